"""Learned links: densities, the start at the copula, and recovery behind links that mix features."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import TWO, assert_at_least, assert_at_most, assert_close, relative
from test_copula import SIZED, drawn, explained, recovery

from hcl_jax import Hierarchy
from hcl_jax.fitted import fit_estimator
from hcl_jax.networks.links import METHOD, Bends, FlowConfig, fit_copula, fit_flow
from hcl_jax.networks.training import Batch, TrainingConfig

DOUBLE = FlowConfig(TrainingConfig(steps=0, dtype="float64"), layers=1, knots=2)
DENSITY = eqx.filter_jit(lambda network, views: network.log_density(views))
SCORES = eqx.filter_jit(lambda network, views, present=None: network.scores(views, present))
UNDONE = eqx.filter_jit(lambda network, views: network.undone(views))
QUICK = TrainingConfig(steps=300, batch_size=256, learning_rate=2e-2, dtype="float64")
MIXED = Hierarchy((6, 6), {(1, 2): 2, (1,): 1})


@cache
def gaussian_views(n=300):
    return tuple(jnp.asarray(view) for view in drawn("identity", 0, n, hierarchy=TWO)[0])


@cache
def started():
    """The network that training starts from, with these views as they are."""
    network = METHOD.build(jr.key(0), TWO, DOUBLE)
    return METHOD.start(network, Batch(gaussian_views()), TWO, DOUBLE)


def perturbed(network, size=0.3):
    """The same with every parameter moved."""
    rng = np.random.default_rng(3)
    moved = lambda leaf: jnp.asarray(np.asarray(leaf) + size * rng.standard_normal(leaf.shape))
    return jax.tree.map(moved, network)


@cache
def bent():
    """A network with rotations, bends and loadings of some size."""
    return perturbed(started())


@cache
def leaky_views():
    return tuple(jnp.asarray(view) for view in drawn("leaky", 0, 1000, hierarchy=MIXED)[0])


@cache
def trained():
    return fit_flow(leaky_views(), MIXED, FlowConfig(QUICK, layers=1), key=jr.key(0))


@pytest.mark.slow
def test_density_is_that_of_the_change_of_variables():
    """log N(u(x); 0, ΛΛᵀ + Ψ) + log |det du/dx| with the Jacobian of all features."""
    network, row = bent(), jr.normal(jr.key(1), (16,))
    undone = lambda x: network.undone((x[None, :9], x[None, 9:]))[0][0]
    Lambda, psi = network.gaussian()
    assert bool((Lambda[~TWO.mask] == 0).all())
    normal = jax.scipy.stats.multivariate_normal.logpdf(undone(row), jnp.zeros(16), Lambda @ Lambda.T + jnp.diag(psi))
    expected = normal + jnp.linalg.slogdet(jax.jit(jax.jacobian(undone))(row))[1]
    assert_close(DENSITY(network, (row[None, :9], row[None, 9:]))[0], expected, "log density")


@pytest.mark.parametrize("n_knots", [1, 4])
def test_bends_increase_and_start_at_the_identity(n_knots):
    bends = Bends.identity(3, n_knots, jnp.float64)
    grid = jnp.broadcast_to(jnp.linspace(-5, 5, 400)[:, None], (400, 3))
    value, log_det = bends(grid)
    assert_close(value, grid, "identity")
    assert_at_most(jnp.abs(log_det).max(), 1e-14, "log det of the identity")
    value, _ = perturbed(bends, 1.0)(grid)
    assert bool((jnp.diff(value, axis=0) > 0).all())


def test_turns_are_rotations():
    for flow in bent().flows:
        for turn in flow.turns:
            R = turn(jnp.eye(turn.skew.shape[0])).T
            assert_close(R @ R.T, jnp.eye(len(R)), "RRᵀ")
            assert_close(jnp.linalg.det(R), 1.0, "det R")


def test_training_starts_at_the_likelihood_and_scores_of_the_linear_fit():
    """−log density of the rows is hcl-ml's: ½(d log 2π + log det Σ + tr(Σ⁻¹S)), S with divisor n."""
    views = gaussian_views()
    fitted = fit_estimator(views, TWO, "hcl-ml", noise="feature", scaled=False)
    Sigma = fitted.loadings @ fitted.loadings.T + jnp.diag(fitted.noise_variance)
    centred = jnp.concatenate([view - view.mean(axis=0, keepdims=True) for view in views], axis=1)
    squares = jnp.sum(centred * jnp.linalg.solve(Sigma, centred.T).T, axis=1)
    expected = -(squares + jnp.linalg.slogdet(2 * jnp.pi * Sigma)[1]) / 2
    assert_close(DENSITY(started(), views), expected, "log density of every row", slack=1e6)
    assert_close(SCORES(started(), views), fitted.transform(views), "scores", slack=1e6)


@pytest.mark.slow
def test_held_out_likelihood_rises_behind_a_link_that_mixes():
    fitted, history = trained(), np.asarray(trained().history["held_out"])
    gained = (history[0] - np.nanmin(history)) * MIXED.n_features
    assert int(fitted.status) == 0
    assert_at_least(gained, 0.5, "nats a row that the links give")
    views = tuple(jnp.split(fitted.marginals(jnp.concatenate(leaky_views(), axis=1)), 2, axis=1))
    assert_at_most(-DENSITY(fitted.network, views).mean() / MIXED.n_features, history[0], "−log density a feature over all rows")


@pytest.mark.slow
def test_the_key_decides_the_fit():
    again = fit_flow(leaky_views(), MIXED, FlowConfig(QUICK, layers=1), key=jr.key(0))
    other = fit_flow(leaky_views(), MIXED, FlowConfig(QUICK, layers=1), key=jr.key(1))
    scores = trained().transform(leaky_views())
    assert bool(jnp.array_equal(again.transform(leaky_views()), scores))
    assert relative(other.transform(leaky_views()), scores) > 1e-3


def test_rows_without_a_view_have_the_posterior_mean_of_the_others():
    network, rows = bent(), tuple(view[:5] for view in gaussian_views())
    present = jnp.array([[True, True], [True, False], [False, True], [False, False], [True, True]])
    scores = SCORES(network, rows, present)
    assert_close(scores[jnp.array([0, 4])], SCORES(network, rows)[jnp.array([0, 4])], "whole rows")
    (u, _), (Lambda, psi) = UNDONE(network, rows), network.gaussian()
    for i, seen in ((1, slice(0, 9)), (2, slice(9, 16))):
        Sigma = Lambda[seen] @ Lambda[seen].T + jnp.diag(psi[seen])
        assert_close(scores[i], Lambda[seen].T @ jnp.linalg.solve(Sigma, u[i, seen]), f"row {i}")
    assert_at_most(jnp.abs(scores[3]).max(), 0, "scores of a row without views")


def test_transform_is_by_row_and_takes_absent_views():
    views, fitted = leaky_views(), trained()
    scores = fitted.transform(views)
    assert_close(fitted.transform([view[3:4] for view in views]), scores[3:4], "one row alone")
    lacking = (views[0].at[:2].set(jnp.nan), views[1])
    assert_close(fitted.transform(lacking)[2:], scores[2:], "rows that lack nothing")
    assert bool(jnp.isfinite(fitted.transform(lacking)).all())
    assert bool((fitted.membership == MIXED.modality_mask).all())


@pytest.mark.slow
@pytest.mark.long
def test_degenerate_features_leave_training_finite():
    """A constant feature, a copy, a sum of others and a binary one, whose likelihood has no bound without jitter."""
    views, z, *_ = drawn("leaky", 0, 1000, hierarchy=TWO)
    views[0][:, 0], views[0][:, 1], views[0][:, 2] = 4.0, views[0][:, 3], views[0][:, 4] + views[0][:, 5]
    views[1][:, 0] = views[1][:, 0] > 0
    fitted = fit_flow(views, TWO, FlowConfig(QUICK), key=jr.key(0))
    scores = np.asarray(fitted.transform(views))
    assert int(fitted.status) == 0
    assert np.isfinite(scores).all()
    assert_at_least(explained(scores, z), explained(np.asarray(fit_copula(views, TWO).transform(views)), z) - 0.02, "R²")


@pytest.mark.slow
@pytest.mark.long
def test_a_response_trains_the_head():
    views, z, *_ = drawn("sinh", 0, 300, hierarchy=MIXED)
    y = z[:, 0] - z[:, 1]
    fitted = fit_flow(views, MIXED, FlowConfig(QUICK, layers=0), y=y, key=jr.key(0))
    assert_at_least(np.corrcoef(fitted.predict(views), y)[0, 1], 0.8, "correlation of the prediction with the response")


def test_refusals_name_the_argument():
    for name in ("layers", "knots"):
        with pytest.raises(ValueError, match=name):
            FlowConfig(**{name: -1})
    with pytest.raises(ValueError, match="key"):
        fit_flow(leaky_views(), MIXED, key=None)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.long
@pytest.mark.parametrize(("link", "least"), [("leaky", (0.988, 0.982, 0.965)), ("leakyQ", (0.97, 0.955, 0.91))])
def test_links_that_mix_features_are_learned(link, least):
    """n = 8,000, default settings: R² of the latent factors of 2,000 further rows, by level, and the leak."""
    found = []
    for seed in range(2):
        views, z, *_ = drawn(link, seed, 10_000)
        fitted = fit_flow([view[:8000] for view in views], SIZED, key=jr.key(seed))
        levels, leak = recovery(fitted.transform([view[8000:] for view in views]), z[8000:])
        found.append(levels)
        assert_at_most(leak, 0.01, f"{link}, seed {seed}: leak")
    for mean, bound, level in zip(np.mean(found, axis=0), least, ("all", "pairs", "private"), strict=True):
        assert_at_least(mean, bound, f"{link}: R² of structures of {level}")


@pytest.mark.slow
@pytest.mark.long
def test_links_by_feature_leave_it_at_the_copula():
    """n = 8,000, sinh: R² within .003 of the copula's."""
    views, z, *_ = drawn("sinh", 0, 10_000)
    train, test = [view[:8000] for view in views], [view[8000:] for view in views]
    flow, _ = recovery(fit_flow(train, SIZED, key=jr.key(0)).transform(test), z[8000:])
    copula, _ = recovery(fit_copula(train, SIZED).transform(test), z[8000:])
    assert_at_most(np.abs(flow - copula).max(), 0.003, "largest difference in R²")
