"""Linear regression of a response on scores, from second moments (theory: Section 5).

A linear regression on linear scores needs no more of the labelled rows than their second moments. `FoldMoments` holds these by
fold of the cross-validation; `FoldMoments.project` takes them from features to scores in O(d²K). Each regression returns a
`Regression` on the scores; with a score map C (d × K) the same prediction from features has coefficients C b.
"""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from hcl_jax.compiled import compiled
from hcl_jax.prediction.paths import (
    Rule,
    accelerated,
    check_option,
    choose_penalty,
    group_index,
    group_norms,
    path_tolerance,
    positive,
    shrink_groups,
)
from hcl_jax.structure import CONVERGED, NON_FINITE, ON_BOUND, OUT_OF_STEPS, Hierarchy, as_hierarchy
from hcl_jax.views import as_key, as_matrix, as_number, as_response, check_count, check_folds

PROJECTED = ON_BOUND  # what that status says of a regression
EIGENVALUE_FLOOR = 1e-2
"""Of the mean score variance: what eigenvalues of an indefinite debiased moment are raised to."""
N_PENALTIES = 50
Choice = Literal["cv", "evidence"]


class FoldMoments(eqx.Module):
    """Sums over the labelled rows of each of F folds: of rows, 1, x, xxᵀ, xy, y and y².

    Sums are about `origin`, which takes no digits from data far from zero.
    """

    count: Float[Array, " F"]
    x: Float[Array, "F d"]
    xx: Float[Array, "F d d"]
    xy: Float[Array, "F d"]
    y: Float[Array, " F"]
    yy: Float[Array, " F"]
    origin: Float[Array, " d"]
    y_origin: Float[Array, ""]

    @classmethod
    def from_rows(
        cls, x: Any, y: Any, n_folds: int = 5, key: Any = None, folds: Int[np.ndarray, " m"] | None = None
    ) -> "FoldMoments":
        """Of m × d rows and their m responses, cut into folds of nearly equal size, in the order given or shuffled by `key`; or
        in the `folds` given, of every row a number below `n_folds`.

        Raises `ValueError` for fewer rows than folds, fewer than two folds, a response that is not one number a row, and, outside
        of compiled code, values that are not finite.
        """
        x = as_matrix(x, "x")
        check_folds(n_folds, x.shape[0])
        y = as_response(y, x.shape[0]).astype(x.dtype)
        if key is not None:
            order = jr.permutation(as_key(key, "to shuffle the rows"), x.shape[0])
            x, y = x[order], y[order]
        edges = [round(x.shape[0] * i / n_folds) for i in range(n_folds + 1)]
        if folds is not None:
            by_fold = np.argsort(folds, kind="stable")
            x, y, edges = x[by_fold], y[by_fold], [0, *np.cumsum(np.bincount(folds, minlength=n_folds)).tolist()]
        origin, y_origin = x.mean(axis=0), y.mean()
        x, y = x - origin[None, :], y - y_origin
        parts = [(x[a:b], y[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        return cls(
            jnp.diff(jnp.array(edges)).astype(x.dtype),
            jnp.stack([rows.sum(axis=0) for rows, _ in parts]),
            jnp.stack([rows.T @ rows for rows, _ in parts]),
            jnp.stack([rows.T @ responses for rows, responses in parts]),
            jnp.stack([responses.sum() for _, responses in parts]),
            jnp.stack([jnp.sum(responses**2) for _, responses in parts]),
            origin,
            y_origin,
        )

    def project(self, score_map: Any) -> "FoldMoments":
        """The moments of the scores x score_map."""
        C = as_matrix(score_map, "score_map", (self.x.shape[1], None))
        xx = jnp.stack([C.T @ (fold @ C) for fold in self.xx])
        return FoldMoments(self.count, self.x @ C, xx, self.xy @ C, self.y, self.yy, C.T @ self.origin, self.y_origin)


class Regression(eqx.Module):
    """y ≈ bᵀz + intercept. `penalty` is 0 where there is none. `status` is one of `hcl_jax.structure`; `PROJECTED` is converged,
    where the debiased moment of all rows, or of all but one fold, was indefinite: its eigenvalues were raised to at least 1 % of
    the mean variance of the scores."""

    coefficients: Float[Array, " K"]
    intercept: Float[Array, ""]
    penalty: Float[Array, ""]
    status: Int[Array, ""]


class _Problems(NamedTuple):
    """½bᵀHb − gᵀb of all rows (first) and of all rows but one fold each; and what the held-out folds think of a b."""

    H: Float[Array, "sets K K"]
    g: Float[Array, "sets K"]
    yy: Float[Array, " sets"]
    eigenvalues: Float[Array, "sets K"]
    eigenvectors: Float[Array, "sets K K"]
    indefinite: Array
    held_H: Float[Array, "F K K"]
    held_g: Float[Array, "F K"]
    held_yy: Float[Array, " F"]
    score_mean: Float[Array, " K"]
    y_mean: Float[Array, ""]
    n_rows: Float[Array, ""]


def _problems(moments: FoldMoments, noise_gram: Float[Array, "K K"] | None) -> _Problems:
    """Training and held-out moments about the training means, less the noise in the scores; H made positive definite."""

    def training(fold_sums: Array) -> Array:
        total = fold_sums.sum(axis=0, keepdims=True)
        return jnp.concatenate([total, total - fold_sums])

    count, x, y = training(moments.count), training(moments.x), training(moments.y)
    mean, y_mean = x / count[:, None], y / count
    noise = 0 if noise_gram is None else noise_gram[None, :, :]
    H = training(moments.xx) / count[:, None, None] - mean[:, :, None] * mean[:, None, :] - noise
    g = training(moments.xy) / count[:, None] - mean * y_mean[:, None]
    yy = training(moments.yy) / count - y_mean**2

    held, out, y_out = moments.count, moments.x / moments.count[:, None], moments.y / moments.count
    m, ym = mean[1:], y_mean[1:]
    cross = out[:, :, None] * m[:, None, :]
    held_H = moments.xx / held[:, None, None] - cross - jnp.swapaxes(cross, 1, 2) + m[:, :, None] * m[:, None, :] - noise
    held_g = moments.xy / held[:, None] - m * y_out[:, None] - (out - m) * ym[:, None]
    held_yy = moments.yy / held - 2 * ym * y_out + ym**2

    values, vectors = jax.lax.map(jnp.linalg.eigh, H)
    floor = EIGENVALUE_FLOOR * jnp.trace(H[0] + (0 if noise_gram is None else noise_gram)) / H.shape[1]
    indefinite = (values[:, :1] < 0) if noise_gram is not None else jnp.zeros_like(values[:, :1], bool)
    raised = jnp.where(indefinite, jnp.maximum(values, floor), jnp.maximum(values, 0))
    H = jnp.where(indefinite[:, :, None], (vectors * raised[:, None, :]) @ jnp.swapaxes(vectors, 1, 2), H)
    origin = (moments.origin, moments.y_origin)
    return _Problems(
        H, g, yy, raised, vectors, indefinite.any(), held_H, held_g, held_yy, mean[0] + origin[0], y_mean[0] + origin[1], count[0]
    )


def _regression(
    problems: _Problems, coefficients: Float[Array, " K"], penalty: Float[Array, ""], converged: Array | bool = True
) -> Regression:
    intercept = problems.y_mean - coefficients @ problems.score_mean
    ended = jnp.where(problems.indefinite, PROJECTED, CONVERGED)
    status = jnp.where(jnp.isfinite(coefficients).all(), jnp.where(converged, ended, OUT_OF_STEPS), NON_FINITE)
    return Regression(coefficients, intercept, penalty, status)


def _held_out_errors(problems: _Problems, b: Float[Array, "L F K"]) -> Float[Array, "L F"]:
    """The (debiased) mean squared error of fold f's coefficients on that fold, for every penalty."""
    quadratic = jnp.einsum("lfi,fij,lfj->lf", b, problems.held_H, b)
    return problems.held_yy[None, :] - 2 * jnp.einsum("fi,lfi->lf", problems.held_g, b) + quadratic


def _check(moments: FoldMoments, hierarchy: Hierarchy | None = None) -> None:
    """Raise `ValueError` unless these are moments, and the hierarchy, where one is needed, has as many factors as they scores."""
    if not isinstance(moments, FoldMoments):
        raise ValueError(f"moments: are of type {type(moments).__name__}; expected those of FoldMoments.from_rows(scores, y)")
    n_scores = moments.x.shape[-1]
    if hierarchy is not None and as_hierarchy(hierarchy).n_factors != n_scores:
        raise ValueError(f"hierarchy: has {hierarchy.n_factors} factors; expected {n_scores}, as there are scores")


def _noise_gram(noise_gram: Any, moments: FoldMoments) -> Float[Array, "K K"] | None:
    """The noise in the scores, if any, checked: `ValueError` unless it is K × K."""
    n_scores = moments.x.shape[-1]
    return None if noise_gram is None else as_matrix(noise_gram, "noise_gram", (n_scores, n_scores)).astype(moments.x.dtype)


def least_squares(moments: FoldMoments, noise_gram: Any = None) -> Regression:
    """Least squares; debiased where `noise_gram`, the covariance σ²CᵀC of the noise in the scores, is given.

    Minimises (1/2m) Σ (y − bᵀz)² − ½bᵀ(noise_gram)b, with an intercept. Directions without variance get no coefficient. Raises
    `ValueError` that names the argument, as all regressions do: no moments, a `noise_gram` or hierarchy for other scores.
    """
    _check(moments)
    return _least_squares(moments, _noise_gram(noise_gram, moments))


@compiled
def _least_squares(moments: FoldMoments, noise_gram: Float[Array, "K K"] | None) -> Regression:
    problems = _problems(moments, noise_gram)
    values, vectors = problems.eigenvalues[0], problems.eigenvectors[0]
    visible = values > 10 * values.size * jnp.finfo(values.dtype).eps * values[-1]
    inverse = jnp.where(visible, 1 / jnp.where(visible, values, 1), 0)
    return _regression(problems, vectors @ (inverse * (vectors.T @ problems.g[0])), jnp.zeros((), values.dtype))


def _check_ridge(moments: FoldMoments, choose: Choice) -> None:
    _check(moments)
    check_option(choose, "choose", Choice)


@compiled(check=_check_ridge)
def ridge(moments: FoldMoments, choose: Choice = "cv") -> Regression:
    """Least squares with the penalty (μ/2)‖b‖², μ on a grid from 1e-6 to 1e3 mean score variances: by cross-validation, or where
    the marginal likelihood of a normal prior is largest (its variance and that of the noise profiled out)."""
    problems = _problems(moments, None)
    values, vectors = problems.eigenvalues, problems.eigenvectors
    unit = positive(values[0].mean())
    penalties = unit * jnp.logspace(3, -6, N_PENALTIES, dtype=values.dtype)
    rotated = jnp.einsum("fij,fi->fj", vectors, problems.g)
    shrunk = rotated[None, :, :] / (values[None, :, :] + penalties[:, None, None])
    if choose == "cv":
        b = jnp.einsum("fij,lfj->lfi", vectors[1:], shrunk[:, 1:])
        best = choose_penalty(_held_out_errors(problems, b), "min")
    else:
        left = problems.yy[0] - jnp.sum(rotated[0][None, :] * shrunk[:, 0], axis=1)
        volume = jnp.sum(jnp.log1p(values[0][None, :] / penalties[:, None]), axis=1)
        best = jnp.argmin(jnp.log(left) + volume / problems.n_rows)
    return _regression(problems, vectors[0] @ shrunk[best, 0], penalties[best])


def group_lasso(
    moments: FoldMoments,
    hierarchy: Hierarchy,
    noise_gram: Any = None,
    *,
    rule: Rule = "min",
    adaptive: float | Float[Array, ""] = 0.0,
    max_steps: int = 1000,
) -> Regression:
    """Least squares (debiased as in `least_squares`) with the penalty λ Σ_s w_s‖b_s‖ over the hierarchy's structures.

    w_s = √r_s, divided by ‖b̂_s‖^adaptive of the unpenalised fit to the same rows where `adaptive` is positive. λ runs down a
    warm-started path of 50 from the smallest that leaves nothing to its 1,000th part, and is chosen by cross-validation: every
    fold is scored by the same criterion, with coefficients, means and weights of the other folds only. Solved by accelerated
    proximal gradients. Source: Yuan and Lin (2006); adaptive weights: Zou (2006), Wang and Leng (2008).
    """
    _check(moments, as_hierarchy(hierarchy))
    check_option(rule, "rule", Rule)
    check_count(max_steps, "max_steps", 1)
    power = as_number(adaptive, "adaptive", "a number of at least 0", lambda power: 0 <= power < np.inf)
    power = jnp.asarray(power, moments.x.dtype)  # an array: other powers find the same program
    return _group_lasso(moments, hierarchy, _noise_gram(noise_gram, moments), power, rule, max_steps)


@compiled
def _group_lasso(
    moments: FoldMoments,
    hierarchy: Hierarchy,
    noise_gram: Float[Array, "K K"] | None,
    adaptive: Float[Array, ""],
    rule: Rule,
    max_steps: int,
) -> Regression:
    problems, groups = _problems(moments, noise_gram), group_index(hierarchy)
    dtype = problems.g.dtype
    weights = _group_weights(problems, groups, adaptive)
    largest = positive(problems.eigenvalues[:, -1])
    top = jnp.max(group_norms(problems.g[0], groups) / weights[0])
    penalties = top * jnp.logspace(0, -3, N_PENALTIES, dtype=dtype)

    def solve(H, g, size, weight, start, penalty):
        def step(b):
            return shrink_groups(b - (H @ b - g) / size, penalty * weight / size, groups)

        return accelerated(step, start, path_tolerance(dtype), max_steps)

    def along(starts, penalty):
        b, converged = jax.vmap(solve, in_axes=(0, 0, 0, 0, 0, None))(problems.H, problems.g, largest, weights, starts, penalty)
        return b, (b, converged[0])

    _, (path, converged) = jax.lax.scan(along, jnp.zeros_like(problems.g), penalties)
    best = choose_penalty(_held_out_errors(problems, path[:, 1:]), rule)
    return _regression(problems, path[best, 0], penalties[best], converged[best])


def _group_weights(problems: _Problems, groups: np.ndarray, adaptive: Float[Array, ""]) -> Float[Array, "sets S"]:
    """√r_s over ‖b̂_s‖^adaptive, from the unpenalised coefficients of every set of training rows; a b̂_s of 0 weighs 1e6 times."""
    sizes = jnp.sqrt(jnp.asarray(np.bincount(groups), problems.g.dtype))
    values = jnp.maximum(problems.eigenvalues, 1e-6 * positive(problems.eigenvalues[:, -1:]))
    rotated = jnp.einsum("fij,fi->fj", problems.eigenvectors, problems.g) / values
    norms = group_norms(jnp.einsum("fij,fj->fi", problems.eigenvectors, rotated), groups)
    return sizes[None, :] / jnp.maximum(norms / positive(norms.max(axis=1, keepdims=True)), 1e-6) ** adaptive


def _check_relevance(moments: FoldMoments, hierarchy: Hierarchy, max_steps: int) -> None:
    _check(moments, as_hierarchy(hierarchy))
    check_count(max_steps, "max_steps", 1)


@compiled(check=_check_relevance)
def group_relevance(moments: FoldMoments, hierarchy: Hierarchy, max_steps: int = 500) -> Regression:
    """Least squares with a normal prior on each structure's coefficients, its variance where the marginal likelihood is largest.

    A structure that does not help is shrunk to nearly nothing, without cross-validation. Fixed-point rounds of MacKay (1992):
    a_s = γ_s/‖b_s‖², γ_s = r_s − a_s tr Σ_ss, noise variance = m·(mean squared residual)/(m − Σγ_s).
    """
    problems, groups = _problems(moments, None), group_index(hierarchy)
    H, g, m = problems.H[0], problems.g[0], problems.n_rows
    sizes = jnp.asarray(np.bincount(groups), g.dtype)
    one_hot = jnp.asarray(groups[:, None] == np.arange(len(sizes))[None, :], g.dtype)
    scale = positive(jnp.trace(H) / H.shape[0])

    def fit(precision, noise):
        """(b, γ) at prior precisions of the groups, in units of the noise variance over m."""
        factor = jax.scipy.linalg.cho_factor(H + jnp.diag(precision[groups]), lower=True)
        inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(H.shape[0], dtype=H.dtype))
        b = inverse @ g
        return b, jnp.maximum(sizes - precision * (jnp.diagonal(inverse) @ one_hot), 1e-6 * sizes)

    def advance(state):
        precision, noise, _, step = state
        b, effective = fit(precision, noise)
        residual = problems.yy[0] - 2 * g @ b + b @ H @ b
        noise = m * residual / (m - effective.sum())
        energy = jnp.maximum((b**2) @ one_hot, jnp.finfo(b.dtype).tiny)
        update = jnp.clip(effective * noise / (m * energy), 1e-8 * scale, 1e8 * scale)
        return update, noise, jnp.max(jnp.abs(jnp.log(update / precision))), step + 1

    state = (jnp.full_like(sizes, 1e-3) * scale, problems.yy[0], jnp.ones((), g.dtype), 0)
    precision, noise, change, _ = jax.lax.while_loop(lambda s: (s[2] > 1e-4) & (s[3] < max_steps), advance, state)
    b, _ = fit(precision, noise)
    return _regression(problems, b, precision.mean(), change <= 1e-4)
