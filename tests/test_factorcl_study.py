"""The study of FactorCL: its designs, what its metrics say of codes that are known, its cells, and its command line."""

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from helpers import assert_at_least, assert_refused, assert_within

import factorcl as figures
from hcl_jax import Hierarchy
from hcl_jax.experiments import read_results
from hcl_jax.experiments.factorcl import (
    FACTORCL_METHODS,
    N_TEST,
    Coded,
    CodeSpec,
    DrawSpec,
    FactorclCell,
    code,
    code_metrics,
    contrast_config,
    draw,
)
from simulations.factorcl import main

H = Hierarchy.shared_and_private((50, 50), 10, 10)
NONE = jnp.zeros((), jnp.int32)


def drawn(cell, replicate=0):
    shared = (np.uint32(0), np.uint32(1), jnp.asarray(cell.noise_variance), jnp.asarray(cell.weights))
    return draw(DrawSpec(cell.hierarchy, "float64", cell.n, cell.design), shared, jnp.uint32(replicate))


def metrics(cell, rows, codes, **parts):
    return code_metrics(cell.hierarchy, cell.n, (rows.z, rows.y, Coded(codes, parts, NONE, NONE)))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_the_label_is_the_sign_of_a_sum_of_eight_factors_of_which_a_share_is_unique(share):
    cell = FactorclCell(H, 400, 0.25, share=share)
    weights = dict(zip(H.structures, np.split(np.array(cell.weights), 3), strict=True))
    assert sum(cell.weights) == 8
    assert weights[1,].sum() == weights[2,].sum() == 4 * share
    rows = drawn(cell)
    np.testing.assert_array_equal(rows.y, np.asarray(rows.z @ np.array(cell.weights)) > 0)


def test_the_label_of_products_cannot_be_seen_by_linear_maps_of_the_rows():
    H4 = Hierarchy.shared_and_private((50, 50), 4, 4)
    for share in (0.0, 0.5, 1.0):
        cell = FactorclCell(H4, 4000, 0.04, "product", share)
        rows = drawn(cell)
        assert np.sum(np.square(cell.weights)) == pytest.approx(1)
        unique = np.split(np.array(cell.weights), 3)[1:]
        assert np.sum(np.square(unique)) == pytest.approx(share)
        assert_within(metrics(cell, rows, rows.x)["accuracy"], 0.5, 0.03, "accuracy of the features")  # 4,000 rows: 0.008
        pairs = rows.z.reshape(len(rows.z), -1, 2).prod(axis=2)
        assert_at_least(metrics(cell, rows, pairs)["accuracy"], 0.9, "accuracy of the products")


def test_features_are_near_the_limit_of_bayes_in_a_sum():
    """The angle between the label's argument and its posterior mean says how often their signs agree."""
    cell = FactorclCell(H, 12000, 0.25, share=1.0)
    rows = drawn(cell)
    expected = np.asarray(rows.z @ np.array(cell.weights))
    slope = np.linalg.lstsq(np.asarray(rows.x), expected)[0]
    bayes = 1 - np.arccos(np.corrcoef(rows.x @ slope, expected)[0, 1]) / np.pi
    assert_within(metrics(cell, rows, rows.x)["accuracy"], bayes, 0.02, "accuracy")


def test_codes_hold_what_they_were_made_of():
    cell = FactorclCell(H, 4000, 0.25)
    rows = drawn(cell)
    own = {"12": rows.z[:, H.columns("12")], "1": 0.5 * rows.z[:, H.columns("1")]}
    found = metrics(cell, rows, rows.z, **own)
    np.testing.assert_allclose(found["r_squared"], 1, atol=1e-6)
    np.testing.assert_allclose(found["part_12"], [1, 0, 0], atol=0.06)
    np.testing.assert_allclose(found["part_1"], [0, 1, 0], atol=0.06)
    assert_at_least(found["accuracy"], 0.97, "accuracy of all factors")
    assert np.isnan(found["part_accuracy"][2])  # no part of that name
    assert found["part_accuracy"][0] > found["part_accuracy"][1]


def test_labels_of_some_structures():
    H3 = Hierarchy.full((20, 20, 20), 4)
    cell = FactorclCell(H3, 400, 0.25, label=((3,), (1, 2)))
    assert cell.label == ((1, 2), (3,))
    weights = dict(zip(H3.structures, np.split(np.array(cell.weights), 7), strict=True))
    assert {s: int(w.sum()) for s, w in weights.items() if w.any()} == {(1, 2): 4, (3,): 4}


def test_cells_are_named_by_content():
    cell = FactorclCell(H, 500, 0.25, share=1.0)
    assert cell.name == "design=sum,dims=50x50,rank=10,n=500,noise_variance=0.25,share=1"
    other = FactorclCell(H, 500, 0.25, share=1.0, steps=6000, strength=0.5)
    assert other.draw_name == cell.draw_name  # the same data
    assert other.name == cell.name + ",steps=6000,strength=0.5"


def test_methods_that_count_no_factors_share_their_programs():
    few = FactorclCell(Hierarchy.shared_and_private((50, 50), 4, 4), 500, 0.25, "product")
    many = FactorclCell(H, 500, 0.25)
    assert CodeSpec.of(few, "simclr") == CodeSpec.of(many, "simclr")
    assert CodeSpec.of(few, "hcl") != CodeSpec.of(many, "hcl")
    assert CodeSpec.of(many, "factorcl-sup-shared").hierarchy.structures == ((1, 2),)


def test_every_method_has_a_configuration():
    for method in FACTORCL_METHODS:
        if method not in ("raw", "hcl"):
            config = contrast_config(method, 2, strength=0.3)
            assert config.task_weight == 0
            assert method == "untrained" or config.strength == 0.3
    assert contrast_config("factorcl-sup-no-club", 2).club_weight == 0
    assert contrast_config("factorcl-sup-last", 2).training.keep == "last"


def test_features_are_their_own_codes():
    cell = FactorclCell(H, 400, 0.25)
    rows = drawn(cell)
    np.testing.assert_array_equal(code("raw", CodeSpec.of(cell, "raw"), rows).codes, rows.x)
    assert rows.x.shape == (400 + N_TEST, 100)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--design", "cosine"], ["design", "cosine", "expected"]),
        (["--share", "1.5"], ["share", "1.5", "expected"]),
        (["--design", "sum", "--rank", "10", "--share", "0.3"], ["share", "0.3", "expected"]),
        (["--design", "sum", "--share", "1", "--rank", "3"], ["rank", "3", "expected"]),
        (["--label", "1", "--share", "0"], ["label", "expected"]),
        (["--label", "123", "--share", "0"], ["label", "123", "expected"]),
        (["--methods", "simclr", "pca"], ["methods", "pca", "expected"]),
        (["--n-grid", "5"], ["n-grid", "5", "expected"]),
        (["--training-steps", "0"], ["steps", "0", "expected"]),
        (["--strength", "-1"], ["strength", "-1", "expected"]),
        (["--metric", "rmse"], ["metric", "rmse", "expected"]),
    ],
)
def test_bad_options_are_named(arguments, words, tmp_path, capsys):
    assert_refused(main, ["--preset", "tiny", *arguments], words, tmp_path / "out", capsys)


@pytest.mark.slow
@pytest.mark.long
def test_the_tiny_study_runs_and_is_drawn(tmp_path):
    assert main(["--preset", "tiny", "--output", str(tmp_path), "--no-progress"]) == 0
    table = read_results(tmp_path)
    assert set(table["method"]) == {"factorcl-sup", "factorcl-ssl", "raw", "simclr"}
    names = [name for name, _ in figures.figures(table)]
    assert names[0] == "factorcl_shares"
    assert names[1].startswith("factorcl_parts_product")
    assert main(["--preset", "tiny", "--output", str(tmp_path), "--no-progress"]) == 0  # nothing left to compute


def test_means_are_by_structure_and_differences_paired():
    setting = dict.fromkeys(figures.SETTING, "s") | {"share": 1.0, "metric": "part_12", "structure": "1"}
    values = {"simclr": [0.1, 0.3, 0.2], "factorcl-sup": [0.5, 0.6, 0.7]}
    rows = [
        setting | {"method": method, "replicate": i, "value": value}
        for method, held in values.items()
        for i, value in enumerate(held)
    ]
    found = {row["method"]: row for row in figures.means(pl.DataFrame(rows)).iter_rows(named=True)}
    apart = np.subtract(values["factorcl-sup"], values["simclr"])
    ours = found["factorcl-sup"]
    assert ours["difference"] == pytest.approx(apart.mean(), rel=1e-4)
    assert ours["difference_sem"] == pytest.approx(apart.std(ddof=1) / np.sqrt(3), rel=1e-4)
    assert (ours["least"], ours["largest"], ours["replicates"]) == (0.5, 0.7, 3)
    assert found["simclr"]["difference"] == 0
