"""What the benchmarks share: seconds, peak memory, and the cores of a process."""

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

SAMPLING_SECONDS = 0.002


def timed(compute: Callable[[], Any]) -> tuple[Any, float]:
    """The result, once it is there, and the seconds that it took."""
    start = time.perf_counter()
    result = jax.block_until_ready(compute())
    return result, time.perf_counter() - start


def interleaved(competitors: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every competitor in every round; all take their turn in each, in an order that is reversed every time."""
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for i in range(rounds):
        for name in list(competitors)[:: 1 if i % 2 == 0 else -1]:
            seconds[name].append(timed(competitors[name])[1])
    return seconds


def restrict_to_cores(threads: int) -> None:
    """Leave this process the first `threads` of its cores."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise ValueError(f"--threads: is {threads}; expected 1 to {len(cores)}, the cores of this process")
    os.sched_setaffinity(0, cores[:threads])


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: without pages of mapped files, which the system takes back when short."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can: what is taken again later then counts."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """The largest anonymous memory of this process while the block runs, sampled every two milliseconds.

    `bytes` is the peak, `growth` the peak beyond what was held when the block began.

    >>> with PeakMemory() as peak:
    ...     _ = bytes(10**8)
    >>> peak.growth > 5e7
    True
    """

    def __enter__(self) -> "PeakMemory":
        trim_heap()
        self._before = self.bytes = anonymous_bytes()
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.bytes = max(self.bytes, anonymous_bytes())
        self._done.set()
        self._sampler.join()

    @property
    def growth(self) -> int:
        return self.bytes - self._before
