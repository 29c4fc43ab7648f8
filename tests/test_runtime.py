"""How many devices an entry point uses, and what it leaves of the flags that XLA was given."""

import os
import subprocess
import sys

import jax
import pytest
from helpers import ROOT

from hcl_jax.experiments import configure, runtime


@pytest.fixture
def _unchanged(monkeypatch):
    """What `configure` sets in the process stays as it is."""
    monkeypatch.setattr(runtime, "_single_threaded_devices", lambda devices, pool_threads: None)
    monkeypatch.setattr(runtime, "_available_cores", lambda: 3)
    monkeypatch.setattr(runtime, "threadpool_limits", lambda limit: None)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ("", "--x=false"),
        ("--y=1", "--y=1 --x=false"),
        ("--x=true threads=1", "--x=true threads=1"),
        ("--xx=1 threads=1", "--xx=1 threads=1 --x=false"),  # what stands first decides whether these are flags
        ("/tmp/flags.txt", "/tmp/flags.txt"),
        (" --y='a b'", " --y='a b' --x=false"),
    ],
)
def test_flags_of_the_user_stay_as_they_are(held, expected):
    assert runtime.with_flag(held, "--x=false") == expected
    assert runtime.with_flag(expected, "--x=false") == expected  # as on a worker that inherits them


def test_xla_starts_with_the_flags_that_a_study_leaves(tmp_path):
    file = tmp_path / "flags"
    file.write_text("--xla_cpu_multi_thread_eigen=true")
    program = "from hcl_jax.experiments import configure; configure(); import jax; print(jax.numpy.ones(3).sum())"
    for flags in ("--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", str(file)):
        environment = dict(os.environ, XLA_FLAGS=flags, HCL_COMPILATION_CACHE="0", JAX_PLATFORMS="cpu", PYTHONPATH=str(ROOT))
        ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert ended.stdout.strip() == "3.0", ended.stderr


@pytest.mark.usefixtures("_unchanged")
def test_a_cpu_has_a_device_a_core_and_batches_one():
    assert (configure(), configure(devices=2), configure(batched=True)) == (3, 2, 1)


@pytest.mark.usefixtures("_unchanged")
def test_all_accelerators_are_used_whatever_the_cores(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert (configure(), configure(devices=2), configure(devices=8), configure(batched=True)) == (4, 2, 4, 4)
