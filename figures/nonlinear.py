"""Figures of the nonlinear study: R² of the true factors by level of sharing, and leak, against n, from the tables of a sweep.

    python figures/nonlinear.py results/nonlinear

draws figures/out/nonlinear_recovery.{pdf,png}, or nonlinear_links where each link was run at one n. Several folders may be given.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import polars as pl
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curves import annotate, error_curves, legend_above, setting_title, settings
from hcl_jax.experiments import read_results
from hcl_jax.experiments.methods import check_known
from style import METRICS, PRINT, Destination, method_style, ordered, panels, run_script, save_all, size_axis

NONLINEAR_SETTING = ("dims", "structures", "ranks", "noise_variance", "link", "latent", "told")
LEVELS = {"shared by all": "shared by all views", "shared by some": "shared by some views", "private": "private"}


def with_levels(table: pl.DataFrame) -> pl.DataFrame:
    """The rows of R², with how many views share the structure; mean over the structures of a level."""
    views = pl.col("dims").str.count_matches("x") + 1
    members = pl.col("structure").str.len_chars()
    level = pl.when(members == 1).then(pl.lit("private")).when(members == views).then(pl.lit("shared by all"))
    rows = table.filter(pl.col("metric") == "r_squared").with_columns(level.otherwise(pl.lit("shared by some")).alias("level"))
    by = [name for name in rows.columns if name not in ("structure", "value", "modality")]
    return rows.group_by(by, maintain_order=True).agg(pl.col("value").mean(), structure=pl.lit(""), modality=pl.lit(0))


@mpl.rc_context(PRINT)
def fig_recovery(table: pl.DataFrame) -> Figure:
    """A row a link, a column a level of sharing, and one of the leak."""
    groups = settings(table, NONLINEAR_SETTING)
    figure, axes = panels(len(groups), len(LEVELS) + 1, 2.6, 2.3)
    for row, (setting, group) in zip(axes, groups, strict=True):
        levels = with_levels(group)
        for panel, (level, title) in zip(row, LEVELS.items(), strict=False):
            draw_linear(panel, error_curves(levels.filter(pl.col("level") == level), average="mean"))
            panel.set(title=title, ylabel=METRICS["r_squared"], xlabel="rows, n")
        leak = group.filter(pl.col("metric") == "leak")
        draw_linear(row[-1], error_curves(leak, average="mean"))
        row[-1].set(title="of another structure's factors", ylabel="largest $R^2$", xlabel="rows, n")
        row[0].set_title("")
        row[0].set_title(f"{setting_title(setting)}\n{LEVELS['shared by all']}", loc="left")
    legend_above(figure, axes[0][0])
    annotate(figure, table, average="Mean")
    return figure


@mpl.rc_context(PRINT)
def fig_links(table: pl.DataFrame) -> Figure:
    """Every link at one n: a panel a level of sharing, methods side by side."""
    levels = with_levels(table)
    links, methods = table["link"].unique(maintain_order=True).to_list(), ordered(table["method"])
    figure, axes = panels(len(LEVELS), 1, 6.5, 1.9)
    for (panel,), (level, title) in zip(axes, LEVELS.items(), strict=True):
        curves = error_curves(levels.filter(pl.col("level") == level), by=("link",), average="mean")
        for i, method in enumerate(methods):
            own, style = curves.filter(pl.col("method") == method), method_style(method)
            places = [links.index(link) + (i - (len(methods) - 1) / 2) * 0.8 / len(methods) for link in own["link"]]
            panel.errorbar(
                places,
                own["mean"].to_numpy(),
                yerr=own["sem"].fill_null(0).to_numpy(),
                label=style.label,
                color=style.colour,
                marker=style.marker or "_",
                linestyle="",
            )
        panel.set(title=title, ylabel=METRICS["r_squared"], ylim=(None, 1.02))
        panel.set_xticks(range(len(links)), links)
    legend_above(figure, axes[0][0])
    annotate(figure, table, average="Mean")
    return figure


def draw_linear(axes: Axes, curves: pl.DataFrame) -> None:
    """One line a method with its error bars, R² on a linear axis against n."""
    for method in ordered(curves["method"]):
        curve, style = curves.filter(pl.col("method") == method).sort("n"), method_style(method)
        axes.errorbar(
            curve["n"].to_numpy(),
            curve["mean"].to_numpy(),
            yerr=curve["sem"].fill_null(0).to_numpy(),
            label=style.label,
            color=style.colour,
            marker=style.marker,
            linestyle=style.line,
        )
    size_axis(axes, curves["n"].to_list())


@dataclass(frozen=True)
class Arguments(Destination):
    """Draw the figures of the nonlinear study."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that simulations/nonlinear.py has written; their rows are put together."""
    methods: tuple[str, ...] = ()
    """Methods to draw. Default: all."""


def figures(table: pl.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Every figure that the table can be drawn as, by name."""
    sizes = pl.col("n").n_unique().over("link", "told", "latent")
    against, single = table.filter(sizes > 1), table.filter(sizes == 1)
    if len(against):
        yield "nonlinear_recovery", fig_recovery(against)
    if len(single) and single["told"].n_unique() == 1:
        yield "nonlinear_links", fig_links(single)


def main(arguments: Arguments) -> None:
    """Draw and save, and say where."""
    table = pl.concat([read_results(folder) for folder in arguments.results]).unique(
        ["cell", "method", "metric", "structure", "modality", "replicate"], keep="first", maintain_order=True
    )
    if arguments.methods:
        check_known(arguments.methods, table["method"].unique(maintain_order=True))
        table = table.filter(pl.col("method").is_in(arguments.methods))
    save_all(figures(table), arguments)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
