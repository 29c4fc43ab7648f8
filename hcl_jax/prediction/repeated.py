"""Repeated measurements from scores: a linear model with an intercept of its own for every subject."""

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hcl_jax.compiled import compiled
from hcl_jax.intervals import BOUNDARY, NOT_CONVERGED, VALID, Interval, check_level, normal_quantile, symmetric_interval
from hcl_jax.linalg import spd_inverse
from hcl_jax.prediction.paths import ScoreAxes, check_option, covariance_of_scores, score_axes
from hcl_jax.structure import CONVERGED, NON_FINITE, ON_BOUND
from hcl_jax.views import as_matrix, as_response

RATIOS = 48
"""Variance ratios, and 0, among which the best is looked for before its neighbourhood is halved."""
LEAST_RATIO = 1e-4  # over the mean number of rows of a subject
BISECTIONS = 60
Method = Literal["reml", "ml"]


class RandomIntercept(eqx.Module):
    """y = intercept + zᵀb + u_s + e: u_s ~ N(0, intercept_variance) of the row's subject, e ~ N(0, residual_variance).

    `covariance` is that of the K + 1 fixed effects (intercept, b), `variance_covariance` that of the two variances, and `effects`
    are the predictions of u for the `subjects`, E(u | y) at the estimates. `status` is one of `hcl_jax.structure`: `ON_BOUND`
    says that the likelihood is largest where the intercepts have no variance, or the rows of a subject none about its intercept.
    """

    coefficients: Float[Array, " K"]
    intercept: Float[Array, ""]
    covariance: Float[Array, "fixed fixed"]
    intercept_variance: Float[Array, ""]
    residual_variance: Float[Array, ""]
    variance_covariance: Float[Array, "2 2"]
    effects: Float[Array, " S"]
    status: Int[Array, ""]
    subjects: tuple[Hashable, ...] = eqx.field(static=True)

    def predict(self, scores: Any, subjects: Any = None) -> Float[Array, " m"]:
        """The expected response of rows: with the effect of its subject where that is known, else without.

        Raises `ValueError` for scores of another number, and other than one subject a row.
        """
        scores = as_matrix(scores, "scores", (None, self.coefficients.size)).astype(self.coefficients.dtype)
        mean = scores @ self.coefficients + self.intercept
        if subjects is None:
            return mean
        place = {subject: row for row, subject in enumerate(self.subjects)}
        known = np.array([place.get(subject, -1) for subject in _as_labels(subjects, scores.shape[0])])
        return mean + jnp.where(known >= 0, self.effects[known], 0)

    def intervals(self, level: float = 0.95) -> Interval:
        """Of the intercept and the coefficients, K + 1 in that order: normal quantiles times standard errors (Wald).

        These take the variances for known, and are short for effects of scores that differ between few subjects. A score
        that is a linear combination of others has an infinite standard error. Raises `ValueError` for a level outside (0, 1).
        """
        check_level(level)
        values, variances = jnp.append(self.intercept, self.coefficients), jnp.diagonal(self.covariance)
        status = jnp.where(self.status == NON_FINITE, NOT_CONVERGED, VALID)
        return symmetric_interval(values, variances, level, jnp.broadcast_to(status, values.shape))

    def variance_intervals(self, level: float = 0.95) -> Interval:
        """Of the variances of the intercepts and of the residuals, in that order: symmetric in their logarithms, by the expected
        information.

        Where a variance is 0 its status is `BOUNDARY`: `upper` is then the quantile times the standard error. Raises `ValueError`
        for a level outside (0, 1).
        """
        check_level(level)
        values = jnp.stack([self.intercept_variance, self.residual_variance])
        error = jnp.sqrt(jnp.diagonal(self.variance_covariance))
        width = normal_quantile((1 + level) / 2, error.dtype) * error
        inside = values > 0
        factor = jnp.exp(width / jnp.where(inside, values, 1))
        lower, upper = jnp.where(inside, values / factor, 0), jnp.where(inside, values * factor, width)
        status = jnp.where(self.status == NON_FINITE, NOT_CONVERGED, jnp.where(inside, VALID, BOUNDARY))
        return Interval(values, error, lower, upper, status)


def _as_labels(subjects: Any, n: int) -> list[Hashable]:
    """One subject for each of n rows."""
    if isinstance(subjects, jax.core.Tracer):
        raise ValueError("subjects: are traced; expected values that are known outside of compiled code")
    array = np.asarray(subjects)
    if array.shape != (n,):
        raise ValueError(f"subjects: has shape {array.shape}; expected ({n},), the subject of each row")
    labels = array.tolist()
    lacking = sum(label is None or type(label).__name__ == "NAType" or label != label for label in labels)
    if lacking:
        raise ValueError(f"subjects: lack {lacking} of {n}; expected the subject of each row")
    return labels


def random_intercept(scores: Any, y: Any, subjects: Any, *, method: Method = "reml") -> RandomIntercept:
    """Linear regression of n responses on n × K scores, with a random intercept for each of S subjects (Laird and Ware 1982).

    `subjects` names the subject of each row: numbers or text, in any order. The restricted likelihood, or the likelihood itself
    (`method="ml"`), depends on coefficients and residual variance in closed form once the ratio of the two variances is given;
    the ratio is found by a grid, and to the last digits by bisection of the derivative. The covariance of a subject's n_i rows is
    1 + ratio on the diagonal and ratio off it, so that all that enters are products within subjects and n_i/(1 + n_i ratio) times
    those of their means: O(nK² + SK²), and no n × n matrix. Standard errors are those of generalised least squares, and of the
    expected information of the variances; a score that adds nothing to the others gets its share of least norm.

    >>> fit = random_intercept([[0.0], [1.0], [0.0], [1.0], [2.0], [0.0]], [1.0, 2.2, 3.0, 3.9, 5.0, 0.1], list("aabbbc"))
    >>> round(float(fit.coefficients[0]), 3), fit.subjects
    (1.043, ('a', 'b', 'c'))

    Raises `ValueError` that names the argument for scores or responses that are not finite, no more rows than coefficients,
    other than one subject a row, a single subject, subjects with one row each, or an unknown method.
    """
    scores = as_matrix(scores, "scores")
    n, K = scores.shape
    y = as_response(y, n).astype(scores.dtype)
    labels = _as_labels(subjects, n)
    names = tuple(dict.fromkeys(labels))
    check_option(method, "method", Method)
    if not 1 < len(names) < n:
        found = "a single one" if len(names) == 1 else "others in every row"
        raise ValueError(f"subjects: are {found}; expected at least two, and one of them in several rows")
    if n <= K + 1:
        raise ValueError(f"scores: has shape {scores.shape}; expected more rows than scores and the intercept, {K + 1}")
    fit = _random_intercept(scores, y, _codes(labels, names), len(names), method)
    return RandomIntercept(**fit, subjects=names)


def _codes(labels: Sequence[Hashable], names: tuple[Hashable, ...]) -> np.ndarray:
    place = {name: code for code, name in enumerate(names)}
    return np.array([place[label] for label in labels], np.int32)


class _Sums(NamedTuple):
    """Of columns (1, scores on their axes, y less its least squares on them): products within subjects, the subjects' means, and
    their numbers of rows; with the identity on axes that the scores have no extent in."""

    within: Float[Array, "q q"]
    means: Float[Array, "S q"]
    counts: Float[Array, " S"]
    unseen: Float[Array, "p p"]
    n_rows: float
    n_fixed: Float[Array, ""]

    def products(self, within: Float[Array, ""] | float, between: Float[Array, " S"]) -> Float[Array, "q q"]:
        """Products of the columns where those within subjects, and those of their means, count so often."""
        return within * self.within + self.means.T @ ((between * self.counts)[:, None] * self.means)


class _Profile(NamedTuple):
    """Generalised least squares at a ratio of the variances: coefficients, their covariance over the residual variance, the sum
    of squares, its divisor, and the logarithm of the likelihood, constants left out."""

    coefficients: Float[Array, " p"]
    inverse: Float[Array, "p p"]
    squares: Float[Array, ""]
    freedom: Float[Array, ""]
    value: Float[Array, ""]


def _profile(sums: _Sums, ratio: Float[Array, ""], method: Method) -> _Profile:
    products = sums.products(1.0, 1 / (1 + sums.counts * ratio))
    inverse, volume = spd_inverse(products[:-1, :-1] + sums.unseen)
    coefficients = inverse @ products[:-1, -1]
    squares = products[-1, -1] - coefficients @ products[:-1, -1]
    freedom = sums.n_rows - (sums.n_fixed if method == "reml" else jnp.zeros_like(sums.n_fixed))
    spread = jnp.sum(jnp.log1p(sums.counts * ratio)) + (volume if method == "reml" else 0)
    return _Profile(coefficients, inverse, squares, freedom, -(spread + freedom * jnp.log(squares)) / 2)


def _best_ratio(sums: _Sums, method: Method) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(the ratio of the variances at which the likelihood is largest, the largest that is looked at): there products of scores
    that differ between subjects alone have half of the digits."""
    value = lambda ratio: _profile(sums, ratio, method).value
    dtype = sums.counts.dtype
    powers = jnp.logspace(np.log10(LEAST_RATIO), -np.log10(jnp.finfo(dtype).eps) / 2, RATIOS, dtype=dtype)
    ratios = jnp.append(jnp.zeros(1, dtype), powers * sums.counts.size / sums.n_rows)
    best = jnp.nanargmax(jax.lax.map(value, ratios))
    slope = jax.grad(value)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        rises = slope(middle) > 0
        return jnp.where(rises, middle, low), jnp.where(rises, high, middle)

    ends = (ratios[jnp.maximum(best - 1, 0)], ratios[jnp.minimum(best + 1, RATIOS)])
    return jax.lax.fori_loop(0, BISECTIONS, halve, ends)[0], ratios[-1]


def _information(sums: _Sums, fixed: Array, of_intercept: Array, residual: Array, method: Method) -> Float[Array, "2 2"]:
    """The expected information on the two variances: ½ tr(P V_i P V_j), V_i the derivatives of the rows' covariance V, P = V⁻¹
    or, restricted, V⁻¹ − V⁻¹X(XᵀV⁻¹X)⁻¹XᵀV⁻¹ with `fixed` = (XᵀV⁻¹X)⁻¹."""
    total = residual + sums.counts * of_intercept
    by_mean = jnp.stack([sums.counts, jnp.ones_like(total)]) / total[None, :]
    by_row = jnp.stack([jnp.zeros_like(residual), 1 / residual])
    single = [sums.products(by_row[i] / residual, by_mean[i] / total)[:-1, :-1] @ fixed for i in (0, 1)]

    def entry(i: int, j: int) -> Array:
        trace = jnp.sum(by_mean[i] * by_mean[j] + (sums.counts - 1) * by_row[i] * by_row[j])
        if method == "ml":
            return trace / 2
        double = sums.products(by_row[i] * by_row[j] / residual, by_mean[i] * by_mean[j] / total)[:-1, :-1] @ fixed
        return (trace - 2 * jnp.trace(double) + jnp.trace(single[i] @ single[j])) / 2

    return jnp.stack([jnp.stack([entry(i, j) for j in (0, 1)]) for i in (0, 1)])


@compiled
def _random_intercept(
    scores: Float[Array, "n K"], y: Float[Array, " n"], subject: Int[Array | np.ndarray, " n"], n_subjects: int, method: Method
) -> dict[str, Array]:
    axes = score_axes(scores)
    sums, least_squares = _sums(axes, y, jnp.asarray(subject), n_subjects)
    ratio, largest = _best_ratio(sums, method)
    at = _profile(sums, ratio, method)
    residual = at.squares / at.freedom
    of_all = residual * at.inverse
    information = _information(sums, of_all, ratio * residual, residual, method)
    shrunk = ratio * sums.counts / (1 + ratio * sums.counts)
    effects = shrunk * (sums.means[:, -1] - sums.means[:, :-1] @ at.coefficients)
    own = least_squares + at.coefficients
    b = axes.turn @ own[1:]
    shift = jnp.concatenate([jnp.ones((1, 1), b.dtype), -(axes.centre @ axes.turn)[None, :]], axis=1)
    of_scores, with_intercept = covariance_of_scores(axes, of_all[1:, 1:]), axes.turn @ (of_all @ shift.T)[1:]
    covariance = jnp.block([[shift @ of_all @ shift.T, with_intercept.T], [with_intercept, of_scores]])
    ended = jnp.where((ratio == 0) | (ratio >= largest / 2), ON_BOUND, CONVERGED)
    status = jnp.where(jnp.isfinite(b).all() & jnp.isfinite(at.value), ended, NON_FINITE)
    return {
        "coefficients": b,
        "intercept": own[0] - axes.centre @ b,
        "covariance": covariance,
        "intercept_variance": ratio * residual,
        "residual_variance": residual,
        "variance_covariance": jnp.linalg.inv(information),
        "effects": effects,
        "status": status,
    }


def _sums(axes: ScoreAxes, y: Float[Array, " n"], subject: Int[Array, " n"], n_subjects: int) -> tuple[_Sums, Float[Array, " p"]]:
    """(what the likelihood needs, the least-squares coefficients whose fit is taken off y, so that it keeps its digits)."""
    n, dtype = y.size, y.dtype
    columns = jnp.concatenate([jnp.ones((n, 1), dtype), axes.rows], axis=1)
    least_squares = jnp.append(y.mean(), axes.rows.T @ (y - y.mean()) / (n - 1))
    columns = jnp.concatenate([columns, (y - columns @ least_squares)[:, None]], axis=1)
    counts = jax.ops.segment_sum(jnp.ones(n, dtype), subject, n_subjects)
    means = jax.ops.segment_sum(columns, subject, n_subjects) / counts[:, None]
    apart = columns - means[subject]
    unseen = jnp.diag(jnp.append(jnp.zeros(1, bool), ~axes.visible)).astype(dtype)
    return _Sums(apart.T @ apart, means, counts, unseen, float(n), 1 + axes.visible.sum().astype(dtype)), least_squares
