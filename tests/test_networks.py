"""One contract for every method that learns a network: what studies, figures and users rely on, whatever is inside."""

import dataclasses
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
from helpers import assert_at_most, relative

from hcl_jax import Hierarchy
from hcl_jax.networks import NETWORKS, NetworkFit, TrainingConfig, configuration, load, training
from hcl_jax.networks.network import NetworkConfig

HIERARCHY = Hierarchy((8, 7, 6), {"123": 2, "12": 1, "13": 1, "23": 1, "1": 1, "2": 1, "3": 1})
TRAINING = TrainingConfig(steps=12, batch_size=32, round_steps=4)


def make_views(n=80, seed=0):
    """Three views of unlike scales with shared factors, and a response."""
    k_latent, k_loadings, k_noise = jr.split(jr.key(seed), 3)
    z = jr.normal(k_latent, (n, HIERARCHY.n_factors))
    loadings = jnp.where(HIERARCHY.mask, jr.normal(jr.key(99), (HIERARCHY.n_features, HIERARCHY.n_factors)), 0)
    x = z @ loadings.T + 0.3 * jr.normal(k_noise, (n, HIERARCHY.n_features)) + 1.0
    views = [scale * x[:, HIERARCHY.rows(m)] for m, scale in zip(HIERARCHY.modalities, (1.0, 20.0, 0.05), strict=True)]
    return views, z[:, 0] + z[:, 5]


VIEWS, Y = make_views()
KEY = jr.key(3)


def config_of(name: str) -> NetworkConfig:
    """The entry's own configuration, on a short training."""
    return dataclasses.replace(configuration(name), training=TRAINING)


def short(name: str, views=VIEWS, **options):
    config = dataclasses.replace(config_of(name), **options.pop("config", {}))
    return NETWORKS[name](views, HIERARCHY, config=config, **{"key": KEY, **options})


@cache
def fitted(name: str) -> NetworkFit:
    return short(name)


TRAINED = [name for name in NETWORKS if isinstance(configuration(name), NetworkConfig)]  # all but hcl-copula
MARKS = {"hcl": [], "misa": [pytest.mark.slow]}
OTHERS = [pytest.mark.slow, pytest.mark.long]  # a network takes a minute or two, nearly all of it compilation


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, OTHERS)) for name in TRAINED])
def name(request):
    return request.param


def test_scores_have_a_column_for_each_of_the_membership(name):
    scores = fitted(name).transform(VIEWS)
    assert scores.shape == (80, fitted(name).membership.shape[1])
    assert fitted(name).membership.shape[0] == 3
    assert fitted(name).membership.any(axis=0).all()
    assert bool(jnp.isfinite(scores).all())
    assert scores.dtype == VIEWS[0].dtype
    assert int(fitted(name).status) == 0


def test_scores_of_a_row_do_not_depend_on_its_company(name):
    new, _ = make_views(n=6, seed=5)
    together = fitted(name).transform(new)
    alone = jnp.concatenate([fitted(name).transform([view[i : i + 1] for view in new]) for i in range(6)])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)  # float32: products of one row and of six round unlike


def test_rows_that_lack_a_view_have_scores_of_the_others(name):
    there = np.ones((80, 3), bool)
    there[:5, 1] = False
    scores = fitted(name).transform(VIEWS, there)
    as_nan = [view.at[:5].set(jnp.nan) if m == 1 else view for m, view in enumerate(VIEWS)]
    np.testing.assert_array_equal(scores, fitted(name).transform(as_nan))
    assert bool(jnp.isfinite(scores).all())
    np.testing.assert_allclose(scores[5:], fitted(name).transform(VIEWS)[5:], rtol=1e-4, atol=1e-5)
    other = [view.at[:5].add(3.0) if m == 1 else view for m, view in enumerate(VIEWS)]
    np.testing.assert_array_equal(scores, fitted(name).transform(other, there))  # whatever stands in the absent view


def test_the_same_key_gives_the_same_bits_and_another_one_others(name):
    again, other = short(name), short(name, key=jr.key(4))
    for one, two in zip(jax.tree.leaves(fitted(name)), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert relative(other.transform(VIEWS), fitted(name).transform(VIEWS)) > 1e-3


@pytest.mark.slow
def test_batched_over_keys_it_is_what_single_runs_are(name):
    keys = jr.split(jr.key(7), 2)
    batched = jax.vmap(lambda key: short(name, key=key).transform(VIEWS))(keys)
    for key, scores in zip(keys, batched, strict=True):
        single = short(name, key=key).transform(VIEWS)
        signs = jnp.where(jnp.sum(scores * single, axis=0) < 0, -1.0, 1.0)  # those of eigenvectors are the solver's
        scores = scores * signs[None, :]
        # networks are float32, and twelve steps of Adam spread roundings: .0005 to .007 was seen, of another key .11
        assert_at_most(relative(scores, single), 0.02, f"{name}, batched beside single")


def test_a_loss_that_is_not_finite_is_status_2_with_finite_parameters(name):
    steep = dataclasses.replace(TRAINING, learning_rate=1e30, weight_decay=0.0)
    found = short(name, config={"training": steep})
    assert int(found.status) == 2
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(eqx.filter(found.network, eqx.is_inexact_array)))
    assert bool(jnp.isfinite(found.transform(VIEWS)).all())


@pytest.mark.slow
def test_the_best_round_is_kept(name):
    found = fitted(name)
    held_out = np.asarray(found.history["held_out"])
    assert np.isfinite(held_out).all()
    assert int(found.steps) == TRAINING.steps
    none = short(name, config={"training": dataclasses.replace(TRAINING, steps=0)})
    np.testing.assert_allclose(none.history["held_out"][0], held_out[0], rtol=1e-5)
    if np.argmin(held_out) == 0:
        np.testing.assert_allclose(none.transform(VIEWS), found.transform(VIEWS), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("supervision", ["joint", "tuned"])
def test_a_response_is_learned(name, supervision):
    longer = dataclasses.replace(TRAINING, steps=150, round_steps=25, learning_rate=1e-2)
    found = short(name, y=Y, config={"supervision": supervision, "training": longer})
    error = jnp.mean((found.predict(VIEWS) - Y) ** 2) / jnp.var(Y)
    assert_at_most(error, 0.6, f"{name}, {supervision}: mean squared error over the variance, on training rows")


@pytest.mark.slow
def test_classes_have_probabilities(name):
    labels = (Y > 0).astype(jnp.int32)
    found = short(name, y=labels, config={"n_classes": 2})
    probabilities = found.predict(VIEWS)
    assert probabilities.shape == (80, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.slow
def test_saved_and_loaded_it_gives_the_same_bits(name, tmp_path):
    path = tmp_path / "fit.npz"
    fitted(name).save(path)
    found = load(path)
    assert jax.tree.structure(found) == jax.tree.structure(fitted(name))
    for one, two in zip(jax.tree.leaves(fitted(name)), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(found.transform(VIEWS), fitted(name).transform(VIEWS))


def test_an_interrupted_run_goes_on_to_the_same_bits(name, tmp_path):
    path = tmp_path / "checkpoint"

    class Interrupt(Exception):
        pass

    whole, replace = short(name), training.Path.replace

    def stop_after_the_first(self, target):
        replace(self, target)
        raise Interrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training.Path, "replace", stop_after_the_first)
        patched.setattr(training, "PIECE", 1)
        with pytest.raises(Interrupt):
            short(name, checkpoint=path)
    assert path.exists()
    resumed = short(name, checkpoint=path)
    assert not path.exists()
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.fixture
def as_users_call():
    """Without the run-time checks of types in signatures that other tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"inputs": "ranks"}, "inputs"),
        ({"supervision": "late"}, "supervision"),
        ({"task_weight": -1.0}, "task_weight"),
        ({"n_classes": 1}, "n_classes"),
    ],
)
def test_bad_options_are_named(name, bad, word):
    with pytest.raises(ValueError, match=rf"{word}.*expected"):
        dataclasses.replace(config_of(name), **bad)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"steps": -1}, "steps"),
        ({"batch_size": 1}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"schedule": "linear"}, "schedule"),
        ({"held_out": 1.0}, "held_out"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_bad_trainings_are_named(bad, word):
    with pytest.raises(ValueError, match=rf"{word}.*expected"):
        TrainingConfig(**bad)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"views": VIEWS[:2]}, "views"),
        ({"views": [*VIEWS[:2], VIEWS[2][:, :3]]}, "views"),
        ({"key": 0}, "key"),
        ({"y": Y[:-1]}, "y"),
        ({"config": 3}, "config"),
        ({"config": TRAINING}, "config"),
    ],
)
def test_bad_arguments_are_named(name, change, word):
    arguments = {"views": VIEWS, "config": config_of(name), "key": KEY} | change
    with pytest.raises(ValueError, match=rf"{word}.*expected"):
        NETWORKS[name](arguments.pop("views"), HIERARCHY, **arguments)


@pytest.mark.slow
def test_other_numbers_in_a_configuration_find_the_same_programs(caplog):
    short("hcl")
    with jax.log_compiles(), caplog.at_level("WARNING"):
        short("hcl", config={"temperature": 0.5, "training": dataclasses.replace(TRAINING, learning_rate=2e-3)})
    assert not [line for line in caplog.messages if "Compiling" in line]
