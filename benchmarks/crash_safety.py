"""A sweep of 40 parts that is killed with SIGKILL again and again ends with the table of a run that was left alone, bit for bit.

    python benchmarks/crash_safety.py                  # 20 kills of the study, restarted each time
    python benchmarks/crash_safety.py --workers 2      # one sweep on a local Dask cluster, a worker killed every few seconds

A third of the kills of the study strike while it starts, the others at any moment in which it computes. What a kill met is
printed. Exits with 1 when a row is wrong, lost or there twice.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from hcl_jax.experiments import read_results

STUDY = Path(__file__).parent.parent / "simulations/recovery.py"
SWEEP = (
    *("--dims", "60", "50", "40", "--rank", "2", "--n-grid", "500", "1000", "2000", "4000"),
    *("--methods", "hcl-vb", "hcl-gd", "--replicates", "100", "--no-progress"),
)
KEY = ["cell", "method", "metric", "structure", "modality", "replicate"]


@dataclass(frozen=True)
class Options:
    """What strikes the sweep."""

    kills: int = 20
    """SIGKILLs of the study; with --workers, at most so many of workers."""
    workers: int = 0
    """Workers of a local Dask cluster; 0 for none."""
    every: float = 4.0
    """Mean seconds between two kills of workers."""
    devices: int = 1
    """Host devices of the study, or of each worker."""
    seed: int = 0
    """Of the moments."""


def start(output: Path, *options: str) -> subprocess.Popen:
    """The study, in a process of its own."""
    command = [sys.executable, str(STUDY), *SWEEP, "--output", str(output), *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=dict(os.environ, JAX_PLATFORMS="cpu"))


def finish(output: Path, *options: str) -> float:
    """Run the study to its end; returns the seconds it took."""
    begun = time.perf_counter()
    process = start(output, *options)
    if process.wait():
        raise SystemExit(f"the study ended with exit code {process.returncode}")
    return time.perf_counter() - begun


def state(output: Path) -> tuple[int, int]:
    """Parts that are stored, and temporary files."""
    return len(list(output.glob("cells/*/*/*.parquet"))), len(list(output.rglob(".*.tmp")))


def runs(output: Path) -> int:
    """How often the study began to compute."""
    path = output / "manifest.json"
    return path.read_text().count('"command"') if path.exists() else 0


def kill_study(output: Path, options: Options, starting: float, part: float) -> Iterator[str]:
    """Kill and restart, while it starts or some parts later; what each kill met."""
    rng = np.random.default_rng(options.seed)
    for number in range(options.kills):
        begun, (before, _), ran = time.perf_counter(), state(output), runs(output)
        process = start(output, "--devices", str(options.devices))
        if rng.random() < 1 / 3:
            time.sleep(rng.uniform(0, starting))
        else:
            further = int(rng.integers(0, 3))
            while process.poll() is None and (runs(output) == ran or state(output)[0] < before + further):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, part))
        if process.poll() is not None:
            raise SystemExit(f"the sweep was done after {number} kills")
        process.kill()
        process.wait()
        (parts, temporary), seconds = state(output), time.perf_counter() - begun
        phase = "computing" if runs(output) > ran else "starting"
        yield f"{number + 1:4d} {seconds:8.2f} s  {phase:10} {parts:3d} parts stored, {temporary} temporary files"


def find_workers(study: Any) -> tuple[list, list]:
    """The workers of the study's cluster, and those of them that are computing: they hold a claim."""
    import psutil

    workers, busy = [], []
    for process in study.children():
        with contextlib.suppress(psutil.Error):  # it is dead already
            if any("spawn_main" in word for word in process.cmdline()):
                workers.append(process)
                if any("/locks/" in file.path for file in process.open_files()):
                    busy.append(process)
    return workers, busy


def kill_workers(output: Path, options: Options) -> Iterator[str]:
    """Kill a worker every few seconds, two of three times one that computes, until the sweep is done; what each kill met."""
    import psutil

    rng, begun, number = np.random.default_rng(options.seed), time.perf_counter(), 0
    process = start(output, "--local-cluster", str(options.workers), "--devices", str(options.devices))
    study = psutil.Process(process.pid)
    while number < options.kills and process.poll() is None:
        time.sleep(rng.uniform(0.5, 1.5) * options.every)
        workers, busy = find_workers(study) if process.poll() is None else ([], [])
        chosen = workers if rng.random() < 1 / 3 else busy
        if chosen:
            number += 1
            victim = chosen[rng.integers(len(chosen))]
            victim.kill()
            phase = "computing" if victim in busy else "idle or starting"
            yield f"{number:4d} {time.perf_counter() - begun:8.2f} s  {phase:16} {state(output)[0]:3d} parts stored"
    if process.wait():
        raise SystemExit(f"the study ended with exit code {process.returncode}")


def same_bits(one: Path, other: Path) -> bool:
    """Whether both folders hold the same rows, each once."""
    tables = [read_results(output).sort(KEY) for output in (one, other)]
    unique = not any(table.select(KEY).is_duplicated().any() for table in tables)
    bits = [table["value"].to_numpy().tobytes() for table in tables]
    return unique and bits[0] == bits[1] and tables[0].drop("value").equals(tables[1].drop("value"))


def main(options: Options) -> int:
    """Prints a line a kill; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        finish(Path(folder) / "compiles", "--replicates", "20", "--devices", str(options.devices))
        seconds = finish(alone, "--devices", str(options.devices))
        parts = json.loads((alone / "manifest.json").read_text())["parts"]
        spent = [part["seconds"] for part in parts.values()]
        print(f"left alone: {seconds:.1f} s, {len(parts)} parts, {np.median(spent):.2f} s at the median", flush=True)
        starting, part = seconds - sum(spent), float(np.median(spent))
        lines = kill_workers(killed, options) if options.workers else kill_study(killed, options, starting, part)
        for line in lines:
            print(line, flush=True)
        if not options.workers:
            finish(killed, "--devices", str(options.devices))
        same, (stored, temporary) = same_bits(alone, killed), state(killed)
        print(f"{stored} parts, {temporary} temporary files; the table is {'the same bit for bit' if same else 'ANOTHER ONE'}")
    return 0 if same and not temporary else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
