"""Contrasts of whole representations, against which FactorCL is measured: SimCLR across views, SupCon, Cross+Self.

A view's code is to be found from the other views' codes of the sample ("cross"), or from a changed copy of the view ("self").
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from hcl_jax.networks.augmentation import AUGMENTATIONS, Augmentation, augmented, find_spared, none_spared
from hcl_jax.networks.independence import binned, first_label, same_label, supcon, unit
from hcl_jax.networks.modules import Constant, Perceptron, redrawn
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
from hcl_jax.structure import Hierarchy
from hcl_jax.views import check_options


class Preset(NamedTuple):
    """What tells the variants apart; see the options of the same names."""

    inputs: Literal["normal", "standardised"]
    augmentation: Augmentation
    normalise: bool
    temperature: float


PRESETS = {
    "default": Preset("normal", "noise", True, 0.1),
    "published": Preset("standardised", "published", False, 0.07),
}


@dataclass(frozen=True)
class SimclrConfig(NetworkConfig):
    """Options of `fit`. None: as the variant has it, filled in when the configuration is made.

    variant: "published" as the baselines of the released FactorCL code.
    inputs: as of every network; None: "normal" for the default variant, "standardised" for the published one.
    objective: "cross" between views, "cross-self" also between every view and its copy, by the same projections, or
    "cross-self-heads" by others, so that what only a view has need not be found from the others.
    positives: the same "sample", which is SimCLR, or the same "label", which is SupCon and without a response SimCLR.
    augmentation, strength: see `augmentation.augmented`.
    normalise: projections count by their direction only. temperature: of the softmax, τ.
    width: of all codes. hidden, head_hidden: widths of the hidden layers of encoders and projections.
    """

    presets: ClassVar = PRESETS
    training: TrainingConfig = TrainingConfig(weight_decay=0.0)
    variant: Literal["default", "published"] = "default"
    inputs: Literal["normal", "standardised"] | None = None  # type: ignore[assignment]
    objective: Literal["cross", "cross-self", "cross-self-heads"] = "cross"
    positives: Literal["sample", "label"] = "sample"
    augmentation: Augmentation | None = None
    strength: float = 1.0
    normalise: bool | None = None
    temperature: float | None = None
    width: int = 16
    hidden: tuple[int, ...] = (128, 128)
    head_hidden: tuple[int, ...] = (32,)

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "objective": ("cross", "cross-self", "cross-self-heads"),
            "positives": ("sample", "label"),
            "augmentation": AUGMENTATIONS,
        }
        check_options(self, choices=choices, positive=("temperature",), least={"strength": 0, "width": 1})
        check_widths(self, "hidden", "head_hidden")


class Simclr(Network):
    """Encoders and projections by view, and the supervised head on the encoders' codes."""

    backbones: tuple[Perceptron, ...]
    projections: tuple[Perceptron, ...]
    own: tuple[Perceptron, ...]
    """Projections for a view and its copy; none: the same."""
    head: Perceptron
    spared: tuple[Constant, ...]
    """Directions that "conditioned" copies leave alone."""

    def codes(self, views: tuple[Rows, ...]) -> list[Float[Array, "n r"]]:
        return [backbone(x) for backbone, x in zip(self.backbones, views, strict=True)]

    def scores(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n R"]:
        """The encoders' codes side by side; that of an absent view is that of its mean."""
        return jnp.concatenate(self.codes(views), axis=1)

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        return self.head(self.scores(views))


def build(key: Key[Array, ""], hierarchy: Hierarchy, config: SimclrConfig) -> Simclr:
    """Random encoders and projections."""
    dtype, r, dims = jnp.dtype(config.training.dtype), config.width, hierarchy.dims
    perceptron = lambda *widths: Perceptron(key, widths, dtype=dtype)  # drawn anew below
    projections = lambda: tuple(perceptron(r, *config.head_hidden, r) for _ in dims)
    network = Simclr(
        backbones=tuple(perceptron(d, *config.hidden, r) for d in dims),
        projections=projections(),
        own=projections() if config.objective == "cross-self-heads" else (),
        head=perceptron(len(dims) * r, HEAD, config.n_outputs),
        spared=none_spared(hierarchy, config),
    )
    return redrawn(key, network)


def loss(
    network: Simclr, batch: Batch, key: Key[Array, ""], config: SimclrConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`supcon` of all views' projections, and the mean over views of that of each view and its copy; see `fit`."""
    codes = network.codes(batch.views)
    positives = None
    if config.positives == "label" and batch.y is not None:
        positives = same_label(binned(first_label(batch.y)))

    def contrast(projections: list[Rows], positives: Bool[Array, "n n"] | None) -> Float[Array, ""]:
        features = jnp.stack(projections, axis=1)
        tau = config.temperature
        assert tau is not None, "filled in when the configuration was made"
        return supcon(unit(features) if config.normalise else features, positives, temperature=tau, base_temperature=tau)

    parts = {"cross": contrast([head(z) for head, z in zip(network.projections, codes, strict=True)], positives)}
    if config.objective != "cross":
        assert config.augmentation is not None, "filled in when the configuration was made"
        copies = network.codes(augmented(key, batch.views, config.augmentation, config.strength, network.spared))
        heads = network.own or network.projections
        pairs = [contrast([head(z), head(copy)], None) for head, z, copy in zip(heads, codes, copies, strict=True)]
        parts["self"] = jnp.mean(jnp.stack(pairs))
    return sum(parts.values(), jnp.zeros((), codes[0].dtype)), parts


def membership(hierarchy: Hierarchy, config: SimclrConfig) -> np.ndarray:
    """Columns are those of the view that they are computed from."""
    return np.repeat(np.eye(hierarchy.n_modalities, dtype=bool), config.width, axis=1)


def check(hierarchy: Hierarchy, config: SimclrConfig) -> None:
    """Raise `ValueError` for a single view."""
    check_modalities(hierarchy, "views are compared")


METHOD = Method("simclr", SimclrConfig, build, loss, membership, find_spared, check=check)


def fit(
    views: Any, hierarchy: Hierarchy, config: SimclrConfig = SimclrConfig(), *, y: Any = None, key: Any, **options: Any
) -> NetworkFit:
    """SimCLR across views (Chen et al. 2020), SupCon (Khosla et al. 2020) or Cross+Self on rows.

    −mean_a mean_p log( exp(⟨a, p⟩/τ) / Σ_{j≠a} exp(⟨a, j⟩/τ) ) over the projections of all views of the batch, p those of a's
    sample in the other views, or with `positives="label"` all of a's label; for "cross-self" and "cross-self-heads" the mean over
    views of the same of each view and its copy is added. Scores are the encoders' codes; `task_weight=0` leaves them to the
    contrast, to be probed. Options as in `fit_network`.
    """
    return fit_network(METHOD, views, hierarchy, config, y=y, key=key, **options)
