"""Three modalities of each row of labels: codes, measurements and text, of what was known at its prediction time.

An event with a number is a measurement, one with text is text, any other is a code; codes that are administrative, or do not
change, are not in the modality of codes but, with age, beside the three. `known` is the one way from events to rows,
and it joins them on time <= prediction_time: nothing later can enter, whatever its code. Vocabularies, weights, axes, means and
scales are those of the rows that `fit` is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from hcl_jax.records.meds import BIRTH, DEATH

VIEWS = ("codes", "measurements", "text")
ADMINISTRATIVE = (
    *("HOSPITAL_ADMISSION", "HOSPITAL_DISCHARGE", "HOSPITAL_ADMIT_SOURCE", "ICU_ADMISSION", "ICU_DISCHARGE", "UNIT_ADMIT_SOURCE"),
    *("INSURANCE", "LANGUAGE", "MARITAL_STATUS", "RACE"),
)
STATISTICS = ("last", "mean", "count", "present")
CARE_LIMITS = ("CARE_PLAN//Care Limitation", "CARE_PLAN//Critical Care Discharge/Transfer Planning", "CARE_PLAN//Prognosis")
"""Of eICU: what says within 24 hours what the staff expect. Legitimate, but report with and without."""
WORD = r"[a-z]{3,}"
LIMIT = 5.0


@dataclass(frozen=True)
class Inputs:
    """exclude: starts of codes that nothing may see. administrative: starts of codes beside the modalities. rarest: training rows
    in which a code, word or measurement must occur. width: axes of codes and of text, at most. lookback_days: how far back events
    count; all of them without it."""

    exclude: tuple[str, ...] = ()
    administrative: tuple[str, ...] = ADMINISTRATIVE
    rarest: int = 20
    width: int = 32
    lookback_days: float | None = None
    seed: int = 0


class Rows(NamedTuple):
    """What the rows of labels are predicted from, in their order."""

    views: dict[str, np.ndarray]
    """A matrix a modality; rows that lack it are NaN."""
    presence: np.ndarray
    """n × 3, the modalities of `VIEWS`."""
    demographics: np.ndarray
    """Age in years (the fit's mean where it is unknown), then counts of codes that are administrative or do not change."""


def known(events: pl.LazyFrame, labels: pl.DataFrame, inputs: Inputs = Inputs()) -> pl.LazyFrame:  # noqa: B008
    """Events of each row of labels up to its prediction time: `row` from 0, time, code, numeric_value, text_value.

    Births and deaths are left out, and what `exclude` names.
    """
    rows = labels.lazy().select("subject_id", "prediction_time").with_row_index("row")
    found = events.join(rows, on="subject_id").filter(pl.col("time") <= pl.col("prediction_time"))
    if inputs.lookback_days is not None:
        found = found.filter(pl.col("time") >= pl.col("prediction_time") - pl.duration(seconds=86400 * inputs.lookback_days))
    return found.filter(~_starts((BIRTH, DEATH, *inputs.exclude))).select("row", "time", "code", "numeric_value", "text_value")


@dataclass(frozen=True)
class Tokens:
    """Counts of codes or words, and their axes: TF-IDF with log counts, then the leading right singular vectors."""

    vocabulary: list[str]
    weights: Any = None
    axes: Any = None

    def scores(self, counts: Any) -> np.ndarray:
        """n × axes."""
        return self.axes.transform(self.weights.transform(counts)) if self.vocabulary else np.zeros((counts.shape[0], 0))


@dataclass(frozen=True)
class Modalities:
    """What `fit` keeps of its rows."""

    inputs: Inputs
    codes: Tokens
    text: Tokens
    measured: list[str]
    kept: np.ndarray = field(repr=False)
    """Of last, mean, count and present of `measured`, the columns that vary and differ."""
    means: np.ndarray = field(repr=False)
    scales: np.ndarray = field(repr=False)
    about: list[str]
    mean_age: float

    @property
    def columns(self) -> list[str]:
        """Names of the columns of measurements."""
        names = [f"{code} {statistic}" for statistic in STATISTICS for code in self.measured]
        return [names[k] for k in self.kept]

    def transform(self, events: pl.LazyFrame, labels: pl.DataFrame) -> Rows:
        """The rows of labels, each by its own events alone."""
        n, found = len(labels), known(events, labels, self.inputs)
        codes = _counts(_code_tokens(found, self.inputs), n, self.codes.vocabulary)
        text = _counts(_word_tokens(found), n, self.text.vocabulary)
        raw = _statistics(found, n, self.measured)
        values = np.clip(self._standardised(raw), -LIMIT, LIMIT)
        presence = np.stack(
            [np.diff(codes.indptr) > 0, np.any(np.isfinite(raw[:, : len(self.measured)]), axis=1), np.diff(text.indptr) > 0],
            axis=1,
        )
        filled = (self.codes.scores(codes), values, self.text.scores(text))
        views = {name: np.where(presence[:, [m]], filled[m], np.nan) for m, name in enumerate(VIEWS)}
        about = _counts(_about_tokens(events, labels, self.inputs), n, self.about).toarray()
        age = np.nan_to_num(_ages(events, labels), nan=self.mean_age)
        return Rows(views, presence, np.column_stack([age, about]))

    def single_columns(self, events: pl.LazyFrame, labels: pl.DataFrame) -> tuple[list[str], Any]:
        """Names and a sparse matrix, n × columns, of what rows are made of: counts of codes and words, measurements.

        A measurement is 0 where it lacks, its standardised value elsewhere.
        """
        from scipy.sparse import csc_matrix, hstack

        n, found = len(labels), known(events, labels, self.inputs)
        blocks = [
            _counts(_code_tokens(found, self.inputs), n, self.codes.vocabulary),
            _counts(_about_tokens(events, labels, self.inputs), n, self.about),
            _counts(_word_tokens(found), n, self.text.vocabulary),
            csc_matrix(self._standardised(_statistics(found, n, self.measured))),
        ]
        words = (f"word {word}" for word in self.text.vocabulary)
        return [*self.codes.vocabulary, *self.about, *words, *self.columns], hstack(blocks, format="csc")

    def _standardised(self, raw: np.ndarray) -> np.ndarray:
        return np.nan_to_num((raw[:, self.kept] - self.means) / self.scales)


def fit(events: pl.LazyFrame, labels: pl.DataFrame, inputs: Inputs = Inputs()) -> Modalities:  # noqa: B008
    """Vocabularies, weights, axes, means and scales of training rows of labels; their values are not looked at.

    Raises `ValueError` for no rows.
    """
    if not len(labels):
        raise ValueError("labels: hold no rows; expected the training rows of a task")
    n, found = len(labels), known(events, labels, inputs)
    measured = _vocabulary(found.filter(pl.col("numeric_value").is_finite()).select("row", token="code"), inputs.rarest)
    raw = _statistics(found, n, measured)
    means, scales = _moments(raw)
    kept = _distinct(raw, means, scales)
    ages = _ages(events, labels)
    return Modalities(
        inputs=inputs,
        codes=_fit_tokens(_code_tokens(found, inputs), n, inputs),
        text=_fit_tokens(_word_tokens(found), n, inputs),
        measured=measured,
        kept=kept,
        means=means[kept],
        scales=scales[kept],
        about=_vocabulary(_about_tokens(events, labels, inputs), inputs.rarest),
        mean_age=float(np.nanmean(ages)) if np.any(np.isfinite(ages)) else 0.0,
    )


def _code_tokens(found: pl.LazyFrame, inputs: Inputs) -> pl.LazyFrame:
    codes = found.filter(pl.col("numeric_value").is_null() & pl.col("text_value").is_null())
    return codes.filter(~_starts(inputs.administrative)).select("row", token="code")


def _word_tokens(found: pl.LazyFrame) -> pl.LazyFrame:
    words = pl.col("text_value").str.to_lowercase().str.extract_all(WORD)
    return found.filter(pl.col("text_value").is_not_null()).select("row", token=words).explode("token").drop_nulls("token")


def _about_tokens(events: pl.LazyFrame, labels: pl.DataFrame, inputs: Inputs) -> pl.LazyFrame:
    """Administrative codes up to the prediction time, and codes without a time."""
    rows = labels.lazy().select("subject_id").with_row_index("row")
    static = events.filter(pl.col("time").is_null() & ~_starts(inputs.exclude)).join(rows, on="subject_id")
    timed = known(events.filter(_starts(inputs.administrative)), labels, inputs)
    return pl.concat([static.select("row", token="code"), timed.select("row", token="code")])


def _starts(words: Sequence[str]) -> pl.Expr:
    """Whether a code starts with one of the words."""
    return pl.any_horizontal(pl.lit(False), *(pl.col("code").str.starts_with(word) for word in words))


def _vocabulary(tokens: pl.LazyFrame, rarest: int) -> list[str]:
    """Tokens of at least so many rows, in the order of the alphabet."""
    rows = tokens.unique().group_by("token").len().filter(pl.col("len") >= rarest)
    return rows.collect(engine="streaming")["token"].sort().to_list()


def _counts(tokens: pl.LazyFrame, n_rows: int, vocabulary: list[str]) -> Any:
    """Counts, n × vocabulary, sparse by row."""
    from scipy.sparse import csr_matrix

    columns = pl.LazyFrame({"token": pl.Series(vocabulary, dtype=pl.String), "column": np.arange(len(vocabulary))})
    table = tokens.join(columns, on="token").group_by("row", "column").len().collect(engine="streaming")
    where = (table["row"].to_numpy(), table["column"].to_numpy())
    return csr_matrix((table["len"].to_numpy().astype(float), where), shape=(n_rows, len(vocabulary)))


def _fit_tokens(tokens: pl.LazyFrame, n_rows: int, inputs: Inputs) -> Tokens:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    vocabulary = _vocabulary(tokens, inputs.rarest)
    width = min(inputs.width, len(vocabulary) - 1, n_rows - 1)
    if width < 1:
        return Tokens([])
    weights = TfidfTransformer(sublinear_tf=True)
    weighted = weights.fit_transform(_counts(tokens, n_rows, vocabulary))
    return Tokens(vocabulary, weights, TruncatedSVD(width, algorithm="arpack", random_state=inputs.seed).fit(weighted))


def _statistics(found: pl.LazyFrame, n_rows: int, measured: list[str]) -> np.ndarray:
    """n × (statistics · codes): NaN where last and mean lack; count is log(1 + number), present 0 or 1."""
    columns = pl.LazyFrame({"code": pl.Series(measured, dtype=pl.String), "column": np.arange(len(measured))})
    numbers = found.filter(pl.col("numeric_value").is_finite()).join(columns, on="code").group_by("row", "column")
    value = pl.col("numeric_value").cast(pl.Float64)
    table = numbers.agg(last=value.sort_by("time").last(), mean=value.mean(), count=pl.len().cast(pl.Float64).log1p()).collect()
    row, column = table["row"].to_numpy(), table["column"].to_numpy()
    blocks = []
    for statistic in STATISTICS:
        block = np.full((n_rows, len(measured)), np.nan if statistic in ("last", "mean") else 0.0)
        block[row, column] = 1.0 if statistic == "present" else table[statistic].to_numpy()
        blocks.append(block)
    return np.hstack(blocks)


def _moments(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of the cells that are there."""
    there = np.isfinite(raw)
    number = np.maximum(there.sum(axis=0), 1)
    means = np.where(there, raw, 0.0).sum(axis=0) / number
    return means, np.sqrt((np.where(there, raw - means, 0.0) ** 2).sum(axis=0) / number)


def _distinct(raw: np.ndarray, means: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Columns that vary, and of columns that are the same up to their scale and rounding the first."""
    varies = np.flatnonzero(scales > 1e-12)
    values = np.nan_to_num((raw[:, varies] - means[varies]) / scales[varies])
    _, first = np.unique(np.round(values, 9) + 0.0, axis=1, return_index=True)
    return varies[np.sort(first)]


def _ages(events: pl.LazyFrame, labels: pl.DataFrame) -> np.ndarray:
    births = events.filter(pl.col("code") == BIRTH).group_by("subject_id").agg(birth=pl.col("time").min())
    rows = labels.lazy().select("subject_id", "prediction_time").with_row_index("row").join(births, on="subject_id", how="left")
    years = (pl.col("prediction_time") - pl.col("birth")).dt.total_days() / 365.25
    return rows.sort("row").select(years.alias("age")).collect(engine="streaming")["age"].to_numpy()
