"""Importance of structures on real data: what a class prediction loses without each structure's scores (the paper's Figure 9).

One split, 70 % for training: a representation is fitted to the training rows, a multinomial logistic regression to their scores;
on the other rows each structure is then masked, imputed by its mean, or permuted. Beside the raw drops with bootstrap intervals
stand the paper's clipped and normalised shares. The scores of the held-out rows are kept for maps of the latent space (S6.2).

    python simulations/importance.py --data digits                      # nonlinear HCL: minutes
    python simulations/importance.py --data digits --method hcl-vb      # a linear estimate: seconds
    python simulations/importance.py --data tcga --method hcl-copula
    python figures/importance.py results/importance                     # draws the figures
"""

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import polars as pl
from sklearn.model_selection import train_test_split

import real_prediction
from hcl_jax import ESTIMATORS
from hcl_jax.experiments import OutputError, configure
from hcl_jax.experiments.command_line import error_line, make_hierarchy, parse
from hcl_jax.experiments.store import write_bytes
from hcl_jax.fitted import Fitted, activity, column_structures, fit_estimator
from hcl_jax.importance import ImportanceConfig, structure_importance
from hcl_jax.networks import NETWORKS
from hcl_jax.prediction import softmax_regression
from hcl_jax.structure import structure_name

PROGRAM = "importance.py"
HOW = ("permute", "mask", "impute")


@dataclass(frozen=True)
class Study:
    """What each structure is worth to the prediction of a class, on real data."""

    data: Literal["tcga", "digits"] = "digits"
    """tcga: five omics of 347 breast tumours; digits: six views of 2,000 handwritten digits."""
    file: Path | None = None
    """The .npz file. Default: its usual place under HCL_DATA."""
    method: str = "hcl"
    """A network, or an estimator on standardised features with noise by feature where it knows it."""
    test_share: float = 0.3
    """Share of the rows that is held out."""
    seed: int = 0
    """Root of the split and of all random numbers."""
    output: Path = Path("results/importance")
    """Folder of the tables: DATA-METHOD-importance.parquet and DATA-METHOD-scores.parquet."""


def check(study: Study) -> None:
    """Raise `ValueError` that names the argument."""
    known = (*NETWORKS, *ESTIMATORS)
    if study.method not in known:
        raise ValueError(f"method: unknown {study.method!r}; expected one of {', '.join(known)}")
    if not 0 < study.test_share < 1:
        raise ValueError(f"test_share: is {study.test_share}; expected a share between 0 and 1")


def fit(study: Study, views: list[np.ndarray], key: jax.Array) -> Fitted:
    """The representation, of the structures that the study of accuracy uses."""
    known = real_prediction.DATA[study.data]
    hierarchy = make_hierarchy([view.shape[1] for view in views], 1, known.structures)
    if study.method in NETWORKS:
        return NETWORKS[study.method](views, hierarchy, key=key)
    options: dict[str, Any] = {"noise": "feature"} if study.method in ("hcl-ml", "hcl-vb") else {}
    return fit_estimator(views, hierarchy, study.method, **options)


def run(study: Study) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(importance: one row a structure and way, scores: one row a held-out sample)."""
    asked = real_prediction.Study(data=study.data, file=study.file, test_share=study.test_share)
    views, labels, names = real_prediction.read(asked)
    train, test = train_test_split(np.arange(len(labels)), test_size=study.test_share, stratify=labels, random_state=study.seed)
    k_fit, k_head, k_importance = jr.split(jr.key(study.seed), 3)
    fitted = fit(study, [view[train] for view in views], k_fit)
    scores = fitted.transform([view[train] for view in views])
    scale = jnp.where(scores.std(axis=0) > 0, scores.std(axis=0), jnp.inf)[None, :]
    head = softmax_regression(scores / scale, labels[train], len(names), key=k_head)
    held = [view[test] for view in views]
    predict = lambda scores: head.predict(scores / scale)
    tables = [
        structure_importance(
            fitted, held, labels[test], predict, ImportanceConfig(how=how, metric="accuracy"), key=k_importance
        ).with_columns(how=pl.lit(how))
        for how in HOW
    ]
    about = {"data": study.data, "method": study.method, "status": int(fitted.status), "test_rows": len(test)}
    importance = pl.concat(tables).with_columns(*(pl.lit(value).alias(name) for name, value in about.items()))
    return importance, score_table(fitted, fitted.transform(held), names[labels[test]])


def score_table(fitted: Fitted, scores: jax.Array, classes: np.ndarray) -> pl.DataFrame:
    """The first two principal components of every structure's scores, and the class."""
    columns: dict[str, Any] = {"class": [str(name) for name in classes]}
    by_column = column_structures(fitted)
    for s in activity(fitted):
        own = np.asarray(scores[:, np.array([column == s for column in by_column])])
        left, values, _ = np.linalg.svd(own - own.mean(axis=0), full_matrices=False)
        for i in range(min(2, own.shape[1])):
            columns[f"{structure_name(s)}.{i + 1}"] = left[:, i] * values[i]
    return pl.DataFrame(columns)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        study = parse(Study, sys.argv[1:] if arguments is None else list(arguments), Study(), PROGRAM, __doc__)
        check(study)
        configure("float64")
        importance, scores = run(study)
        for name, table in (("importance", importance), ("scores", scores)):
            path = study.output / f"{study.data}-{study.method}-{name}.parquet"
            write_bytes(path, parquet(table), study.output)
    except (ValueError, OutputError) as error:
        print(f"{PROGRAM}: error: {error_line(Study, error)}", file=sys.stderr)
        return 2
    shown = importance.filter(pl.col("how") == "permute").sort("drop", descending=True)
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=130, float_precision=4, tbl_hide_dataframe_shape=True):
        print(shown.select("structure", "n_columns", "score", "drop", "drop_low", "drop_high", "share"))
    return 0


def parquet(table: pl.DataFrame) -> bytes:
    """The table as the bytes of a parquet file."""
    held = io.BytesIO()
    table.write_parquet(held)
    return held.getvalue()


if __name__ == "__main__":
    sys.exit(main())
