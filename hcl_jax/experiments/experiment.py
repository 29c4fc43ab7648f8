"""What the engine asks of a study: how its replicates are drawn, and by which programs a method is computed from a draw."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, PyTree

from hcl_jax.structure import Hierarchy, Structure

Outcome = dict[str, Array]
"""By metric: a scalar a replicate, one value a structure, or structures × modalities; and `status` and `steps`."""


@runtime_checkable
class AnyCell(Protocol):
    """A setting of a study: frozen, hashable, named by content."""

    @property
    def hierarchy(self) -> Hierarchy: ...  # of the truth

    @property
    def n(self) -> int: ...

    @property
    def draw_name(self) -> str: ...  # names the data: cells that differ in nothing else share their draws

    @property
    def name(self) -> str: ...

    def columns(self) -> dict[str, str | int | float]: ...  # the cell's columns of a tidy table


@dataclass(frozen=True)
class Stage:
    """One mapped program of a method: (shared, items, counts) -> results of all replicates.

    Methods whose first stages have the same name in the same cell share the result.
    """

    name: str
    program: Callable[..., PyTree]
    items: Callable[[Any, Any], PyTree]
    """(what was drawn, result of the stage before) -> the program's items."""


@runtime_checkable
class Experiment(Protocol):
    """A study, as the engine sees it."""

    study: str

    def check(self, cell: Any, method: str) -> None:
        """Raise `ValueError` that names the argument where the method cannot be computed in this cell."""

    def draw_program(self, cell: Any, dtype: str, batched: bool) -> Callable[..., PyTree]:
        """(shared, replicates, counts) -> what all replicates draw."""

    def draw_key(self, cell: Any, dtype: str) -> Any:
        """What that program is compiled for."""

    def shared_arguments(self, cell: Any, seed: int, dtype: str) -> tuple:
        """What all replicates of a cell's draw have in common, as host values of fixed types."""

    def stages(self, cell: Any, method: str, batched: bool) -> Sequence[Stage]:
        """The programs that lead from a draw to the method's `Outcome`, in order."""

    def structures(self, cell: Any, method: str) -> tuple[Structure, ...]:
        """What the metrics by structure run over."""

    def numbers_drawn(self, cell: Any) -> int:
        """How many numbers a draw of one replicate holds: what chunks of replicates are cut by."""


def trace(experiment: Experiment, cell: Any, method: str, drawn: PyTree, counts: np.ndarray, batched: bool) -> PyTree:
    """The shapes of a method's outcome, without computing; `drawn` holds shapes. Raises what the method raises."""
    result = None
    for stage in experiment.stages(cell, method, batched):
        result = jax.eval_shape(stage.program, None, stage.items(drawn, result), counts)
    return result
