"""Encoders that start from given weights, and few labelled rows: FactorCL from there, beside fine-tuning.

A stand-in for the setting of IRFL in Liang et al. 2023 (Table 3), whose encoders are CLIP's: encoders are trained by SimCLR on
many rows without labels, and then see LABELLED rows. Accuracy on other rows, of a linear probe that is fitted to the labelled
ones.

| name | what is done |
|---|---|
| given | nothing: the given encoders |
| fine-tuning | they and a head go on by the cross-entropy of the labels |
| simclr | they go on by SimCLR on the labelled rows |
| factorcl-sup, factorcl-ssl | they go on by FactorCL, with the labels or without |
| factorcl-sup, new | FactorCL from random encoders |

    python simulations/continued.py                  # ten minutes
    python simulations/continued.py --labelled 500 --replicates 2 --share 1
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import polars as pl
from tqdm import tqdm

from hcl_jax import Hierarchy
from hcl_jax.experiments import configure
from hcl_jax.experiments.command_line import check_list, error_line, parse
from hcl_jax.experiments.factorcl import DrawSpec, FactorclCell, codes_of, contrast_config, draw
from hcl_jax.experiments.probes import accuracy
from hcl_jax.networks import NETWORKS, NetworkFit, simclr
from hcl_jax.networks.network import Method, fit_network
from hcl_jax.networks.training import Batch

PROGRAM = "continued.py"
H = Hierarchy.shared_and_private((50, 50), 10, 10)
NOISE_VARIANCE = 0.25
STARTS = {"factorcl-sup": True, "factorcl-ssl": True, "simclr": True, "factorcl-sup, new": False}
"""Whether training starts from the given encoders."""


@dataclass(frozen=True)
class Study:
    """Accuracy from few labels, with encoders that were trained without."""

    n: int = 12000
    """Rows without labels, from which the given encoders are."""
    labelled: int = 1000
    """Rows with labels."""
    share: tuple[float, ...] = (0.0, 0.5, 1.0)
    """Shares of the label that are of a single view."""
    replicates: int = 5
    """Independent draws."""
    steps: int = 1000
    """Steps on the labelled rows, at most."""
    seed: int = 0
    """Root of all random numbers."""


def no_loss(network: Any, batch: Batch, key: jax.Array, config: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Nothing but the task's."""
    return jnp.zeros((), batch.views[0].dtype), {}


FINE_TUNING = Method("fine-tuning", simclr.SimclrConfig, simclr.build, no_loss, simclr.membership)


def replicate(study: Study, share: float, number: int) -> dict[str, float]:
    """Accuracy by name."""
    cell = FactorclCell(H, study.n + study.labelled, NOISE_VARIANCE, share=share)
    weights = jnp.asarray(cell.weights)
    shared = np.uint32(study.seed), np.uint32(round(1000 * share)), jnp.asarray(cell.noise_variance), weights
    rows = jax.jit(draw, static_argnums=0)(DrawSpec(H, "float64", cell.n, cell.design), shared, jnp.uint32(number))
    views = [rows.x[:, H.rows(m)] for m in H.modalities]
    first, few = ([view[part] for view in views] for part in (slice(study.n), slice(study.n, cell.n)))
    labels, key = rows.y[study.n : cell.n], jr.wrap_key_data(rows.key)
    given = NETWORKS["simclr"](first, H, config=contrast_config("simclr", 2), key=key)

    def of(fitted: Any) -> float:
        codes, _ = codes_of(fitted, [view[study.n :] for view in views])
        return float(accuracy(codes, rows.y[study.n :], study.labelled))

    def go_on(method: str, start: Any) -> NetworkFit:
        config = contrast_config(method, 2, study.steps)
        y = {"y": labels} if method == "factorcl-sup" else {}
        fitted: Any = NETWORKS[method.removesuffix("-sup").removesuffix("-ssl")](
            few, H, config=config, key=key, backbones=start, **y
        )
        return fitted

    tuning = dataclasses.replace(contrast_config("simclr", 2, study.steps), task_weight=1.0)
    tuned = fit_network(FINE_TUNING, few, H, tuning, y=labels, key=key, backbones=given.network.backbones)
    found = {"given": of(given), "fine-tuning": of(tuned)}
    for name, starts in STARTS.items():
        found[name] = of(go_on(name.partition(",")[0], given.network.backbones if starts else None))
    return found


def check(study: Study) -> None:
    """Raise `ValueError` that names the argument."""
    check_list("share", study.share)
    for name, least in (("n", 256), ("labelled", 256), ("replicates", 1), ("steps", 1)):
        if getattr(study, name) < least:
            raise ValueError(f"{name}: is {getattr(study, name)}; expected at least {least}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        study = parse(Study, sys.argv[1:] if arguments is None else list(arguments), Study(), PROGRAM, __doc__)
        check(study)
        for share in study.share:
            FactorclCell(H, study.n, NOISE_VARIANCE, share=share)
    except ValueError as error:
        print(f"{PROGRAM}: error: {error_line(Study, error)}", file=sys.stderr)
        return 2
    configure("float64")
    rows = [
        {"share": share, "method": name, "accuracy": value}
        for share in study.share
        for number in tqdm(range(study.replicates), desc=f"share {share:g}", disable=None)
        for name, value in replicate(study, share, number).items()
    ]
    mean, sem = pl.col("accuracy").mean(), pl.col("accuracy").std() / pl.len().sqrt()
    table = pl.DataFrame(rows).group_by("share", "method", maintain_order=True).agg(mean, sem.alias("sem"))
    with pl.Config(tbl_rows=-1, tbl_hide_column_data_types=True, tbl_hide_dataframe_shape=True, float_precision=3):
        print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
