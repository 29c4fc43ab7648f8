"""Figures of the study on real data: accuracy by method, and the structures that carry the signal, from its tables.

    python figures/real_prediction.py results/real_prediction

draws figures/out/real_prediction_accuracy.{pdf,png} and, where methods with the group penalty were run,
real_prediction_structures.{pdf,png}, a panel a data set.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib as mpl
import polars as pl
import tyro
from matplotlib.figure import Figure

from hcl_jax.evaluation import corrected_mean
from style import PRINT, Destination, method_style, ordered, panels, run_script, save_all

TITLES = {"tcga": "TCGA breast cancer, 5 views\nPAM50 subtype", "digits": "UCI handwritten digits, 6 views\ndigit"}
LABELS = {"pca": "principal components", "raw": "features"}


def label(method: str) -> str:
    """The method's name in these figures."""
    if method in LABELS:
        return LABELS[method]
    representation, _, penalty = method.partition("+")
    return method_style(representation).label + (", group penalty" if penalty == "group" else "")


def corrected_means(table: pl.DataFrame, value: str, by: list[str]) -> pl.DataFrame:
    """Means of a column over the splits, and in `sem` their standard errors, corrected for what splits share; 0 for one split."""
    groups = table.group_by(by, maintain_order=True)
    means = [(*key, *corrected_mean(group[value].to_numpy(), group["test_share"][0])) for key, group in groups]
    return pl.DataFrame(means, schema=[*by, value, "sem"], orient="row").with_columns(pl.col("sem").fill_nan(0))


@mpl.rc_context(PRINT)
def fig_accuracy(table: pl.DataFrame) -> Figure:
    """Mean test accuracy of every method with its standard error, corrected for what splits share, best on top."""
    groups = [group for _, group in table.group_by("data", maintain_order=True)]
    figure, axes = panels(1, len(groups), 3.6, 3.4)
    for panel, group in zip(axes[0], groups, strict=True):
        means = corrected_means(group, "accuracy", ["method"]).sort("accuracy", "method")
        for place, (method, accuracy, error) in enumerate(means.iter_rows()):
            look = method_style(method.partition("+")[0])
            face = "white" if method.endswith("+group") else look.colour
            panel.errorbar(accuracy, place, xerr=error, color=look.colour, marker="o", linestyle="", markerfacecolor=face)
        panel.set_yticks(range(len(means)), [label(method) for method in means["method"]])
        panel.set(xlabel="test accuracy\nmean ± corrected standard error", title=TITLES.get(group["data"][0], group["data"][0]))
        panel.text(0.98, 0.02, f"{group['split'].n_unique()} splits", transform=panel.transAxes, ha="right", fontsize=6.5)
    return figure


@mpl.rc_context(PRINT)
def fig_structures(table: pl.DataFrame, top: int = 10) -> Figure:
    """Share of each structure in the squared norm of the coefficients under the group penalty: the largest shares."""
    groups = [group for _, group in table.group_by("data", maintain_order=True)]
    figure, axes = panels(1, len(groups), 3.6, 2.8)
    for panel, group in zip(axes[0], groups, strict=True):
        shares = corrected_means(group, "share", ["method", "structure"])
        largest = shares.group_by("structure").agg(pl.col("share").mean()).sort("share", descending=True)["structure"].head(top)
        methods = ordered(shares["method"])
        for offset, method in enumerate(methods):
            held = {row["structure"]: row for row in shares.filter(pl.col("method") == method).iter_rows(named=True)}
            look = method_style(method.partition("+")[0])
            panel.errorbar(
                [place + 0.2 * (offset - (len(methods) - 1) / 2) for place in range(len(largest))],
                [held[name]["share"] for name in largest],
                yerr=[held[name]["sem"] for name in largest],
                color=look.colour,
                marker=look.marker,
                linestyle="",
                label=look.label,
            )
        panel.set_xticks(range(len(largest)), largest.to_list(), rotation=60)
        panel.set(xlabel="structure (views by number)", ylabel="share of squared coefficients")
        panel.set(title=TITLES.get(group["data"][0], group["data"][0]), ylim=(0, None))
        panel.legend()
    return figure


@dataclass(frozen=True)
class Arguments(Destination):
    """Draw the figures of the study on real data."""

    results: Annotated[Path, tyro.conf.Positional]
    """Folder that simulations/real_prediction.py has written."""


def read(folder: Path, name: str) -> pl.DataFrame:
    """The tables of all data sets. Raises `ValueError` where there are none."""
    paths = sorted(folder.glob(f"*-{name}.parquet"))
    if not paths:
        raise ValueError(f"results: {folder} holds no table of {name}; expected one of simulations/real_prediction.py")
    return pl.concat([pl.read_parquet(path) for path in paths])


def figures(results: Path) -> Iterator[tuple[str, Figure]]:
    """(name, figure), that of the structures where a method with the group penalty was run."""
    yield "real_prediction_accuracy", fig_accuracy(read(results, "accuracy"))
    penalised = read(results, "structures").filter(pl.col("method").str.ends_with("+group"))
    if len(penalised):
        yield "real_prediction_structures", fig_structures(penalised)


def main(arguments: Arguments) -> None:
    """Draw and save, and say where."""
    save_all(figures(arguments.results), arguments)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
