"""Contrastive losses on representations (theory: Section 2, eq. 2 and Remark 2).

Representations are an array M × n × K: what modality m says of sample i about the K factors, zero in the columns of
structures that the modality does not belong to.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcl_jax.structure import Hierarchy

Similarity = Callable[[Float[Array, "n r"], Float[Array, "n r"]], Float[Array, "n n"]]
"""ℓ(h_i, h'_j) for all pairs of samples."""


Scalar = float | Float[Array, ""]


def inner_product(a: Float[Array, "n r"], b: Float[Array, "n r"]) -> Float[Array, "n n"]:
    """⟨h_i, h'_j⟩."""
    return a @ b.T


def cosine(a: Float[Array, "n r"], b: Float[Array, "n r"]) -> Float[Array, "n n"]:
    """⟨h_i, h'_j⟩/(‖h_i‖‖h'_j‖), 0 where a representation is zero."""
    return _unit(a) @ _unit(b).T


def negative_distance(a: Float[Array, "n r"], b: Float[Array, "n r"]) -> Float[Array, "n n"]:
    """−½‖h_i − h'_j‖²."""
    return a @ b.T - (jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None, :]) / 2


def gaussian_log_ratio(a: Float[Array, "n r"], b: Float[Array, "n r"], correlation: Scalar = 0.9) -> Float[Array, "n n"]:
    """log p(h_i, h'_j)/(p(h_i) p(h'_j)), up to a constant, of standard normal coordinates with that correlation ρ each:
    (ρ⟨h, h'⟩ − ½ρ²(‖h‖² + ‖h'‖²))/(1 − ρ²)."""
    squares = jnp.sum(a**2, axis=1)[:, None] + jnp.sum(b**2, axis=1)[None, :]
    return (correlation * (a @ b.T) - correlation**2 * squares / 2) / (1 - correlation**2)


def _unit(a: Float[Array, "n r"]) -> Float[Array, "n r"]:
    squared = jnp.sum(a**2, axis=1, keepdims=True)
    positive = squared > 0
    return jnp.where(positive, a / jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def linear_representations(
    samples: Float[Array, "n d"], loadings: Float[Array, "d K"], hierarchy: Hierarchy
) -> Float[Array, "M n K"]:
    """F^(m)ᵀ x_i^(m) for every modality and sample; F is masked by the hierarchy first."""
    masked = jnp.where(hierarchy.mask, loadings, 0)
    return jnp.stack([samples[:, hierarchy.rows(m)] @ masked[hierarchy.rows(m)] for m in hierarchy.modalities])


def similarities(
    representations: Float[Array, "M n K"],
    hierarchy: Hierarchy,
    similarity: Similarity = inner_product,
    weights: Float[Array, " structures"] | None = None,
) -> Float[Array, "n n"]:
    """φ_ij = Σ_s w_s Σ_{m,m' ∈ s} ℓ(h_{i,s}^(m), h_{j,s}^(m')), weights 1 unless given.

    For the inner product the modalities of a structure are added first: one product a structure.
    """
    weights = jnp.ones(len(hierarchy.structures), representations.dtype) if weights is None else weights
    total = jnp.zeros((representations.shape[1],) * 2, representations.dtype)
    for weight, s in zip(weights, hierarchy.structures, strict=True):
        blocks = [representations[m - 1][:, hierarchy.columns(s)] for m in s]
        if similarity is inner_product:
            joint = sum(blocks[1:], blocks[0])
            total = total + weight * inner_product(joint, joint)
        else:
            total = total + weight * sum(similarity(a, b) for a in blocks for b in blocks)
    return total


def linear_loss(phi: Float[Array, "n n"]) -> Float[Array, ""]:
    """−(1/2n) Σ_i φ_ii + (1/(2n(n−1))) Σ_{i≠j} φ_ij: the first two terms of eq. (2). Needs n ≥ 2."""
    n = phi.shape[0]
    if n < 2:
        raise ValueError(f"phi: has {n} samples; expected at least 2")
    own = jnp.trace(phi)
    return -own / (2 * n) + (phi.sum() - own) / (2 * n * (n - 1))


def softmax_loss(phi: Float[Array, "n n"], temperature: float | Float[Array, ""]) -> Float[Array, ""]:
    """−(1/n) Σ_i log( exp(φ_ii/τ) / Σ_j exp(φ_ij/τ) ), without overflow (Remark 2)."""
    scaled = phi / temperature
    return jnp.mean(jax.nn.logsumexp(scaled, axis=1) - jnp.diagonal(scaled))


def ridge_penalty(loadings: Float[Array, "d K"], penalty: float | Float[Array, ""] = 1.0) -> Float[Array, ""]:
    """R(F) = (λ/4) ‖FFᵀ‖_F², as ‖FᵀF‖_F²: O(dK²)."""
    return penalty / 4 * jnp.sum((loadings.T @ loadings) ** 2)


def structure_overlap(representations: Float[Array, "M n K"], hierarchy: Hierarchy) -> Float[Array, ""]:
    """The mean over modalities of Σ_{s<t} ‖Cov(h_s^(m), h_t^(m))‖_F²: the penalty that keeps the structures of one modality
    apart.

    Squared covariances, not signed inner products, which would drive structures to opposite directions instead of apart.
    """
    n = representations.shape[1]
    centred = representations - representations.mean(axis=1, keepdims=True)
    covariances = jnp.einsum("mik,mil->mkl", centred, centred) / n
    total = jnp.sum(covariances**2)
    for columns in map(hierarchy.columns, hierarchy.structures):
        total = total - jnp.sum(covariances[:, columns, columns] ** 2)
    return total / 2 / hierarchy.n_modalities


def linear_contrastive_loss(
    samples: Float[Array, "n d"], loadings: Float[Array, "d K"], hierarchy: Hierarchy, penalty: float | Float[Array, ""] = 1.0
) -> Float[Array, ""]:
    """L(F) of eq. (2) with f = identity: equal to −½ tr(FᵀSF) + (λ/4)‖FFᵀ‖_F² for masked F, centred data or not (Proposition
    1)."""
    phi = similarities(linear_representations(samples, loadings, hierarchy), hierarchy)
    return linear_loss(phi) + ridge_penalty(jnp.where(hierarchy.mask, loadings, 0), penalty)
