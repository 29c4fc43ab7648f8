"""Shares of variance add up, and scores are read in the features by least squares."""

import numpy as np

from hcl_jax.explained import linear_reading, row_shares, share_intervals

DIMS, COLUMNS = (5, 4), ((1, 2), (1,), (1, 2))
MEMBERSHIP = np.array([[True, True, True], [True, False, True]])


def problem(seed=0, n=40):
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(n, 3))
    scores -= scores.mean(axis=0)
    loadings = generator.normal(size=(9, 3)) * np.repeat(MEMBERSHIP, DIMS, axis=0)
    return scores, loadings, scores @ loadings.T + generator.normal(size=(n, 9)), generator


def test_scores_are_read_by_least_squares_of_the_rows_that_have_the_view():
    scores, loadings, _, _ = problem()
    present = np.ones((40, 2), bool)
    present[::3, 1] = False
    Z = np.where(np.repeat(present, DIMS, axis=1), scores @ loadings.T, 99)
    np.testing.assert_allclose(linear_reading(Z, present, scores, MEMBERSHIP, DIMS), loadings, atol=1e-12)


def test_shares_add_up_to_what_the_reconstruction_explains_and_rows_lack_views():
    scores, loadings, Z, generator = problem()
    present = generator.random((40, 2)) < 0.7
    held = row_shares(Z, present, scores, loadings, COLUMNS, ((1, 2), (1,)), DIMS)
    shares = held.of(np.ones(40))
    for m, rows in enumerate((slice(0, 5), slice(5, 9))):
        seen = present[:, m]
        left = np.sum((Z[seen][:, rows] - (scores @ loadings.T)[seen][:, rows]) ** 2) / np.sum(Z[seen][:, rows] ** 2)
        assert abs(shares[m].sum() - (1 - left)) < 1e-12
    assert shares[1, 1] == 0  # the second view has no columns of structure 1


def test_bootstrap_bounds_hold_the_share_and_shrink_with_the_rows():
    widths = []
    for n in (50, 800):
        scores, loadings, Z, _ = problem(n=n)
        held = row_shares(Z, np.ones((n, 2), bool), scores, loadings, COLUMNS, ((1, 2), (1,)), DIMS)
        found = share_intervals(held, seed=0)
        assert (found.low <= found.share + 1e-12).all()
        assert (found.high >= found.share - 1e-12).all()
        widths.append((found.high - found.low)[0, 0])
    assert 2 < widths[0] / widths[1] < 8  # √(800/50) = 4
