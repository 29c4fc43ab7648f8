"""Figures of DeepJIVE: what is recovered and told by method, and pictures of joint and individual parts.

    python figures/deepjive.py results/deepjive

draws figures/out/deepjive_metrics.{pdf,png} from the table, and for every setting of images or volumes whose pictures lie beside
it deepjive_parts_SETTING-METHOD and deepjive_walk_SETTING-METHOD; of volumes the middle slice is drawn, and the difference along
the joint axis. Digits are MNIST's (LeCun, Cortes and Burges; usually stated as CC BY-SA 3.0), which the figures say.
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

from style import PRINT, Destination, panels, run_script, save_all

SHOWN = {
    "joint error": "error of joint parts",
    "individual error": "error of individual parts",
    "r2 12": "$R^2$ of the shared factor",
    "correlation": "largest correlation",
    "degrees to ajive": "degrees from AJIVE",
    "accuracy 12 from view 1": "accuracy, joint scores of view 1",
    "accuracy 1": "accuracy, individual scores",
    "svm 1": "the same, support vector machine",
    "accuracy all": "accuracy, all scores",
    "joint rank": "joint rank",
}
"""Metrics that are drawn, where a setting has them."""
SOURCE = "Digits: MNIST (LeCun, Cortes and Burges), usually stated as CC BY-SA 3.0."


@mpl.rc_context(PRINT)
def fig_metrics(table: pl.DataFrame) -> Figure:
    """A row a setting, a panel a metric: one point a seed, a bar at the mean, by method."""
    settings = table["setting"].unique(maintain_order=True).to_list()
    held = {s: [m for m in SHOWN if m in set(table.filter(pl.col("setting") == s)["metric"])] for s in settings}
    figure, axes = panels(len(settings), max(map(len, held.values())), 2.1, 1.9)
    for row, setting in zip(axes, settings, strict=True):
        own = table.filter(pl.col("setting") == setting)
        for panel in row[len(held[setting]) :]:
            panel.set_axis_off()
        for panel, metric in zip(row, held[setting], strict=False):
            draw_metric(panel, own.filter(pl.col("metric") == metric))
            panel.set_title(SHOWN[metric] if panel is not row[0] else f"{setting}\n{SHOWN[metric]}", loc="left")
    seeds = table.group_by("setting", "method").agg(pl.col("seed").n_unique())["seed"]
    failed = table.filter(pl.col("status") == 2).select("setting", "method", "seed").unique().height
    note = f"{seeds.min()} to {seeds.max()} seeds; points: one each, bars: means. {failed} fits not finite. {SOURCE}"
    figure.supxlabel(note, fontsize=6.5, x=0.01, ha="left")
    return figure


def draw_metric(panel: Axes, rows: pl.DataFrame) -> None:
    """The seeds of every method, and their mean."""
    methods = rows["method"].unique(maintain_order=True).to_list()
    for i, method in enumerate(methods):
        values = rows.filter(pl.col("method") == method)["value"].to_numpy()
        panel.plot([i] * len(values), values, linestyle="", marker="o", markersize=2, color="#004488")
        panel.plot([i - 0.3, i + 0.3], [values.mean()] * 2, color="#BB5566")
    panel.set_xticks(range(len(methods)), methods, rotation=60, ha="right")


@mpl.rc_context(PRINT)
def fig_parts(pictures: dict[str, np.ndarray], setting: str) -> Figure:
    """A column a sample; for every view the rows view, joint part, individual part."""
    rows = [f"{name} {m}" for m in views_of(pictures) for name in ("view", "joint", "individual")]
    return grid_of({name: flat(pictures[name]) for name in rows}, setting)


@mpl.rc_context(PRINT)
def fig_walk(pictures: dict[str, np.ndarray], setting: str) -> Figure:
    """What decoders make of joint scores from −2 to 2 standard deviations, a row a view, and the last less the first."""
    rows = {}
    for m in views_of(pictures):
        walk = flat(pictures[f"walk {m}"])
        rows[f"view {m}, −2 to 2 sd"] = walk
        rows[f"view {m}, 2 less −2 sd"] = walk[-1:] - walk[:1]
    return grid_of(rows, setting)


def views_of(pictures: dict[str, np.ndarray]) -> list[int]:
    """The numbers of the views that have pictures."""
    return sorted(int(name.split()[1]) for name in pictures if name.startswith("view"))


def flat(images: np.ndarray) -> np.ndarray:
    """Images as they are, of volumes the middle slice."""
    return images if images.ndim == 3 else images[:, images.shape[1] // 2]


def grid_of(rows: dict[str, np.ndarray], setting: str) -> Figure:
    """A labelled row of images for each; those of differences in red and blue about 0."""
    columns = max(map(len, rows.values()))
    figure, axes = panels(len(rows), columns, 0.7, 0.75)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        difference = "less" in name
        limit = np.abs(images).max()
        scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if difference else {"cmap": "gray"}
        for panel in row:
            panel.set_axis_off()
        for panel, image in zip(row, images, strict=False):
            panel.imshow(image, **scale)
        row[0].set_title(name, loc="left", fontsize=6)
    if setting.startswith("digits"):
        figure.supxlabel(SOURCE, fontsize=5, x=0.01, ha="left")
    return figure


@dataclass(frozen=True)
class Arguments(Destination):
    """Draw the figures of DeepJIVE."""

    results: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that simulations/deepjive.py has written."""


def figures(folder: Path) -> Iterator[tuple[str, Figure]]:
    """Every figure of a folder, by name."""
    path = folder / "deepjive.parquet"
    if not path.exists():
        raise ValueError(f"results: {folder} holds no table; expected what simulations/deepjive.py writes")
    table = pl.read_parquet(path).filter(pl.col("offset") == 0)
    if table["metric"].is_in(list(SHOWN)).any():
        yield "deepjive_metrics", fig_metrics(table.filter(pl.col("metric").is_in(list(SHOWN))))
    for held in sorted(folder.glob("*.npz")):
        with np.load(held, allow_pickle=False) as file:
            pictures = {name: file[name] for name in file.files}
        yield f"deepjive_parts_{held.stem}", fig_parts(pictures, held.stem)
        yield f"deepjive_walk_{held.stem}", fig_walk(pictures, held.stem)


def main(arguments: Arguments) -> None:
    """Draw and save, and say where."""
    for folder in arguments.results:
        save_all(figures(folder), arguments)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
