"""What each section of a report holds: tables as lists of rows, and no words but names."""

import math
import platform
from collections import Counter
from dataclasses import dataclass, fields
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from hcl_jax import __version__
from hcl_jax.decomposition import Decomposition
from hcl_jax.fitting import Settings
from hcl_jax.selection import NoFactorError
from hcl_jax.structure import Structure
from hcl_jax.views import presence_table

MOST_PATTERNS = 12
MOST_BEST = 6
"""Structures whose scores and features are shown."""
N_FEATURES = 10
LEVEL = 0.9
"""Of the bounds of features' shares."""


def records(frame: Any) -> list[dict[str, Any]]:
    """The rows of a table, whichever kind of frame it is."""
    return frame.to_dict(orient="records") if hasattr(frame, "iloc") else frame.to_dicts()


@dataclass(frozen=True)
class Sureness:
    """How sure structures are: rows by structure, and the number of permutations behind p-values; or why that is not there."""

    rows: list[dict[str, Any]]
    permutations: int = 0
    absent: str | None = None


@dataclass(frozen=True)
class Prediction:
    """What cross-validation saw, as rows; or why there are none.

    outcome: one row a method, its metrics as (mean, standard error).
    """

    folds: int = 0
    outcome_name: str | None = None
    kind: str | None = None
    metrics: tuple[str, ...] = ()
    outcome: tuple[tuple[str, dict[str, tuple[float, float]]], ...] = ()
    views: tuple[dict[str, Any], ...] = ()
    structures: tuple[dict[str, Any], ...] = ()
    absent: str | None = None

    @property
    def largest_drop(self) -> float:
        return max((row["drop"] for row in self.structures), default=0.0)


NO_DATA = "This decomposition was loaded from a file, which holds no data."


def assessed(decomposition: Decomposition) -> Sureness:
    """p-values and stability, or why these cannot be."""
    if decomposition.data is None:
        return Sureness([], absent=NO_DATA)
    try:
        rows = records(decomposition.assessment)
    except ValueError as error:  # too few samples that lack nothing: the rest of the report stands without
        return Sureness([], absent=f"It could not be computed: {error}.")
    null = decomposition.null.explained
    for row, s in zip(rows, decomposition.active, strict=True):
        row["spread"] = decomposition.stability[s].spread if s in decomposition.stability else None
    return Sureness(rows, len(next(iter(null.values()))) if null else 0)


def cross_validated(decomposition: Decomposition, cv: int | None) -> Prediction:
    """Prediction in folds, or why there is none."""
    if decomposition.data is None:
        return Prediction(absent=NO_DATA)
    if cv is None:
        return Prediction(absent="Cross-validation was not asked for.")
    try:
        seen = decomposition.evaluate(cv)
    except NoFactorError:
        return Prediction(absent="In some fold the rows that are left support no factor.")
    table: dict[str, dict[str, tuple[float, float]]] = {}
    for row in seen.outcome.iter_rows(named=True):
        table.setdefault(row["method"], {})[row["metric"]] = (row["mean"], row["standard_error"])
    return Prediction(
        folds=cv,
        outcome_name=decomposition.outcome_name,
        kind=None if decomposition.head is None else decomposition.head.kind,
        metrics=tuple(seen.outcome["metric"].unique(maintain_order=True)),
        outcome=tuple(table.items()),
        views=tuple(seen.views.to_dicts()),
        structures=tuple(seen.structures.to_dicts()),
    )


def data_section(decomposition: Decomposition) -> dict[str, Any]:
    """Views with their numbers of features, and, where there are data, who has them."""
    hierarchy, read = decomposition.hierarchy, decomposition.data
    constant = np.isinf(decomposition.reading.scale)
    views: list[dict[str, Any]] = [
        {"view": name, "features": len(features), "constant": int(constant[hierarchy.rows(m)].sum())}
        for m, (name, features) in enumerate(zip(decomposition.view_names, decomposition.feature_names, strict=True), start=1)
    ]
    section: dict[str, Any] = {"n_samples": decomposition.n_samples, "views": views, "patterns": None, "outcome": None}
    if read is None:
        return section
    present = presence_table(read)
    for view, matrix, there in zip(views, read.matrices, present.T, strict=True):
        cells = np.isnan(np.asarray(matrix)[there])
        view |= {"samples": int(there.sum()), "missing": float(cells.mean()) if cells.size else 0.0}
    counts = Counter(map(tuple, present.tolist())).most_common()
    section["patterns"] = counts[:MOST_PATTERNS]
    section["other_patterns"] = (len(counts[MOST_PATTERNS:]), sum(n for _, n in counts[MOST_PATTERNS:]))
    outcome = decomposition.outcome
    if outcome is not None:
        values = outcome.values[outcome.known]
        section["outcome"] = {"name": outcome.name, "known": int(outcome.known.sum())}
        if outcome.classes is None:
            section["outcome"]["range"] = (values.min(), np.median(values), values.max())
        if outcome.events is not None:
            section["outcome"]["events"] = int(outcome.events[outcome.known].sum())
        if outcome.subjects is not None:
            section["outcome"]["subjects"] = len(np.unique(outcome.subjects[outcome.known]))
        if outcome.classes is not None:
            numbers = np.bincount(values.astype(int), minlength=len(outcome.classes))
            section["outcome"]["classes"] = list(zip(map(str, outcome.classes), numbers.tolist(), strict=True))
    return section


Cells = list[tuple[float, float, float] | None]


def share_table(decomposition: Decomposition) -> list[tuple[str, bool, Cells]]:
    """`variance_explained` with one row a structure, then the total and the residual: (label, whether it is one of these two,
    by view (share, low, high), None where the structure lacks the view)."""
    shares, found = decomposition.shares, []
    for i, s in enumerate(decomposition.active):
        held = zip(*(bound[:, i].tolist() for bound in shares[:3]), strict=True)
        cells: Cells = [cell if m in s else None for m, cell in enumerate(held, start=1)]
        found.append((decomposition.label(s), False, cells))
    total: Cells = [(share, low, high) for share, low, high in shares.total.tolist()]
    residual: Cells = [(1 - share, 1 - high, 1 - low) for share, low, high in shares.total.tolist()]
    return [*found, ("total", True, total), ("residual", True, residual)]


def structure_section(decomposition: Decomposition, sureness: Sureness) -> dict[str, Any]:
    """All structures, whether they are doubtful, and the features of those that matter most, reproducible ones first."""
    plain = records(decomposition.structures)
    rows = sureness.rows or [row | {"stability": None, "spread": None, "p_value": None, "verdict": None} for row in plain]
    for row in rows:
        row["doubtful"] = row["verdict"] is not None and not row["verdict"].startswith("reproducible")
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["doubtful"], -rows[i]["share"]))
    best = [decomposition.active[i] for i in order[:MOST_BEST]]
    return {
        "rows": rows,
        "permutations": sureness.permutations,
        "absent": sureness.absent,
        "best": best,
        "others": len(rows) - len(best),
        "features": [_features(decomposition, s) for s in best],
        "without_intervals": decomposition.without_intervals,
        "level": LEVEL,
    }


def _features(decomposition: Decomposition, structure: Structure) -> dict[str, Any]:
    """The features of a structure, view by view, with their loadings on the first two scores."""
    scores = [name for name, s in zip(decomposition.score_names, decomposition.columns, strict=True) if s == structure][:2]
    by_view: dict[str, list[dict[str, Any]]] = {}
    level = LEVEL if decomposition.without_intervals is None else None
    for row in records(decomposition.top_features(structure, N_FEATURES, level)):
        said = {"feature": row["feature"], "share": row["share"], "loadings": [row[name] for name in scores]}
        low = row.get("low")
        said["bounds"] = None if low is None or math.isnan(low) else (low, row["high"])
        by_view.setdefault(row["view"], []).append(said)
    return {"structure": decomposition.label(structure), "n_scores": len(scores), "views": list(by_view.items())}


def settings_section(decomposition: Decomposition) -> dict[str, Any]:
    """The arguments of the fit, the versions, and the call that repeats it."""
    settings = decomposition.settings
    given = {field.name: getattr(settings, field.name) for field in fields(settings)}
    if isinstance(given["structures"], tuple):
        given["structures"] = list(given["structures"])
    versions = {"hcl_jax": __version__, "Python": platform.python_version()}
    versions |= {name: version(name) for name in ("jax", "jaxlib", "numpy", "polars")}
    defaults = {field.name: field.default for field in fields(Settings)}
    changed = {name: value for name, value in given.items() if value != defaults[name] or name in ("method", "seed")}
    return {
        "arguments": given,
        "ranks": [(decomposition.label(s), rank) for s, rank in decomposition.hierarchy.ranks],
        "versions": versions,
        "precision": "double" if jax.dtypes.canonicalize_dtype(float).itemsize == 8 else "single",
        "backend": jax.default_backend(),
        "call": ",\n    ".join(
            ["data", *["y=y"] * (decomposition.head is not None), *[f"{k}={v!r}" for k, v in changed.items()]]
        ),
    }
