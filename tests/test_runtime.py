"""How many devices an entry point uses."""

import jax
import pytest

from hcl_jax.experiments import configure, runtime


@pytest.fixture
def _unchanged(monkeypatch):
    """What `configure` sets in the process stays as it is."""
    monkeypatch.setattr(runtime, "_single_threaded_devices", lambda devices, pool_threads: None)
    monkeypatch.setattr(runtime, "_available_cores", lambda: 3)
    monkeypatch.setattr(runtime, "threadpool_limits", lambda limit: None)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)


@pytest.mark.usefixtures("_unchanged")
def test_a_cpu_has_a_device_a_core_and_batches_one():
    assert (configure(), configure(devices=2), configure(batched=True)) == (3, 2, 1)


@pytest.mark.usefixtures("_unchanged")
def test_all_accelerators_are_used_whatever_the_cores(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert (configure(), configure(devices=2), configure(devices=8), configure(batched=True)) == (4, 2, 4, 4)
