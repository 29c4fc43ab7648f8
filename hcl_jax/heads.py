"""Regressions of an outcome on scores, one for each kind of outcome, and how good their predictions are."""

from dataclasses import dataclass
from typing import Any

import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key
from scipy.special import log_softmax, softmax

from hcl_jax.compiled import bucket
from hcl_jax.outcomes import N_FOLDS, Kind, Outcome
from hcl_jax.prediction.classification import softmax_regression
from hcl_jax.prediction.concordance import concordance
from hcl_jax.prediction.regression import FoldMoments, ridge
from hcl_jax.prediction.repeated import random_intercept
from hcl_jax.prediction.survival import cox_regression


@dataclass(frozen=True, eq=False)
class Head:
    """A regression of an outcome on scores, by the outcome's kind: of a number, ridge; of classes, multinomial logistic with a
    ridge penalty; of survival times, Cox's with a ridge penalty; of repeated measurements, linear with a random intercept by
    subject. Penalties are chosen by cross-validation."""

    coefficients: Float[np.ndarray, "K o"]
    intercept: Float[np.ndarray, " o"]
    """Of survival times such that a sample with mean scores has log hazard ratio 0."""
    classes: tuple[Any, ...] | None
    kind: Kind

    def outputs(self, scores: Any) -> Float[np.ndarray, "n o"]:
        """The expected number (without the effect of its subject), the logit of every class, or the logarithm of the hazard over
        that of a sample with mean scores."""
        return np.asarray(scores) @ self.coefficients + self.intercept[None, :]

    def predict(self, scores: Any) -> np.ndarray:
        """The `outputs`, but of classes the most probable ones, in the words of the outcome."""
        outputs = self.outputs(scores)
        if self.classes is None:
            return outputs[:, 0]
        return np.array(self.classes)[outputs.argmax(axis=1)]

    def probabilities(self, scores: Any) -> Float[np.ndarray, "n C"]:
        """Of every class. Raises `ValueError` where the outcome has none."""
        if self.classes is None:
            raise ValueError(f"head: is of kind {self.kind!r}; expected classes for probabilities")
        return softmax(self.outputs(scores), axis=1)


def fit_head(scores: Any, outcome: Outcome, key: Key[Array, ""], *, scaled: bool = True) -> Head:
    """The regression of the known outcomes on their rows' scores (n × K), where these are `scaled` in units of their standard
    deviations, so that a penalty treats them alike.

    A random intercept has no penalty: of repeated measurements, scores that are not scaled, such as all features, and more scores
    than half of the rows are a ridge regression's, whose folds keep subjects together. Raises `ValueError` for fewer known
    outcomes, or events, than folds.
    """
    rows, known = np.asarray(scores)[outcome.known], outcome.of_rows(outcome.known)
    if len(rows) < N_FOLDS:
        raise ValueError(f"y: has {len(rows)} known values; expected at least {N_FOLDS}")
    centre, spread = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(spread > 1e-9 * spread.max(initial=0), spread if scaled else 1, np.inf)
    Z = (rows - centre) / scale
    if outcome.kind == "class":
        coefficients, intercept = _of_classes(Z, known, key)
    elif outcome.kind == "survival":
        coefficients, intercept = _of_survival(Z, known, key)
    elif outcome.kind == "repeated" and scaled and 2 * Z.shape[1] < len(Z):
        fit = random_intercept(Z, known.values.astype(Z.dtype), known.subjects)
        coefficients, intercept = np.asarray(fit.coefficients)[:, None], np.asarray(fit.intercept)[None]
    else:
        coefficients, intercept = _of_numbers(Z, known, key)
    coefficients = coefficients / scale[:, None]
    return Head(coefficients, intercept - centre @ coefficients, outcome.classes, outcome.kind)


Fit = tuple[Float[np.ndarray, "K o"], Float[np.ndarray, " o"]]
"""(coefficients, intercept)."""


def _of_numbers(Z: Float[np.ndarray, "n K"], outcome: Outcome, key: Key[Array, ""]) -> Fit:
    if outcome.subjects is None:
        order = np.asarray(jr.permutation(key, len(Z)))
        folds = FoldMoments.from_rows(Z[order], outcome.values[order].astype(Z.dtype), N_FOLDS)
    else:
        _, subject = np.unique(outcome.subjects, return_inverse=True)
        n_folds = min(N_FOLDS, subject.max() + 1)
        place = np.asarray(jr.permutation(key, subject.max() + 1))
        folds = FoldMoments.from_rows(Z, outcome.values.astype(Z.dtype), n_folds, folds=place[subject] % n_folds)
    fit = ridge(folds)
    return np.asarray(fit.coefficients)[:, None], np.asarray(fit.intercept)[None]


def _of_classes(Z: Float[np.ndarray, "n K"], outcome: Outcome, key: Key[Array, ""]) -> Fit:
    """Padded to shared sizes: folds of several sizes are fitted by one program."""
    size = bucket(len(Z))
    padded = np.zeros((size, Z.shape[1]), Z.dtype)
    padded[: len(Z)] = Z
    labels = np.zeros(size, np.int32)
    labels[: len(Z)] = outcome.values
    n_classes = len(outcome.classes or ())
    classifier = softmax_regression(padded, labels, n_classes, key=key, counted=np.arange(size) < len(Z))
    return np.asarray(classifier.coefficients), np.asarray(classifier.intercept)


def _of_survival(Z: Float[np.ndarray, "n K"], outcome: Outcome, key: Key[Array, ""]) -> Fit:
    """Padded as classes are, with rows that are censored before the first event: no risk set holds them."""
    events = outcome.events
    if events is None or events.sum() < N_FOLDS:
        raise ValueError(f"y: has {0 if events is None else events.sum()} events; expected at least {N_FOLDS}")
    extra = bucket(len(Z)) - len(Z)
    times = np.append(outcome.values, np.full(extra, outcome.values.min() / 2)).astype(Z.dtype)
    padded, happened = np.concatenate([Z, np.zeros((extra, Z.shape[1]), Z.dtype)]), np.append(events, np.zeros(extra, bool))
    fit = cox_regression(padded, times, happened, choose="cv", n_folds=N_FOLDS, key=key)
    return np.asarray(fit.coefficients)[:, None], np.zeros(1, Z.dtype)


def outcome_errors(outcome: Outcome, head: Head, scores: Any) -> dict[str, float]:
    """Of the rows whose outcome is known: `accuracy`, `balanced_accuracy` and `log_loss` (nats) of classes; `r_squared`, about
    their mean, and `rmse` of numbers; `concordance` (Harrell's) of survival times, NaN where no two rows can be compared."""
    known = outcome.of_rows(outcome.known)
    truth, outputs = known.values, head.outputs(np.asarray(scores)[outcome.known])
    if known.events is not None:
        earliest = truth[known.events].min(initial=np.inf)
        comparable = ((truth > earliest) | ((truth == earliest) & ~known.events)).any()
        index = concordance(outputs[:, 0], truth, known.events).estimate if comparable else np.nan
        return {"concordance": float(index)}
    if outcome.classes is None:
        squares, spread = np.mean((outputs[:, 0] - truth) ** 2), np.var(truth)
        return {"r_squared": float(1 - squares / spread) if spread > 0 else float("nan"), "rmse": float(np.sqrt(squares))}
    labels = truth.astype(int)
    right = outputs.argmax(axis=1) == labels
    return {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(np.mean([right[labels == c].mean() for c in np.unique(labels)])),
        "log_loss": float(-np.mean(log_softmax(outputs, axis=1)[np.arange(len(labels)), labels])),
    }
