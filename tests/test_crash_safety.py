"""Processes that die, in whatever moment, and clusters of processes: the table is that of a run that was left alone, bit for bit.

`benchmarks/crash_safety.py` does it at length and at random.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import psutil
import pytest
from helpers import ROOT, assert_same_bits, sorted_results

STUDY = ROOT / "simulations/recovery.py"
TINY = ["--dims", "5", "4", "4", "--structures", "123:1", "12:1", "3:1", "--n-grid", "50", "100", "--no-progress"]
EIGHT_PARTS = [*TINY, "--replicates", "23", "--methods", "naive-svd", "hcl-svd", "--devices", "1"]
ITERATIVE = [
    *TINY,
    "--dims",
    "20",
    "15",
    "10",
    "--n-grid",
    "500",
    "1000",
    "--replicates",
    "23",
    "--methods",
    "hcl-gn",
    "cramer-rao",
]
KILLED = """
import os, signal, sys
name, left = sys.argv[1], int(sys.argv[2])
call = getattr(os, name)
def counted(*arguments):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments)
setattr(os, name, counted)
from simulations.recovery import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of a CPU, with programs that all processes compile once."""
    cache = str(tmp_path_factory.mktemp("cache"))
    return dict(os.environ, JAX_PLATFORMS="cpu", HCL_COMPILATION_CACHE=cache, PYTHONPATH=str(ROOT))


def launch(environment: dict[str, str], *words: str | Path) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment, text=True, **pipes)


def complete(environment: dict[str, str], *words: str | Path) -> str:
    process = launch(environment, *words)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return said


def parts(output: Path) -> int:
    return len(list(output.glob("cells/*/*/*.parquet")))


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory) -> pl.DataFrame:
    output = tmp_path_factory.mktemp("whole")
    complete(environment, STUDY, *EIGHT_PARTS, "--output", output)
    assert parts(output) == 8
    return sorted_results(output)


def test_a_sweep_killed_three_times_and_resumed_on_two_devices_ends_with_the_same_table(tmp_path, whole, environment):
    arguments = [*EIGHT_PARTS, "--output", tmp_path]
    for call, count, stored in (("fsync", 3, 1), ("replace", 4, 3), ("fsync", 2, 3)):
        # the first call is the manifest's: half of the second part, all but the name of a third more, half of the fourth
        process = launch(environment, "-c", KILLED, call, str(count), *arguments)
        said, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL, said
        assert parts(tmp_path) == stored
        assert list(tmp_path.rglob(".*.tmp"))
    assert "computed 5 parts" in complete(environment, STUDY, *arguments, "--devices", "2")
    assert not list(tmp_path.rglob(".*.tmp"))
    assert_same_bits(sorted_results(tmp_path), whole)


def test_processes_share_a_folder(tmp_path, whole, environment):
    replicates = (["--replicates", "9"], [], [])
    together = [launch(environment, STUDY, *EIGHT_PARTS, *more, "--output", tmp_path) for more in replicates]
    said = [process.communicate()[0] for process in together]
    assert [process.returncode for process in together] == [0, 0, 0], said
    computed = [int(text.split("computed ")[1].split()[0]) for text in said]
    assert sum(computed) == parts(tmp_path)  # none of them twice
    assert_same_bits(sorted_results(tmp_path), whole)


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path, environment):
    slow = ["--dims", "300", "300", "--methods", "hcl-gd", "--no-progress"]
    process = launch(environment, STUDY, *slow, "--output", tmp_path)
    wait_until(lambda: any(path.stem != "manifest" for path in tmp_path.glob("locks/**/*.lock")), process)  # a part is in hand
    process.terminate()
    time.sleep(0.5)
    process.terminate()
    begun = time.perf_counter()
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGTERM, said
    assert time.perf_counter() - begun < 5  # seconds: a part takes longer


def wait_until(happened, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.perf_counter() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.perf_counter() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_the_bits_do_not_depend_on_devices_chunks_or_executor(tmp_path, environment):
    ways = {
        "one": ["--devices", "1"],
        "four in small chunks": ["--devices", "4", "--memory-gib", "1e-6"],
        "cluster": ["--local-cluster", "2"],
    }
    for way, options in ways.items():
        complete(environment, STUDY, *ITERATIVE, "hcl-gd", "hcl-vb", *options, "--output", tmp_path / way)
        assert_same_bits(sorted_results(tmp_path / way), sorted_results(tmp_path / "one"))
    complete(environment, STUDY, *ITERATIVE, "--batched", "--output", tmp_path / "batched")
    batched = sorted_results(tmp_path / "batched")
    one = sorted_results(tmp_path / "one").filter(pl.col("method").is_in(batched["method"].unique().implode()))
    # both stop at a relative gradient of 1e-6 or less: errors differ by as much
    assert (one["value"] - batched["value"]).abs().max() < 1e-5 * one["value"].abs().max()


@pytest.mark.slow
def test_the_commands_of_docs_clusters_survive_the_death_of_a_worker(tmp_path, environment):
    """A scheduler and two workers, as docs/clusters.md starts them; one is killed, its nanny and all."""
    address = "tcp://127.0.0.1:28786"
    scheduler = launch(environment, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "28786", "--no-dashboard")
    worker = ["-m", "dask", "worker", address, "--nthreads", "1", "--memory-limit", "0", "--no-dashboard"]
    workers = [launch(environment, *worker, "--local-directory", tmp_path / f"scratch{i}") for i in range(2)]
    arguments = [*ITERATIVE, "--replicates", "100"]
    try:
        study = launch(environment, STUDY, *arguments, "--scheduler", address, "--output", tmp_path / "cluster")
        wait_until(lambda: parts(tmp_path / "cluster") > 0, study)
        children = psutil.Process(workers[0].pid).children()
        for process in (workers[0], *children):
            process.kill()
        said, _ = study.communicate(timeout=200)
        assert study.returncode == 0, said
        assert workers[1].poll() is None
    finally:
        for process in (*workers, scheduler):
            process.terminate()
            process.communicate()
    complete(environment, STUDY, *arguments, "--devices", "1", "--output", tmp_path / "alone")
    assert_same_bits(sorted_results(tmp_path / "cluster"), sorted_results(tmp_path / "alone"))
