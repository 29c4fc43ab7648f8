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
from hcl_jax.baselines.linear import predict, transform, variance_explained
from hcl_jax.evaluation import corrected_mean
from hcl_jax.intervals import block_norm_intervals, delta_method, gram_intervals
from hcl_jax.model import sample_coefficients, sample_rows_given_covariance
from hcl_jax.prediction import FoldMoments, fold_of_rows, least_squares_scores, posterior_mean_scores, softmax_regression
from hcl_jax.real_data import fit_truth, gaussian_log_likelihood
from hcl_jax.selection import select
from hcl_jax.streaming import accumulate

H = Hierarchy((6, 5), {(1, 2): 1, (1,): 1, (2,): 1})
KEY, N = jr.key(0), 40
RNG = np.random.default_rng(0)
VIEWS = [RNG.standard_normal((N, dim)) for dim in H.dims]
X, Y, LABELS = np.concatenate(VIEWS, axis=1), VIEWS[0][:, 0], np.arange(N) % 2
TRUTH, S = problem(H, noise=0.5, n=200)
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
BAD_RESPONSES = [None, "y", 3.0, Y[:-1], Y[:, None], Y * 1j, np.where(Y > 1, np.nan, Y), Y.astype(str), [None] * N]
BAD_LABELS = [None, "ab", LABELS[:-1], LABELS[:, None], LABELS + 0.5, LABELS + 1, LABELS - 1, 0 * LABELS, LABELS.astype(str)]
BAD_NOISE = [None, "x", -1.0, np.nan, np.inf, np.ones(2), -np.ones(11), np.eye(11), 1j]
BAD_COUNTS = [None, 0, -3, 1.5, np.nan, "10"]
BAD_LEVELS = [0, 1, -1, 2, np.nan]
BAD_STRUCTURES = [(2, 3), (0,), "", "13", (), 0, -1, 1.5, "a"]
BAD_ENTRIES = [(16, 15), [(11, 0)], [(99, -1)], [(0, 1, 2)], [(0.5, 1)], [], None, "01"]

Case = tuple[str, Callable, list, str]
CASES: list[Case] = [
    ("SampleCovariance.from_data", SampleCovariance.from_data, BAD_VIEWS, "views"),
    ("fit_truth", fit_truth, BAD_VIEWS, "views"),
    ("fit_truth, of a hierarchy", lambda bad: fit_truth(bad, H), OTHER_VIEWS, "views"),
    ("accumulate", lambda bad: accumulate([bad]), [[VIEWS[0], bad[1]] for bad in BAD_VIEWS[7:9]], "views"),
    ("transform", lambda bad: transform(decomposition(), bad), BAD_VIEWS + OTHER_VIEWS, "views"),
    ("variance_explained", lambda bad: variance_explained(decomposition(), bad), BAD_VIEWS + OTHER_VIEWS, "views"),
    ("predict", lambda bad: predict(BASELINES["mmfl"](VIEWS, H, y=Y, key=KEY), bad), BAD_VIEWS + OTHER_VIEWS, "views"),
    ("SampleCovariance", lambda bad: SampleCovariance(bad, n=50), BAD_MATRICES, "matrix"),
    ("SampleCovariance of rows", lambda bad: SampleCovariance(data=bad, n=50), BAD_MATRICES, "data"),
    ("SampleCovariance, n", lambda bad: SampleCovariance(np.eye(3), n=bad), [0, 1, -2, np.nan, np.inf], "n"),
    ("sample_loadings, key", lambda bad: sample_loadings(bad, H), BAD_KEYS, "key"),
    ("sample_loadings, hierarchy", lambda bad: sample_loadings(KEY, bad), BAD_HIERARCHIES, "hierarchy"),
    ("sample_truth, key", lambda bad: sample_truth(bad, H, 1.0), BAD_KEYS, "key"),
    ("sample_truth, hierarchy", lambda bad: sample_truth(KEY, bad, 1.0), BAD_HIERARCHIES, "hierarchy"),
    ("sample_truth, noise_variance", lambda bad: sample_truth(KEY, H, bad), BAD_NOISE, "noise_variance"),
    ("sample_truth, noise", lambda bad: sample_truth(KEY, H, 1.0, noise=bad), [None, "views", 3], "noise"),
    ("sample_truth, by view", lambda bad: sample_truth(KEY, H, bad, noise="view"), [np.ones(2), np.ones(12)], "noise_variance"),
    ("Truth", lambda bad: Truth(TRUTH.loadings, bad, H, noise="view"), [jnp.ones(2), jnp.ones((11, 1))], "noise_variance"),
    ("sample_coefficients, key", lambda bad: sample_coefficients(bad, H), BAD_KEYS, "key"),
    ("sample_coefficients, support", lambda bad: sample_coefficients(KEY, H, [bad]), BAD_STRUCTURES, "support"),
    ("sample_observations, key", lambda bad: sample_observations(bad, TRUTH, 5), BAD_KEYS, "key"),
    ("sample_observations, n_samples", lambda bad: sample_observations(KEY, TRUTH, bad), BAD_COUNTS, "n_samples"),
    ("sample_observations, latent", lambda bad: sample_observations(KEY, TRUTH, 5, bad), ["normal", None, 3], "latent"),
    ("sample_wishart_covariance, key", lambda bad: sample_wishart_covariance(bad, TRUTH, 50), BAD_KEYS, "key"),
    ("sample_wishart_covariance, n", lambda bad: sample_wishart_covariance(KEY, TRUTH, bad), [0, 11, -5, np.nan], "n"),
    ("sample_factored_covariance, key", lambda bad: sample_factored_covariance(bad, TRUTH, 5), BAD_KEYS, "key"),
    ("sample_factored_covariance, n", lambda bad: sample_factored_covariance(KEY, TRUTH, bad), [*BAD_COUNTS, 1], "n_samples"),
    ("sample_data_covariance, key", lambda bad: sample_data_covariance(bad, TRUTH, 50), BAD_KEYS, "key"),
    ("sample_data_covariance, n", lambda bad: sample_data_covariance(KEY, TRUTH, bad), [*BAD_COUNTS, 1], "n"),
    ("sample_data_covariance, latent", lambda bad: sample_data_covariance(KEY, TRUTH, 50, bad), ["normal", None], "latent"),
    ("sample_rows_given_covariance, key", lambda bad: sample_rows_given_covariance(bad, S, 200), BAD_KEYS, "key"),
    ("sample_rows_given_covariance, n", lambda bad: sample_rows_given_covariance(KEY, S, bad), BAD_COUNTS, "n_samples"),
    ("select, covariance", lambda bad: select(bad, H), BAD_COVARIANCES[:3], "covariance"),
    ("select, hierarchy", lambda bad: select(S, bad), BAD_HIERARCHIES, "hierarchy"),
    ("recovery_errors", lambda bad: recovery_errors(bad, H, TRUTH.loadings, H), [jnp.ones((11, 2))], "loadings_hat"),
    ("recovery_errors, truth", lambda bad: recovery_errors(TRUTH.loadings, H, bad, H), [jnp.ones((10, 3))], "loadings"),
    ("limits, covariance", lambda bad: LIMITS["cramer-rao"](TRUTH, bad), [BAD_COVARIANCES[3]], "covariance"),
    ("limits, truth", lambda bad: LIMITS["bayes"](bad, S), [TRUTH], "truth"),
    ("Hierarchy.rank", H.rank, BAD_STRUCTURES, "structure"),
    ("Hierarchy.columns", H.columns, BAD_STRUCTURES, "structure"),
    ("Hierarchy.structure_rows", H.structure_rows, BAD_STRUCTURES, "structure"),
    ("Hierarchy.rows", H.rows, [0, -1, 3, 1.5, "a", None, (1, 2)], "modality"),
    ("Hierarchy.active_columns", H.active_columns, [0, -1, 3, 1.5, "a", None, (1, 2)], "modality"),
    ("Hierarchy, dims", lambda bad: Hierarchy(bad, {"1": 1}), [None, (), 0, (0,), (-1, 2), ("a",), (1.5,)], "dims"),
    ("Hierarchy, ranks", lambda bad: Hierarchy((6, 5), bad), [None, (), {}, {"13": 1}, {"1": -1}, {"1": 1.5}, {"1": 7}], "ranks"),
    ("gram_intervals, entries", lambda bad: gram_intervals(estimate(), S, H, bad), BAD_ENTRIES, "entries"),
    ("gram_intervals, level", lambda bad: gram_intervals(estimate(), S, H, [(0, 1)], bad), BAD_LEVELS, "level"),
    ("block_norm_intervals, blocks", lambda bad: block_norm_intervals(estimate(), S, H, [(bad, 1)]), BAD_STRUCTURES, "blocks"),
    ("block_norm_intervals, level", lambda bad: block_norm_intervals(estimate(), S, H, [("12", 1)], bad), BAD_LEVELS, "level"),
    ("block_norm_intervals, zero", lambda bad: block_norm_intervals(estimate(), S, H, [bad]), [("1", 2), ("12", 3)], "blocks"),
    ("delta_method, quantity", lambda bad: delta_method(bad, estimate(), S, H), [lambda F: F[0, :1]], "quantity"),
    ("delta_method, level", lambda bad: delta_method(lambda F: F[:1] @ F[1], estimate(), S, H, bad), BAD_LEVELS, "level"),
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
    ("fold_of_rows, n_folds", lambda bad: fold_of_rows(KEY, N, bad), [0, 1, N + 1, 2.5, None], "n_folds"),
    ("softmax_regression, scores", lambda bad: softmax_regression(bad, LABELS, 2, key=KEY), BAD_MATRICES, "scores"),
    ("softmax_regression, labels", lambda bad: softmax_regression(X, bad, 2, key=KEY), BAD_LABELS, "labels"),
    ("softmax_regression, key", lambda bad: softmax_regression(X, LABELS, 2, key=bad), BAD_KEYS, "key"),
    ("softmax_regression, n_folds", lambda bad: softmax_regression(X, LABELS, 2, key=KEY, n_folds=bad), [0, 1, N + 1], "n_folds"),
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


def test_every_public_name_is_in_the_list():
    tried = {case[0].replace(".", ",").partition(",")[0] for case in CASES}
    registries = {"ESTIMATORS", "LATENT_LAWS", "LIMITS", "Estimate"}  # their entries stand below; Estimate is what these return
    assert {*hcl_jax.__all__} - registries <= tried
    assert {*ESTIMATORS, *NAMES, "limits"} <= tried
