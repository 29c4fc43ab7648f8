"""Linear maps from features to scores, from estimated loadings (theory: Section 5)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcl_jax.linalg import least_squares_map
from hcl_jax.views import as_matrix, by_feature

PRUNED = 1e-6


def least_squares_scores(loadings: Any) -> Float[Array, "d K"]:
    """Λ(ΛᵀΛ)⁺: the map of rows x to ẑ = (ΛᵀΛ)⁻¹Λᵀx. Columns that were pruned, to a millionth of the strongest in variance, have
    zero scores: what they would be is noise alone."""
    return least_squares_map(as_matrix(loadings, "loadings"), PRUNED)


def posterior_mean_scores(loadings: Any, noise_variance: Any) -> Float[Array, "d K"]:
    """Ψ⁻¹Λ(ΛᵀΨ⁻¹Λ + I)⁻¹: the map of rows x to E[z|x]. y regressed on these needs no debiasing: E[y|x] = βᵀE[z|x].

    Ψ = diag(ψ) for a vector of one noise variance a feature. For one number, σ²I, it is Λ(ΛᵀΛ + σ²I)⁻¹, least squares where σ² is
    0. Raises `ValueError` that names the argument for a vector of another length, and for values of ψ that are not positive.
    """
    L = as_matrix(loadings, "loadings")
    shared = np.ndim(noise_variance) == 0
    psi = by_feature(noise_variance, L.shape[0], L.dtype, positive=not shared)
    scaled = L if shared else L / psi[:, None]
    core = L.T @ scaled + (psi[0] if shared else 1) * jnp.eye(L.shape[1], dtype=L.dtype)
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(core, lower=True), scaled.T).T
