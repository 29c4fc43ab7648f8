"""hcl_jax: hierarchical contrastive learning for multimodal data."""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from hcl_jax.decomposition import Decomposition, fit, load
    from hcl_jax.outcomes import repeated, survival

__version__ = "0.1.0"

__all__ = [
    "ESTIMATORS",
    "LATENT_LAWS",
    "LIMITS",
    "Decomposition",
    "Estimate",
    "Hierarchy",
    "SampleCovariance",
    "Truth",
    "fit",
    "load",
    "recovery_errors",
    "repeated",
    "sample_data_covariance",
    "sample_factored_covariance",
    "sample_loadings",
    "sample_observations",
    "sample_truth",
    "sample_wishart_covariance",
    "survival",
]

FRONT_DOOR = {
    **dict.fromkeys(("Decomposition", "fit", "load"), "hcl_jax.decomposition"),
    **dict.fromkeys(("repeated", "survival"), "hcl_jax.outcomes"),
}
"""By name, the module that has it."""


def __getattr__(name: str) -> Any:
    """The front door, which imports all methods, is opened when it is first asked for."""
    if name not in FRONT_DOOR:
        raise AttributeError(f"module 'hcl_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(FRONT_DOOR[name]), name)
