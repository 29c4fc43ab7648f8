"""Files of multimodal benchmarks as matrices by modality: MIMIC-III, CMU-MOSI, CMU-MOSEI, UR-FUNNY, MUStARD, and IRFL features.

The data are not ours to ship. Who has them saves the arrays of each split under the names that the benchmarks give their fields,
`train_vision`, `train_audio`, …, `train_labels`, `valid_vision`, …, in one .npz: n × features, or n × time × features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hcl_jax.views import UNREADABLE

SPOKEN = ("vision", "audio", "text")
FIELDS: dict[str, tuple[str, ...]] = {
    "mimic": ("static", "timeseries"),
    "mosi": SPOKEN,
    "mosei": SPOKEN,
    "urfunny": SPOKEN,
    "mustard": SPOKEN,
    "irfl": ("image", "text"),
}
"""The modalities of each benchmark."""
LABELS = "labels"
SPLITS = ("train", "valid", "test")
Pool = Literal["flatten", "mean"]


@dataclass(frozen=True)
class BenchmarkSplit:
    """Rows of one split: a matrix a modality, in the order of `FIELDS`, and a label a row."""

    views: dict[str, np.ndarray]
    labels: np.ndarray
    n_replaced: int
    """Entries that were not finite, of which files of speech have some, and that are 0 here."""


def load_benchmark(path: Path | str, benchmark: str, pool: Pool = "flatten") -> dict[str, BenchmarkSplit]:
    """The splits of a benchmark's file that are there, `train` at least.

    pool: what becomes of time in series of shape n × time × features: all steps side by side, or their mean. Raises `ValueError`
    for an unknown benchmark or pool, a file that cannot be read, fields that are missing, and arrays that are no such series or
    of other numbers of rows.
    """
    if benchmark not in FIELDS:
        raise ValueError(f"benchmark: unknown {benchmark!r}; expected one of {', '.join(FIELDS)}")
    if pool not in ("flatten", "mean"):
        raise ValueError(f"pool: unknown {pool!r}; expected flatten or mean")
    try:
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"path: no file {path}; expected an .npz with fields such as train_{FIELDS[benchmark][0]}") from None
    except UNREADABLE as error:
        raise ValueError(f"path: {path} cannot be read ({error}); expected an .npz without pickled objects") from None
    found = [split for split in SPLITS if any(name.startswith(f"{split}_") for name in held)]
    if "train" not in found:
        raise ValueError(f"path: {path} has no field train_{FIELDS[benchmark][0]}; expected the split train at least")
    return {split: _split(held, split, benchmark, pool) for split in found}


def _split(held: dict[str, np.ndarray], split: str, benchmark: str, pool: Pool) -> BenchmarkSplit:
    names = {field: f"{split}_{field}" for field in (*FIELDS[benchmark], LABELS)}
    if missing := [name for name in names.values() if name not in held]:
        raise ValueError(f"path: lacks {', '.join(missing)}; expected {', '.join(names.values())}")
    labels = np.squeeze(held[names[LABELS]])
    if labels.ndim != 1:
        raise ValueError(f"path: {names[LABELS]} has shape {held[names[LABELS]].shape}; expected a label a row")
    views, n_replaced = {}, 0
    for field in FIELDS[benchmark]:
        rows = _as_rows(held[names[field]], names[field], pool)
        if len(rows) != len(labels):
            raise ValueError(f"path: {names[field]} has {len(rows)} rows; expected {len(labels)}, as {names[LABELS]}")
        finite = np.isfinite(rows)
        n_replaced += int(np.sum(~finite))
        views[field] = np.where(finite, rows, 0.0)
    return BenchmarkSplit(views, labels, n_replaced)


def _as_rows(array: np.ndarray, name: str, pool: Pool) -> np.ndarray:
    if array.ndim not in (2, 3) or not np.issubdtype(array.dtype, np.number):
        raise ValueError(f"path: {name} has shape {array.shape} of {array.dtype}; expected n × features or n × time × features")
    values = array.astype(float)
    if values.ndim == 2:
        return values
    return values.mean(axis=1) if pool == "mean" else values.reshape(len(values), -1)
