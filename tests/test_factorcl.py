"""FactorCL: numbers of the released code and its alternation, parts of the lattice, and what training changes."""

import dataclasses
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch_weights as torch
from helpers import TWO, assert_at_least, assert_at_most, assert_close, reference_arrays, relative

from hcl_jax import Hierarchy
from hcl_jax.networks import factorcl, hcl, simclr
from hcl_jax.networks.factorcl import FactorclConfig
from hcl_jax.networks.modules import whitened
from hcl_jax.networks.training import Batch, Critics, TrainingConfig, make_step

DOUBLE = TrainingConfig(dtype="float64", weight_decay=0.0)
KEY = jr.key(0)
THREE = Hierarchy.full((12, 10, 8), 1)
PUBLISHED = FactorclConfig(
    variant="published",
    n_classes=3,  # the width of one-hot labels there, of which two occur
    width=8,
    hidden=(32, 32, 32),
    head_hidden=(8, 8),
    critic_hidden=(16, 16),
    critic_steps=2,
    training=dataclasses.replace(DOUBLE, learning_rate=1e-3, clip=1e12, schedule="constant"),  # plain Adam
)
TERMS = {
    "infonce_x1x2": "nce(1;2)",
    "club_x1x2_cond": "club(1;2|y)",
    "infonce_x1y": "nce(1;y)",
    "infonce_x2y": "nce(2;y)",
    "infonce_x1x2_cond": "nce(1;2|y)",
    "club_x1x2": "club(1;2)",
}

built = jax.jit(factorcl.build, static_argnums=(1, 2))


def places(labelled):
    """Of the stored weights in our network."""
    found = {}
    for m in range(2):
        found |= torch.perceptron(f"backbones.{m}", lambda net, m=m: net.backbones[m], 4)
    for theirs, ours in TERMS.items():
        for m in (1, 2):
            name = f"linears_{theirs}" if "y" in theirs else f"linears_{theirs}.{m - 1}"
            if "y" not in theirs or theirs == f"infonce_x{m}y":
                found |= torch.perceptron(name, lambda net, head=(m, ours): net.heads[head], 3)
        term = next(term for term in factorcl.terms(VIEWS, PUBLISHED) if term.name == ours)
        name, upper = term.critic(labelled), term.upper
        critic = lambda net, name=name, upper=upper: (net.upper if upper else net.lower)[name].perceptron
        found |= torch.perceptron(f"{theirs}._f", critic, 3)
    return found


VIEWS = Hierarchy.shared_and_private((12, 15), 4, 1)


@cache
def released(name):
    """(stored arrays, our network with the stored weights, places).

    Critics of upper bounds see their right side first there: the columns of their first layers are put in our order.
    """
    arrays = dict(reference_arrays(f"deep/{name}"))
    width = 8 if name == "factorcl_sup" else 16
    for key in arrays:
        if "club_x1x2" in key and "_f.0.weight" in key:
            right = width if "cond" in key else 8
            arrays[key] = np.concatenate([arrays[key][:, right:], arrays[key][:, :right]], axis=1)
    where = places(name == "factorcl_sup")
    return arrays, torch.load(built(KEY, VIEWS, PUBLISHED), arrays, where), where


def batches(arrays):
    """(the batch, its copies, that of the critics, its copies)."""
    x, y = torch.inputs(arrays)[:2], arrays.get("y")
    club = tuple(jnp.asarray(arrays[f"x{m}_club"], float) for m in (1, 2))
    if y is None:
        copies = tuple(jnp.asarray(arrays[f"x{m}_aug"], float) for m in (1, 2))
        return Batch(x), copies, Batch(club), club  # their copies take no part in what critics of upper bounds learn
    labels = lambda y: jnp.asarray(y[:, 0], jnp.int32)
    return Batch(x, labels(y)), None, Batch(club, labels(arrays["y_club"])), None


def total(network, batch, copies):
    parts = factorcl.bounds(network, batch, copies, PUBLISHED)
    return factorcl.objective(network, parts, PUBLISHED), parts


def learned(network, batch, copies):
    return factorcl.upper_loss(network, factorcl.sides(network, batch, copies, PUBLISHED), PUBLISHED)


NAMES = ("factorcl_sup", "factorcl_ssl")


@pytest.mark.parametrize("name", NAMES)
def test_every_code_and_every_term_of_the_released_code(name):
    arrays, network, _ = released(name)
    batch, copies, club, club_copies = batches(arrays)
    held = jax.jit(lambda net: factorcl.sides(net, batch, copies, PUBLISHED))(network)
    codes = held.codes
    for m in (1, 2):
        assert_at_most(relative(held.embeddings[m - 1][0], arrays[f"rep/z{m}"]), 1e-9, f"z{m}")
    for theirs, ours in TERMS.items():
        for m in (1, 2):
            stored = "rep/head_" + (theirs if "y" in theirs else f"{theirs}_{m}")
            if (m, ours) in codes:
                assert_at_most(relative(codes[m, ours][0], arrays[stored]), 1e-9, stored)
    _, parts = jax.jit(total)(network, batch, copies)
    for theirs, ours in TERMS.items():
        sign = -1 if theirs.startswith("infonce") else 1
        assert_at_most(relative(sign * parts[ours], arrays[f"loss/{theirs}"]), 1e-9, theirs)
    of_critics = jax.jit(learned)
    assert_at_most(relative(of_critics(network, batch, copies)[0], arrays["loss/learning"]), 1e-9, "learning")
    found = of_critics(network, club, club_copies)[0]
    assert_at_most(relative(found, arrays["loss/learning_club_batch"]), 1e-9, "learning, second batch")
    embedding = dataclasses.replace(network, columns=()).scores(batch.views)
    assert_at_most(relative(embedding, arrays["rep/embedding"]), 1e-9, "embedding")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_descent_of_the_released_code(name):
    arrays, network, where = released(name)
    batch, copies, _, _ = batches(arrays)
    kept = {key: value for key, value in arrays.items() if key in ("x1", "x2") or key[0] != "x"}
    # a constant added to a critic's scores does not change CLUB: exactly so here, up to rounding there
    kept["grad/w_without"] = np.array(["club_x1x2._f.4.bias", "club_x1x2_cond._f.4.bias"])
    torch.check_loss(kept, network, where, lambda net, xs: total(net, batch._replace(views=xs), copies)[0])


@pytest.mark.parametrize("name", NAMES)
def test_five_rounds_of_the_released_alternation(name):
    """By the step of the training loop. Critics of upper bounds keep their bits in the first part of it, all others in the
    second."""
    arrays, network, where = released(name)
    batch, copies, club, club_copies = batches(arrays)
    value = jax.jit(lambda net: total(net, batch, copies)[0])
    of_critics = jax.jit(lambda net: learned(net, club, club_copies)[0])
    critics = Critics(factorcl.upper_critics, lambda net, batch, key, config: learned(net, batch, club_copies))
    moving, step, model_of = make_step(
        lambda net, batch, key, config: total(net, batch, copies), critics, PUBLISHED, network, n_steps=5
    )
    step = jax.jit(step)

    def after(moving, club, steps):
        theirs = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2)[:steps], (club, KEY))
        with jax.numpy_dtype_promotion("standard"):
            return step(moving, (batch, KEY, theirs))

    losses, learning = [value(network)], []
    for _ in range(5):
        (params, _, _), _ = after(moving, club, 0)
        learning.append(of_critics(model_of(params)))
        np.testing.assert_array_equal(params[1], moving[0][1])
        assert relative(params[0], moving[0][0]) > 0
        (other, _, _), _ = after(moving, club._replace(views=batch.views), 2)
        moving, before = after(moving, club, 2)
        np.testing.assert_array_equal(other[0], moving[0][0])
        assert relative(other[1], moving[0][1]) > 0
        assert_close(before, losses[-1], "loss before the round")
        losses.append(value(model_of(moving[0])))
    network = model_of(moving[0])
    learning.append(of_critics(network))
    assert_at_most(relative(losses, arrays["alt/loss"]), 1e-6, "losses")
    assert_at_most(relative(learning, arrays["alt/learning_loss"][::2]), 1e-6, "losses of the critics")
    found = torch.by_name(network, where)
    for key in (key for key in arrays if key.startswith("alt/w/")):
        assert_at_most(relative(found[key.removeprefix("alt/w/")], arrays[key]), 1e-6, key)


def parts_of(hierarchy, **options):
    return {term.name: term.weight for term in factorcl.terms(hierarchy, FactorclConfig(**options))}


def test_terms():
    both = {"nce(1;2)": 1, "club(1;2|y)": 1, "nce(1;y)": 1, "nce(2;y)": 1, "nce(1;2|y)": 1, "club(1;2)": 1}
    for options in ({}, {"mode": "lattice"}, {"heads": "term"}, {"variant": "published"}):
        assert parts_of(TWO, **options) == both
    pairs = parts_of(THREE)
    assert len(pairs) == 3 * 2 + 3 * 3
    assert set(pairs.values()) == {1}
    lattice = parts_of(THREE, mode="lattice")
    assert lattice["nce(1;23)"] == pytest.approx(1 / 3)
    assert lattice["nce(1;2)"] == 1
    assert {name for name in lattice if "only" in name} == {"only(12;3)", "only(13;2)", "only(1;23)"}
    assert parts_of(Hierarchy((4, 4), {(1, 2): 1, (1,): 1}), mode="lattice")["club(1;2)"] == 1


def random_batch(hierarchy, n=24, seed=0, classes=3):
    rng = np.random.default_rng(seed)
    views = tuple(jnp.asarray(rng.standard_normal((n, d))) for d in hierarchy.dims)
    return Batch(views, None if classes is None else jnp.asarray(rng.integers(0, classes, n), jnp.int32))


SMALL = FactorclConfig(training=DOUBLE, n_classes=3, width=3, hidden=(8,), head_hidden=(4,), critic_hidden=(5,), codes="plain")


def test_the_lattice_of_two_views_is_the_two_view_loss_averaged_over_directions():
    """The six terms written out with tied heads: one for what is shared, one for what is unique, whatever the term."""
    config = dataclasses.replace(SMALL, mode="lattice")
    network, batch = built(KEY, TWO, config), random_batch(TWO)
    z = network.embeddings(batch.views)
    shared, unique = (
        [network.heads[m, part](z[m - 1]) for m, part in of] for of in ([(1, "12"), (2, "12")], [(1, "1"), (2, "2")])
    )
    one_hot, alike = jnp.eye(3)[batch.y], np.equal.outer(batch.y, batch.y)
    with_label = lambda codes: [jnp.concatenate([code, one_hot], axis=1) for code in codes]
    scores = {
        "nce(1;2)": network.lower["nce(1;2)"](*shared),
        "club(1;2|y)": network.upper["club(1;2|y)"](*with_label(shared)),
        "nce(1;y)": network.lower["nce(1;y)"](unique[0], one_hot),
        "nce(2;y)": network.lower["nce(2;y)"](unique[1], one_hot),
        "nce(1;2|y)": network.lower["nce(1;2|y)"](*with_label(unique)),
        "club(1;2)": network.upper["club(1;2)"](*unique),
    }

    def two_views(turned):
        """Views in the one order or the other: InfoNCE asks for the second of a pair, then for the first."""
        value = 0
        for name, s in scores.items():
            s = np.asarray(s.T if turned else s)
            kept = alike if name.endswith("|y)") else np.ones_like(alike)
            if name.startswith("club"):
                value += max(np.mean([s[i, i] - s[i, kept[i]].mean() for i in range(len(s))]), 0)
            else:
                value -= np.mean([s[i, i] - np.log(np.exp(s[i, kept[i]]).mean()) for i in range(len(s))])
        return value

    value, _ = jax.jit(lambda net: factorcl.loss(net, batch, KEY, config))(network)
    assert_at_most(relative(value, (two_views(False) + two_views(True)) / 2), 1e-9, "loss")


@pytest.mark.parametrize("mode", ["pairwise", "lattice"])
@pytest.mark.parametrize("classes", [3, None])
def test_any_number_of_views(mode, classes):
    """A column for each coordinate, and a part of the loss for each term that applies."""
    uneven = Hierarchy((6, 5, 4), {(1, 2, 3): 2, (1, 3): 1, (2,): 1})
    for hierarchy in (THREE, uneven, Hierarchy.full((8, 9, 8, 9), 1)):
        config = dataclasses.replace(SMALL, mode=mode)
        batch = random_batch(hierarchy, classes=classes)
        shapes = jax.eval_shape(
            lambda key, hierarchy=hierarchy, config=config, batch=batch: (
                (network := factorcl.build(key, hierarchy, config)).scores(batch.views),
                factorcl.loss(network, batch, key, config),
                factorcl.learning(network, batch, key, config),
            ),
            KEY,
        )
        membership = factorcl.membership(hierarchy, config)
        assert shapes[0].shape == (24, membership.shape[1])
        assert membership.any(axis=0).all()
        count = sum(factorcl.applies(term, classes is not None, config) for term in factorcl.terms(hierarchy, config))
        assert len(shapes[1][1]) == count


def test_columns_are_those_of_the_views_of_their_structure():
    lattice = factorcl.membership(THREE, dataclasses.replace(SMALL, mode="lattice"))
    expected = [[m in s for m in (1, 2, 3)] for s in THREE.structures for _ in s for _ in range(3)]
    np.testing.assert_array_equal(lattice, np.transpose(expected))
    backbones = factorcl.membership(THREE, dataclasses.replace(SMALL, scores="backbones"))
    np.testing.assert_array_equal(backbones, np.repeat(np.eye(3, dtype=bool), 3, axis=1))


def test_a_view_outside_of_a_structure_need_not_hide_from_it():
    """CLUB(X_A; all others) moves the heads of A and the encoders of its views, and nothing of the others."""
    config = dataclasses.replace(SMALL, mode="lattice")
    network, batch = built(KEY, THREE, config), random_batch(THREE)
    gradient = jax.jit(jax.grad(lambda net: factorcl.bounds(net, batch, None, config)["only(12;3)"]))(network)
    size = lambda tree: sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(tree))
    assert size(gradient.backbones[0]) > 0
    assert size(gradient.heads[2, "12"]) > 0
    assert size(gradient.backbones[2]) == size(gradient.heads[1, "123"]) == size(gradient.heads[3, "3"]) == 0


def test_upper_bounds_below_the_floor_do_not_count():
    network = built(KEY, TWO, SMALL)
    parts = {term.name: jnp.asarray(-5.0 if term.upper else 0.5) for term in network.terms}
    assert_close(factorcl.objective(network, parts, SMALL), -2.0, "with a floor")
    without = dataclasses.replace(SMALL, floor=False)
    assert_close(factorcl.objective(network, parts, without), -12.0, "without")
    assert_close(factorcl.objective(network, parts, dataclasses.replace(without, club_weight=0.5)), -7.0, "at half weight")


def test_codes_cannot_hide_from_critics_by_being_small():
    """Last layers that are up to a thousand times smaller leave bounds of whitened codes as they are."""
    batch = random_batch(TWO)
    scaled = dataclasses.replace(SMALL, codes="whitened")
    network = built(KEY, TWO, SMALL)
    shrink = jnp.array([1.0, 1e-3, 1e-2])
    last = lambda net: [leaf for head in net.heads.values() for leaf in (head.layers[-1].weight, head.layers[-1].bias)]
    small = eqx.tree_at(last, network, [leaf * (shrink[:, None] if leaf.ndim == 2 else shrink) for leaf in last(network)])
    value = jax.jit(
        lambda net, config: factorcl.objective(net, factorcl.bounds(net, batch, None, config), config), static_argnums=1
    )
    assert_at_most(relative(value(small, scaled), value(network, scaled)), 1e-6, "whitened")
    assert_at_least(relative(value(small, SMALL), value(network, SMALL)), 1e-2, "plain")


def test_whitened_rows_are_uncorrelated_whatever_their_scale():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((500, 4)) @ rng.standard_normal((4, 4)) * np.array([1e3, 1.0, 1e-3, 1e-5]) + 7
    found = np.asarray(whitened(jnp.asarray(rows)))
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(found.T @ found / 500, np.eye(4), atol=0.02)  # the ridge of 1e-4 on correlations of this condition
    constant = np.concatenate([rows, np.ones((500, 1))], axis=1)
    np.testing.assert_allclose(np.asarray(whitened(jnp.asarray(constant)))[:, 4], 0, atol=1e-9)


def test_numbers_as_labels_are_compared_within_bins():
    batch = random_batch(TWO, classes=None)
    numbers = jnp.asarray(np.random.default_rng(3).standard_normal((24, 1)))
    config = dataclasses.replace(SMALL, n_classes=None)
    network = built(KEY, TWO, config)
    held = factorcl.sides(network, batch._replace(y=numbers), None, config)
    order = np.argsort(numbers[:, 0])
    alike = np.asarray(held.alike)[np.ix_(order, order)]
    blocks = np.flatnonzero(~np.diagonal(alike, 1)) + 1
    assert len(blocks) == 6
    expected = np.zeros((24, 24), bool)
    for part in np.split(np.arange(24), blocks):
        expected[np.ix_(part, part)] = True
    np.testing.assert_array_equal(alike, expected)


@cache
def draw(n=2000):
    """Two views of unique and shared latents, and a label of unique ones."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, n, 3))
    maps = rng.standard_normal((2, 6, 12)) / np.sqrt(6)
    views = [np.concatenate([w[m], w[2]], axis=1) @ maps[m] + 0.3 * rng.standard_normal((n, 12)) for m in (0, 1)]
    return views, np.int32(w[:2, :, 0].sum(axis=0) > 0), w


def probe(codes, y, n_train):
    """Accuracy of a least-squares classifier in new rows."""
    design = np.column_stack([np.ones(len(codes)), np.asarray(codes, float)])
    slope = np.linalg.lstsq(design[:n_train], 2.0 * y[:n_train] - 1, rcond=None)[0]
    return np.mean((design[n_train:] @ slope > 0) == y[n_train:])


QUICK = TrainingConfig(steps=300, batch_size=100, learning_rate=3e-3, weight_decay=0.0)


@pytest.mark.slow
@pytest.mark.long
def test_labels_of_unique_information_are_found_where_a_contrast_of_views_loses_them():
    views, y, _ = draw()
    hierarchy, train = Hierarchy.shared_and_private((12, 12), 3, 3), [view[:1000] for view in draw()[0]]
    options = {"n_classes": 2, "task_weight": 0.0, "width": 4, "hidden": (32, 32), "training": QUICK}
    config = FactorclConfig(scores="backbones", **options)
    supervised = factorcl.fit(train, hierarchy, config, y=y[:1000], key=KEY)
    blind = factorcl.fit(train, hierarchy, config, key=KEY)
    contrast = simclr.fit(train, hierarchy, simclr.SimclrConfig(**options), key=KEY)
    found, without, lost = (probe(fit.transform(views), y, 1000) for fit in (supervised, blind, contrast))
    assert_at_least(found, 0.85, "accuracy of supervised FactorCL")
    assert_at_least(found - lost, 0.15, "accuracy of supervised FactorCL less that of SimCLR")
    assert_at_least(without - lost, 0.03, "accuracy of self-supervised FactorCL less that of SimCLR")


@pytest.mark.slow
@pytest.mark.long
def test_upper_bounds_stay_bounded_in_three_thousand_steps():
    views, y, _ = draw()
    training = dataclasses.replace(QUICK, steps=3000, learning_rate=1e-3, schedule="constant", patience=1000)
    config = FactorclConfig(n_classes=2, task_weight=0.0, width=4, hidden=(32, 32), training=training)
    fit = factorcl.fit([view[:1000] for view in views], Hierarchy.shared_and_private((12, 12), 3, 3), config, y=y[:1000], key=KEY)
    assert int(fit.steps) >= 3000
    for name, values in fit.history.items():
        assert_at_most(np.abs(values[1:]).max(), 20, f"largest {name} of any round")
    assert_at_least(probe(fit.transform(views), y, 1000), 0.85, "accuracy")


def test_refusals():
    for options, word in (
        ({"critic_speed": 0.0}, "critic_speed"),
        ({"critic_steps": 0}, "critic_steps"),
        ({"width": 0}, "width"),
        ({"strength": -1.0}, "strength"),
        ({"hidden": ()}, "hidden"),
        ({"mode": "lattice", "heads": "term"}, "heads"),
    ):
        with pytest.raises(ValueError, match=rf"{word}.*expected"):
            FactorclConfig(**options)
    with pytest.raises(ValueError, match="at least 2"):
        factorcl.fit([np.zeros((9, 9))], Hierarchy((9,), {(1,): 2}), key=KEY)


def test_encoders_start_from_those_of_another_fit():
    """Without steps they are the given ones; those of other widths are refused."""
    views, y, _ = draw(200)
    hierarchy = Hierarchy.shared_and_private((12, 12), 3, 3)
    still = TrainingConfig(steps=0)
    first = simclr.fit(views, hierarchy, simclr.SimclrConfig(training=still, width=4, hidden=(6,)), key=KEY)
    config = FactorclConfig(training=still, n_classes=2, width=4, hidden=(6,), scores="backbones")
    second = factorcl.fit(views, hierarchy, config, y=y, key=jr.key(1), backbones=first.network.backbones)
    np.testing.assert_array_equal(second.transform(views), first.transform(views))
    other = dataclasses.replace(config, hidden=(7,))
    with pytest.raises(ValueError, match=r"backbones.*6x12.*expected.*7x12"):
        factorcl.fit(views, hierarchy, other, y=y, key=KEY, backbones=first.network.backbones)
    with pytest.raises(ValueError, match=r"backbones.*expected a method"):
        hcl.fit(views, hierarchy, hcl.HclConfig(training=still), key=KEY, backbones=first.network.backbones)
