"""Maximum likelihood in the hierarchical factor model (theory: Section 3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcl_jax.covariance import SampleCovariance, denoised_factor
from hcl_jax.estimators.estimate import Estimate, default_tolerance, finished, log_scale, scale_equivariant
from hcl_jax.estimators.spectral import structured_loadings
from hcl_jax.fisher import FisherOperator, minus_half_gradient, noise_gradient, noise_groups
from hcl_jax.linalg import spd_inverse
from hcl_jax.structure import Hierarchy

GRADIENT_ROUNDING = 256
"""Rounding errors, in units of ε‖F‖/σ², that a gradient holds where the factors are far stronger than the noise: Σ⁻¹ is then
taken of a difference of nearly equal numbers. (Measured in single precision: 100 to 250.)"""
NOISE_ROUNDING = 32
"""Units of ε and of the mean variance below which a noise variance cannot be told from zero."""


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


class _Problem(NamedTuple):
    covariance: SampleCovariance
    hierarchy: Hierarchy
    groups: tuple[slice, ...]
    tolerance: float

    def images(self, F: Float[Array, "d K"]) -> Float[Array, "g d K"]:
        """S[:, p] F_p for every group p of features."""
        return jnp.stack([self.covariance.product(F[g], g) for g in self.groups])

    def line(self, F, images, V, V_images, noise, change) -> _Line:
        """The likelihood along (V, change), from products that are at hand."""
        groups = self.groups
        FF, FV, VV = (jnp.stack([A[g].T @ B[g] for g in groups]) for A, B in ((F, F), (F, V), (V, V)))

        def pairs(A, B_images):
            return jnp.stack([jnp.stack([A[p].T @ image[p] for image in B_images]) for p in groups])

        FSF, FSV, VSV = pairs(F, images), pairs(F, V_images), pairs(V, V_images)
        cross = FSV + jnp.transpose(FSV, (1, 0, 3, 2))
        variances = self.covariance.variances()
        return _Line(
            jnp.stack([FF, FV + jnp.swapaxes(FV, 1, 2), VV]),
            jnp.stack([FSF, cross, VSV]),
            jnp.stack([noise, change]),
            jnp.array([g.stop - g.start for g in groups], F.dtype),
            jnp.stack([variances[g].sum() for g in groups]),
            smallest_noise(self.covariance),
        )

    def gradient(self, F, images, noise):
        """(−½ of the gradient in F and ψ, the same preconditioned by the Fisher information, its relative size)."""
        fisher = FisherOperator(F, noise, self.hierarchy, self.groups)
        precision, image = fisher.precision, fisher.image
        covariance_image = jnp.einsum("pdk,p->dk", images, 1 / noise) @ precision.inverse
        right = minus_half_gradient(precision, covariance_image, self.hierarchy)
        right_noise = -noise_gradient(precision, image, covariance_image, self.covariance, self.groups) / 2
        rounding = GRADIENT_ROUNDING * jnp.finfo(F.dtype).eps * jnp.linalg.norm(F) / jnp.min(noise)
        scale = jnp.maximum(jnp.linalg.norm(jnp.where(self.hierarchy.mask, image, 0)), rounding / self.tolerance)
        sizes = jnp.array([g.stop - g.start for g in self.groups], F.dtype)
        relative = jnp.maximum(jnp.linalg.norm(right) / scale, jnp.max(jnp.abs(right_noise) * noise / sizes))
        return (right, right_noise), fisher.precondition((right, right_noise)), relative


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

    def advance(state):
        F, images, noise, gradient, scored, momentum, alignment, relative, _, step = state
        previous, old_gradient = momentum
        new_alignment = _dot(gradient, scored)
        beta = jnp.maximum((new_alignment - _dot(scored, old_gradient)) / jnp.where(alignment > 0, alignment, 1), 0)
        direction = _combine(scored, previous, beta)
        ascends = _dot(direction, gradient) > 0
        V, change = jax.tree.map(lambda a, b: jnp.where(ascends, a, b), direction, scored)
        V_images = problem.images(V)
        t = line_step(problem.line(F, images, V, V_images, noise, change))
        reached = F + t * V, images + t * V_images, noise + t * change
        new_gradient, new_scored, new_relative = problem.gradient(*reached)
        moved = (t > 0) & jnp.isfinite(new_relative)  # not where Σ is singular to rounding
        new = *reached, new_gradient, new_scored, ((V, change), gradient), new_alignment, new_relative
        old = F, images, noise, gradient, scored, momentum, alignment, relative
        return *jax.tree.map(lambda a, b: jnp.where(moved, a, b), new, old), moved, step + 1

    zero = (jnp.zeros_like(start), jnp.zeros_like(start_noise))
    images = problem.images(start)
    gradient, scored, relative = problem.gradient(start, images, start_noise)
    state = (start, images, start_noise, gradient, scored, (zero, zero), jnp.zeros((), start.dtype), relative, jnp.array(True), 0)
    state = jax.lax.while_loop(lambda s: (s[7] > tolerance) & s[8] & (s[9] < max_steps), advance, state)
    F, images, noise, _, _, _, _, relative, _, steps = state
    still = problem.line(F, images, jnp.zeros_like(F), jnp.zeros_like(images), noise, jnp.zeros_like(noise))
    objective = still.value_and_slope(jnp.zeros((), F.dtype))[0] + F.shape[0] * jnp.log(2 * jnp.pi)
    return finished(F, noise if len(groups) > 1 else noise[0], relative <= tolerance, steps, objective)


def check_degrees_of_freedom(covariance: SampleCovariance, hierarchy: Hierarchy) -> None:
    """Raise `ValueError` when K ≥ ν: the likelihood is then unbounded. (Where n is traced, its caller has checked.)"""
    if not isinstance(covariance.n, jax.core.Tracer) and hierarchy.n_factors >= float(covariance.nu):
        raise ValueError(
            f"hierarchy: has K = {hierarchy.n_factors} factors for ν = n − 1 = {float(covariance.nu):g} degrees of freedom; "
            "the likelihood is unbounded unless K < ν"
        )


def smallest_noise(covariance: SampleCovariance) -> Float[Array, ""]:
    """What rounding leaves of a noise variance of zero, for which the likelihood is unbounded: no fit goes below it."""
    return NOISE_ROUNDING * jnp.finfo(covariance.dtype).eps * covariance.trace() / covariance.n_features


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
    check_degrees_of_freedom(covariance, hierarchy)
    tolerance = default_tolerance(covariance.dtype, double=1e-6) if tolerance is None else tolerance
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
