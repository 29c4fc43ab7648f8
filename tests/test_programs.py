"""What the compiled programs of a sweep may not contain."""

import jax
import jax.numpy as jnp
import pytest

from hcl_jax import ESTIMATORS, LIMITS, Hierarchy, SampleCovariance, Truth, recovery_errors
from hcl_jax.experiments.recovery import RECOVERY_LIMITS
from tests.helpers import equations

HIERARCHY = Hierarchy.full((12, 10, 8), 1)
LAPACK = {"cholesky", "eigh", "lu", "householder_product", "geqrf", "qr", "svd", "triangular_solve", "schur", "tridiagonal"}


def batched_lapack_calls(function, *arguments) -> list[str]:
    program = jax.make_jaxpr(function)(*arguments)
    return [
        f"{equation.primitive.name} on {equation.invars[0].aval.shape}"
        for equation in equations(program.jaxpr)
        if equation.primitive.name in LAPACK and equation.invars[0].aval.ndim > 2
    ]


def program(name: str):
    truth = Truth(jnp.where(HIERARCHY.mask, 1.0, 0.0), jnp.asarray(0.5), HIERARCHY)
    covariance = SampleCovariance(jnp.eye(30), n=jnp.asarray(500.0))
    if name in ESTIMATORS:
        return lambda S: ESTIMATORS[name](S, HIERARCHY), (covariance,)
    if name in LIMITS:
        return LIMITS[name], (truth, covariance)
    return lambda F: recovery_errors(F, HIERARCHY, truth.loadings, HIERARCHY), (truth.loadings,)


@pytest.mark.parametrize("name", [*ESTIMATORS, *RECOVERY_LIMITS, "errors"])
def test_mapped_programs_make_no_batched_lapack_call(name: str) -> None:
    """A batched call waits for other threads of XLA's pool, which has one a device: two devices would wait for each other."""
    function, arguments = program(name)
    assert batched_lapack_calls(function, *arguments) == []


def test_the_check_sees_a_batched_call_inside_a_loop() -> None:
    looped = jax.jit(lambda A: jax.lax.fori_loop(0, 3, lambda _, B: jnp.linalg.cholesky(B), A))
    assert batched_lapack_calls(looped, jnp.stack([jnp.eye(3)] * 2)) == ["cholesky on (2, 3, 3)"]
