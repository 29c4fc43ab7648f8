"""The contrastive losses: the linear one is the masked quadratic form, the others are their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROPERTY, TWO, UNEVEN, assert_at_most, assert_close, masked_normal, relative, structure_rotation
from hypothesis import given
from hypothesis import strategies as st

from hcl_jax import SampleCovariance
from hcl_jax.contrastive import (
    cosine,
    inner_product,
    linear_contrastive_loss,
    linear_loss,
    linear_representations,
    ridge_penalty,
    similarities,
    softmax_loss,
    structure_overlap,
)
from hcl_jax.covariance import LowRankCovariance
from hcl_jax.estimators.spectral import least_squares_objective

loss_of = jax.jit(linear_contrastive_loss, static_argnums=2)
HIERARCHY = st.sampled_from([TWO, UNEVEN])
SEEDS = st.integers(0, 10_000)


@given(
    hierarchy=HIERARCHY,
    n=st.sampled_from([2, 3, 12]),
    seed=SEEDS,
    shift=st.floats(-50, 50),
    scale=st.floats(0.01, 100),
    penalty=st.floats(0, 10),
)
@PROPERTY
def test_linear_loss_is_minus_half_the_trace_plus_the_penalty(hierarchy, n, seed, shift, scale, penalty):
    """Eq. (2) = −½ tr(FᵀSF) + (λ/4)‖FFᵀ‖_F² for any data, centred or not. Rounding is relative to the largest term of the sum."""
    rng = np.random.default_rng(seed)
    X = shift + scale * rng.standard_normal((n, hierarchy.n_features))
    F = masked_normal(rng, hierarchy)
    S = np.cov(X.T)
    expected = -np.trace(F.T @ S @ F) / 2 + penalty / 4 * np.linalg.norm(F @ F.T) ** 2
    size = np.linalg.norm(X @ F) ** 2 + penalty * np.linalg.norm(F @ F.T) ** 2
    loss = loss_of(jnp.asarray(X), jnp.asarray(F), hierarchy, jnp.asarray(penalty))
    assert_at_most(abs(float(loss) - expected) / size, 1e-14, "difference, relative to the terms")


@given(hierarchy=HIERARCHY, seed=SEEDS)
@PROPERTY
def test_linear_loss_is_the_distance_to_the_covariance_up_to_a_constant(hierarchy, seed):
    """Proposition 1 with λ = 1: L(F) − L(F') = ½(f(F) − f(F')), f(F) = ½‖FFᵀ − S‖_F², the objective of the estimators."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((12, hierarchy.n_features))
    S = SampleCovariance(jnp.asarray(np.cov(X.T)), n=12)
    pair = [jnp.asarray(masked_normal(rng, hierarchy)) for _ in range(2)]
    losses = [float(loss_of(jnp.asarray(X), F, hierarchy, jnp.asarray(1.0))) for F in pair]
    distances = [np.linalg.norm(np.asarray(F @ F.T - S.matrix)) ** 2 / 4 for F in pair]
    difference = (losses[0] - losses[1]) - (distances[0] - distances[1])
    assert_at_most(abs(difference) / max(distances), 1e-13, "difference of differences, relative")


def test_the_estimators_objective_is_the_distance():
    rng = np.random.default_rng(0)
    F, L = (jnp.asarray(masked_normal(rng, TWO)) for _ in range(2))
    dense = np.linalg.norm(np.asarray(F @ F.T - L @ L.T)) ** 2 / 2
    assert_close(least_squares_objective(F, LowRankCovariance(L)), dense, "½‖FFᵀ − LLᵀ‖²")


def test_loadings_outside_the_pattern_do_not_count():
    rng = np.random.default_rng(1)
    X, F = jnp.asarray(rng.standard_normal((8, 16))), rng.standard_normal((16, 5))
    masked = loss_of(X, jnp.asarray(np.where(TWO.mask, F, 0)), TWO)
    assert_close(loss_of(X, jnp.asarray(F), TWO), masked, "loss of unmasked loadings")


def test_rotating_a_structure_does_not_change_the_loss():
    rng = np.random.default_rng(2)
    X, F = jnp.asarray(rng.standard_normal((8, 19))), masked_normal(rng, UNEVEN)
    rotated = F @ structure_rotation(rng, UNEVEN)
    assert_close(loss_of(X, jnp.asarray(rotated), UNEVEN), loss_of(X, jnp.asarray(F), UNEVEN), "loss of rotated loadings")


def naive_similarities(H, hierarchy, similarity, weights):
    n = H.shape[1]
    phi = np.zeros((n, n))
    for w, s in zip(weights, hierarchy.structures, strict=True):
        for i in range(n):
            for j in range(n):
                columns = hierarchy.columns(s)
                phi[i, j] += w * sum(similarity(H[a - 1, i, columns], H[b - 1, j, columns]) for a in s for b in s)
    return phi


SIMILARITIES = {
    "inner_product": (inner_product, np.dot),
    "cosine": (cosine, lambda a, b: a @ b / (np.linalg.norm(a) * np.linalg.norm(b))),
    "gaussian": (
        lambda a, b: jnp.exp(-jnp.sum((a[:, None, :] - b[None, :, :]) ** 2, axis=2)),
        lambda a, b: np.exp(-np.sum((a - b) ** 2)),
    ),
}


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarities_are_double_sums(name):
    traced, plain = SIMILARITIES[name]
    rng = np.random.default_rng(3)
    X, F = rng.standard_normal((4, 19)), masked_normal(rng, UNEVEN)
    H = linear_representations(jnp.asarray(X), jnp.asarray(F), UNEVEN)
    weights = np.array([1.0, 0.5, 2.0, 0.1])
    phi = similarities(H, UNEVEN, traced, jnp.asarray(weights))
    assert_close(phi, naive_similarities(np.asarray(H), UNEVEN, plain, weights), name)
    assert_close(similarities(H, UNEVEN, traced), naive_similarities(np.asarray(H), UNEVEN, plain, np.ones(4)), "weights of 1")


def test_cosine_of_a_zero_representation_is_zero_and_differentiable():
    a = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    assert_close(cosine(a, a), np.array([[0.0, 0.0], [0.0, 1.0]]), "cosines")
    assert jnp.isfinite(jax.grad(lambda a: cosine(a, a).sum())(a)).all()


def test_losses_are_their_definitions():
    rng = np.random.default_rng(4)
    phi = rng.standard_normal((6, 6))
    phi = phi + phi.T
    off = phi.sum() - np.trace(phi)
    assert_close(linear_loss(jnp.asarray(phi)), -np.trace(phi) / 12 + off / 60, "linear")
    scaled = np.exp(phi / 0.5)
    expected = -np.mean(np.log(np.diagonal(scaled) / scaled.sum(axis=1)))
    assert_close(softmax_loss(jnp.asarray(phi), 0.5), expected, "softmax")


def test_softmax_loss_does_not_overflow():
    phi = jnp.eye(4) * 1e5
    assert float(softmax_loss(phi, 0.01)) == 0.0
    assert_close(softmax_loss(jnp.zeros((4, 4)), 1.0), np.log(4), "without any signal")


def test_penalties():
    rng = np.random.default_rng(5)
    F = masked_normal(rng, TWO)
    assert_close(ridge_penalty(jnp.asarray(F), 2.0), np.linalg.norm(F @ F.T) ** 2 / 2, "(λ/4)‖FFᵀ‖²")
    H = rng.standard_normal((2, 30, 5)) * TWO.modality_mask[:, None, :]
    expected = 0.0
    for m, (own, both) in enumerate([(TWO.columns((1,)), TWO.columns((1, 2))), (TWO.columns((2,)), TWO.columns((1, 2)))]):
        C = np.cov(H[m].T, bias=True)
        expected += np.sum(C[own, both] ** 2) / 2
    assert_close(structure_overlap(jnp.asarray(H), TWO), expected, "Σ_{s<t} ‖Cov‖², mean over modalities")


def test_gradient_of_the_linear_loss_is_the_half_gradient_of_the_objective():
    rng = np.random.default_rng(6)
    X, F = rng.standard_normal((9, 16)), masked_normal(rng, TWO)
    gradient = jax.grad(linear_contrastive_loss, argnums=1)(jnp.asarray(X), jnp.asarray(F), TWO)
    expected = np.where(TWO.mask, F @ F.T @ F - np.cov(X.T) @ F, 0)
    assert_at_most(relative(gradient, expected), 1e-13, "∇L against [F(FᵀF) − SF]∘mask")


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="phi: has 1 samples; expected at least 2"):
        linear_loss(jnp.ones((1, 1)))
