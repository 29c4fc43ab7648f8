"""Nonlinear hierarchical contrastive learning: encoders that are networks, any hierarchy (theory: Section 2, Remark 2).

One encoder a (modality, structure). The outputs of a modality are whitened together, within the batch, by the symmetric root,
which keeps the coordinates of its structures apart; the structures that two modalities share are contrasted; a decoder keeps what
is private from being lost.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from hcl_jax.contrastive import (
    cosine,
    gaussian_log_ratio,
    inner_product,
    linear_loss,
    negative_distance,
    ridge_penalty,
    similarities,
    softmax_loss,
)
from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators.likelihood import hcl_ml
from hcl_jax.fisher import noise_by_feature
from hcl_jax.linalg import inverse_root
from hcl_jax.networks.independence import third_moments
from hcl_jax.networks.modules import Branches, Perceptron, redrawn, uniform_weights
from hcl_jax.networks.network import Method, Network, NetworkConfig, NetworkFit, Rows, all_columns, fit_network
from hcl_jax.networks.training import Batch, TrainingConfig
from hcl_jax.scores import posterior_mean_scores
from hcl_jax.structure import Hierarchy
from hcl_jax.views import check_options

NEWTON_STEPS = 12


@dataclass(frozen=True)
class HclConfig(NetworkConfig):
    """Options of `fit`.

    loss: "pairwise" contrasts each pair of modalities, by a softmax in both directions over the structures that both hold;
    "softmax" all of them at once, Remark 2's; "linear" is eq. (2)'s.
    similarity: ℓ of two representations of a structure: "distance" −½‖h − h'‖², "gaussian" the log density ratio of correlated
    Gaussians, "inner" product, "cosine", or "bilinear" ⟨h, Bh'⟩ with a learned B for each structure.
    temperature: τ, of the softmax. correlation: of the "gaussian" similarity.
    structure_weights: w_s, one a structure of the hierarchy in its order; none given: 1.
    whiten: False takes the encoders' outputs as they are, for eq. (2) with its ridge penalty, and linear encoders.
    ridge, noise_variance: then, λ of (λ/4)‖FFᵀ‖² and σ² of (σ²/2)‖F‖², which takes the noise off the covariance.
    exclusivity: weight of the squared cross-covariances between unlike structures of two modalities.
    reconstruction: weight of the mean squared error of the decoders, in units of a coordinate.
    independence: weight of the third mixed moments between structures of a modality.
    hidden: width of the encoders' and decoders' hidden layers.
    encoder: "linear" leaves the hidden layers out.
    start: "linear" starts encoders at `hcl-ml` fitted to their inputs, "random" at random weights.
    """

    training: TrainingConfig = TrainingConfig(batch_size=512, learning_rate=3e-3)
    loss: Literal["pairwise", "softmax", "linear"] = "pairwise"
    similarity: Literal["distance", "gaussian", "inner", "cosine", "bilinear"] = "distance"
    temperature: float = 0.3
    correlation: float = 0.9
    structure_weights: tuple[float, ...] = ()
    whiten: bool = True
    ridge: float = 1.0
    noise_variance: float = 0.0
    exclusivity: float = 1.0
    reconstruction: float = 3.0
    independence: float = 0.5
    hidden: int = 64
    encoder: Literal["perceptron", "linear"] = "perceptron"
    start: Literal["linear", "random"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "loss": ("pairwise", "softmax", "linear"),
            "similarity": ("distance", "gaussian", "inner", "cosine", "bilinear"),
            "encoder": ("perceptron", "linear"),
            "start": ("linear", "random"),
        }
        weights = ("exclusivity", "reconstruction", "independence", "noise_variance")
        positive = ("temperature", "correlation", "ridge")
        check_options(self, choices=choices, positive=positive, least={"hidden": 1} | dict.fromkeys(weights, 0))
        if self.correlation >= 1:
            raise ValueError(f"correlation: is {self.correlation}; expected a number between 0 and 1")
        if not self.whiten and (self.encoder, self.loss) != ("linear", "linear"):
            raise ValueError(f"whiten: is False for {self.encoder} encoders and the {self.loss} loss; expected linear ones, both")


class Decoder(eqx.Module):
    """h → Bh + MLP(h)."""

    skip: Float[Array, "k p"]
    perceptron: Perceptron | None

    def __call__(self, h: Float[Array, "n k"]) -> Float[Array, "n p"]:
        linear = h @ self.skip
        return linear if self.perceptron is None else linear + self.perceptron(h)


class HclNetwork(Network):
    """Encoders and decoders by modality, and the linear maps that make scores of their outputs."""

    encoders: tuple[Branches, ...]
    decoders: tuple[Decoder, ...]
    head: Decoder
    means: tuple[Float[Array, " _k"], ...]
    roots: tuple[Float[Array, "_k _k"], ...]
    """Of every modality's outputs among the training rows: h = (raw − mean) root."""
    rotation: Float[Array, "K K"]
    """Block diagonal: each structure's coordinates to those in which its modalities correlate one by one."""
    reliability: Float[Array, "M K"]
    """Correlation of a modality's coordinate with the factor that the modalities of its structure share; 1 if it is alone."""
    bilinear: tuple[Float[Array, "_r _r"], ...]
    """B of each structure, for that similarity."""
    hierarchy: Hierarchy = eqx.field(static=True)

    def raw(self, views: tuple[Rows, ...]) -> list[Float[Array, "n _k"]]:
        """The encoders' outputs of every modality, structure by structure."""
        return [
            _flatten(encoder(view), self.hierarchy, m)
            for m, (encoder, view) in enumerate(zip(self.encoders, views, strict=True), start=1)
        ]

    def whitened(self, views: tuple[Rows, ...]) -> list[Float[Array, "n _k"]]:
        """The same, whitened as the training rows were."""
        return [(raw - mean[None, :]) @ root for raw, mean, root in zip(self.raw(views), self.means, self.roots, strict=True)]

    def scores(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n K"]:
        """E[z | h of the modalities that are present] where every coordinate is h_m = a_m z + √(1 − a_m²) e_m: z has variance 1,
        and a_m is its reliability; 0 where no modality of a structure is there."""
        return self._combined(self.rotated(views), present)

    def rotated(self, views: tuple[Rows, ...]) -> list[Float[Array, "n _k"]]:
        """The same, in the coordinates in which a structure's modalities correlate one by one."""
        return [h @ self.rotation[np.ix_(c, c)] for h, c in zip(self.whitened(views), self._columns(), strict=True)]

    def _columns(self) -> list[np.ndarray]:
        return [self.hierarchy.active_columns(m) for m in self.hierarchy.modalities]

    def _combined(self, rotated: list[Float[Array, "n _k"]], present: Bool[Array, "n M"] | None) -> Float[Array, "n K"]:
        n, dtype = rotated[0].shape[0], rotated[0].dtype
        alone = self.hierarchy.modality_mask.sum(axis=0) == 1
        total, precision = jnp.zeros((n, self.hierarchy.n_factors), dtype), jnp.ones((n, self.hierarchy.n_factors), dtype)
        for m, (h, columns) in enumerate(zip(rotated, self._columns(), strict=True)):
            a = jnp.where(alone[columns], 1, self.reliability[m, columns])
            weight = jnp.where(alone[columns], 1, a / jnp.maximum(1 - a**2, 1e-3))
            there = jnp.ones((n, 1), dtype) if present is None else present[:, m, None].astype(dtype)
            total = total.at[:, columns].add(there * weight[None, :] * h)
            precision = precision.at[:, columns].add(there * jnp.where(alone[columns], 0, a * weight)[None, :])
        return total / precision

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        """Of the encoders' outputs as they are: what whitens them is not known before the end of training."""
        return self.head(jnp.concatenate(self.raw(views), axis=1))


def _flatten(blocks: Float[Array, "B n r"], hierarchy: Hierarchy, m: int) -> Float[Array, "n k"]:
    """The outputs of a modality's encoders side by side, each as wide as its structure's rank."""
    ranks = [rank for s, rank in hierarchy.ranks if m in s]
    return jnp.concatenate([block[:, :rank] for block, rank in zip(blocks, ranks, strict=True)], axis=1)


def whiten(raw: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """(raw − mean) C^(−½), C their covariance: coordinates of variance 1, uncorrelated, and as near to the raw ones as can be."""
    centred = raw - raw.mean(axis=0, keepdims=True)
    return centred @ newton_inverse_root(centred.T @ centred / raw.shape[0])


def newton_inverse_root(C: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """C^(−½) by coupled Newton–Schulz iterations: products only, and derivatives that equal eigenvalues do not upset."""
    eye = jnp.eye(C.shape[0], dtype=C.dtype)
    C = C + 1e-5 * jnp.trace(C) / C.shape[0] * eye
    size = jnp.sqrt(jnp.sum(C**2))

    def step(carry, _):
        Y, Z = carry
        T = (3 * eye - Z @ Y) / 2
        return (Y @ T, T @ Z), None

    (_, Z), _ = jax.lax.scan(step, (C / size, eye), length=NEWTON_STEPS)
    return Z / jnp.sqrt(size)


def build(key: Key[Array, ""], hierarchy: Hierarchy, config: HclConfig) -> HclNetwork:
    """Random encoders, of variance 1 for inputs of variance 1."""
    dtype = jnp.dtype(config.training.dtype)
    k_encoders, k_decoders, k_skip = jr.split(key, 3)
    encoders, decoders, means, roots = [], [], [], []
    widths = [len(hierarchy.active_columns(m)) for m in hierarchy.modalities]
    for m, p in zip(hierarchy.modalities, hierarchy.dims, strict=True):
        ranks = [rank for s, rank in hierarchy.ranks if m in s]
        (skip,) = uniform_weights(jr.fold_in(k_skip, m), [((p, len(ranks), max(ranks)), p)], dtype)
        encoders.append(Branches(jr.fold_in(k_encoders, m), skip, config.hidden if config.encoder == "perceptron" else 0))
        decoders.append(_decoder(k_decoders, widths[m - 1], p, config))
        means.append(jnp.zeros(widths[m - 1], dtype))
        roots.append(jnp.eye(widths[m - 1], dtype=dtype))
    decoders.append(_decoder(k_decoders, sum(widths), config.n_outputs, config))
    if config.encoder == "perceptron":
        decoders = redrawn(k_decoders, decoders)
        ends = lambda held: [decoder.perceptron.layers[-1] for decoder in held]
        decoders = eqx.tree_at(ends, decoders, jax.tree.map(lambda leaf: 0.01 * leaf, ends(decoders)))
    *decoders, head = decoders
    rotation = jnp.eye(hierarchy.n_factors, dtype=dtype)
    reliability = jnp.asarray(hierarchy.modality_mask, dtype) / 2
    bilinear = tuple(jnp.eye(rank, dtype=dtype) for _, rank in hierarchy.ranks)
    return HclNetwork(
        tuple(encoders), tuple(decoders), head, tuple(means), tuple(roots), rotation, reliability, bilinear, hierarchy=hierarchy
    )


def _decoder(key: Key[Array, ""], k: int, p: int, config: HclConfig) -> Decoder:
    dtype = jnp.dtype(config.training.dtype)
    if config.encoder == "linear":
        return Decoder(jnp.zeros((k, p), dtype), None)
    return Decoder(jnp.zeros((k, p), dtype), Perceptron(key, (k, config.hidden, config.hidden, p), jax.nn.gelu, dtype))


def start(network: HclNetwork, rows: Batch, hierarchy: Hierarchy, config: HclConfig) -> HclNetwork:
    """Encoders at each modality's own posterior means under `hcl-ml`, whitened; decoders at least squares on these.

    The supervised head starts at a ridge regression on the encoders' outputs, so that a fit whose contrast only gets worse on
    held-out rows, which are what stops it, predicts no worse than its linear start.
    """
    if config.start == "random":
        return network
    Z = jnp.concatenate(rows.views, axis=1)
    if hierarchy.n_factors >= Z.shape[0] - 1:
        raise ValueError(
            f"views: have {Z.shape[0]} rows to train on; expected more than {hierarchy.n_factors + 1}, one more than there are "
            "factors, or start='random'"
        )
    estimate = hcl_ml(SampleCovariance.from_data(Z), hierarchy, noise="feature")
    loadings, psi = with_signs(estimate.loadings), noise_by_feature(estimate.noise_variance, hierarchy.n_features)
    encoders, decoders = [], []
    for m, view in zip(hierarchy.modalities, rows.views, strict=True):
        own, columns = hierarchy.rows(m), hierarchy.active_columns(m)
        score_map = posterior_mean_scores(loadings[own][:, columns], psi[own])
        centred = view - view.mean(axis=0, keepdims=True)
        scores = centred @ score_map
        root, _ = inverse_root(scores.T @ scores / scores.shape[0])
        score_map = score_map @ root
        ranks = [rank for s, rank in hierarchy.ranks if m in s]
        blocks = jnp.split(score_map, np.cumsum(ranks)[:-1], axis=1)
        padded = [jnp.pad(block, ((0, 0), (0, max(ranks) - block.shape[1]))) for block in blocks]
        encoders.append(eqx.tree_at(lambda e: e.skip, network.encoders[m - 1], jnp.stack(padded, axis=1)))
        back = (centred @ score_map).T @ centred / centred.shape[0]
        decoders.append(eqx.tree_at(lambda d: d.skip, network.decoders[m - 1], back))
    network = eqx.tree_at(lambda n: (n.encoders, n.decoders), network, (tuple(encoders), tuple(decoders)))
    if rows.y is None:
        return network
    skip = _head_start(jnp.concatenate(network.raw(rows.views), axis=1), rows.y, config)
    return eqx.tree_at(lambda n: n.head.skip, network, skip)


def _head_start(raw: Float[Array, "n k"], y: Array, config: HclConfig) -> Float[Array, "k o"]:
    """Ridge coefficients of standardised responses, or of logits: C times the regression of the indicators of C classes, as the
    probabilities are (1 + logit)/C to first order. The penalty k/n is the one for as much signal as noise."""
    n, k = raw.shape
    targets = y if config.n_classes is None else config.n_classes * jax.nn.one_hot(y, config.n_classes, dtype=raw.dtype)
    centred = raw - raw.mean(axis=0, keepdims=True)
    gram = centred.T @ centred / n
    return jnp.linalg.solve(gram + k / n * jnp.eye(k, dtype=raw.dtype), centred.T @ targets.astype(raw.dtype) / n)


def loss(network: HclNetwork, batch: Batch, key: Key[Array, ""], config: HclConfig) -> tuple[Float[Array, ""], dict]:
    """The contrast, and the penalties that keep structures apart and what is private."""
    hierarchy, raw = network.hierarchy, network.raw(batch.views)
    if not config.whiten:
        return _linear_loss(network, raw, config)
    whitened = [whiten(outputs) for outputs in raw]
    pairs = list(combinations(hierarchy.modalities, 2))
    if config.loss == "pairwise":
        contrast = _sum([_pair_contrast(network, whitened, m, other, config) for m, other in pairs], raw[0].dtype)
    else:
        contrast = _joint_contrast(network, whitened, config)
    exclusivity = _sum([_unlike_covariance(hierarchy, whitened, m, other) for m, other in pairs], raw[0].dtype)
    decoded = zip(batch.views, network.decoders, whitened, strict=True)
    error = _sum([h.shape[1] * jnp.mean((view - decoder(h)) ** 2) for view, decoder, h in decoded], raw[0].dtype)
    blocks = zip(hierarchy.modalities, whitened, strict=True)
    moments = _sum([third_moments(h, _groups(hierarchy, m)) for m, h in blocks], raw[0].dtype)
    parts = {"contrast": contrast, "exclusivity": exclusivity, "reconstruction": error, "independence": moments}
    weights = (1, config.exclusivity, config.reconstruction, config.independence)
    return _sum([weight * part for weight, part in zip(weights, parts.values(), strict=True)], raw[0].dtype), parts


def _sum(terms: list[Float[Array, ""]], dtype: Any) -> Float[Array, ""]:
    return jnp.stack(terms).sum() if terms else jnp.zeros((), dtype)


def _weights(hierarchy: Hierarchy, config: HclConfig) -> tuple[float, ...]:
    return config.structure_weights or (1.0,) * len(hierarchy.structures)


def _pair_contrast(
    network: HclNetwork, whitened: list[Float[Array, "n _k"]], m: int, other: int, config: HclConfig
) -> Float[Array, ""]:
    """Symmetric InfoNCE of two modalities, φ_ij = (1/τ) Σ_s w_s ℓ(h_{i,s}, h'_{j,s}) over the structures that both hold."""
    ours, theirs, _ = _shared_columns(network.hierarchy, m, other)
    if not len(ours):
        return jnp.zeros((), whitened[0].dtype)
    phi = _similarity(network, whitened[m - 1][:, ours], whitened[other - 1][:, theirs], {m, other}, config)
    return (softmax_loss(phi, config.temperature) + softmax_loss(phi.T, config.temperature)) / 2


def _similarity(
    network: HclNetwork, a: Float[Array, "n k"], b: Float[Array, "n k"], members: set[int], config: HclConfig
) -> Float[Array, "n n"]:
    """Σ_s w_s ℓ(a_s, b_s) over the structures that have these members. Those that add up over coordinates are one product."""
    held = [
        (s, rank, w, B)
        for (s, rank), w, B in zip(network.hierarchy.ranks, _weights(network.hierarchy, config), network.bilinear, strict=True)
        if members <= set(s)
    ]
    edges = np.cumsum([0, *(rank for _, rank, _, _ in held)])
    if config.similarity in ("cosine", "bilinear"):
        blocks = [slice(start, stop) for start, stop in zip(edges[:-1], edges[1:], strict=True)]
        own = [
            cosine(a[:, c], b[:, c]) if config.similarity == "cosine" else inner_product(a[:, c] @ B, b[:, c])
            for c, (_, _, _, B) in zip(blocks, held, strict=True)
        ]
        return jnp.stack([w * phi for phi, (_, _, w, _) in zip(own, held, strict=True)]).sum(axis=0)
    root = jnp.asarray(np.sqrt(np.repeat([w for _, _, w, _ in held], [rank for _, rank, _, _ in held])), a.dtype)
    a, b = a * root[None, :], b * root[None, :]
    if config.similarity == "gaussian":
        return gaussian_log_ratio(a, b, config.correlation)
    return negative_distance(a, b) if config.similarity == "distance" else inner_product(a, b)


def _joint_contrast(network: HclNetwork, whitened: list[Float[Array, "n _k"]], config: HclConfig) -> Float[Array, ""]:
    """Remark 2's softmax, or eq. (2)'s linear loss, of φ_ij = Σ_s w_s Σ_{m,m'∈s} ℓ(h_{i,s}^(m), h_{j,s}^(m'))."""
    hierarchy = network.hierarchy
    phi = jnp.zeros((whitened[0].shape[0],) * 2, whitened[0].dtype)
    for m in hierarchy.modalities:
        for other in hierarchy.modalities:
            ours, theirs, _ = _shared_columns(hierarchy, m, other)
            if len(ours):
                phi = phi + _similarity(network, whitened[m - 1][:, ours], whitened[other - 1][:, theirs], {m, other}, config)
    return linear_loss(phi) if config.loss == "linear" else softmax_loss(phi, config.temperature)


def _linear_loss(network: HclNetwork, raw: list[Float[Array, "n _k"]], config: HclConfig) -> tuple[Float[Array, ""], dict]:
    """Eq. (2) of linear encoders F, whose first two terms are −½tr(FᵀSF); with (σ²/2)‖F‖² beside its penalty the minimiser is the
    masked FFᵀ nearest to S − σ²I."""
    hierarchy, F = network.hierarchy, linear_map(network)
    placed = [
        jnp.zeros((h.shape[0], hierarchy.n_factors), h.dtype).at[:, hierarchy.active_columns(m)].set(h)
        for m, h in zip(hierarchy.modalities, raw, strict=True)
    ]
    contrast = linear_loss(similarities(jnp.stack(placed), hierarchy))
    penalty = ridge_penalty(F, config.ridge) + config.noise_variance / 2 * jnp.sum(F**2)
    return contrast + penalty, {"contrast": contrast, "penalty": penalty}


def linear_map(network: HclNetwork) -> Float[Array, "d K"]:
    """F (d × K, with the hierarchy's zeros) of linear encoders."""
    hierarchy, dtype = network.hierarchy, network.roots[0].dtype
    F = jnp.zeros((hierarchy.n_features, hierarchy.n_factors), dtype)
    for m, encoder in zip(hierarchy.modalities, network.encoders, strict=True):
        own = _flatten(jnp.swapaxes(encoder.skip, 0, 1), hierarchy, m)
        F = F.at[hierarchy.rows(m), hierarchy.active_columns(m)].set(own)
    return F


def _unlike_covariance(hierarchy: Hierarchy, whitened: list[Float[Array, "n _k"]], m: int, other: int) -> Float[Array, ""]:
    """Σ of squared covariances between coordinates of unlike structures of two modalities."""
    a, b = whitened[m - 1], whitened[other - 1]
    unlike = _shared_columns(hierarchy, m, other)[2]
    return jnp.sum(jnp.where(unlike, (a.T @ b / a.shape[0]) ** 2, 0))


def _shared_columns(hierarchy: Hierarchy, m: int, other: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(where the structures that both hold stand among the columns of each, which pairs of columns are of unlike structures)."""
    ours, theirs = hierarchy.active_columns(m), hierarchy.active_columns(other)
    both = np.intersect1d(ours, theirs)
    of_column = np.repeat(np.arange(len(hierarchy.structures)), [rank for _, rank in hierarchy.ranks])
    unlike = of_column[ours][:, None] != of_column[theirs][None, :]
    return np.searchsorted(ours, both), np.searchsorted(theirs, both), unlike


def _groups(hierarchy: Hierarchy, m: int) -> np.ndarray:
    """The structure of each of a modality's coordinates, as an integer."""
    of_column = np.repeat(np.arange(len(hierarchy.structures)), [rank for _, rank in hierarchy.ranks])
    return of_column[hierarchy.active_columns(m)]


def finish(network: HclNetwork, rows: Batch, hierarchy: Hierarchy, config: HclConfig) -> HclNetwork:
    """Whitening, rotations and reliabilities, from all training rows."""
    raw = network.raw(rows.views)
    means = tuple(r.mean(axis=0) for r in raw)
    roots = tuple(
        inverse_root((r - mean[None, :]).T @ (r - mean[None, :]) / r.shape[0])[0] for r, mean in zip(raw, means, strict=True)
    )
    whitened = [(r - mean[None, :]) @ root for r, mean, root in zip(raw, means, roots, strict=True)]
    rotation, reliability = jnp.eye(hierarchy.n_factors, dtype=raw[0].dtype), jnp.zeros_like(network.reliability)
    for s in hierarchy.structures:
        columns = hierarchy.columns(s)
        blocks = [whitened[m - 1][:, np.isin(hierarchy.active_columns(m), np.arange(columns.start, columns.stop))] for m in s]
        Q, a = shared_axes(blocks)
        rotation = rotation.at[columns, columns].set(Q)
        reliability = reliability.at[np.array(s) - 1, columns].set(a)
    return eqx.tree_at(lambda n: (n.means, n.roots, n.rotation, n.reliability), network, (means, roots, rotation, reliability))


def with_signs(columns: Float[Array, "p r"]) -> Float[Array, "p r"]:
    """Each column with the sign that makes its largest entry positive: eigenvectors come with either."""
    largest = jnp.take_along_axis(columns, jnp.argmax(jnp.abs(columns), axis=0)[None, :], axis=0)
    return columns * jnp.where(largest < 0, -1, 1).astype(columns.dtype)


def shared_axes(blocks: list[Float[Array, "n r"]]) -> tuple[Float[Array, "r r"], Float[Array, "m r"]]:
    """(Q, a): rotated by Q, coordinate k of block m is a_mk z_k + noise, with one z for all blocks.

    Q are the eigenvectors of the mean symmetrised cross-covariance of two blocks; a_m a_l, the nearest to the correlations of the
    rotated coordinates off the diagonal (unweighted least squares factor analysis with one factor), between 0 and 0.999.
    """
    n, r = blocks[0].shape
    if len(blocks) == 1:
        return jnp.eye(r, dtype=blocks[0].dtype), jnp.ones((1, r), blocks[0].dtype)
    cross = jnp.stack([a.T @ b / n for a, b in combinations(blocks, 2)]).mean(axis=0)
    Q = with_signs(jnp.linalg.eigh((cross + cross.T) / 2)[1])
    rotated = jnp.stack([block @ Q for block in blocks])
    R = jnp.einsum("mnr,lnr->rml", rotated, rotated) / n
    off = R * (1 - jnp.eye(len(blocks), dtype=R.dtype))[None]
    a = jnp.sqrt(jnp.clip(off.sum(axis=(1, 2)) / (len(blocks) * (len(blocks) - 1)), 1e-6, 1))[:, None] * jnp.ones_like(R[:, 0])

    def step(a, _):
        others = jnp.sum(a**2, axis=1, keepdims=True) - a**2
        new = jnp.einsum("rml,rl->rm", off, a) / jnp.maximum(others, 1e-6)
        return jnp.clip((a + new) / 2, 0, 0.999), None

    a, _ = jax.lax.scan(step, a, length=30)
    return Q, a.T


def check(hierarchy: Hierarchy, config: HclConfig) -> None:
    """Raise `ValueError` unless there is one positive weight a structure, or none is given."""
    weights, n = config.structure_weights, len(hierarchy.structures)
    if weights and (len(weights) != n or not all(w > 0 for w in weights)):
        raise ValueError(f"structure_weights: are {weights}; expected {n} positive numbers, one a structure, or none")


METHOD = Method("hcl", HclConfig, build, loss, all_columns, start, finish, check)


def fit(
    views: Any, hierarchy: Hierarchy, config: HclConfig = HclConfig(), *, y: Any = None, key: Any, **options: Any
) -> NetworkFit:
    """Nonlinear HCL on rows; options as in `fit_network`."""
    return fit_network(METHOD, views, hierarchy, config, y=y, key=key, **options)
