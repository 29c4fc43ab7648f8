"""MISA: the numbers of the authors' code and of the port, where losses vanish, and that training finds what views share."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch_weights as torch
from helpers import SHARED, TWO, assert_at_least, assert_at_most, assert_close, masked_normal, reference_arrays, relative

from hcl_jax import Hierarchy
from hcl_jax.networks import misa
from hcl_jax.networks.misa import MisaConfig
from hcl_jax.networks.training import Batch, TrainingConfig

DOUBLE = TrainingConfig(dtype="float64")
KEY = jr.key(0)


def port_places():
    places = torch.perceptron("invariant_body.net", lambda net: net.common, 3)
    for m in range(3):
        places |= torch.linear(f"invariant_input_projs.{m}", lambda net, m=m: net.projections[m])
        places |= torch.perceptron(f"specific_encoders.{m}.net", lambda net, m=m: net.own[m], 3)
        places |= torch.perceptron(f"decoders.{m}", lambda net, m=m: net.decoders[m], 2)
    return places | torch.transformer("transformer.layers.0", lambda net: net.fusion)


def official_places():
    places = torch.linear("shared.shared_1", lambda net: net.common)
    for m, (name, number) in enumerate((("t", 1), ("v", 1), ("a", 3))):
        places |= torch.linear(f"project_{name}.project_{name}", lambda net, m=m: net.projections[m])
        places |= torch.linear(f"project_{name}.project_{name}_layer_norm", lambda net, m=m: net.norms[m])
        places |= torch.linear(f"private_{name}.private_{name}_{number}", lambda net, m=m: net.own[m])
        places |= torch.linear(f"recon_{name}.recon_{name}_1", lambda net, m=m: net.decoders[m])
    for i in (0, 1):
        places |= torch.linear(f"fusion.fusion_layer_{2 * i + 1}", lambda net, i=i: net.head.layers[i])
    return places | torch.transformer("transformer_encoder.layers.0", lambda net: net.fusion)


built = jax.jit(misa.build, static_argnums=(1, 2))
PLACES = {"port": port_places, "official": official_places}
RANKS = {"port": 4, "official": 8}


@cache
def released(variant):
    """(stored arrays, our network with the stored weights, its configuration)."""
    arrays = reference_arrays(f"deep/misa_{variant}")
    dims = [x.shape[1] for x in torch.inputs(arrays)]
    config = MisaConfig(variant=variant, training=DOUBLE)
    network = built(KEY, Hierarchy.shared_and_private(dims, RANKS[variant], 1), config)
    return arrays, torch.load(network, arrays, PLACES[variant]()), config


def total(config, network, views):
    return misa.loss(network, Batch(views), KEY, config)[0]


@pytest.mark.parametrize("variant", ["port", "official"])
class TestReleased:
    def test_every_representation(self, variant):
        arrays, network, _ = released(variant)
        codes, tokens = jax.jit(lambda xs: (network.codes(xs), network.fusion(network.tokens(network.codes(xs)))))(
            torch.inputs(arrays)
        )
        for m in range(3):
            found = {"c": codes.shared, "p": codes.private, "recon": codes.rebuilt}
            found |= {"u": codes.targets} if variant == "official" else {}
            for name, values in found.items():
                assert_at_most(relative(values[m], arrays[f"rep/{name}{m + 1}"]), 1e-9, f"{name}{m + 1}")
        assert_at_most(relative(tokens, arrays["rep/tokens_out"]), 1e-9, "tokens")

    def test_parts_of_the_loss(self, variant):
        arrays, network, config = released(variant)
        _, parts = jax.jit(lambda xs: misa.loss(network, Batch(xs), KEY, config))(torch.inputs(arrays))
        for ours, theirs in (("similarity", "sim"), ("difference", "diff"), ("reconstruction", "recon")):
            assert_at_most(relative(parts[ours], arrays[f"loss/{theirs}"]), 1e-9, ours)

    def test_total_gradients_and_descent(self, variant):
        """At 1e-3 the port's run diverges: encoders without a bound under a fifth moment; its stored amplification is NaN."""
        arrays, network, config = released(variant)
        torch.check_loss(arrays, network, PLACES[variant](), lambda net, xs: total(config, net, xs))


def test_fused_output_and_its_derivative():
    arrays, network, _ = released("port")
    views = torch.inputs(arrays)
    fused, pulled_back = jax.vjp(jax.jit(lambda xs: network.fused(xs)), views)
    assert_at_most(relative(fused, arrays["fused"]), 1e-9, "fused")
    for m, gradient in enumerate(pulled_back(jnp.asarray(arrays["fuse/cot"], float))[0], start=1):
        assert_at_most(relative(gradient, arrays[f"fuse/grad/x{m}"]), 1e-9, f"gradient by view {m}")


@pytest.mark.slow
def test_official_output_and_training_with_a_task():
    arrays, network, config = released("official")
    y = jnp.asarray(arrays["y_real"], float)[:, None]
    task_loss = lambda outputs: jnp.mean((outputs - y) ** 2)

    def value_of(net, views):
        return total(config, net, views) + task_loss(net.outputs(views))

    outputs = jax.jit(lambda xs: network.outputs(xs))(torch.inputs(arrays))
    assert_at_most(relative(outputs, arrays["fused"]), 1e-9, "output")
    assert_at_most(relative(task_loss(outputs), arrays["loss/task_mse"]), 1e-9, "task")
    torch.check_loss(arrays, network, official_places(), value_of, "with_task/")


SMALL = {"hidden": (16, 8), "training": DOUBLE}
VARIANTS = ("default", "port", "official")


def random_views(hierarchy, n=40, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((n, d))) for d in hierarchy.dims)


@cache
def untrained(variant, hierarchy):
    config = MisaConfig(variant=variant, **SMALL)
    return built(KEY, hierarchy, config), config


PAIR = Hierarchy((6, 6), {(1, 2): 2, (1,): 2, (2,): 2})
THREE = Hierarchy.full((12, 10, 8), 2)


@pytest.mark.parametrize("variant", VARIANTS)
class TestEveryVariant:
    def test_derivatives_are_finite_where_norms_vanish(self, variant):
        """Views that are equal, seen by equal weights: their shared codes are, and have a discrepancy of 0. Rows that are equal:
        centred, they are 0. Lengths and moments of zeros have no derivative unless one is chosen."""
        network, config = untrained(variant, PAIR)
        network = eqx.tree_at(lambda net: net.projections, network, (network.projections[0],) * 2)

        @jax.jit
        def evaluate(x):
            evaluated = lambda net, xs: misa.loss(net, Batch(xs), KEY, config)
            (_, parts), gradient = jax.value_and_grad(evaluated, has_aux=True)(network, (x, x))
            return parts["similarity"], [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)]

        for x in (random_views(PAIR)[0], jnp.ones((40, 6)), jnp.zeros((40, 6))):
            similarity, finite = evaluate(x)
            assert similarity == 0
            assert all(map(bool, finite))

    def test_orthogonal_designs_have_no_difference(self, variant):
        H = np.ones((1, 1))
        for _ in range(3):
            H = np.block([[H, H], [H, -H]])  # 8 orthogonal columns, centred but for the first
        a, b = jnp.asarray(H[:, 1:4]), jnp.asarray(H[:, 4:7])
        assert_at_most(misa.DIFFERENCES[variant](a, b), 1e-28, "orthogonal")
        assert_at_least(misa.DIFFERENCES[variant](a, a), 0.3, "equal")

    @pytest.mark.parametrize("hierarchy", [TWO, THREE, SHARED, Hierarchy.full((8, 8, 9, 10), 1)], ids=str)
    def test_a_column_for_each_code_and_any_number_of_views(self, variant, hierarchy):
        config = MisaConfig(variant=variant, **SMALL)
        views, membership = random_views(hierarchy), misa.membership(hierarchy, config)
        shared, own = misa.widths(hierarchy, config)

        def shapes(views):
            network = misa.build(KEY, hierarchy, config)
            network = misa.finish(network, Batch(views), hierarchy, config)
            return network.scores(views), network.fused(views), network.outputs(views)

        scores, fused, outputs = jax.eval_shape(shapes, views)
        assert scores.shape == (40, membership.shape[1]) == (40, shared + sum(own))
        assert membership.sum() == hierarchy.n_modalities * shared + sum(own)
        assert variant == "default" or fused.shape == (40, 2 * hierarchy.n_modalities * shared)
        assert outputs.shape == (40, 1)

    def test_rows_that_lack_views(self, variant):
        """The mean of what the others share, and nothing of their own."""
        network, config = untrained(variant, THREE)
        views = random_views(THREE)
        network = jax.jit(misa.finish, static_argnums=(2, 3))(network, Batch(views), THREE, config)
        present = np.ones((40, 3), bool)
        present[:20, 1] = present[:10, 2] = False

        @jax.jit
        def evaluate(views, present):
            codes = network.aligned(network.codes(views))
            return network.scores(views, present), network.scores(views), jnp.stack(codes.shared), codes.private

        scores, whole, aligned, private = evaluate(views, jnp.asarray(present))
        r, own = misa.widths(THREE, config)
        expected = (np.asarray(aligned) * present.T[:, :, None]).sum(axis=0) / present.sum(axis=1, keepdims=True)
        assert_close(scores[:, :r], expected, "shared")
        for m, block in enumerate(np.split(np.asarray(scores[:, r:]), np.cumsum(own)[:-1], axis=1)):
            assert_close(block, np.where(present[:, m, None], private[m], 0), f"view {m + 1}'s own")
        assert_close(scores[20:], whole[20:], "whole rows")
        if variant == "default":
            assert_at_most(np.abs(whole.mean(axis=0)).max(), 1e-12, "means")


def test_codes_that_are_rotations_of_each_other_are_aligned():
    """Whitened and rotated, they are equal, and so is their mean, of variance 1."""
    network, config = untrained("default", PAIR)
    last = lambda net: (net.projections[0].weight, net.projections[0].bias, net.projections[1].weight, net.projections[1].bias)
    W, b = network.projections[0].weight, network.projections[0].bias
    network = eqx.tree_at(last, network, (W, b, W, b))
    x = random_views(PAIR)[0]
    finished = jax.jit(misa.finish, static_argnums=(2, 3))(network, Batch((x, x)), PAIR, config)
    shared = finished.aligned(finished.codes((x, x))).shared
    assert_close(shared[0], shared[1], "both views")
    assert_close(np.cov(shared[0].T, bias=True), np.eye(2), "covariance", slack=1e6)


def test_default_widths_are_those_of_the_structures():
    uneven = Hierarchy((9, 9, 9), {(1, 2, 3): 2, (1, 3): 1, (2, 3): 2, (2,): 1})
    assert misa.widths(uneven, MisaConfig()) == (2, (1, 3, 3))
    assert misa.widths(uneven, MisaConfig(variant="port")) == (2, (2, 2, 2))
    assert misa.widths(Hierarchy((9, 9, 9), {(1, 2): 2, (3,): 3}), MisaConfig()) == (3, (2, 2, 3))
    assert misa.widths(SHARED, MisaConfig()) == (3, (0, 0))
    assert misa.widths(uneven, MisaConfig(shared_rank=4, private_ranks=(1, 0, 2))) == (4, (1, 0, 2))


def test_variants_fill_in_what_is_not_given():
    weights = lambda config: (config.inputs, config.similarity, config.difference, config.reconstruction)
    assert weights(MisaConfig()) == ("normal", 1, 0.3, 1)
    assert weights(MisaConfig(variant="port")) == ("standardised", 1, 1, 1)
    assert weights(MisaConfig(variant="official", similarity=0.0, inputs="normal")) == ("normal", 0, 0.3, 1)


def test_only_the_port_has_a_similarity_without_a_bound():
    """Inputs a hundred times as large: fifth moments of codes without a bound grow by up to 1e10."""
    ratio = {}
    for variant in VARIANTS:
        network, config = untrained(variant, THREE)
        similarity = jax.jit(lambda xs, net=network, config=config: misa.loss(net, Batch(xs), KEY, config)[1]["similarity"])
        views = random_views(THREE)
        ratio[variant] = similarity(tuple(100 * x for x in views)) / similarity(views)
    assert_at_most(ratio["default"], 100, "default")
    assert_at_most(ratio["official"], 100, "official")
    assert_at_least(ratio["port"], 1e4, "port")


def test_only_the_default_difference_has_a_derivative_at_width_one():
    """A row of one coordinate, scaled to length 1, is its sign."""
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(rng.standard_normal((30, 1))), jnp.asarray(rng.standard_normal((30, 1)))
    size = {name: float(jnp.abs(jax.jit(jax.grad(loss))(a, b)).max()) for name, loss in misa.DIFFERENCES.items()}
    assert_at_most(size["port"], 1e-12, "port")
    assert_at_least(size["default"], 1e-4, "default")
    assert_close(misa.DIFFERENCES["default"](a, b), np.corrcoef(a[:, 0], b[:, 0])[0, 1] ** 2, "squared correlation")


@cache
def draw():
    """(hierarchy, 800 rows of its views side by side, their latents): what is a view's own has twice the loadings."""
    rng = np.random.default_rng(1)
    hierarchy = Hierarchy((12, 10, 8), {(1, 2, 3): 1, (1,): 1, (2,): 1, (3,): 1})
    z = rng.standard_normal((800, hierarchy.n_factors))
    loadings = masked_normal(rng, hierarchy) * np.array([1, 2, 2, 2])
    return hierarchy, z @ loadings.T + 0.3 * rng.standard_normal((800, hierarchy.n_features)), z


def as_views(X):
    return np.split(X, np.cumsum(draw()[0].dims)[:-1], axis=1)


def explained(predicted, target):
    return 1 - np.var(target - predicted) / np.var(target)


def shared_explained(fit):
    """Share of the variance of the shared latent that its score explains in new rows, by least squares on the others."""
    _, X, z = draw()
    score = np.asarray(fit.transform(as_views(X)), float)[:, 0]
    slope, intercept = np.polyfit(score[:400], z[:400, 0], 1)
    return explained(slope * score[400:] + intercept, z[400:, 0])


@pytest.mark.slow
def test_training_finds_what_is_shared_and_predicts_what_is_not():
    """More is found than by the same networks with random weights, their codes aligned alike. The response is a view's own, so
    that it is no help in that."""
    hierarchy, X, z = draw()
    y = z[:, 1] + z[:, 1] ** 2 + 0.3 * np.random.default_rng(2).standard_normal(800)
    training = TrainingConfig(steps=200, batch_size=100, learning_rate=5e-3)
    config = MisaConfig(hidden=(24,), training=training)
    fit = misa.fit(as_views(X[:400]), hierarchy, config, y=y[:400], key=jr.key(3))
    assert int(fit.status) == 0

    @jax.jit
    def random_network(X, key):
        return misa.finish(misa.build(key, hierarchy, config), Batch(fit.standardised(X)), hierarchy, config)

    networks = [random_network(jnp.asarray(X[:400]), key) for key in jr.split(jr.key(4), 8)]
    random = np.mean([shared_explained(eqx.tree_at(lambda fit: fit.network, fit, network)) for network in networks])
    assert_at_least(shared_explained(fit) - random, 0.15, "trained less the mean of random")
    assert_at_least(shared_explained(fit), 0.85, "trained")
    assert_at_least(explained(np.asarray(fit.predict(as_views(X[400:]))), y[400:]), 0.7, "response of new rows")


def test_refusals():
    for options, word in (
        ({"similarity": -1.0}, "similarity"),
        ({"shared_rank": 0}, "shared_rank"),
        ({"hidden": (8, 0)}, "hidden"),
        ({"private_ranks": (1, -1)}, "private_ranks"),
        ({"variant": "port", "private_ranks": (1, 1)}, "private_ranks"),
    ):
        with pytest.raises(ValueError, match=word):
            MisaConfig(**options)
    views = [np.zeros((9, d)) for d in TWO.dims]
    for config, word in (
        (MisaConfig(private_ranks=(1, 1, 1)), "private_ranks"),
        (MisaConfig(heads=5), "heads"),
        (MisaConfig(variant="port", shared_rank=3, heads=2), "heads"),
    ):
        with pytest.raises(ValueError, match=word):
            misa.fit(views, TWO, config, key=KEY)
    with pytest.raises(ValueError, match="at least 2"):
        misa.fit(views[:1], Hierarchy((9,), {(1,): 2}), key=KEY)
