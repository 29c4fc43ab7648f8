"""The study of FactorCL: does it keep what views share about a task, and what each has for itself, where a contrast of views
keeps only the former?

Claims (Liang et al. 2023, Figure 2, Tables 1 and 3): codes of FactorCL predict labels from unique information, which those of
SimCLR lose; its parts hold what their names say. Rows are x = Λz + ε and the label the sign of a sum of factors, of which a
`share` is of a single view. `accuracy` is that of a linear probe of the encoders' codes on rows that no method has seen;
`part_12` is the R² of every structure's factors from the codes of the part 12. Designs: "sum" with normal loadings, in which a
probe of the features is near the Bayes limit; "product", in which it is at chance; "published", with loadings that are all
positive.

    python simulations/factorcl.py                           # two designs, five shares, two draws
    python simulations/factorcl.py --preset tiny             # a minute
    python simulations/factorcl.py --preset targets          # five draws of what the claims are judged by
    python simulations/factorcl.py --preset parts            # what NCE-CLUB does, by kind of heads and steps
    python simulations/factorcl.py --preset lattice          # three views, labels from some of the seven structures
    python simulations/factorcl.py --preset irrelevant       # thirty shared factors that the label does not need
    python simulations/factorcl.py --preset strength         # of the noise in augmentations
    python simulations/factorcl.py --preset dimension        # views of 50, 200 and 1,000 features
    python simulations/factorcl.py --preset published        # the paper's design
    python simulations/factorcl.py --preset beside           # HCL on the same rows
    python simulations/factorcl.py --list-methods
    python figures/factorcl.py results/factorcl              # draws the figures
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
from hcl_jax.experiments.factorcl import DESIGNS, FACTORCL_METHODS, Factorcl, FactorclCell
from hcl_jax.structure import as_structure

PROGRAM = "factorcl.py"
METRIC = "accuracy"
BASELINES = ("raw", "untrained", "simclr", "supcon", "cross-self", "cross-self-heads")
METHODS = ("factorcl-sup", "factorcl-ssl", *BASELINES)
NOISE = {"sum": 0.25, "product": 0.04, "published": 0.0}
RANK = {"sum": 10, "product": 4, "published": 50}
"""Of every structure, in the designs of the default preset."""


@dataclass(frozen=True)
class Study(SweepOptions):
    """Every option is described below; --preset sets the defaults that are shown, and any option overrides it."""

    preset: Literal[
        "tiny", "default", "targets", "parts", "lattice", "irrelevant", "strength", "dimension", "published", "beside"
    ] = "default"
    """Where the other options start: see above."""
    rank: int | None = None
    """Factors of each structure for which --structures gives none. Default: 10, of products 4, in the published design 50."""
    noise_variance: tuple[float, ...] = ()
    """Noise variances, one setting each. Default: 0.25, of products 0.04, in the published design 0."""
    design: tuple[str, ...] = ("sum", "product")
    """What the label is the sign of: sum, product or published."""
    share: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of the label that are of a single view."""
    label: tuple[str, ...] = ()
    """Structures that the label is made of. Default: all."""
    training_steps: tuple[int, ...] = (2000,)
    """Steps of the training."""
    strength: tuple[float, ...] = (1.0,)
    """Standard deviations of the noise in augmentations."""
    n_grid: tuple[int, ...] = (12000,)
    """Numbers of rows that methods see."""
    replicates: int = 2
    """Independent draws of each cell, numbered from 0: raising it later adds to what is there."""
    methods: tuple[str, ...] = METHODS
    """What to compute, by name."""
    output: Path = Path("results/factorcl")
    """Folder of the results. It holds one seed and one dtype."""
    metric: str = METRIC
    """Metric of the table at the end; all metrics are stored."""
    list_methods: bool = False
    """Print every method's name and stop."""


PARTS = ("factorcl-sup", "factorcl-sup-no-club", "factorcl-sup-terms", "factorcl-sup-terms-no-club")
LAST = ("factorcl-sup-last", "factorcl-sup-no-club-last", "factorcl-sup-plain-last")
PRESETS = {
    "tiny": Study(
        preset="tiny",
        rank=4,
        noise_variance=(0.25,),
        design=("product",),
        share=(0.0, 1.0),
        n_grid=(600,),
        training_steps=(60,),
        replicates=2,
        methods=("factorcl-sup", "factorcl-ssl", "raw", "simclr"),
        output=Path("results/factorcl-tiny"),
    ),
    "default": Study(),
    "targets": Study(
        preset="targets",
        share=(0.0, 0.5, 1.0),
        replicates=5,
        output=Path("results/factorcl-targets"),
    ),
    "parts": Study(
        preset="parts",
        design=("sum",),
        share=(0.5,),
        training_steps=(2000, 6000),
        replicates=5,
        methods=(*PARTS, *LAST, "factorcl-sup-plain", "factorcl-sup-shared", "untrained"),
        output=Path("results/factorcl-parts"),
    ),
    "lattice": Study(
        preset="lattice",
        dims=((50, 50, 50),),
        rank=4,
        design=("sum",),
        share=(0.5,),
        label=("12", "3"),
        replicates=5,
        methods=("factorcl-sup", "factorcl-sup-pairwise", "simclr", "untrained", "raw"),
        output=Path("results/factorcl-lattice"),
    ),
    "irrelevant": Study(
        preset="irrelevant",
        structures=("12:30", "1:10", "2:10"),
        design=("sum",),
        share=(1.0,),
        methods=(*PARTS, "simclr", "raw"),
        replicates=5,
        output=Path("results/factorcl-irrelevant"),
    ),
    "strength": Study(
        preset="strength",
        design=("sum",),
        share=(1.0,),
        strength=(0.1, 0.5, 1.0, 1.5, 2.0),
        methods=("factorcl-ssl", "factorcl-ssl-published", "factorcl-ssl-conditioned", "cross-self"),
        replicates=3,
        output=Path("results/factorcl-strength"),
    ),
    "dimension": Study(
        preset="dimension",
        dims=((50, 50), (200, 200), (1000, 1000)),
        design=("sum",),
        share=(0.5,),
        methods=("factorcl-sup", "factorcl-ssl", "simclr", "raw"),
        replicates=3,
        output=Path("results/factorcl-dimension"),
    ),
    "published": Study(
        preset="published",
        dims=((100, 100),),
        design=("published",),
        share=(0.0, 0.5, 1.0),
        methods=("factorcl-sup", "factorcl-ssl", "factorcl-ssl-published", *BASELINES),
        replicates=3,
        output=Path("results/factorcl-published"),
    ),
    "beside": Study(
        preset="beside",
        design=("sum",),
        share=(0.0, 0.5, 1.0),
        methods=("factorcl-sup", "factorcl-ssl", "hcl"),
        replicates=3,
        output=Path("results/factorcl-beside"),
    ),
}


def parse_study(arguments: Sequence[str]) -> Study:
    """The study that the command line asks for; a bad one raises `ValueError` in one line."""
    default = PRESETS.get(peek(arguments, "preset")["preset"] or "default", PRESETS["default"])
    study = parse(Study, arguments, default, PROGRAM, __doc__)
    return study if study.dims else dataclasses.replace(study, dims=((50, 50),))


def make_cells(study: Study) -> tuple[FactorclCell, ...]:
    """The grid: designs × settings × noise variances × n × shares × strengths × steps."""
    return tuple(
        FactorclCell(hierarchy, n, noise, design, share, label, steps, strength)
        for design in study.design
        for dims in study.dims
        for hierarchy in [make_hierarchy(dims, RANK[design] if study.rank is None else study.rank, study.structures)]
        for label in [tuple(as_structure(name, hierarchy.n_modalities, "label") for name in study.label)]
        for noise in study.noise_variance or (NOISE[design],)
        for n in study.n_grid
        for share in study.share
        for strength in study.strength
        for steps in study.training_steps
    )


def plan_study(arguments: Sequence[str]) -> Plan:
    """What the command line asks for; raises `ValueError` or `OutputError`, in one line that names the argument."""
    study = parse_study(arguments)
    check_options(study, FACTORCL_METHODS)
    for name in ("dims", "n_grid", "design", "share", "training_steps", "strength"):
        check_list(name, getattr(study, name))
    for design in study.design:
        if design not in DESIGNS:
            raise ValueError(f"design: unknown {design!r}; expected one of {', '.join(DESIGNS)}")
    if study.metric != METRIC:
        raise ValueError(f"metric: is {study.metric!r}; expected {METRIC}, for others see figures/factorcl.py --csv")
    devices = configure_for(study)
    return make_plan(study, Factorcl(), make_cells(study), devices)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--list-methods" in arguments:
        print(*FACTORCL_METHODS, sep="\n")
        return 0
    return run_command(PROGRAM, Study, plan_study, arguments)


if __name__ == "__main__":
    sys.exit(main())
