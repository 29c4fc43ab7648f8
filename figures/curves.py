"""From tidy rows to curves: averages with Monte Carlo standard errors, log-log slopes, failure counts; and their drawing."""

import textwrap
from collections.abc import Callable

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hcl_jax.experiments import ratios
from hcl_jax.experiments.cell import number_name, path_name
from hcl_jax.experiments.summary import status_words
from hcl_jax.structure import NON_FINITE, ON_BOUND, OUT_OF_STEPS
from style import LIMIT, MethodStyle, log_axes, method_style, ordered

SETTING = ("dims", "structures", "ranks", "noise_variance", "latent", "sampling", "loadings", "fitted")
DOWNSTREAM_SETTING = ("dims", "structures", "ranks", "noise_variance", "response_noise_variance", "support", "link")
DEFAULTS = {"latent": "gaussian", "sampling": "wishart", "loadings": "", "fitted": "true", "support": "", "link": "identity"}
DEFAULTS |= {"response_noise_variance": 0.1}


def error_curves(table: pl.DataFrame, by: tuple[str, ...] = ("n",), average: str = "rms") -> pl.DataFrame:
    """The average over the replicates with a finite value (`rms`, as the limit is one, or `mean`) in a column `mean` and its
    standard error in `sem`, one row for each method and value of `by`."""
    curves = ratios.averages(ratios.by_replicate(table, by), by)
    sem = {"rms": "rms_sem", "mean": "sem"}[average]
    held = curves.filter(pl.col(average).is_not_null())
    return held.select(*by, "method", pl.col(average).alias("mean"), pl.col(sem).alias("sem")).sort(*by)


def over_limit(table: pl.DataFrame, by: tuple[str, ...] = ("n",)) -> pl.DataFrame:
    """Root mean square error over that of the limit on the same draws, in a column `mean`, its paired standard error in `sem`;
    one row for each method but the limit and value of `by`."""
    curves = ratios.over_limit(ratios.by_replicate(table, by), by)
    held = curves.filter(pl.col("ratio").is_not_null() & ~pl.col("method").is_in(ratios.LIMITS_SHOWN))
    return held.select(*by, "method", pl.col("ratio").alias("mean"), pl.col("ratio_sem").alias("sem")).sort(*by)


def loglog_slope(n: np.ndarray, mean: np.ndarray, sem: np.ndarray) -> tuple[float, float]:
    """Slope of log mean on log n by weighted least squares, and its standard error from those of the means.

    Without standard errors (a single replicate) the fit is unweighted, and the slope's standard error is NaN.
    """
    x, y = np.log(n), np.log(mean)
    known = bool(np.all(np.isfinite(sem) & (sem > 0)))
    weights = (mean / sem) ** 2 if known else np.ones_like(x)
    centred = x - np.average(x, weights=weights)
    scale = np.sum(weights * centred**2)
    return float(np.sum(weights * centred * y) / scale), float(scale**-0.5) if known else float("nan")


def slope_label(curve: pl.DataFrame, x: str = "n") -> str:
    """`−0.50 ± 0.01`, or nothing where there is no line to fit."""
    if curve[x].n_unique() < 2:
        return ""
    slope, sem = loglog_slope(*(curve[name].cast(pl.Float64).to_numpy() for name in (x, "mean", "sem")))
    spread = f" ± {sem:.{2 if sem >= 0.005 else 3}f}" if np.isfinite(sem) else ""
    return f"{slope:.{2 if not sem < 0.005 else 3}f}{spread}".replace("-", "−")


def draw_curves(
    axes: Axes,
    curves: pl.DataFrame,
    slopes: bool = False,
    x: str = "n",
    style_of: Callable[[str], MethodStyle] = method_style,
) -> None:
    """One line a method with its error bars, against `x` on log axes; with the fitted slopes in the labels if asked."""
    positive = curves.filter(pl.col("mean") > 0)
    for method in ordered(positive["method"]):
        curve, style = positive.filter(pl.col("method") == method).sort(x), style_of(method)
        slope = slope_label(curve, x) if slopes else ""
        axes.errorbar(
            curve[x].to_numpy(),
            curve["mean"].to_numpy(),
            yerr=None if method == LIMIT else curve["sem"].fill_null(0).to_numpy(),
            label=f"{style.label}  {slope}" if slope else style.label,
            color=style.colour,
            marker=style.marker,
            markerfacecolor="white" if style.hollow else style.colour,
            linestyle=style.line,
            zorder=3 if style.marker == "" else 2,
        )
    if len(positive):
        log_axes(axes, curves[x].to_list())


def settings(table: pl.DataFrame, columns: tuple[str, ...] = SETTING) -> list[tuple[dict, pl.DataFrame]]:
    """The table by setting (all of the cell but n), in its own order."""
    groups = table.group_by(*columns, maintain_order=True)
    return [(dict(zip(columns, key, strict=True)), group) for key, group in groups]


def setting_title(setting: dict) -> str:
    """What a panel shows: dimensions, ranks and noise, and whatever is not at its default."""
    dims = setting["dims"].replace("x", ", ")
    parts = [f"dims ({dims}), {_ranks(setting)}, $\\sigma^2$ = {number_name(setting['noise_variance'])}"]
    others = [f"{name.replace('_', ' ')} {value}" for name, value in _not_default(setting).items()]
    return "\n".join(parts + [textwrap.fill(other, width=60) for other in others])


def _not_default(setting: dict) -> dict:
    return {name: setting[name] for name, default in DEFAULTS.items() if setting.get(name, default) != default}


def _ranks(setting: dict) -> str:
    structures, ranks = setting["structures"].split(","), setting["ranks"].split(",")
    full = len(structures) == 2 ** (setting["dims"].count("x") + 1) - 1
    if full and len(set(ranks)) == 1:
        return f"rank {ranks[0]}"
    return "ranks " + " ".join(f"{s}:{r}" for s, r in zip(structures, ranks, strict=True))


def setting_slug(setting: dict) -> str:
    """A file name's part for a setting."""
    other = [str(value) for value in _not_default(setting).values()]
    ranks = _ranks(setting).replace("ranks ", "").replace("rank ", "rank").replace(" ", "-").replace(":", "r")
    return path_name("_".join([setting["dims"], ranks, f"noise{number_name(setting['noise_variance'])}", *other]))


def failure_note(table: pl.DataFrame, average: str = "Root mean square") -> str:
    """How many replicates stand behind the averages, what the bars are, and how many fits did not converge, by method."""
    fits = table.select("cell", "method", "replicate", "status").unique()
    counts = fits.group_by("cell", "method").len()["len"]
    low, high = counts.min(), counts.max()
    replicates = f"{low}" if low == high else f"{low} to {high}"
    lines = [f"{average} ± standard error over {replicates} replicates."]
    for status, treated in ((OUT_OF_STEPS, "kept in"), (NON_FINITE, "left out of"), (ON_BOUND, "kept in")):
        failed = {m: fits.filter(pl.col("method") == m) for m in ordered(fits.filter(pl.col("status") == status)["method"])}
        entries = [f"{method_style(m).label} {(rows['status'] == status).sum()} of {len(rows)}" for m, rows in failed.items()]
        if entries or status != ON_BOUND:
            words = status_words(table)[status].capitalize()
            lines.append(f"{words}, {treated} the averages: {', '.join(entries) or 'none'}.")
    return " ".join(lines)


def oracle_note(table: pl.DataFrame) -> str:
    """What the errors by structure of a method without structures really are."""
    naive = [name for name in ordered(table["method"]) if name.startswith("naive")]
    return f" {' and '.join(method_style(name).label for name in naive)}: after a rotation onto the truth." if naive else ""


def annotate(figure: Figure, table: pl.DataFrame, note: str = "", average: str = "Root mean square") -> None:
    """Put what was averaged and the failure counts under the figure, and a note."""
    text = textwrap.fill(failure_note(table, average) + note, width=int(20 * figure.get_figwidth()))
    figure.supxlabel(text, fontsize=6.5, x=0.01, ha="left")


def shared_legend(axes: Axes, source: Axes) -> None:
    """The legend of `source`, alone in `axes`."""
    axes.set_axis_off()
    axes.legend(*source.get_legend_handles_labels(), loc="center")


def legend_above(figure: Figure, source: Axes) -> None:
    """The legend of `source` above all panels: the place below belongs to the failure counts."""
    figure.legend(*source.get_legend_handles_labels(), loc="outside upper center", ncols=4 if figure.get_figwidth() > 5 else 2)
