"""Figures of the study of FactorCL: accuracy against the share of unique information, and what every part holds, from the tables
of a sweep.

    python figures/factorcl.py results/factorcl
    python figures/factorcl.py results/factorcl-targets results/factorcl-parts --csv docs/tables/factorcl.csv

draws figures/out/factorcl_shares.{pdf,png} where several shares were run, and factorcl_parts_SETTING, one a setting. Several
folders may be given. With --csv it writes every mean, by structure, and the difference from SimCLR on the same draws.
"""

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

from curves import annotate, error_curves, legend_above, settings
from hcl_jax.experiments import read_results
from hcl_jax.experiments.cell import number_name, path_name
from hcl_jax.experiments.methods import check_known
from style import METRICS, PRINT, Destination, method_style, ordered, panels, run_script, save_all

SETTING = ("design", "dims", "structures", "ranks", "noise_variance", "n", "label", "training_steps", "strength")


def title(setting: dict) -> str:
    """What a panel shows."""
    ranks = " ".join(map(":".join, zip(setting["structures"].split(","), setting["ranks"].split(","), strict=True)))
    parts = [f"{setting['design']}, dims ({setting['dims'].replace('x', ', ')}), {ranks}"]
    others = {"label": "label of", "training_steps": "steps", "strength": "strength"}
    defaults = {"label": "", "training_steps": 2000, "strength": 1.0}
    more = [f"{word} {setting[name]}" for name, word in others.items() if setting[name] != defaults[name]]
    return "\n".join([*parts, *([", ".join(more)] if more else [])])


@mpl.rc_context(PRINT)
def fig_shares(table: pl.DataFrame) -> Figure:
    """A panel a setting: accuracy of a linear probe against the share of the label that is of a single view."""
    groups = settings(table.filter(pl.col("metric") == "accuracy"), SETTING)
    figure, (axes,) = panels(1, len(groups), 3.2, 2.8)
    for panel, (setting, group) in zip(axes, groups, strict=True):
        curves = error_curves(group, by=("share",), average="mean")
        for method in ordered(curves["method"]):
            curve, style = curves.filter(pl.col("method") == method).sort("share"), method_style(method)
            panel.errorbar(
                curve["share"].to_numpy(),
                curve["mean"].to_numpy(),
                yerr=curve["sem"].fill_null(0).to_numpy(),
                label=style.label,
                color=style.colour,
                marker=style.marker,
                linestyle=style.line,
            )
        panel.set(title=title(setting), xlabel="share of unique information in the label", ylabel=METRICS["accuracy"])
    legend_above(figure, axes[0])
    annotate(figure, table, average="Mean")
    return figure


@mpl.rc_context(PRINT)
def fig_parts(table: pl.DataFrame) -> Figure:
    """A panel a method and share: a row a part, a column a structure's factors, R² in the mean; the last column the accuracy."""
    groups = sorted(settings(table, ("method", "share")), key=lambda held: place_of(held[0], table))
    columns = min(len(groups), 3)
    size = 0.55 * (1 + table["structures"].item(0).count(",") + 1)
    figure, axes = panels(-(-len(groups) // columns), columns, size + 1.0, size + 0.6)
    flat = [panel for row in axes for panel in row]
    for panel, (setting, group) in zip(flat, groups, strict=False):
        draw_parts(panel, group)
        panel.set_title(f"{method_style(setting['method']).label}\nshare {number_name(setting['share'])}")
    for panel in flat[len(groups) :]:
        panel.set_axis_off()
    annotate(figure, table, average="Mean")
    return figure


def place_of(setting: dict, table: pl.DataFrame) -> tuple[int, float]:
    """By method, in the order of every legend, then by share."""
    return ordered(table["method"]).index(setting["method"]), setting["share"]


def draw_parts(axes: Axes, table: pl.DataFrame) -> None:
    """Numbers on shades of grey: white at 0, dark at 1."""
    names = table["structures"].item(0).split(",")
    cells = np.full((len(names), len(names) + 1), np.nan)
    means = table.group_by("metric", "structure").agg(pl.col("value").mean())
    for metric, structure, value in means.iter_rows():
        if metric == "part_accuracy":
            cells[names.index(structure), -1] = value
        elif metric.removeprefix("part_") in names and structure in names:
            cells[names.index(metric.removeprefix("part_")), names.index(structure)] = value
    axes.imshow(np.clip(cells, 0, 1), cmap="Greys", vmin=0, vmax=1.4, aspect="auto")
    for (i, j), value in np.ndenumerate(cells):
        if np.isfinite(value):
            axes.text(j, i, f"{abs(value) if abs(value) < 0.005 else value:.2f}", ha="center", va="center", fontsize=6)
    axes.axvline(len(names) - 0.5, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names) + 1), [*names, "label"])
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="factors of", ylabel="codes of the part")
    axes.grid(visible=False)


def means(table: pl.DataFrame) -> pl.DataFrame:
    """A row a setting, share, method, metric and structure: `mean` and `sem` over replicates, the `least` and the `largest`, the
    mean `difference` from SimCLR on the same draws with its standard error, and how many replicates."""
    keys = [*SETTING, "share", "metric", "structure"]
    beside = table.filter(pl.col("method") == "simclr").select(*keys, "replicate", pl.col("value").alias("contrast"))
    paired = table.join(beside, on=[*keys, "replicate"], how="left", maintain_order="left")
    value, difference = pl.col("value"), pl.col("value") - pl.col("contrast")
    root = pl.len().sqrt()
    found = paired.group_by(*keys, "method", maintain_order=True).agg(
        value.mean().alias("mean"),
        (value.std() / root).alias("sem"),
        value.min().alias("least"),
        value.max().alias("largest"),
        difference.mean().alias("difference"),
        (difference.std() / root).alias("difference_sem"),
        pl.len().alias("replicates"),
    )
    return found.with_columns(pl.selectors.float().round_sig_figs(5))


@dataclass(frozen=True)
class Arguments(Destination):
    """Draw the figures of the study of FactorCL."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that simulations/factorcl.py has written; their rows are put together."""
    methods: tuple[str, ...] = ()
    """Methods to draw. Default: all."""
    csv: Path | None = None
    """A file for the means."""


def figures(table: pl.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Every figure that the table can be drawn as, by name."""
    several = table.filter(pl.col("share").n_unique().over(*SETTING, "method") > 1)
    if len(several):
        yield "factorcl_shares", fig_shares(several)
    with_parts = pl.col("metric").str.starts_with("part_").any().over("cell", "method")
    for setting, group in settings(table.filter(with_parts), SETTING):
        words = [str(setting[name]).replace(",", "-") for name in ("design", "dims", "ranks", "training_steps", "strength")]
        yield path_name("_".join(["factorcl_parts", *words])), fig_parts(group)


def main(arguments: Arguments) -> None:
    """Draw and save, and say where."""
    table = pl.concat([read_results(folder) for folder in arguments.results]).unique(
        ["cell", "method", "metric", "structure", "modality", "replicate"], keep="first", maintain_order=True
    )
    if arguments.methods:
        check_known(arguments.methods, table["method"].unique(maintain_order=True))
        table = table.filter(pl.col("method").is_in(arguments.methods))
    if arguments.csv is not None:
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        means(table).write_csv(arguments.csv)
    save_all(figures(table), arguments)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
