"""Cox regression and concordance: against sums written out, scikit-survival, linear programs, and the coverage of intervals."""

from itertools import product

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_at_most, assert_close, assert_within, relative
from scipy.optimize import linprog
from test_compilation import compilations

from hcl_jax.intervals import BOUNDARY, INEFFICIENT, NOT_CONVERGED, VALID
from hcl_jax.prediction import MONOTONE, as_survival, concordance, concordance_difference, cox_regression
from hcl_jax.prediction.survival import _folds_with_events
from hcl_jax.structure import CONVERGED, OUT_OF_STEPS

BETA = np.array([0.7, -0.4, 0.0])


def outcomes(seed=0, n=120, grid=5.0, K=3):
    """(scores, times, events) of proportional hazards; times in steps of 1/grid, so that many are tied."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((n, K))
    ends, censored = rng.exponential(np.exp(-scores @ BETA[:K])), 2 * rng.exponential(size=n)
    return scores, np.ceil(grid * np.minimum(ends, censored)) / grid, ends <= censored


def draw(key, n):
    """(scores, times, events, a risk score with noise), in JAX."""
    k_scores, k_ends, k_censored, k_noise = jr.split(key, 4)
    scores = jr.normal(k_scores, (n, 3))
    risk = scores @ jnp.asarray(BETA)
    ends, censored = jr.exponential(k_ends, (n,)) * jnp.exp(-risk), 2 * jr.exponential(k_censored, (n,))
    return scores, jnp.minimum(ends, censored), ends <= censored, risk + jr.normal(k_noise, (n,))


def log_likelihood(b, scores, times, events, ties):
    """The partial log-likelihood, with a row of weights of all hazards for each event."""
    weights = []
    for time in np.unique(times[events]):
        died, at_risk = events & (times == time), times >= time
        weights += [at_risk - died * (l / died.sum() if ties == "efron" else 0.0) for l in range(died.sum())]
    eta = scores @ b
    return eta[events].sum() - jnp.log(np.array(weights) @ jnp.exp(eta)).sum()


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@pytest.mark.parametrize("penalty", [0.0, 4.0])
def test_it_is_the_maximum_of_the_sums_written_out(ties, penalty):
    scores, times, events = outcomes()
    fit = cox_regression(scores, times, events, penalty=penalty, ties=ties)
    plain = lambda b: log_likelihood(b, scores, times, events, ties)
    gradient, information = jax.grad(plain)(fit.coefficients), -jax.hessian(plain)(fit.coefficients)
    assert_close(fit.log_likelihood, plain(fit.coefficients))
    assert_at_most(np.abs(gradient - penalty * fit.coefficients).max(), 1e-10, "gradient")
    spread = np.linalg.inv(information + penalty * np.eye(3))
    assert_close(fit.covariance, spread @ information @ spread, slack=1e5)
    assert fit.status == CONVERGED
    assert set(fit.intervals().status.tolist()) == {INEFFICIENT if penalty else VALID}


def test_survival_curves_are_those_of_the_baseline_hazard_written_out():
    scores, times, events = outcomes()
    fit, new, at = cox_regression(scores, times, events), scores[:4] + 1, np.array([0.0, 0.2, 0.5, 3.0, 99.0])
    risk = np.exp((scores - np.asarray(fit.centre)) @ np.asarray(fit.coefficients))
    steps = {time: (events & (times == time)).sum() / risk[times >= time].sum() for time in np.unique(times[events])}
    baseline = np.array([sum(step for time, step in steps.items() if time <= end) for end in at])
    expected = np.exp(-np.exp(np.asarray(fit.log_hazard(new)))[:, None] * baseline)
    assert_close(fit.survival(new, at), expected)
    assert np.all(np.asarray(fit.survival(new, at))[:, 0] == 1)


def test_units_origins_and_the_order_of_rows_do_not_matter():
    scores, times, events = outcomes()
    turned, order = np.array([1e-6, 1.0, 1e7]), np.random.default_rng(3).permutation(len(times))
    fit = cox_regression(scores, times, events)
    other = cox_regression((scores * turned + [1e-3, 50.0, -1e9])[order], times[order] * 30, events[order])
    assert_close(other.coefficients * turned, fit.coefficients, slack=1e9)  # 1e9 in units of 1e7 takes two digits of the scores
    assert_close(other.log_likelihood, fit.log_likelihood, slack=1e6)


@pytest.mark.slow
def test_single_precision_has_the_digits_of_single_precision():
    scores, times, events = outcomes(n=400)
    fit, single = (cox_regression(scores.astype(kind), times, events) for kind in (np.float64, np.float32))
    assert single.coefficients.dtype == np.float32
    assert single.status == CONVERGED
    assert_close(single.coefficients, fit.coefficients)


@pytest.mark.slow
def test_the_penalty_is_where_the_folds_are_best():
    scores, times, events = outcomes(n=90)
    key = jr.key(4)
    fit = cox_regression(scores, times, events, choose="cv", key=key, n_folds=3, n_penalties=5)
    order = np.argsort(-times, kind="stable")
    scores, times, events = scores[order], times[order], events[order]
    fold = np.asarray(_folds_with_events(key, jnp.asarray(events), 3))
    deaths = np.bincount(fold, weights=events)
    assert np.ptp(deaths) <= 1
    assert np.ptp(np.bincount(fold)) <= 1
    penalties = events.sum() * scores.var(axis=0).mean() * np.logspace(2, -4, 5)
    held_out = [held_out_loss(scores, times, events, fold, penalty) for penalty in penalties]
    assert_close(fit.penalty, penalties[np.argmin(held_out)])
    assert_close(fit.held_out, min(held_out), slack=1e6)
    again = cox_regression(scores, times, events, penalty=float(fit.penalty))
    assert_close(fit.coefficients, again.coefficients, slack=1e6)
    assert fit.intervals().reasons() == again.intervals().reasons()


def held_out_loss(scores, times, events, fold, penalty):
    """Minus what the folds add to the partial log-likelihood, per event."""
    added = 0.0
    for out in range(fold.max() + 1):
        kept = fold != out
        fit = cox_regression(scores[kept], times[kept], events[kept], penalty=penalty)
        added += float(log_likelihood(fit.coefficients, scores, times, events, "efron") - fit.log_likelihood)
    return -added / events.sum()


def has_a_maximum(scores, times, events):
    """By a linear program: no direction is there along which no event falls behind any row at risk, and one is ahead."""
    ahead = np.concatenate([scores[i] - scores[times >= times[i]] for i in np.flatnonzero(events)])
    best = linprog(-ahead.sum(axis=0), A_ub=-ahead, b_ub=np.zeros(len(ahead)), bounds=(-1, 1))
    return -best.fun < 1e-7


def test_a_likelihood_without_a_maximum_is_told_from_one_with():
    found = {True: 0, False: 0}
    for seed in range(40):
        scores, times, events = outcomes(seed, n=6, K=2)
        if seed % 4 == 0:
            scores[:, 0] = np.round(scores[:, 0])  # ties in the scores: orders that are perfect but for equal risks
        if events.any():
            there = has_a_maximum(scores, times, events)
            fit = cox_regression(scores, times, events)
            assert (fit.status == CONVERGED) == there, (seed, fit.status)
            assert (fit.status == MONOTONE) == (not there)
            found[there] += 1
    assert min(found.values()) >= 5, "both cases are among the draws"


def test_perfectly_ordered_events_are_a_status():
    scores, times, events = outcomes(grid=1e6)
    only = -times[:, None] * [1, 0, 0]
    alone = cox_regression(only, times, events)
    assert alone.status == MONOTONE
    assert float(concordance(alone.log_hazard(only), times, events).estimate) == 1
    perfect = np.column_stack([-times, scores[:, :2]])
    fit = cox_regression(perfect, times, events)
    assert fit.status == MONOTONE
    assert np.isfinite(fit.coefficients).all()
    assert set(fit.intervals().status.tolist()) == {NOT_CONVERGED}
    penalised = cox_regression(perfect, times, events, penalty=1.0)
    assert penalised.status == CONVERGED


def test_no_steps_left_is_a_status():
    assert cox_regression(*outcomes(), max_steps=2).status == OUT_OF_STEPS


@pytest.mark.slow
def test_scores_that_others_make_up_have_no_standard_error():
    scores, times, events = outcomes()
    fit = cox_regression(scores, times, events)
    more = cox_regression(np.column_stack([scores, scores[:, 0] + scores[:, 1], np.full(len(times), 7.0)]), times, events)
    errors = np.asarray(more.intervals().standard_error)
    assert np.isinf(errors).tolist() == [True, True, False, True, True]
    assert_close(errors[2], fit.intervals().standard_error[2], slack=1e5)
    assert_close(more.log_likelihood, fit.log_likelihood)
    assert more.status == CONVERGED


def test_other_numbers_compile_nothing_anew():
    scores, times, events = outcomes()
    cox_regression(scores, times, events, penalty=0.0)
    concordance(scores[:, 0], times, events)
    scores, times, events = outcomes(1)
    with compilations() as again:
        fit = cox_regression(scores, times, events, penalty=3.0)
        concordance(scores[:, 1], times, events)
    assert not again
    assert fit.status == CONVERGED


@pytest.mark.slow
def test_a_batch_is_the_fits_one_by_one():
    keys = jr.split(jr.key(0), 3)
    both = lambda key: (
        cox_regression(*draw(key, 50)[:3]).coefficients,
        concordance(draw(key, 50)[3], *draw(key, 50)[1:3]).estimate,
    )
    batch = jax.vmap(both)(keys)
    singles = [both(key) for key in keys]
    assert_close(batch[0], jnp.stack([b for b, _ in singles]), slack=1e5)
    assert_close(batch[1], jnp.stack([index for _, index in singles]))


def test_outcomes_are_read_as_one_array_or_as_two():
    scores, times, events = outcomes()
    joint = np.array(list(zip(events, times, strict=True)), dtype=[("died", bool), ("days", float)])
    for given in ((joint, None), (times, events.astype(int)), (list(times), events.tolist())):
        read = as_survival(*given, len(times))
        assert np.array_equal(read[0], times)
        assert np.array_equal(read[1], events)
    assert cox_regression(scores, joint).status == CONVERGED


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"times": [-1.0, 2, 3, 4]}, "times: hold -1; expected times from 0"),
        ({"times": [np.nan, 2, 3, 4]}, "times: holds NaN"),
        ({"times": [1.0, 2, 3]}, "times: has shape (3,)"),
        ({"times": np.ones((4, 2))}, "times: has shape (4, 2)"),
        ({"events": [1, 2, 2, 1]}, "events: hold 2; expected 1 (the event) or 0 (censored)"),
        ({"events": [0, 0, 0, 0]}, "events: all 4 rows are censored"),
        ({"events": None}, "events: is None; expected 1 (the event) or 0"),
        ({"events": ["yes", "no", "no", "no"]}, "events: has type"),
        ({"scores": [[1.0], [np.inf], [0], [2]]}, "scores: holds NaN or infinite"),
        ({"penalty": -1.0}, "penalty: is -1.0"),
        ({"choose": "cv"}, "key: is None"),
        ({"choose": "cv", "key": jr.key(0), "penalty": 1.0}, "penalty: is 1; expected none"),
        ({"choose": "cv", "key": jr.key(0), "n_folds": 4}, "n_folds: is 4; expected at most the number of events, 3"),
        ({"max_steps": 0}, "max_steps: is 0"),
    ],
)
def test_bad_input_is_named(change, words):
    given = {"scores": [[1.0], [3.0], [0.0], [2.0]], "times": [1.0, 2, 3, 4], "events": [1, 1, 0, 1]} | change
    with pytest.raises(ValueError, match=".*") as raised:
        cox_regression(given.pop("scores"), given.pop("times"), given.pop("events"), **given)
    assert words in str(raised.value)


def test_bad_risks_are_named():
    for arguments, words in (
        (([1.0, 2.0], [1.0, 1.0], [1, 1]), "times: leave no pair"),
        (([[1.0], [2.0]], [1.0, 2.0], [1, 1]), "risk: has shape (2, 1)"),
        (([1.0, np.nan], [1.0, 2.0], [1, 1]), "risk: holds NaN"),
        (([1.0, 2.0], [1.0, 2.0], [1, 1], 95.0), "level: is 95"),
    ):
        with pytest.raises(ValueError, match=".*") as raised:
            concordance(*arguments)
        assert words in str(raised.value)
    with pytest.raises(ValueError, match="second: has shape"):
        concordance_difference([1.0, 2.0], [1.0], [1.0, 2.0], [1, 1])


def weighted_index(weights, risk, times, events):
    """Harrell's index of weighted rows, pair by pair."""
    concordant = comparable = 0.0
    for i in range(len(risk)):
        for j in range(len(risk)):
            if events[i] and (times[i] < times[j] or (times[i] == times[j] and not events[j])):
                comparable += weights[i] * weights[j]
                concordant += weights[i] * weights[j] * (0.5 if risk[i] == risk[j] else float(risk[i] > risk[j]))
    return concordant / comparable


def jackknife(risk, times, events, step=1e-5):
    """The derivatives of the index in the weights of the rows, by differences."""
    n = len(risk)
    moved = np.stack([np.ones(n) + step * np.eye(n), np.ones(n) - step * np.eye(n)])
    index = np.array([[weighted_index(weights, risk, times, events) for weights in side] for side in moved])
    return (index[0] - index[1]) / (2 * step)


def test_concordance_and_its_errors_are_the_sums_written_out():
    scores, times, events = outcomes(n=30)
    risks = [np.round(scores[:, k], 1) for k in (0, 1)]  # tied risks as well
    found = [concordance(risk, times, events, 0.9) for risk in risks]
    slopes = [jackknife(risk, times, events) for risk in risks]
    for risk, interval, slope in zip(risks, found, slopes, strict=True):
        assert_close(interval.estimate, weighted_index(np.ones(30), risk, times, events))
        assert_within(interval.standard_error, np.linalg.norm(slope), 1e-8, "standard error")
        assert interval.status == VALID
        assert 0 < interval.lower < interval.estimate < interval.upper < 1
    difference = concordance_difference(*risks, times, events, 0.9)
    assert_close(difference.estimate, found[0].estimate - found[1].estimate)
    assert_within(difference.standard_error, np.linalg.norm(slopes[0] - slopes[1]), 1e-8, "standard error of the difference")


def test_indices_without_error_say_so():
    _, times, events = outcomes(n=30, grid=1e6)
    perfect = concordance(-times, times, events)
    assert (float(perfect.estimate), float(perfect.lower), float(perfect.upper)) == (1, 0, 1)
    assert perfect.status == BOUNDARY
    assert perfect.reasons()[0].startswith("boundary")
    same = concordance_difference(times, 2 * times, times, events)
    assert (float(same.estimate), float(same.standard_error), int(same.status)) == (0, 0, BOUNDARY)


def real_outcomes(name):
    """(scores, times, events) of an open data set that scikit-survival comes with; its numeric columns."""
    datasets = pytest.importorskip("sksurv.datasets")
    frame, outcome = getattr(datasets, f"load_{name}")()
    event, time = outcome.dtype.names
    return frame.select_dtypes("number").to_numpy(float), outcome[time], outcome[event]


@pytest.mark.parametrize("penalty", [0.0, 10.0])
@pytest.mark.parametrize(
    ("name", "ties"),
    [
        ("veterans_lung_cancer", "efron"),
        *[
            pytest.param(name, ties, marks=pytest.mark.slow)
            for name, ties in (("veterans_lung_cancer", "breslow"), *product(("gbsg2", "whas500"), ("efron", "breslow")))
        ],
    ],
)
def test_real_data_give_what_scikit_survival_finds(name, ties, penalty):
    models, metrics = pytest.importorskip("sksurv.linear_model"), pytest.importorskip("sksurv.metrics")
    scores, times, events = real_outcomes(name)
    assert len(np.unique(times[events])) < events.sum(), "some events are tied"
    outcome = np.array(list(zip(events, times, strict=True)), dtype=[("event", bool), ("time", float)])
    reference = models.CoxPHSurvivalAnalysis(alpha=penalty, ties=ties, tol=1e-12, n_iter=200).fit(scores, outcome)
    fit = cox_regression(scores, outcome, penalty=penalty, ties=ties)
    at = reference.unique_times_
    assert_at_most(relative(fit.coefficients, reference.coef_), 1e-8, f"{name}: coefficients")
    survival = reference.predict_survival_function(scores[:9], return_array=True)
    assert_at_most(np.abs(fit.survival(scores[:9], at) - survival).max(), 1e-8, f"{name}: survival")
    risk = np.round(reference.predict(scores), 1)
    expected, *_ = metrics.concordance_index_censored(events, times, risk)
    assert_at_most(abs(concordance(risk, times, events).estimate - expected), 1e-12, f"{name}: concordance")


@pytest.mark.slow
@pytest.mark.parametrize("n", [80, 250])
def test_ninety_percent_intervals_hold_the_truth_in_nine_draws_of_ten(n):
    """500 draws: the share that holds it has a standard error of 0.0134. The true indices are those of 20,000 rows, whose error
    is at most an eighth of that of a draw."""
    draws, level = 500, 0.9
    scores, times, events, noisy = draw(jr.key(11), 20_000)
    true = [float(concordance(risk, times, events).estimate) for risk in (scores @ jnp.asarray(BETA), noisy)]

    def one(key):
        scores, times, events, noisy = draw(key, n)
        fit, risk = cox_regression(scores, times, events), scores @ jnp.asarray(BETA)
        index = concordance(risk, times, events, level)
        return fit.status, fit.intervals(level), index, concordance_difference(risk, noisy, times, events, level)

    status, coefficients, index, difference = jax.jit(jax.vmap(one))(jr.split(jr.key(12), draws))
    assert np.all(np.asarray(status) == CONVERGED)
    tolerance = 3 * np.sqrt(level * (1 - level) / draws)
    for k, beta in enumerate(BETA):
        held = (coefficients.lower[:, k] <= beta) & (beta <= coefficients.upper[:, k])
        assert_within(held.mean(), level, tolerance, f"n = {n}: coverage of coefficient {k}")
    for what, interval, truth in (("concordance", index, true[0]), ("difference", difference, true[0] - true[1])):
        held = (interval.lower <= truth) & (truth <= interval.upper)
        assert_within(held.mean(), level, tolerance, f"n = {n}: coverage of the {what}")
