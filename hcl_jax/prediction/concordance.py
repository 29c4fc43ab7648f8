"""How well a risk score orders survival times: Harrell's index with its standard error, and differences of two scores."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hcl_jax.compiled import compiled
from hcl_jax.intervals import BOUNDARY, VALID, Interval, check_level, normal_quantile, symmetric_interval
from hcl_jax.prediction.survival import as_survival
from hcl_jax.views import as_response

TIED = 1e-8
"""Risk scores that differ by no more are tied."""
PAIR_ROWS = 64  # rows whose pairs with all others are in memory at a time


def concordance(risk: Any, times: Any, events: Any = None, level: float = 0.95) -> Interval:
    """Harrell's index C: the share of comparable pairs in which the row with the higher risk has the event first.

    Two rows are comparable where the one whose time ends first has the event, and at equal times where just one of them has it;
    risks within 1e-8 of each other count one half. The standard error is the infinitesimal jackknife's: the root of Σ_i u_i²,
    u_i the derivative of C in the weight of row i (Therneau and Watson 2015, The concordance statistic and the Cox model); the
    interval is symmetric in log C/(1 − C). Where no pair or every pair is concordant there is no error to estimate, and the
    status is `BOUNDARY` with the interval (0, 1). C depends on the law of censoring; compare risk scores on the same rows only.
    O(n²) time and O(n) memory.

    >>> found = concordance([3.0, 1.0, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0], [1, 1, 0, 1])
    >>> round(float(found.estimate), 4)
    0.8

    Raises `ValueError` that names the argument for what `as_survival` refuses, a level outside (0, 1), and no comparable pair.
    """
    (risk,), times, events = _risks((risk,), times, events, level)
    return _concordance(risk, times, events, level)


def concordance_difference(first: Any, second: Any, times: Any, events: Any = None, level: float = 0.95) -> Interval:
    """C of the first risk score less C of the second, for the same rows: as `concordance` has both, paired.

    The standard error is the root of Σ_i (u_i − v_i)², u and v the derivatives of the two in the weights of the rows; the
    interval is symmetric. Scores that order all pairs alike differ by 0 without error: their status is `BOUNDARY`, the interval
    a point. Raises `ValueError` as `concordance` does.
    """
    (first, second), times, events = _risks((first, second), times, events, level, ("first", "second"))
    return _concordance_difference(first, second, times, events, level)


def _risks(
    risks: tuple[Any, ...], times: Any, events: Any, level: float, names: tuple[str, ...] = ("risk",)
) -> tuple[list[Float[Array, " n"]], Float[Array, " n"], Bool[Array, " n"]]:
    check_level(level)
    shape = np.shape(risks[0])
    if len(shape) != 1:
        raise ValueError(f"{names[0]}: has shape {shape}; expected a vector, one risk for each row")
    read = [as_response(risk, shape[0], argument=name) for risk, name in zip(risks, names, strict=True)]
    times, events = as_survival(times, events, shape[0])
    earliest = jnp.min(jnp.where(events, times, jnp.inf))
    comparable = jnp.any((times > earliest) | ((times == earliest) & ~events))
    if not isinstance(comparable, jax.core.Tracer) and not comparable:
        raise ValueError("times: leave no pair of rows comparable; expected an event before the end of another row")
    return read, times, events


@compiled
def _concordance(risk: Float[Array, " n"], times: Float[Array, " n"], events: Bool[Array, " n"], level: float) -> Interval:
    index, influence = _index(risk, times, events)
    error = jnp.linalg.norm(influence)
    known = error > 0
    odds = jnp.where(known, index * (1 - index), 1)
    centre, width = jax.scipy.special.logit(index), normal_quantile((1 + level) / 2, error.dtype) * error / odds
    lower = jnp.where(known, jax.nn.sigmoid(centre - width), 0)
    upper = jnp.where(known, jax.nn.sigmoid(centre + width), 1)
    return Interval(index, error, lower, upper, jnp.where(known, VALID, BOUNDARY))


@compiled
def _concordance_difference(
    first: Float[Array, " n"], second: Float[Array, " n"], times: Float[Array, " n"], events: Bool[Array, " n"], level: float
) -> Interval:
    (one, u), (other, v) = _index(first, times, events), _index(second, times, events)
    variance = jnp.sum((u - v) ** 2)
    return symmetric_interval(one - other, variance, level, jnp.where(variance > 0, VALID, BOUNDARY))


def _index(
    risk: Float[Array, " n"], times: Float[Array, " n"], events: Bool[Array, " n"]
) -> tuple[Float[Array, ""], Float[Array, " n"]]:
    """(C, its derivative in the weight of each row), from the pairs that each row is in and how many of them are concordant."""

    def pairs(row):
        its_risk, its_time, its_event = row
        same = its_time == times
        goes_first = its_event & ((its_time < times) | (same & ~events))
        goes_later = events & ((times < its_time) | (same & ~its_event))
        ahead = its_risk - risk
        share = jnp.where(jnp.abs(ahead) <= TIED, 0.5, (ahead > 0).astype(risk.dtype))
        won = jnp.where(goes_first, share, 0) + jnp.where(goes_later, 1 - share, 0)
        return won.sum(), jnp.sum(goes_first | goes_later).astype(risk.dtype)

    won, comparable = jax.lax.map(pairs, (risk, times, events), batch_size=PAIR_ROWS)
    total = comparable.sum()
    index = won.sum() / total
    return index, 2 * (won - index * comparable) / total
