"""The table that ends a study: mean ± Monte Carlo standard error by method and n, beside the limit."""

from collections.abc import Sequence

import polars as pl

from hcl_jax.experiments.experiment import AnyCell
from hcl_jax.experiments.tidy import RESULT_COLUMNS

LIMITS_SHOWN = {"cramer-rao": "root_mean_square", "bayes": "mean"}
"""How a limit is averaged: the square of an error is what the Cramér–Rao bound bounds."""
_NOT_SETTING = {"study", "cell", "n", "rank", *RESULT_COLUMNS}
_DEFAULTS = {"latent": "gaussian", "sampling": "wishart", "loadings": "", "fitted": "true", "support": ""}
_SUMMARY_COLUMNS = ("mean", "sem", "limit", "ratio", "replicates", "non_finite", "out_of_steps", "projected")


def _setting(table: pl.DataFrame) -> list[str]:
    """The columns that tell settings apart."""
    return [name for name in table.columns if name not in _NOT_SETTING and name not in _SUMMARY_COLUMNS]


def summarise(table: pl.DataFrame, metric: str = "gram_frobenius") -> pl.DataFrame:
    """One row a setting, method and n: `mean` and its standard error `sem` over the replicates with a finite value, the `limit`
    (root mean square over the same draws), their `ratio`, and how many replicates were `non_finite` or `out_of_steps`.

    A metric by structure or block is first averaged within the replicate.
    """
    rows, setting = table.filter(pl.col("metric") == metric), _setting(table)
    by_replicate = rows.group_by(*setting, "n", "method", "replicate", maintain_order=True).agg(
        pl.col("value").mean(), (pl.col("value") ** 2).mean().alias("square"), pl.col("status").first()
    )
    finite = pl.col("value").is_finite()
    summary = by_replicate.group_by(*setting, "n", "method", maintain_order=True).agg(
        pl.col("value").filter(finite).mean().alias("mean"),
        (pl.col("value").filter(finite).std() / finite.sum().sqrt()).alias("sem"),
        pl.col("square").filter(finite).mean().sqrt().alias("root_mean_square"),
        pl.len().alias("replicates"),
        (pl.col("status") == 2).sum().alias("non_finite"),
        (pl.col("status") == 1).sum().alias("out_of_steps"),
        (pl.col("status") == 3).sum().alias("projected"),
    )
    squared = pl.col("method").replace_strict(LIMITS_SHOWN, default="") == "root_mean_square"
    limit = pl.when(squared).then("root_mean_square").otherwise("mean").alias("limit")
    limits = summary.filter(pl.col("method").is_in(list(LIMITS_SHOWN))).select(*setting, "n", limit)
    joined = summary.join(limits, on=[*setting, "n"], how="left", maintain_order="left")
    return joined.with_columns((pl.col("mean") / pl.col("limit")).alias("ratio")).drop("root_mean_square")


def select_results(table: pl.DataFrame, cells: Sequence[AnyCell], methods: tuple[str, ...], replicates: int) -> pl.DataFrame:
    """What a study asked for, of everything that its folder holds; methods in the study's order."""
    names = [cell.name for cell in cells]
    asked = pl.col("cell").is_in(names) & pl.col("method").is_in(methods) & (pl.col("replicate") < replicates)
    return table.filter(asked).sort(
        pl.col("cell").replace_strict(names, range(len(names)), default=-1),
        pl.col("method").replace_strict(methods, range(len(methods)), default=-1),
        "replicate",
        maintain_order=True,
    )


def format_summary(summary: pl.DataFrame, metric: str) -> str:
    """The summary as text, one table a setting."""
    blocks = []
    for _, group in summary.group_by(*_setting(summary), maintain_order=True):
        blocks.append("\n".join([_title(group, metric), *_lines(group), *_failures(group)]))
    return "\n\n".join(blocks) or f"no results for {metric}"


def _title(group: pl.DataFrame, metric: str) -> str:
    row = group.row(0, named=True)
    ranks = "+".join(f"{s}:{r}" for s, r in zip(row["structures"].split(","), row["ranks"].split(","), strict=True))
    parts = [f"dims {row['dims']}", f"ranks {ranks}", f"noise variance {row['noise_variance']:g}"]
    told = ("dims", "structures", "ranks", "noise_variance")
    others = [name for name in _setting(group) if name not in told and row[name] != _DEFAULTS.get(name)]
    parts += [f"{name.replace('_', ' ')} {row[name]}" for name in others]
    return f"{metric}, mean ± standard error (ratio to the limit); {', '.join(parts)}"


def _lines(group: pl.DataFrame) -> list[str]:
    sizes = group["n"].unique().sort().to_list()
    all_methods = group["method"].unique(maintain_order=True).to_list()
    methods = [m for m in all_methods if m not in LIMITS_SHOWN]
    cells = {(row["method"], row["n"]): row for row in group.iter_rows(named=True)}
    width = max(6, *map(len, all_methods))
    lines = [f"{'method':{width}}" + "".join(f"{'n = ' + str(n):>28}" for n in sizes)]
    lines += [f"{m:{width}}" + "".join(f"{_entry(cells.get((m, n))):>28}" for n in sizes) for m in methods]
    for limit in (m for m in all_methods if m in LIMITS_SHOWN):
        entries = [cells.get((limit, n)) for n in sizes]
        lines.append(f"{limit:{width}}" + "".join(f"{'' if e is None else _number(e['limit']):>28}" for e in entries))
    return lines


def _entry(row: dict | None) -> str:
    if row is None or row["mean"] is None:
        return "" if row is None else "no finite value"
    ratio = f" ({row['ratio']:.3f})" if row["ratio"] is not None else ""
    sem = _number(row["sem"]) if row["sem"] is not None else "?"
    return f"{_number(row['mean'])} ± {sem}{ratio}"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _failures(group: pl.DataFrame) -> list[str]:
    kinds = {"non_finite": "non-finite", "out_of_steps": "out of steps", "projected": "with an indefinite moment, projected"}
    totals = group.group_by("method", maintain_order=True).agg(pl.col("replicates", *kinds).sum())
    return [
        f"{row['method']}: of {row['replicates']} replicates "
        + ", ".join(f"{row[kind]} {name}" for kind, name in kinds.items() if kind != "projected" or row[kind])
        for row in totals.iter_rows(named=True)
        if any(row[kind] for kind in kinds)
    ]
