"""Hands the groups of a sweep to the workers of a dask.distributed cluster. Workers compute and store; this process only watches.

Needs the extra `distributed`, which is imported when a cluster is asked for.
"""

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING
from uuid import uuid4

import jax

from hcl_jax.experiments.executors import POLL_SECONDS, Executor, Job, Stop, Watch
from hcl_jax.experiments.runtime import CompilationCounter, configure, versions
from hcl_jax.experiments.sweep import ClaimedError, Done, Execution, Group, run_group

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

CONNECT_SECONDS = 10.0
RETRIES = 2
"""How often a group is tried again elsewhere after an error."""
LOST_WORKERS = 25
"""How often a group may be given to further workers after Dask has counted several that died of it."""

_halted: set[str] = set()
"""The runs that this worker is to compute no further parts for."""


class ClusterError(Exception):
    """A cluster cannot be used; the message is one line that says why."""


@contextmanager
def dask_executor(scheduler: str | None, n_workers: int | None) -> Iterator[Executor]:
    """An executor on the workers of this scheduler, or on this number of new ones here. Raises `ClusterError`."""
    import distributed

    if scheduler is None:
        assert n_workers is not None
        settings = {"threads_per_worker": 1, "memory_limit": None, "dashboard_address": ":0", "silence_logs": "CRITICAL"}
        with distributed.LocalCluster(n_workers=0, **settings) as cluster, distributed.Client(cluster) as client:
            yield partial(run_on_cluster, client, look_after=_replacing(cluster, n_workers))
        return
    try:
        client = distributed.Client(scheduler, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ClusterError(
            f"scheduler: cannot reach {scheduler} ({reason}); expected tcp://HOST:PORT of a dask scheduler"
        ) from None
    with client:
        yield partial(run_on_cluster, client)


def _replacing(cluster: "LocalCluster", n_workers: int) -> Callable[[], None]:
    """Keeps up the number of workers: a nanny starts a worker again that dies, but not one that dies while it starts."""
    from distributed import Status

    async def replace_dead() -> None:
        for name, nanny in list(cluster.workers.items()):
            if nanny.process is None or nanny.process.status not in (Status.starting, Status.running):
                del cluster.workers[name]
                await nanny.close()
        cluster.scale(n_workers)

    cluster.scale(n_workers)
    return lambda: cluster.loop.add_callback(replace_dead)  # type: ignore[union-attr]  # it is running


def run_on_cluster(
    client: "Client", job: Job, groups: list[Group], watch: Watch, stop: Stop, look_after: Callable[[], None] = lambda: None
) -> None:
    """Compute all groups on the workers, however many there are and come and go.

    Told to stop, each worker finishes the part in hand. Raises `ClusterError` when the scheduler is lost, a worker has other
    versions than this process, or a group loses every worker that it is given to; and what a worker raises.
    """
    from distributed import KilledWorker

    run_id, own, lost, halting = uuid4().hex, versions(), Counter[str](), False
    submit = partial(client.submit, compute_group, job, own=own, run_id=run_id, pure=False, retries=RETRIES)
    waiting, looked = {submit(group=group): group for group in groups}, time.monotonic()
    while waiting:
        if stop.asked:
            client.run(halt, run_id, on_error="ignore")  # each time, for workers may have joined
            if not halting:
                _cancel_idle(client, waiting)
            halting = True
        for future in [future for future in waiting if future.done()]:
            group = waiting.pop(future)
            try:
                found = future.result()
            except KilledWorker:
                lost[group.name] += 1
                if lost[group.name] > LOST_WORKERS:
                    raise ClusterError(f"scheduler: workers that compute {group.name} die; see their logs") from None
                found = None
            except CancelledError:
                raise ClusterError(f"scheduler: {client.scheduler.address} is gone; the same command goes on") from None
            if found is None:
                waiting |= {} if stop.asked else {submit(group=group): group}
                continue
            parts, n_compilations = found
            watch.report.n_compilations += n_compilations
            for done in parts:
                watch.finished(done)
            if not stop.asked:
                watch.closed(group)
        if time.monotonic() > looked + POLL_SECONDS:
            looked = time.monotonic()
            look_after()
        time.sleep(POLL_SECONDS / 10)


def _cancel_idle(client: "Client", waiting: dict) -> None:
    """Cancel what no worker has begun."""
    begun = {key for keys in client.processing().values() for key in keys}
    idle = [future for future in waiting if future.key not in begun]
    client.cancel(idle)
    for future in idle:
        del waiting[future]


def halt(run_id: str) -> None:
    """On a worker: compute no further part for this run."""
    _halted.add(run_id)


def compute_group(job: Job, group: Group, own: dict[str, str], run_id: str) -> tuple[list[Done], int] | None:
    """On a worker: the parts that were stored, and the programs compiled for them; None where another process is at the group."""
    execution, parts = prepare_worker(job, own), []
    if run_id in _halted:
        return [], 0
    with CompilationCounter() as compilations:
        try:
            with closing(run_group(job.sweep, group, job.store, execution)) as stored:
                for done in stored:
                    parts.append(done)
                    if run_id in _halted:
                        break
        except ClaimedError:
            time.sleep(POLL_SECONDS)
            return None
    return parts, compilations.count


def prepare_worker(job: Job, own: dict[str, str]) -> Execution:
    """Set JAX up as on the client's machine. Raises `ClusterError` for other versions, `OutputError` for another file system."""
    differences = [f"{name} {found} (expected {own.get(name)})" for name, found in versions().items() if found != own.get(name)]
    if differences:
        raise ClusterError(f"scheduler: the worker on {socket.gethostname()} has {', '.join(differences)}")
    job.store.check_shared()
    devices = configure(job.sweep.dtype, job.execution.devices, job.execution.batched)
    return replace(job.execution, devices=devices, batched=job.execution.batched or jax.default_backend() != "cpu")
