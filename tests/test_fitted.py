"""An HCL estimate as a fit to rows: scores are posterior means, also where a row lacks views."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from hcl_jax import Hierarchy
from hcl_jax.baselines import BASELINES
from hcl_jax.fitted import fit_estimator, variance_explained

H = Hierarchy((6, 5, 4), {"123": 1, "12": 1, "1": 1, "3": 1})


def make_views(n=300, seed=0):
    k_latent, k_noise = jr.split(jr.key(seed))
    z = jr.normal(k_latent, (n, H.n_factors))
    loadings = jnp.where(H.mask, jr.normal(jr.key(99), H.mask.shape), 0)
    x = z @ loadings.T + 0.5 * jr.normal(k_noise, (n, H.n_features)) + 3.0
    return [scale * x[:, H.rows(m)] for m, scale in zip(H.modalities, (1.0, 50.0, 0.01), strict=True)]


VIEWS = make_views()
FIT = fit_estimator(VIEWS, H, "hcl-ml", noise="feature")


def test_a_row_that_lacks_views_is_scored_by_the_posterior_of_the_others():
    there = np.ones((300, 3), bool)
    there[:4] = [[True, False, True], [False, True, True], [False, False, True], [False, False, False]]
    scores = FIT.transform(VIEWS, there)
    Z, psi = np.asarray(FIT.standardise(VIEWS)), np.asarray(FIT.noise_variance)
    of_feature = np.repeat([0, 1, 2], H.dims)
    for i in range(6):
        seen = there[i][of_feature]
        L = np.asarray(FIT.loadings)[seen]
        covariance = L @ L.T + np.diag(psi[seen])
        expected = L.T @ np.linalg.solve(covariance, Z[i, seen]) if seen.any() else np.zeros(H.n_factors)
        np.testing.assert_allclose(scores[i], expected, rtol=1e-8, atol=1e-10)


def test_absent_views_may_be_nan_and_cells_may_not():
    there = np.ones((300, 3), bool)
    there[:9, 1] = False
    as_nan = [VIEWS[0], VIEWS[1].at[:9].set(jnp.nan), VIEWS[2]]
    np.testing.assert_array_equal(FIT.transform(as_nan), FIT.transform(VIEWS, there))
    with pytest.raises(ValueError, match="views: view 2 holds NaN or infinite values in 1 of 1500 cells; expected"):
        FIT.transform([VIEWS[0], VIEWS[1].at[0, 0].set(jnp.nan), VIEWS[2]])


def test_a_decomposition_without_a_noise_model_refuses_them():
    fitted = BASELINES["ajive"](VIEWS, H)
    with pytest.raises(ValueError, match=r"views: lack some rows.*expected"):
        fitted.transform([VIEWS[0], VIEWS[1].at[:9].set(jnp.nan), VIEWS[2]])


@pytest.mark.parametrize("bad", [np.ones((300, 2), bool), np.ones((300, 3)), "all"])
def test_bad_presence_is_named(bad):
    with pytest.raises(ValueError, match=r"presence: .*expected"):
        FIT.transform(VIEWS, bad)


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match=r"name: unknown estimator 'pca'; expected one of hcl-vb, hcl-ml"):
        fit_estimator(VIEWS, H, "pca")


def test_units_do_not_matter_and_every_view_is_explained():
    other = fit_estimator([10 * VIEWS[0], VIEWS[1], VIEWS[2] - 7], H, "hcl-ml", noise="feature")
    np.testing.assert_allclose(other.transform([10 * VIEWS[0], VIEWS[1], VIEWS[2] - 7]), FIT.transform(VIEWS), atol=2e-3)
    # rounding starts the two fits apart, and the stopping rule leaves them up to a few 1e-4 of a score's deviation apart
    table = variance_explained(FIT, VIEWS)
    for m in H.modalities:
        assert sum(share for (view, _), share in table.items() if view == m) > 0.5


LACKING = np.ones((300, 3), bool)
LACKING[np.arange(0, 300, 2), np.arange(150) % 3] = False
PARTLY = fit_estimator(VIEWS, H, "hcl-ml", presence=LACKING, noise="view")


def test_scores_have_the_covariance_of_the_views_that_are_there():
    L, psi = np.asarray(FIT.loadings), np.asarray(FIT.noise_variance)
    patterns = np.array([[True, True, True], [False, True, False], [False, False, False]])
    for own, covariance in zip(patterns, FIT.score_covariances(patterns), strict=True):
        seen = own[np.repeat([0, 1, 2], H.dims)]
        Sigma = L[seen] @ L[seen].T + np.diag(psi[seen])
        np.testing.assert_allclose(covariance, np.eye(4) - L[seen].T @ np.linalg.solve(Sigma, L[seen]), atol=1e-10)


def test_an_absent_view_is_its_conditional_mean_and_deviation():
    there = np.ones((300, 3), bool)
    there[:5, 1] = there[3, 0] = False
    values, deviations = FIT.impute(VIEWS, there)
    X = np.concatenate(VIEWS, axis=1)
    centre, scale = np.asarray(FIT.centre), np.asarray(FIT.scale)
    L, psi = scale[:, None] * np.asarray(FIT.loadings), scale**2 * np.asarray(FIT.noise_variance)
    Sigma = L @ L.T + np.diag(psi)
    for i in range(7):
        seen = there[i][np.repeat([0, 1, 2], H.dims)]
        np.testing.assert_array_equal(values[i, seen], X[i, seen])
        assert not np.asarray(deviations)[i, seen].any()
        coefficients = np.linalg.solve(Sigma[np.ix_(seen, seen)], Sigma[np.ix_(seen, ~seen)])
        expected = centre[~seen] + (X[i] - centre)[seen] @ coefficients
        conditional = Sigma[np.ix_(~seen, ~seen)] - Sigma[np.ix_(~seen, seen)] @ coefficients
        np.testing.assert_allclose(values[i, ~seen], expected, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(deviations[i, ~seen] ** 2, np.diag(conditional), rtol=1e-8)


def test_estimation_widens_predictions_as_in_a_regression_on_the_scores():
    """With scores that are all but known the prediction of a view is an ordinary regression on them, whose variance is known."""
    assert PARTLY.status == 0
    plain = eqx.tree_at(lambda fit: fit.spread, PARTLY, None)
    (values, wider), (same, deviations) = PARTLY.impute(VIEWS, LACKING), plain.impute(VIEWS, LACKING)
    np.testing.assert_array_equal(values, same)
    absent = ~LACKING[:, np.repeat([0, 1, 2], H.dims)]
    ratios = np.asarray(wider)[absent] / np.asarray(deviations)[absent]
    assert ratios.min() > 1
    assert ratios.max() < 1.1
    psi, n = np.asarray(PARTLY.noise_variance)[0], LACKING[:, 0].sum()
    rows = np.column_stack([np.ones(n), np.asarray(PARTLY.factors)[LACKING[:, 0]][:, :3]])
    covariances = np.asarray(PARTLY.score_covariances(LACKING[LACKING[:, 0]]))[:, :3, :3] * 299 / 300
    gram = rows.T @ rows
    gram[1:, 1:] += covariances.sum(axis=0)
    inverse = np.linalg.inv(gram)
    at = np.array([1.0, 0.3, -1.0, 0.5])
    spread = np.asarray(PARTLY.spread)[0]
    expected = n / (n - 4) * (psi + psi * at @ inverse @ at) - psi
    np.testing.assert_allclose(psi * at @ spread[:4, :4] @ at, expected, rtol=1e-8)


def test_rows_that_lack_views_are_fitted_in_the_units_of_each_feature():
    other = [view * scale + 5 for view, scale in zip(VIEWS, (3.0, 0.01, 100.0), strict=True)]
    moved = fit_estimator(other, H, "hcl-ml", presence=LACKING, noise="view")
    np.testing.assert_allclose(moved.transform(other, LACKING), PARTLY.factors, atol=1e-5)
    np.testing.assert_allclose(PARTLY.transform(VIEWS, LACKING), PARTLY.factors, atol=1e-12)
    with pytest.raises(ValueError, match=r"name: is 'hcl-gd', and views lack some rows; expected one of hcl-vb, hcl-ml"):
        fit_estimator(VIEWS, H, "hcl-gd", presence=LACKING)


def test_a_decomposition_without_a_noise_model_predicts_no_view():
    fitted = BASELINES["ajive"](VIEWS, H)
    with pytest.raises(ValueError, match=r"fitted: .*no noise variances; expected"):
        fitted.impute(VIEWS, LACKING)


@pytest.mark.parametrize("missing", ["views", "impute-cells"])
def test_a_constant_feature_of_a_view_that_rows_lack_is_its_value(missing):
    views = [VIEWS[0], VIEWS[1].at[:, 2].set(7.1), VIEWS[2]]
    fit = fit_estimator(views, H, "hcl-ml", presence=LACKING, noise="view", missing=missing)
    values, deviations = fit.impute(views, LACKING, missing=missing)
    assert fit.status == 0
    np.testing.assert_allclose(values[:, 8], 7.1, rtol=1e-15)
    assert not deviations[:, 8].any()
    assert jnp.isfinite(fit.factors).all()
