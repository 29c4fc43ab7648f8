"""Frames of polars and pandas: the names that they carry, and the numbers in their columns. Pandas need not be installed."""

from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import polars as pl

TEXT = (pl.String, pl.Categorical, pl.Enum)


def is_frame(value: Any) -> bool:
    """Whether this has named columns, as polars or pandas has them."""
    return isinstance(value, pl.DataFrame) or (hasattr(value, "index") and hasattr(value, "columns"))


def feature_names(frame: Any) -> tuple[str, ...]:
    """The names of the columns, but for the one that names the samples."""
    return tuple(map(str, frame.columns))[_names_first(frame) :]


def sample_names(frame: Any) -> tuple[Hashable, ...] | None:
    """A pandas index other than the default one, 0, 1, …, else the first column if that is text, else None."""
    if not _names_first(frame):
        return None if isinstance(frame, pl.DataFrame) else index_names(frame.index)
    return tuple((frame.to_series(0) if isinstance(frame, pl.DataFrame) else frame.iloc[:, 0]).to_list())


def index_names(index: Any) -> tuple[Hashable, ...] | None:
    """The names in a pandas index; None for the default one, 0, 1, …"""
    default = type(index).__name__ == "RangeIndex" and index.start == 0 and index.step == 1
    return None if default else tuple(index)


def _names_first(frame: Any) -> bool:
    """Whether the first column names the samples."""
    if not len(frame.columns):
        return False
    if isinstance(frame, pl.DataFrame):
        return isinstance(frame.dtypes[0], TEXT)
    return index_names(frame.index) is None and frame.dtypes.iloc[0].kind == "O" and _text_at(frame.iloc[:, 0]) is not None


def of_features(frame: Any, places: Sequence[int]) -> Any:
    """The frame with some of its features, by their place, and the names of its samples."""
    first = int(_names_first(frame))
    columns = [0] * first + [place + first for place in places]
    return frame[:, columns] if isinstance(frame, pl.DataFrame) else frame.iloc[:, columns]


def frame_numbers(frame: Any, where: str) -> np.ndarray:
    """The features as a matrix, NaN where cells are missing: single precision where all columns have no more, else double; as
    they are where some pandas column holds other objects, dates or complex numbers.

    Raises `ValueError` that starts with `where` and names the first column of text, its first value that is no number, and the
    row of that, counted from 1.
    """
    if isinstance(frame, pl.DataFrame):
        return _polars_numbers(frame[:, int(_names_first(frame)) :], where)
    features = frame.iloc[:, int(_names_first(frame)) :]
    kinds = [dtype.kind for dtype in features.dtypes]
    for column in (place for place, kind in enumerate(kinds) if kind == "O"):
        _refuse_text(_text_at(features.iloc[:, column]), features.columns[column], where)
    if set(kinds) <= set("fiubO"):
        single = all(dtype.kind == "f" and dtype.itemsize <= 4 for dtype in features.dtypes)
        with suppress(TypeError, ValueError):  # an object that is no number
            return features.to_numpy(dtype=np.float32 if single else np.float64, na_value=np.nan)
    return np.asarray(features)


def _polars_numbers(features: pl.DataFrame, where: str) -> np.ndarray:
    for name, dtype in features.schema.items():
        if isinstance(dtype, TEXT):
            column = features.get_column(name).cast(pl.String)
            known = column.is_not_null()
            wrong = known & column.str.strip_chars().cast(pl.Float64, strict=False).is_null()
            row = (wrong if wrong.any() else known).arg_max()
            _refuse_text(None if row is None or not known.any() else (row, column[row]), name, where)
        elif not (dtype.is_numeric() or isinstance(dtype, (pl.Boolean, pl.Null))):
            raise ValueError(f"{where} has column {name!r} of type {dtype}; expected real numbers")
    single = all(isinstance(dtype, (pl.Float16, pl.Float32)) for dtype in features.dtypes)
    wanted = pl.Float32() if single else pl.Float64()
    return (features if set(features.dtypes) == {wanted} else features.cast(wanted)).to_numpy()


def _text_at(column: Any) -> tuple[int, str] | None:
    """The row and the value of the first cell of a pandas column that is text."""
    return next(((row, cell) for row, cell in enumerate(column) if isinstance(cell, str)), None)


def _refuse_text(found: tuple[int, str] | None, column: Any, where: str) -> None:
    if found:
        row, value = found
        said = value if len(value) <= 40 else f"{value[:40]}…"
        raise ValueError(f"{where} holds {said!r} in row {row + 1} of column {str(column)!r}; expected real numbers")
