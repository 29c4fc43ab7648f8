"""An HCL estimate as a fit to rows: scores are posterior means, also where a row lacks views."""

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
    np.testing.assert_allclose(other.transform([10 * VIEWS[0], VIEWS[1], VIEWS[2] - 7]), FIT.transform(VIEWS), atol=1e-4)
    table = variance_explained(FIT, VIEWS)
    for m in H.modalities:
        assert sum(share for (view, _), share in table.items() if view == m) > 0.5
