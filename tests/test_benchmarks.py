"""Benchmarks run, and say so when they are asked for what they do not have."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "recovery_throughput.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_throughput_prints_both_tables():
    case, brief = ["--cases", "equal-float32", "--noise-variances", "1"], ["--n", "2000", "--rounds", "1", "--threads", "1"]
    done = run(*case, *brief, "--descent-seconds", "2")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| (100, 100, 100)")]
    assert len(rows) == 2
    assert rows[0][-2].strip() == "0"  # nothing compiled during the rounds
    assert "never: stops at i = 101" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "nonsense"], "--cases: unknown 'nonsense'; expected some of equal-float32"),
        (["--noise-variances", "-1"], "--noise-variances: holds -1; expected positive numbers"),
        (["--rounds", "0"], "--rounds: is 0; expected at least 1"),
        (["--threads", "4096"], "--threads: is 4096; expected 1 to"),
    ],
)
def test_bad_arguments_are_named_in_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
