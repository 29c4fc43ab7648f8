"""Outcomes that scores predict: numbers, classes, survival times and repeated measurements, read in the order of the samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from hcl_jax.frames import index_names
from hcl_jax.views import real_numbers

N_FOLDS = 5
"""Of the choice of a head's penalty: fewer values, or events, are no outcome."""
MOST_CLASSES = 50
"""More different values than that are no classes."""


Kind = Literal["number", "class", "survival", "repeated"]


@dataclass(frozen=True)
class Outcome:
    """One value for each of n samples, or none where it is not `known`: a number, the place of its class among `classes`, or the
    time at which the sample had the event (`events`) or was last seen without it; of `subjects`, where several samples may be of
    one."""

    values: Float[np.ndarray, " n"]
    known: Bool[np.ndarray, " n"]
    classes: tuple[Any, ...] | None = None
    name: str = "y"
    events: Bool[np.ndarray, " n"] | None = None
    subjects: Int[np.ndarray, " n"] | None = None
    """From 0, in the order in which they come; −1 where unknown."""

    @property
    def kind(self) -> Kind:
        if self.events is not None:
            return "survival"
        if self.subjects is not None:
            return "repeated"
        return "number" if self.classes is None else "class"

    def of_rows(self, rows: np.ndarray) -> "Outcome":
        events, subjects = (None if held is None else held[rows] for held in (self.events, self.subjects))
        return replace(self, values=self.values[rows], known=self.known[rows], events=events, subjects=subjects)


@dataclass(frozen=True, eq=False)
class Survival:
    """What `survival` was given: `y` of `hcl_jax.fit`."""

    time: Any
    event: Any


@dataclass(frozen=True, eq=False)
class Repeated:
    """What `repeated` was given: `y` of `hcl_jax.fit`."""

    values: Any
    subject: Any


def survival(time: Any, event: Any) -> Survival:
    """An outcome of survival times, to be given to `hcl_jax.fit` as `y`: of every sample the time, larger than 0, at which it had
    the event or, where `event` is false (or 0), was last seen without it.

    Either is one value for each sample, by name (a pandas series with an index, a dictionary) or in the order of the samples; a
    sample for which either is missing has an unknown outcome. Both are looked at by `fit`.
    """
    return Survival(time, event)


def repeated(values: Any, subject: Any) -> Repeated:
    """An outcome of numbers of which several samples may be of one subject (a patient at several visits), to be given to
    `hcl_jax.fit` as `y`: the regression has an intercept of its own for every subject, and folds keep the samples of a subject
    together.

    Either is one value for each sample, by name or in the order of the samples, as in `survival`; whole numbers are numbers here.
    """
    return Repeated(values, subject)


def as_outcome(y: Any, n: int, samples: Sequence[Any] | None = None) -> Outcome:
    """Floating-point numbers are a regression's, and anything else classes: whole numbers, booleans, text.

    A pandas series whose index names samples, and a dictionary, are brought into the order of the `samples`; samples that they
    lack, and None or NaN, have an unknown outcome.

    Raises `ValueError` for other shapes, infinite numbers, fewer than five known values, one class only, a class that occurs
    once, and more than 50 of them; for times that are not above 0, events that are not true or false, and fewer than five of
    them; for a single subject, and subjects with one sample each.
    """
    if isinstance(y, Survival):
        return _as_survival(y, n, samples)
    if isinstance(y, Repeated):
        return _as_repeated(y, n, samples)
    name = str(getattr(y, "name", None) or "y")
    listed = _in_order(y, n, samples)
    known = _known(listed)
    _check_enough(known)
    present = [value for value, is_known in zip(listed, known, strict=True) if is_known]
    if all(isinstance(value, (float, np.floating)) for value in present):
        return Outcome(_numbers(listed, known, "y"), known, None, name)
    if not all(isinstance(value, (str, bool, int, np.bool_, np.integer)) for value in present):
        kinds = ", ".join(sorted({type(value).__name__ for value in present}))
        raise ValueError(f"y: holds {kinds}; expected floating-point numbers, or classes: text, whole numbers or booleans")
    classes = tuple(sorted({_plain(value) for value in present}, key=str))
    if all(not isinstance(value, str) for value in classes):
        classes = tuple(sorted(classes))
    place, values = {value: i for i, value in enumerate(classes)}, np.zeros(n)
    values[known] = [place[_plain(value)] for value in present]
    counts = np.bincount(values[known].astype(int))
    if len(classes) < 2:
        raise ValueError(f"y: all samples are of class {classes[0]!r}; expected at least two classes")
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"y: has {len(classes)} classes; expected at most {MOST_CLASSES}, or floating-point numbers")
    if counts.min() < 2:
        raise ValueError(f"y: has one sample of class {classes[int(counts.argmin())]!r}; expected at least two of each")
    return Outcome(values, known, classes, name)


def _as_survival(y: Survival, n: int, samples: Sequence[Any] | None) -> Outcome:
    times, events = _in_order(y.time, n, samples, "time"), _in_order(y.event, n, samples, "event")
    known = _known(times) & _known(events)
    _check_enough(known)
    values = _numbers(times, known, "time")
    if (least := values[known].min()) <= 0:
        raise ValueError(f"time: holds {least:g}; expected times above 0, since each sample was first seen")
    happened = np.zeros(n, bool)
    for row in np.flatnonzero(known):
        if isinstance(events[row], str) or events[row] not in (0, 1):
            raise ValueError(
                f"event: holds {_plain(events[row])!r}; expected True (the event) or False (last seen without it), or 1 and 0"
            )
        happened[row] = bool(events[row])
    if happened.sum() < N_FOLDS:
        raise ValueError(f"event: has {happened.sum()} events in {known.sum()} samples; expected at least {N_FOLDS}")
    return Outcome(values, known, None, str(getattr(y.time, "name", None) or "survival"), events=happened)


def _as_repeated(y: Repeated, n: int, samples: Sequence[Any] | None) -> Outcome:
    listed, subjects = _in_order(y.values, n, samples, "values"), _in_order(y.subject, n, samples, "subject")
    known = _known(listed) & _known(subjects)
    _check_enough(known)
    values = _numbers(listed, known, "values")
    place: dict[Any, int] = {}
    codes = np.array([place.setdefault(s, len(place)) if is_known else -1 for s, is_known in zip(subjects, known, strict=True)])
    if not 1 < len(place) < known.sum():
        found = f"is {_plain(next(iter(place)))!r} in all samples" if len(place) == 1 else "is another one in every sample"
        raise ValueError(f"subject: {found}; expected at least two subjects, and one of them in several samples")
    return Outcome(values, known, None, str(getattr(y.values, "name", None) or "y"), subjects=codes)


def _plain(value: Any) -> Any:
    """A number of Python's own, where it is one of NumPy's."""
    return value.item() if isinstance(value, np.generic) else value


def _known(listed: Sequence[Any]) -> Bool[np.ndarray, " n"]:
    missing = lambda value: value is None or type(value).__name__ in ("NAType", "NaTType") or value != value
    return np.array([not missing(value) for value in listed])


def _check_enough(known: Bool[np.ndarray, " n"]) -> None:
    if known.sum() < N_FOLDS:
        raise ValueError(f"y: has {known.sum()} known values of {len(known)}; expected at least {N_FOLDS}")


def _numbers(listed: Sequence[Any], known: Bool[np.ndarray, " n"], argument: str) -> Float[np.ndarray, " n"]:
    """The numbers, 0 where they are not known. Raises `ValueError` for others than finite ones, and where all are alike."""
    values, n = np.zeros(len(known)), len(known)
    values[known] = real_numbers([value for value, is_known in zip(listed, known, strict=True) if is_known], f"{argument}:")
    if not np.isfinite(values).all():
        infinite = int((~np.isfinite(values)).sum())
        raise ValueError(f"{argument}: holds infinite values in {infinite} of {n} samples; expected numbers")
    if np.ptp(values[known]) == 0:
        raise ValueError(f"{argument}: is {values[known][0]} in all samples; expected values that differ")
    return values


def _in_order(y: Any, n: int, samples: Sequence[Any] | None, argument: str = "y") -> list[Any]:
    """The values in the order of the samples, None where there is none."""
    if y is None:
        raise ValueError(f"{argument}: is None; expected an outcome, one value for each of the {n} samples")
    index = index_names(y.index) if samples is not None and hasattr(y, "iloc") else None
    if index is not None:
        y = dict(zip(index, y, strict=True))
    if isinstance(y, Mapping):
        if samples is None:
            raise ValueError(f"{argument}: is by name of sample, which the views do not have; expected one value for each row")
        by_name = y if any(sample in y for sample in samples) else {str(name): value for name, value in y.items()}
        held = [by_name.get(sample) for sample in samples]  # files have names of text where an index has numbers
        if all(value is None for value in held):
            raise ValueError(f"{argument}: names none of the samples; expected names such as {list(samples)[0]!r}")
        return held
    values = list(np.asarray(y, object)) if isinstance(y, (list, tuple)) else list(np.asarray(y))
    if len(values) != n or any(np.ndim(value) for value in values):
        shape = np.shape(np.asarray(y, object))
        raise ValueError(f"{argument}: has shape {shape}; expected ({n},), one value for each sample")
    return values
