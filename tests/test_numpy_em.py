"""The NumPy EM of the benchmarks: against the likelihood written out, and against `hcl-ml`."""

from itertools import islice

import numpy as np
import pytest
from helpers import TWO, UNEVEN, assert_at_most, assert_close, dense_deviance, fitted_by, masked_normal, problem, relative

from benchmarks import numpy_em
from hcl_jax import Hierarchy
from likelihood_race import modalities_of

CASES = [(TWO, 0.1), (UNEVEN, 0.5)]
IDS = ["two", "uneven"]


def rough_start(hierarchy: Hierarchy, seed: int = 3):
    return masked_normal(np.random.default_rng(seed), hierarchy), 2.0


@pytest.mark.parametrize(("hierarchy", "noise"), CASES, ids=IDS)
def test_likelihood_is_that_of_the_dense_covariance(hierarchy, noise):
    S = np.asarray(problem(hierarchy, noise=noise)[1].matrix)
    F, sigma_sq = rough_start(hierarchy)
    dense = dense_deviance(F, np.full(len(F), sigma_sq), S) + len(F) * np.log(2 * np.pi)
    assert_close(numpy_em.log_likelihood_per_row(S, F, sigma_sq), -dense / 2, "log-likelihood")


@pytest.mark.parametrize(("hierarchy", "noise"), CASES, ids=IDS)
def test_every_iteration_increases_the_likelihood_and_keeps_the_zeros(hierarchy, noise):
    S = np.asarray(problem(hierarchy, noise=noise)[1].matrix)
    steps = [rough_start(hierarchy), *islice(numpy_em.em_steps(S, *rough_start(hierarchy), modalities_of(hierarchy)), 60)]
    values = [numpy_em.log_likelihood_per_row(S, *step) for step in steps]
    # a rounding of the value is all that it may ever lose; in 60 iterations from a rough start it gains far more
    assert_at_most(-np.min(np.diff(values)), 1e-13 * abs(values[-1]), "loss of an iteration")
    assert values[-1] > values[0] + 1
    assert all(not F[~hierarchy.mask].any() for F, _ in steps)


@pytest.mark.slow
def test_the_optimum_is_that_of_hcl_ml():
    truth, covariance = problem(UNEVEN, noise=0.5)
    S = np.asarray(covariance.matrix)
    steps = numpy_em.em_steps(S, np.asarray(truth.loadings), 0.5, modalities_of(UNEVEN))
    F, sigma_sq = next(islice(steps, 3000, None))
    ours = fitted_by("hcl-ml")(covariance, UNEVEN)
    assert ours.status == 0
    assert numpy_em.log_likelihood_per_row(S, F, sigma_sq) == pytest.approx(-float(ours.objective) / 2, abs=1e-9)
    assert sigma_sq == pytest.approx(float(ours.noise_variance), rel=1e-5)
    # both have stopped where the likelihood is flat: its value is right to 1e-9, and so the loadings to the root of that
    assert_at_most(relative(F @ F.T, ours.loadings @ ours.loadings.T), 1e-4, "FFᵀ")


def test_precision_follows_the_input():
    S = np.asarray(problem(TWO)[1].matrix, np.float32)
    F, sigma_sq = rough_start(TWO)
    loadings, _ = next(numpy_em.em_steps(S, F.astype(np.float32), sigma_sq, modalities_of(TWO)))
    assert loadings.dtype == np.float32
