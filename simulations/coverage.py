"""Do the 95 % intervals for entries of G and for block norms cover the truth, wherever their status says that they are valid?

Truths have the loadings of Section 4.1 of the paper, but for one structure, whose loadings are these times a factor: 1 (strong),
0.15 (weak) or 0 (absent); the fit is always offered it. The summary has, for strong, weak and absent blocks and for entries of G
within a view, across views and on the diagonal, how often each status was given, and the coverage among the valid intervals and
among those that are an upper bound only.

    python simulations/coverage.py
    python simulations/coverage.py --problems small --noise-variance 2 --n-grid 300 --methods hcl-ml
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import polars as pl
from jaxtyping import Array
from tqdm import tqdm

from hcl_jax import Hierarchy, Truth, sample_loadings, sample_wishart_covariance
from hcl_jax.experiments.command_line import run_table
from hcl_jax.experiments.methods import estimator
from hcl_jax.intervals import STATUS_TEXT, VALID, Interval, block_norm_intervals, gram_intervals
from hcl_jax.structure import Structure, as_structure, structure_name

PROBLEMS = {
    "small": Hierarchy((9, 7), {(1, 2): 2, (1,): 1, (2,): 2}),
    "large": Hierarchy((30, 20, 25), {(1, 2, 3): 2, (1, 2): 2, (1,): 2, (3,): 1}),
}
STRENGTHS = {"strong": 1.0, "weak": 0.15, "absent": 0.0}
N_ENTRIES = 60  # of G, drawn once for a problem


@dataclass(frozen=True)
class Study:
    """Coverage of confidence intervals."""

    problems: tuple[str, ...] = ("small", "large")
    """Hierarchies: small has dims (9, 7), large (30, 20, 25)."""
    strengths: tuple[str, ...] = ("strong", "weak", "absent")
    """Loadings of the structure that is varied: strong, weak or absent."""
    varied: tuple[str, ...] = ("12", "1")
    """Structures whose strength is varied, one at a time."""
    methods: tuple[str, ...] = ("hcl-ml", "hcl-vb")
    """Estimators; hcl-ml@view has one noise variance a view."""
    noise_variance: tuple[float, ...] = (0.5,)
    """Noise variances."""
    n_grid: tuple[int, ...] = (300, 2000)
    """Numbers of samples."""
    replicates: int = 400
    """Independent draws of each cell."""
    batch: int = 100
    """Draws that are computed together."""
    level: float = 0.95
    """Nominal coverage."""
    seed: int = 0
    """Root of all random numbers."""
    output: Path = Path("results/coverage.parquet")
    """The table: one row an interval."""


Blocks = list[tuple[Structure, int]]


def blocks_of(hierarchy: Hierarchy) -> Blocks:
    """Every block that is not held at zero."""
    return [(s, m) for s in hierarchy.structures for m in s]


def entries_of(hierarchy: Hierarchy, seed: int) -> np.ndarray:
    """Random entries of G, a fifth of them on the diagonal."""
    pairs = np.random.default_rng(seed).integers(0, hierarchy.n_features, (N_ENTRIES, 2))
    pairs[: N_ENTRIES // 5, 1] = pairs[: N_ENTRIES // 5, 0]
    return pairs


def draws(study: Study, hierarchy: Hierarchy, method: str) -> Callable[..., tuple]:
    """A batch of keys, n, noise variance and factors of the columns to (true entries, intervals, true norms, intervals)."""
    fit, entries, blocks = estimator(method), entries_of(hierarchy, study.seed), blocks_of(hierarchy)
    rows, columns = entries.T

    def one(key: Array, n: Array, noise: Array, factors: Array) -> tuple[Array, Interval, Array, Interval]:
        k_truth, k_data = jr.split(key)
        loadings = sample_loadings(k_truth, hierarchy, factors.dtype) * factors[None, :]
        covariance = sample_wishart_covariance(k_data, Truth(loadings, noise, hierarchy), n)
        estimate = fit(covariance, hierarchy)
        norms = jnp.stack([jnp.linalg.norm(loadings[hierarchy.rows(m), hierarchy.columns(s)]) for s, m in blocks])
        return (
            jnp.sum(loadings[rows] * loadings[columns], axis=1),
            gram_intervals(estimate, covariance, hierarchy, entries, study.level),
            norms,
            block_norm_intervals(estimate, covariance, hierarchy, blocks, study.level),
        )

    return jax.vmap(one, (0, None, None, None))  # not compiled as one: its parts are, and the entries and blocks share them


def kinds_of(hierarchy: Hierarchy, entries: np.ndarray, varied: Structure, strength: str) -> tuple[list[str], list[str]]:
    """What each entry, and each block, is in the summary."""
    view = hierarchy.modality_of_feature[entries]
    entry_kinds = np.where(view[:, 0] == view[:, 1], "G within a view", "G across views")
    entry_kinds = np.where(entries[:, 0] == entries[:, 1], "G diagonal", entry_kinds)
    return list(entry_kinds), [f"block {strength if s == varied else 'strong'}" for s, _ in blocks_of(hierarchy)]


def frame(truth: Array, interval: Interval, kinds: list[str], names: list[str]) -> pl.DataFrame:
    """One row a draw and quantity."""
    n_draws, n_quantities = truth.shape
    columns = {
        name: np.asarray(getattr(interval, name)).ravel() for name in ("estimate", "standard_error", "lower", "upper", "status")
    }
    labels = {"quantity": names * n_draws, "kind": kinds * n_draws}
    draw = {"draw": np.repeat(np.arange(n_draws), n_quantities), "truth": np.asarray(truth).ravel()}
    return pl.DataFrame(draw | labels | columns)


def settings(study: Study) -> list[dict]:
    """One dictionary a cell; a cell where all is strong stands once."""
    cells = []
    for problem in study.problems:
        for method in study.methods:
            for noise in study.noise_variance:
                for n in study.n_grid:
                    changed = [(v, s) for s in study.strengths for v in study.varied[: 1 if s == "strong" else None]]
                    for varied, strength in changed:
                        cell = {"problem": problem, "method": method, "noise_variance": noise, "n": n}
                        cells.append(cell | {"varied": varied, "strength": strength})
    return cells


def run_cell(study: Study, cell: dict, program: Callable[..., tuple], batches: tqdm) -> pl.DataFrame:
    """All draws of a cell. The draws of all methods and strengths are the same."""
    hierarchy = PROBLEMS[cell["problem"]]
    varied, entries = as_structure(cell["varied"], hierarchy.n_modalities), entries_of(hierarchy, study.seed)
    factors = np.ones(hierarchy.n_factors)
    factors[hierarchy.columns(varied)] = STRENGTHS[cell["strength"]]
    entry_kinds, block_kinds = kinds_of(hierarchy, entries, varied, cell["strength"])
    names = [f"{structure_name(s)} in {m}" for s, m in blocks_of(hierarchy)]
    parts = []
    for start in range(0, study.replicates, study.batch):
        keys = jax.vmap(lambda i: jr.fold_in(jr.key(study.seed), i))(jnp.arange(start, start + study.batch))
        gram, entry, norms, block = program(
            keys, jnp.asarray(cell["n"], float), jnp.asarray(cell["noise_variance"]), jnp.asarray(factors)
        )
        tables = (frame(gram, entry, entry_kinds, [f"{i}, {j}" for i, j in entries]), frame(norms, block, block_kinds, names))
        parts += [table.with_columns(pl.col("draw") + start) for table in tables]
        batches.update()
    return pl.concat(parts).with_columns([pl.lit(value).alias(name) for name, value in cell.items()])


def run(study: Study) -> pl.DataFrame:
    """One row an interval."""
    cells, tables, programs = settings(study), [], {}
    with tqdm(total=len(cells) * -(-study.replicates // study.batch), unit="batch", disable=None) as batches:
        for cell in cells:
            key = cell["problem"], cell["method"]
            if key not in programs:
                programs[key] = draws(study, PROBLEMS[cell["problem"]], cell["method"])
            tables.append(run_cell(study, cell, programs[key], batches))
    return pl.concat(tables)


def summarise(table: pl.DataFrame) -> pl.DataFrame:
    """By setting and kind: the share of every status, coverage and its standard error (over draws: quantities of one draw hang
    together) where the interval is valid, and coverage of the others."""
    keys = ["problem", "n", "noise_variance", "method", "varied", "strength", "kind"]
    hit = table.with_columns(
        hit=(pl.col("lower") <= pl.col("truth")) & (pl.col("truth") <= pl.col("upper")), valid=pl.col("status") == VALID
    )
    shares = hit.group_by(*keys, maintain_order=True).agg(
        [(pl.col("status") == code).mean().alias(text.split(":")[0]) for code, text in STATUS_TEXT.items()]
        + [pl.col("hit").filter(~pl.col("valid")).mean().alias("coverage of others")]
    )
    by_draw = hit.filter("valid").group_by(*keys, "draw").agg(hits=pl.col("hit").sum(), count=pl.len())
    coverage = by_draw.group_by(*keys).agg(
        (pl.col("hits").sum() / pl.col("count").sum()).alias("coverage of valid"),
        (
            (pl.col("hits") - pl.col("count") * (pl.col("hits").sum() / pl.col("count").sum())).pow(2).sum().sqrt()
            / pl.col("count").sum()
        ).alias("standard error"),
        pl.col("count").sum().alias("valid intervals"),
    )
    return shares.join(coverage, on=keys, how="left", maintain_order="left")


def check(study: Study) -> None:
    """Raise `ValueError`, naming the argument, for what cannot be drawn or fitted."""
    for name, values, known in (("problems", study.problems, PROBLEMS), ("strengths", study.strengths, STRENGTHS)):
        for value in values:
            if value not in known:
                raise ValueError(f"{name}: holds {value!r}; expected some of {', '.join(known)}")
    for method in study.methods:
        estimator(method)
    for problem in study.problems:
        hierarchy = PROBLEMS[problem]
        for value in study.varied:
            if as_structure(value, hierarchy.n_modalities, "varied") not in hierarchy.structures:
                raise ValueError(f"varied: holds {value!r}, which the problem {problem} lacks; expected some of {hierarchy}")
        for n in study.n_grid:
            if not n > hierarchy.n_features:
                raise ValueError(f"n_grid: holds {n}; expected more samples than the {hierarchy.n_features} features")
    for noise in study.noise_variance:
        if not noise > 0:
            raise ValueError(f"noise_variance: holds {noise}; expected positive numbers")
    for name in ("replicates", "batch"):
        if getattr(study, name) < 1:
            raise ValueError(f"{name}: is {getattr(study, name)}; expected a positive integer")
    if study.replicates % study.batch:
        raise ValueError(f"batch: is {study.batch}; expected a divisor of the {study.replicates} replicates")
    if not 0 < study.level < 1:
        raise ValueError(f"level: is {study.level}; expected a number between 0 and 1")
    study.output.parent.mkdir(parents=True, exist_ok=True)


def main() -> int:
    """The command line; returns the exit code."""
    return run_table("coverage.py", Study, __doc__, check=check, run=run, summary=summarise)


if __name__ == "__main__":
    sys.exit(main())
