"""Plain functions whose body is one compiled program: compiled at the first call, found again at every later one."""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, cast

import jax
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function | None = None, *, check: Callable[..., None] | None = None) -> Any:
    """The function as one program for all calls whose arrays agree in shape and dtype and whose other arguments are equal.

    Arrays, inside of pytrees too, are traced; everything else (hierarchies, configurations, numbers, strings, None) is static and
    has to be hashable. `check` runs before, outside of compiled code, and gets those of the function's arguments that it names:
    what is to be said of the values of arrays has to be said there, as the function sees tracers. Within other compiled or mapped
    code the function's own operations take its place, so that its results are those of the plain function compiled there.

    >>> @compiled
    ... def scaled(x, factor=2.0):
    ...     return x * factor
    >>> float(scaled(jax.numpy.ones(()), factor=3.0))
    3.0
    """
    if function is None:
        return partial(compiled, check=check)
    signature = inspect.signature(function)
    checked = () if check is None else tuple(inspect.signature(check).parameters)

    @partial(jax.jit, static_argnums=0, inline=True)
    def program(static: tuple, traced: list) -> Any:
        structure, held = static
        leaves = [value if array is None else array for array, value in zip(traced, held, strict=True)]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        return function(*args, **kwargs)

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
        return program((structure, held), traced)

    return cast(Function, call)
