"""Draws have the law they claim: zero pattern, spectra, moments; the same key gives the same draw, another key another."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    CHAIN,
    SHARED,
    TWO,
    assert_at_least,
    assert_at_most,
    assert_close,
    assert_within,
    normal_truth,
    problem,
    relative,
)
from scipy import stats

from hcl_jax import (
    LATENT_LAWS,
    Hierarchy,
    SampleCovariance,
    sample_data_covariance,
    sample_factored_covariance,
    sample_loadings,
    sample_observations,
    sample_truth,
    sample_wishart_covariance,
)
from hcl_jax.model import ResponseTruth, Truth

FLOAT = jnp.dtype(float)
draw_loadings = jax.jit(jax.vmap(sample_loadings, (0, None, None)), static_argnums=(1, 2))
draw_wisharts = jax.jit(jax.vmap(sample_wishart_covariance, (0, None, None)))
draw_data = jax.jit(sample_data_covariance, static_argnames=("latent", "chunk"))


def blocks(loadings, hierarchy):
    return {(s, m): np.asarray(loadings[..., hierarchy.rows(m), hierarchy.columns(s)]) for s in hierarchy.structures for m in s}


def z_of_means(draws, truth, nu):
    """How many standard errors the mean of Wishart draws lies from Σ, by entry: Var S_ij = (Σ_iiΣ_jj + Σ_ij²)/ν."""
    Sigma = np.asarray(truth.covariance())
    variance = (np.outer(np.diagonal(Sigma), np.diagonal(Sigma)) + Sigma**2) / nu
    return np.abs((np.asarray(draws).mean(0) - Sigma) / np.sqrt(variance / len(draws)))


def test_loadings_have_the_zero_pattern_and_the_spectrum_of_the_paper():
    loadings = np.asarray(draw_loadings(jr.split(jr.key(0), 5), CHAIN, FLOAT))
    assert (loadings[:, ~CHAIN.mask] == 0).all()
    assert (loadings[:, CHAIN.mask] != 0).all()
    for (s, m), block in blocks(loadings, CHAIN).items():
        values = np.linalg.svd(block, compute_uv=False)
        assert values.max() <= 1.5, f"structure {s}, modality {m}: largest singular value {values.max():.4f}"
        assert values.min() >= 0.5, f"structure {s}, modality {m}: smallest singular value {values.min():.4f}"


def test_blocks_are_independent_and_isotropic():
    """200 pairs of blocks of three columns: singular values are uniform, directions have no preference (p-values above 1e-3)."""
    draws = np.asarray(draw_loadings(jr.split(jr.key(3), 200), SHARED, FLOAT))
    first, second = draws[:, :5], draws[:, 5:]
    values = np.linalg.svd(first, compute_uv=False).ravel()
    p = stats.kstest(values, "uniform", args=(0.5, 1.0)).pvalue
    assert p > 1e-3, f"singular values against Uniform(0.5, 1.5): p = {p:.2g}"
    signs = (first[:, 0, 0] > 0).sum()
    assert stats.binomtest(int(signs), 200).pvalue > 1e-3, f"{signs} of 200 corners are positive"
    correlation = np.corrcoef(first[:, :4].ravel(), second.ravel())[0, 1]
    assert_at_most(abs(correlation), 5 / np.sqrt(second.size), "correlation between the blocks of two modalities")


def test_keys_decide_the_draw():
    keys = jr.split(jr.key(0), 5)
    first, again = draw_loadings(keys, CHAIN, FLOAT), draw_loadings(keys, CHAIN, FLOAT)
    assert (first == again).all()
    assert relative(first[1], first[0]) > 0.5
    entries = np.concatenate([block.ravel() for block in blocks(first, CHAIN).values()])
    assert len(set(entries.tolist())) == entries.size, "two blocks share numbers"
    assert_close(first[2], sample_loadings(keys[2], CHAIN, FLOAT), "third of a batch, against itself alone")


def test_truth_knows_its_covariance():
    truth, _ = problem(TWO, noise=0.3)
    L = np.asarray(truth.loadings)
    assert_close(truth.gram(), L @ L.T, "ΛΛᵀ")
    assert_close(truth.covariance(), L @ L.T + 0.3 * np.eye(16), "Σ")


def unequal(hierarchy):
    """A truth with a noise variance of its own for every feature."""
    return normal_truth(np.random.default_rng(0), hierarchy, np.linspace(0.2, 3, hierarchy.n_features), "feature")


def test_draws_with_unequal_noise_have_the_covariance_of_the_truth():
    """The mean of Wishart draws is Σ, and so is the covariance of rows."""
    truth = unequal(SHARED)
    Sigma = np.asarray(truth.loadings @ truth.loadings.T) + np.diag(truth.noise_variance)
    assert_close(truth.covariance(), Sigma, "Σ")
    draws = draw_wisharts(jr.split(jr.key(6), 5000), truth, 30.0).matrix
    assert_at_most(z_of_means(draws, truth, 29).max(), 4.5, "largest z of a mean among 45 entries")
    rows, _ = sample_observations(jr.key(7), truth, 20_000)
    sample = SampleCovariance.from_data([rows]).matrix
    assert_at_most(z_of_means(sample[None], truth, 19_999).max(), 4.5, "largest z of the covariance of rows")


def test_trees_of_a_truth_may_hold_anything():
    truth, _ = problem(TWO)
    batch = eqx.tree_at(lambda truth: truth.noise_variance, truth, jnp.arange(3.0))
    axes = jax.tree.map(lambda leaf: None if leaf is truth.loadings else 0, truth)
    assert jax.vmap(Truth.covariance, in_axes=(axes,))(batch).shape == (3, 16, 16)


def test_conditional_mean_and_variance_are_those_of_gaussian_conditioning():
    truth = unequal(TWO)
    beta = np.random.default_rng(1).standard_normal(5)
    told = ResponseTruth(truth.loadings, truth.noise_variance, TWO, jnp.asarray(beta), jnp.asarray(0.3), noise="feature")
    cross, Sigma = np.asarray(truth.loadings) @ beta, np.asarray(truth.covariance())
    coefficients = np.linalg.solve(Sigma, cross)
    assert_close(told.conditional_mean(), coefficients, "Σ⁻¹Λβ")
    assert_close(told.conditional_variance(), 0.3 + beta @ beta - cross @ coefficients, "Var(y|x)")


@pytest.mark.parametrize("n", [30.0, 10.0])
def test_wishart_draws_have_wishart_moments(n):
    """E S = Σ, Cov(S_ij, S_kl) = (Σ_ikΣ_jl + Σ_ilΣ_jk)/ν, ν tr(Σ⁻¹S) ~ chi-squared(νd). n = 10 = d + 1 is the least."""
    truth, _ = problem(SHARED, noise=0.5)
    count, nu = 20_000, n - 1
    draws = np.asarray(draw_wisharts(jr.split(jr.key(5), count), truth, n).matrix)
    Sigma = np.asarray(truth.covariance())
    assert_at_most(np.abs(draws - draws.transpose(0, 2, 1)).max(), 1e-13, "asymmetry")
    assert_at_least(np.linalg.eigvalsh(draws).min(), 0, "smallest eigenvalue")
    assert_at_most(z_of_means(draws, truth, nu).max(), 4.5, "largest z of a mean among 45 entries")
    expected = (np.einsum("ik,jl->ijkl", Sigma, Sigma) + np.einsum("il,jk->ijkl", Sigma, Sigma)).reshape(81, 81) / nu
    assert_at_most(
        relative(np.cov(draws.reshape(count, 81).T), expected), 0.08, "covariances of pairs of entries (noise about 0.05)"
    )
    statistic = nu * np.trace(np.linalg.solve(Sigma[None], draws), axis1=1, axis2=2)
    p = stats.kstest(statistic, "chi2", args=(nu * 9,)).pvalue
    assert p > 1e-3, f"ν tr(Σ⁻¹S) against its chi-squared law: p = {p:.2g}"


def test_wishart_draws_reach_a_billion_samples_without_recompilation():
    truth, _ = problem(SHARED)
    draw = jax.jit(sample_wishart_covariance)
    for n in (50.0, 5000.0, 1e9):
        S = draw(jr.key(2), truth, jnp.asarray(n))
        assert_at_most(relative(S.matrix, truth.covariance()), 4 / np.sqrt(n), f"‖S − Σ‖/‖Σ‖ at n = {n:g}")
        assert float(S.nu) == n - 1
    assert draw._cache_size() == 1, "n is not a traced number"


def test_factored_draws_are_rows_with_the_right_covariance():
    truth, _ = problem(TWO, noise=0.5)
    draw = jax.jit(jax.vmap(partial(sample_factored_covariance, truth=truth, n_samples=10)))
    S = draw(jr.split(jr.key(1), 4000))
    assert S.matrix is None
    assert S.data.shape == (4000, 9, 16)
    assert (np.asarray(S.n) == 10).all()
    draws = np.einsum("bni,bnj->bij", S.data, S.data) / 9
    assert_at_most(z_of_means(draws, truth, 9).max(), 4.5, "largest z of a mean among 136 entries")


def test_chunks_add_up_to_the_covariance_of_all_rows():
    truth, _ = problem(TWO)
    rows = np.concatenate([np.asarray(sample_observations(jr.fold_in(jr.key(4), i), truth, 20, "laplace")[0]) for i in range(3)])
    for n in (7, 40, 45):
        S = draw_data(jr.key(4), truth, jnp.asarray(float(n)), latent="laplace", chunk=20)
        assert_close(S.matrix, np.cov(rows[:n].T), f"covariance of {n} rows in chunks of 20")
        assert float(S.n) == n
    assert draw_data._cache_size() == 1, "n is not a traced number"


def test_observations_follow_the_model():
    truth = Truth(problem(TWO)[0].loadings, jnp.zeros(()), TWO)
    x, z = sample_observations(jr.key(0), truth, 6, "uniform")
    assert_close(x, z @ truth.loadings.T, "x without noise")
    x, z = sample_observations(jr.key(0), problem(TWO, noise=4.0)[0], 20_000)
    residual = np.asarray(x - z @ truth.loadings.T)
    assert_within(residual.var(), 4.0, 4 * 4.0 * np.sqrt(2 / residual.size), "noise variance, ± 4 standard errors")


@pytest.mark.parametrize("latent", LATENT_LAWS)
def test_latent_laws_have_mean_zero_and_variance_one(latent):
    z = np.asarray(LATENT_LAWS[latent](jr.key(7), (200_000, 1), FLOAT))
    assert z.dtype == np.float64
    assert_within(z.mean(), 0, 4 / np.sqrt(z.size), f"{latent}: mean, ± 4 standard errors")
    assert_within((z**2).mean(), 1, 4 * (z**2).std() / np.sqrt(z.size) + 1e-12, f"{latent}: variance, ± 4 standard errors")


def test_latent_laws_are_what_their_names_say():
    draw = {name: np.asarray(law(jr.key(8), (20_000, 1), FLOAT))[:, 0] for name, law in LATENT_LAWS.items()}
    assert set(draw["rademacher"].tolist()) == {-1.0, 1.0}
    laws = {
        "gaussian": stats.norm(),
        "uniform": stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)),
        "laplace": stats.laplace(scale=np.sqrt(0.5)),
        "t": stats.t(10, scale=np.sqrt(0.8)),
        "elliptical": stats.t(10, scale=np.sqrt(0.8)),
    }
    assert set(laws) | {"rademacher"} == set(LATENT_LAWS)
    for name, law in laws.items():
        p = stats.kstest(draw[name], law.cdf).pvalue
        assert p > 1e-3, f"{name}: p = {p:.2g}"


def test_only_elliptical_factors_depend_on_each_other():
    """Uncorrelated all of them; squares correlate by (κ − 1)/(3κ − 1) under the multivariate t, κ = E[z₁²z₂²] = 8/6. Their sample
    correlation has a heavy tail, hence the wide tolerance."""
    for name, law in LATENT_LAWS.items():
        z = np.asarray(law(jr.key(9), (100_000, 2), FLOAT))
        assert_within(np.corrcoef(z.T)[0, 1], 0, 5 / np.sqrt(len(z)), f"{name}: correlation")
        if name != "rademacher":
            squares = 1 / 9 if name == "elliptical" else 0
            assert_within(np.corrcoef((z**2).T)[0, 1], squares, 0.04, f"{name}: correlation of squares")


def test_draws_follow_the_dtype():
    truth = jax.eval_shape(lambda: sample_truth(jr.key(0), SHARED, 0.5))
    assert truth.loadings.dtype == truth.noise_variance.dtype == jnp.float32
    single = jax.tree.map(lambda x: x.astype(jnp.float32), problem(SHARED)[0])
    for draw in (sample_wishart_covariance, sample_data_covariance, sample_factored_covariance):
        S = jax.eval_shape(lambda draw=draw: draw(jr.key(0), single, 30))
        assert (S.data if S.matrix is None else S.matrix).dtype == S.n.dtype == jnp.float32


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda truth: sample_truth(jr.key(0), TWO, -0.5), "noise_variance: is -0.5; expected non-negative numbers"),
        (lambda truth: sample_truth(jr.key(0), TWO, float("nan")), "noise_variance: holds NaN"),
        (
            lambda truth: sample_truth(jr.key(0), TWO, jnp.array([0.5, 0.2]), noise="view"),
            r"noise_variance: has shape \(2,\); expected one number, or one for each of 16 features",
        ),
        (lambda truth: sample_truth(jr.key(0), TWO, jnp.ones(16)), "noise: is 'shared' for noise variances of shape"),
        (lambda truth: sample_wishart_covariance(jr.key(0), truth, 16), "n: is 16; expected at least 17, one more"),
        (lambda truth: sample_factored_covariance(jr.key(0), truth, 1), "n_samples: is 1; expected an integer of at least 2"),
        (
            lambda truth: sample_data_covariance(jr.key(0), truth, 30, "cauchy"),
            "latent: unknown law 'cauchy'; expected one of gaussian",
        ),
        (lambda truth: sample_observations(jr.key(0), truth, 30, "normal"), "latent: unknown law 'normal'"),
        (lambda truth: Hierarchy.full((3, 9), 2), "modality 1 have ranks adding up to 4; expected at most its dimension 3"),
    ],
)
def test_refusals_name_the_argument(draw, message):
    with pytest.raises(ValueError, match=message) as refusal:
        draw(problem(TWO)[0])
    assert "\n" not in str(refusal.value)
