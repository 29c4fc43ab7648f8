"""Figure of the benchmarks: time and peak memory against the sizes of the problem. Nothing is timed here.

    python figures/sizes.py results/benchmarks

draws figures/out/benchmarks_sizes.{pdf,png} from the tables of benchmarks/estimators.py and benchmarks/replicates.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import polars as pl
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from style import PRINT, Destination, log_errors, method_style, ordered, panels, run_script, save_all, short_count

SWEEPS = {
    "n": "rows n",
    "d": "features d",
    "K": "factors K",
    "M": "modalities M",
    "replicates": "replicates",
}
QUANTITIES = {"seconds": "seconds", "megabytes": "peak memory beyond the data, MB"}


@mpl.rc_context(PRINT)
def fig_sizes(table: pl.DataFrame) -> Figure:
    """A row for time and one for memory, a column a sweep that the table holds, a line a method."""
    sweeps = [sweep for sweep in SWEEPS if sweep in table["sweep"]]
    figure, axes = panels(len(QUANTITIES), len(sweeps), 1.9, 1.9)
    for row, (quantity, label) in zip(axes, QUANTITIES.items(), strict=True):
        for panel, sweep in zip(row, sweeps, strict=True):
            group = table.filter(pl.col("sweep") == sweep).sort("size")
            for method in ordered(group["method"]):
                line, style = group.filter(pl.col("method") == method), method_style(method)
                panel.plot(
                    line["size"], line[quantity], color=style.colour, marker=style.marker, linestyle=style.line, label=style.label
                )
            panel.set(xscale="log", xlabel=SWEEPS[sweep] if row is axes[-1] else "")
            panel.xaxis.set_major_locator(FixedLocator(sorted(set(group["size"]))))
            panel.xaxis.set_minor_locator(NullLocator())
            panel.xaxis.set_major_formatter(FuncFormatter(lambda size, _: short_count(size)))
            log_errors(panel)
        row[0].set_ylabel(label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


@dataclass(frozen=True)
class Arguments(Destination):
    """Draw the figure of the benchmarks."""

    results: Annotated[Path, tyro.conf.Positional]
    """Folder with the tables of benchmarks/estimators.py and, if it was run, benchmarks/replicates.py."""


def read_tables(folder: Path) -> pl.DataFrame:
    """All tables of the folder together. Raises `ValueError` when there are none."""
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise ValueError(f"results: no .csv in {folder}; expected the tables of benchmarks/estimators.py")
    return pl.concat([pl.read_csv(path) for path in paths])


def main(arguments: Arguments) -> None:
    table = read_tables(arguments.results)
    save_all([("benchmarks_sizes", fig_sizes(table))], arguments)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
