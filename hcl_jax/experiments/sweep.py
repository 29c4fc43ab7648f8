"""A sweep: cells × methods × replicates, cut into parts, and the parts of one draw computed where they are missing."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil

from hcl_jax.compiled import keep_few_programs
from hcl_jax.experiments.cell import path_name
from hcl_jax.experiments.experiment import AnyCell, Experiment, trace
from hcl_jax.experiments.mapping import Slots, place
from hcl_jax.experiments.runtime import device_name
from hcl_jax.experiments.store import PART_SIZE, Part, Store
from hcl_jax.experiments.tidy import tidy_rows

FIT_OVERHEAD = 20  # draws that a fit holds the like of while it runs (measured with 1,900 features)
BATCH_OVERHEAD = 6  # draws that a method holds the like of per replicate when replicates are batched
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

    cell: AnyCell
    method: str
    part: Part


@dataclass(frozen=True)
class Group:
    """The tasks on one draw and one aligned block of replicates: what one process computes at a time."""

    tasks: tuple[Task, ...]

    @property
    def block(self) -> range:
        """The replicates that a process claims together."""
        first = self.tasks[0].part.first // PART_SIZE * PART_SIZE
        return range(first, first + PART_SIZE)

    @property
    def name(self) -> str:
        """Names the claim, whichever of its tasks are missing."""
        return f"{path_name(self.tasks[0].cell.draw_name)}/{self.block.start}"


class Done(NamedTuple):
    """A part that was computed and stored: its seconds, and the status of each replicate."""

    task: Task
    seconds: float
    status: np.ndarray


class ClaimedError(Exception):
    """Another process computes the group."""


@dataclass(frozen=True)
class Sweep:
    """What is to be computed."""

    experiment: Experiment
    cells: tuple[AnyCell, ...]
    methods: tuple[str, ...]
    replicates: int
    seed: int
    dtype: str

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
            tasks += in_order(missing)
        return tasks


def in_order(tasks: list[Task]) -> list[Task]:
    """Tasks on the same replicates, and so on the same draws, one after the other."""
    return sorted(tasks, key=lambda task: (task.part.first, task.part.last))


def group_tasks(tasks: list[Task]) -> list[Group]:
    """Tasks by draw and block, in the order they are in."""
    groups: dict[tuple, list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.cell.draw_name, task.part.first // PART_SIZE), []).append(task)
    return [Group(tuple(group)) for group in groups.values()]


def check_tasks(sweep: Sweep, tasks: list[Task], execution: Execution) -> None:
    """Trace every program once without computing, so that what a method refuses is said before anything is written.

    Raises `ValueError` that names the argument.
    """
    for task in tasks:
        sweep.experiment.check(task.cell, task.method)
    for task in {_program_key(sweep, task, execution): task for task in tasks}.values():
        slots = Slots.spread(0, 1, chunk_size(sweep, task.cell, execution))
        try:
            drawn = jax.eval_shape(draw_program_of(sweep, task.cell, execution), *draw_arguments(sweep, task.cell, slots))
            trace(sweep.experiment, task.cell, task.method, drawn, slots.counts, execution.batched)
        except ValueError as error:
            raise ValueError(f"methods: {task.method} cannot be used here, {error}") from error


def _program_key(sweep: Sweep, task: Task, execution: Execution) -> tuple:
    stages = sweep.experiment.stages(task.cell, task.method, execution.batched)
    return sweep.experiment.draw_key(task.cell, sweep.dtype), *(stage.program for stage in stages)


def chunk_size(sweep: Sweep, cell: AnyCell, execution: Execution) -> int:
    """Places a device: what the memory budget allows, and no more than a part needs.

    At least two, for a leading axis of length one would be simplified away, and the bits might follow.
    """
    held = sweep.experiment.numbers_drawn(cell) * np.dtype(sweep.dtype).itemsize * (BATCH_OVERHEAD if execution.batched else 1)
    allowed = execution.memory_gib * GIB / (jax.device_count() * held)
    return max(2, min(-(-PART_SIZE // execution.used_devices), int(allowed)))


def memory_needed(sweep: Sweep, cells: Iterable[AnyCell], execution: Execution) -> float:
    """GiB that draws, and the fits that run at a time, take at most on all devices; without what the process itself takes."""

    def numbers(cell: AnyCell) -> int:
        places = chunk_size(sweep, cell, execution) * (BATCH_OVERHEAD if execution.batched else 1)
        return (places + FIT_OVERHEAD) * sweep.experiment.numbers_drawn(cell)

    largest = max((numbers(cell) for cell in cells), default=0)
    return jax.device_count() * largest * np.dtype(sweep.dtype).itemsize / GIB


def memory_available() -> float:
    """GiB that are free on this machine, or on its accelerators."""
    if jax.default_backend() == "cpu":
        return float(psutil.virtual_memory().available) / GIB
    held = [device.memory_stats() for device in jax.local_devices()]
    return sum(stats["bytes_limit"] - stats["bytes_in_use"] for stats in held) / GIB


def check_memory(needed: float, available: float) -> None:
    """Raise `ValueError` when a sweep needs more memory than there is."""
    if needed > available:
        raise ValueError(
            f"memory_gib: the largest cell needs about {needed:.1f} GiB of the {available:.1f} GiB that are free; expected fewer "
            "features, fewer --devices, a smaller --memory-gib or --dtype float32"
        )


def draw_program_of(sweep: Sweep, cell: AnyCell, execution: Execution) -> Callable[..., Any]:
    """The program that draws a cell's replicates."""
    return sweep.experiment.draw_program(cell, sweep.dtype, execution.batched)


def draw_arguments(sweep: Sweep, cell: AnyCell, slots: Slots) -> tuple:
    """What that program is called with, on the devices."""
    shared = sweep.experiment.shared_arguments(cell, sweep.seed, sweep.dtype)
    return place(shared, split=False), place(slots.replicates, split=True), place(slots.counts, split=True)


class Draws:
    """Draws chunks of replicates. The latest draw stays on the devices, and with it the latest result of a first stage, so that
    all methods of a part share the one, and methods that build on the same fit the other."""

    def __init__(self, sweep: Sweep, execution: Execution):
        self.sweep, self.execution = sweep, execution
        self._drawn = _Latest()
        self._fitted = _Latest()

    def outcomes(self, task: Task) -> Iterator[tuple[dict[str, np.ndarray], Slots]]:
        """The outcome of each chunk of a part, and where its replicates stand in it."""
        size = chunk_size(self.sweep, task.cell, self.execution)
        used = self.execution.used_devices
        step = size * used
        for first in range(task.part.first, task.part.last + 1, step):
            slots = Slots.spread(first, min(step, task.part.last + 1 - first), size, used)
            yield jax.device_get(self._analyse(task, slots)), slots

    def _analyse(self, task: Task, slots: Slots) -> Any:
        key = (task.cell.draw_name, slots.replicates.tobytes())
        drawn = self._drawn.get(key, lambda: self._draw(task.cell, slots))
        counts, result = place(slots.counts, split=True), None
        for number, stage in enumerate(self.sweep.experiment.stages(task.cell, task.method, self.execution.batched)):
            items = stage.items(drawn, result)
            if number == 0:
                result = self._fitted.get((key, stage.program), partial(stage.program, None, items, counts))
            else:
                result = stage.program(None, items, counts)
        return result

    def _draw(self, cell: AnyCell, slots: Slots) -> Any:
        self._fitted.clear()
        return draw_program_of(self.sweep, cell, self.execution)(*draw_arguments(self.sweep, cell, slots))


class _Latest:
    """Holds the last value that was asked for."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._key: tuple | None = None
        self._value: Any = None

    def get(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key != self._key:
            self.clear()  # lets go of the memory first
            self._value = make()
            self._key = key
        return self._value


def compute(task: Task, draws: Draws) -> dict[str, np.ndarray]:
    """The outcome of one part, each metric with the replicates as leading axis."""
    pieces = [{metric: slots.read(values) for metric, values in outcome.items()} for outcome, slots in draws.outcomes(task)]
    return {metric: np.concatenate([piece[metric] for piece in pieces]) for metric in pieces[0]}


def run_group(sweep: Sweep, group: Group, store: Store, execution: Execution) -> Generator[Done, None, None]:
    """Compute what is still missing of a group, part by part, each stored when it is yielded.

    Raises `ClaimedError` while another process is at it, and `OutputError` when a part cannot be written.
    """
    with store.claim(group.name) as held:
        if not held:
            raise ClaimedError(group.name)
        draws = Draws(sweep, execution)
        for task in _missing_now(sweep, group, store):
            start = time.perf_counter()
            outcome = compute(task, draws)
            seconds = time.perf_counter() - start
            structures = sweep.experiment.structures(task.cell, task.method)
            table = tidy_rows(sweep.experiment.study, task.cell, task.method, structures, task.part, outcome)
            store.write(task.cell.name, task.method, task.part, table, seconds, device_name())
            yield Done(task, seconds, outcome["status"])
            keep_few_programs()


def _missing_now(sweep: Sweep, group: Group, store: Store) -> list[Task]:
    """What is left for a group's claimant: other processes may have stored parts since it was planned, and of other lengths."""
    first, stop, tasks = group.block.start, min(group.block.stop, sweep.replicates), []
    for cell, method in dict.fromkeys((task.cell, task.method) for task in group.tasks):
        store.clean(cell.name, method, stop, first)
        tasks += [Task(cell, method, part) for part in store.missing(cell.name, method, stop, first)]
    return in_order(tasks)
