"""Procrustes alignment: loadings are identified up to one rotation per structure (theory: Section 4)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from hcl_jax.structure import Hierarchy


def procrustes_rotation(estimate: Float[Array, "d k"], target: Float[Array, "d k"]) -> Float[Array, "k k"]:
    """O = argmin over orthogonal O of ‖estimate O − target‖_F: the polar factor of estimateᵀ target (Schönemann 1966)."""
    U, _, Vt = jnp.linalg.svd(estimate.T @ target)
    return U @ Vt


def align_globally(estimate: Float[Array, "d K"], target: Float[Array, "d K"]) -> Float[Array, "d K"]:
    """The estimate under the one rotation of all K columns that brings it nearest to the target."""
    return estimate @ procrustes_rotation(estimate, target)


def align_by_structure(estimate: Float[Array, "d K"], target: Float[Array, "d K"], hierarchy: Hierarchy) -> Float[Array, "d K"]:
    """The estimate under one rotation per structure, the same for all the structure's modalities."""
    aligned = [
        align_globally(estimate[:, columns], target[:, columns]) for columns in map(hierarchy.columns, hierarchy.structures)
    ]
    return jnp.concatenate(aligned, axis=1)
