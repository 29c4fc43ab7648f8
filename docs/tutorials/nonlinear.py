"""From three views that are nonlinear functions of their factors to scores, structures, and what each is worth to a prediction.

    python docs/tutorials/nonlinear.py        # a minute; tests/test_tutorials.py runs it as well

Every figure below is one that the script checks when it runs.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from hcl_jax import Hierarchy, Truth
from hcl_jax.fitted import fit_estimator, variance_explained
from hcl_jax.importance import ImportanceConfig, structure_importance
from hcl_jax.links import sample_linked_observations, sample_links
from hcl_jax.model import sample_normal_loadings
from hcl_jax.networks import NETWORKS, TrainingConfig, hcl, load
from hcl_jax.networks.evidence import structure_evidence
from hcl_jax.prediction import FoldMoments, ridge

jax.config.update("jax_enable_x64", True)

# 1. Data. Two factors are shared by three views, one by the first two, one is private to each. Every view is then rotated and
#    bent, twice: no feature is a curve of one linear feature any more.
hierarchy = Hierarchy((20, 20, 20), {"123": 2, "12": 1, "1": 1, "2": 1, "3": 1})
k_loadings, k_links, k_rows, k_response, k_fit = jr.split(jr.key(0), 5)
truth = Truth(sample_normal_loadings(k_loadings, hierarchy, jnp.float64), 0.09, hierarchy)
links = sample_links(k_links, "leaky", hierarchy, jnp.float64)
views, z = sample_linked_observations(k_rows, truth, links, 3000)
train, test = [view[:2000] for view in views], [view[2000:] for view in views]
response = z[:, 0] - z[:, hierarchy.columns("1").start] + 0.5 * jr.normal(k_response, (3000,))


# 2. How much of a structure's factors do its scores hold? R² on rows that no method has seen.
def r_squared(scores, structure):
    own, factors = scores[:, hierarchy.columns(structure)], z[:, hierarchy.columns(structure)]
    line = jnp.linalg.lstsq(own[:2000], factors[:2000])[0]
    return float(1 - jnp.mean((factors[2000:] - own[2000:] @ line) ** 2) / jnp.mean(factors[2000:] ** 2))


linear = fit_estimator(train, hierarchy, "hcl-ml", noise="feature")
copula = NETWORKS["hcl-copula"](train, hierarchy)
config = hcl.HclConfig(training=TrainingConfig(batch_size=256, learning_rate=3e-3, steps=600))
network = NETWORKS["hcl"](train, hierarchy, config=config, key=k_fit)
for name, fitted in {"linear": linear, "normal scores": copula, "network": network}.items():
    scores = fitted.transform(views)
    print(f"{name:14s}", {"".join(map(str, s)): round(r_squared(scores, s), 3) for s in hierarchy.structures})
assert r_squared(network.transform(views), "12") > r_squared(linear.transform(views), "12")

# 3. Is each shared structure there? Correlation of what its views say of it, and how much of it other structures explain.
print(structure_evidence(network, train))
assert not any(found.absent for found in structure_evidence(network, train).values())

# 4. A row that lacks a view is scored by what the others say.
without = [test[0], jnp.full_like(test[1], jnp.nan), test[2]]
both, one = network.transform(test), network.transform(without)
shared = hierarchy.columns("123")
print("correlation of shared scores with and without view 2:", np.corrcoef(both[:, 0], one[:, 0])[0, 1].round(3))
assert bool(jnp.isfinite(one[:, shared]).all())

# 5. Prediction, and what each structure is worth to it: 123 and 1 carry the response.
head = ridge(FoldMoments.from_rows(network.transform(train), response[:2000]))
predict = lambda scores: scores @ head.coefficients + head.intercept
table = structure_importance(network, test, response[2000:], predict, ImportanceConfig(), key=jr.key(1))
print(table)
assert set(table.sort("drop", descending=True)["structure"][:2]) == {"123", "1"}

# 6. Shares of variance, and a file that gives back the same bits.
print(variance_explained(network, test))
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "fit.npz"
    network.save(path)
    np.testing.assert_array_equal(load(path).transform(test), both)
