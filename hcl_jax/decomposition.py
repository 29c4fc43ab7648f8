"""The front door: from an analyst's own views to structures, scores, uncertainty and predictions, whatever the method."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.random as jr
import numpy as np
import polars as pl
from jaxtyping import Float

import hcl_jax
from hcl_jax.annotated import as_mudata
from hcl_jax.assessment import Evaluation, cross_validate
from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators import Estimate
from hcl_jax.explained import Reading, ShareIntervals, reading_of, row_shares, share_intervals
from hcl_jax.fitted import Fitted, LinearFit, active_structures, column_structures, linear_from_state
from hcl_jax.fitting import Settings, choose_hierarchy, completed, fit_method, response_of, scores_of
from hcl_jax.heads import Head, fit_head
from hcl_jax.intervals import EFFICIENT, VALID, Located, check_level, feature_share_intervals, located
from hcl_jax.networks import METHODS
from hcl_jax.networks.links import linked_from_state
from hcl_jax.networks.network import fit_from_state
from hcl_jax.npz import read_npz, write_npz
from hcl_jax.outcomes import Outcome, as_outcome
from hcl_jax.problems import check_fittable, problems
from hcl_jax.reading import match_features, read_views
from hcl_jax.selection import UNSTABLE, PermutationNull, Stability, half_split_stability, permutation_null
from hcl_jax.structure import (
    CONVERGED,
    STATUS_WORDS,
    Hierarchy,
    Structure,
    labelled_structure,
    structure_label,
)
from hcl_jax.views import Views, as_matrix, check_count, presence_table

FORMAT = 1
"""Of saved files."""
CHANCE = 0.05
"""Shared structures with a larger p-value are called no better than chance."""
EXPECTED = "a decomposition that was saved by Decomposition.save"


def fit(
    data: Any,
    *,
    views: Any = None,
    y: Any = None,
    structures: Any = "all",
    ranks: Any = "auto",
    method: str = "hcl-vb",
    noise: str = "view",
    standardise: bool = True,
    missing: str = "model",
    join: str = "union",
    seed: int = 0,
) -> "Decomposition":
    """The decomposition of several views of the same samples into factors that all, some, or single views share.

    - data, views, join: whatever `read_views` reads: a dictionary of frames or arrays by name, files, MuData, one matrix
      with its `views`; samples are joined by name.
    - y: an outcome to predict from the scores: numbers or classes, `survival(time, event)` or `repeated(values, subject)`,
      as `as_outcome` reads them; unsupervised methods do not see it.
    - structures: "all" subsets of the views, or those to consider, such as ["mrna+meth", "mirna"].
    - ranks: "auto", those that the data support (`select_structures`); one number for all structures; or a dictionary by
      structure.
    - method: a name in `ESTIMATORS`, `BASELINES` or `NETWORKS`.
    - noise: what has a noise variance of its own, a "view", a "feature", or none ("shared"), of methods that know the
      difference.
    - standardise: whether features are brought to variance 1; published decompositions and networks have their own way.
    - missing: rows that lack views count for those that they have ("model"), or are left out ("complete"); "impute-cells"
      also takes single cells that are missing (`hcl-ml`).
    - seed: of whatever is random.

    Raises `ValueError` that names the argument for whatever cannot be read or fitted.
    """
    settings = Settings(method, structures, ranks, noise, standardise, missing, seed)
    read = read_views(data, views=views, join=join, cells=missing == "impute-cells")
    settings = settings.in_names(read.names)
    outcome = None if y is None else as_outcome(y, read.n_samples, read.sample_names)
    if missing == "complete":
        whole = np.flatnonzero(presence_table(read).all(axis=1))
        if len(whole) < 3:
            raise ValueError(f"missing: is 'complete', and {len(whole)} rows have all views; expected at least 3")
        read, outcome = read.of_rows(whole), outcome and outcome.of_rows(whole)
    check_fittable(read)
    return dataclasses.replace(decompose(read, settings, outcome, frames=_frames_of(data)), divided=views)


def decompose(read: Views, settings: Settings, outcome: Outcome | None = None, frames: str = "polars") -> "Decomposition":
    """`fit`, of views and an outcome that have been read."""
    response = response_of(settings.method, outcome)
    hierarchy, at_cap = choose_hierarchy(read, settings)
    fitted = fit_method(read, hierarchy, settings, response, outcome)
    scores = scores_of(fitted, read, settings)
    reading = reading_of(fitted, read, scores)
    head = None if outcome is None else fit_head(scores, outcome, jr.fold_in(settings.key, 1))
    Z, present = reading.standardised(read)
    columns = column_structures(fitted)
    shares = row_shares(
        Z, present, scores - reading.score_means, reading.loadings, columns, active_structures(columns), read.dims
    )
    return Decomposition(
        fitted=fitted,
        settings=settings,
        hierarchy=hierarchy,
        view_names=read.names,
        feature_names=read.feature_names,
        reading=reading,
        shares=share_intervals(shares, settings.seed),
        at_cap=at_cap,
        n_samples=read.n_samples,
        frames=frames,
        head=head,
        outcome_name=None if outcome is None else outcome.name,
        data=read,
        outcome=outcome,
    )


@dataclass(frozen=True)
class Decomposition:
    """Views decomposed into structures: who shares what, how much it explains, how sure that is, and what it predicts.

    Tables come as frames of the kind that the data were (pandas, or else polars), with the names of the data.
    """

    fitted: Fitted
    settings: Settings
    hierarchy: Hierarchy
    view_names: tuple[str, ...]
    feature_names: tuple[tuple[str, ...], ...]
    reading: Reading
    shares: ShareIntervals
    """Of the variance of the training rows."""
    at_cap: tuple[Structure, ...]
    """Structures that have as many columns as were offered."""
    n_samples: int
    frames: str = "polars"
    divided: Any = None
    """How the columns of one matrix were divided into views, `views` of `fit`: new matrices are divided so as well."""
    head: Head | None = None
    outcome_name: str | None = None
    data: Views | None = None
    """The training rows; None in a decomposition that was loaded."""
    outcome: Outcome | None = None

    # structures

    @cached_property
    def columns(self) -> tuple[Structure, ...]:
        """The structure of every score, () where it is unused."""
        return column_structures(self.fitted)

    @cached_property
    def active(self) -> tuple[Structure, ...]:
        """The structures that have scores, larger ones first."""
        return active_structures(self.columns)

    @cached_property
    def score_names(self) -> tuple[str, ...]:
        """Such as mrna+meth:2, the second score of what the two share."""
        counts: Counter[Structure] = Counter()
        names = []
        for s in self.columns:
            counts[s] += 1
            names.append(f"{self.label(s) if s else 'unused'}:{counts[s]}")
        return tuple(names)

    def label(self, structure: Structure) -> str:
        """The names of its views, such as mrna+meth."""
        return structure_label(structure, self.view_names)

    @property
    def structures(self) -> Any:
        """One row a structure: `structure`, `n_views`, `rank`, `at_cap` (it has as many columns as were offered: there may be
        more), and `share`, the variance that it explains, averaged over its views. `assessment` says how sure it is."""
        return self._as_came(self._structures())

    def _structures(self) -> pl.DataFrame:
        rows = [
            {
                "structure": self.label(s),
                "n_views": len(s),
                "rank": self.columns.count(s),
                "at_cap": s in self.at_cap,
                "share": float(self.shares.share[[m - 1 for m in s], i].mean()),
            }
            for i, s in enumerate(self.active)
        ]
        return pl.DataFrame(rows)

    def variance_explained(self, data: Any = None) -> Any:
        """One row a view and structure, then the view's `total` and `residual`: the `share` of its variance, with 95 % bootstrap
        bounds `low` and `high` over rows, the fit as it is. Shares add up to the total, at most 1 (`row_shares`). Of the training
        rows, or of new ones, where a share may be negative."""
        return self._as_came(self._variance_explained(self.shares if data is None else self._shares_of(data)))

    def _shares_of(self, data: Any) -> ShareIntervals:
        read = self._read(data)
        (Z, present), scores = self.reading.standardised(read), self.score_matrix(read)
        held = row_shares(
            Z, present, scores - self.reading.score_means, self.reading.loadings, self.columns, self.active, read.dims
        )
        return share_intervals(held, self.settings.seed)

    def _variance_explained(self, shares: ShareIntervals) -> pl.DataFrame:
        rows = []
        for m, view in enumerate(self.view_names):
            for i, s in enumerate(self.active):
                if m + 1 in s:
                    rows.append((view, self.label(s), shares.share[m, i], shares.low[m, i], shares.high[m, i]))
            total, low, high = shares.total[m]
            rows += [(view, "total", total, low, high), (view, "residual", 1 - total, 1 - high, 1 - low)]
        return pl.DataFrame(rows, schema=["view", "structure", "share", "low", "high"], orient="row")

    # scores and features

    def scores(self) -> Any:
        """Those of the training samples, one row each. Raises `ValueError` where the decomposition was loaded."""
        read = self._training()
        return self._by_sample(read, dict(zip(self.score_names, self.score_matrix(read).T, strict=True)))

    def transform(self, data: Any) -> Any:
        """Scores of any samples, one row each: views and features are found by name, and training means and scales are used. A
        view that a sample lacks is no obstacle to methods with a noise model. Raises `ValueError` as `match_features` does."""
        read = self._read(data)
        return self._by_sample(read, dict(zip(self.score_names, self.score_matrix(read).T, strict=True)))

    def loadings(self, view: str) -> Any:
        """One row a feature of the view, one column a score that the view sees, on the scale of standardised features."""
        m = self._view(view)
        held = {self.score_names[k]: self.reading.loadings[self.hierarchy.rows(m), k] for k in self._seen_by(m)}
        return self._as_came(pl.DataFrame({"feature": list(self.feature_names[m - 1]), **held}))

    def _seen_by(self, m: int) -> list[int]:
        return [k for k, s in enumerate(self.columns) if m in s]

    def top_features(self, structure: Any, n: int = 10, level: float | None = None) -> Any:
        """Of every view of the structure, the n features of which it explains most: `view`, `feature`, `share` of the feature's
        variance (whatever the rotation of the factors), and the loading on every score of the structure.

        With a `level`, such as 0.9, also `low` and `high`, bounds of the share (`feature_share_intervals`), missing where it is
        not certain that all of the structure's factors were found. They take seconds when first asked for. Raises `ValueError`
        with the reason where there are none (`without_intervals`).
        """
        table = self._top_features(structure, n)
        return self._as_came(table if level is None else self._with_bounds(table, structure, n, level))

    def _with_bounds(self, table: pl.DataFrame, structure: Any, n: int, level: float) -> pl.DataFrame:
        check_level(level)
        if self.without_intervals is not None:
            raise ValueError(f"level: is {level}, and there are no intervals; {self.without_intervals}")
        named = [(view, name) for view, names in zip(self.view_names, self.feature_names, strict=True) for name in names]
        place = {pair: j for j, pair in enumerate(named)}
        rows = [place[pair] for pair in table.select("view", "feature").iter_rows()]
        padded = rows + rows[-1:] * (n * len(self.view_names) - len(rows))  # one program for all structures
        estimate, covariance, at = self._likelihood
        s = labelled_structure(structure, self.view_names, "structure")
        found = feature_share_intervals(estimate, covariance, self.hierarchy, s, padded, level, at=at)
        valid = np.asarray(found.status)[: len(rows)] == VALID
        bounds = {"low": np.asarray(found.lower), "high": np.minimum(found.upper, 1)}
        held = {name: np.where(valid, ends[: len(rows)], np.nan) for name, ends in bounds.items()}
        return table.with_columns(pl.Series(name, ends, nan_to_null=True) for name, ends in held.items())

    @property
    def without_intervals(self) -> str | None:
        """Why shares of features have no intervals; None where they have."""
        if self.settings.method not in EFFICIENT:
            return f"{self.settings.method} has none, as it does not maximise the likelihood: {', '.join(EFFICIENT)} have"
        if self.data is None:
            return "a file does not hold the data that they need"
        if any(np.isnan(matrix).any() for matrix in map(np.asarray, self.data.matrices)):
            return "they need samples that lack nothing"
        return None

    @cached_property
    def _likelihood(self) -> tuple[Estimate, SampleCovariance, Located]:
        """The estimate, the covariance that it was fitted to, and the maximum of the likelihood where intervals are taken: with
        noise by feature where features were brought to variance 1, as they then differ in it."""
        fitted, settings = self.fitted, self.settings
        if not isinstance(fitted, LinearFit) or fitted.noise_variance is None:
            raise ValueError(f"method: is {settings.method!r}, which has no noise model; expected one that has, as hcl-vb")
        covariance = SampleCovariance.from_data(self.reading.standardised(self._training())[0], form="padded")
        estimate = Estimate(
            loadings=fitted.loadings,
            noise_variance=fitted.noise_variance,
            status=fitted.status,
            steps=fitted.steps,
            objective=fitted.objective,
            method=settings.method,
            noise="feature" if settings.standardise else settings.noise,
        )
        return estimate, covariance, located(estimate, covariance, self.hierarchy)

    def _top_features(self, structure: Any, n: int = 10) -> pl.DataFrame:
        s = labelled_structure(structure, self.view_names, "structure")
        if s not in self.active:
            listed = ", ".join(map(self.label, self.active))
            raise ValueError(f"structure: is {structure!r}; expected one of those found, {listed}")
        check_count(n, "n", 1)
        held = [k for k, column in enumerate(self.columns) if column == s]
        frames = []
        for m in s:
            loadings = self.reading.loadings[self.hierarchy.rows(m)][:, held]
            share = loadings**2 @ self.reading.score_variances[held]
            best = np.argsort(-share, kind="stable")[:n]
            columns = {self.score_names[k]: loadings[best, i] for i, k in enumerate(held)}
            features = [self.feature_names[m - 1][j] for j in best]
            frames.append(
                pl.DataFrame({"feature": features, "share": share[best], **columns}).select(
                    pl.lit(self.view_names[m - 1]).alias("view"), pl.all()
                )
            )
        return pl.concat(frames)

    # views

    def impute(self, view: str, data: Any = None) -> tuple[Any, Any]:
        """(the view, with what samples lack of it predicted from what they have; standard deviations of the predictions, 0 where
        nothing was predicted), in the units of the data: of the training samples, or of any others.

        Raises `ValueError` where the method has no noise model.
        """
        read, m = self._training() if data is None else self._read(data), self._view(view)
        if not isinstance(self.fitted, LinearFit):
            raise ValueError(f"method: is {self.settings.method!r}, which has no noise model; expected one that has, as hcl-vb")
        rows = self.hierarchy.rows(m)
        values, deviations = (array[:, rows].T for array in completed(self.fitted, read, self.settings))
        names = self.feature_names[m - 1]
        return (
            self._by_sample(read, dict(zip(names, values, strict=True))),
            self._by_sample(read, dict(zip(names, deviations, strict=True))),
        )

    def inverse_transform(self, scores: Any) -> dict[str, Any]:
        """What scores, n × R or a frame as `transform` gives it, say of each view, in the units of the data."""
        matrix = self._score_matrix(scores)
        scale = np.where(np.isfinite(self.reading.scale), self.reading.scale, 0)
        X = self.reading.centre + scale * ((matrix - self.reading.score_means) @ self.reading.loadings.T)
        said = {}
        for m, (view, names) in enumerate(zip(self.view_names, self.feature_names, strict=True), start=1):
            said[view] = self._as_came(pl.DataFrame(dict(zip(names, X[:, self.hierarchy.rows(m)].T, strict=True))))
        return said

    def _score_matrix(self, scores: Any) -> Float[np.ndarray, "n R"]:
        if hasattr(scores, "columns"):
            lacking = [name for name in self.score_names if name not in scores.columns]
            if lacking:
                raise ValueError(f"scores: lack {', '.join(lacking)}; expected the columns that transform gives")
            scores = np.stack([np.asarray(scores[name], float) for name in self.score_names], axis=1)
        return np.asarray(as_matrix(scores, "scores", (None, len(self.score_names))), float)

    def view_from_others(self, read: Views, m: int) -> Float[np.ndarray, "n d_m"] | None:
        """View m (from 0) of rows that lack it, in the units of the data; None where the method has no noise model."""
        if not isinstance(self.fitted, LinearFit) or self.fitted.noise_variance is None:
            return None
        return completed(self.fitted, read, self.settings)[0][:, self.hierarchy.rows(m + 1)]

    def score_matrix(self, read: Views) -> Float[np.ndarray, "n R"]:
        """The scores of views that have been read, as they stand."""
        return scores_of(self.fitted, read, self.settings)

    # outcome

    def predict(self, data: Any) -> np.ndarray:
        """The outcome that is expected of each sample: a number, its most probable class, or of survival times the log hazard
        ratio to a sample with mean scores. Raises `ValueError` without one."""
        return self._head().predict(self.score_matrix(self._read(data)))

    def predict_probabilities(self, data: Any) -> Any:
        """One row a sample, one column a class. Raises `ValueError` where the outcome has none."""
        head, read = self._head(), self._read(data)
        held = head.probabilities(self.score_matrix(read))
        return self._by_sample(read, {str(c): column for c, column in zip(head.classes or (), held.T, strict=True)})

    def _head(self) -> Head:
        if self.head is None:
            raise ValueError("y: was not given to fit; expected an outcome to predict, fit(..., y=...)")
        return self.head

    def evaluate(self, cv: int = 5) -> Evaluation:
        """How well the outcome, and each view, are predicted for samples that were not seen: everything, the choice of structures
        included, is fitted again without each of `cv` folds. Beside it, principal components (as many as there are scores) and
        all features, with the same regression, and for views ridge regression. Raises `ValueError` where the decomposition was
        loaded."""
        read = self._training()
        again = lambda rows, outcome: decompose(rows, self.settings, outcome, self.frames)
        return cross_validate(again, read, self.outcome, cv, jr.fold_in(self.settings.key, 4))

    # how sure

    @cached_property
    def stability(self) -> dict[Structure, Stability]:
        """By structure, how alike two halves of the samples see it (`half_split_stability`): of those that have all views.
        Computed when first asked for."""
        return half_split_stability(self._whole(), self.hierarchy, key=jr.fold_in(self.settings.key, 2), **self._as_fitted)

    @cached_property
    def null(self) -> PermutationNull:
        """What is found of structures of several views where the rows of every view are permuted on their own, so that nothing is
        shared (`permutation_null`): of samples that have all views. Computed when first asked for."""
        return permutation_null(self._whole(), self.hierarchy, key=jr.fold_in(self.settings.key, 3), **self._as_fitted)

    @property
    def _as_fitted(self) -> dict[str, Any]:
        return {"noise": self.settings.search_noise(self.hierarchy.dims), "scaled": self.settings.standardise}

    def _whole(self) -> list[np.ndarray]:
        """The training rows that lack nothing. Raises `ValueError` for fewer than 6."""
        X = [np.asarray(matrix) for matrix in self._training().matrices]
        rows = ~np.stack([np.isnan(matrix).any(axis=1) for matrix in X]).any(axis=0)
        if rows.sum() < 6:
            raise ValueError(f"data: have {int(rows.sum())} samples that lack nothing; expected at least 6 to permute and split")
        return [matrix[rows] for matrix in X]

    @property
    def assessment(self) -> Any:
        """`structures`, and how sure each of them is: `stability` over halves of the samples, the `p_value` of what is shared, by
        permutation, and a `verdict` in words."""
        return self._as_came(self._assessment())

    def _assessment(self) -> pl.DataFrame:
        table = self._structures()
        stable = [self.stability[s].cosine if s in self.stability else float("nan") for s in self.active]
        chance = [self.null.p_values.get(s) for s in self.active]
        said = [_verdict(*row) for row in zip(stable, chance, table["at_cap"], strict=True)]
        return table.with_columns(
            pl.Series("stability", stable), pl.Series("p_value", chance, pl.Float64), pl.Series("verdict", said)
        )

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of the results should know, one sentence each."""
        found = []
        if int(self.fitted.status) != CONVERGED:
            words = STATUS_WORDS.get(int(self.fitted.status), f"status {int(self.fitted.status)}")
            found.append(f"The fit ended {words}.")
        for s in self.at_cap:
            found.append(f"{self.label(s)} has as many columns as were offered: there may be more.")
        if self.data is not None:
            found += problems(self.data)
        return tuple(found)

    # files

    def save(self, path: Path | str) -> None:
        """One .npz without pickle: arrays, and a description in JSON; not the data. `load` gives back the same bits.

        Raises `ValueError` for a folder that does not exist, and a fit that cannot be saved.
        """
        described, arrays = self.fitted.state()
        description = {
            "format": FORMAT,
            "version": hcl_jax.__version__,
            "fitted": described,
            "settings": dataclasses.asdict(self.settings),
            "ranks": [[list(s), rank] for s, rank in self.hierarchy.ranks],
            "views": self.view_names,
            "features": self.feature_names,
            "at_cap": [list(s) for s in self.at_cap],
            "n_samples": self.n_samples,
            "frames": self.frames,
            "divided": self.divided if isinstance(self.divided, (str, list, tuple)) else None,
            "outcome": self._described_outcome(),
        }
        held = {f"fitted.{name}": array for name, array in arrays.items()}
        held |= {f"reading.{name}": array for name, array in self.reading._asdict().items()}
        held |= {f"shares.{name}": array for name, array in self.shares._asdict().items()}
        if self.head is not None:
            held |= {"head.coefficients": self.head.coefficients, "head.intercept": self.head.intercept}
        write_npz(path, description, held)

    def to_mudata(self, data: Any = None) -> Any:
        """A MuData object of the views, of the training samples or of any others: loadings in varm["hcl"] of every modality,
        scores in obsm["hcl"], and in uns["hcl"] the names of the scores, `structures` and `variance_explained` (of the training
        samples). Raises `ValueError` as `transform` does, and where mudata is not installed."""
        read = self._training() if data is None else self._read(data)
        tables = {"structures": self._structures(), "variance_explained": self._variance_explained(self.shares)}
        return as_mudata(
            read,
            self.score_matrix(read),
            self.score_names,
            [self.reading.loadings[self.hierarchy.rows(m)] for m in self.hierarchy.modalities],
            tables,
        )

    def _described_outcome(self) -> dict[str, Any] | None:
        if self.head is None:
            return None
        return {"name": self.outcome_name, "kind": self.head.kind, "classes": self.head.classes}

    # what came in and goes out

    def _read(self, data: Any) -> Views:
        cells, one = self.settings.missing == "impute-cells", getattr(data, "ndim", 0) == 2 or hasattr(data, "columns")
        read = data if isinstance(data, Views) else read_views(data, views=self.divided if one else None, cells=cells)
        return match_features(read, self.view_names, self.feature_names)

    def _training(self) -> Views:
        if self.data is None:
            raise ValueError("data: are not kept in a file; expected the decomposition that fit returned, or data to transform")
        return self.data

    def _view(self, name: Any) -> int:
        """From 1."""
        if name not in self.view_names:
            raise ValueError(f"view: is {name!r}; expected one of {', '.join(self.view_names)}")
        return self.view_names.index(name) + 1

    def as_polars(self) -> "Decomposition":
        """The same, whose tables come as polars frames."""
        return dataclasses.replace(self, frames="polars")

    def _as_came(self, frame: pl.DataFrame) -> Any:
        if self.frames != "pandas":
            return frame
        import pandas as pd  # the data came from it

        return pd.DataFrame(frame.to_dict(as_series=False))

    def _by_sample(self, read: Views, columns: Mapping[str, Any]) -> Any:
        """One row a sample, named as the samples are."""
        if self.frames == "pandas":
            import pandas as pd

            return pd.DataFrame(dict(columns), index=None if read.sample_names is None else list(read.sample_names))
        frame = pl.DataFrame(dict(columns))
        if read.sample_names is None:
            return frame
        return frame.insert_column(0, pl.Series("sample", [str(name) for name in read.sample_names]))


def load(path: Path | str) -> Decomposition:
    """The decomposition that `Decomposition.save` wrote, without its data: it transforms, completes and predicts new samples as
    the one that was saved. Raises `ValueError` for another file, or one from a later version."""
    description, arrays = read_npz(path, EXPECTED)
    if "fitted" not in description or "format" not in description:
        raise ValueError(f"path: {path} holds something else; expected {EXPECTED}")
    if description["format"] > FORMAT:
        raise ValueError(
            f"path: {path} has format {description['format']}, of hcl_jax {description['version']}; expected at most {FORMAT}, "
            f"which is what version {hcl_jax.__version__} reads: update hcl_jax"
        )
    try:
        return _loaded(description, arrays)
    except (KeyError, TypeError) as error:
        raise ValueError(f"path: {path} is incomplete ({error}); expected {EXPECTED}") from None


def _loaded(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Decomposition:
    part = lambda prefix: {k.removeprefix(prefix): array for k, array in arrays.items() if k.startswith(prefix)}
    described, outcome, settings = description["fitted"], description["outcome"], description["settings"]
    structures = settings["structures"]
    settings = Settings(**settings | {"structures": structures if structures == "all" else tuple(structures)})
    dims = tuple(len(names) for names in description["features"])
    head = None
    if outcome is not None:
        held = part("head.")
        classes = None if outcome["classes"] is None else tuple(outcome["classes"])
        kind = outcome.get("kind", "number" if classes is None else "class")  # files from before there were others have none
        head = Head(held["coefficients"], held["intercept"], classes, kind)
    return Decomposition(
        fitted=FROM_STATE[described["kind"]](described, part("fitted.")),
        settings=settings,
        hierarchy=Hierarchy(dims, {tuple(s): rank for s, rank in description["ranks"]}),
        view_names=tuple(description["views"]),
        feature_names=tuple(tuple(names) for names in description["features"]),
        reading=Reading(**part("reading.")),
        shares=ShareIntervals(**part("shares.")),
        at_cap=tuple(tuple(s) for s in description["at_cap"]),
        n_samples=description["n_samples"],
        frames=description["frames"],
        divided=description["divided"],
        head=head,
        outcome_name=outcome and outcome["name"],
    )


FROM_STATE = {
    "linear": linear_from_state,
    "linked": linked_from_state,
    "network": lambda description, arrays: fit_from_state(description, arrays, METHODS),
}
"""By the kind of a fit, what builds it from its state."""


def _verdict(stability: float, p_value: float | None, at_cap: bool) -> str:
    if p_value is not None and p_value > CHANCE:
        return "not above chance"
    if not stability >= UNSTABLE:
        return "unstable"
    return "reproducible, perhaps of a larger rank" if at_cap else "reproducible"


def _frames_of(data: Any) -> str:
    """Whether the data came in pandas frames."""
    values = data.values() if isinstance(data, Mapping) else data if isinstance(data, (list, tuple)) else [data]
    return "pandas" if any(hasattr(value, "iloc") for value in values) else "polars"
