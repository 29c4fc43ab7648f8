"""Errors against dense definitions, and what must leave them unchanged."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CHAIN,
    PROPERTY,
    TWO,
    UNEVEN,
    assert_at_most,
    errors_of,
    masked_normal,
    orthogonal,
    permuted_modalities,
    relative,
    structure_gram,
    structure_rotation,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes

from hcl_jax import Hierarchy
from hcl_jax.metrics import NORMS, gram_error, place_columns

HIERARCHY = st.sampled_from([TWO, UNEVEN])
SEEDS = st.integers(0, 10_000)
ROUNDING = 1e-12  # some thousand roundings of float64
NUMPY_NORMS = {
    "spectral": partial(np.linalg.norm, ord=2),
    "frobenius": np.linalg.norm,
    "two_to_infinity": lambda A: np.linalg.norm(A, axis=1).max(),
}


def pair(hierarchy, seed):
    """A target and an estimate near it, both with the zero pattern."""
    rng = np.random.default_rng(seed)
    target = masked_normal(rng, hierarchy)
    return rng, target + 0.3 * masked_normal(rng, hierarchy), target


def measure(estimate, target, hierarchy, estimated=None):
    errors = errors_of(jnp.asarray(estimate), estimated or hierarchy, jnp.asarray(target), hierarchy)
    return {name: np.asarray(value) for name, value in errors.items()}


def assert_same(a, b, what, tolerance=ROUNDING):
    assert a.keys() == b.keys()
    worst = max(a, key=lambda name: np.abs(a[name] - b[name]).max())
    assert_at_most(np.abs(a[worst] - b[worst]).max(), tolerance, f"{what}: largest change, in {worst}")


def dense_errors(estimate, target, hierarchy):
    """Every error by its definition, with SciPy's Procrustes and d × d Gram matrices."""
    G, G_hat = target @ target.T, estimate @ estimate.T
    aligned = estimate @ orthogonal_procrustes(estimate, target)[0]
    errors = {f"procrustes_{name}": norm(aligned - target) for name, norm in NUMPY_NORMS.items()}
    errors |= {"gram_frobenius": np.linalg.norm(G_hat - G), "gram_relative": np.linalg.norm(G_hat - G) / np.linalg.norm(G)}
    structures, modalities = hierarchy.structures, hierarchy.modalities
    errors["structure_gram_frobenius"] = np.array(
        [np.linalg.norm(structure_gram(estimate, hierarchy, s) - structure_gram(target, hierarchy, s)) for s in structures]
    )
    for name in (*NUMPY_NORMS, "gram_frobenius"):
        errors[f"block_{name}"] = np.zeros((len(structures), len(modalities)))
    for i, s in enumerate(structures):
        A, B = estimate[:, hierarchy.columns(s)], target[:, hierarchy.columns(s)]
        rotated = A @ orthogonal_procrustes(A, B)[0]
        for m in modalities:
            a, b = rotated[hierarchy.rows(m)], B[hierarchy.rows(m)]
            for name, norm in NUMPY_NORMS.items():
                errors[f"block_{name}"][i, m - 1] = norm(a - b)
            errors["block_gram_frobenius"][i, m - 1] = np.linalg.norm(a @ a.T - b @ b.T)
    return errors


@given(hierarchy=HIERARCHY, seed=SEEDS)
@PROPERTY
def test_every_error_is_its_definition(hierarchy, seed):
    _, estimate, target = pair(hierarchy, seed)
    assert_same(
        measure(estimate, target, hierarchy), dense_errors(estimate, target, hierarchy), "against dense definitions", 1e-7
    )


@given(hierarchy=HIERARCHY, seed=SEEDS)
@PROPERTY
def test_rotating_structures_changes_nothing(hierarchy, seed):
    rng, estimate, target = pair(hierarchy, seed)
    before = measure(estimate, target, hierarchy)
    assert_same(before, measure(estimate @ structure_rotation(rng, hierarchy), target, hierarchy), "estimate rotated", 1e-9)
    assert_same(before, measure(estimate, target @ structure_rotation(rng, hierarchy), hierarchy), "truth rotated", 1e-9)


@given(hierarchy=HIERARCHY, seed=SEEDS)
@PROPERTY
def test_permuting_features_changes_nothing(hierarchy, seed):
    rng, estimate, target = pair(hierarchy, seed)
    order = np.concatenate([rng.permutation(np.arange(hierarchy.n_features)[hierarchy.rows(m)]) for m in hierarchy.modalities])
    before, after = measure(estimate, target, hierarchy), measure(estimate[order], target[order], hierarchy)
    assert_same(before, after, "features permuted within modalities", 1e-9)


@pytest.mark.parametrize(("hierarchy", "order"), [(TWO, (1, 0)), (UNEVEN, (2, 0, 1))], ids=str)
def test_permuting_modalities_permutes_the_errors(hierarchy, order):
    _, estimate, target = pair(hierarchy, 0)
    permuted, rows, columns = permuted_modalities(hierarchy, order)
    before = measure(estimate, target, hierarchy)
    after = measure(estimate[rows][:, columns], target[rows][:, columns], permuted)
    new_of_old = {old + 1: new for new, old in enumerate(order, start=1)}
    moved = [permuted.structures.index(tuple(sorted(new_of_old[m] for m in s))) for s in hierarchy.structures]
    back = {}
    for name, value in after.items():
        back[name] = value if value.ndim == 0 else value[moved]
        if value.ndim == 2:
            back[name] = back[name][:, [new_of_old[m] - 1 for m in hierarchy.modalities]]
    assert_same(before, back, "modalities permuted", 1e-9)


@given(hierarchy=HIERARCHY, seed=SEEDS)
@PROPERTY
def test_no_error_where_only_rotations_differ(hierarchy, seed):
    rng, _, target = pair(hierarchy, seed)
    errors = measure(target @ structure_rotation(rng, hierarchy), target, hierarchy)
    worst = max(errors, key=lambda name: errors[name].max())
    assert_at_most(errors[worst].max(), 1e-7, f"largest error, in {worst}")  # norms are roots of sums of squares near 0


def test_blocks_do_not_see_what_structures_see():
    """Modalities of one structure rotated apart: each block's Gram matrix is right, the structure's is not."""
    rng, _, target = pair(TWO, 1)
    apart = target.copy()
    both = TWO.columns((1, 2))
    apart[TWO.rows(1), both] = apart[TWO.rows(1), both] @ orthogonal(rng, 2)
    errors = measure(apart, target, TWO)
    i = TWO.structures.index((1, 2))
    assert_at_most(errors["block_gram_frobenius"][i].max(), ROUNDING, "block Gram error")
    assert errors["structure_gram_frobenius"][i] > 1, f"structure Gram error is {errors['structure_gram_frobenius'][i]:.3g}"


def test_gram_error_keeps_its_digits_where_the_difference_is_small():
    """The expanded form ‖AᵀA‖² + ‖BᵀB‖² − 2‖AᵀB‖² loses half of them."""
    rng = np.random.default_rng(0)
    A, V = rng.standard_normal((30, 4)), rng.standard_normal((30, 4))
    for h in (1e-2, 1e-5, 1e-8):
        step = h * V
        exact = np.linalg.norm(step @ A.T + A @ step.T + step @ step.T)
        measured = float(gram_error(jnp.asarray(A + step), jnp.asarray(A)))
        assert_at_most(abs(measured / exact - 1), 1e-6, f"relative error at a difference of {h:g}")


@given(shape=st.sampled_from([(30, 4, 6), (5, 4, 6)]), seed=SEEDS)
@PROPERTY
def test_gram_error_is_the_dense_norm(shape, seed):
    rng = np.random.default_rng(seed)
    A, B = rng.standard_normal(shape[:2]), rng.standard_normal((shape[0], shape[2]))
    dense = np.linalg.norm(A @ A.T - B @ B.T)
    assert_at_most(abs(float(gram_error(jnp.asarray(A), jnp.asarray(B))) / dense - 1), ROUNDING, "relative difference")


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (1, 3)])
def test_norms_are_numpys(shape):
    A = np.random.default_rng(2).standard_normal(shape)
    assert NORMS.keys() == NUMPY_NORMS.keys()
    for name, norm in NORMS.items():
        assert_at_most(abs(float(norm(jnp.asarray(A))) / NUMPY_NORMS[name](A) - 1), 1e-7, name)


def test_an_estimate_without_the_pattern_is_aligned_globally_then_masked():
    rng, _, target = pair(TWO, 3)
    errors = measure(target @ orthogonal(rng, TWO.n_factors), target, TWO)
    worst = max(errors, key=lambda name: errors[name].max())
    assert_at_most(errors[worst].max(), 1e-6, f"largest error of a globally rotated truth, in {worst}")
    leaky = target.copy()
    leaky[TWO.rows(2), TWO.columns((1,))] = 0.05
    errors = measure(leaky, target, TWO)
    i = TWO.structures.index((1,))
    assert errors["block_frobenius"][i, 1] > 0.02, "leakage into a zero block has to show"
    assert_at_most(abs(errors["structure_gram_frobenius"]).max(), 0.5, "structure Gram error after masking")


def test_errors_stand_on_the_union_of_both_hierarchies():
    _, _, target = pair(TWO, 4)
    fitted = Hierarchy(TWO.dims, {(1, 2): 3, (1,): 1})  # one factor too many, one structure missing
    estimate = np.zeros((16, 4))
    estimate[:, [0, 1]], estimate[:, 3] = target[:, TWO.columns((1, 2))], target[:, TWO.columns((1,))][:, 0]
    errors = measure(estimate, target, TWO, fitted)
    missing = structure_gram(target, TWO, (2,))
    assert errors["structure_gram_frobenius"].shape == (3,)
    assert_at_most(abs(errors["gram_frobenius"] - np.linalg.norm(missing)), 1e-10, "Gram error minus that of what is missing")
    assert_at_most(abs(errors["structure_gram_frobenius"][2] - np.linalg.norm(missing)), 1e-10, "the same, by structure")
    assert_at_most(errors["structure_gram_frobenius"][:2].max(), 1e-7, "error of the structures that are there")


def test_columns_are_placed_where_the_larger_hierarchy_has_them():
    _, _, target = pair(TWO, 5)
    larger = TWO.union(Hierarchy(TWO.dims, {(1, 2): 3, (1,): 1}))
    placed = np.asarray(place_columns(jnp.asarray(target), TWO, larger))
    np.testing.assert_array_equal(placed[:, [0, 1, 3, 4, 5]], target)
    assert (placed[:, 2] == 0).all()


def test_errors_follow_the_dtype_and_batch():
    _, estimate, target = pair(TWO, 6)
    single = [jnp.asarray(A, jnp.float32) for A in (estimate, target)]
    errors = errors_of(single[0], TWO, single[1], TWO)
    assert {value.dtype for value in errors.values()} == {jnp.dtype(jnp.float32)}
    double = measure(estimate, target, TWO)
    for name, value in errors.items():
        assert_at_most(relative(value, double[name]), 1e-4, f"{name} in float32")
    batch = jax.vmap(lambda A: errors_of(A, TWO, jnp.asarray(target), TWO))(
        jnp.stack([jnp.asarray(target), jnp.asarray(estimate)])
    )
    assert_same({name: np.asarray(value[1]) for name, value in batch.items()}, double, "second of a batch", 1e-9)


def test_shapes_of_errors():
    _, estimate, target = pair(CHAIN, 0)
    errors = measure(estimate, target, CHAIN)
    by_shape = {(): set(), (5,): set(), (5, 4): set()}
    for name, value in errors.items():
        by_shape[value.shape].add(name)
    assert by_shape[()] == {f"procrustes_{norm}" for norm in NORMS} | {"gram_frobenius", "gram_relative"}
    assert by_shape[(5,)] == {"structure_gram_frobenius"}
    assert by_shape[(5, 4)] == {f"block_{norm}" for norm in NORMS} | {"block_gram_frobenius"}
    zero = np.array([[m not in s for m in CHAIN.modalities] for s in CHAIN.structures])
    for name in by_shape[(5, 4)]:
        assert (errors[name][zero] == 0).all(), f"{name}: blocks that both hold at zero have no error"
