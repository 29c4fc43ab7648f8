"""Whatever an analyst hands over becomes views with names: arrays, frames, MuData, AnnData, files. New data get a fit's."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from hcl_jax.files import is_path, modalities, read_path
from hcl_jax.frames import is_frame
from hcl_jax.sources import Source, split
from hcl_jax.views import Numbers, Table, Views, aligned, as_table, listed_views, refuse_repeated, shown, some

JOINS = ("union", "inner")


def read_views(data: Any, *, views: Any = None, join: str = "union", cells: bool = False) -> Views:
    """The views that the data hold, in the order in which they hold them, with the names of views, features and samples.

    data: {view: array, frame of pandas or polars, AnnData, or path}, or a list of these; a MuData object, whose modalities are
    views; one matrix, frame or AnnData object, whose columns `views` divides (`sources.split`), or which is one view; or the path
    of a file or folder (`files.read_path`). Elements of a list are called `view 1` and so on, files by their own names. Of data
    with several views, `views` may list those that are wanted, in the order wanted.

    join: samples with names are joined by these. "union" has all of them: those of the first view in its order, then those that
    only later views have in theirs; a view that a sample lacks is a row of NaN. "inner" has those that all views have, in the
    order of the first. Names of text in one view and of numbers in another are compared as text. Views without names go by their
    order: all have as many rows, and those with names have these in one order.

    cells: whether single cells may be missing (NaN, None, empty); rows that are NaN throughout always may.

    Arrays of NumPy and JAX that hold floating-point numbers are not copied, those of frames and files once, and once more where
    samples have to be moved.

    >>> import polars as pl
    >>> rna = pl.DataFrame({"sample": ["s1", "s2"], "TP53": [1.0, 2.0], "BRCA1": [0.5, 0.1]})
    >>> protein = pl.DataFrame({"sample": ["s2", "s3"], "p53": [3, 4]})
    >>> views = read_views({"rna": rna, "protein": protein})
    >>> views.sample_names, views.matrices[1].tolist()
    (('s1', 's2', 's3'), [[nan], [3.0], [4.0]])

    Raises `ValueError`, in one line, that names the argument, the file or view, and what is missing, repeated or no number.
    """
    if join not in JOINS:
        raise ValueError(f"join: is {join!r}; expected {' or '.join(map(repr, JOINS))}")
    if isinstance(data, Views) and views is None:
        return data
    found = _sources(data)
    if not found:
        raise ValueError("data: holds no view; expected at least one matrix, samples × features")
    sources = _chosen(found, views)
    refuse_repeated([source.name for source in sources], "data:", "views")
    return _joined(tuple(source.name for source in sources), [_table_of(source, cells) for source in sources], join)


def _sources(data: Any) -> list[Source]:
    """The views one by one, nothing of them read as numbers yet."""
    if isinstance(data, Views):
        held = zip(data.names, data.matrices, data.feature_names, strict=True)
        return [Source(name, matrix, features=features, samples=data.sample_names) for name, matrix, features in held]
    if is_path(data) or _is_annotated(data):
        return _element(data)
    given, names = listed_views(_as_matrix_or_frame(data), "data")
    if names is None:
        return [source for m, value in enumerate(given, start=1) for source in _element(value, f"view {m}")]
    sources = []
    for value, name in zip(given, names, strict=True):
        found = _element(value)
        if len(found) != 1:
            raise ValueError(f"data: {name!r} holds views {some([source.name for source in found])}; expected one")
        sources.append(found[0]._replace(name=name))
    return sources


def _element(value: Any, name: str = "view 1") -> list[Source]:
    """The views of a file or an object; `name` is for one that has none."""
    if is_path(value):
        return read_path(value)
    if _is_annotated(value):
        found = modalities(value)
        return found if hasattr(value, "mod") else [found[0]._replace(name=name)]
    return [Source(name, _as_matrix_or_frame(value))]


def _is_annotated(value: Any) -> bool:
    """Whether this is a MuData or an AnnData object."""
    return hasattr(value, "obs_names") and (hasattr(value, "mod") or hasattr(value, "var_names"))


def _as_matrix_or_frame(value: Any) -> Any:
    """Lazy frames collected, sparse matrices filled with zeros, series as frames of one column; others as they are."""
    for method in ("collect", "toarray", "to_frame"):
        if hasattr(value, method) and not is_frame(value):
            return getattr(value, method)()
    return value


def _chosen(sources: list[Source], views: Any) -> list[Source]:
    """The views that are wanted, or those that the columns of one matrix hold."""
    if views is None:
        return sources
    listed = list(views) if isinstance(views, Sequence) and not isinstance(views, str) else []
    if listed and all(isinstance(name, str) for name in listed):
        refuse_repeated(listed, "views:", "names")
        held = {source.name: source for source in sources}
        unknown = [name for name in listed if name not in held]
        if unknown:
            raise ValueError(f"views: {some(unknown)} are not among the data; expected some of {some(list(held))}")
        return [held[name] for name in listed]
    if len(sources) > 1:
        raise ValueError(f"views: is {shown(views)}; expected a list of some of the {len(sources)} views' names")
    return split(sources[0], views)


def _table_of(source: Source, cells: bool) -> Table:
    """The view as a matrix, with the names that stood beside it."""
    label = source.name if source.name.removeprefix("view ").isdigit() else f"view {source.name!r}"
    table = as_table(source.values, f"{source.where}: {label}", absent=True, cells=cells)
    for axis, names, what in ((1, source.features, "features"), (0, source.samples, "samples")):
        if names is not None and len(names) != table.matrix.shape[axis]:
            raise ValueError(f"{table.where} has {table.matrix.shape[axis]} {what} and {len(names)} names; expected as many")
        refuse_repeated(names or (), table.where, what)
    features = tuple(map(str, source.features)) if source.features else table.features
    return table._replace(features=features, samples=source.samples or table.samples)


def _joined(names: tuple[str, ...], tables: list[Table], join: str) -> Views:
    """The views, their samples joined by name."""
    named = [table.samples for table in tables if table.samples is not None]
    of_text = {isinstance(name, str) for samples in named for name in samples}
    if len(of_text) > 1:
        tables = [table if table.samples is None else table._replace(samples=tuple(map(str, table.samples))) for table in tables]
        named = [table.samples for table in tables if table.samples is not None]
    order = tuple(dict.fromkeys(chain.from_iterable(named)))
    if join == "inner":
        in_all = set(order).intersection(*named)
        order = tuple(name for name in order if name in in_all)
        if named and not order:
            raise ValueError(
                f"data: no sample is in all views: {_first_names(tables)}; expected names that match, or join='union'"
            )
    moved = aligned(tables, "data", order)
    matrices, features = (tuple(part) for part in zip(*[(table.matrix, table.features) for table in moved], strict=True))
    return Views(matrices, names, features, order if named else None)


def _first_names(tables: Sequence[Table]) -> str:
    """A sample of each view."""
    return ", ".join(f"{table.samples[0]!r} in {table.where.rpartition(': ')[2]}" for table in tables if table.samples)


def match_features(views: Views, names: Sequence[str], feature_names: Sequence[Sequence[str]]) -> Views:
    """New data with the views and the features that a fit has, in its order: what `read_views` read, the fit's names of views and
    the names of each view's features.

    A view that the new data lack is NaN throughout, as one that a sample lacks. Views without names are taken in their order if
    there are as many. Features are found by name; where those of the new data or of the fit have none (and are 0, 1, …), by their
    place, and then there are as many. What the new data have beside these is left out, and `left_out` counts it.

    Raises `ValueError` that names the view: views of other names while some of the fit's are lacking, which may be the same;
    features that lack, how many and the first of them; other numbers of features without names.
    """
    places = _matched(views, names)
    matrices: list[Numbers] = []
    for name, wanted in zip(names, map(tuple, feature_names), strict=True):
        place = places.get(name)
        if place is None:
            matrices.append(np.full((views.n_samples, len(wanted)), np.nan, views.matrices[0].dtype))
        else:
            matrices.append(_with_features(views.matrices[place], views.feature_names[place], wanted, name))
    return Views(tuple(matrices), tuple(names), tuple(map(tuple, feature_names)), views.sample_names)


def left_out(views: Views, names: Sequence[str], feature_names: Sequence[Sequence[str]]) -> dict[str, int]:
    """By view of the new data, how many of its features `match_features` has no use for, where there are any."""
    places = _matched(views, names)
    used = {places.get(name): len(wanted) for name, wanted in zip(names, feature_names, strict=True)}
    beside = {name: dim - used.get(m, 0) for m, (name, dim) in enumerate(zip(views.names, views.dims, strict=True))}
    return {name: count for name, count in beside.items() if count}


def _matched(views: Views, names: Sequence[str]) -> dict[str, int]:
    """The place in the new data of those of the fit's views that are there."""
    by_order = tuple(f"view {m}" for m in range(1, len(names) + 1))
    if views.names == by_order:
        return {name: m for m, name in enumerate(names)}
    unknown = [name for name in views.names if name not in names]
    lacking = [name for name in names if name not in views.names]
    if unknown and lacking:
        raise ValueError(f"data: has views {some(unknown)} and lacks {some(lacking)}; expected the names that the fit has")
    return {name: views.names.index(name) for name in names if name in views.names}


def _with_features(matrix: Numbers, given: tuple[str, ...], wanted: tuple[str, ...], view: str) -> Numbers:
    if given == wanted:
        return matrix
    if not _numbered(given):
        place = {name: column for column, name in enumerate(given)}
        lacking = [name for name in wanted if name not in place]
        if not lacking:
            return matrix[:, np.array([place[name] for name in wanted])]
        if not _numbered(wanted):
            said = f"lacks {len(lacking)} of the fit's {len(wanted)} features: {some(lacking)}"
            raise ValueError(f"data: view {view!r} {said}; expected all of them")
    if len(given) != len(wanted):
        raise ValueError(f"data: view {view!r} has {len(given)} features without names; expected {len(wanted)}, as the fit has")
    return matrix


def _numbered(features: tuple[str, ...]) -> bool:
    """Whether these are the names of features without names."""
    return features == tuple(map(str, range(len(features))))
