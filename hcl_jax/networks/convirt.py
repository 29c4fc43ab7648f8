"""ConVIRT: an encoder a view, trained to find each sample's other views in the batch (Zhang et al. 2022)."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from hcl_jax.networks.independence import symmetric_info_nce, unit
from hcl_jax.networks.modules import Perceptron, Skipped, redrawn
from hcl_jax.networks.network import (
    HEAD,
    Method,
    Network,
    NetworkConfig,
    NetworkFit,
    Rows,
    check_modalities,
    check_widths,
    fit_network,
)
from hcl_jax.networks.training import Batch, TrainingConfig
from hcl_jax.structure import Hierarchy, structure_name
from hcl_jax.views import check_options


class Preset(NamedTuple):
    """What tells the variants apart; see the options of the same names."""

    inputs: Literal["normal", "standardised"]
    temperature: float
    direction: float


PRESETS = {
    "default": Preset("normal", 0.1, 0.5),
    "paper": Preset("standardised", 0.1, 0.75),
    "port": Preset("standardised", 0.07, 0.75),
    "trained": Preset("standardised", 1.0, 1.0),
}


@dataclass(frozen=True)
class ConvirtConfig(NetworkConfig):
    """Options of `fit`.

    training: batches as large as HCL's unless given.
    variant: "default", "paper" (its temperature and direction), "port" (those in the released HCL code) or "trained" (those with
    which that code was run, other methods' options that reached it by their names).
    inputs: as of every network; None: "normal" for the default variant, "standardised" for the others.
    temperature: τ. direction: λ, the weight of finding the later view of a pair from the earlier one, 1 − λ that of the converse.
    None: 0.1 and 0.5; 0.1 and 0.75 in the paper, 0.07 and 0.75 in the port, 1 and 1 as trained. They are filled in when the
    configuration is made.
    rank: width of every view's code. None: the ranks of all structures that hold a view, added up, the most of any view, and
    one more, as only directions are compared; in the other variants the rank of the structure of all views, or the largest rank
    without it.
    hidden: widths of the encoders' hidden layers.
    """

    presets: ClassVar = PRESETS
    training: TrainingConfig = TrainingConfig(batch_size=1024, learning_rate=3e-3)
    variant: Literal["default", "paper", "port", "trained"] = "default"
    inputs: Literal["normal", "standardised"] | None = None  # type: ignore[assignment]
    temperature: float | None = None
    direction: float | None = None
    rank: int | None = None
    hidden: tuple[int, ...] = (256, 128)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, choices={}, positive=("temperature",), least={"rank": 1})
        if self.direction is None or not 0 <= self.direction <= 1:
            raise ValueError(f"direction: is {self.direction}; expected a number from 0 to 1")
        check_widths(self, "hidden")


class Convirt(Network):
    """Encoders by view, and the supervised head on all their codes."""

    encoders: tuple[Perceptron | Skipped, ...]
    head: Perceptron

    def codes(self, views: tuple[Rows, ...]) -> list[Float[Array, "n r"]]:
        """Every view's code, of any length."""
        return [encoder(x) for encoder, x in zip(self.encoders, views, strict=True)]

    def scores(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n R"]:
        """All codes side by side, that of an absent view the mean of those of the views that are present.

        Views agree on a code up to its length, so that this is what is known of it.
        """
        codes = jnp.stack(self.codes(views))
        if present is not None:
            there = present.T[:, :, None]
            count = jnp.maximum(there.sum(axis=0), 1).astype(codes.dtype)
            codes = jnp.where(there, codes, (jnp.where(there, codes, 0).sum(axis=0) / count)[None])
        return jnp.concatenate([*codes], axis=1)

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        return self.head(self.scores(views))


def width(hierarchy: Hierarchy, config: ConvirtConfig) -> int:
    """Of a view's code."""
    if config.rank is not None:
        return config.rank
    if config.variant == "default":
        return max(len(hierarchy.active_columns(m)) for m in hierarchy.modalities) + 1
    ranks = dict(hierarchy.ranks)
    return ranks.get(tuple(hierarchy.modalities)) or max(ranks.values())


def build(key: Key[Array, ""], hierarchy: Hierarchy, config: ConvirtConfig) -> Convirt:
    """Random encoders."""
    dtype = jnp.dtype(config.training.dtype)
    r = width(hierarchy, config)
    shapes = [(d, *config.hidden, r) for d in hierarchy.dims]
    encoders: tuple[Perceptron | Skipped, ...]
    if config.variant == "default":
        encoders = tuple(Skipped(key, shape, dtype) for shape in shapes)  # drawn anew below
    else:
        encoders = tuple(Perceptron(key, shape, dtype=dtype) for shape in shapes)
    head = Perceptron(key, (hierarchy.n_modalities * r, HEAD, config.n_outputs), dtype=dtype)
    return redrawn(key, Convirt(encoders, head))


def loss(
    network: Convirt, batch: Batch, key: Key[Array, ""], config: ConvirtConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The sum over pairs of views of `symmetric_info_nce` of the cosines of their codes, by pair."""
    floor = 0.0 if config.variant == "default" else 1e-12  # the released code's, whose gradient at 0 is as large as 1/floor
    directions = [unit(code, floor=floor) for code in network.codes(batch.views)]
    assert config.temperature is not None, "filled in when the configuration was made"
    assert config.direction is not None, "filled in when the configuration was made"
    parts: dict[str, Array] = {}
    for m, other in combinations(range(len(directions)), 2):
        cosines = directions[m] @ directions[other].T
        name = structure_name((m + 1, other + 1))
        parts[name] = symmetric_info_nce(cosines, config.temperature, config.direction)
    return sum(parts.values(), jnp.zeros((), directions[0].dtype)), parts


def membership(hierarchy: Hierarchy, config: ConvirtConfig) -> np.ndarray:
    """All columns are all views'."""
    M = hierarchy.n_modalities
    return np.ones((M, M * width(hierarchy, config)), bool)


def check(hierarchy: Hierarchy, config: ConvirtConfig) -> None:
    """Raise `ValueError` for a single view."""
    check_modalities(hierarchy, "views are compared")


METHOD = Method("convirt", ConvirtConfig, build, loss, membership, check=check)


def fit(
    views: Any, hierarchy: Hierarchy, config: ConvirtConfig = ConvirtConfig(), *, y: Any = None, key: Any, **options: Any
) -> NetworkFit:
    """The least of the sum over pairs of views m < l of λ CE(rows of S/τ) + (1 − λ) CE(columns of S/τ): S are the cosines of
    their codes for all pairs of samples, and CE the cross-entropy of which samples belong together.

    Scores are the codes before they are scaled to length 1, side by side; of a row that lacks views, the mean of its other codes
    stands in. What a view has for itself is of no use to the loss. Options as in `fit_network`.

    The default variant finds either view of a pair alike (λ = ½), its codes have room for all structures of a view, as HCL's
    have, and its encoders a linear path besides their hidden layers. Codes as wide as the rank of one structure, as in the
    released code, hold that structure at best, and of codes of one coordinate nothing but the sign is compared.
    """
    return fit_network(METHOD, views, hierarchy, config, y=y, key=key, **options)
