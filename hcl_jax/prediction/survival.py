"""Survival times from scores: Cox regression, its penalty by cross-validation, its baseline hazard and survival curves."""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from hcl_jax.compiled import compiled
from hcl_jax.intervals import INEFFICIENT, NOT_CONVERGED, VALID, Interval, check_level, symmetric_interval
from hcl_jax.linalg import spd_inverse
from hcl_jax.prediction.paths import (
    Rule,
    ScoreAxes,
    check_option,
    choose_penalty,
    covariance_of_scores,
    positive,
    score_axes,
)
from hcl_jax.structure import CONVERGED, NON_FINITE, ON_BOUND, OUT_OF_STEPS
from hcl_jax.views import as_key, as_matrix, as_number, as_response, check_count

MONOTONE = ON_BOUND  # what that status says of a Cox regression
Ties = Literal["efron", "breslow"]
PenaltyChoice = Literal["given", "cv"]


class CoxRegression(eqx.Module):
    """The hazard of a row at time t, h₀(t) exp((z − centre)ᵀb), with `covariance` that of b and `cumulative_baseline` H₀ at
    the `times` of the rows, ascending, as Breslow (1974) estimates it.

    `penalty` is 0 where there is none. `held_out` is minus the cross-validated partial log-likelihood per event, NaN where the
    penalty was given; `log_likelihood` is the partial one, without the penalty. `status` is one of `hcl_jax.structure`:
    `MONOTONE` says that some combination of the scores orders the events without fault, so that the likelihood rises for ever,
    or so nearly that hazards would leave the range of numbers: the coefficients are where the search broke off.
    """

    coefficients: Float[Array, " K"]
    covariance: Float[Array, "K K"]
    centre: Float[Array, " K"]
    times: Float[Array, " n"]
    cumulative_baseline: Float[Array, " n"]
    penalty: Float[Array, ""]
    held_out: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    status: Int[Array, ""]

    def log_hazard(self, scores: Any) -> Float[Array, " m"]:
        """The logarithm of each row's hazard over that of a row at the centre: its risk score."""
        scores = as_matrix(scores, "scores", (None, self.centre.size)).astype(self.centre.dtype)
        return (scores - self.centre[None, :]) @ self.coefficients

    def cumulative_hazard(self, scores: Any, times: Any) -> Float[Array, "m T"]:
        """H₀(t) exp(log hazard) of rows of scores at T times: a step function, level after the last time that was seen."""
        times = jnp.asarray(times, self.times.dtype)
        before = jnp.searchsorted(self.times, times, side="right")
        baseline = jnp.append(jnp.zeros_like(self.penalty), self.cumulative_baseline)[before]
        return jnp.exp(self.log_hazard(scores))[:, None] * baseline[None, :]

    def survival(self, scores: Any, times: Any) -> Float[Array, "m T"]:
        """The probability of no event up to each of T times, exp(−H(t)), for rows of scores."""
        return jnp.exp(-self.cumulative_hazard(scores, times))

    def intervals(self, level: float = 0.95) -> Interval:
        """Of the coefficients, b_k and normal quantiles times its standard error (Wald).

        Those of a penalised fit are drawn to 0, and marked as not efficient; a score that is a linear combination of others
        has an infinite standard error. Raises `ValueError` for a level outside (0, 1).
        """
        check_level(level)
        penalised = jnp.where(self.penalty > 0, INEFFICIENT, VALID)
        status = jnp.where(self.status == CONVERGED, penalised, NOT_CONVERGED)
        variances = jnp.diagonal(self.covariance)
        return symmetric_interval(self.coefficients, variances, level, jnp.broadcast_to(status, variances.shape))


def as_survival(times: Any, events: Any, n: int) -> tuple[Float[Array, " n"], Bool[Array, " n"]]:
    """(times, whether each ends with the event or is censored then) of n rows.

    `events` hold booleans, or 1 and 0. Without them `times` is one structured array with a field of booleans and a field of
    times, as scikit-survival has them. Raises `ValueError` that names the argument for another number of rows, times that are
    negative or not finite, events that are not 0 or 1, and no event. (Traced values pass.)
    """
    if events is None:
        times, events = _of_fields(times)
    times, events = as_response(times, n, argument="times"), as_response(events, n, argument="events")
    if not isinstance(times, jax.core.Tracer) and (least := float(times.min())) < 0:
        raise ValueError(f"times: hold {least:g}; expected times from 0, since the start of each row")
    if not isinstance(events, jax.core.Tracer):
        other = np.setdiff1d(np.asarray(events), [0, 1])
        if other.size:
            raise ValueError(f"events: hold {other[0]:g}; expected 1 (the event) or 0 (censored)")
        if not bool(events.any()):
            raise ValueError(f"events: all {n} rows are censored; expected at least one event")
    return times, events > 0


def _of_fields(outcome: Any) -> tuple[np.ndarray, np.ndarray]:
    """(times, events) of a structured array."""
    fields = getattr(getattr(outcome, "dtype", None), "names", None) or ()
    flags = [name for name in fields if outcome.dtype[name].kind == "b"]
    if len(fields) != 2 or len(flags) != 1:
        raise ValueError(
            "events: is None; expected 1 (the event) or 0 (censored) for each row, or times that have a field of them"
        )
    (other,) = set(fields) - set(flags)
    return outcome[other], outcome[flags[0]]


class _RiskSets(NamedTuple):
    """Rows by falling time: those at risk at the time of row i are the rows 0 … last_i, tied with it first_i … last_i."""

    rows: Float[Array, "n K"]
    events: Bool[Array, " n"]
    first: Int[Array, " n"]
    last: Int[Array, " n"]

    def at_risk(self, values: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Sums over the rows at risk at the time of each."""
        return jnp.cumsum(values, axis=0)[self.last]

    def tied(self, values: Float[Array, "n ..."]) -> Float[Array, "n ..."]:
        """Sums over the rows that share the time of each; not by differences, in which large hazards would swallow small ones."""
        return jax.ops.segment_sum(values, self.first, self.first.size, indices_are_sorted=True)[self.first]

    def until(self, values: Float[Array, " n"]) -> Float[Array, " n"]:
        """Sums over the rows whose time is at most that of each."""
        return jnp.cumsum(values[::-1])[::-1][self.first]


class _Likelihood(NamedTuple):
    value: Float[Array, ""]
    gradient: Float[Array, " K"]
    information: Float[Array, "K K"]


def _likelihood(risk: _RiskSets, kept: Bool[Array, " n"], point: Float[Array, " K"], ties: Ties) -> _Likelihood:
    """The partial log-likelihood of the rows that are kept, its gradient, and minus its Hessian (Cox 1972; Efron 1977).

    The l-th of m tied events is compared with the hazards at risk less (l/m) times those of the m, l = 0 … m − 1; after Breslow
    with all that are at risk. The Hessian's second moments are one product over rows, each weighted by the events that are
    expected of it, and need no sum over risk sets.
    """
    eta = risk.rows @ point
    top = jnp.max(jnp.where(kept, eta, -jnp.inf))
    hazard = jnp.where(kept, jnp.exp(eta - top), 0)
    died = (kept & risk.events).astype(eta.dtype)
    share = jnp.zeros_like(eta)
    if ties == "efron":
        count = jnp.cumsum(died)
        share = jnp.where(died > 0, (count - 1 - (count - died)[risk.first]) / jnp.maximum(risk.tied(died), 1), 0)
    at_risk = jnp.where(died > 0, risk.at_risk(hazard) - share * risk.tied(hazard * died), 1)
    value = jnp.sum(died * (eta - top - jnp.log(at_risk)))
    rate = died / at_risk
    expected = hazard * (risk.until(rate) - died * risk.tied(rate * share))
    weighted = hazard[:, None] * risk.rows
    means = rate[:, None] * (risk.at_risk(weighted) - share[:, None] * risk.tied(weighted * died[:, None]))
    information = risk.rows.T @ (expected[:, None] * risk.rows) - means.T @ means
    return _Likelihood(value, risk.rows.T @ (died - expected), information)


def _orders_events(risk: _RiskSets, direction: Float[Array, " K"]) -> Bool[Array, ""]:
    """Whether every event has the largest risk of those at risk along a direction, to a share of the scores' spread: the
    likelihood then never falls along it, and there is no finite maximum."""
    along = risk.rows @ direction
    behind = jnp.where(risk.events, jax.lax.cummax(along)[risk.last] - along, 0)
    slack = jnp.cbrt(jnp.finfo(along.dtype).eps)
    return jnp.max(behind) <= slack * (along.max() - along.min())


def _in_range(risk: _RiskSets, point: Float[Array, " K"]) -> Bool[Array, ""]:
    """Whether hazards are such that the smallest over the largest is well above the least number: e⁻⁶³⁷ in double precision."""
    eta = risk.rows @ point
    return eta.max() - eta.min() <= -0.9 * jnp.log(jnp.finfo(eta.dtype).tiny)


class _Newton(NamedTuple):
    point: Float[Array, " K"]
    value: Float[Array, ""]
    direction: Float[Array, " K"]
    scale: Float[Array, ""]
    status: Int[Array, ""]
    step: Int[Array, ""]


def _maximise(
    risk: _RiskSets,
    kept: Bool[Array, " n"],
    start: Float[Array, " K"],
    ridge: Float[Array, "K K"],
    free: Bool[Array, ""],
    ties: Ties,
    max_steps: Int[Array, ""],
) -> tuple[Float[Array, " K"], Int[Array, ""]]:
    """(point, status) of Newton's steps, halved where the value would fall. Where the fit is `free` of a penalty, to all rows,
    the search ends when a step has been found to order the events, or asks for hazards out of range."""
    precision = jnp.finfo(start.dtype).eps

    def look(point):
        at = _likelihood(risk, kept, point, ties)
        pull = ridge @ point
        factor = jax.scipy.linalg.cho_factor(at.information + ridge, lower=True)
        return at.value - point @ pull / 2, jax.scipy.linalg.cho_solve(factor, at.gradient - pull)

    def advance(s: _Newton) -> _Newton:
        point = s.point + s.scale * s.direction
        value, direction = look(point)
        inside = _in_range(risk, point)
        better = inside & (value >= s.value - 100 * precision * (1 + jnp.abs(s.value)))
        small = jnp.max(jnp.abs(direction)) <= jnp.sqrt(precision) * (1 + jnp.max(jnp.abs(point)))
        ended = jnp.where(small, CONVERGED, jnp.where(free & _orders_events(risk, direction), MONOTONE, OUT_OF_STEPS))
        ended = jnp.where(jnp.isfinite(direction).all(), ended, NON_FINITE)
        moved = _Newton(point, value, direction, jnp.ones_like(s.scale), ended, s.step + 1)
        halved = s._replace(scale=s.scale / 2, step=s.step + 1, status=jnp.where(free & ~inside, MONOTONE, OUT_OF_STEPS))
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), moved, halved)

    one = jnp.ones((), start.dtype)
    state = _Newton(start, -jnp.inf * one, jnp.zeros_like(start), one, jnp.asarray(OUT_OF_STEPS), jnp.asarray(0))
    state = jax.lax.while_loop(lambda s: (s.status == OUT_OF_STEPS) & (s.step < max_steps), advance, state)
    onwards = state.point + state.direction  # to the last digits; to where the events are in order
    ahead = ((state.status == CONVERGED) | (state.status == MONOTONE)) & _in_range(risk, onwards)
    return jnp.where(ahead, onwards, state.point), state.status


def cox_regression(
    scores: Any,
    times: Any,
    events: Any = None,
    *,
    penalty: Any = 0.0,
    ties: Ties = "efron",
    choose: PenaltyChoice = "given",
    key: Any = None,
    n_folds: int = 5,
    rule: Rule = "min",
    n_penalties: int = 15,
    max_steps: int = 50,
) -> CoxRegression:
    """Cox's proportional hazards of n rows of K scores: the largest partial log-likelihood less (penalty/2)‖b‖², by
    Newton's steps.

    `times` and `events` are those of `as_survival`. Tied events are treated after Efron (1977) or Breslow (1974). With
    `choose="cv"` the penalty is chosen along a warm-started path from 100 to 1e-4 times (events · mean variance of the scores),
    by what the rows of each fold add to the partial log-likelihood at coefficients fitted without them (Verweij and van
    Houwelingen 1993); `key` shuffles the rows into folds with equal shares of the events. Standard errors are those of the
    inverse information I: (I + penalty)⁻¹ I (I + penalty)⁻¹ (Gray 1992). O(nK² + n log n) a step; other numbers of the same
    shape compile nothing anew.

    >>> fit = cox_regression([[0.0], [1.0], [2.0], [1.0], [0.5]], [5.0, 3.0, 4.0, 2.0, 2.5], [1, 1, 0, 1, 1])
    >>> round(float(fit.coefficients[0]), 4), int(fit.status)
    (-0.1693, 0)

    Raises `ValueError` that names the argument for what `as_survival` refuses, scores that are not finite, a negative penalty,
    unknown options, more folds than events, a penalty beside `choose="cv"`, or no key with it.
    """
    scores = as_matrix(scores, "scores")
    times, events = as_survival(times, events, scores.shape[0])
    check_option(ties, "ties", Ties)
    check_option(choose, "choose", PenaltyChoice)
    check_option(rule, "rule", Rule)
    for name, count, least in (("n_penalties", n_penalties, 1), ("max_steps", max_steps, 1), ("n_folds", n_folds, 2)):
        check_count(count, name, least)
    penalty = jnp.asarray(as_number(penalty, "penalty", "a number of at least 0", lambda mu: 0 <= mu < np.inf), scores.dtype)
    limit = jnp.asarray(max_steps)  # an array: other limits find the same program
    if choose == "given":
        return _cox(scores, times, events, penalty, limit, ties)
    key = as_key(key, "to shuffle the folds")
    if not isinstance(penalty, jax.core.Tracer) and penalty > 0:
        raise ValueError(f"penalty: is {float(penalty):g}; expected none where choose is 'cv'")
    if not isinstance(events, jax.core.Tracer) and (n_events := int(events.sum())) < n_folds:
        raise ValueError(f"n_folds: is {n_folds}; expected at most the number of events, {n_events}")
    return _cox_by_folds(scores, times, events, key, limit, ties, rule, int(n_folds), int(n_penalties))


class _Problem(NamedTuple):
    """Rows by falling time, in axes of their scores; `ridge` is ‖b‖² there, `unseen` the identity on axes without extent."""

    risk: _RiskSets
    axes: ScoreAxes
    ridge: Float[Array, "K K"]
    unseen: Float[Array, "K K"]
    times: Float[Array, " n"]


def _problem(scores: Float[Array, "n K"], times: Float[Array, " n"], events: Bool[Array, " n"]) -> _Problem:
    order = jnp.argsort(-times)
    axes = score_axes(scores[order], times[order] >= jnp.min(jnp.where(events, times, jnp.inf)))
    falling = -times[order]
    first = jnp.searchsorted(falling, falling, side="left")
    last = jnp.searchsorted(falling, falling, side="right") - 1
    risk = _RiskSets(axes.rows, events[order], first, last)
    return _Problem(risk, axes, axes.turn.T @ axes.turn, jnp.diag(~axes.visible).astype(scores.dtype), times[order])


@compiled
def _cox(
    scores: Float[Array, "n K"],
    times: Float[Array, " n"],
    events: Bool[Array, " n"],
    penalty: Float[Array, ""],
    max_steps: Int[Array, ""],
    ties: Ties,
) -> CoxRegression:
    problem, every = _problem(scores, times, events), jnp.ones(times.shape, bool)
    ridge = penalty * problem.ridge + problem.unseen
    start = jnp.zeros(scores.shape[1], scores.dtype)
    point, status = _maximise(problem.risk, every, start, ridge, penalty == 0, ties, max_steps)
    return _finished(problem, point, status, penalty, jnp.full_like(penalty, jnp.nan), ties)


@compiled
def _cox_by_folds(
    scores: Float[Array, "n K"],
    times: Float[Array, " n"],
    events: Bool[Array, " n"],
    key: Key[Array, ""],
    max_steps: Int[Array, ""],
    ties: Ties,
    rule: Rule,
    n_folds: int,
    n_penalties: int,
) -> CoxRegression:
    problem, dtype = _problem(scores, times, events), scores.dtype
    risk, n_events = problem.risk, events.sum().astype(dtype)
    fold = _folds_with_events(key, risk.events, n_folds)
    kept = jnp.concatenate([jnp.ones((1, fold.size), bool), fold[None, :] != jnp.arange(n_folds)[:, None]])
    unit = n_events * positive(jnp.mean((scores - scores.mean(axis=0)[None, :]) ** 2))
    penalties = unit * jnp.logspace(2, -4, n_penalties, dtype=dtype)

    def along(starts, penalty):
        ridge = penalty * problem.ridge + problem.unseen
        fit = lambda rows, start: _maximise(risk, rows, start, ridge, jnp.asarray(False), ties, max_steps)
        points, status = jax.vmap(fit)(kept, starts)
        value = jax.vmap(lambda rows, point: _likelihood(risk, rows, point, ties).value)
        added = value(jnp.ones_like(kept[1:]), points[1:]) - value(kept[1:], points[1:])
        return points, (points[0], status[0], -added * n_folds / n_events)

    _, (path, status, errors) = jax.lax.scan(along, jnp.zeros((n_folds + 1, scores.shape[1]), dtype), penalties)
    best = choose_penalty(errors, rule)
    return _finished(problem, path[best], status[best], penalties[best], errors.mean(axis=1)[best], ties)


def _folds_with_events(key: Key[Array, ""], events: Bool[Array, " n"], n_folds: int) -> Int[Array, " n"]:
    """The fold of each row, as `fold_of_rows` has them, such that each has an equal share of the events as well."""
    order = jnp.lexsort((jr.uniform(key, events.shape), events))
    return jnp.zeros(events.size, int).at[order].set(jnp.arange(events.size) % n_folds)


def _finished(
    problem: _Problem,
    point: Float[Array, " K"],
    status: Int[Array, ""],
    penalty: Float[Array, ""],
    held_out: Float[Array, ""],
    ties: Ties,
) -> CoxRegression:
    risk, axes = problem.risk, problem.axes
    every = jnp.ones(risk.events.shape, bool)
    at = _likelihood(risk, every, point, ties)
    information = at.information + problem.unseen
    spread, _ = spd_inverse(information + penalty * problem.ridge)
    covariance = covariance_of_scores(axes, spread @ information @ spread)
    eta = risk.rows @ point
    hazard = jnp.exp(eta - eta.max())
    baseline = risk.until(jnp.where(risk.events, 1 / risk.at_risk(hazard), 0)) * jnp.exp(-eta.max())
    return CoxRegression(
        axes.turn @ point, covariance, axes.centre, problem.times[::-1], baseline[::-1], penalty, held_out, at.value, status
    )
