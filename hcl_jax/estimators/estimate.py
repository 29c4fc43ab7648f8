"""What every estimator returns."""

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from hcl_jax.covariance import SampleCovariance, check_covariance
from hcl_jax.structure import CONVERGED, NON_FINITE, ON_BOUND, OUT_OF_STEPS, Hierarchy, as_hierarchy
from hcl_jax.views import as_number, check_count

Fit = TypeVar("Fit", bound=Callable[..., "Estimate"])


class Estimate(eqx.Module):
    """Loadings, noise variance, and how the fit ended.

    `loadings` is d × K, with the hierarchy's zero pattern where the method has one. `noise_variance` is one number, or one for
    each of the d features where a likelihood estimator was asked for noise by view or by feature. `status`: 0 converged, 1 out of
    steps, 2 non-finite, 3 converged on a bound, a noise variance of next to nothing: the factors took it all, or there was none.
    `objective`: f = ½‖FFᵀ − S̃‖_F² for the spectral and the least-squares methods, −2 log-likelihood/ν or −bound/ν for the
    likelihood ones. `method` is the name in `ESTIMATORS`, `noise` which features share a noise variance.
    """

    loadings: Float[Array, "d K"]
    noise_variance: Float[Array, "..."]
    status: Int[Array, ""]
    steps: Int[Array, ""]
    objective: Float[Array, ""]
    method: str = eqx.field(static=True, default="")
    noise: str = eqx.field(static=True, default="shared")


def finished(
    loadings: Array,
    noise_variance: Array,
    converged: Array | bool,
    steps: Array | int,
    objective: Array,
    *,
    on_bound: Array | bool = False,
    noise: str = "shared",
) -> Estimate:
    """An estimate whose status says whether it converged, where, and whether everything in it is finite."""
    finite = jnp.isfinite(loadings).all() & jnp.isfinite(noise_variance).all() & jnp.isfinite(objective)
    ended = jnp.where(on_bound | ~(noise_variance.min() > 0), ON_BOUND, CONVERGED)
    status = jnp.where(finite, jnp.where(converged, ended, OUT_OF_STEPS), NON_FINITE)
    return Estimate(loadings, noise_variance, status, jnp.asarray(steps), objective, noise=noise)


def check_problem(covariance: SampleCovariance, hierarchy: Hierarchy) -> None:
    """Raise `ValueError` unless the covariance has the features of the hierarchy, more of them than factors, and K < ν: with more
    factors the noise variance is 0 and the likelihood unbounded. (Where n is traced, the estimate's status says so.)"""
    check_covariance(covariance)
    d, n_factors = as_hierarchy(hierarchy).n_features, hierarchy.n_factors
    if covariance.n_features != d:
        raise ValueError(
            f"hierarchy: has dims {hierarchy.dims}, {d} features; expected {covariance.n_features}, as the covariance has"
        )
    if n_factors >= d:
        raise ValueError(
            f"hierarchy: has K = {n_factors} factors for {d} features; expected fewer, or nothing is left for the noise"
        )
    if not isinstance(covariance.n, jax.core.Tracer) and n_factors >= float(covariance.nu):
        raise ValueError(
            f"hierarchy: has K = {n_factors} factors for ν = n − 1 = {float(covariance.nu):g} degrees of freedom; "
            "expected K < ν, or the fit leaves no noise"
        )


def check_iterative(covariance: SampleCovariance, hierarchy: Hierarchy, tolerance: float | None, max_steps: int) -> None:
    """As `check_problem`, and raise `ValueError` unless the tolerance, if any, is a positive number and the steps are
    counted from 0. (Traced options pass.)"""
    check_problem(covariance, hierarchy)
    if tolerance is not None:
        as_number(tolerance, "tolerance", "a positive number", lambda number: number > 0)
    if not isinstance(max_steps, jax.core.Tracer):
        check_count(max_steps, "max_steps", 0)


def named(estimator: Fit) -> Fit:
    """The estimator, whose estimates carry its name."""

    @wraps(estimator)
    def run(*args: Any, **options: Any) -> Estimate:
        return dataclasses.replace(estimator(*args, **options), method=estimator.__name__.replace("_", "-"))

    return cast(Fit, run)


def without_name(estimate: Estimate) -> Estimate:
    """The estimate, whatever made it: programs that take it are then compiled once for all methods."""
    return dataclasses.replace(estimate, method="", noise="shared")


def default_tolerance(dtype: DTypeLike, double: float = 1e-8, single: float = 1e-4) -> float:
    """The relative gradient at which to stop: what double, or single, precision can reach."""
    return double if jnp.finfo(dtype).bits == 64 else single


def stopping_tolerance(given: float | None, dtype: DTypeLike, double: float = 1e-8, single: float = 1e-4) -> float:
    """The tolerance that was given, or the default one."""
    return default_tolerance(dtype, double, single) if given is None else given


def squared_scale(objective: Array, root: Array, n_features: int) -> Array:
    """½‖FFᵀ − S̃‖_F² of S from that of S/root²."""
    return objective * root**4


def log_scale(objective: Array, root: Array, n_features: int) -> Array:
    """−2 log-likelihood/ν of S from that of S/root²."""
    return objective + 2 * n_features * jnp.log(root)


def scale_equivariant(objective: Callable[[Array, Array, int], Array]) -> Callable[[Fit], Fit]:
    """An estimator whose problem is checked, that sees S in unit scale, and whose estimate is scaled back: the units of the data,
    from 1e-18 to 1e18, then change neither its steps nor its stop. (In single precision `objective` may leave the range of
    numbers.)"""

    def decorate(estimator: Fit) -> Fit:
        @wraps(estimator)
        def run(covariance: SampleCovariance, hierarchy: Hierarchy, **options: Any) -> Estimate:
            check_problem(covariance, hierarchy)
            unit, root = covariance.in_unit_scale()
            fit = estimator(unit, hierarchy, **options)
            scaled = objective(fit.objective, root, covariance.n_features)
            loadings, noise = root * fit.loadings, root**2 * fit.noise_variance
            return dataclasses.replace(fit, loadings=loadings, noise_variance=noise, objective=scaled)

        return cast(Fit, run)

    return decorate
