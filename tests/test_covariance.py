"""The covariance operator in its two forms against dense algebra; the noise variance; shrinkage of eigenvalues."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import (
    CHAIN,
    PROPERTY,
    TWO,
    assert_at_most,
    assert_close,
    assert_within,
    masked_normal,
    population,
    problem,
    relative,
)
from hypothesis import given
from hypothesis import strategies as st

from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance, sample_factored_covariance
from hcl_jax.covariance import (
    DenoisedCovariance,
    LowRankCovariance,
    corrected_noise_variance,
    denoised_factor,
    noise_variance,
    shrunk_factor,
    spiked_signal,
)
from hcl_jax.linalg import top_eigenpairs_of
from hcl_jax.views import as_views

PAPER = Hierarchy.full((100, 100, 100), 5)


def rows_and_matrix(rows=6, features=11, seed=0):
    X = np.random.default_rng(seed).standard_normal((rows, features))
    S = X.T @ X / rows
    return SampleCovariance(data=jnp.asarray(X), n=rows + 1), SampleCovariance(jnp.asarray(S), n=rows + 1), S


@pytest.mark.parametrize("rows", [6, 20])
def test_rows_and_matrix_are_one_operator(rows):
    held_as_rows, held_as_matrix, S = rows_and_matrix(rows)
    V = jnp.asarray(np.random.default_rng(1).standard_normal((11, 3)))
    some, few = slice(2, 7), slice(8, 11)
    for form in (held_as_rows, held_as_matrix):
        assert form.n_features == 11
        assert float(form.nu) == rows
        assert_close(form.product(V), S @ V, "S V")
        assert_close(form.product(V[some], some), S[:, some] @ V[some], "S[:, rows] V")
        assert_close(form.block(some, few), S[some, few], "block")
        assert_close(form.variances(), np.diagonal(S), "variances")
        assert_close(form.trace(), np.trace(S), "trace")
        assert_close(form.squared_norm(), np.sum(S**2), "squared norm")


@pytest.mark.parametrize(("rows", "k"), [(6, 3), (6, 8), (20, 8)])
def test_top_eigenpairs_in_both_forms(rows, k):
    held_as_rows, held_as_matrix, S = rows_and_matrix(rows)
    expected = np.linalg.eigvalsh(S)[::-1][:k]
    expected[min(rows, k) :] = 0
    for form in (held_as_rows, held_as_matrix):
        values, vectors = form.top_eigenpairs(k)
        assert_at_most(np.abs(np.asarray(values) - expected).max(), 1e-13, f"largest error of {k} eigenvalues")
        assert_at_most(relative(S @ vectors, vectors * values[None, :]), 1e-13, "S v = λ v")
    visible = min(rows, k)
    grams = [form.top_eigenpairs(k)[1].T @ form.top_eigenpairs(k)[1] for form in (held_as_rows, held_as_matrix)]
    for gram in grams:
        assert_at_most(relative(gram[:visible, :visible], np.eye(visible)), 1e-12, "orthonormality of visible vectors")


def test_eigenvalues_are_ordered_by_size_not_magnitude():
    values, vectors = top_eigenpairs_of(jnp.diag(jnp.array([1.0, -5.0, 3.0])), 2)
    assert values.tolist() == [3.0, 1.0]
    np.testing.assert_array_equal(np.abs(vectors), [[0, 1], [0, 0], [1, 0]])


@pytest.mark.parametrize("n", [10, 40])
def test_covariance_of_data(n):
    rng = np.random.default_rng(2)
    views = [jnp.asarray(rng.standard_normal((n, dim)) + 3) for dim in (9, 7)]
    S = SampleCovariance.from_data(views)
    assert (S.data is not None) == (n <= 16), "rows are held where there are fewer of them than features"
    expected = np.cov(np.concatenate(views, axis=1).T)
    assert_close(S.block(slice(None), slice(None)), expected, "against numpy.cov")
    assert float(S.n) == n


@pytest.mark.parametrize("form", ["matrix", "rows"])
def test_covariance_of_data_far_from_zero(form):
    """In single precision with means up to 1e8 standard deviations, against float64 on the same numbers; compiled too."""
    rng = np.random.default_rng(3)
    means = np.array([0, 1e4, 1e6, 3e7, 1e8 + 4], np.float32)
    views = [(rng.standard_normal((3, 200, 5)) + means).astype(np.float32), rng.standard_normal((3, 200, 2)).astype(np.float32)]
    views[0][:, 0] = 1e6  # an outlying first row

    def covariance(views):
        return SampleCovariance.from_data(views, form=form).block(slice(None), slice(None))

    mapped = jax.jit(jax.vmap(covariance))(views)
    for i, one in enumerate(mapped):
        expected = np.cov(np.concatenate([view[i] for view in views], axis=1).T.astype(float))
        scale = np.sqrt(np.diagonal(expected))
        for found in (one, covariance([view[i] for view in views])):
            assert_at_most(
                np.abs((np.asarray(found, float) - expected) / scale / scale[:, None]).max(),
                2e-5,
                "error in units of the variances",
            )


@pytest.mark.parametrize("mean", [1e6, 3e7, 1e8])
def test_double_data_are_centred_before_they_become_single(mean):
    """As JAX is when nobody sets its precision: float64 of NumPy in, float32 out."""
    views = [np.random.default_rng(3).standard_normal((200, 3)) + mean]
    with jax.enable_x64(False):
        found = np.asarray(SampleCovariance.from_data(views).matrix)
        assert found.dtype == np.float32
        with pytest.raises(ValueError, match=r"views: view 1: column 0 has mean .*which float32 does not hold"):
            as_views([view / 10 + 10 * mean for view in views]).stacked()
    assert_at_most(np.abs(found - np.cov(views[0].T)).max(), 1e-5, "error of the covariance")


@given(n_factors=st.sampled_from([1, 3, 8]), rows=st.sampled_from([6, 20]), seed=st.integers(0, 99))
@PROPERTY
def test_noise_variance_is_the_mean_of_the_smallest_eigenvalues(n_factors, rows, seed):
    held_as_rows, held_as_matrix, S = rows_and_matrix(rows, seed=seed)
    expected = np.linalg.eigvalsh(S)[: 11 - n_factors].mean()
    for form in (held_as_rows, held_as_matrix):
        noise = noise_variance(form, form.top_eigenpairs(n_factors)[0])
        assert_at_most(abs(float(noise) - expected), 1e-13, f"error of σ̂² at K = {n_factors}")


def test_denoised_factor_is_the_best_low_rank_approximation():
    _, form, S = rows_and_matrix(20)
    L, noise = denoised_factor(form, 4)
    values, vectors = np.linalg.eigh(S - float(noise) * np.eye(11))
    best = (vectors[:, -4:] * np.maximum(values[-4:], 0)) @ vectors[:, -4:].T
    assert_close(L @ L.T, best, "L Lᵀ")
    assert_close(noise, values[:-4].mean() + float(noise), "σ̂²")


def test_denoised_factor_clips_at_zero():
    S = SampleCovariance(jnp.eye(6), n=10)
    L, noise = denoised_factor(S, 2)
    assert_at_most(float(jnp.abs(L).max()), 1e-7, "a factor of pure noise")
    assert_close(noise, 1.0, "σ̂²")


def test_targets_are_operators():
    _, form, S = rows_and_matrix(20)
    V = jnp.asarray(np.random.default_rng(3).standard_normal((11, 2)))
    dense = S - 0.4 * np.eye(11)
    target = DenoisedCovariance(form, jnp.asarray(0.4))
    assert_close(target.product(V), dense @ V, "S̃ V")
    assert_close(target.squared_norm(), np.sum(dense**2), "‖S̃‖²")
    L = jnp.asarray(np.random.default_rng(4).standard_normal((11, 3)))
    assert_close(LowRankCovariance(L).product(V), L @ L.T @ V, "L Lᵀ V")
    assert_close(LowRankCovariance(L).squared_norm(), jnp.sum((L @ L.T) ** 2), "‖L Lᵀ‖²")


@given(excess=st.floats(0.05, 50), gamma=st.floats(0.001, 2), noise=st.floats(0.01, 100))
@PROPERTY
def test_spiked_signal_inverts_the_bias_of_eigenvalues(excess, gamma, noise):
    """A spike ℓ > 1 + √γ shows at x = ℓ(1 + γ/(ℓ − 1)) with cosine c² (Donoho, Gavish and Johnstone 2018)."""
    spike = np.sqrt(gamma) * (1 + excess)  # ℓ − 1
    x = (1 + spike) * (1 + gamma / spike)
    signal, cosine_sq = spiked_signal(jnp.array([noise * x]), jnp.asarray(noise), jnp.asarray(gamma))
    cosine = (1 - gamma / spike**2) / (1 + gamma / spike)
    assert_at_most(abs(float(signal[0]) / (noise * spike) - 1), 1e-6, "relative error of σ²(ℓ − 1)")  # a root near the edge
    assert_at_most(abs(float(cosine_sq[0]) - cosine), 1e-6, "error of c²")


def test_spiked_signal_below_the_edge_and_without_noise():
    gamma = jnp.asarray(0.25)
    signal, cosine_sq = spiked_signal(jnp.array([9.0, 2.0]), jnp.asarray(1.0), gamma)
    assert cosine_sq[1] == 0
    assert signal[1] == 0.5
    assert cosine_sq[0] > 0.9
    signal, cosine_sq = spiked_signal(jnp.array([9.0, 2.0]), jnp.asarray(0.0), gamma)
    assert signal.tolist() == [9.0, 2.0]
    assert cosine_sq.tolist() == [1.0, 1.0]


def test_corrected_noise_variance_removes_most_of_the_bias():
    """d = 300, K = 35, ν = 4,999: one σ̂² has a standard error of 0.012, so that of five draws is 0.0055."""
    pairs = []
    for seed in range(5):
        _, S = problem(PAPER, seed, noise=10.0, n=5000)
        values, _ = S.top_eigenpairs(35)
        pairs.append((float(noise_variance(S, values)), float(corrected_noise_variance(S, values))))
    plain, corrected = np.mean(pairs, axis=0)
    assert_at_most(plain, 9.7, "mean σ̂², biased downwards, for 10")
    assert_within(corrected, 10, 0.08, "mean corrected σ²")
    assert_at_most(abs(corrected - 10) / abs(plain - 10), 0.2, "bias left, as a share")


def test_shrinkage_brings_weak_signals_nearer():
    truth, S = problem(PAPER, 0, noise=10.0, n=5000)
    G = np.asarray(truth.gram())
    errors = {}
    for name, factor in (("denoised", denoised_factor), ("shrunk", shrunk_factor)):
        L, _ = factor(S, 35)
        errors[name] = relative(L @ L.T, G)
    assert_at_most(errors["shrunk"], 1.0, "relative Gram error of the shrunk factor")
    assert_at_most(errors["shrunk"] / errors["denoised"], 0.6, "shrunk over denoised")


def test_shrinkage_is_idle_without_noise():
    truth, _ = problem(TWO, noise=0.0)
    L, noise = shrunk_factor(population(truth), TWO.n_factors)
    assert_at_most(abs(float(noise)), 1e-12, "σ²")
    assert_at_most(relative(L @ L.T, truth.gram()), 1e-10, "relative error of the Gram matrix")


def test_factored_covariance_works_under_jit_and_vmap():
    truth, _ = problem(TWO, noise=0.5)
    keys = jr.split(jr.key(0), 3)
    batch = jax.vmap(lambda key: denoised_factor(sample_factored_covariance(key, truth, 10), 5)[0])(keys)
    single = jax.jit(lambda key: denoised_factor(sample_factored_covariance(key, truth, 10), 5)[0])(keys[1])
    assert_close(batch[1] @ batch[1].T, single @ single.T, "L Lᵀ")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SampleCovariance(jnp.eye(3), n=1), "n: is 1; expected at least 2 samples"),
        (lambda: SampleCovariance(jnp.eye(3), n=float("nan")), "n: is nan; expected at least 2 samples"),
        (lambda: SampleCovariance(n=5), "matrix, data: expected exactly one of the two"),
        (lambda: SampleCovariance(jnp.eye(3), data=jnp.eye(3), n=5), "matrix, data: expected exactly one of the two"),
        (lambda: SampleCovariance(jnp.eye(3), n=np.inf), "n: is inf; expected at least 2 samples"),
        (lambda: SampleCovariance(jnp.ones((2, 3)), n=5), r"matrix: has shape \(2, 3\); expected a square matrix"),
        (lambda: SampleCovariance(np.eye(3) * 1j, n=5), "matrix: has type complex128"),
        (lambda: SampleCovariance(data=np.eye(3) * 1j, n=5), "data: has type complex128"),
        (lambda: SampleCovariance(data=jnp.ones(3), n=5), r"data: has shape \(3,\); expected a matrix"),
        (lambda: SampleCovariance(data=jnp.full((4, 3), jnp.inf), n=5), "data: holds NaN or infinite values"),
        (lambda: SampleCovariance(jnp.eye(3).at[1, 1].set(jnp.nan), n=5), "matrix: holds NaN or infinite values"),
        (lambda: SampleCovariance(jnp.zeros((3, 3)), n=5), "matrix: has trace 0; expected a positive one"),
        (lambda: SampleCovariance(-jnp.eye(3), n=5), "matrix: has trace -3; expected a positive one"),
        (lambda: SampleCovariance(jnp.diag(jnp.array([3.0, -1.0])), n=5), r"matrix: has -1 on its diagonal, at \(1, 1\)"),
        (
            lambda: SampleCovariance(jnp.tril(jnp.full((3, 3), 0.5) + jnp.eye(3)), n=5),
            r"matrix: has 0 at \(0, 1\) and 0.5 at \(1, 0\); expected a symmetric matrix",
        ),
        (
            lambda: SampleCovariance(jnp.array([[1.0, 3.0], [3.0, 4.0]]), n=5),
            r"matrix: has 3 at \(0, 1\) between features of variances 1 and 4; expected at most 2",
        ),
        (lambda: SampleCovariance.from_data([]), "views: are none; expected at least one matrix"),
        (lambda: SampleCovariance.from_data([np.ones((4, 2)) * 1j]), "views: view 1 has type complex128"),
        (
            lambda: SampleCovariance.from_data([np.eye(4)[:1]]),
            "views: have 1 row; expected at least 2",
        ),
        (
            lambda: SampleCovariance.from_data([np.eye(4), np.eye(4)[:, :0]]),
            r"view 2 has shape \(4, 0\); expected at least one sample and one feature",
        ),
        (lambda: SampleCovariance.from_data([1e30 * jnp.eye(4, dtype=jnp.float32)]), "squares leave the range of float32"),
        (lambda: SampleCovariance.from_data([jnp.ones((4, 2)), jnp.ones((5, 2))]), r"view 2 has shape \(5, 2\); expected 4 rows"),
        (
            lambda: SampleCovariance.from_data([jnp.ones((4, 2)), jnp.full((4, 3), jnp.nan)]),
            "view 2 holds NaN or infinite values",
        ),
        (
            lambda: noise_variance(SampleCovariance(jnp.eye(3), n=5), jnp.ones(3)),
            "top_values: has 3 eigenvalues; expected fewer than the 3",
        ),
    ],
)
def test_refusals_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


def test_covariances_are_taken_up_to_rounding():
    """As sums in single precision leave them: a little unsymmetric, a correlation of 1 + 1e-6, a constant feature below 0."""
    S = np.array([[4, 2 + 2e-6, 0], [2 - 2e-6, 1, 0], [0, 0, -1e-16]])
    assert SampleCovariance(S, n=5).n_features == 3
    assert SampleCovariance(np.array([[2, 1], [1, 3]], ">i4"), n=5).dtype == np.float64
    assert SampleCovariance(np.eye(2, dtype=np.float16), n=5).dtype == np.float32
    one_of_none = jax.vmap(lambda S: SampleCovariance(S, n=5).trace())(jnp.stack([-jnp.eye(2), jnp.full((2, 2), jnp.nan)]))
    assert float(one_of_none[0]) == -2, "within compiled and mapped code values are not known, and not checked"


BLIND = Hierarchy((4, 3, 5), {(1, 3): 2, (3,): 1})  # whose second modality sees nothing


@pytest.mark.parametrize("hierarchy", [TWO, CHAIN, BLIND], ids=str)
@pytest.mark.parametrize("form", ["matrix", "rows"])
def test_masked_loadings_are_multiplied_as_any_others(hierarchy, form):
    rng = np.random.default_rng(0)
    A, F = (jnp.asarray(masked_normal(rng, hierarchy)) for _ in range(2))
    x = rng.standard_normal((30, hierarchy.n_features))
    S = SampleCovariance.from_data([jnp.asarray(x[:, hierarchy.rows(m)]) for m in hierarchy.modalities], form=form)
    for covariance in (S, DenoisedCovariance(S, jnp.asarray(0.3)), LowRankCovariance(A)):
        product = covariance.masked_product(hierarchy)
        assert_at_most(relative(product(F), covariance.product(F)), 1e-13, f"{type(covariance).__name__} times F")
    rows = hierarchy.rows(1)
    first = S.masked_product(hierarchy)(F, (1,))
    assert_at_most(relative(first, S.product(F[rows], rows)), 1e-13, "S[:, rows] F[rows]")


def test_zeros_of_masked_loadings_are_not_multiplied():
    apart = Hierarchy((8,) * 10, {(m,): 2 for m in range(1, 11)})
    F, S = jnp.ones((80, 20)), SampleCovariance(jnp.eye(80), n=100)
    programs = {"masked": lambda F: S.masked_product(apart)(F), "dense": lambda F: S.product(F)}
    flops = {name: jax.jit(program).lower(F).compile().cost_analysis()["flops"] for name, program in programs.items()}
    assert_at_most(flops["masked"] / flops["dense"], 0.2, "operations: a tenth, and the sums over modalities")


@pytest.mark.parametrize("name", ["hcl-gn", "hcl-ml"])
def test_a_modality_may_see_nothing(name):
    x = np.random.default_rng(2).standard_normal((200, BLIND.n_features))
    x[:, BLIND.rows(1)] += x[:, :1]
    S = SampleCovariance.from_data([jnp.asarray(x[:, BLIND.rows(m)]) for m in BLIND.modalities])
    fit = jax.jit(ESTIMATORS[name], static_argnums=1)(S, BLIND)
    assert int(fit.status) == 0
    assert not np.asarray(fit.loadings)[BLIND.rows(2)].any()
