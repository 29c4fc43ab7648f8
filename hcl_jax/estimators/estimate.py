"""What every estimator returns."""

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

CONVERGED, OUT_OF_STEPS, NON_FINITE = 0, 1, 2


class Estimate(eqx.Module):
    """Loadings, noise variance, and how the fit ended.

    `loadings` is d × K, with the hierarchy's zero pattern where the method has one. `noise_variance` is one number, or one per
    modality where a likelihood estimator was asked for that. `status`: 0 converged, 1 out of steps, 2 non-finite. `objective`:
    f = ½‖FFᵀ − S̃‖_F² for the spectral and the least-squares methods, −2 log-likelihood/ν or −bound/ν for the likelihood ones.
    """

    loadings: Float[Array, "d K"]
    noise_variance: Float[Array, "..."]
    status: Int[Array, ""]
    steps: Int[Array, ""]
    objective: Float[Array, ""]


def finished(loadings: Array, noise_variance: Array, converged: Array | bool, steps: Array | int, objective: Array) -> Estimate:
    """An estimate whose status says whether it converged, and whether everything in it is finite."""
    finite = jnp.isfinite(loadings).all() & jnp.isfinite(noise_variance).all() & jnp.isfinite(objective)
    status = jnp.where(finite, jnp.where(converged, CONVERGED, OUT_OF_STEPS), NON_FINITE)
    return Estimate(loadings, noise_variance, status, jnp.asarray(steps), objective)


def default_tolerance(dtype: DTypeLike, double: float = 1e-8, single: float = 1e-4) -> float:
    """The relative gradient at which to stop: what double, or single, precision can reach."""
    return double if jnp.finfo(dtype).bits == 64 else single
