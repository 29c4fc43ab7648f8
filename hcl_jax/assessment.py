"""Cross-validation of a decomposition: everything is fitted again without the held-out rows, and simple rivals beside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import polars as pl
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

from hcl_jax.compiled import bucket
from hcl_jax.evaluation import corrected_mean
from hcl_jax.heads import fit_head, outcome_errors
from hcl_jax.importance import ImportanceConfig, score_drops
from hcl_jax.outcomes import Outcome
from hcl_jax.views import Views, check_count, presence_table

RIDGE_PENALTIES = np.logspace(-3, 3, 13)
"""In units of the mean squared singular value."""


@dataclass(frozen=True)
class Evaluation:
    """What cross-validation saw.

    outcome: one row a method (`hcl_jax`, `pca`, `features`) and metric: mean over folds, its standard error (corrected for rows
    that folds share, `corrected_mean`), and the value of every fold. Empty without an outcome.
    views: one row a view, predicted from the others: R² over its cells, of the decomposition (None where it has no noise model)
    and of ridge regression.
    structures: by structure, how much the outcome's first metric falls where its scores are permuted among held-out samples: mean
    over the folds in which the structure was found, and in how many it was.
    predictions: of every sample with a known outcome, by a fit that did not see it.
    """

    outcome: pl.DataFrame
    views: pl.DataFrame
    structures: pl.DataFrame
    predictions: pl.DataFrame


def cross_validate(
    decompose: Callable[[Views, Outcome | None], Any], read: Views, outcome: Outcome | None, cv: int, key: Key[Array, ""]
) -> Evaluation:
    """`decompose` fits rows; what it returns predicts, and completes views. Raises `ValueError` for more folds than rows."""
    check_count(cv, "cv", 2)
    fold = folds_of(read.n_samples, outcome, cv, key)
    errors: list[dict[str, Any]] = []
    views: list[dict[str, Any]] = []
    structures: list[dict[str, Any]] = []
    predictions = []
    for number in tqdm(range(cv), desc="cross-validation", unit="fold", disable=None, leave=False):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        seen, held = read.of_rows(train), read.of_rows(test)
        known = None if outcome is None else outcome.of_rows(train)
        fitted = decompose(seen, known)
        views += _view_rows(fitted, seen, held, number)
        if outcome is None or known is None:
            continue
        truth, k_fold = outcome.of_rows(test), jr.fold_in(key, number)
        scores = fitted.score_matrix(held)
        errors += _rows("hcl_jax", outcome_errors(truth, fitted.head, scores), number)
        for rival, n_axes in (("pca", scores.shape[1]), ("features", None)):
            maps = principal_axes(seen, n_axes)
            head = fit_head(maps(seen), known, k_fold, scaled=n_axes is not None)
            errors += _rows(rival, outcome_errors(truth, head, maps(held)), number)
        structures += _importance_rows(fitted, truth, scores, number, k_fold)
        of = np.flatnonzero(truth.known)
        predictions += list(zip(test[of].tolist(), fitted.head.predict(scores[of]).tolist(), strict=True))
    return Evaluation(
        _summary(errors, 1 / cv), _view_summary(views), _structure_summary(structures, 1 / cv), _in_order(predictions)
    )


def folds_of(n: int, outcome: Outcome | None, cv: int, key: Key[Array, ""]) -> Int[np.ndarray, " n"]:
    """The fold of every row, nearly equal in size, and in the share of every class, or of events; the rows of a subject are in
    one. Raises `ValueError` for more folds than half of the rows, than events, and than subjects."""
    if cv > n // 2:
        raise ValueError(f"cv: is {cv}, of {n} samples; expected at most half as many folds")
    if outcome is not None and outcome.subjects is not None:
        return _folds_of_subjects(outcome.subjects, cv, key)
    order = np.asarray(jr.permutation(key, n))
    label = None
    if outcome is not None and outcome.events is not None:
        label = outcome.events
        if cv > label.sum():
            raise ValueError(f"cv: is {cv}, of {label.sum()} events; expected at most as many folds")
    elif outcome is not None and outcome.classes is not None:
        label = outcome.values
    if outcome is not None and label is not None:
        order = order[np.argsort(np.where(outcome.known, label, -1)[order], kind="stable")]
    fold = np.empty(n, int)
    fold[order] = np.arange(n) % cv
    return fold


def _folds_of_subjects(subjects: Int[np.ndarray, " n"], cv: int, key: Key[Array, ""]) -> Int[np.ndarray, " n"]:
    """The fold of every row by its subject, those with most rows first, each to the fold that has least; rows without one are
    each one of their own."""
    unknown = subjects < 0
    whose = np.where(unknown, subjects.max() + np.cumsum(unknown), subjects)
    counts = np.bincount(whose)
    if cv > len(counts):
        raise ValueError(f"cv: is {cv}, of {len(counts)} subjects; expected at most as many folds")
    order = np.asarray(jr.permutation(key, len(counts)))
    fold, size = np.empty(len(counts), int), np.zeros(cv)
    for subject in order[np.argsort(-counts[order], kind="stable")]:
        fold[subject] = size.argmin()
        size[fold[subject]] += counts[subject]
    return fold[whose]


def principal_axes(read: Views, n_axes: int | None) -> Callable[[Views], Float[np.ndarray, "n r"]]:
    """The map from rows to their scores on the first principal components of standardised features, views that a row lacks at
    their means; all components for None, which is a rotation of the features. Zeros fill up the columns to a shared number."""
    centre, scale = read.centre_and_scale()
    _, values, right = thin_svd(read.standardised(centre, scale))
    kept = len(values) if n_axes is None else min(n_axes, len(values))
    axes = np.zeros((len(right), bucket(kept) if n_axes is None else n_axes))
    axes[:, :kept] = right[:, :kept]
    return lambda views: views.standardised(centre, scale) @ axes


def thin_svd(
    X: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, "n r"], Float[np.ndarray, " r"], Float[np.ndarray, "d r"]]:
    """(U, s, V) of X = U diag(s) Vᵀ without singular values below 1e-6 of the largest, from the smaller of XXᵀ and XᵀX: several
    times as fast as the decomposition of X."""
    wide = X.shape[0] <= X.shape[1]
    values, vectors = np.linalg.eigh(X @ X.T if wide else X.T @ X)
    kept = np.flatnonzero(values > 1e-12 * max(values[-1], 0))[::-1]
    roots, vectors = np.sqrt(values[kept]), vectors[:, kept]
    others = (X.T if wide else X) @ vectors / roots
    return (vectors, roots, others) if wide else (others, roots, vectors)


def _rows(method: str, errors: dict[str, float], fold: int) -> list[dict[str, Any]]:
    return [{"method": method, "metric": metric, "fold": fold, "value": value} for metric, value in errors.items()]


def _view_rows(fitted: Any, seen: Views, held: Views, fold: int) -> list[dict[str, Any]]:
    """Sums of squares of every view of the held-out rows that have it and another one: in all, and of what is left by the model
    and by ridge regression, in units of the training rows' standard deviations."""
    if len(seen.names) < 2:
        return []
    ridge, present = RidgeViews(seen), presence_table(held)
    found = []
    for m, name in enumerate(seen.names):
        usable = np.flatnonzero(present[:, m] & (present.sum(axis=1) > 1))
        if not len(usable):
            continue
        rows = held.of_rows(usable)
        truth = ridge.standardised(rows)[:, ridge.columns(m)]
        hidden = rows.without(m)
        by_model = fitted.view_from_others(hidden, m)
        left = None
        if by_model is not None:
            predicted = (by_model - ridge.centre[ridge.columns(m)]) / ridge.scale[ridge.columns(m)]
            left = float(np.sum((truth - predicted) ** 2))
        by_ridge = float(np.sum((truth - ridge.predict(hidden, m)) ** 2))
        found.append({"view": name, "fold": fold, "total": float(np.sum(truth**2)), "model": left, "ridge": by_ridge})
    return found


class RidgeViews:
    """Ridge regression of each view on all others together, on standardised features, absent views at their means: the penalty
    has the least squared error when single rows are left out (generalised cross-validation)."""

    def __init__(self, read: Views):
        self.centre, self.scale = read.centre_and_scale()
        self.edges = np.cumsum([0, *read.dims])
        self.Z = self.standardised(read)
        self.present = presence_table(read)
        self.maps: dict[int, np.ndarray] = {}

    def columns(self, m: int) -> slice:
        return slice(self.edges[m], self.edges[m + 1])

    def standardised(self, read: Views) -> Float[np.ndarray, "n d"]:
        """Rows in units of the training rows."""
        return read.standardised(self.centre, self.scale)

    def predict(self, read: Views, m: int) -> Float[np.ndarray, "n d_m"]:
        """View m (from 0) of rows, from their other views."""
        if m not in self.maps:
            self.maps[m] = self._fit(m)
        others = self.standardised(read)
        others[:, self.columns(m)] = 0
        return others @ self.maps[m]

    def _fit(self, m: int) -> Float[np.ndarray, "d d_m"]:
        rows = self.present[:, m]
        X, Y = self.Z[rows].copy(), self.Z[rows][:, self.columns(m)]
        X[:, self.columns(m)] = 0
        left, values, right = thin_svd(X)
        projected, n = left.T @ Y, len(X) - 1  # the mean has taken one degree of freedom
        outside = np.sum(Y**2) - np.sum(projected**2)
        squares = np.sum(projected**2, axis=1)
        penalties = RIDGE_PENALTIES * np.mean(values**2)
        shrunk = values[None, :] ** 2 / (values[None, :] ** 2 + penalties[:, None])
        errors = (outside + ((1 - shrunk) ** 2 @ squares)) / (1 - shrunk.sum(axis=1) / n).clip(1e-9) ** 2
        best = penalties[int(errors.argmin())]
        return right @ ((values / (values**2 + best))[:, None] * projected)


def _importance_rows(fitted: Any, truth: Outcome, scores: Float[np.ndarray, "n R"], fold: int, key: Key[Array, ""]) -> list[Any]:
    """By structure, what the first metric of the outcome loses where its scores are permuted."""
    known = truth.of_rows(truth.known)
    first = lambda changed: next(iter(outcome_errors(known, fitted.head, changed).values()))
    drops = score_drops(jnp.asarray(scores[truth.known]), fitted.columns, first, ImportanceConfig(), key=key)
    return [{"structure": fitted.label(s), "fold": fold, "drop": drop} for s, drop in drops.items()]


def _summary(rows: list[dict[str, Any]], test_share: float) -> pl.DataFrame:
    found = []
    for method, metric in dict.fromkeys((row["method"], row["metric"]) for row in rows):
        values = np.array([row["value"] for row in rows if (row["method"], row["metric"]) == (method, metric)])
        mean, error = corrected_mean(values, test_share)
        found.append({"method": method, "metric": metric, "mean": mean, "standard_error": error, "folds": values.tolist()})
    schema = {"method": pl.String, "metric": pl.String, "mean": pl.Float64, "standard_error": pl.Float64}
    return pl.DataFrame(found, schema=schema | {"folds": pl.List(pl.Float64)})


def _view_summary(rows: list[dict[str, Any]]) -> pl.DataFrame:
    found = []
    for view in dict.fromkeys(row["view"] for row in rows):
        of = [row for row in rows if row["view"] == view]
        total = sum(row["total"] for row in of)
        r_squared = {
            name: None if any(row[key] is None for row in of) else 1 - sum(row[key] for row in of) / total
            for name, key in (("hcl_jax", "model"), ("ridge", "ridge"))
        }
        found.append({"view": view, **r_squared})
    return pl.DataFrame(found, schema={"view": pl.String, "hcl_jax": pl.Float64, "ridge": pl.Float64})


def _structure_summary(rows: list[dict[str, Any]], test_share: float) -> pl.DataFrame:
    found = []
    for structure in dict.fromkeys(row["structure"] for row in rows):
        drops = np.array([row["drop"] for row in rows if row["structure"] == structure])
        mean, error = corrected_mean(drops, test_share)
        found.append({"structure": structure, "drop": mean, "standard_error": error, "n_folds": len(drops)})
    schema = {"structure": pl.String, "drop": pl.Float64, "standard_error": pl.Float64, "n_folds": pl.Int64}
    return pl.DataFrame(found, schema=schema).sort("drop", descending=True)


def _in_order(predictions: list[tuple[int, Any]]) -> pl.DataFrame:
    ordered = sorted(predictions)
    return pl.DataFrame({"row": [row for row, _ in ordered], "predicted": [value for _, value in ordered]})
