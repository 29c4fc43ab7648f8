"""One fit of one package, in a process and an environment of its own: `python peer_fits.py PACKAGE INPUT.npz OUTPUT.npz`.

The input holds `train_VIEW` and `test_VIEW` (rows, features), the names `views`, and the number of `factors`. The output holds
the scores of both, what is predicted of the last view's test rows from the other views where the package can, and the seconds of
the fit, on the clock and of the processor. Views are standardised by the training rows, as every package's guide has it.
"""

import resource
import sys
import time

import numpy as np


def fit_hcl_jax(train, test, factors):
    """Structures and ranks are its own choice, by what the data support."""
    import jax

    import hcl_jax

    jax.config.update("jax_enable_x64", True)
    found = hcl_jax.fit(train)
    last = list(train)[-1]
    scores = lambda views: found.transform(views)[list(found.score_names)].to_numpy()
    others = {name: test[name] for name in train if name != last}
    view = lambda: found.impute(last, others)[0][list(found.feature_names[-1])].to_numpy()
    return lambda: (scores(train), scores(test), view())


def fit_mofapy2(train, test, factors):
    """Factors that explain nothing are dropped. It has no scores for new samples: here their posterior means under its loadings
    and precisions, which are what it iterates."""
    import contextlib
    import io

    from mofapy2.run.entry_point import entry_point

    with contextlib.redirect_stdout(io.StringIO()):
        model = entry_point()
        model.set_data_options(scale_views=False)
        model.set_data_matrix([[X] for X in train.values()])
        model.set_model_options(factors=factors)
        model.set_train_options(seed=1, dropR2=0.001, verbose=False, quiet=True)
        model.build()
        model.run()
    nodes = model.model.getExpectations()
    loadings = [np.asarray(W["E"] if isinstance(W, dict) else W) for W in nodes["W"]]
    precisions = [np.asarray(t["E"] if isinstance(t, dict) else t)[0] for t in model.model.nodes["Tau"].getExpectations()]

    def scores(views):
        used = [m for m, name in enumerate(train) if name in views]
        W = np.concatenate([loadings[m] for m in used])
        weighted = W * np.concatenate([precisions[m] for m in used])[:, None]
        X = np.concatenate([list(views.values())[i] for i in range(len(used))], axis=1)
        return np.linalg.solve(W.T @ weighted + np.eye(W.shape[1]), weighted.T @ X.T).T

    others = dict(list(test.items())[:-1])
    return lambda: (scores(train), scores(test), scores(others) @ loadings[-1].T)


def fit_cca_zoo(train, test, factors):
    """Multiset CCA with shrinkage a half, as its constraints are void where features outnumber samples; the views' scores are
    averaged. It predicts no view."""
    from cca_zoo.linear import MCCA

    model = MCCA(n_components=factors, shrinkage=0.5).fit(list(train.values()))
    average = lambda views: np.mean(model.transform(list(views.values())), axis=0)
    return lambda: (average(train), average(test), None)


def fit_pca(train, test, factors):
    """scikit-learn's principal components of all views side by side. It predicts no view."""
    from sklearn.decomposition import PCA

    side_by_side = lambda views: np.concatenate(list(views.values()), axis=1)
    model = PCA(factors, random_state=0).fit(side_by_side(train))
    return lambda: (model.transform(side_by_side(train)), model.transform(side_by_side(test)), None)


PACKAGES = {"hcl_jax": fit_hcl_jax, "mofapy2": fit_mofapy2, "cca-zoo": fit_cca_zoo, "scikit-learn": fit_pca}


def spent():
    """(seconds on the clock, seconds of the processor) so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([time.perf_counter(), used.ru_utime + used.ru_stime])


def main(package, source, target):
    held = np.load(source)
    train, test = ({str(name): held[f"{part}_{name}"] for name in held["views"]} for part in ("train", "test"))
    seconds = []
    for _ in range(2):  # the second fit finds compiled programs
        before = spent()
        scores = PACKAGES[package](train, test, int(held["factors"]))
        seconds.append(spent() - before)
    seen, new, view = scores()
    np.savez(target, train=seen, test=new, seconds=np.array(seconds), **({} if view is None else {"view": view}))


if __name__ == "__main__":
    main(*sys.argv[1:])
