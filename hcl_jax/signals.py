"""Views that are sums of known joint and individual parts: what methods that separate the two are tried on."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
        clean = jnp.stack([part for (l, _), part in parts.items() if l == m]).sum(axis=0)
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
    parts: dict[tuple[int, Structure], Rows] = {
        (1, (1, 2)): jnp.outer(joint, on(p, 0, 0.5)),
        (1, (1,)): jnp.outer(quarters, on(p, 0.5, 1)),
        (2, (1, 2)): -jnp.outer(joint, on(q, 0.8, 1)),
        (2, (2,)): jnp.outer(fifths, on(q, 0, 0.5)) + jnp.outer(other, on(q, 0.5, 0.8)),
    }
    factors = {(1, 2): joint[:, None], (1,): quarters[:, None], (2,): jnp.stack([fifths, other], axis=1)}
    return _signals(key, parts, factors, noise)


def sample_curves(
    key: Key[Array, ""],
    n: int,
    n_points: int = 64,
    noise: float = 0.1,
    amplitudes: Sequence[float] = (1.0, 1.5),
    joint: bool = True,
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
    parts: dict[tuple[int, Structure], Rows] = {}
    factors: dict[Structure, Array] = {}
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
            at = 2 * math.pi * frequency * np.arange(hierarchy.dims[m - 1]) / hierarchy.dims[m - 1]
            parts[m, s] = waves[(m - 1) % len(waves)](jnp.asarray(at, phases.dtype)[None, :] + phases[:, [i]])
    return _signals(k_noise, parts, factors, noise)


CHANGES = ("same", "inverted", "rotated", "noisy")
"""What `pair_images` does to the second view."""


def pair_images(
    rng: np.random.Generator,
    images: Float[np.ndarray, "N ..."],
    labels: Int[np.ndarray, " N"],
    n: int,
    change: str = "inverted",
) -> tuple[Float[np.ndarray, "n ..."], Float[np.ndarray, "n ..."], Int[np.ndarray, " n"]]:
    """(n images, for each another of the same class, the classes): what the two share is the class, and no style.

    The second is as it is, inverted (the largest value less it), rotated by a quarter turn, or noisy (normal noise of half the
    images' standard deviation). Raises `ValueError` for another change, and more pairs than there are images.
    """
    if change not in CHANGES:
        raise ValueError(f"change: is {change!r}; expected one of {', '.join(CHANGES)}")
    if not 1 <= n <= len(labels):
        raise ValueError(f"n: is {n}; expected from 1 to the number of images, {len(labels)}")
    first = rng.permutation(len(labels))[:n]
    second = np.empty_like(first)
    for label in np.unique(labels[first]):
        own = labels[first] == label
        second[own] = rng.choice(np.flatnonzero(labels == label), own.sum())
    other = images[second]
    if change == "inverted":
        other = images.max() - other
    elif change == "rotated":
        other = np.rot90(other, axes=(1, 2))
    elif change == "noisy":
        other = other + 0.5 * images.std() * rng.standard_normal(other.shape)
    return images[first], other, labels[first]


def halved(images: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "n ..."]:
    """Images or volumes of even sides at half the resolution: means of blocks of two a side."""
    n, *sides = images.shape
    blocks = images.reshape(n, *(size for side in sides for size in (side // 2, 2)))
    return blocks.mean(axis=tuple(range(2, 2 * len(sides) + 1, 2)))


class Phantom(NamedTuple):
    """Two views of volumes (n × side × side × side), the shared factor, the views' own ones, and the group of every sample."""

    views: tuple[Float[np.ndarray, "n s s s"], Float[np.ndarray, "n s s s"]]
    atrophy: Float[np.ndarray, " n"]
    own: Float[np.ndarray, "n 4"]
    group: Int[np.ndarray, " n"]


def sample_phantom(
    rng: np.random.Generator, n: int, side: int = 16, effect: float = 1.0, noise: float = 0.05, slope: float = 4.0
) -> Phantom:
    """A head of ellipsoids, as two kinds of scanner would see it: what they share is how far the tissue has shrunk.

    The atrophy a ~ N(0, 1) times `effect` widens the ventricles and thins the cortex in the first contrast (tissue), and lowers
    uptake in the cortex in the second (activity). The first view's own factors are the head's height and width, the second's
    overall uptake and a hot spot on a uniform place of the front. The group is 1 with probability 1/(1 + exp(−slope a)).
    """
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, side)] * 3, indexing="ij"))
    edge = 2.5 / side
    a, own = rng.standard_normal(n), rng.uniform(-1, 1, (n, 4))

    def ellipsoid(centre: np.ndarray, radii: np.ndarray) -> np.ndarray:
        """1 within, 0 without, over a voxel or so: for n centres and radii (n × 3)."""
        squared = sum(((grid[None, i] - _cells(centre[:, i])) / _cells(radii[:, i])) ** 2 for i in range(3))
        return 1 / (1 + np.exp((np.sqrt(squared) - 1) * _cells(radii.min(axis=1)) / (edge / 2)))

    zero, ones = np.zeros((n, 3)), np.ones((n, 1))
    outline = np.concatenate([0.8 * ones, 0.72 + 0.06 * own[:, [0]], 0.72 + 0.06 * own[:, [1]]], axis=1)
    thickness = np.clip(0.22 - 0.05 * effect * a[:, None], 0.05, 0.4)
    wide = np.clip(0.22 + 0.06 * effect * a[:, None], 0.08, 0.4)
    ventricles = ellipsoid(zero, wide * np.array([[1.4, 0.7, 1.0]]))
    tissue = ellipsoid(zero, outline) - 0.45 * ellipsoid(zero, outline - thickness) - 0.4 * ventricles
    still = np.tile([[0.8, 0.72, 0.72]], (n, 1))
    cortex = ellipsoid(zero, still) - ellipsoid(zero, still - 0.25)
    spot = ellipsoid(np.concatenate([0.5 * ones, 0.4 * own[:, 2:3], 0 * ones], axis=1), np.full((n, 3), 0.25))
    activity = (1 + 0.2 * _cells(own[:, 3])) * (0.4 * ellipsoid(zero, still) + cortex * (0.6 - 0.12 * effect * _cells(a)))
    views = (tissue, activity + 0.5 * spot)
    group = (rng.uniform(size=n) < 1 / (1 + np.exp(-slope * a))).astype(int)
    noisy = tuple(view + noise * rng.standard_normal(view.shape) for view in views)
    return Phantom((noisy[0], noisy[1]), a, own, group)


def _cells(values: np.ndarray) -> np.ndarray:
    """One number a sample, to be broadcast over its voxels."""
    return values[:, None, None, None]
