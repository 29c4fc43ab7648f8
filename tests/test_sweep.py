"""Replicates do not depend on their company, and a sweep computes what is missing and nothing else."""

import jax
import numpy as np
import polars as pl
import pytest
from helpers import RESULT_KEY, assert_same_bits, sorted_results

from figures.means import mean_table
from hcl_jax import ESTIMATORS, Hierarchy
from hcl_jax.experiments import (
    Cell,
    Execution,
    Recovery,
    Store,
    Sweep,
    fitted_hierarchy,
    format_costs,
    format_summary,
    project_costs,
    run_sweep,
    summarise,
)
from hcl_jax.experiments.mapping import Slots
from hcl_jax.experiments.recovery import kept_ranks
from hcl_jax.experiments.store import Identity
from hcl_jax.experiments.summary import select_results
from hcl_jax.experiments.sweep import check_memory, check_tasks, chunk_size, memory_needed

SMALL = Hierarchy((5, 4, 4), {(1, 2, 3): 1, (1, 2): 1, (3,): 1})
METHODS = ("hcl-svd", "naive-svd", "cramer-rao")
QUIET = Execution(progress=False)


def make_sweep(cells=None, methods=METHODS, replicates=3, seed=0) -> Sweep:
    cells = tuple(cells or (Cell(SMALL, n, 1.0) for n in (50, 100)))
    return Sweep(Recovery(), cells, tuple(methods), replicates, seed, "float64")


def compute(output, sweep, execution=QUIET):
    store = Store(output, Identity("recovery", sweep.seed, sweep.dtype, "0.1.0"))
    tasks = sweep.tasks(store)
    check_tasks(sweep, tasks, execution)
    return run_sweep(sweep, tasks, store, execution, {})


def test_adding_replicates_a_method_and_an_n_equals_a_single_run_bit_for_bit(tmp_path):
    compute(tmp_path / "steps", make_sweep([Cell(SMALL, 50, 1.0)], METHODS[:2], replicates=3))
    compute(tmp_path / "steps", make_sweep([Cell(SMALL, 50, 1.0)], METHODS[:2], replicates=23))
    added = compute(tmp_path / "steps", make_sweep(replicates=23))
    assert added.n_parts == 2 + 2 * 3  # the limit at the first n, everything at the second
    whole = compute(tmp_path / "whole", make_sweep(replicates=23))
    assert whole.n_parts == 12
    assert_same_bits(sorted_results(tmp_path / "steps"), sorted_results(tmp_path / "whole"))


def test_a_finished_sweep_computes_compiles_and_writes_nothing(tmp_path):
    compute(tmp_path, make_sweep())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = compute(tmp_path, make_sweep())
    assert (again.n_parts, again.n_compilations) == (0, 0)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_a_grid_over_n_and_noise_compiles_each_program_once(tmp_path):
    fresh = Hierarchy((4, 3, 3), {(1, 2, 3): 1, (1, 2): 1})
    cells = [Cell(fresh, n, noise) for n in (50, 70, 10**9) for noise in (0.5, 2.0)]
    report = compute(tmp_path, make_sweep(cells, replicates=2))
    assert report.n_compilations == 1 + 2 + 1 + 1  # the draw, two estimators, their errors, the limit


@pytest.mark.slow
def test_chunks_do_not_change_the_bits(tmp_path):
    cells = [Cell(SMALL, 50, 1.0)]
    little = Execution(memory_gib=1e-9, progress=False)
    assert chunk_size(make_sweep(cells), cells[0], little) == 2
    compute(tmp_path / "little", make_sweep(cells, replicates=7), little)
    compute(tmp_path / "all", make_sweep(cells, replicates=7))
    assert_same_bits(sorted_results(tmp_path / "little"), sorted_results(tmp_path / "all"))


@pytest.mark.slow
def test_side_by_side_agrees_with_one_by_one(tmp_path):
    batched = Execution(batched=True, progress=False)
    for name, execution in (("one", QUIET), ("batched", batched)):
        compute(tmp_path / name, make_sweep(replicates=3), execution)
    one, other = sorted_results(tmp_path / "one"), sorted_results(tmp_path / "batched")
    np.testing.assert_allclose(one["value"], other["value"], rtol=1e-6, atol=1e-9)


def test_every_replicate_and_seed_has_its_own_draw(tmp_path):
    cells = [Cell(SMALL, 50, 1.0)]
    for seed in (0, 1):
        compute(tmp_path / str(seed), make_sweep(cells, ["hcl-svd"], replicates=5, seed=seed))
    errors = [
        sorted_results(tmp_path / str(seed)).filter(pl.col("metric") == "gram_frobenius")["value"].to_list() for seed in (0, 1)
    ]
    assert len({*errors[0], *errors[1]}) == 10


@pytest.mark.slow
def test_wrong_hierarchies_are_fitted_to_the_same_draws(tmp_path):
    cells = [Cell(SMALL, 200, 1.0, fitted=fitted) for fitted in ("true", "extra", "missing", "merged")]
    compute(tmp_path, make_sweep(cells, ["hcl-svd", "cramer-rao"], replicates=2))
    table = sorted_results(tmp_path)
    limits = table.filter((pl.col("method") == "cramer-rao") & (pl.col("metric") == "gram_frobenius"))
    assert limits.group_by("replicate").agg(pl.col("value").n_unique())["value"].to_list() == [1, 1]
    structures = table.filter((pl.col("fitted") == "extra") & (pl.col("metric") == "structure_gram_frobenius"))
    assert set(structures.filter(pl.col("method") == "hcl-svd")["structure"]) == {"123", "12", "13", "3"}


@pytest.mark.parametrize(
    "cell",
    [Cell(SMALL, 8, 1.0), Cell(SMALL, 60, 1.0, latent="rademacher", sampling="data"), Cell(SMALL, 60, 1.0, sampling="data")],
    ids=["fewer samples than features", "rademacher", "sampled"],
)
def test_every_way_of_drawing_gives_finite_errors(tmp_path, cell):
    compute(tmp_path, make_sweep([cell], ["hcl-svd"], replicates=2))
    table = sorted_results(tmp_path)
    assert np.isfinite(table["value"].to_numpy()).all()
    assert set(table["sampling"]) == {cell.sampling}


def test_given_loadings_are_the_truth_of_every_replicate(tmp_path):
    loadings = np.where(SMALL.mask, 2.0, 0.0) * np.linspace(1, 2, SMALL.n_factors)
    cell = Cell(SMALL, 10**8, 0.1, loadings="file")
    sweep = Sweep(Recovery({"file": loadings}), (cell,), ("naive-svd-denoised",), 2, 0, "float64")
    compute(tmp_path, sweep)
    relative = sorted_results(tmp_path).filter(pl.col("metric") == "gram_relative")["value"]
    assert relative.max() < 1e-3


def test_the_tidy_table_has_a_row_a_number(tmp_path):
    compute(tmp_path, make_sweep([Cell(SMALL, 50, 1.0)], ["hcl-svd"], replicates=2))
    table = sorted_results(tmp_path)
    assert table.select(RESULT_KEY).is_duplicated().sum() == 0
    blocks = table.filter((pl.col("metric") == "block_spectral") & (pl.col("replicate") == 0))
    assert set(zip(blocks["structure"], blocks["modality"], strict=True)) == {
        (s, m) for s in ("123", "12", "3") for m in (1, 2, 3)
    }
    overall = table.filter(pl.col("metric") == "gram_relative")
    assert overall["structure"].to_list() == ["", ""]
    assert overall["modality"].to_list() == [0, 0]
    assert (table["rank"] == 1).all()
    assert set(table["structures"]) == {"123,12,3"}


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("true", "123:3,12:3,13:3,1:3,2:3,3:3"),
        ("missing", "123:3,13:3,1:3,2:3,3:3"),
        ("extra", "123:3,12:3,13:3,23:3,1:3,2:3,3:3"),
        ("low", "123:1,12:1,13:1,1:1,2:1,3:1"),
        ("high", "123:5,12:5,13:5,1:5,2:5,3:5"),
        ("merged", "123:6,12:9,3:3"),
    ],
)
def test_fitted_hierarchies(variant, expected):
    ranks = dict.fromkeys(((1, 2, 3), (1, 2), (1, 3), (1,), (2,), (3,)), 3)
    assert str(fitted_hierarchy(Hierarchy((30, 30, 30), ranks), variant)) == expected


def test_a_full_lattice_has_no_structure_to_add():
    with pytest.raises(ValueError, match="hierarchies: 'extra'"):
        fitted_hierarchy(Hierarchy.full((9, 9), 1), "extra")


def test_what_a_method_refuses_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="methods: hcl-gd-published cannot be used here"):
        compute(tmp_path / "out", make_sweep(methods=["hcl-svd", "hcl-gd-published"]))
    with pytest.raises(ValueError, match="n_grid: holds 4; hcl-ml with 3 factors"):
        compute(tmp_path / "out", make_sweep([Cell(SMALL, 4, 1.0)], methods=["hcl-ml"]))
    assert not (tmp_path / "out").exists()


def test_a_failed_replicate_is_stored_and_costs_no_other(tmp_path, monkeypatch):
    def failing(covariance, hierarchy):
        fit = ESTIMATORS["naive-svd"](covariance, hierarchy)
        unlucky = fit.loadings[1, 1] * fit.loadings[7, 1] > 0
        loadings = jax.numpy.where(unlucky, jax.numpy.nan, fit.loadings)
        return type(fit)(loadings, fit.noise_variance, jax.numpy.where(unlucky, 2, 0), fit.steps, fit.objective)

    monkeypatch.setitem(ESTIMATORS, "failing", failing)
    compute(tmp_path, make_sweep([Cell(SMALL, 50, 1.0)], ["failing"], replicates=12))
    summary = summarise(sorted_results(tmp_path)).row(0, named=True)
    assert 0 < summary["non_finite"] < 12
    assert np.isfinite(summary["mean"])


def test_slots_deal_replicates_out_and_read_them_back_in_order():
    slots = Slots(np.array([4, 5, 5, 6, 6, 6], np.uint32), np.array([2, 1], np.int32))
    assert slots.read(np.array([4, 5, 0, 6, 0, 0])).tolist() == [4, 5, 6]
    spread = Slots.spread(first=7, count=3, size=5)
    assert spread.read(spread.replicates).tolist() == [7, 8, 9]


def test_kept_ranks_count_what_is_not_pruned():
    loadings = np.where(SMALL.mask, 1.0, 0.0)
    loadings[SMALL.rows(2), SMALL.columns((1, 2))] = 0
    kept = kept_ranks(jax.numpy.asarray(loadings), SMALL, ((1, 2, 3), (1, 2), (1, 3), (3,)))
    assert kept["kept_rank"].tolist() == [1, 1, 0, 1]
    assert kept["block_kept_rank"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 1]]


def test_the_summary_is_mean_standard_error_and_ratio_to_the_limit(tmp_path):
    sweep = make_sweep([Cell(SMALL, 50, 1.0)], replicates=4)
    compute(tmp_path, sweep)
    table = select_results(sorted_results(tmp_path), sweep.cells, sweep.methods, 4)
    values = {
        method: table.filter((pl.col("metric") == "gram_frobenius") & (pl.col("method") == method))["value"].to_numpy()
        for method in METHODS
    }
    row = summarise(table).filter(pl.col("method") == "hcl-svd").row(0, named=True)
    root, limit = (np.sqrt(np.mean(values[method] ** 2)) for method in ("hcl-svd", "cramer-rao"))
    expected = (values["hcl-svd"].mean(), values["hcl-svd"].std(ddof=1) / 2, limit, root / limit)
    np.testing.assert_allclose([row[name] for name in ("mean", "sem", "limit", "ratio")], expected)
    text = format_summary(summarise(table), "gram_frobenius")
    assert "n = 50" in text
    assert f"({row['ratio']:.3f})" in text
    own = mean_table(table).filter(pl.col("method") == "cramer-rao")
    assert set(own["metric"]) == set(table.filter(pl.col("method") == "cramer-rao")["metric"])
    assert own["ratio"].to_list() == [1.0] * len(own)


def test_a_dry_run_times_every_program_and_writes_nothing(tmp_path):
    sweep = make_sweep(replicates=40)
    costs = project_costs(sweep, sweep.tasks(None), QUIET)
    assert [(cost.method, cost.replicates) for cost in costs] == [
        ("(draw)", 80),
        ("hcl-svd", 80),
        ("naive-svd", 80),
        ("cramer-rao", 80),
        ("(errors)", 160),
    ]
    assert all(cost.seconds_each > 0 for cost in costs)
    assert "projected: " in format_costs(costs)
    assert list(tmp_path.iterdir()) == []


def test_memory_is_estimated_and_checked_before_anything_runs():
    def needed(dim, n, **execution):
        cell = Cell(Hierarchy.full((dim, dim), 1), n, 1.0)
        return memory_needed(Sweep(Recovery(), (cell,), ("hcl-ml",), 20, 0, "float64"), [cell], Execution(**execution))

    assert needed(1000, 5000) == pytest.approx(4 * needed(500, 5000), rel=0.05)  # d × d
    assert needed(1000, 50) < needed(1000, 5000) / 30  # 50 rows instead
    assert needed(1000, 5000, memory_gib=0.05) < needed(1000, 5000)
    check_memory(1.0, 2.0)
    with pytest.raises(ValueError, match=r"memory_gib: the largest cell needs about 3.0 GiB of the 2.0 GiB that are free"):
        check_memory(3.0, 2.0)
