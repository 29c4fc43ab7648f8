"""Gauss–Newton preconditioning of ½‖FFᵀ − S̃‖_F², and the fit to a shrunk covariance that it makes cheap (theory: Section 3)."""

from jaxtyping import Array, Float

from hcl_jax.compiled import compiled
from hcl_jax.covariance import DenoisedCovariance, LowRankCovariance, SampleCovariance, denoised_factor, shrunk_factor
from hcl_jax.estimators.estimate import Estimate, check_iterative, named, scale_equivariant, squared_scale, stopping_tolerance
from hcl_jax.estimators.gradient import Preconditioner, minimise_masked
from hcl_jax.estimators.spectral import structured_loadings
from hcl_jax.fisher import apply_by_modality, modality_inverses
from hcl_jax.structure import Hierarchy

DAMPING = 0.1  # of the mean signal eigenvalue: keeps weak columns from taking wild steps


def gauss_newton_blocks(hierarchy: Hierarchy) -> Preconditioner:
    """V ↦ V(FᵀF)_aa⁻¹ per modality with active columns a: the inverse of the diagonal blocks of the Gauss–Newton operator
    V ↦ (VFᵀF + FVᵀF)∘mask, damped.

    What the blocks leave out, conjugate directions and the exact line minimum of `minimise_masked` make up for. Solving with
    the whole operator by inner conjugate gradients takes about half as many steps and more time.
    """

    def direction(F: Float[Array, "d K"], gradient: Float[Array, "d K"]) -> Float[Array, "d K"]:
        return apply_by_modality(gradient, modality_inverses(F.T @ F, hierarchy, DAMPING), hierarchy)

    return direction


@compiled(check=check_iterative)
@named
@scale_equivariant(squared_scale)
def hcl_gn(
    covariance: SampleCovariance, hierarchy: Hierarchy, *, tolerance: float | None = None, max_steps: int = 1500
) -> Estimate:
    """`hcl-gn`: the minimiser of ½‖FFᵀ − S̃‖_F² over masked F, as `hcl-gd`, along Gauss–Newton directions: several times
    fewer steps."""
    factor, noise = denoised_factor(covariance, hierarchy.n_factors)
    start = structured_loadings(factor, hierarchy)
    target = DenoisedCovariance(covariance, noise)
    return minimise_masked(target, start, noise, hierarchy, gauss_newton_blocks(hierarchy), max_steps, tolerance)


@compiled(check=check_iterative)
@named
@scale_equivariant(squared_scale)
def hcl_shrunk(
    covariance: SampleCovariance, hierarchy: Hierarchy, *, tolerance: float | None = None, max_steps: int = 1500
) -> Estimate:
    """`hcl-shrunk`: the masked F nearest to the covariance whose top-K eigenvalues are shrunk for Frobenius loss.

    Source of the shrinkage: Donoho, Gavish and Johnstone (2018); see `shrunk_factor`. The objective is f with that covariance
    as S̃. Starts at `hcl-svd` of the unshrunk covariance: a column that is zero at the start, as those of invisible
    eigenvalues would be, stays zero. Stops at a relative gradient of 1e-6 (float64) or 1e-4 (float32): columns on their way
    to zero get there slowly.
    """
    tolerance = stopping_tolerance(tolerance, covariance.dtype, double=1e-6)
    factor, noise = shrunk_factor(covariance, hierarchy.n_factors)
    unshrunk, _ = denoised_factor(covariance, hierarchy.n_factors)
    start = structured_loadings(unshrunk, hierarchy)
    precondition = gauss_newton_blocks(hierarchy)
    return minimise_masked(LowRankCovariance(factor), start, noise, hierarchy, precondition, max_steps, tolerance)
