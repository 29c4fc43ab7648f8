"""Maximum likelihood in the hierarchical factor model (theory: Section 3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.covariance import SampleCovariance, denoised_factor, smallest_noise
from hcl_jax.estimators.estimate import Estimate, finished, log_scale, scale_equivariant, stopping_tolerance
from hcl_jax.estimators.spectral import structured_loadings
from hcl_jax.fisher import FisherOperator, Parameters, by_group, group_grams, noise_groups
from hcl_jax.linalg import spd_inverse
from hcl_jax.structure import Hierarchy

GRADIENT_ROUNDING = 256
"""Rounding errors, in units of ε‖F‖/σ², that a gradient holds where the factors are far stronger than the noise: Σ⁻¹ is then
taken of a difference of nearly equal numbers. (Measured in single precision: 100 to 250.)"""


class _Line(NamedTuple):
    """All that the likelihood needs along (F + tV, ψ + tδ): K × K matrices, quadratic in t, per group p or pair of groups (p,
    q)."""

    inner: Float[Array, "3 g K K"]  # coefficients of F_pᵀF_p
    quadratic: Float[Array, "3 g g K K"]  # coefficients of F_pᵀ S_pq F_q
    noise: Float[Array, "2 g"]
    sizes: Float[Array, " g"]
    traces: Float[Array, " g"]
    floor: Float[Array, ""]  # noise variances at or below it are out of bounds

    def _parts(self, t: Float[Array, ""]) -> tuple[Array, Array, Array]:
        """(ψ, W, Q) at step t: log det Σ + tr(Σ⁻¹S) = Σ_p (d_p log ψ_p + tr S_p/ψ_p) + log det W − tr(W⁻¹Q)."""
        powers = jnp.stack([jnp.ones_like(t), t, t**2])
        noise = self.noise[0] + t * self.noise[1]
        W = jnp.einsum("tpij,tp->ij", self.inner, powers[:, None] / noise[None, :])
        weights = powers[:, None, None] / noise[None, :, None] / noise[None, None, :]
        return noise, W + jnp.eye(W.shape[0], dtype=W.dtype), jnp.einsum("tpqij,tpq->ij", self.quadratic, weights)

    def value_and_slope(self, t: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """log det Σ + tr(Σ⁻¹S) at step t, and its derivative; infinite out of bounds."""
        (noise, W, Q), (change, W_slope, Q_slope) = jax.jvp(self._parts, (t,), (jnp.ones_like(t),))
        inverse, log_det = spd_inverse(W)
        fitted = inverse @ Q
        value = jnp.sum(self.sizes * jnp.log(jnp.abs(noise)) + self.traces / noise) + log_det - jnp.trace(fitted)
        slope = jnp.sum(change * (self.sizes / noise - self.traces / noise**2)) + jnp.sum(inverse * (W_slope - Q_slope))
        slope = slope + jnp.sum((fitted @ inverse) * W_slope)
        valid = (noise > self.floor).all() & jnp.isfinite(value)
        return jnp.where(valid, value, jnp.inf), jnp.where(valid, slope, jnp.inf)


class _Point(NamedTuple):
    """Where a fit is, and what is known there."""

    loadings: Float[Array, "d K"]
    images: Float[Array, "g d K"]  # S[:, p] F_p for every group p of features
    noise: Float[Array, " g"]
    grams: Float[Array, "g K K"]  # F_pᵀF_p
    gradient: Parameters  # −½ of it
    scored: Parameters  # the same, preconditioned by the Fisher information
    relative: Float[Array, ""]  # size of the gradient


class _Search(NamedTuple):
    """A fit under way: the last direction, the gradient before it, and whether it led anywhere."""

    at: _Point
    direction: Parameters
    old_gradient: Parameters
    alignment: Float[Array, ""]
    moved: Bool[Array, ""]
    step: Int[Array, ""]


class _Problem:
    """What does not change during a fit."""

    def __init__(self, covariance: SampleCovariance, hierarchy: Hierarchy, groups: tuple[slice, ...], tolerance: float):
        self.hierarchy, self.groups, self.tolerance = hierarchy, groups, tolerance
        self.product = covariance.masked_product(hierarchy)
        self.variances, self.smallest_noise = covariance.variances(), smallest_noise(covariance)
        self.sizes = jnp.array([g.stop - g.start for g in groups], covariance.dtype)

    def images(self, F: Float[Array, "d K"]) -> Float[Array, "g d K"]:
        """S[:, p] F_p for every group p of features."""
        modalities = self.hierarchy.modalities
        return jnp.stack([self.product(F, own) for own in ([modalities] if len(self.groups) == 1 else zip(modalities))])

    def pairs(self, A: Float[Array, "d K"], images: Float[Array, "g d K"]) -> Float[Array, "g g K K"]:
        """A_pᵀ S_pq B_q for all pairs of groups, from the images of B."""
        return jnp.stack([group_grams(A, image, self.groups) for image in images], axis=1)

    def line(self, at: _Point, V: Float[Array, "d K"], V_images: Float[Array, "g d K"], change: Float[Array, " g"]) -> _Line:
        """The likelihood along (V, change), from products that are at hand."""
        F, groups = at.loadings, self.groups
        FV, VV = (group_grams(A, V, groups) for A in (F, V))
        FSF, FSV, VSV = self.pairs(F, at.images), self.pairs(F, V_images), self.pairs(V, V_images)
        return _Line(
            jnp.stack([at.grams, FV + jnp.swapaxes(FV, 1, 2), VV]),
            jnp.stack([FSF, FSV + jnp.transpose(FSV, (1, 0, 3, 2)), VSV]),
            jnp.stack([at.noise, change]),
            self.sizes,
            by_group(self.variances, groups),
            self.smallest_noise,
        )

    def at(self, F: Float[Array, "d K"], images: Float[Array, "g d K"], noise: Float[Array, " g"]) -> _Point:
        """The point of these loadings and noise variances, from the images of the loadings."""
        fisher = FisherOperator(F, noise, self.hierarchy, self.groups)
        covariance_image = jnp.einsum("pdk,p->dk", images, 1 / noise) @ fisher.inverse
        gradient = fisher.minus_half_gradient(covariance_image, self.variances)
        rounding = GRADIENT_ROUNDING * jnp.finfo(F.dtype).eps * jnp.linalg.norm(F) / jnp.min(noise)
        scale = jnp.maximum(jnp.linalg.norm(jnp.where(self.hierarchy.mask, fisher.image(), 0)), rounding / self.tolerance)
        relative = jnp.maximum(jnp.linalg.norm(gradient[0]) / scale, jnp.max(jnp.abs(gradient[1]) * noise / self.sizes))
        return _Point(F, images, noise, fisher.grams, gradient, fisher.precondition(gradient), relative)


def _dot(a, b) -> Float[Array, ""]:
    return jnp.sum(a[0] * b[0]) + jnp.sum(a[1] * b[1])


def _combine(a, b, factor):
    return jax.tree.map(lambda x, y: x + factor * y, a, b)


def line_step(line: _Line) -> Float[Array, ""]:
    """A step that lowers the objective: the better of t = 1 and the secant step after it, halved until it does; 0 if none
    does."""
    zero = jnp.zeros((), line.noise.dtype)
    start, slope = line.value_and_slope(zero)
    shrinking = jnp.where(line.noise[1] < 0, -line.noise[0] / jnp.where(line.noise[1] < 0, line.noise[1], -1), jnp.inf)
    first = jnp.minimum(1, jnp.min(shrinking) / 2)
    value, first_slope = line.value_and_slope(first)
    curved = first_slope > slope
    second = jnp.where(curved, -slope * first / jnp.where(curved, first_slope - slope, 1), 2 * first)
    second = jnp.clip(second, first / 10, first * 4)
    second_value, second_slope = line.value_and_slope(second)
    slack = 10 * jnp.finfo(start.dtype).eps * jnp.abs(start)  # what rounding may add at the end, where steps gain less than that
    better = (second_value <= value + slack) & (jnp.abs(second_slope) <= jnp.abs(first_slope)) & jnp.isfinite(second_value)
    t = jnp.where(better, second, first)

    def halve(state):
        t, _, tries = state
        return t / 2, line.value_and_slope(t / 2)[0], tries + 1

    state = (t, jnp.where(better, second_value, value), 0)
    t, value, _ = jax.lax.while_loop(lambda s: ~(s[1] <= start + slack) & (s[2] < 30), halve, state)
    return jnp.where(value <= start + slack, t, 0)


def maximise_likelihood(
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    start: Float[Array, "d K"],
    start_noise: Float[Array, " groups"],
    groups: tuple[slice, ...],
    tolerance: float,
    max_steps: int,
) -> Estimate:
    """Nonlinear conjugate gradients (Polak and Ribière), preconditioned by the diagonal blocks of the Fisher information.

    One product with S a step: along a line the likelihood is a function of K × K matrices alone. Stops when the gradient,
    relative to ‖Σ⁻¹F∘mask‖_F for the loadings and to the number of features for each log σ², is at most `tolerance`, or the
    loadings' part is what rounding leaves of it.
    """
    problem = _Problem(covariance, hierarchy, groups, tolerance)

    def advance(search: _Search) -> _Search:
        at = search.at
        alignment = _dot(at.gradient, at.scored)
        gained = alignment - _dot(at.scored, search.old_gradient)
        beta = jnp.maximum(gained / jnp.where(search.alignment > 0, search.alignment, 1), 0)
        ascends = alignment + beta * _dot(search.direction, at.gradient) > 0
        V, change = _combine(at.scored, search.direction, jnp.where(ascends, beta, 0))
        V_images = problem.images(V)
        t = line_step(problem.line(at, V, V_images, change))
        reached = problem.at(at.loadings + t * V, at.images + t * V_images, at.noise + t * change)
        moved = (t > 0) & jnp.isfinite(reached.relative)  # not where Σ is singular to rounding

        def kept(new: Array, old: Array) -> Array:  # of what a fit that ends here is made of
            return jnp.where(moved, new, old)

        reached = reached._replace(
            loadings=kept(reached.loadings, at.loadings),
            images=kept(reached.images, at.images),
            noise=kept(reached.noise, at.noise),
            grams=kept(reached.grams, at.grams),
            relative=kept(reached.relative, at.relative),
        )
        return _Search(reached, (V, change), at.gradient, alignment, moved, search.step + 1)

    zero = (jnp.zeros_like(start), jnp.zeros_like(start_noise))
    first = problem.at(start, problem.images(start), start_noise)
    search = _Search(first, zero, zero, jnp.zeros((), start.dtype), jnp.array(True), jnp.array(0))
    search = jax.lax.while_loop(lambda s: (s.at.relative > tolerance) & s.moved & (s.step < max_steps), advance, search)
    at = search.at
    still = problem.line(at, jnp.zeros_like(start), jnp.zeros_like(at.images), zero[1])
    objective = still.value_and_slope(jnp.zeros((), start.dtype))[0] + start.shape[0] * jnp.log(2 * jnp.pi)
    noise = at.noise if len(groups) > 1 else at.noise[0]
    return finished(at.loadings, noise, at.relative <= tolerance, search.step, objective)


def positive_noise(
    noise: Float[Array, "..."], loadings: Float[Array, "d K"], covariance: SampleCovariance
) -> Float[Array, "..."]:
    """A noise variance to start from: where it is next to nothing, the mean variance that the loadings do not explain, which is
    not nothing when they fit badly."""
    d = covariance.n_features
    floor = jnp.maximum(1e-6 * covariance.trace() / d, 2 * smallest_noise(covariance))
    unexplained = (covariance.trace() - jnp.sum(loadings**2)) / d
    return jnp.where(noise > floor, noise, jnp.maximum(floor, unexplained))


@scale_equivariant(log_scale)
def hcl_ml(
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    *,
    noise_per_modality: bool = False,
    tolerance: float | None = None,
    max_steps: int = 1500,
) -> Estimate:
    """`hcl-ml`: minimises log det Σ + tr(Σ⁻¹S), Σ = FFᵀ + Ψ, over masked F and the noise variance, from `hcl-svd`.

    With `noise_per_modality`, Ψ has one variance per modality, and `noise_variance` of the estimate is the vector of them. The
    objective is −2 log-likelihood/ν = d log 2π + log det Σ + tr(Σ⁻¹S). Raises `ValueError` for K ≥ ν.
    """
    tolerance = stopping_tolerance(tolerance, covariance.dtype, double=1e-6)
    groups = noise_groups(hierarchy, noise_per_modality)
    factor, noise = denoised_factor(covariance, hierarchy.n_factors)
    start = structured_loadings(factor, hierarchy)
    if noise_per_modality:
        left = covariance.variances() - jnp.sum(start**2, axis=1)
        start_noise = jnp.stack([jnp.maximum(jnp.mean(left[g]), noise / 10) for g in groups])
    else:
        start_noise = noise[None]
    start_noise = positive_noise(start_noise, start, covariance)
    return maximise_likelihood(covariance, hierarchy, start, start_noise, groups, tolerance, max_steps)
