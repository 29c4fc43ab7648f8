"""Linear probes: of rows whose relation is known, and beside scikit-learn's."""

import jax.numpy as jnp
import numpy as np
from helpers import assert_within
from sklearn.linear_model import LinearRegression

from hcl_jax.experiments.probes import accuracy, gaussian_information, r_squared

RNG = np.random.default_rng(0)
N, X = 3000, RNG.standard_normal((5000, 4))


def test_r_squared_is_that_of_a_regression_on_the_first_rows():
    z = X @ RNG.standard_normal((4, 3)) + RNG.standard_normal((5000, 3)) + 2
    expected = np.asarray(LinearRegression().fit(X[:N], z[:N]).predict(X[N:]))
    rest, total = ((z[N:] - fitted) ** 2 for fitted in (expected, z[:N].mean(axis=0)))
    found = r_squared(jnp.asarray(X), jnp.asarray(z), N)
    np.testing.assert_allclose(found, 1 - rest.mean(axis=0) / total.mean(axis=0), rtol=1e-6)


def test_information_of_correlated_normals():
    rho = np.array([0.3, 0.9])
    z = rho * X[:, :2] + np.sqrt(1 - rho**2) * RNG.standard_normal((5000, 2))
    turned = z @ np.linalg.qr(RNG.standard_normal((2, 2)))[0]
    found = gaussian_information(jnp.asarray(X), jnp.asarray(turned), N)
    assert_within(found, -0.5 * np.log(1 - rho**2).sum(), 0.05, "nats")  # standard error of either half 1/√2000
    assert abs(float(gaussian_information(jnp.asarray(X), jnp.asarray(RNG.standard_normal((5000, 2))), N))) < 0.01


def test_accuracy_is_that_of_the_sign_of_a_regression():
    score = X @ np.array([1.0, -2.0, 0.5, 0.0])
    y = np.int32(score + RNG.standard_normal(5000) > 0.7)
    fitted = LinearRegression().fit(X[:N], 2 * y[:N] - 1).predict(X[N:])
    found = accuracy(jnp.asarray(X), jnp.asarray(y), N)
    np.testing.assert_allclose(found, np.mean((fitted > 0) == y[N:]), atol=1e-12)
