"""The recovery study's command line: what it computes, and what it refuses."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from helpers import assert_refused
from scipy.stats import multivariate_normal

from hcl_jax import Hierarchy
from hcl_jax.experiments import read_results
from hcl_jax.real_data import fit_truth, gaussian_log_likelihood, read_truth, truth_bytes
from hcl_jax.views import load_views
from simulations.recovery import PRESETS, main, parse_study

ROOT = Path(__file__).parent.parent
TINY = ["--dims", "5", "4", "4", "--structures", "123:1", "12:1", "3:1", "--n-grid", "50", "--replicates", "3", "--no-progress"]
METHODS = ["--methods", "hcl-svd", "cramer-rao"]


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch):
    monkeypatch.setenv("HCL_COMPILATION_CACHE", "0")


def test_a_study_runs_resumes_and_describes_itself(tmp_path, capsys):
    arguments = [*TINY, *METHODS, "--output", str(tmp_path / "out")]
    assert main([*TINY, "--methods", "naive-svd", "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert "projected: " in capsys.readouterr().out
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "computed 2 parts" in said
    assert "hcl-svd" in said
    assert "±" in said
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["identity"] == {"study": "recovery", "seed": 0, "dtype": "float64", "version": "0.1.0"}
    (run,) = manifest["runs"]
    assert run["command"] == ["recovery.py", *arguments]
    assert run["config"]["n_grid"] == [50]
    assert {"versions", "device"} <= set(run)
    assert main(arguments) == 0
    assert "computed 0 parts in 0.0 s, 0 programs compiled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n-grid", "1"], ["--n-grid", "at least 2"]),
        (["--n-grid", "many"], ["--n-grid", "many"]),
        (["--noise-variance", "-1"], ["--noise-variance", "positive"]),
        (["--dims", "3", "4", "4", "--rank", "1"], ["--rank", "modality 1", "at most its dimension 3"]),
        (["--dims", "0", "4"], ["--dims", "positive integer"]),
        (["--rank", "0"], ["--rank", "positive"]),
        (["--structures", "124:1"], ["--structures", "unknown structure"]),
        (["--metric", "gram"], ["--metric", "gram_relative", "visible_global"]),
        (["--structures", "12:one"], ["--structures", "12:one"]),
        (["--structures", "12", "21"], ["--structures", "each once"]),
        (["--dims", "5", "4", "4", "--dims", "5", "4", "4"], ["--dims", "each once"]),
        (["--batched", "--devices", "2"], ["--devices", "2", "--batched"]),
        (["--methods", "hcl-best@view"], ["--methods", "unknown 'hcl-best'", "hcl-vb"]),
        (["--methods", "hcl-vb@column"], ["--methods", "'hcl-vb@column'", "shared, view, feature"]),
        (["--methods", "hcl-svd@view"], ["--methods", "'hcl-svd@view'", "hcl-ml or hcl-vb"]),
        (["--methods", "hcl-ml@view", "--n-grid", "5"], ["--n-grid", "hcl-ml@view", "more than"]),
        (["--methods", "hcl-best"], ["--methods", "hcl-best", "hcl-vb"]),
        (["--methods", "hcl-ml", "--n-grid", "5"], ["--n-grid", "hcl-ml", "more than"]),
        (["--methods", "hcl-gd-published", "--structures", "123", "1"], ["--methods", "hcl-gd-published"]),
        (["--hierarchies", "wrong"], ["--hierarchies", "missing"]),
        (["--hierarchies", "extra", "--rank", "1", "--structures"], ["--hierarchies", "--structures"]),
        (["--latent", "cauchy"], ["--latent", "rademacher"]),
        (["--replicates", "0"], ["--replicates", "positive"]),
        (["--seed", "-3"], ["--seed"]),
        (["--dtype", "float16"], ["--dtype", "float32"]),
        (["--preset", "huge"], ["--preset", "paper"]),
        (["--unknown"], ["--unknown"]),
        (["--loadings-from", "absent.npz", "--views", "a"], ["--loadings-from", "absent.npz"]),
        (["--views", "a"], ["--views", "--loadings-from"]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_that_names_the_argument(tmp_path, capsys, arguments, words):
    assert_refused(main, ["--preset", "tiny", *arguments], words, tmp_path / "out", capsys)


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert main([*TINY, *METHODS, "--output", str(tmp_path / "taken")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("recovery.py: error: --output: ")
    assert line.count("\n") == 1


def test_another_seed_in_the_same_output_is_refused(tmp_path, capsys):
    arguments = [*TINY, "--methods", "naive-svd", "--output", str(tmp_path)]
    assert main(arguments) == 0
    assert main([*arguments, "--seed", "1"]) == 2
    assert "seed 0 (this run: 1)" in capsys.readouterr().err


def test_single_options_override_the_preset():
    study = parse_study(["--preset", "paper", "--rank", "4", "--dims", "20", "30"])
    assert (study.rank, study.dims, study.n_grid) == (4, ((20, 30),), PRESETS["paper"].n_grid)
    assert parse_study(["--preset", "paper"]).dims == ((100, 100, 100), (100, 500, 800))
    assert parse_study([]).dims == ((100, 100, 100),)
    assert parse_study(["--preset=tiny"]).dims == ((12, 10, 8),)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "--preset paper --dry-run" in said
    assert "--loadings-from" in said


def real_file(folder: Path, n: int = 400) -> Path:
    rng = np.random.default_rng(0)
    z = rng.standard_normal((n, 2))
    a = z @ rng.standard_normal((2, 6)) + 0.5 * rng.standard_normal((n, 6))
    b = z[:, :1] @ rng.standard_normal((1, 5)) + 0.5 * rng.standard_normal((n, 5))
    gap = np.where(np.arange(n)[:, None] == 3, np.nan, b)
    np.savez(folder / "views.npz", a=a, b=b, gap=gap, short=a[:10], flat=a[:, 0], names=np.array(["x"]))
    return folder / "views.npz"


@pytest.mark.slow
def test_a_fit_to_real_data_is_the_truth_of_every_replicate(tmp_path, capsys):
    file = str(real_file(tmp_path))
    output = tmp_path / "out"
    arguments = ["--loadings-from", file, "--views", "a", "b", "--replicates", "2", "--methods", "hcl-svd"]
    assert main([*arguments, "--output", str(output), "--no-progress"]) == 0
    said = capsys.readouterr().out
    assert "held-out log-likelihood" in said
    table = read_results(output)
    assert set(table["n"]) == {400, 1600, 6400}
    assert table["loadings"].unique().str.starts_with("views-a+b-").all()
    assert table.filter(pl.col("metric") == "gram_relative")["value"].max() < 1
    assert main([*arguments, "--output", str(output), "--no-progress"]) == 0
    said = capsys.readouterr().out
    assert "fitting" not in said  # the fit was kept
    assert "computed 0 parts" in said


@pytest.mark.parametrize(
    ("views", "words"),
    [
        (["a", "c"], ["--views", "'c'", "a, b"]),
        (["a", "gap"], ["--views", "'gap'", "NaN"]),
        (["a", "flat"], ["--views", "'flat'", "(400,)"]),
        (["a", "short"], ["--views", "'short'", "400"]),
        (["a", "names"], ["--views", "'names'"]),
        (["a", "a"], ["--views", "each once"]),
    ],
    ids=lambda value: "_".join(value),
)
def test_bad_views_are_one_line(tmp_path, capsys, views, words):
    output = tmp_path / "out"
    assert main(["--loadings-from", str(real_file(tmp_path)), "--views", *views, "--output", str(output)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(word in line for word in words), line
    assert not output.exists()


@pytest.mark.parametrize("kept", [0, 100, -40], ids=["empty", "header", "cut short"])
def test_a_file_that_is_cut_short_is_one_line(tmp_path, capsys, kept):
    whole = real_file(tmp_path).read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole[:kept])
    assert_refused(
        main, ["--loadings-from", str(cut), "--views", "a", "b"], ["--loadings-from", "cut.npz"], tmp_path / "out", capsys
    )


@pytest.mark.slow
def test_a_kept_truth_is_read_back_unchanged(tmp_path):
    views = load_views(real_file(tmp_path), ["a", "b"])
    truth = fit_truth(views, Hierarchy((6, 5), {(1, 2): 1, (1,): 1}))
    assert truth.held_out > truth.held_out_independent
    (tmp_path / "truth.npz").write_bytes(truth_bytes(truth))
    again = read_truth(tmp_path / "truth.npz")
    assert again.loadings.tobytes() == truth.loadings.tobytes()
    assert {name: value for name, value in vars(again).items() if name != "loadings"} == {
        name: value for name, value in vars(truth).items() if name != "loadings"
    }


def test_the_gaussian_likelihood_is_that_of_scipy():
    rng = np.random.default_rng(1)
    loadings, rows = rng.standard_normal((5, 2)), rng.standard_normal((7, 5))
    expected = multivariate_normal(cov=loadings @ loadings.T + 0.3 * np.eye(5)).logpdf(rows).mean()
    found = gaussian_log_likelihood(jnp.asarray(rows), jnp.asarray(loadings), jnp.asarray(0.3))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    psi = np.linspace(0.1, 3, 5)
    expected = multivariate_normal(cov=loadings @ loadings.T + np.diag(psi)).logpdf(rows).mean()
    np.testing.assert_allclose(gaussian_log_likelihood(rows, loadings, psi), expected, rtol=1e-10)
    for wrong in (psi[:2], 0.0, None):  # one value a view is not one a feature
        with pytest.raises(ValueError, match="noise_variance: "):
            gaussian_log_likelihood(rows, loadings, wrong)
    with pytest.raises(ValueError, match=r"rows: has shape \(7, 4\); expected a matrix, any number × 5"):
        gaussian_log_likelihood(rows[:, 1:], loadings, psi)
