"""The front door beside its neighbours, MOFA (mofapy2), cca-zoo and scikit-learn: accuracy, a missing view, new samples, time.

    python benchmarks/peers.py --data ../shared/data/tcga_brca5/tcga_brca5.npz        # minutes

makes an environment of its own for the neighbours (`--environment`), with `pip install`, and fits every package to the same
training rows of five folds, one after the other, each in a process of its own. Accuracy: multinomial logistic regression on the
scores, its penalty chosen in the training rows, the same for all; all features stand beside. Missing view: R² of the last view of
the test rows, from the others, beside ridge on them. The first of a process' two fits includes compilation, the second
does not.

Data: tcga_brca5.npz (The Cancer Genome Atlas, open access) with mRNA, methylation and miRNA of 347 breast tumours.
"""

import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from hcl_jax.evaluation import corrected_mean
from measuring import check_known, run_script

FITS = Path(__file__).with_name("peer_fits.py")
OURS, PEERS, FEATURES = "hcl_jax", ("mofapy2", "cca-zoo", "scikit-learn"), "all features"


@dataclass(frozen=True)
class Arguments:
    """What is compared."""

    data: Path
    """The .npz file."""
    views: tuple[str, ...] = ("mrna", "meth", "mirna")
    """Arrays of the file; the last is the one that test rows lack in turn."""
    labels: str = "pam50"
    """The array of classes."""
    packages: tuple[str, ...] = (OURS, *PEERS)
    """Some of hcl_jax, mofapy2, cca-zoo, scikit-learn."""
    factors: int = 20
    """Of the packages that do not choose their number; where MOFA starts."""
    folds: int = 5
    """Of the samples, stratified by class."""
    environment: Path = Path(".venv-peers")
    """Where the neighbours are installed; made if it is not there."""
    output: Path | None = None
    """A .csv file for the table."""


def python_of(environment: Path) -> Path:
    """The interpreter of an environment that holds the neighbours. It is made if there is none."""
    python = environment / "bin/python"
    if not python.exists():
        print(f"installing {', '.join(PEERS)} into {environment}")
        venv.create(environment, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS], check=True)
    return python


def fold_of(arguments: Arguments, held: dict[str, np.ndarray], train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
    """The input of one fold: views in units of the training rows' standard deviations, without features that are constant."""
    found = {"views": np.array(arguments.views), "factors": np.array(arguments.factors)}
    for name in arguments.views:
        X = held[name].astype(float)
        spread = X[train].std(axis=0)
        Z = (X - X[train].mean(axis=0))[:, spread > 0] / spread[spread > 0]
        found |= {f"train_{name}": Z[train], f"test_{name}": Z[test]}
    return found


def accuracy(scores: np.ndarray, labels: np.ndarray, new: np.ndarray, truth: np.ndarray) -> float:
    """Of logistic regression on standardised scores."""
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    search = GridSearchCV(head, {"logisticregression__C": np.logspace(-4, 2, 7)}, cv=3)
    return float(search.fit(scores, labels).score(new, truth))


def r_squared(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Of all entries, about the training means."""
    return float(1 - ((truth - predicted) ** 2).sum() / (truth**2).sum())


def rows_of(arguments: Arguments, fold: dict[str, np.ndarray], labels: np.ndarray, truth: np.ndarray, number: int) -> list[dict]:
    """What every package makes of one fold."""
    parts = {part: [fold[f"{part}_{name}"] for name in arguments.views] for part in ("train", "test")}
    whole = {part: np.concatenate(views, axis=1) for part, views in parts.items()}
    others = {part: np.concatenate(views[:-1], axis=1) for part, views in parts.items()}
    ridge = RidgeCV(np.logspace(0, 6, 13)).fit(others["train"], parts["train"][-1])
    beside = {
        "package": FEATURES,
        "accuracy": accuracy(whole["train"], labels, whole["test"], truth),
        "missing_view": r_squared(ridge.predict(others["test"]), parts["test"][-1]),
    }
    found = [beside]
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "fold.npz", Path(name) / "fit.npz"
        np.savez(source, **fold)
        for package in arguments.packages:
            python = sys.executable if package == OURS else python_of(arguments.environment)
            subprocess.run([python, FITS, package, source, target], check=True)
            fit = np.load(target)
            found.append(
                {
                    "package": package,
                    "factors": fit["train"].shape[1],
                    "accuracy": accuracy(fit["train"], labels, fit["test"], truth),
                    "missing_view": r_squared(fit["view"], parts["test"][-1]) if "view" in fit else None,
                }
                | dict(zip(("wall", "cpu"), fit["seconds"][0], strict=True))
                | dict(zip(("second_wall", "second_cpu"), fit["seconds"][1], strict=True))
            )
    return [row | {"fold": number} for row in found]


def summary(table: pl.DataFrame, folds: int) -> pl.DataFrame:
    """Means over folds, the standard error of accuracy corrected for training rows that folds share."""
    rows = []
    for (package,), group in table.group_by("package", maintain_order=True):
        mean, error = corrected_mean(group["accuracy"].to_numpy(), 1 / folds)
        others = {name: group[name].mean() for name in ("missing_view", "factors", "wall", "cpu", "second_wall", "second_cpu")}
        rows.append({"package": package, "accuracy": mean, "standard_error": error} | others)
    return pl.DataFrame(rows)


def main(arguments: Arguments) -> None:
    """Fit, print, and write the table where one is asked for."""
    check_known("packages", arguments.packages, (OURS, *PEERS))
    if not arguments.data.is_file():
        raise ValueError(f"--data: {arguments.data} does not exist; expected an .npz file")
    held = dict(np.load(arguments.data))
    check_known("views", (*arguments.views, arguments.labels), held)
    labels, rows = held[arguments.labels], []
    splits = StratifiedKFold(arguments.folds, shuffle=True, random_state=0).split(labels, labels)
    for number, (train, test) in enumerate(tqdm(splits, total=arguments.folds, unit="fold", disable=None)):
        rows += rows_of(arguments, fold_of(arguments, held, train, test), labels[train], labels[test], number)
    table = summary(pl.DataFrame(rows, infer_schema_length=None), arguments.folds)
    with pl.Config(tbl_cols=-1, tbl_width_chars=160, float_precision=3, tbl_hide_dataframe_shape=True):
        print(table)
    if arguments.output is not None:
        table.write_csv(arguments.output)


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
