"""DeepJIVE: joint and individual variation by autoencoders (arXiv 2507.19682), for any hierarchy.

A view is the sum of what decoders make of its codes, x_m ≈ Σ_{s∋m} d_{m,s}(c_{m,s}), one code for every structure that it belongs
to; the codes of a structure's views are to be the same, and those of a view uncorrelated. With a structure of all views and one
for each it is DeepJIVE, with the full lattice a nonlinear SLIDE.
"""

import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from hcl_jax.compiled import compiled
from hcl_jax.networks.modules import Constant, Convolutions, Deconvolutions, Perceptron, redrawn
from hcl_jax.networks.network import (
    HEAD,
    Method,
    Network,
    NetworkConfig,
    NetworkFit,
    Rows,
    all_columns,
    check_modalities,
    check_widths,
    fit_network,
    split_views,
)
from hcl_jax.networks.training import Batch, Critics, TrainingConfig
from hcl_jax.structure import NON_FINITE, Hierarchy, Structure
from hcl_jax.views import check_options

Place = tuple[int, Structure]
"""(View, structure that it belongs to): where there is a code."""
TINY = 1e-6
"""Of a variance: the least that is divided by."""
COLLAPSED, BLURRED, DIVERGED = 0.1, 1.5, 5.0
"""A code of several views has lost its variance below that standard deviation; an error has grown by more than these factors."""


@dataclass(frozen=True)
class DeepjiveConfig(NetworkConfig):
    """Options of `fit`.

    identity: how the codes of a structure's views become the same. "explicit": their squared differences are added to the loss;
    "exchange": every view is rebuilt from the others' codes as well; "merged": there is only one, of all these views together.
    identity_weight: of the squared differences.
    orthogonality: what keeps a code from telling what larger structures' codes of the view tell. "ridge": the share of its
    variance that these explain linearly, in closed form; "adversarial": that share by a network that learns to; "explained",
    "residual": squares of what this network explains, or does not, as the paper may be read: the first has no gradient in the
    code, the second is least for codes that say nothing.
    gamma: weight of the orthogonality. ridge: of its regressions, for codes of variance 1.
    joint_first: share of the steps before codes of single views take part; those of several join in between by their size.
    ramp: share of the steps, from there on, over which γ grows from 0.
    standardise: codes of several views have mean 0 and variance 1, in the batch and at the end among the training rows.
    project: at the end a linear regression takes from every code what those of larger structures explain of it.
    hidden: widths of the hidden layers of encoders, and in reverse of decoders; none: linear ones.
    shapes: sides of every view's images or volumes, whose features are their voxels in C order; encoders and decoders then are
    convolutions of stride 2 with these `channels`, layer by layer, and this `kernel`. None given: perceptrons.
    critic_steps, critic_speed: of the networks that learn to explain.
    """

    training: TrainingConfig = TrainingConfig(
        steps=6000, batch_size=128, learning_rate=4e-3, weight_decay=0.0, round_steps=100, patience=20
    )
    inputs: Literal["normal", "standardised", "scaled"] = "scaled"
    identity: Literal["explicit", "exchange", "merged"] = "explicit"
    identity_weight: float = 1.0
    orthogonality: Literal["ridge", "adversarial", "explained", "residual"] = "ridge"
    gamma: float = 0.3
    ridge: float = 1e-3
    joint_first: float = 0.35
    ramp: float = 0.3
    standardise: bool = True
    project: bool = True
    hidden: tuple[int, ...] = (64, 64)
    shapes: tuple[tuple[int, ...], ...] = ()
    channels: tuple[int, ...] = (8, 16)
    kernel: int = 2
    critic_steps: int = 5
    critic_speed: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "identity": ("explicit", "exchange", "merged"),
            "orthogonality": ("ridge", "adversarial", "explained", "residual"),
        }
        weights = dict.fromkeys(("identity_weight", "gamma", "joint_first", "ramp"), 0)
        check_options(self, choices=choices, positive=("ridge", "critic_speed"), least=weights | {"critic_steps": 1, "kernel": 2})
        if self.joint_first + self.ramp >= 1:
            raise ValueError(f"ramp: is {self.ramp}, after joint_first {self.joint_first}; expected a sum below 1")
        check_widths(self, "hidden")
        check_widths(self, "channels", least=1)

    @property
    def settled(self) -> Any:
        """The share of the steps after which the loss no longer changes."""
        return self.joint_first + self.ramp


class Deepjive(Network):
    """Encoders and decoders by view and structure."""

    encoders: dict[Place, Any]
    mergers: dict[Structure, Perceptron]
    """Of what the encoders of a structure's views make, where these have one code."""
    decoders: dict[Place, Any]
    regressions: dict[Place, Perceptron]
    """Of a code on those of larger structures, where networks learn them."""
    head: Perceptron
    centres: dict[Place, Constant]
    scales: dict[Place, Constant]
    projection: Constant
    """K × K: scores are c − c·projection, c the codes less their centres and over their scales."""
    hierarchy: Hierarchy = eqx.field(static=True)

    def raw(self, views: tuple[Rows, ...]) -> dict[Place, Rows]:
        """The codes before they are standardised."""
        codes = {(m, s): encode(views[m - 1]) for (m, s), encode in self.encoders.items()}
        for s, merge in self.mergers.items():
            codes |= dict.fromkeys([(m, s) for m in s], merge(jnp.concatenate([codes[m, s] for m in s], axis=1)))
        return codes

    def combined(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n K"]:
        """The mean of a structure's codes over its views that are there. 0 where none is; of one code of several views where
        one lacks."""
        there = jnp.ones((views[0].shape[0], len(views)), bool) if present is None else present
        codes, blocks = self.raw(views), []
        for s in self.hierarchy.structures:
            own = [(codes[m, s] - self.centres[m, s].value[None, :]) / self.scales[m, s].value[None, :] for m in s]
            held = there[:, np.array(s) - 1]
            if s in self.mergers:
                own, held = own[:1], held.all(axis=1, keepdims=True)
            blocks.append(mean_present(own, held))
        return jnp.concatenate(blocks, axis=1)

    def scores(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n K"]:
        """The combined codes, less what those of larger structures that share a view with theirs explain."""
        c = self.combined(views, present)
        return c - c @ self.projection.value

    def part(self, scores: Float[Array, "n K"], m: int, s: Structure) -> Rows:
        """What the structure's scores say of view m, in its standardised units."""
        return self.decoders[m, s](scores[:, self.hierarchy.columns(s)])

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        """Of the codes as they are: what standardises them is not known before the end of training."""
        return self.head(jnp.concatenate([*self.raw(views).values()], axis=1))


def mean_present(codes: list[Rows], present: Bool[Array, "n m"]) -> Rows:
    """The mean of the codes that are present in a row, 0 where none is."""
    held = [jnp.where(present[:, i, None], code, 0) for i, code in enumerate(codes)]
    return sum(held[1:], held[0]) / jnp.maximum(present.sum(axis=1, keepdims=True), 1).astype(held[0].dtype)


def places(hierarchy: Hierarchy) -> list[Place]:
    """Every view's structures, larger ones first."""
    return [(m, s) for m in hierarchy.modalities for s in hierarchy.structures if m in s]


def earlier(hierarchy: Hierarchy, m: int, s: Structure) -> list[Structure]:
    """The structures of view m that stand before s, larger ones and those of its size."""
    return [t for t in hierarchy.structures[: hierarchy.structures.index(s)] if m in t]


def build(key: Key[Array, ""], hierarchy: Hierarchy, config: DeepjiveConfig) -> Deepjive:
    """Random encoders and decoders."""
    dtype, rank, dims = jnp.dtype(config.training.dtype), dict(hierarchy.ranks), hierarchy.dims
    perceptron = lambda *widths: Perceptron(key, widths, jax.nn.gelu, dtype)  # drawn anew below
    at, back = places(hierarchy), config.hidden[::-1]
    merged = [s for s in hierarchy.structures if len(s) > 1] if config.identity == "merged" else []
    width = lambda s: (config.hidden or (rank[s],))[-1] if s in merged else rank[s]  # of what encoders make
    learned = [(m, s) for m, s in at if earlier(hierarchy, m, s)] if config.orthogonality != "ridge" else []
    explaining = lambda m, s: sum(rank[t] for t in earlier(hierarchy, m, s))
    constants = lambda fill: {(m, s): Constant(jnp.full(rank[s], fill, dtype)) for m, s in at}

    def encoder(m: int, r: int) -> Any:
        if not config.shapes:
            return perceptron(dims[m - 1], *config.hidden, r)
        return Convolutions(key, config.shapes[m - 1], config.channels, r, config.kernel, dtype)

    def decoder(m: int, r: int) -> Any:
        if not config.shapes:
            return perceptron(r, *back, dims[m - 1])
        return Deconvolutions(key, config.shapes[m - 1], config.channels, r, config.kernel, dtype)

    network = Deepjive(
        encoders={(m, s): encoder(m, width(s)) for m, s in at},
        mergers={s: perceptron(len(s) * width(s), *config.hidden[-1:], rank[s]) for s in merged},
        decoders={(m, s): decoder(m, rank[s]) for m, s in at},
        regressions={(m, s): perceptron(explaining(m, s), *config.hidden[:1], rank[s]) for m, s in learned},
        head=perceptron(sum(rank[s] for _, s in at), HEAD, config.n_outputs),
        centres=constants(0.0),
        scales=constants(1.0),
        projection=Constant(jnp.zeros((hierarchy.n_factors,) * 2, dtype)),
        hierarchy=hierarchy,
    )
    return redrawn(key, network)


def standardised(raw: dict[Place, Rows]) -> dict[Place, Rows]:
    """Codes of several views with mean 0 and variance 1 in the batch."""
    return {(m, s): of_unit_variance(code) if len(s) > 1 else code for (m, s), code in raw.items()}


def of_unit_variance(code: Rows) -> Rows:
    """Less its mean and over its standard deviation."""
    return (code - code.mean(axis=0, keepdims=True)) / jnp.sqrt(code.var(axis=0, keepdims=True) + TINY)


def reconstruction(
    network: Deepjive, views: tuple[Rows, ...], codes: dict[Place, Rows], exchange: bool, on: dict[Structure, Array]
) -> Float[Array, ""]:
    """Σ_m of the mean squared error of view m; with `exchange` the mean of that and of those with the codes of the next view of
    every structure in place of its own, and of the one after it, as often as structures have views.

    Parts that are not on learn what is left of the others, which learn as if they were not there.
    """
    passes = max(map(len, network.hierarchy.structures)) if exchange else 1
    decoded = {}
    for (m, s), decode in network.decoders.items():
        start = s.index(m)
        order = [*s[start:], *s[:start]] if exchange else [m]
        decoded[m, s] = jnp.split(decode(jnp.concatenate([codes[l, s] for l in order])), len(order))
    errors = []
    for m, x in enumerate(views, start=1):
        own = [(on[s], parts) for (l, s), parts in decoded.items() if l == m]
        for k in range(passes):
            parts = [(flag, part[k % len(part)]) for flag, part in own]
            left = x - sum(flag * part for flag, part in parts)
            others = sum((1 - flag) * part for flag, part in parts)
            held = jax.lax.stop_gradient
            first, both = jnp.mean(left**2), jnp.mean((held(left) - others) ** 2)
            errors.append((both + first - held(first)) / passes)
    return total(errors, views[0].dtype)


def conditions(network: Deepjive, codes: dict[Place, Rows]) -> dict[Place, Rows]:
    """For every code that comes after others of its view: these, of variance 1, side by side."""
    before = {place: earlier(network.hierarchy, *place) for place in codes}
    return {
        (m, s): jnp.concatenate([of_unit_variance(codes[m, t]) for t in others], axis=1)
        for (m, s), others in before.items()
        if others
    }


def penalties(network: Deepjive, codes: dict[Place, Rows], config: DeepjiveConfig) -> list[Float[Array, ""]]:
    """Of every code that comes after others of its view, for what these tell of it."""
    given, held = conditions(network, codes), jax.lax.stop_gradient
    if config.orthogonality == "ridge":
        return [explained_share(held(g), codes[place], config.ridge) for place, g in given.items()]
    guess = {place: network.regressions[place](g) for place, g in given.items()}
    if config.orthogonality == "explained":
        return [jnp.mean(g**2) for g in guess.values()]
    if config.orthogonality == "residual":
        return [jnp.mean((codes[place] - g) ** 2) for place, g in guess.items()]
    return [
        1 - jnp.mean((codes[place] - held(g)) ** 2 / (codes[place].var(axis=0, keepdims=True) + TINY))
        for place, g in guess.items()
    ]


def explained_share(given: Float[Array, "n k"], code: Float[Array, "n r"], ridge: float | Array) -> Float[Array, ""]:
    """The share of the variance of the code that a ridge regression on what is given explains: mean over its columns."""
    n, k = given.shape
    code = code - code.mean(axis=0, keepdims=True)
    cross = given.T @ code / n
    B = jnp.linalg.solve(given.T @ given / n + ridge * jnp.eye(k, dtype=given.dtype), cross)
    return jnp.mean(jnp.sum(B * cross, axis=0) / (jnp.mean(code**2, axis=0) + TINY))


def loss(
    network: Deepjive, batch: Batch, key: Key[Array, ""], config: DeepjiveConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """reconstruction + identity_weight · identity + γ · orthogonality; `spread` is the least standard deviation of a code of
    several views before it is standardised."""
    hierarchy, dtype = network.hierarchy, batch.views[0].dtype
    elapsed = jnp.ones((), dtype) if batch.elapsed is None else batch.elapsed
    raw = network.raw(batch.views)
    codes = standardised(raw) if config.standardise else raw
    M = hierarchy.n_modalities
    begins = {s: config.joint_first * ((M - len(s)) / (M - 1)) for s in hierarchy.structures}
    on = {s: (elapsed >= begin).astype(dtype) for s, begin in begins.items()}
    shared = [s for s in hierarchy.structures if len(s) > 1]
    differences = [
        jnp.mean(jnp.stack([jnp.mean((codes[m, s] - codes[l, s]) ** 2) for m, l in combinations(s, 2)])) for s in shared
    ]
    parts = {
        "reconstruction": reconstruction(network, batch.views, codes, config.identity == "exchange", on),
        "identity": total(differences, dtype),
        "orthogonality": total(penalties(network, codes, config), dtype),
        "spread": jnp.stack([raw[s[0], s].std(axis=0).min() for s in shared]).min() if shared else jnp.ones((), dtype),
    }
    gamma = config.gamma * jnp.clip((elapsed - config.joint_first) / (config.ramp + TINY), 0, 1)
    weight = config.identity_weight if config.identity == "explicit" else 0.0
    return parts["reconstruction"] + weight * parts["identity"] + gamma * parts["orthogonality"], parts


def total(terms: list[Float[Array, ""]], dtype: Any) -> Float[Array, ""]:
    """The sum of the terms of a loss, of which there may be none."""
    return jnp.stack(terms).sum() if terms else jnp.zeros((), dtype)


def regressions(network: Deepjive) -> dict[Place, Perceptron]:
    """The networks that take turns with the rest."""
    return network.regressions


def learning(
    network: Deepjive, batch: Batch, key: Key[Array, ""], config: DeepjiveConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What these minimise: the squared error of a code, regressed on those of larger structures."""
    raw = network.raw(batch.views)
    codes = standardised(raw) if config.standardise else raw
    given = conditions(network, codes)
    errors = [jnp.mean((codes[place] - network.regressions[place](g)) ** 2) for place, g in given.items()]
    return total(errors, batch.views[0].dtype), {}


def finish(network: Deepjive, rows: Batch, hierarchy: Hierarchy, config: DeepjiveConfig) -> Deepjive:
    """What standardises codes, and the projection, from all training rows."""
    if config.standardise:
        shared = {place: code for place, code in network.raw(rows.views).items() if len(place[1]) > 1}
        centres = network.centres | {place: Constant(code.mean(axis=0)) for place, code in shared.items()}
        scales = network.scales | {place: Constant(jnp.sqrt(code.var(axis=0) + TINY)) for place, code in shared.items()}
        network = eqx.tree_at(lambda n: (n.centres, n.scales), network, (centres, scales))
    if not config.project:
        return network
    projection = Constant(projection_of(network.combined(rows.views), hierarchy))
    return eqx.tree_at(lambda n: n.projection, network, projection)


def projection_of(codes: Float[Array, "n K"], hierarchy: Hierarchy) -> Float[Array, "K K"]:
    """P such that the columns of a structure in codes − codes P are the residuals of its codes, regressed on these columns of all
    structures before it that share a view with it."""
    eye, of_column = jnp.eye(codes.shape[1], dtype=codes.dtype), np.arange(codes.shape[1])
    centred, T = codes - codes.mean(axis=0, keepdims=True), eye
    for i, s in enumerate(hierarchy.structures):
        before = [t for t in hierarchy.structures[:i] if set(s) & set(t)]
        if before:
            own, given = hierarchy.columns(s), np.concatenate([of_column[hierarchy.columns(t)] for t in before])
            B = jnp.linalg.lstsq(centred @ T[:, given], centred[:, own])[0]
            T = T.at[:, own].add(-T[:, given] @ B)
    return eye - T


def check(hierarchy: Hierarchy, config: DeepjiveConfig) -> None:
    """Raise `ValueError` for a single view, and shapes that are not the views' or cannot be halved by every layer."""
    check_modalities(hierarchy, "what views share is told from what they have alone")
    factor = 2 ** len(config.channels)
    fits = [
        math.prod(sides) == d and all(side % factor == 0 for side in sides)
        for sides, d in zip(config.shapes, hierarchy.dims, strict=False)
    ]
    if config.shapes and (len(config.shapes) != hierarchy.n_modalities or not all(fits)):
        raise ValueError(
            f"shapes: are {config.shapes}; expected one a view, of {hierarchy.dims} voxels, whose sides are multiples of {factor}"
        )


METHOD = Method("deepjive", DeepjiveConfig, build, loss, all_columns, finish=finish, check=check)
LEARNING = replace(METHOD, critics=Critics(regressions, learning))


def fit(
    views: Any, hierarchy: Hierarchy, config: DeepjiveConfig = DeepjiveConfig(), *, y: Any = None, key: Any, **options: Any
) -> NetworkFit:
    """DeepJIVE on rows: views that are sums of what decoders make of codes, one code a view and structure.

    Least Σ_m mean‖x_m − Σ_{s∋m} d_{m,s}(c_{m,s})‖²/d_m, all views of variance 1, + identity + γ · orthogonality; see
    `DeepjiveConfig`. Codes of all views learn first, as if there were no others, and those of single views what these leave; then
    all learn together, and γ grows. Scores are the mean of a structure's codes over the views that a row has, less the linear
    regression on the scores of structures before it that share a view with it. Where the identity is merged a row that lacks a
    view of a structure has 0 there. `parts` gives what the scores say of the views, `warnings_of` what went wrong.

    The paper's penalty on the regression network is ambiguous, and both readings of it fail ("explained", "residual"); nor does
    it standardise joint codes, which then shrink to nothing. With structures of single views alone these are separate
    autoencoders. Options as in `fit_network`; the scaled inputs keep the geometry of squared errors, as linear JIVE does.
    """
    method = METHOD if getattr(config, "orthogonality", "ridge") == "ridge" else LEARNING
    return fit_network(method, views, hierarchy, config, y=y, key=key, **options)


def parts(fitted: NetworkFit, views: Any, presence: Any = None) -> dict[Place, Float[Array, "n _d"]]:
    """By (view, structure) what the structure's scores say of the view, in units of its features, about no mean of its own.

    A view is its training means plus the sum of its parts plus what is left. Raises `ValueError` for a fit of another method, and
    of normal scores, whose parts add up in no units.
    """
    network = fitted.network
    if not isinstance(network, Deepjive) or fitted.config.inputs == "normal":
        raise ValueError(f"fitted: is {fitted.method} of {fitted.config.inputs} inputs; expected deepjive of scaled ones")
    scores = fitted.transform(views, presence)
    scale = split_views(jnp.where(jnp.isfinite(fitted.marginals.scale), fitted.marginals.scale, 0)[None, :], fitted.dims)
    return {(m, s): part * scale[m - 1] for (m, s), part in decoded(network, scores).items()}


@compiled
def decoded(network: Deepjive, scores: Float[Array, "n K"]) -> dict[Place, Rows]:
    """All parts, in standardised units and the precision of the scores."""
    dtype, own = scores.dtype, network.projection.value.dtype
    return {place: network.part(scores.astype(own), *place).astype(dtype) for place in network.decoders}


def warnings_of(fitted: NetworkFit) -> tuple[str, ...]:
    """What went wrong, in words, by the history of the training; nothing where nothing did.

    Collapse: codes of several views are the same because they have hardly any variance (of standardised ones none: what
    standardises them is bounded). Blur: the error of the views on held-out rows has grown again, as the orthogonality took over;
    divergence: by more, or to what is not finite.
    """
    found = []
    last = {name: values[np.isfinite(values)] for name, values in jax.tree.map(np.asarray, fitted.history).items()}
    least = 10 * TINY**0.5 if fitted.config.standardise else COLLAPSED
    if last["spread"][-1] < least:
        found.append(f"collapse: a code of several views has a standard deviation of {last['spread'][-1]:.2g}, below {least:.2g}")
    growth = last["reconstruction"][-1] / last["reconstruction"].min()
    if int(fitted.status) == NON_FINITE or growth > DIVERGED:
        found.append(f"divergence: the error of the views ended at {growth:.2g} times its least")
    elif growth > BLURRED:
        found.append(f"blur: the error of the views ended at {growth:.2g} times its least; expected a smaller gamma")
    return tuple(found)
