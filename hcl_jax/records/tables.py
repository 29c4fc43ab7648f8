"""Raw tables of a database as lazy frames with types, and what is wrong with them in one line: file, column, row."""

import csv
import gzip
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

Kind = Literal["id", "int", "float", "text", "time", "date"]
TIME, DATE = "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d"
FAILURES = (pl.exceptions.PolarsError, OSError, EOFError, zlib.error, csv.Error)
"""What polars and gzip raise for a file that is not the table that it should be."""


@dataclass(frozen=True)
class Table:
    """A .csv.gz (or .csv) and the columns that are read from it; no cell of an `id` column is empty."""

    folder: Path
    name: str
    columns: Mapping[str, Kind]

    @property
    def path(self) -> Path:
        packed = self.folder / f"{self.name}.csv.gz"
        plain = self.folder / f"{self.name}.csv"
        return plain if plain.exists() and not packed.exists() else packed


def scan(table: Table) -> pl.LazyFrame:
    """The table's columns with their types, and `row` from 1; blank cells are null. Nothing but the header is read yet.

    Raises `ValueError` that names file and column: no file, a header that cannot be read, columns that are not there.
    """
    if not table.path.exists():
        raise ValueError(f"{table.path}: no such file; expected the table {table.name}")
    try:
        header = pl.scan_csv(table.path, infer_schema=False).collect_schema().names()
    except FAILURES as error:
        raise ValueError(_torn_row(table.path) or f"{table.path}: {_first_line(error)}; expected a header") from None
    for name in table.columns:
        if name not in header:
            raise ValueError(f"{table.path}: column {name}, row 0: is missing; expected it in the header")
    frame = pl.scan_csv(table.path, infer_schema=False).with_row_index("row", offset=1)
    return frame.select("row", *(_typed(name, kind, strict=True).alias(name) for name, kind in table.columns.items()))


def explain(table: Table) -> str | None:
    """What is wrong with the table, in one line; None if nothing is. Reads the whole file."""
    if (torn := _torn_row(table.path)) is not None:
        return torn
    raw = pl.scan_csv(table.path, infer_schema=False).with_row_index("row", offset=1)
    kept = raw.select("row", *table.columns)
    bad = {name: _typed(name, kind, strict=False).is_null() & _wanted(name, kind) for name, kind in table.columns.items()}
    found = kept.filter(pl.any_horizontal(*bad.values())).head(1).collect(engine="streaming")
    if not len(found):
        return None
    name = next(name for name, wrong in bad.items() if found.select(wrong).item())
    return f"{table.path}: column {name}, row {found['row'][0]}: is {found[name][0]!r}; expected {_EXPECTED[table.columns[name]]}"


def refuse_repeated(table: Table, column: str) -> None:
    """Raises `ValueError` that names file, column and row if a value of the column, such as the number of a stay, comes twice."""
    frame = scan(table).select("row", column)
    twice = frame.filter(pl.col(column).is_duplicated() & ~pl.col(column).is_first_distinct())
    try:
        found = twice.head(1).collect()
    except FAILURES as error:
        raise ValueError(explain(table) or f"{table.path}: {_first_line(error)}") from None
    if len(found):
        raise ValueError(
            f"{table.path}: column {column}, row {found['row'][0]}: {found[column][0]} is there before; expected each once"
        )


_EXPECTED = {
    "id": "a whole number",
    "int": "a whole number or nothing",
    "float": "a number or nothing",
    "text": "text",
    "time": "a time such as 2196-02-24 14:38:00 or nothing",
    "date": "a day such as 2196-02-24 or nothing",
}


def _typed(name: str, kind: Kind, *, strict: bool) -> pl.Expr:
    text = _blank_as_null(name)
    if kind in ("id", "int"):
        value = text.cast(pl.Int64, strict=strict)
        return _never_null(value) if kind == "id" and strict else value
    if kind == "float":
        return text.cast(pl.Float64, strict=strict)
    if kind == "text":
        return text
    if kind == "date":
        return text.str.head(10).str.to_datetime(DATE, strict=strict, time_unit="us")
    return text.str.to_datetime(TIME, strict=strict, time_unit="us")


def _blank_as_null(name: str) -> pl.Expr:
    text = pl.col(name).str.strip_chars()
    return pl.when(text != "").then(text)


def _never_null(value: pl.Expr) -> pl.Expr:
    """The value; a null ends the query, since the word below is no number."""
    return pl.when(value.is_null()).then(pl.lit("empty")).otherwise(value.cast(pl.String)).cast(pl.Int64)


def _wanted(name: str, kind: Kind) -> pl.Expr:
    """Whether a cell that gave no value should have given one."""
    return pl.lit(True) if kind == "id" else _blank_as_null(name).is_not_null() & pl.lit(kind != "text")


def _torn_row(path: Path) -> str | None:
    """The first row that cannot be read or has not as many fields as the header."""
    row = 0
    with gzip.open(path, "rt", newline="") if path.suffix == ".gz" else open(path, newline="") as lines:
        try:
            reader = csv.reader(lines)
            width = len(next(reader, []))
            for row, fields in enumerate(reader, start=1):
                if len(fields) != width:
                    return f"{path}: row {row}: has {len(fields)} fields; expected {width}, as the header"
        except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
            return f"{path}: row {row + 1}: {_first_line(error)}; expected a whole table"
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
