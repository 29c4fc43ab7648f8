"""A sweep of many replicates on all cores beside as many single calls on one thread.

    python benchmarks/replicates.py                     # prints the table, and writes it to results/benchmarks/replicates.csv
    python figures/sizes.py results/benchmarks

A replicate draws loadings, draws their sample covariance at n samples and fits, all in one compiled program. The sweep maps it
over the cores, as a study does; the single calls are made one after the other in a process of their own, which has one core.
Both take turns; compilation is not timed.
"""

import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import polars as pl
from jaxtyping import Array

from hcl_jax import ESTIMATORS, Estimate, Hierarchy, sample_truth, sample_wishart_covariance
from hcl_jax.experiments import configure
from hcl_jax.experiments.mapping import Slots, place, spread
from measuring import PeakMemory, check_known, check_rounds, interleaved, restrict_to_cores, run_script, timed

SEED = 0


@dataclass(frozen=True)
class Arguments:
    """Time a sweep on all cores beside single calls on one thread."""

    methods: tuple[str, ...] = ("hcl-gn", "hcl-ml")
    """Estimators."""
    replicates: tuple[int, ...] = (1, 10, 100)
    """How many, in ascending order."""
    dims: tuple[int, ...] = (100, 100, 100)
    """Features of each view."""
    rank: int = 5
    """Of each of the structures."""
    n: int = 5_000
    """Samples behind each covariance."""
    noise_variance: float = 1.0
    """σ² of the data."""
    dtype: str = "float64"
    """Precision of both: float64 or float32."""
    threads: int = 2
    """Cores of the sweep."""
    rounds: int = 5
    """Turns of each; the table has the median."""
    output: Path = Path("results/benchmarks/replicates.csv")
    """The table, in long form."""


def make_replicate(method: str, arguments: Arguments) -> Callable[[Array], Estimate]:
    """The number of a replicate -> its estimate."""
    hierarchy = Hierarchy.full(arguments.dims, arguments.rank)

    def replicate(number: Array) -> Estimate:
        k_truth, k_data = jr.split(jr.fold_in(jr.key(SEED), number))
        truth = sample_truth(k_truth, hierarchy, arguments.noise_variance, jnp.dtype(arguments.dtype))
        return ESTIMATORS[method](sample_wishart_covariance(k_data, truth, arguments.n), hierarchy)

    return replicate


def make_sweep(method: str, arguments: Arguments) -> Callable[[int], Estimate]:
    """The number of replicates -> their estimates, computed on all devices."""
    replicate = make_replicate(method, arguments)
    program = spread(lambda _, number: replicate(number), batched=False)

    def sweep(count: int) -> Estimate:
        slots = Slots.spread(0, count, -(-count // jax.device_count()), arguments.threads)
        return program(None, *place((slots.replicates, slots.counts), split=True))

    return sweep


def start_single(dtype: str) -> None:
    """Begin a process of one core and one thread."""
    restrict_to_cores(1)
    configure(dtype, devices=1)


@lru_cache
def single_program(method: str, arguments: Arguments) -> Callable[[Array], Estimate]:
    return jax.jit(make_replicate(method, arguments))


def single_calls(method: str, arguments: Arguments, count: int) -> float:
    """Seconds of that many calls, one after the other."""
    program, numbers = single_program(method, arguments), [jnp.asarray(i, jnp.uint32) for i in range(count)]
    jax.block_until_ready(program(numbers[0]))
    return timed(lambda: [jax.block_until_ready(program(number)) for number in numbers])[1]


def measure(method: str, arguments: Arguments, single: ProcessPoolExecutor) -> pl.DataFrame:
    """One row a number of replicates, for the sweep and for the single calls."""
    sweep, rows = make_sweep(method, arguments), []
    for count in arguments.replicates:
        jax.block_until_ready(sweep(count))
        with PeakMemory() as peak:
            jax.block_until_ready(sweep(count))
        ours, calls = [], []
        for _ in range(arguments.rounds):
            ours += interleaved({"sweep": lambda count=count: sweep(count)}, 1)["sweep"]
            calls.append(single.submit(single_calls, method, arguments, count).result())
        rows.append(("replicates", count, method, statistics.median(ours), peak.growth / 1e6))
        rows.append(("replicates, single calls", count, method, statistics.median(calls), None))
    return pl.DataFrame(rows, ["sweep", "size", "method", "seconds", "megabytes"], orient="row")


def text_rows(table: pl.DataFrame) -> str:
    """The printed table of a method."""
    swept, calls = (table.filter(pl.col("sweep") == name) for name in ("replicates", "replicates, single calls"))
    return "\n".join(
        f"| {method} | {count} | {seconds:.3g} s | {one_by_one:.3g} s | {one_by_one / seconds:.2f} | {megabytes:.3g} MB |"
        for (_, count, method, seconds, megabytes), one_by_one in zip(swept.iter_rows(), calls["seconds"], strict=True)
    )


def check(arguments: Arguments) -> None:
    """Raise `ValueError` that names the argument."""
    check_known("methods", arguments.methods, ESTIMATORS)
    if min(arguments.replicates, default=0) < 1:
        raise ValueError(f"--replicates: are {arguments.replicates}; expected positive numbers")
    check_rounds(arguments.rounds)
    if arguments.n <= sum(arguments.dims):
        raise ValueError(f"--n: is {arguments.n}; expected more than the {sum(arguments.dims)} features")


HEADER = """\
| method | replicates | sweep | single calls, one thread | times as fast | memory of the sweep |
|---|---|---|---|---|---|"""


def main(arguments: Arguments) -> None:
    check(arguments)
    restrict_to_cores(arguments.threads)
    configure(arguments.dtype, arguments.threads)
    print(HEADER, flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    context, tables = multiprocessing.get_context("spawn"), []
    with ProcessPoolExecutor(1, context, start_single, (arguments.dtype,)) as single:
        for method in arguments.methods:
            tables.append(measure(method, arguments, single))
            print(text_rows(tables[-1]), flush=True)
            pl.concat(tables).write_csv(arguments.output)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
