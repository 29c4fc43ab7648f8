"""The nonlinear study: its metrics on scores that are known, its cells, and its command line."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_refused, assert_within

import nonlinear as figures
from hcl_jax import Hierarchy
from hcl_jax.experiments import read_results
from hcl_jax.experiments.nonlinear import DrawSpec, NonlinearCell, draw, outcome_of, score_metrics
from simulations.nonlinear import main

H = Hierarchy((6, 5, 4), {"123": 2, "12": 1, "1": 1, "3": 1})
N = 1500
Z = jr.normal(jr.key(0), (N + 1000, H.n_factors))
MASK = jnp.asarray(H.modality_mask)


def metrics(scores, membership=MASK):
    return score_metrics(scores, membership, Z, H, N)


def test_the_factors_themselves_have_everything_and_leak_nothing():
    found = metrics(Z @ jnp.diag(jnp.array([2.0, -1.0, 3.0, 0.1, 1.0])))
    np.testing.assert_allclose(found["r_squared"], 1, atol=1e-6)
    assert float(found["leak"]) < 0.01
    assert float(found["quadratic"].max()) < 1e-6


def test_noise_and_leak_are_what_they_were_made():
    noise = jr.normal(jr.key(1), Z.shape)
    scores = 0.8 * Z + 0.6 * noise
    assert_within(metrics(scores)["r_squared"].mean(), 0.64, 0.03, "R² of factors in noise")
    leaking = scores.at[:, 3].add(0.5 * Z[:, 4])  # the private factor of 3 in the scores of 1
    found = metrics(leaking)
    assert_within(found["leak"], 0.25 / 1.25, 0.04, "leak")


def test_products_of_other_factors_are_seen():
    scores = Z.at[:, 2].add(Z[:, 3] * Z[:, 4])
    found = metrics(scores)["quadratic"]
    assert_within(found[H.structures.index((1, 2))], 0.5, 0.05, "share of products")
    assert float(jnp.delete(found, H.structures.index((1, 2))).max()) < 0.01


def test_a_structure_without_scores_has_none():
    shared_only = jnp.ones((3, H.n_factors), bool)
    found = metrics(Z, shared_only)
    np.testing.assert_allclose(found["r_squared"], [1, 0, 0, 0], atol=1e-2)
    np.testing.assert_allclose(found["r_squared_all"], 1, atol=1e-6)


def test_the_oracle_of_known_links_is_the_posterior_mean():
    cell = NonlinearCell(H, 500, 0.25, "leakyQ")
    drawn = draw(DrawSpec.of(cell, "float64"), (np.uint32(0), np.uint32(1), jnp.asarray(0.25)), jnp.uint32(0))
    found = outcome_of("oracle", H, 500, drawn)
    L = np.asarray(drawn.truth.loadings)
    explained = np.diag(L.T @ np.linalg.solve(L @ L.T + 0.25 * np.eye(len(L)), L))
    expected = [explained[H.columns(s)].mean() for s in H.structures]
    np.testing.assert_allclose(found["r_squared"], expected, atol=0.06)
    assert np.all(np.asarray(found["r_squared"]) < np.asarray(expected) + 0.06)


def test_cells_are_named_by_content():
    cell = NonlinearCell(H, 500, 0.09, "leaky")
    assert cell.name == "dims=6x5x4,ranks=123r2+12r1+1r1+3r1,n=500,noise_variance=0.09,link=leaky"
    told = NonlinearCell(H, 500, 0.09, "leaky", fitted=Hierarchy.full(H.dims, 1))
    assert told.draw_name == cell.draw_name  # the same data
    assert told.name != cell.name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--link", "cosine"], ["link", "cosine", "expected"]),
        (["--latent", "cauchy"], ["latent", "cauchy", "expected"]),
        (["--methods", "hcl", "pca"], ["methods", "pca", "expected"]),
        (["--n-grid", "5"], ["n-grid", "5", "expected"]),
        (["--absent", "45"], ["absent", "45", "expected"]),
        (["--metric", "rmse"], ["metric", "rmse", "expected"]),
    ],
)
def test_bad_options_are_named(arguments, words, tmp_path, capsys):
    assert_refused(main, ["--preset", "tiny", *arguments], words, tmp_path / "out", capsys)


@pytest.mark.slow
def test_the_tiny_study_runs_and_is_drawn(tmp_path):
    assert main(["--preset", "tiny", "--output", str(tmp_path), "--no-progress"]) == 0
    table = read_results(tmp_path)
    assert set(table["method"]) == {"linear", "hcl-copula", "hcl", "oracle"}
    assert [name for name, _ in figures.figures(table)] == ["nonlinear_recovery"]
    with jax.log_compiles(False):
        assert main(["--preset", "tiny", "--output", str(tmp_path), "--no-progress"]) == 0  # nothing left to compute
