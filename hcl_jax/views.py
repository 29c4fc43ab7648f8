"""The boundary: what a caller gives becomes matrices of real numbers with names, or an error that says what is wrong with it.

Arrays of NumPy and JAX, nested lists, frames of pandas and polars, masked arrays, arrays of objects, integers and booleans.
Inside of compiled code only shapes and types can be looked at. Means and scales, and what is constant, are decided here as well.
"""

import numbers
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from hcl_jax.fisher import noise_by_feature
from hcl_jax.frames import feature_names, frame_numbers, index_names, is_frame, sample_names
from hcl_jax.structure import whole_number

Numbers = np.ndarray | Array
Held = TypeVar("Held", bound=Numbers)
UNREADABLE = (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
"""What numpy raises for a file that is not .npz, or is cut short."""
LISTED = 5
ROUNDED = 0.01  # of a standard deviation may be lost to rounding when numbers go to a narrower precision


@dataclass(frozen=True, eq=False)
class Views:
    """Views of the same samples: `matrices` n × d_m of floating-point numbers, NumPy's or JAX's as they came, rows in one order.

    Features without names are numbered from 0; `sample_names` are None where no view has any.
    """

    matrices: tuple[Numbers, ...]
    names: tuple[str, ...]
    feature_names: tuple[tuple[str, ...], ...]
    sample_names: tuple[Hashable, ...] | None = None

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(int(matrix.shape[1]) for matrix in self.matrices)

    @property
    def n_samples(self) -> int:
        return int(self.matrices[0].shape[0])

    def of_rows(self, rows: Any) -> "Views":
        """Some of the samples, by their place."""
        order = np.asarray(rows)
        names = None if self.sample_names is None else tuple(self.sample_names[row] for row in order)
        return replace(self, matrices=tuple(matrix[order] for matrix in self.matrices), sample_names=names)

    def without(self, view: int) -> "Views":
        """The same samples, all of them without this view (by its place, from 0)."""
        matrices = list(self.matrices)
        matrices[view] = np.full(matrices[view].shape, np.nan, matrices[view].dtype)
        return replace(self, matrices=tuple(matrices))

    def centre_and_scale(self) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]:
        """(means, standard deviations) of every feature over the cells that are there, in double precision; infinite deviations
        of those that are constant."""
        X = np.concatenate([np.asarray(matrix, float) for matrix in self.matrices], axis=1)
        there = ~np.isnan(X)
        n = there.sum(axis=0)
        first = np.where(there, X, 0).sum(axis=0) / np.maximum(n, 1)
        rest = np.where(there, X - first, 0)
        centre = first + rest.sum(axis=0) / np.maximum(n, 1)
        deviation = norms(np.where(there, X - centre, 0)) / np.sqrt(np.maximum(n - 1, 1))
        return centre, np.where(deviation > np.finfo(float).eps * np.abs(centre), deviation, np.inf)

    def standardised(self, centre: Float[np.ndarray, " d"], scale: Float[np.ndarray, " d"]) -> Float[np.ndarray, "n d"]:
        """All views side by side in these units, 0 where cells are missing."""
        X = np.concatenate([np.asarray(matrix, float) for matrix in self.matrices], axis=1)
        return np.nan_to_num((X - centre) / scale, nan=0.0)

    def joined(self) -> Numbers:
        """All views side by side: NumPy's, with all the digits that came, where all of them are; JAX's otherwise."""
        if all(isinstance(matrix, np.ndarray) for matrix in self.matrices):
            return np.concatenate(self.matrices, axis=1)
        return self.stacked()

    def stacked(self) -> Float[Array, "n d"]:
        """All views side by side, in the widest of their precisions that JAX has. Raises `ValueError` where that is narrower than
        they came in, and too narrow for how some column varies about its mean."""
        dtype = jax.dtypes.canonicalize_dtype(np.result_type(*[np.dtype(matrix.dtype) for matrix in self.matrices]))
        for name, matrix in zip(self.names, self.matrices, strict=True):
            if isinstance(matrix, np.ndarray) and np.finfo(matrix.dtype).eps < np.finfo(dtype).eps:
                _refuse_rounded(matrix, name, dtype)
        return jnp.concatenate([jnp.asarray(matrix, dtype) for matrix in self.matrices], axis=1)


def _refuse_rounded(matrix: np.ndarray, name: str, dtype: np.dtype) -> None:
    """Raise `ValueError` if rounding to the precision takes more than `ROUNDED` of a column's standard deviation."""
    _, means, spreads = centred(matrix)
    lost = (spreads > 0) & (np.finfo(dtype).eps * np.abs(means) > ROUNDED * spreads)
    if lost.any():
        column = int(lost.argmax())
        raise ValueError(
            f"views: {name}: column {column} has mean {means[column]:.3g} and standard deviation {spreads[column]:.3g}, which "
            f'{dtype} does not hold; expected columns that are nearer to 0, or jax.config.update("jax_enable_x64", True)'
        )


class Table(NamedTuple):
    """One view, as it came."""

    where: str
    matrix: Numbers
    features: tuple[str, ...]
    samples: tuple[Hashable, ...] | None

    def in_order(self, samples: tuple[Hashable, ...]) -> "Table":
        """The rows of the samples, NaN for those that the view lacks."""
        if self.samples == samples:
            return self
        place = {name: row for row, name in enumerate(self.samples or ())}
        rows = np.array([place.get(name, -1) for name in samples])
        matrix = np.asarray(self.matrix)[rows]
        matrix[rows < 0] = np.nan
        return self._replace(matrix=matrix, samples=samples)


def as_views(
    data: Any, *, names: Sequence[str] | None = None, argument: str = "views", absent: bool = False, cells: bool = False
) -> Views:
    """The views that are meant by a matrix (one view), an iterable of matrices, or a dictionary of them by name.

    A matrix is anything that NumPy reads as one, samples × features; a list of lists of numbers is one matrix. Frames name their
    features. Samples are named by a pandas index other than the default one, else by the first column of a frame if that is text.
    Named samples are brought into the order of the first view that has names; views without names are taken to be in the order
    that the named ones share. Half precision becomes single, integers and booleans double.

    >>> views = as_views({"rna": [[1, 2], [3, 4], [5, 7]], "protein": np.ones((3, 1), np.float16)})
    >>> views.names, views.dims, [str(matrix.dtype) for matrix in views.matrices]
    (('rna', 'protein'), (2, 1), ['float64', 'float32'])

    Raises `ValueError` that names the `argument`, the view, what was found and what was expected: no view, no sample, no feature,
    no matrix, complex numbers, text, cells that are missing, NaN or infinite (how many), other numbers of rows, names that occur
    twice, samples that some view lacks. `names` are those of the views of an iterable. Where views may be `absent`, a row of a
    view that is NaN throughout is one that the sample lacks; NaN in some of its cells is refused, unless `cells` may be missing.
    """
    if isinstance(data, Views):
        return data if names is None else replace(data, names=_checked_names(names, len(data.names), argument))
    given, found = listed_views(data, argument)
    if not given:
        raise ValueError(f"{argument}: are none; expected at least one matrix, samples × features")
    named = names if names is not None else found
    labels = [f"view {i}" for i in range(1, len(given) + 1)]
    if named is not None:
        named = _checked_names(named, len(given), argument)
        labels = [f"view {name!r}" for name in named]
    read = [as_table(value, f"{argument}: {label}", absent, cells) for value, label in zip(given, labels, strict=True)]
    tables = aligned(read, argument)
    samples = next((table.samples for table in tables if table.samples is not None), None)
    features = tuple(table.features for table in tables)
    return Views(tuple(table.matrix for table in tables), tuple(named or labels), features, samples)


def listed_views(data: Any, argument: str) -> tuple[list[Any], Sequence[str] | None]:
    """The views one by one, and their names where they have some."""
    if isinstance(data, Mapping):
        return list(data.values()), [str(name) for name in data]
    if hasattr(data, "shape") or hasattr(data, "__array__") or _is_list_of_rows(data):
        return [data], None
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return list(data), None
    raise ValueError(f"{argument}: is {shown(data)}; expected matrices, samples × features, in a list or a dictionary by name")


def _is_list_of_rows(data: Any) -> bool:
    """Whether these are the rows of one matrix, rather than several."""
    if not isinstance(data, (list, tuple)) or not data or not all(isinstance(row, (list, tuple)) and row for row in data):
        return False
    return not any(isinstance(cell, (list, tuple)) or getattr(cell, "ndim", 0) for row in data for cell in row)


def _checked_names(names: Sequence[str], n_views: int, argument: str) -> tuple[str, ...]:
    if isinstance(names, str) or len(names) != n_views:
        raise ValueError(f"names: are {shown(names)}; expected {n_views}, one for each of the {argument}")
    refuse_repeated(names, "names:", "names")
    return tuple(str(name) for name in names)


def refuse_repeated(names: Iterable[Hashable], where: str, what: str) -> None:
    """Raise `ValueError` that starts with `where` and lists `what` there are more than once."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{where} {what} {some(repeated)} occur more than once; expected each once")


def some(names: Sequence[Hashable]) -> str:
    """The first of the names, and how many there are."""
    listed = ", ".join(map(repr, names[:LISTED]))
    return listed if len(names) <= LISTED else f"{listed}, … ({len(names)} in all)"


def shown(value: Any) -> str:
    """The value in one line, shortened where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}…"


def as_table(value: Any, where: str, absent: bool, cells: bool) -> Table:
    """One view. Raises `ValueError`, as `as_views` does, that starts with `where`."""
    features, samples = None, None
    if is_frame(value):
        features, samples, value = feature_names(value), sample_names(value), frame_numbers(value, where)
    matrix = real_numbers(value, where)
    if matrix.ndim != 2:
        raise ValueError(f"{where} has shape {matrix.shape}; expected a matrix, samples × features")
    _refuse_cells(matrix, where, absent=absent, cells=cells)
    if 0 in matrix.shape:
        raise ValueError(f"{where} has shape {matrix.shape}; expected at least one sample and one feature")
    nameless = sum(name is None or type(name).__name__ in ("NAType", "NaTType") or name != name for name in samples or ())
    if nameless:
        raise ValueError(f"{where} has no name for {nameless} of {len(matrix)} samples; expected one for each")
    for names, what in ((features, "features"), (samples, "samples")):
        refuse_repeated(names or (), where, what)
    return Table(where, matrix, features or tuple(map(str, range(matrix.shape[1]))), samples)


def _refuse_cells(array: Numbers, where: str, *, absent: bool = False, cells: bool = False) -> None:
    """Raise `ValueError` that counts what is not finite, but for rows that are NaN throughout where they may be `absent`, and any
    NaN where `cells` may be missing. Tracers pass."""
    if isinstance(array, jax.core.Tracer):
        return
    on_host = isinstance(array, np.ndarray) or all(device.platform == "cpu" for device in array.devices())
    xp: Any = np if on_host else jnp
    held = np.asarray(array) if on_host else array
    wrong = xp.isinf(held) if cells else ~xp.isfinite(held)
    if absent and not cells:
        wrong = wrong & ~xp.isnan(held).all(axis=1, keepdims=True)
    count = int(wrong.sum())
    if count:
        what = "infinite values" if cells else "NaN or infinite values"
        beside = ", or rows that are NaN throughout" * absent
        raise ValueError(f"{where} holds {what} in {count} of {array.size} cells; expected finite numbers{beside}")


def presence_table(views: Views) -> Bool[np.ndarray, "n M"]:
    """Which views each sample has: those whose row is not NaN throughout."""
    return np.stack([~np.isnan(np.asarray(matrix)).all(axis=1) for matrix in views.matrices], axis=1)


def presence_of(views: Views, presence: Any = None) -> Bool[Array, "n M"]:
    """Which views each sample has: those whose row is not NaN throughout, and for which `presence` holds where that is given.

    Raises `ValueError` for a `presence` that is not n × M booleans.
    """
    found = jnp.stack([~jnp.isnan(jnp.asarray(matrix)).all(axis=1) for matrix in views.matrices], axis=1)
    if presence is None:
        return found
    given = presence if isinstance(presence, jax.Array) else np.asarray(presence)
    if given.dtype != bool or given.shape != found.shape:
        raise ValueError(f"presence: is {given.dtype} of shape {given.shape}; expected booleans, {found.shape}")
    return found & given


def aligned(tables: list[Table], argument: str, samples: tuple[Hashable, ...] | None = None) -> list[Table]:
    """The views with their samples in one order: these, which some may lack, or those of the first view that has names, which all
    must have. Raises `ValueError` where names, or numbers of rows, do not match."""
    first = next((table for table in tables if table.samples is not None), None)

    def move(table: Table) -> Table:
        if first is None or table.samples is None:
            return table
        return _in_order_of(first, table) if samples is None else table.in_order(samples)

    moved = [move(table) for table in tables]
    if any(new.samples != old.samples for new, old in zip(moved, tables, strict=True)):
        for table in tables:
            if table.samples is None:
                raise ValueError(
                    f"{table.where} has no names of samples; expected some, as the others have them in unlike orders"
                )
    rows = moved[0].matrix.shape[0]
    for table in moved[1:]:
        if table.matrix.shape[0] != rows:
            other = moved[0].where.removeprefix(f"{argument}: ")
            raise ValueError(f"{table.where} has shape {table.matrix.shape}; expected {rows} rows, as {other} has")
    return moved


def _in_order_of(first: Table, table: Table) -> Table:
    assert first.samples is not None, "the first view names its samples"
    assert table.samples is not None, "so does the other"
    held = set(table.samples)
    lacking = [name for name in first.samples if name not in held]
    further = sorted(held - set(first.samples), key=table.samples.index)
    if lacking or further:
        said = [f"lacks {some(lacking)}"] * bool(lacking) + [f"has {some(further)} beside them"] * bool(further)
        raise ValueError(f"{table.where} {' and '.join(said)}; expected the samples of {first.where.rpartition(': ')[2]}")
    return table.in_order(first.samples)


def _checked_numbers(value: Any, where: str) -> Numbers:
    """Finite floating-point numbers of any shape; tracers pass where their type is right."""
    array = real_numbers(value, where)
    _refuse_cells(array, where)
    return array


def as_number(value: Any, argument: str, expected: str, allowed: Callable[[float], bool]) -> Numbers:
    """The real number. Raises `ValueError` that names the argument, its value and what was `expected` for anything else, and for
    a number that is not allowed. (Traced ones pass.)"""
    number = real_numbers(value, f"{argument}:")
    if number.shape != () or not (isinstance(number, jax.core.Tracer) or allowed(float(number))):
        said = f"has shape {number.shape}" if number.shape else f"is {value}"
        raise ValueError(f"{argument}: {said}; expected {expected}")
    return number


def real_numbers(value: Any, where: str) -> Numbers:
    """An array of floating-point numbers, NaN where cells are missing. Raises `ValueError` that starts with `where`."""
    if isinstance(value, jax.Array):
        if not (jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool) or jnp.iscomplexobj(value):
            raise ValueError(f"{where} has type {value.dtype}; expected real numbers")
        kept = jnp.issubdtype(value.dtype, jnp.floating)
        wanted = jnp.result_type(np.float32 if value.dtype.itemsize < 8 else np.float64) if kept else jnp.result_type(float)
        return value.astype(wanted)
    if isinstance(value, np.ma.MaskedArray):
        return np.where(np.ma.getmaskarray(value), np.nan, real_numbers(value.data, where))
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be read as numbers ({error}); expected a matrix, samples × features") from None
    if array.dtype.kind == "O":
        return np.array([_number(cell, where) for cell in array.ravel().tolist()], float).reshape(array.shape)
    if array.dtype.kind not in "fiub":
        example = f", such as {array.flat[0]!r}" if array.size else ""
        raise ValueError(f"{where} has type {array.dtype}{example}; expected real numbers")
    single = array.dtype.kind == "f" and array.dtype.itemsize <= 4
    return array.astype(np.float32 if single else np.float64, copy=False)


def _number(cell: Any, where: str) -> float:
    """The number in a cell of an array of objects, NaN where it is missing."""
    if cell is None or type(cell).__name__ in ("NAType", "NaTType"):
        return float("nan")
    if isinstance(cell, numbers.Real) or (hasattr(cell, "__float__") and not isinstance(cell, numbers.Complex)):
        try:
            return float(cell)
        except (TypeError, ValueError, OverflowError):
            pass
    raise ValueError(f"{where} holds {shown(cell)}; expected real numbers")


def as_matrix(value: Any, argument: str, shape: tuple[int | None, int | None] = (None, None)) -> Float[Array, "n d"]:
    """A matrix of finite numbers, of the shape given where that is not None. Raises `ValueError` that names the argument."""
    matrix = _checked_numbers(value, f"{argument}:")
    if matrix.ndim != 2 or any(want not in (None, size) for want, size in zip(shape, matrix.shape, strict=True)):
        expected = " × ".join("any number" if size is None else str(size) for size in shape)
        raise ValueError(f"{argument}: has shape {matrix.shape}; expected a matrix, {expected}")
    return jnp.asarray(matrix)


def by_feature(noise_variance: Any, d: int, dtype: Any, *, positive: bool = False) -> Float[Array, " d"]:
    """A noise variance, one number or one a feature, as one a feature.

    Raises `ValueError` for another shape, and outside of compiled code for one that is negative, or 0 where it must be positive.
    """
    values = _checked_numbers(noise_variance, "noise_variance:")
    psi = noise_by_feature(jnp.asarray(values, dtype), d)
    if not isinstance(values, jax.core.Tracer) and not bool((values > 0 if positive else values >= 0).all()):
        kind = "positive" if positive else "non-negative"
        raise ValueError(f"noise_variance: is {shown(noise_variance)}; expected {kind} numbers")
    return psi


def as_response(y: Any, n: int, *, argument: str = "y", samples: tuple[Hashable, ...] | None = None) -> Float[Array, " n"]:
    """One finite number for each of n rows, brought into the order of the `samples` where both have names.

    Raises `ValueError` that names the argument.
    """
    if y is None:
        raise ValueError(f"{argument}: is None; expected a response, one value for each of the {n} rows")
    index = index_names(y.index) if samples is not None and hasattr(y, "iloc") else None
    values = _checked_numbers(y, f"{argument}:")
    if values.shape != (n,):
        raise ValueError(f"{argument}: has shape {values.shape}; expected ({n},), one value for each row")
    if samples is not None and index is not None:
        refuse_repeated(index, f"{argument}:", "samples")
        first = Table("the views", values, (), samples)
        values = _in_order_of(first, Table(f"{argument}:", values, (), index)).matrix
    return jnp.asarray(values)


def as_labels(labels: Any, n: int, n_classes: int, argument: str = "labels") -> Int[Array, " n"]:
    """One class, from 0 to `n_classes` − 1, for each of n rows; what needs values is not checked inside compiled code.

    Raises `ValueError` that names the argument: no integers, another number of rows, a class out of range, or one class only.
    """
    array = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if array.dtype.kind not in "iub":
        raise ValueError(f"{argument}: has type {array.dtype}; expected integers from 0 to {n_classes - 1}")
    if array.shape != (n,):
        raise ValueError(f"{argument}: has shape {array.shape}; expected one class for each of the {n} rows")
    if not isinstance(array, jax.core.Tracer):
        least, most = int(array.min()), int(array.max())
        if least < 0 or most >= n_classes:
            raise ValueError(f"{argument}: from {least} to {most}; expected from 0 to {n_classes - 1}")
        if least == most:
            raise ValueError(f"{argument}: all rows are of class {least}; expected at least two classes")
    return jnp.asarray(array, jnp.int32)


def check_options(
    options: Any, *, choices: Mapping[str, tuple[str, ...]], positive: Sequence[str] = (), least: Mapping[str, int] | None = None
) -> None:
    """Raise `ValueError` that names the option unless each is among its choices, positive, or at least so large. None passes."""
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            listed = f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}"
            raise ValueError(f"{name}: is {getattr(options, name)!r}; expected {listed}")
    given = {name: getattr(options, name) for name in (*positive, *(least or {})) if getattr(options, name) is not None}
    for name, value in given.items():
        if name in positive and not value > 0:
            raise ValueError(f"{name}: is {value}; expected a positive number")
        if least and name in least and not value >= least[name]:
            raise ValueError(f"{name}: is {value}; expected at least {least[name]}")


def check_count(value: Any, argument: str, least: int) -> None:
    """Raise `ValueError` that names the argument unless it is a whole number, at least that."""
    number = whole_number(value)
    if number is None or number < least:
        raise ValueError(f"{argument}: is {shown(value)}; expected an integer of at least {least}")


def check_folds(n_folds: int, n: int) -> None:
    """Raise `ValueError` unless n rows can be cut into that many folds."""
    folds = whole_number(n_folds)
    if folds is None or not 2 <= folds <= n:
        raise ValueError(f"n_folds: is {n_folds}; expected from 2 to the number of rows, {n}")


def as_key(key: Any, purpose: str) -> Key[Array, ""]:
    """A random key of the new or the old kind. Raises `ValueError` that says what it is for unless it is one."""
    if isinstance(key, jax.Array):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return key
        if key.dtype == jnp.uint32 and key.shape == (2,):
            return jr.wrap_key_data(key)
    raise ValueError(f"key: is {shown(key)}; expected a random key such as jax.random.key(0), {purpose}")


def deviations(X: Held, kept: Numbers) -> tuple[Held, Held]:
    """(X less its column means, the means) over the rows that are kept; others become 0. Means far from 0 cost no digits: the
    first is found from differences to a row, and a second pass takes off what it was off by. Equal entries are exactly 0."""
    xp = np if isinstance(X, np.ndarray) else jnp
    n = xp.sum(kept).astype(X.dtype)

    def mean(rows: Any) -> Any:
        return xp.sum(xp.where(kept[:, None], rows, 0), axis=0) / n

    origin = X[xp.argmax(kept)]
    first = origin + mean(X - origin[None, :])
    rest = X - first[None, :]
    second = mean(rest)
    return xp.where(kept[:, None], rest - second[None, :], 0), first + second


def centred(X: Held, counted: Bool[Array, " n"] | None = None) -> tuple[Held, Held, Held]:
    """(X less its column means, the means, standard deviations with divisor n − 1) over the rows that count; others become 0.

    A column whose deviation is within the rounding of its mean is constant: its deviation is 0, and so is the column. Squares are
    taken in units of the largest entry: deviations of 1e-160 and 1e160 are as good as others.
    """
    xp = np if isinstance(X, np.ndarray) else jnp
    kept = xp.ones(X.shape[0], bool) if counted is None else counted
    residual, centre = deviations(X, kept)
    n = xp.sum(kept).astype(X.dtype)
    deviation = norms(residual) / xp.sqrt(xp.maximum(n - 1, 1))
    constant = deviation <= xp.finfo(X.dtype).eps * xp.abs(centre)
    return xp.where(constant[None, :], 0, residual), centre, xp.where(constant, 0, deviation)


def norms(X: Held) -> Held:
    """The Euclidean norm of every column, without squares that leave the range of numbers."""
    xp = np if isinstance(X, np.ndarray) else jnp
    largest = xp.max(xp.abs(X), axis=0, initial=0)
    unit = xp.where((largest > 0) & xp.isfinite(largest), largest, 1)
    return unit * xp.sqrt(xp.sum((X / unit[None, :]) ** 2, axis=0))


def centre_and_scale(X: Held) -> tuple[Held, Held]:
    """(means, standard deviations) of the columns; infinite deviations of those that are constant, which then become 0."""
    _, centre, deviation = centred(X)
    xp: Any = np if isinstance(X, np.ndarray) else jnp
    return centre, xp.where(deviation > 0, deviation, xp.inf)


def standardise(train: Held, others: Held) -> Held:
    """`others` with the means and standard deviations of `train`; features that are constant there become 0."""
    centre, scale = centre_and_scale(train)
    scaled: Any = (others - centre[None, :]) / scale[None, :]
    return scaled


def view_norms(X: Float[Array, "n d"], dims: Sequence[int]) -> Float[Array, " d"]:
    """The Frobenius norm of every view of centred columns, repeated over its features; 1 for a view without variance."""
    edges, columns = np.cumsum([0, *dims]), norms(X)
    sizes = jnp.concatenate([norms(columns[a:b, None]) for a, b in zip(edges[:-1], edges[1:], strict=True)])
    return jnp.repeat(jnp.where(sizes > 0, sizes, 1), np.array(dims), total_repeat_length=int(edges[-1]))


def load_views(path: Path, names: Sequence[str], argument: str = "loadings_from") -> list[np.ndarray]:
    """The named views of an .npz file, one row a sample, in double precision.

    Raises `ValueError` that names what is wrong: no such file (as the `argument` that named it), no such view (and those there
    are), or what `as_views` refuses.
    """
    held, listing = _read(path, names, argument)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"views: got {' '.join(names) or 'none'}; expected some of {', '.join(listing)}, each once")
    for name in names:
        if name not in held:
            raise ValueError(f"views: {name!r} is not in {path}; expected some of {', '.join(listing)}")
    return [np.asarray(matrix, float) for matrix in as_views({name: held[name] for name in names}).matrices]


def _read(path: Path, names: Sequence[str], argument: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """The named arrays that the file holds, and the names of all."""
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in file.files}, list(file.files)
    except FileNotFoundError:
        raise ValueError(f"{argument}: no file {path}; expected an .npz file with one array per view") from None
    except UNREADABLE as error:
        raise ValueError(f"{argument}: {path} cannot be read ({error}); expected .npz with one array per view") from None
