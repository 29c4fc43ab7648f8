"""The sample covariance as an operator, its noise variance, and what is left when the noise is taken away (theory: Section 3)."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from hcl_jax.compiled import bucket
from hcl_jax.linalg import top_eigenpairs_of
from hcl_jax.structure import Hierarchy
from hcl_jax.views import Numbers, as_matrix, as_number, as_views, deviations

Rows = slice | np.ndarray
"""Some of the features: a slice, or their numbers."""

MaskedProduct = Callable[..., Float[Array, "d K"]]
"""Masked loadings ↦ their product with a covariance."""


def _seen_columns(matrix: Float[Array, "rows K"], hierarchy: Hierarchy, modality: int) -> Float[Array, "rows seen"]:
    """The columns that a modality sees."""
    return matrix[:, hierarchy.active_columns(modality)]


def _all_columns(part: Float[Array, "rows seen"], hierarchy: Hierarchy, modality: int) -> Float[Array, "rows K"]:
    """The columns that a modality sees where they stand among all K, and zeros in the others."""
    seen = hierarchy.modality_mask[modality - 1]
    place = np.where(seen, np.cumsum(seen) - 1, part.shape[1])
    return jnp.pad(part, ((0, 0), (0, 1)))[:, place]


COVARIANCE_ROUNDING = 1e-3
"""Share of √(S_ii S_jj) by which S_ij and S_ji may differ, or exceed it: what sums in the low precision of accelerators leave.
Triangles, differences of covariances and matrices of something else miss by a share of the order of 1."""
NOISE_ROUNDING = 32
"""Units of ε and of the mean variance below which a noise variance cannot be told from zero."""


def _pair(matrix: np.ndarray, excess: np.ndarray) -> tuple[int, int]:
    """Where the excess is largest."""
    i, j = np.unravel_index(np.argmax(excess), matrix.shape)
    return int(i), int(j)


def _check_covariance_matrix(matrix: np.ndarray) -> None:
    """Raise `ValueError` where a matrix cannot be a covariance: the conditions that cost O(d²), each up to rounding."""
    variances = matrix.diagonal()
    if not variances.sum() > 0:
        raise ValueError(f"matrix: has trace {variances.sum():g}; expected a positive one, the sum of the variances")
    slack = NOISE_ROUNDING * np.finfo(matrix.dtype).eps * variances.sum()  # a constant feature's covariances are rounding
    if variances.min() < -slack:
        i = int(variances.argmin())
        raise ValueError(
            f"matrix: has {variances[i]:g} on its diagonal, at ({i}, {i}); expected variances, which are not negative"
        )
    scales = np.sqrt(np.maximum(variances, 0))
    largest = scales[:, None] * scales[None, :]
    allowed, asymmetry = COVARIANCE_ROUNDING * largest + slack, np.abs(matrix - matrix.T)
    if (asymmetry > allowed).any():
        i, j = _pair(matrix, asymmetry - allowed)
        raise ValueError(
            f"matrix: has {matrix[i, j]:g} at ({i}, {j}) and {matrix[j, i]:g} at ({j}, {i}); expected a symmetric matrix"
        )
    excess = np.abs(matrix) - largest
    if (excess > allowed).any():
        i, j = _pair(matrix, excess - allowed)
        raise ValueError(
            f"matrix: has {matrix[i, j]:g} at ({i}, {j}) between features of variances {variances[i]:g} and {variances[j]:g}; "
            f"expected at most {largest[i, j]:g}, the root of their product, as in every covariance"
        )


def _padded_rows(rows: Numbers) -> Numbers:
    """The rows with zeros up to a shared number of them. NumPy's stay NumPy's, which has no program for every number of rows."""
    xp = np if isinstance(rows, np.ndarray) else jnp
    return xp.concatenate([rows, xp.zeros((bucket(len(rows)) - len(rows), rows.shape[1]), rows.dtype)])


class SampleCovariance(eqx.Module):
    """S = sample covariance with divisor ν = n − 1, held as a d × d matrix, or as centred rows X with S = XᵀX/ν.

    `n` counts the samples behind S. It is an array, never static, so that a grid over n compiles once. The rows are the cheaper
    form where there are fewer samples than features; every product then costs their size, and no d × d matrix is formed.

    >>> S = SampleCovariance(jnp.diag(jnp.array([4.0, 1.0])), n=11)
    >>> float(S.nu), S.product(jnp.ones((2, 1))).ravel().tolist()
    (10.0, [4.0, 1.0])

    Integers become the default float, float16 float32. Raises `ValueError` that names the argument when `n` is below 2; for
    complex numbers; when the matrix is not square and symmetric, holds NaN or infinite values, has no positive trace, a negative
    variance, or a covariance above the root of the product of its variances, all up to rounding. (That leaves out matrices
    whose negative eigenvalues no pair of features shows: finding these costs O(d³).) Values are checked where they are known,
    outside compiled code.
    """

    matrix: Float[Array, "d d"] | None
    data: Float[Array, "rows d"] | None
    n: Float[Array, ""]

    def __init__(self, matrix: ArrayLike | None = None, *, n: ArrayLike, data: ArrayLike | None = None):
        if (matrix is None) == (data is None):
            raise ValueError("matrix, data: expected exactly one of the two")
        name = "data" if matrix is None else "matrix"
        held = as_matrix(data if matrix is None else matrix, name)
        if 0 in held.shape or (data is None and held.shape[0] != held.shape[1]):
            raise ValueError(
                f"{name}: has shape {held.shape}; expected {'rows × features' if matrix is None else 'a square matrix'}"
            )
        count = as_number(n, "n", "at least 2 samples, as one number", lambda n: 2 <= n < np.inf)
        if data is None and not isinstance(held, jax.core.Tracer):
            _check_covariance_matrix(np.asarray(held))
        self.matrix, self.data = (held, None) if data is None else (None, held)
        self.n = jnp.asarray(count, dtype=held.dtype)

    @classmethod
    def from_data(cls, views: Any, *, form: str = "auto") -> "SampleCovariance":
        """The covariance of the samples of all views together, which are what `as_views` takes, held as the `form` says: `rows`
        (centred), `matrix`, `auto`: rows where these are fewer than the features; or `padded`: `auto`, with rows of zeros up to
        one of four sizes in an octave, so that folds of NumPy's data that are nearly equal in size find one program. Under `jit`
        and `vmap` too.

        Exact to the rounding of the deviations from the mean, wherever the mean is. Raises `ValueError` as `as_views` does; for
        fewer than two rows, columns that are all constant, or an unknown form. Values are checked where they are known, outside
        compiled code.
        """
        if form not in ("auto", "matrix", "rows", "padded"):
            raise ValueError(f"form: is {form!r}; expected auto, matrix, rows or padded")
        joined = as_views(views).joined()
        n, d = joined.shape
        if n < 2:
            raise ValueError(f"views: have {n} row; expected at least 2")
        centred, _ = deviations(joined, np.ones(n, bool) if isinstance(joined, np.ndarray) else jnp.ones(n, bool))
        if form == "padded":
            centred = _padded_rows(centred)
        rows = jnp.asarray(centred, jax.dtypes.canonicalize_dtype(centred.dtype))  # single precision comes after
        if not isinstance(rows, jax.core.Tracer):
            if not bool(rows.any()):
                raise ValueError(f"views: all {d} columns are constant; expected some that vary")
            if not 0 < float(jnp.vdot(rows, rows)) < np.inf:
                raise ValueError(
                    f"views: have deviations whose squares leave the range of {rows.dtype}; expected other units or float64"
                )
        if form == "rows" or (form != "matrix" and n <= d):
            return cls(data=rows, n=n)
        if form == "padded" and isinstance(centred, np.ndarray):
            return cls((centred.T @ centred / (n - 1)).astype(rows.dtype), n=n)
        return cls(rows.T @ rows / (n - 1), n=n)

    def in_unit_scale(self) -> tuple["SampleCovariance", Float[Array, ""]]:
        """(S/c, √c) with c the power of 4 that brings the mean variance to between 1 and 4: exact, and nothing that is computed
        from S/c runs out of the range of single precision."""
        total = self.trace() if self.matrix is not None else jnp.vdot(self._rows, self._rows) / self.nu  # a rough sum will do
        mean = total / self.n_features
        usable = (mean > 0) & jnp.isfinite(mean)
        exponent = jnp.where(usable, jnp.floor(jnp.log2(jnp.where(usable, mean, 1)) / 2), 0).astype(jnp.int32)
        root = jnp.ldexp(jnp.ones((), self.dtype), exponent)
        if self.matrix is not None:
            return eqx.tree_at(lambda S: S.matrix, self, self.matrix / root / root), root
        return eqx.tree_at(lambda S: S.data, self, self._rows / root), root

    def divided_by(self, scale: Float[Array, " d"]) -> "SampleCovariance":
        """The covariance of the features in units of their own: S_ij/(scale_i scale_j)."""
        if self.matrix is not None:
            return SampleCovariance(self.matrix / scale[:, None] / scale[None, :], n=self.n)
        return SampleCovariance(data=self._rows / scale[None, :], n=self.n)

    @property
    def nu(self) -> Float[Array, ""]:
        """ν = n − 1, the degrees of freedom."""
        return self.n - 1

    @property
    def _rows(self) -> Float[Array, "rows d"]:
        assert self.data is not None, "a covariance without a matrix holds rows"
        return self.data

    @property
    def dtype(self) -> jnp.dtype:
        return self.n.dtype

    @property
    def n_features(self) -> int:
        return (self._rows if self.matrix is None else self.matrix).shape[1]

    def product(self, vectors: Float[Array, "rows k"], rows: Rows = slice(None)) -> Float[Array, "d k"]:
        """S V; with `rows`, S[:, rows] V for a V that has those rows only."""
        if self.matrix is not None:
            return self.matrix[:, rows] @ vectors
        return self._rows.T @ (self._rows[:, rows] @ vectors) / self.nu

    def masked_product(self, hierarchy: Hierarchy) -> MaskedProduct:
        """(F, modalities) ↦ S[:, rows] F[rows] with the rows of some modalities, all by default, for loadings that are zero where
        the hierarchy says so: none of these zeros is multiplied.

        To be asked for before a loop: it holds the columns of S (or the rows' columns) by modality, a copy.
        """
        held = self._rows if self.matrix is None else self.matrix
        columns = {m: held[:, hierarchy.rows(m)] for m in hierarchy.modalities}

        def product(loadings: Float[Array, "d K"], modalities: Iterable[int] = hierarchy.modalities) -> Float[Array, "d K"]:
            parts = [(m, columns[m] @ _seen_columns(loadings[hierarchy.rows(m)], hierarchy, m)) for m in modalities]
            image = functools.reduce(jnp.add, [_all_columns(part, hierarchy, m) for m, part in parts])
            return image if self.matrix is not None else held.T @ image / self.nu

        return product

    def block(self, rows: Rows, columns: Rows) -> Float[Array, "rows columns"]:
        """The block S[rows, columns] as a matrix."""
        if self.matrix is not None:
            return self.matrix[rows][:, columns]
        return self._rows[:, rows].T @ self._rows[:, columns] / self.nu

    def entries(self, rows: Int[Array, " q"], columns: Int[Array, " q"]) -> Float[Array, " q"]:
        """S_ij for pairs of indices."""
        if self.matrix is not None:
            return self.matrix[rows, columns]
        return jnp.sum(self._rows[:, rows] * self._rows[:, columns], axis=0) / self.nu

    def variances(self) -> Float[Array, " d"]:
        """The diagonal of S."""
        if self.matrix is not None:
            return jnp.diagonal(self.matrix)
        return jnp.sum(self._rows**2, axis=0) / self.nu

    def trace(self) -> Float[Array, ""]:
        if self.matrix is None and self._rows.shape[0] < self.n_features:
            return jnp.trace(self._gram()) / self.nu
        return self.variances().sum()

    def _gram(self) -> Float[Array, "rows rows"]:
        """XXᵀ, of which a compiled program needs one however often it asks."""
        return self._rows @ self._rows.T

    def squared_norm(self) -> Float[Array, ""]:
        """‖S‖_F²."""
        if self.matrix is not None:
            return jnp.sum(self.matrix**2)
        return jnp.sum(self._gram() ** 2) / self.nu**2

    def top_eigenpairs(self, k: int) -> tuple[Float[Array, " k"], Float[Array, "d k"]]:
        """The k largest eigenvalues of S, descending, and their eigenvectors.

        Held as rows fewer than features, S has at most as many non-zero eigenvalues as there are rows: further ones are 0,
        with zero vectors.
        """
        if self.matrix is not None:
            return top_eigenpairs_of(self.matrix, k)
        rows, _ = self._rows.shape
        if rows >= self.n_features:
            return top_eigenpairs_of(self.block(slice(None), slice(None)), k)
        values, left = top_eigenpairs_of(self._gram() / self.nu, min(k, rows))
        visible = values > 10 * rows * jnp.finfo(self.dtype).eps * values[0]
        scale = jnp.where(visible, 1 / jnp.sqrt(jnp.where(visible, values * self.nu, 1)), 0)
        missing = k - min(k, rows)
        return jnp.pad(jnp.where(visible, values, 0), (0, missing)), jnp.pad(
            self._rows.T @ (left * scale[None, :]), ((0, 0), (0, missing))
        )


def check_covariance(covariance: SampleCovariance) -> None:
    """Raise `ValueError` unless it is a sample covariance."""
    if not isinstance(covariance, SampleCovariance):
        kind = type(covariance).__name__
        raise ValueError(f"covariance: is of type {kind}; expected a SampleCovariance, such as SampleCovariance.from_data(views)")


def smallest_noise(covariance: SampleCovariance) -> Float[Array, ""]:
    """What rounding leaves of a noise variance of zero, for which the likelihood is unbounded: no fit goes below it."""
    return NOISE_ROUNDING * jnp.finfo(covariance.dtype).eps * covariance.trace() / covariance.n_features


class DenoisedCovariance(eqx.Module):
    """S̃ = S − σ̂² I, known through its products."""

    covariance: SampleCovariance
    noise_variance: Float[Array, ""]

    def product(self, vectors: Float[Array, "d k"]) -> Float[Array, "d k"]:
        """S̃ V."""
        return self.covariance.product(vectors) - self.noise_variance * vectors

    def masked_product(self, hierarchy: Hierarchy) -> MaskedProduct:
        """F ↦ S̃ F, as `SampleCovariance.masked_product`."""
        product = self.covariance.masked_product(hierarchy)
        return lambda loadings: product(loadings) - self.noise_variance * loadings

    def squared_norm(self) -> Float[Array, ""]:
        """‖S̃‖_F²."""
        S, noise = self.covariance, self.noise_variance
        return S.squared_norm() - 2 * noise * S.trace() + S.n_features * noise**2


class LowRankCovariance(eqx.Module):
    """L Lᵀ for a d × k factor L."""

    factor: Float[Array, "d k"]

    def product(self, vectors: Float[Array, "d k"]) -> Float[Array, "d k"]:
        """L Lᵀ V."""
        return self.factor @ (self.factor.T @ vectors)

    def masked_product(self, hierarchy: Hierarchy) -> MaskedProduct:
        """F ↦ L Lᵀ F, as `SampleCovariance.masked_product`."""
        return self.product

    def squared_norm(self) -> Float[Array, ""]:
        """‖L Lᵀ‖_F²."""
        return jnp.sum((self.factor.T @ self.factor) ** 2)


def noise_variance(covariance: SampleCovariance, top_values: Float[Array, " K"]) -> Float[Array, ""]:
    """σ̂² = mean of the d − K smallest eigenvalues of S, from its trace and its K largest eigenvalues; 0 where these leave nothing
    but rounding."""
    remaining = covariance.n_features - top_values.shape[0]
    trace = covariance.trace()
    if remaining < 1:
        raise ValueError(
            f"top_values: has {top_values.shape[0]} eigenvalues; expected fewer than the {covariance.n_features} features"
        )
    left = trace - top_values.sum()
    return jnp.where(left < NOISE_ROUNDING * jnp.finfo(covariance.dtype).eps * trace, 0, left / remaining)


def spiked_signal(
    top_values: Float[Array, " K"], noise: Float[Array, ""], gamma: Float[Array, ""]
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """The population signal eigenvalues σ²(ℓ − 1) behind sample eigenvalues, and their cosines c² (0 below the threshold).

    Spiked model with aspect ratio γ = d/ν: x = λ/σ² lies above (1 + √γ)² when the signal is visible, and then
    ℓ = (x + 1 − γ + √((x + 1 − γ)² − 4x))/2, c² = (1 − γ/(ℓ−1)²)/(1 + γ/(ℓ−1)) (Donoho, Gavish and Johnstone 2018).
    Below the threshold the signal is put at its edge σ²√γ.
    """
    safe_noise = jnp.where(noise > 0, noise, 1)
    x = top_values / safe_noise
    visible = (x > (1 + jnp.sqrt(gamma)) ** 2) & (noise > 0)
    x = jnp.where(visible, x, (1 + jnp.sqrt(gamma)) ** 2 + 1)
    spike = (x + 1 - gamma + jnp.sqrt(jnp.maximum((x + 1 - gamma) ** 2 - 4 * x, 0))) / 2 - 1
    cosine_sq = (1 - gamma / spike**2) / (1 + gamma / spike)
    signal = jnp.where(visible, noise * spike, noise * jnp.sqrt(gamma))
    no_noise = noise <= 0
    return jnp.where(no_noise, top_values, signal), jnp.where(no_noise, 1.0, jnp.where(visible, cosine_sq, 0.0))


def corrected_noise_variance(covariance: SampleCovariance, top_values: Float[Array, " K"], rounds: int = 10) -> Float[Array, ""]:
    """σ̂² freed from its downward bias when γ = d/ν is not small (after Passemier, Li and Yao 2017).

    Rounds of σ² ← σ̂²(1 + b√(2γ)/(d − K)) with b = √(γ/2)(K + σ² Σ_k 1/a_k), a_k the signal eigenvalues of `spiked_signal`.
    """
    d, n_factors = covariance.n_features, top_values.shape[0]
    gamma = d / covariance.nu
    biased = noise_variance(covariance, top_values)

    def correct(_, noise):
        signal, _ = spiked_signal(top_values, noise, gamma)
        b = jnp.sqrt(gamma / 2) * (n_factors + jnp.sum(noise / jnp.where(signal > 0, signal, jnp.inf)))
        return biased * (1 + b * jnp.sqrt(2 * gamma) / (d - n_factors))

    return jax.lax.fori_loop(0, rounds, correct, biased)


def denoised_factor(covariance: SampleCovariance, n_factors: int) -> tuple[Float[Array, "d K"], Float[Array, ""]]:
    """(L, σ̂²): L Lᵀ is the best rank-K approximation of S̃ = S − σ̂² I, negative eigenvalues clipped at 0."""
    values, vectors = covariance.top_eigenpairs(n_factors)
    noise = noise_variance(covariance, values)
    return vectors * jnp.sqrt(jnp.maximum(values - noise, 0))[None, :], noise


def shrunk_factor(covariance: SampleCovariance, n_factors: int) -> tuple[Float[Array, "d K"], Float[Array, ""]]:
    """(L, σ²): L Lᵀ has the top-K eigenvectors of S and eigenvalues shrunk for Frobenius loss, σ²(ℓ − 1)c² or 0 where invisible.

    σ² is `corrected_noise_variance`. Source: Donoho, Gavish and Johnstone (2018), spiked covariance model.
    """
    values, vectors = covariance.top_eigenpairs(n_factors)
    noise = corrected_noise_variance(covariance, values)
    signal, cosine_sq = spiked_signal(values, noise, covariance.n_features / covariance.nu)
    return vectors * jnp.sqrt(signal * cosine_sq)[None, :], noise
