"""The downstream study: predicting a response from learned representations, beside the Bayes limit.

Claims (the paper's Section 4.2 and supplement S5.2): representations of HCL predict with the lowest RMSE and SMAPE at every n,
methods with partial sharing beat JIVE and sJIVE, errors fall in n and m, and the group lasso finds the relevant structures.
Representations are fitted to n unlabelled rows, and a regression on their scores to m labelled ones. A method is named
REPRESENTATION+REGRESSION, such as hcl-ml+posterior, hcl-ml+debiased-group, slide+ridge or raw+ridge.

    python simulations/downstream.py                            # HCL and ridge: minutes
    python simulations/downstream.py --preset tiny              # seconds
    python simulations/downstream.py --preset baselines --dry-run
    python simulations/downstream.py --preset deep --dry-run    # networks: MISA, ConVIRT, DLF, TSD and nonlinear HCL
    python simulations/downstream.py --preset links --dry-run   # the same, and linear methods, behind links that are not linear
    python simulations/downstream.py --preset coefficients      # the error of β against m, and the structures selected
    python simulations/downstream.py --n-grid 2000 --m-grid 200 --support 123 12 --methods hcl-ml+posterior-group bayes
    python simulations/downstream.py --list-methods
    python figures/downstream.py results/downstream             # draws the figures
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hcl_jax.experiments.command_line import (
    Plan,
    SweepOptions,
    check_list,
    check_options,
    configure_for,
    make_hierarchy,
    make_plan,
    parse,
    peek,
    run_command,
)
from hcl_jax.experiments.downstream import HCL_REGRESSIONS, Downstream, DownstreamCell, known_methods

PROGRAM = "downstream.py"
METRICS = (
    *("rmse", "smape", "r_squared", "excess_risk", "bayes_excess", "beta_error", "structure_beta_error"),
    *("selected", "true_positive_rate", "false_positive_rate", "exact_selection"),
)
HCL = ("hcl-vb", "hcl-ml", "hcl-gn", "hcl-svd")
DEFAULT_METHODS = (
    *("hcl-vb+posterior-ridge", "hcl-vb+posterior-group"),  # beside the other regressions on hcl-vb, which then fit it once
    *(f"{name}+{regression}" for name in HCL for regression in ("posterior", "least-squares", "debiased")),
    *("hcl-shrunk+posterior", "hcl-gd-published+posterior"),
    *("naive-svd-denoised+posterior", "raw+ridge", "bayes"),
)
BASELINE_METHODS = (
    *("hcl-vb+posterior", "hcl-ml+posterior", "raw+ridge", "bayes"),
    *(f"{name}+ridge" for name in ("jive", "ajive", "slide", "sjive", "mmfl", "hnn")),
    *("sjive+own", "mmfl+own", "mmfl-cv+ridge", "mmfl-cv+own", "hnn-minimum+ridge"),
)
SELECTED = ("jive-permutation", "jive-bic", "ajive-selected", "slide-bcv", "sjive-permutation", "hnn-angle")
SELECTED_METHODS = tuple(f"{name}+ridge" for name in SELECTED)
DEEP = ("hcl", "misa", "convirt", "dlf", "tsd")
DEEP_METHODS = (
    *("hcl-vb+posterior", "hcl-copula+ridge", "raw+ridge", "bayes"),
    *(f"{name}+{regression}" for name in DEEP for regression in ("ridge", "own")),
)
LINKED_METHODS = (*DEEP_METHODS, "hcl-flow+ridge", "hcl-ml+posterior-ridge", "jive+ridge", "slide+ridge", "sjive+ridge")
COEFFICIENT_METHODS = tuple(f"hcl-ml+{regression}" for regression in HCL_REGRESSIONS)


@dataclass(frozen=True)
class Study(SweepOptions):
    """Every option is described below; --preset sets the defaults that are shown, and any option overrides it."""

    preset: Literal["tiny", "default", "baselines", "selected", "deep", "links", "coefficients", "paper"] = "default"
    """Where the other options start: seconds; HCL against n; the matrix decompositions at the true ranks, or with their own rank
    rules (hours); networks, and all of them behind links that are not linear (hours); regressions against m; or the paper's grid
    with HCL and ridge."""
    noise_variance: tuple[float, ...] = (0.1,)
    """Noise variances, one setting each."""
    n_grid: tuple[int, ...] = (500, 1000, 2000, 4000, 8000)
    """Numbers of rows that representations are fitted to; supervised methods see the responses of these rows too."""
    m_grid: tuple[int, ...] = (10_000,)
    """Numbers of labelled rows, which the regressions are fitted to."""
    response_noise_variance: float = 0.1
    """σ_y², of the response given the factors."""
    link: tuple[str, ...] = ("identity",)
    """Links between the linear model and the features: sinh, leaky, … (simulations/nonlinear.py --list-links)."""
    support: tuple[str, ...] = ()
    """Structures with non-zero coefficients, such as 123 12. None given: all of them."""
    methods: tuple[str, ...] = DEFAULT_METHODS
    """REPRESENTATION+REGRESSION, and the limit `bayes`."""
    output: Path = Path("results/downstream")
    """Folder of the results. It holds one seed and one dtype."""
    metric: str = "rmse"
    """Metric of the table at the end; all metrics are stored."""
    list_methods: bool = False
    """Print every method's name and stop."""


PRESET_DIMS = {"tiny": ((12, 10, 8),), "paper": ((100, 100, 100), (100, 500, 800))}
DEFAULT = Study(dims=())
PRESETS = {
    "tiny": Study(
        preset="tiny",
        rank=1,
        n_grid=(200, 800),
        m_grid=(500,),
        replicates=4,
        methods=("hcl-ml+posterior", "hcl-ml+debiased-group", "slide+ridge", "raw+ridge", "bayes"),
        output=Path("results/downstream-tiny"),
    ),
    "default": DEFAULT,
    "baselines": Study(
        preset="baselines",
        noise_variance=(0.1, 1.0),
        replicates=10,
        methods=BASELINE_METHODS,
        output=Path("results/downstream-baselines"),
    ),
    "selected": Study(
        preset="selected",
        n_grid=(500, 2000),
        replicates=10,
        methods=("hcl-vb+posterior", "raw+ridge", *SELECTED_METHODS, "bayes"),
        output=Path("results/downstream-selected"),
    ),
    "deep": Study(
        preset="deep",
        noise_variance=(0.1, 1.0),
        replicates=10,
        methods=DEEP_METHODS,
        output=Path("results/downstream-deep"),
    ),
    "links": Study(
        preset="links",
        noise_variance=(1.0,),
        n_grid=(500, 2000, 8000),
        link=("sinh", "leaky"),
        replicates=3,
        methods=LINKED_METHODS,
        output=Path("results/downstream-links"),
    ),
    "coefficients": Study(
        preset="coefficients",
        n_grid=(1_000_000,),
        m_grid=(140, 200, 280, 400, 1000, 2000, 5000, 10_000),
        support=("123", "12"),
        replicates=50,
        methods=(*COEFFICIENT_METHODS, "raw+ridge", "bayes"),
        output=Path("results/downstream-coefficients"),
    ),
    "paper": Study(preset="paper", noise_variance=(0.1, 1.0), replicates=100, output=Path("results/downstream-paper")),
}


def parse_study(arguments: Sequence[str]) -> Study:
    """The study that the command line asks for; a bad one raises `ValueError` in one line."""
    default = PRESETS.get(peek(arguments, "preset")["preset"] or "default", DEFAULT)
    study = parse(Study, arguments, default, PROGRAM, __doc__)
    return study if study.dims else dataclasses.replace(study, dims=PRESET_DIMS.get(study.preset, ((100, 100, 100),)))


def make_cells(study: Study) -> tuple[DownstreamCell, ...]:
    """The grid: settings × noise variances × m × n."""
    hierarchies = [make_hierarchy(dims, study.rank, study.structures) for dims in study.dims]
    supports = [tuple(hierarchy.present(text, "support") for text in study.support) for hierarchy in hierarchies]
    return tuple(
        DownstreamCell(hierarchy, n, m, noise, study.response_noise_variance, support, link)
        for hierarchy, support in zip(hierarchies, supports, strict=True)
        for link in study.link
        for noise in study.noise_variance
        for m in study.m_grid
        for n in study.n_grid
    )


def plan_study(arguments: Sequence[str]) -> Plan:
    """What the command line asks for; raises `ValueError` or `OutputError`, in one line that names the argument."""
    study = parse_study(arguments)
    check_options(study, known_methods())
    for name in ("dims", "n_grid", "m_grid", "noise_variance", "link", *(["support"] if study.support else [])):
        check_list(name, getattr(study, name))
    if study.metric not in METRICS:
        raise ValueError(f"metric: unknown {study.metric!r}; expected one of {', '.join(METRICS)}")
    devices = configure_for(study)
    return make_plan(study, Downstream(), make_cells(study), devices)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--list-methods" in arguments:
        print(*known_methods(), sep="\n")
        return 0
    return run_command(PROGRAM, Study, plan_study, arguments)


if __name__ == "__main__":
    sys.exit(main())
