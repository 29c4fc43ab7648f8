"""A truth taken from real data: the variational fit of a hierarchy to named views of a file."""

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators import Estimate
from hcl_jax.estimators.variational import Posterior, fit_posterior, found_columns, relevance
from hcl_jax.structure import Hierarchy, full_lattice

UNREADABLE = (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for a file that is not .npz, or is cut short."""
GENEROUS_RANK = 20
TEST_SHARE = 0.2


@dataclass(frozen=True)
class RealTruth:
    """Loadings and noise variance fitted to real data, and how well they describe samples that the fit has not seen.

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


def load_views(path: Path, names: Sequence[str], argument: str = "loadings_from") -> list[np.ndarray]:
    """The named views of an .npz file, one row a sample.

    Raises `ValueError` that names what is wrong: no such file (as the `argument` that named it), no such view (and those there
    are), a wrong shape, NaN.
    """
    held, listing = _read(path, names, argument)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"views: got {' '.join(names) or 'none'}; expected some of {', '.join(listing)}, each once")
    for name in names:
        if name not in held:
            raise ValueError(f"views: {name!r} is not in {path}; expected some of {', '.join(listing)}")
    views = [_check_view(name, held[name]) for name in names]
    for name, view in zip(names, views, strict=True):
        if len(view) != len(views[0]):
            raise ValueError(f"views: {name!r} has {len(view)} samples; expected {len(views[0])}, as {names[0]!r} has")
    return views


def _read(path: Path, names: Sequence[str], argument: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The named arrays that the file holds, and the names of all."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}, list(file.files)
    except FileNotFoundError:
        raise ValueError(f"{argument}: no file {path}; expected an .npz file with one array per view") from None
    except UNREADABLE as error:
        raise ValueError(f"{argument}: {path} cannot be read ({error}); expected .npz with one array per view") from None


def _check_view(name: str, view: np.ndarray) -> np.ndarray:
    if view.ndim != 2 or view.dtype.kind not in "fiub" or min(view.shape) < 1:
        raise ValueError(f"views: {name!r} has shape {view.shape}, {view.dtype}; expected numbers, samples × features")
    if not np.isfinite(view).all():
        raise ValueError(f"views: {name!r} holds {np.sum(~np.isfinite(view))} NaN or infinite values; expected finite numbers")
    return view.astype(float)


def standardise(train: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`others` with the means and scales of `train`; features that are constant there become 0."""
    scale = train.std(axis=0, ddof=1)
    return np.where(scale > 0, (others - train.mean(axis=0)) / np.where(scale > 0, scale, 1), 0)


def generous_hierarchy(dims: Sequence[int], n_samples: int) -> Hierarchy:
    """The full lattice with more factors than data are likely to have: rank 20, or what dimensions and half the samples allow."""
    n_structures = len(full_lattice(len(dims)))
    per_modality = 2 ** (len(dims) - 1)
    rank = min(GENEROUS_RANK, min(dims) // per_modality, (n_samples - 1) // (2 * n_structures))
    if rank < 1:
        raise ValueError(f"structures: all {n_structures} exceed dims {tuple(dims)} or {n_samples} samples; expected a list")
    return Hierarchy.full(dims, rank)


def fit_truth(views: Sequence[np.ndarray], hierarchy: Hierarchy | None = None, dtype: str = "float64") -> RealTruth:
    """Standardise the views and fit the hierarchy to them with `hcl-vb`.

    Without a hierarchy the fit starts from `generous_hierarchy`, and the truth has the columns that were not pruned, each in the
    structure of the modalities where it was kept. Raises `ValueError` when there are no more samples than factors.
    """
    n_samples = len(views[0])
    train = np.random.default_rng(0).permutation(n_samples) >= round(TEST_SHARE * n_samples)
    fitted = hierarchy or generous_hierarchy([view.shape[1] for view in views], int(train.sum()))
    if fitted.n_factors >= train.sum() - 1:
        raise ValueError(
            f"rank: makes {fitted.n_factors} factors of {train.sum()} samples; expected fewer than {train.sum() - 1}"
        )
    held_out, independent = _held_out([view[train] for view in views], [view[~train] for view in views], fitted, dtype)
    posterior, estimate = _fit([standardise(view, view) for view in views], fitted, dtype)
    loadings, kept = np.asarray(estimate.loadings), fitted
    if hierarchy is None:
        loadings, kept = keep_columns(loadings, np.asarray(relevance(posterior, fitted)), fitted)
    return RealTruth(kept, loadings, float(estimate.noise_variance), n_samples, held_out, independent, int(estimate.status))


@lru_cache
def _fit_program(hierarchy: Hierarchy) -> Callable[[SampleCovariance], tuple[Posterior, Estimate]]:
    return jax.jit(lambda covariance: fit_posterior(covariance, hierarchy))


def _fit(views: Sequence[np.ndarray], hierarchy: Hierarchy, dtype: str) -> tuple[Posterior, Estimate]:
    return _fit_program(hierarchy)(SampleCovariance.from_data([jnp.asarray(view, dtype) for view in views]))


def _held_out(train: list[np.ndarray], test: list[np.ndarray], hierarchy: Hierarchy, dtype: str) -> tuple[float, float]:
    _, estimate = _fit([standardise(view, view) for view in train], hierarchy, dtype)
    rows = np.concatenate([standardise(*pair) for pair in zip(train, test, strict=True)], axis=1)
    independent = -0.5 * np.mean(np.sum(rows**2 + np.log(2 * np.pi), axis=1))
    likelihood = gaussian_log_likelihood(jnp.asarray(rows, dtype), estimate.loadings, estimate.noise_variance)
    return float(likelihood), float(independent)


def gaussian_log_likelihood(
    rows: Float[Array, "n d"], loadings: Float[Array, "d K"], noise_variance: Float[Array, ""]
) -> Float[Array, ""]:
    """Mean log density of the rows under N(0, ΛΛᵀ + σ²I), by W = ΛᵀΛ + σ²I: O(ndK)."""
    d, n_factors = loadings.shape
    W = loadings.T @ loadings + noise_variance * jnp.eye(n_factors, dtype=loadings.dtype)
    projected = rows @ loadings
    explained = jnp.sum(projected.T * jnp.linalg.solve(W, projected.T), axis=0)
    log_det = jnp.linalg.slogdet(W)[1] + (d - n_factors) * jnp.log(noise_variance)
    return -0.5 * jnp.mean(d * jnp.log(2 * jnp.pi) + log_det + (jnp.sum(rows**2, axis=1) - explained) / noise_variance)


def keep_columns(
    loadings: np.ndarray, relevances: Float[np.ndarray, "M K"], hierarchy: Hierarchy
) -> tuple[np.ndarray, Hierarchy]:
    """The loadings without the columns that the data do not support, each in the structure of the modalities that support it.

    Raises `ValueError` when none is left.
    """
    homes = found_columns(relevances, hierarchy)
    if not homes:
        raise ValueError("loadings_from: the fit pruned every column; expected data with at least one visible factor")
    kept = Hierarchy(hierarchy.dims, {s: len(columns) for s, columns in homes.items()})
    order = [column for s in kept.structures for column in homes[s]]
    return np.where(kept.mask, loadings[:, order], 0), kept


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
