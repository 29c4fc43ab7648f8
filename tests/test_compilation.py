"""Plain calls are compiled once, and found again."""

import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import LATTICE, PUBLISHED, assert_at_most, equations, numpy_loadings, population, problem

import hcl_jax.compiled
from hcl_jax import ESTIMATORS, LIMITS, Hierarchy, Truth, sample_data_covariance, sample_wishart_covariance
from hcl_jax.baselines import BASELINES
from hcl_jax.baselines.hnn import HnnConfig
from hcl_jax.baselines.sjive import SjiveConfig
from hcl_jax.compiled import PROGRAMS, compiled, keep_few_programs
from hcl_jax.prediction import FoldMoments, group_lasso, group_relevance, least_squares, ridge, softmax_regression

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
    program(ones, power=7.0)  # what the first of all calls asks of XLA
    with compilations() as first:
        program(ones, power=2.0)
    with compilations() as again:
        assert float(program(x=twos, name="plain", power=2.0)) == 20
    with compilations() as other:
        program(ones, power=3.0)
    assert (len(first), len(other)) == (1, 1)
    assert not again
    assert program.__doc__ == "Σ xᵖ."


def test_a_process_keeps_the_programs_called_last():
    """Each takes up to a thousand areas of memory, which are few: a process that kept all would die of the sixtieth."""
    program = compiled(scaled_sum)
    for size in range(1, PROGRAMS + 2):
        program(jnp.ones(size), power=5.0)
    with compilations() as kept:
        program(jnp.ones(PROGRAMS + 1), power=5.0)
    with compilations() as gone:
        program(jnp.ones(1), power=5.0)
    assert (len(kept), len(gone)) == (0, 1)


def test_a_process_lets_go_of_its_programs_before_they_are_too_many(monkeypatch):
    """A study of hundreds of networks would die of the sixty-fifth thousandth area. Its programs are mapped ones, and are held by
    the functions that map them."""
    program, ones = jax.jit(lambda x: jnp.sin(x) @ x.T), jnp.ones((3, 3))
    before = np.asarray(program(ones))
    with compilations() as kept:
        keep_few_programs()
        program(ones)
    monkeypatch.setattr(hcl_jax.compiled, "AREAS", 0)
    with compilations() as gone:
        keep_few_programs()
        after = np.asarray(program(ones))
    assert (len(kept), len(gone)) == (0, 1 if sys.platform == "linux" else 0)
    assert (before == after).all()


def test_a_compiled_function_adds_nothing_to_a_program_that_calls_it():
    x = jnp.arange(4.0)
    one, other = (jax.make_jaxpr(jax.vmap(f))(x[:, None]) for f in (compiled(scaled_sum), scaled_sum))
    assert str(one) == str(other)


def test_a_compiled_function_may_be_called_on_constants_within_a_program():
    program = compiled(scaled_sum)
    assert float(jax.jit(lambda: program(jnp.ones(5)))()) == float(program(jnp.ones(5)))
    assert float(jax.vmap(lambda x: x + program(jnp.ones(5)))(jnp.zeros(1))[0]) == float(program(jnp.ones(5)))


def test_checks_run_before_and_see_values():
    def check(x, power):
        if not isinstance(x, jax.core.Tracer) and float(x.min()) < 0:
            raise ValueError(f"x: holds {float(x.min())}; expected non-negative numbers for power {power}")

    program = compiled(scaled_sum, check=check)
    with pytest.raises(ValueError, match=r"x: holds -1.0; expected non-negative numbers for power 1.0"):
        program(jnp.array([1.0, -1.0]))
    assert float(jax.jit(program)(jnp.array([1.0, -1.0]))) == 0


SMALL = Hierarchy.full((6, 5), 1)
EXPENSIVE = {"hcl-shrunk", "hcl-gd", "naive-svd-denoised", "hnn", *PUBLISHED}  # which go the way of cheaper entries
CHEAPER = {"sjive": SjiveConfig(eta=0.5), "hnn": HnnConfig(penalties=(0.2, 0.2))}


def call(name, seed, hierarchy=None, n=30):
    """The registry's entry called as at the prompt, on data of the seed."""
    hierarchy = hierarchy or (LATTICE if name in PUBLISHED else SMALL)
    if name in ESTIMATORS:
        return partial(ESTIMATORS[name], problem(hierarchy, seed)[1], hierarchy)
    rng = np.random.default_rng(seed)
    options = {"config": CHEAPER[name]} if name in CHEAPER else {}
    views = [jnp.asarray(rng.standard_normal((n, dim))) for dim in hierarchy.dims]
    return partial(BASELINES[name], views, hierarchy, y=jnp.asarray(rng.standard_normal(n)), key=jr.key(seed), **options)


def entries():
    names = [*ESTIMATORS, *BASELINES]
    slow = {name for name in BASELINES if "-" in name} | EXPENSIVE
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("name", entries())
def test_the_second_call_of_an_entry_compiles_nothing(name):
    first, second = call(name, 0), call(name, 1)
    jax.block_until_ready(first())
    with compilations() as seconds:
        jax.block_until_ready(second())
    assert not seconds


def tools(seed):
    """Calls of what is neither an estimator nor a baseline as at the prompt, on data, and with numbers, of the seed."""
    truth, S = problem(SMALL, seed)
    key, rng, noise_gram = jr.key(seed), np.random.default_rng(seed), (0.1 + seed) * np.eye(3)
    z, y = rng.standard_normal((40, 3)), rng.standard_normal(40)
    moments, labels = FoldMoments.from_rows(z, y), np.arange(40) % 2
    return {
        "sample_wishart_covariance": partial(sample_wishart_covariance, key, truth, 50 + seed),
        "sample_data_covariance": partial(sample_data_covariance, key, truth, 50 + seed),
        "sample_data_covariance-t": partial(sample_data_covariance, key, truth, 50 + seed, "t"),
        **{name: partial(LIMITS[name], truth, S) for name in ("cramer-rao", "detection")},
        "least_squares": partial(least_squares, moments, noise_gram),
        "ridge": partial(ridge, moments),
        "group_lasso": partial(group_lasso, moments, SMALL, noise_gram, adaptive=float(seed)),
        "group_relevance": partial(group_relevance, moments, SMALL),
        "softmax_regression": partial(softmax_regression, z, labels, 2, key=key),
        "softmax_regression-groups": partial(softmax_regression, z, labels, 2, SMALL, key=key),
    }


@pytest.mark.parametrize("name", tools(0))
def test_the_second_call_of_a_tool_compiles_nothing(name):
    jax.block_until_ready(tools(0)[name]())
    second = tools(1)[name]
    with compilations() as seconds:
        jax.block_until_ready(second())
    assert not seconds


def best_seconds(run, repeats=5):
    def once():
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(repeats))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ESTIMATORS, "jive", "ajive", "slide", "sjive", "mmfl"])  # others take minutes themselves
def test_a_plain_call_takes_at_most_five_times_the_compiled_program(name):
    plain = call(name, 0, Hierarchy.full((30, 20, 25), 1), n=200)
    leaves, structure = jax.tree.flatten((plain.args, plain.keywords))
    traced = [leaf if isinstance(leaf, jax.Array) else None for leaf in leaves]

    @jax.jit
    def program(traced):
        args, keywords = jax.tree.unflatten(structure, [b if a is None else a for a, b in zip(traced, leaves, strict=True)])
        return plain.func(*args, **keywords)

    # checks of the arguments take a millisecond or two, and more where the tests check types as well: a program can take less
    ratio = best_seconds(plain) / (best_seconds(lambda: program(traced)) + 1e-3)
    assert_at_most(ratio, 5, f"{name}: plain call over compiled program")


@pytest.mark.slow
@pytest.mark.parametrize(("n_modalities", "seconds"), [(3, 6), (6, 20)])
def test_hcl_ml_compiles_within_seconds_of_one_core(n_modalities, seconds):
    """The first call in a new process: tracing and compilation, in seconds of all cores; twice what a quiet one may take."""
    script = f"""
import time, jax, jax.numpy as jnp, numpy as np
from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance
hierarchy = Hierarchy.full((40,) * {n_modalities}, 1)
S = SampleCovariance.from_data(jnp.asarray(np.random.default_rng(0).standard_normal((200, sum(hierarchy.dims)))))
start = time.process_time()
jax.block_until_ready(ESTIMATORS["hcl-ml"](S, hierarchy, max_steps=1))
print(time.process_time() - start)
"""
    took = subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert_at_most(float(took), seconds, f"seconds to compile hcl-ml for {n_modalities} modalities")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hcl-svd", "hcl-gn", "hcl-ml"])
def test_compilation_grows_slower_than_the_number_of_structures(name):
    """From 7 structures to 63; measured in instructions of the program, which no other work on the machine changes."""
    sizes = []
    for n_modalities in (3, 6):
        hierarchy = Hierarchy.full((40,) * n_modalities, 1)
        S = population(Truth(jnp.asarray(numpy_loadings(np.random.default_rng(0), hierarchy)), jnp.ones(()), hierarchy))
        sizes.append(sum(1 for _ in equations(jax.make_jaxpr(partial(ESTIMATORS[name], hierarchy=hierarchy))(S).jaxpr)))
    assert_at_most(sizes[1] / sizes[0], 3, f"{name}: size of the program of 63 structures over that of 7")
