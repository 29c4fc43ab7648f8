"""The released HCL: numbers of released runs from their weights, the collapse of its regulariser, the contract of networks."""

from dataclasses import replace
from functools import cache, reduce

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from helpers import TWO, assert_at_least, assert_at_most, assert_close, reference_arrays, relative
from torch_weights import by_name, load, perceptron

from hcl_jax import Hierarchy
from hcl_jax.networks.hcl_released import HclReleasedConfig, build, fit, loss
from hcl_jax.networks.independence import hcl_loss, signed_overlap, unit_structures
from hcl_jax.networks.training import Batch, TrainingConfig, join_numbers
from hcl_jax.structure import full_lattice

DIMS = (12, 15, 10)
LATTICE = full_lattice(3)
CONFIG = HclReleasedConfig(training=TrainingConfig(dtype="float64"))
RANKS = {"hcl": (4, 4, 4, 4, 4, 4, 4), "hcl_unequal": (4, 3, 2, 5, 1, 6, 2)}
PENALTIES = {"lam1": 1.0, "lam_1_over_B": 1 / 32, "lam0": 0.0}


def layout(ranks):
    """Of more factors than a modality has features, as the released runs have: a union, as no such hierarchy is identifiable."""
    return reduce(Hierarchy.union, [Hierarchy(DIMS, {s: rank}) for s, rank in zip(LATTICE, ranks, strict=True)])


PLACES = {}
for _m in range(3):
    for _level in range(3):
        PLACES |= perceptron(f"encoders.{_m}.{_level}.net", lambda net, m=_m, level=_level: net.encoders[m][level], 3)


def doubles(arrays, names):
    return tuple(jnp.asarray(arrays[name], float) for name in names)


def under(arrays, prefix):
    """The stored arrays whose names start so, by what follows."""
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


@cache
def released(name):
    """(arrays, network, views) of a released run."""
    arrays = reference_arrays(f"deep/{name}")
    network = load(eqx.filter_jit(build)(jr.key(0), layout(RANKS[name]), CONFIG), arrays, PLACES)
    return arrays, network, doubles(arrays, ("x1", "x2", "x3"))


def total(network, views, penalty=1.0):
    return loss(network, Batch(views), jr.key(0), join_numbers(CONFIG, {"penalty": penalty}, float))


with_gradients = eqx.filter_jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


@eqx.filter_jit
def forward(network, views, cotangent):
    """Everything on the way to the scores, and how these pull on the views."""
    scores, pull = jax.vjp(network.scores, views)
    return network.levels(views), network.representations(views), scores, pull(cotangent)[0]


@pytest.mark.parametrize("name", RANKS)
def test_released_representations_agree(name):
    arrays, network, views = released(name)
    levels, representations, means, pulled = forward(network, views, *doubles(arrays, ["fuse/cot"]))
    for m in (1, 2, 3):
        for level in range(3):
            assert_at_most(relative(levels[m - 1][level], arrays[f"rep/raw/m{m}_level{level}"]), 1e-13, f"encoder {m}, {level}")
        for k, s in enumerate(LATTICE):
            block = representations[m - 1][:, network.hierarchy.columns(s)]
            assert_at_most(relative(block, arrays.get(f"rep/h/m{m}_k{k}", np.zeros(block.shape))), 1e-13, f"{m} of {s}")
        assert_at_most(relative(pulled[m - 1], arrays[f"fuse/grad/x{m}"]), 1e-9, f"gradient of the scores by view {m}")
    for k, s in enumerate(LATTICE):
        assert_at_most(relative(means[:, network.hierarchy.columns(s)], arrays[f"rep/avg/k{k}"]), 1e-13, f"mean of {s}")
    assert_at_most(relative(means, arrays["fused"]), 1e-13, "scores")


@pytest.mark.parametrize("name", RANKS)
def test_released_loss_and_gradients_agree(name):
    arrays, network, views = released(name)
    (value, parts), (by_weights, by_views) = with_gradients(network, views, jnp.asarray(1.0))
    assert_at_most(relative(parts["contrast"], arrays["loss/contrast"]), 1e-9, "contrast")
    assert_at_most(relative(parts["overlap"], arrays["loss/reg"]), 1e-9, "overlap")
    assert_at_most(relative(value, arrays["loss/total"]), 1e-9, "loss")
    assert_at_most(relative(value, arrays["f32/total"]), 1e-6, "loss, in float32 there")
    weak = with_gradients(network, views, jnp.asarray(0.01))[0][0]
    assert_at_most(relative(weak, arrays["loss/total_lam0.01"]), 1e-9, "loss at a hundredth of the penalty")
    for m in (1, 2, 3):
        assert_at_most(relative(by_views[m - 1], arrays[f"grad/x{m}"]), 1e-9, f"gradient by view {m}")
    gradients = by_name(by_weights, PLACES)
    for name, stored in under(arrays, "grad/w/").items():
        assert_at_most(relative(gradients[name], stored), 1e-9, f"gradient by {name}")
    assert relative(np.sqrt(sum(np.sum(g**2) for g in gradients.values())), arrays["grad/w_global_norm"]) < 1e-9
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(by_weights.head))


@eqx.filter_jit
def descent(network, views, rate, steps=10):
    """(losses before each step of plain descent and after the last, the network there)."""
    params, static = eqx.partition(network, eqx.is_inexact_array)
    objective = lambda params: total(eqx.combine(params, static), views)[0]

    def step(params, _):
        value, gradient = jax.value_and_grad(objective)(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient), value

    params, values = jax.lax.scan(step, params, length=steps)
    return jnp.append(values, objective(params)), eqx.combine(params, static)


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["0.001", "1e-05"])
@pytest.mark.parametrize("name", RANKS)
def test_released_descent_agrees(name, rate):
    arrays, network, views = released(name)
    values, end = descent(network, views, jnp.asarray(float(rate)))
    tolerance = max(1e-9, 1e-12 * float(arrays[f"sgd/lr{rate}/amplification"]))
    assert_at_most(relative(values, arrays[f"sgd/lr{rate}"]), tolerance, "losses")
    weights = by_name(end, PLACES)
    for place, stored in under(arrays, f"sgd/lr{rate}/w/").items():
        assert_at_most(relative(weights[place], stored), tolerance, f"{place} after the last step")


@cache
def collapsing():
    """(a run of 300 Adam steps by penalty, hierarchy, arrays): losses, their parts and representations before every step."""
    arrays, hierarchy = reference_arrays("deep/collapse"), layout((4,) * 7)
    config = replace(CONFIG, hidden=(32, 16))
    network = load(eqx.filter_jit(build)(jr.key(0), hierarchy, config), under(arrays, "small/"), PLACES)
    views = doubles(arrays, ("small/x1", "small/x2", "small/x3"))
    params, static = eqx.partition(network, eqx.is_inexact_array)
    optimiser = optax.adam(1e-3, eps=1e-8)  # eps added to the root, as in torch

    def objective(params, penalty):
        network = eqx.combine(params, static)
        value, parts = total(network, views, penalty)
        return value, (parts, unit_structures(network.representations(views), hierarchy), network.scores(views))

    def step(carry, _, penalty):
        params, state = carry
        (value, seen), gradient = jax.value_and_grad(objective, has_aux=True)(params, penalty)
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), (value, seen)

    @jax.jit
    def run(penalty):
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies numbers of unlike types
            return jax.lax.scan(lambda carry, _: step(carry, _, penalty), (params, optimiser.init(params)), length=301)[1]

    return run, hierarchy, arrays


def pair_cosines(units, hierarchy, pairs):
    """The mean cosine of two structures' vectors, over samples and the modalities that both have."""
    found = []
    for pair in pairs:
        s, t = (tuple(map(int, name)) for name in pair.split("-"))
        common = [m - 1 for m in s if m in t]
        products = units[:, common][..., hierarchy.columns(s)] * units[:, common][..., hierarchy.columns(t)]
        found.append(products.sum(axis=-1).mean(axis=(1, 2)))
    return np.stack(found, axis=1)


def spread(units, hierarchy):
    """The standard deviation of a coordinate over samples, averaged over coordinates, modalities and structures."""
    held = hierarchy.modality_mask
    return units.std(axis=2, ddof=1)[:, held].mean(axis=1)


def mean_inner_products(units, hierarchy):
    """By structure, over all pairs of samples and of its modalities: ‖the mean of the vectors‖²."""
    means = units.mean(axis=2)
    by_structure = [means[:, [m - 1 for m in s]][..., hierarchy.columns(s)].mean(axis=1) for s in hierarchy.structures]
    return np.stack([np.sum(mean**2, axis=1) for mean in by_structure], axis=1)


def effective_rank(fused):
    """exp of the entropy of the shares of variance."""
    variances = np.linalg.svd(fused - fused.mean(axis=1, keepdims=True), compute_uv=False) ** 2
    shares = variances / variances.sum(axis=1, keepdims=True)
    return np.exp(-np.sum(shares * np.log(shares), axis=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", PENALTIES)
def test_collapse_agrees_step_by_step(name):
    """All 301 losses of the stored runs. Without the penalty the run itself magnifies roundings by 1e5 after step 200."""
    run, hierarchy, arrays = collapsing()
    stored = under(arrays, f"small/{name}/")
    values, (parts, units, fused) = jax.device_get(run(PENALTIES[name]))
    units, fused = units[::10], fused[::10]
    late = {"loss": 1e-3, "other": 1e-2} if name == "lam0" else {"loss": 1e-8, "other": 1e-8}
    found = {"contrast": parts["contrast"][::10], "reg": parts["overlap"][::10], "std": spread(units, hierarchy)}
    found |= {"cosines": pair_cosines(units, hierarchy, arrays["pairs"]), "effective_rank": effective_rank(fused)}
    found |= {"mean_inner_per_structure": mean_inner_products(units, hierarchy)}
    assert set(found) == set(stored) - {"loss", "step"}
    assert list(stored["step"]) == list(range(0, 301, 10))
    error = np.abs(values - stored["loss"]) / np.abs(stored["loss"])
    assert_at_most(error[:201].max(), 1e-8, "loss up to step 200")
    assert_at_most(error[201:].max(), late["loss"], "loss after step 200")
    for key, series in found.items():
        size = np.abs(stored[key]).max()
        assert_at_most(np.abs(series - stored[key])[:21].max() / size, 1e-8, f"{key} up to step 200")
        assert_at_most(np.abs(series - stored[key])[21:].max() / size, late["other"], f"{key} after step 200")


def test_the_released_penalty_makes_structures_opposite():
    """Where it ends: the levels of a modality at a = c = −b, where the closed form vanishes, and nothing of the data left."""
    run, hierarchy, arrays = collapsing()
    _, (parts, units, _) = jax.device_get(run(1.0))
    cosines = dict(zip(arrays["pairs"], pair_cosines(units[-1:], hierarchy, arrays["pairs"])[0], strict=True))
    assert_at_most(cosines["123-12"], -0.98, "cosine of 123 and 12")
    assert_at_least(cosines["123-1"], 0.9, "cosine of 123 and 1")
    assert_at_least(cosines["12-13"], 1 - 1e-12, "cosine of 12 and 13")
    assert_at_most(spread(units[-1:], hierarchy)[0] / spread(units[:1], hierarchy)[0], 0.5, "spread, of that at the start")
    contrast = parts["contrast"]
    assert_at_least(contrast[-1], contrast[0], "contrast, which is to be minimised")


def test_the_penalty_is_a_sum_of_squares_for_equal_ranks():
    """Σ_m Σ_i ‖a + 2b + c‖² of the unit vectors of levels 123, pairs and private."""
    _, network, views = released("hcl")
    units = unit_structures(network.representations(views), network.hierarchy)
    levels = [[level / jnp.linalg.norm(level, axis=1, keepdims=True) for level in own] for own in network.levels(views)]
    closed = sum(jnp.sum((a + 2 * b + c) ** 2) for a, b, c in levels)
    assert_close(signed_overlap(units, network.hierarchy), closed, "the regulariser")


def test_the_contrast_alone_reaches_its_bound_without_telling_samples_apart():
    """−12B/(B−1), by +v and −v: half of the samples have the one vector, half the other."""
    hierarchy, n = layout((4,) * 7), 32
    signs = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    vectors = np.random.default_rng(0).standard_normal(hierarchy.n_factors)
    h = jnp.asarray(hierarchy.modality_mask[:, None, :] * signs[None, :, None] * vectors[None, None, :])
    assert_close(hcl_loss(h, hierarchy, 0.0), -12 * n / (n - 1), "the contrast")


SMALL = Hierarchy((9, 8, 7), {(1, 2, 3): 2, (1, 2): 1, (2, 3): 2, (1,): 1, (3,): 2})
QUICK = replace(CONFIG, hidden=(8,), head=6, training=TrainingConfig(steps=20, batch_size=16, round_steps=10, dtype="float64"))


@cache
def fitted():
    rng = np.random.default_rng(0)
    views = [rng.standard_normal((40, p)) for p in SMALL.dims]
    return fit(views, SMALL, QUICK, y=views[0][:, 0], key=jr.key(0)), views


@pytest.mark.slow
def test_any_ranks_are_fitted():
    fit_, views = fitted()
    scores = fit_.transform(views)
    assert scores.shape == (40, SMALL.n_factors)
    assert np.array_equal(fit_.membership, SMALL.modality_mask)
    assert int(fit_.status) == 0
    assert set(fit_.history) == {"train", "held_out", "contrast", "overlap", "task"}
    assert relative(fit_.transform([x[3:5] for x in views]), scores[3:5]) < 1e-12
    assert np.isfinite(fit_.predict(views)).all()
    assert fit_.predict(views).shape == (40,)


def test_absent_views_are_left_out_of_the_means():
    fit_, views = fitted()
    presence = np.ones((40, 3), bool)
    presence[:10, 0], presence[10:20, 1:] = False, False
    scores, whole = fit_.transform(views, presence), fit_.transform(views)
    assert not np.asarray(scores[:10, SMALL.columns((1,))]).any()
    assert not np.asarray(scores[10:20, SMALL.columns((2, 3))]).any()
    assert relative(scores[20:], whole[20:]) < 1e-12
    assert relative(scores[:10, SMALL.columns((2, 3))], whole[:10, SMALL.columns((2, 3))]) < 1e-12
    first = fit_.transform(views, np.tile([True, False, False], (40, 1)))[:, SMALL.columns((1, 2))]
    second = fit_.transform(views, np.tile([False, True, False], (40, 1)))[:, SMALL.columns((1, 2))]
    assert relative((first + second) / 2, whole[:, SMALL.columns((1, 2))]) < 1e-12


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="hierarchy: has 2 modalities; expected 3"):
        fit([np.ones((8, 9)), np.ones((8, 7))], TWO, key=jr.key(0))
    with pytest.raises(ValueError, match="penalty: is -1"):
        HclReleasedConfig(penalty=-1.0)
