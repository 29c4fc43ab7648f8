"""The variational fit with all blocks open: its bound, its rotations, its zeros, and that one program serves all."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_at_least, assert_at_most, assert_close

from hcl_jax.estimators import group_factors as module
from hcl_jax.estimators.group_factors import GroupFactors, group_factors, principal_start
from hcl_jax.reduced import reduced_rows

PATTERNS = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]], bool)
"""Which of three views see each of four columns."""
K = 8


def problem(n=600, d=20, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, PATTERNS.shape[1]))
    views = [z @ (seen[:, None] * rng.standard_normal((4, d))) + rng.standard_normal((n, d)) for seen in PATTERNS]
    return reduced_rows(views, "view", scaled=False)


def fit(reduced, member=None):
    member = jnp.ones((3, K), bool) if member is None else jnp.asarray(member)
    return group_factors(reduced.moments, member, principal_start(reduced.moments, K))


def test_the_blocks_that_there_are_stay_open():
    found = fit(problem())
    assert int(found.status) == 0
    blocks = np.asarray(found.block_odds)[:, np.asarray(found.column_odds) > np.log(K)] > np.log(3 * K)
    assert sorted(map(tuple, blocks.T)) == sorted(map(tuple, PATTERNS.T))


def test_what_a_view_may_not_see_is_zero():
    member = np.ones((3, K), bool)
    member[2, :6] = False
    posterior = fit(problem(), member).posterior
    assert (np.asarray(posterior.mean)[2][:, :6] == 0).all()
    assert (np.asarray(posterior.prior)[2][:6] == 0).all()


def state(reduced):
    """A posterior between the start and the end, by plain sweeps."""
    start = principal_start(reduced.moments, K)
    prior = (jnp.sum(start**2, axis=1) + 1e-6) / 20
    at = GroupFactors(start, jnp.zeros((3, K, K)), prior, jnp.ones(3))
    bounds = []
    for _ in range(6):
        at, bound = jax.jit(module._sweep)(reduced.moments, at)
        bounds.append(float(bound))
    return at, bounds


def test_the_bound_rises_and_is_below_the_likelihood_of_the_fit():
    """Every plain sweep raises it; log p(x) of Gaussian rows at the posterior means is above it."""
    reduced = problem()
    at, bounds = state(reduced)
    assert (np.diff(bounds) > -1e-8 * abs(bounds[-1])).all()
    L = np.asarray(at.mean)[:, :20].reshape(60, K)
    S = np.asarray(reduced.moments.matrix)  # q is d here
    Sigma = L @ L.T + np.diag(np.repeat(np.asarray(at.noise), 20))
    nu = float(reduced.moments.nu)
    likelihood = -nu / 2 * (60 * np.log(2 * np.pi) + np.linalg.slogdet(Sigma)[1] + np.trace(np.linalg.solve(Sigma, S)))
    assert_at_most(bounds[-1], likelihood, "bound")
    assert_at_least(bounds[-1], likelihood - 60 * K * np.log(nu), "bound, with what loadings cost")


def test_rotations_keep_the_fit_and_raise_the_bound():
    """ΛΛᵀ stays; Σ d_m Σ_k log (E_m)_kk falls."""
    reduced = problem()
    at, _ = state(reduced)
    turned = jax.jit(module._rotated)(reduced.moments, at, jnp.ones((3, K), bool))
    joined = [np.asarray(p.mean).reshape(-1, K) for p in (turned, at)]
    assert_close(joined[0] @ joined[0].T, joined[1] @ joined[1].T)
    cost = [np.log(np.diagonal(np.asarray(p.second_moments(reduced.moments.dims)), axis1=1, axis2=2)).sum() for p in (turned, at)]
    assert_at_most(cost[0], cost[1], "sum of logarithms")


def test_only_columns_that_the_same_views_see_are_rotated_into_each_other():
    reduced = problem()
    member = np.ones((3, K), bool)
    member[2, :4] = False
    at, _ = state(reduced)
    at = at._replace(mean=jnp.where(jnp.asarray(member)[:, None, :], at.mean, 0))
    turned = jax.jit(module._rotated)(reduced.moments, at, jnp.asarray(member))
    for part in (slice(0, 4), slice(4, K)):
        before, after = (np.asarray(p.mean).reshape(-1, K)[:, part] for p in (at, turned))
        assert_close(after @ after.T, before @ before.T)


def test_every_two_columns_meet_once():
    first, second = module._schedule(6)
    assert len({frozenset(pair) for pair in zip(first.ravel(), second.ravel(), strict=True)}) == 15
    assert all(sorted([*i, *j]) == list(range(6)) for i, j in zip(first, second, strict=True))
