"""Published decompositions of several views, one a file: `fit(views, hierarchy, config, *, y=None, key) -> LinearFit`."""

from collections.abc import Callable

from hcl_jax.baselines.linear import LinearFit

BASELINES: dict[str, Callable[..., LinearFit]] = {}
"""By name, `fit(views, hierarchy, *, y=None, key)` with the configuration that the name says."""

__all__ = ["BASELINES", "LinearFit"]
