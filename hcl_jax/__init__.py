"""hcl_jax: hierarchical contrastive learning for multimodal data."""

from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators import ESTIMATORS, Estimate
from hcl_jax.limits import LIMITS
from hcl_jax.metrics import recovery_errors
from hcl_jax.model import (
    LATENT_LAWS,
    Truth,
    sample_data_covariance,
    sample_factored_covariance,
    sample_loadings,
    sample_observations,
    sample_truth,
    sample_wishart_covariance,
)
from hcl_jax.structure import Hierarchy

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "LATENT_LAWS",
    "LIMITS",
    "Estimate",
    "Hierarchy",
    "SampleCovariance",
    "Truth",
    "recovery_errors",
    "sample_data_covariance",
    "sample_factored_covariance",
    "sample_loadings",
    "sample_observations",
    "sample_truth",
    "sample_wishart_covariance",
]
