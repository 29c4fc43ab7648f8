"""MISA: codes that views share and codes of their own, told apart by moments and correlations (Hazarika et al. 2020).

Shared codes of all views are to have one distribution (central moment discrepancy), own codes to be uncorrelated with the shared
ones and with those of other views (difference loss), and both together to rebuild the view. A transformer over all 2M codes makes
the input of the supervised head.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from hcl_jax.linalg import inverse_root
from hcl_jax.networks.attention import TransformerLayer, check_heads
from hcl_jax.networks.independence import cmd, difference, unit
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
from hcl_jax.networks.training import Batch, TrainingConfig
from hcl_jax.structure import Hierarchy
from hcl_jax.views import check_options

TOKEN = 32
"""Width to which the default variant brings codes of unlike widths, to make tokens of them."""
OFFICIAL_FEEDFORWARD = 2048
"""The width of the transformer's hidden layer in the authors' code."""


class Preset(NamedTuple):
    """What tells the variants apart; see the options of the same names."""

    inputs: Literal["normal", "standardised"]
    similarity: float
    difference: float
    reconstruction: float


PRESETS = {
    "default": Preset("normal", 1.0, 0.3, 1.0),
    "port": Preset("standardised", 1.0, 1.0, 1.0),
    "official": Preset("standardised", 1.0, 0.3, 1.0),
}


@dataclass(frozen=True)
class MisaConfig(NetworkConfig):
    """Options of `fit`.

    training: batches as large as HCL's unless given, as the discrepancy of small ones is mostly chance.
    variant: "official" has the authors' networks and losses, "port" those of the released HCL code, "default" ours; see `fit`.
    inputs: as of every network; None: "normal" for the default variant, "standardised" for the others.
    similarity, difference, reconstruction: weights of the three losses; None: 1, 0.3 and 1, or 1, 1 and 1 for the port. They are
    filled in when the configuration is made.
    shared_rank: width of the shared codes. None: the rank of the structure of all views, or the largest rank without it.
    private_ranks: widths of the views' own codes. None: the ranks of all other structures that hold the view, added up; in the
    other variants, where codes are added to each other, always the shared rank.
    hidden: widths of the hidden layers of the encoders, and in reverse of the decoders; the official variant has none.
    heads: of the transformer. None: 2 where these divide the width of its tokens, else 1.
    """

    presets: ClassVar = PRESETS
    training: TrainingConfig = TrainingConfig(batch_size=1024, learning_rate=3e-3)
    variant: Literal["default", "port", "official"] = "default"
    inputs: Literal["normal", "standardised"] | None = None  # type: ignore[assignment]
    similarity: float | None = None
    difference: float | None = None
    reconstruction: float | None = None
    shared_rank: int | None = None
    private_ranks: tuple[int, ...] | None = None
    hidden: tuple[int, ...] = (256, 128)
    heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = dict.fromkeys(("similarity", "difference", "reconstruction"), 0)
        check_options(self, choices={}, least={"shared_rank": 1, "heads": 1} | weights)
        check_widths(self, "hidden")
        if self.private_ranks is not None and self.variant != "default":
            raise ValueError(
                f"private_ranks: are {self.private_ranks}; expected None, as codes of {self.variant!r} have one width"
            )
        if min(self.private_ranks or (0,)) < 0:
            raise ValueError(f"private_ranks: are {self.private_ranks}; expected non-negative integers")


class Codes(NamedTuple):
    """What the views have in common, what is each view's own, what is to be rebuilt, and what is rebuilt: a view each."""

    shared: tuple[Rows, ...]
    private: tuple[Rows, ...]
    targets: tuple[Rows, ...]
    rebuilt: tuple[Rows, ...]


class MisaNetwork(Network):
    """What the variants have in common."""

    fusion: eqx.AbstractVar[TransformerLayer]
    head: eqx.AbstractVar[Perceptron]

    @abstractmethod
    def codes(self, views: tuple[Rows, ...]) -> Codes:
        """Codes of standardised views."""

    @abstractmethod
    def tokens(self, codes: Codes) -> Float[Array, "n t e"]:
        """Of the transformer, before its layer."""

    def fused(self, views: tuple[Rows, ...]) -> Float[Array, "n te"]:
        """The transformer's tokens side by side."""
        return _flat(self.fusion(self.tokens(self.codes(views))))

    def aligned(self, codes: Codes) -> Codes:
        """Codes as scores have them: the shared ones in coordinates that are one for all views."""
        return codes

    def scores(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n R"]:
        """The mean of the shared codes of the views that are present, and each view's own code, 0 where it is not."""
        codes = self.aligned(self.codes(views))
        if present is None:
            present = jnp.ones((views[0].shape[0], len(views)), bool)
        held = [jnp.where(present[:, m, None], c, 0) for m, c in enumerate(codes.shared)]
        count = jnp.maximum(present.sum(axis=1, keepdims=True), 1).astype(held[0].dtype)
        private = [jnp.where(present[:, m, None], p, 0) for m, p in enumerate(codes.private)]
        return jnp.concatenate([sum(held[1:], held[0]) / count, *private], axis=1)

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        return self.head(self.fused(views))


def _flat(tokens: Float[Array, "n t e"]) -> Float[Array, "n te"]:
    return tokens.reshape(tokens.shape[0], -1)


class MisaPort(MisaNetwork):
    """The port of the released HCL code: perceptrons without a bound, and shared codes by one perceptron behind linear maps."""

    projections: tuple[eqx.nn.Linear, ...]
    common: Perceptron
    own: tuple[Perceptron, ...]
    decoders: tuple[Perceptron, ...]
    fusion: TransformerLayer
    head: Perceptron

    def codes(self, views: tuple[Rows, ...]) -> Codes:
        shared = tuple(self.common(rowwise(project, x)) for project, x in zip(self.projections, views, strict=True))
        private = tuple(encoder(x) for encoder, x in zip(self.own, views, strict=True))
        rebuilt = tuple(decoder(c + p) for decoder, c, p in zip(self.decoders, shared, private, strict=True))
        return Codes(shared, private, views, rebuilt)

    def tokens(self, codes: Codes) -> Float[Array, "n t e"]:
        return jnp.stack([*codes.shared, *codes.private], axis=1)


class MisaOfficial(MisaNetwork):
    """The authors' networks on vectors: u = LN(relu(Wx)), one sigmoid layer for every code, and u rebuilt linearly."""

    projections: tuple[eqx.nn.Linear, ...]
    norms: tuple[eqx.nn.LayerNorm, ...]
    common: eqx.nn.Linear
    own: tuple[eqx.nn.Linear, ...]
    decoders: tuple[eqx.nn.Linear, ...]
    fusion: TransformerLayer
    head: Perceptron

    def codes(self, views: tuple[Rows, ...]) -> Codes:
        projected = tuple(
            rowwise(norm, jax.nn.relu(rowwise(project, x)))
            for norm, project, x in zip(self.norms, self.projections, views, strict=True)
        )
        shared = tuple(jax.nn.sigmoid(rowwise(self.common, u)) for u in projected)
        private = tuple(jax.nn.sigmoid(rowwise(encoder, u)) for encoder, u in zip(self.own, projected, strict=True))
        rebuilt = tuple(rowwise(decoder, p + c) for decoder, c, p in zip(self.decoders, shared, private, strict=True))
        return Codes(shared, private, projected, rebuilt)

    def tokens(self, codes: Codes) -> Float[Array, "n t e"]:
        return jnp.stack([*codes.private, *codes.shared], axis=1)


class Misa(MisaNetwork):
    """Ours: encoders and decoders that start linear, and shared codes between 0 and 1."""

    projections: tuple[eqx.nn.Linear, ...]
    common: Skipped
    own: tuple[Skipped | None, ...]
    """None where a view has no code of its own."""
    decoders: tuple[Skipped, ...]
    embeddings: tuple[eqx.nn.Linear, ...]
    """Of the codes, as tokens of one width."""
    fusion: TransformerLayer
    head: Perceptron
    direct: eqx.nn.Linear
    """From codes to outputs, as the transformer's norms take lengths away."""
    shared_means: Float[Array, "M r"]
    private_means: tuple[Float[Array, " _p"], ...]
    """Of the training rows, so that the 0 of an absent view's own code is its mean."""
    rotations: Float[Array, "M r r"]
    """Of the shared codes, to where those of all views agree best among the training rows."""

    def codes(self, views: tuple[Rows, ...]) -> Codes:
        shared = tuple(
            jax.nn.sigmoid(self.common(rowwise(project, x))) for project, x in zip(self.projections, views, strict=True)
        )
        private = tuple(x[:, :0] if encoder is None else encoder(x) for encoder, x in zip(self.own, views, strict=True))
        both = [jnp.concatenate(pair, axis=1) for pair in zip(shared, private, strict=True)]
        rebuilt = tuple(decoder(h) for decoder, h in zip(self.decoders, both, strict=True))
        return Codes(shared, private, views, rebuilt)

    def tokens(self, codes: Codes) -> Float[Array, "n t e"]:
        held = [code for code in (*codes.shared, *codes.private) if code.shape[1]]
        return jnp.stack([rowwise(embed, code) for embed, code in zip(self.embeddings, held, strict=True)], axis=1)

    def aligned(self, codes: Codes) -> Codes:
        shared = tuple((c - self.shared_means[m][None, :]) @ self.rotations[m] for m, c in enumerate(codes.shared))
        private = tuple(p - mean[None, :] for p, mean in zip(codes.private, self.private_means, strict=True))
        return codes._replace(shared=shared, private=private)

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        codes = self.codes(views)
        direct = rowwise(self.direct, jnp.concatenate([*codes.shared, *codes.private], axis=1))
        return direct + self.head(_flat(self.fusion(self.tokens(codes))))


def widths(hierarchy: Hierarchy, config: MisaConfig) -> tuple[int, tuple[int, ...]]:
    """(of the shared codes, of each view's own)."""
    full = tuple(hierarchy.modalities)
    ranks = dict(hierarchy.ranks)
    shared = config.shared_rank or ranks.get(full) or max(ranks.values())
    if config.variant != "default":
        return shared, (shared,) * hierarchy.n_modalities
    held = tuple(sum(r for s, r in hierarchy.ranks if m in s and s != full) for m in full)
    return shared, held if config.private_ranks is None else config.private_ranks


def build(key: Key[Array, ""], hierarchy: Hierarchy, config: MisaConfig) -> MisaNetwork:
    """Random networks of the variant."""
    dtype = jnp.dtype(config.training.dtype)
    r, own = widths(hierarchy, config)
    M, dims = hierarchy.n_modalities, hierarchy.dims
    linear = lambda fan_in, fan_out: eqx.nn.Linear(fan_in, fan_out, dtype=dtype, key=key)  # drawn anew below
    perceptron = lambda *widths: Perceptron(key, widths, dtype=dtype)
    skipped = lambda *widths: Skipped(key, widths, dtype)
    fusion = lambda width, hidden: TransformerLayer(key, width, hidden, _heads(config, width), dtype)
    network: MisaNetwork
    if config.variant == "port":
        network = MisaPort(
            projections=tuple(linear(d, r) for d in dims),
            common=perceptron(r, *config.hidden, r),
            own=tuple(perceptron(d, *config.hidden, r) for d in dims),
            decoders=tuple(perceptron(r, r, d) for d in dims),
            fusion=fusion(r, 4 * r),
            head=perceptron(2 * M * r, HEAD, config.n_outputs),
        )
    elif config.variant == "official":
        network = MisaOfficial(
            projections=tuple(linear(d, r) for d in dims),
            norms=tuple(eqx.nn.LayerNorm(r, dtype=dtype) for _ in dims),
            common=linear(r, r),
            own=tuple(linear(r, r) for _ in dims),
            decoders=tuple(linear(r, r) for _ in dims),
            fusion=fusion(r, OFFICIAL_FEEDFORWARD),
            head=perceptron(2 * M * r, M * r, config.n_outputs),
        )
    else:
        codes = [width for width in (*[r] * M, *own) if width]
        entered = max((*config.hidden[-1:], r))
        network = Misa(
            projections=tuple(linear(d, entered) for d in dims),
            common=skipped(entered, *config.hidden, r),
            own=tuple(skipped(d, *config.hidden, p) if p else None for d, p in zip(dims, own, strict=True)),
            decoders=tuple(skipped(r + p, *config.hidden[::-1], d) for d, p in zip(dims, own, strict=True)),
            embeddings=tuple(linear(width, TOKEN) for width in codes),
            fusion=fusion(TOKEN, 4 * TOKEN),
            head=perceptron(len(codes) * TOKEN, HEAD, config.n_outputs),
            direct=linear(sum(codes), config.n_outputs),
            shared_means=jnp.zeros((M, r), dtype),
            private_means=tuple(jnp.zeros(p, dtype) for p in own),
            rotations=jnp.tile(jnp.eye(r, dtype=dtype), (M, 1, 1)),
        )
    return redrawn(key, network)


def _heads(config: MisaConfig, width: int) -> int:
    return (2 if width % 2 == 0 else 1) if config.heads is None else config.heads


def _unit_columns(a: Float[Array, "n r"]) -> Float[Array, "n r"]:
    return unit(a.T).T


DIFFERENCES: dict[str, Callable[[Array, Array], Float[Array, ""]]] = {
    "default": partial(difference, normalise=_unit_columns),
    "port": partial(difference, normalise=partial(unit, floor=1e-8), reduce=jnp.sum),
    "official": partial(difference, normalise=partial(unit, outside=1e-6, held=True)),
}
"""Of two codes, by variant."""


def loss(
    network: MisaNetwork, batch: Batch, key: Key[Array, ""], config: MisaConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of three parts; see `fit`."""
    codes = network.codes(batch.views)
    unlike = [*zip(codes.shared, codes.private, strict=True), *combinations(codes.private, 2)]
    parts = {
        "similarity": _mean([cmd(a, b) for a, b in combinations(codes.shared, 2)]),
        "difference": sum(
            (DIFFERENCES[config.variant](a, b) for a, b in unlike if a.shape[1] and b.shape[1]),
            jnp.zeros((), codes.shared[0].dtype),
        ),
        "reconstruction": _mean([jnp.mean((a - b) ** 2) for a, b in zip(codes.targets, codes.rebuilt, strict=True)]),
    }
    return sum(getattr(config, name) * part for name, part in parts.items()), parts


def _mean(values: list[Float[Array, ""]]) -> Float[Array, ""]:
    return sum(values[1:], values[0]) / len(values)


def finish(network: MisaNetwork, rows: Batch, hierarchy: Hierarchy, config: MisaConfig) -> MisaNetwork:
    """The default variant's means, and where its shared codes agree best among the training rows.

    These are whitened by view, (c_m − mean) C_m^(−½), and the r leading eigenvectors of the covariance of all of them side by
    side, Mr × Mr, are cut into views: generalised canonical correlation (Kettenring 1971, MAXVAR).
    """
    if not isinstance(network, Misa):
        return network
    codes = network.codes(rows.views)
    shared = jnp.stack(codes.shared)
    (M, n, r), means = shared.shape, shared.mean(axis=1)
    centred = shared - means[:, None, :]
    roots = jnp.stack([inverse_root(c.T @ c / n)[0] for c in centred])
    white = jnp.einsum("mnr,mrs->nms", centred, roots).reshape(n, M * r)
    leading = jnp.linalg.eigh(white.T @ white / n)[1][:, ::-1][:, :r].reshape(M, r, r)
    rotations = math.sqrt(M) * roots @ leading
    set_here = (means, tuple(p.mean(axis=0) for p in codes.private), rotations)
    return eqx.tree_at(lambda net: (net.shared_means, net.private_means, net.rotations), network, set_here)


def membership(hierarchy: Hierarchy, config: MisaConfig) -> np.ndarray:
    """The shared columns are all views', the others a view's each."""
    shared, own = widths(hierarchy, config)
    alone = np.repeat(np.eye(len(own), dtype=bool), own, axis=1)
    return np.concatenate([np.ones((len(own), shared), bool), alone], axis=1)


def check(hierarchy: Hierarchy, config: MisaConfig) -> None:
    """Raise `ValueError` for a single view, private ranks that are not one a view, and heads that do not divide the tokens."""
    check_modalities(hierarchy, "shared codes are those of several")
    M = hierarchy.n_modalities
    if config.private_ranks is not None and len(config.private_ranks) != M:
        raise ValueError(f"private_ranks: are {config.private_ranks}; expected {M}, one a view")
    width = TOKEN if config.variant == "default" else widths(hierarchy, config)[0]
    check_heads(_heads(config, width), width)


METHOD = Method("misa", MisaConfig, build, loss, membership, finish=finish, check=check)


def fit(
    views: Any, hierarchy: Hierarchy, config: MisaConfig = MisaConfig(), *, y: Any = None, key: Any, **options: Any
) -> NetworkFit:
    """The least of similarity × mean over pairs of views of CMD₅(c_m, c_l) + difference × (Σ_m D(p_m, c_m) + Σ_{m<l} D(p_m, p_l))
    + reconstruction × mean over views of the mean squared error of rebuilding them.

    Of every view, c_m is what it shares and p_m what is its own; D is `difference`. Scores are [mean of c_m, p_1, …, p_M]; of a
    row that lacks views, the mean over those it has, and 0 for the others' own codes. By default a view's two codes are together
    as wide as all structures that hold it, so that MISA is told as much as HCL. Options as in `fit_network`.

    - "official": u_m = LN(relu(W_m x_m)), codes are a sigmoid layer of u_m, and p_m + c_m rebuild u_m by a linear map, which a
      u_m with little of x_m makes easy. D is the mean of the squares of ãᵀb̃: columns centred, then rows scaled to length 1, the
      lengths held constant in the derivative.
    - "port": perceptrons without a bound, whose fifth moments explode, rebuild x_m. D is the sum of those squares, a hundred
      times the other losses at the start, and its derivative includes the lengths.
    - "default": x_m is rebuilt, which does not get easier. Shared codes lie between 0 and 1, and so do their moments. D is the
      mean squared correlation: columns are scaled instead of rows, so that D is at most 1 for any batch and width (the others
      grow as n²/r², and rows of one coordinate would be scaled to their signs, which have no derivative). Encoders and decoders
      have a linear path besides their hidden layers; so has the head, and codes become tokens of one width by linear maps.

    The discrepancy compares distributions, not samples: codes of two views may be each other's rotation or mirror image, and
    cancel in their mean. The default variant aligns them at the end, and centres all codes (`finish`); the others are left alone.
    """
    return fit_network(METHOD, views, hierarchy, config, y=y, key=key, **options)
