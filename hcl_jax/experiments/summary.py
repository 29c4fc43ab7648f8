"""The table that ends a study: mean ± Monte Carlo standard error by method and n, and its ratio to the limit."""

from collections.abc import Sequence

import polars as pl

from hcl_jax.experiments.cell import number_name
from hcl_jax.experiments.experiment import AnyCell
from hcl_jax.experiments.ratios import LIMITS_SHOWN, averages, by_replicate, entries_together, over_limit
from hcl_jax.experiments.tidy import RESULT_COLUMNS
from hcl_jax.structure import NON_FINITE, ON_BOUND, OUT_OF_STEPS, PREDICTION_STATUS_WORDS, STATUS_WORDS

_NOT_SETTING = {"study", "cell", "n", "rank", *RESULT_COLUMNS}
_DEFAULTS = {
    "latent": "gaussian",
    "sampling": "wishart",
    "loadings": "",
    "fitted": "true",
    "support": "",
    "label": "",
    "strength": 1.0,
}
_FAILURES = {"non_finite": NON_FINITE, "out_of_steps": OUT_OF_STEPS, "projected": ON_BOUND}  # columns of tables on disk
_SUMMARY_COLUMNS = ("mean", "sem", "rms", "limit", "ratio", "ratio_sem", "replicates", *_FAILURES)


def _setting(table: pl.DataFrame) -> list[str]:
    """The columns that tell settings apart."""
    return [name for name in table.columns if name not in _NOT_SETTING and name not in _SUMMARY_COLUMNS]


def summarise(table: pl.DataFrame, metric: str = "gram_frobenius") -> pl.DataFrame:
    """One row a setting, method and n: `mean` and its standard error `sem` over the replicates with a finite value, their root
    mean square `rms`, that of the `limit` on the same draws, the `ratio` of the two and its standard error `ratio_sem` (all by
    `experiments.ratios`), and how many replicates were `non_finite`, `out_of_steps` or `projected` (status
    `ON_BOUND`).

    A metric by structure or block is first made one number a replicate: errors by the root of their sum of squares, counts and
    shares by their average.
    """
    by = (*_setting(table), "n")
    replicates = by_replicate(table.filter(pl.col("metric") == metric), by)
    counts = [(pl.col("status") == status).sum().alias(name) for name, status in _FAILURES.items()]
    summary, keys = averages(replicates, by).drop("rms_sem"), [*by, "method"]
    for more in (
        replicates.group_by(keys, maintain_order=True).agg(pl.len().alias("replicates"), *counts),
        over_limit(replicates, by),
    ):
        summary = summary.join(more, on=keys, how="left", maintain_order="left")
    return summary


def status_words(table: pl.DataFrame) -> dict[int, str]:
    """Of the statuses in a study's table: only predictions have labelled rows, m."""
    return PREDICTION_STATUS_WORDS if "m" in table.columns else STATUS_WORDS


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
    parts = [f"dims {row['dims']}", f"ranks {ranks}", f"noise variance {number_name(row['noise_variance'])}"]
    told = ("dims", "structures", "ranks", "noise_variance")
    others = [name for name in _setting(group) if name not in told and row[name] != _DEFAULTS.get(name)]
    parts += [f"{name.replace('_', ' ')} {row[name]}" for name in others]
    shown = ", ".join(filter(None, [metric, entries_together(metric), "mean ± standard error"]))
    return f"{shown} (root mean square over that of the limit); {', '.join(parts)}"


def _lines(group: pl.DataFrame) -> list[str]:
    sizes = group["n"].unique().sort().to_list()
    all_methods = group["method"].unique(maintain_order=True).to_list()
    methods = [m for m in all_methods if m not in LIMITS_SHOWN]
    cells = {(row["method"], row["n"]): row for row in group.iter_rows(named=True)}
    width = max(6, *map(len, all_methods))
    lines = [f"{'method':{width}}" + "".join(f"{'n = ' + str(n):>28}" for n in sizes)]
    lines += [f"{m:{width}}" + "".join(f"{_entry(cells.get((m, n))):>28}" for n in sizes) for m in methods]
    for limit in (m for m in all_methods if m in LIMITS_SHOWN):
        lines.append(f"{limit:{width}}" + "".join(f"{_limit_entry(cells.get((limit, n))):>28}" for n in sizes))
    return lines


def _entry(row: dict | None) -> str:
    if row is None or row["mean"] is None:
        return "" if row is None else "no finite value"
    ratio = f" ({row['ratio']:.3f})" if row["ratio"] is not None else ""
    sem = _number(row["sem"]) if row["sem"] is not None else "?"
    return f"{_number(row['mean'])} ± {sem}{ratio}"


def _limit_entry(row: dict | None) -> str:
    """What ratios are to, or the mean where there are none."""
    if row is None or row["mean"] is None:
        return ""
    return _number(row["mean"] if row["ratio"] is None else row["rms"])


def _number(value: float) -> str:
    return f"{value:.4g}"


def _failures(group: pl.DataFrame) -> list[str]:
    words = status_words(group)
    totals = group.group_by("method", maintain_order=True).agg(pl.col("replicates", *_FAILURES).sum())
    return [
        f"{row['method']}: of {row['replicates']} replicates "
        + ", ".join(f"{row[kind]} {words[code]}" for kind, code in _FAILURES.items() if code != ON_BOUND or row[kind])
        for row in totals.iter_rows(named=True)
        if any(row[kind] for kind in _FAILURES)
    ]
