"""Rows that lack whole views in few coordinates: moments to start from, and those of rows that a fit has completed."""

from dataclasses import dataclass, replace

import numpy as np

from hcl_jax.estimators.missing import PatternMoments
from hcl_jax.reduced import ReducedViews, reduced_covariance


@dataclass(frozen=True, eq=False)
class ReducedPatterns:
    """Rows with the second moments of every pattern of presence, in the coordinates of `views`, whose own moments are those of
    the rows that have both of two views."""

    views: ReducedViews
    rows: np.ndarray
    """R × M × q, 0 where a view is absent."""
    pattern: np.ndarray
    present: np.ndarray
    """P × M booleans."""
    counts: np.ndarray

    def completed(self, loadings: np.ndarray, noise: np.ndarray) -> ReducedViews:
        """The views with the moments that rows are expected to have by a fit (M × q × K, and M noise variances): Σ E[xxᵀ | the
        views that are present], as in the E step of theory Section 7. ν stays as it was: what is made up is no evidence.
        """
        moments = self.views.moments
        M, q, K = loadings.shape
        L, dims = loadings.reshape(M * q, K), np.asarray(moments.dims)
        psi, real = np.repeat(noise, q), (np.arange(q)[None, :] < dims[:, None]).ravel()
        held = np.asarray(moments.matrix).diagonal().reshape(M, q).sum(axis=1)
        rest = np.maximum(np.asarray(moments.traces) - held, 0)  # of all further coordinates
        expected_rest = noise * np.maximum(dims - q, 0)
        matrix, further = np.zeros((M * q, M * q)), np.zeros(M)
        for number, (has, n) in enumerate(zip(self.present, self.counts, strict=True)):
            here = np.repeat(has, q)
            seen, absent = np.where(here[:, None], L, 0), np.where(here[:, None], 0, L)
            weighted = seen / psi[:, None]
            V = np.linalg.inv(np.eye(K) + seen.T @ weighted)
            rows = self.rows[self.pattern == number].reshape(-1, M * q)
            rows = rows + rows @ weighted @ V @ absent.T
            matrix += rows.T @ rows + n * (absent @ V @ absent.T + np.diag(np.where(~here & real, psi, 0)))
            further += n * np.where(has, rest, expected_rest)
        matrix, further = matrix / self.counts.sum(), further / self.counts.sum()
        traces = further + matrix.diagonal().reshape(M, q).sum(axis=1)
        return replace(self.views, moments=moments.of(matrix, traces))


def reduced_patterns(moments: PatternMoments, noise: str) -> ReducedPatterns:
    """The rows behind the moments, reduced as `reduced_covariance` does. Raises `ValueError` where fewer than three rows have a
    view, or one or two have some pair of views."""
    present, counts = np.asarray(moments.present), np.asarray(moments.counts, float)
    together = present.T.astype(float) @ (present * counts[:, None])
    if min(together[together > 0].min(), together.diagonal().min()) < 3:
        raise ValueError("covariance: fewer than 3 rows have some view, or some pair of views; expected more, or none with both")
    views = reduced_covariance(moments.covariance(), moments.dims, noise, together)
    rows, pattern = (np.asarray(part) for part in moments.about(0 * moments.centre))
    edges = np.cumsum([0, *moments.dims])
    scores = [rows[:, a:b] @ inward for a, b, inward in zip(edges[:-1], edges[1:], views.inward, strict=True)]
    return ReducedPatterns(views, np.stack(scores, axis=1), pattern, present, counts)
