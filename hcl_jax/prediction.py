"""Predicting a response from scores (theory: Section 5).

A linear regression on linear scores needs no more of the labelled rows than their second moments. `FoldMoments` holds these by
fold of the cross-validation; `FoldMoments.project` takes them from features to scores in O(d²K). Each regression returns a
`Regression` on the scores; with a score map C (d × K) the same prediction from features has coefficients C b.

Responses that are classes need the rows: `softmax_regression`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Key

from hcl_jax.estimators.estimate import CONVERGED, NON_FINITE, OUT_OF_STEPS
from hcl_jax.linalg import least_squares_map
from hcl_jax.structure import Hierarchy
from hcl_jax.views import as_matrix, by_feature

PROJECTED = 3  # a status beside those of `Estimate`
EIGENVALUE_FLOOR = 1e-2
"""Of the mean score variance: what eigenvalues of an indefinite debiased moment are raised to."""
PRUNED = 1e-6
N_PENALTIES = 50
Rule = Literal["min", "one-se"]


def least_squares_scores(loadings: Float[Array, "d K"]) -> Float[Array, "d K"]:
    """Λ(ΛᵀΛ)⁺: the map of rows x to ẑ = (ΛᵀΛ)⁻¹Λᵀx. Columns that were pruned, to a millionth of the strongest in variance, have
    zero scores: what they would be is noise alone."""
    return least_squares_map(loadings, PRUNED)


def posterior_mean_scores(loadings: Any, noise_variance: Any) -> Float[Array, "d K"]:
    """Ψ⁻¹Λ(ΛᵀΨ⁻¹Λ + I)⁻¹: the map of rows x to E[z|x]. y regressed on these needs no debiasing: E[y|x] = βᵀE[z|x].

    Ψ = diag(ψ) for a vector of one noise variance a feature. For one number, σ²I, it is Λ(ΛᵀΛ + σ²I)⁻¹, least squares where σ² is
    0. Raises `ValueError` that names the argument for a vector of another length, and for values of ψ that are not positive.
    """
    L = as_matrix(loadings, "loadings")
    shared = jnp.ndim(noise_variance) == 0
    psi = by_feature(noise_variance, L.shape[0], L.dtype, positive=not shared)
    scaled = L if shared else L / psi[:, None]
    core = L.T @ scaled + (psi[0] if shared else 1) * jnp.eye(L.shape[1], dtype=L.dtype)
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(core, lower=True), scaled.T).T


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
    def from_rows(cls, x: Float[Array, "m d"], y: Array, n_folds: int = 5, key: Key[Array, ""] | None = None) -> "FoldMoments":
        """Of m rows and their responses, cut into folds of nearly equal size: in the order given, or shuffled by `key`.

        Raises `ValueError` for fewer rows than folds, fewer than two folds, a response that is not one number a row, and, outside
        of compiled code, values that are not finite.
        """
        check_labelled(x, y, n_folds)
        if key is not None:
            order = jr.permutation(key, x.shape[0])
            x, y = x[order], y[order]
        edges = [round(x.shape[0] * i / n_folds) for i in range(n_folds + 1)]
        origin, y_origin = x.mean(axis=0), y.mean()
        x, y = x - origin[None, :], y - y_origin
        folds = [(x[a:b], y[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        return cls(
            jnp.diff(jnp.array(edges)).astype(x.dtype),
            jnp.stack([rows.sum(axis=0) for rows, _ in folds]),
            jnp.stack([rows.T @ rows for rows, _ in folds]),
            jnp.stack([rows.T @ responses for rows, responses in folds]),
            jnp.stack([responses.sum() for _, responses in folds]),
            jnp.stack([jnp.sum(responses**2) for _, responses in folds]),
            origin,
            y_origin,
        )

    def project(self, score_map: Float[Array, "d K"]) -> "FoldMoments":
        """The moments of the scores x score_map."""
        C = score_map
        xx = jnp.stack([C.T @ (fold @ C) for fold in self.xx])
        return FoldMoments(self.count, self.x @ C, xx, self.xy @ C, self.y, self.yy, C.T @ self.origin, self.y_origin)


def check_labelled(x: Array, y: Array, n_folds: int) -> None:
    """Raise `ValueError` that names what is wrong with labelled rows."""
    if n_folds < 2:
        raise ValueError(f"n_folds: is {n_folds}; expected at least 2")
    if y.ndim != 1 or y.shape[0] != x.shape[0]:
        raise ValueError(f"y: has shape {y.shape}; expected one number for each of the {x.shape[0]} rows")
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(f"y: has type {y.dtype}; expected floating-point numbers (see softmax_regression for classes)")
    if x.shape[0] < n_folds:
        raise ValueError(f"x: has {x.shape[0]} rows; expected at least as many as folds, {n_folds}")
    for name, values in (("x", x), ("y", y)):
        if not isinstance(values, jax.core.Tracer) and not bool(jnp.isfinite(values).all()):
            raise ValueError(f"{name}: holds NaN or infinite values; expected finite numbers")


class Regression(eqx.Module):
    """y ≈ bᵀz + intercept. `penalty` is 0 where there is none. `status`: 0 converged, 1 out of steps, 2 non-finite, 3 converged,
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


def choose_penalty(errors: Float[Array, "L F"], rule: Rule) -> Int[Array, ""]:
    """Where to stop along a path of falling penalties: at the smallest mean error over the folds, or at the first mean within one
    standard error of it."""
    mean = errors.mean(axis=1)
    best = jnp.argmin(mean)
    if rule == "min":
        return best
    spread = errors.std(axis=1, ddof=1)[best] / jnp.sqrt(jnp.asarray(errors.shape[1], errors.dtype))
    return jnp.argmax(mean <= mean[best] + spread)


def least_squares(moments: FoldMoments, noise_gram: Float[Array, "K K"] | None = None) -> Regression:
    """Least squares; debiased where `noise_gram`, the covariance σ²CᵀC of the noise in the scores, is given.

    Minimises (1/2m) Σ (y − bᵀz)² − ½bᵀ(noise_gram)b, with an intercept. Directions without variance get no coefficient.
    """
    problems = _problems(moments, noise_gram)
    values, vectors = problems.eigenvalues[0], problems.eigenvectors[0]
    visible = values > 10 * values.size * jnp.finfo(values.dtype).eps * values[-1]
    inverse = jnp.where(visible, 1 / jnp.where(visible, values, 1), 0)
    return _regression(problems, vectors @ (inverse * (vectors.T @ problems.g[0])), jnp.zeros((), values.dtype))


def ridge(moments: FoldMoments, choose: Literal["cv", "evidence"] = "cv") -> Regression:
    """Least squares with the penalty (μ/2)‖b‖², μ on a grid from 1e-6 to 1e3 mean score variances: by cross-validation, or where
    the marginal likelihood of a normal prior is largest (its variance and that of the noise profiled out)."""
    problems = _problems(moments, None)
    values, vectors = problems.eigenvalues, problems.eigenvectors
    unit = _positive(values[0].mean())
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


def group_index(hierarchy: Hierarchy) -> np.ndarray:
    """0-based structure of each of the K scores."""
    return np.repeat(np.arange(len(hierarchy.ranks)), [rank for _, rank in hierarchy.ranks])


def _group_norms(b: Float[Array, "... K"], groups: np.ndarray) -> Float[Array, "... S"]:
    one_hot = jnp.asarray(groups[:, None] == np.arange(groups.max() + 1)[None, :], b.dtype)
    return jnp.sqrt((b**2) @ one_hot)


def shrink_groups(b: Float[Array, " K"], thresholds: Float[Array, " S"], groups: np.ndarray) -> Float[Array, " K"]:
    """The proximal map of Σ_s thresholds_s ‖b_s‖: every block shortened by its threshold, to zero at least."""
    norms = _group_norms(b, groups)
    kept = jnp.maximum(1 - thresholds / jnp.where(norms > 0, norms, 1), 0)
    return b * kept[groups]


class _Iterate(NamedTuple):
    point: Array
    ahead: Array
    momentum: Array
    change: Array
    step: Array


def _accelerated(step: Callable[[Array], Array], start: Array, tolerance: float, max_steps: int) -> tuple[Array, Array]:
    """Accelerated proximal gradient steps, their momentum restarted when it points back (O'Donoghue and Candès 2015). Returns the
    point, and whether its last change was at most `tolerance` of its size."""

    def advance(s: _Iterate) -> _Iterate:
        point = step(s.ahead)
        forward = jnp.sum((s.ahead - point) * (point - s.point)) <= 0
        momentum = jnp.where(forward, (1 + jnp.sqrt(1 + 4 * s.momentum**2)) / 2, 1)
        ahead = point + jnp.where(forward, (s.momentum - 1) / momentum, 0) * (point - s.point)
        size = jnp.maximum(jnp.linalg.norm(point), jnp.finfo(point.dtype).tiny)
        return _Iterate(point, ahead, momentum, jnp.linalg.norm(point - s.ahead) / size, s.step + 1)

    one = jnp.ones((), start.dtype)
    state = _Iterate(start, start, one, one, jnp.zeros((), int))
    state = jax.lax.while_loop(lambda s: (s.change > tolerance) & (s.step < max_steps), advance, state)
    return state.point, state.change <= tolerance


def _positive(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The scale, 1 where it is 0: scores that are all zero get coefficients of zero, whatever they are measured by."""
    return jnp.where(scale > 0, scale, 1)


def _tolerance(dtype: jnp.dtype) -> float:
    return 1e-8 if jnp.finfo(dtype).bits == 64 else 1e-5


def group_lasso(
    moments: FoldMoments,
    hierarchy: Hierarchy,
    noise_gram: Float[Array, "K K"] | None = None,
    *,
    rule: Rule = "min",
    adaptive: float = 0.0,
    max_steps: int = 1000,
) -> Regression:
    """Least squares (debiased as in `least_squares`) with the penalty λ Σ_s w_s‖b_s‖ over the hierarchy's structures.

    w_s = √r_s, divided by ‖b̂_s‖^adaptive of the unpenalised fit to the same rows where `adaptive` is positive. λ runs down a
    warm-started path of 50 from the smallest that leaves nothing to its 1,000th part, and is chosen by cross-validation: every
    fold is scored by the same criterion, with coefficients, means and weights of the other folds only. Solved by accelerated
    proximal gradients. Source: Yuan and Lin (2006); adaptive weights: Zou (2006), Wang and Leng (2008).
    """
    problems, groups = _problems(moments, noise_gram), group_index(hierarchy)
    dtype = problems.g.dtype
    weights = _group_weights(problems, groups, adaptive)
    largest = _positive(problems.eigenvalues[:, -1])
    top = jnp.max(_group_norms(problems.g[0], groups) / weights[0])
    penalties = top * jnp.logspace(0, -3, N_PENALTIES, dtype=dtype)

    def solve(H, g, size, weight, start, penalty):
        def step(b):
            return shrink_groups(b - (H @ b - g) / size, penalty * weight / size, groups)

        return _accelerated(step, start, _tolerance(dtype), max_steps)

    def along(starts, penalty):
        b, converged = jax.vmap(solve, in_axes=(0, 0, 0, 0, 0, None))(problems.H, problems.g, largest, weights, starts, penalty)
        return b, (b, converged[0])

    _, (path, converged) = jax.lax.scan(along, jnp.zeros_like(problems.g), penalties)
    best = choose_penalty(_held_out_errors(problems, path[:, 1:]), rule)
    return _regression(problems, path[best, 0], penalties[best], converged[best])


def _group_weights(problems: _Problems, groups: np.ndarray, adaptive: float) -> Float[Array, "sets S"]:
    """√r_s over ‖b̂_s‖^adaptive, from the unpenalised coefficients of every set of training rows; a b̂_s of 0 weighs 1e6 times."""
    sizes = jnp.sqrt(jnp.asarray(np.bincount(groups), problems.g.dtype))
    values = jnp.maximum(problems.eigenvalues, 1e-6 * _positive(problems.eigenvalues[:, -1:]))
    rotated = jnp.einsum("fij,fi->fj", problems.eigenvectors, problems.g) / values
    norms = _group_norms(jnp.einsum("fij,fj->fi", problems.eigenvectors, rotated), groups)
    return sizes[None, :] / jnp.maximum(norms / _positive(norms.max(axis=1, keepdims=True)), 1e-6) ** adaptive


def group_relevance(moments: FoldMoments, hierarchy: Hierarchy, max_steps: int = 500) -> Regression:
    """Least squares with a normal prior on each structure's coefficients, its variance where the marginal likelihood is largest.

    A structure that does not help is shrunk to nearly nothing, without cross-validation. Fixed-point rounds of MacKay (1992):
    a_s = γ_s/‖b_s‖², γ_s = r_s − a_s tr Σ_ss, noise variance = m·(mean squared residual)/(m − Σγ_s).
    """
    problems, groups = _problems(moments, None), group_index(hierarchy)
    H, g, m = problems.H[0], problems.g[0], problems.n_rows
    sizes = jnp.asarray(np.bincount(groups), g.dtype)
    one_hot = jnp.asarray(groups[:, None] == np.arange(len(sizes))[None, :], g.dtype)
    scale = _positive(jnp.trace(H) / H.shape[0])

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


class Classifier(eqx.Module):
    """P(class = c | z) ∝ exp(zᵀB_c + intercept_c). `status` as in `Regression`; `held_out` is the mean log loss of the folds."""

    coefficients: Float[Array, "K C"]
    intercept: Float[Array, " C"]
    penalty: Float[Array, ""]
    held_out: Float[Array, ""]
    status: Int[Array, ""]

    def log_probabilities(self, scores: Float[Array, "n K"]) -> Float[Array, "n C"]:
        """The logarithm of the probability of every class, for rows of scores."""
        return jax.nn.log_softmax(scores @ self.coefficients + self.intercept[None, :], axis=1)

    def predict(self, scores: Float[Array, "n K"]) -> Int[Array, " n"]:
        """The most probable class, 0 … C − 1."""
        return jnp.argmax(self.log_probabilities(scores), axis=1)


def check_classes(scores: Array, labels: Array, n_classes: int, n_folds: int) -> None:
    """Raise `ValueError` that names what is wrong with labelled rows; what needs values is not checked inside compiled code."""
    if labels.ndim != 1 or labels.shape[0] != scores.shape[0]:
        raise ValueError(f"labels: has shape {labels.shape}; expected one class for each of the {scores.shape[0]} rows")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels: has type {labels.dtype}; expected integers from 0 to {n_classes - 1}")
    if n_classes < 2:
        raise ValueError(f"n_classes: is {n_classes}; expected at least 2")
    if n_folds < 2 or scores.shape[0] < n_folds:
        raise ValueError(f"n_folds: is {n_folds}; expected from 2 to the number of rows, {scores.shape[0]}")
    if isinstance(labels, jax.core.Tracer) or isinstance(scores, jax.core.Tracer):
        return
    if int(labels.min()) < 0 or int(labels.max()) >= n_classes:
        raise ValueError(f"labels: from {int(labels.min())} to {int(labels.max())}; expected from 0 to {n_classes - 1}")
    if int(labels.min()) == int(labels.max()):
        raise ValueError(f"labels: all rows are of class {int(labels.min())}; expected at least two classes")
    if not bool(jnp.isfinite(scores).all()):
        raise ValueError("scores: holds NaN or infinite values; expected finite numbers")


def fold_of_rows(key: Key[Array, ""], n: int, n_folds: int) -> Int[Array, " n"]:
    """The fold of each row, 0 … n_folds − 1: nearly equal in size, shuffled by `key`."""
    return jr.permutation(key, jnp.arange(n) % n_folds)


def softmax_regression(
    scores: Float[Array, "n K"],
    labels: Array,
    n_classes: int,
    hierarchy: Hierarchy | None = None,
    *,
    key: Key[Array, ""],
    n_folds: int = 5,
    rule: Rule = "min",
    n_penalties: int = 15,
    max_steps: int = 300,
    fold_scores: Float[Array, "F n K"] | None = None,
) -> Classifier:
    """Multinomial logistic regression with a ridge penalty, (μ/2)‖B‖_F², or, where a hierarchy is given, the group penalty
    λ Σ_s √r_s ‖B_s‖_F over its structures.

    The penalty is chosen by the log loss of folds shuffled by `key`, along a warm-started path. Accelerated steps under the bound
    of Böhning (1992) on the curvature, ½ZᵀZ/n; for ridge in the principal axes of the scores, where that bound is diagonal.

    Scores that were learned from the labels look better on the rows that they were learned from than on others. `fold_scores` are
    then, for each of the folds `fold_of_rows(key, n, n_folds)`, the scores of all rows from a representation that was fitted
    without the rows of that fold: the penalty is chosen on these, and the result is fitted to `scores`.

    Raises `ValueError` for labels of the wrong type or range, a single class, fewer rows than folds, or scores that are not
    finite.
    """
    check_classes(scores, labels, n_classes, n_folds)
    if fold_scores is not None and fold_scores.shape != (n_folds, *scores.shape):
        raise ValueError(f"fold_scores: has shape {fold_scores.shape}; expected {(n_folds, *scores.shape)}, scores by fold")
    n, dtype = scores.shape[0], scores.dtype
    fold = fold_of_rows(key, n, n_folds)
    kept = jnp.concatenate([jnp.ones((1, n), dtype), (fold[None, :] != jnp.arange(n_folds)[:, None]).astype(dtype)])
    targets = jax.nn.one_hot(labels, n_classes, dtype=dtype)

    def rotated(scores):
        """(mean, axes, variances, centred scores): in their principal axes for ridge."""
        mean = scores.mean(axis=0)
        centred = scores - mean[None, :]
        variances, axes = jnp.linalg.eigh(centred.T @ centred / n)
        return mean, axes, jnp.maximum(variances, 0), centred @ axes if hierarchy is None else centred

    mean, axes, variances, Z = rotated(scores)
    top = _positive(variances[-1])
    own, sets, spreads = None, Z, variances  # own: the axis of scores that each set of training rows has for itself
    if fold_scores is not None:
        _, _, fold_variances, fold_Z = jax.lax.map(rotated, fold_scores)
        own, sets, spreads = 0, jnp.concatenate([Z[None], fold_Z]), jnp.concatenate([variances[None], fold_variances])

    def loss_gradient(Z, B, intercept, weights):
        probabilities = jax.nn.softmax(Z @ B + intercept[None, :], axis=1)
        residual = (probabilities - targets) * (weights / weights.sum())[:, None]
        return Z.T @ residual, residual.sum(axis=0)

    # a fold's rows may spread up to n/n_f times as far as all rows do; the intercept is its own, orthogonal, direction
    slack = n_folds / (n_folds - 1)
    if hierarchy is None:
        penalties = top * jnp.logspace(1, -5, n_penalties, dtype=dtype)
    else:
        groups = group_index(hierarchy)
        sizes = jnp.sqrt(jnp.asarray(np.bincount(groups), dtype))
        gradient, _ = loss_gradient(Z, jnp.zeros((Z.shape[1], n_classes), dtype), jnp.log(targets.mean(axis=0) + 1e-12), kept[0])
        largest = jnp.max(_group_norms(jnp.linalg.norm(gradient, axis=1), groups) / sizes)
        penalties = largest * jnp.logspace(0, -3, n_penalties, dtype=dtype)

    def solve(Z, variances, weights, start, penalty):
        def step(both):
            B, intercept = both[:-1], both[-1]
            slope, intercept_slope = loss_gradient(Z, B, intercept, weights)
            intercept = intercept - 2 * intercept_slope / slack
            if hierarchy is None:
                curvature = slack * variances / 2 + penalty
                return jnp.concatenate([B - (slope + penalty * B) / curvature[:, None], intercept[None, :]])
            curvature = slack * _positive(variances[-1]) / 2
            moved = B - slope / curvature
            shrunk = shrink_groups(jnp.linalg.norm(moved, axis=1), penalty * sizes / curvature, groups)
            length = jnp.linalg.norm(moved, axis=1)
            return jnp.concatenate([moved * (shrunk / jnp.where(length > 0, length, 1))[:, None], intercept[None, :]])

        return _accelerated(step, start, 1e-5, max_steps)

    def along(starts, penalty):
        both, converged = jax.vmap(solve, in_axes=(own, own, 0, 0, None))(sets, spreads, kept, starts, penalty)
        return both, (both, converged[0])

    start = jnp.zeros((n_folds + 1, Z.shape[1] + 1, n_classes), dtype)
    _, (path, converged) = jax.lax.scan(along, start, penalties)
    coefficients, intercepts = path[:, 1:, :-1], path[:, 1:, None, -1]
    products = "nk,lfkc->lfnc" if own is None else "fnk,lfkc->lfnc"
    logits = jnp.einsum(products, sets if own is None else sets[1:], coefficients) + intercepts
    losses = -jnp.sum(jax.nn.log_softmax(logits, axis=-1) * targets[None, None], axis=-1)
    held = 1 - kept[1:]
    errors = jnp.sum(losses * held[None], axis=-1) / held.sum(axis=1)[None, :]
    best = choose_penalty(errors, rule)
    B, intercept = path[best, 0, :-1], path[best, 0, -1]
    B = axes @ B if hierarchy is None else B
    status = jnp.where(jnp.isfinite(B).all(), jnp.where(converged[best], CONVERGED, OUT_OF_STEPS), NON_FINITE)
    return Classifier(B, intercept - mean @ B, penalties[best], errors.mean(axis=1)[best], status)
