"""Maximum likelihood in the hierarchical factor model (theory: Section 3)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.compiled import compiled
from hcl_jax.covariance import SampleCovariance, denoised_factor, smallest_noise
from hcl_jax.estimators.estimate import (
    Estimate,
    check_iterative,
    finished,
    log_scale,
    named,
    scale_equivariant,
    stopping_tolerance,
)
from hcl_jax.estimators.fixed_point import ascend
from hcl_jax.estimators.spectral import structured_loadings
from hcl_jax.fisher import (
    FisherOperator,
    Parameters,
    apply_by_modality,
    check_noise,
    group_grams,
    group_sizes,
    modality_inverses,
    pool,
    spread,
)
from hcl_jax.linalg import spd_inverse
from hcl_jax.structure import Hierarchy

GRADIENT_ROUNDING = 256
"""Rounding errors, in units of ε‖F‖/σ², that a gradient holds where the factors are far stronger than the noise: Σ⁻¹ is then
taken of a difference of nearly equal numbers. (Measured in single precision: 100 to 250.)"""
HEYWOOD = 5e-3
"""The least share of its variance that a feature's, or a view's, own noise variance is let down to: that of R's factanal."""
LOOKS = 33  # at a line: at its start, at two steps along it, and at thirty halvings of the better one
AT_FLOOR = 1 + 1e-6  # times the floor: a noise variance there is on it


class _Line(NamedTuple):
    """All that the likelihood needs along (F + tV, ψ + tδ): K × K matrices, quadratic in t, per group p or pair of groups (p,
    q)."""

    inner: Float[Array, "3 g K K"]  # coefficients of F_pᵀF_p
    quadratic: Float[Array, "3 g g K K"]  # coefficients of F_pᵀ S_pq F_q
    noise: Float[Array, "2 g"]
    sizes: Float[Array, " g"]
    traces: Float[Array, " g"]
    floor: Float[Array, " g"]  # noise variances below it are out of bounds

    def _weights(self, t: Float[Array, ""]) -> tuple[Float[Array, " of_W"], Float[Array, " of_Q"]]:
        """What the coefficients of W and Q count at step t: tⁱ/ψ_p, and tⁱ/(ψ_pψ_q)."""
        powers, noise = jnp.stack([jnp.ones_like(t), t, t**2]), self.noise[0] + t * self.noise[1]
        inner = powers[:, None] / noise[None, :]
        return inner.ravel(), (inner[:, :, None] / noise[None, None, :]).ravel()

    def value_and_slope(self, t: Float[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """log det Σ + tr(Σ⁻¹S) = Σ_p (d_p log ψ_p + tr S_p/ψ_p) + log det W − tr(W⁻¹Q) at step t, and its derivative; infinite
        out of bounds."""
        K = self.inner.shape[-1]
        noise, change = self.noise[0] + t * self.noise[1], self.noise[1]
        weights = zip(*jax.jvp(self._weights, (t,), (jnp.ones_like(t),)), strict=True)
        (W, W_slope), (Q, Q_slope) = (
            (jnp.stack(pair) @ held.reshape(-1, K * K)).reshape(2, K, K)
            for pair, held in zip(weights, (self.inner, self.quadratic), strict=True)
        )
        W = W + jnp.eye(K, dtype=W.dtype)
        inverse, log_det = spd_inverse(W)
        fitted = inverse @ Q
        value = jnp.sum(self.sizes * jnp.log(jnp.abs(noise)) + self.traces / noise) + log_det - jnp.trace(fitted)
        slope = jnp.sum(change * (self.sizes / noise - self.traces / noise**2)) + jnp.sum(inverse * (W_slope - Q_slope))
        slope = slope + jnp.sum((fitted @ inverse) * W_slope)
        valid = (noise >= self.floor / AT_FLOOR).all() & jnp.isfinite(value)
        return jnp.where(valid, value, jnp.inf), jnp.where(valid, slope, jnp.inf)


class _Point(NamedTuple):
    """Where a fit is, and what is known there."""

    loadings: Float[Array, "d K"]
    images: Float[Array, "g d K"]  # S[:, p] F_p for every group p of features
    noise: Float[Array, " g"]
    grams: Float[Array, "g K K"]  # F_pᵀF_p
    gradient: Parameters  # −½ of it
    scored: Parameters  # the same, preconditioned by the Fisher information
    relative: Float[Array, ""]  # size of the gradient
    objective: Float[Array, ""]  # log det Σ + tr(Σ⁻¹S)


class _Search(NamedTuple):
    """A fit under way: the last direction, the gradient before it, and whether it led anywhere."""

    at: _Point
    direction: Parameters
    old_gradient: Parameters
    alignment: Float[Array, ""]
    moved: Bool[Array, ""]
    step: Int[Array, ""]


class _Problem:
    """What does not change during a fit."""

    def __init__(self, covariance: SampleCovariance, hierarchy: Hierarchy, noise: str, tolerance: float):
        self.hierarchy, self.noise, self.tolerance = hierarchy, noise, tolerance
        self.product = covariance.masked_product(hierarchy)
        self.variances, self.sizes = covariance.variances(), jnp.asarray(group_sizes(hierarchy, noise), covariance.dtype)
        self.floor = pool(noise_floor(covariance, hierarchy, noise), hierarchy, noise) / self.sizes

    def images(self, F: Float[Array, "d K"]) -> Float[Array, "g d K"]:
        """S[:, p] F_p for every group p of features."""
        modalities = self.hierarchy.modalities
        return jnp.stack([self.product(F, own) for own in ([modalities] if self.noise == "shared" else zip(modalities))])

    def pairs(self, A: Float[Array, "d K"], images: Float[Array, "g d K"]) -> Float[Array, "g g K K"]:
        """A_pᵀ S_pq B_q for all pairs of groups, from the images of B."""
        return jnp.stack([group_grams(A, image, self.hierarchy, self.noise) for image in images], axis=1)

    def held_at_floor(self, noise: Float[Array, " g"], change: Float[Array, " g"]) -> Float[Array, " g"]:
        """The change of the noise variances without that which leads below their floor."""
        return jnp.where((noise <= AT_FLOOR * self.floor) & (change < 0), 0, change)

    def line(self, at: _Point, V: Float[Array, "d K"], V_images: Float[Array, "g d K"], change: Float[Array, " g"]) -> _Line:
        """The likelihood along (V, change), from products that are at hand."""
        F = at.loadings
        FV, VV = (group_grams(A, V, self.hierarchy, self.noise) for A in (F, V))
        FSF, FSV, VSV = self.pairs(F, at.images), self.pairs(F, V_images), self.pairs(V, V_images)
        return _Line(
            jnp.stack([at.grams, FV + jnp.swapaxes(FV, 1, 2), VV]),
            jnp.stack([FSF, FSV + jnp.transpose(FSV, (1, 0, 3, 2)), VSV]),
            jnp.stack([at.noise, change]),
            self.sizes,
            pool(self.variances, self.hierarchy, self.noise),
            self.floor,
        )

    def at(self, F: Float[Array, "d K"], images: Float[Array, "g d K"], noise: Float[Array, " g"]) -> _Point:
        """The point of these loadings and noise variances, from the images of the loadings."""
        fisher = FisherOperator(F, spread(noise, self.hierarchy, self.noise), self.hierarchy, self.noise)
        covariance_image = jnp.einsum("pdk,p->dk", images, 1 / noise) @ fisher.inverse
        along, by_noise = fisher.minus_half_gradient(covariance_image, self.variances)
        gradient = along, self.held_at_floor(noise, by_noise)
        rounding = GRADIENT_ROUNDING * jnp.finfo(F.dtype).eps * jnp.linalg.norm(F) / jnp.min(noise)
        scale = jnp.maximum(jnp.linalg.norm(jnp.where(self.hierarchy.mask, fisher.image(), 0)), rounding / self.tolerance)
        relative = jnp.maximum(jnp.linalg.norm(gradient[0]) / scale, jnp.max(jnp.abs(gradient[1]) * noise / self.sizes))
        grams = group_grams(F, F, self.hierarchy, self.noise)
        objective = fisher.deviance(covariance_image, self.variances)
        return _Point(F, images, noise, grams, gradient, fisher.precondition(gradient), relative, objective)


def _dot(a, b) -> Float[Array, ""]:
    return jnp.sum(a[0] * b[0]) + jnp.sum(a[1] * b[1])


def _combine(a, b, factor):
    return jax.tree.map(lambda x, y: x + factor * y, a, b)


class _Look(NamedTuple):
    """A line search under way: where it looks next, how often it has looked, and (step, objective, slope) of the start and of
    the step that stands so far."""

    t: Float[Array, ""]
    looks: Int[Array, ""]
    start: Float[Array, "3"]
    best: Float[Array, "3"]
    done: Bool[Array, ""]


def line_step(line: _Line) -> Float[Array, ""]:
    """A step that lowers the objective: the better of t = 1 and the secant step after it, halved until it does; 0 if none
    does. One loop, so that the objective along the line stands in a program once."""
    zero = jnp.zeros((), line.noise.dtype)
    falls = line.noise[1] < 0
    room = jnp.where(falls, (line.floor - line.noise[0]) / jnp.where(falls, line.noise[1], -1), jnp.inf)
    first = jnp.minimum(1, jnp.min(room))

    def look(at: _Look) -> _Look:
        value, slope = line.value_and_slope(at.t)
        seen = jnp.stack([at.t, value, slope])
        start = jnp.where(at.looks == 0, seen, at.start)
        slack = 10 * jnp.finfo(zero.dtype).eps * jnp.abs(start[1])  # what rounding adds at the end, where steps gain less
        better = (value <= at.best[1] + slack) & (jnp.abs(slope) <= jnp.abs(at.best[2])) & jnp.isfinite(value)
        best = jnp.where((at.looks == 2) & ~better, at.best, seen)
        curved = slope > start[2]
        second = jnp.where(curved, -start[2] * first / jnp.where(curved, slope - start[2], 1), 2 * first)
        second = jnp.clip(second, first / 10, first * 4)
        after = jnp.where(at.looks == 0, first, jnp.where(at.looks == 1, second, best[0] / 2))
        return _Look(after, at.looks + 1, start, best, (at.looks >= 2) & (best[1] <= start[1] + slack))

    nothing = jnp.full(3, jnp.inf, zero.dtype)
    begin = _Look(zero, jnp.array(0), nothing, nothing, jnp.array(False))
    end = jax.lax.while_loop(lambda at: ~at.done & (at.looks < LOOKS), look, begin)
    return jnp.where(end.done, end.best[0], 0)


def maximise_likelihood(
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    start: Float[Array, "d K"],
    start_noise: Float[Array, " groups"],
    noise: str,
    tolerance: float,
    max_steps: int,
) -> Estimate:
    """Nonlinear conjugate gradients (Polak and Ribière), preconditioned by the diagonal blocks of the Fisher information.

    One product with S a step: along a line the likelihood is a function of K × K matrices alone. Stops when the gradient,
    relative to ‖Σ⁻¹F∘mask‖_F for the loadings and to the number of features for each log σ², is at most `tolerance`, or the
    loadings' part is what rounding leaves of it.
    """
    problem = _Problem(covariance, hierarchy, noise, tolerance)

    def advance(search: _Search) -> _Search:
        at = search.at
        alignment = _dot(at.gradient, at.scored)
        gained = alignment - _dot(at.scored, search.old_gradient)
        follows = search.alignment > 0  # the step from zero leads nowhere
        beta = jnp.where(follows, jnp.maximum(gained / jnp.where(follows, search.alignment, 1), 0), 0)
        ascends = alignment + beta * _dot(search.direction, at.gradient) > 0
        V, change = _combine(at.scored, search.direction, jnp.where(ascends, beta, 0))
        change = problem.held_at_floor(at.noise, change)
        begins = search.step < 0  # from zero, along the loadings to start from, in one step
        V_images = problem.images(V)
        t = jnp.where(begins, 1, line_step(problem.line(at, V, V_images, change)))
        reached = problem.at(at.loadings + t * V, at.images + t * V_images, at.noise + t * change)
        moved = begins | (t > 0) & jnp.isfinite(reached.relative)  # not where Σ is singular to rounding

        def kept(new: Array, old: Array) -> Array:  # of what a fit that ends here is made of
            return jnp.where(moved, new, old)

        reached = reached._replace(
            loadings=kept(reached.loadings, at.loadings),
            images=kept(reached.images, at.images),
            noise=kept(reached.noise, at.noise),
            grams=kept(reached.grams, at.grams),
            relative=kept(reached.relative, at.relative),
            objective=kept(reached.objective, at.objective),
        )
        return _Search(reached, (V, change), at.gradient, alignment, moved, search.step + 1)

    none, still, zero = jnp.zeros_like(start), jnp.zeros_like(start_noise), jnp.zeros((), start.dtype)
    grams = group_grams(none, none, hierarchy, noise)
    images = jnp.zeros((len(grams), *start.shape), start.dtype)
    origin = _Point(none, images, start_noise, grams, (none, still), (start, still), zero + jnp.inf, zero)
    search = _Search(origin, (none, still), (none, still), zero, jnp.array(True), jnp.array(-1))
    search = jax.lax.while_loop(lambda s: (s.at.relative > tolerance) & s.moved & (s.step < max_steps), advance, search)
    at = search.at
    reported = at.noise[0] if noise == "shared" else spread(at.noise, hierarchy, noise)
    on_bound = (at.noise <= AT_FLOOR * problem.floor).any()
    objective = at.objective + start.shape[0] * jnp.log(2 * jnp.pi)
    return finished(at.loadings, reported, at.relative <= tolerance, search.step, objective, on_bound=on_bound, noise=noise)


def positive_noise(
    noise: Float[Array, "..."], loadings: Float[Array, "d K"], covariance: SampleCovariance
) -> Float[Array, "..."]:
    """A noise variance to start from: where it is next to nothing, the mean variance that the loadings do not explain, which is
    not nothing when they fit badly."""
    d = covariance.n_features
    floor = jnp.maximum(1e-6 * covariance.trace() / d, 2 * smallest_noise(covariance))
    unexplained = (covariance.trace() - jnp.sum(loadings**2)) / d
    return jnp.where(noise > floor, noise, jnp.maximum(floor, unexplained))


def noise_floor(covariance: SampleCovariance, hierarchy: Hierarchy, noise: str) -> Float[Array, " d"]:
    """What the noise variance of a feature is not let below: `HEYWOOD` of the mean variance of the features that share it, where
    they are a view or a single feature. A noise variance that the likelihood takes to 0 (a Heywood case) stops there."""
    if noise == "shared":
        return jnp.broadcast_to(smallest_noise(covariance), (hierarchy.n_features,))
    sizes = jnp.asarray(group_sizes(hierarchy, noise), covariance.dtype)
    shares = HEYWOOD * spread(pool(covariance.variances(), hierarchy, noise) / sizes, hierarchy, noise)
    return jnp.maximum(shares, smallest_noise(covariance))


def starting_point(
    covariance: SampleCovariance, hierarchy: Hierarchy, noise: str
) -> tuple[Float[Array, "d K"], Float[Array, " groups"]]:
    """Loadings and noise variances to start from: `hcl-svd`, and what it leaves of the variances.

    Where noise differs, the largest eigenvalues of S may be those of the noisiest view. The views are then brought to one noise
    by a first fit, and fitted in these units.
    """
    factor, common = denoised_factor(covariance, hierarchy.n_factors)
    start = structured_loadings(factor, hierarchy)
    if noise == "shared":
        return start, positive_noise(common[None], start, covariance)

    def left(loadings: Float[Array, "d K"], kind: str) -> Float[Array, " groups"]:
        sums = pool(covariance.variances() - jnp.sum(loadings**2, axis=1), hierarchy, kind)
        return sums / jnp.asarray(group_sizes(hierarchy, kind), covariance.dtype)

    floor = noise_floor(covariance, hierarchy, "view")
    scale = jnp.sqrt(jnp.maximum(spread(jnp.maximum(left(start, "view"), common / 10), hierarchy, "view"), floor))
    factor, _ = denoised_factor(covariance.divided_by(scale), hierarchy.n_factors)
    start = scale[:, None] * structured_loadings(factor, hierarchy)
    of_views = spread(jnp.maximum(left(start, "view"), common / 100), hierarchy, "view")
    of_features = jnp.maximum(jnp.maximum(spread(left(start, noise), hierarchy, noise), of_views / 10), floor)
    return start, pool(of_features, hierarchy, noise) / jnp.asarray(group_sizes(hierarchy, noise), covariance.dtype)


class _Factors(NamedTuple):
    """Loadings and a noise variance for every feature."""

    loadings: Float[Array, "d K"]
    psi: Float[Array, " d"]


def likelihood_sweep(
    covariance: SampleCovariance, hierarchy: Hierarchy, floor: Float[Array, " d"], at: _Factors
) -> tuple[_Factors, Float[Array, ""]]:
    """One step of expectation and maximisation from a point, and 2/ν times the log-likelihood (without d log 2π) at it.

    E: C = W⁻¹FᵀΨ⁻¹, Ω = W⁻¹ + C S Cᵀ; M: F^(m)_a = (S Cᵀ)_{m,a} Ω_aa⁻¹, ψ_j = S_jj − f_jᵀ(S Cᵀ)_j (theory: Section 7).
    """
    F, psi = at
    variances = covariance.variances()
    W = jnp.eye(F.shape[1], dtype=F.dtype) + F.T @ (F / psi[:, None])
    inverse, log_det = spd_inverse(W)
    SC = covariance.product(F / psi[:, None] @ inverse)
    explained = inverse @ (F.T @ (SC / psi[:, None]))
    value = jnp.sum(jnp.log(psi) + variances / psi) + log_det - jnp.sum(W * explained)
    loadings = apply_by_modality(SC, modality_inverses(inverse + explained, hierarchy, 0.0), hierarchy)
    loadings = jnp.where(hierarchy.mask, loadings, 0)
    return _Factors(loadings, jnp.maximum(variances - jnp.sum(loadings * SC, axis=1), floor)), -value


def maximise_by_feature(
    covariance: SampleCovariance, hierarchy: Hierarchy, start: _Factors, tolerance: float, max_steps: int
) -> Estimate:
    """Maximum likelihood with a noise variance for every feature, by accelerated steps of expectation and maximisation.

    Along a line the likelihood is then no function of K × K matrices, and a variance on its floor stays there by itself.
    """
    floor, size = noise_floor(covariance, hierarchy, "feature"), start.loadings.size
    sweep = partial(likelihood_sweep, covariance, hierarchy, floor)

    def unflatten(vector: Array, like: _Factors) -> _Factors:
        return _Factors(vector[:size].reshape(like.loadings.shape), jnp.maximum(jnp.exp(vector[size:]), floor))

    unit = jnp.asarray(covariance.n_features, covariance.dtype)
    flatten = lambda at: jnp.concatenate([at.loadings.ravel(), jnp.log(at.psi)])  # noqa: E731
    end, _, steps, converged = ascend(sweep, flatten, unflatten, start, unit, tolerance, max_steps)
    objective = start.loadings.shape[0] * jnp.log(2 * jnp.pi) - sweep(end)[1]
    on_bound = (end.psi <= floor).any()
    return finished(end.loadings, end.psi, converged, steps, objective, on_bound=on_bound, noise="feature")


@compiled(check=check_iterative)
@named
@scale_equivariant(log_scale)
def hcl_ml(
    covariance: SampleCovariance,
    hierarchy: Hierarchy,
    *,
    noise: str = "shared",
    tolerance: float | None = None,
    max_steps: int = 1500,
) -> Estimate:
    """`hcl-ml`: minimises log det Σ + tr(Σ⁻¹S), Σ = FFᵀ + Ψ, over masked F and the noise variance, from `hcl-svd`.

    `noise`: Ψ has one variance for all features (whose views are then expected in like units), one a view, or one a feature;
    `noise_variance` of the estimate is a number, or the vector of all features'. A view's or a feature's own is not let below
    0.5 % of its variance (status 3). The objective is −2 log-likelihood/ν = d log 2π + log det Σ + tr(Σ⁻¹S). Raises
    `ValueError` for K ≥ ν or an unknown kind of noise.
    """
    check_noise(noise)
    start, start_noise = starting_point(covariance, hierarchy, noise)
    if noise == "feature":
        gain = stopping_tolerance(tolerance, covariance.dtype, double=1e-10, single=1e-6)
        return maximise_by_feature(covariance, hierarchy, _Factors(start, start_noise), gain, max_steps)
    tolerance = stopping_tolerance(tolerance, covariance.dtype, double=1e-6)
    return maximise_likelihood(covariance, hierarchy, start, start_noise, noise, tolerance, max_steps)
