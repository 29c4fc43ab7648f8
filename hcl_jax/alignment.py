"""Procrustes alignment: loadings are identified up to one rotation per structure (theory: Section 4)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.linalg import polar_factor
from hcl_jax.structure import Hierarchy


def procrustes_rotation(estimate: Float[Array, "d k"], target: Float[Array, "d k"]) -> Float[Array, "k k"]:
    """O = argmin over orthogonal O of ‖estimate O − target‖_F: the polar factor of estimateᵀ target (Schönemann 1966)."""
    return polar_factor(estimate.T @ target)


def align_globally(estimate: Float[Array, "d K"], target: Float[Array, "d K"]) -> Float[Array, "d K"]:
    """The estimate under the one rotation of all K columns that brings it nearest to the target."""
    return estimate @ procrustes_rotation(estimate, target)


def columns_by_rank(hierarchy: Hierarchy) -> list[tuple[Int[np.ndarray, " S"], Int[np.ndarray, "S rank"]]]:
    """For every rank that occurs: which structures have it, and where the columns of each of these stand."""
    ranks = np.array([rank for _, rank in hierarchy.ranks])
    columns = [np.arange(hierarchy.n_factors)[hierarchy.columns(s)] for s in hierarchy.structures]
    chosen = [np.flatnonzero(ranks == rank) for rank in np.unique(ranks)]
    return [(structures, np.stack([columns[i] for i in structures])) for structures in chosen]


def over_structures(
    function: Callable[..., Array], hierarchy: Hierarchy, *arrays: Float[Array, "... K"] | Bool[Array, "... K"]
) -> Array:
    """function(columns of the first array, columns of the next, …) for every structure, along a new leading axis; structures of
    equal rank as one batch."""
    groups = columns_by_rank(hierarchy)
    batches = [tuple(jnp.moveaxis(array[..., columns], -2, 0) for array in arrays) for _, columns in groups]
    results = [jax.lax.map(lambda batch: function(*batch), batch) for batch in batches]  # no batched LAPACK call: see mapping.py
    return jnp.concatenate(results)[np.argsort(np.concatenate([structures for structures, _ in groups]))]


def align_by_structure(estimate: Float[Array, "d K"], target: Float[Array, "d K"], hierarchy: Hierarchy) -> Float[Array, "d K"]:
    """The estimate under one rotation per structure, the same for all the structure's modalities."""
    aligned = estimate
    for _, columns in columns_by_rank(hierarchy):
        pairs = (jnp.moveaxis(estimate[:, columns], 1, 0), jnp.moveaxis(target[:, columns], 1, 0))
        batch = jax.lax.map(lambda pair: align_globally(*pair), pairs)
        aligned = aligned.at[:, columns].set(jnp.moveaxis(batch, 0, 1))
    return aligned
