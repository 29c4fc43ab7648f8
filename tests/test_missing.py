"""Rows that lack views: against the likelihood of what is there written out with dense matrices, and against complete data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    TWO,
    UNEVEN,
    assert_at_least,
    assert_at_most,
    assert_close,
    assert_within,
    batch_fitted_by,
    masked_normal,
    relative,
    stacked,
)
from scipy.stats import norm
from sklearn.linear_model import RidgeCV

from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance
from hcl_jax.estimators.missing import BLOCK, PatternMoments, hcl_ml_by_pattern
from hcl_jax.fisher import NOISE, pool
from hcl_jax.fitted import fit_estimator
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
    assert moments.rows.any(axis=1).sum() <= 16 + 9 + 7
    assert moments.rows.shape[0] == BLOCK
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


@pytest.mark.slow
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
            "views: 5 rows have view 2, which sees 4 factors; expected at least 6",
        ),
        (
            lambda X, present: present.__setitem__(slice(None), np.eye(2, dtype=bool)[np.arange(40) % 2]),
            "views: no rows link views 1 and 2",
        ),
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


LARGE = Hierarchy((100, 60, 40), {"123": 3, "12": 2, "13": 2, "23": 2, "1": 2, "2": 2, "3": 2})
PSI = np.repeat([1.0, 0.5, 2.0], LARGE.dims)
DRAWS = 20


def large_sample(seed, n):
    rng = np.random.default_rng(seed)
    loadings = 0.4 * masked_normal(rng, LARGE)
    X = rng.standard_normal((n, LARGE.n_factors)) @ loadings.T + np.sqrt(PSI) * rng.standard_normal((n, len(PSI)))
    return rng, loadings, X


@jax.jit
@jax.vmap
def fitted_and_completed(X, present):
    fit = fit_estimator(split(X, LARGE), LARGE, "hcl-ml", presence=present, noise="view", scaled=False)
    return fit, fit.impute(split(X, LARGE), present)


def gram_error(fitted, loadings):
    return np.linalg.norm(np.asarray(fitted) @ np.asarray(fitted).T - loadings @ loadings.T)


def predictions(X, present, loadings):
    """What the truth expects of the absent entries, and what ridge regressions on the views of the complete rows make of them."""
    oracle, ridge, whole = X.copy(), X.copy(), present.all(axis=1)
    for m in LARGE.modalities:
        lacking, own = ~present[:, m - 1], LARGE.modality_of_feature == m - 1
        weighted = loadings[~own] / PSI[~own, None]
        scores = X[lacking][:, ~own] @ weighted @ np.linalg.inv(np.eye(LARGE.n_factors) + loadings[~own].T @ weighted)
        oracle[np.ix_(lacking, own)] = scores @ loadings[own].T
        regression = RidgeCV(np.logspace(0, 4, 9)).fit(X[whole][:, ~own], X[whole][:, own])
        ridge[np.ix_(lacking, own)] = regression.predict(X[lacking][:, ~own])
    return oracle, ridge


@pytest.mark.slow
@pytest.mark.parametrize("n", [300, 1000])
def test_against_complete_data_the_oracle_and_ridge(n):
    """Means over draws. 90 % intervals of absent entries cover what they say, where the plug-in ones covered .885 at n = 300."""
    samples = [large_sample(seed, n) for seed in range(DRAWS)]
    rows = jnp.asarray(np.stack([X for _, _, X in samples]))
    covariances = [SampleCovariance.from_data(X, form="matrix") for X in rows]
    complete = batch_fitted_by("hcl-ml", noise="view")(stacked(covariances), LARGE)
    reference = np.mean([gram_error(F, L) for F, (_, L, _) in zip(complete.loadings, samples, strict=True)])
    for share, largest_ratio, largest_gap in ((0.3, 1.07, 0.035), (0.5, 1.12, 0.035), (0.8, 1.20, 0.05)):
        present = np.stack([lacking_one_view(rng, n, 3, share) for rng, _, _ in samples])
        fits, (values, deviations) = fitted_and_completed(rows, jnp.asarray(present))
        assert (fits.status == CONVERGED).all()
        error = np.mean([gram_error(F, L) for F, (_, L, _) in zip(fits.loadings, samples, strict=True)])
        assert_at_most(error / reference, largest_ratio, f"n = {n}, {share:.0%}: Gram error over that from complete data")
        squares = []
        for there, completed, (_, loadings, X) in zip(present, values, samples, strict=True):
            absent = ~there[:, LARGE.modality_of_feature]
            columns = (completed, *predictions(X, there, loadings))
            squares.append([np.mean((X - column)[absent] ** 2) / np.mean(X[absent] ** 2) for column in columns])
        ours, oracle, ridge = 1 - np.mean(squares, axis=0)
        assert_at_most(
            oracle - ours, 0.015 if n == 1000 else largest_gap, f"n = {n}, {share:.0%}: R² below the oracle's, {oracle:.3f}"
        )
        assert_at_least(ours, ridge, f"n = {n}, {share:.0%}: R², and that of ridge")
        absent = ~present[:, :, LARGE.modality_of_feature]
        errors = np.abs(np.asarray(values) - np.asarray(rows))[absent]
        covered = np.mean(errors <= norm.ppf(0.95) * np.asarray(deviations)[absent])
        assert_within(covered, 0.90, 0.02, f"n = {n}, {share:.0%}: coverage of 90 % intervals")


@pytest.mark.slow
def test_means_are_unbiased_where_presence_depends_on_what_is_present():
    """Views 2 and 3 are absent in the rows whose view 1 is large along the factors that it shares with them."""
    n, biased, ours, draws, masks = 300, [], [], [], []
    for seed in range(DRAWS):
        rng, loadings, X = large_sample(seed, n)
        shared = loadings[: LARGE.dims[0], 0]
        present = np.ones((n, 3), bool)
        high = X[:, : LARGE.dims[0]] @ shared > 0
        present[high, rng.integers(1, 3, high.sum())] = False
        draws.append((loadings[:, 0], X))
        masks.append(present)
    fits, _ = fitted_and_completed(jnp.asarray(np.stack([X for _, X in draws])), jnp.asarray(np.stack(masks)))
    later = slice(LARGE.dims[0], None)  # the views that may be absent
    for centre, present, (direction, X) in zip(fits.centre, masks, draws, strict=True):
        along = direction[later] / np.linalg.norm(direction[later])
        there = present[:, LARGE.modality_of_feature[later]]
        biased.append(np.mean(X[:, later], axis=0, where=there) @ along)
        ours.append(np.asarray(centre)[later] @ along)
    error = np.std(ours, ddof=1) / np.sqrt(len(ours))
    assert_at_least(-np.mean(biased) / error, 10, "standard errors that the means of what is there are off by")
    assert_within(np.mean(ours), 0, 3 * error, "mean along the direction in which presence biases it, and 3 standard errors")
