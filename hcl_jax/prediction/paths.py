"""What penalised regressions and classifications share: groups of coefficients, paths of penalties, accelerated steps."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.structure import Hierarchy, as_hierarchy
from hcl_jax.views import centred

Rule = Literal["min", "one-se"]


def check_option(value: Any, argument: str, kind: Any) -> None:
    """Raise `ValueError` that names the argument unless the value is one of those of a `Literal`."""
    known = get_args(kind)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{argument}: is {value!r}; expected {' or '.join(known)}")


def choose_penalty(errors: Float[Array, "L F"], rule: Rule) -> Int[Array, ""]:
    """Where to stop along a path of falling penalties: at the smallest mean error over the folds, or at the first mean within one
    standard error of it. Raises `ValueError` for an unknown rule."""
    check_option(rule, "rule", Rule)
    mean = errors.mean(axis=1)
    best = jnp.argmin(mean)
    if rule == "min":
        return best
    spread = errors.std(axis=1, ddof=1)[best] / jnp.sqrt(jnp.asarray(errors.shape[1], errors.dtype))
    return jnp.argmax(mean <= mean[best] + spread)


def group_index(hierarchy: Hierarchy) -> np.ndarray:
    """0-based structure of each of the K scores."""
    return np.repeat(np.arange(len(as_hierarchy(hierarchy).ranks)), [rank for _, rank in hierarchy.ranks])


def group_norms(b: Float[Array, "... K"], groups: np.ndarray) -> Float[Array, "... S"]:
    """‖b_s‖ of every structure."""
    one_hot = jnp.asarray(groups[:, None] == np.arange(groups.max() + 1)[None, :], b.dtype)
    return jnp.sqrt((b**2) @ one_hot)


def shrink_groups(b: Float[Array, " K"], thresholds: Float[Array, " S"], groups: np.ndarray) -> Float[Array, " K"]:
    """The proximal map of Σ_s thresholds_s ‖b_s‖: every block shortened by its threshold, to zero at least."""
    norms = group_norms(b, groups)
    kept = jnp.maximum(1 - thresholds / jnp.where(norms > 0, norms, 1), 0)
    return b * kept[groups]


class _Iterate(NamedTuple):
    point: Array
    ahead: Array
    momentum: Array
    change: Array
    step: Array


def accelerated(step: Callable[[Array], Array], start: Array, tolerance: float, max_steps: int) -> tuple[Array, Array]:
    """Accelerated proximal gradient steps, their momentum restarted when it points back (O'Donoghue and Candès 2015). Returns the
    point, and whether its last change was at most `tolerance` of its size."""

    def advance(s: _Iterate) -> _Iterate:
        point = step(s.ahead)
        forward = jnp.sum((s.ahead - point) * (point - s.point)) <= 0
        momentum = jnp.where(forward, (1 + jnp.sqrt(1 + 4 * s.momentum**2)) / 2, 1)
        ahead = point + jnp.where(forward, (s.momentum - 1) / momentum, 0) * (point - s.point)
        size = jnp.maximum(jnp.linalg.norm(point), jnp.finfo(point.dtype).tiny)
        return _Iterate(point, ahead, momentum, jnp.linalg.norm(point - s.ahead) / size, s.step + 1)

    one = jnp.ones((), start.dtype)
    state = _Iterate(start, start, one, one, jnp.zeros((), int))
    state = jax.lax.while_loop(lambda s: (s.change > tolerance) & (s.step < max_steps), advance, state)
    return state.point, state.change <= tolerance


def positive(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The scale, 1 where it is 0: scores that are all zero get coefficients of zero, whatever they are measured by."""
    return jnp.where(scale > 0, scale, 1)


def path_tolerance(dtype: jnp.dtype) -> float:
    """The relative change of a point of the path at which `accelerated` stops: what the precision can reach."""
    return 1e-8 if jnp.finfo(dtype).bits == 64 else 1e-5


class ScoreAxes(NamedTuple):
    """Scores in axes in which they are uncorrelated, of variance 1: `rows` = (scores − centre) `turn` where rows count, else 0.

    Coefficients on the scores are `turn` times those on the axes. An axis in which the scores do not vary is 0, and not
    `visible`; `hidden` are the scores that such an axis takes part in, whose coefficients no response can tell.
    """

    rows: Float[Array, "n K"]
    centre: Float[Array, " K"]
    turn: Float[Array, "K K"]
    visible: Bool[Array, " K"]
    hidden: Bool[Array, " K"]


def score_axes(scores: Float[Array, "n K"], counted: Bool[Array, " n"] | None = None) -> ScoreAxes:
    """The axes of the rows that count, by the eigenvectors of the scores' correlations: whatever units each score comes in."""
    residual, centre, deviation = centred(scores, counted)
    n = jnp.asarray(scores.shape[0] if counted is None else counted.sum(), scores.dtype)
    scale = positive(deviation)
    unit = residual / scale[None, :]
    values, vectors = jnp.linalg.eigh(unit.T @ unit / jnp.maximum(n - 1, 1))
    precision = jnp.finfo(scores.dtype).eps
    visible = values > 10 * values.size * precision * values[-1]
    hidden = jnp.sum(jnp.where(visible[None, :], 0, vectors**2), axis=1) > jnp.sqrt(precision)
    turn = vectors * jnp.where(visible, 1 / jnp.sqrt(jnp.where(visible, values, 1)), 0)[None, :] / scale[:, None]
    return ScoreAxes(residual @ turn, centre, turn, visible, hidden)


def covariance_of_scores(axes: ScoreAxes, covariance: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """The covariance of coefficients on the scores from that on their axes; that of one that nothing tells is infinite."""
    return axes.turn @ covariance @ axes.turn.T + jnp.diag(jnp.where(axes.hidden, jnp.inf, 0).astype(covariance.dtype))
