"""Errors of aligned loadings, of predictions and of their coefficients (theory: Sections 4 and 5). Arrays in, scalars out."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcl_jax.alignment import align_by_structure, align_globally, over_structures, procrustes_rotation
from hcl_jax.compiled import compiled
from hcl_jax.fisher import noise_by_feature
from hcl_jax.linalg import spectral_norm, triangle
from hcl_jax.model import ResponseTruth
from hcl_jax.structure import Hierarchy, as_hierarchy
from hcl_jax.views import real_numbers


def frobenius_norm(matrix: Float[Array, "a b"]) -> Float[Array, ""]:
    """The root of the sum of squares."""
    return jnp.sqrt(jnp.sum(matrix**2))


def two_to_infinity_norm(matrix: Float[Array, "a b"]) -> Float[Array, ""]:
    """The largest row norm."""
    return jnp.sqrt(jnp.max(jnp.sum(matrix**2, axis=1)))


NORMS = {"spectral": spectral_norm, "frobenius": frobenius_norm, "two_to_infinity": two_to_infinity_norm}


def gram_error(estimate: Float[Array, "d a"], target: Float[Array, "d b"]) -> Float[Array, ""]:
    """‖AAᵀ − BBᵀ‖_F as ‖R diag(I, −I) Rᵀ‖_F with [A B] = QR: O(d(a+b)²), and no digits lost to cancellation."""
    both = jnp.concatenate([estimate, target], axis=1)
    signs = jnp.where(jnp.arange(both.shape[1]) < estimate.shape[1], 1, -1).astype(both.dtype)
    R = triangle(both)
    return frobenius_norm((R * signs[None, :]) @ R.T)


def place_columns(loadings: Float[Array, "d K"], hierarchy: Hierarchy, into: Hierarchy) -> Float[Array, "d K2"]:
    """The same loadings in the columns of a hierarchy that holds theirs, zero columns where it has more."""
    starts = [into.columns(s).start for s in hierarchy.structures]
    columns = np.concatenate([start + np.arange(rank) for start, (_, rank) in zip(starts, hierarchy.ranks, strict=True)])
    return jnp.zeros((loadings.shape[0], into.n_factors), loadings.dtype).at[:, columns].set(loadings)


def _has_zero_pattern(loadings: Float[Array, "d K"], hierarchy: Hierarchy) -> Array:
    return jnp.all(jnp.where(hierarchy.mask, 0, loadings) == 0)


def _by_modality(loadings: Float[Array, "d K"], hierarchy: Hierarchy) -> Float[Array, "M rows K"]:
    """The rows of every modality, with rows of zeros, which no norm sees, where it has fewer than another."""
    longest = max(hierarchy.dims)
    blocks = [loadings[hierarchy.rows(m)] for m in hierarchy.modalities]
    return jnp.stack([jnp.pad(block, ((0, longest - block.shape[0]), (0, 0))) for block in blocks])


def recovery_errors(loadings_hat: Any, hierarchy_hat: Hierarchy, loadings: Any, hierarchy: Hierarchy) -> dict[str, Array]:
    """Every recovery error of an estimate, on the union U of the fitted and the true hierarchy (absent columns are zero).

    | name | definition | shape |
    |---|---|---|
    | `procrustes_{spectral,frobenius,two_to_infinity}` | ‖Λ̂O − Λ‖, one rotation O of all columns | () |
    | `gram_frobenius`, `gram_relative` | ‖Λ̂Λ̂ᵀ − G‖_F, and divided by ‖G‖_F | () |
    | `structure_gram_frobenius` | ‖Λ̂_sΛ̂_sᵀ − Λ_sΛ_sᵀ‖_F on the stacked Λ_s | (structures of U,) |
    | `block_{spectral,frobenius,two_to_infinity}` | ‖Λ̂_s^(m) O_s − Λ_s^(m)‖, one O_s per structure | (structures of U, M) |
    | `block_gram_frobenius` | ‖Λ̂_s^(m)Λ̂_s^(m)ᵀ − Λ_s^(m)Λ_s^(m)ᵀ‖_F | (structures of U, M) |

    An estimate without the zero pattern is aligned globally and then masked, except in the blocks that are zero in truth: their
    errors are those of the aligned, unmasked estimate, which is the only place where leakage into them can be seen.

    Raises `ValueError` for loadings that are no real numbers or have another shape than their hierarchy, and for hierarchies of
    unlike dims. Loadings that are not finite are a result, and so are their errors.
    """
    fitted, true = as_hierarchy(hierarchy_hat, "hierarchy_hat"), as_hierarchy(hierarchy)
    if fitted.dims != true.dims:
        raise ValueError(f"hierarchy_hat: has dims {fitted.dims}; expected {true.dims}, as the true one has")
    held = [real_numbers(loadings_hat, "loadings_hat:"), real_numbers(loadings, "loadings:")]
    for name, matrix, own in zip(("loadings_hat", "loadings"), held, (fitted, true), strict=True):
        if matrix.shape != own.mask.shape:
            raise ValueError(f"{name}: have shape {matrix.shape}; expected {own.mask.shape}, those of their hierarchy")
    return _recovery_errors(jnp.asarray(held[0]), fitted, jnp.asarray(held[1]), true)


@compiled
def _recovery_errors(
    loadings_hat: Float[Array, "d K_hat"], hierarchy_hat: Hierarchy, loadings: Float[Array, "d K"], hierarchy: Hierarchy
) -> dict[str, Array]:
    union = hierarchy_hat.union(hierarchy)
    estimate, target = place_columns(loadings_hat, hierarchy_hat, union), place_columns(loadings, hierarchy, union)
    aligned = align_globally(estimate, target)
    patterned = _has_zero_pattern(estimate, union)
    masked = jnp.where(union.mask, jnp.where(patterned, estimate, aligned), 0)
    by_structure = align_by_structure(masked, target, union)
    leak = jnp.where(patterned | union.mask, 0, aligned)  # what stands where the hierarchy has a zero block

    gram = gram_error(loadings_hat, loadings)
    errors = {f"procrustes_{name}": norm(aligned - target) for name, norm in NORMS.items()}
    errors |= {"gram_frobenius": gram, "gram_relative": gram / frobenius_norm(loadings.T @ loadings)}
    errors["structure_gram_frobenius"] = over_structures(gram_error, union, masked, target)
    blocks = _by_modality(by_structure + leak, union), _by_modality(target, union)
    difference = blocks[0] - blocks[1]
    for name, norm in NORMS.items():
        errors[f"block_{name}"] = over_structures(partial(jax.lax.map, norm), union, difference)
    errors["block_gram_frobenius"] = over_structures(
        lambda *pair: jax.lax.map(lambda both: gram_error(*both), pair), union, *blocks
    )
    return errors


def symmetric_percentage_error(covariance: Float[Array, "2 2"], offset: Float[Array, ""]) -> Float[Array, ""]:
    """E 2|y − ŷ|/(|y| + |ŷ|) in per cent, for a normal pair (y, ŷ) with means 0 and `offset`: by quadrature, to about 1e-3 of it.

    Polar: 256 angles by the midpoint rule, and 32 radii at the quantiles of their Rayleigh law.
    """
    dtype = covariance.dtype
    angles = 2 * np.pi * (np.arange(256) + 0.5) / 256
    radii = np.sqrt(-2 * np.log1p(-(np.arange(32) + 0.5) / 32))
    points = jnp.asarray((radii[:, None, None] * np.stack([np.cos(angles), np.sin(angles)], axis=-1)).reshape(-1, 2), dtype)
    scale = jnp.sqrt(covariance[0, 0])
    slope = covariance[0, 1] / scale
    y = scale * points[:, 0]
    prediction = slope * points[:, 0] + jnp.sqrt(jnp.maximum(covariance[1, 1] - slope**2, 0)) * points[:, 1] + offset
    size = jnp.abs(y) + jnp.abs(prediction)
    return 200 * jnp.mean(jnp.abs(y - prediction) / jnp.where(size > 0, size, 1))


def prediction_errors(coefficients: Float[Array, " d"], intercept: Float[Array, ""], truth: ResponseTruth) -> dict[str, Array]:
    """The errors of the prediction ŷ = bᵀx + intercept of a new row, in expectation under the truth: no test sample, no noise.

    | name | definition |
    |---|---|
    | `rmse` | √E(y − ŷ)² |
    | `smape` | E 2|y − ŷ|/(|y| + |ŷ|), per cent |
    | `r_squared` | 1 − E(y − ŷ)²/Var y |
    | `bayes_excess` | E(y − ŷ)² − Var(y|x) ≥ 0 |
    | `excess_risk` | E(y − ŷ)² − E(y − βᵀCx)² with C = (ΛᵀΛ)⁻¹Λᵀ, the paper's; may be negative |
    """
    L, beta = truth.loadings, truth.coefficients
    psi = noise_by_feature(truth.noise_variance, L.shape[0])

    def second_moments(b):
        """Var y, Cov(y, bᵀx), Var(bᵀx)."""
        image = L.T @ b
        return jnp.sum(beta**2) + truth.response_noise_variance, image @ beta, jnp.sum(image**2) + jnp.sum(psi * b**2)

    variance, cross, own = second_moments(coefficients)
    risk = variance - 2 * cross + own + intercept**2
    _, oracle_cross, oracle_own = second_moments(L @ jnp.linalg.solve(L.T @ L, beta))
    pair = jnp.stack([jnp.stack([variance, cross]), jnp.stack([cross, own])])
    # the excess over the Bayes risk as a square, which loses no digits: (b − c)ᵀΣ(b − c) with E[y|x] = cᵀx
    away = coefficients - truth.conditional_mean()
    return {
        "rmse": jnp.sqrt(risk),
        "smape": symmetric_percentage_error(pair, intercept),
        "r_squared": 1 - risk / variance,
        "bayes_excess": jnp.sum((L.T @ away) ** 2) + jnp.sum(psi * away**2) + intercept**2,
        "excess_risk": risk - (variance - 2 * oracle_cross + oracle_own),
    }


def prediction_errors_on_rows(
    predicted: Float[Array, " n"], u: Float[Array, "n d"], y: Float[Array, " n"], truth: ResponseTruth
) -> dict[str, Array]:
    """The errors of predictions of rows of the linear model, u, whatever a method saw of them, and their responses.

    | name | definition |
    |---|---|
    | `bayes_excess` | mean of (E[y|u] − ŷ)² |
    | `rmse` | √(Var(y|u) + `bayes_excess`), which the rows' own noise does not enter |
    | `r_squared` | 1 − `rmse`²/Var y |
    | `smape` | mean of 2|y − ŷ|/(|y| + |ŷ|), per cent |
    """
    excess = jnp.mean((u @ truth.conditional_mean() - predicted) ** 2)
    risk = truth.conditional_variance() + excess
    size = jnp.abs(y) + jnp.abs(predicted)
    return {
        "rmse": jnp.sqrt(risk),
        "smape": 200 * jnp.mean(jnp.abs(y - predicted) / jnp.where(size > 0, size, 1)),
        "r_squared": 1 - risk / (jnp.sum(truth.coefficients**2) + truth.response_noise_variance),
        "bayes_excess": excess,
    }


@compiled
def coefficient_errors(
    coefficients: Float[Array, " K"], loadings: Float[Array, "d K"], hierarchy: Hierarchy, truth: ResponseTruth
) -> dict[str, Array]:
    """Errors of β̂, for scores from loadings of the truth's own hierarchy: ‖O_sᵀβ̂_s − β_s‖ with Λ̂_sO_s nearest to Λ_s.

    `beta_error` (all structures together), `structure_beta_error`, and what a selection of structures got right: `selected` (by
    structure, 0 or 1), `true_positive_rate`, `false_positive_rate` (0 where nothing could be selected wrongly),
    `exact_selection`.
    """
    beta = truth.coefficients

    def error(own: Array, true: Array, coefficients: Array, beta: Array) -> Array:
        return jnp.linalg.norm(procrustes_rotation(own, true).T @ coefficients - beta)

    errors = over_structures(error, hierarchy, loadings, truth.loadings, coefficients, beta)
    chosen, relevant = (over_structures(jnp.any, hierarchy, held != 0) for held in (coefficients, beta))

    def rate(among):
        return jnp.sum(chosen & among) / jnp.maximum(jnp.sum(among), 1)

    return {
        "beta_error": jnp.linalg.norm(errors),
        "structure_beta_error": errors,
        "selected": chosen.astype(beta.dtype),
        "true_positive_rate": rate(relevant).astype(beta.dtype),
        "false_positive_rate": rate(~relevant).astype(beta.dtype),
        "exact_selection": jnp.all(chosen == relevant).astype(beta.dtype),
    }
