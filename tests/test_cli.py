"""The command `hcl`: files in, files out, errors in one line and nothing half written."""

import numpy as np
import polars as pl
import pytest
from test_decomposition import drawn

from hcl_jax.cli import COMMANDS, main
from hcl_jax.decomposition import fit, load
from hcl_jax.outcomes import survival


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file a view, of which one lacks patients, and two outcomes; the fit to them."""
    folder = tmp_path_factory.mktemp("views")
    frames, number, group = drawn()
    for name, frame in frames.items():
        rows = frame.iloc[20:] if name == "meth" else frame
        table = pl.DataFrame({"patient": list(rows.index)} | {column: rows[column].to_numpy() for column in rows})
        table.write_csv(folder / f"{name}.csv")
    pl.DataFrame({"patient": list(number.index), "pressure": number.to_numpy(), "group": list(group)}).write_csv(folder / "y.csv")
    return folder


def views(folder):
    return [str(folder / f"{name}.csv") for name in ("rna", "meth", "mirna")]


@pytest.fixture(scope="module")
def fitted(files):
    saved = files / "fit.npz"
    arguments = [*views(files), "--outcome", str(files / "y.csv"), "--column", "group", "--output", str(saved)]
    assert main(["fit", *arguments, "--structures", "rna+meth+mirna", "rna+meth", "--rank", "1"]) == 0
    return saved


def test_check_says_what_the_data_are(files, capsys):
    assert main(["check", *views(files)]) == 0
    said = capsys.readouterr().out
    assert "rna: 120 samples, 9 features" in said
    assert "meth: 100 samples, 8 features" in said
    assert "120 samples in all, 100 with all views" in said


def test_a_fit_from_files_is_that_of_the_same_frames(files, fitted):
    frames, _, group = drawn()
    frames = frames | {"meth": frames["meth"].iloc[20:]}
    expected = fit(frames, y=group, structures=["rna+meth+mirna", "rna+meth"], ranks=1)
    got = load(fitted)
    np.testing.assert_allclose(got.reading.loadings, expected.reading.loadings, rtol=1e-6, atol=1e-8)
    assert got.outcome_name == "y"


def test_what_is_saved_is_shown(fitted, capsys):
    assert main(["show", str(fitted), "--top", "2"]) == 0
    said = capsys.readouterr().out
    assert "hcl-vb on 120 samples of rna, meth, mirna" in said
    assert "features of rna+meth" in said
    assert "residual" in said


def test_scores_predictions_and_completed_views_of_new_samples(files, fitted, tmp_path):
    new = [str(files / "rna.csv"), str(files / "mirna.csv")]
    scores, predictions, completed = (tmp_path / name for name in ("scores.parquet", "predictions.csv", "meth.tsv"))
    assert main(["transform", str(fitted), *new, "--output", str(scores)]) == 0
    table = pl.read_parquet(scores)
    assert table.columns == ["sample", "rna+meth+mirna:1", "rna+meth:1"]
    assert table["sample"][3] == "patient 3"
    assert main(["predict", str(fitted), *new, "--output", str(predictions)]) == 0
    predicted = pl.read_csv(predictions)
    assert predicted.columns == ["sample", "y", "probability of high", "probability of low"]
    assert main(["impute", str(fitted), "meth", *new, "--output", str(completed)]) == 0
    assert pl.read_csv(completed, separator="\t").shape == (120, 9)
    assert (pl.read_csv(tmp_path / "meth-sd.tsv", separator="\t")["meth0"] > 0).all()


def test_survival_times_and_subjects_are_columns_of_the_outcomes(files, tmp_path):
    frames, number, _ = drawn()
    held = {"patient": list(number.index), "months": np.exp(-number.to_numpy()), "died": [1, 0, 1] * 40, "who": list("abcd") * 30}
    table, saved, output = tmp_path / "clinic.csv", tmp_path / "fit.npz", tmp_path / "predictions.csv"
    pl.DataFrame(held).write_csv(table)
    options = [
        "--outcome",
        str(table),
        "--column",
        "months",
        "--output",
        str(saved),
        "--structures",
        "rna+meth+mirna",
        "--rank",
        "1",
    ]
    assert main(["fit", *views(files), *options, "--event", "died"]) == 0
    frames = frames | {"meth": frames["meth"].iloc[20:]}
    y = survival(held["months"], held["died"])
    expected = fit(frames, y=y, structures=["rna+meth+mirna"], ranks=1)
    assert main(["predict", str(saved), *views(files), "--output", str(output)]) == 0
    predicted = pl.read_csv(output)
    assert predicted.columns == ["sample", "log hazard ratio"]
    np.testing.assert_allclose(predicted["log hazard ratio"], expected.predict(frames), rtol=1e-5, atol=1e-7)
    assert main(["fit", *views(files), *options, "--subject", "who"]) == 0
    assert load(saved).head.kind == "repeated"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "nowhere.npz"], "no file nowhere.npz"),
        (["fit", "VIEWS", "--output", "nowhere/fit.npz"], "output: the folder nowhere does not exist"),
        (["fit", "VIEWS", "--method", "pca"], "method: is 'pca'"),
        (["fit", "VIEWS", "--outcome", "y.csv"], "outcome: y.csv cannot be read"),
        (["fit", "VIEWS", "--outcome", "OUTCOME"], "column: is not given"),
        (["fit", "VIEWS", "--outcome", "OUTCOME", "--column", "age"], "column: is 'age'; expected one of pressure, group"),
        (["fit", "VIEWS", "--outcome", "y.txt"], "outcome: is y.txt; expected a file that ends in .csv, .tsv, .parquet"),
        (["fit", "VIEWS", "--event", "died"], "event: is given without a file; expected --outcome"),
        (["fit", "VIEWS", "--outcome", "OUTCOME", "--event", "a", "--subject", "b"], "event: is given, and subject too"),
        (["fit", "VIEWS", "--outcome", "OUTCOME", "--event", "group"], "time: holds -"),
        (["transform", "FIT", "VIEWS", "--output", "scores.xlsx"], "output: is scores.xlsx; expected a name that ends in"),
        (["impute", "FIT", "protein", "VIEWS"], "view: is 'protein'; expected one of rna, meth, mirna"),
        (["check"], "files: none given"),
    ],
)
def test_errors_are_one_line(arguments, said, files, fitted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    meant = {"VIEWS": views(files), "FIT": [str(fitted)], "OUTCOME": [str(files / "y.csv")]}
    assert main([part for argument in arguments for part in meant.get(argument, [argument])]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert COMMANDS[command].__doc__.split(",")[0].split(":")[0] in " ".join(capsys.readouterr().out.split())
