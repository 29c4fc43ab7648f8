"""One contract for all decompositions: what a row's scores are does not depend on other rows, and bad input is named."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from hcl_jax import Hierarchy
from hcl_jax.baselines import BASELINES, SUPERVISED
from hcl_jax.fitted import activity, column_structures, variance_explained

HIERARCHY = Hierarchy((6, 5, 4), {(1, 2, 3): 1, (1, 2): 1, (1,): 1, (3,): 1})


def make_views(n=45, seed=0, scale=(1.0, 30.0, 0.01)):
    """Three views of very different scales with shared factors, and a response."""
    k_latent, k_loadings, k_noise, k_response = jr.split(jr.key(seed), 4)
    z = jr.normal(k_latent, (n, 4))
    loadings = jnp.where(HIERARCHY.mask, jr.normal(jr.key(99), (15, 4)), 0)
    x = z @ loadings.T + 0.3 * jr.normal(k_noise, (n, 15)) + 2.0
    views = [s * x[:, HIERARCHY.rows(m)] for m, s in zip(HIERARCHY.modalities, scale, strict=True)]
    return views, z[:, 0] - z[:, 3] + 0.2 * jr.normal(k_response, (n,))


VIEWS, Y = make_views()
FITS: dict = {}


def fit(name):
    if name not in FITS:
        program = jax.jit(lambda views, y, key: BASELINES[name](views, HIERARCHY, y=y, key=key))
        FITS[name] = program, program(VIEWS, Y, jr.key(1))
    return FITS[name]


def named(names):
    """Rank rules, and HNN, take long to compile; what rules share with their method at given ranks is tested with that."""
    return [pytest.param(name, marks=pytest.mark.slow) if "-" in name or name == "hnn" else name for name in names]


@pytest.fixture(params=named(BASELINES))
def name(request):
    return request.param


@pytest.fixture(params=named(name for name in BASELINES if not name.endswith("-unscaled")))
def unit_free_name(request):
    """Methods that scale the views: the others depend on their units by definition."""
    return request.param


def test_scores_do_not_depend_on_the_company_of_a_row(name):
    _, fitted = fit(name)
    new, _ = make_views(n=7, seed=3)
    together = fitted.transform(new)
    alone = jnp.concatenate([fitted.transform([view[i : i + 1] for view in new]) for i in range(7)])
    np.testing.assert_allclose(alone, together, rtol=1e-9, atol=1e-12)
    shuffled = fitted.transform([view[::-1] for view in new])[::-1]
    np.testing.assert_allclose(shuffled, together, rtol=1e-9, atol=1e-12)


def test_scores_of_the_training_rows_span_the_training_factors(unit_free_name):
    """What a method does to its own rows, the map does to any: least-squares scores of the fitted part are the factors."""
    _, fitted = fit(unit_free_name)
    used = np.asarray(fitted.membership.any(axis=0))
    scores = np.asarray(fitted.transform(VIEWS))
    assert np.isfinite(scores).all()
    assert np.abs(scores[:, ~used]).max(initial=0) <= 1e-12 * np.abs(scores).max()
    factors = np.asarray(fitted.factors)[:, used]
    correlations = [abs(np.corrcoef(scores[:, used][:, j], factors[:, j])[0, 1]) for j in range(used.sum())]
    assert min(correlations, default=1) > 0.5, correlations


def test_membership_is_where_the_loadings_are(name):
    _, fitted = fit(name)
    held = np.stack([np.abs(fitted.loadings[HIERARCHY.rows(m)]).max(axis=0) > 0 for m in HIERARCHY.modalities])
    assert not (held & ~np.asarray(fitted.membership)).any()
    assert (np.asarray(fitted.membership).any(axis=0) == held.any(axis=0)).all()
    assert int(fitted.status) == 0


def test_tables(name):
    _, fitted = fit(name)
    counts, explained = activity(fitted), variance_explained(fitted, VIEWS)
    assert sum(counts.values()) == sum(bool(s) for s in column_structures(fitted))
    Z = fitted.standardise(VIEWS)
    for (m, s), share in explained.items():
        assert share <= 1 + 1e-9
        if m not in s:
            assert share == 0
    whole = fitted.part(fitted.membership.any(axis=0)) / fitted.scale[None, :]
    left = float(jnp.sum((Z - whole) ** 2) / jnp.sum(Z**2))
    assert 0 <= left < 1 or not counts


def test_scaling_and_shifting_a_view_change_nothing(unit_free_name):
    """No method may lose because of units: the fitted part of a view is that of the view as it was, in its new units."""
    program, fitted = fit(unit_free_name)
    moved = program([VIEWS[0] * 10 + 4, VIEWS[1], VIEWS[2] - 100], Y, jr.key(1))
    assert activity(moved) == activity(fitted)
    kept = fitted.membership.any(axis=0)
    one, other = (np.asarray(f.part(kept)) for f in (fitted, moved))
    for m, factor in zip(HIERARCHY.modalities, (10, 1, 1), strict=True):
        rows = HIERARCHY.rows(m)
        np.testing.assert_allclose(other[:, rows], factor * one[:, rows], atol=2e-3 * factor * np.abs(one[:, rows]).max())


def test_constant_columns_contribute_nothing(name):
    program, _ = fit(name)
    views = [VIEWS[0].at[:, 2].set(7.0), *VIEWS[1:]]
    fitted = program(views, Y, jr.key(1))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in (fitted.loadings, fitted.factors, fitted.score_map, fitted.scale))
    assert float(jnp.abs(fitted.loadings[2]).max()) < 1e-9


def test_supervised_methods_predict_and_others_say_that_they_do_not(name):
    _, fitted = fit(name)
    if name not in SUPERVISED:
        with pytest.raises(ValueError, match="saw no response"):
            fitted.predict(VIEWS)
        return
    new, y = make_views(n=400, seed=5)
    assert np.corrcoef(fitted.predict(new), y)[0, 1] > 0.8


@pytest.mark.parametrize("method", sorted({name.partition("-")[0] for name in BASELINES}))
def test_bad_views_are_named(method):
    def refused(views, message, y=Y):
        with pytest.raises(ValueError, match=message):
            BASELINES[method](views, HIERARCHY, y=y, key=jr.key(0))

    refused([], "views: are none; expected at least one")
    refused([VIEWS[0], VIEWS[1][:-1], VIEWS[2]], "views: view 2 has shape")
    refused([VIEWS[0].at[3, 1].set(jnp.nan), *VIEWS[1:]], "views: view 1 holds NaN")
    refused([VIEWS[0], VIEWS[2], VIEWS[1]], "views: have")
    if method in SUPERVISED:
        refused(VIEWS, "y: ", y=None)
        refused(VIEWS, "y: ", y=Y[:-1])
