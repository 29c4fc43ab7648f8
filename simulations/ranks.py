"""Does `hcl-vb` find the ranks and structures when it is given more than there are?

Truths have some of the structures of three modalities; the fit is given the full lattice with a higher rank. A run is exact
when the columns that the posterior supports make up the true structures with the true ranks. Noise may differ by view, and the
fit may know that or not (`--fit-noise`). Beside the rates stands the signal strength: how many of the K true eigenvalues exceed
the detection threshold of a method that ignores the zero pattern.

    python simulations/ranks.py
    python simulations/ranks.py --noise-variance 0.1 1 --n-grid 5000 --replicates 4
    python simulations/ranks.py --dims 60 40 80 --noise-ratios 0.2 1 3 --noise-variance 1 --n-grid 1000 \\
        --structures 123 12 1 --rank 2 --fitted-rank 3 --normal-loadings
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import polars as pl
from jaxtyping import Array
from tqdm import tqdm

from hcl_jax import LIMITS, Hierarchy, Truth, sample_loadings, sample_wishart_covariance
from hcl_jax.compiled import compiler_options
from hcl_jax.estimators.variational import fit_posterior
from hcl_jax.experiments.command_line import run_table
from hcl_jax.fisher import check_noise, spread
from hcl_jax.model import sample_normal_loadings
from hcl_jax.selection import evidence, found_columns
from hcl_jax.structure import as_structure, structure_name


@dataclass(frozen=True)
class Study:
    """Rates at which hcl-vb finds the true ranks and structures."""

    dims: tuple[int, int, int] = (100, 100, 100)
    """Features of each modality."""
    rank: int = 5
    """True rank of the true structures."""
    structures: tuple[str, ...] = ("123", "12", "13", "1", "2", "3")
    """True structures."""
    fitted_rank: int = 7
    """Rank that the fit is given for each of all seven structures."""
    noise_variance: tuple[float, ...] = (0.1, 1.0, 3.0, 10.0)
    """Noise variances."""
    noise_ratios: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """Noise variance of each modality over that of its cell."""
    fit_noise: str = "view"
    """Noise variances that the fit may find: shared, view or feature."""
    normal_loadings: bool = False
    """Loadings N(0, 4/d_m) in place of those of the paper's Section 4.1, where a factor may be faint."""
    n_grid: tuple[int, ...] = (5000, 20000)
    """Numbers of samples."""
    replicates: int = 20
    """Independent draws of each cell."""
    seed: int = 0
    """Root of all random numbers."""
    output: Path = Path("results/ranks.parquet")
    """The table: one row a replicate."""


def fit_one(study: Study, truth_hierarchy: Hierarchy, fitted: Hierarchy, key: Array, n: Array, noise: Array) -> tuple:
    """(evidence, visible eigenvalues, status) of one draw."""
    k_truth, k_data = jr.split(key)
    psi = spread(noise * jnp.asarray(study.noise_ratios), truth_hierarchy, "view")
    sample = sample_normal_loadings if study.normal_loadings else sample_loadings
    truth = Truth(sample(k_truth, truth_hierarchy, jnp.float64), psi, truth_hierarchy, noise="view")
    covariance = sample_wishart_covariance(k_data, truth, n)
    posterior, estimate = fit_posterior(covariance, fitted, noise=study.fit_noise)
    odds = evidence(posterior, covariance, fitted)
    return odds, LIMITS["detection"](truth, covariance)["visible_global"], estimate.status


def row(study: Study, truth: Hierarchy, fitted: Hierarchy, program, n: int, noise: float, replicate: int) -> dict:
    """What one replicate found."""
    key = jr.fold_in(jr.fold_in(jr.key(study.seed), replicate), n)
    odds, visible, status = program(key, jnp.asarray(n, float), jnp.asarray(noise, float))
    found = {s: len(columns) for s, columns in found_columns(odds, fitted).items()}
    ranks = {f"found_{structure_name(s)}": found.get(s, 0) for s in fitted.structures}
    exact, factors = found == dict(truth.ranks), sum(found.values())
    cell = {"noise_variance": noise, "n": n, "replicate": replicate, "true_factors": truth.n_factors}
    return cell | {"visible": int(visible), "found_factors": factors, "exact": exact, "status": int(status)} | ranks


def run(study: Study) -> pl.DataFrame:
    """One row a replicate."""
    truth = Hierarchy(study.dims, dict.fromkeys(study.structures, study.rank))
    fitted = Hierarchy.full(study.dims, study.fitted_rank)
    program = jax.jit(partial(fit_one, study, truth, fitted), compiler_options=compiler_options())
    cells = [(n, noise, i) for noise in study.noise_variance for n in study.n_grid for i in range(study.replicates)]
    return pl.DataFrame([row(study, truth, fitted, program, *cell) for cell in tqdm(cells, unit="fit", disable=None)])


def check(study: Study) -> None:
    """Raise `ValueError`, naming the argument, for what cannot be drawn or fitted."""
    needed = max(sum(study.dims), 7 * study.fitted_rank) + 2
    for name, values, low in (("noise_variance", study.noise_variance, 0), ("n_grid", study.n_grid, needed)):
        for value in values:
            if not value >= low:
                raise ValueError(f"{name}: is {value}; expected at least {low}")
    for name in ("rank", "fitted_rank", "replicates"):
        if getattr(study, name) < 1:
            raise ValueError(f"{name}: is {getattr(study, name)}; expected a positive integer")
    check_noise(study.fit_noise)
    for ratio in study.noise_ratios:
        if not ratio > 0:
            raise ValueError(f"noise_ratios: holds {ratio}; expected positive numbers")
    for name in study.structures:
        as_structure(name, 3, "structures")
    study.output.parent.mkdir(parents=True, exist_ok=True)


def summarise(table: pl.DataFrame) -> pl.DataFrame:
    """Means over draws."""
    return table.group_by("noise_variance", "n", maintain_order=True).agg(
        pl.col("exact", "visible", "found_factors", "true_factors").mean(),
        pl.selectors.starts_with("found_").exclude("found_factors").mean(),
    )


def main() -> int:
    """The command line; returns the exit code."""
    return run_table("ranks.py", Study, __doc__, check=check, run=run, summary=summarise)


if __name__ == "__main__":
    sys.exit(main())
