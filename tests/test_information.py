"""Bounds of mutual information: of any scores, of Gaussian pairs with the exact critic, and with one that is trained."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import PROPERTY, assert_at_least, assert_at_most, assert_close, assert_within
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hcl_jax.networks.independence import club, info_nce
from hcl_jax.networks.information import InformationConfig, critic_bounds, mutual_information
from hcl_jax.networks.training import TrainingConfig

BATCH = 256
SCORES = arrays(np.float64, (7, 7), elements=st.floats(-1e6, 1e6))
LABELS = arrays(np.int64, 7, elements=st.integers(0, 2))

lower, upper = jax.jit(info_nce), jax.jit(club)


@PROPERTY
@given(SCORES, LABELS)
def test_no_scores_take_infonce_above_the_logarithm_of_what_is_compared(scores, labels):
    alike = labels[:, None] == labels
    for s in (scores, scores.T):
        assert float(lower(s)) <= np.log(7) + 1e-9
        assert float(lower(s, alike)) <= np.log(alike.sum(axis=1)).mean() + 1e-9
    assert float(lower(np.diag(np.full(7, 50.0)), alike)) == pytest.approx(np.log(alike.sum(axis=1)).mean())


def test_one_class_for_all_is_no_condition():
    scores = np.random.default_rng(0).standard_normal((9, 9))
    everything = np.ones((9, 9), bool)
    assert_close(lower(scores, everything), lower(scores), "InfoNCE")
    assert_close(upper(scores, everything), upper(scores), "NCE-CLUB")
    others = jax.jit(lambda s, alike=None: club(s, alike, others_only=True))
    assert_close(others(scores) * (1 - 1 / 9), upper(scores), "NCE-CLUB against others only")
    assert_close(others(scores, everything), others(scores), "NCE-CLUB against others only, one class")
    assert float(others(scores, np.eye(9, dtype=bool))) == 0


def test_conditions_by_mask_are_means_over_classes():
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((12, 12)), np.repeat([0, 1, 1], 4)
    alike = labels[:, None] == labels
    for bound, of in (("InfoNCE", lower), ("NCE-CLUB", upper)):
        expected = sum(np.mean(labels == c) * float(of(scores[np.ix_(labels == c, labels == c)])) for c in (0, 1))
        assert_close(of(scores, alike), expected, bound)


def gaussian_pairs(key, d, rho, n):
    """n pairs of d coordinates, correlation ρ in each."""
    k_x, k_noise = jr.split(key)
    x = jr.normal(k_x, (n, d), jnp.float32)
    return x, rho * x + np.float32(np.sqrt(1 - rho**2)) * jr.normal(k_noise, (n, d), jnp.float32)


class Exact:
    """The log density ratio of such pairs."""

    def __init__(self, rho):
        self.rho = np.float32(rho)

    def __call__(self, x, y):
        rho, c = self.rho, 1 - self.rho**2
        squares = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :]
        return -x.shape[1] / 2 * jnp.log(c) - (rho**2 * squares - 2 * rho * x @ y.T) / (2 * c)


@cache
def of_exact(d, rho, batches=1000):
    """(I, Jeffreys, means of the bounds, their standard errors) with the exact critic; and the batches."""
    x, y = (rows.reshape(batches, BATCH, d) for rows in gaussian_pairs(jr.key(1), d, np.float32(rho), batches * BATCH))
    found = np.asarray(jax.jit(lambda x, y: critic_bounds(Exact(rho), x, y)[:2])(x, y), float)
    errors = found.std(axis=1, ddof=1) / np.sqrt(batches)
    return -d / 2 * np.log(1 - rho**2), d * rho**2 / (1 - rho**2), found.mean(axis=1), errors, (x, y)


CELLS = [(d, rho) for d in (1, 2, 5, 10) for rho in (0.3, 0.5, 0.7, 0.9)]


@pytest.mark.slow
@pytest.mark.parametrize(("d", "rho"), CELLS)
def test_the_exact_critic_of_gaussian_pairs_stands_where_the_theory_has_it(d, rho):
    information, jeffreys, (nce, nce_club), (nce_error, club_error), _ = of_exact(d, rho)
    assert_at_most(nce, information + 3 * nce_error, "InfoNCE")
    assert_within(nce_club, jeffreys, max(0.03 * jeffreys, 3 * club_error), "NCE-CLUB")


EDGES = ((1, 0.9), (10, 0.3))  # where the trained critic is furthest from the exact one


@pytest.mark.slow
@pytest.mark.parametrize(("d", "rho"), [cell if cell in EDGES else pytest.param(*cell, marks=pytest.mark.long) for cell in CELLS])
def test_a_trained_critic_comes_near_the_exact_one(d, rho):
    """Within 15 % of the exact critic's InfoNCE (20 % where there is little), and 20 % of Jeffreys."""
    information, jeffreys, (nce, _), _, batches = of_exact(d, rho)
    pairs = gaussian_pairs(jr.key(2), d, np.float32(rho), 100_000)
    training = TrainingConfig(steps=2000, batch_size=BATCH, weight_decay=0.0, patience=1000)
    found = mutual_information(*pairs, InformationConfig(training=training), key=jr.key(3))
    standardised = [
        (rows - pair.mean(axis=0)[None, None, :]) / pair.std(axis=0)[None, None, :]
        for rows, pair in zip(batches, pairs, strict=True)
    ]
    lower, upper, _ = np.asarray(jax.jit(critic_bounds)(found.critic, *standardised), float).mean(axis=1)
    assert_within(lower / nce, 1, 0.2 if rho == 0.3 else 0.15, "InfoNCE over the exact critic's")
    assert_within(upper / jeffreys, 1, 0.2, "NCE-CLUB over Jeffreys")


SHORT = InformationConfig(training=TrainingConfig(steps=150, batch_size=64, learning_rate=3e-3, weight_decay=0.0), hidden=(32,))


def test_dependent_arrays_have_information_and_others_none():
    x, y = gaussian_pairs(jr.key(1), 2, np.float32(0.9), 3000)
    found = jax.vmap(lambda y: mutual_information(x, y, SHORT, key=jr.key(0)))(jnp.stack([y, y[::-1], 0 * y]))
    assert_within(found.lower[0], 1.5, 0.3, "InfoNCE of 1.66 nats")
    assert_at_least(found.upper[0], found.lower[0], "NCE-CLUB")
    assert_at_most(jnp.abs(found.lower[1:]).max(), 0.1, "InfoNCE of nothing")
    np.testing.assert_allclose(found.saturation, np.log(64), rtol=1e-6)
    assert not np.any(found.status)
    assert np.all(np.isnan(found.classifier))


def test_a_classifier_of_pairs_estimates_information():
    """Its scores are log-ratios of densities less log(n - 1): no ceiling at log n, and no warrant of a bound."""
    x, y = gaussian_pairs(jr.key(1), 2, np.float32(0.7), 3000)
    config = dataclasses.replace(SHORT, objective="classifier", training=dataclasses.replace(SHORT.training, steps=300))
    found = jax.vmap(lambda y: mutual_information(x, y, config, key=jr.key(0)))(jnp.stack([y, y[::-1]]))
    assert_within(found.classifier[0], 0.673, 0.15, "classifier's estimate, in nats")  # a critic of 300 steps sees less
    assert_within(found.classifier[1], 0, 0.1, "of none")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"x": np.zeros(20)}, "x"),
        ({"y": np.zeros((20, 2), int)}, "y"),
        ({"y": np.zeros((19, 2))}, "y"),
        ({"key": 0}, "key"),
    ],
)
def test_bad_arguments_are_named(change, word):
    arguments = {"x": np.zeros((20, 2)), "y": np.zeros((20, 2)), "key": jr.key(0)} | change
    with pytest.raises(ValueError, match=rf"{word}.*expected"):
        mutual_information(**arguments)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="hidden.*expected"):
        InformationConfig(hidden=())
    with pytest.raises(ValueError, match="training.*expected"):
        InformationConfig(training=TrainingConfig(held_out=0.0))
