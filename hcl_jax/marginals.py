"""Maps of single features that training rows set once: standardised values, by feature or view, and normal scores (Gaussian
copula).

Both take rows one by one, so that a training row and a new one with the same values get the same.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from hcl_jax.views import centre_and_scale, centred, standardise, view_norms

KNOTS = 1000
"""At most so many quantiles of a feature are kept; all its values where there are fewer rows."""


class Standardisation(eqx.Module):
    """x → (x − centre)/scale, by feature."""

    centre: Float[Array, " d"]
    scale: Float[Array, " d"]
    """Infinite for features that were constant, which count as 0 in all rows."""

    @classmethod
    def of(cls, X: Float[Array, "n d"], dims: Sequence[int] = ()) -> "Standardisation":
        return cls(*centre_and_scale(X))

    def __call__(self, X: Float[Array, "n d"]) -> Float[Array, "n d"]:
        return (X.astype(self.centre.dtype) - self.centre[None, :]) / self.scale[None, :]


class Scaling(Standardisation):
    """x → (x − centre)/scale, one scale for all features of a view: the mean of their variances is 1."""

    @classmethod
    def of(cls, X: Float[Array, "n d"], dims: Sequence[int] = ()) -> "Scaling":
        Z, centre, _ = centred(X)
        features = np.repeat(dims, dims).astype(float)
        return cls(centre, view_norms(Z, dims) / jnp.sqrt(jnp.asarray(len(Z) * features, X.dtype)))


class NormalScores(eqx.Module):
    """x → Φ⁻¹(F̂_j(x)), by feature: ranks r of the training values, ties at their mean rank, to Φ⁻¹((r − ½)/n), and linearly in
    between; values beyond those of the training rows get the scores of the outermost.

    Scores have variance 1 among the training rows, ties or not; a constant feature has score 0. Of more than `KNOTS` rows as many
    quantiles are kept. What acts feature by feature and strictly increases, known or not, is undone up to sampling error
    (Liu, Lafferty and Wasserman, 2009).
    """

    centre: Float[Array, " d"]
    scale: Float[Array, " d"]
    values: Float[Array, "k d"]
    """In units of `scale` about `centre`: interpolation has an absolute precision."""
    scores: Float[Array, "k d"]

    @classmethod
    def of(cls, X: Float[Array, "n d"], dims: Sequence[int] = ()) -> "NormalScores":
        n = X.shape[0]
        _, centre, deviation = centred(X)
        scale = jnp.where(deviation > 0, deviation, 1)
        ordered = sorted_columns((X - centre[None, :]) / scale[None, :])
        scores = jax.scipy.special.ndtri((_mean_ranks(ordered) - 0.5) / n).astype(X.dtype)
        kept = _kept_ranks(n)
        return cls(centre, scale, ordered[kept], standardise(scores, scores)[kept])

    def __call__(self, X: Float[Array, "n d"]) -> Float[Array, "n d"]:
        units = (X.astype(self.centre.dtype) - self.centre[None, :]) / self.scale[None, :]
        return jax.vmap(jnp.interp, in_axes=(1, 1, 1), out_axes=1)(units, self.values, self.scores)

    def inverse(self, scores: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """The values that have these scores, by feature: the training quantile map, read backwards."""
        units = jax.vmap(jnp.interp, in_axes=(1, 1, 1), out_axes=1)(scores.astype(self.centre.dtype), self.scores, self.values)
        return self.centre[None, :] + self.scale[None, :] * units


Marginals = Standardisation | NormalScores
MARGINALS: dict[str, Any] = {"normal": NormalScores, "standardised": Standardisation, "scaled": Scaling}


def _kept_ranks(n: int) -> np.ndarray:
    """Which of n sorted values are kept: all, or up to `KNOTS`, half of them evenly by rank and half evenly by normal score."""
    if n <= KNOTS:
        return np.arange(n)
    normal = NormalDist()
    end = normal.inv_cdf(1 - 0.5 / n)
    by_score = [n * normal.cdf(score) - 0.5 for score in np.linspace(-end, end, KNOTS // 2)]
    return np.unique(np.round(np.concatenate([np.linspace(0, n - 1, KNOTS // 2), by_score])).astype(int))


def sorted_columns(X: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Every column sorted. Finite numbers are in the order of their bits, read as integers of one sign; XLA sorts these several
    times as fast on a CPU."""
    kind = jnp.dtype(f"int{8 * X.dtype.itemsize}")
    bits = lax.bitcast_convert_type(X.T + 0, kind)  # −0 becomes 0
    turned = lambda held: jnp.where(held < 0, held ^ jnp.iinfo(kind).max, held)
    return lax.bitcast_convert_type(turned(jnp.sort(turned(bits), axis=1)), X.dtype).T


def _mean_ranks(ordered: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Ranks from 1 of sorted columns, those of equal values averaged."""
    n, d = ordered.shape
    place, edge = jnp.arange(n, dtype=jnp.int32)[:, None], jnp.ones((1, d), bool)
    differs = ordered[1:] != ordered[:-1]
    first = lax.cummax(jnp.where(jnp.concatenate([edge, differs]), place, 0))
    last = lax.cummin(jnp.where(jnp.concatenate([differs, edge]), place, n), reverse=True)
    return (first + last + 2).astype(ordered.dtype) / 2
