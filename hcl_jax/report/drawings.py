"""Drawings of a report as SVG that stands in a page: text as text, colours that colour-blind readers can tell apart."""

import io
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from hcl_jax.decomposition import Decomposition
from hcl_jax.outcomes import Outcome
from hcl_jax.report.words import printable
from hcl_jax.structure import Structure

# Paul Tol's muted scheme in an order in which neighbours differ in lightness; past its end come hatches
COLOURS = ("#332288", "#DDCC77", "#117733", "#88CCEE", "#882255", "#44AA99", "#CC6677", "#999933", "#AA4499")
HATCHES = ("", "////", "....", "xxxx")
STYLES = {False: "normal", True: "italic"}
"""Of the titles of panels, by whether the structure is doubtful."""
DOUBTFUL = "#BBBBBB"
MARKERS = "osD^vP*X<"
MOST_POINTS = 2000
WIDTH = 7.4
"""Inches: the column of the page."""
LOOK: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica", "sans-serif"],
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is a dollar
    "path.simplify": True,
}


def _drawing(draw: Callable[..., tuple[Figure, str]]) -> Callable[..., Markup]:
    """A function that returns a figure and what it shows, as one that returns SVG."""

    @wraps(draw)
    def drawn(*args: Any) -> Markup:
        salt = {"svg.hashsalt": draw.__name__}  # the same figure has the same bytes
        with mpl.rc_context(LOOK | salt), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's fonts set the text
            figure, shows = draw(*args)
            file = io.BytesIO()
            FigureCanvasSVG(figure).print_svg(file)
        return inline_svg(file.getvalue(), draw.__name__, shows)

    return drawn


def inline_svg(source: bytes, name: str, shows: str) -> Markup:
    """The SVG as part of an HTML page: no name spaces, metadata and styles, and names of its parts that no other drawing has."""
    root = ET.fromstring(source)
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        held = {_local(key): value for key, value in element.attrib.items()}
        if "id" in held:
            held["id"] = f"{name}-{held['id']}"
        if held.get("href", "").startswith("#"):
            held["href"] = f"#{name}-{held['href'][1:]}"
        element.attrib.clear()
        element.attrib |= {key: value.replace("url(#", f"url(#{name}-") for key, value in held.items()}
    root.attrib |= {"role": "img", "aria-label": shows}
    for size in ("width", "height"):
        del root.attrib[size]
    return Markup(ET.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def short(name: Any, most: int = 28) -> str:
    """A name that fits beside an axis: its beginning and its end."""
    text = " ".join(printable(str(name)).split())
    head, tail = most // 2, (most - 1) // 2
    return text if len(text) <= most else f"{text[:head]}…{text[-tail:]}"


def short_structure(decomposition: Decomposition, structure: Structure, most: int) -> str:
    """Its name, every view of it shortened where that is too long."""
    whole, each = short(decomposition.label(structure), 1000), max(most // len(structure) - 1, 5)
    if len(whole) <= most:
        return whole
    return "+".join(short(decomposition.view_names[m - 1], each) for m in structure)


@_drawing
def shares_drawing(decomposition: Decomposition, doubtful: Collection[str]) -> tuple[Figure, str]:
    """One stacked bar a view: what each structure explains of it, with bounds; doubtful structures are grey."""
    shares, n_views, labels = decomposition.shares, len(decomposition.view_names), []
    for s in decomposition.active:
        labels.append(f"{short_structure(decomposition, s, 34)}{', doubtful' * (decomposition.label(s) in doubtful)}")
    looks = bar_looks([decomposition.label(s) in doubtful for s in decomposition.active])
    legend_rows = (len(labels) + 2) // 3
    figure = Figure(figsize=(WIDTH, 0.9 + 0.62 * n_views + 0.22 * legend_rows), layout="constrained")
    axes = figure.add_subplot()
    place = np.arange(n_views)
    right, left, furthest = np.zeros(n_views), np.zeros(n_views), 1.0
    for i, (s, label, (colour, hatch)) in enumerate(zip(decomposition.active, labels, looks, strict=True)):
        held = np.array([m + 1 in s for m in range(n_views)])
        share = np.where(held, shares.share[:, i], 0)
        start = np.where(share >= 0, right, left)
        axes.barh(
            place[held],
            share[held],
            0.62,
            left=start[held],
            color=colour,
            hatch=hatch,
            label=label,
            edgecolor="white",
            linewidth=0.7,
        )
        height = place - 0.22 + 0.44 * (i + 0.5) / len(labels)  # bounds of neighbours do not lie on each other
        low, high = (start + shares.low[:, i])[held], (start + shares.high[:, i])[held]
        for line, width in (("white", 2.6), ("black", 1)):
            axes.hlines(height[held], low, high, line, linewidth=width)
        furthest = max(furthest, float(high.max()))
        right, left = right + np.maximum(share, 0), left + np.minimum(share, 0)
    total, low, high = shares.total.T
    axes.errorbar(total, place + 0.39, xerr=np.clip([total - low, high - total], 0, None), fmt="|k", capsize=2.5, linewidth=1)
    axes.set(yticks=place, xlabel="share of the view's variance", xlim=(min(0, float(left.min())), furthest))
    axes.set_yticklabels([short(name) for name in decomposition.view_names])
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=min(3, len(labels)))
    return figure, "Stacked bars: the share of variance that each structure explains of every view; the numbers are in the table."


def bar_looks(doubtful: Sequence[bool]) -> list[tuple[str, str]]:
    """By structure, the colour and hatch of its bars."""
    looks, used = [], {True: 0, False: 0}
    for grey in doubtful:
        palette = (DOUBTFUL,) if grey else COLOURS
        turn, colour = divmod(used[grey], len(palette))
        used[grey] += 1
        looks.append((palette[colour], HATCHES[turn % len(HATCHES)]))
    return looks


@_drawing
def scores_drawing(
    decomposition: Decomposition, structures: Sequence[Structure], doubtful: Collection[str]
) -> tuple[Figure, str]:
    """The first two scores of structures, a panel each, coloured by the outcome; the distribution of a score that is alone."""
    assert decomposition.data is not None, "the caller has looked"
    n_columns = min(3, len(structures))
    n_rows = -(-len(structures) // n_columns)
    figure = Figure(figsize=(WIDTH, 2.5 * n_rows + 0.4), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel().tolist()
    rows = drawn_rows(decomposition.n_samples)
    scores = decomposition.score_matrix(decomposition.data)[rows]
    outcome = None if decomposition.outcome is None else decomposition.outcome.of_rows(rows)
    for axes, s in zip(panels, structures, strict=False):
        held = [k for k, column in enumerate(decomposition.columns) if column == s][:2]
        axes.set_title(short_structure(decomposition, s, 27), loc="left", style=STYLES[decomposition.label(s) in doubtful])
        axes.set_xlabel("score 1")
        second = scores[:, held[1]] if len(held) > 1 else _spread(len(rows))
        if len(held) > 1:
            axes.set_ylabel("score 2")
        else:
            axes.set(yticks=[], ylim=(-0.5, 1.5))
            axes.spines["left"].set_visible(False)
        _points(axes, scores[:, held[0]], second, outcome)
    for axes in panels[len(structures) :]:
        axes.set_visible(False)
    _explain(figure, panels[: len(structures)], outcome)
    return figure, "Scores of the samples, one panel a structure."


def drawn_rows(n: int) -> np.ndarray:
    """All rows, or as many of them, drawn at random, as a page can show."""
    if n <= MOST_POINTS:
        return np.arange(n)
    return np.sort(np.random.default_rng(0).choice(n, MOST_POINTS, replace=False))


def _spread(n: int) -> np.ndarray:
    """Heights at which points of one score do not lie on each other."""
    return (np.arange(n) * 0.6180339887) % 1


def _points(axes: Axes, x: np.ndarray, y: np.ndarray, outcome: Outcome | None) -> None:
    size = 14 if len(x) <= 500 else 6
    if outcome is None:
        axes.scatter(x, y, size, color=COLOURS[0], alpha=0.7, linewidths=0)
        return
    unknown = ~outcome.known
    if unknown.any():
        axes.scatter(x[unknown], y[unknown], size, facecolors="none", edgecolors="#777777", linewidths=0.6, label="unknown")
    if outcome.classes is None:
        known, values = outcome.known, outcome.values[outcome.known]
        axes.scatter(x[known], y[known], size, c=values, cmap=VALUES, linewidths=0)
        return
    last = len(COLOURS) - 1
    place = np.minimum(outcome.values.astype(int), last if len(outcome.classes) > len(COLOURS) else len(COLOURS))
    for c in np.unique(place[outcome.known]):
        of = outcome.known & (place == c)
        name = "other classes" if c == last and len(outcome.classes) > len(COLOURS) else short(outcome.classes[c])
        axes.scatter(x[of], y[of], size, color=COLOURS[c], marker=MARKERS[c], alpha=0.8, linewidths=0, label=name)


VALUES = mpl.colormaps["viridis"].resampled(64)


def _explain(figure: Figure, panels: Sequence[Axes], outcome: Outcome | None) -> None:
    """What colours mean: a bar of numbers, or a legend of classes."""
    if outcome is None:
        return
    if outcome.classes is None:
        figure.colorbar(panels[0].collections[-1], ax=list(panels), label=short(outcome.name), aspect=30)
        return
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, title=short(outcome.name), loc="outside lower center", ncols=min(5, len(labels)))
