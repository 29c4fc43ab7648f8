"""Rows that lack views: against the likelihood of what is there written out with dense matrices, and against complete data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TWO, UNEVEN, assert_at_most, assert_close, masked_normal, relative

from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance
from hcl_jax.estimators.missing import PatternMoments, hcl_ml_by_pattern
from hcl_jax.fisher import NOISE, pool
from hcl_jax.structure import CONVERGED, OUT_OF_STEPS


def split(X, hierarchy):
    return [X[:, hierarchy.rows(m)] for m in hierarchy.modalities]


def lacking_one_view(rng, n, n_views, share):
    """Which views each row has, where a share of the rows lacks one of them."""
    present = np.ones((n, n_views), bool)
    rows = np.flatnonzero(rng.random(n) < share)
    present[rows, rng.integers(0, n_views, len(rows))] = False
    return present


def sample(hierarchy, seed=0, n=150, share=0.6):
    """(loadings, ψ, mean, rows, presence), with noise by view."""
    rng = np.random.default_rng(seed)
    loadings, mean = masked_normal(rng, hierarchy), 3 * rng.standard_normal(hierarchy.n_features)
    psi = np.repeat(rng.uniform(0.3, 2.0, hierarchy.n_modalities), hierarchy.dims)
    X = mean + rng.standard_normal((n, hierarchy.n_factors)) @ loadings.T + np.sqrt(psi) * rng.standard_normal((n, len(psi)))
    return loadings, psi, mean, X, lacking_one_view(rng, n, hierarchy.n_modalities, share)


def dense_deviance(loadings, psi, mean, X, present, hierarchy):
    """−2 log-likelihood/ν of the entries that are there, ν_P = n_P(N − 1)/N rows of every pattern, pattern by pattern."""
    seen, total, n = present[:, hierarchy.modality_of_feature], 0.0, len(X)
    for own in np.unique(seen, axis=0):
        rows = X[(seen == own).all(axis=1)][:, own] - mean[None, own]
        Sigma = loadings[own] @ loadings[own].T + jnp.diag(psi[own])
        log_det = jnp.linalg.slogdet(Sigma)[1] + own.sum() * np.log(2 * np.pi)
        total += len(rows) * (n - 1) / n * log_det + jnp.sum(rows * jnp.linalg.solve(Sigma, rows.T).T)
    return total / (n - 1)


@pytest.mark.parametrize("noise", NOISE)
def test_the_maximum_is_stationary_and_its_objective_the_deviance_of_what_is_there(noise):
    """The rule stops at a gain of 1e-10, so where the gradient is about the root of it."""
    _, _, _, X, present = sample(UNEVEN)
    fit, mean = hcl_ml_by_pattern(PatternMoments.from_data(split(X, UNEVEN), present), UNEVEN, noise=noise)
    assert (int(fit.status), fit.method, fit.noise) == (CONVERGED, "hcl-ml", noise)
    psi = jnp.broadcast_to(fit.noise_variance, (UNEVEN.n_features,))
    assert not np.asarray(fit.loadings)[~UNEVEN.mask].any()
    assert_close(fit.objective, dense_deviance(fit.loadings, psi, mean, X, present, UNEVEN), "−2 log-likelihood/ν")
    along, by_feature, by_mean = jax.grad(dense_deviance, argnums=(0, 1, 2))(fit.loadings, psi, mean, X, present, UNEVEN)
    assert_at_most(np.abs(np.where(UNEVEN.mask, along, 0)).max(), 1e-3, f"{noise}: gradient along the loadings")
    assert_at_most(np.abs(pool(by_feature * psi, UNEVEN, noise)).max(), 1e-3, f"{noise}: gradient along log ψ")
    assert_at_most(np.abs(by_mean).max(), 1e-3, f"{noise}: gradient along the mean")


def test_the_likelihood_never_falls():
    for seed in range(4):
        _, _, _, X, present = sample(TWO, seed, n=60)
        moments = PatternMoments.from_data(split(X, TWO), present)
        fits = [hcl_ml_by_pattern(moments, TWO, noise="view", max_steps=steps)[0] for steps in (1, 8, 1500)]
        assert [int(fit.status) for fit in fits[::2]] == [OUT_OF_STEPS, CONVERGED]
        deviances = [float(fit.objective) for fit in fits]
        assert_at_most(max(np.diff(deviances)) / 16, 1e-12, f"seed {seed}: largest rise of the deviance, per feature")
        assert deviances[1] < deviances[0]


@pytest.mark.parametrize(("noise", "n"), [("shared", 150), ("view", 150), ("view", 16), ("feature", 150)])
def test_rows_that_lack_nothing_are_fitted_as_their_covariance(noise, n):
    _, _, _, X, _ = sample(UNEVEN, n=n)
    fit, mean = hcl_ml_by_pattern(PatternMoments.from_data(split(X, UNEVEN)), UNEVEN, noise=noise)
    direct = ESTIMATORS["hcl-ml"](SampleCovariance.from_data(X), UNEVEN, noise=noise)
    assert int(fit.status) == int(direct.status)
    assert_at_most(relative(fit.loadings @ fit.loadings.T, direct.loadings @ direct.loadings.T), 1e-10, "FFᵀ")
    assert_at_most(relative(fit.noise_variance, direct.noise_variance), 1e-10, "ψ")
    assert_at_most(relative(mean, X.mean(axis=0)), 1e-14, "mean")


def test_many_rows_of_a_pattern_become_few_with_its_moments():
    _, _, mean, X, present = sample(TWO, n=200)
    present[:3] = False  # rows without any view count for nothing
    moments = PatternMoments.from_data(split(X, TWO), present)
    assert moments.rows.shape[0] <= 16 + 9 + 7
    assert float(moments.n) == 197
    rows, pattern = moments.about(jnp.asarray(mean) - moments.centre)
    for p, own in enumerate(np.asarray(moments.present)):
        seen = own[TWO.modality_of_feature]
        deviations = (X - mean)[(present == own).all(axis=1)][:, seen]
        held = np.asarray(rows)[np.asarray(pattern) == p]
        assert not held[:, ~seen].any()
        if own.any():
            assert_at_most(relative(held[:, seen].T @ held[:, seen], deviations.T @ deviations), 1e-12, f"moments of {own}")


def test_nan_rows_and_presence_say_the_same():
    _, _, _, X, present = sample(UNEVEN)
    views = [np.where(there[:, None], view, np.nan) for view, there in zip(split(X, UNEVEN), present.T, strict=True)]
    one, other = PatternMoments.from_data(views), PatternMoments.from_data(split(X, UNEVEN), present)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_batch_of_draws_with_unlike_patterns_gives_what_each_gives():
    """Inside compiled code all 2^M patterns have a place, and all rows are kept."""
    draws = [sample(TWO, seed, n=80) for seed in range(3)]
    draws[2][4][:] = True

    @jax.jit
    @jax.vmap
    def fit(X, present):
        return hcl_ml_by_pattern(PatternMoments.from_data(split(X, TWO), present), TWO, noise="view")

    batch, means = fit(*(jnp.asarray(np.stack([draw[i] for draw in draws])) for i in (3, 4)))
    for i, (_, _, _, X, present) in enumerate(draws):
        single, mean = hcl_ml_by_pattern(PatternMoments.from_data(split(X, TWO), present), TWO, noise="view")
        assert int(batch.status[i]) == CONVERGED
        grams = [F @ F.T for F in (batch.loadings[i], single.loadings)]
        assert_at_most(relative(*grams), 1e-4, "FFᵀ: they stop at gains of 1e-10")
        assert_at_most(abs(float(batch.objective[i] - single.objective)) / 16, 1e-9, "deviance, per feature")
        assert_at_most(relative(means[i], mean), 1e-4, "mean")


def test_units_and_origins_do_not_matter():
    _, _, _, X, present = sample(TWO)
    one, mean = hcl_ml_by_pattern(PatternMoments.from_data(split(X, TWO), present), TWO, noise="view")
    moved, moved_mean = hcl_ml_by_pattern(PatternMoments.from_data(split(8 * X + 1e6, TWO), present), TWO, noise="view")
    assert_at_most(relative(moved.loadings, 8 * one.loadings), 1e-6, "loadings: digits that 1e6 costs, and steps taken after")
    assert_at_most(relative(moved_mean, 8 * mean + 1e6), 1e-12, "mean")
    seen = present @ np.array(TWO.dims)
    assert_at_most(abs(float(moved.objective - one.objective) - 2 * np.log(8) * seen.sum() / len(X)), 1e-8, "deviance")


def broken(change):
    _, _, _, X, present = sample(TWO, n=40)
    change(X, present)
    return hcl_ml_by_pattern(PatternMoments.from_data(split(X, TWO), present), TWO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X, present: present.__setitem__((slice(None), 1), False), "views: view 2 is absent from all 40 rows; expected"),
        (
            lambda X, present: present.__setitem__((slice(None), 1), np.arange(40) < 5),
            "moments: have 5 rows with view 2, which sees 4 factors",
        ),
        (lambda X, present: present.__setitem__(slice(None), np.eye(2, dtype=bool)[np.arange(40) % 2]), "moments: no rows link"),
        (lambda X, present: X.__setitem__((3, slice(7)), np.nan), "views: view 1 holds NaN or infinite values in 7 of 360 cells"),
    ],
)
def test_what_cannot_be_fitted_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        broken(change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "row"}, "noise: is 'row'; expected one of"),
        ({"tolerance": 0.0}, "tolerance: is 0.0; expected a positive number"),
        ({"max_steps": -1}, "max_steps: is -1; expected"),
        ({"hierarchy": UNEVEN}, "hierarchy: has dims"),
        ({"hierarchy": Hierarchy((8, 8), {"12": 1})}, r"hierarchy: has dims \(8, 8\); expected \(9, 7\)"),
        ({"moments": np.eye(3)}, "moments: is of type ndarray; expected PatternMoments"),
    ],
)
def test_bad_options_are_named(options, message):
    _, _, _, X, present = sample(TWO, n=40)
    given = {"moments": PatternMoments.from_data(split(X, TWO), present), "hierarchy": TWO} | options
    with pytest.raises(ValueError, match=message):
        hcl_ml_by_pattern(given.pop("moments"), given.pop("hierarchy"), **given)
