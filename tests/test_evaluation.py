"""Standard errors of means over overlapping splits."""

import numpy as np
import pytest

from hcl_jax.evaluation import corrected_mean


def test_the_corrected_error_is_the_spread_over_data_sets():
    """The mean of the test rows, whose splits are correlated by n_test/n exactly: what the correction assumes."""
    rng = np.random.default_rng(0)
    n, held, n_splits, n_sets = 40, 12, 15, 1_500
    means, errors = np.empty(n_sets), np.empty(n_sets)
    for i in range(n_sets):
        rows = rng.standard_normal(n)
        results = rng.permuted(np.tile(rows, (n_splits, 1)), axis=1)[:, :held].mean(axis=1)
        means[i], errors[i] = corrected_mean(results, held / n)
    assert np.std(means) == pytest.approx(np.sqrt(np.mean(errors**2)), rel=0.08)  # four standard errors
    assert np.std(means) > 2 * np.sqrt(np.mean(errors**2) / (1 + n_splits * held / (n - held)))  # the uncorrected error


def test_a_constant_difference_is_certain_and_a_single_split_says_nothing():
    assert corrected_mean(np.full(5, 0.25), 0.3) == (0.25, 0.0)
    mean, error = corrected_mean(np.array([0.5]), 0.3)
    assert mean == 0.5
    assert np.isnan(error)


@pytest.mark.parametrize(
    ("values", "share", "name"), [([], 0.3, "values"), ([1.0], 0.0, "test_share"), ([1.0], 1.0, "test_share")]
)
def test_bad_results_are_refused(values, share, name):
    with pytest.raises(ValueError, match=f"^{name}: .*; expected"):
        corrected_mean(np.array(values, float), share)
