"""TSD: what all views share, what each pair of them shares, and what each has alone (Meng et al. 2026, arXiv 2602.19585).

A view has a common code, a code for every pair that it belongs to, and a private one. The common codes are to agree, and the
two codes of a pair; the private ones to be independent; the codes of one view to be orthogonal; and a supervisor tells the
three kinds apart.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from hcl_jax.networks.attention import TransformerLayer, check_heads, tokenwise
from hcl_jax.networks.independence import hsic
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
from hcl_jax.structure import Hierarchy
from hcl_jax.views import check_options

SUPERVISOR = 64
"""Width of the supervisors' hidden layers."""
TOKEN = 32
"""Width to which the default variant brings codes of unlike widths, to make tokens of them."""
TINY = 1e-6
"""Of a variance: the least that is divided by."""
KINDS = ("common", "pair", "private")

gelu = partial(jax.nn.gelu, approximate=False)
Pair = tuple[int, int]


class Preset(NamedTuple):
    """What tells the variants apart; see the options of the same names."""

    inputs: Literal["normal", "standardised"]
    common: float
    pair: float
    private: float
    orthogonality: float
    supervisor: float
    reconstruction: float


PRESETS = {
    "default": Preset("normal", 1.0, 1.0, 1.0, 1.0, 1.0, 3.0),
    "port": Preset("standardised", 1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
}


@dataclass(frozen=True)
class TsdConfig(NetworkConfig):
    """Options of `fit`.

    variant: "port" has the networks and losses of the released HCL code, for three views; "default" ours; see `fit`.
    inputs: as of every network; None: "normal" for the default variant, "standardised" for the port.
    common, pair: weights of the disagreement of common codes, and of the two codes of a pair.
    private: of the dependence of private codes.
    orthogonality: of what keeps the codes of a view apart.
    supervisor: of the supervisor's loss.
    reconstruction: of the views' mean squared error; the port has none.
    The weights that are None are filled in when the configuration is made: 1 each, and 3 for the reconstruction.
    hidden: widths of the hidden layers of the common encoder, and in reverse of the decoders; the other encoders have the last
    one, the port's encoders none.
    heads: of the attention of the default variant.
    """

    presets: ClassVar = PRESETS
    variant: Literal["default", "port"] = "default"
    inputs: Literal["normal", "standardised"] | None = None  # type: ignore[assignment]
    common: float | None = None
    pair: float | None = None
    private: float | None = None
    orthogonality: float | None = None
    supervisor: float | None = None
    reconstruction: float | None = None
    hidden: tuple[int, ...] = (256, 128)
    heads: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, choices={}, least=dict.fromkeys(Preset._fields[1:], 0))
        check_heads(self.heads, TOKEN)
        check_widths(self, "hidden", least=1)
        if self.variant == "port" and self.reconstruction:
            raise ValueError(f"reconstruction: is {self.reconstruction}; expected 0, as the port rebuilds nothing")


class Codes(NamedTuple):
    """Of all views: the common ones, those of both members of each pair, the private ones."""

    common: tuple[Rows, ...]
    pairs: dict[Pair, tuple[Rows, Rows]]
    private: tuple[Rows, ...]

    def of_view(self, m: int) -> list[Rows]:
        """The common code of view m, those of its pairs, and the private one last."""
        own = [both[pair.index(m)] for pair, both in self.pairs.items() if m in pair]
        return [self.common[m - 1], *own, self.private[m - 1]]

    def by_subspace(self) -> list[Rows]:
        """The common codes, the mean of each pair, the private codes: those that have coordinates."""
        means = [(a + b) / 2 for a, b in self.pairs.values()]
        return [code for code in (*self.common, *means, *self.private) if code.shape[1]]


class TsdNetwork(Network):
    """What the variants have in common."""

    @abstractmethod
    def codes(self, views: tuple[Rows, ...]) -> Codes:
        """Codes of standardised views."""

    @abstractmethod
    def fused(self, views: tuple[Rows, ...]) -> Float[Array, "n _f"]:
        """What the supervised head sees."""

    @abstractmethod
    def parts(self, codes: Codes, views: tuple[Rows, ...]) -> dict[str, Float[Array, ""]]:
        """Of the loss, without their weights."""

    def scores(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n R"]:
        """The mean of the common codes, of the codes of every pair, and the private codes; 0 where no view is there for them."""
        codes = self.codes(views)
        there = jnp.ones((views[0].shape[0], len(views)), bool) if present is None else present
        blocks = [mean_present(codes.common, there)]
        blocks += [mean_present(both, there[:, np.array(pair) - 1]) for pair, both in codes.pairs.items()]
        blocks += [mean_present([code], there[:, [m]]) for m, code in enumerate(codes.private)]
        return jnp.concatenate(blocks, axis=1)


def mean_present(codes: Sequence[Rows], present: Bool[Array, "n m"]) -> Rows:
    """The mean of the codes that are present in a row, 0 where none is."""
    held = [jnp.where(present[:, i, None], code, 0) for i, code in enumerate(codes)]
    return sum(held[1:], held[0]) / jnp.maximum(present.sum(axis=1, keepdims=True), 1).astype(held[0].dtype)


def mean(values: Sequence[Float[Array, ""]], like: Rows) -> Float[Array, ""]:
    """0 of nothing."""
    return jnp.mean(jnp.stack(values)) if values else jnp.zeros((), like.dtype)


def mean_square(a: Rows, b: Rows) -> Float[Array, ""]:
    """Of the difference, over rows and columns."""
    return jnp.mean((a - b) ** 2)


class TsdPort(TsdNetwork):
    """The port of the released HCL code."""

    projections: tuple[eqx.nn.Linear, ...]
    common: tuple[eqx.nn.Linear, ...]
    norms: tuple[eqx.nn.LayerNorm, ...]
    pairs: tuple[eqx.nn.Linear, ...]
    private: tuple[eqx.nn.Linear, ...]
    gates: tuple[Perceptron, ...]
    """Each from all codes to a number for its subspace."""
    supervisors: tuple[Perceptron, ...]
    head: Perceptron
    named: tuple[Pair, ...] = eqx.field(static=True)
    """The pairs that have codes."""

    def projected(self, views: tuple[Rows, ...]) -> list[Rows]:
        return [rowwise(project, x) for project, x in zip(self.projections, views, strict=True)]

    def codes(self, views: tuple[Rows, ...]) -> Codes:
        z = self.projected(views)
        common = jnp.concatenate(z)
        for layer, norm in zip(self.common, self.norms, strict=True):
            common = rowwise(norm, gelu(rowwise(layer, common)))
        own = [jax.nn.sigmoid(rowwise(encoder, a)) for encoder, a in zip(self.private, z, strict=True)]
        pairs = {
            (m, l): (jax.nn.sigmoid(rowwise(encoder, z[m - 1])), jax.nn.sigmoid(rowwise(encoder, z[l - 1])))
            for (m, l), encoder in zip(self.named, self.pairs, strict=True)
        }
        return Codes(tuple(jnp.split(common, len(z))), pairs, tuple(own))

    def gate(self, codes: Codes) -> Float[Array, "n s"]:
        """The weights of the subspaces, which add up to 1."""
        together = jnp.concatenate(codes.by_subspace(), axis=1)
        return jax.nn.softmax(jnp.concatenate([gate(together) for gate in self.gates], axis=1), axis=1)

    def fused(self, views: tuple[Rows, ...]) -> Float[Array, "n _f"]:
        codes = self.codes(views)
        return jnp.einsum("ns,snr->nr", self.gate(codes), jnp.stack(codes.by_subspace()))

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        return self.head(self.fused(views))

    def parts(self, codes: Codes, views: tuple[Rows, ...]) -> dict[str, Float[Array, ""]]:
        grams, logs = [], []
        for m in range(1, len(views) + 1):
            common, *pairs, private = codes.of_view(m)
            grams += [common.T @ private, *(s.T @ private for s in pairs), *(s.T @ common for s in pairs)]
            kinds = (("common", common), *(("pair", s) for s in pairs), ("private", private))
            logs += [jnp.log(jax.nn.sigmoid(self.supervisors[KINDS.index(kind)](code)) + 1e-8).mean() for kind, code in kinds]
        return {
            "common": mean([mean_square(a, b) for a, b in combinations(codes.common, 2)], views[0]),
            "pair": mean([mean_square(a, b) for a, b in codes.pairs.values()], views[0]),
            "private": mean([hsic(a, b, 1.0, least_samples=4) for a, b in combinations(codes.private, 2)], views[0]),
            "orthogonality": jnp.sum(jnp.stack(grams) ** 2) / len(views),
            "supervisor": -jnp.sum(jnp.stack(logs)) / len(views),
        }


class Tsd(TsdNetwork):
    """Ours."""

    projections: tuple[eqx.nn.Linear, ...]
    common: Skipped
    pairs: tuple[Skipped, ...]
    private: tuple[Skipped | None, ...]
    """None where a view has no private code."""
    decoders: tuple[Skipped, ...]
    embeddings: tuple[eqx.nn.Linear, ...]
    """Of the codes, by subspace, as tokens of one width."""
    supervisor: Perceptron
    attention: TransformerLayer
    gate: eqx.nn.Linear
    head: Perceptron
    direct: eqx.nn.Linear
    """From codes to outputs, as the attention's norms take lengths away."""
    named: tuple[Pair, ...] = eqx.field(static=True)
    """The pairs that have codes."""

    def codes(self, views: tuple[Rows, ...]) -> Codes:
        z = [rowwise(project, x) for project, x in zip(self.projections, views, strict=True)]
        pairs = {}
        for (m, l), encoder in zip(self.named, self.pairs, strict=True):
            first, second = jnp.split(encoder(jnp.concatenate([z[m - 1], z[l - 1]])), 2)
            pairs[m, l] = (first, second)
        private = tuple(a[:, :0] if encoder is None else encoder(a) for encoder, a in zip(self.private, z, strict=True))
        return Codes(tuple(jnp.split(self.common(jnp.concatenate(z)), len(z))), pairs, private)

    def tokens(self, codes: Codes) -> Float[Array, "n s e"]:
        return jnp.stack([rowwise(e, code) for e, code in zip(self.embeddings, codes.by_subspace(), strict=True)], axis=1)

    def fused(self, views: tuple[Rows, ...]) -> Float[Array, "n _f"]:
        """All tokens after one layer of attention among them, each weighted by its gate, side by side."""
        tokens = self.attention(self.tokens(self.codes(views)))
        gates = jax.nn.softmax(tokenwise(self.gate, tokens), axis=1)
        return (gates * tokens).reshape(tokens.shape[0], -1)

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        return self.head(self.fused(views)) + rowwise(self.direct, jnp.concatenate(self.codes(views).by_subspace(), axis=1))

    def parts(self, codes: Codes, views: tuple[Rows, ...]) -> dict[str, Float[Array, ""]]:
        of_view = [codes.of_view(m) for m in range(1, len(views) + 1)]
        scaled = [_of_unit_distance(code) for code in codes.private if code.shape[1]]
        rebuilt = [decoder(jnp.concatenate(own, axis=1)) for decoder, own in zip(self.decoders, of_view, strict=True)]
        return {
            "common": mean([disagreement(a, b) for a, b in combinations(codes.common, 2)], views[0]),
            "pair": mean([disagreement(a, b) for a, b in codes.pairs.values()], views[0]),
            "private": mean([hsic(a, b, 1.0) for a, b in combinations(scaled, 2)], views[0]),
            "orthogonality": mean([overlap(own) for own in of_view], views[0]),
            "supervisor": self._supervision(codes),
            "reconstruction": mean([mean_square(x, back) for x, back in zip(views, rebuilt, strict=True)], views[0]),
        }

    def _supervision(self, codes: Codes) -> Float[Array, ""]:
        """The cross-entropy of the kinds of the tokens, those of one kind averaged."""
        tokens, first, last = self.tokens(codes), len(codes.common), len(codes.common) + len(codes.pairs)
        kinds = (tokens[:, :first], tokens[:, first:last], tokens[:, last:])
        losses = [
            -jax.nn.log_softmax(self.supervisor(kind.mean(axis=1)), axis=1)[:, label].mean()
            for label, kind in enumerate(kinds)
            if kind.shape[1]
        ]
        return jnp.mean(jnp.stack(losses))


def disagreement(a: Rows, b: Rows) -> Float[Array, ""]:
    """The mean over coordinates of E(a − b)²/(Var a + Var b): 0 where they are the same, and 1 where they are unrelated and have
    equal means, whatever the scale."""
    variance = a.var(axis=0) + b.var(axis=0) + TINY
    return jnp.mean(jnp.mean((a - b) ** 2, axis=0) / variance)


def overlap(codes: Sequence[Rows]) -> Float[Array, ""]:
    """The squared correlations of the coordinates of a view's codes, one by one, added up and divided by their number.

    `codes`: the common one first, the private one last. Those of two of the view's pairs are not compared, as in the paper.
    """
    together = jnp.concatenate(codes, axis=1)
    centred = together - together.mean(axis=0, keepdims=True)
    unit = centred / jnp.sqrt(jnp.sum(centred**2, axis=0, keepdims=True) + TINY * centred.shape[0])
    group = np.repeat(np.arange(len(codes)), [code.shape[1] for code in codes])
    of_pair = (group > 0) & (group < len(codes) - 1)
    compared = ~(of_pair[:, None] & of_pair[None, :]) | (group[:, None] == group[None, :])
    np.fill_diagonal(compared, False)
    return jnp.sum(jnp.where(compared, unit.T @ unit, 0) ** 2) / len(group)


def _of_unit_distance(a: Rows) -> Rows:
    """Scaled so that two samples have a mean squared distance of 1: the bandwidth of HSIC without sorting distances for their
    median."""
    return a / jnp.sqrt(2 * a.var(axis=0).sum() + TINY)


def widths(hierarchy: Hierarchy, config: TsdConfig) -> tuple[int, dict[Pair, int], tuple[int, ...]]:
    """(of the common codes, of the pairs that have one, of the private codes); see `fit`."""
    views, ranks = tuple(hierarchy.modalities), dict(hierarchy.ranks)
    common = ranks.get(views) or max(ranks.values())
    if config.variant == "port":
        return common, {(m, l): common for m, l in combinations(views, 2)}, (common,) * len(views)
    pairs = {(s[0], s[1]): rank for s, rank in hierarchy.ranks if len(s) == 2 and s != views}
    others = [(s, rank) for s, rank in hierarchy.ranks if len(s) != 2 and s != views]
    return common, pairs, tuple(sum(rank for s, rank in others if m in s) for m in views)


def build(key: Key[Array, ""], hierarchy: Hierarchy, config: TsdConfig) -> TsdNetwork:
    """A random network of the variant."""
    k_layers, k_weights = jr.split(key)
    return redrawn(k_weights, (_port if config.variant == "port" else _ours)(k_layers, hierarchy, config))


def _port(key: Key[Array, ""], hierarchy: Hierarchy, config: TsdConfig) -> TsdPort:
    dtype = jnp.dtype(config.training.dtype)
    r, pairs, _ = widths(hierarchy, config)
    linear = lambda fan_in: eqx.nn.Linear(fan_in, r, dtype=dtype, key=key)
    subspaces = 2 * hierarchy.n_modalities + len(pairs)
    return TsdPort(
        tuple(linear(d) for d in hierarchy.dims),
        (linear(r), linear(r)),
        (eqx.nn.LayerNorm(r, dtype=dtype), eqx.nn.LayerNorm(r, dtype=dtype)),
        tuple(linear(r) for _ in pairs),
        tuple(linear(r) for _ in hierarchy.dims),
        tuple(Perceptron(key, (subspaces * r, r, 1), dtype=dtype) for _ in range(subspaces)),
        tuple(Perceptron(key, (r, SUPERVISOR, 1), gelu, dtype) for _ in KINDS),
        Perceptron(key, (r, HEAD, config.n_outputs), dtype=dtype),
        named=tuple(pairs),
    )


def _ours(key: Key[Array, ""], hierarchy: Hierarchy, config: TsdConfig) -> Tsd:
    dtype = jnp.dtype(config.training.dtype)
    r, pairs, private = widths(hierarchy, config)
    entered, back = config.hidden[-1], config.hidden[::-1]
    linear = lambda fan_in, fan_out: eqx.nn.Linear(fan_in, fan_out, dtype=dtype, key=key)
    skipped = lambda *sizes: Skipped(key, sizes, dtype)
    held = [r + sum(rank for pair, rank in pairs.items() if m in pair) + private[m - 1] for m in hierarchy.modalities]
    codes = [width for width in (*(r for _ in hierarchy.dims), *pairs.values(), *private) if width]
    return Tsd(
        tuple(linear(d, entered) for d in hierarchy.dims),
        skipped(entered, *config.hidden, r),
        tuple(skipped(entered, entered, rank) for rank in pairs.values()),
        tuple(skipped(entered, entered, width) if width else None for width in private),
        tuple(skipped(width, *back, d) for width, d in zip(held, hierarchy.dims, strict=True)),
        tuple(linear(width, TOKEN) for width in codes),
        Perceptron(key, (TOKEN, SUPERVISOR, len(KINDS)), gelu, dtype),
        TransformerLayer(key, TOKEN, 4 * TOKEN, config.heads, dtype),
        linear(TOKEN, 1),
        Perceptron(key, (len(codes) * TOKEN, HEAD, config.n_outputs), dtype=dtype),
        linear(sum(codes), config.n_outputs),
        named=tuple(pairs),
    )


def loss(
    network: TsdNetwork, batch: Batch, key: Key[Array, ""], config: TsdConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of the parts; see `fit`."""
    parts = network.parts(network.codes(batch.views), batch.views)
    weighted = [getattr(config, name) * part for name, part in parts.items()]
    return jnp.sum(jnp.stack(weighted)), parts


def membership(hierarchy: Hierarchy, config: TsdConfig) -> np.ndarray:
    """All views hold the common columns, its members those of a pair, a view its private ones."""
    common, pairs, private = widths(hierarchy, config)
    views = np.array(hierarchy.modalities)
    holders = [(views > 0, common), *((np.isin(views, pair), rank) for pair, rank in pairs.items())]
    holders += [(views == m, width) for m, width in zip(views, private, strict=True)]
    return np.concatenate([np.repeat(held[:, None], width, axis=1) for held, width in holders], axis=1)


def check(hierarchy: Hierarchy, config: TsdConfig) -> None:
    """Raise `ValueError` for a single view, and not three in the port."""
    check_modalities(hierarchy, "common codes are those of several")
    if config.variant == "port":
        check_modalities(hierarchy, "the port has", 3)


METHOD = Method("tsd", TsdConfig, build, loss, membership, check=check)


def fit(
    views: Any, hierarchy: Hierarchy, config: TsdConfig = TsdConfig(), *, y: Any = None, key: Any, **options: Any
) -> NetworkFit:
    """TSD on rows. Scores: the mean of the common codes, the mean of the two codes of every pair, the private codes. Options as
    in `fit_network`.

    "port": z = W_m x of the width r of all codes, r the rank of the structure of all views, or the largest rank without it.
    Common codes by one network of two layers (linear, GELU, norm) for all views; those of pairs and private ones by a linear
    layer and a sigmoid. Its orthogonality is a sum of Gram matrices of codes that are positive, which cannot vanish: it is
    nearly all of the loss, and takes the codes to 0. Its supervisor has a head for each kind that sees this kind only, and is
    pleased with constants.

    "default" mends that. Widths are what the hierarchy says: the common one as above, those of pairs their ranks (pairs that it
    lacks have no code), the private one the ranks of the view's own structure and of those of 3 to M − 1 views, which TSD has
    no codes for. Of two views the pair is what is common. Encoders are linear plus a perceptron, without sigmoids. The loss is

        common + pair + private + orthogonality + supervisor + 3 reconstruction,

    disagreements relative to the codes' variances, so that shrinking them gains nothing; HSIC of private codes of unit
    distance; squared correlations for orthogonality, those within a code too; the cross-entropy of three kinds. The authors
    always train with labels, and without them nothing asks the codes to say anything of the views: the reconstruction of each
    view from its codes does. Correlations within a code are needed as agreeing codes are free to repeat one coordinate: without
    them linear regression recovers .4 of the shared factors from the common codes where it recovers .95 with them. The
    supervisor is met by the embeddings' constants and changes next to nothing. The head sees the subspaces' tokens after a
    layer of attention, gated, and the codes.
    """
    return fit_network(METHOD, views, hierarchy, config, y=y, key=key, **options)
