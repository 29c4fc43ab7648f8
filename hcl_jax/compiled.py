"""Plain functions whose body is one compiled program: compiled at the first call, found again at every later one."""

import inspect
import os
from collections.abc import Callable
from functools import cache, lru_cache, partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])

PROGRAMS = 32
"""Programs that are kept, those called last. Each takes up to a thousand areas of memory, and Linux gives a process 65,530."""
AREAS = 30_000
"""Of memory, that a process may have before it lets go of its programs."""


@cache
def compiler_options(runs_long: bool = False) -> dict[str, bool]:
    """What whole programs are compiled with: on a CPU XLA's older code generation, which takes half as long for programs as fast.

    Nothing for programs that run long, such as the training of networks, whose steps take a fifth longer in it; where this
    release of XLA does not have it; and where XLA_FLAGS says which is to be used.
    """
    name = "xla_cpu_use_fusion_emitters"
    if runs_long or jax.default_backend() != "cpu" or name in os.environ.get("XLA_FLAGS", ""):
        return {}
    try:
        jax.jit(lambda: 0, compiler_options={name: False}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return {name: False}


def keep_few_programs() -> None:
    """Let go of all compiled programs where they take more areas of memory than `AREAS`: before the process dies of the next one,
    as a study of hundreds of them would. Those that are called again are compiled again, or come from the cache on disk."""
    areas = Path("/proc/self/maps")
    if areas.exists() and areas.read_bytes().count(b"\n") > AREAS:
        jax.clear_caches()


@lru_cache(maxsize=PROGRAMS)
def _program(
    function: Callable[..., Any], structure: Any, held: tuple, _kinds: tuple, nested: bool, runs_long: bool
) -> Callable[[list], Any]:
    """The function of its arrays alone, compiled; `held` has everything else, and None in the arrays' places.

    A nested program is a part of another, whose options are the ones that count.
    """

    @partial(jax.jit, inline=True, compiler_options=None if nested else compiler_options(runs_long))
    def program(traced: list) -> Any:
        leaves = [value if array is None else array for array, value in zip(traced, held, strict=True)]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return function(*args, **kwargs)

    return program


def compiled(function: Function | None = None, *, check: Callable[..., None] | None = None, runs_long: bool = False) -> Any:
    """The function as one program for all calls whose arrays agree in shape and dtype and whose other arguments are equal.

    Arrays, inside of pytrees too, are traced; everything else (hierarchies, configurations, numbers, strings, None) is static and
    has to be hashable. `check` runs before, outside of compiled code, and gets those of the function's arguments that it names:
    what is to be said of the values of arrays has to be said there, as the function sees tracers. `runs_long` asks for a program
    that is faster, and takes longer to compile. Within other compiled or mapped
    code the function's own operations take its place, so that its results are those of the plain function compiled there. The
    programs called last are kept, `PROGRAMS` of all functions together: a process that fits hundreds of shapes lives on.

    >>> @compiled
    ... def scaled(x, factor=2.0):
    ...     return x * factor
    >>> float(scaled(jax.numpy.ones(()), factor=3.0))
    3.0
    """
    if function is None:
        return partial(compiled, check=check, runs_long=runs_long)
    signature = inspect.signature(function)
    checked = () if check is None else tuple(inspect.signature(check).parameters)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()  # so that every way to write a call finds the same program
        if check is not None:
            check(*(bound.arguments[name] for name in checked))
        leaves, structure = jax.tree.flatten((bound.args, bound.kwargs))
        arrays = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        traced = [leaf if array else None for leaf, array in zip(leaves, arrays, strict=True)]
        held = tuple(None if array else leaf for leaf, array in zip(leaves, arrays, strict=True))
        kinds = tuple((leaf.shape, leaf.dtype) for leaf, array in zip(leaves, arrays, strict=True) if array)
        nested = any(isinstance(leaf, jax.core.Tracer) for leaf in (jnp.empty(()), *leaves))  # traced, whatever the arguments are
        return _program(function, structure, held, kinds, nested, runs_long)(traced)

    return cast(Function, call)
