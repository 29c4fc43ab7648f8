"""Signals of known parts: what their parts add up to, what they share, and bad input."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_at_least, assert_at_most

from hcl_jax import Hierarchy
from hcl_jax.signals import halved, pair_images, sample_blocks, sample_curves, sample_phantom, sample_structured_curves

LATTICE = Hierarchy.full((12, 12, 12), 2)


@pytest.mark.parametrize(
    "draw",
    [
        lambda noise: sample_blocks(jr.key(0), 60, (20, 30), noise),
        lambda noise: sample_curves(jr.key(0), 60, 16, noise),
        lambda noise: sample_structured_curves(jr.key(0), 60, LATTICE, noise),
    ],
)
def test_views_are_their_parts_and_noise(draw):
    clean, noisy = draw(0.0), draw(0.5)
    for m, (view, other) in enumerate(zip(clean.views, noisy.views, strict=True), start=1):
        total = sum(np.asarray(part) for (l, _), part in clean.parts.items() if l == m)
        np.testing.assert_allclose(view, total, atol=1e-12)
        noise = np.asarray(other) - total
        assert_at_most(abs(noise.std() - 0.5), 4 * 0.5 / np.sqrt(2 * noise.size), "standard deviation of the noise")
    first, second = (np.asarray(view) - np.asarray(other) for view, other in zip(clean.views[:2], noisy.views[:2], strict=True))
    k = min(first.shape[1], second.shape[1])
    assert abs(np.corrcoef(first[:, :k].ravel(), second[:, :k].ravel())[0, 1]) < 4 / np.sqrt(first[:, :k].size)


def test_joint_blocks_have_rank_one_and_the_individual_ones_their_own_patterns():
    signals = sample_blocks(jr.key(0), 200, (20, 30))
    ranks = {place: np.linalg.matrix_rank(np.asarray(part)) for place, part in signals.parts.items()}
    assert ranks == {(1, (1, 2)): 1, (2, (1, 2)): 1, (1, (1,)): 1, (2, (2,)): 2}
    together = np.column_stack([np.asarray(factor) for factor in signals.factors.values()])
    assert np.linalg.matrix_rank(together) == 4


def test_curves_share_their_phase_or_have_their_own():
    shared, own = sample_curves(jr.key(1), 500, 16, 0.0), sample_curves(jr.key(1), 500, 16, 0.0, joint=False)
    circle = np.asarray(shared.factors[1, 2])
    np.testing.assert_allclose(np.sum(circle**2, axis=1), 1, rtol=1e-6)
    wave = np.asarray(shared.parts[1, (1, 2)])
    left = wave - circle @ np.linalg.lstsq(circle, wave, rcond=None)[0]  # sin(a + b) is linear in the circle
    assert_at_most(np.abs(left).max(), 1e-5, "what is not linear in the cosine and sine of the phase")
    phases = [np.asarray(own.factors[m,])[:, :2] for m in (1, 2)]
    assert np.abs(phases[0].T @ phases[1] / 500).max() < 4 * 0.5 / np.sqrt(500)


def test_factors_of_structures_are_independent():
    factors = sample_structured_curves(jr.key(2), 2000, LATTICE).factors
    columns = np.column_stack([np.asarray(factors[s]) for s in LATTICE.structures])
    off = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert_at_most(np.abs(off).max(), 4.5 / np.sqrt(2000), "largest of 91 correlations")


def test_pairs_are_of_one_class_and_changed_as_asked():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    images = labels[:, None, None] + 0.1 * rng.random((200, 4, 4))
    for change, back in (
        ("same", lambda x: x),
        ("inverted", lambda x: images.max() - x),
        ("rotated", lambda x: np.rot90(x, -1, (1, 2))),
    ):
        first, second, classes = pair_images(np.random.default_rng(1), images, labels, 50, change)
        np.testing.assert_array_equal(np.floor(first.mean(axis=(1, 2))), classes)
        np.testing.assert_array_equal(np.floor(back(second).mean(axis=(1, 2))), classes)
    assert len(np.unique(first.reshape(50, -1), axis=0)) == 50
    for bad, word in (({"change": "mirrored"}, "change"), ({"n": 201}, "n")):
        with pytest.raises(ValueError, match=rf"{word}.*expected"):
            pair_images(rng, images, labels, **({"n": 5} | bad))


def test_halved_images_are_means_of_blocks():
    x = np.arange(2 * 4 * 6, dtype=float).reshape(2, 4, 6)
    np.testing.assert_allclose(halved(x)[1, 1, 2], x[1, 2:4, 4:6].mean())
    assert halved(np.zeros((3, 4, 4, 4))).shape == (3, 2, 2, 2)


def test_phantom_shrinks_with_the_shared_factor_and_the_group_follows_it():
    rng = np.random.default_rng(3)
    found = sample_phantom(rng, 300, 8, noise=0.0)
    assert found.views[0].shape == found.views[1].shape == (300, 8, 8, 8)
    middle = found.views[0][:, 4, 4, 4]
    assert_at_most(np.corrcoef(middle, found.atrophy)[0, 1], -0.3, "tissue in the middle against atrophy")
    uptake = found.views[1].mean(axis=(1, 2, 3))
    beyond = uptake - np.polyval(np.polyfit(found.own[:, 3], uptake, 1), found.own[:, 3])
    assert_at_most(np.corrcoef(beyond, found.atrophy)[0, 1], -0.5, "uptake against atrophy")
    gap = found.atrophy[found.group == 1].mean() - found.atrophy[found.group == 0].mean()
    assert_at_least(gap, 0.5, "atrophy of one group less that of the other")


def test_noise_of_two_keys_differs():
    one, other = (sample_curves(jr.key(k), 10, 8).views[0] for k in (0, 1))
    assert bool(jnp.any(one != other))
