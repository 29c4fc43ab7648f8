"""Links: inverses, ranges and shapes of the maps between the linear model and the features, and draws through them."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import TWO, assert_at_most, assert_close, assert_within, relative

from hcl_jax import Truth
from hcl_jax.links import LINKS, MonotoneSpline, check_links, leaky, sample_link, sample_linked_observations, sample_links
from hcl_jax.model import sample_observations

INCREASING = ("identity", "sinh", "cubic", "softplus", "spline")
INVERTIBLE = (*INCREASING, "leaky", "leakyQ")
LOSSY = ("absolute", "threshold", "counts")
U = 2 * jr.normal(jr.key(1), (200, 5), jnp.float64)


def link_of(name, seed=0, dim=5, dtype=jnp.float64):
    return sample_link(jr.key(seed), name, dim, dtype)


def truth_of(hierarchy=TWO):
    rng = np.random.default_rng(0)
    loadings = np.where(hierarchy.mask, rng.standard_normal(hierarchy.mask.shape), 0)
    return Truth(jnp.asarray(loadings), jnp.asarray(0.1), hierarchy)


def test_all_links_are_told_apart():
    assert set(LINKS) == {*INVERTIBLE, *LOSSY}


@pytest.mark.parametrize("name", INVERTIBLE)
def test_inverse_is_exact_to_rounding(name):
    link = link_of(name)
    assert link.invertible
    x = link.forward(U)
    assert x.shape == U.shape
    assert_close(link.inverse(x), U, f"{name}: u from x", slack=100)
    assert_close(link.forward(link.inverse(x)), x, f"{name}: x from u", slack=100)


@pytest.mark.parametrize("name", ["sinh", "cubic", "softplus"])
def test_inverse_keeps_relative_digits_far_out(name):
    """Each entry by itself, from 1e-6 to 30 and the same below 0."""
    u = jnp.concatenate([s * jnp.logspace(-6, np.log10(30), 50) for s in (-1, 1)])[:, None]
    link = link_of(name, dim=1)
    scale = jnp.maximum(jnp.abs(u), 1) if name == "softplus" else jnp.abs(u)  # where softplus crosses log 2 only its u is lost
    assert_at_most(jnp.max(jnp.abs(link.inverse(link.forward(u)) - u) / scale), 1e-13, f"{name}: relative error")


@pytest.mark.parametrize("name", INCREASING)
def test_links_by_feature_increase_strictly(name):
    grid = jnp.broadcast_to(jnp.linspace(-6, 6, 1000)[:, None], (1000, 5))
    assert bool((jnp.diff(link_of(name).forward(grid), axis=0) > 0).all())


@pytest.mark.parametrize(
    ("name", "formula"),
    [("sinh", np.sinh), ("cubic", lambda u: u**3), ("softplus", lambda u: np.log1p(np.exp(u))), ("absolute", np.abs)],
)
def test_links_by_feature_are_their_formulas(name, formula):
    assert_close(link_of(name).forward(U), formula(np.asarray(U)), name)


@pytest.mark.parametrize(("name", "rotations"), [("leaky", 2), ("leakyQ", 3)])
def test_leaky_links_rotate_then_bend(name, rotations):
    link, x = link_of(name), np.asarray(U)
    assert len(link.rotations) == rotations
    for layer, R in enumerate(np.asarray(R) for R in link.rotations):
        assert_close(R @ R.T, np.eye(5), "RRᵀ")
        x = x @ R.T
        x = np.where(x < 0, 0.2 * x, x) if layer < 2 else x
    assert_close(link.forward(U), x, name)
    assert relative(link.rotations[0], link.rotations[1]) > 0.1


def test_rotations_are_haar():
    """E R = 0 and E R_ij² = 1/p over draws."""
    draws = np.asarray(jax.vmap(lambda key: LINKS["leaky"](key, 5, jnp.float64).rotations[0])(jr.split(jr.key(0), 200)))
    assert_at_most(np.abs(draws.mean(axis=0)).max(), 4.5 * np.sqrt(1 / 5 / 200), "largest mean entry, in units of its error")
    assert_within((draws[:, 0, 0] ** 2).mean(), 1 / 5, 4 * 0.25 / np.sqrt(200), "mean squared entry")


def test_lossy_links_say_so():
    for name in LOSSY:
        assert not link_of(name).invertible
        with pytest.raises(ValueError, match="inverse"):
            link_of(name).inverse(U)


def test_ranges_of_lossy_links():
    assert bool((link_of("absolute").forward(U) >= 0).all())
    assert set(np.unique(link_of("threshold").forward(U))) == {0.0, 1.0}
    counts = np.asarray(link_of("counts").forward(U, jr.key(2)))
    assert counts.dtype == U.dtype
    assert (counts >= 0).all()
    assert (counts == counts.round()).all()


def test_counts_have_their_mean():
    u = jnp.full((4000, 1), 1.5)
    mean = np.exp(0.75)
    assert_within(link_of("counts").forward(u, jr.key(0)).mean(), mean, 4 * np.sqrt(mean / 4000), "mean count")
    with pytest.raises(ValueError, match="key"):
        link_of("counts").forward(u)


def test_spline_goes_through_its_knots_and_on_in_straight_lines():
    spline = link_of("spline")
    assert_close(spline.forward(spline.knots), spline.values, "values at knots")
    far = jnp.stack([jnp.full(5, -20.0), jnp.full(5, -10.0), jnp.full(5, 10.0), jnp.full(5, 20.0)])
    x = spline.forward(far)
    assert_close(x[1] - x[0], 10 * spline.slopes[0], "left tail")
    assert_close(x[3] - x[2], 10 * spline.slopes[-1], "right tail")


def test_slope_of_a_spline_is_its_derivative():
    spline = link_of("spline")
    by_feature = jax.grad(lambda u: spline.forward(u).sum())(U)
    assert_close(spline.value_and_slope(U)[1], by_feature, "slope")
    edges = jnp.concatenate([spline.knots - 1e-9, spline.knots + 1e-9])
    assert_at_most(relative(spline.value_and_slope(edges)[1], jnp.tile(spline.slopes, (2, 1))), 1e-7, "jump of the slope")


def test_spline_with_equal_slopes_is_linear():
    knots = jnp.linspace(-1, 1, 4)[:, None]
    spline = MonotoneSpline.through(knots, 3 * knots + 1)
    assert_close(spline.forward(U[:, :1]), 3 * U[:, :1] + 1, "line")


def test_float32_stays_float32():
    for name in LINKS:
        x = link_of(name, dtype=jnp.float32).forward(U.astype(jnp.float32), jr.key(0))
        assert x.dtype == jnp.float32, name


def test_links_are_deterministic_in_their_key():
    for name in ("spline", "leaky"):
        assert bool(jnp.array_equal(link_of(name, 3).forward(U), link_of(name, 3).forward(U)))
        assert relative(link_of(name, 3).forward(U), link_of(name, 4).forward(U)) > 0.1


def test_links_of_a_modality_do_not_depend_on_the_others():
    one = sample_links(jr.key(0), "leaky", TWO, jnp.float64)
    other = sample_links(jr.key(0), ("sinh", "leaky"), TWO, jnp.float64)
    assert bool(jnp.array_equal(one[1].rotations[0], other[1].rotations[0]))
    assert relative(one[0].rotations[0][:7, :7], one[1].rotations[0]) > 0.1


def test_all_links_see_the_same_draw():
    truth, key = truth_of(), jr.key(5)
    plain, z = sample_linked_observations(key, truth, sample_links(key, "identity", TWO, jnp.float64), 50)
    assert [view.shape for view in plain] == [(50, 9), (50, 7)]
    assert z.shape == (50, TWO.n_factors)
    for name in ("softplus", "leaky"):
        links = sample_links(jr.key(1), name, TWO, jnp.float64)
        views, again = sample_linked_observations(key, truth, links, 50)
        assert bool(jnp.array_equal(z, again))
        for link, view, u in zip(links, views, plain, strict=True):
            assert_close(link.inverse(view), u, name)


def test_draws_follow_the_linear_model():
    truth, key = truth_of(), jr.key(5)
    views, z = sample_linked_observations(key, truth, sample_links(key, "identity", TWO, jnp.float64), 20_000, "laplace")
    left = jnp.concatenate(views, axis=1) - z @ truth.loadings.T
    assert_within(left.var(), 0.1, 4 * 0.1 * np.sqrt(2 / left.size), "noise variance")
    x, _ = sample_observations(jr.split(key)[0], truth, 20_000, "laplace")
    assert bool(jnp.array_equal(jnp.concatenate(views, axis=1), x))


def test_counts_differ_between_modalities():
    truth = truth_of()
    links = sample_links(jr.key(0), "counts", TWO, jnp.float64)
    (first, second), _ = sample_linked_observations(jr.key(0), truth, links, 50)
    assert relative(first[:, :7], second) > 0.1


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match="link: unknown name 'tanh'"):
        link_of("tanh")
    with pytest.raises(ValueError, match="dim: is 0"):
        link_of("leaky", dim=0)
    with pytest.raises(ValueError, match="names: are 3"):
        sample_links(jr.key(0), ("sinh",) * 3, TWO)
    with pytest.raises(ValueError, match="links: are ByFeature"):
        check_links(link_of("sinh"), TWO)
    with pytest.raises(ValueError, match="links: are str, str"):
        check_links(("sinh", "sinh"), TWO)


def test_leaky_is_continuous_and_increasing():
    u = jnp.linspace(-1, 1, 101)
    assert bool((jnp.diff(leaky(u)) > 0).all())
    assert_close(leaky(u), np.where(np.asarray(u) < 0, 0.2 * np.asarray(u), np.asarray(u)), "leaky")
