"""The ceiling of an architecture: the encoders of `hcl`, trained on the true factors that nobody has."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hcl_jax.networks import hcl
from hcl_jax.networks.hcl import HclConfig
from hcl_jax.networks.network import Method, NetworkFit, all_columns, fit_rows
from hcl_jax.networks.training import Batch
from hcl_jax.structure import Hierarchy


class CeilingNetwork(hcl.HclNetwork):
    """Scores that are sums over the modalities of a structure, one encoder each."""

    def outputs(self, views: Any) -> Float[Array, "n K"]:
        return self.scores(views)

    def scores(self, views: Any, present: Any = None) -> Float[Array, "n K"]:
        total = jnp.zeros((views[0].shape[0], self.hierarchy.n_factors), views[0].dtype)
        for m, raw in enumerate(self.raw(views)):
            there = 1 if present is None else present[:, m, None].astype(raw.dtype)
            total = total.at[:, self.hierarchy.active_columns(m + 1)].add(there * raw)
        return total


def build(key: Key[Array, ""], hierarchy: Hierarchy, config: hcl.HclConfig) -> CeilingNetwork:
    """As nonlinear HCL begins."""
    network = hcl.build(key, hierarchy, config)
    return CeilingNetwork(**{name: getattr(network, name) for name in network.__dataclass_fields__})


def no_loss(network: CeilingNetwork, batch: Batch, key: Key[Array, ""], config: Any) -> tuple[Float[Array, ""], dict]:
    """None but the task's: Σ_k (z_k − ẑ_k)², minimised by E[z | x] among sums over modalities."""
    return jnp.zeros((), batch.views[0].dtype), {}


CONFIG = HclConfig()
METHOD = Method("supervised", hcl.HclConfig, build, no_loss, all_columns, hcl.start)


def fit_ceiling(
    views: Sequence[Float[Array, "n _d"]],
    hierarchy: Hierarchy,
    factors: Float[Array, "n K"],
    config: HclConfig = CONFIG,
    *,
    key: Key[Array, ""],
) -> NetworkFit:
    """Encoders of the size, start, steps and batches of `hcl`, on factors that are known."""
    return fit_rows(METHOD, jnp.concatenate(views, axis=1), hierarchy, config, factors, key)
