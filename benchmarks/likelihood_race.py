"""How much sooner `hcl-ml` is at the maximum of the likelihood than a plain EM in NumPy (`numpy_em.py`).

    python benchmarks/likelihood_race.py

Both start from the loadings and the noise variance of `hcl-svd`, which is not timed, and run in turns on one core, with one
thread each. The best value is where `hcl-ml` ends with a gradient a thousandth of its usual tolerance. Both are timed to the
first iterate whose log-likelihood a row is within 1e-6 of it: the number of iterations is found beforehand, so that neither looks
at the likelihood while the clock runs. The last column is `hcl-ml` as it stops by itself.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import numpy_em
from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance, sample_truth, sample_wishart_covariance
from hcl_jax.estimators.estimate import Estimate, default_tolerance
from hcl_jax.estimators.likelihood import maximise_likelihood
from hcl_jax.experiments import configure
from measuring import check_known, check_noise_variances, check_rounds, interleaved, restrict_to_cores, run_script, timed

WITHIN = 1e-6  # of the best log-likelihood, a row
CHECKED_EVERY = 20  # iterations of EM, off the clock
STEPS_AT_MOST = 5000
OWN_TOLERANCE = {"float32": default_tolerance(jnp.float32), "float64": 1e-6}  # of hcl-ml

CASES = {"equal": Hierarchy.full((100, 100, 100), 5), "released": Hierarchy.full((100, 500, 800), 10)}


@dataclass(frozen=True)
class Arguments:
    """Time hcl-ml beside a plain EM in NumPy, to the same likelihood."""

    cases: tuple[str, ...] = tuple(CASES)
    """Which settings: equal (100/100/100 features, K = 35), released (100/500/800, K = 70)."""
    noise_variances: tuple[float, ...] = (1.0, 10.0)
    """σ²: 10 as released, 1 where the signal is visible."""
    n: int = 5_000
    """Samples behind each covariance."""
    dtype: str = "float64"
    """Precision of both: float64 or float32."""
    rounds: int = 5
    """Alternating rounds; the table has the median."""
    seconds: float = 300.0
    """Time after which EM is given up."""
    seed: int = 0
    """Root of all draws."""


@dataclass
class Race:
    """What both take to the same likelihood: iterations, and the median of their seconds; and where hcl-ml stops by itself."""

    em_iterations: int
    em_seconds: float
    reached: bool
    """Whether EM got there in time; if not, its seconds are those after which it was given up."""
    our_steps: int
    our_seconds: float
    own_steps: int
    own_seconds: float
    own_shortfall: float


def modalities_of(hierarchy: Hierarchy) -> list[numpy_em.Modality]:
    """The hierarchy, for `numpy_em`."""
    return [(hierarchy.rows(m), hierarchy.active_columns(m)) for m in hierarchy.modalities]


def make_fit(hierarchy: Hierarchy) -> Callable[..., Estimate]:
    """(covariance, start, tolerance, number of steps at most) -> hcl-ml from that start; compiled once for all numbers."""

    def fit(covariance: SampleCovariance, start: Estimate, tolerance: jax.Array, steps: jax.Array) -> Estimate:
        return maximise_likelihood(covariance, hierarchy, start.loadings, start.noise_variance[None], "shared", tolerance, steps)

    return jax.jit(fit)


def fewest(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """The least number above `low` that is enough, when `high` is: by bisection.

    >>> fewest(0, 100, lambda i: i * i > 50)
    8
    """
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def em_iterations(S: np.ndarray, start: tuple, modalities: list, target: float, limit: float) -> tuple[int, float, bool]:
    """The iterations of EM to the target, or those that `limit` seconds allow; their seconds; and whether it got there."""

    def at_target(step: tuple) -> bool:
        return numpy_em.log_likelihood_per_row(S, *step) >= target

    steps, count, spent = numpy_em.em_steps(S, *start, modalities), 0, 0.0
    while spent < limit:
        latest, elapsed = timed(lambda: list(islice(steps, CHECKED_EVERY)))
        spent += elapsed
        if at_target(latest[-1]):
            return count + 1 + next(i for i, step in enumerate(latest) if at_target(step)), spent, True
        count += len(latest)
    return count, spent, False


def race(hierarchy: Hierarchy, noise_variance: float, arguments: Arguments) -> Race:
    """Both on one covariance, in alternating rounds."""
    dtype = jnp.dtype(arguments.dtype)
    k_truth, k_data = jr.split(jr.key(arguments.seed))
    truth = sample_truth(k_truth, hierarchy, noise_variance, dtype)
    covariance = sample_wishart_covariance(k_data, truth, arguments.n)
    start = jax.jit(ESTIMATORS["hcl-svd"], static_argnums=1)(covariance, hierarchy)
    S, own = np.asarray(covariance.matrix), OWN_TOLERANCE[arguments.dtype]
    fit, modalities = make_fit(hierarchy), modalities_of(hierarchy)

    def ours(steps: int, tolerance: float = 0.0) -> Estimate:
        return jax.block_until_ready(fit(covariance, start, jnp.asarray(tolerance, dtype), jnp.asarray(steps)))

    def value(estimate: Estimate) -> float:
        return numpy_em.log_likelihood_per_row(S, np.asarray(estimate.loadings), float(estimate.noise_variance))

    best = ours(STEPS_AT_MOST, own / 1000)
    highest = value(best)
    steps = fewest(0, int(best.steps), lambda i: value(ours(i)) >= highest - WITHIN)
    em_start = (np.asarray(start.loadings), float(start.noise_variance))
    count, spent, reached = em_iterations(S, em_start, modalities, highest - WITHIN, arguments.seconds)
    competitors = {"ours": lambda: ours(steps), "own": lambda: ours(STEPS_AT_MOST, own)}
    if reached:
        competitors["em"] = lambda: next(islice(numpy_em.em_steps(S, *em_start, modalities), count - 1, None))
    rounds = interleaved(competitors, arguments.rounds)
    seconds = {"em": spent} | {name: statistics.median(times) for name, times in rounds.items()}
    stopped = ours(STEPS_AT_MOST, own)
    shortfall = highest - value(stopped)
    return Race(count, seconds["em"], reached, steps, seconds["ours"], int(stopped.steps), seconds["own"], shortfall)


HEADER = """\
| dims | K | σ² | dtype | NumPy EM | hcl-ml | ratio | hcl-ml by its own stop |
|---|---|---|---|---|---|---|---|"""


def row(hierarchy: Hierarchy, noise_variance: float, dtype: str, result: Race) -> str:
    more = "" if result.reached else "> "
    em = f"{more}{result.em_seconds:.3g} s, {result.em_iterations:,} iterations"
    ours = f"{1e3 * result.our_seconds:.3g} ms, {result.our_steps} steps"
    own = f"{1e3 * result.own_seconds:.3g} ms, {result.own_steps} steps, {result.own_shortfall:.0e} below"
    case = f"{'/'.join(map(str, hierarchy.dims))} | {hierarchy.n_factors} | {noise_variance:g} | {dtype}"
    return f"| {case} | {em} | {ours} | {more}{result.em_seconds / result.our_seconds:.1f} | {own} |"


def check(arguments: Arguments) -> None:
    """Raise `ValueError` that names the argument."""
    check_known("cases", arguments.cases, CASES)
    check_noise_variances(arguments.noise_variances)
    check_rounds(arguments.rounds)
    least = max([CASES[name].n_features for name in arguments.cases], default=0) + 1
    if arguments.n < least:
        raise ValueError(f"--n: is {arguments.n}; expected at least {least}, one more than the features")


def main(arguments: Arguments) -> None:
    check(arguments)
    configure(arguments.dtype, devices=1)
    restrict_to_cores(1)
    print(HEADER, flush=True)
    for name in arguments.cases:
        for noise_variance in arguments.noise_variances:
            result = race(CASES[name], noise_variance, arguments)
            print(row(CASES[name], noise_variance, arguments.dtype, result), flush=True)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
