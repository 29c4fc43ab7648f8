"""One colour, marker and label per method in all figures, and what makes a figure legible in print."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from hcl_jax.experiments import OutputError
from hcl_jax.experiments.methods import split_noise

LIMIT = "cramer-rao"


@dataclass(frozen=True)
class MethodStyle:
    """How a method is drawn everywhere."""

    label: str
    colour: str
    marker: str = ""
    line: Any = "-"
    """A line style of matplotlib."""
    hollow: bool = False
    """Whether markers are drawn as outlines: a network's own prediction, beside a regression on its scores."""


# Paul Tol's muted scheme, which colour-blind readers can tell apart, with greys for the methods that know no hierarchy
METHODS = {
    "hcl-vb": MethodStyle("HCL-VB", "#882255", "*"),
    "hcl-shrunk": MethodStyle("HCL-shrunk", "#999933", "P"),
    "hcl-ml": MethodStyle("HCL-ML", "#117733", "D"),
    "hcl-gn": MethodStyle("HCL-GN", "#44AA99", "x"),
    "hcl-gd": MethodStyle("HCL-GD", "#332288", "o"),
    "hcl-svd": MethodStyle("HCL-SVD", "#88CCEE", "s"),
    "hcl-gd-published": MethodStyle("HCL-GD, published", "#CC6677", ">", ":"),
    "hcl-svd-published": MethodStyle("HCL-SVD, published", "#DDCC77", "<", ":"),
    "naive-svd-denoised": MethodStyle("Naive SVD, denoised", "#555555", "^", "-."),
    "naive-svd": MethodStyle("Naive SVD", "#AAAAAA", "v", "-."),
    LIMIT: MethodStyle("Cramér–Rao (unbiased)", "#000000", "", "--"),
    # those of Section 4.2: Paul Tol's bright scheme, dash-dotted
    "jive": MethodStyle("JIVE", "#4477AA", "1", "-."),
    "ajive": MethodStyle("AJIVE", "#66CCEE", "2", "-."),
    "slide": MethodStyle("SLIDE", "#228833", "h", "-."),
    "sjive": MethodStyle("sJIVE", "#CCBB44", "3", "-."),
    "mmfl": MethodStyle("MMFL", "#EE6677", "d", "-."),
    "hnn": MethodStyle("HNN", "#AA3377", "p", "-."),
    "raw": MethodStyle("features", "#777777", "|", ":"),
    "bayes": MethodStyle("Bayes limit", "#000000", "", (0, (5, 1))),
    # deep methods, and what they are compared with: Paul Tol's light and dark schemes, dotted
    "hcl": MethodStyle("HCL, nonlinear", "#BB5566", "*"),
    "hcl-start": MethodStyle("HCL, nonlinear, before training", "#997700", "h", "--"),
    "hcl-copula": MethodStyle("HCL-ML on normal scores", "#004488", "D"),
    "hcl-flow": MethodStyle("HCL, links by likelihood", "#DDAA33", "o"),
    "hcl-released": MethodStyle("HCL, released code", "#EE8866", ">", ":"),
    "misa": MethodStyle("MISA", "#77AADD", "^", ":"),
    "convirt": MethodStyle("ConVIRT", "#44BB99", "v", ":"),
    "dlf": MethodStyle("DLF", "#AAAA00", "s", ":"),
    "tsd": MethodStyle("TSD", "#FFAABB", "X", ":"),
    "linear": MethodStyle("HCL-ML on features", "#117733", "P", "-."),
    "supervised": MethodStyle("encoders that see the factors", "#555555", "", "--"),
    "oracle": MethodStyle("link and loadings known", "#000000", "", (0, (5, 1))),
    # FactorCL and its baselines: Paul Tol's medium-contrast scheme
    "factorcl-sup": MethodStyle("FactorCL-SUP", "#994455", "*"),
    "factorcl-ssl": MethodStyle("FactorCL-SSL", "#EE99AA", "P"),
    "simclr": MethodStyle("SimCLR", "#004488", "s", ":"),
    "supcon": MethodStyle("SupCon", "#6699CC", "o", ":"),
    "cross-self": MethodStyle("Cross+Self", "#997700", "^", ":"),
    "cross-self-heads": MethodStyle("Cross+Self, own heads", "#EECC66", "v", ":"),
    "untrained": MethodStyle("untrained encoders", "#BBBBBB", "x", "-."),
    # beside which the benchmarks time: Paul Tol's vibrant scheme, dashed
    "numpy-em": MethodStyle("EM in NumPy", "#EE7733", "^", "--"),
    "factor-analysis": MethodStyle("factor analysis, scikit-learn", "#0077BB", "v", "--"),
    "pca": MethodStyle("PCA, scikit-learn", "#BBBBBB", "s", "--"),
}
REGRESSIONS = {
    "posterior": ("", None),
    "posterior-ridge": ("ridge on posterior means", (0, (4, 1))),
    "posterior-evidence": ("evidence", (0, (1, 1))),
    "posterior-group": ("group lasso on posterior means", "--"),
    "posterior-group-adaptive": ("adaptive group lasso on posterior means", (0, (3, 1, 1, 1))),
    "posterior-relevance": ("relevance by structure", (0, (1, 2))),
    "least-squares": ("least-squares scores", ":"),
    "debiased": ("debiased", "-."),
    "debiased-group": ("debiased group lasso", "--"),
    "debiased-group-one-se": ("debiased group lasso, one SE", (0, (3, 1, 1, 1))),
    "debiased-group-adaptive": ("debiased adaptive group lasso", (0, (6, 2))),
    "ridge": ("", None),
    "own": ("own prediction", ":"),
    "tuned": ("own prediction, tuned", (0, (1, 2))),
}
"""Of REPRESENTATION+REGRESSION: what a label adds, and the line that takes the place of the representation's."""
OWN = ("own", "tuned")

NOISES = {
    "shared": ("one noise variance", (0, (2, 2))),
    "view": ("noise by view", (0, (7, 2))),
    "feature": ("noise by feature", (0, (7, 2, 1, 2, 1, 2))),
}
"""Of ESTIMATOR@NOISE: what a label adds, and the line that takes the place of the estimator's."""

METRICS = {
    "gram_frobenius": r"$\|\hat\Lambda\hat\Lambda^\top - \Lambda\Lambda^\top\|_F$",
    "gram_relative": r"$\|\hat\Lambda\hat\Lambda^\top - \Lambda\Lambda^\top\|_F \,/\, \|\Lambda\Lambda^\top\|_F$",
    "procrustes_spectral": r"$\|\hat\Lambda O - \Lambda\|_2$",
    "procrustes_frobenius": r"$\|\hat\Lambda O - \Lambda\|_F$",
    "procrustes_two_to_infinity": r"$\|\hat\Lambda O - \Lambda\|_{2\to\infty}$",
    "structure_gram_frobenius": r"$\|\hat\Lambda_s\hat\Lambda_s^\top - \Lambda_s\Lambda_s^\top\|_F$",
    "block_gram_frobenius": r"$\|\hat\Lambda_s^{(m)}\hat\Lambda_s^{(m)\top} - \Lambda_s^{(m)}\Lambda_s^{(m)\top}\|_F$",
    "block_spectral": r"$\|\hat\Lambda_s^{(m)} O_s - \Lambda_s^{(m)}\|_2$",
    "block_frobenius": r"$\|\hat\Lambda_s^{(m)} O_s - \Lambda_s^{(m)}\|_F$",
    "block_two_to_infinity": r"$\|\hat\Lambda_s^{(m)} O_s - \Lambda_s^{(m)}\|_{2\to\infty}$",
    "accuracy": "accuracy of a linear probe",
    "rmse": "RMSE",
    "smape": "SMAPE, per cent",
    "r_squared": "$R^2$",
    "r_squared_all": "$R^2$ of all scores",
    "leak": "largest $R^2$ of other factors",
    "quadratic": "share explained by products",
    "bayes_excess": r"$E(y - \hat y)^2 - \mathrm{Var}(y|x)$",
    "beta_error": r"$(\sum_s \|O_s^\top\hat\beta_s - \beta_s\|^2)^{1/2}$",
    "structure_beta_error": r"$\|O_s^\top\hat\beta_s - \beta_s\|$",
    "selected": "share of replicates that select the structure",
}

# For `@mpl.rc_context(PRINT)` on whatever draws or saves
PRINT = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 6.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "mathtext.fontset": "stix",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.4,
    "errorbar.capsize": 1.5,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


def method_style(method: str) -> MethodStyle:
    """The method's style; an unknown method is drawn in black under its own name.

    Of REPRESENTATION@NOISE+REGRESSION the representation says the colour and the marker, and the regression, or else the kind of
    noise, the line. A rank rule, such as in jive-bic, is named in the label.
    """
    name, noise = split_noise(method)
    representation, _, regression = name.partition("+")
    known = representation if representation in METHODS else representation.partition("-")[0]
    if known not in METHODS:
        return MethodStyle(method, "#000000", ".")
    style, (addition, line) = METHODS[known], REGRESSIONS.get(regression, (regression, None))
    rule = representation.removeprefix(known).strip("-")
    kind, dashes = NOISES.get(noise or "", (noise, None))
    label = ", ".join(filter(None, [style.label, rule, kind, addition]))
    return MethodStyle(label, style.colour, style.marker, line or dashes or style.line, regression in OWN)


REGRESSION_LOOKS = {
    "posterior": ("posterior means, least squares", "#117733", "D"),
    "posterior-ridge": ("posterior means, ridge", "#999933", "P"),
    "posterior-evidence": ("posterior means, evidence", "#DDCC77", "<"),
    "posterior-group": ("posterior means, group lasso", "#44AA99", "x"),
    "posterior-group-adaptive": ("posterior means, adaptive group lasso", "#332288", "o"),
    "posterior-relevance": ("posterior means, relevance by structure", "#88CCEE", "s"),
    "least-squares": ("least-squares scores", "#AAAAAA", "v"),
    "debiased": ("debiased", "#CC6677", ">"),
    "debiased-group": ("debiased group lasso", "#AA4499", "^"),
    "debiased-group-one-se": ("debiased group lasso, one SE", "#882255", "*"),
    "debiased-group-adaptive": ("debiased adaptive group lasso, one SE", "#000000", "1"),
}


def regression_style(method: str) -> MethodStyle:
    """The style of a method where regressions on one representation are compared: each has its own colour and marker."""
    regression = method.partition("+")[2]
    if regression not in REGRESSION_LOOKS:
        return method_style(method)
    return MethodStyle(*REGRESSION_LOOKS[regression])


def ordered(methods: Iterable[str]) -> list[str]:
    """Methods in the order of every legend, unknown ones last."""
    known, regressions = list(METHODS), list(REGRESSIONS)

    def place(method: str) -> tuple[int, int, str]:
        representation, _, regression = split_noise(method)[0].partition("+")
        first = representation if representation in known else representation.partition("-")[0]
        return (
            known.index(first) if first in known else len(known),
            regressions.index(regression) if regression in regressions else -1,
            method,
        )

    return sorted(set(methods), key=place)


def panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A grid of axes of the given size in inches each."""
    figure, axes = plt.subplots(rows, columns, squeeze=False, figsize=(width * columns, height * rows), layout="constrained")
    return figure, axes.tolist()


def log_axes(axes: Axes, sizes: list[int]) -> None:
    """Both axes logarithmic, with ticks at the sizes that were run."""
    size_axis(axes, sizes)
    log_errors(axes)


def size_axis(axes: Axes, sizes: list[int]) -> None:
    """A logarithmic horizontal axis, with ticks at the sizes that were run, or some of them."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(readable_sizes(sizes)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: short_count(n)))


def short_count(n: float) -> str:
    """`500`, `20k`, `1.5M`."""
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if n >= unit:
            return f"{n / unit:g}{name}"
    return f"{n:g}"


def log_errors(axes: Axes) -> None:
    """A logarithmic vertical axis, with ticks that can be read off within a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def readable_sizes(sizes: list[int]) -> list[int]:
    """Where to put ticks: at 1, 2 and 5 times the powers of ten, fewer over many decades; at the sizes themselves if few."""
    if len(set(sizes)) <= 3:
        return sorted(set(sizes))
    low, high = min(sizes), max(sizes)
    steps = (1, 2, 5) if high / low < 200 else (1,)
    exponents = range(int(math.log10(low)), int(math.log10(high)) + 1)
    return [n for exponent in exponents for step in steps if low <= (n := step * 10**exponent) <= high]


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The options that all scripts of figures share."""

    folder: Path = Path(__file__).parent / "out"
    """Where the figures go."""
    formats: tuple[str, ...] = ("pdf", "png")
    """File formats."""


def save_all(figures: Iterable[tuple[str, Figure]], to: Destination) -> None:
    """Save figures under their names, and print the paths."""
    mpl.use("agg")
    for name, figure in figures:
        print(*save(figure, to.folder, name, to.formats), sep="\n")


def run_script(main: Callable[[Any], None], arguments: type, description: str | None) -> None:
    """The command line of a script: one line and a non-zero exit code where tables cannot be read or figures written."""
    try:
        main(tyro.cli(arguments, description=description))
    except (ValueError, OSError, OutputError) as error:
        sys.exit(f"error: {error}")


@mpl.rc_context(PRINT)
def save(figure: Figure, folder: Path, name: str, formats: Iterable[str]) -> list[Path]:
    """Write the figure in every format, and close it."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in formats]
    for path in paths:
        figure.savefig(path)
    plt.close(figure)
    return paths
