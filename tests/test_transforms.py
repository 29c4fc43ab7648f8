"""The same answer plain, compiled, in a batch, and in float32.

Compiled differently, the iterations of one method differ in their roundings and may stop a step apart: they agree to what the
stopping rule leaves, not to the last bit. Gram matrices are compared, because rotations within a structure are free.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    TWO,
    assert_at_most,
    batch_fitted_by,
    fitted_by,
    hierarchy_for,
    identified,
    lower_precision,
    problem,
    relative,
    stacked,
)

from hcl_jax import ESTIMATORS, LIMITS
from hcl_jax.experiments.recovery import RECOVERY_LIMITS

DIRECT = ("naive-svd", "naive-svd-denoised", "hcl-svd", "hcl-svd-published", "hcl-gd-published")  # no adaptive stopping rule
TOLERANCE = (
    dict.fromkeys(ESTIMATORS, 1e-5) | dict.fromkeys(DIRECT, 1e-10) | {"hcl-vb": 1e-3}
)  # bound flat to 1e-7: error its root
SINGLE = dict.fromkeys(ESTIMATORS, 5e-3) | dict.fromkeys(DIRECT, 1e-3) | {"hcl-vb": 2e-2}


def marked_slow(names, *slow):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


def draws(name):
    return [problem(hierarchy_for(name), seed, noise=0.5, n=1000) for seed in range(3)]


# Plain calls compile every operation by itself.
@pytest.mark.parametrize(
    "name", marked_slow(ESTIMATORS, "hcl-vb", "hcl-ml", "hcl-shrunk", "hcl-gd-published", "hcl-svd-published")
)
def test_plain_and_compiled_agree(name):
    hierarchy, (_, S) = hierarchy_for(name), draws(name)[0]
    plain, compiled = ESTIMATORS[name](S, hierarchy), fitted_by(name)(S, hierarchy)
    assert_at_most(
        relative(identified(name, plain, hierarchy), identified(name, compiled, hierarchy)),
        TOLERANCE[name],
        f"{name}: plain against compiled",
    )
    assert_at_most(relative(plain.noise_variance, compiled.noise_variance), TOLERANCE[name], f"{name}: noise variance")
    assert int(plain.status) == int(compiled.status)


@pytest.mark.parametrize("name", marked_slow(ESTIMATORS, "hcl-vb", "hcl-ml"))
def test_a_batch_of_three_equals_three_singles(name):
    hierarchy, covariances = hierarchy_for(name), [S for _, S in draws(name)]
    batch = batch_fitted_by(name)(stacked(covariances), hierarchy)
    for i, S in enumerate(covariances):
        single = fitted_by(name)(S, hierarchy)
        member = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        assert_at_most(
            relative(identified(name, member, hierarchy), identified(name, single, hierarchy)),
            TOLERANCE[name],
            f"{name}: member {i} of a batch against itself alone",
        )
        assert int(member.status) == int(single.status)


# The published descent never aligns its start, so that what it ends in depends on the signs of the start's eigenvectors.
@pytest.mark.parametrize("name", marked_slow([name for name in ESTIMATORS if name != "hcl-gd-published"], "hcl-vb", "hcl-ml"))
def test_float32_is_near_float64(name):
    hierarchy, (_, S) = hierarchy_for(name), draws(name)[0]
    half = fitted_by(name)(lower_precision(S), hierarchy)
    assert {half.loadings.dtype, half.noise_variance.dtype, half.objective.dtype} == {jnp.dtype(jnp.float32)}
    double = fitted_by(name)(S, hierarchy)
    assert_at_most(
        relative(identified(name, half, hierarchy), identified(name, double, hierarchy)),
        SINGLE[name],
        f"{name}: float32 against float64",
    )
    assert_at_most(relative(half.noise_variance, double.noise_variance), SINGLE[name], f"{name}: noise variance")
    assert int(half.status) == 0


@pytest.mark.parametrize("name", marked_slow(RECOVERY_LIMITS, "cramer-rao"))
def test_limits_plain_compiled_and_batched_agree(name):
    pairs = draws("hcl-ml")
    batch = jax.jit(jax.vmap(LIMITS[name]))(*stacked(pairs))
    compiled, plain = jax.jit(LIMITS[name])(*pairs[2]), LIMITS[name](*pairs[0])
    for metric in set(plain) - {"status", "steps"}:
        for i, single in ((2, compiled), (0, plain)):
            difference = np.abs(np.asarray(batch[metric][i]) - np.asarray(single[metric])).max()
            assert_at_most(difference, 1e-5, f"{name}: {metric}, draw {i}")


def test_the_sample_size_is_traced():
    fit = jax.jit(ESTIMATORS["hcl-shrunk"], static_argnums=1)
    for n in (500, 5000):
        fit(problem(TWO, noise=0.5, n=n)[1], TWO)
    assert fit._cache_size() == 1, "a new n has to reuse the compiled program"
