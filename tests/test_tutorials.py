"""The tutorials run, and what they claim holds."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

LONG = {"tumours"}  # two cross-validations of 1,642 features, each fold with structures and a program of its own
TUTORIALS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.long] if path.stem in LONG else [])
    for path in sorted((ROOT / "docs/tutorials").glob("*.py"))
]


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS)
def test_it_runs(path):
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
