"""Health records: what representations of codes, measurements and notes predict, beside the features themselves.

The paper's Section 5 on data that everyone can have. Its own cohort is credentialed; docs/health_records.md says what can be
reproduced. Raw tables become MEDS events, events the labels of a task and three modalities at its prediction time, all of it
fitted on training rows; patients (or hospitals) of the test rows are in no training row. Every method gets the same
modalities, ranks and heads: logistic regression (ridge for numbers), its penalty chosen by cross-validation in the training
rows, on scores and demographics. Thresholds of ACC and F1 are chosen on the tuning rows.

    python simulations/health_records.py --data eicu --folder ../shared/data/eicu_demo/csv --preset tiny     # two splits, minutes
    python simulations/health_records.py --data eicu --folder ../shared/data/eicu_demo/csv                   # twenty splits
    python simulations/health_records.py --data meds --folder MY_MEDS_FOLDER --tasks mortality-1y            # any MEDS folder
    python simulations/health_records.py --data eicu --folder ../shared/data/eicu_demo/csv --dry-run         # cohorts, no fits

Splits that are in the output folder are not computed again.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax.random as jr
import numpy as np
import polars as pl
import tyro
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score
from tqdm import tqdm

import hcl_jax
from hcl_jax.baselines import SUPERVISED
from hcl_jax.estimators import BY_PATTERN
from hcl_jax.evaluation import corrected_mean
from hcl_jax.experiments import configure
from hcl_jax.experiments.command_line import error_line, parse, peek
from hcl_jax.fitting import METHOD_NAMES
from hcl_jax.heads import fit_head
from hcl_jax.outcomes import Outcome
from hcl_jax.records import (
    HOSPITAL_TASKS,
    ICU_TASKS,
    Task,
    extract_eicu,
    extract_mimic_iv,
    label,
    read_groups,
    read_meds,
    split,
)
from hcl_jax.records import fit as fit_modalities
from hcl_jax.records.modalities import VIEWS, Modalities
from hcl_jax.records.splits import PARTS
from hcl_jax.structure import CONVERGED
from hcl_jax.views import check_count

PROGRAM = "health_records.py"
TEST_SHARE = 0.2 / 0.9  # of training and test rows: a tenth is for thresholds
RAW, PCA, BOOSTING, DEMOGRAPHICS = "raw", "pca", "boosting", "demographics"
BESIDE = (RAW, PCA, BOOSTING, DEMOGRAPHICS)
EXTRACT: dict[str, Callable[[Path, Path], None]] = {"eicu": extract_eicu, "mimic-iv": extract_mimic_iv}


@dataclass(frozen=True)
class Study:
    """Every option is described below; --preset sets the defaults."""

    folder: Path
    """Raw tables of eICU (.csv.gz) or of MIMIC-IV, or a MEDS folder."""
    data: Literal["eicu", "mimic-iv", "meds"] = "eicu"
    """What the folder holds. eICU and MIMIC-IV demos: PhysioNet, Open Database License 1.0."""
    preset: Literal["tiny", "default"] = "default"
    """Two splits and three methods, or twenty splits and all of them."""
    tasks: tuple[str, ...] = ("mortality-hospital",)
    """Names of tasks; of eICU those 24 hours after the admission to a unit."""
    methods: tuple[str, ...] = ("hcl-vb", "hcl-ml", "jive", "slide", "pca", "raw", "boosting", "demographics")
    """Methods of `hcl_jax.fit`; principal components of all modalities (`pca`), every code, word and measurement (`raw`), boosted
    trees on them (`boosting`), and demographics alone."""
    rank: int = 5
    """Of each of the seven structures; as many principal components as the structures have columns."""
    splits: int = 20
    """Random ones, 70 % training, 10 % tuning and 20 % test rows."""
    by: tuple[str, ...] = ("patient",)
    """What no two parts share: patient, or patient and hospital."""
    seed: int = 0
    """The first split's; the others count on from it."""
    output: Path = Path("results/health-records")
    """Folder of the events and of the table."""
    dry_run: bool = False
    """Print how many rows each filter of a cohort leaves, and stop."""


PRESETS: dict[str | None, dict[str, Any]] = {
    "tiny": {"preset": "tiny", "methods": ("hcl-vb", "pca", "raw"), "splits": 2, "output": Path("results/health-records-tiny")},
}


def tasks_of(study: Study) -> dict[str, Task]:
    """The tasks that the data can have, by name."""
    return {task.name: task for task in (ICU_TASKS if study.data == "eicu" else HOSPITAL_TASKS)}


def check(study: Study) -> None:
    """Raise `ValueError`, naming the argument, for what cannot be read or fitted."""
    if not study.folder.is_dir():
        known = "eICU's demo: physionet.org/content/eicu-crd-demo; MIMIC-IV's: physionet.org/content/mimic-iv-demo"
        raise ValueError(f"folder: {study.folder} does not exist; expected the tables ({known})")
    for name, values, allowed in (
        ("tasks", study.tasks, tuple(tasks_of(study))),
        ("methods", study.methods, (*METHOD_NAMES, *BESIDE)),
    ):
        if unknown := [value for value in values if value not in allowed]:
            raise ValueError(f"{name}: holds {unknown[0]!r}; expected some of {', '.join(allowed)}")
    check_count(study.splits, "splits", 1)
    check_count(study.rank, "rank", 1)


@dataclass(frozen=True)
class Part:
    """The rows of one part of a split."""

    views: dict[str, np.ndarray]
    """Rows that lack a modality are NaN."""
    beside: np.ndarray
    """Demographics, in units of the training rows."""
    y: np.ndarray
    columns: np.ndarray
    """All codes and words, as log counts, and measurements, one column each, before any axes were taken: what `raw` sees."""

    @property
    def features(self) -> np.ndarray:
        """All modalities side by side, at their training means where they lack."""
        return np.nan_to_num(np.concatenate(list(self.views.values()), axis=1))


def parts_of(events: pl.LazyFrame, labels: pl.DataFrame, parts: np.ndarray) -> dict[str, Part]:
    """The rows by part, in units of the training rows' standard deviations; columns that are constant there are left out."""
    value = "boolean_value" if "boolean_value" in labels.columns else "float_value"
    y = labels[value].to_numpy().astype(float)
    if value == "float_value":
        y = np.log1p(np.maximum(y, 0))
    fitted = fit_modalities(events, labels.filter(pl.Series(parts == PARTS[0])))
    seen = {part: labels.filter(pl.Series(parts == part)) for part in PARTS}
    rows = {part: fitted.transform(events, seen[part]) for part in PARTS}
    single = {part: _single(fitted, events, seen[part]) for part in PARTS}
    scale = {name: _scale(rows[PARTS[0]].views[name]) for name in VIEWS}
    beside, columns = _scale(rows[PARTS[0]].demographics), _scale(single[PARTS[0]])
    return {
        part: Part(
            {name: _scaled(rows[part].views[name], scale[name]) for name in VIEWS},
            _scaled(rows[part].demographics, beside),
            y[parts == part],
            _scaled(single[part], columns),
        )
        for part in PARTS
    }


def _single(fitted: Modalities, events: pl.LazyFrame, labels: pl.DataFrame) -> np.ndarray:
    """Log counts of codes and words, and measurements."""
    _, columns = fitted.single_columns(events, labels)
    held, n_measured = columns.toarray(), len(fitted.columns)
    held[:, : held.shape[1] - n_measured] = np.log1p(held[:, : held.shape[1] - n_measured])
    return held


def _scale(X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.nanmean(X, axis=0), np.nanstd(X, axis=0)


def _scaled(X: np.ndarray, scale: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    mean, deviation = scale
    return (X - mean)[:, deviation > 0] / deviation[deviation > 0]


def inputs_of(method: str, parts: dict[str, Part], study: Study, seed: int) -> tuple[dict[str, np.ndarray], int]:
    """(what the head of a method sees of each part: its scores of the modalities, and demographics; the status of the fit)."""
    status = CONVERGED
    if method == DEMOGRAPHICS:
        return {name: part.beside for name, part in parts.items()}, status
    if method in (RAW, BOOSTING):
        scores = {name: part.columns for name, part in parts.items()}
    elif method == PCA:
        _, _, axes = np.linalg.svd(parts[PARTS[0]].features, full_matrices=False)
        scores = {name: part.features @ axes[: 7 * study.rank].T for name, part in parts.items()}
    else:
        train, complete = parts[PARTS[0]], method not in BY_PATTERN
        views = {name: _views(part, complete) for name, part in parts.items()}
        # structures and ranks are the same for all methods, so that they differ in how they fit them
        found = hcl_jax.fit(views[PARTS[0]], y=_response(method, train), ranks=study.rank, method=method, seed=seed)
        columns, status = list(found.score_names), int(found.fitted.status)
        scores = {name: found.transform(held).select(columns).to_numpy() for name, held in views.items()}
    return {name: np.column_stack([scores[name], part.beside]) for name, part in parts.items()}, status


def _views(part: Part, complete: bool) -> dict[str, np.ndarray]:
    """Methods that know no missing views see them at the training means."""
    return {name: np.nan_to_num(X) if complete else X for name, X in part.views.items()}


def _response(method: str, part: Part) -> np.ndarray | None:
    return part.y if method in SUPERVISED else None


def boosted(inputs: dict[str, np.ndarray], y: np.ndarray, classes: bool, seed: int) -> dict[str, np.ndarray]:
    """Gradient boosting, stopped early on a tenth of the training rows."""
    options = {"early_stopping": True, "random_state": seed, "learning_rate": 0.05, "max_leaf_nodes": 8}
    if classes:
        model = HistGradientBoostingClassifier(**options).fit(inputs[PARTS[0]], y)
        return {name: model.predict_proba(X)[:, 1] for name, X in inputs.items()}
    model = HistGradientBoostingRegressor(**options).fit(inputs[PARTS[0]], y)
    return {name: model.predict(X) for name, X in inputs.items()}


def predicted(method: str, parts: dict[str, Part], classes: bool, study: Study, seed: int) -> tuple[dict[str, np.ndarray], int]:
    """(by part the probability of the positive class, or the number that is expected; the status of the fit)."""
    (inputs, status), y = inputs_of(method, parts, study, seed), parts[PARTS[0]].y
    if method == BOOSTING:
        return boosted(inputs, y, classes, seed), status
    outcome = Outcome(y, np.ones(len(y), bool), (0, 1) if classes else None)
    head = fit_head(inputs[PARTS[0]], outcome, jr.key(seed))
    return {name: head.probabilities(X)[:, 1] if classes else head.outputs(X)[:, 0] for name, X in inputs.items()}, status


def class_metrics(p: np.ndarray, y: np.ndarray, tuning_p: np.ndarray, tuning_y: np.ndarray) -> dict[str, float]:
    """Of test rows; ACC and F1 at the threshold that is best for F1 on the tuning rows."""
    thresholds = np.unique(tuning_p)
    threshold = max(thresholds, key=lambda t: f1_score(tuning_y, tuning_p >= t, zero_division=0))
    called = p >= threshold
    return {
        "auc": roc_auc_score(y, p),
        "auprc": average_precision_score(y, p),
        "brier": brier_score_loss(y, p),
        "accuracy": float(np.mean(called == y)),
        "f1": f1_score(y, called, zero_division=0),
    }


def number_metrics(predicted: np.ndarray, y: np.ndarray, mean: float) -> dict[str, float]:
    """On the scale of log(1 + days), about the training mean; MAE and RMSE in days."""
    days, truth = np.expm1(predicted), np.expm1(y)
    return {
        "r_squared": float(1 - np.sum((y - predicted) ** 2) / np.sum((y - mean) ** 2)),
        "mae": float(np.mean(np.abs(days - truth))),
        "rmse": float(np.sqrt(np.mean((days - truth) ** 2))),
    }


def split_rows(
    events: pl.LazyFrame, groups: pl.DataFrame, labels: pl.DataFrame, methods: list[str], study: Study, seed: int
) -> list[dict[str, Any]]:
    """One row a method and metric."""
    parts = parts_of(events, labels, split(labels, groups, study.by, seed=seed))
    classes, found = "boolean_value" in labels.columns, []
    for method in methods:
        told, status = predicted(method, parts, classes, study, seed)
        tuning, test = parts[PARTS[1]], parts[PARTS[2]]
        metrics = (
            class_metrics(told[PARTS[2]], test.y, told[PARTS[1]], tuning.y)
            if classes
            else number_metrics(told[PARTS[2]], test.y, float(parts[PARTS[0]].y.mean()))
        )
        about = {"split": seed, "method": method, "by": "+".join(study.by), "rank": study.rank, "status": status}
        found += [about | {"metric": name, "value": float(value)} for name, value in metrics.items()]
    return found


def events_of(study: Study) -> Path:
    """The MEDS folder, extracted into the output folder if the data are raw tables. Raises `ValueError` for an output folder that
    holds other data."""
    about, source = study.output / "source.json", {"data": study.data, "folder": str(study.folder.resolve())}
    if about.is_file() and (held := json.loads(about.read_text())) != source:
        raise ValueError(f"output: {study.output} holds {held['data']} of {held['folder']}; expected another folder")
    study.output.mkdir(parents=True, exist_ok=True)
    about.write_text(json.dumps(source))
    if study.data not in EXTRACT:
        return study.folder
    folder = study.output / "meds"
    if not folder.is_dir():
        EXTRACT[study.data](study.folder, folder)
    return folder


def run(study: Study) -> pl.DataFrame:
    """The table of the output folder: the splits that are asked for, computed where they are not there."""
    folder = events_of(study)
    events, groups, path = read_meds(folder), read_groups(folder), study.output / "scores.parquet"
    labels = {name: label(events, tasks_of(study)[name]) for name in study.tasks}
    if study.dry_run:
        return pl.concat([labels[name].flow.select(pl.lit(name).alias("task"), pl.all()) for name in study.tasks])
    same = (pl.col("by") == "+".join(study.by)) & (pl.col("rank") == study.rank)
    table = pl.read_parquet(path) if path.is_file() else None
    seeds = range(study.seed, study.seed + study.splits)
    for name, seed in tqdm([(name, seed) for name in study.tasks for seed in seeds], unit="split", disable=None):
        mine = same & (pl.col("task") == name) & (pl.col("split") == seed)
        there = set() if table is None else set(table.filter(mine)["method"])
        if methods := [method for method in study.methods if method not in there]:
            rows = split_rows(events, groups, labels[name].table, methods, study, seed)
            found = pl.DataFrame(rows).select(pl.lit(name).alias("task"), pl.all())
            table = found if table is None else pl.concat([table, found])
            part = path.with_suffix(".part")
            table.write_parquet(part)
            part.replace(path)
    assert table is not None, "a study has a split"
    asked = same & pl.col("task").is_in(study.tasks) & pl.col("method").is_in(study.methods)
    return table.filter(asked & pl.col("split").is_in(list(seeds)))


def summary(table: pl.DataFrame) -> pl.DataFrame:
    """Means over splits with standard errors corrected for rows that splits share, the number of fits that did not converge, and
    differences to all features, paired."""
    rows = []
    for (task, method, metric), group in table.group_by("task", "method", "metric", maintain_order=True):
        values = group.sort("split")["value"].to_numpy()
        mean, error = corrected_mean(values, TEST_SHARE)
        row = {"task": task, "metric": metric, "method": method, "mean": mean, "standard_error": error, "splits": len(values)}
        row["not_converged"] = group.filter(pl.col("status") != CONVERGED).height
        beside = table.filter((pl.col("task") == task) & (pl.col("method") == RAW) & (pl.col("metric") == metric)).sort("split")
        if len(beside) == len(values):
            row["above_raw"], row["difference_error"] = corrected_mean(values - beside["value"].to_numpy(), TEST_SHARE)
        rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None).sort("task", "metric", maintain_order=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 2, after one line that names the argument, on bad input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        default = Study(folder=tyro.MISSING, **PRESETS.get(peek(arguments, "preset")["preset"], {}))
        study = parse(Study, arguments, default, PROGRAM, __doc__)
        check(study)
        configure("float64", devices=1)
        table = run(study)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: error: {error_line(Study, error)}", file=sys.stderr)
        return 2
    with pl.Config(
        tbl_rows=-1, tbl_cols=-1, tbl_width_chars=160, fmt_str_lengths=60, float_precision=3, tbl_hide_dataframe_shape=True
    ):
        print(table if study.dry_run else summary(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
