"""Hierarchies: which latent factors are seen by which modalities (theory: Section 1)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np

Structure = tuple[int, ...]

CONVERGED, OUT_OF_STEPS, NON_FINITE, ON_BOUND = 0, 1, 2, 3
"""The statuses of whatever is fitted: at its end; stopped by its number of steps; not finite; at its end, where a bound or a
projection decided part of the answer (each result says which)."""
STATUS_WORDS = {NON_FINITE: "non-finite", OUT_OF_STEPS: "out of steps", ON_BOUND: "with a noise variance on its bound"}
"""The same in words, of the fits in a count: "2 non-finite"."""
PREDICTION_STATUS_WORDS = STATUS_WORDS | {ON_BOUND: f"{STATUS_WORDS[ON_BOUND]} or an indefinite moment projected"}
"""Of predictions, whose status is the worse of their fit's and their regression's."""


def _canonical_order(structure: Structure) -> tuple[int, Structure]:
    return (-len(structure), structure)


def full_lattice(n_modalities: int) -> tuple[Structure, ...]:
    """All non-empty subsets of 1..M, larger first, then lexicographically."""
    modalities = range(1, n_modalities + 1)
    return tuple(s for size in range(n_modalities, 0, -1) for s in combinations(modalities, size))


def whole_number(value: Any) -> int | None:
    """The whole number that the value is, a float such as 2.0 included; None where it is none."""
    try:
        return int(value) if not isinstance(value, str) and int(value) == value else None
    except (TypeError, ValueError, OverflowError):
        return None


def _check_dims(dims: Any) -> tuple[int, ...]:
    try:
        given = list(dims)
    except TypeError:
        raise ValueError(f"dims: is {dims!r}; expected the positive number of features of each modality") from None
    if not given:
        raise ValueError("dims: got no modality; expected at least one dimension")
    checked = []
    for m, dim in enumerate(given, start=1):
        number = whole_number(dim)
        if number is None or number < 1:
            raise ValueError(f"dims: modality {m} has dimension {dim!r}; expected a positive integer")
        checked.append(number)
    return tuple(checked)


def _check_ranks(ranks: Any, n_modalities: int) -> tuple[tuple[Structure, int], ...]:
    if not isinstance(ranks, Mapping):
        raise ValueError(f"ranks: is {ranks!r}; expected a dictionary of structures and their ranks, such as {{'12': 2, '1': 1}}")
    kept: dict[Structure, int] = {}
    for structure, rank in ranks.items():
        s, number = as_structure(structure, n_modalities, "ranks"), whole_number(rank)
        if s in kept:
            raise ValueError(f"ranks: structure {s} is given twice; expected each set of modalities once")
        if number is None or number < 0:
            raise ValueError(f"ranks: structure {s} has rank {rank!r}; expected a non-negative integer")
        kept[s] = number
    nonzero = [(s, r) for s, r in kept.items() if r > 0]
    if not nonzero:
        raise ValueError("ranks: every rank is 0; expected at least one structure of positive rank")
    return tuple(sorted(nonzero, key=lambda item: _canonical_order(item[0])))


@dataclass(frozen=True, init=False)
class Hierarchy:
    """The modalities' dimensions, and the rank of every structure that is present.

    A structure is the set of modalities, counted from 1, that see its factors, written as `as_structure` reads it. Structures
    are kept larger first, then lexicographically; those of rank 0 are dropped. Static and hashable, so it may be a static
    argument of a jitted function.

    >>> Hierarchy(dims=(4, 3), ranks={2: 1, "12": 2}).structures
    ((1, 2), (2,))

    Raises `ValueError`, naming the modality, when the ranks of the structures seen by a modality add up to more than its
    dimension: its loadings could not then have full column rank, which Theorem 1 of the paper needs for identifiability; and
    for a structure, modality or rank that cannot be, there and in every look-up.
    """

    dims: tuple[int, ...]
    ranks: tuple[tuple[Structure, int], ...]

    def __init__(self, dims: Any, ranks: Any):
        self._set(dims, ranks)
        for m, dim in enumerate(self.dims, start=1):
            total = sum(rank for s, rank in self.ranks if m in s)
            if total > dim:
                raise ValueError(
                    f"ranks: the structures that contain modality {m} have ranks adding up to {total}; "
                    f"expected at most its dimension {dim}"
                )

    def _set(self, dims: Any, ranks: Any) -> None:
        object.__setattr__(self, "dims", _check_dims(dims))
        object.__setattr__(self, "ranks", _check_ranks(ranks, len(self.dims)))

    @classmethod
    def full(cls, dims: Any, rank: Any) -> "Hierarchy":
        """Every non-empty subset of the modalities, each with the same rank."""
        sizes = _check_dims(dims)
        return cls(sizes, dict.fromkeys(full_lattice(len(sizes)), rank))

    @classmethod
    def shared_and_private(cls, dims: Any, shared: Any, private: Any) -> "Hierarchy":
        """One structure shared by all modalities and one private to each: the structure of JIVE."""
        sizes = _check_dims(dims)
        modalities = range(1, len(sizes) + 1)
        ranks = {tuple(modalities): shared}
        return cls(sizes, ranks | {(m,): private for m in modalities if len(sizes) > 1})

    @property
    def n_modalities(self) -> int:
        return len(self.dims)

    @property
    def n_features(self) -> int:
        """d, the dimension of all modalities together."""
        return sum(self.dims)

    @property
    def n_factors(self) -> int:
        """K, the number of latent factors."""
        return sum(rank for _, rank in self.ranks)

    @property
    def structures(self) -> tuple[Structure, ...]:
        return tuple(s for s, _ in self.ranks)

    @property
    def modalities(self) -> range:
        return range(1, self.n_modalities + 1)

    def rank(self, structure: Any) -> int:
        """The structure's rank, 0 where it is absent."""
        return dict(self.ranks).get(as_structure(structure, self.n_modalities), 0)

    def modality(self, number: Any) -> int:
        """The modality of that number. Raises `ValueError` unless it is an integer from 1 to M."""
        m = whole_number(number)
        if m is None or not 1 <= m <= self.n_modalities:
            raise ValueError(f"modality: is {number!r}; expected an integer from 1 to {self.n_modalities}")
        return m

    def present(self, structure: Any, argument: str = "structure") -> Structure:
        """The structure, sorted. Raises `ValueError` that names the argument unless the hierarchy has it."""
        s = as_structure(structure, self.n_modalities, argument)
        if s not in self._columns:
            known = ", ".join(map(structure_name, self.structures))
            raise ValueError(f"{argument}: {structure!r} is not in the hierarchy; expected one of {known}")
        return s

    @cached_property
    def _row_starts(self) -> tuple[int, ...]:
        return tuple(int(start) for start in np.cumsum((0, *self.dims)))

    @cached_property
    def _columns(self) -> dict[Structure, slice]:
        ends = np.cumsum([rank for _, rank in self.ranks])
        return {s: slice(int(end) - rank, int(end)) for (s, rank), end in zip(self.ranks, ends, strict=True)}

    def rows(self, modality: Any) -> slice:
        """Where a modality's features stand among all d."""
        m = self.modality(modality)
        return slice(self._row_starts[m - 1], self._row_starts[m])

    def columns(self, structure: Any) -> slice:
        """Where the factors of a structure of the hierarchy stand among all K."""
        return self._columns[self.present(structure)]

    def structure_rows(self, structure: Any) -> np.ndarray:
        """Indices of the features of a structure's modalities."""
        members = as_structure(structure, self.n_modalities)
        return np.concatenate([np.arange(self.n_features)[self.rows(m)] for m in members])

    def active_columns(self, modality: Any) -> np.ndarray:
        """Indices of the factors that a modality sees."""
        return np.flatnonzero(self.modality_mask[self.modality(modality) - 1])

    @cached_property
    def modality_mask(self) -> np.ndarray:
        """M × K booleans: which factors each modality sees."""
        seen = np.zeros((self.n_modalities, self.n_factors), dtype=bool)
        for s in self.structures:
            seen[[m - 1 for m in s], self.columns(s)] = True
        return seen

    @cached_property
    def mask(self) -> np.ndarray:
        """d × K booleans: the hierarchical zero pattern of the loadings."""
        return np.repeat(self.modality_mask, self.dims, axis=0)

    def union(self, other: "Hierarchy") -> "Hierarchy":
        """The smallest hierarchy that holds both: per structure, the larger of the two ranks."""
        if self.dims != other.dims:
            raise ValueError(f"other: its dims are {other.dims}; expected {self.dims}")
        merged = dict(self.ranks)
        for s, rank in other.ranks:
            merged[s] = max(rank, merged.get(s, 0))
        union = object.__new__(Hierarchy)  # a layout to compare two fits in, not a model: it need not be identifiable
        union._set(self.dims, merged)
        return union

    @property
    def modality_of_feature(self) -> np.ndarray:
        """0-based modality of each of the d features."""
        return np.repeat(np.arange(self.n_modalities), self.dims)

    def __str__(self) -> str:
        return ",".join(f"{structure_name(s)}:{rank}" for s, rank in self.ranks)


def as_hierarchy(value: Any, argument: str = "hierarchy") -> Hierarchy:
    """The hierarchy. Raises `ValueError` that names the argument for anything else."""
    if not isinstance(value, Hierarchy):
        raise ValueError(
            f"{argument}: is {value!r}; expected a Hierarchy, such as Hierarchy(dims=(9, 7), ranks={{'12': 2, '1': 1}})"
        )
    return value


def structure_name(structure: Structure) -> str:
    """`123` for (1, 2, 3); modalities above 9 are set apart by dots, `1.10`, and one alone ends in one, `12.`.

    >>> structure_name((1, 3)), structure_name((2, 10))
    ('13', '2.10')
    """
    if max(structure) <= 9:
        return "".join(map(str, structure))
    return ".".join(map(str, structure)) + ("." if len(structure) == 1 else "")


def structure_label(structure: Structure, names: Sequence[str]) -> str:
    """The structure in the names of its modalities.

    >>> structure_label((1, 3), ("mrna", "methylation", "protein"))
    'mrna+protein'
    """
    return "+".join(names[m - 1] for m in structure)


def labelled_structure(value: Any, names: Sequence[str], argument: str = "structure") -> Structure:
    """The structure that names such as "mrna+protein" or ("mrna", "protein"), or what `as_structure` reads, mean.

    Raises `ValueError` that names the argument and the modalities there are.
    """
    parts = value.split("+") if isinstance(value, str) else value
    if isinstance(parts, Iterable) and all(isinstance(part, str) and part in names for part in parts) and parts:
        return as_structure([names.index(part) + 1 for part in parts], len(names), argument)
    try:
        return as_structure(value, len(names), argument)
    except ValueError:
        raise ValueError(f"{argument}: is {value!r}; expected views joined by +, of {', '.join(names)}") from None


def as_structure(value: Any, n_modalities: int, argument: str = "structure") -> Structure:
    """The structure that is meant: a name as `structure_name` gives it, a modality's number, or some of these in any order.

    >>> as_structure("31", 3), as_structure("2.10", 10), as_structure(2, 3), as_structure([3, 1], 3)
    ((1, 3), (2, 10), (2,), (1, 3))

    Digits without a dot are a modality each where they can be. Raises `ValueError` that names the `argument` for anything that is
    not a non-empty set of modalities from 1 to M.
    """
    for members in _readings(value):
        numbers = [whole_number(m) for m in members]
        s = tuple(sorted(m for m in numbers if m is not None))
        if s and len(set(s)) == len(numbers) and s[0] >= 1 and s[-1] <= n_modalities:
            return s
    raise ValueError(
        f"{argument}: unknown structure {value!r}; expected a non-empty set of modalities from 1 to {n_modalities}, "
        f"such as {structure_name(tuple(range(1, min(n_modalities, 9) + 1)))!r}"
    )


def _readings(value: Any) -> list[list[Any]]:
    """What the members of a structure may be, the likelier first."""
    if isinstance(value, str):
        parts = [part for part in value.split(".") if part] if "." in value else list(value)
        return [
            [int(part) for part in reading if part.isdecimal()] for reading in (parts, [value]) if "".join(reading).isdecimal()
        ]
    if isinstance(value, Iterable):
        return [list(value)]
    return [[value]]
