"""Every public function over one list of bad inputs: a `ValueError` in one line that names the argument and what was expected.

As users call it: without the run-time checks of shapes in signatures that other tests have.
"""

from collections.abc import Callable
from functools import cache

import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import polars as pl
import pytest
from helpers import fitted_by, problem

import hcl_jax
from hcl_jax import (
    ESTIMATORS,
    LIMITS,
    Hierarchy,
    SampleCovariance,
    Truth,
    recovery_errors,
    sample_data_covariance,
    sample_factored_covariance,
    sample_loadings,
    sample_observations,
    sample_truth,
    sample_wishart_covariance,
)
from hcl_jax.baselines import BASELINES
from hcl_jax.evaluation import corrected_mean
from hcl_jax.fitted import variance_explained
from hcl_jax.intervals import block_norm_intervals, delta_method, gram_intervals
from hcl_jax.model import sample_coefficients, sample_response, sample_rows_given_covariance
from hcl_jax.prediction import (
    FoldMoments,
    choose_penalty,
    concordance,
    cox_regression,
    fold_of_rows,
    group_index,
    group_lasso,
    group_relevance,
    least_squares,
    least_squares_scores,
    posterior_mean_scores,
    random_intercept,
    ridge,
    softmax_regression,
)
from hcl_jax.real_data import fit_truth, gaussian_log_likelihood
from hcl_jax.selection import select
from hcl_jax.streaming import CovarianceAccumulator, accumulate, accumulate_npy, accumulate_parquet

H = Hierarchy((6, 5), {(1, 2): 1, (1,): 1, (2,): 1})
KEY, N = jr.key(0), 40
RNG = np.random.default_rng(0)
VIEWS = [RNG.standard_normal((N, dim)) for dim in H.dims]
X, Y, LABELS = np.concatenate(VIEWS, axis=1), VIEWS[0][:, 0], np.arange(N) % 2
TRUTH, S = problem(H, noise=0.5, n=200)
MOMENTS, OTHER_MOMENTS = (FoldMoments.from_rows(X[:, :size], Y) for size in (3, 4))
NAMES = sorted({name.partition("-")[0] for name in BASELINES})


@cache
def estimate():
    return fitted_by("hcl-ml")(S, H)


@cache
def decomposition():
    return BASELINES["slide"](VIEWS, H, key=KEY)


# What cannot be views of the same samples, wherever views are taken.
BAD_VIEWS = [
    None,
    3,
    "rna.csv",
    b"rna",
    [],
    {},
    object(),
    [VIEWS[0], VIEWS[1][:-1]],
    [VIEWS[0], VIEWS[1][:, 0]],
    [VIEWS[0], VIEWS[1][:, :0]],
    [VIEWS[0][:0], VIEWS[1][:0]],
    [VIEWS[0], VIEWS[1] + 1j],
    [VIEWS[0], jnp.asarray(VIEWS[1] + 1j)],
    [VIEWS[0], np.where(VIEWS[1] > 2, np.nan, VIEWS[1])],
    [VIEWS[0], np.where(VIEWS[1] > 2, -np.inf, VIEWS[1])],
    [VIEWS[0], np.ma.MaskedArray(VIEWS[1], VIEWS[1] > 2)],
    [VIEWS[0], VIEWS[1].astype(str)],
    [VIEWS[0], VIEWS[1].astype(int).astype("M8[D]")],
    [VIEWS[0], [[1.0, 2.0], [3.0]]],
    [VIEWS[0], pl.DataFrame({"a": ["x"] * N, "b": [1] * N})],
    [VIEWS[0], None],
    {"rna": VIEWS[0], "dna": object()},
]
# What is fine as views, and not those of the hierarchy.
OTHER_VIEWS = [VIEWS[0], VIEWS[::-1], [*VIEWS, VIEWS[0]], [VIEWS[0]]]
BAD_KEYS = [0, None, "0", 1.5, jnp.zeros(3), jr.split(KEY)]
BAD_HIERARCHIES = [None, {"12": 1}, "12:1", (6, 5)]
BAD_COVARIANCES = [None, np.eye(11), VIEWS, SampleCovariance(jnp.eye(10), n=50), SampleCovariance(jnp.eye(11), n=4)]
BAD_MATRICES = ["x", 3, np.eye(11)[0], np.eye(11) * 1j, np.full((11, 11), np.nan), [[1, 2], [3]], np.array([["a"]], object)]
BAD_TRUTHS = [None, "truth", TRUTH.loadings, S, H]
BAD_MOMENTS = [None, "moments", X, S]
BAD_RULES = [None, "x", "one_se", 1, ["min"]]
BAD_NOISE_GRAMS = ["x", 3.0, np.eye(4), np.ones(3), np.full((3, 3), np.nan), np.eye(3) * 1j]
BAD_RESPONSES = [None, "y", 3.0, Y[:-1], Y[:, None], Y * 1j, np.where(Y > 1, np.nan, Y), Y.astype(str), [None] * N]
BAD_LABELS = [None, "ab", LABELS[:-1], LABELS[:, None], LABELS + 0.5, LABELS + 1, LABELS - 1, 0 * LABELS, LABELS.astype(str)]
BAD_NOISE = [None, "x", -1.0, np.nan, np.inf, np.ones(2), -np.ones(11), np.eye(11), 1j]
BAD_COUNTS = [None, 0, -3, 1.5, np.nan, "10"]
BAD_LEVELS = [0, 1, -1, 2, np.nan]
BAD_SHARES = [*BAD_LEVELS, None, "x", 1j, [0.9]]
BAD_STRUCTURES = [(2, 3), (0,), "", "13", (), 0, -1, 1.5, "a"]
BAD_ENTRIES = [(16, 15), [(11, 0)], [(99, -1)], [(0, 1, 2)], [(0.5, 1)], [], None, "01"]
BAD_LOADINGS = [
    None,
    "x",
    3,
    jnp.ones((11, 2)),
    jnp.ones((10, 3)),
    np.ones((11, 3)) * 1j,
    jnp.ones((11, 3), complex),
    [[1, 2], [3]],
]
BAD_BLOCKS = [None, 12, "12", [], ["12"], [12], [("12",)], [("12", 1, 2)], [("12", "1")], [None]]
BAD_QUANTITIES = [None, 3, np.ones(3), lambda F: F[0, :1], lambda F: F @ F.T, lambda F: [F[0, 0]], lambda F: F.shape[0]]
BAD_N = [None, "50", "x", [50, 60], [50], 1j, 0, 1, -2, np.nan, np.inf]
NAMED = {"a": VIEWS[0], "b": pl.DataFrame(VIEWS[1], schema=list("vwxyz"))}
NAMED_OTHERWISE = NAMED | {"b": pl.DataFrame(VIEWS[1], schema=list("vwxyq"))}

Case = tuple[str, Callable, list, str]
CASES: list[Case] = [
    ("SampleCovariance.from_data", SampleCovariance.from_data, BAD_VIEWS, "views"),
    ("fit_truth", fit_truth, BAD_VIEWS, "views"),
    ("fit_truth, of a hierarchy", lambda bad: fit_truth(bad, H), OTHER_VIEWS, "views"),
    ("accumulate", lambda bad: accumulate([bad]), BAD_VIEWS[4:6] + BAD_VIEWS[7:], "views"),
    (
        "accumulate, a chunk",
        lambda bad: accumulate([bad]),
        [*BAD_VIEWS[:4], object(), VIEWS[0], pl.DataFrame(VIEWS[0])],
        "chunks",
    ),
    ("accumulate, chunks", accumulate, [*BAD_VIEWS[:7], VIEWS, VIEWS[0], {"a": VIEWS[0]}], "chunks"),
    (
        "accumulate, later",
        lambda bad: accumulate([NAMED, bad]),
        [{"c": VIEWS[0], "b": VIEWS[1]}, NAMED_OTHERWISE, VIEWS],
        "views",
    ),
    ("accumulate, shift", lambda bad: accumulate([VIEWS], shift=bad), ["x", 0.0, [0.0] * 10, np.full(11, np.nan)], "shift"),
    ("accumulate, block_rows", lambda bad: accumulate([VIEWS], block_rows=bad), [0, -1, 1.5, "x"], "block_rows"),
    ("accumulate, memory", lambda bad: accumulate([VIEWS], memory=bad), [*BAD_COUNTS, 1], "memory"),
    ("accumulate_npy", accumulate_npy, [None, 3, [], [None], [3], "none.npy", ["none.npy"]], "paths"),
    ("accumulate_parquet", accumulate_parquet, [None, 3, [], [None], [3], "none.parquet", ["none.parquet"]], "paths"),
    ("CovarianceAccumulator", CovarianceAccumulator, [None, 3, (), (0,), "ab", (1.5,), (2, None)], "dims"),
    ("CovarianceAccumulator, update", CovarianceAccumulator((6, 5)).update, [None, 3, "x", [], VIEWS[0], VIEWS[:1]], "views"),
    ("transform", lambda bad: decomposition().transform(bad), BAD_VIEWS + OTHER_VIEWS, "views"),
    ("variance_explained", lambda bad: variance_explained(decomposition(), bad), BAD_VIEWS + OTHER_VIEWS, "views"),
    ("predict", lambda bad: BASELINES["mmfl"](VIEWS, H, y=Y, key=KEY).predict(bad), BAD_VIEWS + OTHER_VIEWS, "views"),
    ("SampleCovariance", lambda bad: SampleCovariance(bad, n=50), BAD_MATRICES, "matrix"),
    ("SampleCovariance of rows", lambda bad: SampleCovariance(data=bad, n=50), BAD_MATRICES, "data"),
    ("SampleCovariance, n", lambda bad: SampleCovariance(np.eye(3), n=bad), BAD_N, "n"),
    ("sample_loadings, key", lambda bad: sample_loadings(bad, H), BAD_KEYS, "key"),
    ("sample_loadings, hierarchy", lambda bad: sample_loadings(KEY, bad), BAD_HIERARCHIES, "hierarchy"),
    ("sample_truth, key", lambda bad: sample_truth(bad, H, 1.0), BAD_KEYS, "key"),
    ("sample_truth, hierarchy", lambda bad: sample_truth(KEY, bad, 1.0), BAD_HIERARCHIES, "hierarchy"),
    ("sample_truth, noise_variance", lambda bad: sample_truth(KEY, H, bad), BAD_NOISE, "noise_variance"),
    ("sample_truth, noise", lambda bad: sample_truth(KEY, H, 1.0, noise=bad), [None, "views", 3], "noise"),
    ("sample_truth, by view", lambda bad: sample_truth(KEY, H, bad, noise="view"), [np.ones(2), np.ones(12)], "noise_variance"),
    (
        "Truth, noise_variance",
        lambda bad: Truth(TRUTH.loadings, bad, H, noise="view"),
        [*BAD_NOISE[1:], jnp.ones(2), jnp.ones((11, 1))],
        "noise_variance",
    ),
    ("Truth, loadings", lambda bad: Truth(bad, 0.5, H), [*BAD_LOADINGS[3:], np.ones((10, 3)), jnp.ones(11)], "loadings"),
    ("Truth, hierarchy", lambda bad: Truth(TRUTH.loadings, 0.5, bad), BAD_HIERARCHIES, "hierarchy"),
    ("sample_coefficients, key", lambda bad: sample_coefficients(bad, H), BAD_KEYS, "key"),
    ("sample_coefficients, support", lambda bad: sample_coefficients(KEY, H, [bad]), BAD_STRUCTURES, "support"),
    ("sample_observations, key", lambda bad: sample_observations(bad, TRUTH, 5), BAD_KEYS, "key"),
    ("sample_observations, truth", lambda bad: sample_observations(KEY, bad, 5), BAD_TRUTHS, "truth"),
    ("sample_response, truth", lambda bad: sample_response(KEY, bad, jnp.ones((5, 3))), [*BAD_TRUTHS, TRUTH], "truth"),
    ("sample_observations, n_samples", lambda bad: sample_observations(KEY, TRUTH, bad), BAD_COUNTS, "n_samples"),
    ("sample_observations, latent", lambda bad: sample_observations(KEY, TRUTH, 5, bad), ["normal", None, 3, ["t"]], "latent"),
    ("sample_wishart_covariance, truth", lambda bad: sample_wishart_covariance(KEY, bad, 50), BAD_TRUTHS, "truth"),
    ("sample_wishart_covariance, key", lambda bad: sample_wishart_covariance(bad, TRUTH, 50), BAD_KEYS, "key"),
    ("sample_wishart_covariance, n", lambda bad: sample_wishart_covariance(KEY, TRUTH, bad), [*BAD_N, 11, -5], "n"),
    ("sample_factored_covariance, key", lambda bad: sample_factored_covariance(bad, TRUTH, 5), BAD_KEYS, "key"),
    ("sample_factored_covariance, truth", lambda bad: sample_factored_covariance(KEY, bad, 5), BAD_TRUTHS, "truth"),
    ("sample_factored_covariance, n", lambda bad: sample_factored_covariance(KEY, TRUTH, bad), [*BAD_COUNTS, 1], "n_samples"),
    ("sample_data_covariance, key", lambda bad: sample_data_covariance(bad, TRUTH, 50), BAD_KEYS, "key"),
    ("sample_data_covariance, truth", lambda bad: sample_data_covariance(KEY, bad, 50), BAD_TRUTHS, "truth"),
    ("sample_data_covariance, n", lambda bad: sample_data_covariance(KEY, TRUTH, bad), [*BAD_N, 1.5], "n"),
    ("sample_data_covariance, chunk", lambda bad: sample_data_covariance(KEY, TRUTH, 50, chunk=bad), BAD_COUNTS, "chunk"),
    ("sample_data_covariance, latent", lambda bad: sample_data_covariance(KEY, TRUTH, 50, bad), ["normal", None], "latent"),
    ("sample_rows_given_covariance, key", lambda bad: sample_rows_given_covariance(bad, S, 200), BAD_KEYS, "key"),
    (
        "sample_rows_given_covariance, covariance",
        lambda bad: sample_rows_given_covariance(KEY, bad, 200),
        [*BAD_COVARIANCES[:3], "S"],
        "covariance",
    ),
    ("sample_rows_given_covariance, n", lambda bad: sample_rows_given_covariance(KEY, S, bad), [*BAD_COUNTS, 10], "n_samples"),
    ("select, covariance", lambda bad: select(bad, H), BAD_COVARIANCES[:3], "covariance"),
    ("select, hierarchy", lambda bad: select(S, bad), BAD_HIERARCHIES, "hierarchy"),
    ("recovery_errors", lambda bad: recovery_errors(bad, H, TRUTH.loadings, H), BAD_LOADINGS, "loadings_hat"),
    ("recovery_errors, truth", lambda bad: recovery_errors(TRUTH.loadings, H, bad, H), BAD_LOADINGS, "loadings"),
    (
        "recovery_errors, fitted",
        lambda bad: recovery_errors(TRUTH.loadings, bad, TRUTH.loadings, H),
        [*BAD_HIERARCHIES, Hierarchy((5, 6), {"12": 1, "1": 1, "2": 1})],
        "hierarchy_hat",
    ),
    ("recovery_errors, true", lambda bad: recovery_errors(TRUTH.loadings, H, TRUTH.loadings, bad), BAD_HIERARCHIES, "hierarchy"),
    ("limits, response", lambda bad: LIMITS["bayes"](bad, S), [*BAD_TRUTHS, TRUTH], "truth"),
    ("Hierarchy.rank", H.rank, BAD_STRUCTURES, "structure"),
    ("Hierarchy.columns", H.columns, BAD_STRUCTURES, "structure"),
    ("Hierarchy.structure_rows", H.structure_rows, BAD_STRUCTURES, "structure"),
    ("Hierarchy.rows", H.rows, [0, -1, 3, 1.5, "a", None, (1, 2)], "modality"),
    ("Hierarchy.active_columns", H.active_columns, [0, -1, 3, 1.5, "a", None, (1, 2)], "modality"),
    ("Hierarchy, dims", lambda bad: Hierarchy(bad, {"1": 1}), [None, (), 0, (0,), (-1, 2), ("a",), (1.5,)], "dims"),
    ("Hierarchy, ranks", lambda bad: Hierarchy((6, 5), bad), [None, (), {}, {"13": 1}, {"1": -1}, {"1": 1.5}, {"1": 7}], "ranks"),
    ("gram_intervals, entries", lambda bad: gram_intervals(estimate(), S, H, bad), BAD_ENTRIES, "entries"),
    ("gram_intervals, level", lambda bad: gram_intervals(estimate(), S, H, [(0, 1)], bad), BAD_SHARES, "level"),
    ("block_norm_intervals, blocks", lambda bad: block_norm_intervals(estimate(), S, H, [(bad, 1)]), BAD_STRUCTURES, "blocks"),
    ("block_norm_intervals, pairs", lambda bad: block_norm_intervals(estimate(), S, H, bad), BAD_BLOCKS, "blocks"),
    ("block_norm_intervals, level", lambda bad: block_norm_intervals(estimate(), S, H, [("12", 1)], bad), BAD_SHARES, "level"),
    ("block_norm_intervals, zero", lambda bad: block_norm_intervals(estimate(), S, H, [bad]), [("1", 2), ("12", 3)], "blocks"),
    ("delta_method, quantity", lambda bad: delta_method(bad, estimate(), S, H), BAD_QUANTITIES, "quantity"),
    ("delta_method, level", lambda bad: delta_method(lambda F: F[:1] @ F[1], estimate(), S, H, bad), BAD_SHARES, "level"),
    ("least_squares_scores", least_squares_scores, BAD_MATRICES, "loadings"),
    ("posterior_mean_scores", lambda bad: posterior_mean_scores(bad, 1.0), BAD_MATRICES, "loadings"),
    ("posterior_mean_scores, noise", lambda bad: posterior_mean_scores(np.eye(11)[:, :2], bad), BAD_NOISE, "noise_variance"),
    ("gaussian_log_likelihood", lambda bad: gaussian_log_likelihood(bad, np.eye(11), 1.0), [*BAD_MATRICES, np.eye(3)], "rows"),
    (
        "gaussian_log_likelihood, noise",
        lambda bad: gaussian_log_likelihood(X, np.eye(11), bad),
        [*BAD_NOISE, 0.0],
        "noise_variance",
    ),
    ("FoldMoments, x", lambda bad: FoldMoments.from_rows(bad, Y), BAD_MATRICES, "x"),
    ("FoldMoments, y", lambda bad: FoldMoments.from_rows(X, bad), BAD_RESPONSES, "y"),
    ("FoldMoments, n_folds", lambda bad: FoldMoments.from_rows(X, Y, bad), [0, 1, -1, N + 1, 2.5, None], "n_folds"),
    ("FoldMoments, key", lambda bad: FoldMoments.from_rows(X, Y, 5, bad), [key for key in BAD_KEYS if key is not None], "key"),
    ("fold_of_rows, key", lambda bad: fold_of_rows(bad, N, 5), BAD_KEYS, "key"),
    ("fold_of_rows, n", lambda bad: fold_of_rows(KEY, bad, 3), BAD_COUNTS, "n"),
    ("fold_of_rows, n_folds", lambda bad: fold_of_rows(KEY, N, bad), [0, 1, N + 1, 2.5, None], "n_folds"),
    ("softmax_regression, scores", lambda bad: softmax_regression(bad, LABELS, 2, key=KEY), BAD_MATRICES, "scores"),
    ("softmax_regression, labels", lambda bad: softmax_regression(X, bad, 2, key=KEY), BAD_LABELS, "labels"),
    ("softmax_regression, n_classes", lambda bad: softmax_regression(X, LABELS, bad, key=KEY), [*BAD_COUNTS, 1], "n_classes"),
    (
        "softmax_regression, hierarchy",
        lambda bad: softmax_regression(X[:, :3], LABELS, 2, bad, key=KEY),
        ["12:3", 3, (6, 5)],
        "hierarchy",
    ),
    ("softmax_regression, rule", lambda bad: softmax_regression(X, LABELS, 2, key=KEY, rule=bad), BAD_RULES, "rule"),
    ("softmax_regression, steps", lambda bad: softmax_regression(X, LABELS, 2, key=KEY, max_steps=bad), BAD_COUNTS, "max_steps"),
    (
        "softmax_regression, fold_scores",
        lambda bad: softmax_regression(X, LABELS, 2, key=KEY, fold_scores=bad),
        ["x", 3, X, [X], np.ones((5, N, 10))],
        "fold_scores",
    ),
    ("least_squares, moments", least_squares, BAD_MOMENTS, "moments"),
    ("least_squares, noise_gram", lambda bad: least_squares(MOMENTS, bad), BAD_NOISE_GRAMS, "noise_gram"),
    ("ridge, moments", ridge, BAD_MOMENTS, "moments"),
    ("ridge, choose", lambda bad: ridge(MOMENTS, bad), BAD_RULES, "choose"),
    ("group_lasso, moments", lambda bad: group_lasso(bad, H), BAD_MOMENTS, "moments"),
    ("group_lasso, hierarchy", lambda bad: group_lasso(MOMENTS, bad), [*BAD_HIERARCHIES, "12:3"], "hierarchy"),
    ("group_lasso, sizes", lambda bad: group_lasso(bad, H), [OTHER_MOMENTS], "hierarchy"),
    ("group_lasso, noise_gram", lambda bad: group_lasso(MOMENTS, H, bad), BAD_NOISE_GRAMS, "noise_gram"),
    ("group_lasso, rule", lambda bad: group_lasso(MOMENTS, H, rule=bad), BAD_RULES, "rule"),
    (
        "group_lasso, adaptive",
        lambda bad: group_lasso(MOMENTS, H, adaptive=bad),
        [None, "x", -1.0, np.nan, np.inf, [1.0], 1j],
        "adaptive",
    ),
    ("group_lasso, max_steps", lambda bad: group_lasso(MOMENTS, H, max_steps=bad), BAD_COUNTS, "max_steps"),
    ("group_relevance, moments", lambda bad: group_relevance(bad, H), BAD_MOMENTS, "moments"),
    ("group_relevance, hierarchy", lambda bad: group_relevance(MOMENTS, bad), [*BAD_HIERARCHIES, "12:3"], "hierarchy"),
    ("group_relevance, sizes", lambda bad: group_relevance(bad, H), [OTHER_MOMENTS], "hierarchy"),
    ("group_relevance, max_steps", lambda bad: group_relevance(MOMENTS, H, bad), BAD_COUNTS, "max_steps"),
    ("group_index", group_index, BAD_HIERARCHIES, "hierarchy"),
    ("choose_penalty, rule", lambda bad: choose_penalty(jnp.ones((4, 3)), bad), BAD_RULES, "rule"),
    ("softmax_regression, key", lambda bad: softmax_regression(X, LABELS, 2, key=bad), BAD_KEYS, "key"),
    ("softmax_regression, n_folds", lambda bad: softmax_regression(X, LABELS, 2, key=KEY, n_folds=bad), [0, 1, N + 1], "n_folds"),
    ("cox_regression, ties", lambda bad: cox_regression(X, N - Y.argsort(), LABELS, ties=bad), BAD_RULES, "ties"),
    ("cox_regression, choose", lambda bad: cox_regression(X, N - Y.argsort(), LABELS, choose=bad), BAD_RULES, "choose"),
    ("cox_regression, key", lambda bad: cox_regression(X, N - Y.argsort(), LABELS, choose="cv", key=bad), BAD_KEYS, "key"),
    ("cox_regression, scores", lambda bad: cox_regression(bad, N - Y.argsort(), LABELS), [None, "x", Y, X * np.nan], "scores"),
    ("concordance, level", lambda bad: concordance(Y, N - Y.argsort(), LABELS, bad), BAD_LEVELS, "level"),
    ("random_intercept, method", lambda bad: random_intercept(X, Y, LABELS, method=bad), BAD_RULES, "method"),
    ("random_intercept, subjects", lambda bad: random_intercept(X, Y, bad), [None, "x", LABELS[1:], 3], "subjects"),
    ("corrected_mean, values", lambda bad: corrected_mean(bad, 0.2), [np.array([])], "values"),
    ("corrected_mean, test_share", lambda bad: corrected_mean(Y, bad), BAD_LEVELS, "test_share"),
]
for name in ESTIMATORS:
    fit = ESTIMATORS[name]
    CASES += [
        (f"{name}, covariance", lambda bad, fit=fit: fit(bad, H), BAD_COVARIANCES[:3], "covariance"),
        (f"{name}, hierarchy", lambda bad, fit=fit: fit(S, bad), BAD_HIERARCHIES, "hierarchy"),
        (f"{name}, sizes", lambda bad, fit=fit: fit(bad, H), BAD_COVARIANCES[3:], "hierarchy"),
    ]
for name in ("hcl-vb", "hcl-ml", "hcl-shrunk", "hcl-gn", "hcl-gd"):
    fit = ESTIMATORS[name]
    CASES += [
        (f"{name}, tolerance", lambda bad, fit=fit: fit(S, H, tolerance=bad), ["x", 0, -1.0, np.nan, 1j, [1e-3]], "tolerance"),
        (
            f"{name}, max_steps",
            lambda bad, fit=fit: fit(S, H, max_steps=bad),
            [None, -1, 1.5, "x", [3], *[0] * (name == "hcl-vb")],
            "max_steps",
        ),
    ]
for name in ("cramer-rao", "detection"):
    limit = LIMITS[name]
    CASES += [
        (f"limits, {name}, truth", lambda bad, limit=limit: limit(bad, S), BAD_TRUTHS, "truth"),
        (f"limits, {name}", lambda bad, limit=limit: limit(TRUTH, bad), [*BAD_COVARIANCES[:4], "S"], "covariance"),
    ]
INTERVALS = {
    "gram_intervals": lambda *problem: gram_intervals(*problem, [(0, 1)]),
    "block_norm_intervals": lambda *problem: block_norm_intervals(*problem, [("12", 1)]),
    "delta_method": lambda *problem: delta_method(lambda F: F[:1] @ F[1], *problem),
}
for name, intervals in INTERVALS.items():
    CASES += [
        (f"{name}, estimate", lambda bad, intervals=intervals: intervals(bad, S, H), [None, "hcl-ml", TRUTH], "estimate"),
        (
            f"{name}, covariance",
            lambda bad, intervals=intervals: intervals(estimate(), bad, H),
            BAD_COVARIANCES[:3],
            "covariance",
        ),
        (f"{name}, sizes", lambda bad, intervals=intervals: intervals(estimate(), bad, H), BAD_COVARIANCES[3:], "hierarchy"),
        (f"{name}, hierarchy", lambda bad, intervals=intervals: intervals(estimate(), S, bad), BAD_HIERARCHIES, "hierarchy"),
    ]
for name in NAMES:
    fit = BASELINES[name]
    CASES += [
        (name, lambda bad, fit=fit: fit(bad, H, y=Y, key=KEY), BAD_VIEWS + OTHER_VIEWS, "views"),
        (f"{name}, hierarchy", lambda bad, fit=fit: fit(VIEWS, bad, y=Y, key=KEY), BAD_HIERARCHIES, "hierarchy"),
    ]
for name in ("sjive", "mmfl"):
    fit = BASELINES[name]
    CASES += [
        (f"{name}, y", lambda bad, fit=fit: fit(VIEWS, H, y=bad, key=KEY), BAD_RESPONSES, "y"),
    ]
for name in ("ajive-selected", "jive-permutation", "slide-bcv", "sjive", "mmfl-cv", "hnn"):
    fit = BASELINES[name]
    CASES += [(f"{name}, key", lambda bad, fit=fit: fit(VIEWS, H, y=Y, key=bad), BAD_KEYS, "key")]


@pytest.fixture(autouse=True)
def as_users_call():
    """Without run-time type checks, which only tests have: what the functions themselves say."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("call", "inputs", "argument"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_bad_input_is_refused_in_one_line_that_names_the_argument(call, inputs, argument):
    for i, bad in enumerate(inputs):
        what = f"input {i}, of type {type(bad).__name__}"
        try:
            call(bad)
        except ValueError as refusal:
            said = str(refusal)
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__} {error}; expected a ValueError") from error
        else:
            raise AssertionError(f"{what}: was taken; expected a ValueError")
        assert said.startswith(f"{argument}:"), f"{what}: {said}"
        assert "expected" in said, f"{what}: {said}"
        assert "\n" not in said, f"{what}: {said}"


def test_a_quantity_may_be_one_number():
    """The delta method of a function that returns a scalar, or a vector of one."""
    one, same = (
        delta_method(quantity, estimate(), S, H) for quantity in (lambda F: jnp.sum(F[0] * F[1]), lambda F: F[:1] @ F[1])
    )
    assert one.estimate.shape == (1,)
    np.testing.assert_allclose(one.standard_error, same.standard_error, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.asarray, np.ndarray.tolist, jnp.asarray])
def test_a_truth_takes_plain_numbers(kind):
    told = Truth(kind(np.asarray(TRUTH.loadings)), 0.5, H)
    assert told.loadings.dtype == told.noise_variance.dtype == float
    np.testing.assert_array_equal(told.covariance(), told.gram() + 0.5 * np.eye(11))


def test_every_public_name_is_in_the_list():
    tried = {case[0].replace(".", ",").partition(",")[0] for case in CASES}
    registries = {"ESTIMATORS", "LATENT_LAWS", "LIMITS", "Estimate"}  # their entries stand below; Estimate is what these return
    front_door = {
        "Decomposition",
        "fit",
        "load",
        "survival",
        "repeated",
    }  # test_decomposition.py and test_heads.py have their tables
    assert {*hcl_jax.__all__} - registries - front_door <= tried
    assert {*ESTIMATORS, *NAMES, "limits"} <= tried
