"""How many replicates of the recovery study a second: hcl_jax (`hcl-gn`) beside the published pipeline in plain NumPy and SciPy.

    python benchmarks/recovery_throughput.py

Both run on the same cores, in one process, in alternating rounds. A replicate is: draw loadings, draw their sample covariance
at n samples, fit. The loop (`numpy_pipeline.py`) has to draw the data for it; hcl_jax draws the covariance from its exact law,
Wishart. The loop's BLAS has all threads or one, whichever is faster; hcl_jax has one host device a thread, as in a sweep. A
second table says how long the loop's own descent takes to reach hcl-gn's objective on the same covariance.

Cores that are busy with other work slow both, and not equally: the column `cores` says how many hcl_jax really had.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

import numpy_pipeline as pipeline
from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance
from hcl_jax.estimators.gauss_newton import hcl_gn
from hcl_jax.experiments import Cell, CompilationCounter, configure
from hcl_jax.experiments.mapping import Slots, place, spread
from hcl_jax.experiments.recovery import DrawSpec, draw_program, errors_program, estimate_program, shared_arguments
from measuring import check_known, check_noise_variances, check_rounds, restrict_to_cores, run_script, timed

METHOD = "hcl-gn"
RACE_EXCESS = 1e-6
RACE_TOLERANCE = {"float32": 1e-4, "float64": 3e-5}
"""Relative gradient at which hcl-gn is within RACE_EXCESS of its minimum, which is checked: both sides of the race stop there."""


@dataclass(frozen=True)
class Case:
    """One setting of the comparison."""

    dims: tuple[int, ...]
    rank: int
    dtype: str
    replicates: int
    """Of hcl_jax a round."""
    loop_replicates: int
    """Of the loop a round."""
    noise_variance: float = 10.0

    @property
    def hierarchy(self) -> Hierarchy:
        return Hierarchy.full(self.dims, self.rank)

    def __str__(self) -> str:
        return f"{self.dims} | {self.rank} | {self.noise_variance:g} | {self.dtype}"


CASES = {
    "equal-float32": Case((100, 100, 100), 5, "float32", 40, 2),
    "equal-float64": Case((100, 100, 100), 5, "float64", 40, 2),
    "released-float32": Case((100, 500, 800), 10, "float32", 8, 1),
}


@dataclass(frozen=True)
class Arguments:
    """Time hcl_jax beside a plain loop of the published pipeline."""

    cases: tuple[str, ...] = tuple(CASES)
    """Which settings: some of equal-float32, equal-float64, released-float32."""
    n: int = 30_000
    """Samples behind each covariance."""
    noise_variances: tuple[float, ...] = (1.0, 10.0)
    """σ²: 10 as released, 1 where the signal is visible."""
    threads: int = 2
    """Cores of both: BLAS threads of the loop, host devices of hcl_jax."""
    rounds: int = 5
    """Alternating rounds; the table has the best and the median."""
    seed: int = 0
    """Root of all draws."""
    descent_seconds: float = 300.0
    """Time after which the loop's descent is given up, or 0 to leave that table out."""


@dataclass
class Timings:
    """Seconds a replicate, one entry a round."""

    loop: list[float] = field(default_factory=list)
    loop_draw: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    ours_draw: list[float] = field(default_factory=list)
    with_metrics: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    """Processor time over time, of hcl_jax."""
    loop_threads: int = 1
    compilations: int = 0


class Ours:
    """hcl_jax's replicates of one case."""

    def __init__(self, case: Case, arguments: Arguments, tolerance: float | None = None):
        self.case, self.seed = case, arguments.seed
        self.cell = Cell(case.hierarchy, arguments.n, case.noise_variance)
        self.size = -(-case.replicates // jax.device_count())
        self.draw = draw_program(DrawSpec.of(self.cell, case.dtype), False)
        if tolerance is None:
            self.fit = estimate_program(METHOD, case.hierarchy, False)
        else:
            self.fit = spread(lambda _, covariance: hcl_gn(covariance, case.hierarchy, tolerance=tolerance), False)
        self.measure = errors_program(case.hierarchy, False)

    def run(self, first: int) -> tuple[float, float, float]:
        """Seconds a replicate to draw, to fit, and to compute all metrics, for replicates from `first` on."""
        slots = Slots.spread(first, self.size * jax.device_count(), self.size)
        shared = place(shared_arguments(self.cell, self.seed, self.case.dtype, None), split=False)
        replicates, counts = place((slots.replicates, slots.counts), split=True)
        (truths, covariances), drawing = timed(lambda: self.draw(shared, replicates, counts))
        estimates, fitting = timed(lambda: self.fit(None, covariances, counts))
        _, measuring = timed(lambda: self.measure(None, (truths, estimates), counts))
        if np.asarray(estimates.status).any():
            raise RuntimeError(f"{METHOD}: {np.count_nonzero(estimates.status)} fits did not converge; expected all to")
        count = len(slots.replicates)
        return drawing / count, fitting / count, measuring / count


def run_loop(rng: np.random.Generator, case: Case, arguments: Arguments) -> tuple[float, float]:
    """Seconds of one replicate of the loop to draw its covariance, and to fit."""
    start = time.perf_counter()
    loadings = pipeline.draw_loadings(rng, case.dims, case.rank, np.dtype(case.dtype))
    S = pipeline.sample_covariance(pipeline.draw_data(rng, loadings, case.noise_variance, arguments.n))
    drawn = time.perf_counter()
    pipeline.fit(S, case.dims, case.rank)
    return drawn - start, time.perf_counter() - drawn


def faster_threads(rng: np.random.Generator, case: Case, arguments: Arguments) -> int:
    """One BLAS thread or all of them, whichever makes the loop faster; the better of two replicates of each."""
    seconds = {}
    for threads in {1, arguments.threads}:
        with threadpool_limits(threads):
            seconds[threads] = min(sum(run_loop(rng, case, arguments)) for _ in range(2))
    return min(seconds, key=seconds.__getitem__)


def measure(case: Case, arguments: Arguments) -> Timings:
    """Alternating rounds of both, after unmeasured replicates of each."""
    rng, timings, ours = np.random.default_rng(arguments.seed), Timings(), Ours(case, arguments)
    timings.loop_threads = faster_threads(rng, case, arguments)
    ours.run(0)
    with CompilationCounter() as compilations:
        for i in range(1, arguments.rounds + 1):
            with threadpool_limits(timings.loop_threads):
                draws, fits = np.transpose([run_loop(rng, case, arguments) for _ in range(case.loop_replicates)])
            timings.loop.append(float(np.mean(draws + fits)))
            timings.loop_draw.append(float(np.mean(draws)))
            began, began_cpu = time.perf_counter(), time.process_time()
            drawing, fitting, measuring = ours.run(i * case.replicates)
            timings.cores.append((time.process_time() - began_cpu) / (time.perf_counter() - began))
            timings.ours.append(drawing + fitting)
            timings.ours_draw.append(drawing)
            timings.with_metrics.append(drawing + fitting + measuring)
    timings.compilations = compilations.count
    return timings


THROUGHPUT_HEADER = """\
Replicates per second, best / median of the rounds; the draw's share of the time; programs compiled during the rounds

| dims | rank | σ² | dtype | loop (BLAS threads) | hcl_jax | ratio | with metrics | loop's draw | our draw | cores | compiled |
|---|---|---|---|---|---|---|---|---|---|---|---|"""


def throughput_row(case: Case, t: Timings) -> str:
    best, median = min(t.loop) / min(t.ours), statistics.median(t.loop) / statistics.median(t.ours)
    shares = [f"{sum(draw) / sum(whole):.0%}" for draw, whole in ((t.loop_draw, t.loop), (t.ours_draw, t.ours))]
    ours = [rates(t.ours), f"{best:.1f} / {median:.1f}", rates(t.with_metrics)]
    checks = [f"{statistics.median(t.cores):.2f}", str(t.compilations)]
    return f"| {case} | {rates(t.loop)} ({t.loop_threads}) | {' | '.join(ours + shares + checks)} |"


def rates(seconds: list[float]) -> str:
    return f"{1 / min(seconds):.3g} / {1 / statistics.median(seconds):.3g}"


@dataclass
class Descent:
    """What it takes the loop to reach hcl-gn's objective on one covariance. Excesses are over that objective, relative."""

    alone: float
    """Seconds of one hcl-gn fit to RACE_EXCESS, on one core."""
    in_sweep: float
    """Seconds of such a fit in a sweep on all cores."""
    our_draw: float
    loop_draw: float
    stopped_at: int
    stopped_excess: float
    """Where the published schedule ends."""
    steps: int
    seconds: float
    excess: float
    """The same with a constant step of 0.2/λ_max(S), from the covariance on."""


def race(case: Case, arguments: Arguments) -> Descent:
    """hcl-gn, the published descent, and that descent with a constant step, on one covariance."""
    rng = np.random.default_rng(arguments.seed)
    loadings = pipeline.draw_loadings(rng, case.dims, case.rank, np.dtype(case.dtype))
    threads = faster_threads(rng, case, arguments)
    with threadpool_limits(threads):
        S, loop_draw = timed(
            lambda: pipeline.sample_covariance(pipeline.draw_data(rng, loadings, case.noise_variance, arguments.n))
        )
    target, alone = time_one_fit(S, case.hierarchy, arguments.n)
    ours = Ours(case, arguments, RACE_TOLERANCE[case.dtype])
    ours.run(0)
    in_sweep = [ours.run(i * case.replicates)[:2] for i in range(1, arguments.rounds + 1)]
    our_draw, fitting = np.median(in_sweep, axis=0)
    with threadpool_limits(threads):
        return race_loop(S, case, target, (alone, float(fitting), float(our_draw), loop_draw), arguments.descent_seconds)


def time_one_fit(S: np.ndarray, hierarchy: Hierarchy, n: int) -> tuple[np.ndarray, float]:
    """hcl-gn's loadings at its own stop, and the best of three times of a single fit to RACE_TOLERANCE."""
    covariance = SampleCovariance(jnp.asarray(S), n=n)
    target = np.asarray(jax.jit(lambda covariance: ESTIMATORS[METHOD](covariance, hierarchy))(covariance).loadings)
    fit = jax.jit(lambda covariance: hcl_gn(covariance, hierarchy, tolerance=RACE_TOLERANCE[S.dtype.name]))
    reached = np.asarray(fit(covariance).loadings)
    S_denoised = S - pipeline.mean_small_eigenvalue(S, hierarchy.n_factors) * np.eye(len(S), dtype=S.dtype)
    excess = make_excess(S_denoised, target)(reached.astype(float))
    if excess > RACE_EXCESS:
        raise RuntimeError(f"{METHOD}: {excess:.1e} above its minimum at its race tolerance; expected {RACE_EXCESS}")
    return target, min(timed(lambda: fit(covariance))[1] for _ in range(3))


def make_excess(S_denoised: np.ndarray, ours: np.ndarray) -> Callable[[np.ndarray], float]:
    """Objective over that of our loadings, less one; in float64 whatever the race is run in."""
    S, S_norm_sq = S_denoised.astype(float), np.vdot(S_denoised, S_denoised).astype(float)

    def objective(V: np.ndarray) -> float:
        return pipeline.objective(V, S @ V, S_norm_sq)

    target = objective(ours.astype(float))
    return lambda V: objective(V.astype(float)) / target - 1


def race_loop(S: np.ndarray, case: Case, ours: np.ndarray, seconds_of_ours: tuple[float, ...], limit: float) -> Descent:
    """Both descents from the loop's own start. The constant step is looked at every 50 steps, off the clock."""
    mask = pipeline.loading_mask(case.dims, case.rank, S.dtype)
    began = time.perf_counter()
    sigma_sq = pipeline.mean_small_eigenvalue(S, mask.shape[1])
    S_denoised = S - sigma_sq * np.eye(len(S), dtype=S.dtype)
    V = pipeline.hcl_svd(S_denoised, case.dims, case.rank)
    seconds = time.perf_counter() - began
    step, steps, excess = 0.2 / float(np.linalg.eigvalsh(S)[-1]), 0, make_excess(S_denoised, ours)
    stopped, stopped_at = pipeline.hcl_grad(S_denoised, V, mask)
    while (reached := excess(V)) > RACE_EXCESS and seconds < limit:
        (V, taken, _), elapsed = timed(lambda V=V: pipeline.descend_to(S_denoised, V, mask, step, -np.inf, max_steps=50))
        seconds, steps = seconds + elapsed, steps + taken
    return Descent(*seconds_of_ours, stopped_at, excess(stopped), steps, seconds, reached)


DESCENT_HEADER = """
Until within 1e-6 of hcl-gn's objective, relative: seconds of a fit from one covariance (alone on one core / in a sweep on
all) and of the whole replicate with its draw (in a sweep), and how many times as long the loop takes. The loop descends with a
constant step, 0.2/λ_max(S), that is not in the published code.

| dims | rank | σ² | dtype | hcl-gn alone | in a sweep | with the draw | published descent | constant step | times as long |
|---|---|---|---|---|---|---|---|---|---|"""


def descent_row(case: Case, d: Descent) -> str:
    published = f"never: stops at i = {d.stopped_at}, objective {1 + d.stopped_excess:.3g} times hcl-gn's"
    if d.excess <= RACE_EXCESS:
        constant, sign = f"{d.seconds:.3g} s, {d.steps:,} steps", ""
    else:
        constant, sign = f"still {d.excess:.1e} above after {d.seconds:.0f} s, {d.steps:,} steps", "> "
    whole = (d.seconds + d.loop_draw) / (d.in_sweep + d.our_draw)
    ratios = " / ".join(f"{sign}{ratio:.0f}" for ratio in (d.seconds / d.alone, d.seconds / d.in_sweep, whole))
    ours = " | ".join(f"{1e3 * seconds:.3g} ms" for seconds in (d.alone, d.in_sweep, d.in_sweep + d.our_draw))
    return f"| {case} | {ours} | {published} | {constant} (draw {d.loop_draw:.2g} s) | {ratios} |"


def check(arguments: Arguments) -> None:
    """Raise `ValueError` that names the argument."""
    check_known("cases", arguments.cases, CASES)
    check_noise_variances(arguments.noise_variances)
    check_rounds(arguments.rounds)


def main(arguments: Arguments) -> None:
    check(arguments)
    restrict_to_cores(arguments.threads)
    cases = [replace(CASES[name], noise_variance=noise) for name in arguments.cases for noise in arguments.noise_variances]
    settings = f"n = {arguments.n:,}, {arguments.threads} threads, {arguments.rounds} rounds"
    print(f"{METHOD} beside the published pipeline in NumPy and SciPy: {settings}\n\n{THROUGHPUT_HEADER}", flush=True)
    for case in cases:
        configure(case.dtype, arguments.threads)
        print(throughput_row(case, measure(case, arguments)), flush=True)
    if not arguments.descent_seconds:
        return
    print(DESCENT_HEADER, flush=True)
    for case in cases:
        configure(case.dtype, arguments.threads)
        print(descent_row(case, race(case, arguments)), flush=True)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
