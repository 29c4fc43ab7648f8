"""Prediction at the sizes of the paper: ratios to the Bayes limit, rates, selection. Minutes, so all of it is marked slow."""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hcl_jax import ESTIMATORS, Hierarchy
from hcl_jax.experiments.downstream import Downstream, DownstreamCell, DrawSpec, draw, estimate_outcome
from hcl_jax.limits import bayes

pytestmark = pytest.mark.slow

HIERARCHY = Hierarchy.full((100, 100, 100), 5)
TWO = ((1, 2, 3), (1, 2))
REPLICATES = 50


@lru_cache
def fit_program(representation):
    return jax.jit(lambda covariance: ESTIMATORS[representation](covariance, HIERARCHY))


@lru_cache
def outcome_program(regressions):
    return jax.jit(lambda fit, drawn: {name: estimate_outcome(name, fit, drawn) for name in regressions})


def replicated(representation, regressions, n, m, noise, support=(), replicates=REPLICATES):
    """Metric by regression, replicates leading; `bayes` stands beside the regressions."""
    cell = DownstreamCell(HIERARCHY, n, m, noise, support=support)
    sample = jax.jit(lambda shared, i: draw(DrawSpec.of(cell, "float64"), shared, i))
    shared = Downstream().shared_arguments(cell, 0, "float64")
    rows = []
    for i in range(replicates):
        drawn = sample(shared, jnp.uint32(i))
        outcome = outcome_program(regressions)(fit_program(representation)(drawn.covariance), drawn)
        rows.append(outcome | {"bayes": bayes(drawn.truth)})
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


@pytest.mark.parametrize(("n", "noise", "bound"), [(2000, 0.1, 1.010), (8000, 1.0, 1.015)])
@pytest.mark.parametrize("representation", ["hcl-ml", "hcl-vb"])
def test_posterior_mean_regression_is_near_the_bayes_limit(representation, n, noise, bound):
    results = replicated(representation, ("posterior",), n, 10_000, noise)
    ratio = results["posterior"]["rmse"].mean() / results["bayes"]["rmse"].mean()
    assert 1 < ratio <= bound, f"{representation}: mean RMSE is {ratio:.4f} times the limit"


def test_the_group_penalty_helps_with_few_labels():
    results = replicated("hcl-ml", ("posterior", "posterior-group"), 2000, 200, 0.1, TWO)
    ratio = results["posterior-group"]["rmse"].mean() / results["posterior"]["rmse"].mean()
    assert ratio <= 0.97, f"RMSE with the group penalty is {ratio:.4f} times that without"


def test_the_debiased_error_of_the_coefficients_falls_like_one_over_root_m():
    sizes = np.array([500, 1000, 2000, 4000, 8000])
    errors = [replicated("hcl-ml", ("debiased",), 1_000_000, int(m), 0.1)["debiased"]["beta_error"] for m in sizes]
    means = np.array([e.mean() for e in errors])
    slope = np.polyfit(np.log(sizes), np.log(means), 1)[0]
    assert abs(slope + 0.5) <= 0.05, f"slope {slope:.3f}, errors {means}"


def test_the_adaptive_group_lasso_selects_the_true_structures():
    regressions = ("debiased-group", "debiased-group-one-se", "debiased-group-adaptive")
    results = replicated("hcl-ml", regressions, 8000, 10_000, 0.1, TWO)
    exact = {name: results[name]["exact_selection"].mean() for name in regressions}
    assert exact["debiased-group-adaptive"] >= 0.95, exact
    assert exact["debiased-group"] < exact["debiased-group-one-se"] + 1e-9, (
        exact
    )  # the minimum of cross-validation does not select
    assert all((results[name]["true_positive_rate"] == 1).all() for name in regressions)
