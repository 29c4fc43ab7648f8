"""Intervals from the inverse Fisher information: against dense algebra, their statuses, and their coverage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from helpers import (
    TWO,
    assert_at_least,
    assert_at_most,
    assert_refused,
    assert_within,
    fitted_by,
    numpy_loadings,
    problem,
    relative,
    structure_rotation,
)

from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance
from hcl_jax.intervals import (
    BOUNDARY,
    INEFFICIENT,
    NOT_CONVERGED,
    VALID,
    block_norm_intervals,
    delta_method,
    feature_share_intervals,
    gram_intervals,
)
from hcl_jax.support import supported_point, without_rotations
from simulations.coverage import Study, main, run, summarise

ENTRIES = np.array([[0, 0], [3, 7], [2, 12], [15, 9], [9, 9]])
BLOCKS = [((1, 2), 1), ((1, 2), 2), ((2,), 2)]


def fit(name="hcl-ml", n=3000, **options):
    _, S = problem(TWO, noise=0.1, n=n)
    return S, fitted_by(name, **options)(S, TWO)


def without(structure, n=3000, noise=0.1):
    """A covariance of TWO with a structure that is not there."""
    rng = np.random.default_rng(0)
    loadings = numpy_loadings(rng, TWO)
    loadings[:, TWO.columns(structure)] = 0
    rows = rng.standard_normal((n, TWO.n_factors)) @ loadings.T + np.sqrt(noise) * rng.standard_normal((n, TWO.n_features))
    return SampleCovariance(jnp.asarray(np.cov(rows.T)), n=n)


def dense_errors(estimate, S, gradient):
    """Standard errors from the pseudo-inverse of the information matrix, by d × d algebra; `gradient(loadings, i, k)` is that of
    all quantities along one free loading."""
    point, _ = supported_point(estimate.loadings, estimate.noise_variance, S, TWO, estimate.noise)
    F, psi, nu = np.asarray(point.loadings), np.asarray(point.fisher.psi), float(S.nu)
    inverse, tangents, gradients = np.linalg.inv(F @ F.T + np.diag(psi)), [], []
    for i, k in zip(*np.nonzero(TWO.mask), strict=True):
        D = np.zeros(inverse.shape)
        D[i] += F[:, k]
        D[:, i] += F[:, k]
        tangents.append(D)
        gradients.append(gradient(F, i, k))
    groups = {"shared": [TWO.modality_of_feature >= 0], "view": [TWO.modality_of_feature == m for m in range(2)]}
    groups["feature"] = list(np.eye(TWO.n_features) > 0)
    for group in groups[estimate.noise]:
        tangents.append(np.diag(1.0 * group))
        gradients.append(np.zeros_like(gradients[0]))
    halves = [inverse @ D for D in tangents]
    information = nu / 2 * np.array([[np.sum(A * B.T) for B in halves] for A in halves])
    return np.sqrt(np.einsum("pq,pr,rq->q", gradients, np.linalg.pinv(information, rcond=1e-10), gradients))


def of_entries(F, i, k):
    return [(a == i) * F[b, k] + (b == i) * F[a, k] for a, b in ENTRIES]


@pytest.mark.parametrize("noise", ["view", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("shared", "feature"))])
def test_standard_errors_are_those_of_the_dense_information(noise):
    S, estimate = fit(noise=noise)
    intervals = gram_intervals(estimate, S, TWO, ENTRIES)
    assert (np.asarray(intervals.status) == VALID).all(), intervals.reasons()
    G = np.asarray(estimate.loadings @ estimate.loadings.T)
    error = np.asarray(intervals.standard_error)
    assert_at_most(
        np.abs(intervals.estimate - G[tuple(ENTRIES.T)]).max() / error.max(), 0.05, "distance of the maximum, in errors"
    )
    assert_at_most(relative(error, dense_errors(estimate, S, of_entries)), 1e-3, "standard errors, dense")
    assert_at_most(relative(intervals.upper - intervals.lower, 2 * 1.959963984540054 * error), 1e-12, "widths")


def test_block_norms_are_freed_from_the_noise_in_them():
    """‖Λ̂‖² less a positive trace; ends at 1.96 standard errors of the squared norm where no column is near the noise."""
    S, estimate = fit()
    intervals = block_norm_intervals(estimate, S, TWO, BLOCKS)
    assert (np.asarray(intervals.status) == VALID).all(), intervals.reasons()
    F = np.asarray(estimate.loadings)
    squares = np.array([np.sum(F[TWO.rows(m), TWO.columns(s)] ** 2) for s, m in BLOCKS])
    assert_at_least((squares - np.asarray(intervals.estimate) ** 2).min(), 1e-5, "what is taken off")

    def gradient(F, i, k):
        return [
            2 * F[i, k] * (i in range(*TWO.rows(m).indices(16)) and k in range(*TWO.columns(s).indices(5))) for s, m in BLOCKS
        ]

    width = 2 * 1.959963984540054 * dense_errors(estimate, S, gradient)
    assert_at_most(relative(intervals.upper**2 - intervals.lower**2, width), 1e-2, "widths of the squared norms, dense")


def test_structures_are_understood_in_any_order_and_by_name():
    S, estimate = fit()
    plain = block_norm_intervals(estimate, S, TWO, BLOCKS)
    named = block_norm_intervals(estimate, S, TWO, [("21", 1), ((2, 1), 2), (2, 2)])
    assert (plain.upper == named.upper).all()


def test_rotations_are_left_out():
    rng = np.random.default_rng(1)
    F, V = (jnp.asarray(np.where(TWO.mask, rng.standard_normal(TWO.mask.shape), 0)) for _ in range(2))
    columns, seen = TWO.columns((1, 2)), jnp.asarray(TWO.modality_mask)
    same = (seen[:, :, None] == seen[:, None, :]).all(axis=0)
    turn = jnp.zeros_like(F).at[:, columns].set(F[:, columns] @ jnp.array([[0.0, 1.0], [-1.0, 0.0]]))
    assert_at_most(float(jnp.linalg.norm(without_rotations(turn, F, same))), 1e-13, "what is left of a rotation")
    left = without_rotations(V, F, same)
    assert_at_most(abs(float(jnp.sum(left * turn))), 1e-13, "inner product of what is left with a rotation")
    assert_at_most(relative(without_rotations(left, F, same), left), 1e-13, "change by a second projection")


def test_rotating_the_estimate_does_not_move_the_intervals():
    S, estimate = fit()
    rotation = jnp.asarray(structure_rotation(np.random.default_rng(0), TWO))
    rotated = dataclasses.replace(estimate, loadings=estimate.loadings @ rotation)
    before, after = (gram_intervals(e, S, TWO, ENTRIES) for e in (estimate, rotated))
    assert_at_most(relative(after.lower, before.lower), 1e-4, "lower ends")
    assert_at_most(relative(after.standard_error, before.standard_error), 1e-4, "standard errors")


def test_the_shrunk_mean_is_taken_to_the_maximum_of_the_likelihood():
    """`hcl-vb` and `hcl-ml` have the same intervals where all columns stand out."""
    S, ml = fit(n=300)
    _, vb = fit("hcl-vb", n=300)
    one, other = (block_norm_intervals(e, S, TWO, BLOCKS) for e in (ml, vb))
    assert (np.asarray(other.status) == VALID).all(), other.reasons()
    assert_at_most(np.abs((one.upper - other.upper) / one.standard_error).max(), 0.05, "difference, in standard errors")


@pytest.mark.parametrize("name", ["hcl-ml", "hcl-vb"])
def test_an_absent_structure_has_an_upper_bound_and_leaves_the_others_alone(name):
    S = without((1, 2))
    estimate = fitted_by(name)(S, TWO)
    blocks = block_norm_intervals(estimate, S, TWO, BLOCKS)
    assert list(np.asarray(blocks.status)) == [BOUNDARY, BOUNDARY, VALID], blocks.reasons()
    assert (blocks.lower[:2] == 0).all()
    assert_within(float(blocks.upper[0]), 0.35, 0.2, "upper bound of what is not there")
    gram = gram_intervals(estimate, S, TWO, ENTRIES)
    across = ENTRIES[:, 0] // 9 != ENTRIES[:, 1] // 9  # nothing but the absent structure is seen by both: S_ij is
    assert_at_most(relative(gram.estimate[across], np.asarray(S.matrix)[tuple(ENTRIES[across].T)]), 1e-12, "entries across views")
    assert (np.asarray(gram.status)[across] == VALID).all()
    assert (np.asarray(gram.status)[ENTRIES[:, 0] == ENTRIES[:, 1]] == BOUNDARY).all()


def test_private_columns_are_found_in_the_place_of_a_shared_structure_however_they_are_rotated():
    """(a, 0) and (0, b) of equal strength: the principal axes of the two may mix them, so that each seems to be in both views."""
    rng = np.random.default_rng(3)
    F, n, noise = np.zeros((TWO.n_features, 2)), 3000, 0.1
    for view, k in ((1, 0), (2, 1)):
        rows = TWO.rows(view)
        F[rows, k] = rng.standard_normal(rows.stop - rows.start)
    F /= np.linalg.norm(F, axis=0)
    data = rng.standard_normal((n, 2)) @ F.T + np.sqrt(noise) * rng.standard_normal((n, TWO.n_features))
    S = SampleCovariance(jnp.asarray(np.cov(data.T)), n=n)
    mixed = np.zeros(TWO.mask.shape)
    mixed[:, TWO.columns((1, 2))] = F @ np.array([[1, 1], [-1, 1]]) / np.sqrt(2)
    estimate = dataclasses.replace(fitted_by("hcl-ml")(S, TWO), loadings=jnp.asarray(mixed))
    point, reached = supported_point(estimate.loadings, estimate.noise_variance, S, TWO, estimate.noise)
    assert bool(reached)
    assert sorted(map(tuple, np.asarray(point.support).T[np.asarray(point.support).any(axis=0)])) == [
        (False, True),
        (True, False),
    ]


def test_intervals_in_single_precision_are_those_in_double():
    """Rounding left of the rotations of a structure's columns grew in the solves, and columns that stand out went missing."""
    hierarchy = Hierarchy.full((30, 30, 30), 3)
    _, double = problem(hierarchy, noise=0.3, n=3000)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), double)
    wide, narrow = (block_norm_intervals(fitted_by("hcl-ml")(S, hierarchy), S, hierarchy, [("12", 1)]) for S in (double, single))
    assert list(narrow.status) == list(wide.status) == [VALID], narrow.reasons()
    for end in ("lower", "upper"):
        gap = np.abs(np.asarray(getattr(narrow, end)) - np.asarray(getattr(wide, end))) / np.asarray(wide.standard_error)
        assert_at_most(gap.max(), 0.2, f"difference of the {end} ends, in standard errors")


def test_statuses_of_estimates():
    S, estimate = fit()
    stopped = dataclasses.replace(estimate, status=jnp.array(1))
    assert (np.asarray(gram_intervals(stopped, S, TWO, ENTRIES).status) == NOT_CONVERGED).all()
    spectral = gram_intervals(fitted_by("hcl-svd")(S, TWO), S, TWO, ENTRIES)
    assert (np.asarray(spectral.status) == INEFFICIENT).all()
    assert "not efficient" in spectral.reasons()[0]


@pytest.mark.slow
def test_intervals_of_a_batch():
    fits = [problem(TWO, seed, noise=0.1, n=3000)[1] for seed in range(2)]
    estimates = [fitted_by("hcl-ml")(S, TWO) for S in fits]
    pairs = (jax.tree.map(lambda *x: jnp.stack(x), *p) for p in (estimates, fits))
    batch = jax.vmap(lambda e, S: gram_intervals(e, S, TWO, ENTRIES))(*pairs)
    single = gram_intervals(estimates[1], fits[1], TWO, ENTRIES)
    assert_at_most(relative(batch.standard_error[1], single.standard_error), 1e-4, "standard errors, second of a batch")


def test_a_second_call_compiles_nothing():
    S, estimate = fit()
    first = gram_intervals(estimate, S, TWO, ENTRIES)
    other = dataclasses.replace(estimate, loadings=-estimate.loadings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax._src.compiler.compile_or_get_cached", None)  # whatever compiles fails
        second = gram_intervals(other, S, TWO, ENTRIES[::-1])
    assert_at_most(relative(second.standard_error[::-1], first.standard_error), 1e-4, "standard errors in reverse")


@pytest.mark.parametrize("entries", [[[16, 15]], [[99, -1]], [[0.5, 1.0]], [0, 1], [["a", "b"]]])
def test_entries_that_are_no_pairs_of_features_are_refused(entries):
    S, estimate = fit()
    with pytest.raises(ValueError, match="entries: "):
        gram_intervals(estimate, S, TWO, entries)


def test_shares_of_features_are_those_of_the_delta_method():
    """The squared norms of a structure's columns have the standard errors that any function of the loadings has."""
    S, estimate = fit()
    columns, features = TWO.columns((1, 2)), [0, 3, TWO.dims[0]]
    found = feature_share_intervals(estimate, S, TWO, "12", features, 0.9)
    squares = delta_method(lambda F: jnp.sum(F[jnp.array(features), columns] ** 2, axis=1), estimate, S, TWO, 0.9)
    np.testing.assert_allclose(found.estimate, squares.estimate, rtol=1e-8)
    np.testing.assert_allclose(found.standard_error, squares.standard_error, rtol=1e-4)
    np.testing.assert_array_equal(found.status, squares.status)
    error = found.standard_error / (2 * jnp.sqrt(found.estimate))
    np.testing.assert_allclose(jnp.sqrt(found.upper), jnp.sqrt(found.estimate) + 1.6448536 * error, rtol=1e-6)


@pytest.mark.slow
def test_shares_of_standardised_features_are_covered():
    """At least as often as they say: features divided by their sample deviations have shares that vary less."""
    hierarchy = Hierarchy((9, 8, 7), {(1, 2, 3): 2, (1, 2): 1, (3,): 1})
    generator = np.random.default_rng(0)
    L = generator.normal(size=(24, 4)) * hierarchy.mask
    hits = []
    for _ in range(60):
        X = generator.normal(size=(300, 4)) @ L.T + 0.7 * generator.normal(size=(300, 24))
        S = SampleCovariance.from_data((X - X.mean(axis=0)) / X.std(axis=0, ddof=1))
        estimate = ESTIMATORS["hcl-vb"](S, hierarchy, noise="feature")
        found = feature_share_intervals(estimate, S, hierarchy, "123", np.arange(24), 0.9)
        truth = np.sum(L[:, hierarchy.columns((1, 2, 3))] ** 2, axis=1) / (np.sum(L**2, axis=1) + 0.49)
        valid = np.asarray(found.status) == VALID
        hits += ((found.lower <= truth) & (truth <= found.upper))[valid].tolist()
    assert len(hits) > 1000
    assert 0.9 < np.mean(hits) < 0.99


def test_refusals_name_the_argument():
    S, estimate = fit()
    with pytest.raises(ValueError, match="features: hold 0; expected features of the structure's views"):
        feature_share_intervals(estimate, S, TWO, "2", [0])
    with pytest.raises(ValueError, match="features: have shape"):
        feature_share_intervals(estimate, S, TWO, "2", [0.5])
    with pytest.raises(ValueError, match="structure: unknown structure '3'"):
        feature_share_intervals(estimate, S, TWO, "3", [0])
    with pytest.raises(ValueError, match="level: is 95.0; expected a number between 0 and 1"):
        gram_intervals(estimate, S, TWO, ENTRIES, level=95.0)
    for block in (((1,), 2), ((1, 3), 1), ("3", 3)):
        with pytest.raises(ValueError, match="blocks: "):
            block_norm_intervals(estimate, S, TWO, [block])
    with pytest.raises(ValueError, match="quantity: changes by"):
        delta_method(lambda F: F[:2, 0], estimate, S, TWO)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n-grid", "10"], ["n_grid", "10"]),
        (["--methods", "hcl-nl"], ["methods", "hcl-nl"]),
        (["--varied", "13"], ["varied", "13"]),
        (["--replicates", "3", "--batch", "2"], ["batch", "2"]),
        (["--noise-variance", "-1"], ["noise_variance", "-1"]),
    ],
)
def test_the_study_refuses_bad_settings(arguments, words, tmp_path, capsys, monkeypatch):
    def run_with(argv):
        monkeypatch.setattr("sys.argv", ["coverage.py", *argv])
        return main()

    assert_refused(run_with, arguments, ["coverage.py", *words], tmp_path / "out" / "table.parquet", capsys)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hcl-ml", "hcl-vb", "hcl-ml@view"])
def test_coverage(method):
    """100 draws: the mean coverage of valid intervals of each kind is within four of its standard errors of 0.92 to 0.98, and
    strong blocks are valid beside a weak or an absent structure too."""
    table = run(Study(problems=("small",), methods=(method,), n_grid=(2000,), varied=("12",), replicates=100))
    means = summarise(table).filter(pl.col("valid intervals") > 20)
    assert len(means) >= 8
    for row in means.iter_rows(named=True):
        slack = 0.03 + 4 * max(row["standard error"], 0.002)
        assert_within(row["coverage of valid"], 0.95, slack, f"{row['strength']}, {row['kind']}")
        if row["kind"] == "block strong":
            assert_at_least(row["valid"], 0.9, f"{row['strength']}: share of strong blocks that are valid")
