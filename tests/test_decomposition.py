"""The front door: from an analyst's own views to structures, scores, predictions, and back from a file."""

import dataclasses
import json
import re
from functools import cache

import numpy as np
import pandas as pd
import polars as pl
import pytest
from test_compilation import compilations

from hcl_jax.covariance import SampleCovariance
from hcl_jax.decomposition import Decomposition, fit, load
from hcl_jax.estimators import ESTIMATORS
from hcl_jax.fisher import noise_by_feature
from hcl_jax.fitted import fit_estimator
from hcl_jax.intervals import feature_share_intervals
from hcl_jax.structure import Hierarchy
from hcl_jax.views import as_views

HIERARCHY = Hierarchy((9, 8, 7), {(1, 2, 3): 2, (1, 2): 1, (3,): 1})
RANKS = {"rna+meth+mirna": 2, "rna+meth": 1, "mirna": 1}
N = 120


@cache
def drawn(n: int = N) -> tuple[dict[str, pd.DataFrame], pd.Series, pd.Series]:
    """(three named views of patients, a number that the first shared factor says, two classes)."""
    generator = np.random.default_rng(3)
    z = generator.normal(size=(n, HIERARCHY.n_factors))
    X = z @ (generator.normal(size=(24, 4)) * HIERARCHY.mask).T + 0.5 * generator.normal(size=(n, 24))
    samples = [f"patient {i}" for i in range(n)]
    frames = {}
    for m, name in enumerate(("rna", "meth", "mirna"), start=1):
        block = 3 + 10.0**m * X[:, HIERARCHY.rows(m)]
        frames[name] = pd.DataFrame(block, index=samples, columns=[f"{name}{j}" for j in range(block.shape[1])])
    number = pd.Series(z[:, 0] + 0.1 * generator.normal(size=n), index=samples, name="pressure")
    return frames, number, pd.Series(np.where(z[:, 0] > 0, "high", "low"), index=samples, name="group")


@cache
def decomposed() -> Decomposition:
    frames, number, _ = drawn()
    return fit(frames, y=number, ranks=RANKS)


def test_it_is_the_estimator_of_the_named_structures():
    frames, _, _ = drawn()
    expected = fit_estimator([frame.to_numpy() for frame in frames.values()], HIERARCHY, "hcl-vb", noise="view")
    got = decomposed()
    np.testing.assert_array_equal(np.asarray(got.fitted.loadings), np.asarray(expected.loadings))
    assert list(got.structures["structure"]) == list(RANKS)
    assert list(got.structures["rank"]) == [2, 1, 1]
    assert got.score_names == ("rna+meth+mirna:1", "rna+meth+mirna:2", "rna+meth:1", "mirna:1")


def test_the_ranks_that_data_support_are_found():
    frames, _, _ = drawn()
    found = fit(frames)
    assert dict(zip(found.structures["structure"], found.structures["rank"], strict=True)) == RANKS


def test_frames_come_back_as_they_came_with_their_names():
    frames, _, _ = drawn()
    scores = decomposed().transform({name: frame.iloc[5:9] for name, frame in frames.items()})
    assert isinstance(scores, pd.DataFrame)
    assert list(scores.index) == [f"patient {i}" for i in range(5, 9)]
    in_polars = {name: pl.DataFrame({"patient": list(f.index)} | {c: f[c].to_numpy() for c in f}) for name, f in frames.items()}
    other = fit(in_polars, ranks=RANKS)
    assert other.scores().columns == ["sample", *decomposed().score_names]
    np.testing.assert_allclose(other.scores().drop("sample").to_numpy(), decomposed().scores().to_numpy(), rtol=1e-12, atol=1e-12)


def test_the_score_of_a_row_depends_on_that_row_alone_and_features_are_found_by_name():
    frames, _, _ = drawn()
    whole = decomposed().scores()
    one = decomposed().transform({name: frame.iloc[[7], ::-1] for name, frame in reversed(frames.items())})
    np.testing.assert_allclose(one.to_numpy()[0], whole.to_numpy()[7], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["hcl-vb", "hcl-svd", "jive", "slide", "hcl-copula"])
@pytest.mark.parametrize("new", [False, True])
def test_shares_of_variance_add_up(method, new):
    """To 1 − ‖x − x̂‖²/‖x‖², for whatever method: the identity is exact, so only rounding is left."""
    frames, _, _ = drawn()
    got = decomposed() if method == "hcl-vb" else fit(frames, ranks=RANKS, method=method)
    data = {name: frame.iloc[:40] + 5 for name, frame in frames.items()} if new else frames
    table = pl.DataFrame(got.variance_explained(data if new else None).to_dict(orient="list"))
    Z = as_views(data).standardised(got.reading.centre, got.reading.scale)
    reconstructed = (got.transform(data).to_numpy() - got.reading.score_means) @ got.reading.loadings.T
    for m, view in enumerate(got.view_names, start=1):
        rows, of = got.hierarchy.rows(m), table.filter(pl.col("view") == view)
        share = dict(zip(of["structure"], of["share"], strict=True))
        left = np.sum((Z[:, rows] - reconstructed[:, rows]) ** 2) / np.sum(Z[:, rows] ** 2)
        assert abs(share["total"] - (1 - left)) < 1e-9
        assert share["total"] <= 1
        assert abs(sum(value for name, value in share.items() if name not in ("total", "residual")) - share["total"]) < 1e-9
        assert abs(share["total"] + share["residual"] - 1) < 1e-9
        assert (of["low"] <= of["share"] + 1e-9).all()
        assert (of["high"] >= of["share"] - 1e-9).all()


def test_the_outcome_is_predicted_for_samples_that_were_not_seen():
    frames, number, group = drawn()
    first = {name: frame.iloc[:80] for name, frame in frames.items()}
    rest = {name: frame.iloc[80:] for name, frame in frames.items()}
    fitted = fit(first, y=number, ranks=RANKS)
    error = np.mean((fitted.predict(rest) - number.to_numpy()[80:]) ** 2) / number.var()
    assert error < 0.1  # the factor is seen through 24 features; what is left is its noise
    classes = fit(first, y=group, ranks=RANKS)
    assert np.mean(classes.predict(rest) == group.to_numpy()[80:]) > 0.85
    probabilities = classes.predict_probabilities(rest)
    assert list(probabilities.columns) == ["high", "low"]
    np.testing.assert_allclose(probabilities.to_numpy().sum(axis=1), 1, rtol=1e-6)


def test_one_matrix_is_divided_as_it_was():
    frames, _, _ = drawn()
    whole = np.concatenate([frame.to_numpy() for frame in frames.values()], axis=1)
    fitted = fit(whole, views=[9, 8, 7], ranks={"123": 2, "12": 1, "3": 1})
    assert fitted.view_names == ("view 1", "view 2", "view 3")
    np.testing.assert_allclose(fitted.transform(whole[:5]).to_numpy(), fitted.scores().to_numpy()[:5], rtol=1e-10, atol=1e-12)


def test_outcomes_by_number_meet_names_of_text():
    frames, number, _ = drawn()
    named = {name: frame.set_axis([str(i) for i in range(N)]) for name, frame in frames.items()}
    by_number = fit(named, y=dict(zip(range(N), number, strict=True)), ranks=RANKS)
    np.testing.assert_allclose(by_number.head.coefficients, decomposed().head.coefficients, rtol=1e-10)


def test_samples_without_an_outcome_count_for_the_structures():
    frames, number, _ = drawn()
    fitted = fit(frames, y=number.iloc[:60], ranks=RANKS)
    np.testing.assert_array_equal(np.asarray(fitted.fitted.loadings), np.asarray(decomposed().fitted.loadings))
    assert fitted.outcome.known.sum() == 60


def test_a_view_that_samples_lack_is_predicted():
    frames, _, _ = drawn()
    new = {name: frame.iloc[:30] for name, frame in frames.items()}
    del new["meth"]
    values, deviations = decomposed().impute("meth", new)
    truth = frames["meth"].iloc[:30]
    assert list(values.columns) == list(truth.columns)
    standard = (values - truth) / deviations
    assert 0.5 < float((standard**2).to_numpy().mean()) < 2
    assert decomposed().transform(new).shape == (30, 4)
    known, none = decomposed().impute("rna", new)
    pd.testing.assert_frame_equal(known, frames["rna"].iloc[:30], rtol=1e-12)
    assert (none.to_numpy() == 0).all()


def test_scores_say_what_the_views_are():
    frames, _, _ = drawn()
    back = decomposed().inverse_transform(decomposed().scores())
    for name, frame in frames.items():
        left = ((back[name].to_numpy() - frame.to_numpy()) ** 2).sum() / ((frame - frame.mean()) ** 2).to_numpy().sum()
        assert left < 0.4
        assert list(back[name].columns) == list(frame.columns)


def test_top_features_are_those_that_the_structure_explains():
    table = decomposed().top_features("rna+meth", 3)
    assert list(table["view"]) == ["rna"] * 3 + ["meth"] * 3
    loadings = decomposed().loadings("meth").set_index("feature")["rna+meth:1"]
    best = loadings.abs().sort_values(ascending=False).index[:3]
    assert list(table["feature"][3:]) == list(best)
    assert table["share"].between(0, 1).all()


def test_shares_of_features_have_bounds_where_the_method_has_intervals(tmp_path):
    """Those of the maximum of the likelihood, which is that of hcl-ml, mapped to names; wider where samples are fewer."""
    frames, _, _ = drawn()
    got = fit(frames, ranks=RANKS, method="hcl-ml")
    table = got.top_features("rna+meth", 3, level=0.9)
    pd.testing.assert_frame_equal(table.drop(columns=["low", "high"]), got.top_features("rna+meth", 3))
    assert (table["low"] < table["share"]).all()
    assert (table["share"] < table["high"]).all()
    assert (got.top_features("rna+meth", 3, level=0.5)["low"] > table["low"]).all()
    Z = np.concatenate([(f - f.mean()) / f.std() for f in frames.values()], axis=1)
    covariance = SampleCovariance.from_data(Z)
    names = [name for frame in frames.values() for name in frame]
    estimate = ESTIMATORS["hcl-ml"](covariance, HIERARCHY, noise="view")
    features = np.array([names.index(name) for name in table["feature"]])
    by_feature = dataclasses.replace(
        estimate, noise="feature", noise_variance=noise_by_feature(estimate.noise_variance, 24)
    )  # standardised features differ in it
    direct = feature_share_intervals(by_feature, covariance, HIERARCHY, "12", features, 0.9)
    np.testing.assert_allclose(table[["low", "high"]].to_numpy(), np.stack([direct.lower, direct.upper], axis=1), rtol=1e-3)
    got.save(tmp_path / "fit.npz")
    for other, said in (
        (load(tmp_path / "fit.npz"), "a file does not hold the data"),
        (spectral(), "hcl-svd has none, as it does not"),
    ):
        assert said in other.without_intervals
        with pytest.raises(ValueError, match=f"level: is 0.9, and there are no intervals; {said}"):
            other.top_features("rna+meth", level=0.9)
    lacking = fit(frames | {"meth": frames["meth"].iloc[20:]}, ranks=RANKS)
    assert lacking.without_intervals == "they need samples that lack nothing"


def spectral() -> Decomposition:
    return fit(drawn()[0], ranks=RANKS, method="hcl-svd")


@pytest.mark.parametrize("method", ["hcl-vb", "jive", "hcl-copula"])
def test_a_saved_decomposition_is_the_same(method, tmp_path):
    frames, number, group = drawn()
    first = fit(frames, y=group, ranks=RANKS, method=method)
    first.save(tmp_path / "fit.npz")
    again = load(tmp_path / "fit.npz")
    new = {name: frame.iloc[:11] + 0.1 for name, frame in frames.items()}
    np.testing.assert_array_equal(first.transform(new).to_numpy(), again.transform(new).to_numpy())
    np.testing.assert_array_equal(first.predict(new), again.predict(new))
    pd.testing.assert_frame_equal(first.structures, again.structures)
    pd.testing.assert_frame_equal(first.variance_explained(), again.variance_explained())
    assert again.settings == first.settings
    again.save(tmp_path / "again.npz")
    one, other = (np.load(tmp_path / f"{name}.npz", allow_pickle=False) for name in ("fit", "again"))
    assert one.files == other.files
    assert all(one[name].tobytes() == other[name].tobytes() and one[name].dtype == other[name].dtype for name in one.files)
    with pytest.raises(ValueError, match="data: are not kept in a file"):
        again.scores()


def test_files_of_other_kinds_are_refused_in_words(tmp_path):
    decomposed().save(tmp_path / "fit.npz")
    with np.load(tmp_path / "fit.npz") as file:
        held = dict(file)
    described = json.loads(str(held["description"]))
    np.savez(tmp_path / "later.npz", **held | {"description": json.dumps(described | {"format": 99, "version": "9.1"})})
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    del held["fitted.loadings"]
    np.savez(tmp_path / "part.npz", **held)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "fit.npz").read_bytes()[:200])
    for name, said in (
        ("later", "format 99, of hcl_jax 9.1; expected at most 1"),
        ("other", "cannot be read"),
        ("part", "is incomplete"),
        ("cut", "cannot be read"),
        ("absent", "no file"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            load(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="path: the folder"):
        decomposed().save(tmp_path / "nowhere" / "fit.npz")


def test_cross_validation_fits_everything_again():
    frames, number, _ = drawn()
    seen = decomposed().evaluate(3)
    held = {(row["method"], row["metric"]): row for row in seen.outcome.iter_rows(named=True)}
    assert held["hcl_jax", "r_squared"]["mean"] > 0.85
    assert len(held["hcl_jax", "r_squared"]["folds"]) == 3
    assert {method for method, _ in held} == {"hcl_jax", "pca", "features"}
    assert seen.structures["structure"][0] == "rna+meth+mirna"
    assert len(seen.predictions) == N
    assert (seen.views["hcl_jax"] > 0.3).all()
    assert (seen.views["ridge"] > 0.3).all()


BAD = [
    ({"method": "pca"}, "method: is 'pca'; expected 'hcl-vb', "),
    ({"noise": "rows"}, "noise: is 'rows'; expected '"),
    ({"missing": "drop"}, "missing: is 'drop'; expected 'model', 'impute-cells' or 'complete'"),
    ({"seed": -1}, "seed: is -1"),
    ({"structures": "rna"}, "structures: is 'rna'; expected 'all', or a list such as ['rna']"),
    ({"structures": ["rna+protein"]}, "structures: is 'rna+protein'; expected views joined by +, of rna, meth, mirna"),
    ({"ranks": {"protein": 1}}, "ranks: is 'protein'; expected views joined by +, of rna, meth, mirna"),
    ({"ranks": 0}, "ranks: is 0"),
    ({"ranks": {"rna": 99}}, "ranks: the structures that contain modality 1"),
    ({"y": [1.0, 2.0]}, "y: has shape (2,); expected (120,), one value for each sample"),
    ({"y": np.ones(N)}, "y: is 1.0 in all samples; expected values that differ"),
    ({"y": ["a"] * N}, "y: all samples are of class 'a'; expected at least two classes"),
    ({"y": ["a"] * (N - 1) + ["b"]}, "y: has one sample of class 'b'; expected at least two of each"),
    ({"y": list(range(N))}, "y: has 120 classes; expected at most 50, or floating-point numbers"),
    ({"y": np.full(N, np.nan)}, "y: has 0 known values of 120; expected at least 5"),
    ({"y": np.r_[np.inf, np.ones(N - 1)]}, "y: holds infinite values in 1 of 120 samples"),
    ({"y": {"someone": 1.0}}, "y: names none of the samples; expected names such as 'patient 0'"),
    ({"method": "sjive"}, "y: is None; expected an outcome, which sjive is fitted to"),
    ({"method": "mmfl", "y": list("abc") * 40}, "y: has 3 classes; expected numbers or two classes, as mmfl is a regression"),
    (
        {"method": "misa", "y": np.r_[np.nan, np.arange(N - 1.0)]},
        "y: is unknown for 1 of 120 samples; expected an outcome for each",
    ),
    ({"y": [1j] * N}, "y: holds complex; expected floating-point numbers, or classes"),
]


@pytest.mark.parametrize(("options", "said"), BAD, ids=[said[:30] for _, said in BAD])
def test_what_cannot_be_is_said_before_anything_is_computed(options, said):
    frames, _, _ = drawn()
    with pytest.raises(ValueError, match=re.escape(said)):
        fit(frames, **{"ranks": RANKS} | options)


def test_questions_about_what_is_not_there():
    got = decomposed()
    for ask, said in (
        (lambda: got.impute("protein"), "view: is 'protein'; expected one of rna, meth, mirna"),
        (lambda: got.top_features("meth+mirna"), "structure: is 'meth+mirna'; expected one of those found"),
        (lambda: got.inverse_transform(np.ones((2, 3))), "scores: has shape (2, 3)"),
        (lambda: fit(drawn()[0], ranks=RANKS).predict(drawn()[0]), "y: was not given to fit"),
        (lambda: got.evaluate(100), "cv: is 100, of 120 samples"),
        (lambda: fit(drawn()[0], ranks=RANKS, method="jive").impute("rna"), "this decomposition has no noise variances"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            ask()


def test_a_second_call_compiles_nothing():
    """Of a view that samples lack, of their scores and of what they predict, for as many samples."""
    got, (frames, _, _) = decomposed(), drawn()
    new = {name: frame for name, frame in frames.items() if name != "meth"}

    def ask():
        got.impute("meth", new)
        got.transform(new)
        got.predict(new)

    ask()
    with compilations() as seconds:
        ask()
    assert not seconds
