"""Averages over replicates, and their ratio to the limit of the same draws: one definition for summaries, tables and figures.

An entry of a metric is a structure, or a structure and a modality; a metric without them has one. The *root mean square* of a
method is √(Σ_entries mean over replicates of value²): over replicates entry by entry, then the entries together. A block that is
held at zero adds nothing, and what leaks into it counts. The *ratio* divides a method's by the limit's, over the replicates that
both have; it is missing where the limit is 0, and where values are negative, which are no errors.
"""

import polars as pl

LIMITS_SHOWN = ("cramer-rao", "bayes")
"""The limits that others are divided by; a table holds one of them."""
AVERAGED = ("selected", "kept_rank", "block_kept_rank", "visible_structure")
"""Metrics that are no errors: counts, and shares of replicates. Within a replicate their entries are averaged."""


def entries_together(metric: str) -> str:
    """How the entries of a metric become one number of a replicate, in words; empty for a metric without entries.

    >>> entries_together("block_frobenius")
    'root of the sum of squares over blocks'
    """
    over = "blocks" if metric.startswith("block_") else "structures"
    if metric in AVERAGED:
        return f"average over {over}"
    return f"root of the sum of squares over {over}" if metric.startswith(("block_", "structure_")) else ""


def by_replicate(rows: pl.DataFrame, by: tuple[str, ...]) -> pl.DataFrame:
    """One row a replicate and method of each group `by`: its `value`, the entries together, and the sum of their `square`s.

    A replicate with an entry that is not finite has a value that is not.
    """
    value = pl.col("value")
    return rows.group_by(*by, "method", "replicate", maintain_order=True).agg(
        pl.when(pl.len() == 1)
        .then(value.first())
        .when(pl.col("metric").first().is_in(AVERAGED))
        .then(value.mean())
        .otherwise((value**2).sum().sqrt())
        .alias("value"),
        (value**2).sum().alias("square"),
        (value < 0).any().alias("negative"),
        pl.col("status").first(),
    )


def averages(replicates: pl.DataFrame, by: tuple[str, ...]) -> pl.DataFrame:
    """Of `by_replicate`, one row a method and group, over its finite replicates: `mean` and its standard error `sem`, `rms` and
    its standard error `rms_sem`."""
    value, square = (pl.col(name).filter(pl.col("value").is_finite()) for name in ("value", "square"))
    count, root = value.len().sqrt(), square.mean().sqrt()
    return replicates.group_by(*by, "method", maintain_order=True).agg(
        value.mean().alias("mean"),
        (value.std() / count).alias("sem"),
        root.alias("rms"),
        pl.when(root > 0).then(square.std() / (2 * root * count)).otherwise(0 * square.std()).alias("rms_sem"),
    )


def over_limit(replicates: pl.DataFrame, by: tuple[str, ...]) -> pl.DataFrame:
    """Of `by_replicate`, one row a method and group that holds a limit: the `limit`'s root mean square over the replicates that
    are finite in both, the `ratio` R of the method's to it, and its paired standard error `ratio_sem`.

    R² = mean(e²)/mean(l²): a replicate moves R by R(e²/mean(e²) − l²/mean(l²))/2.
    """
    finite = replicates.filter(pl.col("value").is_finite())
    keys = [*by, "replicate"]
    limits = finite.filter(pl.col("method").is_in(LIMITS_SHOWN)).select(
        *keys, pl.col("square").alias("limit_square"), pl.col("negative").alias("limit_negative")
    )
    paired = finite.join(limits, on=keys, maintain_order="left")
    square, limit = pl.col("square"), pl.col("limit_square")
    ratio = (square.mean() / limit.mean()).sqrt()
    moved = (pl.when(square.mean() > 0).then(square / square.mean()).otherwise(0) - limit / limit.mean()) * ratio / 2
    told = (limit.mean() > 0) & ~(pl.col("negative") | pl.col("limit_negative")).any()
    return paired.group_by(*by, "method", maintain_order=True).agg(
        limit.mean().sqrt().alias("limit"),
        pl.when(told).then(ratio).alias("ratio"),
        pl.when(told).then(moved.std() / pl.len().sqrt()).alias("ratio_sem"),
    )
