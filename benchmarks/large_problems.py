"""Problems of unusual size: 100,000 features of 500 samples, and ten modalities with thirty structures.

    python benchmarks/large_problems.py
    python benchmarks/large_problems.py --features 10000 100000 --rounds 3

Features: three views, every subset of them with rank 3, rows in single precision; `hcl-gn` from `hcl-svd` to a relative projected
gradient of 1e-3, from covariances held as centred rows. Modalities: ten of 200 features, 30 structures of rank 2, n = 5,000,
σ² = 1; each estimator from one covariance, to its own stop. One thread; nothing is taken from the compilation cache.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from hcl_jax import ESTIMATORS, Estimate, Hierarchy, SampleCovariance, Truth, sample_truth, sample_wishart_covariance
from hcl_jax.estimators.gauss_newton import hcl_gn
from hcl_jax.experiments import configure
from hcl_jax.model import sample_observations
from measuring import PeakMemory, check_known, check_rounds, run_script, timed

SEED = 0
GRADIENT = 1e-3


@dataclass(frozen=True)
class Arguments:
    """Time fits of many features and of many modalities."""

    features: tuple[int, ...] = (10_000, 100_000)
    """Features of all three views together, in ascending order."""
    samples: int = 500
    """Rows of those problems."""
    modality_dim: int = 200
    """Features of each of the ten modalities."""
    methods: tuple[str, ...] = ("hcl-svd", "hcl-gn", "hcl-ml")
    """What is fitted to the ten modalities."""
    rounds: int = 3
    """Calls after the first; the table has their median."""


def report(name: str, function: Callable[[Any], Estimate], argument: Any, rounds: int) -> float:
    """Print one line; returns the median of the later calls."""
    program = jax.jit(function)
    with PeakMemory() as peak:
        estimate, first = timed(lambda: program(argument))
        later = statistics.median([timed(lambda: program(argument))[1] for _ in range(rounds)])
    ended = f"{int(estimate.status):7d} {int(estimate.steps):6d}"
    print(f"{name:34} {first:7.1f}s {later:8.2f}s {peak.bytes / 1e9:6.2f} GB {ended}", flush=True)
    return later


def many_features(arguments: Arguments) -> None:
    """`hcl-gn` on rows of ever more features."""
    later = {}
    for d in arguments.features:
        hierarchy = Hierarchy.full((d // 3, d // 3, d - 2 * (d // 3)), 3)
        truth = sample_truth(jr.key(SEED), hierarchy, 1.0, jnp.float32)
        strength = np.float32(np.sqrt(d / 100))  # a factor acts on a share of the features, whatever their number
        scaled = Truth(strength * truth.loadings, truth.noise_variance, hierarchy)
        x, _ = sample_observations(jr.key(SEED + 1), scaled, arguments.samples)
        views = [x[:, hierarchy.rows(m)] for m in hierarchy.modalities]
        covariance, seconds = timed(lambda views=views: SampleCovariance.from_data(views))
        del x, views
        assert covariance.matrix is None
        print(f"{f'd = {d:,}: centring the rows':34} {seconds:7.1f}s")
        fit = lambda S, hierarchy=hierarchy: hcl_gn(S, hierarchy, tolerance=GRADIENT)
        later[d] = report(f"d = {d:,}: hcl-gn to {GRADIENT:g}", fit, covariance, arguments.rounds)
    if len(later) > 1:
        small, large = arguments.features[0], arguments.features[-1]
        print(f"{large / small:g} times the features, {later[large] / later[small]:.1f} times the seconds")


def thirty_structures(dim: int) -> Hierarchy:
    """Ten modalities: what all share, what each has alone, and 19 random subsets of two to five; rank 2 each."""
    rng = np.random.default_rng(SEED)
    ranks = {tuple(range(1, 11)): 2} | {(m,): 2 for m in range(1, 11)}
    while len(ranks) < 30:
        members = rng.choice(10, rng.integers(2, 6), replace=False) + 1
        ranks[tuple(sorted(members.tolist()))] = 2
    return Hierarchy((dim,) * 10, ranks)


def many_modalities(arguments: Arguments) -> None:
    """Every method on one covariance of ten modalities."""
    hierarchy = thirty_structures(arguments.modality_dim)
    truth = sample_truth(jr.key(SEED), hierarchy, 1.0, jnp.float32)
    covariance = jax.block_until_ready(sample_wishart_covariance(jr.key(SEED + 1), truth, 5000))
    for method in arguments.methods:
        fit = lambda S, method=method: ESTIMATORS[method](S, hierarchy)
        report(f"M = 10, K = {hierarchy.n_factors}, d = {hierarchy.n_features:,}: {method}", fit, covariance, arguments.rounds)


def main(arguments: Arguments) -> None:
    check_known("methods", arguments.methods, ESTIMATORS)
    check_rounds(arguments.rounds)
    os.environ["HCL_COMPILATION_CACHE"] = "0"
    configure("float32", batched=True)  # one device, which computes on one thread
    print(f"{'':34} {'first':>8} {'later':>9} {'memory':>9} {'status':>7} {'steps':>6}")
    many_features(arguments)
    many_modalities(arguments)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
