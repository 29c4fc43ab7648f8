"""Factors of which every view may have a block, all of them open at first: the variational fit finds which blocks there are.

Group factor analysis (Klami, Virtanen, Leppäaho and Kaski 2015) with the model and the updates of `hcl-vb` (theory: Section 3,
noise by view as in Section 7), on the moments of `hcl_jax.reduced`. Which columns a view may see is traced, as are all numbers:
one program serves every hierarchy and every fold of a data set.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.compiled import compiled
from hcl_jax.estimators.fixed_point import ascend
from hcl_jax.linalg import spd_inverse
from hcl_jax.reduced import LEAST_NOISE, Moments
from hcl_jax.structure import CONVERGED, NON_FINITE, ON_BOUND, OUT_OF_STEPS

FADED = 0.1  # relevance below which a column that the bound is better without is taken out
ANGLES = 32  # of a rotation that are tried
TURNS = 3  # sweeps of rotations at a time
ROUNDS = 4  # of rotations and coordinate sweeps
SHORT, LONG = 40, 1000  # coordinate sweeps of a round, and of the last one
TOLERANCE = 1e-6  # gain in the bound per degree of freedom and feature


class GroupFactors(NamedTuple):
    """q(Λ) and the hyperparameters: a row of view m is normal with its mean and covariance C_m, its prior N(0, diag v_m); v is 0
    where a view has no block."""

    mean: Float[Array, "M q K"]
    covariances: Float[Array, "M K K"]
    prior: Float[Array, "M K"]
    noise: Float[Array, " M"]

    def second_moments(self, dims: Float[Array, " M"]) -> Float[Array, "M K K"]:
        """E_m = E[Λ^(m)ᵀΛ^(m)], over all d_m coordinates."""
        return jnp.swapaxes(self.mean, 1, 2) @ self.mean + dims[:, None, None] * self.covariances


class Found(NamedTuple):
    """A fit: its posterior, how far the bound falls without a column or a block (as `hcl_jax.selection.Evidence`), and how it
    ended."""

    posterior: GroupFactors
    column_odds: Float[Array, " K"]
    block_odds: Float[Array, "M K"]
    bound: Float[Array, ""]
    status: Int[Array, ""]
    steps: Int[Array, ""]


class _Scores(NamedTuple):
    """q(z): S Bᵀ by view, Ω, and C_z⁻¹ with its log det."""

    image: Float[Array, "M q K"]
    omega: Float[Array, "K K"]
    precision: Float[Array, "K K"]
    log_det: Float[Array, ""]


def _scores(moments: Moments, at: GroupFactors) -> _Scores:
    """The q(z) that maximises the bound given q(Λ)."""
    K = at.prior.shape[1]
    second = at.second_moments(moments.dims) / at.noise[:, None, None]
    precision = jnp.eye(K, dtype=second.dtype) + second.sum(axis=0)
    inverse, log_det = spd_inverse(precision)
    B = (at.mean / at.noise[:, None, None]).reshape(-1, K) @ inverse
    image = moments.matrix @ B
    return _Scores(image.reshape(at.mean.shape), inverse + B.T @ image, precision, log_det)


def _sweep(moments: Moments, at: GroupFactors) -> tuple[GroupFactors, Float[Array, ""]]:
    """One pass of coordinate maximisations, scores first, and the bound after it."""
    matrix, traces, dims, nu = moments
    K = at.prior.shape[1]
    eye, kept = jnp.eye(K, dtype=matrix.dtype), at.prior > 0
    image, omega, _, log_det = _scores(moments, at)
    roots = jnp.sqrt(at.prior)
    outer = roots[:, :, None] * roots[:, None, :]
    inverses, log_dets = jax.vmap(spd_inverse)(eye[None] + (nu / at.noise)[:, None, None] * outer * omega[None])
    covariances = outer * inverses
    mean = (nu / at.noise)[:, None, None] * image @ covariances
    new = at._replace(mean=mean, covariances=covariances)
    second = new.second_moments(dims)
    own = jnp.diagonal(second, axis1=1, axis2=2)
    prior = jnp.where(kept, own / dims[:, None], 0)
    misfit = traces - 2 * jnp.sum(mean * image, axis=(1, 2)) + jnp.sum(second * omega[None], axis=(1, 2))
    noise = jnp.maximum(misfit / dims, LEAST_NOISE * traces / dims)
    fit = jnp.sum(dims * jnp.log(2 * jnp.pi * noise) + misfit / noise)
    moved = jnp.sum(jnp.where(kept, jnp.log(jnp.where(kept, prior, 1) / jnp.where(kept, at.prior, 1)), 0), axis=1)
    bound = -nu / 2 * (fit + jnp.trace(omega) - K + log_det) - jnp.sum(dims * (moved + log_dets)) / 2
    return _without_faded(new._replace(prior=prior, noise=noise), at.prior, dims), bound


def _without_faded(at: GroupFactors, prior: Float[Array, "M K"], dims: Float[Array, " M"]) -> GroupFactors:
    """Without the blocks, for good, that have faded and that the bound is better without, as in `hcl-vb`: at a prior variance of
    0 its slope Σ_j (q_j² − s_j)/2 is negative."""
    variances, squares = jnp.diagonal(at.covariances, axis1=1, axis2=2), jnp.sum(at.mean**2, axis=1)
    kept = prior > 0
    held, alpha = jnp.where(kept, variances, 1), 1 / jnp.where(kept, prior, 1)
    slope = squares / held**2 - dims[:, None] * (1 / held - alpha)
    left = kept & ~((slope < 0) & (squares < FADED * dims[:, None] * held))
    both = left[:, :, None] & left[:, None, :]
    return at._replace(
        mean=jnp.where(left[:, None, :], at.mean, 0),
        covariances=jnp.where(both, at.covariances, 0),
        prior=jnp.where(left, at.prior, 0),
    )


def _schedule(K: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, second) of K/2 pairs in each of K − 1 rounds, in which every two of an even number of columns meet once."""
    others, rounds = list(range(1, K)), []
    for _ in range(K - 1):
        ring = [0, *others]
        rounds.append([(ring[i], ring[K - 1 - i]) for i in range(K // 2)])
        others = others[-1:] + others[:-1]
    pairs = np.array(rounds)
    return pairs[:, :, 0], pairs[:, :, 1]


def _rotated(moments: Moments, at: GroupFactors, member: Bool[Array, "M K"]) -> GroupFactors:
    """The columns that may be seen by the same views rotated into each other so that the bound, in which a rotation of the scores
    moves the priors alone, Σ_m d_m Σ_k log (E_m)_kk, is larger: where blocks are empty or full.

    Turns of two columns at a time, by the best of a grid of angles and a parabola through its neighbours. A block that noise
    alone would fill, (E_m)_kk of order d_m/ν, is as good as empty.
    """
    dims, nu = moments.dims, moments.nu
    K = at.prior.shape[1]
    angles = (np.arange(ANGLES) - ANGLES // 2) * np.pi / ANGLES
    cosines, sines = (jnp.asarray(f(angles), at.mean.dtype) for f in (np.cos, np.sin))
    empty = (dims / nu / 2)[:, None, None]

    def turned(held, pairs):
        E, R = held
        i, j = pairs
        a, b, cross = E[:, i, i][:, :, None], E[:, j, j][:, :, None], E[:, i, j][:, :, None]
        c, s = cosines[None, None, :], sines[None, None, :]
        mixed = 2 * c * s * cross
        logs = jnp.log(c**2 * a + s**2 * b + mixed + empty) + jnp.log(s**2 * a + c**2 * b - mixed + empty)
        cost = jnp.sum(dims[:, None, None] * logs, axis=0)
        best = jnp.argmin(cost, axis=1)
        at_best, left, right = (jnp.take_along_axis(cost, ((best + k) % ANGLES)[:, None], axis=1)[:, 0] for k in (0, -1, 1))
        bend = left - 2 * at_best + right
        shift = jnp.where(bend > 0, (left - right) / jnp.where(bend > 0, 2 * bend, 1), 0)
        better = (cost[:, ANGLES // 2] - at_best > 0) & (member[:, i] == member[:, j]).all(axis=0)
        steps = (best - ANGLES // 2).astype(E.dtype) + shift
        angle = jnp.where(better, steps * (np.pi / ANGLES), 0)
        cosine = jnp.ones(K, E.dtype).at[i].set(jnp.cos(angle)).at[j].set(jnp.cos(angle))
        sine = jnp.zeros(K, E.dtype).at[i].set(jnp.sin(angle)).at[j].set(-jnp.sin(angle))
        partner = jnp.zeros(K, int).at[i].set(j).at[j].set(i)
        E = E * cosine[None, None, :] + E[:, :, partner] * sine[None, None, :]
        E = E * cosine[None, :, None] + E[:, partner, :] * sine[None, :, None]
        return (E, R * cosine[None, :] + R[:, partner] * sine[None, :]), None

    pairs = tuple(jnp.asarray(np.tile(side, (TURNS, 1))) for side in _schedule(K))
    (E, R), _ = jax.lax.scan(turned, (at.second_moments(dims), jnp.eye(K, dtype=at.mean.dtype)), pairs)
    prior = jnp.where(member, jnp.maximum(jnp.diagonal(E, axis1=1, axis2=2), 0) / dims[:, None], 0)
    return at._replace(mean=at.mean @ R[None], covariances=R.T[None] @ at.covariances @ R[None], prior=prior)


def principal_start(moments: Moments, n_columns: int) -> Float[Array, "M q K"]:
    """The leading principal axes of all views together, scaled to what they have above noise of variance 1."""
    matrix, n_views = np.asarray(moments.matrix), len(moments.dims)
    values, vectors = np.linalg.eigh(matrix)
    kept = min(n_columns, len(matrix))
    columns = vectors[:, ::-1][:, :kept] * np.sqrt(np.maximum(values[::-1][:kept] - 1, 0))
    padded = np.pad(columns, ((0, 0), (0, n_columns - kept)))
    return jnp.asarray(padded.reshape(n_views, -1, n_columns), matrix.dtype)


@compiled
def group_factors(moments: Moments, member: Bool[Array, "M K"], start: Float[Array, "M q K"]) -> Found:
    """The variational fit of K columns, an even number, of which view m may see those in which `member` holds, from loadings to
    start at.

    Rounds of rotations and accelerated coordinate sweeps; the last one ends when the bound twice running gains less than
    `TOLERANCE` a degree of freedom and feature. Status 3: the noise of a view is on its bound.
    """
    dims, nu = moments.dims, moments.nu
    M, K = member.shape
    mean = jnp.where(member[:, None, :], start, 0)
    squares = jnp.sum(mean**2, axis=1)
    tiny = 1e-6 * dims[:, None] / nu  # next to nothing where the start is known
    prior = jnp.where(member & (squares > 0), (squares + tiny) / dims[:, None], 0)
    first = GroupFactors(mean, jnp.zeros((M, K, K), mean.dtype), prior, jnp.ones_like(dims))
    size = mean.size

    def flatten(at: GroupFactors) -> Array:
        return jnp.concatenate([at.mean.ravel(), jnp.log(at.noise)])

    def unflatten(vector: Array, like: GroupFactors) -> GroupFactors:
        kept = like.prior > 0
        moved = like._replace(
            mean=jnp.where(kept[:, None, :], vector[:size].reshape(like.mean.shape), 0),
            noise=jnp.maximum(jnp.exp(vector[size:]), LEAST_NOISE * moments.traces / dims),
        )
        own = jnp.diagonal(moved.second_moments(dims), axis1=1, axis2=2)
        return moved._replace(prior=jnp.where(kept, own / dims[:, None], 0))

    def refined(at: GroupFactors, max_steps: Array):
        turned = _rotated(moments, at, member)
        unit = nu * dims.sum() / 2
        at, *ended = ascend(lambda p: _sweep(moments, p), flatten, unflatten, turned, unit, TOLERANCE, max_steps)
        return at, tuple(ended)

    limits = jnp.array([SHORT] * (ROUNDS - 1) + [LONG])
    at, (bounds, steps, converged) = jax.lax.scan(refined, first, limits)
    columns, blocks = _odds(moments, at)
    finite = jnp.isfinite(bounds[-1]) & jnp.isfinite(at.mean).all()
    on_bound = (at.noise <= LEAST_NOISE * moments.traces / dims).any()
    ended = jnp.where(on_bound, ON_BOUND, CONVERGED)
    status = jnp.where(finite, jnp.where(converged[-1], ended, OUT_OF_STEPS), NON_FINITE)
    return Found(at, columns, blocks, bounds[-1], status, steps.sum())


def _odds(moments: Moments, at: GroupFactors) -> tuple[Float[Array, " K"], Float[Array, "M K"]]:
    """By how much the bound falls without a column, and without a block, as `hcl_jax.selection.evidence` has it."""
    variances, squares, kept = jnp.diagonal(at.covariances, axis1=1, axis2=2), jnp.sum(at.mean**2, axis=1), at.prior > 0
    held, alpha = jnp.where(kept, variances, 1), 1 / jnp.where(kept, at.prior, 1)
    blocks = jnp.where(kept, squares / held + moments.dims[:, None] * jnp.log(held * alpha), 0) / 2
    scores = _scores(moments, at)
    cost = moments.nu / 2 * (jnp.diagonal(scores.omega) - 1 + jnp.log(jnp.diagonal(scores.precision)))
    return blocks.sum(axis=0) - cost, blocks
