"""The search of each network's numbers, before the downstream study: one a method, equal in trials and steps, on a draw apart.

The draw has the study's hierarchy, its own seed, and an n and noise variance out of those of the study. A representation is
judged by the RMSE of ridge regression on its scores, supervised training by that of its own prediction, both on fresh rows.
Trials of a method share one compiled program. The choice is written into hcl_jax/experiments/searched.py by hand, and a test
compares it with the table.

    python simulations/search.py                                # ten methods, 8 trials each: half an hour
    python simulations/search.py --methods convirt --trials 2   # a minute
    python simulations/search.py --output docs/tables/search.csv
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import polars as pl
from tqdm import tqdm

from hcl_jax.experiments import OutputError, configure
from hcl_jax.experiments.command_line import error_line, make_hierarchy, parse
from hcl_jax.experiments.downstream import Downstream, DownstreamCell, DrawSpec, draw, network_outcome, unlabelled_rows
from hcl_jax.experiments.searched import SPACES, searched_name, study_config, trial_numbers, with_numbers
from hcl_jax.experiments.store import write_bytes
from hcl_jax.networks import NETWORKS
from hcl_jax.structure import NON_FINITE

PROGRAM = "search.py"
REGRESSIONS = {"none": "ridge", "joint": "own"}


@dataclass(frozen=True)
class Study:
    """Search every network's numbers on one draw."""

    dims: tuple[int, ...] = (100, 100, 100)
    """Features of each view."""
    rank: int = 5
    """Rank of each structure."""
    n: int = 2000
    """Rows that representations are fitted to."""
    m: int = 10_000
    """Labelled rows, for the regressions."""
    noise_variance: float = 1.0
    """Noise variance of the features."""
    trials: int = 8
    """Trials of each method and each kind of training: the defaults, and random numbers about them."""
    methods: tuple[str, ...] = tuple(SPACES)
    """Networks."""
    supervision: tuple[str, ...] = tuple(REGRESSIONS)
    """none: representations; joint: training with the response."""
    seed: int = 1_000_003
    """Of the draw and the trials: not the seed of a study."""
    output: Path = Path("results/search.csv")
    """The table: one row a trial, added to what is there."""


def check(study: Study) -> None:
    """Raise `ValueError` that names the argument."""
    for name, known in (("methods", SPACES), ("supervision", REGRESSIONS)):
        if unknown := [held for held in getattr(study, name) if held not in known]:
            raise ValueError(f"{name}: unknown {unknown[0]!r}; expected one of {', '.join(known)}")
    if study.trials < 1:
        raise ValueError(f"trials: is {study.trials}; expected at least 1")


def run(study: Study) -> pl.DataFrame:
    """One row a trial; those that the table holds are not computed again."""
    hierarchy = make_hierarchy(study.dims, study.rank, ())
    cell = DownstreamCell(hierarchy, study.n, study.m, study.noise_variance, 0.1, (), "identity")
    spec, shared = DrawSpec.of(cell, "float32"), Downstream().shared_arguments(cell, study.seed, "float32")
    drawn = jax.jit(partial(draw, spec))(shared, np.uint32(0))
    views, y = jax.jit(lambda drawn: unlabelled_rows(drawn, study.n))(drawn)
    judge = {name: jax.jit(partial(network_outcome, regression, study.m)) for name, regression in REGRESSIONS.items()}
    table = pl.read_csv(study.output) if study.output.exists() else pl.DataFrame()
    held = set(table.select("method", "supervision", "trial").iter_rows()) if len(table) else set()
    asked = [(name, kind, t) for name in study.methods for kind in study.supervision for t in range(study.trials)]
    for name, kind, trial in tqdm([item for item in asked if item not in held], unit="trial", disable=None):
        numbers = trial_numbers(name, kind, trial, study.seed)
        config = with_numbers(study_config(name, kind, chosen=False), numbers)
        start = time.perf_counter()
        fitted = NETWORKS[name](views, hierarchy, config=config, y=None if kind == "none" else y, key=jr.key(study.seed))
        status, seconds = int(fitted.status), time.perf_counter() - start
        rmse = float("inf") if status == NON_FINITE else float(judge[kind](fitted, drawn)["rmse"])
        row = {"method": name, "supervision": kind, "trial": trial, "rmse": rmse, "status": status, "steps": int(fitted.steps)}
        row |= {"seconds": round(seconds, 1), "numbers": json.dumps(numbers)}
        table = pl.concat([table, pl.DataFrame([row])]) if len(table) else pl.DataFrame([row])
        write_bytes(study.output, table.write_csv().encode(), study.output.parent)
    return table


def best(table: pl.DataFrame) -> pl.DataFrame:
    """The trial of least error, of each method and kind of training, beside that of the defaults."""
    group = ["method", "supervision"]
    default = table.filter(pl.col("trial") == 0).select(*group, pl.col("rmse").alias("default"))
    return table.sort("rmse").group_by(group, maintain_order=True).first().join(default, on=group, how="left").sort(group)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        study = parse(Study, sys.argv[1:] if arguments is None else list(arguments), Study(), PROGRAM, __doc__)
        check(study)
        configure("float32")
        table = run(study)
    except (ValueError, OutputError) as error:
        print(f"{PROGRAM}: error: {error_line(Study, error)}", file=sys.stderr)
        return 2
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=130, fmt_str_lengths=200, tbl_hide_dataframe_shape=True):
        print(best(table).select("method", "supervision", "trial", "rmse", "default", "steps"))
    for row in best(table).iter_rows(named=True):
        print(f'    "{searched_name(row["method"], row["supervision"])}": {json.dumps(json.loads(row["numbers"]))},')
    return 0


if __name__ == "__main__":
    sys.exit(main())
