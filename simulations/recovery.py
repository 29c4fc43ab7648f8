"""The recovery study: how well each method recovers loadings, beside what the best possible method could do.

Claim (the paper's Section 4.1): errors fall like n^(-1/2), and fitting the hierarchy beats ignoring it. Draws truths and sample
covariances on a grid, runs every method on the same draws, and stores one tidy row a number under --output. A run that was
stopped, or is asked for more replicates, methods or n, computes only what is missing.

    python simulations/recovery.py                              # dims 100 100 100, rank 5: minutes
    python simulations/recovery.py --preset tiny                # seconds
    python simulations/recovery.py --preset paper --dry-run     # what the paper's grid would cost
    python simulations/recovery.py --n-grid 5000 20000 --noise-variance 1 10 --methods hcl-vb hcl-ml cramer-rao
    python simulations/recovery.py --dims 100 100 100 --dims 100 500 800 --rank 10      # two settings
    python simulations/recovery.py --structures 123:5 12:3 1 2 3 --rank 4               # a list; rank 4 where none is given
    python simulations/recovery.py --preset hierarchies         # fits that are told a wrong hierarchy
    python simulations/recovery.py --loadings-from tcga_brca5.npz --views mrna meth mirna
    python figures/recovery.py results/recovery                 # draws the figures
"""

import dataclasses
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hcl_jax import LATENT_LAWS, Hierarchy
from hcl_jax.experiments import FITTED, Cell, Recovery
from hcl_jax.experiments.cell import path_name
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
from hcl_jax.experiments.recovery import RECOVERY_METHODS, metric_names
from hcl_jax.experiments.store import write_bytes
from hcl_jax.real_data import RealTruth, fit_truth, read_truth, truth_bytes
from hcl_jax.views import load_views

PROGRAM = "recovery.py"
MAIN_METHODS = tuple(name for name in RECOVERY_METHODS if name != "detection")
WRONG_METHODS = ("hcl-vb", "hcl-ml", "hcl-shrunk", "hcl-gn", "hcl-svd", "naive-svd-denoised", "cramer-rao")
PAPER_N = (5000, 6000, 7000, 8000, 9000, 10000, 12000, 14000, 16000, 18000, 20000, 25000, 30000)
PAPER_DIMS = ((100, 100, 100), (100, 500, 800))


@dataclass(frozen=True)
class Study(SweepOptions):
    """Every option is described below; --preset sets the defaults that are shown, and any option overrides it."""

    preset: Literal["tiny", "default", "paper", "hierarchies"] = "default"
    """Where the other options start: seconds, minutes, the paper's grid (hours), or the grid of wrong hierarchies."""
    rank: int | None = 5
    """Rank of each structure for which --structures gives none. With --loadings-from, None keeps the ranks that the fit keeps."""
    noise_variance: tuple[float, ...] = (1.0,)
    """Noise variances, one setting each. With --loadings-from and none given: that of the fit."""
    n_grid: tuple[int, ...] = (2500, 5000, 10000, 20000, 40000)
    """Numbers of samples."""
    methods: tuple[str, ...] = MAIN_METHODS
    """Estimators and limits, by name; the limit `detection` counts the factors that can be seen."""
    output: Path = Path("results/recovery")
    """Folder of the results. It holds one seed and one dtype."""
    metric: str = "gram_frobenius"
    """Metric of the table at the end; all metrics are stored."""
    hierarchies: tuple[str, ...] = ("true",)
    """Hierarchies the estimators are told: true, missing (a structure), extra (one too many), low, high (ranks 2 off), merged."""
    latent: tuple[str, ...] = ("gaussian",)
    """Laws of the latent factors."""
    sampling: Literal["wishart", "data"] = "wishart"
    """Draw the covariance itself (its cost does not grow with n), or samples. Non-Gaussian latents are always sampled."""
    loadings_from: Path | None = None
    """An .npz file of real data: a fit of hcl-vb to its --views is the truth of every replicate."""
    views: tuple[str, ...] = ()
    """Names of the arrays in that file, one a modality, samples × features."""


PRESET_DIMS = {
    "tiny": ((12, 10, 8),),
    "default": ((100, 100, 100),),
    "paper": PAPER_DIMS,
    "hierarchies": ((100, 100, 100),),
}
PRESETS = {
    "tiny": Study(
        preset="tiny",
        rank=1,
        n_grid=(500, 2000),
        replicates=8,
        methods=("hcl-vb", "hcl-gn", "hcl-svd", "naive-svd", "cramer-rao"),
        output=Path("results/recovery-tiny"),
    ),
    "default": Study(),
    "paper": Study(
        preset="paper",
        rank=10,
        noise_variance=(10.0, 1.0),
        n_grid=PAPER_N,
        replicates=100,
        methods=RECOVERY_METHODS,
        output=Path("results/recovery-paper"),
    ),
    "hierarchies": Study(
        preset="hierarchies",
        structures=("123", "12", "13", "1", "2", "3"),
        n_grid=(5000, 20000),
        noise_variance=(1.0, 10.0),
        methods=WRONG_METHODS,
        hierarchies=FITTED,
        output=Path("results/recovery-hierarchies"),
    ),
}


def parse_study(arguments: Sequence[str]) -> Study:
    """The study that the command line asks for; a bad one raises `ValueError` in one line."""
    known = peek(arguments, "preset", "loadings-from")
    default = PRESETS.get(known["preset"] or "default", PRESETS["default"])
    if known["loadings-from"] is not None:  # what is not given, the file decides
        output = Path("results") / path_name(f"recovery-{Path(known['loadings-from']).stem}")
        default = dataclasses.replace(default, rank=None, structures=(), noise_variance=(), n_grid=(), output=output)
    study = parse(Study, arguments, default, PROGRAM, __doc__)
    return study if study.dims or study.loadings_from else dataclasses.replace(study, dims=PRESET_DIMS[study.preset])


def check(study: Study) -> None:
    """Raise `ValueError`, naming the argument, for what the cells and methods do not check themselves."""
    check_options(study, RECOVERY_METHODS)
    for law in study.latent:
        if law not in LATENT_LAWS:
            raise ValueError(f"latent: unknown {law!r}; expected some of {', '.join(LATENT_LAWS)}")
    for name in ("hierarchies", "latent", *(() if study.loadings_from else ("dims", "n_grid", "noise_variance"))):
        check_list(name, getattr(study, name))
    if bool(study.views) != bool(study.loadings_from):
        raise ValueError("views: expected together with --loadings-from FILE.npz")
    if study.loadings_from and study.dims:
        raise ValueError("dims: those of the views are used; expected no --dims with --loadings-from")
    if study.metric != Study.metric and study.metric not in metric_names():
        raise ValueError(f"metric: unknown {study.metric!r}; expected one of {', '.join(metric_names())}")


def make_cells(study: Study, hierarchies: Sequence[Hierarchy], label: str = "") -> tuple[Cell, ...]:
    """The grid: hierarchies × noise variances × latent laws × n × the hierarchies that are fitted."""
    return tuple(
        Cell(hierarchy, n, noise, latent, study.sampling if latent == "gaussian" else "data", label, fitted)
        for hierarchy in hierarchies
        for noise in study.noise_variance
        for latent in study.latent
        for n in study.n_grid
        for fitted in study.hierarchies
    )


def real_truth(study: Study) -> tuple[RealTruth, str, Callable[[], None]]:
    """The fit to the real data, its label, and what keeps it under OUTPUT for the next run, which then need not fit again."""
    assert study.loadings_from is not None
    views = load_views(study.loadings_from, study.views)
    request = f"{study.rank} {study.structures}".encode() + study.loadings_from.read_bytes()
    views_told_apart = "+".join(repr(name) if "+" in name else name for name in study.views)
    label = path_name(f"{study.loadings_from.stem}-{views_told_apart}-{zlib.crc32(request):08x}")
    path = study.output / "loadings" / f"{label}.npz"
    if path.exists():
        return read_truth(path), label, lambda: None
    told = study.rank is not None or bool(study.structures)
    hierarchy = make_hierarchy([view.shape[1] for view in views], study.rank, study.structures) if told else None
    print(f"fitting hcl-vb to {', '.join(study.views)} of {study.loadings_from}", flush=True)
    truth = fit_truth(views, hierarchy, study.dtype)
    return truth, label, lambda: write_bytes(path, truth_bytes(truth), study.output)


def describe_truth(truth: RealTruth) -> str:
    """What the fit found, in two lines."""
    return (
        f"truth: ranks {truth.hierarchy}, noise variance {truth.noise_variance:.4g}, fitted to {truth.n_samples} samples "
        f"(status {truth.status})\nheld-out log-likelihood per sample: {truth.held_out:.2f}, "
        f"of independent features: {truth.held_out_independent:.2f}"
    )


def plan_study(arguments: Sequence[str]) -> Plan:
    """What the command line asks for; raises `ValueError` or `OutputError`, in one line that names the argument."""
    study = parse_study(arguments)
    check(study)
    devices = configure_for(study)
    label, loadings, keep_truth = "", {}, lambda: None
    if study.loadings_from:
        truth, label, keep_truth = real_truth(study)
        print(describe_truth(truth))
        hierarchies, loadings = [truth.hierarchy], {label: truth.loadings}
        n_grid = study.n_grid or tuple(truth.n_samples * factor for factor in (1, 4, 16))
        study = dataclasses.replace(study, n_grid=n_grid, noise_variance=study.noise_variance or (truth.noise_variance,))
    else:
        hierarchies = [make_hierarchy(dims, study.rank, study.structures) for dims in study.dims]
    return make_plan(study, Recovery(loadings), make_cells(study, hierarchies, label), devices, keep_truth)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_command(PROGRAM, Study, plan_study, arguments)


if __name__ == "__main__":
    sys.exit(main())
