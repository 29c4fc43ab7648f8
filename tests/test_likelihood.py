"""The Fisher operator and the likelihood: against dense algebra, automatic differentiation and scikit-learn."""

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
    assert_close,
    assert_within,
    dense_deviance,
    fitted_by,
    masked_normal,
    problem,
    relative,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA, FactorAnalysis

from hcl_jax import Hierarchy, SampleCovariance
from hcl_jax.fisher import FisherOperator, by_feature, noise_groups
from hcl_jax.real_data import gaussian_log_likelihood

SEEDS = st.integers(0, 10_000)
CASES = st.sampled_from([(TWO, False), (TWO, True), (CHAIN, True)])


def point(hierarchy, per_modality, seed):
    """Loadings, noise variances and a covariance that is not the model's."""
    rng = np.random.default_rng(seed)
    groups = noise_groups(hierarchy, per_modality)
    noise = rng.uniform(0.3, 2.0, len(groups))
    X = rng.standard_normal((40, hierarchy.n_features))
    S = SampleCovariance(jnp.asarray(np.cov(X.T)), n=40)
    return rng, jnp.asarray(masked_normal(rng, hierarchy)), jnp.asarray(noise), groups, S


def dense_covariance(F, noise, groups):
    return np.asarray(F @ F.T) + np.diag(np.asarray(by_feature(noise, groups))[:, 0])


@given(case=CASES, seed=SEEDS)
@PROPERTY
def test_precision_is_the_dense_inverse(case, seed):
    _, F, noise, groups, _ = point(*case, seed)
    inverse = np.linalg.inv(dense_covariance(F, noise, groups))
    fisher = FisherOperator(F, noise, case[0], groups)
    assert_at_most(relative(fisher.image(), inverse @ F), 1e-12, "Σ⁻¹F")
    assert_at_most(relative(fisher.core, F.T @ inverse @ F), 1e-12, "FᵀΣ⁻¹F")


def expected_deviance(parameters, F, noise, hierarchy, groups, Sigma):
    """½[log det Σ(θ) + tr(Σ(θ)⁻¹Σ)] at θ = (F + V∘mask, ψ + τ): its Hessian at θ = 0 is the Fisher form ½ tr(Σ⁻¹DΣ⁻¹D')."""
    V, tau = parameters
    moved = F + jnp.where(hierarchy.mask, V, 0)
    return dense_deviance(moved, by_feature(noise + tau, groups)[:, 0], Sigma) / 2


@pytest.mark.parametrize(("hierarchy", "per_modality"), [(TWO, False), (TWO, True), (UNEVEN, True)], ids=str)
def test_the_fisher_operator_is_the_hessian_of_the_expected_deviance(hierarchy, per_modality):
    rng, F, noise, groups, _ = point(hierarchy, per_modality, 0)
    fisher = FisherOperator(F, noise, hierarchy, groups)
    zero = (jnp.zeros_like(F), jnp.zeros_like(noise))
    args = (F, noise, hierarchy, groups, jnp.asarray(dense_covariance(F, noise, groups)))

    @jax.jit
    def hessian_product(V, tau):
        return jax.jvp(lambda p: jax.grad(expected_deviance)(p, *args), (zero,), ((V, tau),))[1]

    for _ in range(5):
        V, tau = jnp.asarray(masked_normal(rng, hierarchy)), jnp.asarray(rng.standard_normal(len(groups)))
        ours, exact = fisher.product((V, tau)), hessian_product(V, tau)
        assert_at_most(relative(ours[0], exact[0]), 1e-11, "loadings part of H(V, τ)")
        assert_at_most(relative(ours[1], exact[1]), 1e-11, "noise part of H(V, τ)")


@given(case=CASES, seed=SEEDS)
@PROPERTY
def test_the_fisher_form_is_symmetric_and_its_preconditioner_positive(case, seed):
    rng, F, noise, groups, _ = point(*case, seed)
    fisher = FisherOperator(F, noise, case[0], groups)
    a, b = ((jnp.asarray(masked_normal(rng, case[0])), jnp.asarray(rng.standard_normal(len(groups)))) for _ in range(2))

    def form(p, q):
        return sum(float(jnp.sum(x * y)) for x, y in zip(p, q, strict=True))

    size = np.sqrt(form(a, fisher.product(a)) * form(b, fisher.product(b)))
    assert_at_most(abs(form(a, fisher.product(b)) - form(b, fisher.product(a))) / size, 1e-12, "asymmetry")
    size = np.sqrt(form(a, fisher.precondition(a)) * form(b, fisher.precondition(b)))
    assert_at_most(abs(form(a, fisher.precondition(b)) - form(b, fisher.precondition(a))) / size, 1e-12, "asymmetry of M")


def test_rotations_of_a_structure_carry_no_information():
    rng, F, noise, groups, _ = point(TWO, False, 1)
    columns = TWO.columns((1, 2))
    V = np.zeros(F.shape)
    V[:, columns] = np.asarray(F)[:, columns] @ np.array([[0.0, 1.0], [-1.0, 0.0]])
    along, traces = FisherOperator(F, noise, TWO, groups).product((jnp.asarray(V), jnp.zeros(1)))
    assert_at_most(float(jnp.linalg.norm(along)), 1e-13, "‖H(FA, 0)‖ for a skew A")
    assert_at_most(float(jnp.abs(traces).max()), 1e-13, "its noise part")


def test_solving_undoes_the_product():
    rng, F, noise, groups, _ = point(UNEVEN, True, 2)
    fisher = FisherOperator(F, noise, UNEVEN, groups)
    right = fisher.product((jnp.asarray(masked_normal(rng, UNEVEN)), jnp.asarray(rng.standard_normal(3))))
    solution = fisher.solve(right, 1e-10, 500)
    again = fisher.product(solution)
    assert_at_most(relative(again[0], right[0]), 1e-8, "H H⁻¹, loadings part")
    assert_at_most(relative(again[1], right[1]), 1e-8, "H H⁻¹, noise part")


@given(case=CASES, seed=SEEDS)
@PROPERTY
def test_gradients_are_those_of_the_dense_deviance(case, seed):
    hierarchy, _ = case
    _, F, noise, groups, S = point(*case, seed)
    fisher = FisherOperator(F, noise, hierarchy, groups)
    gradient = fisher.minus_half_gradient(S.product(fisher.image()), S.variances())
    along, by_noise = _dense_gradients(F, noise, hierarchy, groups, S.matrix)
    assert_at_most(relative(-2 * gradient[0], along), 1e-11, "∇ along loadings")
    assert_at_most(relative(-2 * gradient[1], by_noise), 1e-11, "∇ along noise")


def _dense_gradients(F, noise, hierarchy, groups, S):
    gradient = jax.grad(lambda F, psi: dense_deviance(F, by_feature(psi, groups)[:, 0], S), argnums=(0, 1))
    along, by_noise = gradient(F, noise)
    return np.where(hierarchy.mask, along, 0), by_noise


def test_the_gradient_matches_finite_differences():
    rng, F, noise, groups, S = point(TWO, True, 3)
    fisher = FisherOperator(F, noise, TWO, groups)
    gradient = -2 * np.asarray(fisher.minus_half_gradient(S.product(fisher.image()), S.variances())[0])
    V, h = masked_normal(rng, TWO), 1e-5
    psi = by_feature(noise, groups)[:, 0]
    ahead, behind = (float(dense_deviance(F + sign * h * V, psi, S.matrix)) for sign in (1, -1))
    assert_within((ahead - behind) / (2 * h), (gradient * V).sum(), 1e-6 * np.abs(gradient * V).sum(), "slope along a direction")


@pytest.mark.parametrize("per_modality", [False, True])
def test_the_maximum_is_stationary_and_its_objective_the_deviance(per_modality):
    _, S = problem(TWO, noise=0.5, n=300)
    estimate = fitted_by("hcl-ml", **({"noise_per_modality": True} if per_modality else {}))(S, TWO)
    groups, noise = noise_groups(TWO, per_modality), jnp.atleast_1d(estimate.noise_variance)
    assert estimate.status == 0
    assert noise.shape == (2 if per_modality else 1,)
    along, by_noise = _dense_gradients(estimate.loadings, noise, TWO, groups, S.matrix)
    scale = np.linalg.norm(np.linalg.solve(dense_covariance(estimate.loadings, noise, groups), np.asarray(estimate.loadings)))
    assert_at_most(
        np.linalg.norm(along) / scale, 1e-5, "gradient along the loadings, relative (the rule stops at 1e-6 of half of it)"
    )
    assert_at_most(np.abs(by_noise * noise).max() / 16, 1e-5, "gradient along log σ², per feature")
    deviance = dense_deviance(estimate.loadings, by_feature(noise, groups)[:, 0], S.matrix) + 16 * np.log(2 * np.pi)
    assert_close(estimate.objective, deviance, "−2 log-likelihood/ν")


def test_noise_variances_of_modalities_are_told_apart():
    truth, _ = problem(TWO, noise=1.0)
    noise = np.repeat([0.2, 1.5], TWO.dims)
    S = SampleCovariance(truth.gram() + jnp.diag(jnp.asarray(noise)), n=1e6)
    estimate = fitted_by("hcl-ml", noise_per_modality=True)(S, TWO)
    assert_at_most(relative(estimate.noise_variance, [0.2, 1.5]), 1e-5, "relative error of σ_m² in the population")
    assert_at_most(
        relative(estimate.loadings @ estimate.loadings.T, truth.gram()),
        1e-5,
        "relative Gram error (it stops at a relative gradient of 1e-6)",
    )


def test_the_likelihood_never_falls():
    for seed in range(6):
        _, S = problem(TWO, seed, noise=1.0, n=100)
        budgets = ({"max_steps": 1}, {"max_steps": 4}, {})
        deviances = [float(fitted_by("hcl-ml", **options)(S, TWO).objective) for options in budgets]
        assert_at_most(max(np.diff(deviances)) / 16, 1e-12, f"seed {seed}: largest rise of the deviance, per feature")
        assert deviances[1] < deviances[0]


@pytest.mark.parametrize("dims", [(12,), (5, 7)])
def test_one_structure_is_probabilistic_pca(dims):
    """One structure of all modalities and one noise variance: the maximum is known in closed form (Tipping and Bishop 1999)."""
    hierarchy = Hierarchy(dims, {tuple(range(1, len(dims) + 1)): 3})
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 3)) @ rng.standard_normal((3, 12)) + rng.standard_normal((200, 12))
    S = SampleCovariance.from_data([jnp.asarray(X)])
    estimate = fitted_by("hcl-ml")(S, hierarchy)
    F, noise = np.asarray(estimate.loadings), float(estimate.noise_variance)
    values, vectors = np.linalg.eigh(np.asarray(S.matrix))
    closed = (vectors[:, -3:] * (values[-3:] - values[:-3].mean())) @ vectors[:, -3:].T
    assert_at_most(abs(noise / values[:-3].mean() - 1), 1e-8, "relative error of σ²")
    assert_at_most(relative(F @ F.T, closed), 1e-6, "relative error of FFᵀ")
    pca = PCA(3).fit(X)
    assert_at_most(relative(F @ F.T + noise * np.eye(12), pca.get_covariance()), 1e-6, "against scikit-learn's PCA covariance")


def test_one_feature_a_modality_is_factor_analysis():
    """A noise variance per modality, and modalities of one feature each: the ordinary factor model with one factor."""
    hierarchy = Hierarchy((1,) * 6, {tuple(range(1, 7)): 1})
    rng = np.random.default_rng(1)
    X = rng.standard_normal((400, 1)) @ rng.uniform(0.5, 1.5, (1, 6)) + rng.standard_normal((400, 6)) * rng.uniform(0.5, 1.5, 6)
    X = X - X.mean(axis=0)
    S = SampleCovariance(jnp.asarray(X.T @ X / 400), n=400)  # scikit-learn divides by n
    estimate = fitted_by("hcl-ml", noise_per_modality=True)(S, hierarchy)
    reference = FactorAnalysis(1, tol=1e-12, max_iter=20_000).fit(X)
    ours = np.asarray(estimate.loadings @ estimate.loadings.T) + np.diag(estimate.noise_variance)
    assert_at_most(relative(ours, reference.get_covariance()), 1e-5, "against scikit-learn's FactorAnalysis covariance")


def test_the_log_likelihood_of_rows_is_scipys():
    rng, F, noise, _, _ = point(TWO, False, 4)
    rows = rng.standard_normal((7, 16))
    expected = multivariate_normal(cov=dense_covariance(F, noise, noise_groups(TWO, False))).logpdf(rows).mean()
    assert_close(gaussian_log_likelihood(jnp.asarray(rows), F, noise[0]), expected, "mean log density")
