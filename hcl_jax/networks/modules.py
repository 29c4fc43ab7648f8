"""Encoders and decoders that several methods share.

Linear layers and norms are equinox's. Its perceptrons and attention keep functions and Python numbers among their leaves, which
cannot leave a compiled program; ours keep them out of the tree.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

Rows = Float[Array, "n _p"]
RIDGE = 1e-4
"""Of correlations that are to be inverted."""


def rowwise(module: Callable[[Array], Array], rows: Float[Array, "n _p"]) -> Float[Array, "n _q"]:
    """A module of equinox, which takes one row, on all rows."""
    return jax.vmap(module)(rows)


class Constant(eqx.Module):
    """An array of a network that training leaves as it is."""

    value: Array


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


class Skipped(eqx.Module):
    """x → Ax + b + MLP(x), GELU."""

    skip: eqx.nn.Linear
    perceptron: Perceptron

    def __init__(self, key: Key[Array, ""], widths: tuple[int, ...], dtype: DTypeLike):
        k_skip, k_perceptron = jr.split(key)
        self.skip = eqx.nn.Linear(widths[0], widths[-1], dtype=dtype, key=k_skip)
        self.perceptron = Perceptron(k_perceptron, widths, jax.nn.gelu, dtype)

    def __call__(self, rows: Float[Array, "n _p"]) -> Float[Array, "n _q"]:
        return rowwise(self.skip, rows) + self.perceptron(rows)


class Convolutions(eqx.Module):
    """Images or volumes to codes: convolutions of stride 2, GELU, and a linear layer.

    As products of matrices, over patches cut by strided slices: XLA has no fast convolution of volumes on a CPU.
    """

    layers: tuple[eqx.nn.Linear, ...]
    last: eqx.nn.Linear
    sides: tuple[int, ...] = eqx.field(static=True)
    kernel: int = eqx.field(static=True)

    def __init__(
        self, key: Key[Array, ""], sides: tuple[int, ...], channels: Sequence[int], width: int, kernel: int, dtype: DTypeLike
    ):
        cells, each = math.prod(side >> len(channels) for side in sides), kernel ** len(sides)
        shapes = zip((1, *channels[:-1]), channels, strict=True)
        self.layers = tuple(eqx.nn.Linear(each * c, out, dtype=dtype, key=key) for c, out in shapes)
        self.last = eqx.nn.Linear(cells * channels[-1], width, dtype=dtype, key=key)
        self.sides, self.kernel = sides, kernel

    def __call__(self, rows: Float[Array, "n _p"]) -> Float[Array, "n _q"]:
        x = rows.reshape(len(rows), *self.sides, 1)
        for layer in self.layers:
            x = jax.nn.gelu(cellwise(layer, patches(x, self.kernel)))
        return rowwise(self.last, x.reshape(len(rows), -1))


class Deconvolutions(eqx.Module):
    """Codes to images or volumes: the transposes of `Convolutions`, in reverse."""

    first: eqx.nn.Linear
    layers: tuple[eqx.nn.Linear, ...]
    sides: tuple[int, ...] = eqx.field(static=True)
    kernel: int = eqx.field(static=True)

    def __init__(
        self, key: Key[Array, ""], sides: tuple[int, ...], channels: Sequence[int], width: int, kernel: int, dtype: DTypeLike
    ):
        cells, each = math.prod(side >> len(channels) for side in sides), kernel ** len(sides)
        shapes = zip(channels[::-1], (*channels[-2::-1], 1), strict=True)
        self.first = eqx.nn.Linear(width, cells * channels[-1], dtype=dtype, key=key)
        self.layers = tuple(eqx.nn.Linear(c, each * out, dtype=dtype, key=key) for c, out in shapes)
        self.sides, self.kernel = sides, kernel

    def __call__(self, rows: Float[Array, "n _p"]) -> Float[Array, "n _q"]:
        small = [side >> len(self.layers) for side in self.sides]
        x = rowwise(self.first, rows).reshape(len(rows), *small, -1)
        for layer in self.layers:
            x = overlap(cellwise(layer, jax.nn.gelu(x)), self.kernel)
        return x.reshape(len(rows), -1)


def cellwise(layer: eqx.nn.Linear, x: Float[Array, "n *sides c"]) -> Float[Array, "n *sides _k"]:
    """A linear layer on the channels of every cell."""
    return rowwise(layer, x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _slots(sides: int, kernel: int) -> list[tuple[int, ...]]:
    """Where in a patch its cells are."""
    return list(np.ndindex(*(kernel,) * sides))


def patches(x: Float[Array, "n *sides c"], kernel: int) -> Float[Array, "n *half k"]:
    """The channels of a patch of that width about every second cell, side by side; 0 beyond the edges."""
    before, sides = (kernel - 1) // 2, x.ndim - 2
    padded = jnp.pad(x, ((0, 0), *((before, kernel - 2 - before),) * sides, (0, 0)))
    cut = lambda slot: tuple(slice(at, at + side, 2) for at, side in zip(slot, x.shape[1:-1], strict=True))
    return jnp.concatenate([padded[:, *cut(slot)] for slot in _slots(sides, kernel)], axis=-1)


def overlap(x: Float[Array, "n *half k"], kernel: int) -> Float[Array, "n *sides c"]:
    """The transpose of `patches`: patches added up where they lie, what is beyond the edges left out."""
    before, sides = (kernel - 1) // 2, x.ndim - 2
    full = [2 * half for half in x.shape[1:-1]]
    slots = _slots(sides, kernel)
    total = jnp.zeros((x.shape[0], *(side + kernel - 2 for side in full), x.shape[-1] // len(slots)), x.dtype)
    for slot, part in zip(slots, jnp.split(x, len(slots), axis=-1), strict=True):
        total = total.at[:, *(slice(at, at + side, 2) for at, side in zip(slot, full, strict=True))].add(part)
    return total[:, *(slice(before, before + side) for side in full)]


def redrawn(key: Key[Array, ""], network: Any) -> Any:
    """The network with the weights of all its linear layers drawn anew, in one draw: uniform between ±1/√fan_in, and a hundredth
    of that in the last layers of `Skipped`, whose maps so start linear.

    One draw compiles in a tenth of the time of one for every layer; what the layers were made with is never computed.
    """
    limits = [1 / math.sqrt(max(layer.in_features, 1)) for layer in _modules(network, eqx.nn.Linear) for _ in range(2)]
    old = _weights(network)
    edges = np.cumsum([0, *(leaf.size for leaf in old)])
    drawn = jr.uniform(key, (int(edges[-1]),), old[0].dtype, -1, 1)
    new = [limit * drawn[a:b].reshape(leaf.shape) for limit, leaf, a, b in zip(limits, old, edges[:-1], edges[1:], strict=True)]
    network = eqx.tree_at(_weights, network, new)
    if not _modules(network, Skipped):
        return network
    last = lambda tree: [leaf for skipped in _modules(tree, Skipped) for leaf in _weights(skipped.perceptron.layers[-1])]
    return eqx.tree_at(last, network, [leaf / 100 for leaf in last(network)])


def _modules(tree: Any, kind: type) -> list[Any]:
    is_kind = lambda node: isinstance(node, kind)
    return [node for node in jax.tree.leaves(tree, is_leaf=is_kind) if is_kind(node)]


def _weights(tree: Any) -> list[Any]:
    """Of every linear layer the matrix and the bias."""
    return [leaf for layer in _modules(tree, eqx.nn.Linear) for leaf in (layer.weight, layer.bias)]


def whitened(rows: Float[Array, "n p"]) -> Float[Array, "n p"]:
    """The rows in coordinates that are uncorrelated among them, of mean 0 and variance 1.

    By Cholesky, of standardised columns, to whose correlations `RIDGE` is added. Columns have no scale.
    """
    central = rows - rows.mean(axis=0, keepdims=True)
    variances = jnp.mean(central**2, axis=0, keepdims=True)
    columns = central / jnp.sqrt(variances + jnp.finfo(rows.dtype).tiny ** 0.5)
    correlation = columns.T @ columns / rows.shape[0]
    lower = jnp.linalg.cholesky(correlation + RIDGE * jnp.eye(rows.shape[1], dtype=rows.dtype))
    return jax.scipy.linalg.solve_triangular(lower, columns.T, lower=True).T


class Separable(eqx.Module):
    """A critic of pairs, f(x, y) = ⟨g(x), h(y)⟩: two networks, of n rows each, instead of one of n² rows."""

    left: Perceptron
    right: Perceptron

    def __init__(self, key: Key[Array, ""], p: int, q: int, hidden: Sequence[int], dtype: DTypeLike):
        k_left, k_right = jr.split(key)
        self.left = Perceptron(k_left, (p, *hidden, hidden[-1]), dtype=dtype)
        self.right = Perceptron(k_right, (q, *hidden, hidden[-1]), dtype=dtype)

    def __call__(self, x: Float[Array, "n p"], y: Float[Array, "m q"]) -> Float[Array, "n m"]:
        return self.left(x) @ self.right(y).T


class Concatenated(eqx.Module):
    """A critic of pairs, f(x, y) = MLP([x; y]), ReLU: the first layer of x and that of y are added, not their n² pairs formed."""

    perceptron: Perceptron

    def __init__(self, key: Key[Array, ""], p: int, q: int, hidden: Sequence[int], dtype: DTypeLike):
        self.perceptron = Perceptron(key, (p + q, *hidden, 1), dtype=dtype)

    def __call__(self, x: Float[Array, "n p"], y: Float[Array, "m q"]) -> Float[Array, "n m"]:
        first, *rest = self.perceptron.layers
        assert first.bias is not None, "all layers have one"
        of_x, of_y = jnp.split(first.weight, [x.shape[1]], axis=1)
        rows = (x @ of_x.T + first.bias[None, :])[:, None, :] + (y @ of_y.T)[None, :, :]
        rows = rows.reshape(-1, rows.shape[-1])
        for layer in rest:
            rows = rowwise(layer, self.perceptron.activation(rows))
        return rows.reshape(x.shape[0], y.shape[0])


CRITICS: dict[str, Callable[..., Any]] = {"separable": Separable, "concatenated": Concatenated}
"""`CRITICS[name](key, p, q, hidden, dtype)`: scores of all pairs of rows of width p and of width q."""


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
        shapes = [((p, branches, hidden), p), ((branches, hidden, hidden), hidden), ((branches, hidden, width), hidden)]
        self.first, self.second, last = uniform_weights(key, shapes, skip.dtype)
        self.last = 0.01 * last
        self.skip = skip
        self.bias = jnp.zeros((branches, width), skip.dtype)
        self.first_bias = jnp.zeros((branches, hidden), skip.dtype)
        self.second_bias = jnp.zeros((branches, hidden), skip.dtype)

    def __call__(self, rows: Float[Array, "n p"]) -> Float[Array, "B n r"]:
        inner = jax.nn.gelu(jnp.einsum("np,pbh->bnh", rows, self.first) + self.first_bias[:, None])
        inner = jax.nn.gelu(jnp.einsum("bnh,bhk->bnk", inner, self.second) + self.second_bias[:, None])
        linear = jnp.einsum("np,pbr->bnr", rows, self.skip) + self.bias[:, None]
        return linear + jnp.einsum("bnh,bhr->bnr", inner, self.last)


def uniform_weights(key: Key[Array, ""], shapes: Sequence[tuple[tuple[int, ...], int]], dtype: DTypeLike) -> list[Array]:
    """Uniform weights of variance 1/fan_in, for each (shape, fan_in): one draw, which compiles sooner than several."""
    edges = np.cumsum([0, *(math.prod(shape) for shape, _ in shapes)])
    drawn = jr.uniform(key, (int(edges[-1]),), dtype, -1, 1)
    pieces = zip(shapes, edges[:-1], edges[1:], strict=True)
    return [math.sqrt(3 / max(fan_in, 1)) * drawn[a:b].reshape(shape) for (shape, fan_in), a, b in pieces]
