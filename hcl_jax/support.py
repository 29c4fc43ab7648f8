"""The maximum of the likelihood on those columns of the loadings that stand out of the noise: where intervals are taken.

From an estimate's columns, Fisher scoring to the maximum; then columns, and blocks of columns, that noise alone could have made
are put to zero, one round after the other. A column that stands out in one view only is a private one, whatever it was offered
as: beside an absent structure the columns of its views rotate into it at no cost.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.compiled import compiled
from hcl_jax.covariance import SampleCovariance
from hcl_jax.fisher import FisherOperator, Parameters, group_sizes, noise_by_feature, pool, spread
from hcl_jax.structure import Hierarchy, Structure

CG_TOLERANCE, CG_STEPS = 1e-6, 300
STEP_TOLERANCE, STEP_CG_STEPS = 1e-3, 50  # of the solves on the way to the maximum
DECREMENT = {"float64": 1e-4, "float32": 1e-2}
"""Twice the log-likelihood still to gain at which the maximum is reached: a hundredth of a standard error, and a tenth in single
precision, which holds no more of it."""
SCORING_STEPS = 60
SOLVES_TOGETHER = 16
EDGE_QUANTILE = 4.36  # the 99.99 % quantile of the Tracy–Widom law of real matrices: a hierarchy may offer a hundred columns

Quantity = Callable[[Float[Array, "d K"]], Float[Array, " q"]]


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
    image = covariance.product(scaled) @ fisher.inverse
    along, change = fisher.minus_half_gradient(image, variances)
    return Point(F, noise, support, rows, fisher, (jnp.where(rows, along, 0), change), fisher.deviance(image, variances))


def _dot(a: Parameters, b: Parameters) -> Float[Array, ""]:
    return jnp.sum(a[0] * b[0]) + jnp.sum(a[1] * b[1])


def solve(point: Point, right: Parameters, tolerance: float = CG_TOLERANCE, max_steps: int = CG_STEPS) -> Parameters:
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
        V, change = solve(at, at.gradient, STEP_TOLERANCE, STEP_CG_STEPS)
        noise = jnp.maximum(at.noise + t * change, at.noise / 4)
        new = _point(covariance, fisher.hierarchy, fisher.noise, at.loadings + t * V, noise, at.support)
        rounding = 10 * jnp.finfo(t.dtype).eps * jnp.abs(at.deviance)
        better = new.deviance <= at.deviance + rounding
        kept = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, at)
        decrement = covariance.nu * _dot(at.gradient, (V, change))
        return kept, decrement, jnp.where(better, jnp.minimum(1, 2 * t), t / 4), i + 1

    one, enough = jnp.ones((), start.loadings.dtype), DECREMENT[start.loadings.dtype.name]
    state = (start, jnp.inf * one, one, 0)
    at, decrement, _, _ = jax.lax.while_loop(lambda s: ~(s[1] <= enough) & (s[3] < SCORING_STEPS), step, state)
    return at, decrement <= enough


def same_support(support: Bool[Array, "M K"]) -> Bool[Array, "K K"]:
    """Which columns are seen by the same views, and so free to rotate into each other."""
    return (support[:, :, None] == support[:, None, :]).all(axis=0)


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


def _in_axes_of(gram: Float[Array, "K K"], point: Point) -> Float[Array, "d K"]:
    """The loadings with the matrix diagonal among columns of the same support, its least values first.

    One decomposition: groups of columns are set apart by shifts of the diagonal, so that each keeps its places.
    """
    same = same_support(point.support)
    group = jnp.argmax(same, axis=1)
    gram = jnp.where(same, gram, 0)
    shifts = (2 * jnp.trace(gram)) * group.astype(gram.dtype)
    axes = jnp.linalg.eigh(gram + jnp.diag(shifts))[1]
    return jnp.zeros_like(point.loadings).at[:, jnp.argsort(group, stable=True)].set(point.loadings @ axes)


def noise_edge(a: Any, b: Any) -> Any:
    """What the largest eigenvalue of XᵀX, X an a × b matrix of standard normal noise, exceeds in one of ten thousand draws
    (Johnstone, 2001)."""
    roots = jnp.sqrt(a) + jnp.sqrt(b)
    return roots**2 + EDGE_QUANTILE * roots * (1 / jnp.sqrt(a) + 1 / jnp.sqrt(b)) ** (1 / 3)


def column_strengths(point: Point, nu: Float[Array, ""]) -> tuple[Float[Array, " K"], Float[Array, " K"], Float[Array, " K"]]:
    """(λ_k, the strength that noise of as many features makes, what λ_k must exceed) for columns in principal axes: that, and as
    many of λ_k's standard errors as it is of its own; they are larger where columns are hard to tell from others."""
    dims = jnp.asarray(point.fisher.hierarchy.dims, point.loadings.dtype)
    edge = noise_edge(nu, jnp.maximum(dims @ point.support.astype(dims.dtype), 1)) / nu - 1
    strengths = lambda F: jnp.sum(F**2 / point.fisher.psi[:, None], axis=0)  # noqa: E731
    values, variances, _ = moments(point, nu, strengths)
    return values, edge, jnp.maximum(edge, edge * jnp.sqrt(nu / 2) / (1 + edge) * jnp.sqrt(variances))


def _weak_blocks(point: Point, nu: Float[Array, ""]) -> tuple[Bool[Array, "M K"], Float[Array, "d K"]]:
    """(blocks, the loadings in axes where these are columns): of columns that several views see, a view in which some rotation
    of them does no more than noise regressed on the factors that the other views show: variance (1 + 1/λ)ψ/ν an entry, at most
    over their rotations. Of the views of a group the one that stands out least; the others have their turn in later rounds."""
    hierarchy, support = point.fisher.hierarchy, point.support
    same, scaled = same_support(support), point.loadings / jnp.sqrt(point.fisher.psi)[:, None]
    shared = support & (support.sum(axis=0)[None] > 1)
    rotated, ratios = [], []
    for m in hierarchy.modalities:
        own = scaled[hierarchy.rows(m)]
        F = _in_axes_of(own.T @ own, point)
        squares = pool(F**2 / point.fisher.psi[:, None], hierarchy, "view")
        others = squares.sum(axis=0) - squares[m - 1]
        rivals = same_support(support.at[m - 1].set(False)).sum(axis=1).astype(F.dtype)
        noise = noise_edge(jnp.asarray(hierarchy.dims[m - 1], F.dtype), rivals) / nu * (1 + 1 / jnp.where(others > 0, others, 1))
        rotated.append(F)
        ratios.append(jnp.where(shared[m - 1], squares[m - 1] / noise, jnp.inf))
    ratio = jnp.stack(ratios)
    in_group = jnp.where(same[None], ratio[:, None, :], jnp.inf).min(axis=2)  # so that a group's columns choose the same view
    chosen = jnp.argmin(in_group, axis=0)[None] == jnp.arange(len(ratios))[:, None]
    return chosen & (ratio < 1), jnp.where(chosen[:, None], jnp.stack(rotated), 0).sum(axis=0)


def _to_drop(point: Point, nu: Float[Array, ""]) -> tuple[Bool[Array, "M K"], Float[Array, "d K"]]:
    """(what noise alone could have made, the loadings in axes where it stands alone): blocks first, since they may turn a shared
    column into a private one; then columns no stronger than noise; then the weakest of those that are uncertain, since without
    it the others may not be."""
    blocks, rotated = _weak_blocks(point, nu)
    strengths, edges, thresholds = column_strengths(point, nu)
    present = point.support.any(axis=0)
    noise, ratios = present & (strengths < edges), jnp.where(present, strengths / thresholds, jnp.inf)
    columns = jnp.where(noise.any(), noise, (ratios < 1) & (ratios == ratios.min()))
    drop = jnp.where(blocks.any(), blocks, point.support & columns[None])
    return drop, jnp.where(blocks.any(), rotated, point.loadings)


@compiled
def supported_point(
    loadings: Float[Array, "d K"],
    noise_variance: Float[Array, "..."],
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    kind: str,
) -> tuple[Point, Bool[Array, ""]]:
    """(maximum of the likelihood on the columns that stand out of the noise, whether it was reached), the columns of the same
    views in principal axes. The start is any estimate of the loadings and of noise variances of that kind; what is zero in a
    view stays zero."""
    F = jnp.where(hierarchy.mask, loadings, 0)
    sizes = jnp.asarray(group_sizes(hierarchy, kind), F.dtype)
    noise = pool(noise_by_feature(noise_variance, F.shape[0]), hierarchy, kind) / sizes

    def maximum(loadings, noise, support):
        at, reached = _maximum(covariance, _point(covariance, hierarchy, kind, loadings, noise, support))
        return _point(covariance, hierarchy, kind, _in_axes_of(at.fisher.gram, at), at.noise, support), reached

    def dropped(state):
        at, (drop, loadings), _, i = state
        at, reached = maximum(loadings, at.noise, at.support & ~drop)
        return at, _to_drop(at, covariance.nu), reached, i + 1

    support = pool(F**2, hierarchy, "view") > 0
    first = _point(covariance, hierarchy, kind, F, noise, support)
    state = (first, (jnp.zeros_like(support), F), jnp.array(False), jnp.array(0))
    go_on = lambda s: (s[1][0].any() | (s[3] == 0)) & (s[3] <= 2 * hierarchy.n_factors)  # noqa: E731
    at, (drop, _), reached, _ = jax.lax.while_loop(go_on, dropped, state)
    return at, reached & ~drop.any()


def moments(
    point: Point, nu: Float[Array, ""], quantity: Quantity
) -> tuple[Float[Array, " q"], Float[Array, " q"], tuple[Float[Array, "q d K"], Bool[Array, " q"]]]:
    """(values, variances gᵀ(νH)⁻¹g, (the (νH)⁻¹g along the loadings, whether each solve converged)), g the gradients."""
    values, pull_back = jax.vjp(quantity, point.loadings)
    same = same_support(point.support)

    def solved(direction: Float[Array, " q"]):
        gradient = jnp.where(point.rows, pull_back(direction)[0], 0)
        right = (without_rotations(gradient, point.loadings, same), jnp.zeros_like(point.noise))  # rounding left of them grows
        V, change = solve(point, right)
        left = point.fisher.product((V, change))
        residual = jnp.linalg.norm(jnp.where(point.rows, left[0], 0) - right[0])
        return jnp.sum(right[0] * V) / nu, V / nu, residual <= 1e-3 * jnp.linalg.norm(right[0])

    directions = jnp.eye(values.shape[0], dtype=values.dtype)
    variances, solutions, reached = jax.lax.map(solved, directions, batch_size=SOLVES_TOGETHER)
    return values, jnp.maximum(variances, 0), (solutions, reached)


def of_structure(point: Point, structure: Structure) -> Bool[Array, " K"]:
    """Which columns stand out in just the modalities of a structure."""
    seen = np.array([[m in structure] for m in point.fisher.hierarchy.modalities])
    return (point.support == seen).all(axis=0)


def missing_columns(point: Point) -> Int[Array, " structures"]:
    """How many columns of each structure do not stand out."""
    return jnp.stack([jnp.maximum(rank - of_structure(point, s).sum(), 0) for s, rank in point.fisher.hierarchy.ranks])
