"""The sample covariance of more rows than memory holds: one pass over chunks of rows, and partial sums that combine."""

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from jaxtyping import Float

from hcl_jax.covariance import SampleCovariance
from hcl_jax.structure import whole_number
from hcl_jax.views import Views, as_views, check_count, real_numbers

MEMORY = 256 * 2**20  # bytes of rows at a time
LARGEST_BLOCK = 4096  # rows: products of more are no faster, and no longer in the cache where there are some hundred features


@dataclass(frozen=True)
class CovarianceSums:
    """n, a shift c, Σ(x − c) and Σ(x − c)(x − c)ᵀ over some rows, in float64. `dtype` is that of the rows. The products, and
    covariances made of them, are symmetric to the last bit.

    Sums over disjoint ranges of rows combine, in any order: with one shift these are additions, otherwise one set of sums is
    first moved to the shift of the other by an identity. Either way the result differs only by roundings of float64.
    """

    n: int
    shift: Float[np.ndarray, " d"]
    total: Float[np.ndarray, " d"]
    outer: Float[np.ndarray, "d d"]
    dtype: np.dtype

    def combine(self, other: "CovarianceSums") -> "CovarianceSums":
        """The sums over the rows of both, about the shift of this one.

        Raises `ValueError` when the numbers of features differ.
        """
        if len(other.shift) != len(self.shift):
            raise ValueError(f"other: has {len(other.shift)} features; expected {len(self.shift)}")
        moved = other.shift - self.shift
        cross = np.outer(other.total, moved)
        outer = self.outer + other.outer + (cross + cross.T) + other.n * np.outer(moved, moved)
        total = self.total + other.total + other.n * moved
        return CovarianceSums(self.n + other.n, self.shift, total, outer, np.result_type(self.dtype, other.dtype))

    def mean(self) -> Float[np.ndarray, " d"]:
        """The mean of the rows."""
        return self.shift + self.total / self.n

    def covariance(self) -> SampleCovariance:
        """S with divisor n − 1, in the precision of the rows, or in float32 where JAX has no float64.

        Raises `ValueError` when there are fewer than 2 rows.
        """
        if self.n < 2:
            raise ValueError(f"n: is {self.n}; expected at least 2 rows")
        mean = self.total / np.sqrt(self.n)
        S = (self.outer - np.outer(mean, mean)) / (self.n - 1)
        return SampleCovariance(jnp.asarray(S, jax.dtypes.canonicalize_dtype(self.dtype)), n=self.n)


class CovarianceAccumulator:
    """Takes chunks of rows, a list or a dictionary of views each, and holds their `CovarianceSums`: O(d²) memory beside one block
    of rows.

    Rows gather in a block that is shifted as they come in; a full block is multiplied with itself in the precision of the rows,
    and blocks are added up in float64. Chunks may be of any size: the sums do not depend on it, not by a bit.

    `shift` is by default the mean of the first block, so that nothing of the form E[x²] − E[x]² is ever computed. In float32
    the covariances of the stored values are then right to 1e-6 of √(S_ii S_jj), however large the mean (and to 1e-7 unless the
    values are whole multiples of a coarse unit, whose squares are rounded downwards more often than up). That holds as long as
    rows stay near the shift: where they drift from it by t standard deviations, the error is up to t² times as large.

    `block_rows` defaults to what `memory` bytes hold, 4096 at most. `first_row` is what error messages count rows from.

    >>> accumulator = CovarianceAccumulator(dims=(2, 1), dtype=np.float64)
    >>> accumulator.update([np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[2.0], [0.0]])])
    >>> accumulator.sums().covariance().matrix.tolist()
    [[2.0, 0.0, -2.0], [0.0, 0.0, 0.0], [-2.0, 0.0, 2.0]]

    Raises `ValueError` for an argument that makes no sense; so do its methods, naming view and rows.
    """

    def __init__(
        self,
        dims: Sequence[int],
        dtype: np.dtype | type = np.float32,
        *,
        shift: Any = None,
        block_rows: int | None = None,
        memory: int = MEMORY,
        first_row: int = 0,
    ):
        sizes = [whole_number(dim) or 0 for dim in dims] if isinstance(dims, Iterable) else []
        if min(sizes, default=0) < 1:
            raise ValueError(f"dims: is {dims!r}; expected the positive number of features of each view")
        d, self._dtype = sum(sizes), np.result_type(dtype, np.float32)
        if self._dtype not in (np.float32, np.float64):
            raise ValueError(f"dtype: is {np.dtype(dtype)}; expected real numbers of at most 64 bits")
        check_count(memory, "memory", 1)
        if block_rows is not None:
            check_count(block_rows, "block_rows", 1)
        rows = int(min(LARGEST_BLOCK, memory // (d * self._dtype.itemsize)) if block_rows is None else block_rows)
        if rows < 1:
            raise ValueError(f"memory: is {memory}; expected room for at least one row of {d} features")
        origin = None if shift is None else np.asarray(real_numbers(shift, "shift:"))
        if origin is not None and (origin.shape != (d,) or not np.isfinite(origin).all()):
            raise ValueError(f"shift: has shape {origin.shape}; expected {d} finite numbers")
        self._columns = [slice(start, stop) for start, stop in pairwise(np.cumsum([0, *sizes]).tolist())]
        self._block, self._product = np.empty((rows, d), self._dtype), np.empty((d, d), self._dtype)
        self._filled, self._n, self._first_row = 0, 0, first_row
        self._shift = None if origin is None else origin.astype(self._dtype)
        self._names: list[Sequence[str]] | None = None
        self._total, self._outer = np.zeros(d), np.zeros((d, d))

    def update(self, views: Any) -> None:
        """Take in a chunk: the next rows of every view, in a list or a dictionary by name of what `as_views` takes.

        Raises `ValueError` that names the view when its rows are fewer, or its features others, than expected, when views or
        features have other names than in the first chunk, or when a view holds values that are not finite.
        """
        chunk = _as_chunk(views, "views")
        arrays = [np.asarray(matrix) for matrix in chunk.matrices]
        rows = self._check(arrays)
        self._check_names([chunk.names, *chunk.feature_names])
        taken = 0
        while taken < rows:
            size = min(rows - taken, len(self._block) - self._filled)
            target = self._block[self._filled : self._filled + size]
            with np.errstate(invalid="ignore", over="ignore"):  # found in the product
                for view, columns in zip(arrays, self._columns, strict=True):
                    shift = self._dtype.type(0) if self._shift is None else self._shift[None, columns]
                    np.subtract(view[taken : taken + size], shift, out=target[:, columns])
            self._filled += size
            taken += size
            if self._filled == len(self._block):
                self._flush()

    def sums(self) -> CovarianceSums:
        """The sums over all rows so far. Raises `ValueError` when there are none."""
        self._flush()
        if self._shift is None or not self._n:
            raise ValueError("views: have no rows; expected at least one")
        outer = (self._outer + self._outer.T) / 2  # as computed, the two triangles may differ by roundings
        return CovarianceSums(self._n, self._shift.astype(float), self._total.copy(), outer, self._dtype)

    def _check(self, views: Sequence[np.ndarray]) -> int:
        """The number of rows that all views have."""
        if len(views) != len(self._columns):
            raise ValueError(f"views: are {len(views)}; expected {len(self._columns)}")
        for m, (view, columns) in enumerate(zip(views, self._columns, strict=True), start=1):
            dim = columns.stop - columns.start
            if view.ndim != 2 or view.shape[1] != dim:
                raise ValueError(f"views: view {m} has shape {view.shape}; expected rows × {dim}")
        lengths = [len(view) for view in views]
        if min(lengths) < max(lengths):
            short, long = lengths.index(min(lengths)) + 1, lengths.index(max(lengths)) + 1
            end, more = (self._first_row + self._n + self._filled + length for length in (min(lengths), max(lengths)))
            raise ValueError(f"views: view {short} ends before row {end}; expected {more} rows or more, as view {long} has")
        return lengths[0]

    def _check_names(self, names: list[Sequence[str]]) -> None:
        """That the names of the views, and of the features of each, are those of the first chunk."""
        self._names = self._names or names
        for m, (held, expected) in enumerate(zip(names, self._names, strict=True)):
            if held != expected:
                one, other = next(pair for pair in zip(held, expected, strict=True) if pair[0] != pair[1])
                what = f"view {m} has a feature" if m else "one is"
                raise ValueError(f"views: {what} named {one!r}; expected {other!r} in its place, as in the first chunk")

    def _flush(self) -> None:
        """Add the rows of the block to the sums."""
        if not self._filled:
            return
        block = self._block[: self._filled]
        with np.errstate(invalid="ignore", over="ignore"):
            if self._shift is None:
                shift = block.mean(axis=0, dtype=float).astype(self._dtype)
                block -= shift[None]
            np.matmul(block.T, block, out=self._product)
        if not np.isfinite(np.diagonal(self._product)).all():
            raise ValueError(self._not_finite(block))
        if self._shift is None:
            self._shift = shift
        self._total += np.ones(len(block), self._dtype) @ block
        self._outer += self._product
        self._n += self._filled
        self._filled = 0

    def _not_finite(self, block: np.ndarray) -> str:
        start = self._first_row + self._n
        m = next(m for m, c in enumerate(self._columns) if not np.isfinite(np.diagonal(self._product)[c]).all())
        where = f"views: view {m + 1}, rows {start} to {start + len(block) - 1}:"
        if np.isfinite(block[:, self._columns[m]]).all():
            return f"{where} values whose squares exceed {self._dtype}; expected smaller ones, or float64"
        return f"{where} NaN or infinite values; expected finite numbers"


@cache
def _numbered(dim: int) -> tuple[str, ...]:
    """The names of features without names."""
    return tuple(map(str, range(dim)))


def _is_plain(view: Any) -> bool:
    """Whether this is an array to be taken as it is, perhaps of no rows, or mapped into memory: sums check values."""
    of_numbers = type(view) in (np.ndarray, np.memmap) or isinstance(view, jax.Array)
    return of_numbers and view.dtype.kind in "fiub" and view.ndim == 2 and view.shape[1] > 0


def _as_chunk(chunk: Any, argument: str) -> Views:
    """The views of a chunk: plain arrays as they are, anything else as `as_views` reads it."""
    if isinstance(chunk, Views):
        return chunk
    if not isinstance(chunk, Iterable) or isinstance(chunk, (str, bytes)) or hasattr(chunk, "__array__"):
        shape = f" of shape {tuple(chunk.shape)}" if hasattr(chunk, "shape") else ""
        raise ValueError(
            f"{argument}: one is of type {type(chunk).__name__}{shape}; expected every chunk as a list or a dictionary of views, "
            "the next rows of each"
        )
    by_name = dict(chunk) if isinstance(chunk, Mapping) else None
    views = list(chunk if by_name is None else by_name.values())
    if not views or not all(map(_is_plain, views)):
        return as_views(iter(views) if by_name is None else by_name)  # no list, which may be the rows of one matrix
    names = map(str, by_name or (f"view {m}" for m in range(1, len(views) + 1)))
    return Views(tuple(views), tuple(names), tuple(_numbered(view.shape[1]) for view in views))


def accumulate(
    chunks: Iterable[Any],
    *,
    shift: Any = None,
    block_rows: int | None = None,
    memory: int = MEMORY,
) -> CovarianceSums:
    """The sums over chunks of rows, a list or a dictionary of views each, of which only one is held at a time.

    A view is what `as_views` takes; names of views and features are the same in all chunks. Options and errors are those of
    `CovarianceAccumulator`; dimensions and dtype those of the first chunk.

    >>> rng = np.random.default_rng(0)
    >>> chunks = ([rng.normal(size=(500, 3)), rng.normal(size=(500, 2))] for _ in range(20))
    >>> accumulate(chunks).covariance().n_features
    5
    """
    if not isinstance(chunks, Iterable):
        raise ValueError(f"chunks: is {chunks!r}; expected chunks of rows, a list or a dictionary of views each")
    accumulator = None
    for chunk in chunks:
        views = _as_chunk(chunk, "chunks")
        if accumulator is None:
            dtype = np.result_type(*[matrix.dtype for matrix in views.matrices])
            accumulator = CovarianceAccumulator(views.dims, dtype, shift=shift, block_rows=block_rows, memory=memory)
        accumulator.update(views)
    if accumulator is None:
        raise ValueError("chunks: are none; expected at least one")
    return accumulator.sums()


def accumulate_npy(
    paths: str | Path | Sequence[str | Path],
    *,
    rows: slice = slice(None),
    shift: Any = None,
    block_rows: int | None = None,
    memory: int = MEMORY,
) -> CovarianceSums:
    """The sums over a range of rows of .npy files, one a view, mapped into memory and never loaded.

    Several processes, or Dask with `client.map` in place of `pool.map`, take a range each:

        with ProcessPoolExecutor() as pool:
            parts = pool.map(partial_sums, row_ranges(n_rows, 8))  # partial_sums(rows) returns accumulate_npy(paths, rows=rows)
            covariance = functools.reduce(CovarianceSums.combine, parts).covariance()

    Other options are those of `CovarianceAccumulator`. Raises `ValueError` that names the file, before anything is computed, when
    one is missing, is no matrix of numbers or has fewer rows than another; else as the accumulator does.
    """
    files = _as_paths(paths)
    views = [_map_npy(path) for path in files]
    first, last = _selected(rows, _common_length([len(view) for view in views], [str(path) for path in files]))
    accumulator = CovarianceAccumulator(
        [view.shape[1] for view in views],
        np.result_type(*views),
        shift=shift,
        block_rows=block_rows,
        memory=memory,
        first_row=first,
    )
    accumulator.update([view[first:last] for view in views])
    return accumulator.sums()


def accumulate_parquet(
    paths: str | Path | Sequence[str | Path],
    columns: Sequence[Sequence[str] | None] | None = None,
    *,
    rows: slice = slice(None),
    shift: Any = None,
    block_rows: int | None = None,
    memory: int = MEMORY,
) -> CovarianceSums:
    """The sums over a range of rows of parquet files, read lazily: a file or a glob and a list of columns for each view.

    A path that exists is no glob; the files of a glob follow each other by name, and have the same columns. Views may be columns
    of one file, which is then named for each of them. Without columns a view has all of its file's. `memory`
    bytes bound the rows that are read at a time, in the precision of the files; a row group of the file is decoded anew for every
    piece of it, so that small groups, or a large `memory`, are fastest.

    Other options are those of `CovarianceAccumulator`; errors are those of `accumulate_npy`. A missing value counts as NaN.
    """
    paths = _as_paths(paths)
    if columns is not None and len(columns) != len(paths):
        raise ValueError(f"columns: has lists for {len(columns)} views; expected {len(paths)}, one for each of the paths")
    wanted = columns or [None] * len(paths)
    frames = [_scan_parquet(path, names) for path, names in zip(paths, wanted, strict=True)]
    lengths = [_collected(frame.select(pl.len()), path).item() for frame, path in zip(frames, paths, strict=True)]
    first, last = _selected(rows, _common_length(lengths, [str(path) for path in paths]))
    dims = [len(frame.collect_schema()) for frame in frames]
    dtype = np.result_type(*[frame.clear().collect().to_numpy() for frame in frames])
    accumulator = CovarianceAccumulator(dims, dtype, shift=shift, block_rows=block_rows, memory=memory, first_row=first)
    at_a_time = max(1, int(memory) // (2 * sum(dims) * dtype.itemsize))  # as columns of polars and as a matrix
    for start in range(first, last, at_a_time):
        pieces = [frame.slice(start, min(at_a_time, last - start)) for frame in frames]
        accumulator.update([_collected(piece, path).to_numpy() for piece, path in zip(pieces, paths, strict=True)])
    return accumulator.sums()


def row_ranges(n_rows: int, parts: int) -> list[slice]:
    """All rows in consecutive ranges of nearly equal length, for as many processes.

    >>> row_ranges(10, 3)
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
    """
    if not 1 <= parts <= n_rows:
        raise ValueError(f"parts: is {parts}; expected from 1 to {n_rows}, the number of rows")
    return [slice(start, stop) for start, stop in pairwise(n_rows * part // parts for part in range(parts + 1))]


def _as_paths(paths: Any) -> list[str | Path]:
    """The file of each view; one path is that of one view."""
    several = isinstance(paths, Iterable) and not isinstance(paths, str)
    given: list[Any] = list(paths) if several else [paths]
    for path in given:
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"paths: {path!r} is no path; expected the file of each view")
    return given


def _map_npy(path: str | Path) -> np.ndarray:
    try:
        view = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"paths: {path} cannot be mapped ({error}); expected a matrix in .npy") from None
    if view.ndim != 2 or view.dtype.kind not in "fiub":
        raise ValueError(f"paths: {path} has shape {view.shape}, {view.dtype}; expected a matrix of numbers, rows × features")
    return view


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """What goes wrong within is a `ValueError` that names the file."""
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"paths: {path} cannot be read ({reason}); expected parquet") from None


def _collected(frame: pl.LazyFrame, path: str | Path) -> pl.DataFrame:
    with _reading(path):
        return frame.collect()


def _dtypes(path: str) -> dict[str, str]:
    """By column."""
    with _reading(path):
        return {name: str(dtype) for name, dtype in pl.scan_parquet(path, glob=False).collect_schema().items()}


def _files(path: str | Path) -> list[str]:
    """The files of a view. Raises `ValueError` that names the first whose columns are not those of the first file."""
    found = [] if Path(path).exists() else sorted(glob.glob(str(path), recursive=True))
    files = found or [str(path)]
    expected = _dtypes(files[0])
    for file in files[1:]:
        other = _dtypes(file)
        for name in [*expected, *other]:
            one, two = expected.get(name, "missing"), other.get(name, "missing")
            if one != two:
                raise ValueError(f"paths: column {name!r} of {file} is {two}; expected {one}, as in {files[0]}")
    return files


def _scan_parquet(path: str | Path, names: Sequence[str] | None) -> pl.LazyFrame:
    files = _files(path)
    with _reading(path):
        frame = pl.scan_parquet(files, glob=False)
        schema = frame.collect_schema()
    for name in schema if names is None else names:
        if name not in schema or not (schema[name].is_integer() or schema[name].is_float()):
            raise ValueError(f"columns: {name!r} is {schema.get(name, 'missing')} in {path}; expected a column of numbers")
    return frame if names is None else frame.select(names)


def _common_length(lengths: Sequence[int], names: Sequence[str]) -> int:
    """The number of rows that all views have."""
    if not lengths:
        raise ValueError("paths: are none; expected one a view")
    most = max(lengths)
    for m, (length, name) in enumerate(zip(lengths, names, strict=True), start=1):
        if length < most:
            other = names[lengths.index(most)]
            raise ValueError(f"paths: view {m}, {name}, has {length} rows; expected {most}, as {other} has")
    return most


def _selected(rows: slice, n_rows: int) -> tuple[int, int]:
    """Where the range starts and stops."""
    first, last, step = rows.indices(n_rows) if isinstance(rows, slice) else (0, 0, 1)
    if step != 1 or last <= first:
        raise ValueError(f"rows: is {rows}; expected a range of at least one of the {n_rows} rows, and step 1")
    return first, last
