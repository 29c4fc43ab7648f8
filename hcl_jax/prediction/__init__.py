"""Prediction from scores (theory: Section 5): score maps, regressions from second moments, classification from rows; survival
times and repeated measurements."""

from hcl_jax.prediction.classification import Classifier, fold_of_rows, softmax_regression
from hcl_jax.prediction.concordance import concordance, concordance_difference
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
from hcl_jax.prediction.repeated import RandomIntercept, random_intercept
from hcl_jax.prediction.survival import MONOTONE, CoxRegression, as_survival, cox_regression
from hcl_jax.scores import least_squares_scores, posterior_mean_scores

__all__ = [
    "MONOTONE",
    "PROJECTED",
    "Classifier",
    "CoxRegression",
    "FoldMoments",
    "RandomIntercept",
    "Regression",
    "as_survival",
    "choose_penalty",
    "concordance",
    "concordance_difference",
    "cox_regression",
    "fold_of_rows",
    "group_index",
    "group_lasso",
    "group_relevance",
    "least_squares",
    "least_squares_scores",
    "posterior_mean_scores",
    "random_intercept",
    "ridge",
    "shrink_groups",
    "softmax_regression",
]
