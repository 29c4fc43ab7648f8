"""Attention over the tokens of a row, and the transformer layer that the fusions of several methods are made of.

Every row has its own tokens: rows × tokens × width. equinox's attention keeps Python numbers among its leaves, which cannot leave
a compiled program; here nothing but arrays is a leaf.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

Tokens = Float[Array, "n _t _e"]


def tokenwise(module: eqx.nn.Linear | eqx.nn.LayerNorm, tokens: Tokens) -> Tokens:
    """A module of equinox, which takes one vector, on all tokens of all rows."""
    return jax.vmap(jax.vmap(module))(tokens)


def attention(
    queries: Float[Array, "n t e"], keys: Float[Array, "n s e"], values: Float[Array, "n s v"], heads: int = 1
) -> Float[Array, "n t v"]:
    """softmax(QKᵀ/√(e/heads))V, of contiguous blocks of coordinates, a block a head (Vaswani et al. 2017, eq. 1)."""
    (n, t, e), (_, s, v) = queries.shape, values.shape
    Q, K = queries.reshape(n, t, heads, e // heads), keys.reshape(n, s, heads, e // heads)
    weights = jax.nn.softmax(jnp.einsum("nthe,nshe->nhts", Q, K) / math.sqrt(e // heads), axis=-1)
    return jnp.einsum("nhts,nshv->nthv", weights, values.reshape(n, s, heads, v // heads)).reshape(n, t, v)


class TransformerLayer(eqx.Module):
    """x ← LN(x + MHA(x)), x ← LN(x + W₂ relu(W₁x)): normalised after each step, as released multimodal code has it.

    Called with a `context`, its queries are those of x, its keys and values those of the context's tokens. Where these are a
    single token the attention is all on it, whatever the queries. Raises `ValueError` unless the heads divide the width.
    """

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    attended: eqx.nn.LayerNorm
    fed: eqx.nn.LayerNorm
    heads: int = eqx.field(static=True)

    def __init__(
        self, key: Key[Array, ""], width: int, hidden: int | None = None, heads: int = 1, dtype: DTypeLike = jnp.float32
    ):
        check_heads(heads, width)
        hidden = 4 * width if hidden is None else hidden
        shapes = [(width, width)] * 4 + [(width, hidden), (hidden, width)]
        keys = jr.split(key, len(shapes))
        linear = [eqx.nn.Linear(fan_in, fan_out, dtype=dtype, key=k) for k, (fan_in, fan_out) in zip(keys, shapes, strict=True)]
        self.query, self.key, self.value, self.output, self.first, self.second = linear
        self.attended, self.fed = eqx.nn.LayerNorm(width, dtype=dtype), eqx.nn.LayerNorm(width, dtype=dtype)
        self.heads = heads

    def __call__(self, tokens: Float[Array, "n t e"], context: Float[Array, "n s e"] | None = None) -> Float[Array, "n t e"]:
        seen = tokens if context is None else context
        Q, K, V = tokenwise(self.query, tokens), tokenwise(self.key, seen), tokenwise(self.value, seen)
        tokens = tokenwise(self.attended, tokens + tokenwise(self.output, attention(Q, K, V, self.heads)))
        inner = jax.nn.relu(tokenwise(self.first, tokens))
        return tokenwise(self.fed, tokens + tokenwise(self.second, inner))


def check_heads(heads: int, width: int) -> None:
    """Raise `ValueError` unless the heads divide the width."""
    if heads < 1 or width % heads:
        raise ValueError(f"heads: is {heads}; expected a divisor of {width}, the width of a token")
