"""What a view is read from, and several views in the columns of one matrix or frame: which columns are whose."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from hcl_jax.frames import feature_names, is_frame, of_features
from hcl_jax.structure import whole_number
from hcl_jax.views import real_numbers, shown, some

SPECS = "{view: columns}, widths that add up, a separator as ':' in 'rna:TP53', or a function of a column's name"


class Source(NamedTuple):
    """What one view is read from: an array, with or without names, or a frame."""

    name: str
    values: Any
    where: str = "data"
    features: tuple[str, ...] | None = None
    """Where they are not those of a frame."""
    samples: tuple[Hashable, ...] | None = None


def split(source: Source, views: Any) -> list[Source]:
    """The views that the columns of one matrix or frame hold.

    views: {view: its columns}, of which each belongs to one view, or to none and is then left out; widths, a list of
    numbers of columns, all of them in their order; a separator, in front of which a column's name has the view's and
    behind it the feature's; or a function from a column's name to its view's, or None where it is to be left out. The column that
    names the samples of a frame is not counted. Consecutive columns of an array are not copied.

    Raises `ValueError` for columns that are unknown, negative, of two views or twice in one, for a view without columns, for
    widths that do not add up, and for a name without the separator.
    """
    data, features = source.values, source.features
    if not is_frame(data):
        data = real_numbers(data, f"{source.where}:")
        if data.ndim != 2:
            raise ValueError(f"{source.where}: has shape {data.shape}; expected a matrix, samples × features")
    columns = feature_names(data) if is_frame(data) else features or tuple(map(str, range(data.shape[1])))
    if isinstance(views, str):
        places = _by_separator(columns, views)
        columns = features = tuple(name.partition(views)[2] for name in columns)
    elif callable(views):
        places = _grouped([views(name) for name in columns])
    elif isinstance(views, Mapping):
        places = {str(name): _places(columns, chosen, str(name), data) for name, chosen in views.items()}
        _refuse_shared(places, columns)
    else:
        places = _by_width(len(columns), views)
    of_part = {name: features and tuple(features[place] for place in chosen) for name, chosen in places.items()}
    return [source._replace(name=name, values=_part(data, chosen), features=of_part[name]) for name, chosen in places.items()]


def _by_separator(columns: Sequence[str], separator: str) -> dict[str, list[int]]:
    without = [name for name in columns if not separator or separator not in name]
    if without:
        raise ValueError(
            f"views: is {separator!r}, which columns {some(without)} lack; expected it in all names, as in 'rna:TP53'"
        )
    return _grouped([name.partition(separator)[0] for name in columns])


def _grouped(owners: Sequence[Any]) -> dict[str, list[int]]:
    """The columns of each owner."""
    places: dict[str, list[int]] = {}
    for place, owner in enumerate(owners):
        if owner is not None:
            places.setdefault(str(owner), []).append(place)
    if not places:
        raise ValueError(f"views: no column belongs to any; expected {SPECS}")
    return places


def _by_width(d: int, widths: Any) -> dict[str, list[int]]:
    sizes = [whole_number(width) or 0 for width in widths] if isinstance(widths, Iterable) else []
    if min(sizes, default=0) < 1:
        raise ValueError(f"views: is {shown(widths)}; expected {SPECS}")
    if sum(sizes) != d:
        raise ValueError(f"views: are {sum(sizes)} columns wide together; expected {d}, as there are")
    edges = pairwise(np.cumsum([0, *sizes]).tolist())
    return {f"view {m}": list(range(start, stop)) for m, (start, stop) in enumerate(edges, start=1)}


def _places(columns: Sequence[str], chosen: Any, view: str, data: Any) -> list[int]:
    """Where the columns stand that are meant."""
    if callable(chosen):
        chosen = chosen(data)
    if isinstance(chosen, slice):
        return _sliced(columns, chosen, view)
    single = isinstance(chosen, str) or not isinstance(chosen, Iterable)
    wanted: list[Any] = [chosen] if single else list(chosen)
    if wanted and all(isinstance(one, (bool, np.bool_)) for one in wanted):
        if len(wanted) != len(columns):
            raise ValueError(f"views: {view!r} has {len(wanted)} booleans; expected {len(columns)}, one for each column")
        wanted = np.flatnonzero(wanted).tolist()
    if not wanted:
        raise ValueError(f"views: {view!r} has no columns; expected at least one")
    place = {name: i for i, name in enumerate(columns)}
    found = [place.get(one) if isinstance(one, str) else whole_number(one) for one in wanted]
    unknown = [one for one, i in zip(wanted, found, strict=True) if i is None or not 0 <= i < len(columns)]
    if unknown:
        raise ValueError(f"views: {view!r} has columns {some(unknown)}; expected some of the {len(columns)}: {_listed(columns)}")
    return [i for i in found if i is not None]


def _sliced(columns: Sequence[str], chosen: slice, view: str) -> list[int]:
    ends = [end for end in (chosen.start, chosen.stop) if end is not None]
    if any(whole_number(end) is None or not 0 <= end <= len(columns) for end in ends):
        raise ValueError(f"views: {view!r} is {chosen}; expected places from 0 to {len(columns)}")
    places = list(range(len(columns)))[chosen]
    if not places:
        raise ValueError(f"views: {view!r} has no columns; expected at least one")
    return places


def _listed(columns: Sequence[str]) -> str:
    numbered = columns == tuple(map(str, range(len(columns))))
    return f"places from 0 to {len(columns) - 1}" if numbered else some(columns)


def _refuse_shared(places: Mapping[str, Sequence[int]], columns: Sequence[str]) -> None:
    count = Counter(place for chosen in places.values() for place in chosen)
    shared = [place for place, times in count.items() if times > 1]
    if shared:
        owners = [name for name, chosen in places.items() if shared[0] in chosen]
        listed = some([columns[place] for place in shared])
        raise ValueError(f"views: columns {listed} are chosen more than once, by {some(owners)}; expected each once")


def _part(data: Any, places: list[int]) -> Any:
    if is_frame(data):
        return of_features(data, places)
    consecutive = places == list(range(places[0], places[-1] + 1))
    return data[:, places[0] : places[-1] + 1] if consecutive else data[:, np.array(places)]
