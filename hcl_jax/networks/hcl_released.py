"""Hierarchical contrastive learning as the released code has it, to compare with: its loss makes representations collapse.

Three modalities. One encoder a (modality, level), the level being a size of structures, so that a modality says the same of all
structures of a size: of 12 and 13 the first has one vector, cut to their ranks. The regulariser compares structures by the
signed inner products of these vectors, and so rewards opposite ones instead of unrelated ones: for equal ranks it is Σ ‖a + 2b
+ c‖², over modalities and samples, of the unit vectors of the three levels, and vanishes at a = c = −b only. `hcl` is without
these faults.
"""

from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Key

from hcl_jax.contrastive import linear_loss, similarities
from hcl_jax.networks.independence import signed_overlap, unit_structures
from hcl_jax.networks.modules import Perceptron, redrawn
from hcl_jax.networks.network import (
    Method,
    Network,
    NetworkConfig,
    NetworkFit,
    Rows,
    all_columns,
    check_modalities,
    check_widths,
    fit_network,
)
from hcl_jax.networks.training import Batch
from hcl_jax.structure import Hierarchy
from hcl_jax.views import check_options


@dataclass(frozen=True)
class HclReleasedConfig(NetworkConfig):
    """Options of `fit`.

    penalty: λ, the weight of the regulariser, which is a sum over the rows of a batch.
    hidden: widths of the encoders' hidden layers.
    head: width of the supervised head's hidden layer.
    """

    inputs: Literal["normal", "standardised"] = "standardised"
    penalty: float = 1.0
    hidden: tuple[int, ...] = (256, 128)
    head: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, choices={}, least={"penalty": 0, "head": 1})
        check_widths(self, "hidden")


class HclReleasedNetwork(Network):
    """Encoders by modality and level, None where no structure of that size holds the modality."""

    encoders: tuple[tuple[Perceptron | None, ...], ...]
    head: Perceptron
    hierarchy: Hierarchy = eqx.field(static=True)

    def levels(self, views: tuple[Rows, ...]) -> list[list[Float[Array, "n _r"] | None]]:
        """Every encoder's output, by modality and level."""
        return [[e if e is None else e(x) for e in own] for own, x in zip(self.encoders, views, strict=True)]

    def representations(self, views: tuple[Rows, ...]) -> Float[Array, "M n K"]:
        """What each modality says of each structure, before normalisation."""
        by_modality = []
        for m, levels in enumerate(self.levels(views), start=1):
            blocks = []
            for s, rank in self.hierarchy.ranks:
                level = levels[3 - len(s)] if m in s else None
                blocks.append(jnp.zeros((views[0].shape[0], rank), views[0].dtype) if level is None else level[:, :rank])
            by_modality.append(jnp.concatenate(blocks, axis=1))
        return jnp.stack(by_modality)

    def scores(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n K"]:
        """The mean of each structure over its modalities, those that are present; 0 where none of them is."""
        representations = self.representations(views)
        held = jnp.asarray(self.hierarchy.modality_mask)[:, None, :]
        there = held if present is None else held & present.T[:, :, None]
        count = jnp.maximum(there.sum(axis=0), 1).astype(representations.dtype)
        return jnp.where(there, representations, 0).sum(axis=0) / count

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        return self.head(self.scores(views))


def build(key: Key[Array, ""], hierarchy: Hierarchy, config: HclReleasedConfig) -> HclReleasedNetwork:
    """A random network: of every encoder the width is the largest rank that it serves."""
    dtype = jnp.dtype(config.training.dtype)
    k_layers, k_weights = jr.split(key)
    encoders = []
    for m, p in zip(hierarchy.modalities, hierarchy.dims, strict=True):
        widths = [max((rank for s, rank in hierarchy.ranks if m in s and len(s) == 3 - level), default=0) for level in range(3)]
        encoders.append(tuple(Perceptron(k_layers, (p, *config.hidden, r), dtype=dtype) if r else None for r in widths))
    head = Perceptron(k_layers, (hierarchy.n_factors, config.head, config.n_outputs), dtype=dtype)
    return redrawn(k_weights, HclReleasedNetwork(tuple(encoders), head, hierarchy=hierarchy))


def loss(
    network: HclReleasedNetwork, batch: Batch, key: Key[Array, ""], config: HclReleasedConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`independence.hcl_loss`, with its parts."""
    units = unit_structures(network.representations(batch.views), network.hierarchy)
    contrast = linear_loss(similarities(units, network.hierarchy))
    overlap = signed_overlap(units, network.hierarchy)
    return contrast + config.penalty * overlap, {"contrast": contrast, "overlap": overlap}


def check(hierarchy: Hierarchy, config: HclReleasedConfig) -> None:
    """Raise `ValueError` unless there are three views."""
    check_modalities(hierarchy, "the released code has", 3)


METHOD = Method("hcl-released", HclReleasedConfig, build, loss, all_columns, check=check)


def fit(
    views: Any, hierarchy: Hierarchy, config: HclReleasedConfig = HclReleasedConfig(), *, y: Any = None, key: Any, **options: Any
) -> NetworkFit:
    """The released method on rows; scores are the means of each structure over its modalities. Options as in `fit_network`."""
    return fit_network(METHOD, views, hierarchy, config, y=y, key=key, **options)
