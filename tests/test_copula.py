"""Linear fits behind links that act feature by feature, or that are known."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import TWO, assert_at_least, assert_at_most, assert_close, masked_normal, relative

from hcl_jax import Hierarchy, Truth
from hcl_jax.fitted import fit_estimator
from hcl_jax.links import sample_linked_observations, sample_links
from hcl_jax.networks.links import CopulaConfig, fit_copula, fit_known

SIZED = Hierarchy.full((50, 50, 50), 4)
SAMPLER = jax.jit(sample_linked_observations, static_argnums=(3, 4))


def sized_truth(seed, hierarchy=SIZED):
    """Loadings N(0, 4/d_m), noise of standard deviation 0.3."""
    scale = np.sqrt(4 / np.repeat(hierarchy.dims, hierarchy.dims))[:, None]
    return Truth(jnp.asarray(scale * masked_normal(np.random.default_rng(seed), hierarchy)), jnp.asarray(0.09), hierarchy)


def drawn(link, seed, n, latent="gaussian", hierarchy=SIZED):
    """(views, latent factors, links, truth)."""
    truth = sized_truth(seed, hierarchy)
    links = sample_links(jr.key(seed), link, hierarchy, jnp.float64)
    views, z = SAMPLER(jr.key(100 + seed), truth, links, n, latent)
    return [np.array(view) for view in views], np.asarray(z), links, truth


def explained(scores, z):
    """R² of every column of z regressed on the scores, averaged."""
    design = np.column_stack([np.ones(len(scores)), scores])
    left = z - design @ np.linalg.lstsq(design, z, rcond=None)[0]
    return float(np.mean(1 - left.var(axis=0) / z.var(axis=0)))


def recovery(scores, z, hierarchy=SIZED):
    """(mean R² of the structures of three, two and one modality, the largest R² of another structure's factors)."""
    scores, table = np.asarray(scores, float), {}
    for s in hierarchy.structures:
        for t in hierarchy.structures:
            table[s, t] = explained(scores[:, hierarchy.columns(s)], z[:, hierarchy.columns(t)])
    levels = [np.mean([table[s, s] for s in hierarchy.structures if len(s) == size]) for size in (3, 2, 1)]
    return np.array(levels), max(r for (s, t), r in table.items() if s != t)


def small(n=300, link="sinh", seed=0):
    return drawn(link, seed, n, hierarchy=TWO)


def test_scores_do_not_see_increasing_functions_of_features():
    """Exactly where all values are kept, in the training rows: ranks are all that counts."""
    views = small(link="identity")[0]
    bent = [np.exp(views[0]) - 3, views[1] ** 3 + 0.01 * views[1]]
    fitted, other = fit_copula(views, TWO), fit_copula(bent, TWO)
    assert_close(other.transform(bent), fitted.transform(views), "scores")
    assert_close(other.linear.loadings, fitted.linear.loadings, "loadings")


@pytest.mark.slow
def test_of_more_rows_quantiles_are_kept_and_scores_change_little():
    views = small(n=3000, link="identity")[0]
    bent = [np.sinh(view) for view in views]
    assert_at_most(relative(fit_copula(bent, TWO).transform(bent), fit_copula(views, TWO).transform(views)), 5e-3, "scores")


def test_training_rows_have_their_scores_again_and_alone():
    views = small()[0]
    fitted = fit_copula(views, TWO)
    scores = fitted.transform(views)
    assert_close(scores, fitted.linear.factors, "scores again")
    assert_close(fitted.transform([view[7:8] for view in views]), scores[7:8], "scores of one row alone")


def test_ties_constant_and_discrete_features_are_finite():
    views = small()[0]
    views[0][:, 0] = 2.5
    views[0][:, 1] = np.round(views[0][:, 1])
    views[0][:, 2] = views[0][:, 2] > 0
    views[1][:, 0] = np.where(np.arange(300) == 4, 1.0, 0.0)
    fitted = fit_copula(views, TWO)
    scores = fitted.transform(views)
    assert bool(jnp.isfinite(scores).all())
    assert_at_most(jnp.abs(fitted.linear.loadings[0]).max(), 0, "loadings of a constant feature")
    views[0][:, 0] = 17.0
    assert_close(fitted.transform(views), scores, "whatever the constant feature is in new rows")


def test_rows_beyond_the_range_have_the_scores_of_its_ends():
    views = small()[0]
    fitted = fit_copula(views, TWO)
    far, ends = [np.full((1, p), 1e9) for p in TWO.dims], [view.max(axis=0, keepdims=True) for view in views]
    assert_close(fitted.transform(far), fitted.transform(ends), "scores")


def test_rows_without_a_view_have_the_posterior_mean_of_the_others():
    views = small()[0]
    fitted = fit_copula(views, TWO)
    rows, presence = [view[:6].copy() for view in views], np.ones((6, 2), bool)
    presence[3:5, 0], rows[0][3:5] = False, np.nan
    scores = fitted.transform(rows)
    assert_close(scores[:3], fitted.transform(views)[:3], "whole rows")
    L, psi = fitted.linear.loadings[9:], fitted.linear.noise_variance[9:]
    Z = fitted.linear.standardise(jnp.split(fitted.undo(jnp.concatenate([v[:6] for v in views], axis=1)), [9], axis=1))[3:5, 9:]
    W = jnp.eye(L.shape[1]) + L.T @ (L / psi[:, None])
    assert_close(scores[3:5], jnp.linalg.solve(W, L.T @ (Z / psi[None, :]).T).T, "rows of one view")
    assert_close(fitted.transform([view[:6] for view in views], presence), scores, "told by presence")


@pytest.mark.parametrize("name", ["hcl-vb", "hcl-svd", "naive-svd-denoised"])
def test_any_estimator_may_follow(name):
    views, z, *_ = small()
    fitted = fit_copula(views, TWO, CopulaConfig(estimator=name))
    assert int(fitted.status) == 0
    assert_at_least(explained(np.asarray(fitted.transform(views)), z), 0.7, f"{name}: R² of all factors")


def test_no_key_and_no_response_are_needed():
    views = small()[0]
    fitted = fit_copula(views, TWO, y=None, key=None)
    assert fitted.dims == TWO.dims
    assert bool((fitted.membership == TWO.modality_mask).all())
    with pytest.raises(ValueError, match="response"):
        fitted.predict(views)


def test_known_links_are_undone_exactly():
    """The same rows of the linear model behind any link, and up to the stop of the estimator the same scores."""
    views, _, links, _ = small(link="identity")
    plain = fit_known(views, TWO, links)
    for name in ("softplus", "leakyQ"):
        seen, _, links, _ = small(link=name)
        fitted = fit_known(seen, TWO, links)
        assert_close(fitted.undo(jnp.concatenate(seen, axis=1)), np.concatenate(views, axis=1), f"{name}: rows")
        assert_at_most(relative(fitted.transform(seen), plain.transform(views)), 1e-4, f"{name}: scores")
        absent = np.array([[True, False]] * 300)
        assert bool(jnp.isfinite(fitted.transform(seen, absent)).all())


def test_refusals_name_the_argument():
    views, _, links, _ = small(link="absolute")
    with pytest.raises(ValueError, match="links: that of modality 1"):
        fit_known(views, TWO, links)
    with pytest.raises(ValueError, match="links: are ByFeature"):
        fit_known(views, TWO, links[:1])
    with pytest.raises(ValueError, match="estimator"):
        CopulaConfig(estimator="pca")
    with pytest.raises(ValueError, match="views: have"):
        fit_copula(views[::-1], TWO)


def test_pure_under_jit():
    """Two programs round differently, and a fit stops where its likelihood is flat to a tolerance: scores move by its root."""
    views = [jnp.asarray(view) for view in small()[0]]
    compiled = jax.jit(lambda views: fit_copula(views, TWO).transform(views))(views)
    assert_at_most(relative(compiled, fit_copula(views, TWO).transform(views)), 1e-3, "scores")


def correlation_gram(truth):
    """ΛΛᵀ of features of variance 1."""
    scale = jnp.sqrt(jnp.diagonal(truth.covariance()))
    return truth.gram() / jnp.outer(scale, scale)


@pytest.mark.slow
def test_normal_scores_cost_next_to_nothing_on_gaussian_data():
    """n = 5,000: Gram error on the scale of correlations within 2 % of the same estimator on standardised features."""
    errors = {"copula": [], "standardised": []}
    for seed in range(5):
        views, _, _, truth = drawn("identity", seed, 5000)
        G = correlation_gram(truth)
        copula = fit_copula(views, SIZED).linear.loadings
        linear = fit_estimator(views, SIZED, "hcl-ml", noise="feature").loadings
        for name, L in (("copula", copula), ("standardised", linear)):
            errors[name].append(float(jnp.linalg.norm(L @ L.T - G)))
    assert_at_most(np.mean(errors["copula"]) / np.mean(errors["standardised"]), 1.02, "ratio of mean Gram errors")


@pytest.mark.slow
@pytest.mark.parametrize("link", ["sinh", "cubic"])
def test_links_by_feature_are_undone(link):
    """n = 8,000: R² of the latent factors of 2,000 further rows, by level, and the largest of other structures'."""
    found = []
    for seed in range(2):
        views, z, *_ = drawn(link, seed, 10_000)
        fitted = fit_copula([view[:8000] for view in views], SIZED)
        levels, leak = recovery(fitted.transform([view[8000:] for view in views]), z[8000:])
        found.append(levels)
        assert_at_most(leak, 0.01, f"{link}, seed {seed}: leak")
    for mean, least, level in zip(np.mean(found, axis=0), (0.985, 0.978, 0.955), ("all", "pairs", "private"), strict=True):
        assert_at_least(mean, least, f"{link}: R² of structures of {level}")
