"""Gauss–Newton directions for ½‖FFᵀ − S̃‖_F², and the fit to a shrunk covariance that they make cheap (theory: Section 3)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcl_jax.covariance import DenoisedCovariance, LowRankCovariance, SampleCovariance, denoised_factor, shrunk_factor
from hcl_jax.estimators.estimate import Estimate
from hcl_jax.estimators.gradient import Preconditioner, minimise_masked
from hcl_jax.estimators.spectral import structured_loadings
from hcl_jax.fisher import apply_by_modality, modality_inverses
from hcl_jax.structure import Hierarchy

DAMPING = 1e-2  # of the mean signal eigenvalue: keeps weak columns from taking wild steps
CG_STEPS = 2  # more make a better direction and cost more than they save (benchmarks/recovery_throughput.py)


def make_gauss_newton(hierarchy: Hierarchy, damping: float = DAMPING, cg_steps: int = CG_STEPS) -> Preconditioner:
    """Directions V that solve (VFᵀF + FVᵀF)∘mask + μV = ∇f/2 by a few conjugate-gradient steps, each O(dK²).

    The steps are themselves preconditioned by the diagonal part of the operator, V ↦ V(FᵀF)_aa per modality with active columns a.
    """

    def direction(F: Float[Array, "d K"], FF: Float[Array, "K K"], gradient: Float[Array, "d K"]) -> Float[Array, "d K"]:
        inverses = modality_inverses(FF, hierarchy, damping)
        mu = damping * jnp.trace(FF) / FF.shape[0]

        def operator(V: Array) -> Array:
            return jnp.where(hierarchy.mask, V @ FF + F @ (V.T @ F), 0) + mu * V

        def block_solve(V: Array) -> Array:
            return apply_by_modality(V, inverses, hierarchy)

        V, _ = jax.scipy.sparse.linalg.cg(operator, gradient, tol=0.0, maxiter=cg_steps, M=block_solve)
        return V

    return direction


def hcl_gn(covariance: SampleCovariance, hierarchy: Hierarchy, *, tolerance: float | None = None, max_steps: int = 500) -> Estimate:
    """`hcl-gn`: the minimiser of ½‖FFᵀ − S̃‖_F² over masked F, as `hcl-gd`, with Gauss–Newton directions: several times fewer steps."""
    factor, noise = denoised_factor(covariance, hierarchy.n_factors)
    start = structured_loadings(factor, hierarchy)
    target = DenoisedCovariance(covariance, noise)
    return minimise_masked(target, start, noise, hierarchy, make_gauss_newton(hierarchy), max_steps, tolerance)


def hcl_shrunk(covariance: SampleCovariance, hierarchy: Hierarchy, *, tolerance: float | None = None, max_steps: int = 500) -> Estimate:
    """`hcl-shrunk`: the masked F nearest to the covariance whose top-K eigenvalues are shrunk for Frobenius loss.

    Source of the shrinkage: Donoho, Gavish and Johnstone (2018); see `shrunk_factor`. The objective is f with that covariance as S̃.
    Starts at `hcl-svd` of the unshrunk covariance: a column that is zero at the start, as those of invisible eigenvalues would be,
    stays zero.
    """
    factor, noise = shrunk_factor(covariance, hierarchy.n_factors)
    unshrunk, _ = denoised_factor(covariance, hierarchy.n_factors)
    start = structured_loadings(unshrunk, hierarchy)
    return minimise_masked(LowRankCovariance(factor), start, noise, hierarchy, make_gauss_newton(hierarchy), max_steps, tolerance)
