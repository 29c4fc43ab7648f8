"""Figures of the downstream study: prediction and its coefficients, beside the Bayes limit, from the tables of a sweep.

    python figures/downstream.py results/downstream

draws figures/out/downstream_prediction_n.{pdf,png} (the paper's Figure 5), and, where several m were run, downstream_prediction_m
and downstream_coefficients_m (supplement S5.2) and downstream_selection. Several folders may be given, of one study each.
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

from curves import DOWNSTREAM_SETTING, annotate, draw_curves, error_curves, over_limit, setting_title, settings
from hcl_jax.experiments import read_results
from hcl_jax.experiments.methods import check_known
from style import METRICS, PRINT, Destination, method_style, ordered, panels, regression_style, run_script, save_all

AXES = {"n": "rows for the representation, n", "m": "labelled rows, m"}
BESIDE_LIMIT = {"rmse": "RMSE above the Bayes limit, %", "smape": "SMAPE above the Bayes limit, %"}
COEFFICIENT_METRICS = ("beta_error", "bayes_excess")
PREDICTION_METRICS = ("rmse", "smape", "bayes_excess")


@mpl.rc_context(PRINT)
def fig_against(table: pl.DataFrame, x: str, metrics: tuple[str, ...], slopes: bool = False) -> Figure:
    """Metrics against n or m: a row a metric, a column a setting, or all side by side for a single setting. Regressions on a
    single representation have a colour each."""
    other = "m" if x == "n" else "n"
    groups = settings(table, (*DOWNSTREAM_SETTING, other))
    representations = {method.partition("+")[0] for method in table["method"].unique()} - {"bayes", "raw"}
    style_of = regression_style if len(representations) == 1 else method_style
    shape = (1, len(metrics)) if len(groups) == 1 else (len(metrics), len(groups))
    figure, axes = panels(*shape, 3.6 if len(groups) == 1 else 4.2, 4.4 if slopes else 2.7)
    rows_of_panels = [[panel] for panel in axes[0]] if len(groups) == 1 else axes
    for row, metric in zip(rows_of_panels, metrics, strict=True):
        for panel, (setting, group) in zip(row, groups, strict=True):
            curves = curves_of(group.filter(pl.col("metric") == metric), x, metric)
            draw_curves(panel, curves, slopes=slopes, x=x, style_of=style_of)
            label = BESIDE_LIMIT.get(metric, METRICS[metric])
            panel.set(title=f"{setting_title(setting)}\n{other} = {setting[other]:,}", xlabel=AXES[x], ylabel=label)
            if slopes:
                heading = "regression, slope ± standard error"
                panel.legend(title=heading, title_fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=6)
    if not slopes:
        legend_of_all(figure, [panel for row in axes for panel in row])
    beside = (
        " Above the limit: the ratio of root mean squares over replicates, less 1." if set(metrics) & set(BESIDE_LIMIT) else ""
    )
    annotate(figure, table, beside, average="Mean")
    return figure


def curves_of(rows: pl.DataFrame, x: str, metric: str) -> pl.DataFrame:
    """RMSE and SMAPE by how many per cent they exceed the Bayes limit of the same draws: truths differ from cell to cell, and
    methods may have different numbers of replicates. Means of other metrics; without the limit itself."""
    if metric not in BESIDE_LIMIT:
        return error_curves(rows.filter(pl.col("method") != "bayes"), by=(x,), average="mean")
    above, sem = 100 * (pl.col("mean") - 1), 100 * pl.col("sem")
    return over_limit(rows, by=(x,)).with_columns(above.alias("mean"), sem.alias("sem"))


def legend_of_all(figure: Figure, axes: list[Axes]) -> None:
    """One legend above all panels, of every label that any of them has."""
    entries = {label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=int(figure.get_figwidth() / 2.2))


@mpl.rc_context(PRINT)
def fig_selection(table: pl.DataFrame) -> Figure:
    """How often each method selects each structure, at every m: a panel a method. True structures are in bold."""
    rows = table.filter((pl.col("metric") == "selected") & (pl.col("n") == table["n"].max()))
    methods = [method for method in ordered(rows["method"]) if rows.filter(pl.col("method") == method)["value"].mean() < 1]
    columns = min(3, len(methods))
    figure, axes = panels(math.ceil(len(methods) / columns), columns, 2.9, 2.2)
    flat = [panel for row in axes for panel in row]
    support = rows["support"][0].split("+")
    for panel, method in zip(flat, methods, strict=False):
        shares = rows.filter(pl.col("method") == method).group_by("structure", "m").agg(pl.col("value").mean())
        names, sizes = rows["structure"].unique(maintain_order=True).to_list(), sorted(shares["m"].unique())
        grid = np.array([[_share(shares, name, m) for m in sizes] for name in names])
        image = panel.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        panel.set_title(method_style(method).label)
        panel.set_xticks(range(len(sizes)), [f"{m:,}" for m in sizes], rotation=45)
        panel.set_yticks(range(len(names)), names)
        for label, name in zip(panel.get_yticklabels(), names, strict=True):
            label.set_fontweight("bold" if name in support else "normal")
        panel.set(xlabel=AXES["m"], ylabel="structure")
        panel.grid(visible=False)
    for spare in flat[len(methods) :]:
        spare.set_axis_off()
    figure.colorbar(image, ax=flat, shrink=0.6, label=METRICS["selected"])
    annotate(figure, rows, note=" Structures with coefficients are in bold.", average="Mean")
    return figure


def _share(shares: pl.DataFrame, structure: str, m: int) -> float:
    return float(shares.filter((pl.col("structure") == structure) & (pl.col("m") == m))["value"][0])


@dataclass(frozen=True)
class Arguments(Destination):
    """Draw the figures of the downstream study."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that simulations/downstream.py has written; their rows are put together."""
    methods: tuple[str, ...] = ()
    """Methods to draw. Default: all."""


def figures(table: pl.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Every figure that the table can be drawn as, by name."""
    by_n = table.filter(pl.col("n").n_unique().over(*DOWNSTREAM_SETTING, "m") > 1)
    by_m = table.filter(pl.col("m").n_unique().over(*DOWNSTREAM_SETTING, "n") > 1)
    if len(by_n):
        yield "downstream_prediction_n", fig_against(by_n, "n", PREDICTION_METRICS)
    if len(by_m):
        yield "downstream_prediction_m", fig_against(by_m, "m", PREDICTION_METRICS)
        if (by_m["metric"] == "beta_error").any():
            estimated = by_m.filter(~pl.col("method").is_in(["bayes", "raw+ridge"]))
            yield "downstream_coefficients_m", fig_against(estimated, "m", COEFFICIENT_METRICS, slopes=True)
            if (by_m["support"] != "").any():
                yield "downstream_selection", fig_selection(by_m.filter(pl.col("support") != ""))


def main(arguments: Arguments) -> None:
    """Draw and save, and say where."""
    table = pl.concat([read_results(folder) for folder in arguments.results]).unique(
        ["cell", "method", "metric", "structure", "modality", "replicate"], keep="first", maintain_order=True
    )
    if arguments.methods:
        check_known(arguments.methods, table["method"].unique(maintain_order=True))
        table = table.filter(pl.col("method").is_in([*arguments.methods, "bayes"]))  # errors are drawn relative to the limit
    save_all(figures(table), arguments)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
