"""The variational bound against its definition; it never falls; columns that cannot be seen are pruned; correlated columns."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    PROPERTY,
    TWO,
    assert_at_least,
    assert_at_most,
    fitted_by,
    masked_normal,
    population,
    problem,
    relative,
)
from hypothesis import given
from hypothesis import strategies as st

from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance, Truth
from hcl_jax.estimators.missing import PatternMoments
from hcl_jax.estimators.variational import (
    TAKEN,
    Hyperprior,
    Posterior,
    _Vb,
    _VbByPattern,
    correlated_prior,
    fit_posterior,
    hcl_vb_by_pattern,
)
from hcl_jax.fisher import NOISE, group_sizes, spread

SEEDS = st.integers(0, 10_000)
STAGES = st.sampled_from([(noise, in_force) for noise in NOISE for in_force in (False, True)])
N_ROWS = 30


def spd(rng, hierarchy, scale):
    """A random positive definite K × K matrix for each modality, zero on its inactive columns."""
    M, K = hierarchy.n_modalities, hierarchy.n_factors
    roots, seen = rng.standard_normal((M, K, K)), hierarchy.modality_mask
    return scale * (roots @ roots.transpose(0, 2, 1) / K + 0.3 * np.eye(K)) * seen[:, :, None] * seen[:, None, :]


def random_posterior(rng, hierarchy, noise, correlated):
    """Some q(Λ), Γ and ψ, none of them optimal."""
    covariances, prior = spd(rng, hierarchy, 0.05), spd(rng, hierarchy, 1.0)
    if not correlated:
        prior = prior * np.eye(hierarchy.n_factors)
    values, axes = np.linalg.eigh(covariances)
    shares = np.repeat(np.maximum(values, 0), hierarchy.dims, axis=0) * rng.uniform(0.5, 2, (hierarchy.n_features, 1))
    psi = np.asarray(spread(jnp.asarray(rng.uniform(0.3, 2, len(group_sizes(hierarchy, noise)))), hierarchy, noise))
    return Posterior(*(jnp.asarray(part) for part in (masked_normal(rng, hierarchy), axes, shares, prior, psi)))


def random_hyperprior(rng, hierarchy, in_force):
    M, K = hierarchy.n_modalities, hierarchy.n_factors
    return Hyperprior(*(jnp.asarray(x) for x in (rng.uniform(0.1, 0.9, M), rng.uniform(0.5, 2, (M, K)), in_force)))


def data(rng, hierarchy):
    return rng.standard_normal((N_ROWS, hierarchy.n_features)) + rng.standard_normal((N_ROWS, 1))


def draw(seed, noise, in_force):
    """(random numbers, rows, their covariance matrix, a posterior, a hyperprior)."""
    rng = np.random.default_rng(seed)
    X, posterior = data(rng, TWO), random_posterior(rng, TWO, noise, in_force)
    return rng, X, jnp.asarray(X.T @ X / N_ROWS), posterior, random_hyperprior(rng, TWO, in_force)


@cache
def sweep_two(noise):
    return jax.jit(lambda S, posterior, prior: _Vb(SampleCovariance(S, n=N_ROWS + 1), TWO, noise, prior).sweep(posterior))


def row_covariances(posterior, hierarchy):
    """C_j of every feature: d × K × K."""
    axes = np.repeat(np.asarray(posterior.axes), hierarchy.dims, axis=0)
    return (axes * np.asarray(posterior.shares)[:, None, :]) @ axes.transpose(0, 2, 1)


def gaussian_divergence(mean, covariance, prior):
    """KL(N(mean, covariance) ‖ N(0, prior)) of one row of loadings, or of one sample's scores."""
    ratio = np.linalg.solve(prior, covariance)
    quadratic = np.trace(ratio) + mean @ np.linalg.solve(prior, mean)
    return (quadratic - len(mean) - np.linalg.slogdet(ratio)[1]) / 2


def naive_bound(X, scores_of, new, hierarchy):
    """E log p(x | z, Λ) − KL of every sample's scores − KL of every row of loadings, a sample and a feature at a time."""
    C_z, B = scores_of
    mean, psi, covariances = np.asarray(new.mean), np.asarray(new.psi), row_covariances(new, hierarchy)
    bound = 0.0
    for x in X:
        z = B @ x
        seconds = np.einsum("jab,ab->j", covariances + mean[:, :, None] * mean[:, None, :], C_z + np.outer(z, z))
        bound -= np.sum(np.log(2 * np.pi * psi) + (x**2 - 2 * x * (mean @ z) + seconds) / psi) / 2
        bound -= gaussian_divergence(z, C_z, np.eye(len(z)))
    for j, m in enumerate(hierarchy.modality_of_feature):
        kept = np.flatnonzero(new.kept[m])
        C, prior = covariances[j][np.ix_(kept, kept)], np.asarray(new.prior)[m][np.ix_(kept, kept)]
        bound -= gaussian_divergence(mean[j, kept], C, prior)
    return bound


def log_hyperprior(prior, hyperprior, hierarchy):
    """Log density of an inverse Wishart law, up to a constant: −½ λd/(1 − λ) (tr Γ⁻¹D + log det Γ) by modality."""
    total = 0.0
    for m in hierarchy.modalities if hyperprior.in_force else ():
        kept, share = hierarchy.active_columns(m), float(hyperprior.shrinkage[m - 1])
        Gamma, D = np.asarray(prior)[m - 1][np.ix_(kept, kept)], np.diag(np.asarray(hyperprior.target)[m - 1, kept])
        strength = share / (1 - share) * hierarchy.dims[m - 1]
        total -= strength / 2 * (np.trace(np.linalg.solve(Gamma, D)) + np.linalg.slogdet(Gamma)[1])
    return total


def scores_at(posterior, hierarchy):
    """q(z) at given loadings: C_z = (I + E[ΛᵀΨ⁻¹Λ])⁻¹ and B = C_z E[Λ]ᵀΨ⁻¹."""
    mean, psi = np.asarray(posterior.mean), np.asarray(posterior.psi)
    second = (mean.T / psi) @ mean + np.einsum("jab,j->ab", row_covariances(posterior, hierarchy), 1 / psi)
    C_z = np.linalg.inv(np.eye(hierarchy.n_factors) + second)
    return C_z, C_z @ mean.T / psi


@given(stage=STAGES, seed=SEEDS)
@PROPERTY
def test_the_bound_is_its_definition(stage, seed):
    _, X, S, posterior, hyperprior = draw(seed, *stage)
    new, bound = sweep_two(stage[0])(S, posterior, hyperprior)
    assert (new.kept == TWO.modality_mask).all(), "the example should prune nothing"
    expected = naive_bound(X, scores_at(posterior, TWO), new, TWO) + log_hyperprior(new.prior, hyperprior, TWO)
    assert_at_most(abs(float(bound) / expected - 1), 1e-11, f"{stage}: bound over its definition, minus 1")


@cache
def sweep_two_by_pattern(noise):
    return jax.jit(lambda moments, posterior, prior: _VbByPattern(moments, TWO, noise, prior).sweep(posterior))


def naive_bound_by_pattern(X, present, at, new):
    """The bound of the entries that are there: q(z) found at one posterior, the rest from the next. What does not depend on the
    rows counts ν_P = n_P(N − 1)/N times by pattern."""
    share, bound = (len(X) - 1) / len(X), 0.0
    mean, psi, covariances = np.asarray(new.mean), np.asarray(new.psi), row_covariances(new, TWO)
    for x, own in zip(X, present[:, TWO.modality_of_feature], strict=True):
        L, noise = np.asarray(at.mean)[own], np.asarray(at.psi)[own]
        second = (L.T / noise) @ L + np.einsum("jab,j->ab", row_covariances(at, TWO)[own], 1 / noise)
        C_z = np.linalg.inv(np.eye(TWO.n_factors) + second)
        z = C_z @ L.T @ ((x - np.asarray(at.centre))[own] / noise)
        rest, E = (x - np.asarray(new.centre))[own], covariances[own] + mean[own, :, None] * mean[own, None, :]
        seconds = np.einsum("jab,ab->j", E, share * C_z + np.outer(z, z))
        bound -= np.sum(share * np.log(2 * np.pi * psi[own]) + (rest**2 - 2 * rest * (mean[own] @ z) + seconds) / psi[own]) / 2
        bound -= share * gaussian_divergence(0 * z, C_z, np.eye(len(z))) + z @ z / 2
    nothing = (np.eye(TWO.n_factors), np.zeros((TWO.n_factors, TWO.n_features)))
    return bound + naive_bound(np.empty((0, TWO.n_features)), nothing, new, TWO)  # the divergence of the loadings


@pytest.mark.parametrize(("noise", "in_force"), [("view", False), ("feature", True)])
def test_the_bound_of_rows_that_lack_views_is_its_definition_and_never_falls(noise, in_force):
    for seed in range(3):
        rng, X, _, posterior, hyperprior = draw(seed, noise, in_force)
        present = np.ones((N_ROWS, 2), bool)
        present[np.arange(0, 24), rng.integers(0, 2, 24)] = False
        moments = PatternMoments.from_data([X[:, TWO.rows(m)] for m in (1, 2)], present)
        at = posterior._replace(centre=jnp.asarray(0.3 * rng.standard_normal(16)))
        bounds, kept = [], [at.kept]
        for _ in range(6):
            new, bound = sweep_two_by_pattern(noise)(moments, at, hyperprior)
            if not bounds:
                about = [p._replace(centre=p.centre + moments.centre) for p in (at, new)]
                expected = naive_bound_by_pattern(X, present, *about) + log_hyperprior(new.prior, hyperprior, TWO)
                assert_at_most(abs(float(bound) / expected - 1), 1e-11, f"{noise}: bound over its definition, minus 1")
            bounds.append(float(bound))
            kept.append(new.kept)
            at = new
        same = [bool((a == b).all()) for a, b in zip(kept[:-2], kept[1:-1], strict=True)]
        assert_at_most((-np.diff(bounds)[same]).max() / abs(bounds[-1]), 1e-12, f"{noise}: largest fall in 6 sweeps, relative")


def test_rows_that_lack_nothing_have_the_posterior_of_their_covariance():
    _, X, _, _, _ = draw(0, "view", True)
    views = [X[:, TWO.rows(m)] for m in (1, 2)]
    fit, mean = hcl_vb_by_pattern(PatternMoments.from_data(views), TWO, noise="view")
    direct = ESTIMATORS["hcl-vb"](SampleCovariance.from_data(views), TWO, noise="view")
    assert_at_most(relative(fit.loadings @ fit.loadings.T, direct.loadings @ direct.loadings.T), 1e-10, "E[Λ]E[Λ]ᵀ")
    assert_at_most(relative(fit.noise_variance, direct.noise_variance), 1e-10, "ψ")
    assert_at_most(relative(mean, X.mean(axis=0)), 1e-12, "mean")


@pytest.mark.slow
def test_every_pattern_given_a_place_moves_no_posterior():
    """Inside compiled code all patterns have one, those that do not occur too: the general path on rows that lack nothing."""
    truth, _ = problem(TWO, noise=0.5)
    rng = np.random.default_rng(0)
    X = rng.standard_normal((300, 5)) @ np.asarray(truth.loadings).T + np.sqrt(0.5) * rng.standard_normal((300, 16))

    @jax.jit
    def general(X):
        return hcl_vb_by_pattern(PatternMoments.from_data([X[:, :9], X[:, 9:]]), TWO, noise="view")[0]

    fit, direct = general(jnp.asarray(X)), fitted_by("hcl-vb", noise="view")(SampleCovariance.from_data(X), TWO)
    assert (int(fit.status), fit.method) == (0, "hcl-vb")
    assert_at_most(abs(float(fit.objective - direct.objective)) / 16, 1e-6, "−bound/ν, per feature: they stop at gains of 1e-9")
    assert_at_most(relative(fit.loadings @ fit.loadings.T, direct.loadings @ direct.loadings.T), 1e-2, "E[Λ]E[Λ]ᵀ")


@given(stage=STAGES, seed=SEEDS)
@PROPERTY
def test_a_sweep_never_lowers_the_bound(stage, seed):
    _, _, S, posterior, hyperprior = draw(seed, *stage)
    bounds, kept = [], [posterior.kept]
    for _ in range(8):
        posterior, bound = sweep_two(stage[0])(S, posterior, hyperprior)
        bounds.append(float(bound))
        kept.append(posterior.kept)
    same = [bool((a == b).all()) for a, b in zip(kept[:-2], kept[1:-1], strict=True)]  # the next bound is of fewer columns
    falls = -np.diff(bounds)[same]
    assert len(falls) > 0
    assert_at_most(falls.max() / abs(bounds[-1]), 1e-12, f"{stage}: largest fall in 8 sweeps, relative")


@given(stage=STAGES, seed=SEEDS)
@PROPERTY
def test_a_sweep_maximises_in_each_coordinate(stage, seed):
    """After a sweep no small change of Γ, of ψ or of a loading's mean, C_j or C_z alone raises the naive bound."""
    rng, X, S, posterior, hyperprior = draw(seed, *stage)
    noise, in_force = stage
    new, _ = sweep_two(noise)(S, posterior, hyperprior)

    def gain(best, changed, scores, what):
        value = naive_bound(X, scores, changed, TWO) + log_hyperprior(changed.prior, hyperprior, TWO)
        assert_at_most(value - best, 1e-9 * abs(best), f"{stage}: gain from changing {what}")

    scores = scores_at(posterior, TWO)
    best = naive_bound(X, scores, new, TWO) + log_hyperprior(new.prior, hyperprior, TWO)
    groups = jnp.asarray(rng.uniform(0.98, 1.02, len(group_sizes(TWO, noise))))
    gain(best, new._replace(psi=new.psi * spread(groups, TWO, noise)), scores, "ψ")
    seen = TWO.modality_mask[:, :, None] & TWO.modality_mask[:, None, :]
    turn = np.eye(5) + 0.01 * rng.standard_normal((2, 5, 5)) * (1 if in_force else np.eye(5))
    turned = np.where(seen, turn @ np.asarray(new.prior) @ turn.transpose(0, 2, 1), 0)
    gain(best, new._replace(prior=jnp.asarray(turned)), scores, "Γ")
    before = new._replace(prior=posterior.prior, psi=posterior.psi)  # what the loadings were maximised against
    best = naive_bound(X, scores, before, TWO) + log_hyperprior(before.prior, hyperprior, TWO)
    gain(best, before._replace(mean=before.mean + 0.01 * masked_normal(rng, TWO)), scores, "E[Λ]")
    gain(best, before._replace(shares=before.shares * rng.uniform(0.98, 1.02, before.shares.shape)), scores, "C_j")
    C_z, B = scores
    best = naive_bound(X, scores, posterior, TWO) + log_hyperprior(posterior.prior, hyperprior, TWO)
    gain(best, posterior, (1.01 * C_z, B), "C_z")
    gain(best, posterior, (C_z, 0.99 * B), "B")


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISE)
def test_the_bound_never_falls_along_the_fit(noise):
    """With more steps of the second stage −bound/ν is lower or the same, acceleration included."""

    @jax.jit
    def ten_sweeps(S):
        first, _ = fit_posterior(S, TWO, noise=noise, max_steps=4)
        vb = _Vb(S, TWO, noise, correlated_prior(first, TWO))
        return jax.lax.scan(lambda at, _: vb.sweep(at), first, length=10)[1]

    for seed in range(6):
        bounds = np.asarray(ten_sweeps(problem(TWO, seed, noise=2.0, n=150)[1]))
        assert_at_most(-np.diff(bounds).min() / abs(bounds[-1]), 1e-13, f"seed {seed}: largest fall of the bound, relative")


@pytest.mark.parametrize("noise", NOISE)
def test_the_reported_objective_is_the_bound_of_the_posterior(noise):
    rng = np.random.default_rng(1)
    truth, _ = problem(TWO, noise=0.5)
    X = rng.standard_normal((N_ROWS, 5)) @ np.asarray(truth.loadings).T + np.sqrt(0.5) * rng.standard_normal((N_ROWS, 16))
    S = SampleCovariance(jnp.asarray(X.T @ X / N_ROWS), n=N_ROWS + 1)
    posterior, estimate = fit_posterior(S, TWO, noise=noise)
    assert (posterior.mean == estimate.loadings).all()
    bound = naive_bound(X, scores_at(posterior, TWO), posterior, TWO)  # scores renewed after the last sweep: at least as high
    assert_at_most(abs(-bound / N_ROWS / float(estimate.objective) - 1), 1e-6, "−bound/ν over the reported objective, minus 1")


def spare_weight(estimate, hierarchy):
    """What modality 2 holds beyond its two factors of (1, 2). (The private factor of modality 1 may stand in (1, 2) as well.)"""
    F = np.asarray(estimate.loadings)[hierarchy.rows(2)]
    shared = np.linalg.svd(F[:, hierarchy.columns((1, 2))], compute_uv=False)
    return shared[2] ** 2 + np.sum(F[:, hierarchy.columns((2,))] ** 2)


@pytest.mark.slow
def test_columns_that_are_not_there_are_pruned():
    """A structure and a factor too many: empty in the population, nearly so in samples, where hcl-ml fits noise with them."""
    hierarchy = Hierarchy((12, 10), {(1, 2): 2, (1,): 1})
    fitted = Hierarchy(hierarchy.dims, {(1, 2): 3, (1,): 1, (2,): 2})
    spare = {"hcl-vb": [], "hcl-ml": []}
    for seed in range(6):
        truth, S = problem(hierarchy, seed, noise=0.5, n=5000)
        estimate = fitted_by("hcl-vb")(population(truth, 5000), fitted)
        assert_at_most(spare_weight(estimate, fitted), 1e-3, f"seed {seed}: squared norm of what is not there, population")
        found = estimate.loadings @ estimate.loadings.T
        assert_at_most(relative(found, truth.gram()), 6e-3, f"seed {seed}: relative Gram error (a prior's pull at n = 5,000)")
        for name, weights in spare.items():
            weights.append(spare_weight(fitted_by(name)(S, fitted), fitted))
    ratio = np.mean(spare["hcl-vb"]) / np.mean(spare["hcl-ml"])
    assert_at_most(ratio, 0.25, "squared norm of what is not there, in samples: hcl-vb over hcl-ml")


def test_superfluous_columns_are_pruned_for_good_at_small_n():
    """Most of a generous lattice fades from 40 samples; the fit converges, and what is pruned is exactly zero."""
    hierarchy = Hierarchy((7, 7), {(1, 2): 1})
    offered = Hierarchy(hierarchy.dims, {(1, 2): 3, (1,): 3, (2,): 3})
    for seed in range(4):
        _, S = problem(hierarchy, seed, noise=0.1, n=40)
        posterior, estimate = fit_posterior(S, offered, noise="view")
        assert estimate.status == 0, f"seed {seed}: status {int(estimate.status)} after {int(estimate.steps)} steps"
        gone = ~np.repeat(np.asarray(posterior.kept), offered.dims, axis=0)
        assert (np.asarray(estimate.loadings)[gone] == 0).all()
        assert (row_covariances(posterior, offered)[gone] == 0).all()
        assert_at_most(np.asarray(posterior.kept).any(axis=0).sum(), 5, f"seed {seed}: columns left of nine")


@pytest.mark.parametrize("noise", NOISE)
def test_pure_noise_is_fitted_by_nothing(noise):
    S = SampleCovariance(2.0 * jnp.eye(16), n=500)
    estimate = fitted_by("hcl-vb", noise=noise)(S, TWO)
    assert estimate.status == 0
    assert (estimate.loadings == 0).all()
    assert_at_most(float(jnp.abs(estimate.noise_variance / 2 - 1).max()), 1e-3, "relative error of the noise variances")


@pytest.mark.parametrize("n", [1e4, 1e8])
def test_the_prior_fades_with_the_sample(n):
    """The floor of 1e-3 is the stopping rule's: a bound 1e-7 of itself below its maximum leaves an error of about its root."""
    _, S = problem(TWO, noise=0.5, n=2000)
    S = SampleCovariance(S.matrix, n=n)
    vb, ml = (np.asarray(fitted_by(name)(S, TWO).loadings) for name in ("hcl-vb", "hcl-ml"))
    assert_at_most(relative(vb @ vb.T, ml @ ml.T), 30 / n + 1e-3, f"hcl-vb against hcl-ml at n = {n:g}")


CORRELATED = Hierarchy((20, 20), {(1, 2): 1, (1,): 1, (2,): 1})


def correlated_truth(seed, correlation):
    """Loadings of both columns of each modality, normal with the given correlation."""
    rng = np.random.default_rng(seed)
    loadings = masked_normal(rng, CORRELATED)
    shared = loadings[:, CORRELATED.columns((1, 2))]
    for m in (1, 2):
        rows, column = CORRELATED.rows(m), CORRELATED.columns((m,))
        loadings[rows, column] = correlation * shared[rows] + np.sqrt(1 - correlation**2) * loadings[rows, column]
    return Truth(jnp.asarray(loadings), jnp.asarray(1.0), CORRELATED), rng


def correlated_problem(seed, correlation, n=150):
    truth, rng = correlated_truth(seed, correlation)
    X = rng.standard_normal((n, 3)) @ np.asarray(truth.loadings).T + rng.standard_normal((n, 40))
    return truth, SampleCovariance(jnp.asarray(np.cov(X.T)), n=n)


def test_correlated_columns_of_a_view_are_found_as_such():
    """Independent columns' prior pulls correlated ones apart; the second stage's does not, and keeps up with hcl-ml."""
    errors = {"hcl-vb": [], "hcl-ml": []}
    for seed in range(4):
        truth, S = correlated_problem(seed, 0.9)
        posterior, estimate = fit_posterior(S, CORRELATED)
        shared = float(posterior.prior[0, 0, 1] / jnp.sqrt(posterior.prior[0, 0, 0] * posterior.prior[0, 1, 1]))
        assert_at_least(abs(shared), 0.5, f"seed {seed}: correlation in the prior of modality 1")
        for name, F in (("hcl-vb", estimate.loadings), ("hcl-ml", fitted_by("hcl-ml")(S, CORRELATED).loadings)):
            errors[name].append(relative(F @ F.T, truth.gram()))
    assert_at_most(np.mean(errors["hcl-vb"]) / np.mean(errors["hcl-ml"]), 1.05, "Gram error of hcl-vb over that of hcl-ml")


def test_the_shrinkage_tells_correlation_from_chance():
    """λ, of which a part is used, of posteriors whose means are the loadings: 1 for orthogonal columns, small for correlated."""
    none = jnp.zeros((2, 3, 3))

    def shrinkage(loadings):
        F = np.asarray(loadings)
        variances = np.stack([np.mean(F[CORRELATED.rows(m)] ** 2, axis=0) for m in (1, 2)])
        prior = jnp.asarray(variances[:, :, None] * np.eye(3))
        posterior = Posterior(jnp.asarray(F), none, jnp.ones(F.shape), prior, jnp.ones(40))
        return np.asarray(correlated_prior(posterior, CORRELATED).shrinkage) / TAKEN

    orthogonal = np.array(correlated_truth(0, 0.0)[0].loadings)
    for m in (1, 2):
        rows, active = CORRELATED.rows(m), CORRELATED.active_columns(m)
        orthogonal[rows, active] = np.linalg.qr(orthogonal[rows][:, active])[0]
    np.testing.assert_allclose(shrinkage(orthogonal), 1, rtol=1e-12)
    for seed in range(3):
        assert_at_most(shrinkage(correlated_truth(seed, 0.95)[0].loadings).max(), 0.05, f"seed {seed}: λ of correlated columns")
    independent = np.mean([shrinkage(correlated_truth(seed, 0.0)[0].loadings) for seed in range(20)])
    assert_at_least(independent, 0.7, "mean λ of independent columns")
