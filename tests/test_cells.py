"""Rows that lack single cells: against the likelihood of what is there written out row by row, and against whole views."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TWO, assert_at_most, assert_close, assert_within, masked_normal, relative

from hcl_jax.estimators.cells import complete_cells, hcl_ml_by_cell
from hcl_jax.estimators.missing import PatternMoments, hcl_ml_by_pattern
from hcl_jax.fisher import pool
from hcl_jax.fitted import fit_estimator
from hcl_jax.structure import CONVERGED


def sample(seed=0, n=120, share=0.15):
    rng = np.random.default_rng(seed)
    loadings, mean = masked_normal(rng, TWO), 3 * rng.standard_normal(16)
    X = mean + rng.standard_normal((n, 5)) @ loadings.T + 0.7 * rng.standard_normal((n, 16))
    return X, np.where(rng.random(X.shape) < share, np.nan, X)


def dense_deviance(loadings, psi, mean, rows):
    """−2 log-likelihood/ν of the cells that are there, row by row: a missing one counts as 0 of variance 1."""
    here = ~np.isnan(rows)
    rest, n = jnp.where(here, rows - mean[None, :], 0), len(rows)
    own = here[:, :, None] & here[:, None, :]
    Sigma = jnp.where(own, (loadings @ loadings.T + jnp.diag(psi))[None], jnp.eye(16)[None])
    quadratic = jnp.sum(rest * jnp.linalg.solve(Sigma, rest[:, :, None])[:, :, 0])
    return (np.log(2 * np.pi) * here.sum() + jnp.linalg.slogdet(Sigma)[1].sum()) / n + quadratic / (n - 1)


@pytest.mark.parametrize("noise", ["view", "feature"])
def test_the_maximum_is_stationary_and_its_objective_the_deviance_of_what_is_there(noise):
    """The rule stops at a gain of 1e-10, so where the gradient is about the root of it."""
    _, rows = sample()
    fit, mean = hcl_ml_by_cell(jnp.asarray(rows), TWO, noise=noise)
    assert (int(fit.status), fit.method, fit.noise) == (CONVERGED, "hcl-ml", noise)
    assert_close(fit.objective, dense_deviance(fit.loadings, fit.noise_variance, mean, rows), "−2 log-likelihood/ν")
    along, by_feature, by_mean = jax.grad(dense_deviance, argnums=(0, 1, 2))(fit.loadings, fit.noise_variance, mean, rows)
    assert_at_most(np.abs(np.where(TWO.mask, along, 0)).max(), 1e-3, f"{noise}: gradient along the loadings")
    assert_at_most(np.abs(pool(by_feature * fit.noise_variance, TWO, noise)).max(), 1e-3, f"{noise}: gradient along log ψ")
    assert_at_most(np.abs(by_mean).max(), 1e-3, f"{noise}: gradient along the mean")


def test_whole_views_are_cells_too():
    X, rows = sample(share=0.0)
    rows[:30, :9] = rows[30:60, 9:] = np.nan
    fit, mean = hcl_ml_by_cell(jnp.asarray(rows), TWO, noise="view")
    other, other_mean = hcl_ml_by_pattern(PatternMoments.from_data([rows[:, :9], rows[:, 9:]]), TWO, noise="view")
    assert_at_most(abs(float(fit.objective - other.objective)) / 16, 1e-9, "deviance, per feature: they stop at gains of 1e-10")
    assert_at_most(relative(fit.loadings @ fit.loadings.T, other.loadings @ other.loadings.T), 1e-4, "FFᵀ")
    assert_at_most(relative(mean, other_mean), 1e-4, "mean")


def test_cells_are_completed_by_their_conditional_means_and_deviations():
    _, rows = sample(n=12)
    rng = np.random.default_rng(1)
    L, psi, mean = masked_normal(rng, TWO), rng.uniform(0.3, 2, 16), rng.standard_normal(16)
    values, deviations = complete_cells(*map(jnp.asarray, (rows, L, psi, mean)))
    Sigma = L @ L.T + np.diag(psi)
    for row, value, deviation in zip(rows, np.asarray(values), np.asarray(deviations), strict=True):
        seen = ~np.isnan(row)
        np.testing.assert_array_equal(value[seen], row[seen])
        assert not deviation[seen].any()
        coefficients = np.linalg.solve(Sigma[np.ix_(seen, seen)], Sigma[np.ix_(seen, ~seen)])
        np.testing.assert_allclose(value[~seen], mean[~seen] + (row - mean)[seen] @ coefficients, rtol=1e-9, atol=1e-9)
        conditional = np.diag(Sigma[np.ix_(~seen, ~seen)] - Sigma[np.ix_(~seen, seen)] @ coefficients)
        np.testing.assert_allclose(deviation[~seen] ** 2, conditional, rtol=1e-9)


def test_a_feature_that_is_hardly_there_is_named():
    _, rows = sample()
    rows[1:, 4] = np.nan
    rows[0, 4] = 1.0
    with pytest.raises(ValueError, match="rows: feature 4 is there in 1 of 120 rows; expected at least 2"):
        hcl_ml_by_cell(jnp.asarray(rows), TWO)


def split(X):
    return [X[:, :9], X[:, 9:]]


def test_a_fit_to_rows_that_lack_cells_completes_them_in_their_units():
    """Four of five cells of strong factors are there: the others are found to a fraction of their deviation."""
    X, rows = sample(n=300)
    units = np.repeat([100.0, 0.01], [9, 7])
    fit = fit_estimator(split(rows * units), TWO, "hcl-ml", missing="impute-cells", noise="view")
    assert int(fit.status) == CONVERGED
    values, deviations = fit.impute(split(rows * units), missing="impute-cells")
    lacking = np.isnan(rows)
    np.testing.assert_array_equal(np.asarray(values)[~lacking], (rows * units)[~lacking])
    errors = (np.asarray(values) / units - X)[lacking]
    assert_at_most(np.mean(errors**2) / np.mean((X - X.mean(axis=0))[lacking] ** 2), 0.4, "share of the variance that is missed")
    coverage = np.mean(np.abs(errors) <= 1.645 * (np.asarray(deviations) / units)[lacking])
    assert_within(coverage, 0.9, 0.05, "coverage of 90 % intervals: 700 cells, of which some share a row")


def test_missing_cells_are_counted_unless_they_are_to_be_imputed():
    _, rows = sample()
    count = np.isnan(rows[:, :9]).sum()
    with pytest.raises(ValueError, match=f"views: view 1 holds NaN or infinite values in {count} of 1080 cells; expected"):
        fit_estimator(split(rows), TWO, "hcl-ml")
    with pytest.raises(ValueError, match="name: is 'hcl-vb', and cells may be missing; expected hcl-ml"):
        fit_estimator(split(rows), TWO, "hcl-vb", missing="impute-cells")
    with pytest.raises(ValueError, match="missing: is 'drop'; expected one of views, impute-cells"):
        fit_estimator(split(rows), TWO, missing="drop")
    rows[0, 0] = np.inf
    with pytest.raises(ValueError, match="views: view 1 holds infinite values in 1 of 1080 cells"):
        fit_estimator(split(rows), TWO, "hcl-ml", missing="impute-cells")
