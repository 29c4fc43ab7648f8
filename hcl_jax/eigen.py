"""The largest eigenpairs of a symmetric matrix."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def top_eigenpairs_of(matrix: Float[Array, "d d"], k: int) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
    """The k algebraically largest eigenvalues, descending, and their eigenvectors."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values[::-1][:k], vectors[:, ::-1][:, :k]
