"""The tutorials run, and what they claim holds."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_it_runs(path):
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
