"""Products of masked loadings, which never multiply by the zeros of the hierarchy: modality by modality, with the columns that it
sees.

A and F are d × K loadings that are zero where the hierarchy says so; nothing is computed from what stands there.
"""

import functools
from collections.abc import Iterable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from hcl_jax.structure import Hierarchy


def seen_columns(matrix: Float[Array, "rows K"], hierarchy: Hierarchy, modality: int) -> Float[Array, "rows seen"]:
    """The columns that a modality sees."""
    return jnp.concatenate([matrix[:, :0], *(matrix[:, run] for run in hierarchy.active_runs(modality))], axis=1)


def all_columns(part: Float[Array, "rows seen"], hierarchy: Hierarchy, modality: int) -> Float[Array, "rows K"]:
    """The columns that a modality sees where they stand among all K, and zeros in the others."""
    pieces, start, used = [], 0, 0
    for run in hierarchy.active_runs(modality):
        width = run.stop - run.start
        pieces += [jnp.zeros((part.shape[0], run.start - start), part.dtype), part[:, used : used + width]]
        start, used = run.stop, used + width
    pieces.append(jnp.zeros((part.shape[0], hierarchy.n_factors - start), part.dtype))
    return jnp.concatenate(pieces, axis=1)


def block(loadings: Float[Array, "d K"], hierarchy: Hierarchy, modality: int) -> Float[Array, "rows seen"]:
    """A modality's rows of the columns that it sees."""
    return seen_columns(loadings[hierarchy.rows(modality)], hierarchy, modality)


def core(C: Float[Array, "K K"], hierarchy: Hierarchy, modality: int) -> Float[Array, "seen seen"]:
    """The rows and columns of the factors that a modality sees."""
    return seen_columns(seen_columns(C, hierarchy, modality).T, hierarchy, modality).T


def cores(C: Float[Array, "K K"], hierarchy: Hierarchy) -> tuple[Float[Array, "_seen _seen"], ...]:
    """The same for every modality."""
    return tuple(core(C, hierarchy, m) for m in hierarchy.modalities)


def added(parts: Iterable[Float[Array, "..."]]) -> Float[Array, "..."]:
    """Their sum."""
    return functools.reduce(jnp.add, parts)


def modality_gram(A: Float[Array, "d K"], F: Float[Array, "d K"], hierarchy: Hierarchy, modality: int) -> Float[Array, "K K"]:
    """A_mᵀF_m, of the rows of one modality."""
    small = block(A, hierarchy, modality).T @ block(F, hierarchy, modality)
    return all_columns(all_columns(small, hierarchy, modality).T, hierarchy, modality).T


def modality_inner(A: Float[Array, "d K"], M: Float[Array, "d k"], hierarchy: Hierarchy, modality: int) -> Float[Array, "K k"]:
    """A_mᵀM_m, of the rows of one modality, for any M."""
    return all_columns(M[hierarchy.rows(modality)].T @ block(A, hierarchy, modality), hierarchy, modality).T


def gram(A: Float[Array, "d K"], F: Float[Array, "d K"], hierarchy: Hierarchy) -> Float[Array, "K K"]:
    """AᵀF."""
    return added(modality_gram(A, F, hierarchy, m) for m in hierarchy.modalities)


def inner(A: Float[Array, "d K"], M: Float[Array, "d k"], hierarchy: Hierarchy) -> Float[Array, "K k"]:
    """AᵀM for any M."""
    return added(modality_inner(A, M, hierarchy, m) for m in hierarchy.modalities)


def mixed(F: Float[Array, "d K"], C: Float[Array, "K k"], hierarchy: Hierarchy) -> Float[Array, "d k"]:
    """F C."""
    parts = [block(F, hierarchy, m) @ seen_columns(C.T, hierarchy, m).T for m in hierarchy.modalities]
    return jnp.concatenate(parts)


def masked_mixed(
    F: Float[Array, "d K"], cores: Sequence[Float[Array, "_seen _seen"]], hierarchy: Hierarchy
) -> Float[Array, "d K"]:
    """F_m C_m for every modality with its own C_m, zero where F is."""
    return jnp.concatenate([all_columns(block(F, hierarchy, m) @ cores[m - 1], hierarchy, m) for m in hierarchy.modalities])
