"""Prediction from scores (theory: Section 5): score maps, regressions from second moments, classification from rows."""

from hcl_jax.prediction.classification import Classifier, fold_of_rows, softmax_regression
from hcl_jax.prediction.paths import choose_penalty, group_index, shrink_groups
from hcl_jax.prediction.regression import (
    PROJECTED,
    FoldMoments,
    Regression,
    group_lasso,
    group_relevance,
    least_squares,
    ridge,
)
from hcl_jax.scores import least_squares_scores, posterior_mean_scores

__all__ = [
    "PROJECTED",
    "Classifier",
    "FoldMoments",
    "Regression",
    "choose_penalty",
    "fold_of_rows",
    "group_index",
    "group_lasso",
    "group_relevance",
    "least_squares",
    "least_squares_scores",
    "posterior_mean_scores",
    "ridge",
    "shrink_groups",
    "softmax_regression",
]
