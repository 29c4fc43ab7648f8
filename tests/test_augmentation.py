"""Changed copies of rows: what they change, and what those that are conditioned on other views leave alone."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_at_least, assert_at_most, assert_close, assert_within

from hcl_jax.networks.augmentation import as_published, augmented, shared_directions
from hcl_jax.networks.modules import Constant

KEY = jr.key(0)


def random_views(n=4000):
    """Two views of two shared latents, in the first two of their nine and seven features."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((n, 2))
    views = [np.concatenate([z + 0.3 * rng.standard_normal((n, 2)), rng.standard_normal((n, d))], axis=1) for d in (7, 5)]
    return tuple(map(jnp.asarray, views))


def test_what_the_views_before_it_predict_is_found():
    first, second = jax.jit(shared_directions)(random_views())
    assert not np.any(first)
    expected = np.diag(np.repeat([1.0, 0.0], [2, 5]))
    assert_at_most(np.abs(second - expected).max(), 0.1, "projector on the two shared features")
    assert_close(second @ second, second, "idempotent")


def test_conditioned_copies_leave_the_spared_directions_alone():
    views = random_views(60)
    rng = np.random.default_rng(1)
    spared = [np.linalg.qr(rng.standard_normal((d, 2)))[0] for d in (9, 7)]
    projectors = (Constant(jnp.zeros((9, 9))), Constant(jnp.asarray(spared[1] @ spared[1].T)))
    copies = augmented(KEY, views, "conditioned", 0.5, projectors)
    noisy = augmented(KEY, views, "noise", 0.5, ())
    np.testing.assert_array_equal(copies[0], noisy[0])
    assert_close(copies[1] @ spared[1], views[1] @ spared[1], "spared")
    assert_within(jnp.std(copies[0] - views[0]), 0.5, 0.05, "strength")
    assert_at_least(jnp.abs(copies[1] - views[1]).mean(), 0.2, "changed elsewhere")


@pytest.mark.parametrize("width", [7, 8])
def test_published_copies_are_of_four_kinds(width):
    x = 3 + jnp.asarray(np.random.default_rng(0).random((2000, width)))
    copies = np.asarray(as_published(KEY, x))
    swapped = np.roll(x, -(width // 2), axis=1)
    kinds = {
        "swapped": (copies == swapped).all(axis=1),
        "itself": (copies == x).all(axis=1),
        "noise": (np.abs(copies - x) < 0.06).all(axis=1) & (copies != x).all(axis=1),
        "masked": ((copies == x) | (copies == 0)).all(axis=1) & (copies == 0).any(axis=1),
    }
    assert np.sum([*kinds.values()], axis=0).tolist() == [1] * 2000
    untouched = 0.9**width  # masked rows of which nothing is masked count as the row itself
    shares = {"swapped": 0.25, "noise": 0.25, "itself": 0.25 * (1 + untouched), "masked": 0.25 * (1 - untouched)}
    for name, share in shares.items():
        assert_within(kinds[name].mean(), share, 4 * np.sqrt(share * (1 - share) / 2000), name)  # four standard errors
