"""Columns that tell the label by themselves, which no single column known at the prediction time should."""

from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool, Float

BLOCK = 512
FEW, COMMON = 12, 20


def suspects(
    names: list[str], columns: Any, y: Bool[np.ndarray, " n"], *, limit: float = 0.75, pure: int = 30, chance: float = 1e-6
) -> pl.DataFrame:
    """Columns of training rows that look like leaks: column, auc, rows (where it is not 0), positive (the share there), reason.

    columns: n × p, sparse or not, as `Modalities.single_columns` gives them. Reasons: `auc`, that of `column_auc` with few = 12,
    above `limit` or below 1 − `limit`, and 4 standard errors from ½; `pure`, at least so many rows that all have one label, where
    p columns without relation would have that less often than `chance`. An empty table says that no column stands out; a leak
    that is spread over many columns is not seen.

    Raises `ValueError` for labels of one class, and for numbers of names, columns and rows that differ.
    """
    n, p = columns.shape
    if len(names) != p or len(y) != n:
        raise ValueError(f"columns: are {n} × {p}; expected {len(y)} rows, as y, and {len(names)} columns, as names")
    if y.all() or not y.any():
        raise ValueError("y: holds one class; expected both")
    auc = column_auc(columns, y, few=FEW)
    there = columns != 0
    rows = np.asarray(there.sum(axis=0)).ravel()
    positive = np.asarray(there.T @ y.astype(float)).ravel() / np.maximum(rows, 1)
    rate = float(y.mean())
    noise = np.sqrt((n + 1) / (12 * y.sum() * (n - y.sum())))
    high = (np.abs(auc - 0.5) > limit - 0.5) & (np.abs(auc - 0.5) > 4 * noise)
    log_chance = np.where(positive == 1, rows * np.log(rate), np.where(positive == 0, rows * np.log1p(-rate), 0.0))
    alone = (rows >= pure) & (log_chance < np.log(chance / p))
    found = np.flatnonzero(high | alone)
    table = pl.DataFrame(
        {
            "column": [names[k] for k in found],
            "auc": auc[found],
            "rows": rows[found],
            "positive": positive[found],
            "reason": ["auc" if high[k] else "pure" for k in found],
        },
        schema_overrides={"column": pl.String, "reason": pl.String},
    )
    return table.sort((pl.col("auc") - 0.5).abs(), descending=True)


def column_auc(columns: Any, y: Bool[np.ndarray, " n"], *, few: int = 0) -> Float[np.ndarray, " p"]:
    """The AUC of each column as a score, ties counted half (Mann and Whitney's U over the number of pairs).

    Columns of 3 to `few` values are names in disguise, such as places to which patients leave: their values are ordered by the
    share of positive labels among the rows that have them; values of fewer than 20 rows count as average.
    """
    from scipy.stats import rankdata

    n_positive = int(y.sum())
    pairs = n_positive * (len(y) - n_positive)
    found = []
    for first in range(0, columns.shape[1], BLOCK):
        block = columns[:, first : first + BLOCK]
        values = np.array(block if isinstance(block, np.ndarray) else block.toarray())
        for k in range(values.shape[1] if few else 0):
            values[:, k] = _by_share(values[:, k], y, few)
        ranks = rankdata(values, axis=0)
        found.append((ranks[y].sum(axis=0) - n_positive * (n_positive + 1) / 2) / pairs)
    return np.concatenate(found) if found else np.zeros(0)


def _by_share(column: np.ndarray, y: np.ndarray, few: int) -> np.ndarray:
    held, which = np.unique(column, return_inverse=True)
    if not 3 <= len(held) <= few:
        return column
    rows = np.bincount(which)
    share = np.where(rows < COMMON, y.mean(), np.bincount(which, weights=y) / rows)
    return share[which]
