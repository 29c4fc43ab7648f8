"""The command `hcl`: from files of views to structures, scores, completed views, predictions and a report."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import tyro

from hcl_jax.decomposition import Decomposition, fit, load
from hcl_jax.experiments.runtime import enable_compilation_cache
from hcl_jax.outcomes import repeated, survival
from hcl_jax.problems import problems
from hcl_jax.reading import read_views
from hcl_jax.views import UNREADABLE

WRITERS = {
    ".csv": lambda frame, path: frame.write_csv(path),
    ".tsv": lambda frame, path: frame.write_csv(path, separator="\t"),
    ".parquet": lambda frame, path: frame.write_parquet(path),
}
Files = tyro.conf.Positional[tuple[Path, ...]]
File = tyro.conf.Positional[Path]


def _as_data(files: tuple[Path, ...]) -> Any:
    """One file may hold several views; of several files each is one."""
    if not files:
        raise ValueError("files: none given; expected files of views, one a view, or one that holds several")
    return str(files[0]) if len(files) == 1 else [str(path) for path in files]


@dataclass(frozen=True)
class Check:
    """Say what an analyst should know of the data before a fit: names, missing views and cells, features that are constant."""

    files: Files
    """.csv, .tsv, .parquet, .npz, .h5mu or .h5ad: one file a view, named by the file, or one file with several. Rows are samples,
    named by a first column of text."""
    missing_cells: bool = False
    """Single cells may be missing."""

    def run(self) -> None:
        read = read_views(_as_data(self.files), cells=self.missing_cells)
        for name, dim, here in zip(read.names, read.dims, _present(read), strict=True):
            print(f"{name}: {int(here.sum())} samples, {dim} features")
        print(f"{read.n_samples} samples in all, {int(np.all(_present(read), axis=0).sum())} with all views")
        found = problems(read)
        print("\n".join(found) if found else "Nothing stands against a fit.")


def _present(read: Any) -> list[np.ndarray]:
    return [~np.isnan(np.asarray(matrix)).all(axis=1) for matrix in read.matrices]


@dataclass(frozen=True)
class Fit:
    """Decompose the views, and save the decomposition: structures, ranks, loadings, and what they predict."""

    files: Files
    """As of `hcl check`."""
    output: Path = Path("decomposition.npz")
    """Where it is saved."""
    outcome: Path | None = None
    """A file of outcomes, .csv, .tsv or .parquet, samples in its first column."""
    column: str | None = None
    """The outcome's column, where the file has several. Floating-point numbers are a regression's, all else classes."""
    event: str | None = None
    """A column of the file that makes the outcome survival times: true (or 1) where the time ends with the event, false (or 0)
    where the sample was last seen without it."""
    subject: str | None = None
    """A column of the file that makes the outcome repeated measurements: whom each sample is of."""
    structures: tuple[str, ...] = ()
    """Those to consider, such as mrna+meth mirna. None given: all."""
    rank: int | None = None
    """Of every structure. None: those that the data support."""
    method: str = "hcl-vb"
    """hcl-vb, hcl-ml, jive, slide, hcl (a network), …"""
    noise: str = "view"
    """What has a noise variance of its own: view, feature, or shared by all."""
    missing: str = "model"
    """model: rows count for the views that they have; complete: only rows with all views; impute-cells: single cells too."""
    report: Path | None = None
    """Write an HTML report as well."""
    seed: int = 0
    """Of whatever is random."""

    def run(self) -> None:
        _check_folder(self.output, "output")
        y = self._outcome()
        fitted = fit(
            _as_data(self.files),
            y=y,
            structures=list(self.structures) or "all",
            ranks="auto" if self.rank is None else self.rank,
            method=self.method,
            noise=self.noise,
            missing=self.missing,
            seed=self.seed,
        )
        fitted.save(self.output)
        _show(fitted)
        print(f"saved to {self.output}")
        if self.report is not None:
            _report(fitted, self.report)

    def _outcome(self) -> Any:
        """What `fit` takes as `y`. Raises `ValueError` for options that do not go together."""
        if self.event is not None and self.subject is not None:
            raise ValueError("event: is given, and subject too; expected one of them")
        if self.outcome is None:
            for name in ("column", "event", "subject"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: is given without a file; expected --outcome, whose column it names")
            return None
        beside = self.event or self.subject
        values = read_outcome(self.outcome, self.column, () if beside is None else (beside,))
        if self.event is not None:
            return survival(values, read_outcome(self.outcome, self.event))
        return values if self.subject is None else repeated(values, read_outcome(self.outcome, self.subject))


def _report(fitted: Decomposition, path: Path) -> None:
    from hcl_jax.report import write_report  # needs the extra `report`

    print(f"report written to {write_report(fitted, path)}")


@dataclass(frozen=True)
class Show:
    """Print what a saved decomposition found."""

    decomposition: File
    """As `hcl fit` saved it."""
    top: int = 5
    """Features of each view that are listed for every structure."""

    def run(self) -> None:
        fitted = load(self.decomposition)
        _show(fitted)
        for s in fitted.active:
            print(f"\nfeatures of {fitted.label(s)}")
            _print(fitted.as_polars().top_features(fitted.label(s), self.top))


def _show(fitted: Decomposition) -> None:
    plain = fitted.as_polars()
    print(f"{fitted.settings.method} on {fitted.n_samples} samples of {', '.join(fitted.view_names)}")
    _print(plain.structures)
    _print(plain.variance_explained())
    for sentence in fitted.warnings:
        print(sentence)


def _print(frame: pl.DataFrame) -> None:
    with pl.Config(
        tbl_rows=-1,
        tbl_cols=-1,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        float_precision=3,
        tbl_width_chars=130,
    ):
        print(frame)


@dataclass(frozen=True)
class Transform:
    """Scores of samples, by a saved decomposition."""

    decomposition: File
    """As `hcl fit` saved it."""
    files: Files
    """Of the same views and features, in any order; samples may lack views."""
    output: Path = Path("scores.csv")
    """.csv, .tsv or .parquet."""

    def run(self) -> None:
        _check_table(self.output)
        fitted = load(self.decomposition).as_polars()
        _write(fitted.transform(_named(fitted, self.files)), self.output)


@dataclass(frozen=True)
class Predict:
    """The outcome that is expected of samples, by a saved decomposition that was given one: of survival times the log hazard
    ratio to a sample with mean scores."""

    decomposition: File
    """As `hcl fit --outcome` saved it."""
    files: Files
    """As of `hcl transform`."""
    output: Path = Path("predictions.csv")
    """.csv, .tsv or .parquet."""

    def run(self) -> None:
        _check_table(self.output)
        fitted = load(self.decomposition).as_polars()
        data = _named(fitted, self.files)
        named = fitted.outcome_name or "y"
        if fitted.head is not None and fitted.head.kind == "survival":
            named = "log hazard ratio"
        frame = pl.DataFrame({named: fitted.predict(data)})
        if fitted.head is not None and fitted.head.classes is not None:
            frame = frame.hstack(fitted.predict_probabilities(data).select(pl.exclude("sample").name.prefix("probability of ")))
        samples = read_views(data).sample_names
        if samples is not None:
            frame.insert_column(0, pl.Series("sample", [str(name) for name in samples]))
        _write(frame, self.output)


@dataclass(frozen=True)
class Impute:
    """A view of samples, with what they lack of it predicted from their other views."""

    decomposition: File
    """As `hcl fit` saved it."""
    view: tyro.conf.Positional[str]
    """The view that is wanted."""
    files: Files
    """As of `hcl transform`."""
    output: Path = Path("imputed.csv")
    """.csv, .tsv or .parquet; the standard deviations of the predictions go beside it, imputed-sd.csv."""

    def run(self) -> None:
        _check_table(self.output)
        fitted = load(self.decomposition).as_polars()
        values, deviations = fitted.impute(self.view, _named(fitted, self.files))
        _write(values, self.output)
        _write(deviations, self.output.with_name(f"{self.output.stem}-sd{self.output.suffix}"))


@dataclass(frozen=True)
class Report:
    """An HTML report of a saved decomposition: what can be said without its data (`hcl fit --report` says more)."""

    decomposition: File
    """As `hcl fit` saved it."""
    output: Path = Path("report.html")
    """Where it is written."""

    def run(self) -> None:
        _report(load(self.decomposition), self.output)


COMMANDS: dict[str, Any] = {
    "check": Check,
    "fit": Fit,
    "show": Show,
    "report": Report,
    "transform": Transform,
    "predict": Predict,
    "impute": Impute,
}


def _named(fitted: Decomposition, files: tuple[Path, ...]) -> Any:
    """The files by the names of the views: one file may hold several views, or be one of them."""
    data = _as_data(files)
    if isinstance(data, str) and len(fitted.view_names) > 1 and Path(data).stem.split(".")[0] in fitted.view_names:
        return {Path(data).stem.split(".")[0]: data}
    return data


def read_outcome(path: Path, column: str | None, beside: Sequence[str] = ()) -> dict[str, Any]:
    """The outcome of every sample by its name, from a table whose first column names samples; without a name the column that it
    has but for those `beside` it. Raises `ValueError` that says what is missing."""
    readers = {".csv": pl.read_csv, ".tsv": lambda p: pl.read_csv(p, separator="\t"), ".parquet": pl.read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"outcome: is {path}; expected a file that ends in {', '.join(readers)}")
    try:
        table = readers[path.suffix](path)
    except (*UNREADABLE, pl.exceptions.PolarsError) as error:
        raise ValueError(f"outcome: {path} cannot be read ({error})") from None
    names = table.columns
    left = [name for name in names[1:] if name not in beside]
    if column is None and len(left) != 1:
        raise ValueError(f"column: is not given, and {path} has {', '.join(names)}; expected one of them")
    wanted = column or left[0]
    if wanted not in names[1:]:
        raise ValueError(f"column: is {wanted!r}; expected one of {', '.join(names[1:])}, after the samples' names")
    return dict(zip(table[names[0]].cast(pl.String).to_list(), table[wanted].to_list(), strict=True))


def _check_folder(path: Path, argument: str) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{argument}: the folder {path.parent} does not exist; expected one to write {path.name} to")


def _check_table(path: Path) -> None:
    if path.suffix not in WRITERS:
        raise ValueError(f"output: is {path}; expected a name that ends in {', '.join(WRITERS)}")
    _check_folder(path, "output")


def _write(frame: pl.DataFrame, path: Path) -> None:
    """To a temporary name first: nothing is left half written."""
    temporary = path.with_name(path.name + ".tmp")
    WRITERS[path.suffix](frame, temporary)
    temporary.replace(path)
    print(f"{frame.height} samples written to {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 after an error that is said in one line."""
    jax.config.update("jax_enable_x64", True)
    enable_compilation_cache()
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="hcl", description=__doc__, args=None if arguments is None else list(arguments)
    )
    try:
        command.run()
    except ValueError as error:
        print(f"hcl: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
