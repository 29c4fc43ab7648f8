"""Figures of the importance of structures: drops with intervals beside the paper's shares, and maps of the latent space.

    python figures/importance.py results/importance

draws figures/out/importance_DATA-METHOD.{pdf,png} (the paper's Figure 9) and latent_map_DATA-METHOD.{pdf,png} (supplement S6.2).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import numpy as np
import polars as pl
import tyro
from matplotlib.figure import Figure

from style import PRINT, Destination, method_style, panels, run_script, save_all

WAYS = {
    "permute": ("permuted", "#BB5566", "o"),
    "mask": ("masked", "#004488", "s"),
    "impute": ("mean imputed", "#DDAA33", "^"),
}
CLASS_COLOURS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#777777")
"""Paul Tol's muted scheme."""
CLASS_MARKERS = "osD^vP*X<>"


@mpl.rc_context(PRINT)
def fig_importance(table: pl.DataFrame) -> Figure:
    """Left: accuracy lost without each structure, three ways. Right: the same, clipped at 0 and normalised to sum 1."""
    order = table.filter(pl.col("how") == "permute").sort("drop")["structure"].to_list()
    figure, axes = panels(1, 2, 3.2, 0.6 + 0.19 * len(order))
    for panel, value, title in zip(axes[0], ("drop", "share"), ("accuracy lost", "share, as in the paper"), strict=True):
        for i, (how, (label, colour, marker)) in enumerate(WAYS.items()):
            own = table.filter(pl.col("how") == how)
            places = [order.index(s) + (i - 1) * 0.25 for s in own["structure"]]
            middle = own[value].to_numpy()
            spread = [middle - own[f"{value}_low"].to_numpy(), own[f"{value}_high"].to_numpy() - middle]
            panel.errorbar(
                middle, places, xerr=np.maximum(spread, 0), label=label, color=colour, marker=marker, linestyle="", markersize=2.5
            )
        panel.axvline(0, color="black", linewidth=0.6)
        panel.set_yticks(range(len(order)), order)
        panel.set(xlabel=title, ylabel="structure")
    axes[0][0].legend(loc="lower right")
    first = table.row(0, named=True)
    note = (
        f"{first['data']}, {method_style(first['method']).label}: accuracy {first['score']:.3f} on {first['test_rows']} held-out "
    )
    figure.supxlabel(note + "rows.\nBars: 95 % bootstrap intervals over these rows.", fontsize=6.5, x=0.01, ha="left")
    return figure


@mpl.rc_context(PRINT)
def fig_latent_map(scores: pl.DataFrame, structures: list[str]) -> Figure:
    """First against second principal component of the scores of each structure, and of the first two against each other."""
    pairs = [((s, 1), (s, 2)) for s in structures if f"{s}.2" in scores.columns]
    if len(structures) > 1:
        pairs.append(((structures[0], 1), (structures[1], 1)))
    figure, axes = panels(1, len(pairs), 2.5, 2.5)
    classes = scores["class"].unique().sort().to_list()
    for panel, (a, b) in zip(axes[0], pairs, strict=True):
        for i, name in enumerate(classes):
            own = scores.filter(pl.col("class") == name)
            x, y = (own[f"{s}.{k}"].to_numpy() for s, k in (a, b))
            look = {"color": CLASS_COLOURS[i % 10], "marker": CLASS_MARKERS[i % 10]}
            panel.plot(x, y, linestyle="", markersize=2, alpha=0.7, label=name, **look)
        panel.set(xlabel=f"structure {a[0]}, component {a[1]}", ylabel=f"structure {b[0]}, component {b[1]}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(classes), markerscale=2)
    return figure


@dataclass(frozen=True)
class Arguments(Destination):
    """Draw the figures of the importance of structures."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that simulations/importance.py has written."""
    structures: tuple[str, ...] = ()
    """Structures of the latent maps. Default: the two that are worth most."""


def figures(folder: Path, structures: tuple[str, ...] = ()) -> Iterator[tuple[str, Figure]]:
    """Every figure of the tables in a folder, by name."""
    paths = sorted(folder.glob("*-importance.parquet"))
    if not paths:
        raise ValueError(f"results: {folder} holds no table; expected what simulations/importance.py writes")
    for path in paths:
        table, name = pl.read_parquet(path), path.name.removesuffix("-importance.parquet")
        yield f"importance_{name}", fig_importance(table)
        best = table.filter(pl.col("how") == "permute").sort("drop", descending=True)["structure"].to_list()[:2]
        scores = pl.read_parquet(path.with_name(f"{name}-scores.parquet"))
        yield f"latent_map_{name}", fig_latent_map(scores, list(structures) or best)


def main(arguments: Arguments) -> None:
    """Draw and save, and say where."""
    for folder in arguments.results:
        save_all(figures(folder, arguments.structures), arguments)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
