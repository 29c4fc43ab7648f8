"""A truth taken from real data: the variational fit of a hierarchy to standardised views."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators.variational import hcl_vb
from hcl_jax.selection import select_structures
from hcl_jax.structure import Hierarchy
from hcl_jax.views import as_matrix, as_views, by_feature, standardise

TEST_SHARE = 0.2


@dataclass(frozen=True)
class RealTruth:
    """Loadings and noise variance fitted to real data, and how well they describe samples that the fit has not seen.

    One noise variance for all features, as the cells of a study have it; which columns there are was found with one a feature.
    `held_out` is the mean log-likelihood per sample of a fifth of the samples, under a fit to the others;
    `held_out_independent` is that of independent features, for comparison. `status` is that of the fit to all samples.
    """

    hierarchy: Hierarchy
    loadings: np.ndarray
    noise_variance: float
    n_samples: int
    held_out: float
    held_out_independent: float
    status: int


def fit_truth(views: Any, hierarchy: Hierarchy | None = None, dtype: str = "float64") -> RealTruth:
    """Standardise the views (anything that `as_views` reads) and fit the hierarchy to them with `hcl-vb`.

    Without a hierarchy it is the one that `select_structures` finds, with a noise variance for every feature. Raises
    `ValueError` when there are no more samples than factors, when the views have other numbers of features than the hierarchy,
    and for views that `as_views` refuses.
    """
    views = [np.asarray(view, float) for view in as_views(views).matrices]
    n_samples = len(views[0])
    train = np.random.default_rng(0).permutation(n_samples) >= round(TEST_SHARE * n_samples)
    dims, n_train = tuple(view.shape[1] for view in views), int(train.sum())
    if hierarchy is not None and hierarchy.dims != dims:
        raise ValueError(f"views: have {dims} features; expected {hierarchy.dims}")
    if hierarchy is not None and hierarchy.n_factors >= n_train - 1:
        raise ValueError(f"rank: makes {hierarchy.n_factors} factors of {n_train} samples; expected fewer than {n_train - 1}")
    covariance = _covariance([standardise(view, view) for view in views], dtype)
    kept = hierarchy or select_structures(covariance, dims=dims, noise="feature").hierarchy
    held_out, independent = _held_out([view[train] for view in views], [view[~train] for view in views], kept, dtype)
    estimate = hcl_vb(covariance, kept)
    loadings, noise = np.asarray(estimate.loadings), float(estimate.noise_variance)
    return RealTruth(kept, loadings, noise, n_samples, held_out, independent, int(estimate.status))


def _covariance(views: Sequence[np.ndarray], dtype: str) -> SampleCovariance:
    return SampleCovariance.from_data([jnp.asarray(view, dtype) for view in views])


def _held_out(train: list[np.ndarray], test: list[np.ndarray], hierarchy: Hierarchy, dtype: str) -> tuple[float, float]:
    estimate = hcl_vb(_covariance([standardise(view, view) for view in train], dtype), hierarchy)
    rows = np.concatenate([standardise(*pair) for pair in zip(train, test, strict=True)], axis=1)
    independent = -0.5 * np.mean(np.sum(rows**2 + np.log(2 * np.pi), axis=1))
    likelihood = gaussian_log_likelihood(jnp.asarray(rows, dtype), estimate.loadings, estimate.noise_variance)
    return float(likelihood), float(independent)


def gaussian_log_likelihood(rows: Any, loadings: Any, noise_variance: Any) -> Float[Array, ""]:
    """Mean log density of n × d rows under N(0, ΛΛᵀ + Ψ), Ψ = σ²I or, for a vector of one value a feature, diag(ψ).

    By Woodbury, with W = I + ΛᵀΨ⁻¹Λ: log det Σ = log det W + Σ log ψ_j and xᵀΣ⁻¹x = xᵀΨ⁻¹x − bᵀW⁻¹b, b = ΛᵀΨ⁻¹x, in O(ndK).
    Raises `ValueError` that names the argument when shapes do not fit or a variance is not positive.
    """
    L = as_matrix(loadings, "loadings")
    X = as_matrix(rows, "rows", (None, L.shape[0]))
    psi = by_feature(noise_variance, L.shape[0], L.dtype, positive=True)
    scaled = L / psi[:, None]
    W = jnp.eye(L.shape[1], dtype=L.dtype) + L.T @ scaled
    projected = X @ scaled
    explained = jnp.sum(projected.T * jnp.linalg.solve(W, projected.T), axis=0)
    log_det = jnp.linalg.slogdet(W)[1] + jnp.sum(jnp.log(psi))
    squares = jnp.sum(X**2 / psi[None, :], axis=1)
    return -0.5 * jnp.mean(L.shape[0] * jnp.log(2 * jnp.pi) + log_det + squares - explained)


def truth_bytes(truth: RealTruth) -> bytes:
    """The truth as the content of an .npz file, for `read_truth`."""
    fields = asdict(truth)
    hierarchy = fields.pop("hierarchy")
    described = json.dumps({"dims": hierarchy["dims"], "ranks": [[list(s), rank] for s, rank in hierarchy["ranks"]]})
    buffer = io.BytesIO()
    np.savez(buffer, hierarchy=described, **fields)
    return buffer.getvalue()


def read_truth(path: Path) -> RealTruth:
    """The truth that was written with `truth_bytes`."""
    with np.load(path, allow_pickle=False) as file:
        fields = {name: file[name] if name == "loadings" else file[name].item() for name in file.files}
    described = json.loads(fields.pop("hierarchy"))
    ranks = {tuple(s): rank for s, rank in described["ranks"]}
    return RealTruth(hierarchy=Hierarchy(described["dims"], ranks), **fields)
