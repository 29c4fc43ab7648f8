"""Figures of the recovery study: errors against n, beside the limit, from the tables of a sweep. Nothing is fitted here.

    python figures/recovery.py results/recovery

draws figures/out/recovery.{pdf,png} (global errors), recovery_over_limit, recovery_structures_* and recovery_blocks_* for
each setting, recovery_two_to_infinity, and, where other hierarchies than the true one were fitted, recovery_wrong_hierarchies.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import polars as pl
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curves import (
    SETTING,
    annotate,
    draw_curves,
    error_curves,
    legend_above,
    oracle_note,
    over_limit,
    setting_slug,
    setting_title,
    settings,
    shared_legend,
)
from hcl_jax.experiments import FITTED, read_results
from style import LIMIT, METRICS, PRINT, Destination, log_errors, method_style, ordered, panels, run_script, save_all

CUT = 1.6  # times the limit
VARIANTS = {
    "true": "true",
    "missing": "one\nmissing",
    "extra": "one\nextra",
    "low": "ranks\n−2",
    "high": "ranks\n+2",
    "merged": "1, 2\nmerged",
}


@mpl.rc_context(PRINT)
def fig_global_errors(table: pl.DataFrame, metrics: tuple[str, ...] = ("gram_frobenius", "procrustes_frobenius")) -> Figure:
    """Global errors against n: a row a metric, a column a setting, with fitted slopes in the legends."""
    groups = settings(table.filter(pl.col("fitted") == "true"))
    figure, axes = panels(len(metrics), len(groups), 4.6, 3.6)
    for row, metric in zip(axes, metrics, strict=True):
        for panel, (setting, group) in zip(row, groups, strict=True):
            draw_curves(panel, error_curves(group.filter(pl.col("metric") == metric)), slopes=True)
            panel.set(title=setting_title(setting), xlabel="samples n", ylabel=METRICS.get(metric, metric))
            heading = "method, slope ± standard error"
            panel.legend(title=heading, title_fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    annotate(figure, table)
    return figure


@mpl.rc_context(PRINT)
def fig_over_limit(table: pl.DataFrame, metrics: tuple[str, ...] = ("gram_frobenius", "procrustes_frobenius")) -> Figure:
    """Global errors over the limit of the same draws against n, root mean squares both: what is left to gain. Cut at `CUT`."""
    groups = settings(table.filter(pl.col("fitted") == "true"))
    figure, axes = panels(len(metrics), len(groups), 3.5, 2.6)
    for row, metric in zip(axes, metrics, strict=True):
        for panel, (setting, group) in zip(row, groups, strict=True):
            draw_curves(panel, over_limit(group.filter(pl.col("metric") == metric)))
            style = method_style(LIMIT)
            panel.axhline(1, color=style.colour, linestyle=style.line, label=style.label)
            low, high = panel.get_ylim()
            panel.set_ylim(low, min(high, CUT))
            label = METRICS.get(metric, metric)
            panel.set(title=setting_title(setting), xlabel="samples n", ylabel=f"{label}  over the limit", yscale="linear")
    legend_above(figure, axes[0][0])
    annotate(figure, table, f" The axes end at {CUT}: curves that are not seen lie above it.")
    return figure


@mpl.rc_context(PRINT)
def fig_structures(table: pl.DataFrame, metric: str = "structure_gram_frobenius") -> Figure:
    """The error of each structure against n, in one setting."""
    ((setting, group),) = settings(table)
    structures = setting["structures"].split(",")
    columns = min(4, len(structures) + 1)
    figure, axes = panels(math.ceil((len(structures) + 1) / columns), columns, 1.9, 1.8)
    flat = [panel for row in axes for panel in row]
    curves = error_curves(group.filter(pl.col("metric") == metric), by=("structure", "n"))
    for panel, structure in zip(flat, structures, strict=False):
        draw_curves(panel, curves.filter(pl.col("structure") == structure))
        panel.set(title=f"structure {structure}", xlabel="samples n")
    for spare in flat[len(structures) :]:
        spare.set_axis_off()
    shared_legend(flat[len(structures)], flat[0])
    return _finish(figure, group, setting, metric)


@mpl.rc_context(PRINT)
def fig_blocks(table: pl.DataFrame, metric: str = "block_gram_frobenius") -> Figure:
    """The error of each non-zero block against n, in one setting: a row a modality, a column a structure that it sees."""
    ((setting, group),) = settings(table)
    rows = _structures_by_modality(setting)
    figure, axes = panels(len(rows), max(map(len, rows)) + 1, 1.7, 1.7)
    curves = error_curves(group.filter(pl.col("metric") == metric), by=("modality", "structure", "n"))
    for m, (row, structures) in enumerate(zip(axes, rows, strict=True), start=1):
        for panel, structure in zip(row, structures, strict=False):
            draw_curves(panel, curves.filter((pl.col("modality") == m) & (pl.col("structure") == structure)))
            panel.set(title=f"structure {structure}, modality {m}", xlabel="samples n" if m == len(rows) else "")
        for spare in row[len(structures) :]:
            spare.set_axis_off()
    shared_legend(axes[0][-1], axes[0][0])
    return _finish(figure, group, setting, metric)


def _structures_by_modality(setting: dict) -> list[list[str]]:
    structures = {name: name.split(".") if "." in name else list(name) for name in setting["structures"].split(",")}
    n_modalities = setting["dims"].count("x") + 1
    return [[name for name, members in structures.items() if str(m) in members] for m in range(1, n_modalities + 1)]


def _finish(figure: Figure, table: pl.DataFrame, setting: dict, metric: str) -> Figure:
    figure.suptitle(setting_title(setting), fontsize=9)
    figure.supylabel(METRICS.get(metric, metric), fontsize=8)
    annotate(figure, table, oracle_note(table))
    return figure


@mpl.rc_context(PRINT)
def fig_two_to_infinity(table: pl.DataFrame) -> Figure:
    """Is the error spread over the entries? Two-to-infinity over Frobenius error, in units of √(log d/d), against n.

    Near 1: spread, as for incoherent loadings. The largest possible value, √(d/log d), is one row that holds all the error.
    """
    groups = settings(table.filter(pl.col("fitted") == "true"))
    figure, axes = panels(1, len(groups), 3.5, 3.6)
    for panel, (setting, group) in zip(axes[0], groups, strict=True):
        d = sum(map(int, setting["dims"].split("x")))
        draw_curves(panel, error_curves(_spread_ratio(group, math.sqrt(d / math.log(d)))))
        panel.axhline(1, color="black", linewidth=0.6, linestyle=":")
        panel.set(title=setting_title(setting), xlabel="samples n", yscale="linear")
        panel.set_ylabel(r"$\|\hat\Lambda O - \Lambda\|_{2\to\infty} \,/\, \|\hat\Lambda O - \Lambda\|_F \times \sqrt{d/\log d}$")
        panel.set_ylim(bottom=0)
    legend_above(figure, axes[0][0])
    annotate(figure, table)
    return figure


def _spread_ratio(table: pl.DataFrame, scale: float) -> pl.DataFrame:
    """Rows whose value is the ratio of the two norms of one replicate's error, times `scale`."""
    keys = ["n", "method", "replicate"]
    entries, frobenius = (table.filter(pl.col("metric") == f"procrustes_{norm}") for norm in ("two_to_infinity", "frobenius"))
    paired = entries.join(frobenius.select(*keys, pl.col("value").alias("size")), on=keys, maintain_order="left")
    return paired.with_columns((scale * pl.col("value") / pl.col("size")).alias("value"))


@mpl.rc_context(PRINT)
def fig_wrong_hierarchies(table: pl.DataFrame, metric: str = "gram_frobenius") -> Figure:
    """Each method's error when the hierarchy that is fitted is not the true one; a panel a truth and n."""
    truth = [name for name in SETTING if name != "fitted"]
    rows = table.filter(pl.col("metric") == metric)
    groups = [(key, g) for key, g in rows.group_by(*truth, "n", maintain_order=True) if g["fitted"].n_unique() > 1]
    columns = min(2, len(groups))
    figure, axes = panels(math.ceil(len(groups) / columns), columns, 4.4, 2.7)
    flat = [panel for row in axes for panel in row]
    for panel, (key, group) in zip(flat, groups, strict=False):
        setting = dict(zip(truth, key, strict=False)) | {"fitted": "true"}
        _draw_variants(panel, error_curves(group, by=("fitted",)))
        panel.set(
            title=f"{setting_title(setting)}\nn = {key[-1]:,}", xlabel="hierarchy fitted", ylabel=METRICS.get(metric, metric)
        )
    for spare in flat[len(groups) :]:
        spare.set_axis_off()
    legend_above(figure, flat[0])
    annotate(figure, rows)
    return figure


def _draw_variants(axes: Axes, curves: pl.DataFrame) -> None:
    """Variants side by side, the methods next to each other within each."""
    variants = [name for name in FITTED if name in curves["fitted"]]
    methods = [name for name in ordered(curves["method"]) if name != LIMIT]
    for offset, method in zip(np.linspace(-0.3, 0.3, len(methods)) if len(methods) > 1 else (0.0,), methods, strict=True):
        curve, style = curves.filter(pl.col("method") == method), method_style(method)
        x = np.array([variants.index(name) for name in curve["fitted"]]) + offset
        sem = curve["sem"].fill_null(0).to_numpy()
        axes.errorbar(x, curve["mean"].to_numpy(), sem, color=style.colour, marker=style.marker, linestyle="", label=style.label)
    limit = curves.filter((pl.col("method") == LIMIT) & (pl.col("fitted") == "true"))
    if len(limit):
        style = method_style(LIMIT)
        axes.axhline(limit["mean"].item(), color=style.colour, linestyle=style.line, label=style.label)
    log_errors(axes)
    axes.set_xticks(range(len(variants)), [VARIANTS[name] for name in variants])


def figures(table: pl.DataFrame, metrics: tuple[str, ...]) -> Iterator[tuple[str, Figure]]:
    """Every figure that the table holds the data for, with its name."""
    held = table.filter(pl.col("method") != "detection")
    yield "recovery", fig_global_errors(held, metrics)
    if LIMIT in held["method"]:
        yield "recovery_over_limit", fig_over_limit(held, metrics)
    if {"procrustes_two_to_infinity", "procrustes_frobenius"} <= set(held["metric"]):
        yield "recovery_two_to_infinity", fig_two_to_infinity(held)
    for setting, group in settings(held.filter(pl.col("fitted") == "true")):
        yield f"recovery_structures_{setting_slug(setting)}", fig_structures(group)
        yield f"recovery_blocks_{setting_slug(setting)}", fig_blocks(group)
    if held["fitted"].n_unique() > 1:
        yield "recovery_wrong_hierarchies", fig_wrong_hierarchies(held)


@dataclass(frozen=True)
class Arguments(Destination):
    """Draw the figures of a recovery study."""

    output: Annotated[Path, tyro.conf.Positional]
    """Folder that the study has written."""
    metrics: tuple[str, ...] = ("gram_frobenius", "procrustes_frobenius")
    """Global errors to draw, a row of panels each."""


def check_metrics(table: pl.DataFrame, metrics: tuple[str, ...]) -> None:
    """Raise `ValueError` unless the table holds every metric as a global one."""
    known = table.filter((pl.col("structure") == "") & (pl.col("method") != "detection"))["metric"].unique(maintain_order=True)
    for metric in metrics:
        if metric not in known:
            raise ValueError(f"--metrics: unknown {metric!r}; expected some of {', '.join(known)}")


def main(arguments: Arguments) -> None:
    table = read_results(arguments.output)
    check_metrics(table, arguments.metrics)
    save_all(figures(table, arguments.metrics), arguments)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
