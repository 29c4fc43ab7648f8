"""Spectral estimators: no iteration (theory: Section 3)."""

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.compiled import compiled
from hcl_jax.covariance import DenoisedCovariance, LowRankCovariance, SampleCovariance, denoised_factor
from hcl_jax.covariance import noise_variance as mean_of_rest
from hcl_jax.estimators.estimate import Estimate, check_problem, finished, named
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


class _Plan(NamedTuple):
    """Where the entries of structures stand, a row each; lists of columns are filled up to one length with K, which is none."""

    held: Bool[np.ndarray, "S M"]
    unseen: Int[np.ndarray, " S"]
    """How many directions of factor space only the structure's modalities see."""
    inside: Int[np.ndarray, "S inner"]
    """Columns of the structures strictly inside."""
    own: Int[np.ndarray, "S rank"]

    @classmethod
    def of(cls, hierarchy: Hierarchy, structures: Sequence[Structure]) -> "_Plan":
        own = {s: np.arange(hierarchy.n_factors)[hierarchy.columns(s)] for s in hierarchy.structures}
        inside = [np.concatenate([np.arange(0), *(own[t] for t in own if set(t) < set(s))]) for s in structures]

        def padded(lists: Sequence[np.ndarray]) -> Int[np.ndarray, "S longest"]:
            longest = max(map(len, lists))
            return np.stack([np.pad(held, (0, longest - len(held)), constant_values=hierarchy.n_factors) for held in lists])

        return cls(
            np.array([[m in s for m in hierarchy.modalities] for s in structures]),
            np.array([len(own[s]) + len(columns) for s, columns in zip(structures, inside, strict=True)]),
            padded(inside).astype(int),
            padded([own[s] for s in structures]),
        )


def structured_loadings(factor: Float[Array, "d K"], hierarchy: Hierarchy) -> Float[Array, "d K"]:
    """Loadings with the zero pattern of the hierarchy from any factor L of a covariance LLᵀ ≈ G, structure by structure,
    smallest first.

    With c = complement of s, the conditional covariance S̃_ss − S̃_sc S̃_cc⁺ S̃_cs of S̃ = LLᵀ is L_s N Nᵀ L_sᵀ, where N spans the
    Σ_{t ⊆ s} r_t directions of factor space that the rows of c do not see. In the population it equals Σ_{t ⊆ s} Λ_tΛ_tᵀ;
    what the structures inside s explain is taken away, and Λ̂_s is made of the top r_s eigenpairs of the rest. All modalities
    of a structure are extracted together, which aligns them. Exact in the population for every hierarchy that is
    identifiable; costs O(dK²) a structure.

    One program for all structures but the one that all modalities see, which is the widest by far: zeros fill up smaller ones,
    and change nothing.
    """
    grams = jnp.stack([factor[rows].T @ factor[rows] for rows in map(hierarchy.rows, hierarchy.modalities)])
    modality = jnp.asarray(hierarchy.modality_of_feature)

    def extract(loadings: Float[Array, "d K"], plan: _Plan, width: int) -> tuple[Float[Array, "d K"], None]:
        rows = plan.held[modality][:, None]
        others = jnp.einsum("m,mkl->kl", jnp.where(plan.held, 0, 1).astype(factor.dtype), grams)
        least = jnp.linalg.eigh(others)[1][:, :width]  # what the other modalities see least
        left = jnp.where(rows & (jnp.arange(width) < plan.unseen)[None, :], factor @ least, 0)
        inner = jnp.where(rows, loadings.at[:, plan.inside].get(mode="fill", fill_value=0), 0)
        signs = jnp.asarray(np.repeat([1, -1], [width, inner.shape[1]]), factor.dtype)
        found = signed_top_factor(jnp.concatenate([left, inner], axis=1), signs, plan.own.shape[0])
        return loadings.at[:, plan.own].set(jnp.where(rows, found, 0), mode="drop"), None

    loadings = jnp.zeros((hierarchy.n_features, hierarchy.n_factors), factor.dtype)
    by_size = list(reversed(hierarchy.structures))
    for _, structures in groupby(by_size, key=lambda s: len(s) == hierarchy.n_modalities):
        plan = _Plan.of(hierarchy, list(structures))
        width = int(plan.unseen.max())
        loadings, _ = jax.lax.scan(partial(extract, width=width), loadings, jax.tree.map(jnp.asarray, plan))
    return loadings


@compiled(check=check_problem)
@named
def hcl_svd(covariance: SampleCovariance, hierarchy: Hierarchy) -> Estimate:
    """`hcl-svd`: `structured_loadings` of the best rank-K approximation of S̃ = S − σ̂² I.

    The recursion may also be run on S̃ itself, with a pseudo-inverse of every S̃_cc. Truncating first costs O(dK²) after one
    eigenproblem instead of one for each structure, and its Gram errors are lower (docs/results.md).
    """
    factor, noise = denoised_factor(covariance, hierarchy.n_factors)
    loadings = structured_loadings(factor, hierarchy)
    objective = least_squares_objective(loadings, DenoisedCovariance(covariance, noise))
    return finished(loadings, noise, True, 0, objective)


@compiled(check=check_problem)
@named
def naive_svd_denoised(covariance: SampleCovariance, hierarchy: Hierarchy) -> Estimate:
    """`naive-svd-denoised`: top-K eigenpairs of S̃ = S − σ̂² I, clipped at 0. Ignores the hierarchy beyond K."""
    loadings, noise = denoised_factor(covariance, hierarchy.n_factors)
    objective = least_squares_objective(loadings, DenoisedCovariance(covariance, noise))
    return finished(loadings, noise, True, 0, objective)


@compiled(check=check_problem)
@named
def naive_svd(covariance: SampleCovariance, hierarchy: Hierarchy) -> Estimate:
    """`naive-svd`: top-K eigenpairs of S itself, as published. Ignores the hierarchy beyond K, and keeps the noise."""
    values, vectors = covariance.top_eigenpairs(hierarchy.n_factors)
    noise = mean_of_rest(covariance, values)
    loadings = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
    return finished(loadings, noise, True, 0, least_squares_objective(loadings, DenoisedCovariance(covariance, noise)))
