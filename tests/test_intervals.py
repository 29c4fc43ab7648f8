"""Intervals from the inverse Fisher information: against dense algebra, and their coverage."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TWO, assert_at_most, assert_within, fitted_by, problem, relative, structure_rotation

from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance, sample_truth, sample_wishart_covariance
from hcl_jax.intervals import block_norm_intervals, delta_method, gram_intervals, without_rotations

ENTRIES = np.array([[0, 0], [3, 7], [2, 12], [15, 9], [9, 9]])
of_entries = gram_intervals


def fit(name="hcl-ml", n=3000, **options):
    truth, S = problem(TWO, noise=0.5, n=n)
    return truth, S, fitted_by(name, **options)(S, TWO)


def dense_information(estimate, nu):
    """(masked entries (i, k), the information matrix of all free parameters, those entries first), by d × d algebra."""
    L, d = np.asarray(estimate.loadings), TWO.n_features
    noise = np.asarray(estimate.noise_variance).ravel()
    inverse = np.linalg.inv(L @ L.T + np.diag(np.broadcast_to(noise, d)))
    noise = noise if len(noise) == 1 else noise[[0, TWO.dims[0]]]
    free, tangents = list(zip(*np.nonzero(TWO.mask), strict=True)), []
    for i, k in free:
        D = np.zeros((d, d))
        D[i] += L[:, k]
        D[:, i] += L[:, k]
        tangents.append(D)
    for group in range(len(noise)):
        tangents.append(np.diag(1.0 * (TWO.modality_of_feature == group) if len(noise) > 1 else np.ones(d)))
    halves = [inverse @ D for D in tangents]
    return free, nu / 2 * np.array([[np.sum(A * B.T) for B in halves] for A in halves])


def dense_errors(estimate, entries, nu):
    """Standard errors of the entries of G from the pseudo-inverse of the information matrix."""
    free, information = dense_information(estimate, nu)
    L = np.asarray(estimate.loadings)
    gradients = np.zeros((len(information), len(entries)))
    for row, (i, k) in enumerate(free):
        gradients[row] = [(a == i) * L[b, k] + (b == i) * L[a, k] for a, b in entries]
    return np.sqrt(np.diagonal(gradients.T @ np.linalg.pinv(information, rcond=1e-10) @ gradients))


@pytest.mark.parametrize("noise", ["shared", "view"])
def test_standard_errors_are_those_of_the_dense_information(noise):
    _, S, estimate = fit(noise=noise)
    intervals = of_entries(estimate, S, TWO, ENTRIES)
    G = np.asarray(estimate.loadings @ estimate.loadings.T)
    assert_at_most(relative(intervals.estimate, G[tuple(ENTRIES.T)]), 1e-12, "estimates")
    assert_at_most(relative(intervals.standard_error, dense_errors(estimate, ENTRIES, 2999)), 1e-4, "standard errors, dense")
    half = 1.959963984540054 * np.asarray(intervals.standard_error)
    assert_at_most(relative(intervals.upper - intervals.estimate, half), 1e-12, "upper half width")
    assert_at_most(relative(intervals.estimate - intervals.lower, half), 1e-12, "lower half width")


@pytest.mark.slow
def test_width_follows_the_level_and_the_sample_size():
    _, S, estimate = fit()
    narrow, wide = (gram_intervals(estimate, S, TWO, ENTRIES[:1], level) for level in (0.5, 0.99))
    assert_at_most(
        relative(wide.upper - wide.lower, (narrow.upper - narrow.lower) * 2.5758293 / 0.6744898), 1e-6, "ratio of widths"
    )
    larger = gram_intervals(estimate, SampleCovariance(S.matrix, n=4 * 2999 + 1), TWO, ENTRIES[:1], 0.5)
    assert_at_most(relative(larger.standard_error, narrow.standard_error / 2), 1e-6, "standard error at four times ν")


@pytest.mark.slow
def test_block_norms_are_freed_from_the_noise_in_them():
    """‖Λ̂‖² less the trace of the block's covariance, rotations left out; that trace has a Monte Carlo error (16 probes)."""
    _, S, estimate = fit()
    blocks = [((1, 2), 1), ((1, 2), 2), ((2,), 2)]
    intervals = block_norm_intervals(estimate, S, TWO, blocks)
    free, information = dense_information(estimate, 2999)
    variances = np.zeros(TWO.mask.shape)
    for (i, k), variance in zip(free, np.diagonal(np.linalg.pinv(information, rcond=1e-10)), strict=False):
        variances[i, k] = variance
    F = np.asarray(estimate.loadings)
    for q, (s, m) in enumerate(blocks):
        block = TWO.rows(m), TWO.columns(s)
        taken_off = np.sum(F[block] ** 2) - float(intervals.estimate[q]) ** 2
        probes = np.sqrt(2 / (16 * F[block].size))
        assert_within(taken_off / variances[block].sum(), 1, 4 * probes, f"{s}, {m}: trace over the dense one, 4 standard errors")
        assert intervals.lower[q] < intervals.estimate[q] < intervals.upper[q]

    def squares(F):
        return jnp.stack([jnp.sum(F[TWO.rows(m), TWO.columns(s)] ** 2) for s, m in blocks])

    squared = delta_method(squares, estimate, S, TWO).standard_error  # sd of ‖B‖ = sd of ‖B‖² over 2‖B‖
    assert_at_most(relative(intervals.standard_error, squared / (2 * intervals.estimate)), 1e-6, "standard errors")


def test_rotations_are_left_out():
    rng = np.random.default_rng(1)
    F, V = (jnp.asarray(np.where(TWO.mask, rng.standard_normal(TWO.mask.shape), 0)) for _ in range(2))
    columns = TWO.columns((1, 2))
    home = np.repeat(np.arange(3), [rank for _, rank in TWO.ranks])
    same = jnp.asarray(home[:, None] == home[None, :])
    turn = jnp.zeros_like(F).at[:, columns].set(F[:, columns] @ jnp.array([[0.0, 1.0], [-1.0, 0.0]]))
    assert_at_most(float(jnp.linalg.norm(without_rotations(turn, F, same))), 1e-13, "what is left of a rotation")
    left = without_rotations(V, F, same)
    assert_at_most(abs(float(jnp.sum(left * turn))), 1e-13, "inner product of what is left with a rotation")
    assert_at_most(relative(without_rotations(left, F, same), left), 1e-13, "change by a second projection")


def test_rotating_the_estimate_does_not_move_the_intervals():
    _, S, estimate = fit()
    rotation = jnp.asarray(structure_rotation(np.random.default_rng(0), TWO))
    rotated = dataclasses.replace(estimate, loadings=estimate.loadings @ rotation)
    before, after = (of_entries(e, S, TWO, ENTRIES) for e in (estimate, rotated))
    assert_at_most(relative(after.lower, before.lower), 1e-4, "lower ends")
    assert_at_most(relative(after.standard_error, before.standard_error), 1e-4, "standard errors")


def test_intervals_of_a_batch():
    fits = [problem(TWO, seed, noise=0.5, n=3000)[1] for seed in range(2)]
    estimates = [fitted_by("hcl-ml")(S, TWO) for S in fits]
    batch = jax.vmap(lambda e, S: of_entries(e, S, TWO, ENTRIES))(
        *(jax.tree.map(lambda *x: jnp.stack(x), *p) for p in (estimates, fits))
    )
    single = of_entries(estimates[1], fits[1], TWO, ENTRIES)
    assert_at_most(relative(batch.standard_error[1], single.standard_error), 1e-5, "standard errors, second of a batch")


def test_refusals_name_the_argument():
    _, S, estimate = fit()
    with pytest.raises(ValueError, match="level: is 95.0; expected a number between 0 and 1"):
        gram_intervals(estimate, S, TWO, ENTRIES, level=95.0)
    for block in (((1,), 2), ((1, 3), 1)):
        with pytest.raises(ValueError, match=r"blocks: \(.*\) is not a block of the hierarchy"):
            block_norm_intervals(estimate, S, TWO, [block])


def test_coverage_on_a_small_problem():
    """60 draws × 40 entries: coverage has a standard error near 0.008 (entries of one draw hang together)."""
    rng = np.random.default_rng(0)
    entries = rng.integers(0, 16, (40, 2))
    hits = []
    for seed in range(60):
        truth, S = problem(TWO, seed, noise=0.5, n=2000)
        intervals = of_entries(fitted_by("hcl-ml")(S, TWO), S, TWO, entries)
        G = np.asarray(truth.gram())[tuple(entries.T)]
        hits.append(np.mean((intervals.lower <= G) & (intervals.upper >= G)))
    assert_within(np.mean(hits), 0.95, 0.03, f"coverage, standard error {np.std(hits) / np.sqrt(60):.4f}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hcl-ml", "hcl-vb"])
def test_coverage_of_gram_entries(name):
    """200 random entries × 100 replicates at n = 5,000, σ² = 1, dims 100³, rank 5: 95 % intervals cover 0.93 to 0.97."""
    hierarchy = Hierarchy.full((100, 100, 100), 5)
    entries = jnp.asarray(np.random.default_rng(0).integers(0, 300, (200, 2)))

    @jax.jit
    def covered(key):
        k_truth, k_data = jax.random.split(key)
        truth = sample_truth(k_truth, hierarchy, 1.0, jnp.dtype(float))
        S = sample_wishart_covariance(k_data, truth, 5000.0)
        intervals = gram_intervals(ESTIMATORS[name](S, hierarchy), S, hierarchy, entries)
        G = jnp.sum(truth.loadings[entries[:, 0]] * truth.loadings[entries[:, 1]], axis=1)
        return (intervals.lower <= G) & (intervals.upper >= G)

    hits = np.stack([covered(jax.random.fold_in(jax.random.key(0), i)) for i in range(100)])
    error = hits.mean(axis=1).std(ddof=1) / 10
    assert_within(hits.mean(), 0.95, 0.02, f"{name}: coverage, standard error {error:.4f}")
