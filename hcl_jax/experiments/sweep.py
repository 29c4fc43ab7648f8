"""A sweep: cells × methods × replicates, cut into parts, computed where they are missing, and stored one by one."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import jax
import numpy as np

from hcl_jax.estimators import ESTIMATORS
from hcl_jax.experiments.cell import Cell
from hcl_jax.experiments.mapping import Slots, place
from hcl_jax.experiments.progress import Progress
from hcl_jax.experiments.replicate import Drawn, DrawSpec, analyse, draw_program, shared_arguments, trace
from hcl_jax.experiments.runtime import CompilationCounter
from hcl_jax.experiments.store import PART_SIZE, Part, Store
from hcl_jax.experiments.tidy import tidy_rows
from hcl_jax.limits import LIMITS

LIKELIHOOD_METHODS = ("hcl-ml", "hcl-vb")  # unbounded where there are as many factors as degrees of freedom
BATCH_OVERHEAD = 6  # d × d matrices that a method holds per replicate when replicates are batched
GIB = 2**30


@dataclass(frozen=True)
class Execution:
    """How a sweep is computed; none of it changes what is computed, and none of it identifies a result."""

    batched: bool = False
    memory_gib: float = 4.0
    progress: bool = True
    devices: int | None = None
    """How many of the devices to use; None for all."""

    @property
    def used_devices(self) -> int:
        return min(self.devices or jax.device_count(), jax.device_count())


@dataclass(frozen=True)
class Task:
    """One part of one method in one cell."""

    cell: Cell
    method: str
    part: Part


@dataclass(frozen=True)
class Sweep:
    """What is to be computed. `loadings` holds the fitted loadings of real data, by their label."""

    study: str
    cells: tuple[Cell, ...]
    methods: tuple[str, ...]
    replicates: int
    seed: int
    dtype: str
    loadings: dict[str, np.ndarray] = field(default_factory=dict)

    def tasks(self, store: Store | None) -> list[Task]:
        """The parts that are not stored yet; tasks on the same draws stand together."""
        tasks = []
        for _, cells in groupby(self.cells, key=lambda cell: cell.draw_name):
            missing = [
                Task(cell, method, part)
                for cell in cells
                for method in self.methods
                for part in (store.missing(cell.name, method, self.replicates) if store else [Part(0, self.replicates - 1)])
            ]
            tasks += sorted(missing, key=lambda task: (task.part.first, task.part.last))
        return tasks


@dataclass
class Report:
    """What a sweep did: parts stored, programs compiled (or found in the cache), seconds."""

    n_parts: int = 0
    n_compilations: int = 0
    seconds: float = 0.0


def check_methods(methods: Iterable[str]) -> None:
    """Raise `ValueError` unless every name is an estimator or a limit."""
    known = {**ESTIMATORS, **LIMITS}
    for method in methods:
        if method not in known:
            raise ValueError(f"methods: unknown {method!r}; expected some of {', '.join(known)}")


def check_tasks(sweep: Sweep, tasks: list[Task], execution: Execution) -> None:
    """Trace every program once without computing, so that what a method refuses is said before anything is written.

    Raises `ValueError` that names the argument.
    """
    for task in tasks:
        n_factors = task.cell.fitted_hierarchy.n_factors
        if task.method in LIKELIHOOD_METHODS and n_factors >= task.cell.n - 1:
            raise ValueError(
                f"n_grid: holds {task.cell.n}; {task.method} with {n_factors} factors expects more than {n_factors + 1} samples"
            )
    for (spec, fitted, method), task in {_program_key(sweep, task): task for task in tasks}.items():
        slots = Slots.spread(0, 1, chunk_size(task.cell, sweep.dtype, execution))
        try:
            drawn = jax.eval_shape(draw_program(spec, execution.batched), *draw_arguments(sweep, task.cell, slots))
            trace(method, fitted, drawn, slots.counts, execution.batched)
        except ValueError as error:
            raise ValueError(f"methods: {method} cannot be used here, {error}") from error


def _program_key(sweep: Sweep, task: Task) -> tuple:
    return DrawSpec.of(task.cell, sweep.dtype), task.cell.fitted_hierarchy, task.method


def chunk_size(cell: Cell, dtype: str, execution: Execution) -> int:
    """Places a device: what the memory budget allows, and no more than a part needs.

    At least two, for a leading axis of length one would be simplified away, and the bits might follow.
    """
    d = cell.hierarchy.n_features
    matrices = BATCH_OVERHEAD if execution.batched else 1
    allowed = execution.memory_gib * GIB / (jax.device_count() * matrices * d * d * np.dtype(dtype).itemsize)
    return max(2, min(-(-PART_SIZE // execution.used_devices), int(allowed)))


def draw_program_of(sweep: Sweep, cell: Cell, execution: Execution) -> Callable[..., Drawn]:
    """The program that draws a cell's replicates."""
    return draw_program(DrawSpec.of(cell, sweep.dtype), execution.batched)


def draw_arguments(sweep: Sweep, cell: Cell, slots: Slots) -> tuple:
    """What that program is called with, on the devices."""
    shared = shared_arguments(cell, sweep.seed, sweep.dtype, sweep.loadings.get(cell.loadings))
    return place(shared, split=False), place(slots.replicates, split=True), place(slots.counts, split=True)


class Draws:
    """Draws chunks of replicates; the latest stays on the devices, so that all methods of a part share it."""

    def __init__(self, sweep: Sweep, execution: Execution):
        self.sweep, self.execution = sweep, execution
        self._key: tuple | None = None
        self._latest: Drawn | None = None

    def chunks(self, task: Task) -> Iterator[tuple[Drawn, Slots]]:
        """The draws of a part, and where its replicates stand in them."""
        size = chunk_size(task.cell, self.sweep.dtype, self.execution)
        used = self.execution.used_devices
        step = size * used
        for first in range(task.part.first, task.part.last + 1, step):
            slots = Slots.spread(first, min(step, task.part.last + 1 - first), size, used)
            yield self._draw(task.cell, slots), slots

    def _draw(self, cell: Cell, slots: Slots) -> Drawn:
        key = (cell.draw_name, slots.replicates.tobytes())
        if self._latest is None or key != self._key:
            self._key = self._latest = None  # lets go of the memory first
            self._latest = draw_program_of(self.sweep, cell, self.execution)(*draw_arguments(self.sweep, cell, slots))
            self._key = key
        return self._latest


def compute(task: Task, draws: Draws) -> dict[str, np.ndarray]:
    """The outcome of one part, each metric with the replicates as leading axis."""
    pieces = []
    for drawn, slots in draws.chunks(task):
        counts = place(slots.counts, split=True)
        outcome = jax.device_get(analyse(task.method, task.cell.fitted_hierarchy, drawn, counts, draws.execution.batched))
        pieces.append({metric: slots.read(values) for metric, values in outcome.items()})
    return {metric: np.concatenate([piece[metric] for piece in pieces]) for metric in pieces[0]}


def run_sweep(sweep: Sweep, tasks: list[Task], store: Store, execution: Execution, run: dict[str, Any]) -> Report:
    """Compute and store the tasks; with none, nothing is computed, compiled or written.

    `run` is the manifest's record of this run. Raises `OutputError` when a part cannot be written.
    """
    report, start = Report(len(tasks)), time.perf_counter()
    if tasks:
        store.begin(run)
        with CompilationCounter() as compilations:
            _run_tasks(sweep, tasks, store, execution)
        report.n_compilations, report.seconds = compilations.count, time.perf_counter() - start
    return report


def _run_tasks(sweep: Sweep, tasks: list[Task], store: Store, execution: Execution) -> None:
    draws = Draws(sweep, execution)
    with Progress(tasks, enabled=execution.progress) as progress:
        for _, group in groupby(tasks, key=lambda task: (task.cell.draw_name, task.part)):
            for task in group:
                start = time.perf_counter()
                outcome = compute(task, draws)
                seconds = time.perf_counter() - start
                table = tidy_rows(sweep.study, task.cell, task.method, task.part, outcome)
                store.write(task.cell.name, task.method, task.part, table, seconds)
                progress.finished(task, seconds, outcome["status"])
            store.write_manifest()
