"""Folders of events in the MEDS format, version 0.4: written from lazy frames, checked by the schemas of `meds`, and read.

`data/*.parquet` hold a row an event: subject_id, time (null: does not change), code, numeric_value, text_value, and here
`stay_id`, the number of the hospital or unit stay that the event belongs to. A subject's events lie in one file, in the order of
their times. `metadata/` holds dataset.json, codes.parquet, and here `groups.parquet`: the patient and the hospital of each
subject, by which rows are split.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from hcl_jax.records.tables import FAILURES, Table, explain

EVENT: dict[str, pl.DataType | type[pl.DataType]] = {
    "subject_id": pl.Int64,
    "time": pl.Datetime("us"),
    "code": pl.String,
    "numeric_value": pl.Float32,
    "text_value": pl.String,
    "stay_id": pl.Int64,
}
BIRTH, DEATH = "MEDS_BIRTH", "MEDS_DEATH"
GROUPS = "metadata/groups.parquet"
SUBJECTS_PER_FILE = 4000
BATCH = 2**18


@dataclass(frozen=True)
class Events:
    """Events from one table, with `row`; the column that their times come from."""

    frame: pl.LazyFrame
    table: Table
    column: str


def events(
    frame: pl.LazyFrame, table: Table, column: str, *, code: pl.Expr, time: pl.Expr | None, value: pl.Expr | None = None,
    text: pl.Expr | None = None, stay: pl.Expr | None = None,
) -> Events:  # fmt: skip
    """Events of a table: expressions in its columns. Rows without a code are left out, and those without a time, unless
    `time=None`: an event that is known from the start."""
    nothing = pl.lit(None)
    row = frame.select(
        "row",
        "subject_id",
        time=(nothing if time is None else time).cast(EVENT["time"]),
        code=code,
        numeric_value=(nothing if value is None else value).cast(pl.Float32),
        text_value=(nothing if text is None else text).cast(pl.String),
        stay_id=(nothing if stay is None else stay).cast(pl.Int64),
    )
    kept = pl.col("code").is_not_null() if time is None else pl.col("code").is_not_null() & pl.col("time").is_not_null()
    return Events(row.filter(kept), table, column)


def code(*parts: str | pl.Expr) -> pl.Expr:
    """Parts of a code joined by `//`; `UNKNOWN` for those that are missing."""
    known = [pl.lit(part) if isinstance(part, str) else part.cast(pl.String).fill_null("UNKNOWN") for part in parts]
    return pl.concat_str(known, separator="//")


def write_meds(path: Path | str, parts: Sequence[Events], groups: pl.DataFrame, description: Mapping[str, Any]) -> None:
    """Write events as a MEDS folder; `path` appears when it is whole. Memory is that of one file of subjects.

    groups: subject_id, patient, hospital. description: fields of dataset.json. Raises `ValueError` in one line with file, column
    and row for a table that cannot be read, and for an event before its subject's birth; also where `path` exists.
    """
    out = Path(path)
    if out.exists():
        raise ValueError(f"path: {out} exists; expected a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        staged = [_stage(part, work / f"{k}.parquet") for k, part in enumerate(parts)]
        _refuse_before_birth(parts, staged)
        (work / "meds" / "data").mkdir(parents=True)
        (work / "meds" / "metadata").mkdir()
        _write_data(staged, work)
        groups.write_parquet(work / "meds" / GROUPS)
        _write_metadata(work / "meds", description)
        os.rename(work / "meds", out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_meds(path: Path | str) -> pl.LazyFrame:
    """The events of any MEDS folder, lazily, with the columns of `EVENT`; `stay_id` is null where the folder has none.

    The files' schemas are checked here, their rows by `check_meds`. Raises `ValueError` that names a file of another schema.
    """
    frames = []
    for file in _files(Path(path)):
        _check_schema(file)
        frame = pl.scan_parquet(file)
        held = frame.collect_schema().names()
        frames.append(
            frame.select((pl.col(name) if name in held else pl.lit(None).alias(name)).cast(kind) for name, kind in EVENT.items())
        )
    return pl.concat(frames)


def read_groups(path: Path | str) -> pl.DataFrame:
    """subject_id, patient and hospital; each subject is its own patient, of no hospital, where a folder does not say."""
    file = Path(path) / GROUPS
    if file.exists():
        return pl.read_parquet(file)
    subjects = read_meds(path).select(pl.col("subject_id").unique()).sort("subject_id").collect(engine="streaming")
    return subjects.with_columns(patient=pl.col("subject_id").cast(pl.String), hospital=pl.lit(None, pl.String))


def check_meds(path: Path | str) -> None:
    """Raises `ValueError` with file, column and row for what MEDS does not allow.

    That is other columns or types, subjects or codes that are null, events out of order, and a subject in two files.
    """
    files = _files(Path(path))
    for file in files:
        _check_schema(file)
        _check_rows(file)
    subjects = pl.concat([pl.scan_parquet(file).select(pl.col("subject_id").unique(), file=pl.lit(str(file))) for file in files])
    twice = subjects.filter(pl.col("subject_id").is_duplicated()).head(1).collect()
    if len(twice):
        raise ValueError(f"{twice['file'][0]}: column subject_id: {twice['subject_id'][0]} is in another file too; expected one")


def _files(path: Path) -> list[Path]:
    files = sorted((path / "data").rglob("*.parquet"))
    if not files:
        raise ValueError(f"path: {path} holds no data/*.parquet; expected a MEDS folder")
    return files


def _check_schema(file: Path) -> None:
    from flexible_schema.exceptions import SchemaValidationError, TableValidationError
    from meds import DataSchema
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema

    try:
        DataSchema.align(read_schema(file).empty_table())
    except (SchemaValidationError, TableValidationError, ArrowException, OSError) as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}; expected the schema of MEDS") from None


def _check_rows(file: Path) -> None:
    rows = pl.scan_parquet(file).select("subject_id", "time", "code").with_row_index("row", offset=1)
    before = {name: pl.col(name).shift(1) for name in ("subject_id", "time")}
    same = pl.col("subject_id") == before["subject_id"]
    late = same & ((pl.col("time") < before["time"]) | (pl.col("time").is_null() & before["time"].is_not_null())).fill_null(False)
    split = ~same.fill_null(False) & ~pl.col("subject_id").is_first_distinct()
    wrong = {
        "subject_id": (pl.col("subject_id").is_null() | split, "subjects that are not null, the rows of each together"),
        "code": (pl.col("code").is_null(), "a code"),
        "time": (late.fill_null(False), "times of a subject in order"),
    }
    for column, (test, expected) in wrong.items():
        found = rows.filter(test).head(1).collect()
        if len(found):
            raise ValueError(f"{file}: column {column}, row {found['row'][0]}: is {found[column][0]}; expected {expected}")


def _stage(part: Events, file: Path) -> Path:
    try:
        part.frame.sink_parquet(file, compression="lz4")
    except FAILURES as error:
        reason = explain(part.table) or f"{part.table.path}: {str(error).splitlines()[0]}"
        raise ValueError(reason) from None
    return file


def _refuse_before_birth(parts: Sequence[Events], staged: Sequence[Path]) -> None:
    births = _union(staged).filter(pl.col("code") == BIRTH).group_by("subject_id").agg(birth=pl.col("time").min())
    for part, file in zip(parts, staged, strict=True):
        rows = pl.scan_parquet(file).select("row", "subject_id", "time")
        found = rows.join(births, on="subject_id").filter(pl.col("time") < pl.col("birth")).head(1).collect(engine="streaming")
        if len(found):
            row, _, time, birth = found.row(0)
            raise ValueError(
                f"{part.table.path}: column {part.column}, row {row}: is {time}; expected no event before birth, {birth}"
            )


def _union(files: Iterable[Path]) -> pl.LazyFrame:
    return pl.concat([pl.scan_parquet(file) for file in files])


def _write_data(staged: list[Path], work: Path) -> None:
    """Subjects in ranges of their numbers, a file a range, sorted there; each file passes the schema of MEDS on its way."""
    from meds import DataSchema
    from pyarrow import Table as ArrowTable
    from pyarrow.parquet import ParquetFile, ParquetWriter

    found = _union(staged).select(pl.col("subject_id").unique()).collect(engine="streaming")
    subjects = found["subject_id"].sort()
    for k, start in enumerate(range(0, len(subjects), SUBJECTS_PER_FILE)):
        block = subjects[start : start + SUBJECTS_PER_FILE]
        rows = _union(staged).filter(pl.col("subject_id").is_between(block[0], block[-1]))
        ordered = rows.drop("row").sort("subject_id", "time", nulls_last=False, maintain_order=True)
        ordered.sink_parquet(work / "sorted.parquet", row_group_size=BATCH)
        writer = None
        for batch in ParquetFile(work / "sorted.parquet").iter_batches(BATCH):
            table = DataSchema.align(ArrowTable.from_batches([batch]))
            writer = writer or ParquetWriter(work / "meds" / "data" / f"{k}.parquet", table.schema, compression="zstd")
            writer.write_table(table)
        if writer:
            writer.close()


def _write_metadata(folder: Path, description: Mapping[str, Any]) -> None:
    from meds import CodeMetadataSchema, DatasetMetadataSchema
    from pyarrow.parquet import write_table

    codes = read_meds(folder).select(pl.col("code").unique()).sort("code").collect(engine="streaming")
    empty = {"description": pl.lit(None, pl.String), "parent_codes": pl.lit(None, pl.List(pl.String))}
    write_table(CodeMetadataSchema.align(codes.with_columns(**empty).to_arrow()), folder / "metadata" / "codes.parquet")
    fields = {"meds_version": "0.4.1", "raw_source_id_columns": ["stay_id"], **description}
    DatasetMetadataSchema.validate(fields)
    (folder / "metadata" / "dataset.json").write_text(json.dumps(fields, indent=1) + "\n")
