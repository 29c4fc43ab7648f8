"""Spectral estimators: no iteration (theory: Section 3)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from hcl_jax.covariance import DenoisedCovariance, LowRankCovariance, SampleCovariance, denoised_factor
from hcl_jax.covariance import noise_variance as mean_of_rest
from hcl_jax.estimators.estimate import Estimate, check_problem, finished
from hcl_jax.structure import Hierarchy, Structure


def least_squares_objective(
    loadings: Float[Array, "d K"], target: DenoisedCovariance | LowRankCovariance, image: Float[Array, "d K"] | None = None
) -> Float[Array, ""]:
    """f(F) = ½‖FFᵀ − S̃‖_F², from the products S̃F (`image`, where they are at hand)."""
    image = target.product(loadings) if image is None else image
    return jnp.sum((loadings.T @ loadings) ** 2) / 2 - jnp.sum(loadings * image) + target.squared_norm() / 2


def signed_top_factor(columns: Float[Array, "d k"], signs: Float[Array, " k"], rank: int) -> Float[Array, "d rank"]:
    """Top eigenpairs of X diag(signs) Xᵀ as a factor: eigenvectors times the roots of their eigenvalues, clipped at 0."""
    Q, R = jnp.linalg.qr(columns)
    values, vectors = jnp.linalg.eigh((R * signs[None, :]) @ R.T)
    top = slice(-1, -rank - 1, -1)
    return Q @ vectors[:, top] * jnp.sqrt(jnp.maximum(values[top], 0))[None, :]


def _null_basis(factor: Float[Array, "rows K"], dim: int) -> Float[Array, "K dim"]:
    """The `dim` directions in factor space that the rows see least."""
    _, vectors = jnp.linalg.eigh(factor.T @ factor)
    return vectors[:, :dim]


def _inside(s: Structure, hierarchy: Hierarchy) -> list[Structure]:
    """The structures strictly inside s."""
    return [t for t in hierarchy.structures if set(t) < set(s)]


def structured_loadings(factor: Float[Array, "d K"], hierarchy: Hierarchy) -> Float[Array, "d K"]:
    """Loadings with the zero pattern of the hierarchy from any factor L of a covariance LLᵀ ≈ G, structure by structure,
    smallest first.

    With c = complement of s, the conditional covariance S̃_ss − S̃_sc S̃_cc⁺ S̃_cs of S̃ = LLᵀ is L_s N Nᵀ L_sᵀ, where N spans the
    Σ_{t ⊆ s} r_t directions of factor space that the rows of c do not see. In the population it equals Σ_{t ⊆ s} Λ_tΛ_tᵀ;
    what the structures inside s explain is taken away, and Λ̂_s is made of the top r_s eigenpairs of the rest. All modalities
    of a structure are extracted together, which aligns them. Exact in the population for every hierarchy that is
    identifiable; costs O(dK²).
    """
    loadings = jnp.zeros((hierarchy.n_features, hierarchy.n_factors), factor.dtype)
    for s, rank in reversed(hierarchy.ranks):
        rows = hierarchy.structure_rows(s)
        inside = _inside(s, hierarchy)
        unseen = rank + sum(hierarchy.rank(t) for t in inside)
        others = tuple(m for m in hierarchy.modalities if m not in s)
        conditional = factor[rows] @ _null_basis(factor[hierarchy.structure_rows(others)], unseen) if others else factor[rows]
        columns = jnp.concatenate([conditional, *[loadings[rows, hierarchy.columns(t)] for t in inside]], axis=1)
        signs = jnp.where(jnp.arange(columns.shape[1]) < conditional.shape[1], 1, -1).astype(factor.dtype)
        loadings = loadings.at[rows, hierarchy.columns(s)].set(signed_top_factor(columns, signs, rank))
    return loadings


def hcl_svd(covariance: SampleCovariance, hierarchy: Hierarchy) -> Estimate:
    """`hcl-svd`: `structured_loadings` of the best rank-K approximation of S̃ = S − σ̂² I.

    The recursion may also be run on S̃ itself, with a pseudo-inverse of every S̃_cc. Truncating first costs O(dK²) after one
    eigenproblem instead of one for each structure, and its Gram errors are lower (docs/results.md).
    """
    check_problem(covariance, hierarchy)
    factor, noise = denoised_factor(covariance, hierarchy.n_factors)
    loadings = structured_loadings(factor, hierarchy)
    objective = least_squares_objective(loadings, DenoisedCovariance(covariance, noise))
    return finished(loadings, noise, True, 0, objective)


def naive_svd_denoised(covariance: SampleCovariance, hierarchy: Hierarchy) -> Estimate:
    """`naive-svd-denoised`: top-K eigenpairs of S̃ = S − σ̂² I, clipped at 0. Ignores the hierarchy beyond K."""
    check_problem(covariance, hierarchy)
    loadings, noise = denoised_factor(covariance, hierarchy.n_factors)
    objective = least_squares_objective(loadings, DenoisedCovariance(covariance, noise))
    return finished(loadings, noise, True, 0, objective)


def naive_svd(covariance: SampleCovariance, hierarchy: Hierarchy) -> Estimate:
    """`naive-svd`: top-K eigenpairs of S itself, as published. Ignores the hierarchy beyond K, and keeps the noise."""
    check_problem(covariance, hierarchy)
    values, vectors = covariance.top_eigenpairs(hierarchy.n_factors)
    noise = mean_of_rest(covariance, values)
    loadings = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
    return finished(loadings, noise, True, 0, least_squares_objective(loadings, DenoisedCovariance(covariance, noise)))
