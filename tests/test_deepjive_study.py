"""The study of DeepJIVE: its command line, its metrics on a method that is right by construction, its figures."""

import numpy as np
import polars as pl
import pytest
import sklearn.metrics
from helpers import assert_at_least, assert_refused

from figures import deepjive as figures
from simulations import deepjive as study


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--setting", "spheres"], ["setting", "spheres", "expected"]),
        (["--methods", "pca"], ["methods", "pca", "expected"]),
        (["--n", "3"], ["n", "3", "expected"]),
        (["--setting", "volumes"], ["file", "expected"]),
        (["--setting", "volumes", "--file", "missing.npz"], ["file", "missing.npz", "expected"]),
    ],
)
def test_bad_command_lines_end_in_one_line(arguments, words, tmp_path, capsys):
    assert_refused(study.main, arguments, words, tmp_path / "out", capsys)


def test_metrics_of_scores_that_are_the_factors():
    rng = np.random.default_rng(0)
    shared, own = rng.standard_normal((200, 1)), rng.standard_normal((200, 2))
    case = study.Case(
        [], 150, study.Hierarchy((3, 3), {"12": 1, "1": 2}), study.DeepjiveConfig(), {}, {(1, 2): shared, (1,): own}
    )
    found = study.signal_metrics({(1, 2): 3 * shared + 1, (1,): own @ [[1.0, 2.0], [0.0, 1.0]]}, case, 150)
    assert found["r2 12"] == pytest.approx(1)
    assert found["r2 1"] == pytest.approx(1)
    assert found["degrees to truth"] == pytest.approx(0, abs=1e-4)  # an angle from a cosine has half of the digits
    assert found["r2 12 elsewhere"] < 0.1
    classes = (shared[:, 0] > 0).astype(int)
    told = study.class_metrics(shared, classes, 150)
    assert_at_least(told["svm accuracy"], 0.9, "accuracy of classes that the scores are")
    assert told["svm f1 low"] <= told["svm f1"] <= told["svm f1 high"]


def test_judgements_of_two_classes_are_those_of_scikit_learn():
    rng = np.random.default_rng(1)
    truth, said = rng.integers(0, 2, (2, 40))
    found = study.judged(truth, said)
    for name, score in (
        ("accuracy", "accuracy_score"),
        ("precision", "precision_score"),
        ("recall", "recall_score"),
        ("f1", "f1_score"),
    ):
        assert found[name] == pytest.approx(getattr(sklearn.metrics, score)(truth, said), rel=1e-12)
    assert study.judged(truth, 0 * said)["precision"] == 0


def test_ranks_move_from_individual_to_joint():
    hierarchy = study.Hierarchy((9, 9), {"12": 2, "1": 3, "2": 2})
    assert dict(study.with_offset(hierarchy, 2).ranks) == {(1, 2): 4, (1,): 1, (2,): 1}
    assert dict(study.with_offset(hierarchy, -2).ranks) == {(1,): 5, (2,): 4}
    assert study.with_offset(hierarchy, -3) is None


def test_one_s_own_volumes_are_read(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "volumes.npz"
    np.savez(path, mri=rng.random((12, 8, 8, 8)), pet=rng.random((12, 8, 8, 8)), group=np.arange(12) % 2)
    case = study.own_volumes(path, 0)
    assert [view.shape for view in case.views] == [(12, 512)] * 2
    assert case.config.shapes == ((8, 8, 8),) * 2
    assert sorted(case.classes) == [0] * 6 + [1] * 6
    np.savez(path, mri=rng.random((12, 8, 8, 8)), pet=rng.random((12, 8, 8, 6)), group=np.arange(12) % 2)
    with pytest.raises(ValueError, match=r"file.*expected"):
        study.own_volumes(path, 0)


@pytest.mark.slow
def test_figures_are_drawn_of_tables_and_pictures_alone(tmp_path):
    about = {"setting": "digits", "n": 0, "offset": 0, "steps": 0, "status": 0}
    rows = [
        about | {"seed": seed, "method": method, "metric": metric, "value": 0.1 * seed}
        for seed in (0, 1)
        for method in ("explicit", "separate")
        for metric in ("accuracy all", "correlation", "seconds")
    ]
    pl.DataFrame(rows).write_parquet(tmp_path / "deepjive.parquet")
    images = {
        f"{name} {m}": np.random.default_rng(0).random((5, 4, 4))
        for name in ("view", "joint", "individual", "walk")
        for m in (1, 2)
    }
    np.savez(tmp_path / "digits-explicit.npz", **images)
    volumes = {name: np.random.default_rng(0).random((5, 4, 4, 4)) for name in images}
    np.savez(tmp_path / "phantom-explicit.npz", **volumes)
    drawn = dict(figures.figures(tmp_path))
    assert set(drawn) == {"deepjive_metrics"} | {
        f"deepjive_{kind}_{name}-explicit" for kind in ("parts", "walk") for name in ("digits", "phantom")
    }
    shown = [panel for panel in drawn["deepjive_metrics"].axes if panel.axison]
    assert len(shown) == 2  # seconds are no claim
    words = [text.get_text() for text in drawn["deepjive_parts_digits-explicit"].findobj() if hasattr(text, "get_text")]
    assert any("MNIST" in word and "CC BY-SA" in word for word in words)


@pytest.mark.slow
@pytest.mark.long
def test_tiny_study_runs_and_adds_what_is_missing(tmp_path):
    arguments = ["--preset", "tiny", "--setting", "blocks", "--output", str(tmp_path)]
    assert study.main([*arguments, "--methods", "explicit"]) == 0
    first = pl.read_parquet(tmp_path / "deepjive.parquet")
    assert study.main([*arguments, "--methods", "explicit", "ajive"]) == 0
    second = pl.read_parquet(tmp_path / "deepjive.parquet")
    assert second.filter(pl.col("method") == "explicit").equals(first)
    assert set(second["method"]) == {"explicit", "ajive"}
