"""Splits of rows into parts that share no patient, or no hospital."""

from collections.abc import Sequence

import numpy as np
import polars as pl

PARTS = ("train", "tuning", "held_out")
"""The names that MEDS gives them."""


def split(
    labels: pl.DataFrame,
    groups: pl.DataFrame,
    by: Sequence[str] = ("patient",),
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2),
    *,
    seed: int,
) -> np.ndarray:
    """The part of each row of labels, by name.

    groups: what `read_groups` gives. by: columns of groups that no two parts share; with ("patient", "hospital"), hospitals that
    share a patient stay together. Groups are drawn in random order until a part holds its share of the rows.

    Raises `ValueError` for columns that are not there or hold nothing, shares that are not three numbers of sum 1, and subjects
    that are in no group.
    """
    if len(shares) != len(PARTS) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"shares: are {shares}; expected three numbers from 0 of sum 1")
    if not by or (missing := [name for name in by if name not in groups.columns]):
        raise ValueError(f"by: is {by}; expected some of {', '.join(groups.columns)}" + (f", not {missing[0]}" if by else ""))
    rows = labels.select("subject_id").join(groups, on="subject_id", how="left", maintain_order="left")
    for name in by:
        if rows[name].null_count():
            raise ValueError(f"groups: {rows[name].null_count()} rows have no {name}; expected one for each subject")
    linked = _linked(rows, by)
    counts = np.bincount(linked)
    order = np.random.default_rng(seed).permutation(len(counts))
    before = np.cumsum(counts[order]) - counts[order] / 2
    part = np.empty(len(counts), int)
    part[order] = np.searchsorted(np.cumsum(shares)[:-1] * len(rows), before, side="right")
    return np.array(PARTS)[part[linked]]


def _linked(rows: pl.DataFrame, by: Sequence[str]) -> np.ndarray:
    """The number of the connected group of each row: rows that share a value of any column are in one."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(rows)
    values = [rows[name].rank("dense").to_numpy().astype(int) - 1 for name in by]
    offsets = n + np.cumsum([0, *(int(value.max()) + 1 for value in values)])
    ends = np.concatenate([value + offset for value, offset in zip(values, offsets, strict=False)])
    starts = np.tile(np.arange(n), len(by))
    graph = csr_matrix((np.ones(len(ends)), (starts, ends)), shape=(offsets[-1], offsets[-1]))
    found = connected_components(graph, directed=False)[1][:n]
    return np.unique(found, return_inverse=True)[1]
