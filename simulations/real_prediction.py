"""Real data: how well do representations of all views predict a class, and which structures carry the signal?

Repeated stratified splits, 70 % for training. Everything is fitted to the training part only: means and scales, representations
(all of the same total dimension), and a multinomial logistic regression on their standardised scores, its penalty chosen by
cross-validation. Representations that see the labels (sJIVE, MMFL) are fitted anew without each of its folds. Controls:
the same regression on the principal components of all views, and on the features themselves.

    python simulations/real_prediction.py --data tcga --splits 20       # five omics of breast tumours -> PAM50 subtype
    python simulations/real_prediction.py --data digits --splits 20     # six views of handwritten digits -> digit
    python simulations/real_prediction.py --data digits --methods hcl-vb pca raw --splits 5
    python simulations/real_prediction.py --data digits --methods factorcl-sup factorcl-ssl simclr supcon untrained raw --splits 3

What OUTPUT holds is not computed again: more splits or methods add to it. The files are looked for under HCL_DATA (default
../shared/data), or given by --file. HCL uses posterior-mean scores; +group is the regression with the group penalty, whose
coefficients say which structures carry the signal. JIVE-type methods, which have no partially shared parts, spend the same total
dimension on joint and individual ones. HNN is not among the default methods: a step of it takes a singular value decomposition
for every subset of the views.
"""

import dataclasses
import io
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import polars as pl
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import StratifiedShuffleSplit
from tqdm import tqdm

import hcl_jax
from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance
from hcl_jax.baselines import BASELINES, SUPERVISED, ajive, jive, sjive
from hcl_jax.compiled import compiler_options
from hcl_jax.evaluation import corrected_mean
from hcl_jax.experiments import OutputError, configure
from hcl_jax.experiments.command_line import check_list, error_line, make_hierarchy, parse
from hcl_jax.experiments.factorcl import UNTRAINED, VARIANTS, contrast_config
from hcl_jax.experiments.methods import check_methods, estimator, is_estimator
from hcl_jax.experiments.store import write_bytes
from hcl_jax.networks import NETWORKS
from hcl_jax.prediction import Classifier, fold_of_rows, posterior_mean_scores, softmax_regression
from hcl_jax.structure import NON_FINITE, structure_name
from hcl_jax.views import load_views, standardise

PROGRAM = "real_prediction.py"
JOINT_AND_INDIVIDUAL = ("jive", "ajive", "sjive")
HCL = ("hcl-vb", "hcl-ml", "hcl-svd")
N_FOLDS, SUPERVISED_FOLDS = 5, 3
"""Folds that choose the penalty; fewer where the representation has to be fitted again for each."""
CONTRASTS = ("factorcl-sup", "factorcl-ssl", "simclr", "supcon", "cross-self", "cross-self-heads", UNTRAINED)
"""FactorCL and its baselines: told of what all views share and what each has for itself, scores are the encoders' codes."""
LEARNED_FROM_LABELS = (*SUPERVISED, *(name for name in CONTRASTS if name in VARIANTS and VARIANTS[name].supervised))
REFERENCE = "raw"
"""What the others are compared with, split by split."""


@dataclass(frozen=True)
class DataSet:
    """A file, its views, its labels, and two ways to spend the same total dimension."""

    file: str
    views: tuple[str, ...]
    label: str
    structures: tuple[str, ...]
    """Partially shared: for HCL, SLIDE, MMFL and HNN."""
    joint: int
    individual: tuple[int, ...]
    """For the methods that know only joint and individual parts."""


DATA = {
    "tcga": DataSet(
        "tcga_brca5/tcga_brca5.npz",
        ("mrna", "meth", "mirna", "cna", "rppa"),
        "pam50",
        (),  # all 31 subsets, one factor each
        joint=6,
        individual=(5, 5, 5, 5, 5),
    ),
    "digits": DataSet(
        "uci_mfeat/uci_mfeat.npz",
        ("fou", "fac", "kar", "pix", "zer", "mor"),
        "y",
        (
            *("123456:2", "12345:6", "12", "13", "14", "15", "23", "24", "25", "34", "35", "45"),
            *("1:4", "2:4", "3:4", "4:4", "5:4", "6:2"),
        ),
        joint=18,
        individual=(4, 4, 4, 4, 4, 2),
    ),
}


@dataclass(frozen=True)
class Study:
    """Accuracy of representations on real data, over repeated stratified splits."""

    data: Literal["tcga", "digits"] = "tcga"
    """tcga: five omics of 347 breast tumours; digits: six views of 2,000 handwritten digits."""
    file: Path | None = None
    """The .npz file. Default: its usual place under HCL_DATA."""
    methods: tuple[str, ...] = (*HCL, *(f"{name}+group" for name in HCL), *JOINT_AND_INDIVIDUAL, "slide", "mmfl", "pca", "raw")
    """Representations; +group behind a method of HCL asks for the group penalty over its structures."""
    splits: int = 20
    """Number of random splits."""
    test_share: float = 0.3
    """Share of the rows that is held out."""
    seed: int = 0
    """Root of the splits and of the folds of the cross-validation."""
    dtype: Literal["float32", "float64"] = "float64"
    """Precision of all computations."""
    output: Path = Path("results/real_prediction")
    """Folder of the tables: DATA-accuracy.parquet and DATA-structures.parquet. It holds one file, seed, dtype and test share."""


@dataclass(frozen=True)
class Split:
    """Standardised training and test rows by view, and their classes."""

    train: list[jax.Array]
    test: list[jax.Array]
    train_labels: jax.Array
    test_labels: jax.Array


def read(study: Study) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """(views, labels as 0 … C − 1, names of the classes). Raises `ValueError` that names what is missing."""
    known = DATA[study.data]
    path = file_of(study)
    views = load_views(path, known.views, "file")
    with np.load(path, allow_pickle=False) as held:
        if known.label not in held.files:
            raise ValueError(f"file: {path} has no labels {known.label!r}; expected some among {', '.join(held.files)}")
        try:
            raw = held[known.label]
        except ValueError as error:  # objects
            raise ValueError(f"file: the labels {known.label!r} of {path} cannot be read ({error})") from None
    check_labels(study, raw, len(views[0]))
    names, labels = np.unique(raw, return_inverse=True)
    return views, labels, names


def check_labels(study: Study, labels: np.ndarray, n_rows: int) -> None:
    """Raise `ValueError` where rows of these labels cannot be split with all classes on both sides."""
    what = f"the labels {DATA[study.data].label!r} of {file_of(study)}"
    if labels.shape != (n_rows,):
        raise ValueError(f"file: {what} have shape {labels.shape}; expected one for each of the {n_rows} rows")
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2:
        raise ValueError(f"file: {what} have one class; expected at least two")
    if counts.min() < 2:
        alone = ", ".join(map(str, names[counts < 2]))
        raise ValueError(f"file: {what} have one row of class {alone}; expected at least two rows of each class")
    n_test = math.ceil(study.test_share * n_rows)
    if not len(names) <= n_test <= n_rows - max(len(names), N_FOLDS):
        raise ValueError(
            f"test_share: is {study.test_share}, {n_test} of {n_rows} rows; expected at least a row of each of the {len(names)} "
            f"classes, and {max(len(names), N_FOLDS)} rows for training"
        )


def make_splits(study: Study, views: list[np.ndarray], labels: np.ndarray) -> Iterator[Split]:
    """Random stratified splits, standardised by the means and scales of the training part."""
    for train, test in StratifiedShuffleSplit(study.splits, test_size=study.test_share, random_state=study.seed).split(
        labels, labels
    ):
        parts = [[jnp.asarray(standardise(view[train], view[rows]), study.dtype) for view in views] for rows in (train, test)]
        yield Split(parts[0], parts[1], jnp.asarray(labels[train]), jnp.asarray(labels[test]))


Scores = tuple[jax.Array, jax.Array]
"""Of the training and of the test rows."""


def optimal_scores(split: Split) -> jax.Array:
    """The classes of the training rows as numbers, for methods that learn from one response: the means of the classes on the
    leading discriminant of their first principal components."""
    rows = np.concatenate(split.train, axis=1)
    left, values, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    kept = min(30, len(rows) // 5)
    labels = np.asarray(split.train_labels)
    line = LinearDiscriminantAnalysis(n_components=1).fit_transform(left[:, :kept] * values[:kept], labels)[:, 0]
    classes, place = np.unique(labels, return_inverse=True)
    means = np.array([line[labels == c].mean() for c in classes])[place]
    return jnp.asarray((means - means.mean()) / means.std(), split.train[0].dtype)


class Representations:
    """Fits every method's representation to a split; the same program serves all splits."""

    def __init__(self, data: DataSet, hierarchy: Hierarchy, n_classes: int):
        self.hierarchy, self._n_classes = hierarchy, n_classes
        self._programs: dict[str, Callable[..., Any]] = {}
        ranks = {"joint_rank": data.joint, "individual_ranks": data.individual}
        signal = tuple(min(data.joint + rank, dim) for rank, dim in zip(data.individual, hierarchy.dims, strict=True))
        self._configs = {
            "jive": jive.JiveConfig(**ranks),
            "ajive": ajive.AjiveConfig(signal_ranks=signal, **ranks),
            "sjive": sjive.SjiveConfig(**ranks),
        }

    def scores(self, method: str, split: Split, key: jax.Array) -> Scores:
        """Of training and test rows."""
        rows = [jnp.concatenate(views, axis=1) for views in (split.train, split.test)]
        if method == "raw":
            return rows[0], rows[1]
        if method == "pca":
            axes = self._run(
                method, lambda S: S.top_eigenpairs(self.hierarchy.n_factors)[1], SampleCovariance.from_data(split.train)
            )
            return rows[0] @ axes, rows[1] @ axes
        if is_estimator(method):
            covariance = SampleCovariance.from_data(split.train)
            estimate = self._run(method, lambda S: estimator(method)(S, self.hierarchy), covariance)
            score_map = posterior_mean_scores(estimate.loadings, estimate.noise_variance)
            return rows[0] @ score_map, rows[1] @ score_map
        if method in CONTRASTS:
            fitted = self._run(method, partial(self._contrast, method), split.train, split.train_labels, key)
            return fitted.transform(split.train), fitted.transform(split.test)
        config = {"config": self._configs[method]} if method in self._configs else {}
        fit = partial(BASELINES[method], **config)
        fitted = self._run(
            method, lambda views, y, key: fit(views, self.hierarchy, y=y, key=key), split.train, optimal_scores(split), key
        )
        return fitted.transform(split.train), fitted.transform(split.test)

    def fold_scores(self, method: str, split: Split, key: jax.Array) -> jax.Array:
        """folds × rows × scores: of all training rows, by representations that have not seen the rows of one fold each."""
        fold = np.asarray(fold_of_rows(key, len(split.train_labels), SUPERVISED_FOLDS))
        blind = []
        for f in range(SUPERVISED_FOLDS):
            seen = fold != f
            inner = Split([view[seen] for view in split.train], split.train, split.train_labels[seen], split.train_labels)
            blind.append(equal_scales(self.scores(method, inner, key))[1])
        return jnp.stack(blind)

    def _contrast(self, method: str, views: list[jax.Array], labels: jax.Array, key: jax.Array) -> Any:
        config = contrast_config(method, self._n_classes)
        if hasattr(config, "scores"):
            config = dataclasses.replace(config, scores="backbones")
        told = Hierarchy.shared_and_private(self.hierarchy.dims, 1, 1)
        y = {"y": labels} if method in LEARNED_FROM_LABELS else {}
        return NETWORKS["factorcl" if method == UNTRAINED else VARIANTS[method].network](views, told, config=config, key=key, **y)

    def _run(self, method: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._programs.setdefault(method, jax.jit(function, compiler_options=compiler_options()))(*arguments)


def equal_scales(scores: Scores) -> Scores:
    """Scores divided by their standard deviation on the training rows, so that a penalty treats them alike."""
    scale = scores[0].std(axis=0)
    scale = jnp.where(scale > 1e-9 * scale.max(), scale, jnp.inf)[None, :]
    return scores[0] / scale, scores[1] / scale


@partial(jax.jit, static_argnames=("n_classes", "hierarchy", "n_folds"))
def _regression(
    scores: jax.Array,
    labels: jax.Array,
    fold_scores: jax.Array | None,
    key: jax.Array,
    n_classes: int,
    hierarchy: Hierarchy | None,
    n_folds: int,
) -> Classifier:
    return softmax_regression(scores, labels, n_classes, hierarchy, key=key, n_folds=n_folds, fold_scores=fold_scores)


def classify(
    representations: Representations, method: str, split: Split, key: jax.Array, n_classes: int
) -> tuple[Classifier, Scores]:
    """The regression of the classes on a method's scores, and these. Its penalty is chosen on rows whose labels the scores have
    not seen: those of supervised methods are learned again without each fold."""
    representation, _, penalty = method.partition("+")
    scores = equal_scales(representations.scores(representation, split, key))
    supervised = representation in LEARNED_FROM_LABELS
    blind = representations.fold_scores(representation, split, key) if supervised else None
    n_folds = SUPERVISED_FOLDS if supervised else N_FOLDS
    told = representations.hierarchy if penalty == "group" else None
    return _regression(scores[0], split.train_labels, blind, key, n_classes, told, n_folds), scores


def file_of(study: Study) -> Path:
    """The .npz file. Raises `ValueError` where there is none."""
    path = study.file or Path(os.environ.get("HCL_DATA", "../shared/data")) / DATA[study.data].file
    if not path.is_file():
        raise ValueError(f"file: {path} does not exist; expected the file of {study.data}, under HCL_DATA or given by --file")
    return path


def identity(study: Study) -> dict[str, Any]:
    """What the numbers depend on beside the method and the split: columns of both tables."""
    return {
        "data": study.data,
        "file_crc32": zlib.crc32(file_of(study).read_bytes()),
        "seed": study.seed,
        "dtype": study.dtype,
        "test_share": study.test_share,
        "version": hcl_jax.__version__,
    }


KEY = {
    "data": pl.String,
    "file_crc32": pl.Int64,
    "seed": pl.Int64,
    "dtype": pl.String,
    "test_share": pl.Float64,
    "version": pl.String,
}
COLUMNS = {
    "accuracy": KEY
    | {"method": pl.String, "split": pl.Int64, "accuracy": pl.Float64, "log_loss": pl.Float64}
    | {"dimension": pl.Int64, "status": pl.Int64, "seconds": pl.Float64},
    "structures": KEY | {"method": pl.String, "split": pl.Int64, "structure": pl.String, "rank": pl.Int64, "share": pl.Float64},
}
"""Of the tables."""


def accuracy_row(fit: Classifier, scores: Scores, split: Split, seconds: float) -> dict[str, Any]:
    """How well the classes of the test rows are predicted."""
    log_probabilities = np.asarray(fit.log_probabilities(scores[1]))
    truth = np.asarray(split.test_labels)
    return {
        "accuracy": float(np.mean(log_probabilities.argmax(axis=1) == truth)),
        "log_loss": float(-np.mean(log_probabilities[np.arange(len(truth)), truth])),
        "dimension": int(np.sum(np.asarray(scores[0]).std(axis=0) > 0)),
        "status": int(fit.status),
        "seconds": seconds,
    }


def structure_rows(fit: Classifier, hierarchy: Hierarchy) -> list[dict[str, Any]]:
    """How large each structure's coefficients on equally scaled scores are: their share of the squared norm of all."""
    energy = np.sum(np.asarray(fit.coefficients) ** 2, axis=1)
    total = energy.sum() or 1.0
    return [
        {"structure": structure_name(s), "rank": rank, "share": float(energy[hierarchy.columns(s)].sum() / total)}
        for s, rank in hierarchy.ranks
    ]


class Tables:
    """The tables of one data set in OUTPUT."""

    def __init__(self, study: Study):
        """Reads those that are there. Raises `ValueError` where they cannot be read or belong to another study."""
        self.study, self.identity = study, identity(study)
        self.held = {name: self._read(name) for name in COLUMNS}
        finished = self.held["accuracy"].select("method", "split")
        self.done = set(finished.iter_rows())
        # structures are written first: those of a split whose accuracy is not there are computed again
        self.held["structures"] = self.held["structures"].join(finished, on=["method", "split"], how="semi")

    def _path(self, name: str) -> Path:
        return self.study.output / f"{self.study.data}-{name}.parquet"

    def _read(self, name: str) -> pl.DataFrame:
        path = self._path(name)
        if not path.exists():
            return pl.DataFrame(schema=COLUMNS[name])
        try:
            table = pl.read_parquet(path)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise ValueError(f"output: {path} cannot be read ({error}); expected a table of this study, or none") from None
        if dict(table.schema) != COLUMNS[name]:
            raise ValueError(f"output: {path} has other columns than this version writes; expected another folder")
        for column, value in self.identity.items():
            if others := set(table[column]) - {value}:
                raise ValueError(f"output: {path} holds {column} {others.pop()}; expected {value}, or another folder")
        return table

    def add(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        """Write both tables whole with these rows more; raises `OutputError` where the folder cannot be written."""
        for name in ("structures", "accuracy"):
            table = pl.concat([self.held[name], pl.DataFrame(rows[name], schema=COLUMNS[name])])
            buffer = io.BytesIO()
            table.write_parquet(buffer)
            write_bytes(self._path(name), buffer.getvalue(), self.study.output)
            self.held[name] = table

    def asked(self, name: str) -> pl.DataFrame:
        """The rows of the methods and splits that the study asks for, in its order."""
        table = self.held[name].filter(pl.col("method").is_in(self.study.methods) & (pl.col("split") < self.study.splits))
        place = pl.col("method").replace_strict(self.study.methods, range(len(self.study.methods)), default=-1)
        return table.sort(place, "split", maintain_order=True)


def run(study: Study) -> Tables:
    """Whatever OUTPUT does not hold yet: accuracy by method and split, shares of the structures by method of HCL and split;
    stored after every split."""
    data, tables = DATA[study.data], Tables(study)
    views, labels, classes = read(study)
    hierarchy = make_hierarchy([view.shape[1] for view in views], 1, data.structures)
    representations = Representations(data, hierarchy, len(classes))
    left = [[method for method in study.methods if (method, number) not in tables.done] for number in range(study.splits)]
    steps = tqdm(total=sum(map(len, left)), unit="fit", disable=None)
    for number, split in enumerate(make_splits(study, views, labels) if any(left) else ()):
        key = jr.fold_in(jr.key(study.seed), number)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in COLUMNS}
        for method in left[number]:
            start = perf_counter()
            fit, scores = jax.block_until_ready(classify(representations, method, split, key, len(classes)))
            base = tables.identity | {"method": method, "split": number}
            rows["accuracy"].append(base | accuracy_row(fit, scores, split, perf_counter() - start))
            if is_estimator(method.partition("+")[0]):
                rows["structures"] += [base | row for row in structure_rows(fit, hierarchy)]
            steps.update()
        if rows["accuracy"]:
            tables.add(rows)
    steps.close()
    return tables


def check(study: Study) -> None:
    """Raise `ValueError` that names the argument."""
    known = (*ESTIMATORS, *(f"{name}+group" for name in ESTIMATORS), *BASELINES, *CONTRASTS, "pca", "raw")
    check_methods(study.methods, known)
    check_list("methods", study.methods)
    if not 0 <= study.seed < 2**32:
        raise ValueError(f"seed: is {study.seed}; expected an integer from 0 to 2^32 - 1")
    if study.splits < 1:
        raise ValueError(f"splits: is {study.splits}; expected at least 1")
    if not 0 < study.test_share < 1:
        raise ValueError(f"test_share: is {study.test_share}; expected a number between 0 and 1")


def summary(accuracy: pl.DataFrame) -> pl.DataFrame:
    """Means over the splits, best first; the standard error of the accuracy, and that of its `difference` from the features'
    regression (if it was run) on the same splits, are corrected for what splits share."""
    share, reference = accuracy["test_share"][0], accuracy.filter(pl.col("method") == REFERENCE)
    rows = []
    for (method,), group in accuracy.group_by("method", maintain_order=True):
        mean, error = corrected_mean(group["accuracy"].to_numpy(), share)
        paired = group.join(reference, on="split", suffix="_reference")
        differences = (paired["accuracy"] - paired["accuracy_reference"]).to_numpy()
        difference, its_error = corrected_mean(differences, share) if len(differences) else (None, None)
        rows.append(
            {
                "method": method,
                "accuracy": mean,
                "error": error,
                "difference": difference,
                "difference_error": its_error,
                "log_loss": group["log_loss"].mean(),
                "dimension": group["dimension"][0],
                "seconds": group["seconds"].median(),
                "non_finite": int((group["status"] == NON_FINITE).sum()),
            }
        )
    table = pl.DataFrame(rows, infer_schema_length=None).sort("accuracy", descending=True)
    return table.with_columns(pl.col("error", "difference_error").cast(pl.Float64).fill_nan(None))  # a single split says nothing


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    try:
        study = parse(Study, sys.argv[1:] if arguments is None else list(arguments), Study(), PROGRAM, __doc__)
        check(study)
        configure(study.dtype)
        tables = run(study)
    except (ValueError, OutputError) as error:
        print(f"{PROGRAM}: error: {error_line(Study, error)}", file=sys.stderr)
        return 2
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_width_chars=130,
        tbl_hide_column_data_types=True,
        tbl_hide_dataframe_shape=True,
        float_precision=4,
    ):
        print(summary(tables.asked("accuracy")))
        structures = tables.asked("structures")
        if len(structures):
            shares = structures.group_by("method", "structure", maintain_order=True).agg(pl.col("share").mean())
            print(shares.sort("share", descending=True).group_by("method", maintain_order=True).head(5))
    return 0


if __name__ == "__main__":
    sys.exit(main())
