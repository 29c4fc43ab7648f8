"""Files of multimodal benchmarks: fields, series, and what is refused."""

import numpy as np
import pytest

from hcl_jax.benchmark_files import FIELDS, load_benchmark

RNG = np.random.default_rng(0)


def arrays(benchmark, rows=(6, 3), steps=4):
    held = {}
    for split, n in zip(("train", "test"), rows, strict=True):
        for width, field in enumerate(FIELDS[benchmark], start=2):
            held[f"{split}_{field}"] = RNG.standard_normal((n, steps, width))
        held[f"{split}_labels"] = np.arange(n)[:, None, None]
    return held


@pytest.mark.parametrize("benchmark", FIELDS)
@pytest.mark.parametrize("pool", ["flatten", "mean"])
def test_every_benchmark_by_split_and_modality(benchmark, pool, tmp_path):
    held = arrays(benchmark)
    np.savez(tmp_path / "data.npz", **held)
    found = load_benchmark(tmp_path / "data.npz", benchmark, pool)
    assert list(found) == ["train", "test"]
    assert tuple(found["test"].views) == FIELDS[benchmark]
    np.testing.assert_array_equal(found["train"].labels, np.arange(6))
    for field, view in found["train"].views.items():
        series = held[f"train_{field}"]
        np.testing.assert_array_equal(view, series.mean(axis=1) if pool == "mean" else series.reshape(6, -1))


def test_entries_that_are_not_finite_are_counted(tmp_path):
    held = arrays("mosi")
    held["train_audio"][0, 0, 0] = -np.inf
    held["train_text"] = held["train_text"][:, 0]
    np.savez(tmp_path / "data.npz", **held)
    found = load_benchmark(tmp_path / "data.npz", "mosi")["train"]
    assert found.n_replaced == 1
    assert found.views["audio"][0, 0] == 0
    np.testing.assert_array_equal(found.views["text"], held["train_text"])


def test_refusals(tmp_path):
    path = tmp_path / "data.npz"
    with pytest.raises(ValueError, match=r"benchmark: unknown 'imagenet'; expected"):
        load_benchmark(path, "imagenet")
    with pytest.raises(ValueError, match=r"path: no file .*expected"):
        load_benchmark(path, "mosi")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"path: .*cannot be read.*expected"):
        load_benchmark(path, "mosi")
    for change, words in (
        ({"train_audio": None}, r"lacks train_audio; expected"),
        ({"train_audio": np.zeros((5, 3))}, r"train_audio has 5 rows; expected 6"),
        ({"train_audio": np.zeros(6)}, r"train_audio has shape \(6,\).*expected"),
        ({"train_audio": np.full((6, 2), "a")}, r"train_audio has shape .*expected"),
        ({"train_labels": np.zeros((6, 2))}, r"train_labels has shape \(6, 2\); expected"),
        ({name: None for name in arrays("mosi") if name.startswith("train")}, r"no field train_vision; expected"),
    ):
        np.savez(path, **{name: value for name, value in (arrays("mosi") | change).items() if value is not None})
        with pytest.raises(ValueError, match=words):
            load_benchmark(path, "mosi")
