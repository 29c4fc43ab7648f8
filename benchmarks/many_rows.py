"""The covariance of many rows from memory-mapped files: `accumulate_npy` beside one pass of BLAS products over the same files.

    python benchmarks/many_rows.py                      # 10,000,000 rows × 300 features: 12 GB of files, which are deleted

The files hold one block of random rows again and again, and start on a new page for every pass. The pass to compare with does
the least that yields a 300 × 300 matrix: it copies a chunk of the views side by side, and adds up chunkᵀ chunk in float32, with
no shift, no check and no mean; same size of chunk, same threads. Both take turns. The memory is that of the whole process that
no file backs, Python and JAX included. The error is that of the covariance beside one in float64, in units of √(S_ii S_jj).
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from hcl_jax.streaming import LARGEST_BLOCK, CovarianceSums, accumulate_npy
from measuring import PeakMemory, check_rounds, interleaved, restrict_to_cores, run_script

RANDOM_ROWS = 100_000
MEAN = 3.0


@dataclass(frozen=True)
class Arguments:
    """Time the covariance of many rows beside one pass of BLAS products."""

    rows: int = 10_000_000
    """Rows of every file."""
    dims: tuple[int, ...] = (100, 100, 100)
    """Features of each view, a file a view."""
    block_rows: int = LARGEST_BLOCK
    """Rows of a product, for both."""
    threads: int = 2
    """Cores, and BLAS threads, of both."""
    rounds: int = 3
    """Turns of each; the table has the best."""
    folder: Path | None = None
    """Where to write the files; by default the system's folder for temporary files."""


def write_views(folder: Path, arguments: Arguments) -> tuple[list[Path], np.ndarray]:
    """A file a view, and the covariance of its rows: a block of correlated rows, repeated."""
    rng, d = np.random.default_rng(0), sum(arguments.dims)
    block = rng.standard_normal((min(RANDOM_ROWS, arguments.rows), d), dtype=np.float32)
    block[:, 1:] += block[:, :-1]
    block += np.float32(MEAN)
    paths = [folder / f"view{m}.npy" for m in range(1, len(arguments.dims) + 1)]
    for path, view in zip(paths, np.split(block, np.cumsum(arguments.dims)[:-1], axis=1), strict=True):
        file = np.lib.format.open_memmap(path, "w+", np.float32, (arguments.rows, view.shape[1]))
        for start in range(0, arguments.rows, len(block)):
            file[start : start + len(block)] = view[: arguments.rows - start]
        file.flush()
    repeats, rest = divmod(arguments.rows, len(block))
    weights = np.where(np.arange(len(block)) < rest, repeats + 1, repeats)
    return paths, np.cov(block.astype(float).T, fweights=weights)


def one_blas_pass(paths: Sequence[Path], block_rows: int) -> np.ndarray:
    """Σ chunkᵀ chunk in float32."""
    views = [np.load(path, mmap_mode="r") for path in paths]
    d = sum(view.shape[1] for view in views)
    chunk, product, total = (np.empty(shape, np.float32) for shape in ((block_rows, d), (d, d), (d, d)))
    total[:] = 0
    for start in range(0, len(views[0]), block_rows):
        pieces = [view[start : start + block_rows] for view in views]
        rows = np.concatenate(pieces, axis=1, out=chunk[: len(pieces[0])])
        total += np.matmul(rows.T, rows, out=product)
    return total


def largest_error(sums: CovarianceSums, expected: np.ndarray) -> float:
    """In units of √(S_ii S_jj)."""
    scale = np.sqrt(np.diagonal(expected))
    return float(np.max(np.abs(np.asarray(sums.covariance().matrix) - expected) / np.outer(scale, scale)))


def run(folder: Path, arguments: Arguments) -> str:
    """The row of the table."""
    paths, expected = write_views(folder, arguments)
    with threadpool_limits(arguments.threads):
        with PeakMemory() as peak:
            sums = accumulate_npy(paths, block_rows=arguments.block_rows)
        competitors = {
            "ours": lambda: accumulate_npy(paths, block_rows=arguments.block_rows),
            "blas": lambda: one_blas_pass(paths, arguments.block_rows),
        }
        seconds = interleaved(competitors, arguments.rounds)
    ours, blas = (min(seconds[name]) for name in ("ours", "blas"))
    sizes = f"{arguments.rows:,} × {sum(arguments.dims)} | {4 * arguments.rows * sum(arguments.dims) / 1e9:.3g} GB"
    times = f"{ours:.3g} s | {blas:.3g} s | {blas / ours:.2f}"
    return f"| {sizes} | {arguments.threads} | {times} | {peak.bytes / 1e6:.0f} MB | {largest_error(sums, expected):.1e} |"


def check(arguments: Arguments) -> None:
    """Raise `ValueError` that names the argument."""
    if arguments.rows < 2:
        raise ValueError(f"--rows: is {arguments.rows}; expected at least 2")
    check_rounds(arguments.rounds)
    if min(arguments.dims, default=0) < 1:
        raise ValueError(f"--dims: is {arguments.dims}; expected the positive number of features of each view")
    needed, free = 4 * arguments.rows * sum(arguments.dims), shutil.disk_usage(arguments.folder or tempfile.gettempdir()).free
    if needed > free:
        raise ValueError(
            f"--rows: is {arguments.rows}, files of {needed / 1e9:.3g} GB; expected at most the {free / 1e9:.3g} GB free"
        )


HEADER = """\
| rows × features | files | threads | accumulate_npy | one BLAS pass | speed of that | peak anonymous memory | error |
|---|---|---|---|---|---|---|---|"""


def main(arguments: Arguments) -> None:
    check(arguments)
    restrict_to_cores(arguments.threads)
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(run(Path(folder), arguments), flush=True)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
