"""The authors' released algorithms, kept for comparison: three modalities, all seven structures, one rank (docs/results.md
says what they miss)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hcl_jax.covariance import DenoisedCovariance, SampleCovariance, noise_variance
from hcl_jax.estimators.estimate import Estimate, finished
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


def _dominant(matrix: Float[Array, "a a"], k: int) -> tuple[Float[Array, " k"], Float[Array, "a k"]]:
    """The k eigenpairs of largest absolute eigenvalue."""
    values, vectors = jnp.linalg.eigh(matrix)
    order = jnp.argsort(-jnp.abs(values))[:k]
    return values[order], vectors[:, order]


def _dominant_factor(matrix: Float[Array, "a a"], rank: int) -> Float[Array, "a rank"]:
    values, vectors = _dominant(matrix, rank)
    return vectors * jnp.sqrt(jnp.abs(values))[None, :]


def _conditional(own: Array, cross: Array, others: Array, k: int) -> Array:
    """own − cross · others⁺ · crossᵀ with the inverse on the k dominant eigenpairs of others, signs kept."""
    values, vectors = _dominant(others, k)
    image = cross @ vectors
    return own - (image / values[None, :]) @ image.T


def _published_loadings(S: Float[Array, "d d"], hierarchy: Hierarchy, rank: int) -> Float[Array, "d K"]:
    """HCL_SVD as released, from the denoised S̃. Every modality's block of a structure is found by itself, never aligned with
    the others."""
    rows = {m: hierarchy.rows(m) for m in hierarchy.modalities}
    loadings = jnp.zeros((hierarchy.n_features, hierarchy.n_factors), S.dtype)

    def joined(matrix, modalities, m=None):
        right = jnp.concatenate([matrix[:, rows[b]] for b in modalities], axis=1)
        return right[rows[m]] if m else jnp.concatenate([right[rows[a]] for a in modalities])

    private = S
    for m in (1, 2, 3):
        others = tuple(b for b in (1, 2, 3) if b != m)
        block = _dominant_factor(_conditional(S[rows[m], rows[m]], joined(S, others, m), joined(S, others), 6 * rank), rank)
        loadings = loadings.at[rows[m], hierarchy.columns((m,))].set(block)
        private = private.at[rows[m], rows[m]].add(-block @ block.T)
    for pair in ((1, 2), (1, 3), (2, 3)):
        third = rows[6 - sum(pair)]
        for m in pair:
            conditional = _conditional(private[rows[m], rows[m]], private[rows[m], third], private[third, third], 3 * rank)
            loadings = loadings.at[rows[m], hierarchy.columns(pair)].set(_dominant_factor(conditional, rank))
    pairs = loadings[:, 1 * rank : 4 * rank]
    for m in (1, 2, 3):
        left = private[rows[m], rows[m]] - pairs[rows[m]] @ pairs[rows[m]].T
        loadings = loadings.at[rows[m], hierarchy.columns((1, 2, 3))].set(_dominant_factor(left, rank))
    return loadings


def hcl_svd_published(covariance: SampleCovariance, hierarchy: Hierarchy) -> Estimate:
    """`hcl-svd-published`: the released HCL_SVD. Its blocks are good, its loadings of one structure are not aligned between
    modalities.

    Raises `ValueError` unless there are three modalities and all seven structures with one rank.
    """
    rank = check_published(hierarchy)
    S = covariance.block(slice(None), slice(None))
    noise = noise_variance(covariance, covariance.top_eigenpairs(hierarchy.n_factors)[0])
    loadings = _published_loadings(S - noise * jnp.eye(S.shape[0], dtype=S.dtype), hierarchy, rank)
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


def hcl_gd_published(covariance: SampleCovariance, hierarchy: Hierarchy) -> Estimate:
    """`hcl-gd-published`: the released HCL_grad started at the released HCL_SVD. Raises `ValueError` as `hcl_svd_published`
    does."""
    return published_descent(covariance, hierarchy, hcl_svd_published(covariance, hierarchy).loadings)
