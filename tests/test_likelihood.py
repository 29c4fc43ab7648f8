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
    population,
    problem,
    relative,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA, FactorAnalysis

from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance, Truth
from hcl_jax.fisher import NOISE, FisherOperator, group_sizes, pool, spread
from hcl_jax.real_data import gaussian_log_likelihood
from hcl_jax.structure import CONVERGED, ON_BOUND

SEEDS = st.integers(0, 10_000)
operator_at = jax.jit(FisherOperator, static_argnums=(2, 3))  # one program per hierarchy and kind of noise
CASES = st.sampled_from([(TWO, "shared"), (TWO, "view"), (TWO, "feature"), (CHAIN, "view"), (CHAIN, "feature")])


def point(hierarchy, noise, seed):
    """Loadings, noise variances by group and by feature, and a covariance that is not the model's."""
    rng = np.random.default_rng(seed)
    groups = jnp.asarray(rng.uniform(0.3, 2.0, len(group_sizes(hierarchy, noise))))
    X = rng.standard_normal((40, hierarchy.n_features))
    S = SampleCovariance(jnp.asarray(np.cov(X.T)), n=40)
    return rng, jnp.asarray(masked_normal(rng, hierarchy)), groups, spread(groups, hierarchy, noise), S


def change(rng, hierarchy, noise):
    """Some (V, τ)."""
    tau = rng.standard_normal(len(group_sizes(hierarchy, noise)))
    return jnp.asarray(masked_normal(rng, hierarchy)), jnp.asarray(tau)


def dense_covariance(F, psi):
    return np.asarray(F @ F.T) + np.diag(np.asarray(psi))


@pytest.mark.parametrize("noise", NOISE)
def test_groups_of_features_are_those_that_share_noise(noise):
    values = np.arange(1.0, len(group_sizes(TWO, noise)) + 1)
    expected = {"shared": [1] * 16, "view": [1] * 9 + [2] * 7, "feature": range(1, 17)}[noise]
    by_feature = spread(jnp.asarray(values), TWO, noise)
    assert by_feature.tolist() == list(expected)
    assert (pool(by_feature, TWO, noise) == values * group_sizes(TWO, noise)).all()


@given(case=CASES, seed=SEEDS)
@PROPERTY
def test_precision_is_the_dense_inverse(case, seed):
    _, F, _, psi, _ = point(*case, seed)
    inverse = np.linalg.inv(dense_covariance(F, psi))
    fisher = operator_at(F, psi, *case)
    assert_at_most(relative(fisher.image(), inverse @ F), 1e-12, "Σ⁻¹F")
    assert_at_most(relative(fisher.core, F.T @ inverse @ F), 1e-12, "FᵀΣ⁻¹F")


def test_one_noise_variance_is_a_vector_of_equal_ones():
    rng, F, _, _, _ = point(TWO, "shared", 5)
    one, many = FisherOperator(F, jnp.asarray(0.7), TWO), FisherOperator(F, jnp.full(16, 0.7), TWO)
    V, tau = change(rng, TWO, "shared")
    for a, b in zip(one.product((V, tau)), many.product((V, tau)), strict=True):
        assert_close(a, b, "H(V, τ)")


def expected_deviance(parameters, F, psi, hierarchy, noise, Sigma):
    """½[log det Σ(θ) + tr(Σ(θ)⁻¹Σ)] at θ = (F + V∘mask, ψ + τ): its Hessian at θ = 0 is the Fisher form ½ tr(Σ⁻¹DΣ⁻¹D')."""
    V, tau = parameters
    return dense_deviance(F + jnp.where(hierarchy.mask, V, 0), psi + spread(tau, hierarchy, noise), Sigma) / 2


@pytest.mark.parametrize(("hierarchy", "noise"), [(TWO, "shared"), (UNEVEN, "view"), (TWO, "feature")], ids=str)
def test_the_fisher_operator_is_the_hessian_of_the_expected_deviance(hierarchy, noise):
    rng, F, groups, psi, _ = point(hierarchy, noise, 0)
    fisher = operator_at(F, psi, hierarchy, noise)
    zero = (jnp.zeros_like(F), jnp.zeros_like(groups))
    args = (F, psi, hierarchy, noise, jnp.asarray(dense_covariance(F, psi)))

    @jax.jit
    def hessian_product(V, tau):
        return jax.jvp(lambda p: jax.grad(expected_deviance)(p, *args), (zero,), ((V, tau),))[1]

    for _ in range(5):
        V, tau = change(rng, hierarchy, noise)
        ours, exact = fisher.product((V, tau)), hessian_product(V, tau)
        assert_at_most(relative(ours[0], exact[0]), 1e-11, "loadings part of H(V, τ)")
        assert_at_most(relative(ours[1], exact[1]), 1e-11, "noise part of H(V, τ)")


@pytest.mark.parametrize("noise", NOISE)
def test_the_diagonal_for_the_noise_is_that_of_the_operator(noise):
    """H(0, e_p)_p = ½‖(Σ⁻¹)_pp‖²_F, of which the preconditioner takes the inverse."""
    _, F, groups, psi, _ = point(TWO, noise, 6)
    fisher, none = operator_at(F, psi, TWO, noise), jnp.zeros_like(F)
    diagonal = np.array([fisher.product((none, unit))[1][p] for p, unit in enumerate(jnp.eye(len(groups)))])
    assert_at_most(relative(1 / fisher.precondition((none, jnp.ones_like(groups)))[1], diagonal), 1e-11, "diagonal along ψ")


@given(case=CASES, seed=SEEDS)
@PROPERTY
def test_the_fisher_form_is_symmetric_and_its_preconditioner_positive(case, seed):
    rng, F, _, psi, _ = point(*case, seed)
    fisher = operator_at(F, psi, *case)
    a, b = change(rng, *case), change(rng, *case)

    def form(p, q):
        return sum(float(jnp.sum(x * y)) for x, y in zip(p, q, strict=True))

    size = np.sqrt(form(a, fisher.product(a)) * form(b, fisher.product(b)))
    assert_at_most(abs(form(a, fisher.product(b)) - form(b, fisher.product(a))) / size, 1e-12, "asymmetry")
    size = np.sqrt(form(a, fisher.precondition(a)) * form(b, fisher.precondition(b)))
    assert_at_most(abs(form(a, fisher.precondition(b)) - form(b, fisher.precondition(a))) / size, 1e-12, "asymmetry of M")


def test_rotations_of_a_structure_carry_no_information():
    _, F, _, psi, _ = point(TWO, "feature", 1)
    columns = TWO.columns((1, 2))
    V = np.zeros(F.shape)
    V[:, columns] = np.asarray(F)[:, columns] @ np.array([[0.0, 1.0], [-1.0, 0.0]])
    along, traces = operator_at(F, psi, TWO, "feature").product((jnp.asarray(V), jnp.zeros(16)))
    assert_at_most(float(jnp.linalg.norm(along)), 1e-12, "‖H(FA, 0)‖ for a skew A")
    assert_at_most(float(jnp.abs(traces).max()), 1e-12, "its noise part")


@pytest.mark.parametrize(("hierarchy", "noise"), [(UNEVEN, "view"), (TWO, "feature")], ids=str)
def test_solving_undoes_the_product(hierarchy, noise):
    rng, F, _, psi, _ = point(hierarchy, noise, 2)
    fisher = operator_at(F, psi, hierarchy, noise)
    right = fisher.product(change(rng, hierarchy, noise))
    again = fisher.product(fisher.solve(right, 1e-10, 500))
    assert_at_most(relative(again[0], right[0]), 1e-8, "H H⁻¹, loadings part")
    assert_at_most(relative(again[1], right[1]), 1e-8, "H H⁻¹, noise part")


@given(case=CASES, seed=SEEDS)
@PROPERTY
def test_gradients_are_those_of_the_dense_deviance(case, seed):
    _, F, _, psi, S = point(*case, seed)
    fisher = operator_at(F, psi, *case)
    gradient = fisher.minus_half_gradient(S.product(fisher.image()), S.variances())
    along, by_noise = _dense_gradients(F, psi, *case, S.matrix)
    assert_at_most(relative(-2 * gradient[0], along), 1e-11, "∇ along loadings")
    assert_at_most(relative(-2 * gradient[1], by_noise), 1e-11, "∇ along noise")


_deviance_gradients = jax.jit(jax.grad(dense_deviance, argnums=(0, 1)))


def _dense_gradients(F, psi, hierarchy, noise, S):
    """The gradient along masked loadings, and along the noise variances of the groups."""
    along, by_feature = _deviance_gradients(F, psi, S)
    return np.where(hierarchy.mask, along, 0), np.asarray(pool(by_feature, hierarchy, noise))


def test_the_gradient_matches_finite_differences():
    rng, F, _, psi, S = point(TWO, "view", 3)
    fisher = operator_at(F, psi, TWO, "view")
    gradient = -2 * np.asarray(fisher.minus_half_gradient(S.product(fisher.image()), S.variances())[0])
    V, h = masked_normal(rng, TWO), 1e-5
    ahead, behind = (float(dense_deviance(F + sign * h * V, psi, S.matrix)) for sign in (1, -1))
    assert_within((ahead - behind) / (2 * h), (gradient * V).sum(), 1e-6 * np.abs(gradient * V).sum(), "slope along a direction")


@pytest.mark.parametrize(("noise", "bound"), [("shared", 1e-5), ("view", 1e-5), ("feature", 1e-3)])
def test_the_maximum_is_stationary_and_its_objective_the_deviance(noise, bound):
    """(The rule stops at 1e-6 of half of the relative gradient; by feature at a gain of 1e-10, so at about the root of it.)"""
    _, S = problem(TWO, noise=0.5, n=300)
    estimate = fitted_by("hcl-ml", noise=noise)(S, TWO)
    assert estimate.status == 0
    assert estimate.noise_variance.shape == (() if noise == "shared" else (16,))
    psi = jnp.broadcast_to(estimate.noise_variance, (16,))
    along, by_noise = _dense_gradients(estimate.loadings, psi, TWO, noise, S.matrix)
    scale = np.linalg.norm(np.linalg.solve(dense_covariance(estimate.loadings, psi), np.asarray(estimate.loadings)))
    assert_at_most(np.linalg.norm(along) / scale, bound, f"{noise}: gradient along the loadings, relative")
    by_log = by_noise * np.asarray(pool(psi, TWO, noise)) / group_sizes(TWO, noise)
    assert_at_most(np.abs(by_log).max() / 16, bound, f"{noise}: gradient along log σ², per feature")
    deviance = dense_deviance(estimate.loadings, psi, S.matrix) + 16 * np.log(2 * np.pi)
    assert_close(estimate.objective, deviance, "−2 log-likelihood/ν")


TOLD_APART = {
    "view": (np.repeat([0.2, 1.5], TWO.dims), 1e-5),  # it stops at a relative gradient of 1e-6
    "feature": (np.linspace(0.2, 1.5, 16), 1e-3),  # it stops at a gain of 1e-10
}


@pytest.mark.parametrize("noise", TOLD_APART)
def test_noise_variances_are_told_apart(noise):
    psi, bound = TOLD_APART[noise]
    loadings = problem(TWO, noise=1.0)[0].loadings
    truth = Truth(loadings, jnp.asarray(psi), TWO, noise=noise)
    estimate = fitted_by("hcl-ml", noise=noise)(population(truth, 1e6), TWO)
    assert_at_most(relative(estimate.noise_variance, psi), bound, f"{noise}: relative error of ψ in the population")
    found = estimate.loadings @ estimate.loadings.T
    assert_at_most(relative(found, truth.gram()), bound, f"{noise}: relative Gram error in the population")


@pytest.mark.parametrize("noise", ["view", "feature"])
def test_a_noise_variance_that_vanishes_ends_on_its_floor(noise):
    """A Heywood case: view 1, or feature 4 alone, is a combination of the factors without noise."""
    psi = np.r_[np.zeros(9), np.ones(7)] if noise == "view" else np.where(np.arange(16) == 4, 0.0, 0.5)
    loadings = problem(TWO, noise=1.0)[0].loadings
    covariance = population(Truth(loadings, jnp.asarray(psi), TWO, noise=noise), 500)
    for name in ("hcl-ml", "hcl-vb"):
        estimate = fitted_by(name, noise=noise)(covariance, TWO)
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(estimate)), f"{name}: something is not finite"
        if (name, noise) == ("hcl-vb", "feature"):  # ψ_j counts the uncertainty of the feature's own loadings, which is not 0
            assert estimate.status == CONVERGED
            continue
        assert estimate.status == ON_BOUND, f"{name}: status {int(estimate.status)} after {int(estimate.steps)} steps"
        least = float(estimate.noise_variance.min() / covariance.variances()[4])
        assert_at_most(least, 0.02, f"{name}: the least noise variance, over the variance of its feature")
        assert least > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda S, L, psi: ESTIMATORS["hcl-ml"](S, TWO, noise="modality"), "noise: is 'modality'; expected one of shared, view"),
        (lambda S, L, psi: ESTIMATORS["hcl-vb"](S, TWO, noise="modality"), "noise: is 'modality'; expected one of shared, view"),
        (lambda S, L, psi: Truth(L, psi, TWO, noise="modality"), "noise: is 'modality'; expected one of shared, view"),
        (lambda S, L, psi: Truth(L, psi[:2], TWO, noise="view"), r"noise_variance: has shape \(2,\); expected one number, or"),
        (lambda S, L, psi: Truth(L, psi, TWO), r"noise: is 'shared' for noise variances of shape \(16,\)"),
        (lambda S, L, psi: FisherOperator(L, psi[:2], TWO, "view"), r"noise_variance: has shape \(2,\); expected one number, or"),
    ],
)
def test_kinds_of_noise_that_do_not_fit_are_refused(call, message):
    truth, S = problem(TWO)
    with pytest.raises(ValueError, match=message) as refusal:
        call(S, truth.loadings, jnp.ones(16))
    assert "\n" not in str(refusal.value)


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


@pytest.mark.parametrize(("dims", "rank"), [((6,), 1), ((5, 7), 3)])
def test_one_structure_with_noise_by_feature_is_factor_analysis(dims, rank):
    """One structure of all modalities, a noise variance for every feature: the ordinary factor model."""
    d = sum(dims)
    hierarchy = Hierarchy(dims, {tuple(range(1, len(dims) + 1)): rank})
    rng = np.random.default_rng(1)
    X = rng.standard_normal((400, rank)) @ rng.standard_normal((rank, d))
    X = X + rng.standard_normal((400, d)) * rng.uniform(0.7, 1.5, d)
    X = X - X.mean(axis=0)
    S = SampleCovariance(jnp.asarray(X.T @ X / 400), n=400)  # scikit-learn divides by n
    estimate = fitted_by("hcl-ml", noise="feature")(S, hierarchy)
    reference = FactorAnalysis(rank, tol=1e-12, max_iter=20_000, svd_method="lapack").fit(X)
    assert estimate.status == 0
    ours = np.asarray(estimate.loadings @ estimate.loadings.T) + np.diag(estimate.noise_variance)
    assert_at_most(relative(ours, reference.get_covariance()), 1e-4, "against scikit-learn's FactorAnalysis covariance")


def test_the_log_likelihood_of_rows_is_scipys():
    rng, F, groups, psi, _ = point(TWO, "shared", 4)
    rows = rng.standard_normal((7, 16))
    expected = multivariate_normal(cov=dense_covariance(F, psi)).logpdf(rows).mean()
    assert_close(gaussian_log_likelihood(jnp.asarray(rows), F, groups[0]), expected, "mean log density")
