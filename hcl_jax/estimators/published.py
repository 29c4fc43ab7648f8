"""The authors' released algorithms, kept for comparison: three modalities, all seven structures, one rank (docs/results.md
says what they miss)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcl_jax.compiled import compiled
from hcl_jax.covariance import DenoisedCovariance, SampleCovariance, noise_variance
from hcl_jax.estimators.estimate import Estimate, check_problem, finished, named
from hcl_jax.estimators.spectral import least_squares_objective
from hcl_jax.structure import Hierarchy, full_lattice

FIRST_STEP, DECAY_EVERY, FIRST_CHECK, MAX_STEPS, LOSS_CHANGE = 1e-4, 10, 100, 1000, 1e-6


def check_published(hierarchy: Hierarchy) -> int:
    """The common rank; raises `ValueError` unless the hierarchy is what the released code is written for."""
    ranks = {rank for _, rank in hierarchy.ranks}
    if hierarchy.structures != full_lattice(3) or len(ranks) != 1:
        raise ValueError(
            f"hierarchy: is {hierarchy}; the published algorithms expect three modalities and all seven structures of one rank"
        )
    return ranks.pop()


def _largest(values: Float[Array, " p"], vectors: Float[Array, "a p"], k: int) -> tuple[Float[Array, " k"], Float[Array, "a k"]]:
    """The k eigenpairs of largest absolute eigenvalue."""
    order = jnp.argsort(-jnp.abs(values))[:k]
    return values[order], vectors[:, order]


class _Residual(NamedTuple):
    """S[rows, rows] − σ²I + C diag(signs) Cᵀ for some rows of S: what the released code takes apart."""

    covariance: SampleCovariance
    noise: Float[Array, ""]
    rows: np.ndarray
    columns: Float[Array, "a c"]
    signs: Float[Array, " c"]

    def add(self, columns: Float[Array, "a k"], signs: Float[Array, " k"]) -> "_Residual":
        both = jnp.concatenate([self.columns, columns], axis=1)
        return self._replace(columns=both, signs=jnp.concatenate([self.signs, signs]))

    def subtract(self, columns: Float[Array, "a k"]) -> "_Residual":
        return self.add(columns, -jnp.ones_like(columns, shape=columns.shape[1]))

    def dominant(self, k: int) -> tuple[Float[Array, " k"], Float[Array, "a k"]]:
        """The k eigenpairs of largest absolute eigenvalue. Where S is held as rows and these are fewer than features, among the
        eigenvectors that the rows and C span: on all others the matrix is −σ²I, without any that can be told apart."""
        S, held = self.covariance, self.covariance.data
        if held is None or held.shape[0] + len(self.signs) >= len(self.rows):
            own = S.block(self.rows, self.rows) + (self.columns * self.signs[None, :]) @ self.columns.T
            values, vectors = jnp.linalg.eigh(own - self.noise * jnp.eye(len(self.rows), dtype=S.dtype))
            return _largest(values, vectors, k)
        Q, R = jnp.linalg.qr(jnp.concatenate([held[:, self.rows].T / jnp.sqrt(S.nu), self.columns], axis=1))
        signs = jnp.concatenate([jnp.ones(held.shape[0], S.dtype), self.signs])
        values, vectors = jnp.linalg.eigh((R * signs[None, :]) @ R.T)
        values, vectors = _largest(values - self.noise, vectors, k)
        return values, Q @ vectors

    def dominant_factor(self, rank: int) -> Float[Array, "a rank"]:
        values, vectors = self.dominant(rank)
        return vectors * jnp.sqrt(jnp.abs(values))[None, :]

    def given(self, others: "_Residual", k: int) -> "_Residual":
        """own − cross · others⁺ · crossᵀ with the inverse on the k dominant eigenpairs of others, signs kept; cross is S's."""
        values, vectors = others.dominant(k)
        image = self.covariance.product(vectors, others.rows)[self.rows] / jnp.sqrt(jnp.abs(values))[None, :]
        return self.add(image, -jnp.sign(values))


def _published_loadings(
    covariance: SampleCovariance, noise: Float[Array, ""], hierarchy: Hierarchy, rank: int
) -> Float[Array, "d K"]:
    """HCL_SVD as released, from S̃ = S − σ̂²I. Every modality's block of a structure is found by itself, never aligned with the
    others."""
    rows = {m: np.arange(hierarchy.n_features)[hierarchy.rows(m)] for m in hierarchy.modalities}
    loadings = jnp.zeros((hierarchy.n_features, hierarchy.n_factors), covariance.dtype)

    def residual(held: np.ndarray) -> _Residual:
        nothing = jnp.zeros((len(held), 0), covariance.dtype)
        return _Residual(covariance, noise, held, nothing, nothing[0])

    private = {}
    for m in (1, 2, 3):
        others = residual(np.concatenate([rows[b] for b in (1, 2, 3) if b != m]))
        block = residual(rows[m]).given(others, 6 * rank).dominant_factor(rank)
        loadings = loadings.at[rows[m], hierarchy.columns((m,))].set(block)
        private[m] = residual(rows[m]).subtract(block)
    for pair in ((1, 2), (1, 3), (2, 3)):
        for m in pair:
            block = private[m].given(private[6 - sum(pair)], 3 * rank).dominant_factor(rank)
            loadings = loadings.at[rows[m], hierarchy.columns(pair)].set(block)
    pairs = loadings[:, 1 * rank : 4 * rank]
    for m in (1, 2, 3):
        block = private[m].subtract(pairs[rows[m]]).dominant_factor(rank)
        loadings = loadings.at[rows[m], hierarchy.columns((1, 2, 3))].set(block)
    return loadings


@compiled(check=check_problem)
@named
def hcl_svd_published(covariance: SampleCovariance, hierarchy: Hierarchy) -> Estimate:
    """`hcl-svd-published`: the released HCL_SVD. Its blocks are good, its loadings of one structure are not aligned between
    modalities.

    Raises `ValueError` unless there are three modalities and all seven structures with one rank.
    """
    rank = check_published(hierarchy)
    noise = noise_variance(covariance, covariance.top_eigenpairs(hierarchy.n_factors)[0])
    loadings = _published_loadings(covariance, noise, hierarchy, rank)
    return finished(loadings, noise, True, 0, least_squares_objective(loadings, DenoisedCovariance(covariance, noise)))


def published_descent(covariance: SampleCovariance, hierarchy: Hierarchy, start: Float[Array, "d K"]) -> Estimate:
    """The released HCL_grad from a start: V ← V − 2η(VVᵀV − S̃V)∘mask, η = 1e-4 divided by ten every ten steps.

    Its stop, a loss change below 1e-6 after more than 100 steps, then fires because the step length has vanished, not because the
    gradient has: `status` reports the published rule (0 when it fired within 1,000 steps).
    """
    check_published(hierarchy)
    noise = noise_variance(covariance, covariance.top_eigenpairs(hierarchy.n_factors)[0])
    target = DenoisedCovariance(covariance, noise)
    constant = target.squared_norm() / 2

    def loss(V, image):
        return jnp.sum((V.T @ V) ** 2) / 2 - jnp.sum(V * image) + constant

    def advance(state):
        V, image, eta, previous, _, step = state
        V = V - eta * 2 * jnp.where(hierarchy.mask, V @ (V.T @ V) - image, 0)
        image = target.product(V)
        current = loss(V, image)
        eta = jnp.where(
            (step % DECAY_EVERY == 0) & (step > 0), eta / 10, eta
        )  # its counter starts at 0: eleven steps before the first
        stopped = (step > FIRST_CHECK) & (jnp.abs(current - previous) < LOSS_CHANGE)
        return V, image, eta, current, stopped, step + 1

    image = target.product(start)
    state = (start, image, jnp.asarray(FIRST_STEP, start.dtype), loss(start, image), jnp.array(False), 0)
    V, _, _, objective, stopped, steps = jax.lax.while_loop(lambda s: ~s[4] & (s[5] < MAX_STEPS), advance, state)
    return finished(V, noise, stopped, steps, objective)


@compiled(check=check_problem)
@named
def hcl_gd_published(covariance: SampleCovariance, hierarchy: Hierarchy) -> Estimate:
    """`hcl-gd-published`: the released HCL_grad started at the released HCL_SVD. Raises `ValueError` as `hcl_svd_published`
    does."""
    return published_descent(covariance, hierarchy, hcl_svd_published(covariance, hierarchy).loadings)
