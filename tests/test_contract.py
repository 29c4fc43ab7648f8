"""Every entry of the registries keeps the contract."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    HIERARCHICAL,
    LIKELIHOOD,
    PUBLISHED,
    TWO,
    assert_at_most,
    fitted_by,
    identified,
    permuted_modalities,
    population,
    problem,
    relative,
)

from hcl_jax import ESTIMATORS, LIMITS, Estimate, Hierarchy, SampleCovariance
from hcl_jax.estimators.estimate import ON_BOUND
from hcl_jax.experiments.recovery import RECOVERY_LIMITS

# Equal dimensions and ranks: permuting the modalities maps these to themselves, so one compiled program serves both orders.
PAIR, TRIPLE = Hierarchy((8, 8), {(1, 2): 2, (1,): 1, (2,): 1}), Hierarchy.full((7, 7, 7), 1)
REGISTERED = {
    "hcl-vb",
    "hcl-ml",
    "hcl-shrunk",
    "hcl-gn",
    "hcl-gd",
    "hcl-svd",
    "hcl-gd-published",
    "hcl-svd-published",
    "naive-svd-denoised",
    "naive-svd",
}
# The published descent depends on the signs of its start's eigenvectors (never aligned), and its step length has units.
EQUIVARIANT = [name for name in ESTIMATORS if name != "hcl-gd-published"]
TOLERANCE = dict.fromkeys(ESTIMATORS, 1e-5) | {"hcl-vb": 1e-3}  # what the stopping rules leave


def symmetric(name):
    return TRIPLE if name in PUBLISHED else PAIR


def test_the_registries_hold_what_the_design_names():
    assert set(ESTIMATORS) == REGISTERED
    assert set(LIMITS) == {*RECOVERY_LIMITS, "bayes"}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_have_their_shapes_and_dtypes(name):
    hierarchy = symmetric(name)
    estimate = fitted_by(name)(problem(hierarchy, noise=0.5, n=500)[1], hierarchy)
    assert isinstance(estimate, Estimate)
    assert estimate.loadings.shape == (hierarchy.n_features, hierarchy.n_factors)
    assert estimate.noise_variance.shape == estimate.status.shape == estimate.steps.shape == estimate.objective.shape == ()
    assert estimate.loadings.dtype == estimate.noise_variance.dtype == estimate.objective.dtype == jnp.float64
    assert jnp.issubdtype(estimate.status.dtype, jnp.integer)
    assert jnp.issubdtype(estimate.steps.dtype, jnp.integer)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(estimate))
    assert estimate.status == 0, f"{name}: status {int(estimate.status)} after {int(estimate.steps)} steps"
    assert estimate.noise_variance > 0
    if name in HIERARCHICAL:
        assert (np.asarray(estimate.loadings)[~hierarchy.mask] == 0).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_are_deterministic(name):
    hierarchy = symmetric(name)
    S = problem(hierarchy, noise=0.5, n=500)[1]
    first, second = (fitted_by(name)(S, hierarchy) for _ in range(2))
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_permuted_modalities_permute_the_estimate(name):
    hierarchy = symmetric(name)
    order = (2, 0, 1) if name in PUBLISHED else (1, 0)
    permuted, rows, _ = permuted_modalities(hierarchy, order)
    assert permuted == hierarchy
    S = problem(hierarchy, noise=0.5, n=500)[1]
    moved = SampleCovariance(S.matrix[np.ix_(rows, rows)], n=500)
    before, after = (
        identified(name, fitted_by(name)(S, hierarchy), hierarchy),
        identified(name, fitted_by(name)(moved, hierarchy), hierarchy),
    )
    assert_at_most(relative(after, before[np.ix_(rows, rows)]), TOLERANCE[name], f"{name}: modalities permuted")


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_permuted_features_permute_the_estimate(name):
    hierarchy = symmetric(name)
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.permutation(np.arange(hierarchy.n_features)[hierarchy.rows(m)]) for m in hierarchy.modalities])
    S = problem(hierarchy, noise=0.5, n=500)[1]
    moved = SampleCovariance(S.matrix[np.ix_(rows, rows)], n=500)
    before, after = (
        identified(name, fitted_by(name)(S, hierarchy), hierarchy),
        identified(name, fitted_by(name)(moved, hierarchy), hierarchy),
    )
    assert_at_most(relative(after, before[np.ix_(rows, rows)]), TOLERANCE[name], f"{name}: features permuted")


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_other_units_scale_the_estimate(name):
    """S in units 100 times as large: loadings scale by 10."""
    hierarchy = symmetric(name)
    S = problem(hierarchy, noise=0.5, n=500)[1]
    fits = [fitted_by(name)(SampleCovariance(c * S.matrix, n=500), hierarchy) for c in (1.0, 100.0)]
    before, after = (identified(name, fit, hierarchy) for fit in fits)
    assert_at_most(relative(after, 100 * before), TOLERANCE[name], f"{name}: units changed")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_broken_input_has_status_two(name):
    hierarchy = symmetric(name)
    S = problem(hierarchy, noise=0.5, n=500)[1]
    broken = eqx.tree_at(lambda S: S.matrix, S, S.matrix.at[3, :].set(jnp.nan).at[:, 3].set(jnp.nan))
    estimate = fitted_by(name)(broken, hierarchy)
    assert estimate.status == 2, f"{name}: status {int(estimate.status)} for a covariance with NaN"


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    "hierarchy",
    [TWO, Hierarchy((7, 7, 7), {(1, 2, 3): 1, (1,): 1}), Hierarchy((7, 7, 7), dict(TRIPLE.ranks) | {(1,): 2})],
    ids=str,
)
def test_the_published_methods_refuse_other_hierarchies(name, hierarchy):
    S = SampleCovariance(jnp.eye(hierarchy.n_features), n=100)
    with pytest.raises(
        ValueError, match="hierarchy: is .*; the published algorithms expect three modalities and all seven structures"
    ) as error:
        ESTIMATORS[name](S, hierarchy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_problems_that_do_not_fit_together_are_refused(name):
    """Before anything is computed, compiled or not; the degrees of freedom only where they are known."""
    hierarchy = symmetric(name)
    d, K = hierarchy.n_features, hierarchy.n_factors
    every = Hierarchy((2, 3, 2), {(1,): 2, (2,): 3, (3,): 2})
    static = {
        f"hierarchy: has dims {hierarchy.dims}, {d} features; expected 5, as": (SampleCovariance(jnp.eye(5), n=100), hierarchy),
        "hierarchy: has K = 7 factors for 7 features; expected fewer": (SampleCovariance(jnp.eye(7), n=100), every),
    }
    few = (SampleCovariance(jnp.eye(d), n=K + 1), hierarchy)
    cases = static | {f"hierarchy: has K = {K} factors for ν = n − 1 = {K} degrees of freedom; expected K < ν": few}
    for run, refused in ((ESTIMATORS[name], cases), (fitted_by(name), static)):
        for message, misfits in refused.items():
            with pytest.raises(ValueError, match=re.escape(message)):
                run(*misfits)


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in LIKELIHOOD])
def test_a_fit_that_leaves_no_noise_ends_on_a_bound(name):
    """K = ν factors take all of the variance; compiled code, which does not know n, says so in the status."""
    hierarchy = symmetric(name)
    x = np.random.default_rng(0).standard_normal((hierarchy.n_factors + 1, hierarchy.n_features))
    estimate = fitted_by(name)(SampleCovariance(np.cov(x.T), n=hierarchy.n_factors + 1), hierarchy)
    assert estimate.noise_variance == 0
    assert estimate.status == ON_BOUND


@pytest.mark.parametrize("name", RECOVERY_LIMITS)
def test_limits_have_status_and_steps(name):
    truth, S = problem(PAIR, noise=0.5, n=500)
    limits = jax.jit(LIMITS[name])(truth, S)
    assert limits["status"] == 0
    assert limits["steps"].shape == ()
    assert all(jnp.isfinite(value).all() for value in limits.values())
    assert all((limits[key] == value).all() for key, value in jax.jit(LIMITS[name])(truth, S).items())


def test_a_population_without_noise_is_handled():
    truth, _ = problem(PAIR, noise=0.0)
    for name in LIKELIHOOD:
        estimate = fitted_by(name)(population(truth, 500), PAIR)
        assert jnp.isfinite(estimate.loadings).all(), f"{name}: without noise the likelihood is unbounded, but nothing may be NaN"
        assert_at_most(
            relative(identified(name, estimate, PAIR), truth.gram()), 1e-2, f"{name}: relative Gram error without noise"
        )
