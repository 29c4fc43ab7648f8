"""Views in few coordinates: the principal axes of each, in units of its noise, which is all that a search for structures needs.

Everything here is NumPy on the host: no size of a data set has a program of its own, and what comes out has one shape for all
folds of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcl_jax.covariance import SampleCovariance, spiked_signal
from hcl_jax.fisher import check_noise
from hcl_jax.views import as_views, centred

AXES = 128
"""Of a view that are kept: every axis after them explains less than 1/128 of its variance."""
ROUNDS = 6  # of noise variances by feature and the factors that they leave
LEAST_NOISE = 5e-3
"""The share of its variance that a feature's noise is let down to, and a view's."""


class Moments(NamedTuple):
    """Second moments of M views of q coordinates each, in units of their noise, and what the other coordinates hold: noise."""

    matrix: Float[Array, "Mq Mq"]
    traces: Float[Array, " M"]
    """The variance of all d_m coordinates of a view together."""
    dims: Float[Array, " M"]
    nu: Float[Array, ""]

    def of(self, matrix: np.ndarray, traces: np.ndarray) -> "Moments":
        """Other moments of the same views, as certain as these."""
        return self._replace(matrix=jnp.asarray(matrix, float), traces=jnp.asarray(traces, float))


@dataclass(frozen=True, eq=False)
class ReducedViews:
    """Views of which each is known by its leading principal axes."""

    moments: Moments
    rows: np.ndarray | None
    """The scores, n × M × q, where they came from rows."""
    metrics: np.ndarray
    """M × q × q: aᵀWb is the inner product of two columns of loadings over the view's variance, in the units that came."""
    inward: tuple[np.ndarray, ...]
    """d_m × q of every view: its coordinates are x ↦ xᵀ`inward`."""
    visible: np.ndarray
    """The shares of its variance that the axes of a view have that stand out of the noise; 0 for the others, M × q."""

    @property
    def n_views(self) -> int:
        return len(self.metrics)

    def of_rows(self, rows: np.ndarray) -> "Moments":
        """The moments of other rows of the same coordinates, centred; what they leave out is as large as before."""
        n = len(rows)
        stacked = (rows - rows.mean(axis=0)).reshape(n, -1)
        held = np.diagonal(self.moments.matrix).reshape(self.n_views, -1).sum(axis=1)
        matrix = stacked.T @ stacked / (n - 1)
        kept = matrix.diagonal().reshape(self.n_views, -1).sum(axis=1)
        return _moments(matrix, np.asarray(self.moments.traces) - held + kept, np.asarray(self.moments.dims), float(n - 1))


def _moments(matrix: np.ndarray, traces: np.ndarray, dims: np.ndarray, nu: float) -> Moments:
    return Moments(*[jnp.asarray(value, float) for value in (matrix, traces, dims, nu)])


class _Block(NamedTuple):
    """One view: rows over √ν where these are fewer than the features, else their covariance."""

    held: np.ndarray
    is_rows: bool

    def variances(self) -> np.ndarray:
        return (self.held**2).sum(axis=0) if self.is_rows else self.held.diagonal()

    def alone(self, nu: float) -> np.ndarray:
        """What of each feature's variance the others do not predict, a start that takes no excess of one feature for a factor;
        the variances where there are too few rows to tell."""
        d = self.held.shape[1]
        if self.is_rows or nu < 2 * d:
            return np.maximum(self.variances(), np.finfo(float).tiny)
        ridge = np.finfo(float).eps * d * self.variances().max()
        unpredicted = 1 / np.linalg.inv(self.held + ridge * np.eye(d)).diagonal()
        return np.maximum(unpredicted * nu / (nu - d + 1), LEAST_NOISE * self.variances() + ridge)

    def axes(self, psi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(eigenvalues, descending, eigenvectors) of Ψ^(−½)SΨ^(−½), without those of eigenvalue 0."""
        root = np.sqrt(psi)
        scaled = self.held / root if self.is_rows else self.held / root[:, None] / root
        values, vectors = np.linalg.eigh(scaled @ scaled.T if self.is_rows else scaled)
        values, vectors = values[::-1], vectors[:, ::-1]
        kept = values > len(psi) * np.finfo(values.dtype).eps * max(values[0], 0)
        values, vectors = values[kept], vectors[:, kept]
        return values, scaled.T @ vectors / np.sqrt(values) if self.is_rows else vectors


def noise_level(values: np.ndarray, d: int, nu: float) -> tuple[float, int]:
    """(σ², how many) of all positive eigenvalues of a covariance of d features: the mean of those within the edge that noise
    alone would have, σ²(1 + √(d/ν))², and the number above it."""
    edge, above, most = (1 + np.sqrt(d / nu)) ** 2, -1, min(d, int(nu)) // 2
    level, count = values.sum() / d, 0
    while count > above:
        level, above = values[count:].sum() / (d - count), count
        count = max(above, min(int((values > edge * level).sum()), most))
    return float(level), count


def _noise(block: _Block, noise: str, nu: float) -> np.ndarray:
    """Noise variances of a view's features: those that factors beyond the noise edge leave, by feature or as one mean."""
    variances = block.variances()
    d, least = len(variances), LEAST_NOISE * np.maximum(variances, variances.mean() * np.finfo(float).eps)
    psi = block.alone(nu) if noise == "feature" else np.full(d, variances.mean())
    for _ in range(ROUNDS if noise == "feature" else 1):
        values, vectors = block.axes(psi)
        level, count = noise_level(values, d, nu)
        if noise != "feature":
            return np.maximum(level * psi, LEAST_NOISE * variances.mean())
        padded = np.zeros(AXES)
        padded[: min(count, AXES)] = values[: min(count, AXES)]
        signal = np.asarray(spiked_signal(jnp.asarray(padded), jnp.asarray(level, float), jnp.asarray(d / nu, float))[0])
        found = (vectors[:, :count][:, :AXES] ** 2 * signal[: min(count, AXES)]).sum(axis=1)
        psi = np.maximum(variances - psi * found, least)
    return psi


class _Axes(NamedTuple):
    """The coordinates of one view are x ↦ xᵀ`inward`."""

    inward: np.ndarray  # d × q
    metric: np.ndarray
    trace: float
    visible: np.ndarray


def _reduced(block: _Block, noise: str, nu: float, q: int) -> _Axes:
    psi = _noise(block, noise, nu)
    values, vectors = block.axes(psi)
    level, count = noise_level(values, len(psi), nu)
    kept = min(q, len(values))
    padded = np.zeros((len(psi), q))
    padded[:, :kept] = vectors[:, :kept]
    visible = np.where(np.arange(q) < count, np.pad(values[:kept] - level, (0, q - kept)) / values.sum(), 0)
    metric = padded.T @ (psi[:, None] * padded) / block.variances().sum()
    return _Axes(padded / np.sqrt(psi)[:, None], metric, float(values.sum()), visible)


def reduced_rows(views: Any, noise: str, *, scaled: bool = True) -> ReducedViews:
    """The views (what `as_views` takes), centred, and of unit variances where they are `scaled`, in their principal axes.

    Noise is that of each feature or of the whole view; it is scaled to 1 before axes are found. Raises `ValueError` as
    `as_views` does, for fewer than three rows, and for a view that is constant.
    """
    check_noise(noise)
    read = as_views(views)
    n = read.n_samples
    if n < 3:
        raise ValueError(f"views: have {n} rows; expected at least 3")
    rows = []
    for name, matrix in zip(read.names, read.matrices, strict=True):
        X, _, spreads = centred(np.asarray(matrix, float))
        if not spreads.any():
            raise ValueError(f"views: {name} is constant; expected features that vary")
        rows.append(X / np.where(spreads > 0, spreads, 1) if scaled else X)
    q, nu = min(AXES, max(read.dims)), float(n - 1)
    blocks = [_Block(X / np.sqrt(nu), True) if n < X.shape[1] else _Block(X.T @ X / nu, False) for X in rows]
    axes = [_reduced(block, noise, nu, q) for block in blocks]
    scores = np.stack([X @ a.inward for X, a in zip(rows, axes, strict=True)], axis=1)
    stacked = scores.reshape(n, -1)
    return _joined(axes, stacked.T @ stacked / nu, read.dims, nu, scores)


def reduced_covariance(
    covariance: SampleCovariance, dims: Sequence[int], noise: str, together: np.ndarray | None = None
) -> ReducedViews:
    """The same, of a covariance of views that have these dimensions.

    `together` (M × M) counts the rows that have both of two views where these are not all: the covariance is then that of rows
    with absent views at 0, each view in the units that give it the variance of the rows that have it. Moments between two views
    are taken of the rows that have both, negative eigenvalues clipped, and the least of the counts has to do for ν.
    """
    check_noise(noise)
    edges, q = np.cumsum([0, *dims]), min(AXES, max(dims))
    is_rows, root = covariance.matrix is None, np.sqrt(float(covariance.nu))
    held = np.asarray(covariance.data, float) / root if is_rows else np.asarray(covariance.matrix, float)
    counts = np.full((len(dims), len(dims)), float(covariance.n)) if together is None else together
    inward, axes = np.zeros((edges[-1], len(dims) * q)), []
    for m, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        block = _block_of(held[:, a:b] if is_rows else held[a:b, a:b], is_rows)
        axes.append(_reduced(block, noise, counts[m, m] - 1, q))
        inward[a:b, m * q : (m + 1) * q] = axes[m].inward
    image = held @ inward
    matrix = image.T @ image if is_rows else inward.T @ image
    if together is not None:
        matrix = _of_rows_with_both(matrix, counts, q)
    return _joined(axes, (matrix + matrix.T) / 2, dims, float(counts[counts > 0].min()) - 1, None)


def _of_rows_with_both(matrix: np.ndarray, counts: np.ndarray, q: int) -> np.ndarray:
    """Moments between views by the rows that have both, 0 where none have, as the nearest matrix that can be a covariance."""
    have = counts.diagonal()
    scale = np.where(counts > 0, np.sqrt(have[:, None] * have[None, :]) / np.maximum(counts, 1), 0)
    values, vectors = np.linalg.eigh(matrix * np.kron(scale, np.ones((q, q))))
    return (vectors * np.maximum(values, 0)) @ vectors.T


def _block_of(held: np.ndarray, is_rows: bool) -> _Block:
    """Rows as a covariance where that is the smaller."""
    return _Block(held.T @ held, False) if is_rows and len(held) >= held.shape[1] else _Block(held, is_rows)


def _joined(axes: Sequence[_Axes], matrix: np.ndarray, dims: Sequence[int], nu: float, scores: np.ndarray | None) -> ReducedViews:
    moments = _moments(matrix, np.array([a.trace for a in axes]), np.array(dims, float), nu)
    metrics, visible = np.stack([a.metric for a in axes]), np.stack([a.visible for a in axes])
    return ReducedViews(moments, scores, metrics, tuple(a.inward for a in axes), visible)
