"""How strong does a factor have to be for its structure to be found?

A truth with unequal noise gets one factor more, in a structure of its own, whose loadings are `strength` times as large as those
of the others; views are standardised, and the full lattice is offered. *Found*: the added structure has the rank that it should
have; *exact*: so have all. Beside the rates stands the share of variance that the factor has in the view where it has least.

    python simulations/power.py
    python simulations/power.py --added 1 --n-grid 300 --floor 0.002 --noise feature
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from tqdm import tqdm

from hcl_jax import Hierarchy, SampleCovariance
from hcl_jax.experiments.command_line import run_table
from hcl_jax.fisher import check_noise
from hcl_jax.selection import FLOOR, select_structures
from hcl_jax.structure import as_structure
from hcl_jax.views import standardise

DIMS = (200, 100, 40)
RANKS = {"123": 3, "12": 2, "13": 1, "1": 3, "2": 2, "3": 2}
NOISE_VARIANCES = (1.0, 0.3, 3.0)
LOADING = 0.5  # standard deviation
OFFERED = 6


@dataclass(frozen=True)
class Study:
    """Rates at which one added factor is found."""

    added: str = "23"
    """Structure of the added factor."""
    strengths: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    """Its loadings over those of the others; 0: no factor, and what is found is that there is none."""
    n_grid: tuple[int, ...] = (300, 1000, 2000)
    """Numbers of samples."""
    noise: str = "view"
    """Noise variances that the fit may find: view or feature."""
    floor: float = FLOOR
    """Share of a view's variance that a column has to explain."""
    replicates: int = 20
    """Independent draws of each cell."""
    seed: int = 0
    """Root of all random numbers."""
    output: Path = Path("results/power.parquet")
    """The table: one row a replicate."""


def draw(truth: Hierarchy, added: str, strength: float, n: int, seed: list[int]) -> tuple[list[np.ndarray], float]:
    """(standardised views, the least share of variance that the added factor has in its views): it is the last column of its
    structure."""
    rng = np.random.default_rng(seed)
    loadings = LOADING * np.where(truth.mask, rng.standard_normal(truth.mask.shape), 0)
    own = truth.columns(added).stop - 1
    loadings[:, own] *= strength
    psi = np.repeat(NOISE_VARIANCES, truth.dims)
    rows = rng.standard_normal((n, truth.n_factors)) @ loadings.T + np.sqrt(psi) * rng.standard_normal((n, truth.n_features))
    shares = loadings[:, own] ** 2 / ((loadings**2).sum(axis=1) + psi)
    least = min(shares[truth.rows(m)].mean() for m in as_structure(added, len(truth.dims)))
    views = [rows[:, truth.rows(m)] for m in truth.modalities]
    return [standardise(view, view) for view in views], float(least)


def row(study: Study, n: int, strength: float, replicate: int) -> dict:
    """What one replicate found."""
    s = as_structure(study.added, len(DIMS))
    others = Hierarchy(DIMS, RANKS)
    truth = Hierarchy(DIMS, dict(others.ranks) | {s: others.rank(s) + 1})
    views, share = draw(truth, study.added, strength, n, [study.seed, replicate, n])
    covariance = SampleCovariance.from_data(views, form="padded")
    found = select_structures(covariance, Hierarchy.full(DIMS, OFFERED), noise=study.noise, floor=study.floor)
    expected = truth if strength > 0 else others
    cell = {"n": n, "strength": strength, "replicate": replicate, "share": share, "status": found.status}
    rank = found.hierarchy.rank(s)
    return cell | {"found": rank == expected.rank(s), "exact": found.hierarchy == expected, "factors": found.hierarchy.n_factors}


def run(study: Study) -> pl.DataFrame:
    """One row a replicate."""
    cells = [(n, strength, i) for n in study.n_grid for strength in study.strengths for i in range(study.replicates)]
    return pl.DataFrame([row(study, *cell) for cell in tqdm(cells, unit="fit", disable=None)])


def check(study: Study) -> None:
    """Raise `ValueError`, naming the argument, for what cannot be drawn or fitted."""
    as_structure(study.added, len(DIMS), "added")
    check_noise(study.noise)
    for name, values, low in (("strengths", study.strengths, 0), ("n_grid", study.n_grid, 3), ("floor", (study.floor,), 0)):
        for value in values:
            if not value >= low:
                raise ValueError(f"{name}: is {value}; expected at least {low}")
    if study.replicates < 1:
        raise ValueError(f"replicates: is {study.replicates}; expected a positive integer")
    study.output.parent.mkdir(parents=True, exist_ok=True)


def summarise(table: pl.DataFrame) -> pl.DataFrame:
    """Means over draws."""
    return table.group_by("n", "strength", maintain_order=True).agg(pl.col("share", "found", "exact", "factors").mean())


def main() -> int:
    """The command line; returns the exit code."""
    return run_table("power.py", Study, __doc__, check=check, run=run, summary=summarise)


if __name__ == "__main__":
    sys.exit(main())
