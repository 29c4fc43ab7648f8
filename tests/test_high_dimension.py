"""More features than samples: centred rows instead of a d × d matrix, with the same results."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from hcl_jax import ESTIMATORS, LIMITS, Hierarchy, SampleCovariance, Truth, recovery_errors
from hcl_jax.alignment import align_by_structure, align_globally
from hcl_jax.experiments.recovery import RECOVERY_LIMITS
from hcl_jax.model import sample_observations, sample_truth
from tests.helpers import PUBLISHED, assert_at_most, equations, relative

LATTICE = Hierarchy.full((25, 30, 35), 1)
WIDE = Hierarchy.full((1000, 1200, 1400), 2)
N = 60


def views_of(hierarchy, n=N, seed=0):
    truth = sample_truth(jr.key(seed), hierarchy, 0.1, jnp.float64)
    x, _ = sample_observations(jr.key(seed + 1), truth, n)
    return truth, [x[:, hierarchy.rows(m)] for m in hierarchy.modalities]


def fit(name, views, form):
    return jax.jit(lambda S: ESTIMATORS[name](S, LATTICE))(SampleCovariance.from_data(views, form=form))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "hcl-gd-published"])
def test_rows_and_matrix_give_the_same_estimate(name):
    """But for hcl-gd-published, whose start has arbitrary signs."""
    _, views = views_of(LATTICE)
    by_form = [fit(name, views, form) for form in ("rows", "matrix")]
    by_rows, by_matrix = by_form
    assert int(by_rows.status) == int(by_matrix.status)
    if name in PUBLISHED:  # every block's sign is its own
        blocks = [(LATTICE.rows(m), LATTICE.columns(s)) for s in LATTICE.structures for m in s]
        grams = [[e.loadings[r, c] @ e.loadings[r, c].T for r, c in blocks] for e in by_form]
        worst = max(relative(a, b) for a, b in zip(*grams, strict=True))
    else:
        worst = relative(by_rows.loadings @ by_rows.loadings.T, by_matrix.loadings @ by_matrix.loadings.T)
    assert_at_most(
        worst, 1e-7, f"{name}: relative difference of the Gram matrices"
    )  # stops at a relative gradient of 1e-6 to 1e-8


def largest_array(function, *arguments) -> tuple[int, str]:
    """The largest number of entries of any array in the traced program, and the operation that makes it."""
    program = jax.make_jaxpr(function)(*arguments)
    return max((out.aval.size, f"{e.primitive.name} {out.aval.shape}") for e in equations(program.jaxpr) for out in e.outvars)


def high_dimensional(name):
    loadings = jax.ShapeDtypeStruct((WIDE.n_features, WIDE.n_factors), jnp.float64)
    number = jax.ShapeDtypeStruct((), jnp.float64)
    rows = jax.ShapeDtypeStruct((N, WIDE.n_features), jnp.float64)

    def with_truth(function):
        return lambda L, noise, X, n: function(Truth(L, noise, WIDE), SampleCovariance(data=X, n=n))

    def with_estimate(function):
        return lambda L, noise, X, n: function(L, 2 * L)

    if name in ESTIMATORS:
        return with_truth(lambda _, S: ESTIMATORS[name](S, WIDE)), (loadings, number, rows, number)
    if name in LIMITS:
        return with_truth(LIMITS[name]), (loadings, number, rows, number)
    functions = {
        "errors": lambda A, B: recovery_errors(A, WIDE, B, WIDE),
        "global alignment": align_globally,
        "alignment by structure": lambda A, B: align_by_structure(A, B, WIDE),
    }
    return with_estimate(functions[name]), (loadings, number, rows, number)


@pytest.mark.parametrize("name", [*ESTIMATORS, *RECOVERY_LIMITS, "errors", "global alignment", "alignment by structure"])
def test_nothing_forms_a_square_matrix_of_all_features(name):
    function, arguments = high_dimensional(name)
    size, operation = largest_array(function, *arguments)
    allowed = WIDE.n_features * max(7 * WIDE.n_factors, 2 * (N + WIDE.n_factors))
    assert allowed < WIDE.n_features**2 / 10
    assert_at_most(size, allowed, f"{name}: entries of the largest array, of {operation}")


def test_the_check_sees_a_square_matrix():
    size, _ = largest_array(lambda X: X.T @ X, jnp.zeros((3, 50)))
    assert size == 2500


@pytest.mark.slow
def test_signals_that_dwarf_the_noise_converge_in_single_precision():
    """Strong factors of many features: a gradient in single precision then holds rounding errors above its relative tolerance."""
    hierarchy = Hierarchy.full((300, 300, 300), 1)
    truth = sample_truth(jr.key(0), hierarchy, 1.0, jnp.float32)
    strong = Truth(30 * truth.loadings, truth.noise_variance, hierarchy)
    x, _ = sample_observations(jr.key(1), strong, 100)
    fit = ESTIMATORS["hcl-ml"](SampleCovariance.from_data([x[:, hierarchy.rows(m)] for m in hierarchy.modalities]), hierarchy)
    assert int(fit.status) == 0
    assert int(fit.steps) < 500


def test_the_form_can_be_asked_for():
    views = [jnp.asarray(np.random.default_rng(0).standard_normal((20, 4)))] * 2
    assert SampleCovariance.from_data(views).matrix is not None
    assert SampleCovariance.from_data(views, form="rows").data is not None
    with pytest.raises(ValueError, match="form: is 'dense'; expected auto, matrix, rows or padded"):
        SampleCovariance.from_data(views, form="dense")
