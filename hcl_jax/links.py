"""Links g between the linear model and the features it is seen through, x = g(u), u = Λz + ε (theory: Sections 1 and 7).

Some act feature by feature, some mix features, some lose part of u. A link stands for one modality; its rows are samples.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from hcl_jax.model import Truth, as_truth, sample_observations
from hcl_jax.structure import Hierarchy
from hcl_jax.views import as_key, check_count

Rows = Float[Array, "n p"]
Map = Callable[[Array], Array]
SLOPE = 0.2
"""Of leaky ReLUs, below 0."""


class Link(eqx.Module):
    """x = g(u), row by row."""

    @abstractmethod
    def forward(self, u: Rows, key: Key[Array, ""] | None = None) -> Rows:
        """g(u). Links with randomness of their own need a key."""

    @abstractmethod
    def inverse(self, x: Rows) -> Rows:
        """The u with g(u) = x. Raises `ValueError` where it cannot be told."""

    @property
    @abstractmethod
    def invertible(self) -> bool:
        """Whether x tells u."""


class ByFeature(Link):
    """One function of a number, on every entry."""

    function: Map = eqx.field(static=True)
    inverse_function: Map | None = eqx.field(static=True, default=None)

    def forward(self, u: Rows, key: Key[Array, ""] | None = None) -> Rows:
        return self.function(u)

    def inverse(self, x: Rows) -> Rows:
        if self.inverse_function is None:
            raise ValueError("link: does not tell u from x; expected one that has an inverse")
        return self.inverse_function(x)

    @property
    def invertible(self) -> bool:
        return self.inverse_function is not None


class Counts(Link):
    """Poisson counts of mean exp(scale · u)."""

    scale: float = eqx.field(static=True, default=0.5)

    def forward(self, u: Rows, key: Key[Array, ""] | None = None) -> Rows:
        return jr.poisson(as_key(key, "to draw the counts"), jnp.exp(self.scale * u)).astype(u.dtype)

    def inverse(self, x: Rows) -> Rows:
        raise ValueError("link: counts do not tell their mean; expected a link that has an inverse")

    @property
    def invertible(self) -> bool:
        return False


class Mixing(Link):
    """Rotations and leaky ReLUs in turn: … leaky(R₂ leaky(R₁u)), each of the `n_leaky` ReLUs after a rotation of its own.

    With one rotation more than there are ReLUs, x looks normal feature by feature. The inverse is exact.
    """

    rotations: tuple[Float[Array, "p p"], ...]
    n_leaky: int = eqx.field(static=True)

    def forward(self, u: Rows, key: Key[Array, ""] | None = None) -> Rows:
        for layer, R in enumerate(self.rotations):
            u = leaky(u @ R.T) if layer < self.n_leaky else u @ R.T
        return u

    def inverse(self, x: Rows) -> Rows:
        for layer, R in reversed(list(enumerate(self.rotations))):
            x = (leaky_inverse(x) if layer < self.n_leaky else x) @ R
        return x

    @property
    def invertible(self) -> bool:
        return True


class MonotoneSpline(Link):
    """By feature, through (knot, value) with a given slope at each, increasing; linear beyond the outermost.

    Rational quadratic between two knots (Gregory and Delbourgo, 1982; Durkan et al., 2019): with ξ = (u − a)/w for a knot a and
    the width w after it, h the rise and s = h/w, slopes δ and δ′ at both ends,
    x = x_a + h (sξ² + δξ(1−ξ)) / (s + (δ + δ′ − 2s) ξ(1−ξ)). Its inverse is the stable root of a quadratic.
    Knots and values have to increase and slopes to be positive, which is not checked; where no slope is above twice the secant of
    an interval beside it, the inverse loses no digits.
    """

    knots: Float[Array, "k p"]
    values: Float[Array, "k p"]
    slopes: Float[Array, "k p"]

    @classmethod
    def through(cls, knots: Float[Array, "k p"], values: Float[Array, "k p"]) -> "MonotoneSpline":
        """With slopes that are the harmonic means of the secants on both sides, at the ends those of the last intervals (Gregory
        and Delbourgo, 1982)."""
        secants = jnp.diff(values, axis=0) / jnp.diff(knots, axis=0)
        inner = 2 / (1 / secants[:-1] + 1 / secants[1:])
        return cls(knots, values, jnp.concatenate([secants[:1], inner, secants[-1:]]))

    def forward(self, u: Rows, key: Key[Array, ""] | None = None) -> Rows:
        return self.value_and_slope(u)[0]

    def value_and_slope(self, u: Rows) -> tuple[Rows, Rows]:
        """(x, dx/du), entry by entry."""
        a, b, x_a, x_b, d_a, d_b = self._interval(self.knots, u)
        w, h = b - a, x_b - x_a
        s = h / w
        xi = jnp.clip((u - a) / w, 0, 1)
        bump = xi * (1 - xi)
        below = s + (d_a + d_b - 2 * s) * bump
        x = x_a + h * (s * xi**2 + d_a * bump) / below
        slope = s**2 * (d_b * xi**2 + 2 * s * bump + d_a * (1 - xi) ** 2) / below**2
        return x + d_a * jnp.minimum(u - a, 0) + d_b * jnp.maximum(u - b, 0), slope

    def inverse(self, x: Rows) -> Rows:
        a, b, x_a, x_b, d_a, d_b = self._interval(self.values, x)
        w, h = b - a, x_b - x_a
        s, rise = h / w, jnp.clip(x - x_a, 0, h)
        bent = rise * (d_a + d_b - 2 * s)
        A, B = h * (s - d_a) + bent, h * d_a - bent  # Aξ² + Bξ = s rise
        xi = 2 * s * rise / (B + jnp.sqrt(jnp.maximum(B**2 + 4 * A * s * rise, 0)))
        return a + w * xi + jnp.minimum(x - x_a, 0) / d_a + jnp.maximum(x - x_b, 0) / d_b

    def _interval(self, edges: Float[Array, "k p"], at: Rows) -> tuple[Rows, Rows, Rows, Rows, Rows, Rows]:
        """(a, b, x_a, x_b, δ, δ′) of the interval between two edges that each entry falls in, the outermost one beyond them."""
        place = jnp.sum(at[:, None, :] >= edges[None, 1:-1], axis=1)
        tables = (self.knots, self.knots[1:], self.values, self.values[1:], self.slopes, self.slopes[1:])
        a, b, x_a, x_b, d_a, d_b = (jnp.take_along_axis(table, place, axis=0) for table in tables)
        return a, b, x_a, x_b, d_a, d_b

    @property
    def invertible(self) -> bool:
        return True


def leaky(u: Array) -> Array:
    """max(u, 0) + 0.2 min(u, 0)."""
    return jnp.where(u < 0, SLOPE * u, u)


def leaky_inverse(x: Array) -> Array:
    """u of x = `leaky`(u)."""
    return jnp.where(x < 0, x / SLOPE, x)


def softplus_inverse(x: Array) -> Array:
    """log(eˣ − 1) = x + log(1 − e⁻ˣ), for positive x."""
    return x + jnp.log(-jnp.expm1(-x))


def _unchanged(u: Array) -> Array:
    return u


def _cube(u: Array) -> Array:
    return u**3


def _positive(u: Array) -> Array:
    return (u > 0).astype(u.dtype)


BY_FEATURE: dict[str, ByFeature] = {
    "identity": ByFeature(_unchanged, _unchanged),
    "sinh": ByFeature(jnp.sinh, jnp.arcsinh),
    "cubic": ByFeature(_cube, jnp.cbrt),
    "softplus": ByFeature(jax.nn.softplus, softplus_inverse),
    "absolute": ByFeature(jnp.abs),
    "threshold": ByFeature(_positive),
}


def _mixing(n_leaky: int, n_rotations: int, key: Key[Array, ""], dim: int, dtype: DTypeLike) -> Mixing:
    return Mixing(tuple(jr.orthogonal(k, dim, dtype=dtype) for k in jr.split(key, n_rotations)), n_leaky)


def _spline(key: Key[Array, ""], dim: int, dtype: DTypeLike) -> MonotoneSpline:
    """Through knots a unit apart, with log-normal rises between them."""
    knots = jnp.broadcast_to(jnp.arange(-3, 4, dtype=dtype)[:, None], (7, dim))
    rises = jnp.exp(jr.normal(key, (6, dim), dtype))
    values = jnp.concatenate([jnp.zeros((1, dim), dtype), jnp.cumsum(rises, axis=0)])
    return MonotoneSpline.through(knots, values - values[3:4])


Sampler = Callable[[Key[Array, ""], int, DTypeLike], Link]


def _always(link: Link) -> Sampler:
    return lambda key, dim, dtype: link


LINKS: dict[str, Sampler] = {
    **{name: _always(link) for name, link in BY_FEATURE.items()},
    "spline": _spline,
    "leaky": partial(_mixing, 2, 2),
    "leakyQ": partial(_mixing, 2, 3),
    "counts": _always(Counts()),
}
"""Simulated links by name, sampler(key, number of features, dtype). By feature the identity, sinh u, u³, softplus u and a random
increasing `spline`; `leaky` and `leakyQ` mix features by Haar rotations; |u|, u > 0 and Poisson counts have no inverse."""


LOSSY = ("absolute", "threshold", "counts")
"""Those without an inverse."""


def check_link(name: str) -> None:
    """Raise `ValueError` unless the name is one of `LINKS`."""
    if not isinstance(name, str) or name not in LINKS:
        raise ValueError(f"link: unknown name {name!r}; expected one of {', '.join(LINKS)}")


def sample_link(key: Key[Array, ""], name: str, dim: int, dtype: DTypeLike = jnp.float32) -> Link:
    """A link of that name for one modality.

    >>> link = sample_link(jr.key(0), "sinh", 2)
    >>> bool(jnp.allclose(link.inverse(link.forward(jnp.ones((1, 2)))), 1))
    True

    Raises `ValueError` for a name that is not one of `LINKS`.
    """
    check_link(name)
    check_count(dim, "dim", 1)
    return LINKS[name](as_key(key, "to draw the link"), dim, dtype)


def sample_links(
    key: Key[Array, ""], names: str | Sequence[str], hierarchy: Hierarchy, dtype: DTypeLike = jnp.float32
) -> tuple[Link, ...]:
    """A link for each modality, all of one name or of one name each; those of a modality do not depend on the others'."""
    given = (names,) * hierarchy.n_modalities if isinstance(names, str) else tuple(names)
    if len(given) != hierarchy.n_modalities:
        raise ValueError(f"names: are {len(given)}; expected one, or {hierarchy.n_modalities}, one for each modality")
    key = as_key(key, "to draw the links")
    modalities = zip(hierarchy.modalities, given, hierarchy.dims, strict=True)
    return tuple(sample_link(jr.fold_in(key, m), name, dim, dtype) for m, name, dim in modalities)


def check_links(links: Any, hierarchy: Hierarchy) -> tuple[Link, ...]:
    """The links. Raises `ValueError` unless there is one for each modality."""
    given = tuple(links) if isinstance(links, Sequence) else (links,)
    if len(given) != hierarchy.n_modalities or not all(isinstance(link, Link) for link in given):
        kinds = ", ".join(type(link).__name__ for link in given)
        raise ValueError(f"links: are {kinds or 'none'}; expected {hierarchy.n_modalities} links, one for each modality")
    return given


def sample_linked_observations(
    key: Key[Array, ""], truth: Truth, links: Sequence[Link], n_samples: int, latent: str = "gaussian"
) -> tuple[tuple[Float[Array, "n _p"], ...], Float[Array, "n K"]]:
    """(views, z): n independent rows x = g(u) of model (1), u = Λz + ε, and their latent factors.

    For one key the same u, whatever the links. Raises `ValueError` as `sample_observations` does, and for another number of links
    than there are modalities.
    """
    given = check_links(links, as_truth(truth, Truth).hierarchy)
    k_rows, k_links = jr.split(as_key(key, "to draw the rows"))
    u, z = sample_observations(k_rows, truth, n_samples, latent)
    parts = jnp.split(u, np.cumsum(truth.hierarchy.dims)[:-1], axis=1)
    return tuple(g.forward(part, jr.fold_in(k_links, m)) for m, (g, part) in enumerate(zip(given, parts, strict=True))), z
