"""Rows that lack whole views: moments by pattern of presence, and what is fitted to them (theory: Section 7)."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.compiled import compiled
from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators.estimate import Estimate, check_iterative, finished, stopping_tolerance
from hcl_jax.estimators.fixed_point import ascend
from hcl_jax.estimators.likelihood import hcl_ml, noise_floor, starting_point
from hcl_jax.fisher import apply_by_modality, check_noise, inverses_of_seen, noise_by_feature, pool, spread
from hcl_jax.linalg import spd_inverse
from hcl_jax.structure import Hierarchy
from hcl_jax.views import Numbers, as_views, deviations, presence_of

ROWS = 4096  # at a time, where each is multiplied by a matrix of its own
BLOCK = 128  # rows are filled up to a multiple of it: other draws of a presence then find the program that is there


def patterns_of(present: Numbers) -> tuple[np.ndarray, Any]:
    """(the patterns of presence that occur, the number of each row's). Inside compiled code, where it cannot be seen which do
    occur, all 2^M of them."""
    if isinstance(present, jax.core.Tracer):
        table = np.array(list(product((False, True), repeat=present.shape[1])))
        return table, jnp.sum(jnp.where(present, 2 ** np.arange(present.shape[1])[None, ::-1], 0), axis=1)
    table, pattern = np.unique(np.asarray(present), axis=0, return_inverse=True)
    return table, pattern.reshape(-1)


class PatternMoments(eqx.Module):
    """Counts, means and second moments of rows by pattern of presence, which is the set of views that a row has.

    The second moments of pattern P are those of `rows`, of which some belong to it: n_P deviations from its mean where it has no
    more rows than features, else as many rows as features with the same inner products; further rows are 0. All are 0 where a
    view is absent. Rows without any view count for nothing.

    >>> x = np.array([[1.0, 2.0], [3.0, 0.0], [5.0, 1.0]])
    >>> moments = PatternMoments.from_data([x, x[:, :1]], np.array([[True, True], [True, False], [True, True]]))
    >>> moments.present.tolist(), moments.counts.tolist()
    ([[True, False], [True, True]], [1.0, 2.0])
    """

    rows: Float[Array, "rows d"]
    pattern: Int[Array, " rows"]
    present: Bool[Array, "P M"]
    means: Float[Array, "P d"]
    """Less the centre."""
    counts: Float[Array, " P"]
    centre: Float[Array, " d"]
    """The mean of every feature over the rows that have it."""
    dims: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def from_data(cls, views: Any, presence: Any = None) -> "PatternMoments":
        """The moments of the samples of all views, which are what `as_views` takes: a view that a row lacks is NaN throughout, or
        False in `presence` (n × M), whatever then stands there.

        Under `jit` and `vmap` too, where all 2^M patterns have a place. Raises `ValueError` as
        `as_views` does; for NaN in some cells of a row's view, with their number; and for a view that no row has.
        """
        read = as_views(views, absent=True)
        X, present = read.joined(), presence_of(read, presence)
        traced = any(isinstance(array, jax.core.Tracer) for array in (X, present))
        xp: Any = jnp if traced else np
        X, present, dims = xp.asarray(X), xp.asarray(present), read.dims
        for name, rows in zip(read.names, present.T, strict=True):
            if not traced and not rows.any():
                raise ValueError(f"views: {name} is absent from all {len(rows)} rows; expected some that have it")
        of_feature = np.repeat(np.arange(len(dims)), dims)
        seen = present[:, of_feature]
        edges = np.cumsum(dims)[:-1]
        parts = zip(np.split(np.arange(sum(dims)), edges), present.T, strict=True)
        centred = [deviations(xp.where(rows[:, None], X[:, columns], 0), rows) for columns, rows in parts]
        X, centre = (xp.concatenate(halves, axis=-1) for halves in zip(*centred, strict=True))
        table, pattern = patterns_of(present)
        belongs = (pattern[None, :] == np.arange(len(table))[:, None]).astype(X.dtype)
        counts = belongs.sum(axis=1) * table.any(axis=1).astype(X.dtype)
        means = belongs @ X / xp.maximum(counts, 1)[:, None]
        rows = xp.where(seen, X - means[pattern], 0)
        if not traced:
            rows, pattern = _fewest_rows(rows, pattern, table[:, of_feature])
        dtype = jax.dtypes.canonicalize_dtype(X.dtype)
        rows, means, counts, centre = (jnp.asarray(array, dtype) for array in (rows, means, counts, centre))
        return cls(rows, jnp.asarray(pattern), jnp.asarray(table), means, counts, centre, dims)

    @property
    def n(self) -> Float[Array, ""]:
        """The rows that have a view."""
        return self.counts.sum()

    @property
    def degrees(self) -> Float[Array, " P"]:
        """ν_P = n_P(N − 1)/N: ν = N − 1 degrees of freedom in all, so that one pattern has S with divisor ν."""
        return self.counts * (self.n - 1) / self.n

    def divided_by(self, scale: Float[Array, " d"]) -> "PatternMoments":
        """The moments of the features in units of their own."""
        held = (self.rows / scale[None, :], self.means / scale[None, :], self.centre / scale)
        return eqx.tree_at(lambda m: (m.rows, m.means, m.centre), self, held)

    def by_feature(self, table: Array) -> Array:
        """The columns of an … × M table, repeated over the features of their views."""
        return jnp.repeat(table, np.array(self.dims), axis=-1, total_repeat_length=sum(self.dims))

    def weights(self) -> Float[Array, " d"]:
        """The share of the degrees of freedom that each feature has: 1 where no row lacks its view."""
        return self.by_feature(self.degrees @ self.present.astype(self.means.dtype)) / (self.n - 1)

    def about(self, mean: Float[Array, " d"]) -> tuple[Float[Array, "all d"], Int[Array, " all"]]:
        """Rows with the second moments of every pattern about a mean (less the centre), √n_P(x̄_P − μ)_P the last of them, and
        their patterns."""
        shifts = jnp.sqrt(self.counts)[:, None] * (self.means - mean[None, :])
        shifts = jnp.where(self.by_feature(self.present), shifts, 0)
        numbers = jnp.arange(len(shifts), dtype=self.pattern.dtype)
        return jnp.concatenate([self.rows, shifts]), jnp.concatenate([self.pattern, numbers])

    def covariance(self) -> SampleCovariance:
        """The covariance with absent entries at the mean, and each view in the units that give it the variance of the rows that
        have it. It is S where all rows have all views."""
        rows, _ = self.about(jnp.zeros_like(self.centre))
        here = self.present.astype(rows.dtype)
        rows = rows * jnp.sqrt(self.n / self.by_feature(self.counts @ here))[None, :]
        if rows.shape[0] <= rows.shape[1]:
            return SampleCovariance(data=rows, n=self.n)
        return SampleCovariance(rows.T @ rows / (self.n - 1), n=self.n)


def _fewest_rows(rows: np.ndarray, pattern: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the same second moments by pattern: no more of each than it has features, and zeros to a multiple of `BLOCK` where
    there are several."""
    kept, numbers = [], []
    for p, columns in enumerate(seen):
        own = rows[pattern == p]
        if len(own) > columns.sum():
            triangle = np.linalg.qr(own[:, columns], mode="r")
            own = np.zeros((len(triangle), rows.shape[1]), rows.dtype)
            own[:, columns] = triangle
        kept.append(own)
        numbers.append(np.full(len(own), p))
    if len(seen) > 1:
        filling = -sum(map(len, kept)) % BLOCK
        kept.append(np.zeros((filling, rows.shape[1]), rows.dtype))
        numbers.append(np.zeros(filling, int))
    return np.concatenate(kept), np.concatenate(numbers)


class Point(NamedTuple):
    """Loadings, a noise variance for every feature, and means (less the centre)."""

    loadings: Float[Array, "d K"]
    psi: Float[Array, " d"]
    mean: Float[Array, " d"]


def view_grams(loadings: Float[Array, "d K"], psi: Float[Array, " d"], dims: Sequence[int]) -> Float[Array, "M K K"]:
    """Λ^(m)ᵀΨ_m⁻¹Λ^(m) of every view: what it says of the scores."""
    edges, weighted = np.cumsum((0, *dims)), loadings / psi[:, None]
    return jnp.stack([loadings[a:b].T @ weighted[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)])


@compiled
def posterior_covariances(
    grams: Float[Array, "M K K"], present: Bool[Array, "P M"]
) -> tuple[Float[Array, "P K K"], Float[Array, " P"]]:
    """V_P = (I + Λ_PᵀΨ_P⁻¹Λ_P)⁻¹ = Var(z | the views of P), and −log det V_P, of every pattern, from `view_grams`."""
    precisions = jnp.einsum("pm,mkl->pkl", present.astype(grams.dtype), grams)
    return jax.lax.map(spd_inverse, precisions + jnp.eye(grams.shape[1], dtype=grams.dtype)[None])


@compiled
def by_own_matrix(rows: Float[Array, "n K"], matrices: Float[Array, "P K K"], pattern: Int[Array, " n"]) -> Float[Array, "n K"]:
    """Every row times the matrix of its pattern, some thousand rows at a time."""
    return jax.lax.map(lambda row: row[0] @ matrices[row[1]], (rows, pattern), batch_size=ROWS)


def posterior_scores(
    X: Float[Array, "n d"],
    present: Bool[Array, "n M"],
    loadings: Float[Array, "d K"],
    psi: Float[Array, " d"],
    dims: Sequence[int],
) -> tuple[Float[Array, "n K"], Float[Array, "P K K"], Int[Array, " n"]]:
    """(E[z | the views that a row has], Var(z | …) by pattern of presence, the pattern of each row), for rows less their mean.

    V_PΛ_PᵀΨ_P⁻¹x_P and V_P (theory: Section 7). What stands in absent views does not count; a row without any has 0 and I.
    """
    table, pattern = patterns_of(present)
    V, _ = posterior_covariances(view_grams(loadings, psi, dims), jnp.asarray(table))
    seen = present[:, np.repeat(np.arange(len(dims)), dims)]
    pattern = jnp.asarray(pattern)
    return by_own_matrix(jnp.where(seen, X, 0) @ (loadings / psi[:, None]), V, pattern), V, pattern


class ExpectedScores(NamedTuple):
    """What the E step finds: sums over the rows that have a view, of x less the mean in force and of the scores z."""

    second: Float[Array, "M K K"]  # A_m = Σ E[zzᵀ]
    image: Float[Array, "d K"]  # B = Σ x E[z]ᵀ
    squares: Float[Array, " d"]  # Σ x²
    latent_mean: Float[Array, "M K"]  # of E[z]
    shift: Float[Array, " d"]  # the mean of x
    rows: Float[Array, " d"]  # how many
    log_det: Float[Array, ""]  # −Σ ν_P log det V_P/ν
    explained: Float[Array, ""]  # Σ (ΛᵀΨ⁻¹x)ᵀE[z]/ν
    excess: Float[Array, ""]  # Σ tr(E[zzᵀ] − I)/ν

    def centred(self, hierarchy: Hierarchy) -> "ExpectedScores":
        """The sums about the means of the rows."""
        first, rows = self.latent_mean, self.rows[_first_rows(hierarchy)]
        second = self.second - rows[:, None, None] * first[:, :, None] * first[:, None, :]
        image = self.image - (self.rows * self.shift)[:, None] * first[hierarchy.modality_of_feature]
        return self._replace(second=second, image=image, squares=self.squares - self.rows * self.shift**2)

    def best_shift(self, loadings: Float[Array, "d K"], hierarchy: Hierarchy) -> Float[Array, " d"]:
        """How far the mean that is best with the loadings is from the one in force."""
        return self.shift - jnp.sum(loadings * self.latent_mean[hierarchy.modality_of_feature], axis=1)


def _first_rows(hierarchy: Hierarchy) -> np.ndarray:
    """The first feature of every view."""
    return np.cumsum((0, *hierarchy.dims))[:-1]


def expected_scores(
    moments: PatternMoments,
    loadings: Float[Array, "d K"],
    psi: Float[Array, " d"],
    mean: Float[Array, " d"],
    grams: Float[Array, "M K K"],
) -> ExpectedScores:
    """The E step: z given the views that each row has, E[z] = V_PΛ_PᵀΨ_P⁻¹x_P, about a mean (less the centre)."""
    present, nu = moments.present.astype(psi.dtype), moments.n - 1
    V, log_det = posterior_covariances(grams, moments.present)
    rows, pattern = moments.about(mean)
    projected = rows @ (loadings / psi[:, None])
    z = by_own_matrix(projected, V, pattern)
    second = jnp.einsum("pm,p,pkl->mkl", present, moments.degrees, V) + jnp.einsum("nm,nk,nl->mkl", present[pattern], z, z)
    roots, n_patterns = jnp.sqrt(moments.counts), len(moments.counts)
    n = moments.counts @ present
    latent_mean = (present * roots[:, None]).T @ z[-n_patterns:] / n[:, None]
    shift = roots @ rows[-n_patterns:] / moments.by_feature(n)
    freedom = jnp.trace(V, axis1=1, axis2=2) - loadings.shape[1]
    return ExpectedScores(
        second=second,
        image=rows.T @ z,
        squares=jnp.sum(rows**2, axis=0),
        latent_mean=latent_mean,
        shift=shift,
        rows=moments.by_feature(n),
        log_det=moments.degrees @ log_det / nu,
        explained=jnp.sum(projected * z) / nu,
        excess=(moments.degrees @ freedom + jnp.sum(z**2)) / nu,
    )


def _likelihood_sweep(
    moments: PatternMoments, hierarchy: Hierarchy, noise: str, floor: Float[Array, " d"], at: Point
) -> tuple[Point, Float[Array, ""]]:
    """One step of expectation and maximisation, and 2/ν times the log-likelihood (without log 2π) before it.

    Λ^(m)_a = B_m A_m⁻¹ and the mean jointly: the regression of a view's rows on E[z], with an intercept.
    """
    F, psi, mean = at
    found = expected_scores(moments, F, psi, mean, view_grams(F, psi, hierarchy.dims))
    weights = moments.weights()
    deviance = weights @ jnp.log(psi) + jnp.sum(found.squares / psi) / (moments.n - 1) + found.log_det - found.explained
    centred = found.centred(hierarchy)
    loadings = apply_by_modality(centred.image, inverses_of_seen(centred.second, hierarchy), hierarchy)
    left = pool(centred.squares - jnp.sum(loadings * centred.image, axis=1), hierarchy, noise) / (moments.n - 1)
    new_psi = jnp.maximum(spread(left / pool(weights, hierarchy, noise), hierarchy, noise), floor)
    return Point(loadings, new_psi, mean + found.best_shift(loadings, hierarchy)), -deviance


def check_by_pattern(moments: Any, hierarchy: Hierarchy, tolerance: float | None, max_steps: int) -> None:
    """Raise `ValueError` as `check_iterative` does, and unless every view is seen by more rows than it sees factors, and the
    views of every structure are linked by rows that have two of them: its factors could else be rotated in one view alone."""
    if not isinstance(moments, PatternMoments):
        kind = type(moments).__name__
        raise ValueError(f"moments: is of type {kind}; expected PatternMoments, such as PatternMoments.from_data(views)")
    check_iterative(SampleCovariance(data=moments.rows, n=moments.n), hierarchy, tolerance, max_steps)
    if moments.dims != hierarchy.dims:
        raise ValueError(f"hierarchy: has dims {hierarchy.dims}; expected {moments.dims}, as the moments have")
    if isinstance(moments.counts, jax.core.Tracer):
        return
    present = np.asarray(moments.present, float)
    check_links(present.T @ (present * np.asarray(moments.counts)[:, None]), hierarchy)


def check_links(together: np.ndarray, hierarchy: Hierarchy) -> None:
    """Raise `ValueError` unless enough rows have each view and link those of each structure; `together` (M × M) counts the rows
    that have both of two views."""
    for m in hierarchy.modalities:
        rows, factors = int(together[m - 1, m - 1]), len(hierarchy.active_columns(m))
        if rows < factors + 2:
            raise ValueError(f"views: {rows} rows have view {m}, which sees {factors} factors; expected at least {factors + 2}")
    for s in hierarchy.structures:
        inside = together[np.ix_(np.array(s) - 1, np.array(s) - 1)] > 0
        linked = np.linalg.matrix_power(inside.astype(int), len(s)) > 0
        if not linked.all():
            i, j = np.argwhere(~linked)[0]
            raise ValueError(
                f"views: no rows link views {s[i]} and {s[j]}, which share the structure {s}; expected some that have both, or a "
                "chain of such rows through its other views"
            )


@compiled(check=check_by_pattern)
def hcl_ml_by_pattern(
    moments: PatternMoments,
    hierarchy: Hierarchy,
    *,
    noise: str = "shared",
    tolerance: float | None = None,
    max_steps: int = 1500,
) -> tuple[Estimate, Float[Array, " d"]]:
    """(`hcl-ml`, mean) from rows that may lack views: maximises the likelihood of what is there over masked loadings, noise
    variances and means.

    Right where presence depends on nothing, or on what is present (missing at random). Steps of expectation and maximisation,
    accelerated so that the likelihood never falls, until two running gain less than `tolerance` (1e-10 in float64, 1e-6 in
    float32) of 2/(νd) log-likelihood. The objective is −2 log-likelihood/ν with ν_P = n_P(N − 1)/N for n_P; where all rows have
    all views, everything is `hcl_ml` of their covariance. Raises `ValueError` for K ≥ ν, an unknown kind of noise, a view that
    too few rows have, and a structure whose views no rows link.
    """
    check_noise(noise)
    if len(moments.counts) == 1:
        fit = hcl_ml(moments.covariance(), hierarchy, noise=noise, tolerance=tolerance, max_steps=max_steps)
        return fit, moments.centre
    covariance, root = moments.covariance().in_unit_scale()
    unit = moments.divided_by(jnp.broadcast_to(root, moments.centre.shape))
    sweep = partial(_likelihood_sweep, unit, hierarchy, noise, noise_floor(covariance, hierarchy, noise))
    fit, mean = maximise_by_sweeps(sweep, covariance, root, moments.weights(), hierarchy, noise, tolerance, max_steps)
    return fit, moments.centre + mean


def maximise_by_sweeps(
    sweep: Callable[[Point], tuple[Point, Float[Array, ""]]],
    covariance: SampleCovariance,
    root: Float[Array, ""],
    weights: Float[Array, " d"],
    hierarchy: Hierarchy,
    noise: str,
    tolerance: float | None,
    max_steps: int,
) -> tuple[Estimate, Float[Array, " d"]]:
    """(`hcl-ml`, mean) by sweeps point ↦ (image, 2/ν log-likelihood) in data that are 1/`root` as large, accelerated, from what
    their covariance with missing entries at the mean suggests; the estimate is scaled back."""
    loadings, groups = starting_point(covariance, hierarchy, noise)
    floor, size = noise_floor(covariance, hierarchy, noise), hierarchy.mask.size
    start = Point(loadings, jnp.maximum(spread(groups, hierarchy, noise), floor), jnp.zeros_like(floor))

    def flatten(at: Point) -> Float[Array, " size"]:
        return jnp.concatenate([at.loadings.ravel(), jnp.log(at.psi), at.mean])

    def unflatten(vector: Float[Array, " size"], like: Point) -> Point:
        psi, mean = jnp.split(vector[size:], 2)
        return Point(vector[:size].reshape(like.loadings.shape), jnp.maximum(jnp.exp(psi), floor), mean)

    gain = stopping_tolerance(tolerance, floor.dtype, double=1e-10, single=1e-6)
    features = jnp.asarray(hierarchy.n_features, floor.dtype)
    end, _, steps, converged = ascend(sweep, flatten, unflatten, start, features, gain, max_steps)
    objective = weights.sum() * jnp.log(2 * jnp.pi * root**2) - sweep(end)[1]
    reported = end.psi[0] if noise == "shared" else end.psi
    fit = finished(end.loadings, reported, converged, steps, objective, on_bound=(end.psi <= floor).any(), noise=noise)
    fit = dataclasses.replace(fit, loadings=root * fit.loadings, noise_variance=root**2 * fit.noise_variance, method="hcl-ml")
    return fit, root * end.mean


@compiled
def regression_spread(
    moments: PatternMoments, hierarchy: Hierarchy, fit: Estimate, mean: Float[Array, " d"]
) -> Float[Array, "M p p"]:
    """S_m, what estimating a view's loadings, mean and noise adds to the variance of its prediction: with scores z of which V is
    the posterior covariance, feature j of it has λ_jᵀVλ_j + ψ_j(1 + (1, z)ᵀS_m(1, z) + tr S_m,zz V).

    By the regression of the N_m rows of a view on the scores E[z], with an intercept: its coefficients have covariance
    ψ_j (Σ(1, z)(1, z)ᵀ)⁻¹ with ψ_jN_m/(N_m − K_m − 1) for ψ_j, K_m the factors that the view sees. The scores are taken as known,
    as in C_m of the variational posterior (theory: Section 3).
    """
    psi = noise_by_feature(fit.noise_variance, hierarchy.n_features)
    grams = view_grams(fit.loadings, psi, hierarchy.dims)
    found = expected_scores(moments, fit.loadings, psi, mean - moments.centre, grams)
    inverses, centre = inverses_of_seen(found.centred(hierarchy).second, hierarchy), found.latent_mean
    cross = -jnp.einsum("mkl,ml->mk", inverses, centre)
    n = found.rows[_first_rows(hierarchy)]
    factors = jnp.asarray(hierarchy.modality_mask.sum(axis=1), psi.dtype)
    lost = n / jnp.maximum(n - factors - 1, 1)
    first = 1 / n - jnp.sum(cross * centre, axis=1) + (lost - 1) / lost
    top = jnp.concatenate([first[:, None, None], cross[:, None, :]], axis=2)
    return lost[:, None, None] * jnp.concatenate([top, jnp.concatenate([cross[:, :, None], inverses], axis=2)], axis=1)


def predicted_variances(
    scores: Float[Array, "n K"],
    posterior: Float[Array, "P K K"],
    pattern: Int[Array, " n"],
    loadings: Float[Array, "d K"],
    psi: Float[Array, " d"],
    dims: Sequence[int],
    spread: Float[Array, "M p p"] | None = None,
) -> Float[Array, "n d"]:
    """Variances of the features of rows whose scores have a posterior, as if each were absent: those of Λ^(m)V_PΛ^(m)ᵀ + Ψ_m, and
    what `regression_spread` adds where it is given."""
    of_latents = jnp.stack([jnp.sum((loadings @ V) * loadings, axis=1) for V in posterior])
    variances = (of_latents + psi[None, :])[pattern]
    if spread is None:
        return variances
    with_one = jnp.concatenate([jnp.ones_like(scores[:, :1]), scores], axis=1)
    of_row = (
        jnp.einsum("nk,mkl,nl->nm", with_one, spread, with_one) + jnp.einsum("mkl,pkl->pm", spread[:, 1:, 1:], posterior)[pattern]
    )
    return variances + psi[None, :] * of_row[:, np.repeat(np.arange(len(dims)), dims)]
