"""Rows that lack single cells: maximum likelihood of what is there (theory: Section 7, every row with a pattern of its own)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hcl_jax.compiled import compiled
from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators.estimate import Estimate, check_iterative
from hcl_jax.estimators.likelihood import noise_floor
from hcl_jax.estimators.missing import ROWS, Point, check_links, maximise_by_sweeps
from hcl_jax.fisher import check_noise, pool, spread
from hcl_jax.linalg import spd_inverse
from hcl_jax.structure import Hierarchy


def cell_posterior(
    X: Float[Array, "n d"], here: Bool[Array, "n d"], loadings: Float[Array, "d K"], psi: Float[Array, " d"]
) -> tuple[Float[Array, "n K"], Float[Array, "n K K"], Float[Array, " n"]]:
    """(E[z | the cells of a row], V_i = Var(z | …), −log det V_i) for rows less their mean: V_i = (I + Σ_j λ_jλ_jᵀ/ψ_j)⁻¹ over
    the cells that are there. What stands in others does not count."""
    d, K = loadings.shape
    weighted = loadings / psi[:, None]
    outer = (loadings[:, :, None] * weighted[:, None, :]).reshape(d, K * K)
    precisions = (here.astype(psi.dtype) @ outer).reshape(-1, K, K) + jnp.eye(K, dtype=psi.dtype)[None]
    V, log_det = jax.lax.map(spd_inverse, precisions, batch_size=ROWS)
    return jnp.einsum("nk,nkl->nl", jnp.where(here, X, 0) @ weighted, V), V, log_det


def _cell_sweep(
    X: Float[Array, "n d"], here: Bool[Array, "n d"], hierarchy: Hierarchy, noise: str, floor: Float[Array, " d"], at: Point
) -> tuple[Point, Float[Array, ""]]:
    """One step of expectation and maximisation, and 2/ν times the log-likelihood (without log 2π) before it: every feature is
    regressed on the scores E[z], with an intercept, over the rows that have it."""
    counted = here.astype(X.dtype)
    n = here.any(axis=1).sum().astype(X.dtype)
    share, nu = (n - 1) / n, n - 1
    rest = jnp.where(here, X - at.mean[None, :], 0)
    z, V, log_det = cell_posterior(rest, here, at.loadings, at.psi)
    rows, squares, image = counted.sum(axis=0), jnp.sum(rest**2, axis=0), rest.T @ z
    weights = share * rows / nu
    explained = jnp.sum((rest @ (at.loadings / at.psi[:, None])) * z)
    deviance = weights @ jnp.log(at.psi) + (jnp.sum(squares / at.psi) + share * log_det.sum() - explained) / nu
    first, shift = counted.T @ z / rows[:, None], rest.sum(axis=0) / rows
    d, K = at.loadings.shape
    second = (counted.T @ (share * V + z[:, :, None] * z[:, None, :]).reshape(-1, K * K)).reshape(d, K, K)
    second = second - rows[:, None, None] * first[:, :, None] * first[:, None, :]
    image, squares = image - (rows * shift)[:, None] * first, squares - rows * shift**2
    mask = jnp.asarray(hierarchy.mask, X.dtype)
    both = mask[:, :, None] * mask[:, None, :]
    systems = both * second + jnp.eye(K, dtype=X.dtype)[None] * (1 - mask)[:, None, :]
    inverses, _ = jax.lax.map(spd_inverse, systems, batch_size=ROWS)
    loadings = jnp.einsum("dk,dkl->dl", image, both * inverses)
    left = pool(squares - jnp.sum(loadings * image, axis=1), hierarchy, noise) / nu
    psi = spread(left / pool(weights, hierarchy, noise), hierarchy, noise)
    mean = at.mean + shift - jnp.sum(loadings * first, axis=1)
    return Point(loadings, jnp.maximum(psi, floor), mean), -deviance


def _check_fit(rows: Any, hierarchy: Hierarchy, tolerance: float | None, max_steps: int) -> None:
    """Raise `ValueError` as `check_iterative` and `check_links` do, and unless every feature has two cells."""
    held = jnp.where(jnp.isnan(rows), 0, rows)
    check_iterative(SampleCovariance(data=held, n=len(rows)), hierarchy, tolerance, max_steps)
    if isinstance(rows, jax.core.Tracer):
        return
    here = ~np.isnan(np.asarray(rows))
    counts = here.sum(axis=0)
    if counts.min() < 2:
        j = int(counts.argmin())
        raise ValueError(f"rows: feature {j} is there in {counts[j]} of {len(here)} rows; expected at least 2")
    of_view = np.stack([here[:, hierarchy.rows(m)].any(axis=1) for m in hierarchy.modalities], axis=1).astype(float)
    check_links(of_view.T @ of_view, hierarchy)


@compiled(check=_check_fit)
def hcl_ml_by_cell(
    rows: Float[Array, "n d"],
    hierarchy: Hierarchy,
    *,
    noise: str = "shared",
    tolerance: float | None = None,
    max_steps: int = 1500,
) -> tuple[Estimate, Float[Array, " d"]]:
    """(`hcl-ml`, mean) from all views side by side, NaN in whatever cells are missing: maximises the likelihood of what is there.

    As `hcl_ml_by_pattern`, which is much faster where rows lack whole views: a sweep costs O(ndK² + (n + d)K³), in
    memory (n + d)K².
    Right where which cells are missing depends on nothing, or on what is there. Raises `ValueError` as it does, and for a
    feature of fewer than two rows.
    """
    check_noise(noise)
    here = ~jnp.isnan(rows)
    counts = here.sum(axis=0).astype(rows.dtype)
    origin = jnp.nanmean(rows, axis=0)
    X = jnp.where(here, rows - origin[None, :], 0)
    n = here.any(axis=1).sum().astype(rows.dtype)
    covariance, root = SampleCovariance(data=X * jnp.sqrt(n / counts)[None, :], n=n).in_unit_scale()
    sweep = partial(_cell_sweep, X / root, here, hierarchy, noise, noise_floor(covariance, hierarchy, noise))
    fit, mean = maximise_by_sweeps(sweep, covariance, root, counts / n, hierarchy, noise, tolerance, max_steps)
    return fit, origin + mean


def complete_cells(
    rows: Float[Array, "n d"], loadings: Float[Array, "d K"], psi: Float[Array, " d"], mean: Float[Array, " d"]
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """(rows with the cells that are NaN at their expectation given the others, standard deviations): μ_j + λ_jᵀE[z], and
    √(λ_jᵀV_iλ_j + ψ_j); what is there stays, with deviation 0."""
    here = ~jnp.isnan(rows)
    z, V, _ = cell_posterior(jnp.where(here, rows - mean[None, :], 0), here, loadings, psi)
    deviations = jnp.sqrt(jnp.einsum("jk,nkl,jl->nj", loadings, V, loadings) + psi[None, :])
    return jnp.where(here, rows, mean[None, :] + z @ loadings.T), jnp.where(here, 0, deviations)
