"""Variational Bayes with automatic relevance determination (theory: Sections 3 and 7)."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.compiled import compiled
from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators.estimate import Estimate, check_iterative, finished, stopping_tolerance
from hcl_jax.estimators.fixed_point import ascend
from hcl_jax.estimators.likelihood import hcl_ml, noise_floor, positive_noise
from hcl_jax.estimators.missing import (
    ExpectedScores,
    PatternMoments,
    check_by_pattern,
    expected_scores,
    hcl_ml_by_pattern,
    view_grams,
)
from hcl_jax.fisher import apply_by_modality, check_noise, group_sizes, noise_by_feature, pool, spread
from hcl_jax.linalg import principal_axes, spd_inverse
from hcl_jax.structure import Hierarchy
from hcl_jax.views import check_count

START_TOLERANCE = 1e-3  # relative gradient of the maximum-likelihood start
START_GAIN = 1e-7  # of its likelihood, where rows lack views
FADED = 0.1  # relevance below which a column that the bound is better without is taken out
REFINED = 1e-2  # of the tolerance: where the second stage stops; at 1 it may end 16 % of the Gram matrix from its maximum
TAKEN = 0.2
"""Of the shrinkage that is best for the correlations themselves: the loadings lose more by too much than by too little."""


class Posterior(NamedTuple):
    """q(Λ) and the hyperparameters.

    Row j of modality m is normal with mean E[λ_j] and covariance C_j = A_m diag(c_j) A_mᵀ; its prior is N(0, Γ_m). Γ_m is zero on
    inactive columns and on those that were pruned.
    """

    mean: Float[Array, "d K"]
    axes: Float[Array, "M K K"]  # A_m
    shares: Float[Array, "d K"]  # c_j
    prior: Float[Array, "M K K"]  # Γ_m
    psi: Float[Array, " d"]
    centre: Float[Array, " d"] | None = None
    """The mean, where rows lack views."""

    @property
    def kept(self) -> Bool[Array, "M K"]:
        """The columns of each modality that are neither inactive nor pruned."""
        return jnp.diagonal(self.prior, axis1=1, axis2=2) > 0

    def scaled(self, root: Float[Array, ""]) -> "Posterior":
        """The posterior of data `root` times as large."""
        square = root**2
        centre = None if self.centre is None else root * self.centre
        return Posterior(root * self.mean, root * self.axes, self.shares, square * self.prior, square * self.psi, centre)

    def covariance_sums(self, weights: Float[Array, " d"], hierarchy: Hierarchy) -> Float[Array, "M K K"]:
        """Σ_j w_j C_j over the features of every modality."""
        sums = jnp.stack([weights[r] @ self.shares[r] for r in map(hierarchy.rows, hierarchy.modalities)])
        return (self.axes * sums[:, None, :]) @ jnp.swapaxes(self.axes, 1, 2)

    def second_moments(self, hierarchy: Hierarchy) -> Float[Array, "M K K"]:
        """E_m = E[Λ^(m)ᵀΛ^(m)]."""
        grams = jnp.stack([self.mean[r].T @ self.mean[r] for r in map(hierarchy.rows, hierarchy.modalities)])
        return grams + self.covariance_sums(jnp.ones_like(self.psi), hierarchy)

    def variances(self, hierarchy: Hierarchy) -> Float[Array, "d K"]:
        """(C_j)_kk."""
        rows = map(hierarchy.rows, hierarchy.modalities)
        return jnp.concatenate([self.shares[r] @ (A**2).T for r, A in zip(rows, self.axes, strict=True)])

    def scores(self, covariance: SampleCovariance, hierarchy: Hierarchy) -> "Scores":
        """The q(z) that maximises the bound given q(Λ)."""
        second = self.mean.T @ (self.mean / self.psi[:, None]) + self.covariance_sums(1 / self.psi, hierarchy).sum(axis=0)
        precision = jnp.eye(second.shape[0], dtype=second.dtype) + second
        C_z, log_det = spd_inverse(precision)
        B = self.mean / self.psi[:, None] @ C_z  # Bᵀ of the text
        image = covariance.product(B)
        return Scores(image, C_z + B.T @ image, precision, log_det)


class Scores(NamedTuple):
    """q(z): S Bᵀ, Ω, C_z⁻¹ and its log det."""

    image: Float[Array, "d K"]
    omega: Float[Array, "K K"]
    precision: Float[Array, "K K"]
    log_det_precision: Float[Array, ""]


class Expected(NamedTuple):
    """What q(z) says to the rest, a degree of freedom."""

    image: Float[Array, "d K"]  # S Bᵀ
    omegas: Float[Array, "M K K"]  # Ω, of the rows that have a modality
    variances: Float[Array, " d"]
    divergence: Float[Array, ""]  # 2 KL of q(z) from the prior
    about: ExpectedScores | None = None  # where the mean is a parameter


class Hyperprior(NamedTuple):
    """What each modality's Γ_m is drawn to: Γ_m = (1 − λ_m) E_m/d_m + λ_m D_m, the mode under an inverse Wishart law. Not in
    force, Γ_m is the diagonal of E_m/d_m."""

    shrinkage: Float[Array, " M"]  # λ_m
    target: Float[Array, "M K"]  # diag D_m
    in_force: Bool[Array, ""]


class _Vb:
    """The coordinate ascent of one problem."""

    def __init__(self, covariance: SampleCovariance, hierarchy: Hierarchy, noise: str, hyperprior: Hyperprior):
        self.S, self.hierarchy, self.noise, self.hyperprior = covariance, hierarchy, noise, hyperprior
        dtype = covariance.dtype
        self.rows = [hierarchy.rows(m) for m in hierarchy.modalities]
        self.dims = jnp.array(hierarchy.dims, dtype)
        self.eye = jnp.eye(hierarchy.n_factors, dtype=dtype)
        self.variances = covariance.variances()
        self.sizes = jnp.asarray(group_sizes(hierarchy, noise), dtype)
        self.floor = noise_floor(covariance, hierarchy, noise)
        self.weights = jnp.ones_like(self.variances)  # the share of the rows that have a feature

    def expected(self, at: Posterior) -> Expected:
        """The q(z) that maximises the bound given q(Λ)."""
        image, omega, _, log_det_precision = at.scores(self.S, self.hierarchy)
        divergence = jnp.trace(omega) - self.hierarchy.n_factors + log_det_precision
        omegas = jnp.broadcast_to(omega, (self.hierarchy.n_modalities, *omega.shape))
        return Expected(image, omegas, self.variances, divergence)

    def by_feature(self, table: Array) -> Array:
        """The rows of an M × K table, repeated over the features of their modalities."""
        return jnp.repeat(table, np.array(self.hierarchy.dims), axis=0, total_repeat_length=self.hierarchy.n_features)

    def best_prior(self, moments: Float[Array, "M K K"], kept: Bool[Array, "M K"]) -> Float[Array, "M K K"]:
        """Γ_m that maximises the bound, and the hyperprior's density where there is one, on the columns that are kept."""
        shrinkage, target, in_force = self.hyperprior
        scaled, shrinkage = moments / self.dims[:, None, None], shrinkage[:, None, None]
        drawn = (1 - shrinkage) * scaled + shrinkage * target[:, :, None] * self.eye[None]
        best = jnp.where(in_force, drawn, scaled * self.eye[None])
        return jnp.where(kept[:, :, None] & kept[:, None, :], best, 0)

    def roots(self, prior: Float[Array, "M K K"], kept: Bool[Array, "M K"]) -> Float[Array, "M K K"]:
        """Cholesky factors of Γ_m, with ones on the diagonal for columns that are not kept."""
        return jax.lax.map(jnp.linalg.cholesky, prior + jnp.where(kept, 0, 1)[:, :, None] * self.eye[None])

    def loadings(
        self, at: Posterior, roots: Float[Array, "M K K"], SB: Float[Array, "d K"], omegas: Float[Array, "M K K"]
    ) -> tuple[Posterior, Float[Array, "M K"]]:
        """q(Λ) that maximises the bound given the scores, and the eigenvalues w of each modality's Ω in units of its prior.

        C_j = (νΩ/ψ_j + Γ_m⁻¹)⁻¹ for all features of a modality by one eigenproblem: with Γ = RRᵀ and RᵀΩR = U diag(w) Uᵀ,
        A = RU and c_jk = 1/(1 + νw_k/ψ_j).
        """
        held = jnp.where(at.kept[:, :, None], roots, 0)
        w, U = jax.lax.map(jnp.linalg.eigh, jnp.swapaxes(held, 1, 2) @ omegas @ held)
        axes, w = held @ U, jnp.maximum(w, 0)
        precisions = self.S.nu / at.psi
        shares = 1 / (1 + precisions[:, None] * self.by_feature(w))
        mean = [(SB[r] @ axes[m] * shares[r] * precisions[r, None]) @ axes[m].T for m, r in enumerate(self.rows)]
        return at._replace(mean=jnp.concatenate(mean), axes=axes, shares=shares), w

    def sweep(self, at: Posterior) -> tuple[Posterior, Float[Array, ""]]:
        """One pass of coordinate maximisations, scores first, and the bound after it (with the hyperprior's density)."""
        nu, kept = self.S.nu, at.kept
        SB, omegas, variances, latent, about = self.expected(at)
        roots = self.roots(at.prior, kept)
        new, w = self.loadings(at, roots, SB, omegas)
        moments = new.second_moments(self.hierarchy)
        new = new._replace(prior=self.best_prior(moments, kept))
        explained = apply_by_modality(new.mean, omegas, self.hierarchy)
        misfit = variances - 2 * jnp.sum(new.mean * SB, axis=1) + jnp.sum(explained * new.mean, axis=1)
        misfit = misfit + jnp.concatenate([new.shares[r] @ w[m] for m, r in enumerate(self.rows)])
        if about is not None and at.centre is not None:
            shift = about.best_shift(new.mean, self.hierarchy)
            misfit, new = misfit - about.rows * shift**2 / nu, new._replace(centre=at.centre + shift)
        pooled = pool(misfit, self.hierarchy, self.noise) / pool(self.weights, self.hierarchy, self.noise)
        new = new._replace(psi=jnp.maximum(spread(pooled, self.hierarchy, self.noise), self.floor))
        fit = jnp.sum(self.weights * jnp.log(2 * jnp.pi * new.psi) + misfit / new.psi)
        bound = -nu / 2 * (fit + latent) - (self.divergence(new, moments, roots) - jnp.sum(jnp.log(new.shares))) / 2
        return self.without_faded(new, at.prior), bound

    def divergence(self, new: Posterior, moments: Float[Array, "M K K"], old_roots: Float[Array, "M K K"]) -> Float[Array, ""]:
        """2 KL of q(Λ), found with the old prior, from the new one, less the part of the shares c_j: tr Γ⁻¹E_m − d_mK_m + d_m log
        det Γ/Γ_old by modality, and −2 log of the hyperprior's density."""
        kept = new.kept
        inverses, log_det = self.inverted(self.roots(new.prior, kept))
        old_log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(old_roots, axis1=1, axis2=2)), axis=1)
        moments = jnp.where(kept[:, :, None] & kept[:, None, :], moments, 0)
        fitted = (
            jnp.sum(inverses * moments, axis=(1, 2))
            - self.dims * kept.sum(axis=1, dtype=self.dims.dtype)
            + self.dims * (log_det - old_log_det)
        )
        return jnp.sum(fitted) + self.drawn(inverses, log_det, kept)

    def drawn(self, inverses: Float[Array, "M K K"], log_det: Float[Array, " M"], kept: Bool[Array, "M K"]) -> Float[Array, ""]:
        """−2 log of the hyperprior's density, Σ_m λd_m/(1 − λ) (tr Γ⁻¹D + log det Γ), from Γ⁻¹ and log det Γ; 0 where it is not
        in force."""
        shrinkage, target, in_force = self.hyperprior
        strength = jnp.where(in_force, shrinkage / (1 - shrinkage), 0)
        traces = jnp.sum(jnp.where(kept, jnp.diagonal(inverses, axis1=1, axis2=2) * target, 0), axis=1)
        return jnp.sum(self.dims * strength * (traces + log_det))

    def without_hyperprior(self, bound: Float[Array, ""], at: Posterior) -> Float[Array, ""]:
        """The bound alone, which the hyperprior's density moves by a constant that has units."""
        return bound + self.drawn(*self.inverted(self.roots(at.prior, at.kept)), at.kept) / 2

    def inverted(self, roots: Float[Array, "M K K"]) -> tuple[Float[Array, "M K K"], Float[Array, " M"]]:
        """(Γ_m⁻¹, log det Γ_m) from Cholesky factors."""
        inverses = jax.lax.map(lambda R: jax.scipy.linalg.cho_solve((R, True), self.eye), roots)
        return inverses, 2 * jnp.sum(jnp.log(jnp.diagonal(roots, axis1=1, axis2=2)), axis=1)

    def without_faded(self, at: Posterior, prior: Float[Array, "M K K"]) -> Posterior:
        """The posterior without the columns, for good, that have faded and that the bound is better without; `prior` is the one
        that q(Λ) was found with.

        In the bound as a function of a column's prior variance alone, Σ_j (q_j² − s_j)/2 is the slope at 0, s_j = 1/C_jkk − α_k
        and q_j = E[λ_jk]/C_jkk: where it is negative there is nothing to gain (Tipping and Faul 2003).
        """
        variances = at.variances(self.hierarchy)
        held = jnp.where(variances > 0, variances, 1)
        prior_variances = jnp.diagonal(prior, axis1=1, axis2=2)
        alpha = self.by_feature(1 / jnp.where(prior_variances > 0, prior_variances, 1))
        slopes = jnp.where(variances > 0, (at.mean / held) ** 2 - 1 / held + alpha, 0)
        slope, square, spread_out = (pool(x, self.hierarchy, "view") for x in (slopes, at.mean**2, variances))
        gone = (slope < 0) & (square < FADED * spread_out) & ~self.hyperprior.in_force
        left = at.kept & ~gone
        prior = jnp.where(left[:, :, None] & left[:, None, :], at.prior, 0)
        mean = jnp.where(self.by_feature(gone), 0, at.mean)
        return at._replace(mean=mean, axes=jnp.where(gone[:, :, None], 0, at.axes), prior=prior)


class _VbByPattern(_Vb):
    """The same for rows that lack views; the mean is a parameter too."""

    def __init__(self, moments: PatternMoments, hierarchy: Hierarchy, noise: str, hyperprior: Hyperprior):
        super().__init__(moments.covariance(), hierarchy, noise, hyperprior)
        self.moments, self.weights = moments, moments.weights()

    def expected(self, at: Posterior) -> Expected:
        assert at.centre is not None, "the mean is a parameter"
        grams = view_grams(at.mean, at.psi, self.hierarchy.dims) + at.covariance_sums(1 / at.psi, self.hierarchy)
        found = expected_scores(self.moments, at.mean, at.psi, at.centre, grams)
        nu = self.moments.n - 1
        return Expected(found.image / nu, found.second / nu, found.squares / nu, found.excess + found.log_det, found)


def _starting_point(
    hierarchy: Hierarchy, loadings: Float[Array, "d K"], psi: Float[Array, " d"], nu: Float[Array, ""]
) -> Posterior:
    """Loadings that are known, under the prior that fits them: next to nothing where they are."""
    blocks = [loadings[:, hierarchy.columns(s)] for s in hierarchy.structures]
    mean = jnp.concatenate([block @ principal_axes(block) for block in blocks], axis=1)  # where relevance can be told apart
    seen, dtype = jnp.asarray(hierarchy.modality_mask), mean.dtype
    none = jnp.zeros((*seen.shape, seen.shape[1]), dtype)
    squares = pool(mean**2, hierarchy, "view") + 1e-6 * pool(psi, hierarchy, "view")[:, None] / nu
    prior = jnp.where(seen, squares / jnp.array(hierarchy.dims, dtype)[:, None], 0)
    return Posterior(mean, none, jnp.ones_like(mean), prior[:, :, None] * jnp.eye(seen.shape[1], dtype=dtype)[None], psi)


def correlated_prior(q: Posterior, hierarchy: Hierarchy) -> Hyperprior:
    """How far the correlations of a modality's columns can be told from chance, by E_m of a fit that takes them for independent.

    λ_m = Σ(1 − r²)²/d_m / Σ r² over the pairs of columns, at most 1: the shrinkage of a correlation matrix of least expected
    squared error (Schäfer and Strimmer 2005), of which `TAKEN` is used. Independent columns have r² ≈ 1/d_m, and λ_m = 1. At
    least √ε, so that Γ_m has an inverse where columns are copies of each other, as without noise.
    """
    kept = q.kept
    variances = jnp.diagonal(q.prior, axis1=1, axis2=2)
    scale = jnp.sqrt(jnp.where(kept, variances, 1))
    dims = jnp.array(hierarchy.dims, q.mean.dtype)
    pairs = kept[:, :, None] & kept[:, None, :] & ~jnp.eye(kept.shape[1], dtype=bool)[None]
    r = jnp.where(pairs, q.second_moments(hierarchy) / dims[:, None, None] / scale[:, :, None] / scale[:, None, :], 0)
    spread_out = jnp.sum(jnp.where(pairs, (1 - r**2) ** 2, 0), axis=(1, 2)) / dims
    size = jnp.sum(r**2, axis=(1, 2))
    shrinkage = jnp.where(size > spread_out, spread_out / jnp.where(size > 0, size, 1), 1)
    return Hyperprior(jnp.maximum(TAKEN * shrinkage, jnp.sqrt(jnp.finfo(shrinkage.dtype).eps)), variances, jnp.array(True))


def maximise_bound(
    vb: _Vb, start: Posterior, tolerance: float | Array, max_steps: int
) -> tuple[Posterior, Float[Array, ""], Int[Array, ""], Bool[Array, ""]]:
    """(posterior, bound, steps, converged): coordinate sweeps, Anderson-accelerated in E[Λ] and the noise's logarithms."""
    hierarchy, noise = vb.hierarchy, vb.noise
    size = start.mean.size

    def flatten(p: Posterior) -> Array:
        parts = [p.mean.ravel(), pool(jnp.log(p.psi), hierarchy, noise) / vb.sizes]
        return jnp.concatenate(parts if p.centre is None else [*parts, p.centre])

    def unflatten(vector: Array, like: Posterior) -> Posterior:
        mean = jnp.where(vb.by_feature(like.kept), vector[:size].reshape(like.mean.shape), 0)
        log_psi, centre = jnp.split(vector[size:], [vb.sizes.size])
        moved = like._replace(mean=mean, psi=jnp.maximum(jnp.exp(spread(log_psi, hierarchy, noise)), vb.floor))
        if like.centre is not None:
            moved = moved._replace(centre=centre)
        return moved._replace(prior=vb.best_prior(moved.second_moments(hierarchy), like.kept))

    unit = vb.S.nu * vb.S.n_features / 2  # a gain per degree of freedom and feature is free of units
    return ascend(vb.sweep, flatten, unflatten, start, unit, tolerance, max_steps)


def _check_fit(covariance: SampleCovariance, hierarchy: Hierarchy, tolerance: float | None, max_steps: int) -> None:
    """As `check_iterative`, and at least one step."""
    check_iterative(covariance, hierarchy, tolerance, max_steps)
    _check_some_step(max_steps)


def _check_some_step(max_steps: int) -> None:
    """Before the first step there is no bound."""
    if not isinstance(max_steps, jax.core.Tracer):
        check_count(max_steps, "max_steps", 1)


@compiled(check=_check_fit)
def fit_posterior(
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    *,
    noise: str = "shared",
    tolerance: float | None = None,
    max_steps: int = 2000,
) -> tuple[Posterior, Estimate]:
    """(q, estimate): the whole variational posterior behind `hcl_vb`."""
    check_noise(noise)
    tolerance = stopping_tolerance(tolerance, covariance.dtype, double=1e-7, single=1e-6)
    unit, root = covariance.in_unit_scale()
    start = hcl_ml(unit, hierarchy, noise=noise, tolerance=START_TOLERANCE, max_steps=50)
    floor = noise_floor(unit, hierarchy, noise)
    psi = positive_noise(noise_by_feature(start.noise_variance, hierarchy.n_features), start.loadings, unit)
    first = _starting_point(hierarchy, start.loadings, jnp.maximum(psi, floor), unit.nu)

    return _fitted_in_stages(partial(_Vb, unit, hierarchy, noise), first, root, hierarchy, noise, tolerance, max_steps)


def _fitted_in_stages(
    vb_under: Callable[[Hyperprior], _Vb],
    first: Posterior,
    root: Float[Array, ""],
    hierarchy: Hierarchy,
    noise: str,
    tolerance: float,
    max_steps: int,
) -> tuple[Posterior, Estimate]:
    """(q, estimate), in the units of the data, from a problem whose data are 1/`root` as large and a posterior to start from."""

    def stage(q: Posterior, in_force: Bool[Array, ""]) -> tuple[Posterior, tuple[Array, ...]]:
        hyperprior = correlated_prior(q, hierarchy)._replace(in_force=in_force)
        stop = jnp.where(in_force, REFINED, 1) * tolerance
        vb = vb_under(hyperprior)
        new, bound, *ended = maximise_bound(vb, q, stop, max_steps)
        bound = vb.without_hyperprior(bound, new)
        in_range = jnp.isfinite(bound)  # not so in single precision where noise at its floor leaves no digits to a sweep
        q = jax.tree.map(lambda a, b: jnp.where(in_range, a, b), new, q)
        return q, (bound, in_range, *ended)

    problem = vb_under(correlated_prior(first, hierarchy))
    # one compiled program for both
    q, (bounds, in_range, steps, converged) = jax.lax.scan(stage, first, jnp.array([False, True]))
    bound, steps, converged = jnp.where(in_range[1], bounds[1], bounds[0]), steps.sum(), (converged & in_range).all()
    reported = q.psi[0] if noise == "shared" else q.psi
    on_bound = (q.psi <= problem.floor).any()
    fit = finished(q.mean, reported, converged, steps, -bound / problem.S.nu, on_bound=on_bound, noise=noise)
    posterior = q.scaled(root)
    objective = fit.objective + problem.weights.sum() * jnp.log(root)  # −bound/ν has half of the likelihood's log det Σ
    return posterior, dataclasses.replace(
        fit, loadings=posterior.mean, noise_variance=root**2 * reported, objective=objective, method="hcl-vb"
    )


def hcl_vb(
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    *,
    noise: str = "shared",
    tolerance: float | None = None,
    max_steps: int = 2000,
) -> Estimate:
    """`hcl-vb`: posterior mean of the loadings under λ^(m)_j ~ N(0, Γ_m), with Γ and the noise that maximise the variational
    bound.

    q(z) q(Λ) factorised; started at `hcl-ml` rotated to principal axes. A first stage, with diagonal Γ_m, prunes columns that
    cannot be seen to zero; in a second the columns of a view may be correlated, as far as `correlated_prior` lets them. `noise`:
    one variance for all features (whose views are then expected in like units), one a view, or one a feature. Stops when 2/(νd)
    times the bound twice running gains less than `tolerance` (1e-7 in float64, 1e-6 in float32; a hundredth of it in the second
    stage), or nothing but rounding: what it still gains after that is in rotations within structures and in columns on their
    way to zero, and moves the Gram error by less than 1 % (docs/results.md). The objective is −bound/ν. Raises `ValueError` for
    K ≥ ν or an unknown kind of noise.
    """
    return fit_posterior(covariance, hierarchy, noise=noise, tolerance=tolerance, max_steps=max_steps)[1]


def _check_fit_by_pattern(moments: Any, hierarchy: Hierarchy, tolerance: float | None, max_steps: int) -> None:
    """As `check_by_pattern`, and at least one step."""
    check_by_pattern(moments, hierarchy, tolerance, max_steps)
    _check_some_step(max_steps)


@compiled(check=_check_fit_by_pattern)
def hcl_vb_by_pattern(
    moments: PatternMoments,
    hierarchy: Hierarchy,
    *,
    noise: str = "shared",
    tolerance: float | None = None,
    max_steps: int = 2000,
) -> tuple[Estimate, Float[Array, " d"]]:
    """(`hcl-vb`, mean) from rows that may lack views: `hcl_vb` with the bound on the likelihood of what is there, of which the
    mean is a parameter (theory: Section 7).

    Started at `hcl_ml_by_pattern`, which says when presence may be ignored and what raises `ValueError`. Where all rows have all
    views, everything is `hcl_vb` of their covariance.
    """
    check_noise(noise)
    if len(moments.counts) == 1:
        fit = hcl_vb(moments.covariance(), hierarchy, noise=noise, tolerance=tolerance, max_steps=max_steps)
        return fit, moments.centre
    covariance, root = moments.covariance().in_unit_scale()
    unit = moments.divided_by(jnp.broadcast_to(root, moments.centre.shape))
    start, mean = hcl_ml_by_pattern(unit, hierarchy, noise=noise, tolerance=START_GAIN, max_steps=50)
    psi = noise_by_feature(start.noise_variance, hierarchy.n_features)
    first = _starting_point(hierarchy, start.loadings, psi, covariance.nu)._replace(centre=mean - unit.centre)
    tolerance = stopping_tolerance(tolerance, covariance.dtype, double=1e-7, single=1e-6)
    vb_under = partial(_VbByPattern, unit, hierarchy, noise)
    posterior, fit = _fitted_in_stages(vb_under, first, root, hierarchy, noise, tolerance, max_steps)
    assert posterior.centre is not None, "the mean is a parameter"
    return fit, moments.centre + posterior.centre
