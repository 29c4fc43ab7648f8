"""A progress bar on the host: one step a part of a method, weighted by what it is expected to cost."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from hcl_jax.experiments.store import PART_SIZE
from hcl_jax.structure import NON_FINITE, OUT_OF_STEPS, STATUS_WORDS

if TYPE_CHECKING:
    from hcl_jax.experiments.sweep import Task

_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"


class Progress:
    """Learns the seconds a replicate of each method and hierarchy takes; the bar and its ETA run in expected seconds."""

    def __init__(self, tasks: list["Task"], enabled: bool = True):
        self._waiting: Counter[tuple] = Counter()
        self._replicates: Counter[tuple] = Counter()
        for task in tasks:
            self._waiting[_place(task)] += len(task.part)
            self._replicates[_kind(task)] += len(task.part)
        self._seconds: dict[tuple, float] = {}
        self._ended = {NON_FINITE: 0, OUT_OF_STEPS: 0}
        self._done = 0
        self._spent = 0.0
        self._bar = tqdm(total=1.0, bar_format=_FORMAT, smoothing=0, disable=None if enabled else True, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def finished(self, task: "Task", seconds: float, status: np.ndarray) -> None:
        """Take note of one part and show what is left."""
        self._done += 1
        self._spent += seconds
        self._seconds[_kind(task)] = seconds / len(task.part)  # the latest: the first of all was compiled
        for code in self._ended:
            self._ended[code] += int(np.sum(status == code))
        self.drop([task])
        self._bar.update(seconds)

    def drop(self, tasks: Iterable["Task"]) -> None:
        """Tasks that need not be waited for any more, and show what is left."""
        for task in tasks:
            self._replicates[_kind(task)] -= self._waiting.pop(_place(task), 0)
        left = sum(count * self._expected(kind) for kind, count in self._replicates.items()) if self._seconds else 0.0
        self._bar.total = max(self._spent + left, 1e-9)
        self._bar.set_postfix_str(f"part {self._done}/{self._done + len(self._waiting)}, {self._counts()}", refresh=False)

    def _expected(self, kind: tuple) -> float:
        """Seconds of a replicate: as the latest of its kind; else the mean of others, scaled by size."""
        if kind in self._seconds:
            return self._seconds[kind]
        return float(np.mean([seconds / _size(other) for other, seconds in self._seconds.items()])) * _size(kind)

    def _counts(self) -> str:
        return ", ".join(f"{count} {STATUS_WORDS[code]}" for code, count in self._ended.items())


def _place(task: "Task") -> tuple:
    return task.cell.name, task.method, task.part.first // PART_SIZE


def _kind(task: "Task") -> tuple:
    return task.method, task.cell.hierarchy.n_features, task.cell.columns().get("fitted")


def _size(kind: tuple) -> float:
    return float(kind[1]) ** 2
