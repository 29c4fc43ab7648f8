"""What each structure is worth to a prediction: how much worse it gets without the structure's scores (the paper's Figure 9).

For any fit and any head that predicts from scores. Three ways to take a structure away: its scores are masked (0), imputed by
their mean, or permuted among the rows, which leaves their law as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import polars as pl
from jaxtyping import Array, Float

from hcl_jax.fitted import Fitted, active_structures, column_structures
from hcl_jax.structure import Structure, structure_name
from hcl_jax.views import as_key, check_count, check_options

Metric = Literal["r_squared", "accuracy"]
Head = Callable[[Float[Array, "n R"]], Array]
"""Predictions from scores: a number a row, or the most probable class."""


@dataclass(frozen=True)
class ImportanceConfig:
    """Options of `structure_importance`.

    how: what takes a structure away: "permute", "mask" or "impute".
    metric: what is lost: "r_squared" of a number, "accuracy" of classes.
    permutations: averaged over, where rows are permuted.
    bootstraps: samples of the rows that intervals are taken from.
    level: of the intervals.
    """

    how: Literal["permute", "mask", "impute"] = "permute"
    metric: Metric = "r_squared"
    permutations: int = 20
    bootstraps: int = 500
    level: float = 0.95

    def __post_init__(self) -> None:
        choices = {"how": ("permute", "mask", "impute"), "metric": ("r_squared", "accuracy")}
        check_options(self, choices=choices, least={"permutations": 1, "bootstraps": 2})
        if not 0 < self.level < 1:
            raise ValueError(f"level: is {self.level}; expected a number between 0 and 1")


def structure_importance(
    fitted: Fitted, views: Any, y: Any, predict: Head, config: ImportanceConfig = ImportanceConfig(), *, key: Any
) -> pl.DataFrame:
    """One row a structure, larger ones first:

    | column | meaning |
    |---|---|
    | `structure`, `n_columns` | its name, and how many scores it has |
    | `score` | the metric with all structures there |
    | `drop`, `drop_low`, `drop_high` | what is lost without it, negative where the prediction gets better; bootstrap interval |
    | `share`, `share_low`, `share_high` | the drop, 0 where it is negative, over the sum of all: the paper's, which hides noise |

    The rows should be ones that neither the fit nor the head has seen. Intervals are percentiles over bootstrap samples of the
    rows, the fit and the head as they are: they know nothing of another training sample. Raises `ValueError` that names the
    argument for responses that are not one a row, and a prediction of another shape.
    """
    return score_importance(fitted.transform(views), column_structures(fitted), y, predict, config, key=key)


def score_importance(
    scores: Float[Array, "n R"],
    by_column: tuple[Structure, ...],
    y: Any,
    predict: Head,
    config: ImportanceConfig = ImportanceConfig(),
    *,
    key: Any,
) -> pl.DataFrame:
    """The same for scores that are there, of columns that belong to these structures (() where they are unused)."""
    key = as_key(key, "for the permutations and the bootstrap")
    n = scores.shape[0]
    check_count(n, "views", 2)
    response = np.asarray(y)
    if response.shape != (n,):
        raise ValueError(f"y: has shape {response.shape}; expected ({n},), one value for each row")
    k_permute, k_bootstrap = jr.split(key)
    structures = list(active_structures(by_column))
    whole = _losses(predict(scores), response, config.metric)
    without = []
    for i, s in enumerate(structures):
        columns = np.array([column == s for column in by_column])
        versions = _taken_away(scores, columns, config, jr.fold_in(k_permute, i))
        without.append(np.mean([_losses(predict(version), response, config.metric) for version in versions], axis=0))
    spread = _spread(response, config.metric)
    counts = np.asarray(jr.randint(k_bootstrap, (config.bootstraps, n), 0, n))
    samples = [np.arange(n), *counts]
    score = np.array([_score(whole[rows], spread[rows], config.metric) for rows in samples])
    drops = score[:, None] - np.array(
        [[_score(losses[rows], spread[rows], config.metric) for losses in without] for rows in samples]
    )
    kept = np.maximum(drops, 0)
    total = kept.sum(axis=1, keepdims=True)
    shares = kept / np.where(total > 0, total, 1)
    return _table(structures, by_column, score[0], drops, shares, config.level)


def score_drops(
    scores: Float[Array, "n R"],
    by_column: tuple[Structure, ...],
    metric: Callable[[Float[Array, "n R"]], float],
    config: ImportanceConfig = ImportanceConfig(),
    *,
    key: Any,
) -> dict[Structure, float]:
    """By structure, larger ones first, what any metric of scores loses without it, on average over permutations: for metrics that
    are no mean over rows, such as a concordance. No intervals; `metric` of `config` counts for nothing."""
    whole, drops = metric(scores), {}
    for i, s in enumerate(active_structures(by_column)):
        columns = np.array([column == s for column in by_column])
        versions = _taken_away(scores, columns, config, jr.fold_in(as_key(key, "for the permutations"), i))
        drops[s] = whole - float(np.mean([metric(version) for version in versions]))
    return drops


def _table(
    structures: list[Structure],
    by_column: tuple[Structure, ...],
    score: float,
    drops: Float[np.ndarray, "samples S"],
    shares: Float[np.ndarray, "samples S"],
    level: float,
) -> pl.DataFrame:
    """The values of all rows stand first among the samples."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    intervals = {name: np.quantile(values[1:], ends, axis=0) for name, values in (("drop", drops), ("share", shares))}
    columns: dict[str, Any] = {
        "structure": [structure_name(s) for s in structures],
        "n_columns": [by_column.count(s) for s in structures],
        "score": np.full(len(structures), score),
    }
    for name, values in (("drop", drops), ("share", shares)):
        columns |= {name: values[0], f"{name}_low": intervals[name][0], f"{name}_high": intervals[name][1]}
    return pl.DataFrame(columns)


def _taken_away(scores: Array, columns: np.ndarray, config: ImportanceConfig, key: Array) -> list[Array]:
    """The scores without the structure, once for each permutation."""
    gone = jnp.asarray(columns)[None, :]
    if config.how == "mask":
        return [jnp.where(gone, 0, scores)]
    if config.how == "impute":
        return [jnp.where(gone, scores.mean(axis=0, keepdims=True), scores)]
    keys = jr.split(key, config.permutations)
    return [jnp.where(gone, scores[jr.permutation(k, scores.shape[0])], scores) for k in keys]


def _losses(predicted: Any, response: np.ndarray, metric: Metric) -> Float[np.ndarray, " n"]:
    """Of every row: the squared error, or whether the class is wrong."""
    values = np.asarray(predicted)
    if values.shape != response.shape:
        raise ValueError(f"predict: gives shape {values.shape}; expected {response.shape}, one prediction for each row")
    return (values - response) ** 2 if metric == "r_squared" else (values != response).astype(float)


def _spread(response: np.ndarray, metric: Metric) -> np.ndarray:
    return np.asarray(response, float) if metric == "r_squared" else np.zeros(len(response))


def _score(losses: np.ndarray, response: np.ndarray, metric: Metric) -> float:
    """R², or the share of right classes."""
    if metric == "accuracy":
        return float(1 - losses.mean())
    variance = response.var()
    return float(1 - losses.mean() / variance) if variance > 0 else 0.0
