"""Benchmarks run, and say so when they are asked for what they do not have."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import assert_at_least, assert_at_most

import estimators
import likelihood_race
import many_rows
import recovery_throughput
import replicates
from figures import sizes
from measuring import PeakMemory, interleaved

SCRIPTS = Path(__file__).parent.parent / "benchmarks"


def run(*arguments, script="recovery_throughput.py"):
    return subprocess.run([sys.executable, SCRIPTS / script, *arguments], capture_output=True, text=True, check=False)


def printed_rows(done, start):
    """The cells of the printed rows that start so."""
    assert done.returncode == 0, done.stderr
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith(start)]


@pytest.mark.slow
@pytest.mark.long
def test_throughput_prints_both_tables():
    case, brief = ["--cases", "equal-float32", "--noise-variances", "1"], ["--n", "2000", "--rounds", "1", "--threads", "1"]
    done = run(*case, *brief, "--descent-seconds", "2")
    rows = printed_rows(done, "| (100, 100, 100)")
    assert len(rows) == 2
    assert rows[0][-1] == "0"  # nothing compiled during the rounds
    assert "never: stops at i = 101" in done.stdout


def test_a_bad_argument_ends_in_one_line():
    done = run("--threads", "4096")
    assert done.returncode != 0
    assert re.fullmatch(r"error: --threads: is 4096; expected 1 to \d+, the cores of this process\n", done.stderr)


def test_peak_memory_sees_what_is_taken_and_not_what_is_mapped(tmp_path):
    np.save(tmp_path / "mapped.npy", np.ones(10_000_000))
    with PeakMemory() as anonymous:
        values = np.ones(10_000_000)
        values.sum()
        del values
    with PeakMemory() as mapped:
        np.load(tmp_path / "mapped.npy", mmap_mode="r").sum()
    assert_at_least(anonymous.growth, 60e6, "80 MB that were given back at once")
    assert_at_most(mapped.growth, 20e6, "80 MB of a file")


def test_competitors_take_turns_in_both_orders():
    calls = []
    seconds = interleaved({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2)
    assert calls == ["a", "b", "b", "a"]
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_many_rows_at_a_small_size(tmp_path):
    """300,000 rows of 90 features are 108 MB of files. The speed is that of a busy machine: only its order is held."""
    done = run("--rows", "300000", "--dims", "40", "30", "20", "--threads", "1", "--folder", tmp_path, script="many_rows.py")
    (row,) = printed_rows(done, "| 300,000 × 90")
    assert_at_least(float(row[5]), 0.2, "of the speed of one BLAS pass")
    assert_at_most(float(row[6].split()[0]), 300, "MB of anonymous memory, Python and JAX included")
    assert_at_most(float(row[7]), 2e-7, "error in float32")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.long
def test_large_problems_at_a_small_size():
    done = run(
        "--features", "600", "1200", "--samples", "50", "--modality-dim", "40", "--rounds", "1", script="large_problems.py"
    )
    assert done.returncode == 0, done.stderr
    fits = [line.split() for line in done.stdout.splitlines() if "hcl-" in line]
    assert len(fits) == 5
    assert all(fit[-2] == "0" for fit in fits), done.stdout  # converged
    assert "2 times the features" in done.stdout


@pytest.mark.slow
@pytest.mark.long
def test_likelihood_race_is_won():
    """By five times where nothing else runs (docs/performance.md); on a busy machine still by more than a half."""
    (row,) = printed_rows(
        run("--cases", "equal", "--noise-variances", "1", "--rounds", "3", script="likelihood_race.py"), "| 100/100/100"
    )
    assert_at_least(float(row[6]), 1.5, "times as fast as EM")
    assert_at_most(float(row[7].split(", ")[2].split()[0]), 1e-6, "below the maximum where hcl-ml stops by itself")


@pytest.mark.slow
@pytest.mark.long
def test_sizes_and_replicates_write_tables_that_are_drawn(tmp_path):
    grids = ["--n-grid", "1000", "--d-grid", "--rank-grid", "--modalities-grid", "2", "--rounds", "1"]
    written = run(*grids, "--methods", "hcl-svd", "numpy-em", "pca", "--output", tmp_path / "sizes.csv", script="estimators.py")
    assert [row[0] for row in printed_rows(written, "|")[2:]] == ["n", "M"]
    few = [
        "--replicates",
        "1",
        "4",
        "--methods",
        "hcl-svd",
        "--dims",
        "20",
        "20",
        "--rank",
        "2",
        "--rounds",
        "1",
        "--threads",
        "1",
    ]
    swept = run(*few, "--output", tmp_path / "replicates.csv", script="replicates.py")
    assert [row[1] for row in printed_rows(swept, "| hcl-svd")] == ["1", "4"]
    table = sizes.read_tables(tmp_path)
    assert len(table) == 2 * 3 + 2 * 2
    assert (table["seconds"] > 0).all()
    assert len(sizes.fig_sizes(table).axes) == 2 * 3


def test_figure_draws_each_sweep_and_method_of_the_table():
    rows = [(sweep, size, method, size * 1e-3, 5.0) for sweep in "nK" for size in (10, 1000) for method in ("hcl-ml", "pca")]
    table = pl.DataFrame(rows, ["sweep", "size", "method", "seconds", "megabytes"], orient="row")
    figure = sizes.fig_sizes(table)
    assert [panel.get_xlabel() for panel in figure.axes] == ["", "", "rows n", "factors K"]
    for panel, values in zip(figure.axes, ([0.01, 1.0],) * 2 + ([5.0, 5.0],) * 2, strict=True):
        assert [line.get_ydata().tolist() for line in panel.lines] == [values] * 2
        assert [line.get_label() for line in panel.lines] == ["HCL-ML", "PCA, scikit-learn"]


def test_figure_needs_a_table(tmp_path):
    with pytest.raises(ValueError, match="results: no .csv in"):
        sizes.read_tables(tmp_path)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (recovery_throughput, {"cases": ("nonsense",)}, "--cases: unknown 'nonsense'; expected some of equal-float32"),
        (recovery_throughput, {"noise_variances": (-1.0,)}, "--noise-variances: holds -1; expected positive numbers"),
        (recovery_throughput, {"rounds": 0}, "--rounds: is 0; expected at least 1"),
        (many_rows, {"rows": 1}, "--rows: is 1; expected at least 2"),
        (many_rows, {"rows": 10**12}, "--rows: is 1000000000000, files of 1.2e+06 GB; expected at most"),
        (many_rows, {"dims": ()}, "--dims: is (); expected"),
        (many_rows, {"rounds": 0}, "--rounds: is 0"),
        (likelihood_race, {"cases": ("nonsense",)}, "--cases: unknown 'nonsense'; expected some of equal, released"),
        (likelihood_race, {"noise_variances": (0.0,)}, "--noise-variances: holds 0; expected positive"),
        (likelihood_race, {"n": 1000}, "--n: is 1000; expected at least 1401"),
        (likelihood_race, {"rounds": 0}, "--rounds: is 0"),
        (estimators, {"methods": ("nonsense",)}, "--methods: unknown 'nonsense'; expected some of hcl-svd"),
        (estimators, {"n_grid": (30,)}, "--n-grid: holds 30; expected more than 36"),
        (estimators, {"noise_variance": -1.0}, "--noise-variance: is -1"),
        (estimators, {"rounds": 0}, "--rounds: is 0"),
        (replicates, {"methods": ("nonsense",)}, "--methods: unknown 'nonsense'; expected some of hcl-vb"),
        (replicates, {"replicates": ()}, "--replicates: are (); expected positive"),
        (replicates, {"n": 300}, "--n: is 300; expected more than the 300 features"),
        (replicates, {"rounds": 0}, "--rounds: is 0"),
    ],
)
def test_arguments_are_checked_before_anything_runs(script, arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        script.check(script.Arguments(**arguments))
