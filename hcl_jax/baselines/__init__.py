"""Published decompositions of several views, one a file: `fit(views, hierarchy, config, *, y=None, key) -> LinearFit`."""

from collections.abc import Callable
from functools import partial

from hcl_jax.baselines import ajive, hnn, jive, mmfl, sjive, slide
from hcl_jax.baselines.linear import LinearFit

BASELINES: dict[str, Callable[..., LinearFit]] = {
    "jive": jive.fit,
    "jive-permutation": partial(jive.fit, config=jive.JiveConfig(ranks="permutation")),
    "jive-bic": partial(jive.fit, config=jive.JiveConfig(ranks="bic")),
    "ajive": ajive.fit,
    "ajive-selected": partial(ajive.fit, config=ajive.AjiveConfig(ranks="selected")),
    "slide": slide.fit,
    "slide-bcv": partial(slide.fit, config=slide.SlideConfig(ranks="bcv")),
    "sjive": sjive.fit,
    "mmfl": mmfl.fit,
    "hnn": hnn.fit,
    "hnn-angle": partial(hnn.fit, config=hnn.HNNConfig(ranks="angle")),
}
"""`BASELINES[name](views, hierarchy, *, y=None, key)`: at the hierarchy's ranks, or with the rank rule behind the dash. HNN
chooses its penalties by bi-cross-validation in both."""

__all__ = ["BASELINES", "LinearFit"]
