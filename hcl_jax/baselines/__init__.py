"""Published decompositions of several views, one a file: `fit(views, hierarchy, config, *, y=None, key=None) -> LinearFit`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import jax.random as jr

from hcl_jax.baselines import ajive, hnn, jive, mmfl, sjive, slide
from hcl_jax.fitted import LinearFit, check_views
from hcl_jax.structure import Hierarchy, as_hierarchy
from hcl_jax.views import as_key, as_response


def sjive_at_permutation_ranks(views: Any, hierarchy: Hierarchy, *, y: Any = None, key: Any = None) -> LinearFit:
    """sJIVE at the ranks that JIVE's permutation test chooses without the response: the first of the two rules of its paper."""
    views = check_views(views, as_hierarchy(hierarchy).dims)
    y = as_response(y, views.n_samples, samples=views.sample_names)
    k_ranks, k_fit = jr.split(as_key(key, "for the permutations and folds"))
    membership = jive.fit(views, hierarchy, jive.JiveConfig(ranks="permutation"), key=k_ranks).membership
    alone = membership.sum(axis=0) == 1
    ranks = jnp.concatenate([membership.all(axis=0).sum()[None], (membership & alone[None, :]).sum(axis=1)])
    most = tuple(len(hierarchy.active_columns(m)) for m in hierarchy.modalities)
    config = sjive.SjiveConfig(joint_rank=min(most), individual_ranks=most)
    return sjive.fit(views, hierarchy, config, y=y, key=k_fit, ranks=ranks.astype(jnp.int32))


BASELINES: dict[str, Callable[..., LinearFit]] = {
    "jive": jive.fit,
    "jive-unscaled": partial(jive.fit, config=jive.JiveConfig(scale_views=False)),
    "jive-permutation": partial(jive.fit, config=jive.JiveConfig(ranks="permutation")),
    "jive-bic": partial(jive.fit, config=jive.JiveConfig(ranks="bic")),
    "ajive": ajive.fit,
    "ajive-selected": partial(ajive.fit, config=ajive.AjiveConfig(ranks="selected")),
    "slide": slide.fit,
    "slide-unscaled": partial(slide.fit, config=slide.SlideConfig(scale_views=False)),
    "slide-bcv": partial(slide.fit, config=slide.SlideConfig(ranks="bcv")),
    "sjive": sjive.fit,
    "sjive-permutation": sjive_at_permutation_ranks,
    "mmfl": mmfl.fit,
    "mmfl-cv": partial(mmfl.fit, config=mmfl.MmflConfig(lam=(0.1, 1.0, 10.0), gamma=(1e-3, 0.03, 1.0))),
    "hnn": hnn.fit,
    "hnn-minimum": partial(hnn.fit, config=hnn.HnnConfig(rule="minimum")),
    "hnn-angle": partial(hnn.fit, config=hnn.HnnConfig(ranks="angle")),
}
"""`BASELINES[name](views, hierarchy, *, y=None, key=None)`, the key where something is drawn: at the hierarchy's ranks, or with
the rule behind the dash, which chooses ranks, or the weights of the response in MMFL; `unscaled`: views keep their common scale,
where noise is alike in all of them. HNN chooses its penalties by bi-cross-validation: the smallest rank within a standard error
of the least error, as its paper does, or the least error."""

SUPERVISED = tuple(name for name in BASELINES if name.startswith(("sjive", "mmfl")))
"""Entries that are fitted to a response too."""

__all__ = ["BASELINES", "SUPERVISED", "LinearFit"]
