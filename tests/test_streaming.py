"""Covariances of rows that come in chunks: against one product in float64, whatever the chunks, the files and the processes."""

import functools
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from helpers import PROPERTY, assert_at_most, assert_close, fitted_by
from hypothesis import given
from hypothesis import strategies as st

from hcl_jax import Hierarchy, SampleCovariance
from hcl_jax.streaming import (
    CovarianceAccumulator,
    CovarianceSums,
    accumulate,
    accumulate_npy,
    accumulate_parquet,
    row_ranges,
)

DIMS = (4, 3, 5)


def draw_views(n=700, mean=0.0, dtype=np.float64, seed=0):
    """Correlated rows of three views whose features have means and scales of their own."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(0.5, 2, sum(DIMS))
    rows = (rng.standard_normal((n, sum(DIMS))) @ rng.standard_normal((sum(DIMS), sum(DIMS))) + mean) * scales
    return [view.astype(dtype) for view in np.split(rows, np.cumsum(DIMS)[:-1], axis=1)]


def direct(views):
    """The covariance of the values as they are stored, in float64."""
    return np.cov(np.concatenate(views, axis=1).astype(float).T)


def in_chunks(views, edges):
    bounds = [0, *edges, len(views[0])]
    return ([view[start:stop] for view in views] for start, stop in zip(bounds[:-1], bounds[1:], strict=True))


def largest_error(actual, expected):
    """In units of √(S_ii S_jj)."""
    scale = np.sqrt(np.diagonal(expected))
    return np.max(np.abs(np.asarray(actual, float) - expected) / scale[:, None] / scale[None, :])


@pytest.fixture
def npy(tmp_path):
    def save(views):
        paths = [tmp_path / f"view{m}.npy" for m in range(1, len(views) + 1)]
        for path, view in zip(paths, views, strict=True):
            np.save(path, view)
        return paths

    return save


def test_chunks_give_the_covariance_of_all_rows():
    views = draw_views(mean=3.0)
    covariance = accumulate(in_chunks(views, [300, 301, 500]), block_rows=128).covariance()
    assert_close(covariance.matrix, direct(views), "covariance")
    assert_close(covariance.matrix, SampleCovariance.from_data([jnp.asarray(view) for view in views]).matrix, "from_data")
    assert covariance.n == 700


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_symmetric_to_the_last_bit(dtype):
    """By construction: whatever the two triangles of a product are on this processor."""
    views = draw_views(mean=3.0, dtype=dtype)
    parts = [accumulate(in_chunks([view[rows] for view in views], [50]), block_rows=64) for rows in row_ranges(700, 3)]
    combined = functools.reduce(CovarianceSums.combine, parts)
    for sums in (*parts, combined):
        for products in (sums.outer, np.asarray(sums.covariance().matrix)):
            assert np.array_equal(products, products.T)


@PROPERTY
@given(st.lists(st.integers(0, 700), max_size=8), st.sampled_from([np.float32, np.float64]))
def test_the_division_into_chunks_does_not_change_a_bit(edges, dtype):
    views = draw_views(dtype=dtype, mean=10.0)
    whole = accumulate([views], block_rows=64)
    parts = accumulate(in_chunks(views, sorted(edges)), block_rows=64)
    for one, other in ((whole.outer, parts.outer), (whole.total, parts.total), (whole.shift, parts.shift)):
        assert np.array_equal(one, other)


def test_sums_may_be_read_between_chunks():
    views = draw_views()
    accumulator = CovarianceAccumulator(DIMS, np.float64, block_rows=1000)
    for stop, chunk in zip((100, 700), in_chunks(views, [100]), strict=True):
        accumulator.update(chunk)
        sums = accumulator.sums()
        assert sums.n == stop
        assert_close(sums.covariance().matrix, direct([view[:stop] for view in views]), f"after {stop} rows")
        assert_close(sums.mean(), np.concatenate([view[:stop].mean(axis=0) for view in views]), "mean")


@pytest.mark.parametrize("block_rows", [100, None])
def test_float32_keeps_its_precision_far_from_zero(block_rows):
    """Means of 1e4 standard deviations, where E[x²] − E[x]² in float32 has no correct digit (and in float64 half of them)."""
    views = draw_views(n=100_000, mean=3.5e4, dtype=np.float32)
    expected = direct(views)
    scale = np.max(np.abs(np.concatenate([view.mean(axis=0) for view in views])) / np.sqrt(np.diagonal(expected)))
    assert scale > 9e3
    # float32 leaves such values some 12 bits about the mean; squares of whole multiples of the last one are more often rounded
    # down than up, by 6e-8 in each of some ten additions
    assert_at_most(largest_error(accumulate([views], block_rows=block_rows).covariance().matrix, expected), 1e-6, "float32")


def test_float32_keeps_its_precision_near_zero():
    views = draw_views(n=100_000, dtype=np.float32)
    assert_at_most(largest_error(accumulate([views]).covariance().matrix, direct(views)), 1e-7, "float32")


def test_scales_may_differ_by_sixteen_decades_in_float32():
    views = [view * np.float32(scale) for view, scale in zip(draw_views(dtype=np.float32), (1e-8, 1.0, 1e8), strict=True)]
    assert_at_most(largest_error(accumulate([views]).covariance().matrix, direct(views)), 1e-6, "scales")


@PROPERTY
@given(st.permutations(range(4)), st.booleans())
def test_partial_sums_combine_in_any_order(order, same_shift):
    views = draw_views(mean=50.0)
    shift = np.full(sum(DIMS), 40.0) if same_shift else None
    parts = [accumulate([[view[rows] for view in views]], shift=shift) for rows in row_ranges(700, 4)]
    combined = functools.reduce(CovarianceSums.combine, [parts[i] for i in order])
    assert combined.n == 700
    if same_shift:
        assert_close(combined.outer, sum(part.outer for part in parts), "additions", slack=10)
    # about the mean 40 the sums are at most (10/0.5)² times the covariances, and so are their roundings
    assert_close(combined.covariance().matrix, direct(views), "combined", slack=1e4)


def test_combining_shifts_that_are_far_apart():
    """Two batches with means 1e3 apart: the moves between the shifts are the covariance."""
    views = draw_views()
    moved = [np.concatenate([view, view + 1e3]) for view in views]
    halves = [accumulate([[view[rows] for view in moved]]) for rows in row_ranges(1400, 2)]
    assert_close(halves[0].combine(halves[1]).covariance().matrix, direct(moved), "batches")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtypes", [(np.float32,) * 3, (np.float32, np.float64, np.int16)], ids=["float32", "mixed"])
def test_npy_files_are_mapped_and_a_range_of_rows_taken(npy, dtypes, order):
    views = [(10 * view).astype(dtype, order=order) for view, dtype in zip(draw_views(), dtypes, strict=True)]
    sums = accumulate_npy(npy(views), rows=slice(50, 650), block_rows=64)
    selected = [view[50:650] for view in views]
    assert sums.n == 600
    assert sums.dtype == np.result_type(*dtypes)
    assert_close(sums.covariance().matrix, direct(selected), "files")


@pytest.mark.parametrize("dtype", ["float16", ">f2", ">f4", ">f8", "int32", ">i2", "uint8"])
def test_any_real_numbers_in_any_byte_order_are_taken(npy, dtype):
    """In files, in chunks and in memory, each to the precision that it computes in."""
    views = [np.clip(10 * view + 100, 0, 255).astype(dtype) for view in draw_views(n=60)]
    expected = direct(views)
    for read in (
        lambda: accumulate_npy(npy(views)).covariance(),
        lambda: accumulate([views]).covariance(),
        lambda: accumulate([[jnp.asarray(view.astype(view.dtype.newbyteorder("="))) for view in views]]).covariance(),
        lambda: accumulate([[view.tolist() for view in views]]).covariance(),
        lambda: SampleCovariance.from_data(views, form="matrix"),
    ):
        assert_at_most(largest_error(read().matrix, expected), 1e-5, f"{dtype}: error in units of the variances")


def test_chunks_may_be_dictionaries_and_frames_and_their_names_stay():
    views = draw_views(n=60)
    expected = accumulate([views]).covariance().matrix
    for form in (pl.DataFrame, np.asarray, jnp.asarray, np.ndarray.tolist):
        chunks = [{"a": form(views[0][rows]), "b": form(views[1][rows]), "c": form(views[2][rows])} for rows in row_ranges(60, 3)]
        assert_close(accumulate(chunks).covariance().matrix, expected, "by name")
        assert_close(accumulate(list(chunk.values()) for chunk in chunks).covariance().matrix, expected, "in lists")
    frame = pl.DataFrame(views[0], schema=list("wxyz"))
    with pytest.raises(
        ValueError, match="views: view 1 has a feature named 'x'; expected 'w' in its place, as in the first chunk"
    ):
        accumulate([[frame], [frame.select("x", "w", "y", "z")]])


def test_one_path_is_one_view_and_a_shift_may_be_a_list(npy, tmp_path):
    view = draw_views()[0]
    path, parquet = npy([view])[0], tmp_path / "view.parquet"
    pl.DataFrame(view).write_parquet(parquet)
    for sums in (
        accumulate_npy(path),
        accumulate_npy(str(path)),
        accumulate_parquet(parquet),
        accumulate([[view]], shift=[0] * 4),
    ):
        assert_close(sums.covariance().matrix, direct([view]), "one view", slack=10)


def test_a_path_that_exists_is_no_glob_and_the_files_of_a_glob_are_alike(tmp_path):
    rows = draw_views(n=20)[0]
    frame = pl.DataFrame(rows, schema=list("abcd"))
    frame.write_parquet(tmp_path / "batch [2].parquet")
    frame[["d", "b", "a", "c"]].write_parquet(tmp_path / "batch [3].parquet")
    for path in ("batch [2].parquet", "batch *.parquet"):
        covariance = accumulate_parquet([tmp_path / path]).covariance()
        copies = 2 if "*" in path else 1
        assert_close(covariance.matrix, direct([np.concatenate([rows] * copies)]), path)
    for name, second, message in (
        (
            "dtype",
            frame.cast({"b": pl.Float32}),
            "column 'b' of .*dtype2.parquet is Float32; expected Float64, as in .*dtype1.parquet",
        ),
        ("less", frame.drop("c"), "column 'c' of .*less2.parquet is missing; expected Float64"),
        ("more", frame.with_columns(e=1.0), "column 'e' of .*more2.parquet is Float64; expected missing"),
    ):
        frame.write_parquet(tmp_path / f"{name}1.parquet")
        second.write_parquet(tmp_path / f"{name}2.parquet")
        with pytest.raises(ValueError, match=f"paths: {message}"):
            accumulate_parquet([tmp_path / f"{name}*.parquet"])


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "damaged.parquet"
    pl.DataFrame(draw_views()[0]).write_parquet(path)
    content = bytearray(path.read_bytes())
    content[100:2000] = bytes(1900)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="paths: .*damaged.parquet cannot be read"):
        accumulate_parquet([path])


@pytest.mark.parametrize("separate", [True, False])
def test_parquet_files_are_read_in_pieces(tmp_path, separate):
    views = draw_views(mean=2.0)
    names = [[f"{m}.{i}" for i in range(dim)] for m, dim in enumerate(DIMS)]
    frames = [pl.DataFrame(view, schema=columns) for view, columns in zip(views, names, strict=True)]
    row_bytes = 8 * sum(DIMS)
    if separate:  # the second view in two files, found by a glob, and rows in groups of 100
        for start, name in ((0, "a"), (300, "b")):
            frames[1][start : start + (300 if name == "a" else 400)].write_parquet(tmp_path / f"1{name}.parquet")
        for m in (0, 2):
            frames[m].write_parquet(tmp_path / f"{m}.parquet", row_group_size=100)
        sums = accumulate_parquet(
            [tmp_path / "0.parquet", f"{tmp_path}/1*.parquet", tmp_path / "2.parquet"], memory=60 * row_bytes
        )
    else:
        path = tmp_path / "all.parquet"
        pl.concat([*frames, pl.DataFrame({"label": ["x"] * 700})], how="horizontal").write_parquet(path)
        sums = accumulate_parquet([path] * 3, names, memory=60 * row_bytes)
    assert_close(sums.covariance().matrix, direct(views), "parquet")
    part = accumulate_parquet([tmp_path / "all.parquet"] * 3, names, rows=slice(200, 500)) if not separate else None
    if part is not None:
        assert_close(part.covariance().matrix, direct([view[200:500] for view in views]), "rows of parquet")


def partial_sums(paths, rows):
    return accumulate_npy(paths, rows=rows)


def test_processes_take_ranges_of_rows(npy):
    views = draw_views(dtype=np.float32, mean=100.0)
    part = functools.partial(partial_sums, npy(views))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(part, row_ranges(700, 4)))
    covariance = functools.reduce(CovarianceSums.combine, parts).covariance()
    assert_at_most(largest_error(covariance.matrix, direct(views)), 1e-6, "four processes' parts")


def test_a_fit_from_accumulated_sums_is_that_from_the_data():
    views = [view / 10 for view in draw_views(n=3000)]
    hierarchy = Hierarchy(DIMS, {(1, 2, 3): 1, (1, 3): 1})
    fit = fitted_by("hcl-svd")
    streamed = fit(accumulate([views], block_rows=500).covariance(), hierarchy)
    at_once = fit(SampleCovariance.from_data([jnp.asarray(view) for view in views]), hierarchy)
    assert_close(streamed.loadings @ streamed.loadings.T, at_once.loadings @ at_once.loadings.T, "fit", slack=1e6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [5, 333])
def test_values_that_are_not_finite_are_named(npy, bad, row):
    views = draw_views()
    views[1][row, 2] = bad
    start = row // 100 * 100
    message = rf"view 2, rows {start} to {start + 99}: NaN or infinite values; expected finite"
    with pytest.raises(ValueError, match=message):
        accumulate([views], block_rows=100)
    with pytest.raises(ValueError, match=rf"view 2, rows {row - 1} to"):
        accumulate_npy(npy(views), rows=slice(row - 1, None), block_rows=100)


def test_values_too_large_for_the_precision_are_named():
    views = draw_views(dtype=np.float32)
    views[2] = views[2] * np.float32(1e25)
    with pytest.raises(ValueError, match="view 3, rows 0 to 699: values whose squares exceed float32"):
        accumulate([views])


def test_a_view_that_ends_early_is_named(npy, tmp_path):
    views = draw_views()
    chunks = [[view[:300] for view in views], [views[0][300:], views[1][300:650], views[2][300:]]]
    with pytest.raises(ValueError, match=r"views: view 2 ends before row 650; expected 700 rows or more, as view 1 has"):
        accumulate(chunks)
    short = [views[0], views[1], views[2][:690]]
    with pytest.raises(ValueError, match=r"paths: view 3, .*view3.npy, has 690 rows; expected 700, as .*view1.npy has"):
        accumulate_npy(npy(short))
    paths = [tmp_path / f"{m}.parquet" for m in range(3)]
    for path, view in zip(paths, short, strict=True):
        pl.DataFrame(view).write_parquet(path)
    with pytest.raises(ValueError, match=r"paths: view 3, .*2.parquet, has 690 rows; expected 700, as .*0.parquet has"):
        accumulate_parquet(paths)


def test_missing_values_in_parquet_are_found(tmp_path):
    frame = pl.DataFrame({"a": [1.0, None, 3.0], "b": [1, 2, 4]})
    frame.write_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="view 1, rows 0 to 2: NaN"):
        accumulate_parquet([tmp_path / "x.parquet"])


def test_bad_arguments_are_named_before_computing(npy, tmp_path):
    views = draw_views()
    paths = npy(views)
    (tmp_path / "text.npy").write_text("nothing")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and nothing more")
    np.save(tmp_path / "vector.npy", np.zeros(3))
    pl.DataFrame({"a": [1.0], "label": ["x"]}).write_parquet(tmp_path / "x.parquet")
    parquet = [tmp_path / "x.parquet"]
    cases = {
        "chunks: are none": lambda: accumulate([]),
        "views: have no rows": lambda: accumulate([[view[:0] for view in views]]),
        "views: are 2; expected 3": lambda: accumulate([views, views[:2]]),
        "views: view 2 has shape (700, 4)": lambda: accumulate([views, [views[0], views[0], views[2]]]),
        "views: view 1 has shape (700,)": lambda: accumulate([[views[0][:, 0]]]),
        "views: view 1 has type complex128": lambda: accumulate([[views[0] * 1j]]),
        "views: view 2 has type complex64": lambda: accumulate([[*views[:2]], [views[0], views[1].astype(np.complex64)]]),
        "views: view 1 holds NaN or infinite values": lambda: accumulate([[np.ma.masked_less(views[0], 0)]]),
        "views: view 1 cannot be read as numbers": lambda: accumulate([[[[1.0, 2.0], [3.0]]]]),
        "dtype: is complex128": lambda: CovarianceAccumulator((3,), complex),
        "dims: is (0,)": lambda: CovarianceAccumulator((0,)),
        "views: view 1 has shape (700, 0)": lambda: accumulate([[views[0][:, :0]]]),
        "chunks: one is of type ndarray of shape (700, 4); expected every chunk as a list": lambda: accumulate([views[0]]),
        "views: one is named 'b'; expected 'a' in its place": lambda: accumulate([{"a": views[0]}, {"b": views[0]}]),
        "block_rows: is 0": lambda: accumulate([views], block_rows=0),
        "memory: is 10; expected room": lambda: accumulate([views], memory=10),
        "shift: has shape (3,)": lambda: accumulate([views], shift=np.zeros(3)),
        "paths: are none": lambda: accumulate_npy([]),
        "nothing.npy cannot be mapped": lambda: accumulate_npy([tmp_path / "nothing.npy"]),
        "cut.npz cannot be mapped": lambda: accumulate_npy([tmp_path / "cut.npz"]),
        "text.npy cannot be mapped": lambda: accumulate_npy([tmp_path / "text.npy"]),
        "vector.npy has shape (3,)": lambda: accumulate_npy([tmp_path / "vector.npy"]),
        "rows: is slice(700, None, None)": lambda: accumulate_npy(paths, rows=slice(700, None)),
        "rows: is slice(0, 10, 2)": lambda: accumulate_npy(paths, rows=slice(0, 10, 2)),
        "parts: is 8; expected from 1 to 7": lambda: row_ranges(7, 8),
        "n: is 1; expected at least 2": lambda: accumulate([[view[:1] for view in views]]).covariance(),
        "other: has 4 features; expected 12": lambda: accumulate([views]).combine(accumulate([views[:1]])),
        "columns: 'label' is String": lambda: accumulate_parquet(parquet),
        "columns: 'c' is missing": lambda: accumulate_parquet(parquet, [["c"]]),
        "columns: has lists for 2 views; expected 1": lambda: accumulate_parquet(parquet, [["a"], ["a"]]),
        "y.parquet cannot be read": lambda: accumulate_parquet([tmp_path / "y.parquet"]),
    }
    for message, compute in cases.items():
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            compute()
        assert "\n" not in str(caught.value)
