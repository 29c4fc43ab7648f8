"""Dense linear algebra of small or symmetric matrices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def top_eigenpairs_of(matrix: Float[Array, "d d"], k: int) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
    """The k algebraically largest eigenvalues, descending, and their eigenvectors."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values[::-1][:k], vectors[:, ::-1][:, :k]


def spd_inverse(matrix: Float[Array, "k k"]) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
    """(A⁻¹, log det A) of a symmetric positive definite A, by Cholesky; NaN where it is not positive definite."""
    lower = jnp.linalg.cholesky(matrix)
    root = jax.scipy.linalg.solve_triangular(lower, jnp.eye(matrix.shape[0], dtype=matrix.dtype), lower=True)
    return root.T @ root, 2 * jnp.sum(jnp.log(jnp.diagonal(lower)))


def least_squares_map(loadings: Float[Array, "d k"], relative_cut: float | None = None) -> Float[Array, "d k"]:
    """V(VᵀV)⁺: the map of rows x to the scores z that minimise ‖x − Vz‖.

    Eigenvalues of VᵀV below `relative_cut` of the largest count as zero; by default those that rounding hides.
    """
    values, vectors = jnp.linalg.eigh(loadings.T @ loadings)
    cut = loadings.shape[0] * jnp.finfo(loadings.dtype).eps if relative_cut is None else relative_cut
    visible = values > cut * values[-1]
    inverse = jnp.where(visible, 1 / jnp.where(visible, values, 1), 0)
    return loadings @ (vectors * inverse[None, :]) @ vectors.T
