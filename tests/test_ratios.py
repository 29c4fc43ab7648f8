"""Ratios to the limit compare like with like: root mean squares over the same replicates, entry by entry, then together."""

import numpy as np
import polars as pl
import pytest
from helpers import ROOT

from figures.means import mean_table
from hcl_jax.experiments.ratios import LIMITS_SHOWN, averages, by_replicate, over_limit

TABLES = sorted((ROOT / "docs/tables").glob("*.csv"))
BLOCKS = [("12", 1), ("12", 2), ("1", 1), ("1", 2)]
ZERO = np.array([False, False, False, True])  # the block of structure 1 in modality 2


def rows(values, entries=(("", 0),), metric="gram_frobenius"):
    """Tidy rows of {method: replicates × entries}, NaN included."""
    frames = [
        pl.DataFrame(
            {
                "n": 10,
                "method": method,
                "metric": metric,
                "structure": [s for s, _ in entries] * len(array),
                "modality": [m for _, m in entries] * len(array),
                "replicate": np.repeat(np.arange(len(array)), len(entries)),
                "value": np.ravel(array).astype(float),
                "status": 0,
            }
        )
        for method, array in values.items()
    ]
    return pl.concat(frames)


def ratios(table):
    """By method."""
    return {row["method"]: row for row in over_limit(by_replicate(table, ("n",)), ("n",)).iter_rows(named=True)}


def lognormal(rng, spread, *shape):
    return np.exp(spread * rng.standard_normal(shape))


def study_table(limit):
    """Errors of a method and a limit with zero blocks, a limit of 0, a signed metric, and entries that the limit lacks."""
    rng = np.random.default_rng(0)
    values = lambda *shape: {"m": 2 * lognormal(rng, 0.5, 6, *shape), limit: lognormal(rng, 0.5, 6, *shape)}
    blocks = {name: np.where(ZERO, 0, array) for name, array in values(4).items()}
    tables = [
        rows(values(1)),
        rows(values(1), metric="rmse"),
        rows(values(2), [("12", 0), ("1", 0)], "structure_gram_frobenius"),
        rows(blocks, BLOCKS, "block_frobenius"),
        rows({"m": values(1)["m"], limit: np.zeros((6, 1))}, metric="bayes_excess"),
        rows({"m": rng.standard_normal((6, 1)), limit: rng.standard_normal((6, 1))}, metric="excess_risk"),
        rows({"m": np.ones((6, 2))}, [("12", 0), ("1", 0)], "kept_rank"),
    ]
    settings = {"study": "s", "cell": "c", "dims": "5x4", "structures": "12,1", "ranks": "1,1", "noise_variance": 1.0}
    return pl.concat(tables).with_columns(**{name: pl.lit(value) for name, value in settings.items()})


@pytest.mark.parametrize("limit", LIMITS_SHOWN)
def test_the_limit_over_itself_is_one_for_every_metric(limit):
    means = mean_table(study_table(limit))
    own = means.filter(pl.col("method") == limit)
    told = own.filter(~pl.col("metric").is_in(["bayes_excess", "excess_risk"]))
    assert told["ratio"].to_list() == [1.0] * 4
    assert told["ratio_sem"].to_list() == [0.0] * 4
    assert told["rms"].to_list() == told["limit"].to_list()
    others = means.filter(pl.col("metric").is_in(["bayes_excess", "excess_risk", "kept_rank"]))
    assert others["ratio"].null_count() == len(others)
    assert_no_infinity(means)


def assert_no_infinity(table):
    numbers = table.select(pl.selectors.float())
    assert numbers.select(pl.all().is_nan().any() | pl.all().is_infinite().any()).row(0) == (False,) * numbers.width


def test_the_ratio_is_of_root_mean_squares_entry_by_entry_over_the_replicates_of_both():
    rng = np.random.default_rng(1)
    error, limit = (np.where(ZERO, 0, lognormal(rng, 0.5, 7, 4)) for _ in range(2))
    error[2, 1], limit[5, 0] = np.nan, np.nan
    both = [0, 1, 3, 4, 6]
    root = lambda array: np.sqrt(np.sum(np.mean(array[both] ** 2, axis=0)))
    row = ratios(rows({"m": error, "cramer-rao": limit}, BLOCKS, "block_frobenius"))["m"]
    np.testing.assert_allclose([row["limit"], row["ratio"]], [root(limit), root(error) / root(limit)])


def test_zero_blocks_and_entries_that_the_limit_lacks_do_not_distort_and_leaks_count():
    rng = np.random.default_rng(2)
    limit = np.where(ZERO, 0, lognormal(rng, 0.3, 5, 4))
    extra = [*BLOCKS, ("2", 1), ("2", 2)]
    table = pl.concat(
        [
            rows({"cramer-rao": limit, "twice": 2 * limit}, BLOCKS, "block_frobenius"),
            rows({"extra": np.concatenate([limit, np.zeros((5, 2))], axis=1)}, extra, "block_frobenius"),
            rows({"leaks": np.where(ZERO, 1, limit)}, BLOCKS, "block_frobenius"),
        ]
    )
    found = {name: row["ratio"] for name, row in ratios(table).items()}
    assert found["twice"] == pytest.approx(2)
    assert found["extra"] == pytest.approx(1)
    assert found["leaks"] == pytest.approx(np.sqrt(1 + 1 / np.mean(np.sum(limit**2, axis=1))))


def test_a_metric_by_structure_is_one_number_a_replicate():
    values = np.array([[3.0, 4.0], [6.0, 8.0]])
    entries = [("12", 0), ("1", 0)]
    means = {
        metric: averages(by_replicate(rows({"m": values}, entries, metric), ("n",)), ("n",)).row(0, named=True)
        for metric in ("structure_beta_error", "selected")
    }
    assert means["structure_beta_error"]["mean"] == 7.5
    assert means["structure_beta_error"]["rms"] == pytest.approx(np.sqrt(62.5))
    assert means["selected"]["mean"] == (3.5 + 7) / 2


def test_standard_errors_are_the_spread_over_studies_and_that_of_the_ratio_is_paired():
    rng = np.random.default_rng(3)
    found = []
    for _ in range(400):
        limit = lognormal(rng, 0.2, 50, 1)
        error = 1.1 * limit * lognormal(rng, 0.01, 50, 1)
        table = rows({"m": error, "cramer-rao": limit})
        ratio, mean = ratios(table)["m"], averages(by_replicate(table, ("n",)), ("n",)).row(0, named=True)
        found.append([ratio["ratio"], mean["rms"], ratio["ratio_sem"], mean["rms_sem"]])
    spread, told = np.std(found, axis=0)[:2], np.mean(found, axis=0)[2:]
    np.testing.assert_allclose(spread, told, rtol=0.15)  # four standard errors of a standard deviation
    assert told[0] < 0.005  # unpaired it would be 0.04


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_of_the_documentation_hold_a_limit_that_is_one_times_itself(path):
    table = pl.read_csv(path, infer_schema_length=None)
    assert_no_infinity(table)
    own = table.filter(pl.col("method").is_in(LIMITS_SHOWN))
    if len(own):  # a table that holds a limit holds ratios to it
        assert own["ratio"].drop_nulls().unique().to_list() == [1.0]
