"""Confidence intervals for rotation-free quantities from the inverse Fisher information (theory: Section 3), and where to trust
them.

The normal approximation holds at the maximum of the likelihood, for columns of the loadings that stand out of the noise. The
variational mean is shrunk, and its own posterior takes the scores for known; columns below the detection limit are noise. So
all intervals are taken at the maximum on the columns of the estimate that stand out (`hcl_jax.support`). What does not still
counts: it widens the interval of its blocks by what would have been detected, and its entries of G are taken from the sample
covariance.

One conjugate-gradient solve a quantity, and no d × d matrix but the covariance where it is one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.compiled import compiled
from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators.estimate import Estimate, check_problem
from hcl_jax.fisher import pool
from hcl_jax.structure import CONVERGED, ON_BOUND, Hierarchy, Structure, as_structure, whole_number
from hcl_jax.support import (
    Point,
    Quantity,
    column_strengths,
    missing_columns,
    moments,
    noise_edge,
    of_structure,
    same_support,
    solve,
    supported_point,
    without_rotations,
)
from hcl_jax.views import as_number

VALID, NOT_CONVERGED, INEFFICIENT, BOUNDARY, OUT_OF_CG_STEPS = range(5)
STATUS_TEXT = {
    VALID: "valid",
    NOT_CONVERGED: "not converged: the fit, or the likelihood steps after it",
    INEFFICIENT: "not efficient: the estimator is not one of the likelihood",
    BOUNDARY: "boundary: at an end of its range, or columns below the detection limit may hold part of it; an upper bound only",
    OUT_OF_CG_STEPS: "out of steps: the solve with the Fisher information",
}
EFFICIENT = ("hcl-ml", "hcl-vb")

PROBES = 16  # random signs behind a trace: its relative error is about √(2/(16 · entries of the block))
PROBE_SEED = 0x48434C  # fixed, so that intervals are deterministic
BISECTIONS = 60

Blocks = tuple[tuple[Structure, int], ...]
Located = tuple[Point, Int[Array, ""]]


class Interval(eqx.Module):
    """Estimates, their standard errors, intervals about them, and for each whether it is valid (`STATUS_TEXT` in words).

    Where the status says `BOUNDARY`, `upper` is a bound that errs on the safe side and `lower` is no claim.
    """

    estimate: Float[Array, "*q"]
    standard_error: Float[Array, "*q"]
    lower: Float[Array, "*q"]
    upper: Float[Array, "*q"]
    status: Int[Array, "*q"]

    def reasons(self) -> list[str]:
        """The statuses in words."""
        return [STATUS_TEXT[int(code)] for code in jnp.ravel(self.status)]


def located(estimate: Estimate, covariance: SampleCovariance, hierarchy: Hierarchy) -> Located:
    """(where intervals are taken, status of all of them)."""
    at, reached = supported_point(estimate.loadings, estimate.noise_variance, covariance, hierarchy, estimate.noise)
    ended = jnp.where(estimate.status == CONVERGED, VALID, jnp.where(estimate.status == ON_BOUND, BOUNDARY, NOT_CONVERGED))
    return at, jnp.where(reached, ended, NOT_CONVERGED) if estimate.method in EFFICIENT else jnp.array(INEFFICIENT)


def _status(common: Int[Array, ""], solved: Bool[Array, " q"], boundary: Bool[Array, " q"]) -> Int[Array, " q"]:
    """What is wrong with all of them, else with each."""
    own = jnp.where(solved, jnp.where(boundary, BOUNDARY, VALID), OUT_OF_CG_STEPS)
    return jnp.where(common == VALID, own, common)


def check_level(level: Any) -> None:
    """Raise `ValueError` unless it is a number between 0 and 1."""
    as_number(level, "level", "a number between 0 and 1", lambda number: 0 < number < 1)


def normal_quantile(probability: float, dtype: Any) -> Float[Array, ""]:
    """Of N(0, 1)."""
    return jax.scipy.special.ndtri(jnp.asarray(probability, dtype))


@compiled
def _delta(quantity: Quantity, point: Point, status: Int[Array, ""], nu: Float[Array, ""], level: float) -> Interval:
    values, variances, (_, solved) = moments(point, nu, lambda F: jnp.ravel(quantity(F)))
    boundary = jnp.broadcast_to(missing_columns(point).sum() > 0, solved.shape)
    return symmetric_interval(values, variances, level, _status(status, solved, boundary))


def symmetric_interval(values: Array, variances: Array, level: float, status: Array) -> Interval:
    """Each value, and as many standard errors on both sides of it as a normal law of that level has."""
    error = jnp.sqrt(variances)
    width = error * normal_quantile((1 + level) / 2, error.dtype)
    return Interval(values, error, values - width, values + width, status)


@compiled
def _feature_shares(
    rows: Int[Array, " q"],
    seen: Bool[Array, " M"],
    place: Int[Array, ""],
    point: Point,
    status: Int[Array, ""],
    nu: Float[Array, ""],
    level: float,
) -> Interval:
    columns = (point.support == seen[:, None]).all(axis=0)
    squares = lambda F: jnp.where(columns[None], F[rows], 0) ** 2 @ jnp.ones_like(F[0])
    values, variances, (_, solved) = moments(point, nu, squares)
    present = values > 0
    root = jnp.sqrt(jnp.where(present, values, 1))
    boundary = ~present | (missing_columns(point)[place] > 0)
    found = symmetric_interval(root, variances / (4 * root**2), level, _status(status, solved, boundary))
    lower, upper = jnp.where(present, jnp.maximum(found.lower, 0) ** 2, 0), jnp.where(present, found.upper**2, 0)
    return Interval(values, jnp.sqrt(variances), lower, upper, found.status)


@compiled
def _gram(
    entries: Int[Array, "q 2"], point: Point, status: Int[Array, ""], covariance: SampleCovariance, level: float
) -> Interval:
    hierarchy = point.fisher.hierarchy
    i, j = entries[:, 0], entries[:, 1]
    values, variances, (_, solved) = moments(point, covariance.nu, lambda F: jnp.sum(F[i] * F[j], axis=1))
    seen = jnp.asarray(np.array([[m in s for s in hierarchy.structures] for m in hierarchy.modalities]))
    modality = jnp.asarray(hierarchy.modality_of_feature)
    missing = (seen[modality[i]] & seen[modality[j]] & (missing_columns(point) > 0)[None]).any(axis=1)
    sampled, spreads = covariance.entries(i, j), covariance.variances()
    own = (spreads[i] * spreads[j] + sampled**2) / covariance.nu
    sampled = jnp.where(i == j, sampled - point.fisher.psi[i], sampled)
    own_status = _status(status, solved | missing, missing & (i == j))
    return symmetric_interval(jnp.where(missing, sampled, values), jnp.where(missing, own, variances), level, own_status)


@compiled
def _block_norms(blocks: Blocks, point: Point, status: Int[Array, ""], nu: Float[Array, ""], level: float) -> Interval:
    hierarchy = point.fisher.hierarchy
    columns = [of_structure(point, s) for s, _ in blocks]

    def sums(matrix: Float[Array, "d K"]) -> Float[Array, " q"]:
        rows = [matrix[hierarchy.rows(m)] for _, m in blocks]
        return jnp.stack([jnp.sum(jnp.where(own[None], part, 0)) for own, part in zip(columns, rows, strict=True)])

    values, variances, (solutions, solved) = moments(point, nu, lambda F: sums(F**2))
    excess = sums(_loading_variances(point, nu))
    cut = _truncation(point, nu, values, variances, solutions, jnp.stack(columns))
    lower, upper = _truncated(values, jnp.sqrt(variances), cut, level)
    present = jnp.stack([own.any() for own in columns])
    missing = jnp.stack([jnp.maximum(hierarchy.rank(s) - own.sum(), 0) for (s, _), own in zip(blocks, columns, strict=True)])
    hidden = jnp.where(
        missing > 0, missing.astype(values.dtype) * _undetected(point, nu, blocks, level) + _misplaced(point, blocks), 0
    )
    squares = [jnp.where(present, jnp.maximum(square - excess, 0), 0) for square in (values, lower, upper)]
    norm, lower, upper = jnp.sqrt(squares[0]), jnp.sqrt(squares[1]), jnp.sqrt(squares[2] + hidden)
    error = jnp.sqrt(variances) / (2 * jnp.where(norm > 0, norm, jnp.inf))
    return Interval(norm, error, lower, upper, _status(status, solved | ~present, missing > 0))


def _misplaced(point: Point, blocks: Blocks) -> Float[Array, " q"]:
    """What the view holds of other structures of which some columns stand out and some do not: a block's column may be there."""
    sums = pool(point.loadings**2, point.fisher.hierarchy, "view")
    columns = {t: of_structure(point, t) for t in point.fisher.hierarchy.structures}
    partial = jnp.stack([own & (own.sum() < point.fisher.hierarchy.rank(t)) for t, own in columns.items()]).any(axis=0)
    return jnp.stack([jnp.sum(jnp.where(partial & ~columns[s], sums[m - 1], 0)) for s, m in blocks])


def _undetected(point: Point, nu: Float[Array, ""], blocks: Blocks, level: float) -> Float[Array, " q"]:
    """‖Λ_k^(m)‖² of a column that would have stood out with probability (1 + level)/2: the threshold, and as many standard
    errors (1 + λ)√(2/ν) of a strength above it, in units of the view's largest noise variance."""
    hierarchy, dtype = point.fisher.hierarchy, point.loadings.dtype
    z = normal_quantile((1 + level) / 2, dtype)
    bounds = []
    for s, m in blocks:
        edge = noise_edge(nu, jnp.asarray(sum(hierarchy.dims[i - 1] for i in s), dtype)) / nu - 1
        bounds.append((edge + z * jnp.sqrt(2 / nu) * (1 + edge)) * point.fisher.psi[hierarchy.rows(m)].max())
    return jnp.stack(bounds)


def _truncation(
    point: Point, nu: Float[Array, ""], values: Array, variances: Array, solutions: Array, columns: Bool[Array, "q K"]
) -> Float[Array, " q"]:
    """What every squared norm must have exceeded for the block's columns to stand out, the rest of the data as it is: the
    strength of a column is β times the squared norm and a part independent of it."""
    strengths, _, thresholds = column_strengths(point, nu)
    gradients = 2 * point.loadings / point.fisher.psi[:, None]
    slopes = jnp.einsum("dk,qdk->qk", gradients, solutions) / jnp.where(variances > 0, variances, 1)[:, None]
    room = (strengths - thresholds)[None] / jnp.where(slopes > 0, slopes, 1)
    cuts = jnp.where(columns & (slopes > 0), values[:, None] - jnp.maximum(room, 0), -jnp.inf)
    return cuts.max(axis=1)


def _truncated(values: Array, errors: Array, cut: Array, level: float) -> tuple[Array, Array]:
    """Ends of an interval for the mean of a normal variable that is seen only above `cut` (Lee, Sun, Sun and Taylor, 2016)."""
    scale = jnp.where(errors > 0, errors, 1)
    room = jnp.where(jnp.isfinite(cut), (values - cut) / scale, jnp.inf)

    def end(probability: float) -> Array:
        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2  # (mean − value)/error; the probability of a larger value rises with it
            above = jax.scipy.special.log_ndtr(middle) - jax.scipy.special.log_ndtr(middle + room)
            larger = above > jnp.log(probability)
            return jnp.where(larger, low, middle), jnp.where(larger, middle, high)

        low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (jnp.full_like(values, -50), jnp.full_like(values, 50)))
        return values + scale * (low + high) / 2

    return end((1 - level) / 2), end((1 + level) / 2)


def _check(level: float, estimate: Estimate, covariance: SampleCovariance, hierarchy: Hierarchy) -> None:
    check_level(level)
    check_problem(covariance, hierarchy)
    if not isinstance(estimate, Estimate):
        raise ValueError(f"estimate: is of type {type(estimate).__name__}; expected an Estimate, such as hcl-ml returns")
    if estimate.loadings.shape[-2:] != hierarchy.mask.shape:
        raise ValueError(f"estimate: has loadings of shape {estimate.loadings.shape}; expected {hierarchy.mask.shape}")


def _check_rotations(quantity: Quantity, estimate: Estimate, hierarchy: Hierarchy) -> None:
    """Raise `ValueError` if rotating the columns of every structure changes the quantity. (Traced loadings are not checked.)"""
    if not callable(quantity):
        raise ValueError(f"quantity: is of type {type(quantity).__name__}; expected a function of the loadings")
    found = jax.eval_shape(quantity, estimate.loadings)
    if not isinstance(found, jax.ShapeDtypeStruct) or len(found.shape) > 1 or not jnp.issubdtype(found.dtype, jnp.floating):
        raise ValueError(f"quantity: returns {found}; expected a vector of real numbers, or one of them")
    if isinstance(estimate.loadings, jax.core.Tracer):
        return
    rng = np.random.default_rng(PROBE_SEED)
    F = np.where(hierarchy.mask, np.asarray(estimate.loadings), 0)
    rotated = F.copy()
    for columns in map(hierarchy.columns, hierarchy.structures):
        Q, R = np.linalg.qr(rng.standard_normal((columns.stop - columns.start,) * 2))
        rotated[:, columns] = F[:, columns] @ (-Q * np.sign(R.diagonal()))  # one column alone turns its sign
    before, after = (np.asarray(quantity(jnp.asarray(part, estimate.loadings.dtype))) for part in (F, rotated))
    change, allowed = np.abs(after - before).max(initial=0), 1e4 * np.finfo(before.dtype).eps * np.abs(before).max(initial=0)
    if not change <= allowed + np.finfo(before.dtype).tiny:
        raise ValueError(
            f"quantity: changes by {change:.3g} when the columns of a structure are rotated; expected a function that does not, "
            "since loadings are known up to such rotations only"
        )


def delta_method(
    quantity: Quantity, estimate: Estimate, covariance: SampleCovariance, hierarchy: Hierarchy, level: float = 0.95
) -> Interval:
    """Intervals for any rotation-free function of the loadings: variance gᵀ(νH)⁻¹g, g its gradient and H the Fisher operator, the
    noise variances free.

    `quantity` maps d × K loadings to a vector, or to one number. Valid only where every column that the hierarchy offers stands
    out of the noise: of a function it is not known where hidden columns enter. Raises `ValueError` for a level outside (0, 1),
    and for a quantity that changes when a structure's columns are rotated. Compiled once for a `quantity`: pass the same function
    again.
    """
    _check(level, estimate, covariance, hierarchy)
    _check_rotations(quantity, estimate, hierarchy)
    return _delta(quantity, *located(estimate, covariance, hierarchy), covariance.nu, level)


def gram_intervals(
    estimate: Estimate,
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    entries: Any,
    level: float = 0.95,
) -> Interval:
    """Intervals for the entries (i, j) of G = ΛΛᵀ, a q × 2 array of features counted from 0.

    Where both views of an entry see a structure with columns that do not stand out, these may hold part of it, and the
    entry off the diagonal is S_ij with its variance (Σ_iiΣ_jj + Σ_ij²)/ν, which needs no model; on the diagonal, where the noise
    has to be told apart, the status is `BOUNDARY`. Raises `ValueError` for entries that are not pairs of features.
    """
    _check(level, estimate, covariance, hierarchy)
    pairs = jnp.asarray(_as_entries(entries, hierarchy))
    return _gram(pairs, *located(estimate, covariance, hierarchy), covariance, level)


def _as_entries(entries: Any, hierarchy: Hierarchy) -> Int[np.ndarray, "q 2"]:
    pairs, d = np.asarray(entries), hierarchy.n_features
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
        raise ValueError(f"entries: have shape {pairs.shape} and type {pairs.dtype}; expected q × 2 integers")
    outside = pairs[((pairs < 0) | (pairs >= d)).any(axis=1)]
    if len(outside):
        raise ValueError(f"entries: hold ({outside[0][0]}, {outside[0][1]}); expected features from 0 to {d - 1}")
    return pairs.astype(np.int64)


def block_norm_intervals(
    estimate: Estimate,
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    blocks: Sequence[tuple[Any, int]],
    level: float = 0.95,
) -> Interval:
    """Intervals for ‖Λ_s^(m)‖_F, one for each (structure, modality).

    ‖Λ̂_s^(m)‖² is larger than ‖Λ_s^(m)‖² by the noise in the block, so the trace of the block's covariance is taken off; and as it
    is looked at only where its columns stand out, its law is a normal one cut off there. With columns missing the status is
    `BOUNDARY`: near zero the norm of a block is not known from below, and that of a view whose structure is absent in the other
    views not at all, since its columns then rotate into the private ones. `upper` then adds, for every missing column, what
    would have been detected with probability (1 + level)/2, and columns that may be misplaced. Raises `ValueError` for a block
    that the hierarchy holds at zero.
    """
    _check(level, estimate, covariance, hierarchy)
    known = _as_blocks(blocks, hierarchy)
    return _block_norms(known, *located(estimate, covariance, hierarchy), covariance.nu, level)


def _as_blocks(blocks: Sequence[tuple[Any, int]], hierarchy: Hierarchy) -> Blocks:
    pairs = list(blocks) if isinstance(blocks, Iterable) else []
    if not pairs:
        raise ValueError(f"blocks: is {blocks!r}; expected at least one pair of a structure and a modality, such as ('12', 1)")
    known = []
    for pair in pairs:
        try:
            s, m = pair
        except (TypeError, ValueError):
            raise ValueError(f"blocks: hold {pair!r}; expected pairs of a structure and a modality, such as ('12', 1)") from None
        structure = as_structure(s, hierarchy.n_modalities, "blocks")
        number = whole_number(m)
        if structure not in hierarchy.structures or number not in structure:
            raise ValueError(
                f"blocks: ({s!r}, {m!r}) is not a block of the hierarchy; expected a structure of it and one of its modalities"
            )
        known.append((structure, number))
    return tuple(known)


def feature_share_intervals(
    estimate: Estimate,
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    structure: Any,
    features: Any,
    level: float = 0.95,
    *,
    at: Located | None = None,
) -> Interval:
    """Intervals for ‖Λ_sj‖², what a structure explains of feature j's variance, j counted from 0: of features of standard
    deviation 1 its share.

    They stand for intervals of single loadings, which are known up to rotations of the structure's columns only; of a structure
    with one column its squared loading. Symmetric in ‖Λ_sj‖. For features that were named beforehand: of those with the largest
    of many shares the estimates are too large. Where features were divided by their sample deviations the intervals are too
    wide, since shares vary less than variances. Where columns of the structure do not stand out the status is `BOUNDARY`. `at`:
    what `located` gives, if it is at hand. Raises `ValueError` for a structure that the hierarchy lacks, and features that are
    not of its views.
    """
    _check(level, estimate, covariance, hierarchy)
    named = as_structure(structure, hierarchy.n_modalities, "structure")
    if named not in hierarchy.structures:
        raise ValueError(f"structure: is {structure!r}; expected one of the hierarchy")
    rows = np.asarray(features)
    if rows.ndim != 1 or rows.dtype.kind not in "iu" or not rows.size:
        raise ValueError(f"features: have shape {rows.shape} and type {rows.dtype}; expected a vector of integers")
    outside = [int(j) for j in rows if not 0 <= j < hierarchy.n_features or hierarchy.modality_of_feature[j] + 1 not in named]
    if outside:
        raise ValueError(f"features: hold {outside[0]}; expected features of the structure's views")
    seen = jnp.asarray([m in named for m in hierarchy.modalities])
    place = jnp.asarray(list(hierarchy.structures).index(named))
    point, status = located(estimate, covariance, hierarchy) if at is None else at
    return _feature_shares(jnp.asarray(rows), seen, place, point, status, covariance.nu, level)


def _loading_variances(point: Point, nu: Float[Array, ""]) -> Float[Array, "d K"]:
    """d × K numbers whose sums over a block are the trace of its covariance (Hutchinson's estimate), rotations left out."""
    same, F = same_support(point.support), point.loadings

    def probe(key: Array) -> Float[Array, "d K"]:
        signs = jnp.where(point.rows, jr.rademacher(key, F.shape, F.dtype), 0)
        V, _ = solve(point, (without_rotations(signs, F, same), jnp.zeros_like(point.noise)))
        return without_rotations(V, F, same) * signs

    return jax.lax.map(probe, jr.split(jr.key(PROBE_SEED), PROBES)).mean(axis=0) / nu
