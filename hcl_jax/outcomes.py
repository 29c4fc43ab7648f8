"""Outcomes that scores predict: what kind they are of, regressions on scores for each kind, and how good predictions are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Key
from scipy.special import log_softmax, softmax

from hcl_jax.compiled import bucket
from hcl_jax.frames import index_names
from hcl_jax.prediction.classification import softmax_regression
from hcl_jax.prediction.regression import FoldMoments, ridge
from hcl_jax.views import real_numbers

N_FOLDS = 5
"""Of the choice of a head's penalty."""
MOST_CLASSES = 50
"""More different values than that are no classes."""


@dataclass(frozen=True)
class Outcome:
    """One value for each of n samples, or none where it is not `known`: a number, or the place of its class among `classes`."""

    values: Float[np.ndarray, " n"]
    known: Bool[np.ndarray, " n"]
    classes: tuple[Any, ...] | None
    name: str = "y"

    @property
    def kind(self) -> str:
        return "number" if self.classes is None else "class"

    def of_rows(self, rows: np.ndarray) -> "Outcome":
        return replace(self, values=self.values[rows], known=self.known[rows])


def as_outcome(y: Any, n: int, samples: Sequence[Any] | None = None) -> Outcome:
    """Floating-point numbers are a regression's, and anything else classes: whole numbers, booleans, text.

    A pandas series whose index names samples, and a dictionary, are brought into the order of the `samples`; samples that they
    lack, and None or NaN, have an unknown outcome. Raises `ValueError` for other shapes, infinite numbers, fewer than five known
    values, one class only, a class that occurs once, and more than 50 of them.
    """
    if y is None:
        raise ValueError(f"y: is None; expected an outcome, one value for each of the {n} samples")
    name = str(getattr(y, "name", None) or "y")
    listed = _in_order(y, n, samples)
    known = np.array([not (value is None or value != value or type(value).__name__ in ("NAType", "NaTType")) for value in listed])
    if known.sum() < N_FOLDS:
        raise ValueError(f"y: has {known.sum()} known values of {n}; expected at least {N_FOLDS}")
    present = [value for value, is_known in zip(listed, known, strict=True) if is_known]
    values = np.zeros(n)
    if all(isinstance(value, (float, np.floating)) for value in present):
        values[known] = real_numbers(present, "y:")
        if not np.isfinite(values).all():
            raise ValueError(f"y: holds infinite values in {int((~np.isfinite(values)).sum())} of {n} samples; expected numbers")
        if np.ptp(values[known]) == 0:
            raise ValueError(f"y: is {values[known][0]} in all samples; expected values that differ")
        return Outcome(values, known, None, name)
    if not all(isinstance(value, (str, bool, int, np.bool_, np.integer)) for value in present):
        kinds = ", ".join(sorted({type(value).__name__ for value in present}))
        raise ValueError(f"y: holds {kinds}; expected floating-point numbers, or classes: text, whole numbers or booleans")
    classes = tuple(sorted({value.item() if isinstance(value, np.generic) else value for value in present}, key=str))
    if all(not isinstance(value, str) for value in classes):
        classes = tuple(sorted(classes))
    place = {value: i for i, value in enumerate(classes)}
    values[known] = [place[value.item() if isinstance(value, np.generic) else value] for value in present]
    counts = np.bincount(values[known].astype(int))
    if len(classes) < 2:
        raise ValueError(f"y: all samples are of class {classes[0]!r}; expected at least two classes")
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"y: has {len(classes)} classes; expected at most {MOST_CLASSES}, or floating-point numbers")
    if counts.min() < 2:
        raise ValueError(f"y: has one sample of class {classes[int(counts.argmin())]!r}; expected at least two of each")
    return Outcome(values, known, classes, name)


def _in_order(y: Any, n: int, samples: Sequence[Any] | None) -> list[Any]:
    """The values in the order of the samples, None where there is none."""
    index = index_names(y.index) if samples is not None and hasattr(y, "iloc") else None
    if index is not None:
        y = dict(zip(index, y, strict=True))
    if isinstance(y, Mapping):
        if samples is None:
            raise ValueError("y: is by name of sample, which the views do not have; expected one value for each row")
        by_name = y if any(sample in y for sample in samples) else {str(name): value for name, value in y.items()}
        held = [by_name.get(sample) for sample in samples]  # files have names of text where an index has numbers
        if all(value is None for value in held):
            raise ValueError(f"y: names none of the samples; expected names such as {list(samples)[0]!r}")
        return held
    values = list(np.asarray(y, object)) if isinstance(y, (list, tuple)) else list(np.asarray(y))
    if len(values) != n or any(np.ndim(value) for value in values):
        shape = np.shape(np.asarray(y, object))
        raise ValueError(f"y: has shape {shape}; expected ({n},), one value for each sample")
    return values


@dataclass(frozen=True, eq=False)
class Head:
    """A regression of an outcome on scores: ridge, or multinomial logistic with a ridge penalty, either chosen by
    cross-validation."""

    coefficients: Float[np.ndarray, "K o"]
    intercept: Float[np.ndarray, " o"]
    classes: tuple[Any, ...] | None

    def outputs(self, scores: Any) -> Float[np.ndarray, "n o"]:
        """The expected number, or the logit of every class."""
        return np.asarray(scores) @ self.coefficients + self.intercept[None, :]

    def predict(self, scores: Any) -> np.ndarray:
        """The expected numbers, or the most probable classes, in the words of the outcome."""
        outputs = self.outputs(scores)
        if self.classes is None:
            return outputs[:, 0]
        return np.array(self.classes)[outputs.argmax(axis=1)]

    def probabilities(self, scores: Any) -> Float[np.ndarray, "n C"]:
        """Of every class. Raises `ValueError` where the outcome is a number."""
        if self.classes is None:
            raise ValueError("head: predicts a number; expected classes for probabilities")
        return softmax(self.outputs(scores), axis=1)


def fit_head(scores: Any, outcome: Outcome, key: Key[Array, ""], *, scaled: bool = True) -> Head:
    """The regression of the known outcomes on their rows' scores (n × K), where these are `scaled` in units of their standard
    deviations, so that the penalty treats them alike. Padded to shared sizes: folds of several sizes are fitted by one program.

    Raises `ValueError` for fewer known outcomes than folds.
    """
    rows = np.asarray(scores)[outcome.known]
    values = outcome.values[outcome.known]
    if len(rows) < N_FOLDS:
        raise ValueError(f"y: has {len(rows)} known values; expected at least {N_FOLDS}")
    centre, spread = rows.mean(axis=0), rows.std(axis=0)
    scale = np.where(spread > 1e-9 * spread.max(initial=0), spread if scaled else 1, np.inf)
    Z = (rows - centre) / scale
    if outcome.classes is None:
        shuffled = np.asarray(jr.permutation(key, len(Z)))
        fit = ridge(FoldMoments.from_rows(Z[shuffled], values[shuffled].astype(Z.dtype), N_FOLDS))
        coefficients, intercept = np.asarray(fit.coefficients)[:, None], np.asarray(fit.intercept)[None]
    else:
        size = bucket(len(Z))
        padded = np.zeros((size, Z.shape[1]), Z.dtype)
        padded[: len(Z)] = Z
        labels = np.zeros(size, np.int32)
        labels[: len(Z)] = values
        classifier = softmax_regression(padded, labels, len(outcome.classes), key=key, counted=np.arange(size) < len(Z))
        coefficients, intercept = np.asarray(classifier.coefficients), np.asarray(classifier.intercept)
    coefficients = coefficients / scale[:, None]
    return Head(coefficients, intercept - centre @ coefficients, outcome.classes)


def outcome_errors(outcome: Outcome, head: Head, scores: Any) -> dict[str, float]:
    """Of the rows whose outcome is known: `accuracy`, `balanced_accuracy` and `log_loss` (nats) of classes; `r_squared`, about
    their mean, and `rmse` of numbers."""
    truth, outputs = outcome.values[outcome.known], head.outputs(np.asarray(scores)[outcome.known])
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
