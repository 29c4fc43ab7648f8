"""What the benchmarks share: seconds, peak memory, and the cores of a process."""

import contextlib
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import tyro

SAMPLING_SECONDS = 0.002


def run_script(main: Callable[[Any], None], arguments: type, description: str | None) -> None:
    """The command line of a benchmark: one line and a non-zero exit code for a `ValueError`."""
    try:
        main(tyro.cli(arguments, description=description))
    except ValueError as error:
        sys.exit(f"error: {error}")


def check_known(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` that names the option unless every name is known."""
    for name in names:
        if name not in known:
            raise ValueError(f"--{option}: unknown {name!r}; expected some of {', '.join(known)}")


def check_rounds(rounds: int) -> None:
    """Raise `ValueError` unless there is a round."""
    if rounds < 1:
        raise ValueError(f"--rounds: is {rounds}; expected at least 1")


def check_noise_variances(values: Iterable[float]) -> None:
    """Raise `ValueError` unless all are positive."""
    for value in values:
        if not value > 0:
            raise ValueError(f"--noise-variances: holds {value:g}; expected positive numbers")


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
