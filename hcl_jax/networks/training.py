"""The one training loop: a loss, rows on the device, a frozen configuration; one compiled program.

Rounds of minibatch steps run in a `while_loop`, the steps of a round in a `scan`. After every round the loss on held-out rows
decides whether the best parameters are replaced, and whether to go on. Optimiser and schedule are optax's.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
from tqdm import tqdm

from hcl_jax.compiled import compiled
from hcl_jax.networks.modules import Constant
from hcl_jax.structure import CONVERGED, NON_FINITE, OUT_OF_STEPS
from hcl_jax.views import check_options

PIECE = 5
"""Rounds between two signs of progress, and two checkpoints."""


class Batch(NamedTuple):
    """Rows of every standardised view, and their responses or classes where the method sees them."""

    views: tuple[Float[Array, "n _d"], ...]
    y: Array | None = None
    elapsed: Float[Array, ""] | None = None
    """Share of the steps that are over, for losses that change on the way; None: all of them."""

    @property
    def n_rows(self) -> int:
        return int(self.views[0].shape[0])

    def of_rows(self, rows: Int[Array, "*m"]) -> "Batch":
        return jax.tree.map(lambda leaf: leaf[rows], self._replace(elapsed=None))


Loss = Callable[[Any, Batch, Key[Array, ""], Any], tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]
"""(model, batch, key, configuration) -> (the loss, its parts by name). A function of a module: programs are found by it."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a network is trained: AdamW on minibatches, early stopping on held-out rows.

    steps: at most. batch_size: rows a step, or all training rows where there are fewer.
    learning_rate: of the first step; the cosine schedule takes it to 0 at the last one, the constant one keeps it.
    weight_decay: of AdamW. clip: the largest norm of a gradient.
    held_out: the share of the rows that early stopping is decided on; 0 decides on the training rows.
    round_steps: steps between two looks at these rows, rounded up to whole epochs.
    patience: rounds without a better held-out loss until it stops.
    keep: the parameters of the round with the "best" held-out loss, or the "last" ones: where critics are at play, the loss is
    also best where these lag behind.
    dtype: precision of parameters and rows.
    """

    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float = 10.0
    held_out: float = field(default=0.1, metadata={"static": True})
    round_steps: int = 50
    patience: int = 10
    keep: Literal["best", "last"] = "best"
    dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        check_options(
            self,
            choices={"schedule": ("cosine", "constant"), "keep": ("best", "last"), "dtype": ("float32", "float64")},
            positive=("learning_rate", "clip"),
            least={"steps": 0, "batch_size": 2, "round_steps": 1, "patience": 1, "weight_decay": 0},
        )
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: is {self.held_out}; expected a share from 0 to below 1")


Config = Any
"""A frozen dataclass with a field `training`; with critics also `critic_steps` and `critic_speed`; where the loss changes on the
way `settled`, the share of the steps after which it no longer does."""


@dataclass(frozen=True)
class Critics:
    """Parameters that descend a loss of their own, and that the steps of all others leave as they are.

    Each step is followed by `critic_steps` of these, on batches of their own, at `critic_speed` times the learning rate.
    """

    of: Callable[[Any], Any]
    """model -> the part of it that holds them. A function of a module, as the loss."""
    loss: Loss


def split_numbers(config: Config) -> tuple[Config, dict[str, np.ndarray]]:
    """(the configuration with 0 for its numbers, these by path): numbers that change no shape are traced, so that a search over
    them compiles nothing anew."""
    blank: dict[str, Any] = {}
    numbers: dict[str, np.ndarray] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            inner, found = split_numbers(value)
            blank[item.name] = inner
            numbers |= {f"{item.name}.{path}": number for path, number in found.items()}
        elif isinstance(value, float) and not item.metadata.get("static"):
            numbers[item.name] = np.asarray(value)
    return _replaced(config, blank | dict.fromkeys((path for path in numbers if "." not in path), 0.0)), numbers


def join_numbers(config: Config, numbers: dict[str, Any], dtype: Any) -> Config:
    """The configuration with these numbers, in that precision."""
    own = {path: jnp.asarray(number, dtype) for path, number in numbers.items() if "." not in path}
    for name in {path.partition(".")[0] for path in numbers if "." in path}:
        inner = {path.partition(".")[2]: number for path, number in numbers.items() if path.startswith(f"{name}.")}
        own[name] = join_numbers(getattr(config, name), inner, dtype)
    return _replaced(config, own)


def _replaced(config: Config, values: dict[str, Any]) -> Config:
    """`dataclasses.replace` without the checks of the values, which may be tracers or left out."""
    copy = object.__new__(type(config))
    for item in dataclasses.fields(config):
        object.__setattr__(copy, item.name, values.get(item.name, getattr(config, item.name)))
    return copy


class TrainState(eqx.Module):
    """Where a training stands."""

    model: PyTree
    optimiser: PyTree
    best: PyTree
    best_loss: Float[Array, ""]
    best_round: Int[Array, ""]
    round: Int[Array, ""]
    finite: Bool[Array, ""]
    history: dict[str, Float[Array, " rounds"]]


class Plan(NamedTuple):
    """How the steps fall into rounds, for so many training rows."""

    batch: int
    epochs: int
    steps_per_epoch: int
    rounds: int

    @classmethod
    def of(cls, config: TrainingConfig, n_rows: int) -> "Plan":
        batch = min(config.batch_size, n_rows)
        per_epoch = n_rows // batch
        epochs = -(-config.round_steps // per_epoch)
        return cls(batch, epochs, per_epoch, -(-config.steps // (epochs * per_epoch)))

    @property
    def steps_per_round(self) -> int:
        return self.epochs * self.steps_per_epoch


def held_out_rows(n_rows: int, share: float) -> int:
    """How many of the rows are held out: at least one, and not all, unless the share is 0."""
    return min(max(1, round(n_rows * share)), n_rows - 1) if share > 0 else 0


def _optimisers(config: Config, critics: Critics | None, n_steps: int) -> tuple[optax.GradientTransformation, ...]:
    """One a group of parameters: those of the loss, and those of the critics."""
    own = _optimiser(config.training, config.training.learning_rate, n_steps)
    if critics is None:
        return (own,)
    speed = config.critic_speed * config.training.learning_rate
    return own, _optimiser(config.training, speed, n_steps * config.critic_steps)


def _optimiser(config: TrainingConfig, rate: Any, n_steps: int) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(rate, max(n_steps, 1)) if config.schedule == "cosine" else rate
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(schedule, weight_decay=config.weight_decay))


def _groups(model: PyTree, critics: Critics | None) -> tuple[tuple[Array, ...], Callable[[tuple[Array, ...]], PyTree]]:
    """(the trained parameters of each group as one vector, how these become the model again): the optimiser is then one small
    program, whatever the network."""
    is_constant = lambda node: isinstance(node, Constant)
    trained = lambda node: not is_constant(node) and eqx.is_inexact_array(node)
    weights, static = eqx.partition(model, jax.tree.map(trained, model, is_leaf=is_constant))
    trees = [weights]
    if critics is not None:
        none = jax.tree.map(lambda _: False, weights)
        theirs = eqx.tree_at(critics.of, none, jax.tree.map(lambda _: True, critics.of(none)))
        trees = list(eqx.partition(weights, theirs)[::-1])
    vectors, unravel = zip(*map(ravel_pytree, trees), strict=True)

    def model_of(vectors: tuple[Array, ...]) -> PyTree:
        return eqx.combine(*(back(vector) for back, vector in zip(unravel, vectors, strict=True)), static)

    return vectors, model_of


def _descend(
    optimiser: optax.GradientTransformation,
    objective: Callable[[Array], tuple[Array, Any]],
    params: Array,
    state: PyTree,
    finite: Array,
) -> tuple[tuple[Array, PyTree, Array], Float[Array, ""]]:
    """((parameters, state of the optimiser, whether all is finite) after one step, and as before where it is not; the loss)."""
    (value, _), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    updates, moved = optimiser.update(gradient, state, params)
    new = optax.apply_updates(params, updates)
    finite = finite & jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(new))
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (new, moved), (params, state))
    return (*kept, finite), value


Moving = tuple[tuple[Array, ...], tuple[PyTree, ...], Array]
"""(Parameters, states of the optimisers, both by group; whether all is finite)."""


def make_step(
    loss: Loss, critics: Critics | None, config: Config, model: PyTree, n_steps: int
) -> tuple[Moving, Callable[[Moving, Any], tuple[Moving, Array]], Callable[[tuple[Array, ...]], PyTree]]:
    """(where the model stands, what one step of n_steps makes of that, parameters -> model).

    A step takes (batch, key, and with critics those of each of their steps, one below the other) and returns the loss as well.
    """
    params, model_of = _groups(model, critics)
    optimisers = _optimisers(config, critics, n_steps)

    def step(moving: Moving, item: tuple[Batch, Array, Any]) -> tuple[Moving, Array]:
        params, states, finite = moving
        batch, key, theirs = item
        objective = lambda own: loss(model_of((own, *params[1:])), batch, key, config)
        (own, state, finite), value = _descend(optimisers[0], objective, params[0], states[0], finite)
        if critics is None:
            return ((own,), (state,), finite), value

        def follow(moving: tuple, item: tuple[Batch, Array]) -> tuple[tuple, Array]:
            objective = lambda inner: critics.loss(model_of((own, inner)), *item, config)
            return _descend(optimisers[1], objective, *moving)

        (inner, inner_state, finite), _ = lax.scan(follow, (params[1], states[1], finite), theirs)
        return ((own, inner), (state, inner_state), finite), value

    states = tuple(optimiser.init(vector) for optimiser, vector in zip(optimisers, params, strict=True))
    return (params, states, jnp.ones((), bool)), step, model_of


def held_out_loss(
    loss: Loss, model: PyTree, held: Batch, size: int, key: Key[Array, ""], config: Config, elapsed: Array | None = None
) -> tuple[Array, dict]:
    """(the mean loss, its parts) over the held-out rows, in batches of one size; what is left over is not used."""
    size = min(size, held.n_rows)
    batches = jax.tree.map(lambda leaf: leaf[: held.n_rows // size * size].reshape(-1, size, *leaf.shape[1:]), held)
    value, parts = lax.map(lambda batch: loss(model, batch._replace(elapsed=elapsed), key, config), batches)
    return value.mean(), jax.tree.map(jnp.mean, parts)


def _start(
    loss: Loss, critics: Critics | None, config: Config, model: PyTree, train: Batch, held: Batch, key: Key[Array, ""]
) -> TrainState:
    plan = Plan.of(config.training, train.n_rows)
    begun = jnp.zeros((), config.training.dtype)
    value, parts = held_out_loss(loss, model, held, plan.batch, jr.fold_in(key, 0), config, begun)
    measured = {"train": jnp.full_like(value, jnp.nan), "held_out": value, **parts}
    history = {name: jnp.full((plan.rounds + 1,), jnp.nan, x.dtype).at[0].set(x) for name, x in measured.items()}
    zero = jnp.zeros((), jnp.int32)
    (_, optimisers, _), _, _ = make_step(loss, critics, config, model, plan.rounds * plan.steps_per_round)
    return TrainState(model, optimisers, model, value, zero, zero, jnp.isfinite(value), history)


def _round(
    loss: Loss,
    critics: Critics | None,
    config: Config,
    state: TrainState,
    train: Batch,
    held: Batch,
    key: Key[Array, ""],
    plan: Plan,
) -> TrainState:
    """All steps of one round, then a look at the held-out rows."""
    (params, _, _), step, model_of = make_step(loss, critics, config, state.model, plan.rounds * plan.steps_per_round)
    k_order, k_steps = jr.split(jr.fold_in(key, state.round + 1))
    used = plan.steps_per_epoch * plan.batch

    def orders(key: Array, epochs: int) -> Int[Array, "steps batch"]:
        shuffled = jax.vmap(lambda k: jr.permutation(k, train.n_rows)[:used])(jr.split(key, epochs))
        return shuffled.reshape(-1, plan.batch)

    def of_rows(moving: Moving, item: tuple[Array, Array, Any, Array]) -> tuple[Moving, Array]:
        rows, k, theirs, elapsed = item
        if critics is not None:
            theirs = (train.of_rows(theirs[0]), theirs[1])
        return step(moving, (train.of_rows(rows)._replace(elapsed=elapsed), k, theirs))

    theirs = None
    if critics is not None:
        shape = (plan.steps_per_round, config.critic_steps)
        k_theirs, k_batches = jr.split(jr.fold_in(k_steps, plan.steps_per_round))
        theirs = (orders(k_theirs, plan.epochs * config.critic_steps).reshape(*shape, -1), jr.split(k_batches, shape))
    at, dtype = state.round + 1, jnp.dtype(config.training.dtype)
    elapsed = (state.round + jnp.arange(plan.steps_per_round, dtype=dtype) / plan.steps_per_round) / plan.rounds
    steps = (orders(k_order, plan.epochs), jr.split(k_steps, plan.steps_per_round), theirs, elapsed)
    (params, optimisers, finite), values = lax.scan(of_rows, (params, state.optimiser, state.finite), steps)
    model = model_of(params)
    share = at.astype(dtype) / plan.rounds
    value, parts = held_out_loss(loss, model, held, plan.batch, jr.fold_in(key, 0), config, share)
    finite = finite & jnp.isfinite(value)
    unsettled = share <= getattr(config, "settled", 0.0)  # losses of then and of later are not of one measure
    better = finite & ((value < state.best_loss) | unsettled)
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), model, state.best)
    measured = {"train": values.mean(), "held_out": value, **parts}
    history = {name: state.history[name].at[at].set(x) for name, x in measured.items()}
    best_loss, best_round = jnp.where(better, value, state.best_loss), jnp.where(better, at, state.best_round)
    return TrainState(model, optimisers, best, best_loss, best_round, at, finite, history)


def _goes_on(state: TrainState, config: Config, plan: Plan) -> Bool[Array, ""]:
    patient = state.round - state.best_round < config.training.patience
    return state.finite & patient & (state.round < plan.rounds)


def _advance(
    loss: Loss,
    critics: Critics | None,
    config: Config,
    state: TrainState,
    train: Batch,
    held: Batch,
    key: Key[Array, ""],
    until: Int[Array, ""],
) -> TrainState:
    """Rounds up to that number, or to the end."""
    plan = Plan.of(config.training, train.n_rows)
    arrays, static = eqx.partition(state, eqx.is_array)

    def goes_on(arrays):
        state = eqx.combine(arrays, static)
        return _goes_on(state, config, plan) & (state.round < until)

    def run(arrays):
        state = _round(loss, critics, config, eqx.combine(arrays, static), train, held, key, plan)
        return eqx.filter(state, eqx.is_array)

    return eqx.combine(lax.while_loop(goes_on, run, arrays), static)


@compiled
def _start_program(
    loss: Loss, critics: Critics | None, config: Config, numbers: dict, model: PyTree, train: Batch, held: Batch, key: Array
) -> TrainState:
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies numbers of unlike types
        return _start(loss, critics, join_numbers(config, numbers, config.training.dtype), model, train, held, key)


@compiled(runs_long=True)
def _advance_program(
    loss: Loss,
    critics: Critics | None,
    config: Config,
    numbers: dict,
    state: TrainState,
    train: Batch,
    held: Batch,
    key: Array,
    until: Array,
) -> TrainState:
    with jax.numpy_dtype_promotion("standard"):
        return _advance(loss, critics, join_numbers(config, numbers, config.training.dtype), state, train, held, key, until)


class Trained(NamedTuple):
    """The parameters that are kept, and how it went: `status` 0 at its end or stopped by patience, 1 still improving when the
    steps ran out at a constant learning rate, 2 not finite (what was kept until then is)."""

    model: PyTree
    loss: Float[Array, ""]
    """Of the held-out rows, the least."""
    status: Int[Array, ""]
    steps: Int[Array, ""]
    history: dict[str, Float[Array, " rounds"]]


def train_network(
    loss: Loss,
    config: Config,
    numbers: dict[str, Any],
    model: PyTree,
    train: Batch,
    held: Batch,
    key: Key[Array, ""],
    *,
    critics: Critics | None = None,
    progress: bool = False,
    checkpoint: Path | None = None,
) -> Trained:
    """Train, by programs that are compiled once for these shapes; `critics` take turns with the other parameters.

    Outside of compiled code it can show its `progress`, and keep a `checkpoint` after every few rounds: where one lies,
    training goes on from there, to the bits of a run that was never interrupted. The file is removed at the end.
    """
    plan = Plan.of(config.training, train.n_rows)
    state = _start_program(loss, critics, config, numbers, model, train, held, key)
    advance = lambda state, until: _advance_program(
        loss, critics, config, numbers, state, train, held, key, jnp.asarray(until, jnp.int32)
    )
    if not progress and checkpoint is None:
        state = advance(state, plan.rounds)
    else:
        state = _in_pieces(advance, state, plan, config, progress, checkpoint)
    ended_early = (state.round >= plan.rounds) & (state.best_round == state.round) & (plan.rounds > 0)
    improving = ended_early & (config.training.schedule == "constant")
    status = jnp.where(state.finite, jnp.where(improving, OUT_OF_STEPS, CONVERGED), NON_FINITE).astype(jnp.int32)
    kept = state.best if config.training.keep == "best" else state.model
    return Trained(kept, state.best_loss, status, state.round * plan.steps_per_round, state.history)


def _in_pieces(
    advance: Callable[[TrainState, int], TrainState],
    state: TrainState,
    plan: Plan,
    config: Config,
    progress: bool,
    checkpoint: Path | None,
) -> TrainState:
    if checkpoint is not None and checkpoint.exists():
        with checkpoint.open("rb") as file:
            state = eqx.tree_deserialise_leaves(file, state)
    with tqdm(total=plan.rounds, initial=int(state.round), unit="round", disable=not progress) as bar:
        while bool(_goes_on(state, config, plan)):
            state = advance(state, int(state.round) + PIECE)
            if checkpoint is not None:
                temporary = checkpoint.with_name(checkpoint.name + ".tmp")
                with temporary.open("wb") as file:
                    eqx.tree_serialise_leaves(file, state)
                temporary.replace(checkpoint)
            bar.set_postfix(held_out=f"{float(state.best_loss):.4g}", refresh=False)
            bar.update(int(state.round) - bar.n)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return state
