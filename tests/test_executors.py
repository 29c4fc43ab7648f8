"""Processes share a folder of results, in whatever order they come and go, and end with the table of a single run."""

import importlib.util
import json
import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import distributed
import polars as pl
import pytest
from helpers import assert_refused, assert_same_bits, sorted_results

import hcl_jax
from hcl_jax import Hierarchy
from hcl_jax.experiments import Cell, Execution, OutputError, Recovery, Store, Sweep, cluster, executors, read_results, run_sweep
from hcl_jax.experiments.executors import Stop
from hcl_jax.experiments.runtime import versions
from hcl_jax.experiments.store import Identity
from hcl_jax.experiments.sweep import ClaimedError, group_tasks, run_group
from simulations.recovery import main

SMALL = Hierarchy((5, 4, 4), {(1, 2, 3): 1, (1, 2): 1, (3,): 1})
METHODS = ("naive-svd", "cramer-rao")
QUIET = Execution(progress=False)
TINY = ["--dims", "5", "4", "4", "--structures", "123:1", "12:1", "3:1", "--n-grid", "50", "100", "--no-progress"]
COMMAND = [*TINY, "--replicates", "23", "--methods", *METHODS]


def make_sweep(replicates: int = 23, seed: int = 0) -> Sweep:
    return Sweep(Recovery(), tuple(Cell(SMALL, n, 1.0) for n in (50, 100)), METHODS, replicates, seed, "float64")


def store_of(output: Path, sweep: Sweep) -> Store:
    return Store(output, Identity("recovery", sweep.seed, sweep.dtype, hcl_jax.__version__))


def run(output: Path, sweep: Sweep, **options):
    store = store_of(output, sweep)
    return run_sweep(sweep, sweep.tasks(store), store, QUIET, {}, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pl.DataFrame:
    """The table of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HCL_COMPILATION_CACHE", "0")
        assert main([*COMMAND, "--output", str(output)]) == 0
    return sorted_results(output)


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch):
    monkeypatch.setenv("HCL_COMPILATION_CACHE", "0")
    monkeypatch.setattr(executors, "POLL_SECONDS", 0.05)


def test_a_group_has_one_claimant_at_a_time(tmp_path):
    one, other = (store_of(tmp_path, make_sweep()) for _ in range(2))
    with one.claim("draw/0") as first, other.claim("draw/0") as second, other.claim("draw/20") as third:
        assert (first, second, third) == (True, False, True)
    with other.claim("draw/0") as free:
        assert free


def test_a_group_that_another_process_is_at_is_put_off_and_taken_over_when_that_one_is_gone(tmp_path, whole):
    sweep = make_sweep()
    store = store_of(tmp_path, sweep)
    group = group_tasks(sweep.tasks(store))[0]
    claimed, release = threading.Event(), threading.Event()

    def other_process():
        with store_of(tmp_path, sweep).claim(group.name) as held:
            assert held
            claimed.set()
            release.wait(60)

    thread = threading.Thread(target=other_process)
    thread.start()
    claimed.wait(60)
    with pytest.raises(ClaimedError):
        next(run_group(sweep, group, store, QUIET))
    parts = []

    def executor(job, groups, watch, stop):
        finished = watch.finished

        def note(done):
            finished(done)
            parts.append(done.task)
            if len(parts) == 6:
                assert not set(parts) & set(group.tasks)  # all others first
                release.set()

        watch.finished = note
        executors.run_here(job, groups, watch, stop)

    report = run(tmp_path, sweep, executor=executor)
    thread.join()
    assert report.n_parts == 8
    assert_same_bits(sorted_results(tmp_path), whole)


def test_what_other_processes_stored_since_the_plan_is_neither_computed_again_nor_overlapped(tmp_path, whole):
    sweep = make_sweep()
    store = store_of(tmp_path, sweep)
    tasks = sweep.tasks(store)
    assert run(tmp_path, make_sweep(replicates=7)).n_parts == 4
    report = run_sweep(sweep, tasks, store, QUIET, {})
    assert report.n_parts == 8
    names = sorted(path.name for path in tmp_path.glob("cells/*n=50,*/naive-svd/*"))
    assert names == ["0-6.parquet", "20-22.parquet", "7-19.parquet"]
    assert_same_bits(sorted_results(tmp_path), whole)
    assert run_sweep(sweep, tasks, store, QUIET, {}).n_parts == 0


def test_the_manifest_keeps_the_record_of_every_run_that_shares_it(tmp_path):
    one, other = (store_of(tmp_path, make_sweep()) for _ in range(2))
    for number, store in enumerate((one, other)):
        store.begin({"command": number})
    groups = group_tasks(make_sweep(3).tasks(one))
    for group, store in zip(groups, (other, one), strict=True):
        assert len([*run_group(make_sweep(3), group, store, QUIET)]) == 2
    other.write_manifest()
    one.write_manifest()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [record["command"] for record in manifest["runs"]] == [0, 1]
    assert {name.split("n=")[1].split(",")[0]: part["run"] for name, part in manifest["parts"].items()} == {"50": 1, "100": 0}


def test_the_second_of_two_seeds_in_a_fresh_folder_is_refused(tmp_path):
    first, second = (store_of(tmp_path, make_sweep(seed=seed)) for seed in (0, 1))
    first.begin({})
    with pytest.raises(OutputError, match=r"seed 0 \(this run: 1\)"):
        second.begin({})
    assert len(json.loads((tmp_path / "manifest.json").read_text())["runs"]) == 1


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def with_a_hole(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:1000] + bytes(1500) + content[2500:])


def rows_lost(path: Path) -> None:
    table = pl.read_parquet(path)
    table.filter(pl.col("replicate") != 3).write_parquet(path)


def one_row_lost(path: Path) -> None:
    pl.read_parquet(path)[:-1].write_parquet(path)


def of_another_method(path: Path) -> None:
    path.write_bytes((path.parent.parent / "cramer-rao" / path.name).read_bytes())


def foreign_columns(path: Path) -> None:
    pl.DataFrame({"a": [1, 2]}).write_parquet(path)


@pytest.mark.parametrize(
    "damage",
    [cut_off, with_a_hole, rows_lost, one_row_lost, of_another_method, foreign_columns, lambda path: path.write_bytes(b"")],
)
def test_a_damaged_part_is_set_aside_and_computed_again(tmp_path, whole, capsys, damage):
    run(tmp_path, make_sweep())
    path = next(tmp_path.glob("cells/*n=50,*/naive-svd/0-19.parquet"))
    damage(path)
    with pytest.raises(OutputError, match=f"--output: {re.escape(str(path))} "):
        read_results(tmp_path)
    assert main([*COMMAND, "--dry-run", "--output", str(tmp_path)]) == 0
    assert f"{path} " in capsys.readouterr().out
    assert run(tmp_path, make_sweep()).n_parts == 1
    assert path.with_name("0-19.parquet.unreadable").exists()
    assert_same_bits(sorted_results(tmp_path), whole)


def test_what_dead_processes_left_is_removed_by_who_computes_the_part(tmp_path):
    run(tmp_path, make_sweep(replicates=20))
    folder = next(tmp_path.glob("cells/*n=50,*/naive-svd"))
    for name in (".0-19.parquet.dead.tmp", ".20-39.parquet.dead.tmp"):
        (folder / name).write_bytes(b"half")
    run(tmp_path, make_sweep())
    left = sorted(path.name for path in folder.iterdir())
    assert left == [".0-19.parquet.dead.tmp", "0-19.parquet", "20-22.parquet"]  # the first block had nothing left to compute


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_part_in_hand_and_the_same_command_goes_on(tmp_path, whole, capsys, monkeypatch, number, code):
    usual, write, written = signal.getsignal(number), Store.write, []

    def struck(self, *arguments):
        if len(written) == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert signal.getsignal(number) == signal.SIG_DFL  # a second one stops at once
        write(self, *arguments)
        written.append(arguments)

    monkeypatch.setattr(Store, "write", struck)
    arguments = [*COMMAND, "--output", str(tmp_path)]
    assert main(arguments) == code
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "the same command goes on" in line
    assert len(written) == len(json.loads((tmp_path / "manifest.json").read_text())["parts"]) == 3
    assert signal.getsignal(number) == usual
    monkeypatch.setattr(Store, "write", write)
    assert main(arguments) == 0
    assert "computed 5 parts" in capsys.readouterr().out
    assert_same_bits(sorted_results(tmp_path), whole)


def test_a_disc_that_fills_up_keeps_what_is_stored(tmp_path, whole, capsys, monkeypatch):
    synchronise, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:  # the manifest and three parts
            raise OSError(28, os.strerror(28))
        synchronise(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    arguments = [*COMMAND, "--output", str(tmp_path)]
    assert main(arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.startswith("recovery.py: error: --output: ")
    assert "No space left on device" in line
    assert not list(tmp_path.rglob(".*.tmp"))
    assert read_results(tmp_path).select("cell", "method").n_unique() > 1
    monkeypatch.setattr(os, "fsync", synchronise)
    assert main(arguments) == 0
    assert "computed 5 parts" in capsys.readouterr().out
    assert_same_bits(sorted_results(tmp_path), whole)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that even its owner cannot write to")
def test_a_folder_that_cannot_be_written_is_one_line(capsys):
    assert main([*COMMAND, "--output", "/sys/kernel/results"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("recovery.py: error: --output: /sys/kernel/results cannot be written (")
    assert line.count("\n") == 1


def test_no_signal_is_no_stop():
    with Stop() as stop:
        assert not stop.asked


@pytest.fixture(scope="module")
def client():
    """A Dask cluster of two threads in this process: all that worker processes do but die."""
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None) as made,
        distributed.Client(made, set_as_default=False) as held,
    ):
        yield held


def test_a_dask_cluster_gives_the_same_bits_and_waits_for_groups_that_other_processes_are_at(tmp_path, whole, client):
    sweep, claimed, release = make_sweep(), threading.Event(), threading.Event()
    store = store_of(tmp_path, sweep)

    def other_process():
        with store_of(tmp_path, sweep).claim(group_tasks(sweep.tasks(store))[0].name):
            claimed.set()
            release.wait(60)

    def executor(job, groups, watch, stop):
        closed = watch.closed
        watch.closed = lambda group: (closed(group), release.set())
        cluster.run_on_cluster(client, job, groups, watch, stop)

    thread = threading.Thread(target=other_process)
    thread.start()
    claimed.wait(60)
    report = run(tmp_path, sweep, executor=executor)
    thread.join()
    assert report.n_parts == 8
    assert_same_bits(sorted_results(tmp_path), whole)


def test_a_signal_stops_a_dask_cluster_after_the_parts_in_hand(tmp_path, whole, client):
    stop, write = Stop(), Store.write

    def struck(self, *arguments):
        stop.signal = signal.SIGTERM
        time.sleep(1)  # the client tells the workers
        write(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", struck)
        report = run(tmp_path, make_sweep(), executor=partial(cluster.run_on_cluster, client), stop=stop)
    assert report.stopped_by == signal.SIGTERM
    assert 1 <= report.n_parts <= 2  # of each worker
    assert run(tmp_path, make_sweep(), executor=partial(cluster.run_on_cluster, client)).n_parts == 8 - report.n_parts
    assert_same_bits(sorted_results(tmp_path), whole)


@pytest.mark.parametrize(("deaths", "error"), [(3, None), (10**6, "workers that compute dims=.* die")])
def test_a_group_that_lost_its_workers_is_given_to_others_a_number_of_times(tmp_path, client, monkeypatch, deaths, error):
    prepare, died = cluster.prepare_worker, []

    def deadly(*arguments):
        died.append(arguments)
        if len(died) <= deaths:
            raise distributed.KilledWorker("group", SimpleNamespace(address="tcp://gone"), 3)
        return prepare(*arguments)

    monkeypatch.setattr(cluster, "prepare_worker", deadly)
    monkeypatch.setattr(cluster, "RETRIES", 0)
    monkeypatch.setattr(cluster, "LOST_WORKERS", 5)
    executor = partial(cluster.run_on_cluster, client)
    if error is None:
        assert run(tmp_path, make_sweep(replicates=2), executor=executor).n_parts == 4
    else:
        with pytest.raises(cluster.ClusterError, match=error):
            run(tmp_path, make_sweep(replicates=2), executor=executor)


def test_a_worker_with_other_versions_or_another_file_system_is_refused(tmp_path):
    sweep = make_sweep()
    job = executors.Job(sweep, store_of(tmp_path, sweep), QUIET)
    with pytest.raises(cluster.ClusterError, match=r"scheduler: the worker on .* has jaxlib .* \(expected 0.0.1\)"):
        cluster.prepare_worker(job, versions() | {"jaxlib": "0.0.1"})
    with pytest.raises(OutputError, match="is not seen from .*; expected a folder that all machines share"):
        cluster.prepare_worker(job, versions())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheduler", "tcp://127.0.0.1:9"], ["--scheduler", "cannot reach tcp://127.0.0.1:9"]),
        (["--scheduler", "nowhere"], ["--scheduler", "cannot reach nowhere"]),
        (["--local-cluster", "0"], ["--local-cluster", "positive"]),
        (["--local-cluster", "2", "--scheduler", "tcp://127.0.0.1:9"], ["--local-cluster", "one of the two"]),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    assert_refused(main, [*COMMAND, *arguments], words, tmp_path / "out", capsys)


def test_without_dask_the_options_say_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_refused(
        main, [*COMMAND, "--local-cluster", "2"], ["--local-cluster", "hcl_jax[distributed]"], tmp_path / "out", capsys
    )
