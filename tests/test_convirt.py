"""ConVIRT: numbers of the released code at three settings, losses that are known, and that training finds what views share."""

from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch_weights as torch
from helpers import SHARED, TWO, assert_at_least, assert_at_most, assert_close, masked_normal, reference_arrays, relative

from hcl_jax import Hierarchy
from hcl_jax.networks import convirt
from hcl_jax.networks.convirt import ConvirtConfig
from hcl_jax.networks.modules import Perceptron
from hcl_jax.networks.training import Batch, TrainingConfig

DOUBLE = TrainingConfig(dtype="float64")
THREE = Hierarchy.full((12, 10, 8), 1)
KEY = jr.key(0)
PLACES = {}
for m in range(3):
    PLACES |= torch.perceptron(f"structure_encoders.{m}.net", lambda net, m=m: net.encoders[m], 3)
TAGS = {"": "port", "tau1_lam1/": "trained", "tau0.1_lam0.75/": "paper"}
VARIANTS = ("default", "paper", "port", "trained")

built = jax.jit(convirt.build, static_argnums=(1, 2))


@cache
def released(variant="port"):
    """(stored arrays, our network with the stored weights, its configuration)."""
    arrays = reference_arrays("deep/convirt")
    hierarchy = Hierarchy.shared_and_private([x.shape[1] for x in torch.inputs(arrays)], 4, 1)
    config = ConvirtConfig(variant=variant, training=DOUBLE)
    return arrays, torch.load(built(KEY, hierarchy, config), arrays, PLACES), config


def total(config, network, views):
    return convirt.loss(network, Batch(views), KEY, config)[0]


def test_every_representation_and_the_derivative_of_all_of_them():
    arrays, network, _ = released()
    views = torch.inputs(arrays)
    for m, code in enumerate(jax.jit(lambda xs: network.codes(xs))(views), start=1):
        assert_at_most(relative(code, arrays[f"rep/z{m}"]), 1e-9, f"z{m}")
    fused, pulled_back = jax.vjp(jax.jit(lambda xs: network.scores(xs)), views)
    assert_at_most(relative(fused, arrays["fused"]), 1e-9, "fused")
    for m, gradient in enumerate(pulled_back(jnp.asarray(arrays["fuse/cot"], float))[0], start=1):
        assert_at_most(relative(gradient, arrays[f"fuse/grad/x{m}"]), 1e-9, f"gradient by view {m}")


@pytest.mark.parametrize(("tag", "variant"), TAGS.items())
def test_loss_gradients_and_descent(tag, variant):
    arrays, network, config = released(variant)
    _, parts = jax.jit(lambda xs: convirt.loss(network, Batch(xs), KEY, config))(torch.inputs(arrays))
    for ours, theirs in (("12", "AB"), ("13", "AC"), ("23", "BC")):
        assert_at_most(relative(parts[ours], arrays[f"{tag}loss/{theirs}"]), 1e-9, f"{tag}pair {ours}")
    torch.check_loss(arrays, network, PLACES, lambda net, xs: total(config, net, xs), tag)


def of_codes(*codes, variant="paper", **options):
    """The loss where encoders are the identity, so that inputs are the codes."""
    return compiled_loss(codes, ConvirtConfig(variant=variant, training=DOUBLE, **options))


@partial(jax.jit, static_argnums=1)
def compiled_loss(codes, config):
    r = codes[0].shape[1]
    encoder = Perceptron(KEY, (r, r), dtype=jnp.float64)
    encoder = eqx.tree_at(lambda e: (e.layers[0].weight, e.layers[0].bias), encoder, (jnp.eye(r), jnp.zeros(r)))
    return total(config, convirt.Convirt((encoder,) * len(codes), encoder), codes)


def random_codes(views=3, n=16, r=4):
    return tuple(jnp.asarray(np.random.default_rng(0).standard_normal((views, n, r))))


def test_codes_that_say_nothing_have_the_logarithm_of_the_batch():
    constant = jnp.ones((16, 4))
    for variant in VARIANTS:
        assert_close(of_codes(constant, constant, variant=variant), np.log(16), variant)
    assert_close(of_codes(constant, constant, constant), 3 * np.log(16), "three pairs")


def test_equal_codes_have_no_loss_at_a_low_temperature_and_no_others_a_negative_one():
    code, other, _ = random_codes()
    assert_at_most(of_codes(jnp.eye(16), 3 * jnp.eye(16), temperature=0.01), 1e-12, "equal directions")
    for temperature in (0.01, 0.1, 1.0):
        assert_at_least(of_codes(code, code, temperature=temperature), -1e-12, "equal")
        assert_at_least(of_codes(code, other, temperature=temperature), 0, "unrelated")


def test_half_and_half_does_not_know_the_order_of_views():
    a, b, c = random_codes()
    assert_close(of_codes(a, b, c, variant="default"), of_codes(c, a, b, variant="default"), "order")
    assert_at_least(jnp.abs(of_codes(a, b) - of_codes(b, a)), 1e-2, "the paper's weights")
    assert_close(of_codes(a, b, direction=0.25), of_codes(b, a, direction=0.75), "weights turned")


def test_only_directions_count():
    """So that codes of one coordinate have no derivative, and codes of length 0 need one to be chosen."""
    a, b, _ = random_codes()
    lengths = jnp.asarray(np.random.default_rng(1).uniform(0.1, 9, (16, 1)))
    assert_close(of_codes(a, lengths * b), of_codes(a, b), "lengths")
    assert_at_most(jnp.abs(jax.grad(of_codes)(a[:, :1], b[:, :1])).max(), 1e-12, "one coordinate")
    assert not np.any(jax.grad(lambda a: of_codes(a, b, variant="default"))(jnp.zeros((16, 4))))


def random_views(hierarchy, n=40):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((n, d))) for d in hierarchy.dims)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hierarchy", [TWO, THREE, SHARED, Hierarchy.full((8, 8, 9, 10), 1)], ids=str)
def test_a_column_for_each_coordinate_and_any_number_of_views(variant, hierarchy):
    config = ConvirtConfig(variant=variant, training=DOUBLE)
    membership = convirt.membership(hierarchy, config)

    def shapes(views):
        network = convirt.build(KEY, hierarchy, config)
        return network.scores(views), network.outputs(views), total(config, network, views)

    scores, outputs, value = jax.eval_shape(shapes, random_views(hierarchy))
    assert membership.all()
    assert scores.shape == (40, membership.shape[1])
    assert outputs.shape == (40, 1)
    assert value.shape == ()


def test_widths():
    uneven = Hierarchy((9, 9, 9), {(1, 2, 3): 2, (1, 3): 1, (2, 3): 2, (2,): 1})
    assert convirt.width(uneven, ConvirtConfig()) == 6
    assert convirt.width(uneven, ConvirtConfig(variant="port")) == 2
    assert convirt.width(Hierarchy((9, 9, 9), {(1, 2): 2, (3,): 3}), ConvirtConfig(variant="paper")) == 3
    assert convirt.width(uneven, ConvirtConfig(rank=5)) == 5


def test_rows_that_lack_views_have_the_mean_of_their_other_codes():
    config = ConvirtConfig(training=DOUBLE, hidden=(8,))
    network = built(KEY, THREE, config)
    views, present = random_views(THREE), np.ones((40, 3), bool)
    present[:20, 1] = present[:10, 2] = False
    codes = np.stack(network.codes(views))
    scores = np.asarray(network.scores(views, jnp.asarray(present))).reshape(40, 3, -1).transpose(1, 0, 2)
    assert_close(scores[1, :10], codes[0, :10], "only the first is there")
    assert_close(scores[1, 10:20], (codes[0, 10:20] + codes[2, 10:20]) / 2, "the second is not")
    assert_close(scores[:, 20:], codes[:, 20:], "all are")


@cache
def draw():
    """(hierarchy, 800 rows of its views side by side, their latents)."""
    rng = np.random.default_rng(1)
    hierarchy = Hierarchy((12, 10, 8), {(1, 2, 3): 2, (1,): 3, (2,): 3, (3,): 3})
    z = rng.standard_normal((800, hierarchy.n_factors))
    return hierarchy, z @ masked_normal(rng, hierarchy).T + 0.3 * rng.standard_normal((800, hierarchy.n_features)), z


def as_views(X):
    return np.split(X, np.cumsum(draw()[0].dims)[:-1], axis=1)


def explained(fit, structure):
    """Share of the variance of a structure's latents that the first view's code explains in new rows, by least squares on the
    others."""
    hierarchy, X, z = draw()
    z = z[:, hierarchy.columns(structure)]
    design = np.column_stack([np.ones(len(X)), np.asarray(fit.transform(as_views(X)), float)[:, :3]])
    left = z[400:] - design[400:] @ np.linalg.lstsq(design[:400], z[:400], rcond=None)[0]
    return 1 - np.var(left) / np.var(z[400:])


QUICK = TrainingConfig(steps=300, batch_size=100, learning_rate=3e-3)


@pytest.mark.slow
def test_training_finds_what_is_shared_and_leaves_the_rest():
    """At a width with which nothing else has room: two latents, and one coordinate more."""
    hierarchy, X, _ = draw()
    config = ConvirtConfig(rank=3, hidden=(24,), training=QUICK)
    fit = convirt.fit(as_views(X[:400]), hierarchy, config, key=jr.key(3))
    assert int(fit.status) == 0
    networks = [built(key, hierarchy, config) for key in jr.split(jr.key(4), 8)]
    random = np.mean([explained(eqx.tree_at(lambda fit: fit.network, fit, network), "123") for network in networks])
    assert_at_least(explained(fit, "123") - random, 0.2, "shared, trained less the mean of random")
    assert_at_least(explained(fit, "123"), 0.9, "shared")
    assert_at_most(explained(fit, "1"), 0.2, "private")


@pytest.mark.slow
def test_classes_are_predicted():
    hierarchy, X, z = draw()
    y = np.digitize(z[:, 0], (-0.5, 0.5))
    config = ConvirtConfig(n_classes=3, hidden=(24,), training=QUICK)
    fit = convirt.fit(as_views(X[:400]), hierarchy, config, y=y[:400], key=jr.key(3))
    probabilities = np.asarray(fit.predict(as_views(X[400:])))
    assert_at_most(np.abs(probabilities.sum(axis=1) - 1).max(), 1e-5, "total probability less 1")
    assert_at_least(np.mean(probabilities.argmax(axis=1) == y[400:]), 0.75, "accuracy")


def test_refusals():
    for options, word in (
        ({"temperature": 0.0}, "temperature"),
        ({"direction": 1.5}, "direction"),
        ({"rank": 0}, "rank"),
        ({"hidden": (8, 0)}, "hidden"),
    ):
        with pytest.raises(ValueError, match=word):
            ConvirtConfig(**options)
    with pytest.raises(ValueError, match="at least 2"):
        convirt.fit([np.zeros((9, 9))], Hierarchy((9,), {(1,): 2}), key=KEY)
