"""What the command lines of studies share: options, presets that single options override, plans that are checked before anything
is written, and one-line errors that name the argument."""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import polars as pl
import tyro

import hcl_jax
from hcl_jax.experiments.cluster import ClusterError, dask_executor
from hcl_jax.experiments.dry_run import format_costs, project_costs
from hcl_jax.experiments.executors import Executor, Stop, run_here, run_sweep
from hcl_jax.experiments.experiment import AnyCell, Experiment
from hcl_jax.experiments.methods import check_methods
from hcl_jax.experiments.runtime import configure, describe
from hcl_jax.experiments.store import Identity, OutputError, Store, read_results, set_aside_name
from hcl_jax.experiments.summary import format_summary, select_results, summarise
from hcl_jax.experiments.sweep import (
    Execution,
    Sweep,
    Task,
    check_memory,
    check_tasks,
    memory_available,
    memory_needed,
)
from hcl_jax.structure import Hierarchy, Structure, as_structure, structure_name

Study = TypeVar("Study")


@dataclass(frozen=True)
class SweepOptions:
    """The options of every study that sweeps a grid."""

    preset: str = "default"
    """Where the other options start."""
    dims: Annotated[tuple[tuple[int, ...], ...], tyro.conf.UseAppendAction] = ()
    """Features of each modality. May be given several times, for several settings. Default: those of the preset."""
    rank: int | None = 5
    """Rank of each structure for which --structures gives none."""
    structures: tuple[str, ...] = ()
    """Structures as modalities and rank: 123:5 12:3 1 (1.10:2 where modalities exceed 9). None given: every subset."""
    noise_variance: tuple[float, ...] = (1.0,)
    """Noise variances, one setting each."""
    n_grid: tuple[int, ...] = ()
    """Numbers of samples."""
    replicates: int = 20
    """Independent draws of each cell, numbered from 0: raising it later adds to what is there."""
    methods: tuple[str, ...] = ()
    """What to compute, by name."""
    seed: int = 0
    """Root of all random numbers."""
    dtype: Literal["float32", "float64"] = "float64"
    """Precision of all computations."""
    output: Path = Path("results")
    """Folder of the results. It holds one seed and one dtype."""
    metric: str = ""
    """Metric of the table at the end; all metrics are stored."""
    dry_run: bool = False
    """Time one replicate of each program, print what is left to compute and its projected time and memory, write nothing."""
    batched: bool = False
    """Replicates side by side in one program: always so on accelerators. Else one after the other, reproducible bit for bit."""
    devices: int | None = None
    """Devices over which replicates are spread: by default all accelerators; on a CPU host devices, by default as many as cores,
    but one with --batched, and in each worker."""
    memory_gib: float = 4.0
    """Budget for the draws that are held at a time: here, on all workers of --local-cluster, or on each of --scheduler."""
    scheduler: str | None = None
    """Address of a dask.distributed scheduler, such as tcp://10.0.0.5:8786: its workers compute the parts (docs/clusters.md)."""
    local_cluster: int | None = None
    """Start a dask.distributed cluster of this many workers here, and let them compute the parts."""
    progress: bool = True
    """Show the progress bar."""


def check_options(study: SweepOptions, known_methods: Sequence[str]) -> None:
    """Raise `ValueError`, naming the argument, for what the cells and methods do not check themselves."""
    check_methods(study.methods, known_methods)
    optional = [name for name in ("devices", "local_cluster") if getattr(study, name) is not None]
    for name in ("replicates", "memory_gib", *optional):
        if not getattr(study, name) > 0:
            raise ValueError(f"{name}: is {getattr(study, name)}; expected a positive number")
    if not 0 <= study.seed < 2**32:
        raise ValueError(f"seed: is {study.seed}; expected an integer from 0 to 2^32 - 1")
    if study.rank is not None and study.rank < 1:
        raise ValueError(f"rank: is {study.rank}; expected a positive integer")
    check_list("methods", study.methods)
    if study.scheduler is not None and study.local_cluster is not None:
        raise ValueError(f"local_cluster: is {study.local_cluster} beside --scheduler; expected one of the two")
    if _on_a_cluster(study) and importlib.util.find_spec("distributed") is None:
        name = "scheduler" if study.scheduler is not None else "local_cluster"
        raise ValueError(f"{name}: needs dask.distributed; expected an installation of hcl_jax[distributed]")


def _on_a_cluster(study: SweepOptions) -> bool:
    return study.scheduler is not None or study.local_cluster is not None


@dataclass(frozen=True)
class Plan:
    """What a study will do: all that is checked before anything is written."""

    study: SweepOptions
    sweep: Sweep
    store: Store
    execution: Execution
    tasks: list[Task]
    before_writing: Callable[[], None]
    memory_needed: float
    """GiB."""


def configure_for(study: SweepOptions) -> int:
    """Set JAX up as the options ask; returns how many devices to use."""
    devices = study.devices or 1 if _on_a_cluster(study) else study.devices
    used = configure(study.dtype, devices, study.batched)
    if study.batched and jax.default_backend() == "cpu" and used < (study.devices or 1):
        raise ValueError(f"devices: is {study.devices} beside --batched; expected 1, as batched replicates share one host device")
    return used


def make_plan(
    study: SweepOptions,
    experiment: Experiment,
    cells: Sequence[AnyCell],
    devices: int,
    before_writing: Callable[[], None] = lambda: None,
) -> Plan:
    """Raises `ValueError` or `OutputError`, in one line that names the argument, for whatever is wrong."""
    store = Store(study.output, Identity(experiment.study, study.seed, study.dtype, hcl_jax.__version__))
    sweep = Sweep(experiment, tuple(cells), study.methods, study.replicates, study.seed, study.dtype)
    batched = study.batched or jax.default_backend() != "cpu"
    memory = study.memory_gib / (study.local_cluster or 1)
    execution, tasks = Execution(batched, memory, study.progress, devices), sweep.tasks(store)
    check_tasks(sweep, tasks, execution)
    needed = memory_needed(sweep, {task.cell for task in tasks}, execution) * (study.local_cluster or 1)
    if study.scheduler is None:  # other machines have memory of their own
        check_memory(needed, memory_available())
    return Plan(study, sweep, store, execution, tasks, before_writing, needed)


def run_plan(plan: Plan, command: Sequence[str]) -> int | None:
    """Compute what is missing, and print the summary; or return the signal that it was stopped by.

    Raises `OutputError` when OUTPUT cannot be written, and `ClusterError` when there is no cluster to compute on.
    """
    study, sweep, tasks = plan.study, plan.sweep, plan.tasks
    for path, reason in plan.store.unusable.items():
        print(f"{reason}: to be set aside as {set_aside_name(path).name} and computed again")
    if study.dry_run:
        print(format_costs(project_costs(sweep, tasks, plan.execution)) if tasks else "nothing left to compute")
        return None
    record = {"config": dataclasses.asdict(study), "command": list(command), **describe()}
    if tasks:
        print(f"{len(tasks)} parts to compute, in about {plan.memory_needed:.2g} GiB of memory at most")
    with Stop() as stop, _executor(study, bool(tasks)) as executor:
        if tasks:
            plan.before_writing()
        report = run_sweep(sweep, tasks, plan.store, plan.execution, record, executor, stop)
    print(f"computed {report.n_parts} parts in {report.seconds:.1f} s, {report.n_compilations} programs compiled\n")
    if report.stopped_by is not None:
        return report.stopped_by
    table = select_results(read_results(study.output), sweep.cells, study.methods, study.replicates)
    print(format_summary(summarise(table, study.metric), study.metric))
    return None


def _executor(study: SweepOptions, needed: bool) -> contextlib.AbstractContextManager[Executor]:
    if needed and _on_a_cluster(study):
        return dask_executor(study.scheduler, study.local_cluster)
    return contextlib.nullcontext(run_here)


def run_command(
    program: str, options: type, plan: Callable[[Sequence[str]], Plan], arguments: Sequence[str] | None = None
) -> int:
    """A study's command line; returns the exit code: 2, after one line that names the argument, on bad input; 128 + the signal,
    after one line that says how to go on, when it was stopped."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        made = plan(arguments)
    except (ValueError, OutputError) as error:
        return _refuse(program, options, error)
    try:
        stopped_by = run_plan(made, [program, *arguments])
    except (OutputError, ClusterError) as error:
        return _refuse(program, options, error)
    if stopped_by is not None:
        name = signal.Signals(stopped_by).name
        print(
            f"{program}: stopped by {name}; what was computed is kept, and the same command goes on from there", file=sys.stderr
        )
        return 128 + stopped_by
    return 0


def run_table(
    program: str,
    options: type,
    description: str | None,
    *,
    check: Callable[[Any], None],
    run: Callable[[Any], pl.DataFrame],
    summary: Callable[[pl.DataFrame], pl.DataFrame],
) -> int:
    """The command line of a study that computes one table on one device, in double precision, writes it to `output` of its
    options, and prints its summary; returns the exit code: 2, after one line that names the argument, on bad input."""
    study: Any = tyro.cli(options, description=description)
    try:
        check(study)
        configure("float64", devices=1)
        table = run(study)
        table.write_parquet(study.output)
    except (ValueError, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    with pl.Config(tbl_cols=-1, tbl_width_chars=200, tbl_rows=-1, float_precision=3, tbl_hide_dataframe_shape=True):
        print(summary(table))
    return 0


def _refuse(program: str, options: type, error: Exception) -> int:
    print(f"{program}: error: {error_line(options, error)}", file=sys.stderr)
    return 2


def peek(arguments: Sequence[str], *names: str) -> dict[str, str | None]:
    """The values of a few options, before all are parsed: those that decide what the defaults are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('-', '_')}", dest=name)
    try:
        known, _ = parser.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(f"{error.argument_name}: {error.message}") from None
    return vars(known)


def parse(study: type[Study], arguments: Sequence[str], default: Study, prog: str, description: str | None) -> Study:
    """The study that the command line asks for, from this default on; a bad command line raises `ValueError` in one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(study, prog=prog, description=description, args=list(arguments), default=default)
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_first_sentence(said.getvalue())) from None
        raise


def _first_sentence(box: str) -> str:
    """What tyro's message says, without its title and frame, and the form of the option that it is about."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    parts = "\n".join("" if set(line) <= {"─", "-"} else line for line in lines).split("\n\n")
    expected = [part.splitlines()[1] for part in parts if part.startswith("Argument helptext:")]
    said = [" ".join(part.split()) for part in parts if not part.startswith(("For full helptext", "Argument helptext"))]
    named = [part for part in said if "--" in part] or said[-1:]
    return "; ".join([named[0].rstrip("."), *(f"expected {form}" for form in expected[:1]), "see --help"])


def error_line(study: Any, error: Exception) -> str:
    """The error in one line, an argument's name in front as it is written on the command line."""
    name, colon, rest = " ".join(str(error).split()).partition(":")
    flags = {field.name: f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(study)} | {"ranks": "--rank"}
    return f"{flags.get(name, name)}{colon}{rest}"


def check_list(name: str, values: Sequence[Any]) -> None:
    """Raise `ValueError` unless there is at least one value, and each once."""
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{name}: got {' '.join(map(str, values)) or 'nothing'}; expected at least one value, each once")


def make_hierarchy(dims: Sequence[int], rank: int | None, structures: Sequence[str]) -> Hierarchy:
    """The hierarchy of `--rank` and `--structures`: those listed, or every subset of the modalities.

    >>> str(make_hierarchy((9, 9, 9), 2, ("123:1", "12")))
    '123:1,12:2'
    """
    if structures:
        named = [_structure_and_rank(text, len(dims), rank) for text in structures]
        check_list("structures", [structure_name(s) for s, _ in named])
        try:
            return Hierarchy(dims, dict(named))
        except ValueError as error:
            raise ValueError(str(error).replace("ranks:", "structures:", 1)) from None
    if rank is None:
        raise ValueError("rank: is None; expected a positive integer")
    return Hierarchy.full(dims, rank)


def _structure_and_rank(text: str, n_modalities: int, rank: int | None) -> tuple[Structure, int]:
    """From `123:5`, or from `123` with the rank given."""
    modalities, _, own = text.partition(":")
    if not (own.isdecimal() or (own == "" and rank is not None)):
        raise ValueError(f"structures: cannot read {text!r}; expected modalities:rank, such as 123:5, or give --rank")
    return as_structure(modalities, n_modalities, "structures"), int(own or rank or 0)
