"""From the arrays of an outcome to tidy rows, one a number."""

import numpy as np
import polars as pl

from hcl_jax.experiments.experiment import AnyCell
from hcl_jax.experiments.store import Part
from hcl_jax.structure import Structure, structure_name

RESULT_COLUMNS = {
    "replicate": pl.Int64,
    "method": pl.String,
    "metric": pl.String,
    "structure": pl.String,
    "modality": pl.Int64,
    "value": pl.Float64,
    "status": pl.Int64,
    "steps": pl.Int64,
}
"""The columns of every part after `study` and those of the cell."""
_TYPES = {str: pl.String, int: pl.Int64, float: pl.Float64}


def tidy_rows(
    study: str, cell: AnyCell, method: str, structures: tuple[Structure, ...], part: Part, outcome: dict[str, np.ndarray]
) -> pl.DataFrame:
    """The rows of one part. `outcome` holds, by metric and replicate, a scalar, one per structure, or structures × modalities."""
    names = [structure_name(s) for s in structures]
    status, steps = outcome["status"], outcome["steps"]
    metrics = {metric: np.asarray(values, float) for metric, values in outcome.items() if metric not in ("status", "steps")}
    per_metric = [_metric_rows(metric, values, names, part, status, steps) for metric, values in metrics.items()]
    constants = {"study": study, **cell.columns()}
    schema = {name: _TYPES[type(value)] for name, value in constants.items()} | RESULT_COLUMNS
    held = constants | {"method": method}
    table = pl.concat(per_metric).with_columns(**{name: pl.lit(value) for name, value in held.items()})
    return table.select(list(schema)).cast(pl.Schema(schema))


def _metric_rows(
    metric: str, values: np.ndarray, names: list[str], part: Part, status: np.ndarray, steps: np.ndarray
) -> pl.DataFrame:
    structures, modalities = _labels(values.shape[1:], names)
    count, width = len(part), len(structures)
    return pl.DataFrame(
        {
            "replicate": np.repeat(np.arange(part.first, part.last + 1), width),
            "metric": [metric] * (count * width),
            "structure": structures * count,
            "modality": modalities * count,
            "value": values.reshape(-1),
            "status": np.repeat(status, width),
            "steps": np.repeat(steps, width),
        }
    )


def _labels(shape: tuple[int, ...], names: list[str]) -> tuple[list[str], list[int]]:
    match shape:
        case ():
            return [""], [0]
        case (_,):
            return names, [0] * len(names)
        case _:
            n_modalities = shape[1]
            return [name for name in names for _ in range(n_modalities)], [*range(1, n_modalities + 1)] * len(names)
