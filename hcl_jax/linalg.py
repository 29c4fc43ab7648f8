"""Dense linear algebra of small or symmetric matrices, and the extrapolation of fixed-point maps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

MEMORY = 6  # past steps that Anderson's extrapolation combines
GUARD = 8  # further columns of a warm-started subspace: its convergence follows the gap behind them


def top_eigenpairs_of(matrix: Float[Array, "d d"], k: int) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
    """The k algebraically largest eigenvalues, descending, and their eigenvectors."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values[::-1][:k], vectors[:, ::-1][:, :k]


def principal_axes(columns: Float[Array, "d k"]) -> Float[Array, "k k"]:
    """The rotation after which the columns are orthogonal, the longest first: right singular vectors."""
    return top_eigenpairs_of(columns.T @ columns, columns.shape[1])[1]


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


def inverse_root(gram: Float[Array, "k k"]) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
    """((BᵀB)^(−½), ‖B‖_*) from BᵀB: B times the first is the polar factor of B. Where B has no extent, neither has the factor."""
    values, vectors = jnp.linalg.eigh(gram)
    kept = values > gram.shape[0] * jnp.finfo(gram.dtype).eps * values[-1]
    roots = jnp.where(kept, jnp.sqrt(jnp.where(kept, values, 1)), 0)
    inverse = jnp.where(kept, 1 / jnp.where(kept, roots, 1), 0)
    return (vectors * inverse[None, :]) @ vectors.T, roots.sum()


def polar_factor(matrix: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """The orthogonal matrix nearest to a square one, which may be singular."""
    U, _, Vt = jnp.linalg.svd(matrix)
    return U @ Vt


def triangle(rows: Float[Array, "n d"]) -> Float[Array, "k d"]:
    """At most d rows with the same inner products of columns."""
    return rows if rows.shape[0] <= rows.shape[1] else jnp.linalg.qr(rows, mode="r")


def largest_roots(gram: Float[Array, "p p"], k: int) -> Float[Array, " k"]:
    """The roots of the k largest eigenvalues of a Gram matrix: singular values of what it is the Gram matrix of."""
    return jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(gram)[::-1][:k], 0))


def singular_values(matrix: Float[Array, "q p"], k: int) -> Float[Array, " k"]:
    """The k largest, by the Gram matrix of the smaller side."""
    return largest_roots(matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix, k)


def spectral_norm(matrix: Float[Array, "q p"]) -> Float[Array, ""]:
    """The largest singular value; 0 of an empty matrix."""
    return jnp.zeros((), matrix.dtype) if 0 in matrix.shape else singular_values(matrix, 1)[0]


def leading_left_vectors(matrix: Float[Array, "q p"], k: int) -> Float[Array, "q k"]:
    """The leading k left singular vectors, by the Gram matrix of the smaller side."""
    q, p = matrix.shape
    if q <= p:
        return top_eigenpairs_of(matrix @ matrix.T, k)[1]
    return jnp.linalg.qr(matrix @ principal_axes(matrix)[:, :k])[0]


def improved_left_vectors(matrix: Float[Array, "q p"], vectors: Float[Array, "q k"]) -> Float[Array, "q k"]:
    """The best left vectors in the span of [V, MMᵀV], one Rayleigh–Ritz step: they capture no less of M than V does."""
    basis = jnp.linalg.qr(jnp.concatenate([vectors, matrix @ (matrix.T @ vectors)], axis=1))[0]
    return basis @ principal_axes(matrix.T @ basis)[:, : vectors.shape[1]]


class Anderson(NamedTuple):
    """Extrapolates a fixed-point map from its last evaluations (Anderson, 1965; Walker and Ni, 2011).

    Holds the last differences of images and residuals (image less argument), flattened; `used` of them are in use: −1 before
    the first evaluation, 0 after it, when the extrapolation is the plain image.
    """

    images: Float[Array, "m size"]
    residuals: Float[Array, "m size"]
    last_image: Float[Array, " size"]
    last_residual: Float[Array, " size"]
    used: Array

    @classmethod
    def empty(cls, size: int, dtype: DTypeLike) -> "Anderson":
        table, row = jnp.zeros((MEMORY, size), dtype), jnp.zeros(size, dtype)
        return cls(table, table, row, row, jnp.array(-1))

    def push(self, image: Float[Array, " size"], residual: Float[Array, " size"]) -> "Anderson":
        """Remember one more evaluation; the first after a restart only sets the base of the differences."""
        slot = jnp.maximum(self.used, 0) % MEMORY
        keep = self.used < 0
        images = self.images.at[slot].set(jnp.where(keep, self.images[slot], image - self.last_image))
        residuals = self.residuals.at[slot].set(jnp.where(keep, self.residuals[slot], residual - self.last_residual))
        return Anderson(images, residuals, image, residual, self.used + 1)

    def extrapolate(self) -> Float[Array, " size"]:
        """The combination of past images whose combined residual is smallest (type II), slightly regularised."""
        present = jnp.arange(MEMORY) < self.used
        R = jnp.where(present[:, None], self.residuals, 0)
        gram = R @ R.T
        ridge = 1e-10 * jnp.trace(gram) + jnp.finfo(gram.dtype).tiny
        system = gram + jnp.diag(jnp.where(present, ridge, 1))
        gamma = jnp.linalg.solve(system, R @ self.last_residual)
        return self.last_image - jnp.where(present, gamma, 0) @ self.images
