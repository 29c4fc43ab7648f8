"""Encoders and decoders that several methods share.

Linear layers and norms are equinox's. Its perceptrons and attention keep functions and Python numbers among their leaves, which
cannot leave a compiled program; ours keep them out of the tree.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

Rows = Float[Array, "n _p"]


def rowwise(module: Callable[[Array], Array], rows: Float[Array, "n _p"]) -> Float[Array, "n _q"]:
    """A module of equinox, which takes one row, on all rows."""
    return jax.vmap(module)(rows)


class Perceptron(eqx.Module):
    """Linear layers from each width to the next, the activation between them and none at the end."""

    layers: tuple[eqx.nn.Linear, ...]
    activation: Callable[[Array], Array] = eqx.field(static=True)

    def __init__(
        self,
        key: Key[Array, ""],
        widths: Sequence[int],
        activation: Callable[[Array], Array] = jax.nn.relu,
        dtype: DTypeLike = jnp.float32,
    ):
        keys = jr.split(key, len(widths) - 1)
        shapes = zip(keys, widths[:-1], widths[1:], strict=True)
        self.layers = tuple(eqx.nn.Linear(fan_in, fan_out, dtype=dtype, key=k) for k, fan_in, fan_out in shapes)
        self.activation = activation

    def __call__(self, rows: Float[Array, "n _p"]) -> Float[Array, "n _q"]:
        for layer in self.layers[:-1]:
            rows = self.activation(rowwise(layer, rows))
        return rowwise(self.layers[-1], rows)


class Branches(eqx.Module):
    """B encoders of the same rows and of one shape, x → A_b x + MLP_b(x), in three products for all of them.

    Two hidden layers, GELU; the last layer starts at a hundredth, so that the map starts at the linear one, `skip`.
    """

    skip: Float[Array, "p B r"]
    bias: Float[Array, "B r"]
    first: Float[Array, "p B h"]
    first_bias: Float[Array, "B h"]
    second: Float[Array, "B h h"]
    second_bias: Float[Array, "B h"]
    last: Float[Array, "B h r"]

    def __init__(self, key: Key[Array, ""], skip: Float[Array, "p B r"], hidden: int):
        p, branches, width = skip.shape
        k_first, k_second, k_last = jr.split(key, 3)
        self.skip = skip
        self.bias = jnp.zeros((branches, width), skip.dtype)
        self.first = uniform_weights(k_first, (p, branches, hidden), p, skip.dtype)
        self.first_bias = jnp.zeros((branches, hidden), skip.dtype)
        self.second = uniform_weights(k_second, (branches, hidden, hidden), hidden, skip.dtype)
        self.second_bias = jnp.zeros((branches, hidden), skip.dtype)
        self.last = 0.01 * uniform_weights(k_last, (branches, hidden, width), hidden, skip.dtype)

    def __call__(self, rows: Float[Array, "n p"]) -> Float[Array, "B n r"]:
        inner = jax.nn.gelu(jnp.einsum("np,pbh->bnh", rows, self.first) + self.first_bias[:, None])
        inner = jax.nn.gelu(jnp.einsum("bnh,bhk->bnk", inner, self.second) + self.second_bias[:, None])
        linear = jnp.einsum("np,pbr->bnr", rows, self.skip) + self.bias[:, None]
        return linear + jnp.einsum("bnh,bhr->bnr", inner, self.last)


def uniform_weights(key: Key[Array, ""], shape: tuple[int, ...], fan_in: int, dtype: DTypeLike) -> Array:
    """Uniform, of variance 1/fan_in."""
    limit = float(np.sqrt(3 / max(fan_in, 1)))
    return jr.uniform(key, shape, dtype, -limit, limit)
