"""Variational Bayes with automatic relevance determination (theory: Section 3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcl_jax.covariance import SampleCovariance, smallest_noise
from hcl_jax.estimators.estimate import Estimate, check_problem, finished, stopping_tolerance
from hcl_jax.estimators.likelihood import hcl_ml, positive_noise
from hcl_jax.linalg import Anderson, spd_inverse
from hcl_jax.structure import Hierarchy, Structure

START_TOLERANCE = 1e-3  # relative gradient of the maximum-likelihood start
PRUNED = 1e6  # cap of α, in units of the data precision νΩ_kk/σ²: a column there is pruned


class Posterior(NamedTuple):
    """q(Λ) and the hyperparameters: means, per modality the column covariance C_m (zero on inactive columns), precisions α,
    noise σ²."""

    mean: Float[Array, "d K"]
    column_covariances: Float[Array, "M K K"]
    precisions: Float[Array, "M K"]
    noise: Float[Array, " groups"]

    def scaled(self, root: Float[Array, ""]) -> "Posterior":
        """The posterior of data `root` times as large."""
        square = root**2
        return Posterior(root * self.mean, square * self.column_covariances, self.precisions / square, square * self.noise)


class _Sweep(NamedTuple):
    posterior: Posterior
    bound: Float[Array, ""]


class _Vb:
    """The coordinate ascent of one problem."""

    def __init__(self, covariance: SampleCovariance, hierarchy: Hierarchy):
        self.S, self.hierarchy = covariance, hierarchy
        dtype = covariance.dtype
        self.rows = [hierarchy.rows(m) for m in hierarchy.modalities]
        self.dims = jnp.array(hierarchy.dims, dtype)
        self.seen = jnp.asarray(hierarchy.modality_mask, dtype)
        self.eye = jnp.eye(hierarchy.n_factors, dtype=dtype)
        self.trace = covariance.trace()
        self.smallest_noise = smallest_noise(covariance)

    def second_moments(self, mean: Array, column_covariances: Array) -> Float[Array, "M K K"]:
        """E_m = E[Λ^(m)]ᵀE[Λ^(m)] + d_m C_m."""
        grams = jnp.stack([mean[r].T @ mean[r] for r in self.rows])
        return grams + self.dims[:, None, None] * column_covariances

    def sweep(self, at: Posterior) -> _Sweep:
        """One pass of coordinate maximisations, scores first, and the bound after it."""
        nu, d, seen = self.S.nu, self.S.n_features, self.seen
        noise = at.noise[0]
        scores, log_det_inverse = spd_inverse(self.eye + self.second_moments(at.mean, at.column_covariances).sum(axis=0) / noise)
        B = at.mean @ scores / noise  # Bᵀ of the text
        SB = self.S.product(B)
        omega = scores + B.T @ SB

        both = seen[:, :, None] * seen[:, None, :]
        precision = both * (nu / noise) * omega[None] + self.eye[None] * (at.precisions * seen + (1 - seen))[:, None, :]
        inverses, log_dets = zip(*map(spd_inverse, precision), strict=True)
        column_covariances = both * jnp.stack(inverses)
        mean = jnp.concatenate([SB[r] @ column_covariances[m] for m, r in enumerate(self.rows)]) * (nu / noise)
        moments = self.second_moments(mean, column_covariances)
        mean_squares = jnp.diagonal(moments, axis1=1, axis2=2)
        cap = PRUNED * nu * jnp.diagonal(omega) / noise
        precisions = jnp.minimum(self.dims[:, None] / jnp.where(seen > 0, mean_squares, 1), cap[None, :])
        q = self.trace - 2 * jnp.sum(mean * SB) + jnp.sum(moments.sum(axis=0) * omega)
        new_noise = jnp.maximum(q / d, self.smallest_noise)

        active = seen.sum(axis=1)
        fit = d * jnp.log(2 * jnp.pi * new_noise) + q / new_noise
        latent = jnp.trace(omega) - self.hierarchy.n_factors + log_det_inverse
        prior = jnp.sum(seen * precisions * mean_squares, axis=1) + self.dims * (
            jnp.stack(log_dets) - active - jnp.sum(seen * jnp.log(precisions), axis=1)
        )
        bound = -nu / 2 * (fit + latent) - prior.sum() / 2
        return _Sweep(Posterior(mean, column_covariances, precisions, new_noise[None]), bound)


def _principal_axes(loadings: Float[Array, "d K"], hierarchy: Hierarchy) -> Float[Array, "d K"]:
    """The same loadings with orthogonal columns within every structure: the axes along which relevance can be told apart."""
    rotated = []
    for columns in map(hierarchy.columns, hierarchy.structures):
        block = loadings[:, columns]
        _, axes = jnp.linalg.eigh(block.T @ block)
        rotated.append(block @ axes[:, ::-1])
    return jnp.concatenate(rotated, axis=1)


def _starting_point(vb: _Vb, loadings: Float[Array, "d K"], noise: Float[Array, ""]) -> Posterior:
    mean = _principal_axes(loadings, vb.hierarchy)
    none = jnp.zeros_like(vb.second_moments(mean, jnp.zeros((), mean.dtype)))
    squares = jnp.diagonal(vb.second_moments(mean, none), axis1=1, axis2=2)
    floor = 1e-6 * noise / vb.S.nu * vb.dims[:, None]
    return Posterior(mean, none, vb.dims[:, None] / jnp.maximum(squares, floor), noise[None])


def maximise_bound(vb: _Vb, start: Posterior, tolerance: float, max_steps: int) -> tuple[_Sweep, Array, Array]:
    """(last sweep, steps, converged): coordinate sweeps, Anderson-accelerated in E[Λ] and log σ². The bound never falls: an
    extrapolation that lowers it is dropped and the memory of past steps cleared."""

    def flatten(p: Posterior) -> Array:
        return jnp.concatenate([p.mean.ravel(), jnp.log(p.noise)])

    def unflatten(vector: Array, like: Posterior) -> Posterior:
        mean = vector[:-1].reshape(like.mean.shape)
        squares = jnp.diagonal(vb.second_moments(mean, like.column_covariances), axis1=1, axis2=2)
        precisions = vb.dims[:, None] / jnp.where((vb.seen > 0) & (squares > 0), squares, 1)
        return Posterior(mean, like.column_covariances, jnp.minimum(precisions, PRUNED * like.precisions), jnp.exp(vector[-1:]))

    def advance(state):
        best, memory_before, trial, small, step = state
        swept = vb.sweep(trial)
        accepted = swept.bound >= best.bound
        image = flatten(swept.posterior)
        pushed = memory_before.push(image, image - flatten(trial))
        empty = Anderson.empty(image.shape[0], image.dtype)
        memory = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), pushed, empty)
        extrapolated = unflatten(memory.extrapolate(), swept.posterior)
        gain = 2 * (swept.bound - best.bound) / (vb.S.nu * vb.S.n_features)  # per degree of freedom and feature: free of units
        rounded = ~accepted & (memory_before.used < 0)  # a plain sweep from the best point lost: only rounding is left to gain
        gains_little = (accepted & (gain < tolerance)) | rounded
        small = jnp.where(gains_little, small + 1, jnp.where(accepted, 0, small))
        best = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), swept, best)
        trial = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), extrapolated, best.posterior)
        return best, memory, trial, small, step + 1

    first = vb.sweep(start)
    size = start.mean.size + 1
    state = (first, Anderson.empty(size, start.mean.dtype), first.posterior, jnp.array(0), jnp.array(1))
    best, _, _, small, steps = jax.lax.while_loop(lambda s: (s[3] < 2) & (s[4] < max_steps), advance, state)
    return best, steps, small >= 2


def fit_posterior(
    covariance: SampleCovariance, hierarchy: Hierarchy, *, tolerance: float | None = None, max_steps: int = 500
) -> tuple[Posterior, Estimate]:
    """(q, estimate): the whole variational posterior behind `hcl_vb`."""
    check_problem(covariance, hierarchy)
    tolerance = stopping_tolerance(tolerance, covariance.dtype, double=1e-7, single=1e-6)
    unit, root = covariance.in_unit_scale()
    vb = _Vb(unit, hierarchy)
    start = hcl_ml(unit, hierarchy, tolerance=START_TOLERANCE, max_steps=50)
    point = _starting_point(vb, start.loadings, positive_noise(start.noise_variance, start.loadings, unit))
    swept, steps, converged = maximise_bound(vb, point, tolerance, max_steps)
    converged &= swept.posterior.noise[0] > vb.smallest_noise  # there, for data without noise, rounding decides
    fit = finished(swept.posterior.mean, swept.posterior.noise[0], converged, steps, -swept.bound / covariance.nu)
    posterior = swept.posterior.scaled(root)
    objective = fit.objective + covariance.n_features * jnp.log(root)  # −bound/ν has half of the likelihood's log det Σ
    return posterior, Estimate(posterior.mean, posterior.noise[0], fit.status, fit.steps, objective)


def relevance(posterior: Posterior, hierarchy: Hierarchy) -> Float[Array, "M K"]:
    """‖E[Λ^(m)_k]‖²/(d_m (C_m)_kk): how far each column of each modality stands out of its own uncertainty, 0 on inactive ones.

    Columns that the data do not support end far below 1, those that they do far above.
    """
    squares = jnp.stack([jnp.sum(posterior.mean[hierarchy.rows(m)] ** 2, axis=0) for m in hierarchy.modalities])
    variances = jnp.diagonal(posterior.column_covariances, axis1=1, axis2=2)
    spread = variances * jnp.asarray(hierarchy.dims, variances.dtype)[:, None]
    return jnp.where(spread > 0, squares / jnp.where(spread > 0, spread, 1), 0)


def found_columns(relevances: Float[np.ndarray, "M K"], hierarchy: Hierarchy) -> dict[Structure, list[int]]:
    """The columns that data support, by the structure of the modalities in which their relevance exceeds 1: the ranks and
    structures that `hcl-vb` finds when it is given more than there are."""
    found: dict[Structure, list[int]] = {}
    for column in range(hierarchy.n_factors):
        seen = tuple(m for m in hierarchy.modalities if relevances[m - 1, column] > 1)
        if seen:
            found.setdefault(seen, []).append(column)
    return found


def hcl_vb(
    covariance: SampleCovariance, hierarchy: Hierarchy, *, tolerance: float | None = None, max_steps: int = 500
) -> Estimate:
    """`hcl-vb`: posterior mean of the loadings under Λ^(m)_jk ~ N(0, 1/α_{m,k}), with α and σ² that maximise the variational
    bound.

    q(z) q(Λ) factorised; started at `hcl-ml` rotated to principal axes. Columns that cannot be seen are pruned to zero. Stops
    when 2/(νd) times the bound twice running gains less than `tolerance` (1e-7 in float64, 1e-6 in float32), or nothing but
    rounding: what it still gains after that is in rotations within structures and in columns on their way to zero, and moves
    the Gram error by less than 1 % (docs/results.md). The objective is −bound/ν. Raises `ValueError` for K ≥ ν.
    """
    return fit_posterior(covariance, hierarchy, tolerance=tolerance, max_steps=max_steps)[1]
