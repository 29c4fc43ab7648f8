"""The estimators keep scikit-learn's contract, and work in its pipelines, searches and cross-validation."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from test_decomposition import RANKS, drawn

from hcl_jax.decomposition import fit
from hcl_jax.sklearn import HCLClassifier, HCLRegressor, HCLTransformer, stack


class Half:
    """The places of half of the columns: a check of scikit-learn does not say how many there will be. Its name is the same in
    every process, which the names of tests need."""

    def __init__(self, second):
        self.second = second

    def __call__(self, X):
        middle = (X.shape[1] + 1) // 2
        return list(range(middle, X.shape[1]) if self.second else range(middle))

    def __repr__(self):
        return "second" if self.second else "first"


def estimators(views, structure):
    """At a fixed rank, and by the method that compiles fastest: every check has data of another shape."""
    return [kind(views, ranks={structure: 1}, method="hcl-svd") for kind in (HCLTransformer, HCLClassifier, HCLRegressor)]


@pytest.mark.slow
@parametrize_with_checks(estimators(None, "1"))
def test_the_contract_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.long
@parametrize_with_checks(estimators({"first": Half(False), "second": Half(True)}, "12"))
def test_the_contract_of_scikit_learn_with_two_views(estimator, check):
    check(estimator)


def test_it_is_the_decomposition_of_the_same_views():
    frames, number, group = drawn()
    X, views = stack(frames)
    assert {name: (part.start, part.stop) for name, part in views.items()} == {"rna": (0, 9), "meth": (9, 17), "mirna": (17, 24)}
    scores = HCLTransformer(views, ranks=RANKS).fit_transform(X)
    np.testing.assert_allclose(scores, fit(frames, ranks=RANKS).scores().to_numpy(), rtol=1e-10, atol=1e-12)
    in_one = pd.concat(frames, axis=1)
    in_one.columns = [f"{view}:{feature}" for view, feature in in_one.columns]
    named = HCLTransformer(":", ranks=RANKS).set_output(transform="pandas").fit(in_one)
    out = named.transform(in_one)
    assert list(out.columns) == ["rna+meth+mirna:1", "rna+meth+mirna:2", "rna+meth:1", "mirna:1"]
    assert list(out.index) == list(in_one.index)
    np.testing.assert_allclose(out.to_numpy(), scores, rtol=1e-10, atol=1e-12)


def test_pipelines_searches_and_cross_validation():
    frames, number, group = drawn()
    X, views = stack(frames)
    assert cross_val_score(HCLClassifier(views, ranks=RANKS), X, group, cv=3).mean() > 0.85
    assert cross_val_score(HCLRegressor(views, ranks=RANKS), X, number, cv=3).mean() > 0.85
    piped = make_pipeline(HCLTransformer(views, ranks=RANKS), StandardScaler(), LogisticRegression())
    search = GridSearchCV(piped, {"hcltransformer__method": ["hcl-vb", "hcl-svd"]}, cv=3).fit(X, group)
    assert search.best_score_ > 0.85
    assert set(HCLClassifier(views, ranks=RANKS).fit(X, group).predict(X)) == {"high", "low"}


def test_rows_may_lack_views():
    frames, number, _ = drawn()
    X, views = stack(frames)
    X[::3, views["meth"]] = np.nan
    fitted = HCLRegressor(views, ranks=RANKS).fit(X, number)
    assert fitted.score(X, number) > 0.85
    X[0, 0] = np.nan
    with pytest.raises(ValueError, match="holds NaN or infinite values in 1 of 1080 cells"):
        fitted.predict(X)


def test_a_search_goes_on_where_no_factor_stands_out():
    noise = np.random.default_rng(0).normal(size=(60, 12))
    assert HCLTransformer([6, 6]).fit_transform(noise).shape == (60, 3)
