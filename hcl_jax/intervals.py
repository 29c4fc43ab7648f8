"""Confidence intervals for rotation-free quantities from the inverse Fisher information (theory: Section 3), and where to trust
them.

The normal approximation holds at the maximum of the likelihood, for columns of the loadings that stand out of the noise. The
variational mean is shrunk and its own posterior takes the scores for known; and columns below the detection limit are noise,
rotated at will into their neighbours. So all intervals are taken at one *point*: from the estimate's columns, Fisher scoring
to the maximum, then columns, and blocks of columns, that noise alone could have made are put to zero one round after the other.
A column that stands out in one view only is a private one, whatever it was offered as. What was put to zero still counts: it
widens the interval of its blocks by what would have been detected, and its entries of G are taken from the sample covariance.

One conjugate-gradient solve a quantity, and no d × d matrix but the covariance where it is one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators.estimate import Estimate
from hcl_jax.fisher import FisherOperator, Parameters, group_sizes, noise_by_feature, pool, spread
from hcl_jax.structure import CONVERGED, Hierarchy, Structure

VALID, NOT_CONVERGED, INEFFICIENT, BOUNDARY, OUT_OF_CG_STEPS = range(5)
STATUS_TEXT = {
    VALID: "valid",
    NOT_CONVERGED: "the fit, or the likelihood steps after it, did not converge",
    INEFFICIENT: "the estimator is not efficient: not one of the likelihood",
    BOUNDARY: "upper bound only: columns at or below the detection limit may hold part of it",
    OUT_OF_CG_STEPS: "the solve with the Fisher information ran out of steps",
}
EFFICIENT = ("hcl-ml", "hcl-vb")

CG_TOLERANCE, CG_STEPS = 1e-6, 300
STEP_TOLERANCE, STEP_CG_STEPS = 1e-3, 50  # of the solves on the way to the maximum
DECREMENT = 1e-4  # twice the log-likelihood still to gain at which the maximum is reached: a hundredth of a standard error
SCORING_STEPS, ROUNDS = 60, 20
EDGE_QUANTILE = 3.27  # the 99.9 % quantile of the Tracy–Widom law of real matrices
PROBES = 16  # random signs behind a trace: its relative error is about √(2/(16 · entries of the block))
PROBE_SEED = 0x48434C  # fixed, so that intervals are deterministic
BISECTIONS = 60

Quantity = Callable[[Float[Array, "d K"]], Float[Array, " q"]]


class Interval(eqx.Module):
    """Estimates, their standard errors, intervals about them, and for each whether it is valid (`STATUS_TEXT` in words).

    Where the status says `BOUNDARY`, `upper` is a bound that errs on the safe side and `lower` is no claim.
    """

    estimate: Float[Array, " q"]
    standard_error: Float[Array, " q"]
    lower: Float[Array, " q"]
    upper: Float[Array, " q"]
    status: Int[Array, " q"]

    def reasons(self) -> list[str]:
        """The statuses in words."""
        return [STATUS_TEXT[int(code)] for code in self.status]


class Point(eqx.Module):
    """Where the likelihood stands, restricted to some columns of the loadings in each view: its derivatives there, and H."""

    loadings: Float[Array, "d K"]
    noise: Float[Array, " groups"]
    support: Bool[Array, "M K"]
    rows: Bool[Array, "d K"]  # the support, by feature
    fisher: FisherOperator
    gradient: Parameters  # −½ of that of the deviance
    deviance: Float[Array, ""]


def _fisher_at(loadings: Float[Array, "d K"], noise: Float[Array, " groups"], hierarchy: Hierarchy, kind: str) -> FisherOperator:
    return FisherOperator(loadings, spread(noise, hierarchy, kind), hierarchy, kind)


def _point(
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    kind: str,
    loadings: Float[Array, "d K"],
    noise: Float[Array, " groups"],
    support: Bool[Array, "M K"],
) -> Point:
    """The point of these loadings, those outside the support put to zero: one product with S."""
    rows = jnp.repeat(support, np.array(hierarchy.dims), axis=0, total_repeat_length=hierarchy.n_features)
    F = jnp.where(rows, loadings, 0)
    fisher = _fisher_at(F, noise, hierarchy, kind)
    scaled, variances = F / fisher.psi[:, None], covariance.variances()
    image = covariance.product(scaled)
    along, change = fisher.minus_half_gradient(image @ fisher.inverse, variances)
    fit = jnp.sum(jnp.log(fisher.psi) + variances / fisher.psi) - jnp.sum(fisher.inverse * (scaled.T @ image))
    deviance = fit - jnp.linalg.slogdet(fisher.inverse)[1]
    return Point(F, noise, support, rows, fisher, (jnp.where(rows, along, 0), change), deviance)


def _dot(a: Parameters, b: Parameters) -> Float[Array, ""]:
    return jnp.sum(a[0] * b[0]) + jnp.sum(a[1] * b[1])


def _solve(point: Point, right: Parameters, tolerance: float = CG_TOLERANCE, max_steps: int = CG_STEPS) -> Parameters:
    """H⁻¹ of the right-hand side on the support, as `FisherOperator.solve`."""

    def supported(parameters: Parameters) -> Parameters:
        return jnp.where(point.rows, parameters[0], 0), parameters[1]

    def product(parameters: Parameters) -> Parameters:
        return supported(point.fisher.product(parameters))

    def precondition(parameters: Parameters) -> Parameters:
        return supported(point.fisher.precondition(parameters))

    return jax.scipy.sparse.linalg.cg(product, right, tol=tolerance, maxiter=max_steps, M=precondition)[0]


def _maximum(covariance: SampleCovariance, start: Point) -> tuple[Point, Bool[Array, ""]]:
    """(the maximum of the likelihood on the support, whether it was reached), by Fisher scoring; a step that raises the deviance
    is quartered."""
    fisher = start.fisher

    def step(state):
        at, _, t, i = state
        V, change = _solve(at, at.gradient, STEP_TOLERANCE, STEP_CG_STEPS)
        noise = jnp.maximum(at.noise + t * change, at.noise / 4)
        new = _point(covariance, fisher.hierarchy, fisher.noise, at.loadings + t * V, noise, at.support)
        rounding = 10 * jnp.finfo(t.dtype).eps * jnp.abs(at.deviance)
        better = new.deviance <= at.deviance + rounding
        kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, at)
        decrement = covariance.nu * _dot(at.gradient, (V, change))
        return kept, decrement, jnp.where(better, jnp.minimum(1, 2 * t), t / 4), i + 1

    one = jnp.ones((), start.loadings.dtype)
    state = (start, jnp.inf * one, one, 0)
    at, decrement, _, _ = jax.lax.while_loop(lambda s: ~(s[1] <= DECREMENT) & (s[3] < SCORING_STEPS), step, state)
    return at, decrement <= DECREMENT


def _same_support(support: Bool[Array, "M K"]) -> Bool[Array, "K K"]:
    """Which columns are seen by the same views, and so free to rotate into each other."""
    return (support[:, :, None] == support[:, None, :]).all(axis=0)


def _principal_axes(point: Point) -> Float[Array, "d K"]:
    """The loadings with FᵀΨ⁻¹F diagonal among columns of the same support.

    One decomposition: groups of columns are set apart by shifts of the diagonal, so that each keeps its places.
    """
    same = _same_support(point.support)
    group = jnp.argmax(same, axis=1)
    gram = jnp.where(same, point.fisher.gram, 0)
    shifts = (2 * jnp.trace(gram)) * group.astype(gram.dtype)
    axes = jnp.linalg.eigh(gram + jnp.diag(shifts))[1]
    return jnp.zeros_like(point.loadings).at[:, jnp.argsort(group, stable=True)].set(point.loadings @ axes)


def noise_edge(a: Any, b: Any) -> Any:
    """What the largest eigenvalue of XᵀX, X an a × b matrix of standard normal noise, exceeds in one of a thousand draws
    (Johnstone, 2001)."""
    roots = jnp.sqrt(a) + jnp.sqrt(b)
    return roots**2 + EDGE_QUANTILE * roots * (1 / jnp.sqrt(a) + 1 / jnp.sqrt(b)) ** (1 / 3)


def _squares(point: Point) -> Float[Array, "M K"]:
    """‖Ψ^(−1/2)F^(m)_k‖², the strength of every column in every view in units of the noise."""
    return pool(point.loadings**2 / point.fisher.psi[:, None], point.fisher.hierarchy, "view")


def _weak_columns(point: Point, nu: Float[Array, ""]) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """(λ_k, what it must exceed) for columns in principal axes: the strength that noise of as many features makes, and as many
    standard errors as it then has of its own; they are larger beside strong columns of the same view."""
    dims = jnp.asarray(point.fisher.hierarchy.dims, point.loadings.dtype)
    edge = noise_edge(nu, jnp.maximum(dims @ point.support.astype(dims.dtype), 1)) / nu - 1
    strengths = lambda F: jnp.sum(F**2 / point.fisher.psi[:, None], axis=0)  # noqa: E731
    values, variances, _ = _moments(point, nu, strengths)
    return values, jnp.maximum(edge, edge * jnp.sqrt(nu / 2) / (1 + edge) * jnp.sqrt(variances))


def _weak_blocks(point: Point, nu: Float[Array, ""]) -> Bool[Array, "M K"]:
    """For every column seen by several views, the view that stands out least, where it does no more than noise regressed on the
    factors that the other views show: variance (1 + 1/λ)ψ/ν an entry, at most over their rotations."""
    squares, support = _squares(point), point.support
    dims = jnp.asarray(point.fisher.hierarchy.dims, squares.dtype)
    rivals = jnp.stack([_same_support(support.at[m].set(False)).sum(axis=1) for m in range(len(dims))]).astype(squares.dtype)
    others = squares.sum(axis=0)[None] - squares
    noise = noise_edge(dims[:, None], rivals) / nu * (1 + 1 / jnp.where(others > 0, others, 1))
    ratios = jnp.where(support & (support.sum(axis=0)[None] > 1), squares / noise, jnp.inf)
    return (ratios < 1) & (ratios == ratios.min(axis=0)[None])


def _to_drop(point: Point, nu: Float[Array, ""]) -> Bool[Array, "M K"]:
    """What noise alone could have made: blocks first, since they may turn a shared column into a private one; then columns."""
    blocks = _weak_blocks(point, nu)
    strengths, thresholds = _weak_columns(point, nu)
    return jnp.where(blocks.any(), blocks, point.support & (strengths < thresholds)[None])


def supported_point(estimate: Estimate, covariance: SampleCovariance, hierarchy: Hierarchy) -> tuple[Point, Bool[Array, ""]]:
    """(maximum of the likelihood on the columns that stand out of the noise, whether it was reached), in principal axes."""
    kind = estimate.noise
    F = jnp.where(hierarchy.mask, estimate.loadings, 0)
    sizes = jnp.asarray(group_sizes(hierarchy, kind), F.dtype)
    noise = pool(noise_by_feature(estimate.noise_variance, F.shape[0]), hierarchy, kind) / sizes

    def maximum(loadings, noise, support):
        at, reached = _maximum(covariance, _point(covariance, hierarchy, kind, loadings, noise, support))
        return _point(covariance, hierarchy, kind, _principal_axes(at), at.noise, support), reached

    def dropped(state):
        at, drop, _, i = state
        at, reached = maximum(at.loadings, at.noise, at.support & ~drop)
        return at, _to_drop(at, covariance.nu), reached, i + 1

    support = pool(F**2, hierarchy, "view") > 0
    first = _point(covariance, hierarchy, kind, F, noise, support)
    state = (first, jnp.zeros_like(support), jnp.array(False), jnp.array(0))
    go_on = lambda s: (s[1].any() | (s[3] == 0)) & (s[3] < ROUNDS)  # noqa: E731
    at, drop, reached, _ = jax.lax.while_loop(go_on, dropped, state)
    return at, reached & ~drop.any()


def _moments(
    point: Point, nu: Float[Array, ""], quantity: Quantity
) -> tuple[Float[Array, " q"], Float[Array, " q"], tuple[Float[Array, "q d K"], Bool[Array, " q"]]]:
    """(values, variances gᵀ(νH)⁻¹g, (the (νH)⁻¹g along the loadings, whether each solve converged)), g the gradients."""
    values, pull_back = jax.vjp(quantity, point.loadings)

    def solved(direction: Float[Array, " q"]):
        right = (jnp.where(point.rows, pull_back(direction)[0], 0), jnp.zeros_like(point.noise))
        V, change = _solve(point, right)
        left = point.fisher.product((V, change))
        residual = jnp.linalg.norm(jnp.where(point.rows, left[0], 0) - right[0])
        return jnp.sum(right[0] * V) / nu, V / nu, residual <= 1e-3 * jnp.linalg.norm(right[0])

    variances, solutions, reached = jax.lax.map(solved, jnp.eye(values.shape[0], dtype=values.dtype))
    return values, jnp.maximum(variances, 0), (solutions, reached)


def _missing(point: Point, hierarchy: Hierarchy) -> Int[Array, " structures"]:
    """How many columns of each structure do not stand out."""
    return jnp.stack([hierarchy.rank(s) - _of_structure(point, hierarchy, s).sum() for s in hierarchy.structures])


def _of_structure(point: Point, hierarchy: Hierarchy, structure: Structure) -> Bool[Array, " K"]:
    """Which columns stand out in just the modalities of a structure."""
    seen = jnp.array([[m in structure] for m in hierarchy.modalities])
    return (point.support == seen).all(axis=0)


def _status(estimate: Estimate, reached: Array, solved: Bool[Array, " q"], boundary: Bool[Array, " q"]) -> Int[Array, " q"]:
    """The first of the reasons that holds."""
    converged = reached & (estimate.status == CONVERGED)
    status = jnp.where(solved, jnp.where(boundary, BOUNDARY, VALID), OUT_OF_CG_STEPS)
    if estimate.method not in EFFICIENT:
        status = jnp.full_like(status, INEFFICIENT)
    return jnp.where(converged, status, NOT_CONVERGED)


def _normal_quantile(probability: float, dtype: Any) -> Float[Array, ""]:
    return jax.scipy.stats.norm.ppf(jnp.asarray(probability, dtype))


@eqx.filter_jit
def _delta(quantity: Quantity, estimate: Estimate, covariance: SampleCovariance, hierarchy: Hierarchy, level: float) -> Interval:
    point, reached = supported_point(estimate, covariance, hierarchy)
    values, variances, (_, solved) = _moments(point, covariance.nu, quantity)
    missing = _missing(point, hierarchy).sum() > 0
    return _symmetric(values, variances, level, _status(estimate, reached, solved, jnp.broadcast_to(missing, solved.shape)))


def _symmetric(values: Array, variances: Array, level: float, status: Array) -> Interval:
    error = jnp.sqrt(variances)
    width = error * _normal_quantile((1 + level) / 2, error.dtype)
    return Interval(values, error, values - width, values + width, status)


@eqx.filter_jit
def _gram(entries: Array, estimate: Estimate, covariance: SampleCovariance, hierarchy: Hierarchy, level: float) -> Interval:
    i, j = entries[:, 0], entries[:, 1]
    point, reached = supported_point(estimate, covariance, hierarchy)
    values, variances, (_, solved) = _moments(point, covariance.nu, lambda F: jnp.sum(F[i] * F[j], axis=1))
    seen = jnp.asarray(np.array([[m in s for s in hierarchy.structures] for m in hierarchy.modalities]))
    modality = jnp.asarray(hierarchy.modality_of_feature)
    missing = ((seen[modality[i]] & seen[modality[j]]) * _missing(point, hierarchy)[None]).sum(axis=1) > 0
    sampled = jax.vmap(lambda a, b: covariance.block(a[None], b[None])[0, 0])(i, j)
    spreads = covariance.variances()
    own = (spreads[i] * spreads[j] + sampled**2) / covariance.nu
    sampled = jnp.where(i == j, sampled - point.fisher.psi[i], sampled)
    status = _status(estimate, reached, solved | missing, missing & (i == j))
    return _symmetric(jnp.where(missing, sampled, values), jnp.where(missing, own, variances), level, status)


@eqx.filter_jit
def _block_norms(blocks: tuple, estimate: Estimate, covariance: SampleCovariance, hierarchy: Hierarchy, level: float) -> Interval:
    nu = covariance.nu
    point, reached = supported_point(estimate, covariance, hierarchy)
    columns = [_of_structure(point, hierarchy, s) for s, _ in blocks]

    def sums(matrix: Float[Array, "d K"]) -> Float[Array, " q"]:
        rows = [matrix[hierarchy.rows(m)] for _, m in blocks]
        return jnp.stack([jnp.sum(jnp.where(own[None], part, 0)) for own, part in zip(columns, rows, strict=True)])

    values, variances, (solutions, solved) = _moments(point, nu, lambda F: sums(F**2))
    excess = sums(_loading_variances(point, nu))
    cut = _truncation(point, nu, values, variances, solutions, jnp.stack(columns))
    lower, upper = _truncated(values, jnp.sqrt(variances), cut, level)
    present = jnp.stack([own.any() for own in columns])
    missing = jnp.stack([hierarchy.rank(s) - own.sum() for (s, _), own in zip(blocks, columns, strict=True)])
    hidden = missing * _undetected(point, nu, blocks, level)
    squares = [jnp.where(present, jnp.maximum(square - excess, 0), 0) for square in (values, lower, upper)]
    norm, lower, upper = jnp.sqrt(squares[0]), jnp.sqrt(squares[1]), jnp.sqrt(squares[2] + hidden)
    error = jnp.sqrt(variances) / (2 * jnp.where(norm > 0, norm, jnp.inf))
    return Interval(norm, error, lower, upper, _status(estimate, reached, solved | ~present, missing > 0))


def _undetected(point: Point, nu: Float[Array, ""], blocks: tuple, level: float) -> Float[Array, " q"]:
    """‖Λ_k^(m)‖² of a column that would have stood out with probability (1 + level)/2: the threshold, and as many standard
    errors (1 + λ)√(2/ν) of a strength above it, in units of the view's largest noise variance."""
    hierarchy, dtype = point.fisher.hierarchy, point.loadings.dtype
    z = _normal_quantile((1 + level) / 2, dtype)
    bounds = []
    for s, m in blocks:
        edge = noise_edge(nu, jnp.asarray(sum(hierarchy.dims[i - 1] for i in s), dtype)) / nu - 1
        bounds.append((edge + z * jnp.sqrt(2 / nu) * (1 + edge)) * point.fisher.psi[hierarchy.rows(m)].max())
    return jnp.stack(bounds)


def _truncation(
    point: Point, nu: Float[Array, ""], values: Array, variances: Array, solutions: Array, columns: Bool[Array, "q K"]
) -> Float[Array, " q"]:
    """What every squared norm must have exceeded for the block's columns to stand out, the rest of the data as it is: the
    strength of a column is β times the norm and a part independent of it."""
    strengths, thresholds = _weak_columns(point, nu)
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


def _check(level: float, estimate: Estimate, hierarchy: Hierarchy) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: is {level}; expected a number between 0 and 1")
    if estimate.loadings.shape[-2:] != hierarchy.mask.shape:
        raise ValueError(f"estimate: has loadings of shape {estimate.loadings.shape}; expected {hierarchy.mask.shape}")


def _check_rotations(quantity: Quantity, estimate: Estimate, hierarchy: Hierarchy) -> None:
    """Raise `ValueError` if rotating the columns of every structure changes the quantity. (Traced loadings are not checked.)"""
    if isinstance(estimate.loadings, jax.core.Tracer):
        return
    rng = np.random.default_rng(PROBE_SEED)
    F = np.where(hierarchy.mask, np.asarray(estimate.loadings), 0)
    rotated = F.copy()
    for columns in map(hierarchy.columns, hierarchy.structures):
        rotated[:, columns] = F[:, columns] @ np.linalg.qr(rng.standard_normal((columns.stop - columns.start,) * 2))[0]
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

    `quantity` maps d × K loadings to a vector. Valid only where every column that the hierarchy offers stands out of the noise:
    of a function it is not known where hidden columns enter. Raises `ValueError` for a level outside (0, 1), and for a quantity
    that changes when a structure's columns are rotated. Compiled once for a `quantity`: pass the same function again.
    """
    _check(level, estimate, hierarchy)
    _check_rotations(quantity, estimate, hierarchy)
    return _delta(quantity, estimate, covariance, hierarchy, level)


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
    _check(level, estimate, hierarchy)
    return _gram(jnp.asarray(_as_entries(entries, hierarchy)), estimate, covariance, hierarchy, level)


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
    would have been detected with probability (1 + level)/2. Raises `ValueError` for a block that the hierarchy holds at zero.
    """
    _check(level, estimate, hierarchy)
    return _block_norms(_as_blocks(blocks, hierarchy), estimate, covariance, hierarchy, level)


def _as_blocks(blocks: Sequence[tuple[Any, int]], hierarchy: Hierarchy) -> tuple[tuple[Structure, int], ...]:
    known = []
    for s, m in blocks:
        structure = _as_structure(s, hierarchy)
        if structure not in hierarchy.structures or m not in structure:
            raise ValueError(
                f"blocks: ({s!r}, {m!r}) is not a block of the hierarchy; expected a structure of it and one of its modalities"
            )
        known.append((structure, int(m)))
    return tuple(known)


def _as_structure(value: Any, hierarchy: Hierarchy) -> Structure:
    return tuple(sorted(int(m) for m in value))


def without_rotations(V: Float[Array, "d K"], loadings: Float[Array, "d K"], same: Bool[Array, "K K"]) -> Float[Array, "d K"]:
    """V less its part along the rotations FA, A skew-symmetric among columns of the `same` group: where the information is zero.

    In the axes where FᵀF, other groups left out, is diag(λ), the nearest A has A_kl = (FᵀV − VᵀF)_kl/(λ_k + λ_l).
    """
    values, axes = jnp.linalg.eigh(jnp.where(same, loadings.T @ loadings, 0))
    skew = axes.T @ jnp.where(same, loadings.T @ V - V.T @ loadings, 0) @ axes
    sums = values[:, None] + values[None, :]
    known = sums > 100 * jnp.finfo(values.dtype).eps * values[-1]
    A = axes @ jnp.where(known, skew / jnp.where(known, sums, 1), 0) @ axes.T
    return V - loadings @ jnp.where(same, A, 0)


def _loading_variances(point: Point, nu: Float[Array, ""]) -> Float[Array, "d K"]:
    """d × K numbers whose sums over a block are the trace of its covariance (Hutchinson's estimate), rotations left out."""
    same, F = _same_support(point.support), point.loadings

    def probe(key: Array) -> Float[Array, "d K"]:
        signs = jnp.where(point.rows, jr.rademacher(key, F.shape, F.dtype), 0)
        V, _ = _solve(point, (without_rotations(signs, F, same), jnp.zeros_like(point.noise)))
        return without_rotations(V, F, same) * signs

    return jax.lax.map(probe, jr.split(jr.key(PROBE_SEED), PROBES)).mean(axis=0) / nu
