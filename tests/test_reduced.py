"""Views in few coordinates: what is kept, in which units, and that rows and covariances say the same."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_at_least, assert_at_most, assert_close

from hcl_jax import SampleCovariance
from hcl_jax.reduced import AXES, noise_level, reduced_covariance, reduced_rows
from hcl_jax.views import standardise

DIMS = (150, 40, 6)


def drawn(n, seed=0, noise=(1.0, 0.3, 2.0)):
    """Two factors that all views see, in noise that differs by view."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, 2))
    return [z @ rng.standard_normal((2, d)) + v**0.5 * rng.standard_normal((n, d)) for d, v in zip(DIMS, noise, strict=True)]


@pytest.mark.parametrize("noise", ["view", "feature"])
@pytest.mark.parametrize("n", [100, 400])
def test_rows_and_covariances_reduce_to_the_same(n, noise):
    views = drawn(n)
    covariance = SampleCovariance.from_data([standardise(view, view) for view in views])
    from_rows, from_moments = reduced_rows(views, noise), reduced_covariance(covariance, DIMS, noise)
    for name, a, b in zip(["matrix", "traces", "dims", "nu"], from_rows.moments, from_moments.moments, strict=True):
        assert_close(np.abs(a), np.abs(b), name, slack=1e6)  # eigenvectors have signs of their own; noise is found in rounds
    assert_close(from_rows.visible, from_moments.visible, slack=1e6)


def test_nothing_is_lost_but_axes_that_explain_next_to_nothing():
    views = [standardise(view, view) for view in drawn(400)]
    reduced = reduced_rows(views, "view")
    held = np.diagonal(reduced.moments.matrix).reshape(3, -1).sum(axis=1)
    assert reduced.moments.matrix.shape == (3 * AXES, 3 * AXES)
    assert_close(held[1:], reduced.moments.traces[1:], "views with no more features than axes")
    assert_at_least(held[0] / reduced.moments.traces[0], 1 - (DIMS[0] - AXES) / AXES, "the view with more")
    small = SampleCovariance.from_data(views[1:])
    ratio = np.sort(np.linalg.eigvalsh(np.asarray(reduced.moments.matrix)[AXES : 2 * AXES, AXES : 2 * AXES]))[::-1][:40]
    own = np.sort(np.linalg.eigvalsh(np.asarray(small.matrix)[:40, :40]))[::-1]
    assert_close(ratio / ratio[0], own / own[0], "eigenvalues, up to the unit of noise", slack=1e5)


@pytest.mark.parametrize(("noise", "scales"), [("view", np.full(60, 3.0)), ("feature", np.linspace(0.5, 3, 60))])
def test_noise_has_variance_one(noise, scales):
    """Beyond the two factors the eigenvalues are those of equal noise, (1 ± √0.03)²: 0.68 to 1.38, and a margin."""
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2000, 2))
    view = 2 * z @ rng.standard_normal((2, 60)) + scales * rng.standard_normal((2000, 60))
    reduced = reduced_rows([view], noise, scaled=False)
    values = np.linalg.eigvalsh(np.asarray(reduced.moments.matrix))[::-1]
    assert (reduced.visible > 0).sum() == 2
    assert_at_least(values[59], 0.6, "the smallest")
    assert_at_most(values[2], 1.5, "the largest of the noise")


def test_noise_level_counts_what_stands_out():
    rng = np.random.default_rng(0)
    values = np.linalg.eigvalsh(np.cov(rng.standard_normal((1000, 50)).T))[::-1]
    level, count = noise_level(np.concatenate([[30.0, 20.0], 3 * values[2:]]), 50, 999.0)
    assert count == 2
    assert_at_most(abs(level / 3 - 1), 0.05, "level")


def test_bad_input():
    views = drawn(20)
    with pytest.raises(ValueError, match="noise: is 'row'"):
        reduced_rows(views, "row")
    with pytest.raises(ValueError, match="views: have 2 rows; expected at least 3"):
        reduced_rows([view[:2] for view in views], "view")
    with pytest.raises(ValueError, match="views: view 2 is constant"):
        reduced_rows([views[0], jnp.ones((20, 3))], "view")
