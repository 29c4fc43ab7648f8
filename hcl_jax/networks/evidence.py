"""Which of the structures that nonlinear HCL was told are there, by what a fit says of rows."""

from itertools import combinations
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hcl_jax.compiled import compiled
from hcl_jax.fitted import read_rows
from hcl_jax.networks.hcl import HclNetwork
from hcl_jax.networks.network import NetworkFit, Rows
from hcl_jax.structure import Structure

LEAST_CORRELATION, LEAST_RELATIVE, MOST_EXPLAINED = 0.3, 0.75, 0.2
"""A structure is absent where its modalities correlate less than that, or less than that share of the median over all shared
structures, or other structures explain more than that of it."""


class Evidence(NamedTuple):
    """What rows say of a structure: see `structure_evidence`."""

    correlation: float
    explained: float
    absent: bool


def structure_evidence(fitted: NetworkFit, views: Any) -> dict[Structure, Evidence]:
    """Whether each shared structure is there, from rows alone: those of the training will do.

    `correlation`: mean over the structure's pairs of modalities, and coordinates, of the correlation of what the two say of it.
    What nobody shares correlates little, unless encoders fill the structure with nonlinear functions of the factors of other
    structures, which the modalities do share. Factors of two structures are independent, and so `explained` tells these: the
    share of the variance of the structure's scores that a regression on the scores of others explains, with their squares,
    products and absolute values. It is fitted to the first half of the rows and judged on the second, so negative where there is
    nothing; with fewer than ten rows for each of these features, K(K + 5)/2 for K scores of others, it is too low.

    `absent` is what `called_absent` says: a structure whose factors are much weaker than those of the others may be called so.
    """
    X, present = read_rows(views, fitted.dims)
    if present is not None:
        raise ValueError("views: lack some rows of some view; expected whole ones")
    rows = fitted.standardised(X)
    correlation, explained = evidence(fitted.network, rows)
    shared = [s for s in fitted.hierarchy.structures if len(s) > 1]
    found = zip(shared, correlation, explained, called_absent(correlation, explained), strict=True)
    return {s: Evidence(float(c), float(e), bool(absent)) for s, c, e, absent in found}


def called_absent(correlation: Float[Array, " S"], explained: Float[Array, " S"]) -> Bool[Array, " S"]:
    """Which of the shared structures are absent: see `LEAST_CORRELATION`."""
    least = jnp.maximum(LEAST_RELATIVE * jnp.median(correlation), LEAST_CORRELATION)
    return (correlation < least) | (explained > MOST_EXPLAINED)


@compiled
def evidence(network: HclNetwork, views: tuple[Rows, ...]) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
    """(correlation, explained) of every shared structure, in order: see `structure_evidence`."""
    hierarchy = network.hierarchy
    rotated, scores = network.rotated(views), network.scores(views)
    half = scores.shape[0] // 2
    correlations, explained = [], []
    for s in hierarchy.structures:
        if len(s) == 1:
            continue
        columns = np.arange(hierarchy.n_factors)[hierarchy.columns(s)]
        places = [np.searchsorted(hierarchy.active_columns(m), columns) for m in s]
        blocks = [rotated[m - 1][:, place] for m, place in zip(s, places, strict=True)]
        correlations.append(jnp.stack([_correlation(a, b).mean() for a, b in combinations(blocks, 2)]).mean())
        others = scores[:, np.setdiff1d(np.arange(hierarchy.n_factors), columns)]
        explained.append(_explained(_with_products(others), scores[:, columns], half))
    return jnp.stack(correlations), jnp.stack(explained)


def _correlation(a: Float[Array, "n r"], b: Float[Array, "n r"]) -> Float[Array, " r"]:
    """Of every column with its like."""
    a, b = a - a.mean(axis=0, keepdims=True), b - b.mean(axis=0, keepdims=True)
    sizes = jnp.sqrt(jnp.sum(a**2, axis=0) * jnp.sum(b**2, axis=0))
    return jnp.sum(a * b, axis=0) / jnp.where(sizes > 0, sizes, 1)


def _with_products(T: Float[Array, "n k"]) -> Float[Array, "n p"]:
    """1, the columns, their products two by two, and their absolute values."""
    i, j = np.triu_indices(T.shape[1])
    return jnp.concatenate([jnp.ones_like(T[:, :1]), T, T[:, i] * T[:, j], jnp.abs(T)], axis=1)


def _explained(features: Float[Array, "n p"], targets: Float[Array, "n r"], half: int) -> Float[Array, ""]:
    """Mean R² of the targets of the second half, of a regression on the first (with a ridge of a millionth)."""
    F, T = features[:half], targets[:half]
    gram = F.T @ F / half
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)
    B = jnp.linalg.solve(gram + 1e-6 * jnp.trace(gram) / gram.shape[0] * eye, F.T @ T / half)
    left = jnp.mean((targets[half:] - features[half:] @ B) ** 2, axis=0)
    return jnp.mean(1 - left / targets[half:].var(axis=0))
