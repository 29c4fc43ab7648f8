"""scikit-learn estimators on one two-dimensional X whose columns belong to views: pipelines, grid search, cross-validation.

from hcl_jax.sklearn import HCLClassifier, stack
X, views = stack({"mrna": mrna, "meth": meth})
cross_val_score(HCLClassifier(views), X, y)
"""

from typing import Any

import jax.random as jr
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, TransformerMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from hcl_jax.decomposition import Decomposition, decompose
from hcl_jax.fitting import Settings
from hcl_jax.heads import fit_head
from hcl_jax.outcomes import N_FOLDS, Outcome
from hcl_jax.reading import read_views
from hcl_jax.selection import NoFactorError
from hcl_jax.views import Views

FLOATS = [np.float64, np.float32]


def stack(data: Any) -> tuple[np.ndarray, dict[str, slice]]:
    """(all views side by side, the columns of each by its name): X and `views` of the estimators, of what `read_views` reads."""
    read = read_views(data)
    edges = np.cumsum([0, *read.dims]).tolist()
    columns = {name: slice(a, b) for name, a, b in zip(read.names, edges[:-1], edges[1:], strict=True)}
    return np.concatenate([np.asarray(matrix) for matrix in read.matrices], axis=1), columns


class _Decomposing(BaseEstimator):
    """What the three estimators share: the options of `hcl_jax.fit`, and the decomposition of the training rows."""

    def __init__(
        self,
        views: Any = None,
        *,
        structures: Any = "all",
        ranks: Any = "auto",
        method: Any = "hcl-vb",
        noise: Any = "view",
        standardise: Any = True,
        random_state: Any = None,
    ):
        self.views = views
        self.structures = structures
        self.ranks = ranks
        self.method = method
        self.noise = noise
        self.standardise = standardise
        self.random_state = random_state

    def _views(self, X: Any, *, reset: bool) -> tuple[Views, np.dtype]:
        """The views in the columns of X, which keep the names that a frame gives them, and the precision of X."""
        least = {"ensure_min_samples": N_FOLDS, "ensure_min_features": 2} if reset else {}
        checked = validate_data(self, X, reset=reset, dtype=FLOATS, ensure_all_finite="allow-nan", **least)
        return read_views(X if hasattr(X, "columns") else checked, views=self.views), checked.dtype

    def _decompose(self, read: Views) -> None:
        """Where no factor stands out of the noise, one column of every structure is kept: a search has to go on."""
        seed = 0 if self.random_state is None else self.random_state
        settings = Settings(
            method=self.method,
            structures=self.structures,
            ranks=self.ranks,
            noise=self.noise,
            standardise=self.standardise,
            seed=seed if isinstance(seed, int) else int(seed.randint(2**31)),
        )
        try:
            fitted = decompose(read, settings.in_names(read.names))
        except NoFactorError:
            fitted = decompose(read, Settings(**vars(settings) | {"ranks": 1}).in_names(read.names))
        self.decomposition_: Decomposition = fitted
        self._n_features_out = len(fitted.score_names)

    def _scores(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        read, dtype = self._views(X, reset=False)
        return self.decomposition_.score_matrix(read).astype(dtype)


class HCLTransformer(TransformerMixin, _Decomposing):
    """Scores of the factors that views share and that are their own, as columns.

    views: {name: columns | slice | selector}, widths, a separator in the columns' names, or a function of a column's name, as
    `read_views` takes them; None is one view. A view that a row lacks is NaN throughout. The rest is as in `hcl_jax.fit`;
    random_state is its seed. `decomposition_` is the `Decomposition` of the training rows.
    """

    def fit(self, X: Any, y: Any = None) -> Any:
        """Decompose the rows; y is ignored."""
        read, _ = self._views(X, reset=True)
        self._decompose(read)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The scores of rows, n × R."""
        return self._scores(X)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Names of the scores, such as mrna+meth:1."""
        check_is_fitted(self)
        return np.array(self.decomposition_.score_names, object)


class _Supervised(_Decomposing):
    def _fit(self, X: Any, y: Any, classes: np.ndarray | None) -> Any:
        """Decompose the rows, and regress y, numbers or the places of their classes, on the scores."""
        read, _ = self._views(X, reset=True)
        self._decompose(read)
        names = None if classes is None else tuple(classes.tolist())
        outcome = Outcome(np.asarray(y, float), np.ones(read.n_samples, bool), names)
        self.head_ = fit_head(self.decomposition_.score_matrix(read), outcome, jr.key(self.decomposition_.settings.seed))
        return self


class HCLRegressor(RegressorMixin, _Supervised):
    """Ridge regression of a number on the scores of `HCLTransformer`, its penalty chosen by cross-validation."""

    def __sklearn_tags__(self) -> Any:
        """Few factors that the views have need not be those that a response has: the score may be poor."""
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True
        return tags

    def fit(self, X: Any, y: Any) -> Any:
        """Decompose the rows, and regress y on their scores."""
        checked, y = validate_data(self, X, y, dtype=FLOATS, ensure_all_finite="allow-nan", y_numeric=True)
        return self._fit(X if hasattr(X, "columns") else checked, y, None)

    def predict(self, X: Any) -> np.ndarray:
        """The number that is expected of each row."""
        scores = self._scores(X)
        return self.head_.predict(scores)


class HCLClassifier(ClassifierMixin, _Supervised):
    """Multinomial logistic regression of classes on the scores of `HCLTransformer`, its ridge penalty chosen by
    cross-validation."""

    def __sklearn_tags__(self) -> Any:
        """Few factors that the views have need not be those that a response has: the score may be poor."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True
        return tags

    def fit(self, X: Any, y: Any) -> Any:
        """Decompose the rows, and regress the classes on their scores."""
        checked, y = validate_data(self, X, y, dtype=FLOATS, ensure_all_finite="allow-nan")
        check_classification_targets(y)
        self.classes_, places = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y: all rows are of one class, {self.classes_[0]!r}; expected at least two classes")
        return self._fit(X if hasattr(X, "columns") else checked, places, self.classes_)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each row."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of every class, n × C, in the order of `classes_`."""
        scores = self._scores(X)
        return self.head_.probabilities(scores)
