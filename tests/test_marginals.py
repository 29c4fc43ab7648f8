"""Normal scores: ranks, ties, constants, values beyond the training rows; and standardised values."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.stats

from hcl_jax.marginals import KNOTS, NormalScores, Standardisation, sorted_columns

X = jr.normal(jr.key(0), (300, 3)) * jnp.array([1.0, 1e-3, 1e5])[None, :] + 2.0


def test_they_are_the_normal_quantiles_of_the_ranks():
    expected = scipy.stats.norm.ppf((scipy.stats.rankdata(X, axis=0) - 0.5) / 300)
    expected /= expected.std(axis=0, ddof=1)
    np.testing.assert_allclose(NormalScores.of(X)(X), expected, rtol=1e-10, atol=1e-12)


def test_increasing_functions_of_features_change_nothing():
    bent = jnp.stack([jnp.sinh(X[:, 0]), X[:, 1] ** 3, jnp.exp(X[:, 2] / 1e5)], axis=1)
    np.testing.assert_allclose(NormalScores.of(bent)(bent), NormalScores.of(X)(X), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(NormalScores.of(1e-150 * X)(1e-150 * X), NormalScores.of(X)(X), rtol=1e-9, atol=1e-9)


def test_ties_get_their_mean_rank_and_variance_one():
    counts = jnp.floor(jnp.abs(X[:, :1]))
    scores = NormalScores.of(counts)(counts)
    expected = scipy.stats.norm.ppf((scipy.stats.rankdata(counts, axis=0) - 0.5) / 300)
    np.testing.assert_allclose(np.corrcoef(scores[:, 0], expected[:, 0])[0, 1], 1, rtol=1e-12)
    np.testing.assert_allclose(scores.std(axis=0, ddof=1), 1, rtol=1e-10)


def test_a_constant_feature_scores_zero_whatever_comes_later():
    constant = jnp.full((50, 1), 14.62)
    for kind in (NormalScores, Standardisation):
        fitted = kind.of(constant)
        np.testing.assert_array_equal(fitted(jnp.array([[14.62], [3.0], [1e9]])), 0)


def test_new_values_fall_between_their_neighbours_and_are_cut_off_at_the_ends():
    fitted, ordered = NormalScores.of(X), jnp.sort(X, axis=0)
    between = fitted((ordered[:-1] + ordered[1:]) / 2)
    ends = fitted(jnp.stack([ordered[0] - 1e9, ordered[-1] + 1e9]))
    known = fitted(ordered)
    assert bool(((between > known[:-1]) & (between < known[1:])).all())
    np.testing.assert_array_equal(ends, jnp.stack([known[0], known[-1]]))


def test_many_rows_are_kept_as_quantiles_and_a_row_alone_scores_as_in_company():
    many = jr.normal(jr.key(1), (5 * KNOTS, 2))
    fitted = NormalScores.of(many)
    assert 0.8 * KNOTS <= fitted.values.shape[0] <= KNOTS
    expected = scipy.stats.norm.ppf((scipy.stats.rankdata(many, axis=0) - 0.5) / (5 * KNOTS))
    assert (
        float(jnp.abs(fitted(many) - expected).max()) < 0.05
    )  # linear between two of a thousand quantiles, whose ends are dense
    alone = jnp.concatenate([fitted(many[i : i + 1]) for i in range(5)])
    np.testing.assert_allclose(alone, fitted(many)[:5], rtol=1e-13)


def test_they_are_undone_by_the_quantiles():
    fitted = NormalScores.of(X)
    np.testing.assert_allclose(fitted.inverse(fitted(X)), X, rtol=1e-9)


def test_they_work_batched_and_compiled():
    batch = jnp.stack([X, 2 * X])
    program = jax.jit(jax.vmap(lambda rows: NormalScores.of(rows)(rows)))
    np.testing.assert_allclose(program(batch)[1], NormalScores.of(X)(X), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_columns_are_sorted(dtype):
    """Negative numbers, both zeros, ties, and the smallest and largest there are."""
    rng, limits = np.random.default_rng(0), np.finfo(dtype)
    X = rng.standard_normal((101, 3)).round(1).astype(dtype)
    X[:6, 0] = -0.0, 0.0, limits.max, limits.min, limits.tiny, -limits.tiny
    np.testing.assert_array_equal(sorted_columns(jnp.asarray(X)), np.sort(X, axis=0))
