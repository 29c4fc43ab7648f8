"""Classification from rows of scores: multinomial logistic regression with a penalty chosen by cross-validation."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from hcl_jax.compiled import compiled
from hcl_jax.estimators.estimate import CONVERGED, NON_FINITE, OUT_OF_STEPS
from hcl_jax.prediction.paths import (
    Rule,
    accelerated,
    check_option,
    choose_penalty,
    group_index,
    group_norms,
    positive,
    shrink_groups,
)
from hcl_jax.structure import Hierarchy, as_hierarchy
from hcl_jax.views import as_key, as_labels, as_matrix, check_count, check_folds, real_numbers


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


def fold_of_rows(key: Key[Array, ""], n: int, n_folds: int) -> Int[Array, " n"]:
    """The fold of each row, 0 … n_folds − 1: nearly equal in size, shuffled by `key`."""
    check_count(n, "n", 2)
    check_folds(n_folds, n)
    return jr.permutation(as_key(key, "to shuffle the rows"), jnp.arange(int(n)) % int(n_folds))


def softmax_regression(
    scores: Any,
    labels: Any,
    n_classes: int,
    hierarchy: Hierarchy | None = None,
    *,
    key: Any,
    n_folds: int = 5,
    rule: Rule = "min",
    n_penalties: int = 15,
    max_steps: int = 300,
    fold_scores: Any = None,
    counted: Any = None,
) -> Classifier:
    """Multinomial logistic regression with a ridge penalty, (μ/2)‖B‖_F², or, where a hierarchy is given, the group penalty
    λ Σ_s √r_s ‖B_s‖_F over its structures.

    The penalty is chosen by the log loss of folds shuffled by `key`, along a warm-started path. Accelerated steps under the bound
    of Böhning (1992) on the curvature, ½ZᵀZ/n; for ridge in the principal axes of the scores, where that bound is diagonal.

    Scores that were learned from the labels look better on the rows that they were learned from than on others. `fold_scores` are
    then, for each of the folds `fold_of_rows(key, n, n_folds)`, the scores of all rows from a representation that was fitted
    without the rows of that fold: the penalty is chosen on these, and the result is fitted to `scores`.

    Rows that are not `counted` (n booleans) only fill up shapes: they change nothing but which fold a row falls into.

    Raises `ValueError` that names the argument for labels of the wrong type or range, a single class, fewer rows than folds,
    other numbers of scores than the hierarchy has factors, scores that are not finite, or an unknown rule.
    """
    scores = as_matrix(scores, "scores", (None, None if hierarchy is None else as_hierarchy(hierarchy).n_factors))
    for name, count, least in (("n_classes", n_classes, 2), ("n_penalties", n_penalties, 1), ("max_steps", max_steps, 1)):
        check_count(count, name, least)
    check_option(rule, "rule", Rule)
    labels = as_labels(labels, scores.shape[0], n_classes)
    check_folds(n_folds, scores.shape[0])
    if fold_scores is not None:
        fold_scores = jnp.asarray(real_numbers(fold_scores, "fold_scores:"), scores.dtype)
        if fold_scores.shape != (n_folds, *scores.shape):
            raise ValueError(f"fold_scores: has shape {fold_scores.shape}; expected {(n_folds, *scores.shape)}, scores by fold")
    n = scores.shape[0]
    held = jnp.ones(n, bool) if counted is None else jnp.asarray(counted)
    if held.shape != (n,) or held.dtype != bool:
        raise ValueError(f"counted: is {held.dtype} of shape {held.shape}; expected booleans of shape ({n},)")
    key, sizes = as_key(key, "to shuffle the folds"), (int(n_classes), int(n_folds), int(n_penalties))
    return _softmax_regression(scores, labels, held, key, fold_scores, hierarchy, rule, *sizes, max_steps)


def _loss_gradient(
    Z: Float[Array, "n K"],
    B: Float[Array, "K C"],
    intercept: Float[Array, " C"],
    targets: Float[Array, "n C"],
    weights: Float[Array, " n"],
) -> tuple[Float[Array, "K C"], Float[Array, " C"]]:
    """Of the weighted mean log loss, in the coefficients and in the intercept."""
    probabilities = jax.nn.softmax(Z @ B + intercept[None, :], axis=1)
    residual = (probabilities - targets) * (weights / weights.sum())[:, None]
    return Z.T @ residual, residual.sum(axis=0)


@compiled
def _softmax_regression(
    scores: Float[Array, "n K"],
    labels: Int[Array, " n"],
    counted: Bool[Array, " n"],
    key: Key[Array, ""],
    fold_scores: Float[Array, "F n K"] | None,
    hierarchy: Hierarchy | None,
    rule: Rule,
    n_classes: int,
    n_folds: int,
    n_penalties: int,
    max_steps: int,
) -> Classifier:
    dtype, here = scores.dtype, counted.astype(scores.dtype)
    n = here.sum()
    fold = fold_of_rows(key, scores.shape[0], n_folds)
    kept = here[None, :] * (fold[None, :] != jnp.arange(-1, n_folds)[:, None]).astype(dtype)
    targets = jax.nn.one_hot(labels, n_classes, dtype=dtype) * here[:, None]

    def rotated(scores):
        """(mean, axes, variances, centred scores): in their principal axes for ridge."""
        mean = here @ scores / n
        centred = (scores - mean[None, :]) * here[:, None]
        variances, axes = jnp.linalg.eigh(centred.T @ centred / n)
        return mean, axes, jnp.maximum(variances, 0), centred @ axes if hierarchy is None else centred

    mean, axes, variances, Z = rotated(scores)
    top = positive(variances[-1])
    own, sets, spreads = None, Z, variances  # own: the axis of scores that each set of training rows has for itself
    if fold_scores is not None:
        _, _, fold_variances, fold_Z = jax.lax.map(rotated, fold_scores)
        own, sets, spreads = 0, jnp.concatenate([Z[None], fold_Z]), jnp.concatenate([variances[None], fold_variances])

    # a fold's rows may spread up to n/n_f times as far as all rows do; the intercept is its own, orthogonal, direction
    slack = jnp.max(n / kept[1:].sum(axis=1))
    if hierarchy is None:
        penalties = top * jnp.logspace(1, -5, n_penalties, dtype=dtype)
    else:
        groups = group_index(hierarchy)
        sizes = jnp.sqrt(jnp.asarray(np.bincount(groups), dtype))
        nothing, frequencies = jnp.zeros((Z.shape[1], n_classes), dtype), targets.sum(axis=0) / n
        gradient, _ = _loss_gradient(Z, nothing, jnp.log(frequencies + 1e-12), targets, kept[0])
        largest = jnp.max(group_norms(jnp.linalg.norm(gradient, axis=1), groups) / sizes)
        penalties = largest * jnp.logspace(0, -3, n_penalties, dtype=dtype)

    def solve(Z, variances, weights, start, penalty):
        def step(both):
            B, intercept = both[:-1], both[-1]
            slope, intercept_slope = _loss_gradient(Z, B, intercept, targets, weights)
            intercept = intercept - 2 * intercept_slope / slack
            if hierarchy is None:
                curvature = slack * variances / 2 + penalty
                return jnp.concatenate([B - (slope + penalty * B) / curvature[:, None], intercept[None, :]])
            curvature = slack * positive(variances[-1]) / 2
            moved = B - slope / curvature
            shrunk = shrink_groups(jnp.linalg.norm(moved, axis=1), penalty * sizes / curvature, groups)
            length = jnp.linalg.norm(moved, axis=1)
            return jnp.concatenate([moved * (shrunk / jnp.where(length > 0, length, 1))[:, None], intercept[None, :]])

        return accelerated(step, start, 1e-5, max_steps)

    def along(starts, penalty):
        both, converged = jax.vmap(solve, in_axes=(own, own, 0, 0, None))(sets, spreads, kept, starts, penalty)
        return both, (both, converged[0])

    start = jnp.zeros((n_folds + 1, Z.shape[1] + 1, n_classes), dtype)
    _, (path, converged) = jax.lax.scan(along, start, penalties)
    coefficients, intercepts = path[:, 1:, :-1], path[:, 1:, None, -1]
    products = "nk,lfkc->lfnc" if own is None else "fnk,lfkc->lfnc"
    logits = jnp.einsum(products, sets if own is None else sets[1:], coefficients) + intercepts
    losses = -jnp.sum(jax.nn.log_softmax(logits, axis=-1) * targets[None, None], axis=-1)
    held = here[None, :] - kept[1:]
    errors = jnp.sum(losses * held[None], axis=-1) / held.sum(axis=1)[None, :]
    best = choose_penalty(errors, rule)
    B, intercept = path[best, 0, :-1], path[best, 0, -1]
    B = axes @ B if hierarchy is None else B
    status = jnp.where(jnp.isfinite(B).all(), jnp.where(converged[best], CONVERGED, OUT_OF_STEPS), NON_FINITE)
    return Classifier(B, intercept - mean @ B, penalties[best], errors.mean(axis=1)[best], status)
