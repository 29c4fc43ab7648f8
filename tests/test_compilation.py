"""Plain calls are compiled once, and found again."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import pytest
from helpers import hierarchy_for, problem

from hcl_jax import ESTIMATORS
from hcl_jax.compiled import compiled

COMPILATION = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations():
    """The seconds of every compilation in the block."""
    seconds: list[float] = []

    def listen(event: str, duration: float, **_) -> None:
        if event == COMPILATION:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def scaled_sum(x, *, power=1.0, name="plain"):
    """Σ xᵖ."""
    return jnp.sum(x**power)


def test_a_compiled_function_finds_its_program_however_the_call_is_written():
    program, ones, twos = compiled(scaled_sum), jnp.ones(5), jnp.full(5, 2.0, float)
    with compilations() as first:
        program(ones, power=2.0)
    with compilations() as again:
        assert float(program(x=twos, name="plain", power=2.0)) == 20
    with compilations() as other:
        program(ones, power=3.0)
    assert (len(first), len(other)) == (1, 1)
    assert not again
    assert program.__doc__ == "Σ xᵖ."


def test_a_compiled_function_adds_nothing_to_a_program_that_calls_it():
    x = jnp.arange(4.0)
    one, other = (jax.make_jaxpr(jax.vmap(f))(x[:, None]) for f in (compiled(scaled_sum), scaled_sum))
    assert str(one) == str(other)


def test_checks_run_before_and_see_values():
    def check(x, power):
        if not isinstance(x, jax.core.Tracer) and float(x.min()) < 0:
            raise ValueError(f"x: holds {float(x.min())}; expected non-negative numbers for power {power}")

    program = compiled(scaled_sum, check=check)
    with pytest.raises(ValueError, match=r"x: holds -1.0; expected non-negative numbers for power 1.0"):
        program(jnp.array([1.0, -1.0]))
    assert float(jax.jit(program)(jnp.array([1.0, -1.0]))) == 0


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name not in ("hcl-ml", "hcl-vb")])
def test_an_estimator_compiles_once(name):
    hierarchy = hierarchy_for(name)
    ESTIMATORS[name](problem(hierarchy)[1], hierarchy)
    _, S = problem(hierarchy, seed=1)
    with compilations() as seconds:
        ESTIMATORS[name](S, hierarchy)
    assert not seconds
