"""What structures explain of the views: shares of variance that add up, for any method, on training rows and new ones."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from hcl_jax.fitted import Fitted, LinearFit
from hcl_jax.structure import Structure
from hcl_jax.views import Views, presence_table


def linear_reading(
    Z: Float[np.ndarray, "n d"],
    present: Bool[np.ndarray, "n M"],
    scores: Float[np.ndarray, "n R"],
    membership: Bool[np.ndarray, "M R"],
    dims: Sequence[int],
) -> Float[np.ndarray, "d R"]:
    """The least-squares coefficients of every view on the scores that it holds, over the rows that have it: how any scores, those
    of a network too, are read in the features. `Z` and `scores` are centred. Zero where the membership does not hold."""
    edges = np.cumsum([0, *dims])
    loadings = np.zeros((edges[-1], scores.shape[1]))
    for m, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        columns, rows = np.flatnonzero(membership[m]), present[:, m]
        if len(columns):
            loadings[a:b, columns] = np.linalg.lstsq(scores[np.ix_(rows, columns)], Z[rows, a:b], rcond=None)[0].T
    return loadings


class Reading(NamedTuple):
    """How scores are read in the features."""

    centre: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]
    """Infinite for features that are constant."""
    score_means: Float[np.ndarray, " R"]
    score_variances: Float[np.ndarray, " R"]
    """Of the factors: 1 where the model says so, else those of the training scores."""
    loadings: Float[np.ndarray, "d R"]
    """On standardised features: those of linear methods, and of others the least-squares coefficients of the views."""

    def standardised(self, read: Views) -> tuple[Float[np.ndarray, "n d"], Bool[np.ndarray, "n M"]]:
        """(rows in these units, 0 where cells are missing; which views each of them has)."""
        return read.standardised(self.centre, self.scale), presence_table(read)


def reading_of(fitted: Fitted, read: Views, scores: Float[np.ndarray, "n R"]) -> Reading:
    """How the scores of these training rows are read: by the method's own loadings where it is linear, else by least squares."""
    variances = np.var(scores, axis=0)
    if isinstance(fitted, LinearFit):
        if fitted.noise_variance is not None:
            variances = np.ones_like(variances)
        centre, scale, loadings = (np.asarray(array, float) for array in (fitted.centre, fitted.scale, fitted.loadings))
        return Reading(centre, scale, np.zeros(scores.shape[1]), variances, loadings)
    (centre, scale), means = read.centre_and_scale(), scores.mean(axis=0)
    empty = Reading(centre, scale, means, variances, np.zeros((0, 0)))
    Z, present = empty.standardised(read)
    return empty._replace(loadings=linear_reading(Z, present, scores - means, np.asarray(fitted.membership), read.dims))


class RowShares(NamedTuple):
    """By row, view and structure, 2⟨x, x̂_s⟩ − ⟨x̂, x̂_s⟩, and by row and view ‖x‖²: sums over rows give shares of variance."""

    explained: Float[np.ndarray, "n M S"]
    total: Float[np.ndarray, "n M"]

    def of(self, weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, "M S"]:
        """The shares where rows count by these weights; 0 for a view without variance."""
        total = weights @ self.total
        return np.tensordot(weights, self.explained, axes=1) / np.where(total > 0, total, np.inf)[:, None]


def row_shares(
    Z: Float[np.ndarray, "n d"],
    present: Bool[np.ndarray, "n M"],
    scores: Float[np.ndarray, "n R"],
    loadings: Float[np.ndarray, "d R"],
    columns: Sequence[Structure],
    structures: Sequence[Structure],
    dims: Sequence[int],
) -> RowShares:
    """What each structure's part x̂_s = Σ_k t_k l_k of the reconstruction x̂ = Σ_s x̂_s explains of every row x of standardised
    features: (2⟨x, x̂_s⟩ − ⟨x̂, x̂_s⟩)/‖x‖², whose sum over structures is 1 − ‖x − x̂‖²/‖x‖². `columns` gives the structure of every
    score. A share may be negative on new rows. Views that a row lacks count as nothing."""
    edges = np.cumsum([0, *dims])
    explained = np.zeros((len(Z), len(dims), len(structures)))
    total = np.zeros((len(Z), len(dims)))
    for m, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        seen = present[:, m, None]
        x = np.where(seen, Z[:, a:b], 0).astype(float)
        total[:, m] = np.sum(x**2, axis=1)
        # ⟨2x − x̂, x̂_s⟩ = Σ_k t_k ⟨2x − x̂, l_k⟩: one product for all structures
        by_column = ((2 * x - np.where(seen, scores @ loadings[a:b].T, 0)) @ loadings[a:b]) * scores
        for i, s in enumerate(structures):
            explained[:, m, i] = by_column[:, np.array([column == s for column in columns])].sum(axis=1)
    return RowShares(explained, total)


class ShareIntervals(NamedTuple):
    """Shares of variance by view and structure, with bootstrap bounds, and of all structures together."""

    share: Float[np.ndarray, "M S"]
    low: Float[np.ndarray, "M S"]
    high: Float[np.ndarray, "M S"]
    total: Float[np.ndarray, "M 3"]
    """(share, low, high)."""


def share_intervals(shares: RowShares, seed: int, bootstraps: int = 400, level: float = 0.95) -> ShareIntervals:
    """Percentile intervals over bootstrap samples of the rows, the fit as it is."""
    n = len(shares.total)
    generator = np.random.default_rng(seed)
    counts = (generator.multinomial(n, np.full(n, 1 / n)) for _ in range(bootstraps))
    held = np.stack([shares.of(weights.astype(float)) for weights in itertools.chain([np.ones(n)], counts)])
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(held[1:], ends, axis=0)
    totals = held.sum(axis=2)
    return ShareIntervals(held[0], low, high, np.stack([totals[0], *np.quantile(totals[1:], ends, axis=0)], axis=1))
