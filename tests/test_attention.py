"""Attention: its definition written out in loops, heads apart, and what it comes to with a single key."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_close

from hcl_jax.networks.attention import TransformerLayer, attention, tokenwise

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape))


def test_attention_is_that_of_every_head_in_loops():
    Q, K, V = normal(3, 4, 6), normal(3, 5, 6), normal(3, 5, 8)
    expected = np.zeros((3, 4, 8))
    for i in range(3):
        for head in range(2):
            q, k, v = (np.asarray(x[i])[:, head * w : (head + 1) * w] for x, w in ((Q, 3), (K, 3), (V, 4)))
            for t in range(4):
                weights = np.exp(k @ q[t] / np.sqrt(3))
                expected[i, t, head * 4 : (head + 1) * 4] = weights @ v / weights.sum()
    assert_close(attention(Q, K, V, 2), expected)


def test_a_layer_is_normalised_twice_and_may_look_elsewhere():
    layer = TransformerLayer(jr.key(0), 6, 10, heads=2, dtype=jnp.float64)
    x, context = normal(3, 4, 6), normal(3, 5, 6)
    linear = lambda module, tokens: np.asarray(tokens) @ np.asarray(module.weight).T + np.asarray(module.bias)

    def norm(tokens):
        centred = tokens - tokens.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)

    for seen in (x, context):
        attended = attention(
            *(jnp.asarray(linear(m, y)) for m, y in ((layer.query, x), (layer.key, seen), (layer.value, seen))), 2
        )
        first = norm(np.asarray(x) + linear(layer.output, attended))
        second = norm(first + linear(layer.second, np.maximum(linear(layer.first, first), 0)))
        assert_close(eqx.filter_jit(layer)(x, seen), second, "layer")
    assert_close(eqx.filter_jit(layer)(x), eqx.filter_jit(layer)(x, x), "itself")


def test_a_single_key_gets_all_attention():
    layer = TransformerLayer(jr.key(0), 6, heads=2, dtype=jnp.float64)
    x, context = normal(3, 4, 6), normal(3, 1, 6)
    Q, K, V = tokenwise(layer.query, x), tokenwise(layer.key, context), tokenwise(layer.value, context)
    assert_close(attention(Q, K, V, 2), np.repeat(np.asarray(V), 4, axis=1))


def test_leaves_are_arrays_and_heads_divide_the_width():
    layer = TransformerLayer(jr.key(0), 6, heads=3)
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(layer))
    assert jax.tree.leaves(jax.jit(lambda key: TransformerLayer(key, 6, heads=3))(jr.key(0)))
    for heads in (0, 4):
        with pytest.raises(ValueError, match="heads"):
            TransformerLayer(jr.key(0), 6, heads=heads)
