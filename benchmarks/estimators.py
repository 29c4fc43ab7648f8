"""Time and peak memory of the estimators against n, d, K and M, beside scikit-learn and a plain EM in NumPy, on the same data.

    python benchmarks/estimators.py                     # prints the table, and writes it to results/benchmarks/sizes.csv
    python figures/sizes.py results/benchmarks

Every method gets the rows of all views, and is timed from there to its estimate: the sample covariance is in the time of all that
need one. Compilation is not; each runs on one core, with one thread, in turns. Memory is the peak beyond the data.

numpy-em (`numpy_em.py`) is given the start from `hcl-svd`, and the number of iterations that bring it within 1e-6 a row of the
likelihood of `hcl-ml`. FactorAnalysis maximises the likelihood of K factors that all features see, each feature with a noise
variance of its own; PCA takes the K leading principal components. Neither knows the hierarchy. Both have scikit-learn's defaults.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import polars as pl
from sklearn.decomposition import PCA, FactorAnalysis

import numpy_em
from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance, sample_observations, sample_truth
from hcl_jax.experiments import configure
from likelihood_race import WITHIN, em_iterations, modalities_of
from measuring import PeakMemory, check_known, check_rounds, interleaved, restrict_to_cores, run_script
from numpy_pipeline import sample_covariance

OURS = ("hcl-svd", "hcl-gn", "hcl-ml", "hcl-vb")
OTHERS = ("numpy-em", "factor-analysis", "pca")


@dataclass(frozen=True)
class Case:
    """One point of a sweep."""

    sweep: str
    size: int
    hierarchy: Hierarchy
    n: int


def equal_views(features: int = 300, rank: int = 5) -> Hierarchy:
    """Three views of a size, all seven structures of a rank."""
    return Hierarchy.full((features // 3,) * 3, rank)


def chain(n_modalities: int, features: int = 300) -> Hierarchy:
    """Rank 4 for all modalities together, 2 for each pair of neighbours and for each modality alone."""
    pairs = {(m, m + 1): 2 for m in range(1, n_modalities)}
    alone = {(m,): 2 for m in range(1, n_modalities + 1)}
    return Hierarchy((features // n_modalities,) * n_modalities, pairs | alone | {tuple(range(1, n_modalities + 1)): 4})


@dataclass(frozen=True)
class Arguments:
    """Time the estimators against the sizes of their problem."""

    n_grid: tuple[int, ...] = (1_000, 5_000, 20_000)
    """Rows, of 300 features, K = 35."""
    d_grid: tuple[int, ...] = (150, 300, 600, 1_200)
    """Features in three views, of 5,000 rows, K = 35."""
    rank_grid: tuple[int, ...] = (1, 2, 5, 10)
    """Ranks r of each of the seven structures, K = 7r, of 5,000 rows and 300 features."""
    modalities_grid: tuple[int, ...] = (2, 3, 5, 10)
    """Views of 300 features together, of 5,000 rows; structures: all, neighbours, each alone."""
    methods: tuple[str, ...] = (*OURS, *OTHERS)
    """Which methods."""
    noise_variance: float = 1.0
    """σ² of the data."""
    dtype: str = "float64"
    """Precision of all: float64 or float32."""
    rounds: int = 3
    """Turns of each; the table has the median."""
    em_seconds: float = 60.0
    """Time after which numpy-em is left out of a case."""
    seed: int = 0
    """Root of all draws."""
    output: Path = Path("results/benchmarks/sizes.csv")
    """The table, in long form."""


def cases(arguments: Arguments) -> Iterator[Case]:
    """All points of all sweeps."""
    yield from (Case("n", n, equal_views(), n) for n in arguments.n_grid)
    yield from (Case("d", d, equal_views(d), 5_000) for d in arguments.d_grid)
    yield from (Case("K", 7 * rank, equal_views(rank=rank), 5_000) for rank in arguments.rank_grid)
    yield from (Case("M", count, chain(count), 5_000) for count in arguments.modalities_grid)


def draw_rows(case: Case, arguments: Arguments) -> np.ndarray:
    """n × d rows of the model."""
    k_truth, k_data = jr.split(jr.key(arguments.seed))
    truth = sample_truth(k_truth, case.hierarchy, arguments.noise_variance, jnp.dtype(arguments.dtype))
    return np.array(sample_observations(k_data, truth, case.n)[0])


def our_fit(name: str, rows: np.ndarray, hierarchy: Hierarchy) -> Callable[[], Any]:
    fit = jax.jit(ESTIMATORS[name], static_argnums=1)
    views = [rows[:, hierarchy.rows(m)] for m in hierarchy.modalities]
    return lambda: fit(SampleCovariance.from_data([jnp.asarray(view) for view in views]), hierarchy)


def em_fit(rows: np.ndarray, hierarchy: Hierarchy, seconds: float) -> Callable[[], Any] | None:
    """EM to the likelihood of hcl-ml; None where that takes too long."""
    S, modalities = sample_covariance(rows.copy()), modalities_of(hierarchy)
    best, start = (our_fit(name, rows, hierarchy)() for name in ("hcl-ml", "hcl-svd"))
    target = numpy_em.log_likelihood_per_row(S, np.asarray(best.loadings), float(best.noise_variance)) - WITHIN
    from_svd = (np.asarray(start.loadings), float(start.noise_variance))
    count, _, reached = em_iterations(S, from_svd, modalities, target, seconds)
    if not reached:
        return None
    return lambda: next(islice(numpy_em.em_steps(sample_covariance(rows.copy()), *from_svd, modalities), count - 1, None))


def competitors(case: Case, arguments: Arguments) -> dict[str, Callable[[], Any]]:
    """What is to be timed, each from the rows on."""
    rows, K = draw_rows(case, arguments), case.hierarchy.n_factors
    fits = {name: our_fit(name, rows, case.hierarchy) for name in arguments.methods if name in OURS}
    if "numpy-em" in arguments.methods and (em := em_fit(rows, case.hierarchy, arguments.em_seconds)):
        fits["numpy-em"] = em
    learners = {"factor-analysis": lambda: FactorAnalysis(K, random_state=0), "pca": lambda: PCA(K, random_state=0)}
    return fits | {
        name: lambda make=make: make().fit(rows).components_ for name, make in learners.items() if name in arguments.methods
    }


def measure(case: Case, arguments: Arguments) -> pl.DataFrame:
    """One row a method: median seconds, and megabytes at the peak."""
    fits = competitors(case, arguments)
    megabytes = {}
    for name, fit in fits.items():
        jax.block_until_ready(fit())  # compiles
        with PeakMemory() as peak:
            jax.block_until_ready(fit())
        megabytes[name] = peak.growth / 1e6
    seconds = interleaved(fits, arguments.rounds)
    return pl.DataFrame(
        {
            "sweep": case.sweep,
            "size": case.size,
            "method": list(fits),
            "seconds": [statistics.median(seconds[name]) for name in fits],
            "megabytes": [megabytes[name] for name in fits],
        }
    )


def text_row(case: Case, table: pl.DataFrame, methods: tuple[str, ...]) -> str:
    """The case as a row of the printed table."""
    found = {
        name: (seconds, megabytes) for name, seconds, megabytes in table.select("method", "seconds", "megabytes").iter_rows()
    }
    cells = [f"{1e3 * found[name][0]:.3g} / {found[name][1]:.3g}" if name in found else "not in time" for name in methods]
    h = case.hierarchy
    return f"| {case.sweep} | {case.n:,} | {h.n_features} | {h.n_factors} | {h.n_modalities} | {' | '.join(cells)} |"


def check(arguments: Arguments) -> None:
    """Raise `ValueError` that names the argument."""
    check_known("methods", arguments.methods, OURS + OTHERS)
    check_rounds(arguments.rounds)
    if not arguments.noise_variance > 0:
        raise ValueError(f"--noise-variance: is {arguments.noise_variance:g}; expected a positive number")
    for case in cases(arguments):
        if case.n <= case.hierarchy.n_factors + 1:
            raise ValueError(f"--n-grid: holds {case.n}; expected more than {case.hierarchy.n_factors + 1}, one more than K")


def main(arguments: Arguments) -> None:
    check(arguments)
    configure(arguments.dtype, devices=1)
    restrict_to_cores(1)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"Milliseconds / megabytes\n\n| against | n | d | K | M | {' | '.join(arguments.methods)} |")
    print("|---" * (5 + len(arguments.methods)) + "|", flush=True)
    tables = []
    for case in cases(arguments):
        tables.append(measure(case, arguments))
        print(text_row(case, tables[-1], arguments.methods), flush=True)
        pl.concat(tables).write_csv(arguments.output)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
