"""Spectral estimators: no iteration (theory: Section 3)."""

from collections.abc import Iterable, Sequence
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


def _padded(numbers: Iterable[np.ndarray], filler: int) -> Int[np.ndarray, "lists longest"]:
    """Lists of numbers side by side, the shorter ones filled up."""
    lists = list(numbers)
    table = np.full((len(lists), max(map(len, lists))), filler)
    for row, held in zip(table, lists, strict=True):
        row[: len(held)] = held
    return table


class _Level(NamedTuple):
    """The structures of one size, none of which lies inside another: where each one's entries stand, filled up to equal lengths
    with the number of a row or column of zeros, d or K."""

    held: Bool[np.ndarray, "S M"]
    rows: Int[np.ndarray, "S rows"]
    columns: Int[np.ndarray, "S rank"]
    inside: Int[np.ndarray, "S inner"]
    """Columns of the structures strictly inside."""

    @classmethod
    def of(cls, hierarchy: Hierarchy, structures: Sequence[Structure]) -> "_Level":
        own = {s: np.arange(hierarchy.n_factors)[hierarchy.columns(s)] for s in hierarchy.structures}
        inside = [[own[t] for t in hierarchy.structures if set(t) < set(s)] for s in structures]
        return cls(
            np.array([[m in s for m in hierarchy.modalities] for s in structures]),
            _padded(map(hierarchy.structure_rows, structures), hierarchy.n_features),
            _padded((own[s] for s in structures), hierarchy.n_factors),
            _padded((np.concatenate([np.arange(0), *columns]) for columns in inside), hierarchy.n_factors),
        )

    def unseen(self, n_factors: int) -> Int[np.ndarray, " S"]:
        """How many directions of factor space only the modalities of each structure see."""
        return np.sum(self.columns < n_factors, axis=1) + np.sum(self.inside < n_factors, axis=1)


def _extract(
    level: _Level, factor: Float[Array, "d K"], grams: Float[Array, "M K K"], loadings: Float[Array, "d K"]
) -> Float[Array, "d K"]:
    """The loadings with those of a level's structures, where they hold those of smaller ones."""
    K = factor.shape[1]
    unseen = level.unseen(K)
    held = factor.at[level.rows].get(mode="fill", fill_value=0)
    if not level.held.all():
        others = jnp.einsum("sm,mkl->skl", jnp.asarray(~level.held, factor.dtype), grams)
        held = held @ jax.lax.map(jnp.linalg.eigh, others)[1][:, :, : unseen.max()]  # what the others see least
        held = jnp.where((np.arange(held.shape[2]) < unseen[:, None])[:, None, :], held, 0)
    inner = loadings.at[level.rows[:, :, None], level.inside[:, None, :]].get(mode="fill", fill_value=0)
    signs = jnp.asarray(np.repeat([1, -1], [held.shape[2], inner.shape[2]]), factor.dtype)
    rank = level.columns.shape[1]
    found = jax.lax.map(lambda columns: signed_top_factor(columns, signs, rank), jnp.concatenate([held, inner], axis=2))
    return loadings.at[level.rows[:, :, None], level.columns[:, None, :]].set(found, mode="drop")


def structured_loadings(factor: Float[Array, "d K"], hierarchy: Hierarchy) -> Float[Array, "d K"]:
    """Loadings with the zero pattern of the hierarchy from any factor L of a covariance LLᵀ ≈ G, structure by structure,
    smallest first.

    With c = complement of s, the conditional covariance S̃_ss − S̃_sc S̃_cc⁺ S̃_cs of S̃ = LLᵀ is L_s N Nᵀ L_sᵀ, where N spans the
    Σ_{t ⊆ s} r_t directions of factor space that the rows of c do not see. In the population it equals Σ_{t ⊆ s} Λ_tΛ_tᵀ;
    what the structures inside s explain is taken away, and Λ̂_s is made of the top r_s eigenpairs of the rest. All modalities
    of a structure are extracted together, which aligns them. Exact in the population for every hierarchy that is
    identifiable; costs O(dK²).

    Structures of one size do not depend on one another, and are extracted as one batch: a program has as many steps as there
    are sizes. Zeros that fill up smaller blocks change nothing.
    """
    grams = jnp.stack([factor[rows].T @ factor[rows] for rows in map(hierarchy.rows, hierarchy.modalities)])
    loadings = jnp.zeros((hierarchy.n_features, hierarchy.n_factors), factor.dtype)
    for _, structures in groupby(reversed(hierarchy.structures), key=len):
        loadings = _extract(_Level.of(hierarchy, list(structures)), factor, grams, loadings)
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
