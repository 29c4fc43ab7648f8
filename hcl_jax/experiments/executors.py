"""Runs a sweep, here on this machine; `cluster.py` has the workers of a cluster. Both compute groups through `run_group`."""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from hcl_jax.experiments.progress import Progress
from hcl_jax.experiments.runtime import CompilationCounter
from hcl_jax.experiments.store import Store
from hcl_jax.experiments.sweep import ClaimedError, Done, Execution, Group, Sweep, Task, group_tasks, run_group

MANIFEST_SECONDS = 60.0
"""How often the manifest is brought up to date: parts say all of it themselves, so that a killed run loses nothing."""
POLL_SECONDS = 1.0
"""How long to wait before looking again at groups that other processes compute."""


class Stop:
    """Takes note of SIGTERM and SIGINT while the block runs, so that the part in hand can be finished. A second signal ends the
    process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._usual = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        for other in self._usual:
            signal.signal(other, signal.SIG_DFL)

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.signal is not None


@dataclass
class Report:
    """What this process and its workers did: parts stored, programs compiled (or found in the cache), seconds; and the signal
    that stopped them early."""

    n_parts: int = 0
    n_compilations: int = 0
    seconds: float = 0.0
    stopped_by: int | None = None


@dataclass
class Watch:
    """What an executor reports to."""

    store: Store
    progress: Progress
    report: Report = field(default_factory=Report)

    def __post_init__(self) -> None:
        self._written = time.monotonic()

    def finished(self, done: Done) -> None:
        """A part was stored."""
        self.report.n_parts += 1
        self.progress.finished(done.task, done.seconds, done.status)

    def closed(self, group: Group) -> None:
        """A group has nothing left to compute: what was not computed here, another process did."""
        self.progress.drop(group.tasks)
        if time.monotonic() > self._written + MANIFEST_SECONDS:
            self.store.write_manifest()
            self._written = time.monotonic()


@dataclass(frozen=True)
class Job:
    """All that a process needs to compute groups."""

    sweep: Sweep
    store: Store
    execution: Execution


Executor = Callable[[Job, list[Group], Watch, Stop], None]
"""Computes all groups, or returns early once it is told to stop."""


def run_here(job: Job, groups: Sequence[Group], watch: Watch, stop: Stop) -> None:
    """The groups one after the other; those that other processes are at are put off, and taken over should these die."""
    with CompilationCounter() as compilations:
        waiting = list(groups)
        while waiting and not stop.asked:
            put_off = [group for group in waiting if not stop.asked and not _run_one(job, group, watch, stop)]
            if len(put_off) == len(waiting):
                time.sleep(POLL_SECONDS)
            waiting = put_off
    watch.report.n_compilations += compilations.count


def _run_one(job: Job, group: Group, watch: Watch, stop: Stop) -> bool:
    try:
        with closing(run_group(job.sweep, group, job.store, job.execution)) as parts:
            for done in parts:
                watch.finished(done)
                if stop.asked:
                    return False
    except ClaimedError:
        return False
    watch.closed(group)
    return True


def run_sweep(
    sweep: Sweep,
    tasks: list[Task],
    store: Store,
    execution: Execution,
    run: dict[str, Any],
    executor: Executor = run_here,
    stop: Stop | None = None,
) -> Report:
    """Compute and store the tasks; with none, nothing is computed, compiled or written.

    `run` is the manifest's record of this run. Raises `OutputError` when a part cannot be written: those before it are kept.
    """
    stop, start = Stop() if stop is None else stop, time.perf_counter()
    if not tasks:
        return Report()
    store.begin(run)
    with Progress(tasks, enabled=execution.progress) as progress:
        watch = Watch(store, progress)
        executor(Job(sweep, store, execution), group_tasks(tasks), watch, stop)
    store.write_manifest()
    watch.report.seconds, watch.report.stopped_by = time.perf_counter() - start, stop.signal
    return watch.report
