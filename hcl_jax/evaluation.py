"""How sure a mean over random splits of one data set is: splits share rows, so their results are not independent."""

import numpy as np
from jaxtyping import Float


def corrected_mean(values: Float[np.ndarray, " J"], test_share: float) -> tuple[float, float]:
    """(mean, standard error) of J results on random splits that hold out the same share of the rows.

    The standard error is √(s²(1/J + n_test/n_train)), s² the variance of the results: with overlapping training sets that of J
    independent results, s/√J, is too small by a factor that grows with J. NaN for a single split. Of a difference between two
    methods: give the differences, split by split. Source: Nadeau and Bengio (2003), Machine Learning 52, Section 3.

    >>> mean, error = corrected_mean(np.array([0.8, 0.9]), 0.5)
    >>> round(mean, 3), round(error, 3)
    (0.85, 0.087)

    Raises `ValueError` for no results, and for a share that is not between 0 and 1.
    """
    if len(values) == 0:
        raise ValueError("values: are none; expected the result of at least one split")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share: is {test_share}; expected a number between 0 and 1")
    if len(values) == 1:
        return float(values[0]), float("nan")
    variance = np.var(values, ddof=1)
    return float(np.mean(values)), float(np.sqrt(variance * (1 / len(values) + test_share / (1 - test_share))))
