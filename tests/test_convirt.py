"""ConVIRT: the numbers of the released code at three settings, the loss where it is known, and that training finds what views share."""

from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch_weights as torch
from helpers import SHARED, TWO, assert_at_least, assert_at_most, assert_close, reference_arrays, relative

from hcl_jax import Hierarchy
from hcl_jax.networks import convirt
from hcl_jax.networks.convirt import ConvirtConfig
from hcl_jax.networks.training import Batch, TrainingConfig

DOUBLE = TrainingConfig(dtype="float64")
THREE = Hierarchy.full((12, 10, 8), 1)
KEY = jr.key(0)
PLACES = {}
for m in range(3):
    PLACES |= torch.perceptron(f"structure_encoders.{m}.net", lambda net, m=m: net.encoders[m], 3)
TAGS = {"": "port", "tau1_lam1/": "trained", "tau0.1_lam0.75/": "paper"}
VARIANTS = ("default", "paper", "port", "trained")

built = jax.jit(convirt.build, static_argnums=(1, 2))


@cache
def released(variant="port"):
    """(stored arrays, our network with the stored weights, its configuration)."""
    arrays = reference_arrays("deep/convirt")
    hierarchy = Hierarchy.shared_and_private([x.shape[1] for x in torch.inputs(arrays)], 4, 1)
    config = ConvirtConfig(variant=variant, training=DOUBLE)
    return arrays, torch.load(built(KEY, hierarchy, config), arrays, PLACES), config


def total(config, network, views):
    return convirt.loss(network, Batch(views), KEY, config)[0]


def test_every_representation_and_the_derivative_of_all_of_them():
    arrays, network, _ = released()
    views = torch.inputs(arrays)
    for m, code in enumerate(jax.jit(lambda xs: network.codes(xs))(views), start=1):
        assert_at_most(relative(code, arrays[f"rep/z{m}"]), 1e-9, f"z{m}")
    fused, pulled_back = jax.vjp(jax.jit(lambda xs: network.scores(xs)), views)
    assert_at_most(relative(fused, arrays["fused"]), 1e-9, "fused")
    for m, gradient in enumerate(pulled_back(jnp.asarray(arrays["fuse/cot"], float))[0], start=1):
        assert_at_most(relative(gradient, arrays[f"fuse/grad/x{m}"]), 1e-9, f"gradient by view {m}")


@pytest.mark.parametrize(("tag", "variant"), TAGS.items())
def test_loss_gradients_and_descent(tag, variant):
    arrays, network, config = released(variant)
    _, parts = jax.jit(lambda xs: convirt.loss(network, Batch(xs), KEY, config))(torch.inputs(arrays))
    for ours, theirs in (("12", "AB"), ("13", "AC"), ("23", "BC")):
        assert_at_most(relative(parts[ours], arrays[f"{tag}loss/{theirs}"]), 1e-9, f"{tag}pair {ours}")
    torch.check_loss(arrays, network, PLACES, lambda net, xs: total(config, net, xs), tag)
