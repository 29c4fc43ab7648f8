"""Descent on f(F) = ½‖FFᵀ − S̃‖_F² over loadings with a zero pattern (theory: Section 3, Algorithm 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcl_jax.compiled import compiled
from hcl_jax.covariance import DenoisedCovariance, LowRankCovariance, SampleCovariance, denoised_factor
from hcl_jax.estimators.estimate import (
    Estimate,
    check_iterative,
    finished,
    named,
    scale_equivariant,
    squared_scale,
    stopping_tolerance,
)
from hcl_jax.estimators.spectral import least_squares_objective, structured_loadings
from hcl_jax.structure import Hierarchy

Target = DenoisedCovariance | LowRankCovariance
Preconditioner = Callable[[Float[Array, "d K"], Float[Array, "d K"]], Float[Array, "d K"]]
"""(F, ∇f/2 there) -> direction of descent, up to its sign: a symmetric positive definite map of the gradient."""


def half_gradient(loadings: Float[Array, "d K"], image: Float[Array, "d K"], hierarchy: Hierarchy) -> Float[Array, "d K"]:
    """∇f/2 = [F(FᵀF) − S̃F]∘mask, from the image S̃F: FFᵀ is never formed."""
    return jnp.where(hierarchy.mask, loadings @ (loadings.T @ loadings) - image, 0)


def line_coefficients(F: Array, V: Array, V_image: Array, half_grad: Array) -> Float[Array, "4"]:
    """c with f(F + tV) − f(F) = c₁t + c₂t² + c₃t³ + c₄t⁴, exactly: f is a quartic along a line."""
    FF, VV, cross = F.T @ F, V.T @ V, F.T @ V
    cross = cross + cross.T
    c2 = jnp.sum(cross**2) / 2 + jnp.sum(FF * VV) - jnp.sum(V * V_image)
    return jnp.stack([2 * jnp.sum(half_grad * V), c2, jnp.sum(cross * VV), jnp.sum(VV**2) / 2])


def minimise_quartic(c: Float[Array, "4"]) -> Float[Array, ""]:
    """A step t > 0 that minimises c₁t + c₂t² + c₃t³ + c₄t⁴ with c₁ ≤ 0 ≤ c₄: the best of a geometric grid about the natural
    scale of
    the problem, polished by Newton steps that are kept only when they go down. Never goes up: 0 when nothing is below 0."""
    tiny = jnp.finfo(c.dtype).tiny

    def value(t):
        return t * (c[0] + t * (c[1] + t * (c[2] + t * c[3])))

    def newton(_, t):
        slope = c[0] + t * (2 * c[1] + t * (3 * c[2] + 4 * t * c[3]))
        curvature = 2 * c[1] + t * (6 * c[2] + 12 * t * c[3])
        trial = jnp.where(curvature > 0, t - slope / jnp.where(curvature > 0, curvature, 1), t)
        return jnp.where((trial > 0) & (value(trial) <= value(t)), trial, t)

    quadratic = -c[0] / jnp.maximum(2 * jnp.abs(c[1]), tiny)
    quartic = jnp.cbrt(-c[0] / jnp.maximum(4 * c[3], tiny))
    grid = jnp.minimum(quadratic, quartic) * 2.0 ** jnp.linspace(-2, 3, 16, dtype=c.dtype)
    start = grid[jnp.nanargmin(value(grid))]
    best = jax.lax.fori_loop(0, 5, newton, start)
    return jnp.where(value(best) < 0, best, 0)


def minimise_masked(
    target: Target,
    start: Float[Array, "d K"],
    noise: Float[Array, ""],
    hierarchy: Hierarchy,
    precondition: Preconditioner,
    max_steps: int,
    tolerance: float | None = None,
) -> Estimate:
    """Preconditioned nonlinear conjugate gradients with the exact line minimum: one product S̃V and O(dK²) a step, f never rises.

    Directions follow Polak and Ribière, restarted along the preconditioned gradient when their coefficient is negative or they do
    not descend. Stops when ‖∇f/2‖_F ≤ tolerance · ‖S̃F∘mask‖_F (1e-8 in float64, 1e-4 in float32), or when f goes down no more.
    """
    tolerance = stopping_tolerance(tolerance, start.dtype)
    product = target.masked_product(hierarchy)

    def measure(F, image):
        gradient = half_gradient(F, image, hierarchy)
        scale = jnp.linalg.norm(jnp.where(hierarchy.mask, image, 0))
        return gradient, jnp.linalg.norm(gradient) <= tolerance * scale

    def advance(state):
        F, image, gradient, direction, alignment, _, _, step = state
        steepest = precondition(F, gradient)
        new_alignment = jnp.sum(gradient * steepest)
        direction = conjugate(gradient, steepest, new_alignment, direction, alignment)
        V_image = product(direction)
        t = minimise_quartic(line_coefficients(F, direction, V_image, gradient))
        F, image = F + t * direction, image + t * V_image
        new_gradient, converged = measure(F, image)
        momentum = (direction, gradient)
        return F, image, new_gradient, momentum, new_alignment, converged, t > 0, step + 1

    def conjugate(gradient, steepest, new_alignment, momentum, alignment):
        previous, old_gradient = momentum
        beta = jnp.maximum((new_alignment - jnp.sum(steepest * old_gradient)) / jnp.where(alignment > 0, alignment, 1), 0)
        direction = beta * previous - steepest
        return jnp.where(jnp.sum(direction * gradient) < 0, direction, -steepest)

    image = product(start)
    gradient, converged = measure(start, image)
    zero = jnp.zeros_like(start)
    state = (start, image, gradient, (zero, zero), jnp.zeros((), start.dtype), converged, jnp.array(True), 0)
    state = jax.lax.while_loop(lambda s: ~s[5] & s[6] & (s[7] < max_steps), advance, state)
    F, image, _, _, _, converged, _, steps = state
    return finished(F, noise, converged, steps, least_squares_objective(F, target, image))


@compiled(check=check_iterative)
@named
@scale_equivariant(squared_scale)
def hcl_gd(
    covariance: SampleCovariance, hierarchy: Hierarchy, *, tolerance: float | None = None, max_steps: int = 2000
) -> Estimate:
    """`hcl-gd`: the minimiser of ½‖FFᵀ − S̃‖_F² over masked F by gradient descent from `hcl-svd` (Algorithm 1), accelerated by
    conjugate directions and exact line minima. See `minimise_masked` for its stop."""
    factor, noise = denoised_factor(covariance, hierarchy.n_factors)
    start = structured_loadings(factor, hierarchy)
    target = DenoisedCovariance(covariance, noise)
    return minimise_masked(target, start, noise, hierarchy, lambda F, gradient: gradient, max_steps, tolerance)
