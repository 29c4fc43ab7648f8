"""The study of health records: from the demo's tables to a table of methods, gone on from where it was."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import PLACES

from simulations.health_records import Part, Study, class_metrics, events_of, inputs_of, main, number_metrics, summary

pytest.importorskip("meds")
EICU = Path(os.environ.get("HCL_DATA", PLACES["HCL_DATA"])) / "eicu_demo/csv"


@pytest.mark.slow
@pytest.mark.skipif(not EICU.exists(), reason="eicu_demo/csv is not in HCL_DATA")
def test_the_demo_from_tables_to_scores(tmp_path, capsys):
    """Logistic regression on everything beats demographics, and stays of eICU's demo are told by about .8 (two splits; splits of
    their size vary by .03)."""
    asked = ["--folder", str(EICU), "--preset", "tiny", "--output", str(tmp_path)]
    assert main([*asked, "--methods", "raw", "demographics"]) == 0
    first = pl.read_parquet(tmp_path / "scores.parquet")
    assert main([*asked, "--methods", "raw", "demographics", "hcl-vb"]) == 0
    whole = pl.read_parquet(tmp_path / "scores.parquet")
    assert whole.head(len(first)).equals(first)  # not computed again
    means = dict(whole.filter(pl.col("metric") == "auc").group_by("method").agg(pl.col("value").mean()).iter_rows())
    assert means["raw"] > 0.72
    assert means["raw"] > means["demographics"]
    assert means["hcl-vb"] > means["demographics"] - 0.02
    assert "mortality-hospital" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--folder", "/nowhere"], "--folder: /nowhere does not exist; expected the tables"),
        (["--folder", ".", "--tasks", "survival"], "--tasks: holds 'survival'; expected some of mortality-hospital, "),
        (["--folder", ".", "--methods", "mofa"], "--methods: holds 'mofa'; expected some of hcl-vb, "),
        (["--folder", ".", "--splits", "0"], "--splits: is 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_thresholds_come_from_the_tuning_rows():
    """A threshold that only the test rows would suggest is not used."""
    tuning_y, tuning_p = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.6, 0.7])
    y, p = np.array([0, 1, 1, 0]), np.array([0.3, 0.5, 0.65, 0.1])
    found = class_metrics(p, y, tuning_p, tuning_y)
    assert found["auc"] == 1
    assert found["accuracy"] == 0.75  # .5 is below .6
    assert found["f1"] == pytest.approx(2 / 3)
    assert number_metrics(np.log1p([1.0, 3.0]), np.log1p([1.0, 5.0]), 0.0)["mae"] == pytest.approx(1)


def test_rows_without_a_modality_count_for_the_others():
    """The mean of the training rows stands in for them only where a method needs one."""
    generator = np.random.default_rng(0)
    views = {name: generator.normal(size=(20, 3)) for name in ("codes", "measurements", "text")}
    views["text"][:5] = np.nan
    part = Part(views, np.ones((20, 1)), generator.normal(size=20), np.zeros((20, 30)))
    assert not np.isnan(part.features).any()
    assert (part.features[:5, 6:] == 0).all()
    inputs, status = inputs_of("raw", {"train": part}, None, 0)
    assert status == 0
    assert inputs["train"].shape == (20, 31)  # every column, and demographics


def test_differences_are_paired():
    """A method that is .1 above raw in every split is .1 above, without error, however much splits differ."""
    rows = [
        {"task": "t", "split": i, "method": method, "metric": "auc", "value": value, "status": int(i == 0)}
        for i, base in enumerate((0.5, 0.7, 0.9))
        for method, value in (("raw", base), ("hcl-vb", base + 0.1))
    ]
    row = summary(pl.DataFrame(rows)).filter(pl.col("method") == "hcl-vb").row(0, named=True)
    assert row["above_raw"] == pytest.approx(0.1)
    assert row["difference_error"] == pytest.approx(0, abs=1e-12)
    assert row["standard_error"] > 0.1
    assert row["not_converged"] == 1


def test_an_output_folder_holds_one_source(tmp_path):
    """Other tables into the same folder would be called what the first ones were."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    study = Study(tmp_path / "first", data="meds", output=tmp_path / "out")
    assert events_of(study) == events_of(study) == tmp_path / "first"
    with pytest.raises(ValueError, match="output: .*out holds meds of .*first; expected another folder"):
        events_of(replace(study, folder=tmp_path / "second"))
