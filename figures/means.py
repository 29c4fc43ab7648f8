"""Means of a finished sweep as a small table: one row a setting, method, n and metric, with standard error, ratio to the limit
and failures.

    python figures/means.py results/recovery-paper docs/tables/recovery-paper.csv

`mean` ± `sem` are over replicates; `ratio` ± `ratio_sem` is the root mean square over replicates, `rms`, over that of the limit
on the same draws, and empty where that is 0. Errors by structure or block enter as the root of their sum of squares over the
structures or blocks of a replicate, counts and shares (`selected`, `kept_rank`) as their average. The files under docs/tables are
made so.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import polars as pl
import tyro

from hcl_jax.experiments import OutputError, read_results, summarise


@dataclass(frozen=True)
class Arguments:
    """Write the means of a sweep to a csv file."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """OUTPUT of a study, or of several runs of it, and last the csv file to write."""


def mean_table(table: pl.DataFrame) -> pl.DataFrame:
    """The summary of every metric, results to six digits."""
    summaries = [
        summarise(table, metric).with_columns(pl.lit(metric).alias("metric"))
        for metric in table["metric"].unique(maintain_order=True)
    ]
    optional = {"latent", "sampling", "loadings", "fitted", "support"} & set(table.columns)
    constant = [name for name in optional if table[name].n_unique() == 1]
    results = ("mean", "sem", "rms", "limit", "ratio", "ratio_sem")  # what tells settings apart keeps all its digits
    return pl.concat(summaries).drop(constant).with_columns(pl.col(results).round_sig_figs(6))


def main() -> int:
    """The command line; returns the exit code."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        *folders, table = arguments.results
        if not folders or table.suffix != ".csv":
            raise ValueError(
                f"results: are {' '.join(map(str, arguments.results))}; expected folders, and last a csv file to write"
            )
        means = mean_table(pl.concat([read_results(folder) for folder in folders]))
        table.parent.mkdir(parents=True, exist_ok=True)
        means.write_csv(table)
    except (ValueError, OutputError, OSError) as error:
        print(f"means.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
