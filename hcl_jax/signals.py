"""Views that are sums of known joint and individual parts: what methods that separate the two are tried on."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key

from hcl_jax.structure import Hierarchy, Structure

Rows = Float[Array, "n _p"]
BUMP = 0.1
"""Width of the bumps of `sample_curves`."""


class Signals(NamedTuple):
    """Views, and by (view, structure) the parts that they are the sums of, but for noise; what the parts are functions of."""

    views: tuple[Rows, ...]
    parts: dict[tuple[int, Structure], Rows]
    factors: dict[Structure, Float[Array, "n k"]]


def _signals(key: Key[Array, ""], parts: dict[tuple[int, Structure], Rows], factors: dict, noise: Any) -> Signals:
    """The parts of every view added up, and noise of that standard deviation."""
    views = []
    for m in sorted({m for m, _ in parts}):
        clean = sum(part for (l, _), part in parts.items() if l == m)
        views.append(clean + noise * jr.normal(jr.fold_in(key, m), clean.shape, clean.dtype))
    return Signals(tuple(views), parts, factors)


def sample_blocks(key: Key[Array, ""], n: int, dims: tuple[int, int] = (100, 500), noise: float = 1.0) -> Signals:
    """Two views of blocks of ±1 and unit noise, after Figure 2 of Feng, Jiang, Hannig and Marron (2018): joint rank 1,
    individual ranks 1 and 2.

    The joint score is 1 in the first half of the samples and −1 in the second, on half of the first view's features and, with the
    other sign, on the last fifth of the second's. Individual scores alternate in quarters on the other half of the first view's
    features, and of the second's in fifths on the first half and in other quarters on what is left but the last fifth.
    """
    p, q = dims
    pattern = lambda *signs: jnp.asarray(np.array(signs, float)[np.arange(n) * len(signs) // n])
    on = lambda d, a, b: jnp.asarray((np.arange(d) >= a * d) & (np.arange(d) < b * d), float)
    joint, quarters = pattern(1, 1, -1, -1), pattern(1, -1, 1, -1)
    fifths, other = pattern(1, -1, 0, -1, 1), pattern(1, -1, -1, 1)
    parts = {
        (1, (1, 2)): jnp.outer(joint, on(p, 0, 0.5)),
        (1, (1,)): jnp.outer(quarters, on(p, 0.5, 1)),
        (2, (1, 2)): -jnp.outer(joint, on(q, 0.8, 1)),
        (2, (2,)): jnp.outer(fifths, on(q, 0, 0.5)) + jnp.outer(other, on(q, 0.5, 0.8)),
    }
    factors = {(1, 2): joint[:, None], (1,): quarters[:, None], (2,): jnp.stack([fifths, other], axis=1)}
    return _signals(key, parts, factors, noise)


def sample_curves(
    key: Key[Array, ""], n: int, n_points: int = 64, noise: float = 0.1, amplitudes: Sequence[float] = (1.0, 1.5), joint: bool = True
) -> Signals:
    """x_m(s) = A_m sin(2π(s + t)) + exp(−(s − t_m)²/(2·0.1²)) + noise on a grid of [−1, 1]: one phase for all views, and every
    view's own position of a bump, all uniform on (−1, 1). Without `joint` every view has its own phase, a second factor.

    The factor of the phase is (cos 2πt, sin 2πt).
    """
    k_phase, k_bumps, k_noise = jr.split(key, 3)
    M, grid = len(amplitudes), jnp.linspace(-1, 1, n_points)[None, :]
    everyone = tuple(range(1, M + 1))
    phases = jr.uniform(k_phase, (n, 1 if joint else M), minval=-1, maxval=1)
    positions = jr.uniform(k_bumps, (n, M), minval=-1, maxval=1)
    parts, factors = {}, {}
    for m, a in zip(everyone, amplitudes, strict=True):
        phase, position = phases[:, [0 if joint else m - 1]], positions[:, [m - 1]]
        wave, bump = a * jnp.sin(2 * math.pi * (grid + phase)), jnp.exp(-((grid - position) ** 2) / (2 * BUMP**2))
        circle = jnp.concatenate([jnp.cos(2 * math.pi * phase), jnp.sin(2 * math.pi * phase)], axis=1)
        if joint:
            parts |= {(m, everyone): wave, (m, (m,)): bump}
            factors |= {everyone: circle, (m,): position}
        else:
            parts[m, (m,)] = wave + bump
            factors[m,] = jnp.concatenate([circle, position], axis=1)
    return _signals(k_noise, parts, factors, noise)


def sample_structured_curves(key: Key[Array, ""], n: int, hierarchy: Hierarchy, noise: float = 0.1) -> Signals:
    """Curves on a circle whose phases are shared by structure: view m is Σ_{s∋m} w_m(2π(f_s u + t_s)) + noise, u from 0 to 1.

    The frequencies f_s of a view's structures are unlike; the wave w_m is a sine, a rounded square, or a row of bumps, by view.
    The factor of a structure is (cos 2πt_s, sin 2πt_s), t_s uniform; ranks are not used.
    """
    k_phase, k_noise = jr.split(key)
    waves = (jnp.sin, lambda a: jnp.tanh(2 * jnp.sin(a)), lambda a: 1.5 * jnp.exp(2 * (jnp.cos(a) - 1)))
    phases = 2 * math.pi * jr.uniform(k_phase, (n, len(hierarchy.structures)))
    parts, factors = {}, {}
    for i, s in enumerate(hierarchy.structures):
        factors[s] = jnp.stack([jnp.cos(phases[:, i]), jnp.sin(phases[:, i])], axis=1)
        for m in s:
            frequency = 1 + [t for t in hierarchy.structures if m in t].index(s)
            at = 2 * math.pi * frequency * jnp.arange(hierarchy.dims[m - 1]) / hierarchy.dims[m - 1]
            parts[m, s] = waves[(m - 1) % len(waves)](at[None, :] + phases[:, [i]])
    return _signals(k_noise, parts, factors, noise)
