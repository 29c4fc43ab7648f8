"""Random intercepts: against matrices written out, the analysis of variance, statsmodels, and simulations."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_at_most, assert_close, assert_within, relative
from scipy.optimize import minimize_scalar
from test_compilation import compilations

from hcl_jax.intervals import BOUNDARY, VALID
from hcl_jax.prediction import random_intercept
from hcl_jax.structure import CONVERGED, NON_FINITE, ON_BOUND

BETA = np.array([0.5, -1.0])
SUBJECT = np.repeat(np.arange(25), [1, 2, 3, 4, 5] * 5)


def measurements(seed=0, subject=SUBJECT, spread=0.8, noise=0.6):
    """(scores, responses): one score that differs between subjects only in part, one that differs between them alone."""
    rng = np.random.default_rng(seed)
    n, S = len(subject), subject.max() + 1
    scores = np.column_stack([rng.standard_normal(n) + rng.standard_normal(S)[subject], rng.standard_normal(S)[subject]])
    return scores, 2 + scores @ BETA + spread * rng.standard_normal(S)[subject] + noise * rng.standard_normal(n)


class Dense:
    """Generalised least squares with the n × n covariance written out."""

    def __init__(self, scores, y, subject, ratio, method):
        n = len(y)
        self.X, self.same = np.column_stack([np.ones(n), scores]), (subject[:, None] == subject).astype(float)
        V = np.eye(n) + ratio * self.same
        inverse = np.linalg.inv(V)
        self.fixed = np.linalg.inv(self.X.T @ inverse @ self.X)
        self.b = self.fixed @ self.X.T @ inverse @ y
        rest = y - self.X @ self.b
        freedom = n - (self.X.shape[1] if method == "reml" else 0)
        self.residual = rest @ inverse @ rest / freedom
        self.effects = ratio * self.same @ inverse @ rest
        self.projected = inverse - (inverse @ self.X @ self.fixed @ self.X.T @ inverse if method == "reml" else 0)
        volume = np.linalg.slogdet(V)[1] - (np.linalg.slogdet(self.fixed)[1] if method == "reml" else 0)
        self.deviance = volume + freedom * np.log(self.residual)

    def variance_covariance(self):
        parts = [self.projected @ part / self.residual for part in (self.same, np.eye(len(self.same)))]
        return np.linalg.inv([[np.trace(a @ b) / 2 for b in parts] for a in parts])


@pytest.mark.parametrize("method", ["reml", "ml"])
def test_it_is_the_maximum_of_the_matrices_written_out(method):
    scores, y = measurements()
    fit = random_intercept(scores, y, SUBJECT, method=method)
    deviance = lambda ratio: Dense(scores, y, SUBJECT, ratio, method).deviance
    best = minimize_scalar(deviance, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-10})
    ratio = float(fit.intercept_variance / fit.residual_variance)
    assert_at_most(deviance(ratio) - best.fun, 1e-12, "deviance above the least")
    assert_within(ratio, best.x, 1e-6, "ratio")  # a search without derivatives has half of the digits
    dense = Dense(scores, y, SUBJECT, ratio, method)
    assert_close(np.append(fit.intercept, fit.coefficients), dense.b)
    assert_close(fit.covariance, dense.residual * dense.fixed, slack=1e4)
    assert_close(fit.residual_variance, dense.residual)
    assert_close(fit.variance_covariance, dense.variance_covariance(), slack=1e4)
    assert_close(fit.effects[SUBJECT], dense.effects, slack=1e4)
    assert fit.status == CONVERGED


def test_with_equal_numbers_of_rows_it_is_the_analysis_of_variance():
    subject = np.repeat(np.arange(25), 3)
    rng = np.random.default_rng(1)
    y = rng.standard_normal(25)[subject] + rng.standard_normal(75)
    means = y.reshape(25, 3).mean(axis=1)
    within = ((y - means[subject]) ** 2).sum() / 50
    fit = random_intercept(np.ones((75, 2)), y, subject)  # scores that are constant add nothing
    assert_close(fit.residual_variance, within)
    assert_close(fit.intercept_variance, means.var(ddof=1) - within / 3, slack=1e5)
    assert_close(fit.intercept, y.mean())
    assert fit.coefficients.tolist() == [0, 0]
    assert np.isinf(fit.intervals().standard_error).tolist() == [False, True, True]


def test_units_origins_and_the_order_of_rows_do_not_matter():
    scores, y = measurements()
    order = np.random.default_rng(3).permutation(len(y))
    fit = random_intercept(scores, y, SUBJECT)
    other = random_intercept((scores * [1e-5, 1e4] + [3.0, -1e6])[order], 1e3 * y[order] + 1e5, SUBJECT[order])
    assert_close(other.coefficients * np.array([1e-5, 1e4]) / 1e3, fit.coefficients, slack=1e7)
    assert_close(other.intercept_variance / 1e6, fit.intercept_variance, slack=1e7)
    assert_close(jnp.stack([other.effects[other.subjects.index(s)] for s in fit.subjects]) / 1e3, fit.effects, slack=1e7)


@pytest.mark.slow
def test_single_precision_has_the_digits_of_single_precision():
    scores, y = measurements()
    fit, single = (random_intercept(scores.astype(kind), y.astype(kind), SUBJECT) for kind in (np.float64, np.float32))
    assert single.coefficients.dtype == np.float32
    assert_close(single.coefficients, fit.coefficients, slack=1e4)
    assert_close(single.intercept_variance, fit.intercept_variance, slack=1e4)


def test_known_subjects_have_their_effect_and_new_ones_none():
    scores, y = measurements()
    names = np.array([f"patient {s}" for s in SUBJECT])
    fit = random_intercept(scores, y, names)
    mean = scores @ np.asarray(fit.coefficients) + float(fit.intercept)
    assert_close(fit.predict(scores), mean)
    assert_close(fit.predict(scores, names), mean + np.asarray(fit.effects)[SUBJECT])
    assert_close(fit.predict(scores[:2], ["someone else", "patient 3"]), mean[:2] + [0, float(fit.effects[3])])


def test_a_variance_of_zero_is_a_status_with_an_upper_bound():
    scores, y = measurements(spread=0.0, noise=1.0)
    means = np.array([y[s == SUBJECT].mean() for s in range(25)])
    even = y - means[SUBJECT] + scores @ BETA  # the subjects' means differ by less than noise would make them
    fit = random_intercept(scores, even, SUBJECT)
    assert fit.status == ON_BOUND
    assert float(fit.intercept_variance) == 0
    assert np.all(np.asarray(fit.effects) == 0)
    least_squares = np.linalg.lstsq(np.column_stack([np.ones(len(y)), scores]), even)[0]
    assert_close(np.append(fit.intercept, fit.coefficients), least_squares)
    variances = fit.variance_intervals(0.9)
    assert variances.status.tolist() == [BOUNDARY, VALID]
    assert (float(variances.lower[0]), float(variances.upper[0]) > 0) == (0, True)
    assert set(fit.intervals().status.tolist()) == {VALID}


def test_responses_without_any_variance_are_a_status():
    scores, _ = measurements()
    assert random_intercept(scores, np.full(len(SUBJECT), 3.0), SUBJECT).status == NON_FINITE
    assert random_intercept(scores, np.sin(SUBJECT), SUBJECT).status == ON_BOUND


def test_other_numbers_compile_nothing_anew():
    random_intercept(*measurements(), SUBJECT)
    with compilations() as again:
        random_intercept(*measurements(5), SUBJECT)
    assert not again


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"subjects": np.zeros(6)}, "subjects: are a single one"),
        ({"subjects": np.arange(6)}, "subjects: are others in every row"),
        ({"subjects": np.arange(5)}, "subjects: has shape (5,); expected (6,)"),
        ({"subjects": [1, 1, None, 2, 2, np.nan]}, "subjects: lack 2 of 6"),
        ({"y": [1.0, 2, np.nan, 4, 5, 6]}, "y: holds NaN"),
        ({"scores": np.ones((6, 5))}, "scores: has shape (6, 5); expected more rows"),
    ],
)
def test_bad_input_is_named(change, words):
    given = {"scores": np.arange(6.0)[:, None], "y": np.arange(6.0), "subjects": list("aabbcc")} | change
    with pytest.raises(ValueError, match=".*") as raised:
        random_intercept(**given)
    assert words in str(raised.value)


@pytest.mark.parametrize("method", ["reml", pytest.param("ml", marks=pytest.mark.slow)])
def test_it_is_what_statsmodels_finds(method):
    models = pytest.importorskip("statsmodels.api")
    scores, y = measurements(seed=7)
    reference = models.MixedLM(y, models.add_constant(scores), groups=SUBJECT).fit(
        reml=method == "reml", method=["powell", "bfgs"]
    )
    fit = random_intercept(scores, y, SUBJECT, method=method)
    assert_at_most(relative(np.append(fit.intercept, fit.coefficients), reference.fe_params), 1e-6, "coefficients")
    assert_at_most(relative(fit.intercept_variance, reference.cov_re[0, 0]), 1e-6, "variance of the intercepts")
    assert_at_most(relative(fit.residual_variance, reference.scale), 1e-6, "residual variance")
    effects = [np.ravel(reference.random_effects[s])[0] for s in fit.subjects]
    assert_at_most(relative(fit.effects, effects), 1e-6, "effects")
    # those of statsmodels are of the observed information of coefficients and variances together: other by 1/S
    assert_at_most(relative(fit.intervals().standard_error, reference.bse_fe), 1 / 25, "standard errors")


@pytest.mark.slow
def test_simulated_coefficients_and_variances_are_recovered():
    """500 draws of 60 subjects with 1 to 5 rows: means within 3 standard errors, nine intervals of ten hold the truth."""
    subject = np.repeat(np.arange(60), [1, 2, 3, 4, 5] * 12)
    scores, _ = measurements(2, subject)
    spread, noise, draws, level = 0.8, 0.6, 500, 0.9

    def one(key):
        k_effects, k_noise = jr.split(key)
        y = (
            2
            + jnp.asarray(scores @ BETA)
            + spread * jr.normal(k_effects, (60,))[subject]
            + noise * jr.normal(k_noise, subject.shape)
        )
        fit = random_intercept(scores, y, subject)
        return fit.intervals(level), fit.variance_intervals(level)

    coefficients, variances = jax.jit(jax.vmap(one))(jr.split(jr.key(0), draws))
    tolerance = 3 * np.sqrt(level * (1 - level) / draws)
    for found, truth, what in ((coefficients, (2.0, *BETA), "coefficient"), (variances, (spread**2, noise**2), "variance")):
        for k, value in enumerate(truth):
            estimates = np.asarray(found.estimate[:, k])
            assert_within(estimates.mean(), value, 3 * estimates.std() / np.sqrt(draws), f"{what} {k}")
            held = (found.lower[:, k] <= value) & (value <= found.upper[:, k])
            assert_within(held.mean(), level, tolerance, f"coverage of {what} {k}")
