"""Hierarchies: which latent factors are seen by which modalities (theory: Section 1)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

Structure = tuple[int, ...]

CONVERGED, OUT_OF_STEPS, NON_FINITE, ON_BOUND = 0, 1, 2, 3
"""The statuses of whatever is fitted: at its end; stopped by its number of steps; not finite; at its end, where a bound or a
projection decided part of the answer (each result says which)."""


def _canonical_order(structure: Structure) -> tuple[int, Structure]:
    return (-len(structure), structure)


def full_lattice(n_modalities: int) -> tuple[Structure, ...]:
    """All non-empty subsets of 1..M, larger first, then lexicographically."""
    modalities = range(1, n_modalities + 1)
    return tuple(s for size in range(n_modalities, 0, -1) for s in combinations(modalities, size))


def _check_dims(dims: Sequence[int]) -> tuple[int, ...]:
    for m, dim in enumerate(dims, start=1):
        if int(dim) != dim or dim < 1:
            raise ValueError(f"dims: modality {m} has dimension {dim!r}; expected a positive integer")
    if not dims:
        raise ValueError("dims: got no modality; expected at least one dimension")
    return tuple(int(dim) for dim in dims)


def _check_ranks(ranks: Mapping[Structure, int], n_modalities: int) -> tuple[tuple[Structure, int], ...]:
    kept: dict[Structure, int] = {}
    for structure, rank in ranks.items():
        s = tuple(sorted(structure))
        if not s or len(set(s)) != len(s) or not all(1 <= m <= n_modalities for m in s):
            raise ValueError(
                f"ranks: unknown structure {structure!r}; expected a non-empty set of modalities from 1 to {n_modalities}"
            )
        if s in kept:
            raise ValueError(f"ranks: structure {s} is given twice; expected each set of modalities once")
        if int(rank) != rank or rank < 0:
            raise ValueError(f"ranks: structure {s} has rank {rank!r}; expected a non-negative integer")
        kept[s] = int(rank)
    nonzero = [(s, r) for s, r in kept.items() if r > 0]
    if not nonzero:
        raise ValueError("ranks: every rank is 0; expected at least one structure of positive rank")
    return tuple(sorted(nonzero, key=lambda item: _canonical_order(item[0])))


@dataclass(frozen=True, init=False)
class Hierarchy:
    """The modalities' dimensions, and the rank of every structure that is present.

    A structure is the set of modalities, counted from 1, that see its factors. Structures are kept larger first, then
    lexicographically; those of rank 0 are dropped. Static and hashable, so it may be a static argument of a jitted function.

    >>> Hierarchy(dims=(4, 3), ranks={(2,): 1, (1, 2): 2}).structures
    ((1, 2), (2,))

    Raises `ValueError`, naming the modality, when the ranks of the structures seen by a modality add up to more than its
    dimension: its loadings could not then have full column rank, which Theorem 1 of the paper needs for identifiability.
    """

    dims: tuple[int, ...]
    ranks: tuple[tuple[Structure, int], ...]

    def __init__(self, dims: Sequence[int], ranks: Mapping[Structure, int]):
        self._set(dims, ranks)
        for m, dim in enumerate(self.dims, start=1):
            total = sum(rank for s, rank in self.ranks if m in s)
            if total > dim:
                raise ValueError(
                    f"ranks: the structures that contain modality {m} have ranks adding up to {total}; "
                    f"expected at most its dimension {dim}"
                )

    def _set(self, dims: Sequence[int], ranks: Mapping[Structure, int]) -> None:
        object.__setattr__(self, "dims", _check_dims(dims))
        object.__setattr__(self, "ranks", _check_ranks(ranks, len(self.dims)))

    @classmethod
    def full(cls, dims: Sequence[int], rank: int) -> "Hierarchy":
        """Every non-empty subset of the modalities, each with the same rank."""
        return cls(dims, dict.fromkeys(full_lattice(len(dims)), rank))

    @classmethod
    def shared_and_private(cls, dims: Sequence[int], shared: int, private: int) -> "Hierarchy":
        """One structure shared by all modalities and one private to each: the structure of JIVE."""
        n_modalities = len(dims)
        ranks = {tuple(range(1, n_modalities + 1)): shared}
        return cls(dims, ranks | {(m,): private for m in range(1, n_modalities + 1) if n_modalities > 1})

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

    def rank(self, structure: Structure) -> int:
        """The structure's rank, 0 where it is absent."""
        return dict(self.ranks).get(structure, 0)

    @cached_property
    def _row_starts(self) -> tuple[int, ...]:
        return tuple(int(start) for start in np.cumsum((0, *self.dims)))

    @cached_property
    def _columns(self) -> dict[Structure, slice]:
        ends = np.cumsum([rank for _, rank in self.ranks])
        return {s: slice(int(end) - rank, int(end)) for (s, rank), end in zip(self.ranks, ends, strict=True)}

    def rows(self, modality: int) -> slice:
        """Where a modality's features stand among all d."""
        return slice(self._row_starts[modality - 1], self._row_starts[modality])

    def columns(self, structure: Structure) -> slice:
        """Where a structure's factors stand among all K."""
        return self._columns[structure]

    def structure_rows(self, structure: Structure) -> np.ndarray:
        """Indices of the features of a structure's modalities."""
        return np.concatenate([np.arange(self.n_features)[self.rows(m)] for m in structure])

    def active_columns(self, modality: int) -> np.ndarray:
        """Indices of the factors that a modality sees."""
        return np.flatnonzero(self.modality_mask[modality - 1])

    def active_runs(self, modality: int) -> tuple[slice, ...]:
        """The same as runs of neighbouring factors."""
        edges = np.flatnonzero(np.diff(self.modality_mask[modality - 1], prepend=False, append=False))
        return tuple(slice(int(start), int(stop)) for start, stop in edges.reshape(-1, 2))

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


def structure_name(structure: Structure) -> str:
    """`123` for (1, 2, 3); modalities above 9 are set apart by dots, `1.10`.

    >>> structure_name((1, 3)), structure_name((2, 10))
    ('13', '2.10')
    """
    separator = "." if max(structure) > 9 else ""
    return separator.join(map(str, structure))
