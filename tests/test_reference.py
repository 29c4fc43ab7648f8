"""The published variants against one run each of the authors' released code, and the errors recorded there (in float32)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_at_most, errors_of, fitted_by, reference_arrays, relative
from scipy.linalg import orthogonal_procrustes

from hcl_jax import Hierarchy, SampleCovariance
from hcl_jax.estimators.published import published_descent

STORED = ("naive_svd", "hcl_svd", "hcl_gd", "slide")  # rows of `errors`
BLOCKS = [
    (m, s)
    for m, row in {1: ("123", "12", "13", "1"), 2: ("123", "12", "23", "2"), 3: ("123", "13", "23", "3")}.items()
    for s in row
]


@pytest.fixture(params=["small", "medium"])
def published(request):
    arrays = reference_arrays(f"published_{request.param}")
    return {key: array.astype(float) if array.dtype.kind == "f" else array for key, array in arrays.items()}


def hierarchy_of(published):
    return Hierarchy.full(published["dims"].tolist(), int(published["rank"]))


def covariance_of(published):
    n = int(published["n"]) if "n" in published else 2000
    return SampleCovariance(jnp.asarray(published["sample_covariance"]), n=n)


def worst_block(ours, theirs, hierarchy):
    """The largest relative difference of a block's Gram matrix, blocks that exist only."""
    errors = []
    for s in hierarchy.structures:
        for m in s:
            a, b = (np.asarray(F)[hierarchy.rows(m), hierarchy.columns(s)] for F in (ours, theirs))
            errors.append(relative(a @ a.T, b @ b.T))
    return max(errors)


@pytest.mark.parametrize("name", ["naive-svd", "hcl-svd-published"])
def test_noise_variance_and_blocks_agree(published, name):
    hierarchy = hierarchy_of(published)
    estimate = fitted_by(name)(covariance_of(published), hierarchy)
    noise = float(published["noise_variance"])
    assert_at_most(abs(float(estimate.noise_variance) / noise - 1), 1e-4, f"{name}: relative error of the noise variance")
    stored = published["naive_svd" if name == "naive-svd" else "hcl_svd"]
    assert_at_most(
        worst_block(estimate.loadings, stored, hierarchy), 1e-3, f"{name}: worst relative error of a block's Gram matrix"
    )


def test_the_descent_from_the_stored_start_agrees(published):
    hierarchy = hierarchy_of(published)
    descend = jax.jit(published_descent, static_argnums=1)
    estimate = descend(covariance_of(published), hierarchy, jnp.asarray(published["hcl_svd"]))
    assert_at_most(relative(estimate.loadings, published["hcl_gd"]), 1e-3, "relative error of the loadings")
    assert_at_most(
        worst_block(estimate.loadings, published["hcl_gd"], hierarchy), 1e-3, "worst relative error of a block's Gram matrix"
    )
    assert estimate.steps == 102  # its counter starts at 0


def test_recorded_errors_of_the_stored_loadings_agree(published):
    """Block Gram errors after the global Procrustes alignment that the released code uses, then the global Gram error."""
    hierarchy, truth = hierarchy_of(published), published["true_loadings"]
    named = {"".join(map(str, s)): s for s in hierarchy.structures}
    for name, recorded in zip(STORED, published["errors"], strict=True):
        estimate = published[name]
        aligned = estimate @ orthogonal_procrustes(estimate, truth)[0]
        blocks = []
        for m, s in BLOCKS:
            a, b = (F[hierarchy.rows(m), hierarchy.columns(named[s])] for F in (aligned, truth))
            blocks.append(np.linalg.norm(a @ a.T - b @ b.T))
        errors = errors_of(jnp.asarray(estimate), hierarchy, jnp.asarray(truth), hierarchy)
        found = np.array([*blocks, float(errors["gram_frobenius"])])
        assert_at_most(
            np.abs(found / recorded - 1).max(), 1e-3, f"{name}: largest relative difference from the 13 recorded errors"
        )
