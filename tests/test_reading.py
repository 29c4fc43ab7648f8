"""Whatever holds the data, the same views with the same names; samples joined by name; refusals in one line."""

import gzip
import json
import tracemalloc
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse as sp

from hcl_jax.problems import check_fittable, problems
from hcl_jax.reading import left_out, match_features, read_views
from hcl_jax.views import Views

RNG = np.random.default_rng(0)
SAMPLES, RNA_NAMES, PROTEIN_NAMES = ("s3", "s1", "s4", "s2"), ("TP53", "MYC", "KRAS"), ("p53", "AKT")
RNA, PROTEIN = RNG.standard_normal((4, 3)), np.where(RNG.random((4, 2)) < 0.5, 0.25, 2.5)
NAN = np.nan


def as_pandas(matrix, features, samples=SAMPLES):
    return pd.DataFrame(matrix, columns=list(features), index=None if samples is None else list(samples))


def as_polars(matrix, features, samples=SAMPLES, first="sample"):
    named = [] if samples is None else [pl.Series(first, list(samples))]
    return pl.DataFrame([*named, *(pl.Series(name, column) for name, column in zip(features, np.transpose(matrix), strict=True))])


def annotated():
    """(AnnData by view, MuData)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, of versions to come
        import anndata
        import mudata

        held = {"rna": as_pandas(RNA, RNA_NAMES), "protein": as_pandas(PROTEIN, PROTEIN_NAMES)}
        views = {name: anndata.AnnData(frame) for name, frame in held.items()}
        views["protein"].X = sp.csr_matrix(views["protein"].X)
        return views, mudata.MuData(views)


def write_all(folder: Path):
    """The two views in files of every kind."""
    frames = {"rna": (RNA, RNA_NAMES), "protein": (PROTEIN, PROTEIN_NAMES)}
    for kind in ("csv", "tsv", "csv.gz", "tsv.gz", "parquet", "pandas", "h5ad", "R", "npy"):
        (folder / kind).mkdir()
    for name, (matrix, features) in frames.items():
        as_polars(matrix, features).write_csv(folder / "csv" / f"{name}.csv")
        as_pandas(matrix, features).to_csv(folder / "tsv" / f"{name}.tsv", sep="\t")
        as_pandas(matrix, features).to_csv(folder / "csv.gz" / f"{name}.csv.gz")
        as_pandas(matrix, features).to_csv(folder / "tsv.gz" / f"{name}.TSV.GZ", sep="\t", compression="gzip")
        lines = as_pandas(matrix, features).to_csv().removeprefix(",")  # as write.table of R has it: no name for that of rows
        (folder / "R" / f"{name}.csv").write_text(lines)
        frame = as_polars(matrix, features)
        frame.write_parquet(folder / "parquet" / f"{name}.parquet")
        index = {"index_columns": ["__index_level_0__"]}  # where pandas puts the index: last
        moved = frame.rename({"sample": "__index_level_0__"}).select(*features, "__index_level_0__")
        moved.write_parquet(folder / "pandas" / f"{name}.parquet", metadata={"pandas": json.dumps(index)})
        np.save(folder / "npy" / f"{name}.npy", matrix)
    named = {"rna_names": RNA_NAMES, "protein_names": PROTEIN_NAMES, "sample_names": SAMPLES, "y": np.arange(4)}
    np.savez(folder / "named.npz", rna=RNA, protein=PROTEIN, **{name: np.array(held) for name, held in named.items()})
    views, together = annotated()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together.write(folder / "all.h5mu")
        for name, data in views.items():
            data.write_h5ad(folder / "h5ad" / f"{name}.h5ad")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    write_all(folder)
    return folder


WHOLE = np.concatenate([RNA, PROTEIN], axis=1)
PREFIXED = tuple(f"rna:{name}" for name in RNA_NAMES) + tuple(f"protein:{name}" for name in PROTEIN_NAMES)
NAMED = RNA_NAMES + PROTEIN_NAMES
IN_COLUMNS = {"rna": list(RNA_NAMES), "protein": list(PROTEIN_NAMES)}
FORMS = {
    "pandas": lambda _: ({"rna": as_pandas(RNA, RNA_NAMES), "protein": as_pandas(PROTEIN, PROTEIN_NAMES)}, None),
    "polars": lambda _: ({"rna": as_polars(RNA, RNA_NAMES), "protein": as_polars(PROTEIN, PROTEIN_NAMES)}, None),
    "lazy": lambda _: ({"rna": as_polars(RNA, RNA_NAMES).lazy(), "protein": as_polars(PROTEIN, PROTEIN_NAMES)}, None),
    "one of arrays": lambda _: ({"rna": as_pandas(RNA, RNA_NAMES), "protein": as_polars(PROTEIN, PROTEIN_NAMES, None)}, None),
    "text first in pandas": lambda _: (
        {"rna": as_pandas(RNA, RNA_NAMES).reset_index(), "protein": as_pandas(PROTEIN, PROTEIN_NAMES).reset_index()},
        None,
    ),
    "AnnData": lambda _: (annotated()[0], None),
    "MuData": lambda _: (annotated()[1], None),
    "some of MuData": lambda _: (annotated()[1], ["rna", "protein"]),
    "Views": lambda folder: (read_views(folder / "named.npz"), None),
    "some of Views": lambda folder: (read_views(folder / "named.npz"), ["rna", "protein"]),
    "prefix": lambda _: (as_pandas(WHOLE, PREFIXED), ":"),
    "prefix, polars": lambda _: (as_polars(WHOLE, PREFIXED), ":"),
    "columns by name": lambda _: (as_polars(WHOLE, NAMED), IN_COLUMNS),
    "columns in another order": lambda _: (as_pandas(WHOLE[:, ::-1], NAMED[::-1]), IN_COLUMNS),
    "places and slices": lambda _: (as_polars(WHOLE, NAMED), {"rna": slice(3), "protein": [3, np.int64(4)]}),
    "booleans": lambda _: (as_pandas(WHOLE, NAMED), {"rna": slice(0, 3), "protein": np.array([0, 0, 0, 1, 1], bool)}),
    "selector": lambda _: (as_pandas(WHOLE, NAMED), {"rna": lambda frame: frame.columns[:3], "protein": slice(3, None)}),
    "function of a name": lambda _: (as_pandas(WHOLE, NAMED), lambda name: "rna" if name in RNA_NAMES else "protein"),
    "with a column of labels": lambda _: (as_pandas(WHOLE, NAMED).assign(label=list("abba")), IN_COLUMNS),
    "list of csv": lambda folder: ([folder / "csv" / "rna.csv", str(folder / "csv" / "protein.csv")], None),
    "kinds that differ": lambda folder: ({"rna": folder / "csv" / "rna.csv", "protein": folder / "h5ad" / "protein.h5ad"}, None),
    "one csv": lambda folder: (joint_csv(folder), ":"),
    "folder csv": lambda folder: (folder / "csv", ["rna", "protein"]),
    "folder tsv": lambda folder: (folder / "tsv", ["rna", "protein"]),
    "folder csv.gz": lambda folder: (folder / "csv.gz", ["rna", "protein"]),
    "folder tsv.gz": lambda folder: (folder / "tsv.gz", ["rna", "protein"]),
    "folder parquet": lambda folder: (folder / "parquet", ["rna", "protein"]),
    "folder of pandas' parquet": lambda folder: (folder / "pandas", ["rna", "protein"]),
    "folder of R's tables": lambda folder: (folder / "R", ["rna", "protein"]),
    "folder h5ad": lambda folder: (folder / "h5ad", ["rna", "protein"]),
    "npz": lambda folder: (folder / "named.npz", None),
    "h5mu": lambda folder: (folder / "all.h5mu", None),
}


def joint_csv(folder):
    as_polars(WHOLE, PREFIXED).write_csv(folder / "joint.csv")
    return folder / "joint.csv"


@pytest.mark.parametrize("form", FORMS)
def test_the_same_views_with_the_same_names_whatever_holds_them(form, folder):
    data, views = FORMS[form](folder)
    read = read_views(data, views=views)
    assert read.names == ("rna", "protein")
    assert read.feature_names == (RNA_NAMES, PROTEIN_NAMES)
    assert read.sample_names == SAMPLES
    for found, truth in zip(read.matrices, (RNA, PROTEIN), strict=True):
        np.testing.assert_array_equal(found, truth)


@pytest.mark.parametrize(
    ("data", "views", "names"),
    [
        ([RNA, PROTEIN], None, ("view 1", "view 2")),
        ([RNA.tolist(), jnp.asarray(PROTEIN)], None, ("view 1", "view 2")),
        (WHOLE, [3, 2], ("view 1", "view 2")),
        (WHOLE.tolist(), (3, 2), ("view 1", "view 2")),
        (jnp.asarray(WHOLE), {"a": slice(None, 3), "b": [3, 4]}, ("a", "b")),
        (WHOLE, lambda name: "a" if int(name) < 3 else "b", ("a", "b")),
        ({"a": sp.csr_matrix(RNA), "b": as_polars(PROTEIN, "xy", None)}, None, ("a", "b")),
    ],
)
def test_without_names_by_order(data, views, names):
    read = read_views(data, views=views)
    assert read.names == names
    assert read.sample_names is None
    np.testing.assert_array_equal(read.joined(), WHOLE)


def test_npy_and_single_columns(folder):
    read = read_views({"rna": folder / "npy" / "rna.npy", "age": pd.Series([1, 2, 3, 4], name="age")})
    assert read.dims == (3, 1)
    assert read.feature_names[1] == ("age",)


def random_frames(seed):
    """Three views of some of 30 samples each, in orders of their own."""
    rng = np.random.default_rng(seed)
    names = [f"s{i}" for i in rng.permutation(30)]
    for d in (3, 1, 2):
        held = rng.choice(names, rng.integers(5, 25), replace=False)
        yield as_pandas(rng.standard_normal((len(held), d)), map(str, range(d)), held)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("join", ["union", "inner"])
def test_samples_are_joined_by_name(seed, join):
    frames = list(random_frames(seed))
    read = read_views(dict(zip("abc", frames, strict=True)), join=join)
    truth = pd.concat(frames, axis=1, join="outer" if join == "union" else "inner", sort=False)
    assert read.sample_names == tuple(truth.index)
    np.testing.assert_array_equal(read.joined(), truth.to_numpy())


def test_order_of_a_union_and_names_of_numbers_beside_names_of_text():
    one, two = pd.DataFrame({"x": [1.0, 2.0]}, index=[20, 10]), pl.DataFrame({"s": ["30", "10"], "y": [3.0, 4.0]})
    read = read_views({"one": one, "two": two})
    assert read.sample_names == ("20", "10", "30")
    np.testing.assert_array_equal(read.joined(), [[1, NAN], [2, 4], [NAN, 3]])
    assert read_views([one, one.iloc[:1]]).sample_names == (20, 10)
    with pytest.raises(
        ValueError, match="data: view 2 has no names of samples; expected some, as the others have them in unlike"
    ):
        read_views([one, PROTEIN[:2], two])


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "samples", "truth"),
    [
        (",a,b\n7,1,2\n5,3,4\n", ("7", "5"), [[1, 2], [3, 4]]),
        ("a,b\n7,1\n5,3\n", None, [[7, 1], [5, 3]]),
        ('s,a,b\r\n"x, y","1", 2\r\nz,NA ,-1e5', ("x, y", "z"), [[1, 2], [NAN, -1e5]]),
        ("\ufeffs,a,b\nx,,NaN\ny,NULL,+4\n", ("x", "y"), [[NAN, NAN], [NAN, 4]]),
        ("s,a\n01,1\n02x,2\n", ("01", "02x"), [[1], [2]]),
    ],
)
def test_dialects_of_csv(tmp_path, content, samples, truth):
    read = read_views(write(tmp_path, "x.csv", content), cells=True)
    assert read.names == ("x",)
    assert read.sample_names == samples
    np.testing.assert_array_equal(read.matrices[0], truth)


@pytest.mark.parametrize("row", [0, 5000])
@pytest.mark.parametrize("cell", ["NA", " 2", "high"])
def test_what_is_no_plain_number_early_or_late_in_a_csv(tmp_path, row, cell):
    lines = [f"s{i},{i},{i}" for i in range(5001)]
    lines[row] = f"s{row},{cell},1"
    path = write(tmp_path, "x.csv", "\n".join(["s,a,b", *lines]))
    if cell == "high":
        with pytest.raises(ValueError, match=f"view 'x' holds 'high' in row {row + 1} of column 'a'; expected real numbers"):
            read_views(path, cells=True)
    truth = np.repeat(np.arange(5001.0)[:, None], 2, axis=1)
    truth[row] = NAN if cell == "NA" else 2, 1
    if cell != "high":
        np.testing.assert_array_equal(read_views(path, cells=True).matrices[0], truth)
    np.testing.assert_array_equal(read_views(path, views={"b": ["b"]}).matrices[0], truth[:, 1:])


def test_kinds_of_numbers_in_frames():
    nullable = pd.DataFrame(
        {
            "i": pd.array([1, None], dtype="Int64"),
            "b": [True, False],
            "o": pd.Series([None, 2], dtype=object),
            "f": np.float32([1, 2]),
        }
    )
    counted = pl.DataFrame({"i": [1, None], "b": [True, False], "o": [None, 2], "f": [1.0, 2.0], "n": [None, None]})
    read = read_views({"a": nullable, "b": counted}, cells=True)
    np.testing.assert_array_equal(read.matrices[0], [[1, 1, NAN, 1], [NAN, 0, 2, 2]])
    np.testing.assert_array_equal(read.matrices[1], [[1, 1, NAN, 1, NAN], [NAN, 0, 2, 2, NAN]])
    single = read_views([nullable[["f"]], counted.select(pl.col("f").cast(pl.Float32))])
    assert {matrix.dtype for matrix in single.matrices} == {np.dtype(np.float32)}


def peak_of(call):
    tracemalloc.start()
    try:
        result = call()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


def test_no_more_than_one_copy():
    X = RNG.standard_normal((500, 400))
    names = [f"s{i}" for i in range(500)]
    peak, read = peak_of(lambda: read_views(X, views=[100, 300]))
    assert all(np.shares_memory(X, matrix) for matrix in read.matrices)
    assert peak < X.nbytes / 2  # what is finite and what is not, a byte a cell
    first, moved = as_pandas(X[:, :200], map(str, range(200)), names), as_pandas(X[:, 200:], map(str, range(200)), names[::-1])
    peak, read = peak_of(lambda: read_views([first, moved]))
    assert np.shares_memory(X, read.matrices[0])
    assert peak < X.nbytes
    np.testing.assert_array_equal(read.matrices[1], X[::-1, 200:])


CUT = {
    "npz": ("named.npz", "not a zip file|No data left"),
    "npy": ("npy/rna.npy", "No data left|pickled|reading array header|read all data"),
    "parquet": ("parquet/rna.parquet", "out of specification"),
    "csv.gz": ("csv.gz/rna.csv.gz", "it is empty|Not a gzipped file|ended before the end-of-stream"),
    "h5mu": ("all.h5mu", "not an HDF5 file|open file"),
}
"""A file of each kind, and what is said of the first part of it."""


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.7, 0.97])
def test_files_that_are_cut_short(kind, share, folder, tmp_path):
    name, reason = CUT[kind]
    content = (folder / name).read_bytes()
    path = write(tmp_path, f"cut.{kind}", content[: int(share * len(content))])
    with pytest.raises(
        ValueError, match=rf"data: .*cut\.{kind} cannot be read \(.*({reason}).*\); expected \.{kind}$"
    ) as refusal:
        read_views(path)
    assert "\n" not in str(refusal.value)


TWO = {"a": as_pandas(RNA, "xyz"), "b": as_pandas(PROTEIN, "uv")}
FRAME = as_pandas(WHOLE, NAMED)
TEXT = "s,a,b\nx,1,2\ny,3,4\nz,high,6\n"
BAD = {
    # samples
    "samples twice": (
        lambda _: read_views({"a": as_pandas(RNA, "xyz", ("s1", "s2", "s1", "s4"))}),
        "view 'a' samples 's1' occur",
    ),
    "samples twice, csv": (lambda p: read_views(write(p, "x.csv", "s,a\nx,1\nx,2\n")), "x.csv: view 'x' samples 'x' occur more"),
    "samples without a name": (
        lambda _: read_views({"a": pl.DataFrame({"s": ["x", None], "u": [1, 2]})}),
        "data: view 'a' has no name for 1 of 2 samples; expected one for each",
    ),
    "no sample in all": (
        lambda _: read_views({"a": TWO["a"], "b": as_pandas(PROTEIN, "uv", "wxyz")}, join="inner"),
        "data: no sample is in all views: 's3' in view 'a', 'w' in view 'b'; expected names that match, or join='union'",
    ),
    "no sample in common": (
        lambda _: check_fittable(read_views({"a": TWO["a"], "b": as_pandas(PROTEIN, "uv", "wxyz")})),
        "data: view 'a' shares no sample with the others: it has 's3', they have 'w'; expected names that match",
    ),
    "lengths": (lambda _: read_views([RNA, PROTEIN[:3]]), r"data: view 2 has shape \(3, 2\); expected 4 rows, as view 1 has"),
    "lengths beside names": (
        lambda _: read_views({"a": TWO["a"], "b": PROTEIN[:3]}),
        "data: view 'b' has shape .* expected 4 rows",
    ),
    "two samples": (lambda _: check_fittable(read_views([RNA[:2]])), "data: hold 2 samples; expected at least 3"),
    "join": (lambda _: read_views(TWO, join="outer"), "join: is 'outer'; expected 'union' or 'inner'"),
    # values
    "text in a frame": (
        lambda _: read_views({"a": as_pandas(RNA, "xyz").assign(w=["1", None, "low", "2"])}),
        "data: view 'a' holds '1' in row 1 of column 'w'; expected real numbers",
    ),
    "text in a csv": (
        lambda p: read_views(write(p, "x.csv", TEXT)),
        r"data: .*x\.csv: view 'x' holds 'high' in row 3 of column 'a'; expected real numbers",
    ),
    "text in a csv, split": (
        lambda p: read_views(write(p, "x.csv", TEXT), views={"v": ["a"]}),
        "view 'v' holds 'high' in row 3 of",
    ),
    "text in parquet": (lambda p: read_views(parquet_with_text(p)), r"x\.parquet: view 'x' holds 'u' in row 2 of column 'b'"),
    "dates": (
        lambda _: read_views({"a": pl.DataFrame({"d": pl.Series(["2020-01-01"]).str.to_date()})}),
        "data: view 'a' has column 'd' of type Date; expected real numbers",
    ),
    "complex": (lambda _: read_views({"a": pd.DataFrame({"x": [1, 2j]})}), "data: view 'a' has type complex128, such as"),
    "dates in pandas": (
        lambda _: read_views({"a": pd.DataFrame({"x": [1.0], "d": pd.to_datetime(["2020-01-01"])})}),
        r"data: view 'a' holds Timestamp\('2020-01-01 00:00:00'\); expected real numbers",
    ),
    "an object": (lambda _: read_views({"a": pd.DataFrame({"x": [1.0, {}]})}), "data: view 'a' holds {}; expected real numbers"),
    "text in an array": (lambda _: read_views({"a": np.array([["1", "2"]])}), "data: view 'a' has type <U1, such as"),
    "infinite": (lambda _: read_views([RNA, np.where(PROTEIN > 1, np.inf, 0)]), "data: view 2 holds NaN or infinite values in"),
    "infinite cells": (lambda _: read_views([[[np.inf, NAN]]], cells=True), "data: view 1 holds infinite values in 1 of 2 cells"),
    "infinite in a csv": (
        lambda p: read_views(write(p, "x.csv", "s,a\nx,inf\n")),
        r"x\.csv: view 'x' holds NaN or infinite values",
    ),
    "cells": (
        lambda _: read_views([[[1.0, NAN], [NAN, NAN]]]),
        "data: view 1 holds NaN or infinite values in 1 of 4 cells; expected finite numbers, or rows that are NaN throughout",
    ),
    "no variance": (
        lambda _: check_fittable(read_views({"a": RNA, "b": RNA * 0 + 14.62})),
        "data: view 'b' has no variance; expected",
    ),
    "absent": (
        lambda _: check_fittable(read_views({"a": RNA, "b": RNA * NAN})),
        "data: view 'b' is absent from all 4 samples; exp",
    ),
    "no features": (
        lambda _: read_views({"a": RNA[:, :0]}),
        r"data: view 'a' has shape \(4, 0\); expected at least one sample and one",
    ),
    "no features, csv": (
        lambda p: read_views(write(p, "x.csv", "s\nx\ny\n")),
        r"x\.csv: view 'x' has shape .* expected at least one",
    ),
    "features twice": (lambda _: read_views({"a": as_pandas(RNA, "xyx")}), "data: view 'a' features 'x' occur more than once"),
    "features twice, csv": (
        lambda p: read_views(write(p, "x.csv", "s,a,a\nx,1,2\n")),
        r"x\.csv cannot be read \(its first line names 'a' more than once\); expected \.csv",
    ),
    # files
    "no such file": (lambda p: read_views(p / "x.csv"), r"data: no file .*x\.csv; expected \.csv"),
    "no such file, by name": (lambda p: read_views({"a": str(p / "x.npz")}), r"data: no file .*x\.npz; expected \.npz"),
    "unknown kind": (
        lambda p: read_views(write(p, "x.xlsx", "")),
        r"data: .*x\.xlsx is of unknown kind; expected one of \.npz, \.npy",
    ),
    "text, no path": (lambda _: read_views("rna"), r"data: rna is of unknown kind; expected one of \.npz"),
    "empty csv": (lambda p: read_views(write(p, "x.csv", "")), r"x\.csv cannot be read \(it is empty\)"),
    "header alone": (
        lambda p: read_views(write(p, "x.csv", "s,a\n")),
        r"x\.csv: view 'x' has shape \(0, 2\); expected at least one sample",
    ),
    "csv cut short": (
        lambda p: read_views(write(p, "x.csv", "s,a,b\nx,1,2\ny,3")),
        r"x\.csv cannot be read \(its last line has 2 of 3 fields\); expected \.csv",
    ),
    "long line": (lambda p: read_views(write(p, "x.csv", "s,a\nx,1\ny,2,3\n")), r"x\.csv cannot be read \(found more fields"),
    "separator": (
        lambda p: read_views(write(p, "x.csv", "s;a\nx;1\n")),
        r"cannot be read \(its columns are not separated by ','\)",
    ),
    "encoding": (lambda p: read_views(write(p, "x.csv", "s,a\nx,1\n".encode("utf-16"))), r"x\.csv cannot be read \(.*codec"),
    "not gz": (lambda p: read_views(write(p, "x.csv.gz", TEXT)), r"x\.csv\.gz cannot be read \(Not a gzipped file"),
    "damaged gz": (
        lambda p: read_views(write(p, "x.csv.gz", damaged(gzip.compress(TEXT.encode())))),
        r"csv\.gz cannot be read \(",
    ),
    "no matrix in npz": (lambda p: read_views(npz(p, y=np.arange(3))), r"no matrix of numbers among its arrays: 'y' \(3,\)"),
    "names in npz": (
        lambda p: read_views(npz(p, a=RNA, a_names=np.array(["x"]))),
        "view 'a' has 3 features and 1 names; expected as",
    ),
    "empty folder": (lambda p: read_views(p), "data: the folder .* holds no file of views; expected some of"),
    "several in one": (lambda p: read_views({"a": npz(p, u=RNA, v=RNA)}), "data: 'a' holds views 'u', 'v'; expected one"),
    "two of one name": (
        lambda p: read_views([npz(p, u=RNA), npz(p, u=RNA)]),
        "data: views 'u' occur more than once; expected each once",
    ),
    "two of one name, text": (lambda _: read_views({1: RNA, "1": RNA}), "data: views '1' occur more than once"),
    "nothing": (lambda _: read_views({}), "data: holds no view"),
    "nothing in MuData": (lambda _: read_views(no_modality()), "data: holds no view"),
    "a number": (lambda _: read_views(3), "data: is 3; expected matrices"),
    "None": (lambda _: read_views({"a": RNA, "b": None}), r"data: view 'b' has shape \(\); expected a matrix"),
    # views
    "unknown columns": (
        lambda _: read_views(FRAME, views={"a": ["TP53", "X1", "X2"]}),
        "views: 'a' has columns 'X1', 'X2'; expected some of the 5: 'TP53', 'MYC', 'KRAS', 'p53', 'AKT'",
    ),
    "columns of two views": (
        lambda _: read_views(FRAME, views={"a": slice(0, 3), "b": slice(2, 5)}),
        "views: columns 'KRAS' are chosen more than once, by 'a', 'b'; expected each once",
    ),
    "columns twice": (lambda _: read_views(WHOLE, views={"a": [1, 1]}), "views: columns '1' are chosen more than once, by 'a'"),
    "negative": (
        lambda _: read_views(WHOLE, views={"a": [0, -1]}),
        "views: 'a' has columns -1; expected some of the 5: places from 0 to 4",
    ),
    "negative slice": (
        lambda _: read_views(WHOLE, views={"a": slice(-2, None)}),
        r"views: 'a' is slice\(-2, None, None\); expected",
    ),
    "too far": (lambda _: read_views(WHOLE, views={"a": slice(0, 9)}), "views: 'a' is .* expected places from 0 to 5"),
    "no columns": (lambda _: read_views(WHOLE, views={"a": []}), "views: 'a' has no columns; expected at least one"),
    "booleans": (lambda _: read_views(WHOLE, views={"a": [True]}), "views: 'a' has 1 booleans; expected 5, one for each column"),
    "widths": (lambda _: read_views(WHOLE, views=[3, 3]), "views: are 6 columns wide together; expected 5, as there are"),
    "no widths": (
        lambda _: read_views(WHOLE, views=[3, -2]),
        r"views: is \[3, -2\]; expected {view: columns}, widths",
    ),
    "a number of views": (lambda _: read_views(WHOLE, views=2), "views: is 2; expected {view: columns}"),
    "separator that lacks": (
        lambda _: read_views(FRAME, views=":"),
        "views: is ':', which columns 'TP53', 'MYC'.* lack; expected",
    ),
    "no view of any": (lambda _: read_views(FRAME, views=lambda name: None), "views: no column belongs to any; expected"),
    "unknown views": (
        lambda _: read_views(TWO, views=["a", "c"]),
        "views: 'c' are not among the data; expected some of 'a', 'b'",
    ),
    "columns of several": (
        lambda _: read_views(TWO, views={"a": [0]}),
        "views: is .* expected a list of some of the 2 views' names",
    ),
    # new data
    "features missing": (
        lambda _: match_features(read_views(TWO), ("a", "b"), ("xyz", ("u", *map(str, range(9))))),
        "data: view 'b' lacks 9 of the fit's 10 features: '0', '1', '2', '3', '4', … \\(9 in all\\); expected all of them",
    ),
    "other width": (
        lambda _: match_features(read_views([RNA]), ("a",), (("x", "y"),)),
        "data: view 'a' has 3 features without names; expected 2, as the fit has",
    ),
    "other views": (
        lambda _: match_features(read_views({"mRNA": RNA}), ("rna", "b"), ("xyz", "uv")),
        "data: has views 'mRNA' and lacks 'rna', 'b'; expected the names that the fit has",
    ),
}


def parquet_with_text(folder):
    pl.DataFrame({"a": [1, 2], "b": [None, "u"]}).write_parquet(folder / "x.parquet")
    return folder / "x.parquet"


def npz(folder, **arrays):
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def no_modality():
    mudata = annotated()[1]
    mudata.mod.clear()
    return mudata


def damaged(content):
    return content[:15] + bytes([content[15] ^ 255]) + content[16:]


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_refused_in_one_line(case, tmp_path):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message) as refusal:
        call(tmp_path)
    said = str(refusal.value)
    assert "\n" not in said
    assert said.startswith(("data: ", "views: ", "join: "))
    assert "; expected " in said


@pytest.mark.parametrize("package", ["mudata", "anndata"])
def test_what_a_file_needs_is_said(package, folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    path = folder / "all.h5mu" if package == "mudata" else folder / "h5ad" / "rna.h5ad"
    with pytest.raises(ValueError, match=rf"needs the package {package}; expected it from pip install hcl_jax\[mudata\]"):
        read_views(path)


def test_new_data_take_the_order_and_the_names_of_a_fit():
    fit = read_views(TWO)
    new = read_views(
        {"b": TWO["b"][["v", "u"]].assign(more=0.0), "a": as_polars(RNA[:, [2, 0, 1]], "zxy"), "c": as_pandas(RNA, "xyz")}
    )
    found = match_features(new, fit.names, fit.feature_names)
    assert found.names == fit.names
    assert found.feature_names == fit.feature_names
    assert found.sample_names == SAMPLES
    np.testing.assert_array_equal(found.joined(), fit.joined())
    assert left_out(new, fit.names, fit.feature_names) == {"b": 1, "c": 3}
    assert match_features(fit, fit.names, fit.feature_names).matrices[0] is fit.matrices[0]


def test_a_view_that_new_data_lack_is_nan():
    fit = read_views(TWO)
    found = match_features(read_views({"b": TWO["b"]}), fit.names, fit.feature_names)
    assert found.dims == fit.dims
    assert np.isnan(found.matrices[0]).all()
    np.testing.assert_array_equal(found.matrices[1], PROTEIN)


@pytest.mark.parametrize("new", [[RNA, PROTEIN], {"a": RNA, "b": PROTEIN}, {"b": TWO["b"], "a": RNA}])
def test_features_without_names_go_by_their_place(new):
    for fit in (read_views(TWO), read_views({"a": RNA, "b": PROTEIN})):
        found = match_features(read_views(new), fit.names, fit.feature_names)
        assert found.names == ("a", "b")
        np.testing.assert_array_equal(found.joined(), WHOLE)


def held(*matrices, samples=None):
    features = tuple(tuple(map(str, range(matrix.shape[1]))) for matrix in matrices)
    return Views(matrices, tuple("abc"[: len(matrices)]), features, samples)


MANY = np.random.default_rng(1).standard_normal((30, 4))
SOME = np.where(np.arange(30)[:, None] < 9, MANY, NAN), np.where(np.arange(30)[:, None] > 6, MANY, NAN)


@pytest.mark.parametrize(
    ("views", "sentences"),
    [
        (held(MANY, MANY[:, :2]), []),
        (held(RNA[:2]), ["There are 2 samples: a fit needs at least 3."]),
        (held(RNA, samples=("s", "t", "s", "u")), ["Samples 's' occur more than once."]),
        (held(np.where([[1], [0], [1], [1]], RNA, NAN), samples=SAMPLES), ["1 of 4 samples lack all views: 's1'."]),
        (held(RNA, RNA * NAN), ["View 'b' is absent from all samples."]),
        (held(RNA, PROTEIN * 0 + 14.62), ["View 'b' has no variance: all its features are constant."]),
        (held(MANY * [1, 0, 0, 1]), ["View 'a' has 2 of 4 features that are constant."]),
        (held(np.where(MANY[3, 2] == MANY, np.inf, MANY)), ["View 'a' holds 1 infinite values."]),
        (
            held(MANY, np.where(np.arange(30)[:, None] < 20, np.where(MANY[3, 2] == MANY, NAN, MANY), NAN)),
            ["View 'b' lacks 1 of the 80 cells of the samples that have it."],
        ),
        (held(*SOME), ["Views 'a' and 'b' share 2 of 30 samples."]),
        (
            read_views({"a": pd.DataFrame({"patient_id": [7, 3, 5], "x": [1.0, 2.0, 4.0]})}),
            ["View 'a' begins with 'patient_id', which looks like the samples' numbers: it is taken for a feature."],
        ),
    ],
)
def test_what_an_analyst_should_know(views, sentences):
    assert problems(views) == sentences


def test_data_that_can_be_fitted():
    check_fittable(held(MANY, MANY[:, :2]))
    check_fittable(held(np.where(np.arange(30)[:, None] < 20, MANY, NAN), MANY))
    check_fittable(held(MANY))
