"""Fixed-point maps that never lower a merit, accelerated so that the merit still never falls."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.linalg import Anderson

Point = TypeVar("Point", bound=tuple)


class Ascent(NamedTuple):
    """Where an ascent is: the best point and its merit, where it looks next, and how often in a row it gained little."""

    best: tuple[Any, Array]  # (point, merit)
    trial: Any
    memory: Anderson
    small: Int[Array, ""]
    step: Int[Array, ""]


def ascend(
    sweep: Callable[[Point], tuple[Point, Float[Array, ""]]],
    flatten: Callable[[Point], Float[Array, " size"]],
    unflatten: Callable[[Float[Array, " size"], Point], Point],
    start: Point,
    unit: Float[Array, ""],
    tolerance: float | Array,
    max_steps: int | Array,
) -> tuple[Point, Float[Array, ""], Int[Array, ""], Bool[Array, ""]]:
    """(point, merit, steps, converged) of repeated sweeps point ↦ (image, merit), Anderson-accelerated in `flatten(point)`.

    The merit never falls: an extrapolation that lowers it is dropped and the memory of past steps cleared. `unflatten(vector,
    like)` is the point of a vector, with what is not in the vector taken from an image. Ends when the merit twice running gains
    less than `tolerance` units, or nothing but rounding.
    """

    def choose(accepted, new, old):
        return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)

    def advance(at: Ascent) -> Ascent:
        image, merit = sweep(at.trial)
        accepted = merit >= at.best[1]
        vector = flatten(image)
        pushed = at.memory.push(vector, vector - flatten(at.trial))
        memory = choose(accepted, pushed, Anderson.empty(vector.shape[0], vector.dtype))
        rounded = ~accepted & (at.memory.used < 0)  # a plain sweep from the best point lost: only rounding is left to gain
        little = (accepted & (merit - at.best[1] < tolerance * unit)) | rounded
        small = jnp.where(little, at.small + 1, jnp.where(accepted, 0, at.small))
        best = choose(accepted, (image, merit), at.best)
        trial = choose(accepted, unflatten(memory.extrapolate(), image), best[0])
        return Ascent(best, trial, memory, small, at.step + 1)

    vector = flatten(start)
    nothing = jnp.full((), -jnp.inf, vector.dtype)
    state = Ascent((start, nothing), start, Anderson.empty(vector.shape[0], vector.dtype), jnp.array(0), jnp.array(0))
    end = jax.lax.while_loop(lambda s: (s.small < 2) & (s.step < max_steps), advance, state)
    return *end.best, end.step, end.small >= 2
