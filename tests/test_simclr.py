"""Baselines of FactorCL: numbers of the released code, with labels and without."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch_weights as torch
from helpers import TWO, assert_at_most, assert_close, reference_arrays, relative

from hcl_jax import Hierarchy
from hcl_jax.networks import simclr
from hcl_jax.networks.simclr import SimclrConfig
from hcl_jax.networks.training import Batch, TrainingConfig

KEY = jr.key(0)
DOUBLE = TrainingConfig(dtype="float64", weight_decay=0.0)
PUBLISHED = SimclrConfig(variant="published", n_classes=2, width=8, hidden=(32, 32, 32), head_hidden=(8, 8), training=DOUBLE)
PLACES = {}
for m in range(2):
    PLACES |= torch.perceptron(f"encoder_x{m + 1}", lambda net, m=m: net.backbones[m], 4)
    PLACES |= torch.perceptron(f"projection_x{m + 1}", lambda net, m=m: net.projections[m], 3)

built = jax.jit(simclr.build, static_argnums=(1, 2))


@cache
def released():
    arrays = reference_arrays("deep/supcon_model")
    hierarchy = Hierarchy.shared_and_private([x.shape[1] for x in torch.inputs(arrays)], 4, 1)
    return arrays, torch.load(built(KEY, hierarchy, PUBLISHED), arrays, PLACES)


def test_every_code_of_the_released_code():
    arrays, network = released()
    codes = jax.jit(lambda net: net.codes(torch.inputs(arrays)))(network)
    for m, code in enumerate(codes):
        assert_at_most(relative(code, arrays[f"rep/z{m + 1}"]), 1e-9, f"z{m + 1}")
        assert_at_most(relative(network.projections[m](code), arrays[f"rep/proj{m + 1}"]), 1e-9, f"projection {m + 1}")
    assert_at_most(relative(jnp.concatenate(codes, axis=1), arrays["rep/embedding"]), 1e-9, "embedding")


@pytest.mark.parametrize("positives", ["sample", "label"])
def test_loss_gradients_and_descent_of_the_released_code(positives):
    arrays, network = released()
    config = dataclasses.replace(PUBLISHED, positives=positives)
    y = jnp.asarray(arrays["y"].reshape(-1), jnp.int32)
    value = lambda net, xs: simclr.loss(net, Batch(xs, y), KEY, config)[0]
    torch.check_loss(arrays, network, PLACES, value, "supcon/" if positives == "label" else "simclr/")


def random_batch(n=20):
    rng = np.random.default_rng(0)
    return Batch(tuple(jnp.asarray(rng.standard_normal((n, d))) for d in TWO.dims))


@pytest.mark.parametrize("objective", ["cross-self", "cross-self-heads"])
def test_a_view_and_its_copy_are_compared_by_projections_of_their_own_where_it_says_so(objective):
    config = SimclrConfig(objective=objective, width=4, hidden=(8,), head_hidden=(6,), training=DOUBLE, strength=0.0)
    network, batch = built(KEY, TWO, config), random_batch()
    value, parts = jax.jit(lambda net: simclr.loss(net, batch, KEY, config))(network)
    assert_close(value, parts["cross"] + parts["self"], "sum")
    heads = network.own if objective == "cross-self-heads" else network.projections
    expected = []
    for head, z in zip(heads, network.codes(batch.views), strict=True):
        units = np.tile(np.asarray(head(z)) / np.linalg.norm(head(z), axis=1, keepdims=True), (2, 1))
        odds = np.exp(units @ units.T / 0.1)
        np.fill_diagonal(odds, 0)
        expected.append(np.mean(np.log(odds.sum(axis=1)) - 1 / 0.1))
    assert_close(parts["self"], np.mean(expected), "copies without noise")
