"""Handwritten digits in three descriptions: ranks and prediction the scikit-learn way, in pipelines and searches.

    python docs/tutorials/digits.py        # minutes; tests/test_tutorials.py runs it as well

Data: Multiple Features (Robert Duin, UCI Machine Learning Repository, CC BY 4.0), 2,000 digits, as uci_mfeat.npz under HCL_DATA
has them. Three of its six descriptions: Fourier coefficients of the shapes, Karhunen-Loève coefficients, Zernike moments.
"""

import os
from pathlib import Path

import jax
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hcl_jax.sklearn import HCLClassifier, HCLTransformer, stack

jax.config.update("jax_enable_x64", True)
path = Path(os.environ.get("HCL_DATA", "../shared/data")) / "uci_mfeat/uci_mfeat.npz"
if not path.is_file():
    raise SystemExit(f"{path} does not exist; expected the file, under HCL_DATA")
held = np.load(path)

# 1. One matrix, as scikit-learn wants it, and which of its columns are which view.
X, views = stack({name: held[name] for name in ("fou", "kar", "zer")})
X_train, X_test, digit_train, digit_test = train_test_split(X, held["y"], test_size=0.5, stratify=held["y"], random_state=0)

# 2. Scores of shared and private structures in a pipeline, as a frame with names.
transformer = HCLTransformer(views, ranks=4).set_output(transform="pandas")
scores = transformer.fit_transform(X_train)
print(scores.iloc[:3, :6])
pipeline = make_pipeline(HCLTransformer(views, ranks=4), LogisticRegression(max_iter=1000))
print("four of each structure, logistic regression:", cross_val_score(pipeline, X_train, digit_train, cv=3).mean().round(3))

# 3. How many columns a structure needs to tell digits is a search, like any other; every fold decomposes its own rows.
search = GridSearchCV(HCLClassifier(views), {"ranks": [2, 4, 6]}, cv=3).fit(X_train, digit_train)
for rank, accuracy in zip(search.cv_results_["param_ranks"], search.cv_results_["mean_test_score"], strict=True):
    print(f"rank {rank}: {accuracy:.3f}")
accuracy = search.score(X_test, digit_test)

# 4. Beside it all features: a decomposition describes the views, and need not predict as well as all that they hold.
features = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(X_train, digit_train)
print(f"digits not seen before: {accuracy:.3f}; all features: {features.score(X_test, digit_test):.3f}")
assert accuracy > 0.9

# 5. What carries it? The decomposition is there, with everything that it can be asked.
found = search.best_estimator_.decomposition_
print(found.variance_explained())
