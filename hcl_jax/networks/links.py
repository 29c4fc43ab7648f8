"""Methods for features that are seen through links, x = g(Λz + ε): links that act by feature, that are known, that are learned.

All end in the linear model: scores are its posterior means, of what undoes the links.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators import ESTIMATORS
from hcl_jax.estimators.likelihood import hcl_ml
from hcl_jax.fisher import NOISE, noise_by_feature
from hcl_jax.fitted import Fitted, LinearFit, check_views, fit_estimator, linear_from_state, read_rows
from hcl_jax.linalg import spd_inverse
from hcl_jax.links import Link, check_links
from hcl_jax.marginals import NormalScores
from hcl_jax.networks.network import Method, Network, NetworkConfig, NetworkFit, Rows, all_columns, fit_network, split_views
from hcl_jax.networks.training import Batch, TrainingConfig
from hcl_jax.scores import posterior_mean_scores
from hcl_jax.structure import Hierarchy, as_hierarchy
from hcl_jax.views import check_options

OWN_NOISE = ("hcl-ml", "hcl-vb")
"""Estimators that know other noise than one variance for all features."""
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class CopulaConfig:
    """What is fitted once the links are undone.

    estimator: a name in `ESTIMATORS`. noise: which features share a noise variance, of `hcl-ml` and `hcl-vb`; the others know one
    for all features. Features that are brought to variance 1, as these are, differ in noise even where it was equal before.
    """

    estimator: str = "hcl-ml"
    noise: Literal["shared", "view", "feature"] = "feature"

    def __post_init__(self) -> None:
        check_options(self, choices={"estimator": tuple(ESTIMATORS), "noise": NOISE})

    @property
    def options(self) -> dict[str, Any]:
        """Those of the estimator."""
        return {"noise": self.noise} if self.estimator in OWN_NOISE else {}


class KnownLinks(eqx.Module):
    """x → g⁻¹(x), of all views side by side."""

    links: tuple[Link, ...]
    dims: tuple[int, ...] = eqx.field(static=True)

    def __call__(self, X: Float[Array, "n d"]) -> Float[Array, "n d"]:
        views = zip(self.links, split_views(X, self.dims), strict=True)
        return jnp.concatenate([link.inverse(view) for link, view in views], axis=1)


class LinkedFit(Fitted):
    """A linear fit to what undoes the links of the rows: normal scores by feature, or the inverses of known links."""

    undo: NormalScores | KnownLinks
    linear: LinearFit
    membership: Bool[Array, "M R"]
    status: Int[Array, ""]
    steps: Int[Array, ""]
    dims: tuple[int, ...] = eqx.field(static=True)

    def transform(self, views: Any, presence: Any = None) -> Float[Array, "n R"]:
        X, present = read_rows(views, self.dims, presence)
        U = self.undo(X)
        if present is not None:
            U = jnp.where(present[:, np.repeat(np.arange(len(self.dims)), self.dims)], U, 0)
        return self.linear.transform(split_views(U, self.dims), present)

    def predict(self, views: Any) -> Float[Array, " n"]:
        return self.linear.predict(views)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(description, arrays): all that `linked_from_state` needs for the same bits. Raises `ValueError` for known links, which
        are functions."""
        if not isinstance(self.undo, NormalScores):
            raise ValueError("fitted: has links that are given as functions, which no file holds; expected normal scores")
        description, arrays = self.linear.state()
        undo = {f"undo.{item.name}": np.asarray(getattr(self.undo, item.name)) for item in dataclasses.fields(self.undo)}
        return description | {"kind": "linked"}, arrays | undo


def linked_from_state(description: Mapping[str, Any], arrays: Mapping[str, Any]) -> LinkedFit:
    """The fit of which this is the `state`. Raises `TypeError` for what is missing."""
    undo = {name.removeprefix("undo."): jnp.asarray(array) for name, array in arrays.items() if name.startswith("undo.")}
    linear = linear_from_state(description, {name: array for name, array in arrays.items() if not name.startswith("undo.")})
    return _linked(NormalScores(**undo), linear)


def _fit_undone(undo: NormalScores | KnownLinks, X: Float[Array, "n d"], hierarchy: Hierarchy, config: CopulaConfig) -> LinkedFit:
    return _linked(undo, fit_estimator(split_views(undo(X), hierarchy.dims), hierarchy, config.estimator, **config.options))


def _linked(undo: NormalScores | KnownLinks, linear: LinearFit) -> LinkedFit:
    return LinkedFit(
        undo=undo, linear=linear, membership=linear.membership, status=linear.status, steps=linear.steps, dims=linear.dims
    )


def fit_copula(
    views: Any, hierarchy: Hierarchy, config: CopulaConfig = CopulaConfig(), *, y: Any = None, key: Any = None
) -> LinkedFit:
    """The linear model of normal scores by feature: a Gaussian copula whose correlation matrix has the hierarchy's structure.

    What acts feature by feature and strictly increases is undone without being known (Liu, Lafferty and Wasserman, 2009; theory:
    Section 7). Loadings are on the scale of correlations. Neither the response nor a key is used. Raises `ValueError` for what
    `check_views` refuses.
    """
    X = check_views(views, as_hierarchy(hierarchy).dims, least=1).stacked()
    return _fit_undone(NormalScores.of(X), X, hierarchy, config)


def fit_known(
    views: Any,
    hierarchy: Hierarchy,
    links: Sequence[Link],
    config: CopulaConfig = CopulaConfig(),
    *,
    y: Any = None,
    key: Any = None,
) -> LinkedFit:
    """The linear model of u = g⁻¹(x), for known links: the ceiling of methods that have to learn them.

    Raises `ValueError` for links without an inverse, rows that no u leads to, and what `check_views` refuses.
    """
    dims, given = as_hierarchy(hierarchy).dims, check_links(links, hierarchy)
    for m, link in enumerate(given, start=1):
        if not link.invertible:
            raise ValueError(f"links: that of modality {m} does not tell u from x; expected one that has an inverse")
    X = check_views(views, dims, least=1).stacked()
    return _fit_undone(KnownLinks(given, dims), X, hierarchy, config)


@dataclass(frozen=True)
class FlowConfig(NetworkConfig):
    """Options of `fit_flow`.

    layers: how often a rotation and bends follow the bends that each view begins with. knots: of the bends.
    jitter: standard deviation of the noise that training adds to inputs, which have 1: it bounds the likelihood where features
    are constant, discrete, or functions of each other.
    """

    training: TrainingConfig = TrainingConfig(batch_size=512, learning_rate=1e-2)
    layers: int = 2
    knots: int = 1
    jitter: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self, choices={}, least={"layers": 0, "knots": 1, "jitter": 0})


class Bends(eqx.Module):
    """An increasing function by feature, near piecewise linear: slopes e^{l₀}, …, e^{l_k} between knots b₁ < … < b_k.

    φ(a) = e^{l₀}t + Σᵢ (e^{lᵢ} − e^{lᵢ₋₁}) (r + √(r² + δ²))/2 with t = eˢ(a − c), r = t − bᵢ; δ is how far a knot reaches. As the
    derivative of every summand rises from 0 to 1, and later for later knots, φ′/eˢ is a mean of the slopes.
    """

    shift: Float[Array, " p"]
    log_scale: Float[Array, " p"]
    log_slopes: Float[Array, "_slopes p"]
    first_knot: Float[Array, "1 p"]
    log_gaps: Float[Array, "_gaps p"]
    log_reach: Float[Array, " p"]

    @classmethod
    def identity(cls, p: int, n_knots: int, dtype: Any) -> "Bends":
        """With equal slopes, and knots from −1 to 1 or at 0."""
        zero = jnp.zeros(p, dtype)
        first, gap = (-1.0, 2 / (n_knots - 1)) if n_knots > 1 else (0.0, 1.0)
        gaps = jnp.full((n_knots - 1, p), np.log(gap), dtype)
        reach = jnp.full(p, np.log(0.3), dtype)
        return cls(zero, zero, jnp.zeros((n_knots + 1, p), dtype), jnp.full((1, p), first, dtype), gaps, reach)

    def __call__(self, a: Rows) -> tuple[Rows, Float[Array, " n"]]:
        """(φ(a), log det φ′(a)), row by row."""
        t = (a - self.shift[None, :]) * jnp.exp(self.log_scale)[None, :]
        slopes = jnp.exp(self.log_slopes)
        knots = self.first_knot + jnp.concatenate([jnp.zeros_like(self.first_knot), jnp.cumsum(jnp.exp(self.log_gaps), axis=0)])
        r = t[:, None, :] - knots[None, :, :]
        root = jnp.sqrt(r**2 + jnp.exp(2 * self.log_reach)[None, None, :])
        value = slopes[None, 0] * t + jnp.sum(jnp.diff(slopes, axis=0)[None] * (r + root), axis=1) / 2
        passed = [jnp.ones_like(t)[:, None], (1 + r / root) / 2, jnp.zeros_like(t)[:, None]]
        weights = -jnp.diff(jnp.concatenate(passed, axis=1), axis=1)
        slope = jnp.sum(slopes[None] * weights, axis=1)
        return value, jnp.log(slope).sum(axis=1) + self.log_scale.sum()


class Turn(eqx.Module):
    """A rotation R = (I + S)⁻¹(I − S), S = A − Aᵀ (Cayley); the identity at A = 0."""

    skew: Float[Array, "p p"]

    def __call__(self, a: Rows) -> Rows:
        S, eye = self.skew - self.skew.T, jnp.eye(self.skew.shape[0], dtype=self.skew.dtype)
        return a @ jnp.linalg.solve(eye + S, eye - S).T


class Flow(eqx.Module):
    """Bends, then rotations and bends in turn: x → u of one view."""

    bends: tuple[Bends, ...]
    turns: tuple[Turn, ...]

    def __call__(self, x: Rows) -> tuple[Rows, Float[Array, " n"]]:
        """(u, log |det du/dx|), row by row."""
        u, log_det = self.bends[0](x)
        for turn, bends in zip(self.turns, self.bends[1:], strict=True):
            u, more = bends(turn(u))
            log_det = log_det + more
        return u, log_det


class FlowNetwork(Network):
    """A flow for each view to u ~ N(0, ΛΛᵀ + Ψ), Λ with the hierarchy's zero pattern, Ψ with one variance a view.

    Rotations are the only maps that mix features, and keep noise equal: were they any linear maps, factors of one view alone and
    its noise could not be told apart. Noise variances by feature are scales of the last bends.
    """

    flows: tuple[Flow, ...]
    loadings: Float[Array, "d K"]
    log_noise: Float[Array, " M"]
    head: Float[Array, "K o"]
    bias: Float[Array, " o"]
    hierarchy: Hierarchy = eqx.field(static=True)

    def gaussian(self) -> tuple[Float[Array, "d K"], Float[Array, " d"]]:
        """(Λ, ψ)."""
        dims = np.array(self.hierarchy.dims)
        psi = jnp.repeat(jnp.exp(self.log_noise), dims, total_repeat_length=self.hierarchy.n_features)
        return jnp.where(self.hierarchy.mask, self.loadings, 0), psi

    def undone(self, views: tuple[Rows, ...]) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
        """(u of all views side by side, log |det du/dx|)."""
        both = [flow(view) for flow, view in zip(self.flows, views, strict=True)]
        return jnp.concatenate([u for u, _ in both], axis=1), sum((more for _, more in both[1:]), both[0][1])

    def log_density(self, views: tuple[Rows, ...]) -> Float[Array, " n"]:
        """log N(u; 0, ΛΛᵀ + Ψ) + log |det du/dx| of every row, in O(dK) each."""
        u, log_det = self.undone(views)
        Lambda, psi = self.gaussian()
        return normal_log_density(u, Lambda, psi) + log_det

    def scores(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n K"]:
        """E[z | u of the views that are present]."""
        u, _ = self.undone(views)
        Lambda, psi = self.gaussian()
        if present is None:
            return u @ posterior_mean_scores(Lambda, psi)
        seen = jnp.where(present[:, self.hierarchy.modality_of_feature], u, 0) @ (Lambda / psi[:, None])
        own = [Lambda[self.hierarchy.rows(m)] for m in self.hierarchy.modalities]
        grams = jnp.stack([L.T @ L for L in own]) / jnp.exp(self.log_noise)[:, None, None]
        return posterior_means_by_row(seen, grams, present)

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        return self.scores(views) @ self.head + self.bias[None, :]


def normal_log_density(u: Float[Array, "n d"], Lambda: Float[Array, "d K"], psi: Float[Array, " d"]) -> Float[Array, " n"]:
    """log N(u; 0, ΛΛᵀ + Ψ) of every row, by Woodbury: W = I + ΛᵀΨ⁻¹Λ, Σ⁻¹ = Ψ⁻¹ − Ψ⁻¹ΛW⁻¹ΛᵀΨ⁻¹, det Σ = det W det Ψ."""
    scaled = Lambda / psi[:, None]
    inverse, log_det = spd_inverse(jnp.eye(Lambda.shape[1], dtype=u.dtype) + Lambda.T @ scaled)
    seen = u @ scaled
    square = jnp.sum(u**2 / psi[None, :], axis=1) - jnp.sum((seen @ inverse) * seen, axis=1)
    return -(square + log_det + jnp.sum(jnp.log(2 * np.pi * psi))) / 2


def posterior_means_by_row(
    seen: Float[Array, "n K"], grams: Float[Array, "M K K"], present: Bool[Array, "n M"]
) -> Float[Array, "n K"]:
    """W⁻¹ΛᵀΨ⁻¹u over the views that each row has: W = I + Σ_m Λ_mᵀΨ_m⁻¹Λ_m of these, from ΛᵀΨ⁻¹u and the `grams` of all views."""
    eye = jnp.eye(grams.shape[1], dtype=grams.dtype)

    def solve(row: tuple[Array, Array]) -> Array:
        W = eye + jnp.tensordot(row[1].astype(grams.dtype), grams, axes=1)
        return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(W, lower=True), row[0])

    return jax.lax.map(solve, (seen, present), batch_size=ROWS_AT_ONCE)


def build(key: Key[Array, ""], hierarchy: Hierarchy, config: FlowConfig) -> FlowNetwork:
    """Flows that change nothing, and no loadings."""
    dtype, K = jnp.dtype(config.training.dtype), hierarchy.n_factors
    flows = []
    for p in hierarchy.dims:
        bends = tuple(Bends.identity(p, config.knots, dtype) for _ in range(config.layers + 1))
        flows.append(Flow(bends, tuple(Turn(jnp.zeros((p, p), dtype)) for _ in range(config.layers))))
    loadings, noise = jnp.zeros((hierarchy.n_features, K), dtype), jnp.zeros(hierarchy.n_modalities, dtype)
    head, bias = jnp.zeros((K, config.n_outputs), dtype), jnp.zeros(config.n_outputs, dtype)
    return FlowNetwork(tuple(flows), loadings, noise, head, bias, hierarchy)


def start(network: FlowNetwork, rows: Batch, hierarchy: Hierarchy, config: FlowConfig) -> FlowNetwork:
    """At `hcl-ml` with noise by feature: the first bends bring the features of a view to its geometric mean noise variance."""
    Z = jnp.concatenate(rows.views, axis=1)
    estimate = hcl_ml(SampleCovariance.from_data(Z), hierarchy, noise="feature")
    psi = jnp.maximum(noise_by_feature(estimate.noise_variance, hierarchy.n_features), config.jitter**2)
    mean = Z.mean(axis=0)
    flows, loadings, log_noise = [], [], []
    for m, flow in zip(hierarchy.modalities, network.flows, strict=True):
        own = hierarchy.rows(m)
        common = jnp.log(psi[own]).mean()
        log_scale = (common - jnp.log(psi[own])) / 2
        flows.append(eqx.tree_at(lambda f: (f.bends[0].shift, f.bends[0].log_scale), flow, (mean[own], log_scale)))
        loadings.append(estimate.loadings[own] * jnp.exp(log_scale)[:, None])
        log_noise.append(common)
    new = tuple(flows), jnp.concatenate(loadings), jnp.stack(log_noise)
    return eqx.tree_at(lambda n: (n.flows, n.loadings, n.log_noise), network, new)


def loss(
    network: FlowNetwork, batch: Batch, key: Key[Array, ""], config: FlowConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """−log density of a row with jitter, in nats a feature."""
    keys = jr.split(key, len(batch.views))
    views = tuple(view + config.jitter * jr.normal(k, view.shape, view.dtype) for k, view in zip(keys, batch.views, strict=True))
    return -network.log_density(views).mean() / network.hierarchy.n_features, {}


METHOD = Method("hcl-flow", FlowConfig, build, loss, all_columns, start)


def fit_flow(
    views: Any, hierarchy: Hierarchy, config: FlowConfig = FlowConfig(), *, y: Any = None, key: Any, **options: Any
) -> NetworkFit:
    """Model (1) with unknown links by maximum likelihood: a normalising flow for each view, the hierarchical factor model on top.

    Starts at the copula (at standardised features with `inputs="standardised"`), and keeps the parameters of the best held-out
    likelihood, so that links which act feature by feature leave it there. `history` holds −log density of the inputs and their
    jitter, in nats a feature. Scores are posterior means, whichever views a row has. Options as in `fit_network`.
    """
    return fit_network(METHOD, views, hierarchy, config, y=y, key=key, **options)
