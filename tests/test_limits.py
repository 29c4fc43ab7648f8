"""The limits against dense least squares, and methods where theory says that they agree or are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    PROPERTY,
    TWO,
    UNEVEN,
    assert_at_most,
    errors_of,
    fitted_by,
    normal_truth,
    population,
    problem,
    relative,
)
from hypothesis import given
from hypothesis import strategies as st

from hcl_jax import LIMITS, Hierarchy, SampleCovariance
from hcl_jax.fisher import group_sizes, spread
from hcl_jax.limits import efficient_error

efficient = jax.jit(efficient_error)
limit = {name: jax.jit(function) for name, function in LIMITS.items()}


def projected(truth, Z):
    """(VΛᵀ + ΛVᵀ, τ) of the tangent nearest to Z in the Fisher form, by dense least squares on Σ^(−½)DΣ^(−½)."""
    L, hierarchy = np.asarray(truth.loadings), truth.hierarchy
    values, vectors = np.linalg.eigh(np.asarray(truth.covariance()))
    root = (vectors / np.sqrt(values)) @ vectors.T
    tangents = []
    for i, k in zip(*np.nonzero(hierarchy.mask), strict=True):
        D = np.zeros((hierarchy.n_features,) * 2)
        D[i] += L[:, k]
        D[:, i] += L[:, k]
        tangents.append(D)
    n_loadings = len(tangents)
    groups = jnp.eye(len(group_sizes(hierarchy, truth.noise)))
    tangents += [np.diag(spread(group, hierarchy, truth.noise)) for group in groups]
    design = np.stack([(root @ D @ root).ravel() for D in tangents], axis=1)
    solution = np.linalg.lstsq(design, (root @ Z @ root).ravel(), rcond=1e-10)[0]
    return np.einsum("i,ijk->jk", solution[:n_loadings], tangents[:n_loadings]), solution[n_loadings:]


def with_unequal_noise(hierarchy, noise, n=300):
    """A truth with noise by view or by feature, and the covariance of a sample."""
    rng = np.random.default_rng(2)
    psi = spread(jnp.asarray(rng.uniform(0.2, 3, len(group_sizes(hierarchy, noise)))), hierarchy, noise)
    truth = normal_truth(rng, hierarchy, psi, noise)
    z, e = rng.standard_normal((n, hierarchy.n_factors)), rng.standard_normal((n, hierarchy.n_features))
    rows = z @ np.asarray(truth.loadings).T + np.sqrt(psi) * e
    return truth, SampleCovariance(jnp.asarray(np.cov(rows.T)), n=n)


CASES = {
    "TWO": lambda: problem(TWO, 0, noise=0.5, n=300),
    "UNEVEN": lambda: problem(UNEVEN, 1, noise=0.5, n=300),
    "view": lambda: with_unequal_noise(UNEVEN, "view"),
    "feature": lambda: with_unequal_noise(TWO, "feature"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_efficient_error_is_the_dense_projection(case):
    truth, S = CASES[case]()
    (V, tau), converged = efficient(truth, S)
    D, tau_dense = projected(truth, np.asarray(S.matrix - truth.covariance()))
    L = np.asarray(truth.loadings)
    assert converged
    assert_at_most(relative(V @ L.T + L @ V.T, D), 1e-6, "VΛᵀ + ΛVᵀ, against dense least squares")
    assert_at_most(relative(tau, tau_dense), 1e-6, "τ, against dense least squares")


def test_the_limit_of_the_gram_error_is_its_derivative():
    truth, S = problem(TWO, noise=0.5, n=300)
    limits = limit["cramer-rao"](truth, S)
    (V, _), _ = efficient(truth, S)
    L = np.asarray(truth.loadings)
    exact = np.linalg.norm(V @ L.T + L @ V.T)
    assert limits["status"] == 0
    assert_at_most(abs(float(limits["gram_frobenius"]) / exact - 1), 1e-3, "difference quotient over ‖VΛᵀ + ΛVᵀ‖_F, minus 1")
    errors = errors_of(truth.loadings, TWO, truth.loadings, TWO)
    assert set(limits) == set(errors) | {"status", "steps"}
    for name, value in errors.items():
        assert limits[name].shape == value.shape
        assert jnp.isfinite(limits[name]).all()


@given(scale=st.sampled_from([2.0, 1e-3]), seed=st.integers(0, 3))
@PROPERTY
def test_the_limit_is_linear_in_the_draw(scale, seed):
    """With a factor of 1e-3 the draw is one of n = 3·10⁸ samples."""
    truth, S = problem(TWO, seed, noise=0.5, n=300)
    Sigma = truth.covariance()
    stretched = SampleCovariance(Sigma + scale * (S.matrix - Sigma), n=300)
    (V, _), _ = efficient(truth, S)
    (W, _), _ = efficient(truth, stretched)
    assert_at_most(relative(W, scale * V), 1e-5, f"V of {scale} Z against {scale} V")


def test_maximum_likelihood_reaches_the_limit():
    """At n = 10⁶ the estimate is the truth plus the efficient error: the second-order remainder is of order n^(−1/2) of it."""
    truth, small = problem(TWO, noise=0.5, n=1000)
    Sigma = truth.covariance()
    S = SampleCovariance(Sigma + (small.matrix - Sigma) / np.sqrt(1000), n=1e6)
    F = fitted_by("hcl-ml")(S, TWO).loadings
    (V, _), _ = efficient(truth, S)
    L = truth.loadings
    assert_at_most(relative(F @ F.T - L @ L.T, V @ L.T + L @ V.T), 0.02, "error of hcl-ml against the efficient error")


@pytest.mark.parametrize("noise", ["view", "feature"])
def test_limits_with_unequal_noise_are_reached_by_maximum_likelihood_of_that_noise(noise):
    """At n = 10⁶, draw by draw, as with one noise variance."""
    truth, small = with_unequal_noise(TWO, noise, n=1000)
    Sigma = truth.covariance()
    S = SampleCovariance(Sigma + (small.matrix - Sigma) / np.sqrt(1000), n=1e6)
    limits, F = limit["cramer-rao"](truth, S), fitted_by("hcl-ml", noise=noise)(S, TWO).loadings
    assert limits["status"] == 0
    ratio = float(errors_of(F, TWO, truth.loadings, TWO)["gram_frobenius"] / limits["gram_frobenius"])
    assert_at_most(abs(ratio - 1), 0.05, f"{noise}: Gram error of hcl-ml over the limit, minus 1")


def test_detection_counts_eigenvalues_above_the_thresholds():
    truth, S = problem(TWO, noise=8.0, n=60)
    counts = limit["detection"](truth, S)
    G = np.asarray(truth.gram())
    threshold = 8.0 * np.sqrt(16 / 59)
    assert int(counts["visible_global"]) == (np.linalg.eigvalsh(G) > threshold).sum()
    expected = []
    for s in TWO.structures:
        block = np.asarray(truth.loadings)[:, TWO.columns(s)]
        dim = sum(TWO.dims[m - 1] for m in s)
        expected.append((np.linalg.eigvalsh(block.T @ block) > 8.0 * np.sqrt(dim / 59)).sum())
    assert counts["visible_structure"].tolist() == expected
    assert 0 <= int(counts["visible_global"]) < 5, "the example should leave something unseen"
    assert counts["visible_structure"].dtype == jnp.float64
    assert counts["status"] == 0


def test_everything_is_visible_without_noise():
    truth, S = problem(TWO, noise=0.0)
    assert limit["detection"](truth, S)["visible_global"] == 5


def test_without_partial_factors_the_model_is_jive():
    """Shared and private structures only: the shared part is the cross-covariance, exactly in the population."""
    hierarchy = Hierarchy.shared_and_private((9, 7), shared=2, private=1)
    truth, _ = problem(hierarchy, noise=0.4)
    F = np.asarray(fitted_by("hcl-gn")(population(truth), hierarchy).loadings)
    shared = F[:, hierarchy.columns((1, 2))]
    cross = shared[hierarchy.rows(1)] @ shared[hierarchy.rows(2)].T
    assert_at_most(relative(cross, truth.covariance()[hierarchy.rows(1), hierarchy.rows(2)]), 1e-7, "cross-covariance")


@pytest.mark.parametrize("name", ["hcl-svd", "hcl-gn", "naive-svd-denoised"])
def test_one_view_is_pca(name):
    """One modality and one structure: every least-squares method is the truncated eigendecomposition of S̃."""
    hierarchy = Hierarchy((10,), {(1,): 3})
    _, S = problem(hierarchy, noise=0.5)
    values, vectors = np.linalg.eigh(np.asarray(S.matrix))
    best = (vectors[:, -3:] * (values[-3:] - values[:-3].mean())) @ vectors[:, -3:].T
    F = np.asarray(fitted_by(name)(S, hierarchy).loadings)
    assert_at_most(relative(F @ F.T, best), 1e-8, f"{name} against PCA")


@pytest.mark.parametrize("name", ["hcl-svd", "hcl-gn", "hcl-gd", "hcl-shrunk"])
def test_without_noise_recovery_is_exact(name):
    truth, _ = problem(TWO, noise=0.0)
    F = fitted_by(name)(population(truth, 50), TWO).loadings
    assert_at_most(relative(F @ F.T, truth.gram()), 1e-6, f"{name}: relative Gram error without noise")


def test_limits_of_a_float32_truth():
    truth, S = problem(TWO, noise=0.5, n=300)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (truth, S))
    double, half = limit["cramer-rao"](truth, S), limit["cramer-rao"](*single)
    assert half["gram_frobenius"].dtype == jnp.float32
    assert_at_most(
        abs(float(half["gram_frobenius"]) / float(double["gram_frobenius"]) - 1), 0.02, "float32 over float64, minus 1"
    )
