"""Procrustes: exact where the target is a rotation away, and the same as SciPy's elsewhere."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CHAIN, PROPERTY, TWO, assert_at_most, masked_normal, orthogonal, relative, structure_rotation
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes

from hcl_jax.alignment import align_by_structure, align_globally, procrustes_rotation

SHAPES = st.sampled_from([(16, 5), (6, 1), (19, 6)])  # few, so that compiled code is reused
SEEDS = st.integers(0, 10_000)
ROUNDING = 1e-13  # some hundred roundings of float64


@given(shape=SHAPES, seed=SEEDS)
@PROPERTY
def test_a_rotated_matrix_is_rotated_back(shape, seed):
    rng = np.random.default_rng(seed)
    target, O = rng.standard_normal(shape), orthogonal(rng, shape[1])
    assert_at_most(relative(align_globally(jnp.asarray(target @ O), jnp.asarray(target)), target), ROUNDING, "ΛO aligned onto Λ")


@given(shape=SHAPES, seed=SEEDS)
@PROPERTY
def test_the_rotation_is_scipys(shape, seed):
    rng = np.random.default_rng(seed)
    estimate, target = rng.standard_normal(shape), rng.standard_normal(shape)
    O = procrustes_rotation(jnp.asarray(estimate), jnp.asarray(target))
    assert_at_most(relative(O.T @ O, np.eye(shape[1])), ROUNDING, "orthogonality")
    best = np.linalg.norm(estimate @ orthogonal_procrustes(estimate, target)[0] - target)
    ours = np.linalg.norm(estimate @ np.asarray(O) - target)
    assert_at_most(abs(ours / best - 1), ROUNDING, "distance over that of SciPy's rotation, minus 1")


@given(hierarchy=st.sampled_from([TWO, CHAIN]), seed=SEEDS)
@PROPERTY
def test_structures_are_rotated_back_one_by_one(hierarchy, seed):
    rng = np.random.default_rng(seed)
    target = masked_normal(rng, hierarchy)
    rotated = jnp.asarray(target @ structure_rotation(rng, hierarchy))
    assert_at_most(relative(align_by_structure(rotated, jnp.asarray(target), hierarchy), target), ROUNDING, "ΛO aligned onto Λ")


def test_alignment_by_structure_does_not_mix_structures():
    rng = np.random.default_rng(0)
    target = masked_normal(rng, TWO)
    mixed = target @ orthogonal(rng, TWO.n_factors)
    aligned = align_by_structure(jnp.asarray(mixed), jnp.asarray(target), TWO)
    assert relative(aligned, target) > 0.1, "a rotation across structures must not be undone structure by structure"
    for s in TWO.structures:
        before, after = mixed[:, TWO.columns(s)], np.asarray(aligned[:, TWO.columns(s)])
        assert_at_most(relative(after @ after.T, before @ before.T), ROUNDING, f"Gram matrix of {s}, kept")


@pytest.mark.parametrize("shape", [(5, 3), (5, 1)])
def test_a_zero_estimate_stays_zero(shape):
    aligned = align_globally(jnp.zeros(shape), jnp.ones(shape))
    assert (aligned == 0).all(), "the rotation of a zero matrix is arbitrary but finite"
