"""The hierarchical model (theory: Section 1, eq. 1), and draws from it. The truth comes with the data."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from hcl_jax.compiled import compiled
from hcl_jax.covariance import SampleCovariance, check_covariance
from hcl_jax.fisher import check_noise, noise_by_feature
from hcl_jax.structure import Hierarchy, Structure, as_hierarchy
from hcl_jax.views import as_key, as_number, by_feature, check_count, real_numbers

T_DEGREES = 10.0  # scaled t latents: finite moments up to the ninth


class Truth(eqx.Module):
    """What a study knows and an estimator must find: Λ (d × K, with the hierarchy's zero pattern) and the noise variance, σ² or
    one ψ_j for each feature; `noise` says which features are known to share it, for the limits.

    Raises `ValueError` for an unknown kind of noise, loadings that are not d × K, and a noise variance that is neither one number
    nor d of them.
    """

    loadings: Float[Array, "d K"]
    noise_variance: Float[Array, "..."]
    hierarchy: Hierarchy = eqx.field(static=True)
    noise: str = eqx.field(static=True, default="shared", kw_only=True)

    def __post_init__(self):  # which mapped trees, whose leaves may be anything, do not pass through
        d = as_hierarchy(self.hierarchy).n_features
        if isinstance(self.loadings, Array | np.ndarray | list):
            self.loadings = jnp.asarray(real_numbers(self.loadings, "loadings:"))
        if isinstance(self.loadings, Array) and not isinstance(self.noise_variance, Array | None):
            by_feature(self.noise_variance, d, self.loadings.dtype)
            self.noise_variance = jnp.asarray(self.noise_variance, self.loadings.dtype)

    def __check_init__(self):
        check_noise(self.noise)
        expected = (self.hierarchy.n_features, self.hierarchy.n_factors)
        if isinstance(self.loadings, Array) and self.loadings.shape[-2:] != expected:
            raise ValueError(f"loadings: have shape {self.loadings.shape}; expected {expected}, that of their hierarchy")
        if not isinstance(self.noise_variance, Array):  # a tree of something else, such as the axes of a vmap
            return
        if self.noise == "shared" and self.noise_variance.ndim:
            raise ValueError(
                f"noise: is 'shared' for noise variances of shape {self.noise_variance.shape}; expected view or feature"
            )
        noise_by_feature(self.noise_variance, self.hierarchy.n_features)

    def gram(self) -> Float[Array, "d d"]:
        """G = ΛΛᵀ."""
        return self.loadings @ self.loadings.T

    def covariance(self) -> Float[Array, "d d"]:
        """Σ = ΛΛᵀ + Ψ."""
        return self.gram() + jnp.diag(noise_by_feature(self.noise_variance, self.loadings.shape[0]))

    def in_equal_noise(self) -> tuple[Float[Array, "d K"], Float[Array, ""], Float[Array, " d"]]:
        """(L, σ², s) of x = s ∘ (Lz + σε), ε ~ N(0, I): as it stands for one noise variance, else features in
        units of their noise."""
        if self.noise_variance.ndim == 0:
            return self.loadings, self.noise_variance, jnp.ones_like(self.loadings[:, 0])
        scale = jnp.sqrt(self.noise_variance)
        return self.loadings / scale[:, None], jnp.ones((), scale.dtype), scale


class ResponseTruth(Truth):
    """A truth with a response y = βᵀz + e, Var e = `response_noise_variance`."""

    coefficients: Float[Array, " K"]
    response_noise_variance: Float[Array, ""]

    def conditional_mean(self) -> Float[Array, " d"]:
        """c with E[y|x] = cᵀx: c = Ψ⁻¹Λ(ΛᵀΨ⁻¹Λ + I)⁻¹β."""
        L, _, scale = self.in_equal_noise()
        return L @ self._explained() / scale

    def conditional_variance(self) -> Float[Array, ""]:
        """Var(y|x) = σ_y² + βᵀ(ΛᵀΨ⁻¹Λ + I)⁻¹β, which no prediction's mean squared error is below (theory: Section 6)."""
        _, noise, _ = self.in_equal_noise()
        return self.response_noise_variance + noise * self.coefficients @ self._explained()

    def _explained(self) -> Float[Array, " K"]:
        """(LᵀL + σ²I)⁻¹β, L and σ² those of equal noise."""
        L, noise, _ = self.in_equal_noise()
        return jnp.linalg.solve(L.T @ L + noise * jnp.eye(L.shape[1], dtype=L.dtype), self.coefficients)


Kind = TypeVar("Kind", bound=Truth)


def as_truth(value: Any, kind: type[Kind]) -> Kind:
    """The truth, of that kind. Raises `ValueError` for anything else."""
    if not isinstance(value, kind):
        raise ValueError(f"truth: is of type {type(value).__name__}; expected a {kind.__name__} of loadings and noise variance")
    return value


def _sample_frame(key: Key[Array, ""], dim: int, rank: int, dtype: DTypeLike) -> Float[Array, "dim rank"]:
    """Haar orthonormal columns."""
    Q, R = jnp.linalg.qr(jr.normal(key, (dim, rank), dtype))
    return Q * jnp.where(jnp.diagonal(R) < 0, -1, 1).astype(dtype)[None, :]


def _sample_block(key: Key[Array, ""], dim: int, rank: int, dtype: DTypeLike) -> Float[Array, "dim rank"]:
    """U D Vᵀ with Haar orthonormal U and V, and D sorted Uniform(0.5, 1.5)."""
    k_left, k_values, k_right = jr.split(key, 3)
    values = jnp.sort(jr.uniform(k_values, (rank,), dtype, 0.5, 1.5), descending=True)
    return _sample_frame(k_left, dim, rank, dtype) * values[None, :] @ _sample_frame(k_right, rank, rank, dtype).T


def sample_loadings(key: Key[Array, ""], hierarchy: Hierarchy, dtype: DTypeLike = jnp.float32) -> Float[Array, "d K"]:
    """Λ of the paper's Section 4.1: each non-zero block U D Vᵀ with Haar U, V and D sorted Uniform(0.5, 1.5)."""
    key = as_key(key, "to draw the loadings")
    loadings = jnp.zeros((as_hierarchy(hierarchy).n_features, hierarchy.n_factors), dtype)
    for i, (s, rank) in enumerate(hierarchy.ranks):
        for m in s:
            block = _sample_block(jr.fold_in(jr.fold_in(key, i), m), hierarchy.dims[m - 1], rank, dtype)
            loadings = loadings.at[hierarchy.rows(m), hierarchy.columns(s)].set(block)
    return loadings


def sample_normal_loadings(key: Key[Array, ""], hierarchy: Hierarchy, dtype: DTypeLike = jnp.float32) -> Float[Array, "d K"]:
    """Λ with entries N(0, 4/d_m) where the hierarchy has them: signal that does not fade as features are added."""
    scale = 2 / np.sqrt(np.repeat(as_hierarchy(hierarchy).dims, hierarchy.dims))
    entries = jr.normal(as_key(key, "to draw the loadings"), hierarchy.mask.shape, dtype)
    return jnp.where(hierarchy.mask, entries * jnp.asarray(scale, dtype)[:, None], 0)


def sample_truth(
    key: Key[Array, ""],
    hierarchy: Hierarchy,
    noise_variance: int | float | Float[Array, "..."],
    dtype: DTypeLike = jnp.float32,
    *,
    noise: str = "shared",
) -> Truth:
    """Loadings of `sample_loadings`, with the given noise variance: one number, or one for each of the d features where `noise`
    is view or feature.

    Raises `ValueError` when a noise variance is negative, or its shape is not that of its kind.
    """
    by_feature(noise_variance, as_hierarchy(hierarchy).n_features, dtype)
    return Truth(sample_loadings(key, hierarchy, dtype), jnp.asarray(noise_variance, dtype), hierarchy, noise=noise)


def sample_coefficients(
    key: Key[Array, ""], hierarchy: Hierarchy, support: Sequence[Structure | str] | None = None, dtype: DTypeLike = jnp.float32
) -> Float[Array, " K"]:
    """β uniform on the unit sphere, or on that of the factors of some structures: zero elsewhere.

    Raises `ValueError` for a structure that the hierarchy lacks.
    """
    key = as_key(key, "to draw the coefficients")
    named = hierarchy.structures if support is None else {hierarchy.present(s, "support") for s in support}
    held = np.concatenate([np.full(rank, s in named) for s, rank in hierarchy.ranks])
    beta = jnp.where(held, jr.normal(key, held.shape, dtype), 0)
    return beta / jnp.linalg.norm(beta)


def sample_response(key: Key[Array, ""], truth: ResponseTruth, z: Float[Array, "n K"]) -> Float[Array, " n"]:
    """y = βᵀz + e for rows with latent factors z."""
    as_truth(truth, ResponseTruth)
    noise = jr.normal(as_key(key, "to draw the noise"), (z.shape[0],), z.dtype)
    return z @ truth.coefficients + jnp.sqrt(truth.response_noise_variance) * noise


def sample_rows_given_covariance(key: Key[Array, ""], covariance: SampleCovariance, n_samples: int) -> Float[Array, "n d"]:
    """n centred rows whose sample covariance is the given one: QR with RᵀR = νS and Q Haar among the frames orthogonal to the
    vector of ones. With S drawn from its law, Wishart, theirs is that of n centred Gaussian samples.

    So that methods that see rows and methods that see covariances share a draw.
    """
    key = as_key(key, "to draw the rows")
    check_covariance(covariance)
    check_count(n_samples, "n_samples", max(2, covariance.n_features if covariance.data is None else covariance.data.shape[0]))
    if covariance.data is not None:
        held = covariance.data
    else:
        held = jnp.linalg.cholesky(covariance.block(slice(None), slice(None)) * covariance.nu).T
    normal = jr.normal(key, (n_samples, held.shape[0]), covariance.dtype)
    Q, R = jnp.linalg.qr(normal - normal.mean(axis=0, keepdims=True))
    return Q * jnp.where(jnp.diagonal(R) < 0, -1, 1).astype(Q.dtype)[None, :] @ held


def _t_latents(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return jr.t(key, T_DEGREES, shape, dtype) * jnp.asarray(((T_DEGREES - 2) / T_DEGREES) ** 0.5, dtype)


def _elliptical_latents(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    k_scale, k_normal = jr.split(key)
    scale = jnp.sqrt((T_DEGREES - 2) / jr.chisquare(k_scale, T_DEGREES, (*shape[:-1], 1), dtype))
    return scale * jr.normal(k_normal, shape, dtype)


LATENT_LAWS: dict[str, Callable[[Key[Array, ""], tuple[int, ...], DTypeLike], Array]] = {
    "gaussian": jr.normal,
    "uniform": lambda key, shape, dtype: jr.uniform(key, shape, dtype, -(3**0.5), 3**0.5),
    "rademacher": jr.rademacher,
    "laplace": lambda key, shape, dtype: jr.laplace(key, shape, dtype) * jnp.asarray(0.5**0.5, dtype),
    "t": _t_latents,
    "elliptical": _elliptical_latents,
}
"""Laws of the latent factors, each of mean 0 and variance 1: sampler(key, shape, dtype). `t` has ten degrees of freedom, and so
has `elliptical`, the multivariate t: its factors are uncorrelated, and not independent."""


def check_latent(latent: str) -> None:
    """Raise `ValueError` unless the name is one of `LATENT_LAWS`."""
    if not isinstance(latent, str) or latent not in LATENT_LAWS:
        raise ValueError(f"latent: unknown law {latent!r}; expected one of {', '.join(LATENT_LAWS)}")


def sample_observations(
    key: Key[Array, ""], truth: Truth, n_samples: int, latent: str = "gaussian"
) -> tuple[Float[Array, "n d"], Float[Array, "n K"]]:
    """(x, z): n independent rows x = Λz + ε of model (1), and their latent factors.

    Raises `ValueError` when `latent` is not one of `LATENT_LAWS`.
    """
    as_truth(truth, Truth)
    check_latent(latent)
    check_count(n_samples, "n_samples", 1)
    k_latent, k_noise = jr.split(as_key(key, "to draw the rows"))
    d, n_factors = truth.loadings.shape
    z = LATENT_LAWS[latent](k_latent, (n_samples, n_factors), truth.loadings.dtype)
    noise = jr.normal(k_noise, (n_samples, d), truth.loadings.dtype)
    return z @ truth.loadings.T + jnp.sqrt(noise_by_feature(truth.noise_variance, d))[None, :] * noise, z


def _conjugate_by_root(truth: Truth, W: Float[Array, "d d"]) -> Float[Array, "d d"]:
    """C W Cᵀ with CCᵀ = Σ for a symmetric W, in O(d²K): C = diag(s)(σI + L M Lᵀ), M = V diag(1/(σ + √(λ + σ²))) Vᵀ with LᵀL = V
    diag(λ) Vᵀ, L and σ those of equal noise."""
    L, noise, scale = truth.in_equal_noise()
    sigma = jnp.sqrt(noise)
    values, V = jnp.linalg.eigh(L.T @ L)
    root = sigma + jnp.sqrt(jnp.maximum(values, 0) + noise)
    M = (V / jnp.where(root > 0, root, jnp.inf)[None, :]) @ V.T
    WL = W @ L
    half = (sigma * WL) @ M + L @ (M @ (L.T @ WL) @ M) / 2
    upper = noise / 2 * W + L @ half.T
    return (upper + upper.T) * scale[:, None] * scale[None, :]


def _lower_times_transpose(A: Float[Array, "d d"], n_blocks: int = 8) -> Float[Array, "d d"]:
    """A Aᵀ for a lower-triangular A, a block of columns at a time: two thirds of the products of the plain one are with zeros."""
    d = A.shape[0]
    edges = [round(d * i / n_blocks) for i in range(n_blocks + 1)]
    product = jnp.zeros_like(A)
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        if stop > start:
            strip = A[start:, start:stop]
            product = product.at[start:, start:].add(strip @ strip.T)
    return product


def sample_wishart_covariance(key: Key[Array, ""], truth: Truth, n: int | float | Float[Array, ""]) -> SampleCovariance:
    """S with νS ~ Wishart(Σ, ν), ν = n − 1 ≥ d: the exact law of the sample covariance of n Gaussian samples, at a cost free
    of n.

    Bartlett: S = C A Aᵀ Cᵀ/ν with A lower triangular, standard normal below a diagonal of chi variates with ν, ν − 1, …
    degrees of freedom. Any C with CCᵀ = Σ will do; the root of a low-rank plus diagonal Σ costs O(d²K).

    Raises `ValueError` when n − 1 is below d: draw with `sample_factored_covariance` there.
    """
    as_truth(truth, Truth)
    d, dtype = truth.loadings.shape[0], truth.loadings.dtype
    as_number(n, "n", f"at least {d + 1}, one more than the number of features", lambda n: d + 1 <= n < np.inf)
    k_normal, k_chi = jr.split(as_key(key, "to draw the covariance"))
    nu = jnp.asarray(n, dtype) - 1
    chi = jnp.sqrt(2 * jr.gamma(k_chi, (nu - jnp.arange(d, dtype=dtype)) / 2, dtype=dtype))
    A = jnp.tril(jr.normal(k_normal, (d, d), dtype), -1) + jnp.diag(chi)
    return SampleCovariance(_conjugate_by_root(truth, _lower_times_transpose(A) / nu), n=n)


def sample_factored_covariance(key: Key[Array, ""], truth: Truth, n_samples: int) -> SampleCovariance:
    """S of n Gaussian samples, held as ν = n − 1 rows with S = XᵀX/ν: the same law as n centred samples, for ν below d.

    Raises `ValueError` when `n_samples` is below 2.
    """
    as_truth(truth, Truth)
    check_count(n_samples, "n_samples", 2)
    rows, _ = sample_observations(key, truth, n_samples - 1)
    return SampleCovariance(data=rows, n=n_samples)


def sample_data_covariance(
    key: Key[Array, ""], truth: Truth, n: int | float | Float[Array, ""], latent: str = "gaussian", chunk: int = 1000
) -> SampleCovariance:
    """S of n samples of model (1) with any latent law, drawn and accumulated a chunk of rows at a time, in O(d²) memory.

    n may be traced: the number of chunks is decided when the program runs, and the last one is cut by zero weights.
    Raises `ValueError` when `latent` is not one of `LATENT_LAWS`.
    """
    as_truth(truth, Truth)
    check_latent(latent)
    check_count(chunk, "chunk", 1)
    if not isinstance(n, jax.core.Tracer):
        check_count(n, "n", 2)
    n = jnp.asarray(n, truth.loadings.dtype)
    return SampleCovariance(_covariance_by_chunks(as_key(key, "to draw the rows"), truth, n, latent, int(chunk)), n=n)


@compiled
def _covariance_by_chunks(key: Key[Array, ""], truth: Truth, n: Float[Array, ""], latent: str, chunk: int) -> Float[Array, "d d"]:
    d, dtype = truth.loadings.shape[0], truth.loadings.dtype

    def accumulate(i, sums):
        total, outer = sums
        x, _ = sample_observations(jr.fold_in(key, i), truth, chunk, latent)
        kept = (jnp.arange(chunk, dtype=dtype) < n - (i * chunk).astype(dtype)).astype(dtype)
        x = x * kept[:, None]
        return total + x.sum(axis=0), outer + x.T @ x

    n_chunks = jnp.ceil(n / chunk).astype(jnp.int32)
    total, outer = jax.lax.fori_loop(0, n_chunks, accumulate, (jnp.zeros(d, dtype), jnp.zeros((d, d), dtype)))
    return (outer - jnp.outer(total, total) / n) / (n - 1)
