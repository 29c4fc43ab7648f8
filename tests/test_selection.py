"""Which structures and ranks data support: the evidence of columns, the table read, and whole hierarchies found."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import TWO, assert_at_least, assert_at_most, fitted_by, normal_truth, relative

from hcl_jax import Hierarchy, SampleCovariance, sample_wishart_covariance
from hcl_jax.estimators.variational import fit_posterior
from hcl_jax.selection import Evidence, evidence, found_columns, select
from hcl_jax.views import standardise

NOISE_OF_VIEWS = (0.2, 1.0, 3.0)
RANKS = {(1, 2, 3): 2, (1, 2): 2, (1,): 2}
SMALL = Hierarchy((15, 10, 20), RANKS)
OFFERED = Hierarchy(SMALL.dims, dict.fromkeys(RANKS, 3) | {(2, 3): 2, (3,): 2})


def small_problem(seed):
    truth = normal_truth(np.random.default_rng(seed), SMALL, np.repeat(NOISE_OF_VIEWS, SMALL.dims), "view")
    return truth, sample_wishart_covariance(jr.key(seed), truth, 1000)


def test_evidence_tells_what_is_there_from_what_is_not():
    """Of the columns offered, as many as there are stand far out, each in the modalities of one true structure."""
    for seed in range(3):
        _, S = small_problem(seed)
        posterior, _ = fit_posterior(S, OFFERED, noise="view")
        odds = evidence(posterior, S, OFFERED)
        columns = np.asarray(odds.columns)
        assert (np.asarray(odds.blocks)[~OFFERED.modality_mask] == 0).all()
        assert (columns[~np.asarray(posterior.kept).any(axis=0)] == 0).all(), "a pruned column has no evidence either way"
        ordered = np.sort(columns)[::-1]
        assert_at_least(ordered[5], 20, f"seed {seed}: the least log odds of the six columns that are there")
        assert_at_most(ordered[6], np.log(OFFERED.n_factors), f"seed {seed}: the largest of those that are not")


def test_hierarchies_are_found():
    for seed in range(3):
        _, S = small_problem(seed)
        assert select(S, OFFERED, noise="view") == SMALL, f"seed {seed}"


def test_hierarchies_of_standardised_views_are_found():
    """Standardising few features with equal noise makes noise that differs by feature: one variance a view finds up to ten more
    columns there."""
    truth = {(1, 2, 3): 1, (1,): 1, (2,): 1, (3,): 1}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        z = rng.standard_normal((300, 4))
        views = [
            z[:, [0, k]] @ rng.standard_normal((2, dim)) + sd * rng.standard_normal((300, dim))
            for k, dim, sd in ((1, 12, 1), (2, 10, 0.5), (3, 9, 1))
        ]
        S = SampleCovariance.from_data([standardise(view, view) for view in views])
        assert dict(select(S, Hierarchy.full((12, 10, 9), 2)).ranks) == truth, f"seed {seed}"


def test_noise_that_is_drawn_supports_no_hierarchy():
    rows = np.random.default_rng(0).standard_normal((500, TWO.n_features))
    with pytest.raises(ValueError, match="covariance: supports none of the 5 columns offered"):
        select(SampleCovariance.from_data(rows), TWO)


def test_found_columns_reads_the_table():
    """A block counts above log 7, of seven offered, a column above log 5."""
    blocks = np.array([[9.0, 0.2, 30.0, 0.0, 0.0], [8.0, 5.0, 0.0, 2.0, 9.0]])
    columns = np.array([15.0, 4.0, 30.0, 2.0, 1.5])
    assert found_columns(Evidence(jnp.asarray(columns), jnp.asarray(blocks)), TWO) == {(1, 2): [0], (2,): [1, 3], (1,): [2]}
    assert found_columns(Evidence(jnp.zeros(5), jnp.asarray(blocks)), TWO) == {}


def test_noise_supports_no_hierarchy():
    with pytest.raises(ValueError, match="covariance: supports none of the 5 columns offered; expected a visible factor"):
        select(SampleCovariance(2.0 * jnp.eye(16), n=500), TWO)


FULL_SIZE = Hierarchy((60, 40, 80), RANKS)
NOISE_VARIANCES = {
    "view": lambda rng: np.repeat(NOISE_OF_VIEWS, FULL_SIZE.dims),
    "feature": lambda rng: rng.uniform(0.2, 3, FULL_SIZE.n_features),
}


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISE_VARIANCES)
def test_the_hierarchy_is_found_in_the_full_lattice_and_its_loadings_as_if_it_were_known(noise):
    """Twenty draws of n = 1,000: all seven structures of rank 3 offered, and hcl-ml told the true ones."""
    offered = Hierarchy.full(FULL_SIZE.dims, 3)
    exact, errors = [], {"hcl-vb": [], "hcl-ml": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth = normal_truth(rng, FULL_SIZE, NOISE_VARIANCES[noise](rng), noise)
        S = sample_wishart_covariance(jr.key(seed), truth, 1000)
        posterior, estimate = fit_posterior(S, offered, noise=noise)
        found = found_columns(evidence(posterior, S, offered), offered)
        exact.append({s: len(columns) for s, columns in found.items()} == RANKS)
        for name, fit in (("hcl-vb", estimate), ("hcl-ml", fitted_by("hcl-ml", noise=noise)(S, FULL_SIZE))):
            errors[name].append(relative(fit.loadings @ fit.loadings.T, truth.gram()))
    assert_at_least(np.mean(exact), 0.9, f"{noise}: share of draws in which the hierarchy is found")
    ratio = np.mean(errors["hcl-vb"]) / np.mean(errors["hcl-ml"])
    assert_at_most(ratio, 1.05, f"{noise}: mean Gram error of hcl-vb over that of hcl-ml told the hierarchy")
