"""What a network learns and how it is fitted: one contract for all methods, `fit(views, hierarchy, config, *, y=None, key)`."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from hcl_jax.compiled import compiled
from hcl_jax.fitted import Fitted, check_views, read_rows
from hcl_jax.marginals import MARGINALS, Marginals
from hcl_jax.networks.training import (
    Batch,
    Critics,
    Trained,
    TrainingConfig,
    held_out_rows,
    join_numbers,
    split_numbers,
    train_network,
)
from hcl_jax.npz import read_npz, write_npz
from hcl_jax.structure import NON_FINITE, Hierarchy, as_hierarchy
from hcl_jax.views import as_key, as_labels, as_response, centre_and_scale, check_options

Rows = Float[Array, "n _p"]
HEAD = 256
"""Width of the supervised head's hidden layer, of methods that do not say otherwise."""


class Network(eqx.Module):
    """Maps of standardised views. `present` (n × M) says which views each row has; None: all of them."""

    @abstractmethod
    def scores(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n R"]:
        """What `transform` returns, by column of the membership."""

    @abstractmethod
    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        """Of the supervised head: the standardised response, or one logit a class."""


@dataclass(frozen=True)
class NetworkConfig:
    """What all networks have in common; every method adds its own.

    inputs: what encoders see of a feature: its "normal" scores, its "standardised" values, or these "scaled" by view, which
    keeps what the features of a view vary by in proportion.
    supervision: what a response, where one is given, is used for: "joint" adds the task's loss from the first step, "tuned"
    trains without it first and goes on with it from there, "none" leaves it alone.
    task_weight: of the task's loss: half the mean squared error of the standardised response, or the cross-entropy.
    n_classes: of an integer response; None where the response is a number.
    restarts: trainings from unlike random weights, of which the one with the least held-out loss is kept.
    """

    presets: ClassVar[Mapping[str, Any]] = {}
    """By variant, a named tuple of the options that are its own: those that are None are filled in from it."""
    training: TrainingConfig = TrainingConfig()
    inputs: Literal["normal", "standardised", "scaled"] = "normal"
    supervision: Literal["joint", "tuned", "none"] = "joint"
    task_weight: float = 1.0
    n_classes: int | None = None
    restarts: int = 1

    def __post_init__(self) -> None:
        if self.presets:
            variant = self.variant  # type: ignore[attr-defined]  # of methods with presets
            check_options(self, choices={"variant": tuple(self.presets)})
            for name, value in self.presets[variant]._asdict().items():
                if getattr(self, name) is None:
                    object.__setattr__(self, name, value)
        least = {"task_weight": 0, "n_classes": 2, "restarts": 1}
        choices = {"inputs": tuple(MARGINALS), "supervision": ("joint", "tuned", "none")}
        check_options(self, choices=choices, least=least)

    @property
    def n_outputs(self) -> int:
        return 1 if self.n_classes is None else self.n_classes


def check_widths(config: Any, *names: str, least: int = 0) -> None:
    """Raise `ValueError` unless these options are that many positive widths of layers, or more."""
    for name in names:
        widths = getattr(config, name)
        if len(widths) < least or min(widths, default=1) < 1:
            expected = "at least one positive width" if least else "positive widths"
            raise ValueError(f"{name}: is {widths}; expected {expected}")


def check_modalities(hierarchy: Hierarchy, reason: str, exactly: int | None = None) -> None:
    """Raise `ValueError` for a hierarchy of a single modality, or not of exactly so many."""
    M = hierarchy.n_modalities
    if exactly != M if exactly else M < 2:
        count = "1 modality" if M == 1 else f"{M} modalities"
        raise ValueError(f"hierarchy: has {count}; expected {exactly or 'at least 2'}, as {reason}")


def all_columns(hierarchy: Hierarchy, config: Any) -> np.ndarray:
    """The membership of scores that are the hierarchy's factors, M × K."""
    return hierarchy.modality_mask


@dataclass(frozen=True)
class Method:
    """A method, as the one way to fit it sees it. All functions are a module's, so that compiled programs are found by them."""

    name: str
    config: type[NetworkConfig]
    build: Callable[[Key[Array, ""], Hierarchy, Any], Network]
    """A network with random weights, in the configuration's precision."""
    loss: Callable[[Any, Batch, Key[Array, ""], Any], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]
    """(network, batch, key, configuration) -> (the loss without the task's, its parts)."""
    membership: Callable[[Hierarchy, Any], np.ndarray]
    """M × R booleans."""
    start: Callable[[Any, Batch, Hierarchy, Any], Network] = field(default=lambda network, *_: network)
    """(network, training rows, hierarchy, configuration) -> where training starts."""
    finish: Callable[[Any, Batch, Hierarchy, Any], Network] = field(default=lambda network, *_: network)
    """What is set from the training rows once training has ended."""
    check: Callable[[Hierarchy, Any], None] = field(default=lambda *_: None)
    """Raise `ValueError` where the method cannot be fitted to the hierarchy."""
    critics: Critics | None = None
    """What takes turns with the rest of the network."""


class NetworkFit(Fitted):
    """A trained network, with what its training rows say of single features."""

    network: Network
    marginals: Marginals
    membership: Bool[Array, "M R"]
    status: Int[Array, ""]
    steps: Int[Array, ""]
    history: dict[str, Float[Array, " rounds"]]
    """By round, from the start on: mean `train` loss, `held_out` loss and its parts; NaN after the last round."""
    response: tuple[Float[Array, " o"], Float[Array, " o"]]
    """Mean and standard deviation of the response."""
    dims: tuple[int, ...] = eqx.field(static=True)
    hierarchy: Hierarchy = eqx.field(static=True)
    method: str = eqx.field(static=True)
    config: Any = eqx.field(static=True)
    supervised: bool = eqx.field(static=True)

    def standardised(self, X: Float[Array, "n d"]) -> tuple[Rows, ...]:
        """What the network sees of rows of all views side by side."""
        return split_views(self.marginals(X).astype(self.config.training.dtype), self.dims)

    def transform(self, views: Any, presence: Any = None) -> Float[Array, "n R"]:
        X, present = read_rows(views, self.dims, presence)
        return _scores(self, X, present)

    def predict(self, views: Any) -> Float[Array, "..."]:
        """The response that is expected, or the probability of every class (n × C)."""
        if not self.supervised:
            raise ValueError("fitted: this network saw no response; expected a supervised one, or regress on its scores")
        X, present = read_rows(views, self.dims)
        if present is not None:
            raise ValueError("views: lack some rows of some view; expected whole ones, or regress on the scores")
        return _predictions(self, X)

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(description, arrays): all that `fit_from_state` needs for the same bits."""
        leaves = jax.tree_util.tree_leaves_with_path(self)
        description = {
            "kind": "network",
            "method": self.method,
            "dims": self.dims,
            "ranks": [[list(s), rank] for s, rank in self.hierarchy.ranks],
            "config": dataclasses.asdict(self.config),
            "supervised": self.supervised,
            "history": sorted(self.history),
        }
        return description, {jax.tree_util.keystr(place): np.asarray(leaf) for place, leaf in leaves}

    def save(self, path: Path | str) -> None:
        """One .npz without pickle: arrays, and a description in JSON. `load` gives back the same bits."""
        write_npz(path, *self.state())


def split_views(Z: Float[Array, "n d"], dims: tuple[int, ...]) -> tuple[Rows, ...]:
    """The views that stand side by side."""
    return tuple(jnp.split(Z, np.cumsum(dims)[:-1], axis=1))


@compiled
def _scores(fitted: NetworkFit, X: Float[Array, "n d"], present: Bool[Array, "n M"] | None) -> Float[Array, "n R"]:
    views = fitted.standardised(X)
    if present is not None:
        views = tuple(jnp.where(present[:, m, None], view, 0) for m, view in enumerate(views))
    return fitted.network.scores(views, present).astype(X.dtype)


@compiled
def _predictions(fitted: NetworkFit, X: Float[Array, "n d"]) -> Float[Array, "..."]:
    outputs = fitted.network.outputs(fitted.standardised(X))
    if fitted.config.n_classes is not None:
        return jax.nn.softmax(outputs, axis=1).astype(X.dtype)
    mean, deviation = fitted.response
    return (mean[None, :] + deviation[None, :] * outputs.astype(mean.dtype))[:, 0].astype(X.dtype)


def task_loss(outputs: Float[Array, "n o"], y: Array, n_classes: int | None) -> Float[Array, ""]:
    """Half the mean squared error, or the cross-entropy of integer classes."""
    if n_classes is None:
        return jnp.mean(jnp.sum((outputs - y) ** 2, axis=1)) / 2
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs, axis=1), y[:, None], axis=1))


def _loss(method: Method, network: Network, batch: Batch, key: Array, config: Any) -> tuple[Array, dict[str, Array]]:
    value, parts = method.loss(network, batch, key, config)
    if batch.y is None:
        return value, parts
    task = task_loss(network.outputs(batch.views), batch.y, config.n_classes)
    return value + config.task_weight * task, parts | {"task": task}


LOSSES: dict[Method, Callable[..., tuple[Array, dict[str, Array]]]] = {}


def _loss_of(method: Method) -> Callable[..., tuple[Array, dict[str, Array]]]:
    """One function a method, so that compiled programs are found again."""
    return LOSSES.setdefault(method, partial(_loss, method))


def fit_network(
    method: Method,
    views: Any,
    hierarchy: Hierarchy,
    config: Any = None,
    *,
    y: Any = None,
    key: Any,
    backbones: Any = None,
    progress: bool = False,
    checkpoint: Path | str | None = None,
) -> NetworkFit:
    """The method, trained on the views: on its own loss, and the task's where a response is given.

    Of methods whose networks have `backbones`, these may be given, to go on from: those of another fit, whatever its method, of
    the same widths. Everything else starts at random.

    A response that is a number is standardised; integers are classes, `n_classes` of them. Pure under `jit` and `vmap`; called
    plainly it can show its `progress`, and keep a `checkpoint` from which an interrupted run goes on. A loss that is not finite
    ends it in status 2. Raises `ValueError`, before any computing, for views that are not the hierarchy's, a missing key, and
    options out of range.
    """
    config = method.config() if config is None else config
    if not isinstance(config, method.config):
        raise ValueError(f"config: is of type {type(config).__name__}; expected a {method.config.__name__}")
    method.check(as_hierarchy(hierarchy), config)
    read = check_views(views, hierarchy.dims, least=1)
    key = as_key(key, "for the start of the training and its batches")
    X, response = read.stacked(), None
    if X.shape[0] < 4:
        raise ValueError(f"views: have {X.shape[0]} rows; expected at least 4")
    if y is not None and config.supervision != "none":
        if config.n_classes is None:
            response = as_response(y, read.n_samples, samples=read.sample_names).astype(X.dtype)[:, None]
        else:
            response = as_labels(y, read.n_samples, config.n_classes, "y")
    return fit_rows(method, X, hierarchy, config, response, key, backbones=backbones, progress=progress, checkpoint=checkpoint)


def _with_backbones(network: Network, backbones: Any) -> Network:
    """The network with these encoders in place of its own. Raises `ValueError` where they are of other shapes, or it has none."""
    own = getattr(network, "backbones", None)
    if own is None:
        raise ValueError("backbones: are given; expected a method whose networks have them")
    if jax.eval_shape(lambda: backbones) != jax.eval_shape(lambda: own):
        raise ValueError(f"backbones: are {_widths_of(backbones)}; expected {_widths_of(own)}, those of the configuration")
    return eqx.tree_at(lambda net: net.backbones, network, backbones)


def _widths_of(backbones: Any) -> str:
    """The shapes of their weights."""
    return (
        ", ".join("x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(backbones) if getattr(leaf, "ndim", 0) > 1) or "none"
    )


def fit_rows(
    method: Method,
    X: Float[Array, "n d"],
    hierarchy: Hierarchy,
    config: Any,
    response: Array | None,
    key: Array,
    *,
    backbones: Any = None,
    progress: bool = False,
    checkpoint: Path | str | None = None,
) -> NetworkFit:
    """The same for rows that are checked; a response is n × o numbers, or n classes."""
    static, numbers = split_numbers(config)
    loss, file, k_rows = _loss_of(method), None if checkpoint is None else Path(checkpoint), jr.split(key, 4)[1]
    run = partial(train_network, loss, static, numbers, critics=method.critics, progress=progress)
    runs = []
    for i in range(config.restarts):
        prepared = _prepare(method, static, numbers, hierarchy, X, response, jr.fold_in(key, i) if i else key, k_rows)
        network, train, held = prepared.network, prepared.train, prepared.held
        if backbones is not None:
            network = _with_backbones(network, backbones)
        k_first, k_second = prepared.keys
        own = file.with_name(f"{file.name}.{i}") if file is not None and i else file
        if config.supervision == "tuned" and response is not None:
            blind, blind_held = (batch._replace(y=None) for batch in (train, held))
            before = None if own is None else own.with_name(own.name + ".pretraining")
            network = run(network, blind, blind_held, k_second, checkpoint=before).model
        runs.append(run(network, train, held, k_first, checkpoint=own))
    trained = runs[0] if len(runs) == 1 else _best_of(runs)
    network = _finish(method, static, numbers, hierarchy, trained.model, train)
    return NetworkFit(
        network=network,
        marginals=prepared.marginals,
        membership=jnp.asarray(method.membership(hierarchy, config)),
        status=trained.status,
        steps=trained.steps,
        history=trained.history,
        response=prepared.response,
        dims=hierarchy.dims,
        hierarchy=hierarchy,
        method=method.name,
        config=config,
        supervised=response is not None,
    )


def _best_of(runs: list[Trained]) -> Trained:
    """The run that ended in the least loss; those that did not end finite only where none did."""
    losses = jnp.stack([jnp.where(run.status == NON_FINITE, jnp.inf, run.loss) for run in runs])
    return jax.tree.map(lambda *leaves: jnp.stack(leaves)[jnp.argmin(losses)], *runs)


class Prepared(eqx.Module):
    """What training starts from."""

    network: Network
    train: Batch
    held: Batch
    marginals: Marginals
    response: tuple[Float[Array, " o"], Float[Array, " o"]]
    keys: tuple[Array, Array]


@compiled
def _prepare(
    method: Method, static: Any, numbers: dict, hierarchy: Hierarchy, X: Array, response: Array | None, key: Array, k_rows: Array
) -> Prepared:
    config = join_numbers(static, numbers, static.training.dtype)
    k_build, _, k_first, k_second = jr.split(key, 4)
    marginals = MARGINALS[config.inputs].of(X, hierarchy.dims)
    Z = marginals(X).astype(config.training.dtype)
    mean, deviation = jnp.zeros(1, X.dtype), jnp.ones(1, X.dtype)
    y = response
    if response is not None and config.n_classes is None:
        mean, deviation = centre_and_scale(response)
        y = ((response - mean[None, :]) / deviation[None, :]).astype(config.training.dtype)
        deviation = jnp.where(jnp.isfinite(deviation), deviation, 0)
    rows = Batch(split_views(Z, hierarchy.dims), y)
    order = jr.permutation(k_rows, X.shape[0])
    n_held = held_out_rows(X.shape[0], config.training.held_out)
    train = rows.of_rows(order[n_held:])
    held = rows.of_rows(order[:n_held]) if n_held else train
    network = method.start(method.build(k_build, hierarchy, config), train, hierarchy, config)
    return Prepared(network, train, held, marginals, (mean, deviation), (k_first, k_second))


@compiled
def _finish(method: Method, static: Any, numbers: dict, hierarchy: Hierarchy, network: Network, train: Batch) -> Network:
    return method.finish(network, train, hierarchy, join_numbers(static, numbers, static.training.dtype))


def load_fit(path: Path | str, methods: Mapping[str, Method]) -> NetworkFit:
    """The fit that `NetworkFit.save` wrote. Raises `ValueError` for a file that is not one."""
    expected = "one that was saved by a fit"
    description, arrays = read_npz(path, expected)
    try:
        return fit_from_state(description, arrays, methods)
    except KeyError as error:
        raise ValueError(f"path: {path} cannot be read ({error}); expected {expected}") from None


def fit_from_state(description: Mapping[str, Any], held: Mapping[str, Any], methods: Mapping[str, Method]) -> NetworkFit:
    """The fit of which this is the `state`. Raises `KeyError` for what is missing."""
    arrays = {name: jnp.asarray(array) for name, array in held.items()}
    method = methods[description["method"]]
    config = _config_from(method.config, description["config"])
    hierarchy = Hierarchy(description["dims"], {tuple(s): rank for s, rank in description["ranks"]})
    marginals = MARGINALS[config.inputs]
    maps = [arrays[f".marginals.{item.name}"] for item in dataclasses.fields(marginals)]
    skeleton = NetworkFit(
        network=eqx.filter_eval_shape(method.build, jr.key(0), hierarchy, config),
        marginals=marginals(*maps),
        membership=arrays[".membership"],
        status=arrays[".status"],
        steps=arrays[".steps"],
        history={name: arrays[f".history['{name}']"] for name in description["history"]},
        response=(arrays[".response[0]"], arrays[".response[1]"]),
        dims=hierarchy.dims,
        hierarchy=hierarchy,
        method=method.name,
        config=config,
        supervised=description["supervised"],
    )
    return jax.tree_util.tree_map_with_path(lambda place, _: arrays[jax.tree_util.keystr(place)], skeleton)


def _config_from(kind: type, held: dict[str, Any]) -> Any:
    """A frozen dataclass from its fields as JSON has them."""
    values = {}
    for item in dataclasses.fields(kind):
        value, default = held[item.name], item.default
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            value = _config_from(type(default), value)
        values[item.name] = _as_tuples(value)
    return kind(**values)


def _as_tuples(value: Any) -> Any:
    """Lists, which JSON makes of tuples, as these again."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
