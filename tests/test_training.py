"""The training loop, on losses whose minimum is known."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from hcl_jax.networks.modules import Constant
from hcl_jax.networks.training import Batch, Critics, Plan, TrainingConfig, join_numbers, split_numbers, train_network
from hcl_jax.structure import CONVERGED, NON_FINITE, OUT_OF_STEPS

K_X, K_NOISE, K_HELD = jr.split(jr.key(0), 3)
COEFFICIENTS = jnp.array([1.0, -2.0, 0.5])


@dataclass(frozen=True)
class Config:
    """A weight beside the training's own options."""

    training: TrainingConfig = TrainingConfig(steps=400, batch_size=50, learning_rate=0.05, weight_decay=0.0, dtype="float64")
    weight: float = 1.0
    size: int = 3


class Line(NamedTuple):
    slope: jax.Array


def squares(model, batch, key, config):
    error = jnp.mean((batch.views[0] @ model.slope - batch.y) ** 2)
    return config.weight * error, {"error": error}


def not_finite_from_the_third_look(model, batch, key, config):
    """Finite as long as the slope has not gone half the way."""
    value, parts = squares(model, batch, key, config)
    return jnp.where(model.slope[0] > 0.5, jnp.nan, value), parts


def rows(key, n=500, noise=0.1):
    k_x, k_noise = jr.split(key)
    x = jr.normal(k_x, (n, 3))
    return Batch((x,), x @ COEFFICIENTS + noise * jr.normal(k_noise, (n,)))


TRAIN, HELD = rows(K_X), rows(K_HELD, 100)
ZERO = Line(jnp.zeros(3))


def train(config=Config(), loss=squares, model=ZERO, **options):
    return train_network(loss, *split_numbers(config), model, TRAIN, HELD, jr.key(1), **options)


def test_it_reaches_the_least_squares_solution():
    found = train()
    exact = jnp.linalg.lstsq(TRAIN.views[0], TRAIN.y)[0]
    np.testing.assert_allclose(found.model.slope, exact, atol=2e-3)  # minibatches of 50: held-out rows choose the round
    assert int(found.status) == CONVERGED
    assert float(found.history["held_out"][-1]) < 0.013  # noise 0.01
    assert found.history["error"].shape == found.history["train"].shape


def test_the_start_is_kept_where_training_makes_it_worse():
    exact = Line(jnp.linalg.lstsq(HELD.views[0], HELD.y)[0])  # no slope is better on the held-out rows
    found = train(model=exact)
    np.testing.assert_array_equal(found.model.slope, exact.slope)


def test_the_last_parameters_are_kept_where_they_are_asked_for():
    exact = Line(jnp.linalg.lstsq(HELD.views[0], HELD.y)[0])
    config = Config()
    found = train(dataclasses.replace(config, training=dataclasses.replace(config.training, keep="last")), model=exact)
    assert float(jnp.abs(found.model.slope - exact.slope).max()) > 0
    value, _ = squares(found.model, HELD, jr.key(0), config)
    history = np.asarray(found.history["held_out"])
    np.testing.assert_allclose(value, history[np.isfinite(history)][-1], rtol=0.1)  # batches leave some held-out rows out


def test_patience_ends_it_early():
    exact = Line(jnp.linalg.lstsq(HELD.views[0], HELD.y)[0])
    config = Config()
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, patience=2, round_steps=10))
    assert int(train(config, model=exact).steps) == 2 * Plan.of(config.training, 500).steps_per_round


def test_still_improving_at_a_constant_rate_is_out_of_steps():
    config = Config()
    slow = dataclasses.replace(config.training, steps=20, learning_rate=1e-3, schedule="constant")
    assert int(train(dataclasses.replace(config, training=slow)).status) == OUT_OF_STEPS
    assert int(train(dataclasses.replace(config, training=dataclasses.replace(slow, schedule="cosine"))).status) == CONVERGED


def test_the_last_finite_parameters_are_kept():
    found = train(loss=not_finite_from_the_third_look)
    assert int(found.status) == NON_FINITE
    assert bool(jnp.isfinite(found.model.slope).all())
    assert float(found.model.slope[0]) <= 0.5


def test_zero_steps_leave_the_start():
    config = Config()
    found = train(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=0)))
    np.testing.assert_array_equal(found.model.slope, 0)
    assert int(found.steps) == 0


def test_numbers_are_traced_and_what_changes_shapes_is_not():
    static, numbers = split_numbers(Config())
    names = {"weight", "training.learning_rate", "training.weight_decay", "training.clip"}
    assert set(numbers) == names
    other, _ = split_numbers(Config(weight=2.0))
    assert static == other
    assert hash(static) == hash(other)
    assert static.training.held_out == 0.1
    joined = join_numbers(static, numbers, "float64")
    assert float(joined.training.learning_rate) == 0.05
    assert joined.size == 3


def test_a_batch_of_weights_is_one_program():
    static, numbers = split_numbers(Config())

    def slope(weight):
        return train_network(squares, static, numbers | {"weight": weight}, ZERO, TRAIN, HELD, jr.key(1)).model.slope

    both = jax.vmap(slope)(jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(both[0], train().model.slope, rtol=1e-6)


@pytest.mark.parametrize("n_rows", [10, 49, 50, 51, 1000])
def test_rounds_are_whole_epochs(n_rows):
    plan = Plan.of(TrainingConfig(batch_size=50, steps=300, round_steps=30), n_rows)
    assert plan.batch == min(50, n_rows)
    assert plan.steps_per_epoch == n_rows // plan.batch
    assert plan.steps_per_round % plan.steps_per_epoch == 0
    assert plan.rounds * plan.steps_per_round >= 300
    assert (plan.rounds - 1) * plan.steps_per_round < 300


def test_progress_shows_the_held_out_loss(capsys):
    found = train(progress=True)
    assert "held_out" in capsys.readouterr().err
    np.testing.assert_array_equal(found.model.slope, train().model.slope)


class Pair(NamedTuple):
    """A line, and another one that is to follow it."""

    line: Line
    follower: Line
    held: Constant


@dataclass(frozen=True)
class Alternating(Config):
    critic_speed: float = 2.0
    critic_steps: int = 3


def of_both(model, batch, key, config):
    """Would pull the follower and the constant to 0, were they not left alone: Adam's steps are as long for small gradients."""
    value, parts = squares(model.line, batch, key, config)
    return value + 1e-6 * (jnp.sum(model.follower.slope**2) + jnp.sum(model.held.value**2)), parts


def distance(model, batch, key, config):
    """Would pull the line to the follower, were it not left alone."""
    return jnp.sum((model.follower.slope - model.line.slope) ** 2), {}


def no_pull(model, batch, key, config):
    return jnp.sum(model.follower.slope * 0), {}


FOLLOWER = Critics(lambda model: model.follower, distance)
BOTH = Pair(ZERO, Line(jnp.ones(3)), Constant(jnp.full(2, 5.0)))


def test_critics_take_turns_with_the_rest():
    found = train(Alternating(), of_both, BOTH, critics=FOLLOWER)
    exact = jnp.linalg.lstsq(TRAIN.views[0], TRAIN.y)[0]
    np.testing.assert_allclose(found.model.line.slope, exact, atol=5e-3)
    np.testing.assert_allclose(found.model.follower.slope, found.model.line.slope, atol=1e-2)
    np.testing.assert_array_equal(found.model.held.value, 5.0)  # constants are not trained, nor decayed


def test_what_critics_do_leaves_the_bits_of_the_rest():
    config = Alternating(training=dataclasses.replace(Config().training, held_out=0.0, weight_decay=0.1))
    with_pull, without = (train(config, of_line_alone, BOTH, critics=Critics(FOLLOWER.of, loss)) for loss in (distance, no_pull))
    np.testing.assert_array_equal(with_pull.model.line.slope, without.model.line.slope)
    assert float(jnp.abs(with_pull.model.follower.slope - without.model.follower.slope).max()) > 0.1


def of_line_alone(model, batch, key, config):
    return squares(model.line, batch, key, config)
