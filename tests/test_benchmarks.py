"""Benchmarks run, and say so when they are asked for what they do not have."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
import polars as pl
import pytest
from helpers import assert_at_least, assert_at_most, relative

import estimators
import likelihood_race
import many_rows
import networks
import recovery_throughput
import replicates
from figures import sizes
from hcl_jax.networks import factorcl
from hcl_jax.networks.training import Batch, TrainingConfig
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


def test_networks_do_without_pytorch_and_a_bad_argument_ends_in_one_line():
    done = run("--tables", "steps", "--networks", script="networks.py")
    assert done.returncode == 0, done.stderr
    assert (networks.NO_TORCH in done.stdout) == (not networks.TORCH)
    refused = run("--networks", "nonsense", script="networks.py")
    assert refused.returncode != 0
    assert re.fullmatch(r"error: --networks: unknown 'nonsense'; expected some of hcl-released, .*\n", refused.stderr)


@pytest.mark.slow
@pytest.mark.long
def test_networks_at_a_small_size():
    sizes = ["--dims", "12", "10", "8", "--rank", "1", "--batch", "16", "--steps", "4", "--rounds", "1", "--epochs", "1"]
    fits = ["--n", "300", "--replicates", "4", "--replicate-n", "100", "--replicate-steps", "7"]
    done = run(*sizes, *fits, script="networks.py")
    steps = [printed_rows(done, f"| {name} |")[0] for name in networks.CASES]
    (fit,), (replicates,) = printed_rows(done, "| 300 |"), printed_rows(done, "| 100 |")
    for row in (*steps, fit, replicates):
        assert "–" not in row or not networks.TORCH
    assert all(row[-1] == "0" for row in (*steps, fit)), done.stdout  # nothing compiled after the first call
    assert replicates[-2:] == ["0", "0"], done.stdout  # and replicates have the same bits on one core as on several
    assert fit[3] == "0"


def test_factorcl_in_pytorch_has_our_losses():
    torch = pytest.importorskip("torch")
    from torch_networks import Factorcl, with_weights

    arguments = networks.Arguments(dims=(12, 15, 10), batch=16)
    config = dataclasses.replace(
        networks.factorcl_config("concatenated", arguments),
        training=TrainingConfig(dtype="float64"),
        width=5,
        hidden=(8, 6),
        head_hidden=(4,),
        critic_hidden=(7, 6),
    )
    network = jax.jit(factorcl.build, static_argnums=(1, 2))(jr.key(0), networks.factorcl_hierarchy(arguments), config)
    rows = networks.factorcl_rows(arguments)
    rows = Batch(tuple(view.astype(float) for view in rows.views), rows.y)
    widths = (config.width, config.hidden, config.head_hidden, config.critic_hidden)
    module = with_weights(Factorcl(arguments.dims[:2], *widths, networks.CLASSES), networks.weights_by_name(network))
    views, labels = [torch.from_numpy(np.array(view)) for view in rows.views], torch.from_numpy(np.array(rows.y))
    of = lambda loss: jax.jit(lambda net: loss(net, rows, jr.key(0), config)[0])(network)
    # bounds of untrained critics are small differences of scores
    assert_at_most(relative(of(factorcl.loss), module(views, labels).item()), 1e-9, "main")
    assert_at_most(relative(of(factorcl.learning), module.learning(views, labels).item()), 1e-9, "critics")


@pytest.mark.parametrize("name", networks.CASES)
def test_modules_in_pytorch_have_our_losses_and_gradients(name):
    torch = pytest.importorskip("torch")
    case, arguments = networks.CASES[name], networks.Arguments(dims=(12, 15, 10), rank=2, batch=16, steps=1)
    config = case.config(training=TrainingConfig(dtype="float64"), hidden=(8, 6), n_classes=networks.CLASSES)
    network = jax.jit(case.method.build, static_argnums=(1, 2))(jr.key(0), arguments.hierarchy, config)
    rows = networks.step_rows(case, arguments)
    rows = Batch(tuple(view.astype(float) for view in rows.views), rows.y)
    evaluate = jax.jit(jax.value_and_grad(lambda net: case.method.loss(net, rows, jr.key(0), config)[0]))
    value, gradient = evaluate(network)

    module = networks.torch_module(name, arguments.hierarchy, config, network)
    views = [torch.from_numpy(np.array(view)) for view in rows.views]
    theirs = module(views, None if rows.y is None else torch.from_numpy(np.array(rows.y)))
    theirs.backward()
    assert_at_most(relative(value, theirs.item()), 1e-9, f"{name}: loss")
    ours = networks.weights_by_name(gradient)
    for weight, parameter in module.named_parameters():
        assert_at_most(relative(ours.pop(weight), parameter.grad.numpy()), 1e-7, f"{name}: gradient by {weight}")
    assert not any(np.any(left) for left in ours.values())  # what PyTorch's module lacks has no gradient


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
        (networks, {"tables": ("nonsense",)}, "--tables: unknown 'nonsense'; expected some of steps, fits"),
        (networks, {"networks": ("nonsense",)}, "--networks: unknown 'nonsense'; expected some of hcl-released"),
        (networks, {"batch": 1}, "--batch: is 1; expected at least 4"),
        (networks, {"fit_rounds": 0}, "--fit-rounds: is 0; expected at least 1"),
        (networks, {"replicate_n": 60}, "--replicate-n: is 60; expected at least 70, twice the factors"),
        (networks, {"rounds": 0}, "--rounds: is 0"),
        (replicates, {"methods": ("nonsense",)}, "--methods: unknown 'nonsense'; expected some of hcl-vb"),
        (replicates, {"replicates": ()}, "--replicates: are (); expected positive"),
        (replicates, {"n": 300}, "--n: is 300; expected more than the 300 features"),
        (replicates, {"rounds": 0}, "--rounds: is 0"),
    ],
)
def test_arguments_are_checked_before_anything_runs(script, arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        script.check(script.Arguments(**arguments))
