"""DLF: what views share and what is specific to each, and a fusion in which one view leads (Wang et al. 2025).

A view has a shared code and a specific one, which together rebuild it. Specific codes survive the way through decoder and
encoder; shared ones are told from specific ones, and are nearest where samples are alike. The specific code of the first view
attends to the specific codes of all views, on the way to what the supervised head sees.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from hcl_jax.networks.attention import TransformerLayer, check_heads
from hcl_jax.networks.independence import binned, first_label, first_match_triplet, orthogonality, triplet_hinge, unit
from hcl_jax.networks.modules import Perceptron, Skipped, redrawn, rowwise
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
from hcl_jax.networks.training import Batch
from hcl_jax.networks.tsd import mean_present, mean_square, overlap
from hcl_jax.structure import Hierarchy
from hcl_jax.views import check_options

TOKEN = 32
"""Width of the tokens of the default variant."""
TOKENS = 4
"""Into which the default variant splits a specific code."""


class Preset(NamedTuple):
    """What tells the variants apart; see the options of the same names."""

    inputs: Literal["normal", "standardised"]
    reconstruction: float
    specific: float
    alignment: float
    triplet: float
    orthogonality: float


PRESETS = {
    "default": Preset("normal", 0.1, 0.1, 0.1, 0.01, 0.01),
    "port": Preset("standardised", 1.0, 1.0, 0.0, 1.0, 1.0),
    "official": Preset("standardised", 0.1, 0.1, 0.0, 0.01, 0.01),
}


@dataclass(frozen=True)
class DlfConfig(NetworkConfig):
    """Options of `fit`.

    variant: "port" has the networks and losses of the released HCL code, for three views; "official" these networks with the
    authors' losses; "default" ours; see `fit`.
    inputs: as of every network; None: "normal" for the default variant, "standardised" for the others.
    reconstruction: weight of the views' mean squared error.
    specific: of that of specific codes encoded from what is rebuilt.
    alignment: of the triplets in which a sample is alike to itself in other views; only the default variant has it.
    triplet: of those in which samples of one label are alike, where samples have labels.
    orthogonality: of what keeps shared and specific codes apart.
    The weights that are None are filled in when the configuration is made: 1 each in the port; in the official variant 0.1, 0.1,
    none, 0.01 and 0.01, which are ours too, with 0.1 for the alignment.
    margin: by which cosines are to differ in the alignment, and in the port's triplets.
    label_margin: the same in all other triplets, times the distance of the labels.
    hidden: widths of the encoders' hidden layers, and in reverse of the decoders' in the default variant.
    heads: of the attention. None: 2 where these divide the width of its tokens, else 1.
    """

    presets: ClassVar = PRESETS
    variant: Literal["default", "port", "official"] = "default"
    inputs: Literal["normal", "standardised"] | None = None  # type: ignore[assignment]
    reconstruction: float | None = None
    specific: float | None = None
    alignment: float | None = None
    triplet: float | None = None
    orthogonality: float | None = None
    margin: float = 1.0
    label_margin: float = 0.15
    hidden: tuple[int, ...] = (256, 128)
    heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, choices={}, least=dict.fromkeys((*Preset._fields[1:], "margin", "label_margin"), 0))
        check_widths(self, "hidden", least=1)
        if self.variant != "default" and self.alignment:
            raise ValueError(f"alignment: is {self.alignment}; expected 0, as only the default variant has it")


class Codes(NamedTuple):
    """A view each: shared and specific codes, and what decoders make of both."""

    shared: tuple[Rows, ...]
    specific: tuple[Rows, ...]
    rebuilt: tuple[Rows, ...]


class DlfNetwork(Network):
    """What the variants have in common."""

    @abstractmethod
    def codes(self, views: tuple[Rows, ...]) -> Codes:
        """Codes of standardised views."""

    @abstractmethod
    def encoded(self, views: tuple[Rows, ...]) -> tuple[Rows, ...]:
        """Specific codes."""

    @abstractmethod
    def fused(self, codes: Codes) -> Float[Array, "n _f"]:
        """What the supervised head sees."""

    @abstractmethod
    def parts(self, batch: Batch, config: DlfConfig) -> dict[str, Float[Array, ""]]:
        """Of the loss, without their weights."""

    def scores(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n R"]:
        """The mean of the shared codes of the views that are there, and every view's specific code, 0 where it is not."""
        codes = self.codes(views)
        there = jnp.ones((views[0].shape[0], len(views)), bool) if present is None else present
        specific = [mean_present([code], there[:, [m]]) for m, code in enumerate(codes.specific)]
        return jnp.concatenate([mean_present(codes.shared, there), *specific], axis=1)


class DlfPort(DlfNetwork):
    """The port of the released HCL code: all codes of one width, a code a token."""

    projections: tuple[eqx.nn.Linear, ...]
    shared: Perceptron
    specific: tuple[Perceptron, ...]
    decoders: tuple[Perceptron, ...]
    attractors: tuple[TransformerLayer, ...]
    together: TransformerLayer
    """Over the shared codes."""
    shared_output: eqx.nn.Linear
    specific_outputs: tuple[eqx.nn.Linear, ...]
    head: Perceptron

    def codes(self, views: tuple[Rows, ...]) -> Codes:
        projected = jnp.concatenate([rowwise(project, x) for project, x in zip(self.projections, views, strict=True)])
        shared, specific = jnp.split(self.shared(projected), len(views)), self.encoded(views)
        both = [jnp.concatenate(pair, axis=1) for pair in zip(shared, specific, strict=True)]
        return Codes(tuple(shared), specific, tuple(decoder(h) for decoder, h in zip(self.decoders, both, strict=True)))

    def encoded(self, views: tuple[Rows, ...]) -> tuple[Rows, ...]:
        return tuple(encoder(x) for encoder, x in zip(self.specific, views, strict=True))

    def enhanced(self, codes: Codes) -> list[Rows]:
        """The first view's specific code after it attended to that of each view, of which it sees the same whatever it asks."""
        lead = codes.specific[0][:, None]
        return [layer(lead, code[:, None])[:, 0] for layer, code in zip(self.attractors, codes.specific, strict=True)]

    def fused(self, codes: Codes) -> Float[Array, "n _f"]:
        specific = [
            jax.nn.relu(rowwise(output, code)) for output, code in zip(self.specific_outputs, self.enhanced(codes), strict=True)
        ]
        shared = self.together(jnp.stack(codes.shared, axis=1)).mean(axis=1)
        return jnp.concatenate([*specific, rowwise(self.shared_output, shared)], axis=1)

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        return self.head(self.fused(self.codes(views)))

    def parts(self, batch: Batch, config: DlfConfig) -> dict[str, Float[Array, ""]]:
        codes = self.codes(batch.views)
        rebuilt, specific = codes.rebuilt, codes.specific
        if config.variant == "port":
            rebuilt, specific = jax.lax.stop_gradient((rebuilt, specific))
        again = self.encoded(rebuilt)
        guard = partial(unit, floor=1e-8) if config.variant == "port" else partial(unit, inside=1e-12)
        sums = {
            "reconstruction": _sum([mean_square(x, back) for x, back in zip(batch.views, codes.rebuilt, strict=True)]),
            "specific": _sum([mean_square(a, b) for a, b in zip(specific, again, strict=True)]),
            "orthogonality": _sum(
                [orthogonality(a, b, normalise=guard) for a, b in zip(codes.shared, codes.specific, strict=True)]
            ),
        }
        parts = {name: part / len(batch.views) if config.variant == "port" else part for name, part in sums.items()}
        return parts | {"triplet": self._triplets(codes, batch.y, config)}

    def _triplets(self, codes: Codes, y: Array | None, config: DlfConfig) -> Float[Array, ""]:
        if y is None:
            return jnp.zeros((), codes.shared[0].dtype)
        if config.variant == "port":
            blocks = jnp.stack(codes.shared)
            return first_match_triplet(blocks, first_label(y), config.margin, normalise=partial(unit, floor=1e-8))
        labels = jnp.tile(first_label(y), len(codes.shared))
        return triplet_hinge(jnp.concatenate(codes.shared), labels, config.label_margin, normalise=partial(unit, inside=1e-8))


class Dlf(DlfNetwork):
    """Ours."""

    projections: tuple[eqx.nn.Linear, ...]
    shared: Skipped
    specific: tuple[Skipped | None, ...]
    """None where a view has no specific code."""
    decoders: tuple[Skipped, ...]
    shared_tokens: eqx.nn.Linear
    specific_tokens: tuple[eqx.nn.Linear, ...]
    """Of the views that have a specific code, to `TOKENS` tokens each; so are the attractors and their outputs."""
    attractors: tuple[TransformerLayer, ...]
    together: TransformerLayer
    shared_output: eqx.nn.Linear
    specific_outputs: tuple[eqx.nn.Linear, ...]
    head: Perceptron
    direct: eqx.nn.Linear
    """From codes to outputs, as the attention's norms take lengths away."""

    def codes(self, views: tuple[Rows, ...]) -> Codes:
        projected = jnp.concatenate([rowwise(project, x) for project, x in zip(self.projections, views, strict=True)])
        shared, specific = jnp.split(self.shared(projected), len(views)), self.encoded(views)
        both = [jnp.concatenate(pair, axis=1) for pair in zip(shared, specific, strict=True)]
        return Codes(tuple(shared), specific, tuple(decoder(h) for decoder, h in zip(self.decoders, both, strict=True)))

    def encoded(self, views: tuple[Rows, ...]) -> tuple[Rows, ...]:
        return tuple(x[:, :0] if encoder is None else encoder(x) for encoder, x in zip(self.specific, views, strict=True))

    def fused(self, codes: Codes) -> Float[Array, "n _f"]:
        held = [code for code in codes.specific if code.shape[1]]
        split = [rowwise(split, code).reshape(-1, TOKENS, TOKEN) for split, code in zip(self.specific_tokens, held, strict=True)]
        enhanced = [layer(split[0], tokens).mean(axis=1) for layer, tokens in zip(self.attractors, split, strict=True)]
        specific = [jax.nn.relu(rowwise(output, code)) for output, code in zip(self.specific_outputs, enhanced, strict=True)]
        shared = self.together(jnp.stack([rowwise(self.shared_tokens, code) for code in codes.shared], axis=1)).mean(axis=1)
        return jnp.concatenate([*specific, rowwise(self.shared_output, shared)], axis=1)

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        codes = self.codes(views)
        return self.head(self.fused(codes)) + rowwise(self.direct, jnp.concatenate([*codes.shared, *codes.specific], axis=1))

    def parts(self, batch: Batch, config: DlfConfig) -> dict[str, Float[Array, ""]]:
        codes = self.codes(batch.views)
        again = self.encoded(codes.rebuilt)
        blocks = jnp.stack(codes.shared)
        triplet = jnp.zeros((), blocks.dtype)
        if batch.y is not None:
            triplet = triplet_hinge(blocks.mean(axis=0), binned(first_label(batch.y)), config.label_margin)
        kept = [mean_square(a, b) for a, b in zip(codes.specific, again, strict=True) if a.shape[1]]
        return {
            "reconstruction": _sum([mean_square(x, back) for x, back in zip(batch.views, codes.rebuilt, strict=True)]),
            "specific": _sum([*kept, jnp.zeros((), blocks.dtype)]),
            "alignment": own_sample_hinge(blocks, config.margin),
            "triplet": triplet,
            "orthogonality": _sum([overlap(pair) for pair in zip(codes.shared, codes.specific, strict=True)]),
        }


def _sum(values: Sequence[Float[Array, ""]]) -> Float[Array, ""]:
    return jnp.sum(jnp.stack(values))


def own_sample_hinge(blocks: Float[Array, "M n r"], margin: float | Float[Array, ""] = 1.0) -> Float[Array, ""]:
    """The mean of max(0, cos(a, q) − cos(a, p) + margin) over anchors a of every view, p the same sample in another view, q
    another sample in any view: triplets without labels, every sample being a class of its own."""
    M, n, r = blocks.shape
    units = unit(blocks)
    flat = units.reshape(M * n, r)
    reach = flat @ flat.T + margin
    sample = np.tile(np.arange(n), M)
    other = sample[:, None] != sample[None, :]
    total = jnp.zeros((), blocks.dtype)
    for shift in range(1, M):
        positive = jnp.sum(units * jnp.roll(units, shift, axis=0), axis=-1).reshape(-1)
        total = total + jnp.sum(jnp.where(other, jax.nn.relu(reach - positive[:, None]), 0))
    return total / max((M - 1) * int(other.sum()), 1)


def widths(hierarchy: Hierarchy, config: DlfConfig) -> tuple[int, tuple[int, ...]]:
    """(of the shared codes, of the specific codes); see `fit`."""
    views, ranks = tuple(hierarchy.modalities), dict(hierarchy.ranks)
    shared = ranks.get(views) or max(ranks.values())
    if config.variant != "default":
        return shared, (shared,) * len(views)
    return shared, tuple(sum(rank for s, rank in hierarchy.ranks if m in s and s != views) for m in views)


def build(key: Key[Array, ""], hierarchy: Hierarchy, config: DlfConfig) -> DlfNetwork:
    """A random network of the variant."""
    k_layers, k_weights = jr.split(key)
    return redrawn(k_weights, (_ours if config.variant == "default" else _port)(k_layers, hierarchy, config))


def _port(key: Key[Array, ""], hierarchy: Hierarchy, config: DlfConfig) -> DlfPort:
    dtype, dims = jnp.dtype(config.training.dtype), hierarchy.dims
    r, _ = widths(hierarchy, config)
    linear = lambda fan_in: eqx.nn.Linear(fan_in, r, dtype=dtype, key=key)
    perceptron = lambda *sizes: Perceptron(key, sizes, dtype=dtype)
    layer = lambda: TransformerLayer(key, r, 4 * r, _heads(config, r), dtype)
    return DlfPort(
        tuple(linear(d) for d in dims),
        perceptron(r, *config.hidden, r),
        tuple(perceptron(d, *config.hidden, r) for d in dims),
        tuple(perceptron(2 * r, 2 * r, d) for d in dims),
        tuple(layer() for _ in dims),
        layer(),
        linear(r),
        tuple(linear(r) for _ in dims),
        perceptron((len(dims) + 1) * r, HEAD, config.n_outputs),
    )


def _ours(key: Key[Array, ""], hierarchy: Hierarchy, config: DlfConfig) -> Dlf:
    dtype, dims = jnp.dtype(config.training.dtype), hierarchy.dims
    r, specific = widths(hierarchy, config)
    entered, back = config.hidden[-1], config.hidden[::-1]
    linear = lambda fan_in, fan_out: eqx.nn.Linear(fan_in, fan_out, dtype=dtype, key=key)
    skipped = lambda *sizes: Skipped(key, sizes, dtype)
    layer = lambda: TransformerLayer(key, TOKEN, 4 * TOKEN, _heads(config, TOKEN), dtype)
    held = [width for width in specific if width]
    return Dlf(
        tuple(linear(d, entered) for d in dims),
        skipped(entered, *config.hidden, r),
        tuple(skipped(d, *config.hidden, width) if width else None for d, width in zip(dims, specific, strict=True)),
        tuple(skipped(r + width, *back, d) for d, width in zip(dims, specific, strict=True)),
        linear(r, TOKEN),
        tuple(linear(width, TOKENS * TOKEN) for width in held),
        tuple(layer() for _ in held),
        layer(),
        linear(TOKEN, TOKEN),
        tuple(linear(TOKEN, TOKEN) for _ in held),
        Perceptron(key, ((len(held) + 1) * TOKEN, HEAD, config.n_outputs), dtype=dtype),
        linear(len(dims) * r + sum(held), config.n_outputs),
    )


def _heads(config: DlfConfig, width: int) -> int:
    return (2 if width % 2 == 0 else 1) if config.heads is None else config.heads


def loss(
    network: DlfNetwork, batch: Batch, key: Key[Array, ""], config: DlfConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of the parts; see `fit`."""
    parts = network.parts(batch, config)
    return jnp.sum(jnp.stack([getattr(config, name) * part for name, part in parts.items()])), parts


def membership(hierarchy: Hierarchy, config: DlfConfig) -> np.ndarray:
    """All views hold the shared columns, a view its specific ones."""
    shared, specific = widths(hierarchy, config)
    own = np.repeat(np.eye(len(specific), dtype=bool), specific, axis=1)
    return np.concatenate([np.ones((len(specific), shared), bool), own], axis=1)


def check(hierarchy: Hierarchy, config: DlfConfig) -> None:
    """Raise `ValueError` for a single view, not three in the port, and heads that do not divide the width of the tokens."""
    check_modalities(hierarchy, "shared codes are those of several")
    if config.variant == "port":
        check_modalities(hierarchy, "the port has", 3)
    width = TOKEN if config.variant == "default" else widths(hierarchy, config)[0]
    check_heads(_heads(config, width), width)


METHOD = Method("dlf", DlfConfig, build, loss, membership, check=check)


def fit(
    views: Any, hierarchy: Hierarchy, config: DlfConfig = DlfConfig(), *, y: Any = None, key: Any, **options: Any
) -> NetworkFit:
    """DLF on rows. Scores: the mean of the shared codes, the specific codes. Options as in `fit_network`."""
    return fit_network(METHOD, views, hierarchy, config, y=y, key=key, **options)
