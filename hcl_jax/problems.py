"""What is wrong with data before anything is fitted to them: what rules a fit out, and what an analyst should know."""

from collections import Counter
from itertools import combinations

import numpy as np

from hcl_jax.views import Views, presence_table, some

LEAST = 3  # samples: with two, any two features are perfectly correlated
FEW = 0.1  # of the samples
IDENTIFIED = ("", "sample", "subject", "patient", "person", "case", "stay", "index")  # by a column "id", "subject_id" or "sample"


def problems(views: Views) -> list[str]:
    """What an analyst should know of the data before a fit to them, one sentence each: too few samples, names that occur twice,
    samples without any view, views that are absent or without variance or share few samples, constant features,
    infinite values and missing cells, how many, and a column that looks like the samples' numbers."""
    present = presence_table(views)
    found = []
    if views.n_samples < LEAST:
        found.append(f"There are {views.n_samples} samples: a fit needs at least {LEAST}.")
    repeated = [name for name, count in Counter(views.sample_names or ()).items() if count > 1]
    if repeated:
        found.append(f"Samples {some(repeated)} occur more than once.")
    empty = np.flatnonzero(~present.any(axis=1)).tolist()
    if empty:
        listed = empty if views.sample_names is None else [views.sample_names[row] for row in empty]
        found.append(f"{len(empty)} of {views.n_samples} samples lack all views: {some(listed)}.")
    for name, matrix, features, here in zip(views.names, views.matrices, views.feature_names, present.T, strict=True):
        found += _problems_of(name, np.asarray(matrix), features, here)
    for (one, here), (other, there) in combinations(zip(views.names, present.T, strict=True), 2):
        shared = int((here & there).sum())
        if here.any() and there.any() and shared < max(LEAST, FEW * views.n_samples):
            found.append(f"Views {one!r} and {other!r} share {shared} of {views.n_samples} samples.")
    return found


def _problems_of(name: str, matrix: np.ndarray, features: tuple[str, ...], here: np.ndarray) -> list[str]:
    n, d = int(here.sum()), matrix.shape[1]
    if not n:
        return [f"View {name!r} is absent from all samples."]
    infinite, constant = int(np.isinf(matrix).sum()), int(_constant(matrix).sum())
    missing = int(np.isnan(matrix).sum()) - d * (len(here) - n)
    said = {
        f"View {name!r} holds {infinite} infinite values.": infinite,
        f"View {name!r} lacks {missing} of the {n * d} cells of the samples that have it.": missing,
        f"View {name!r} has no variance: all its features are constant.": constant == d,
        f"View {name!r} has {constant} of {d} features that are constant.": 0 < constant < d,
        f"View {name!r} begins with {features[0]!r}, which looks like the samples' numbers: it is taken for a feature.": (
            _numbers_samples(features[0], matrix[here, 0])
        ),
    }
    return [sentence for sentence, holds in said.items() if holds]


def _constant(matrix: np.ndarray) -> np.ndarray:
    """Which columns vary by no more than rounding, over the cells that are there."""
    least, most = np.fmin.reduce(matrix, axis=0), np.fmax.reduce(matrix, axis=0)
    finite = ~(np.isinf(least) | np.isinf(most))
    spread = np.subtract(most, least, where=finite, out=np.full_like(most, np.inf))
    return ~(spread > 2 * np.finfo(matrix.dtype).eps * np.maximum(np.abs(least), np.abs(most))) & finite


def _numbers_samples(feature: str, column: np.ndarray) -> bool:
    """Whether this is called an identifier, and holds a whole number of its own for each sample."""
    called = feature.lower().removesuffix("id").rstrip("_. -") in IDENTIFIED
    return called and bool((column == np.round(column)).all()) and len(np.unique(column)) == len(column)


def check_fittable(views: Views) -> None:
    """Raise `ValueError` for data to which no decomposition can be fitted: fewer than three samples, a view that no sample has or
    that does not vary, a view whose samples are none of the others' (`problems` lists what else there is to know)."""
    present = presence_table(views)
    if views.n_samples < LEAST:
        raise ValueError(f"data: hold {views.n_samples} samples; expected at least {LEAST}")
    for name, matrix, here in zip(views.names, views.matrices, present.T, strict=True):
        if not here.any():
            raise ValueError(f"data: view {name!r} is absent from all {views.n_samples} samples; expected some that have it")
        if _constant(np.asarray(matrix)).all():
            raise ValueError(f"data: view {name!r} has no variance; expected features that vary")
    for m, name in enumerate(views.names):
        elsewhere = np.asarray(np.delete(present, m, axis=1).any(axis=1))
        if len(views.names) > 1 and not (elsewhere & present[:, m]).any():
            found = _examples(views, present[:, m], elsewhere)
            raise ValueError(f"data: view {name!r} shares no sample with the others{found}; expected names that match")


def _examples(views: Views, here: np.ndarray, elsewhere: np.ndarray) -> str:
    """A sample of the view, and one of the others."""
    if views.sample_names is None:
        return ""
    return f": it has {views.sample_names[int(here.argmax())]!r}, they have {views.sample_names[int(elsewhere.argmax())]!r}"
