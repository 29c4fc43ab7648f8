"""Estimators of the loadings from a sample covariance: one contract, `ESTIMATORS[name](covariance, hierarchy) -> Estimate`."""

from collections.abc import Callable

from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators.estimate import Estimate
from hcl_jax.estimators.gauss_newton import hcl_gn, hcl_shrunk
from hcl_jax.estimators.gradient import hcl_gd
from hcl_jax.estimators.likelihood import hcl_ml
from hcl_jax.estimators.missing import hcl_ml_by_pattern
from hcl_jax.estimators.published import hcl_gd_published, hcl_svd_published
from hcl_jax.estimators.spectral import hcl_svd, naive_svd, naive_svd_denoised
from hcl_jax.estimators.variational import hcl_vb, hcl_vb_by_pattern
from hcl_jax.structure import Hierarchy

ESTIMATORS: dict[str, Callable[[SampleCovariance, Hierarchy], Estimate]] = {
    "hcl-vb": hcl_vb,
    "hcl-ml": hcl_ml,
    "hcl-shrunk": hcl_shrunk,
    "hcl-gn": hcl_gn,
    "hcl-gd": hcl_gd,
    "hcl-svd": hcl_svd,
    "hcl-gd-published": hcl_gd_published,
    "hcl-svd-published": hcl_svd_published,
    "naive-svd-denoised": naive_svd_denoised,
    "naive-svd": naive_svd,
}

BY_PATTERN = {"hcl-vb": hcl_vb_by_pattern, "hcl-ml": hcl_ml_by_pattern}
"""Those that take rows that lack whole views: `BY_PATTERN[name](moments, hierarchy) -> (Estimate, mean)`."""

__all__ = ["BY_PATTERN", "ESTIMATORS", "Estimate"]
