"""The variational bound against its definition; it never falls; columns that cannot be seen are pruned."""

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

from hcl_jax import Hierarchy, SampleCovariance
from hcl_jax.estimators.variational import Posterior, _Vb, fit_posterior, found_columns, relevance

SEEDS = st.integers(0, 10_000)
N_ROWS = 30


def random_posterior(rng, hierarchy):
    """Some q(Λ), α and σ², none of them optimal."""
    M, K = hierarchy.n_modalities, hierarchy.n_factors
    roots = rng.standard_normal((M, K, K)) / 10
    seen = hierarchy.modality_mask
    covariances = (roots @ roots.transpose(0, 2, 1) + 0.01 * np.eye(K)) * seen[:, :, None] * seen[:, None, :]
    parts = (masked_normal(rng, hierarchy), covariances, rng.uniform(0.5, 5, (M, K)), rng.uniform(0.3, 2, 1))
    return Posterior(*(jnp.asarray(part) for part in parts))


def data(rng, hierarchy):
    return rng.standard_normal((N_ROWS, hierarchy.n_features)) + rng.standard_normal((N_ROWS, 1))


@jax.jit
def sweep_two(matrix, posterior):
    return _Vb(SampleCovariance(matrix, n=N_ROWS + 1), TWO).sweep(posterior)


def gaussian_divergence(mean, covariance, prior_precision):
    """KL(N(mean, covariance) ‖ N(0, diag(1/α))) of one row of loadings, or of one sample's scores."""
    k = len(mean)
    quadratic = np.sum(prior_precision * (mean**2 + np.diagonal(covariance)))
    return (quadratic - k - np.linalg.slogdet(covariance)[1] - np.log(prior_precision).sum()) / 2


def naive_bound(X, scores_of, new, hierarchy):
    """E log p(x | z, Λ) − KL of every sample's scores − KL of every row of loadings, a sample and a feature at a time."""
    C_z, B = scores_of
    mean, noise = np.asarray(new.mean), float(new.noise[0])
    bound = 0.0
    second = sum(
        mean[hierarchy.rows(m)].T @ mean[hierarchy.rows(m)] + hierarchy.dims[m - 1] * np.asarray(new.column_covariances[m - 1])
        for m in hierarchy.modalities
    )
    for x in X:
        z = B @ x
        squares = x @ x - 2 * x @ mean @ z + np.trace(second @ (C_z + np.outer(z, z)))
        bound += -len(x) / 2 * np.log(2 * np.pi * noise) - squares / (2 * noise)
        bound -= gaussian_divergence(z, C_z, np.ones(len(z)))
    for m in hierarchy.modalities:
        active = hierarchy.active_columns(m)
        C = np.asarray(new.column_covariances[m - 1])[np.ix_(active, active)]
        for row in mean[hierarchy.rows(m)][:, active]:
            bound -= gaussian_divergence(row, C, np.asarray(new.precisions[m - 1])[active])
    return bound


def scores_at(posterior, hierarchy):
    """q(z) at given loadings: C_z = (I + E[ΛᵀΛ]/σ²)⁻¹ and B = C_z E[Λ]ᵀ/σ²."""
    mean, noise = np.asarray(posterior.mean), float(posterior.noise[0])
    second = mean.T @ mean + np.einsum("m,mij->ij", np.array(hierarchy.dims, float), np.asarray(posterior.column_covariances))
    C_z = np.linalg.inv(np.eye(hierarchy.n_factors) + second / noise)
    return C_z, C_z @ mean.T / noise


@given(seed=SEEDS)
@PROPERTY
def test_the_bound_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    posterior, X = random_posterior(rng, TWO), data(rng, TWO)
    swept = sweep_two(jnp.asarray(X.T @ X / N_ROWS), posterior)
    expected = naive_bound(X, scores_at(posterior, TWO), swept.posterior, TWO)
    assert_at_most(abs(float(swept.bound) / expected - 1), 1e-11, "bound over its definition, minus 1")


@given(seed=SEEDS)
@PROPERTY
def test_a_sweep_never_lowers_the_bound(seed):
    rng = np.random.default_rng(seed)
    X = data(rng, TWO)
    S, posterior = jnp.asarray(X.T @ X / N_ROWS), random_posterior(rng, TWO)
    bounds = []
    for _ in range(8):
        swept = sweep_two(S, posterior)
        posterior = swept.posterior
        bounds.append(float(swept.bound))
    assert_at_most(-np.diff(bounds).min() / abs(bounds[-1]), 1e-12, "largest fall in 8 sweeps, relative")


@given(seed=SEEDS)
@PROPERTY
def test_a_sweep_maximises_in_each_coordinate(seed):
    """After a sweep no small change of α, of σ² or of a loading's mean, C_m or C_z alone raises the naive bound."""
    rng = np.random.default_rng(seed)
    posterior, X = random_posterior(rng, TWO), data(rng, TWO)
    S = jnp.asarray(X.T @ X / N_ROWS)
    new = sweep_two(S, posterior).posterior
    scores = scores_at(posterior, TWO)
    best = naive_bound(X, scores, new, TWO)
    changes = {
        "σ²": new._replace(noise=new.noise * 1.01),
        "α": new._replace(precisions=new.precisions * rng.uniform(0.98, 1.02, new.precisions.shape)),
    }
    for what, changed in changes.items():
        assert_at_most(naive_bound(X, scores, changed, TWO) - best, 1e-9 * abs(best), f"gain from changing {what}")
    before = new._replace(precisions=posterior.precisions, noise=posterior.noise)  # what the loadings were maximised against
    best = naive_bound(X, scores, before, TWO)
    moved = before._replace(mean=before.mean + 0.01 * masked_normal(rng, TWO))
    assert_at_most(naive_bound(X, scores, moved, TWO) - best, 1e-9 * abs(best), "gain from changing E[Λ]")
    shrunk = before._replace(column_covariances=before.column_covariances * 1.01)
    assert_at_most(naive_bound(X, scores, shrunk, TWO) - best, 1e-9 * abs(best), "gain from changing C_m")
    C_z, B = scores
    best = naive_bound(X, scores, posterior, TWO)
    assert_at_most(naive_bound(X, (1.01 * C_z, B), posterior, TWO) - best, 1e-9 * abs(best), "gain from changing C_z")
    assert_at_most(naive_bound(X, (C_z, 0.99 * B), posterior, TWO) - best, 1e-9 * abs(best), "gain from changing B")


@pytest.mark.slow
def test_the_bound_never_falls_along_the_fit():
    """With more steps −bound/ν is lower or the same, acceleration included."""
    for seed in range(6):
        _, S = problem(TWO, seed, noise=2.0, n=150)
        early, late = (float(fitted_by("hcl-vb", **options)(S, TWO).objective) for options in ({"max_steps": 4}, {}))
        assert_at_most((late - early) / abs(early), 1e-13, f"seed {seed}: change of −bound/ν after step 4, relative")


def test_the_reported_objective_is_the_bound_of_the_posterior():
    rng = np.random.default_rng(1)
    truth, _ = problem(TWO, noise=0.5)
    X = rng.standard_normal((N_ROWS, 5)) @ np.asarray(truth.loadings).T + np.sqrt(0.5) * rng.standard_normal((N_ROWS, 16))
    S = SampleCovariance(jnp.asarray(X.T @ X / N_ROWS), n=N_ROWS + 1)
    posterior, estimate = jax.jit(fit_posterior, static_argnums=1)(S, TWO)
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


def test_relevance_tells_what_is_there_from_what_is_not():
    """Twice the structures and a factor too many: columns that are there stand far out, others hardly."""
    hierarchy = Hierarchy((12, 10), {(1, 2): 2, (1,): 1})
    fitted = Hierarchy(hierarchy.dims, {(1, 2): 3, (1,): 1, (2,): 2})
    fit = jax.jit(fit_posterior, static_argnums=1)
    for seed in range(5):
        posterior, _ = fit(problem(hierarchy, seed, noise=0.1, n=5000)[1], fitted)
        relevances = np.asarray(relevance(posterior, fitted))
        assert (relevances[~fitted.modality_mask] == 0).all()
        ordered = np.sort(relevances, axis=None)[::-1]
        assert_at_least(ordered[4], 1000, f"seed {seed}: the least relevance of a column that is there")
        assert_at_most(ordered[5], 100, f"seed {seed}: the largest relevance of one that is not")
        found = found_columns(relevances, fitted)
        missed = [s for s in hierarchy.structures if len(found.get(s, [])) < hierarchy.rank(s)]
        assert not missed, f"seed {seed}: too few columns found in {missed}"


def test_found_columns_reads_the_table():
    relevances = np.array([[9.0, 0.2, 3.0, 0.0, 0.0], [8.0, 5.0, 0.0, 0.9, 0.1]])
    assert found_columns(relevances, TWO) == {(1, 2): [0], (2,): [1], (1,): [2]}


def test_pure_noise_is_fitted_by_nothing():
    S = SampleCovariance(2.0 * jnp.eye(16), n=500)
    estimate = fitted_by("hcl-vb")(S, TWO)
    assert estimate.status != 2
    assert_at_most(float(jnp.linalg.norm(estimate.loadings)) ** 2, 1e-2, "squared norm of the loadings")
    assert_at_most(abs(float(estimate.noise_variance) / 2 - 1), 1e-3, "relative error of σ²")


@pytest.mark.parametrize("n", [1e4, 1e8])
def test_the_prior_fades_with_the_sample(n):
    """The floor of 1e-3 is the stopping rule's: a bound 1e-7 of itself below its maximum leaves an error of about its root."""
    _, S = problem(TWO, noise=0.5, n=2000)
    S = SampleCovariance(S.matrix, n=n)
    vb, ml = (np.asarray(fitted_by(name)(S, TWO).loadings) for name in ("hcl-vb", "hcl-ml"))
    assert_at_most(relative(vb @ vb.T, ml @ ml.T), 30 / n + 1e-3, f"hcl-vb against hcl-ml at n = {n:g}")
