"""Random weights of a whole network in one draw."""

from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

Model = TypeVar("Model", bound=eqx.Module)


def _linear_layers(network: eqx.Module) -> list[eqx.nn.Linear]:
    nodes = jax.tree.leaves(network, is_leaf=lambda node: isinstance(node, eqx.nn.Linear))
    return [node for node in nodes if isinstance(node, eqx.nn.Linear)]


def redrawn(key: Key[Array, ""], network: Model) -> Model:
    """The network with new weights and biases of all linear layers: uniform within ±1/√fan-in, as equinox draws them.

    A network of sixty layers takes 25 s to compile with a draw for each array, and 2 s with one for all: the draws of the layers'
    constructors, which nothing depends on any more, are left out of the program.
    """
    layers = _linear_layers(network)
    limits = np.concatenate([np.repeat(1 / np.sqrt(layer.in_features), layer.weight.size + layer.out_features) for layer in layers])
    drawn = jr.uniform(key, limits.shape, layers[0].weight.dtype, -1, 1) * jnp.asarray(limits, layers[0].weight.dtype)
    arrays = [array for layer in layers for array in (layer.weight, layer.bias)]
    pieces = jnp.split(drawn, np.cumsum([array.size for array in arrays])[:-1])
    new = [piece.reshape(array.shape) for piece, array in zip(pieces, arrays, strict=True)]
    return eqx.tree_at(lambda n: [a for layer in _linear_layers(n) for a in (layer.weight, layer.bias)], network, new)
