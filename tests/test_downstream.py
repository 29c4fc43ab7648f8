"""The downstream study, from draw to table and figure, and the study on real data: what they compute, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from helpers import assert_refused

import simulations.real_prediction as real_prediction
from figures import downstream as drawing
from figures import real_prediction as real_drawing
from figures.means import mean_table
from hcl_jax import ESTIMATORS, Estimate, Hierarchy
from hcl_jax.experiments import downstream, read_results
from hcl_jax.experiments.downstream import (
    Downstream,
    DownstreamCell,
    DrawSpec,
    draw,
    known_methods,
    split_method,
    unlabelled_rows,
)
from hcl_jax.experiments.methods import estimator
from hcl_jax.fitted import LinearFit
from hcl_jax.prediction import least_squares
from simulations.downstream import PRESETS, main

TINY = ["--dims", "7", "6", "5", "--rank", "1", "--no-progress"]
GRID = ["--n-grid", "60", "90", "--m-grid", "40", "80", "--replicates", "3", "--support", "123", "12"]
METHODS = ["--methods", "hcl-svd+posterior", "hcl-svd+debiased-group", "raw+ridge", "bayes"]
CELL = DownstreamCell(Hierarchy.full((7, 6, 5), 1), 60, 40, 0.1)


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch):
    monkeypatch.setenv("HCL_COMPILATION_CACHE", "0")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("downstream")
    assert main([*TINY, *GRID, *METHODS, "--output", str(folder)]) == 0
    return folder


def test_the_table_is_tidy_and_no_method_beats_the_limit(results):
    table = read_results(results)
    assert {"n", "m", "support", "response_noise_variance", "method", "metric", "value"} <= set(table.columns)
    assert table.group_by("cell", "method").agg(pl.col("replicate").n_unique())["replicate"].unique().to_list() == [3]
    keys = ["cell", "replicate"]
    rmse = table.filter(pl.col("metric") == "rmse")
    paired = rmse.join(rmse.filter(pl.col("method") == "bayes").select(*keys, pl.col("value").alias("limit")), on=keys)
    assert (paired["value"] >= paired["limit"] - 1e-9).all()
    assert (table.filter(pl.col("metric") == "bayes_excess")["value"] >= 0).all()
    selected = table.filter((pl.col("metric") == "selected") & (pl.col("method") == "hcl-svd+debiased-group"))
    assert set(selected["structure"]) == {"123", "12", "13", "23", "1", "2", "3"}


def test_an_added_method_is_paired_with_what_is_there_and_changes_nothing(results, tmp_path):
    arguments = [*TINY, "--n-grid", "60", "--m-grid", "40", "--replicates", "3", "--support", "123", "12"]
    assert main([*arguments, "--methods", "hcl-svd+debiased-group", "--output", str(tmp_path)]) == 0
    key = ["cell", "method", "metric", "structure", "replicate"]
    alone = read_results(tmp_path).sort(key)
    among = read_results(results).filter(pl.col("cell").is_in(alone["cell"]) & pl.col("method").is_in(alone["method"])).sort(key)
    assert alone["value"].to_numpy().tobytes() == among["value"].to_numpy().tobytes()


def test_the_limit_over_itself_is_one_and_there_is_no_ratio_to_an_excess_of_zero(results):
    means = mean_table(read_results(results))
    limit = means.filter(pl.col("method") == "bayes")
    assert set(limit.filter(pl.col("ratio") != 1)["metric"]) == set()
    assert set(limit.filter(pl.col("ratio").is_null())["metric"]) == {"bayes_excess", "excess_risk"}
    assert means.filter(pl.col("metric") == "bayes_excess")["ratio"].null_count() == 4 * len(METHODS[1:])


def test_figures_are_drawn_from_the_table(results, tmp_path):
    figures = dict(drawing.figures(read_results(results)))
    assert {"downstream_prediction_n", "downstream_prediction_m", "downstream_coefficients_m"} <= set(figures)
    panel = figures["downstream_prediction_n"].axes[0]
    lines = {line.get_label(): line.get_ydata() for line in panel.get_lines()}
    assert any("n" in panel.get_xlabel() for panel in figures["downstream_prediction_n"].axes)
    assert lines, "nothing was drawn"


@pytest.fixture(scope="module")
def drawn():
    program = jax.jit(lambda shared, i: draw(DrawSpec.of(CELL, "float64"), shared, i))
    return program(Downstream().shared_arguments(CELL, 0, "float64"), jnp.uint32(1))


def test_rows_and_covariance_are_the_same_draw(drawn):
    views, y = unlabelled_rows(drawn, CELL.n)
    rows = jnp.concatenate(views, axis=1)
    np.testing.assert_allclose(rows.T @ rows / (CELL.n - 1), drawn.covariance.matrix, rtol=1e-8, atol=1e-9)
    residual = y - rows @ drawn.truth.conditional_mean()
    # 60 normal residuals: their variance lies within 60 % of the truth's with probability above 0.999
    assert abs(float(residual.var()) / float(drawn.truth.conditional_variance()) - 1) < 0.6


def test_a_method_may_say_how_noise_differs(monkeypatch):
    told = []
    monkeypatch.setitem(ESTIMATORS, "hcl-vb", lambda covariance, hierarchy, noise="shared": told.append(noise))
    for name in ("hcl-vb@view", "hcl-vb"):
        estimator(name)(None, None)
    assert told == ["view", "shared"]


def test_debiasing_subtracts_the_noise_of_the_scores_with_a_variance_a_feature(drawn):
    seen = {}

    def regress(moments, hierarchy, noise_gram):
        seen["gram"] = noise_gram
        return least_squares(moments)

    for noise in (jnp.linspace(0.1, 2.0, 18), jnp.asarray(0.5)):
        zero = jnp.zeros((), int)
        score_map, _ = downstream._debiased(regress, Estimate(drawn.truth.loadings, noise, zero, zero, jnp.zeros(())), drawn)
        psi = np.diag(np.broadcast_to(noise, 18))
        np.testing.assert_allclose(seen["gram"], np.asarray(score_map).T @ psi @ np.asarray(score_map), rtol=1e-9, atol=1e-12)


def test_every_method_has_stages():
    for method in known_methods():
        representation, _ = split_method(method)
        stages = Downstream().stages(CELL, method, False)
        assert stages[0].name in (representation, f"{representation} (joint)", f"{representation} (tuned)", method)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--m-grid", "4"], ["--m-grid", "at least 10"]),
        (["--n-grid", "1"], ["--n-grid", "at least 2"]),
        (["--support", "124"], ["--support", "unknown structure '124'"]),
        (["--support", "12", "12"], ["--support", "each once"]),
        (["--dims", "7", "6", "5", "--dims", "7", "6", "5"], ["--dims", "each once"]),
        (["--response-noise-variance", "0"], ["--response-noise-variance", "positive"]),
        (["--methods", "hcl-ml"], ["--methods", "unknown 'hcl-ml'", "hcl-ml+posterior"]),
        (["--methods", "jive+debiased"], ["--methods", "jive+debiased"]),
        (["--methods", "jive@view+ridge"], ["--methods", "jive@view+ridge", "hcl-ml or hcl-vb"]),
        (["--methods", "hcl-ml+posterior", "--n-grid", "5"], ["--n-grid", "more than"]),
        (["--metric", "mse"], ["--metric", "rmse"]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_that_names_the_argument(tmp_path, capsys, arguments, words):
    assert_refused(main, ["--preset", "tiny", *arguments], words, tmp_path / "out", capsys)


def test_the_order_of_the_support_does_not_matter():
    one, other = (DownstreamCell(Hierarchy.full((7, 6, 5), 1), 60, 40, 0.1, support=s) for s in (((1, 2), (3,)), ((3,), (1, 2))))
    assert one == other


def test_presets_name_methods_that_exist():
    for preset in PRESETS.values():
        assert set(preset.methods) <= set(known_methods())


@pytest.fixture(scope="module")
def two_classes(tmp_path_factory):
    """Two views of 60 rows that a shared factor tells apart."""
    rng = np.random.default_rng(0)
    label = np.repeat([0, 1], 30)
    z = label + 0.3 * rng.standard_normal(60)
    path = tmp_path_factory.mktemp("data") / "two.npz"
    views = {name: np.outer(z, rng.standard_normal(d)) + 0.5 * rng.standard_normal((60, d)) for name, d in (("a", 6), ("b", 5))}
    np.savez(path, **views, label=label)
    return path


@pytest.fixture
def _two(monkeypatch):
    data = real_prediction.DataSet("two.npz", ("a", "b"), "label", (), joint=1, individual=(1, 1))
    monkeypatch.setitem(real_prediction.DATA, "tcga", data)


@pytest.mark.usefixtures("_two")
def test_real_data_are_split_fitted_and_reported(two_classes, tmp_path, capsys):
    methods = ["hcl-ml", "hcl-ml+group", "jive", "pca", "raw"]
    arguments = ["--data", "tcga", "--file", str(two_classes), "--splits", "2", "--output", str(tmp_path)]
    assert real_prediction.main([*arguments, "--methods", *methods]) == 0
    accuracy = pl.read_parquet(tmp_path / "tcga-accuracy.parquet")
    assert sorted(accuracy["method"].unique()) == sorted(methods)
    assert (accuracy["accuracy"] > 0.7).all()
    shares = pl.read_parquet(tmp_path / "tcga-structures.parquet")
    np.testing.assert_allclose(shares.group_by("method", "split").agg(pl.col("share").sum())["share"], 1)
    strongest = shares.filter(pl.col("method") == "hcl-ml+group").sort("share")["structure"][-1]
    assert strongest == "12"
    assert drawn_files(tmp_path) == ["real_prediction_accuracy.png", "real_prediction_structures.png"]
    assert "accuracy" in capsys.readouterr().out


def drawn_files(folder):
    real_drawing.main(real_drawing.Arguments(results=folder, folder=folder, formats=("png",)))
    return sorted(path.name for path in folder.glob("*.png"))


@pytest.mark.usefixtures("_two")
def test_real_data_are_resumed_and_added_to(two_classes, tmp_path, capsys):
    study = ["--data", "tcga", "--file", str(two_classes), "--methods"]
    parts, whole = [[*study, "pca", "--splits", "2"], [*study, "raw", "--splits", "1"]], [*study, "pca", "raw", "--splits", "3"]
    for arguments in parts:
        assert real_prediction.main([*arguments, "--output", str(tmp_path / "parts")]) == 0
    first = pl.read_parquet(tmp_path / "parts/tcga-accuracy.parquet")
    assert first.height == 3
    for folder in ("parts", "whole"):
        assert real_prediction.main([*whole, "--output", str(tmp_path / folder)]) == 0
    resumed, alone = (pl.read_parquet(tmp_path / folder / "tcga-accuracy.parquet") for folder in ("parts", "whole"))
    assert resumed.head(3).equals(first)  # seconds and all: none was computed again
    assert resumed.drop("seconds").sort("method", "split").equals(alone.drop("seconds").sort("method", "split"))
    assert drawn_files(tmp_path / "parts") == ["real_prediction_accuracy.png"]  # no method has shares of structures
    capsys.readouterr()
    other = tmp_path / "other.npz"
    other.write_bytes(two_classes.read_bytes() + b" ")
    assert real_prediction.main([*whole, "--file", str(other), "--output", str(tmp_path / "parts")]) == 2
    assert "holds file_crc32" in capsys.readouterr().err
    assert real_prediction.main([*whole, "--seed", "1", "--output", str(tmp_path / "parts")]) == 2
    assert "--output" in (said := capsys.readouterr().err)
    assert "holds seed 0; expected 1" in said
    assert pl.read_parquet(tmp_path / "parts/tcga-accuracy.parquet").equals(resumed)


@pytest.mark.usefixtures("_two")
def test_a_death_between_the_two_tables_of_real_data_costs_nothing(two_classes, tmp_path):
    study = ["--file", str(two_classes), "--methods", "hcl-svd", "--output", str(tmp_path), "--splits"]
    accuracy, structures = (tmp_path / f"tcga-{name}.parquet" for name in ("accuracy", "structures"))
    assert real_prediction.main([*study, "1"]) == 0
    first = accuracy.read_bytes()
    assert real_prediction.main([*study, "2"]) == 0
    whole = pl.read_parquet(structures)
    accuracy.write_bytes(first)  # as if the process had died before it wrote the second split's
    assert real_prediction.main([*study, "2"]) == 0
    assert pl.read_parquet(structures).equals(whole)
    assert pl.read_parquet(accuracy)["split"].to_list() == [0, 1]


@pytest.mark.usefixtures("_two")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--file", "absent.npz"], ["--file", "absent.npz"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--splits", "0"], ["--splits", "at least 1"]),
        (["--test-share", "1"], ["--test-share", "between 0 and 1"]),
        (["--methods", "magic"], ["--methods", "magic"]),
    ],
)
def test_bad_real_input_is_one_line(two_classes, tmp_path, capsys, arguments, words):
    assert_refused(real_prediction.main, ["--file", str(two_classes), *arguments], words, tmp_path / "out", capsys)


def overfitted(views, hierarchy, *, y, key):
    """A score that is the response itself on the rows that it is learned from, with more features than rows."""
    X = jnp.concatenate(views, axis=1)
    d = X.shape[1]
    score_map = jnp.linalg.lstsq(X, y)[0][:, None]
    zero, whole = jnp.zeros(()), jnp.zeros((), int)
    ones = jnp.ones((len(views), 1), bool)
    return LinearFit(jnp.zeros(d), jnp.ones(d), score_map, X @ score_map, score_map, ones, zero, whole, whole, hierarchy.dims)


def test_labels_of_noise_are_not_predicted_by_scores_that_learned_them(monkeypatch):
    """In-sample, the penalty's cross-validation would see a score that separates the classes, and find a loss of nearly 0."""
    monkeypatch.setitem(real_prediction.BASELINES, "mmfl", overfitted)
    rng = np.random.default_rng(0)
    views = [jnp.asarray(rng.standard_normal((90, d))) for d in (60, 50)]
    labels = jnp.asarray(rng.permutation(np.arange(90) % 2))
    split = real_prediction.Split(views, views, labels, labels)
    data = real_prediction.DataSet("", ("a", "b"), "label", (), joint=1, individual=(1, 1))
    representations = real_prediction.Representations(data, Hierarchy((60, 50), {(1, 2): 1}), 3)
    fit, scores = real_prediction.classify(representations, "mmfl", split, jax.random.key(0), 2)
    assert abs(np.corrcoef(scores[0][:, 0], labels)[0, 1]) > 0.99
    assert float(fit.held_out) > 0.95 * np.log(2)


def test_differences_are_paired_and_their_errors_corrected():
    values = {"raw": [0.5, 0.7, 0.9], "pca": [0.4, 0.6, 0.8]}
    columns = {"test_share": 0.5, "split": [0, 1, 2] * 2, "method": np.repeat(list(values), 3), "log_loss": 0.1, "dimension": 2}
    accuracy = pl.DataFrame(columns | {"accuracy": np.concatenate(list(values.values())), "seconds": 1.0, "status": 0})
    rows = {row["method"]: row for row in real_prediction.summary(accuracy).iter_rows(named=True)}
    np.testing.assert_allclose([rows["pca"]["difference"], rows["pca"]["difference_error"]], [-0.1, 0], atol=1e-12)
    assert rows["pca"]["error"] == pytest.approx(0.2 * np.sqrt(1 / 3 + 1))
    drawn = real_drawing.corrected_means(accuracy, "accuracy", ["method"])
    assert drawn.filter(pl.col("method") == "pca")["sem"].item() == pytest.approx(rows["pca"]["error"])
    alone = real_prediction.summary(accuracy.filter(pl.col("method") == "pca"))
    assert alone["difference"].null_count() == 1


@pytest.mark.usefixtures("_two")
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros(60, int), ["--file", "'label'", "one class"]),
        (np.repeat(["a", "rare"], [59, 1]), ["--file", "'label'", "one row of class rare", "at least two rows"]),
        (np.arange(59) % 2, ["--file", "shape (59,)", "60 rows"]),
        (np.array([None, 1] * 30), ["--file", "'label'", "cannot be read"]),
        (np.arange(60) // 2, ["--test-share", "18 of 60 rows", "30 classes"]),
    ],
    ids=["one class", "one row", "too few", "objects", "more classes than test rows"],
)
def test_labels_that_cannot_be_split_are_one_line(two_classes, tmp_path, capsys, labels, words):
    with np.load(two_classes) as held:
        views = {name: held[name] for name in ("a", "b")}
    np.savez(tmp_path / "bad.npz", label=labels, **views)
    assert_refused(real_prediction.main, ["--file", str(tmp_path / "bad.npz")], words, tmp_path / "out", capsys)
