"""Importance of structures, against what is known by construction."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_within

from hcl_jax import Hierarchy
from hcl_jax.fitted import LinearFit
from hcl_jax.importance import ImportanceConfig, structure_importance

H = Hierarchy((2, 2), {"12": 1, "1": 1, "2": 1})
N = 4000
COEFFICIENTS = jnp.array([2.0, 1.0, 0.0])


def identity_fit():
    """Scores are three of four features."""
    score_map = jnp.eye(4)[:, [0, 1, 2]]
    one, zero = jnp.ones(4), jnp.zeros((), jnp.int32)
    return LinearFit(
        centre=0 * one,
        scale=one,
        loadings=score_map,
        factors=jnp.zeros((0, 3)),
        score_map=score_map,
        membership=jnp.asarray(H.modality_mask),
        objective=jnp.zeros(()),
        status=zero,
        steps=zero,
        dims=H.dims,
    )


X = jr.normal(jr.key(0), (N, 4))
VIEWS, Y = [X[:, :2], X[:, 2:]], X[:, :3] @ COEFFICIENTS + jr.normal(jr.key(1), (N,))


def linear_head(scores):
    return scores @ COEFFICIENTS


@pytest.mark.parametrize(("how", "factor"), [("mask", 1), ("impute", 1), ("permute", 2)])
def test_what_is_lost_is_the_variance_that_a_structure_explains(how, factor):
    """Masking leaves b²; permuting adds another b² of noise. Var y = 4 + 1 + 1."""
    table = structure_importance(identity_fit(), VIEWS, Y, linear_head, ImportanceConfig(how=how), key=jr.key(2))
    assert table["structure"].to_list() == ["12", "1", "2"]
    for name, b in zip(("12", "1", "2"), (2, 1, 0), strict=True):
        row = table.filter(table["structure"] == name).row(0, named=True)
        assert_within(row["drop"], factor * b**2 / 6, 0.05, f"{how}: drop without {name}")
        assert row["drop_low"] <= row["drop"] <= row["drop_high"]
        assert_within(row["share"], b**2 / 5, 0.02, f"{how}: share of {name}")
    assert_within(table["score"][0], 5 / 6, 0.02, "R² with all")


def test_intervals_cover_sampling_of_the_rows():
    """Over samples of 200 rows, intervals of 90 % hold the drop of all 4,000 rows about as often."""
    config = ImportanceConfig(how="mask", level=0.9, bootstraps=200)
    held = []
    for i in range(20):
        rows = slice(200 * i, 200 * (i + 1))
        views = [view[rows] for view in VIEWS]
        row = structure_importance(identity_fit(), views, Y[rows], linear_head, config, key=jr.key(i)).row(0, named=True)
        held.append(row["drop_low"] <= 4 / 6 <= row["drop_high"])
    assert np.mean(held) >= 0.7  # binomial, four standard errors below 0.9


def test_classes_lose_accuracy():
    labels = (X[:, 0] > 0).astype(jnp.int32)
    config = ImportanceConfig(metric="accuracy")
    head = jax.jit(lambda scores: (scores[:, 0] > 0).astype(jnp.int32))
    table = structure_importance(identity_fit(), VIEWS, labels, head, config, key=jr.key(0))
    assert table["score"][0] == 1
    assert_within(table["drop"][0], 0.5, 0.03, "accuracy lost without the structure that decides")
    np.testing.assert_array_equal(table["drop"].to_numpy()[1:], 0)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"y": Y[:-1]}, "y"), ({"predict": lambda scores: scores}, "predict"), ({"key": 0}, "key"), ({"views": VIEWS[:1]}, "views")],
)
def test_bad_input_is_named(change, word):
    arguments = {"views": VIEWS, "y": Y, "predict": linear_head, "key": jr.key(0)} | change
    with pytest.raises(ValueError, match=rf"{word}.*expected"):
        structure_importance(identity_fit(), arguments["views"], arguments["y"], arguments["predict"], key=arguments["key"])
