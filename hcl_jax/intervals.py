"""Confidence intervals for rotation-free quantities from the inverse Fisher information (theory: Section 3).

The variational posterior takes the scores for known, so its own intervals are too short. These take the Fisher information of
the whole model at the estimate: one conjugate-gradient solve a quantity, never a d × d or dK × dK matrix.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators.estimate import Estimate
from hcl_jax.fisher import FisherOperator, noise_groups
from hcl_jax.structure import Hierarchy, Structure

CG_TOLERANCE, CG_STEPS = 1e-6, 300
PROBES = 16  # random signs behind a trace: its relative error is about √(2/(16 · entries of the block))
PROBE_SEED = 0x48434C  # fixed, so that intervals are deterministic


class Interval(eqx.Module):
    """Estimates with their standard errors and a symmetric interval about each."""

    estimate: Float[Array, " q"]
    standard_error: Float[Array, " q"]
    lower: Float[Array, " q"]
    upper: Float[Array, " q"]


def _fisher_at(estimate: Estimate, hierarchy: Hierarchy) -> FisherOperator:
    noise = jnp.atleast_1d(estimate.noise_variance)
    return FisherOperator(estimate.loadings, noise, hierarchy, noise_groups(hierarchy, per_modality=noise.shape[0] > 1))


def delta_method(
    quantity: Callable[[Float[Array, "d K"]], Float[Array, " q"]],
    estimate: Estimate,
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    level: float = 0.95,
) -> Interval:
    """Intervals for any rotation-free function of the loadings: variance gᵀ(νH)⁻¹g, g its gradient and H the Fisher operator.

    `quantity` maps d × K loadings to a vector. It must not change when a structure's columns are rotated: its gradient would
    otherwise have a part along which the information is zero. Raises `ValueError` for a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level: is {level}; expected a number between 0 and 1")
    F, fisher = estimate.loadings, _fisher_at(estimate, hierarchy)
    values, pull_back = jax.vjp(quantity, F)

    def variance(direction: Float[Array, " q"]) -> Float[Array, ""]:
        (gradient,) = pull_back(direction)
        right = (jnp.where(hierarchy.mask, gradient, 0), jnp.zeros_like(jnp.atleast_1d(estimate.noise_variance)))
        V, _ = fisher.solve(right, CG_TOLERANCE, CG_STEPS)
        return jnp.sum(right[0] * V) / covariance.nu

    variances = jax.lax.map(variance, jnp.eye(values.shape[0], dtype=values.dtype))
    error = jnp.sqrt(jnp.maximum(variances, 0))
    width = error * jax.scipy.stats.norm.ppf(jnp.asarray((1 + level) / 2, error.dtype))
    return Interval(values, error, values - width, values + width)


def gram_intervals(
    estimate: Estimate,
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    entries: Int[Array, "q 2"] | Int[np.ndarray, "q 2"],
    level: float = 0.95,
) -> Interval:
    """Intervals for the entries (i, j) of G = ΛΛᵀ, features counted from 0."""
    rows, columns = jnp.asarray(entries)[:, 0], jnp.asarray(entries)[:, 1]
    return delta_method(lambda F: jnp.sum(F[rows] * F[columns], axis=1), estimate, covariance, hierarchy, level)


def block_norm_intervals(
    estimate: Estimate,
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    blocks: Sequence[tuple[Structure, int]],
    level: float = 0.95,
) -> Interval:
    """Intervals for ‖Λ_s^(m)‖_F, one for each (structure, modality).

    ‖Λ̂_s^(m)‖² is larger than ‖Λ_s^(m)‖² by the noise in the block, so the trace of the block's covariance is taken off first; the
    estimates are for `hcl-ml`, which does not shrink. Raises `ValueError` for a block that the hierarchy holds at zero.
    """
    for s, m in blocks:
        if s not in hierarchy.structures or m not in s:
            raise ValueError(
                f"blocks: ({s}, {m}) is not a block of the hierarchy; expected a structure of it and one of its modalities"
            )

    def squared_norms(matrix: Float[Array, "d K"]) -> Float[Array, " q"]:
        return jnp.stack([jnp.sum(matrix[hierarchy.rows(m), hierarchy.columns(s)]) for s, m in blocks])

    squares = delta_method(lambda F: squared_norms(F**2), estimate, covariance, hierarchy, level)
    excess = squared_norms(_loading_variances(estimate, covariance, hierarchy))
    squared = squares.estimate - excess
    norm = jnp.sqrt(jnp.maximum(squared, 0))
    lower, upper = (jnp.sqrt(jnp.maximum(end - excess, 0)) for end in (squares.lower, squares.upper))
    return Interval(norm, squares.standard_error / (2 * jnp.where(norm > 0, norm, jnp.inf)), lower, upper)


def without_rotations(V: Float[Array, "d K"], loadings: Float[Array, "d K"], hierarchy: Hierarchy) -> Float[Array, "d K"]:
    """V less its part along the rotations F_s A, A skew-symmetric, within each structure: where the Fisher information is zero.

    In the axes where F_sᵀF_s = diag(λ), the nearest A has A_kl = (F_sᵀV − VᵀF_s)_kl/(λ_k + λ_l).
    """
    parts = []
    for columns in map(hierarchy.columns, hierarchy.structures):
        F, block = loadings[:, columns], V[:, columns]
        values, axes = jnp.linalg.eigh(F.T @ F)
        skew = axes.T @ (F.T @ block - block.T @ F) @ axes
        pair_sums = values[:, None] + values[None, :]
        A = axes @ jnp.where(pair_sums > 0, skew / jnp.where(pair_sums > 0, pair_sums, 1), 0) @ axes.T
        parts.append(block - F @ A)
    return jnp.concatenate(parts, axis=1)


def _loading_variances(estimate: Estimate, covariance: SampleCovariance, hierarchy: Hierarchy) -> Float[Array, "d K"]:
    """d × K numbers whose sums over a block are the trace of its covariance (Hutchinson's estimate), rotations left out."""
    F, fisher = estimate.loadings, _fisher_at(estimate, hierarchy)
    noise = jnp.zeros_like(jnp.atleast_1d(estimate.noise_variance))

    def probe(key: Array) -> Float[Array, "d K"]:
        signs = jnp.where(hierarchy.mask, jr.rademacher(key, F.shape, F.dtype), 0)
        right = without_rotations(signs, F, hierarchy)
        V, _ = fisher.solve((right, noise), CG_TOLERANCE, CG_STEPS)
        return without_rotations(V, F, hierarchy) * signs

    return jax.lax.map(probe, jr.split(jr.key(PROBE_SEED), PROBES)).mean(axis=0) / covariance.nu
