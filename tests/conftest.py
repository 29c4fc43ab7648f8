"""Settings of every test: float64 available, silent broadcasting and promotion refused, no window system, one thread a process.

Tests run in as many processes as there are cores; products and LAPACK calls that each take all cores as well only get in each
other's way, and a call of 5 ms then takes 50.
"""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import jax
import pytest
import scipy.linalg  # noqa: F401  # loads the LAPACK that JAX calls, so that `threadpool_limits` reaches it
from threadpoolctl import threadpool_limits


def pytest_configure(config):
    """Quick tests spend their time in compiling small programs: a third of it is saved where these are not optimised."""
    if config.option.markexpr == "not slow":
        os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(autouse=True)
def few_programs():
    """Programs of earlier tests are let go of before there are so many that the process dies of the next."""
    from hcl_jax.compiled import keep_few_programs  # not before the hook that checks shapes is there

    keep_few_programs()


@pytest.fixture(autouse=True)
def double_precision():
    """The next test of this process is not in the precision of a study that this one ran."""
    yield
    jax.config.update("jax_enable_x64", True)


jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
threadpool_limits(1)
