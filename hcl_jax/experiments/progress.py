"""A progress bar on the host: one step a part of a method, weighted by what it is expected to cost."""

from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from hcl_jax.experiments.sweep import Task

_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"


class Progress:
    """Learns the seconds a replicate of each method and hierarchy takes; the bar and its ETA run in expected seconds."""

    def __init__(self, tasks: list["Task"], enabled: bool = True):
        self._waiting = list(tasks)
        self._seconds: dict[tuple, list[float]] = {}
        self._failed = self._unfinished = self._done = 0
        self._spent = 0.0
        self._bar = tqdm(total=1.0, bar_format=_FORMAT, smoothing=0, disable=None if enabled else True, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def finished(self, task: "Task", seconds: float, status: np.ndarray) -> None:
        """Take note of one part and show what is left."""
        self._waiting.remove(task)
        self._done += 1
        self._spent += seconds
        self._seconds.setdefault(_kind(task), []).append(seconds / len(task.part))
        self._failed += int(np.sum(status == 2))
        self._unfinished += int(np.sum(status == 1))
        self._bar.total = self._spent + sum(map(self._expected, self._waiting))
        self._bar.set_postfix_str(f"part {self._done}/{self._done + len(self._waiting)}, {self._counts()}", refresh=False)
        self._bar.update(seconds)

    def _expected(self, task: "Task") -> float:
        """Seconds of a part: the latest of its kind, for the first of all was compiled; else the mean, scaled by size."""
        known = self._seconds.get(_kind(task))
        if known:
            return known[-1] * len(task.part)
        weighted = [times[-1] / _size(kind) for kind, times in self._seconds.items()]
        return float(np.mean(weighted)) * _size(_kind(task)) * len(task.part)

    def _counts(self) -> str:
        return f"{self._failed} non-finite, {self._unfinished} out of steps"


def _kind(task: "Task") -> tuple:
    return task.method, task.cell.hierarchy.n_features, task.cell.columns().get("fitted")


def _size(kind: tuple) -> float:
    return float(kind[1]) ** 2
