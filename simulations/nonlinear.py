"""The nonlinear study: how much of every structure's factors each method recovers, through links that it does not know.

Claims (the paper's Section 3 and Figure 5, on deep encoders): HCL recovers shared, partially shared and private factors where
views are nonlinear functions of them, and other deep methods do not. Rows are x = g(Λz + ε), by view; R² of the true factors of a
structure, regressed on that structure's scores, on rows that no method has seen; `leak` is the largest R² of another's.
Beside the methods stand `linear` (hcl-ml on standardised features), `hcl-start` (where hcl starts: no steps), `supervised` (the
encoders of hcl, trained on the factors themselves: what the architecture can do) and `oracle` (link and loadings known).

    python simulations/nonlinear.py                             # three links, n = 8,000: an hour
    python simulations/nonlinear.py --preset tiny               # a minute
    python simulations/nonlinear.py --preset links --dry-run    # every link, the ones that lose information too
    python simulations/nonlinear.py --link leakyQ --n-grid 1000 2000 4000 8000 --methods hcl hcl-copula supervised
    python simulations/nonlinear.py --latent laplace --link leaky
    python simulations/nonlinear.py --preset absent             # a structure that is offered, and is not there
    python simulations/nonlinear.py --list-methods
    python figures/nonlinear.py results/nonlinear               # draws the figures
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
from hcl_jax.experiments.nonlinear import NONLINEAR_METHODS, Nonlinear, NonlinearCell
from hcl_jax.links import LINKS
from hcl_jax.structure import Hierarchy, as_structure

PROGRAM = "nonlinear.py"
METRICS = ("r_squared", "r_squared_all", "leak", "quadratic")
METHODS = ("linear", "hcl-copula", "hcl-start", "hcl", "supervised", "oracle")
DEEP = ("misa", "convirt", "dlf", "tsd", "hcl-released")


@dataclass(frozen=True)
class Study(SweepOptions):
    """Every option is described below; --preset sets the defaults that are shown, and any option overrides it."""

    preset: Literal["tiny", "default", "targets", "links", "deep", "absent"] = "default"
    """Where the other options start: a minute; three links against n; ten replicates at n = 8,000 and 1,000; every link; the deep
    rivals; structures that are offered and absent."""
    rank: int | None = 4
    """Rank of each structure for which --structures gives none."""
    noise_variance: tuple[float, ...] = (0.09,)
    """Noise variances, one setting each: noise enters before the link."""
    n_grid: tuple[int, ...] = (1000, 2000, 4000, 8000)
    """Numbers of rows that methods see."""
    link: tuple[str, ...] = ("sinh", "leaky", "leakyQ")
    """Links between the linear model and the features; --list-links prints all."""
    latent: tuple[str, ...] = ("gaussian",)
    """Laws of the factors."""
    absent: tuple[str, ...] = ()
    """Structures that methods are offered and the truth lacks, one setting each."""
    replicates: int = 3
    """Independent draws of each cell, numbered from 0: raising it later adds to what is there."""
    methods: tuple[str, ...] = METHODS
    """What to compute, by name."""
    output: Path = Path("results/nonlinear")
    """Folder of the results. It holds one seed and one dtype."""
    metric: str = "r_squared"
    """Metric of the table at the end; all metrics are stored."""
    list_methods: bool = False
    """Print every method's name and stop."""
    list_links: bool = False
    """Print every link's name and stop."""


PRESET_DIMS = {"tiny": ((12, 10, 8),)}
UNEQUAL = ("123:2", "12:1", "13:3", "23:2", "1:4", "2:1", "3:2")
PRESETS = {
    "tiny": Study(
        preset="tiny",
        rank=1,
        n_grid=(400, 1200),
        link=("leaky",),
        replicates=2,
        methods=("linear", "hcl-copula", "hcl", "oracle"),
        output=Path("results/nonlinear-tiny"),
    ),
    "default": Study(),
    "targets": Study(
        preset="targets",
        n_grid=(1000, 8000),
        link=("sinh", "cubic", "leaky", "leakyQ"),
        replicates=10,
        output=Path("results/nonlinear-targets"),
    ),
    "links": Study(
        preset="links",
        n_grid=(4000,),
        link=tuple(LINKS),
        methods=("linear", "hcl-copula", "hcl-flow", "hcl", "oracle"),
        output=Path("results/nonlinear-links"),
    ),
    "deep": Study(
        preset="deep",
        n_grid=(1000, 8000),
        link=("identity", "sinh", "leaky", "leakyQ"),
        methods=(*METHODS, *DEEP),
        output=Path("results/nonlinear-deep"),
    ),
    "absent": Study(
        preset="absent",
        n_grid=(8000,),
        link=("leaky",),
        absent=("12", "123"),
        replicates=10,
        methods=("hcl",),
        output=Path("results/nonlinear-absent"),
    ),
}


def parse_study(arguments: Sequence[str]) -> Study:
    """The study that the command line asks for; a bad one raises `ValueError` in one line."""
    default = PRESETS.get(peek(arguments, "preset")["preset"] or "default", PRESETS["default"])
    study = parse(Study, arguments, default, PROGRAM, __doc__)
    return study if study.dims else dataclasses.replace(study, dims=PRESET_DIMS.get(study.preset, ((50, 50, 50),)))


def make_cells(study: Study) -> tuple[NonlinearCell, ...]:
    """The grid: settings × noise variances × laws × links × structures offered beside the truth × n."""
    hierarchies = [make_hierarchy(dims, study.rank, study.structures) for dims in study.dims]
    return tuple(
        NonlinearCell(truth, n, noise, link, latent, told)
        for offered in hierarchies
        for truth, told in truths_and_told(offered, study.absent)
        for noise in study.noise_variance
        for latent in study.latent
        for link in study.link
        for n in study.n_grid
    )


def truths_and_told(offered: Hierarchy, absent: Sequence[str]) -> list[tuple[Hierarchy, Hierarchy | None]]:
    """(the truth, the hierarchy that methods are told where that is another one): all of `offered`, or without each that is
    absent."""
    if not absent:
        return [(offered, None)]
    left_out = [as_structure(name, offered.n_modalities, "absent") for name in absent]
    return [
        (Hierarchy(offered.dims, {s: r for s, r in offered.ranks if s != offered.present(gone, "absent")}), offered)
        for gone in left_out
    ]


def plan_study(arguments: Sequence[str]) -> Plan:
    """What the command line asks for; raises `ValueError` or `OutputError`, in one line that names the argument."""
    study = parse_study(arguments)
    check_options(study, NONLINEAR_METHODS)
    for name in ("dims", "n_grid", "noise_variance", "link", "latent", *(["absent"] if study.absent else [])):
        check_list(name, getattr(study, name))
    if study.metric not in METRICS:
        raise ValueError(f"metric: unknown {study.metric!r}; expected one of {', '.join(METRICS)}")
    devices = configure_for(study)
    return make_plan(study, Nonlinear(), make_cells(study), devices)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for option, names in (("--list-methods", NONLINEAR_METHODS), ("--list-links", LINKS)):
        if option in arguments:
            print(*names, sep="\n")
            return 0
    return run_command(PROGRAM, Study, plan_study, arguments)


if __name__ == "__main__":
    sys.exit(main())
