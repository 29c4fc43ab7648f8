"""Files of views: .npz, .npy, .parquet, .csv and .tsv (and .gz of these), .h5ad and .h5mu, and folders of them."""

import csv
import gzip
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from hcl_jax.sources import Source
from hcl_jax.views import UNREADABLE, some

DAMAGED = (*UNREADABLE, KeyError, pl.exceptions.PolarsError, csv.Error)
MISSING = ["", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null", "None"]
"""What says in text that a cell is missing."""
FIRST = 100  # lines that tell which columns are numbers
TAIL = 2**22  # bytes in which the last line of text is looked for


def is_path(value: Any) -> bool:
    """Whether `read_path` would take it for a file's name."""
    return isinstance(value, (str, os.PathLike))


def read_path(path: str | os.PathLike) -> list[Source]:
    """The views of a file, or of all files of a folder, by name.

    A view has the name of its file (.npy, .parquet, .csv, .h5ad), or the name that it has there (.npz, .h5mu). In .npz matrices
    are views; arrays `<view>_names` and `sample_names` name features and samples; others, such as labels, are left out. In text
    the first line names the columns; the first column names the samples if it holds text, or if the first line has no name for
    it; the cells of `MISSING` are NaN. In .parquet the first column names them if it is text, or the index that pandas wrote.

    Raises `ValueError` that names the file: there is none, of another kind, empty, cut short or damaged, or without a view.
    """
    file = Path(path)
    if file.is_dir():
        files = sorted(inner for inner in file.iterdir() if _kind(inner) and not inner.name.startswith("."))
        if not files:
            raise ValueError(f"data: the folder {file} holds no file of views; expected some of {', '.join(READERS)}")
        return [source for inner in files for source in read_path(inner)]
    kind = _kind(file)
    if kind is None:
        raise ValueError(f"data: {file} is of unknown kind; expected one of {', '.join(READERS)}")
    if not file.exists():
        raise ValueError(f"data: no file {file}; expected {kind}")
    try:
        read = READERS[kind](file)
    except ModuleNotFoundError as error:
        raise ValueError(f"data: {file} needs the package {error.name}; expected it from pip install hcl_jax[mudata]") from None
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"data: {file} cannot be read ({reason}); expected {kind}") from None
    return [source._replace(where=f"data: {file}") for source in read]


def modalities(data: Any) -> list[Source]:
    """The views of a MuData object; of an AnnData object the one, `view 1`. Raises `ValueError` for one without a matrix."""
    held = data.mod if hasattr(data, "mod") else {"view 1": data}
    for name, modality in held.items():
        if modality.X is None:
            raise ValueError(f"data: view {name!r} has no X; expected a matrix, samples × features")
    return [Source(str(name), modality.to_df()) for name, modality in held.items()]


def _kind(path: Path) -> str | None:
    """The ending that says how the file is read."""
    return next((ending for ending in READERS if path.name.lower().endswith(ending)), None)


def _stem(path: Path) -> str:
    return path.name[: -len(_kind(path) or "")]


def _read_npz(path: Path) -> list[Source]:
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        held = {name: file[name] for name in file.files}
    matrices = {name: array for name, array in held.items() if array.ndim == 2 and array.dtype.kind in "fiub"}
    if not matrices:
        shapes = ", ".join(f"{name!r} {array.shape}" for name, array in held.items())
        raise ValueError(f"no matrix of numbers among its arrays: {shapes or 'none'}")
    listed = {name: tuple(array.tolist()) for name, array in held.items() if array.ndim == 1}
    samples = listed.get("sample_names")
    return [Source(name, matrix, features=listed.get(f"{name}_names"), samples=samples) for name, matrix in matrices.items()]


def _read_npy(path: Path) -> list[Source]:
    return [Source(_stem(path), np.load(path, allow_pickle=False))]


def _read_parquet(path: Path) -> list[Source]:
    frame = pl.read_parquet(path, glob=False)
    written = json.loads(pl.read_parquet_metadata(path).get("pandas", "{}"))
    index = [name for name in written.get("index_columns", []) if isinstance(name, str)]
    if len(index) == 1:
        frame = frame.select(pl.col(index[0]).cast(pl.String), pl.exclude(index[0]))
    return [Source(_stem(path), frame)]


def _read_text(path: Path) -> list[Source]:
    content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else None
    separator = "\t" if ".tsv" in path.name.lower()[-7:] else ","
    with path.open("rb") if content is None else io.BytesIO(content) as file:
        header = _header(file, separator)
    options = {"separator": separator, "has_header": False, "skip_rows": 1}
    frame = _read_columns(path if content is None else content, header, options)
    return [Source(_stem(path), _numbers_where_all_are(frame, header[:1]) if header[0] else frame)]


def _read_columns(source: Any, header: list[str], options: dict[str, Any]) -> pl.DataFrame:
    """The first column as text, the others as numbers; those that hold any text as text.

    Fast where all are numbers and nothing but empty cells and "NaN" says that one is missing, then where the first lines tell
    which are numbers."""
    as_text: dict[str, Any] = {"schema": dict.fromkeys(header, pl.String), "null_values": MISSING, **options}
    numbers = dict.fromkeys(header, pl.Float64) | {header[0]: pl.String}
    try:
        return pl.read_csv(source, schema=numbers, **options)
    except pl.exceptions.ComputeError:  # also where a line has too many fields, as it has below
        first = _numbers_where_all_are(pl.read_csv(source, n_rows=FIRST, **as_text), header[1:])
    try:
        return pl.read_csv(source, **{**as_text, "schema": dict(first.schema)})
    except pl.exceptions.ComputeError:
        return _numbers_where_all_are(pl.read_csv(source, **as_text), header[1:])


def _header(file: Any, separator: str) -> list[str]:
    """The names of the columns. Raises `ValueError` where they cannot be those of the lines that follow."""
    lines = csv.reader((line.decode("utf-8-sig") for line in file), delimiter=separator)
    header, first = next(lines, []), next(lines, [])
    if not header:
        raise ValueError("it is empty")
    if len(first) == len(header) + 1:
        header = ["", *header]
    if len(header) == 1 and any(other in header[0] for other in ",;\t"):
        raise ValueError(f"its columns are not separated by {separator!r}")
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise ValueError(f"its first line names {some(repeated)} more than once")
    file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
    _, ended, last = file.read().rpartition(b"\n")
    fields = next(csv.reader([last.decode(errors="replace")], delimiter=separator), [])
    if ended and 0 < len(fields) < len(header):
        raise ValueError(f"its last line has {len(fields)} of {len(header)} fields")
    return header


def _numbers_where_all_are(frame: pl.DataFrame, columns: list[str]) -> pl.DataFrame:
    """The frame, with the columns of text that hold nothing but numbers as numbers."""
    bare = pl.DataFrame([frame.get_column(name) for name in columns]).select(pl.all().str.strip_chars())
    text = bare.select(pl.when(pl.all().is_in(MISSING)).then(None).otherwise(pl.all()).name.keep())
    numbers = text.select(pl.all().cast(pl.Float64, strict=False))
    lost = zip(columns, text.null_count().row(0), numbers.null_count().row(0), strict=True)
    found = [name for name, before, after in lost if before == after]
    return frame.with_columns(numbers.select(found)) if found else frame


def _read_annotated(path: Path) -> list[Source]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions to come, and of names that occur twice, which are refused later
        if path.suffix.lower() == ".h5ad":
            import anndata

            return [source._replace(name=_stem(path)) for source in modalities(anndata.read_h5ad(path))]
        import mudata

        return modalities(mudata.read_h5mu(path))


READERS: dict[str, Callable[[Path], list[Source]]] = {
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".parquet": _read_parquet,
    **dict.fromkeys((".csv", ".csv.gz", ".tsv", ".tsv.gz"), _read_text),
    **dict.fromkeys((".h5mu", ".h5ad"), _read_annotated),
}
"""By the ending of the file's name."""
