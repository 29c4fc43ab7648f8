"""DeepJIVE: its losses by hand, what standardising, projecting and partial sharing must do, and the signs of its failures."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import numpy as np
import pytest
from helpers import assert_at_most, assert_close, relative
from scipy.linalg import subspace_angles

from hcl_jax import Hierarchy
from hcl_jax.baselines import ajive
from hcl_jax.joint_ranks import choose_ranks
from hcl_jax.networks import deepjive
from hcl_jax.networks.deepjive import DeepjiveConfig, build, explained_share, fit, loss, parts, projection_of, warnings_of
from hcl_jax.networks.modules import overlap, patches
from hcl_jax.networks.training import Batch, TrainingConfig
from hcl_jax.signals import sample_blocks, sample_curves

PAIR = Hierarchy((6, 5), {"12": 2, "1": 1, "2": 2})
LATTICE = Hierarchy.full((6, 5, 7), 1)
DOUBLE = TrainingConfig(dtype="float64")
SMALL = DeepjiveConfig(training=DOUBLE, hidden=(7,))


def rows(hierarchy, n=40, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((n, d))) for d in hierarchy.dims)


@cache
def network_of(hierarchy, **options):
    return jax.jit(build, static_argnums=(1, 2))(jr.key(0), hierarchy, dataclasses.replace(SMALL, **options))


def parts_of(hierarchy, elapsed=None, **options):
    """(loss, its parts, codes of unit variance, network, views)"""
    config, views = dataclasses.replace(SMALL, **options), rows(hierarchy)
    network = network_of(hierarchy, **options)
    elapsed = None if elapsed is None else jnp.asarray(elapsed)
    value, found = jax.jit(lambda net, xs: loss(net, Batch(xs, elapsed=elapsed), jr.key(0), config))(network, views)
    raw = {place: np.asarray(code) for place, code in network.raw(views).items()}
    codes = {p: (c - c.mean(axis=0)) / c.std(axis=0) if len(p[1]) > 1 else c for p, c in raw.items()}
    return value, found, codes, network, views


def decoded(network, codes, place, source=None):
    """What the decoder of a place makes of the code of another view, unless given of its own."""
    return np.asarray(network.decoders[place](jnp.asarray(codes[place if source is None else (source, place[1])])))


def test_loss_of_two_views_is_the_papers():
    value, found, codes, network, views = parts_of(PAIR)
    error = sum(
        np.mean((views[m - 1] - decoded(network, codes, (m, (1, 2))) - decoded(network, codes, (m, (m,)))) ** 2) for m in (1, 2)
    )
    # standard deviations are guarded by 1e-6 in the variance, of codes that vary by 0.01 or more before training
    np.testing.assert_allclose(found["reconstruction"], error, rtol=1e-4)
    np.testing.assert_allclose(found["identity"], np.mean((codes[1, (1, 2)] - codes[2, (1, 2)]) ** 2), rtol=1e-2)
    assert_close(value, found["reconstruction"] + found["identity"] + 0.3 * found["orthogonality"], "loss")


def test_exchange_rebuilds_from_the_other_views_code_too():
    _, found, codes, network, views = parts_of(PAIR, identity="exchange")
    errors = [
        np.mean((views[m - 1] - decoded(network, codes, (m, (1, 2)), source) - decoded(network, codes, (m, (m,)))) ** 2)
        for m in (1, 2)
        for source in (1, 2)
    ]
    np.testing.assert_allclose(found["reconstruction"], np.sum(errors) / 2, rtol=1e-4)


def test_merged_codes_are_one():
    network = network_of(LATTICE, identity="merged")
    codes = network.raw(rows(LATTICE))
    for s in LATTICE.structures:
        for m in s:
            np.testing.assert_array_equal(codes[m, s], codes[s[0], s])


def test_explained_share_is_that_of_least_squares():
    rng = np.random.default_rng(1)
    given, code = rng.standard_normal((200, 3)), rng.standard_normal((200, 2)) + 4
    given -= given.mean(axis=0)
    code[:, 0] += given @ [1.0, 2.0, 0.5]
    left = code - code.mean(axis=0) - given @ np.linalg.lstsq(given, code - code.mean(axis=0), rcond=None)[0]
    share = 1 - np.mean(left**2, axis=0) / code.var(axis=0)
    np.testing.assert_allclose(explained_share(jnp.asarray(given), jnp.asarray(code), 1e-9), share.mean(), rtol=1e-5)


def gradients(elapsed, **options):
    """Sizes of the gradients in the encoders, by place, without the identity."""
    config = dataclasses.replace(SMALL, identity_weight=0.0, **options)
    network = network_of(PAIR, **options)
    value = lambda net: loss(net, Batch(rows(PAIR), elapsed=jnp.asarray(elapsed)), jr.key(0), config)[0]
    found = jax.jit(jax.grad(value))(network)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    return {place: flat(encoder) for place, encoder in found.encoders.items()}, network, flat


@pytest.mark.slow
@pytest.mark.long
def test_joint_codes_first_learn_as_if_they_were_alone_and_individual_ones_what_is_left():
    early, network, flat = gradients(0.1, gamma=0.0)
    alone = lambda net: sum(
        jnp.mean((x - net.decoders[m, (1, 2)](deepjive.of_unit_variance(net.encoders[m, (1, 2)](x)))) ** 2)
        for m, x in enumerate(rows(PAIR), start=1)
    )
    expected = jax.jit(jax.grad(alone))(network)
    for m in (1, 2):
        assert_at_most(relative(early[m, (1, 2)], flat(expected.encoders[m, (1, 2)])), 1e-9, "joint gradient before its time")
        assert np.linalg.norm(early[m, (m,)]) > 0
    late, _, _ = gradients(0.9, gamma=0.0)
    assert relative(late[1, (1, 2)], early[1, (1, 2)]) > 1e-4


@pytest.mark.slow
@pytest.mark.long
def test_the_explained_penalty_has_no_gradient_in_the_individual_code_and_the_others_have():
    for name, moves in (("ridge", True), ("adversarial", True), ("residual", True), ("explained", False)):
        without, _, _ = gradients(1.0, orthogonality=name, gamma=0.0)
        config = dataclasses.replace(SMALL, orthogonality=name, identity_weight=0.0)
        value = lambda net, config=config: loss(net, Batch(rows(PAIR)), jr.key(0), config)[0]
        found = jax.jit(jax.grad(value))(network_of(PAIR, orthogonality=name, gamma=0.0))
        own = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found.encoders[1, (1,)])])
        assert (relative(own, without[1, (1,)]) > 1e-6) == moves, name


def test_projection_leaves_no_correlation_of_structures_that_share_a_view():
    codes = jnp.asarray(np.random.default_rng(3).standard_normal((60, LATTICE.n_factors)) @ np.full((7, 7), 0.4) + 1)
    codes = codes + jnp.asarray(np.random.default_rng(4).standard_normal(codes.shape))
    scores = np.asarray(codes - codes @ projection_of(codes, LATTICE))
    correlations = np.corrcoef(scores.T)
    for i, s in enumerate(LATTICE.structures):
        for j, t in enumerate(LATTICE.structures[:i]):
            together = set(s) & set(t)
            assert (abs(correlations[i, j]) < 1e-10) == bool(together), (s, t)


@pytest.mark.parametrize(("sides", "kernel"), [((8, 4), 3), ((4, 4, 4), 2)])
def test_patches_are_those_of_a_convolution_and_overlap_is_their_transpose(sides, kernel):
    rng, k = np.random.default_rng(0), kernel ** len(sides)
    x, weights = rng.standard_normal((2, *sides, 3)), rng.standard_normal((k * 3, 5))
    found = np.asarray(patches(jnp.asarray(x), kernel)) @ weights
    before, axes = (kernel - 1) // 2, range(len(sides))
    padded = np.pad(x, ((0, 0), *((before, kernel) for _ in axes), (0, 0)))
    for cell in np.ndindex(*(side // 2 for side in sides)):
        block = padded[:, *(slice(2 * at, 2 * at + kernel) for at in cell)]
        np.testing.assert_allclose(found[:, *cell], block.reshape(2, -1) @ weights, rtol=1e-10)
    y = rng.standard_normal((2, *(side // 2 for side in sides), k * 3))
    inner = np.sum(np.asarray(patches(jnp.asarray(x), kernel)) * y)
    np.testing.assert_allclose(np.sum(x * np.asarray(overlap(jnp.asarray(y), kernel))), inner, rtol=1e-10)


CURVES = Hierarchy((24, 24), {"12": 2, "1": 2, "2": 2})
QUICK = DeepjiveConfig(
    training=TrainingConfig(steps=1500, batch_size=64, learning_rate=4e-3, weight_decay=0.0, patience=100), hidden=(32,)
)


@cache
def curves(joint=True):
    return sample_curves(jr.key(5), 700, 24, joint=joint)


@cache
def quick(**options):
    return fit([view[:500] for view in curves().views], CURVES, dataclasses.replace(QUICK, **options), key=jr.key(1))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("identity", ["explicit", "exchange", "merged"])
def test_curves_are_taken_apart(identity):
    found = quick(identity=identity)
    rebuilt, truth = parts(found, [view[500:] for view in curves().views]), curves().parts
    assert warnings_of(found) == ()
    for m in (1, 2):
        clean, part = (
            np.asarray(held[m, (1, 2)][-200:]) - np.asarray(held[m, (1, 2)][-200:]).mean(axis=0) for held in (truth, rebuilt)
        )
        assert_at_most(relative(part, clean), 0.25, f"{identity}, view {m}: error of the joint part")
    scores = np.asarray(found.transform([view[500:] for view in curves().views]))
    correlations = np.corrcoef(scores.T)[:2, 2:]
    assert_at_most(abs(correlations).max(), 0.25, "correlation of joint and individual scores, 200 rows: three standard errors")


@pytest.mark.slow
@pytest.mark.long
def test_failures_are_told():
    assert any("collapse" in word for word in warnings_of(quick(standardise=False, identity_weight=100.0)))
    blurred = warnings_of(quick(gamma=1000.0, orthogonality="residual"))
    assert any("blur" in word or "divergence" in word for word in blurred), blurred
    calm = quick()
    jumped = calm.history["reconstruction"].at[-1].set(10 * jnp.nanmin(calm.history["reconstruction"]))
    jumped = dataclasses.replace(calm, history=calm.history | {"reconstruction": jumped})
    assert any("divergence" in word for word in warnings_of(jumped))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("identity", ["explicit", "exchange", "merged"])
def test_linear_networks_find_the_joint_subspace_of_ajive(identity):
    signals = sample_blocks(jr.key(0), 400, (40, 60))
    hierarchy = Hierarchy((40, 60), {"12": 1, "1": 1, "2": 2})
    found = fit(signals.views, hierarchy, dataclasses.replace(QUICK, identity=identity, hidden=()), key=jr.key(0))
    joint = np.asarray(found.transform(signals.views)[:, :1])
    theirs = np.asarray(ajive.fit(signals.views, hierarchy).transform(signals.views)[:, :1])
    angle = np.degrees(subspace_angles(joint - joint.mean(axis=0), theirs)[0])
    assert_at_most(angle, 10, f"{identity}: degrees from AJIVE's joint subspace")


@pytest.mark.slow
@pytest.mark.long
def test_ranks_of_curves():
    config = dataclasses.replace(QUICK, hidden=(64, 64), training=dataclasses.replace(QUICK.training, steps=3000))
    assert choose_ranks(curves().views, (4, 4), config, key=jr.key(0)).joint == 2


@pytest.fixture
def as_users_call():
    """Without the run-time checks of types in signatures that other tests have."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_call")
@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"identity": "same"}, "identity"),
        ({"orthogonality": "none"}, "orthogonality"),
        ({"gamma": -1.0}, "gamma"),
        ({"ridge": 0.0}, "ridge"),
        ({"joint_first": 0.9}, "ramp"),
        ({"hidden": (0,)}, "hidden"),
        ({"critic_steps": 0}, "critic_steps"),
        ({"restarts": 0}, "restarts"),
        ({"channels": ()}, "channels"),
    ],
)
def test_bad_options_are_named(bad, word):
    with pytest.raises(ValueError, match=rf"{word}.*expected"):
        DeepjiveConfig(**bad)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"hierarchy.*expected"):
        fit([np.ones((9, 3))], Hierarchy((3,), {"1": 1}), key=jr.key(0))
    with pytest.raises(ValueError, match=r"shapes.*expected"):
        fit(rows(PAIR), PAIR, dataclasses.replace(SMALL, shapes=((2, 3), (5,))), key=jr.key(0))
    with pytest.raises(ValueError, match=r"latents.*expected"):
        choose_ranks([np.ones((9, 3))] * 2, (2,), key=jr.key(0))
