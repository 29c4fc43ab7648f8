"""Products without the zeros of the hierarchy: equal to the dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CHAIN, TWO, UNEVEN, assert_at_most, masked_normal, relative

from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance, blocks
from hcl_jax.covariance import DenoisedCovariance, LowRankCovariance

BLIND = Hierarchy((4, 3, 5), {(1, 3): 2, (3,): 1})  # whose second modality sees nothing
SHAPES = [TWO, CHAIN, UNEVEN, BLIND]
CLOSE = 1e-13  # sums of at most 20 products, in another order


@pytest.fixture(params=SHAPES, ids=str)
def case(request):
    """(hierarchy, A, F, C, M): two masked loadings, a K × K and a d × 3 matrix."""
    hierarchy, rng = request.param, np.random.default_rng(0)
    A, F = (jnp.asarray(masked_normal(rng, hierarchy)) for _ in range(2))
    C, M = (jnp.asarray(rng.standard_normal(shape)) for shape in ((A.shape[1],) * 2, (A.shape[0], 3)))
    return hierarchy, A, F, C, M


def test_products_are_the_dense_ones(case):
    hierarchy, A, F, C, M = case
    assert_at_most(relative(blocks.gram(A, F, hierarchy), A.T @ F), CLOSE, "AᵀF")
    assert_at_most(relative(blocks.inner(A, M, hierarchy), A.T @ M), CLOSE, "AᵀM")
    assert_at_most(relative(blocks.mixed(F, C, hierarchy), F @ C), CLOSE, "F C")
    masked = blocks.masked_mixed(F, blocks.cores(C, hierarchy), hierarchy)
    assert_at_most(relative(masked, np.where(hierarchy.mask, F @ C, 0)), CLOSE, "(F C)∘mask")


def test_what_is_seen_goes_back_to_its_place(case):
    hierarchy, A, _, _, _ = case
    for m in hierarchy.modalities:
        block = blocks.block(A, hierarchy, m)
        assert block.shape == (hierarchy.dims[m - 1], len(hierarchy.active_columns(m)))
        np.testing.assert_array_equal(blocks.all_columns(block, hierarchy, m), A[hierarchy.rows(m)])


@pytest.mark.parametrize("form", ["matrix", "rows"])
def test_covariances_multiply_masked_loadings_as_any_others(case, form):
    hierarchy, A, F, _, _ = case
    x = np.random.default_rng(1).standard_normal((30, hierarchy.n_features))
    S = SampleCovariance.from_data([jnp.asarray(x[:, hierarchy.rows(m)]) for m in hierarchy.modalities], form=form)
    for covariance in (S, DenoisedCovariance(S, jnp.asarray(0.3)), LowRankCovariance(A)):
        product = covariance.masked_product(hierarchy)
        assert_at_most(relative(product(F), covariance.product(F)), CLOSE, f"{type(covariance).__name__} times F")
    first = S.masked_product(hierarchy)(F, (1,))
    assert_at_most(relative(first, S.product(F[hierarchy.rows(1)], hierarchy.rows(1))), CLOSE, "S[:, rows] F[rows]")


def test_no_zero_is_multiplied():
    """Ten modalities that share nothing: the products of S cost a tenth of the dense ones."""
    apart = Hierarchy((8,) * 10, {(m,): 2 for m in range(1, 11)})
    F, S = jnp.ones((80, 20)), SampleCovariance(jnp.eye(80), n=100)
    flops = {}
    for name, product in (("masked", lambda F: S.masked_product(apart)(F)), ("dense", lambda F: S.product(F))):
        flops[name] = jax.jit(product).lower(F).compile().cost_analysis()["flops"]
    assert_at_most(flops["masked"] / flops["dense"], 0.2, "operations, additions included")


@pytest.mark.parametrize("name", ["hcl-gn", "hcl-ml"])
def test_a_modality_may_see_nothing(name):
    x = np.random.default_rng(2).standard_normal((200, BLIND.n_features))
    x[:, BLIND.rows(1)] += x[:, :1]
    S = SampleCovariance.from_data([jnp.asarray(x[:, BLIND.rows(m)]) for m in BLIND.modalities])
    fit = jax.jit(ESTIMATORS[name], static_argnums=1)(S, BLIND)
    assert int(fit.status) == 0
    assert not np.asarray(fit.loadings)[BLIND.rows(2)].any()
