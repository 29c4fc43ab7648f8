"""TSD: the numbers of released runs of its port, and what the repaired one must do."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_at_least, assert_at_most, assert_close, assert_within, reference_arrays, relative
from torch_weights import by_name, linear, load, perceptron

from hcl_jax import Hierarchy
from hcl_jax.networks.network import split_views
from hcl_jax.networks.training import Batch, TrainingConfig, join_numbers
from hcl_jax.networks.tsd import TsdConfig, build, disagreement, fit, loss, membership, overlap

DOUBLE = TrainingConfig(dtype="float64")
PORT = TsdConfig(variant="port", training=DOUBLE)
PAIRS = ((1, 2), (1, 3), (2, 3))
PARTS = {"com": "common", "pair": "pair", "pri": "private", "ort": "orthogonality", "sup": "supervisor"}
WEIGHTS = {"": 1.0, "lambda_ort0/": 0.0}
"""Of the orthogonality, in the stored runs."""

PLACES = linear("common_encoder.0", lambda net: net.common[0]) | linear("common_encoder.2", lambda net: net.norms[0])
PLACES |= linear("common_encoder.3", lambda net: net.common[1]) | linear("common_encoder.5", lambda net: net.norms[1])
for _i in range(3):
    PLACES |= linear(f"projections.{_i}", lambda net, i=_i: net.projections[i])
    PLACES |= linear(f"sub_encoders.{_i}.0", lambda net, i=_i: net.pairs[i])
    PLACES |= linear(f"private_encoders.{_i}.0", lambda net, i=_i: net.private[i])
    PLACES |= perceptron(f"supervisor.D_{('com', 'sub', 'pri')[_i]}", lambda net, i=_i: net.supervisors[i], 2)
for _i in range(9):
    PLACES |= perceptron(f"gate_networks.{_i}", lambda net, i=_i: net.gates[i], 2)


@cache
def released():
    """(arrays, network, views) of the released run."""
    arrays = reference_arrays("deep/tsd_port")
    network = eqx.filter_jit(build)(jr.key(0), Hierarchy((12, 15, 10), {(1, 2, 3): 4}), PORT)
    views = tuple(jnp.asarray(arrays[f"x{m}"], float) for m in (1, 2, 3))
    return arrays, load(network, arrays, PLACES), views


def under(arrays, prefix):
    """The stored arrays whose names start so, by what follows."""
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def total(network, views, weight):
    return loss(network, Batch(views), jr.key(0), join_numbers(PORT, {"orthogonality": weight}, float))


with_gradients = eqx.filter_jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


@eqx.filter_jit
def forward(network, views, cotangent):
    fused, pull = jax.vjp(network.fused, views)
    codes = network.codes(views)
    return network.projected(views), codes, network.gate(codes), fused, pull(cotangent)[0], network.scores(views)


def test_released_representations_agree():
    arrays, network, views = released()
    z, codes, gate, fused, pulled, scores = forward(network, views, jnp.asarray(arrays["fuse/cot"], float))
    found = {"gate": gate}
    for m in (1, 2, 3):
        found |= {f"z{m}": z[m - 1], f"c{m}": codes.common[m - 1], f"p{m}": codes.private[m - 1]}
        assert_at_most(relative(pulled[m - 1], arrays[f"fuse/grad/x{m}"]), 1e-9, f"gradient of what is fused by view {m}")
    for m, l in PAIRS:
        found |= {f"s{m}{l}_of{m}": codes.pairs[m, l][0], f"s{m}{l}_of{l}": codes.pairs[m, l][1]}
    assert set(found) == set(under(arrays, "rep/"))
    for name, code in found.items():
        assert_at_most(relative(code, arrays[f"rep/{name}"]), 1e-13, name)
    assert_at_most(relative(fused, arrays["fused"]), 1e-13, "fused")
    assert_close(gate.sum(axis=1), np.ones(len(gate)), "sum of the gates")
    means = [np.mean([found[f"c{m}"] for m in (1, 2, 3)], axis=0)]
    means += [(found[f"s{m}{l}_of{m}"] + found[f"s{m}{l}_of{l}"]) / 2 for m, l in PAIRS]
    assert_close(scores, np.concatenate([*means, *codes.private], axis=1), "scores")


@pytest.mark.parametrize("tag", WEIGHTS)
def test_released_loss_and_gradients_agree(tag):
    arrays, network, views = released()
    (value, parts), (by_weights, by_views) = with_gradients(network, views, jnp.asarray(WEIGHTS[tag]))
    for theirs, ours in PARTS.items():
        assert_at_most(relative(parts[ours], arrays[f"loss/{theirs}"]), 1e-9, ours)
    assert_at_most(relative(value, arrays[f"{tag}loss/total"]), 1e-9, "loss")
    for m in (1, 2, 3):
        assert_at_most(relative(by_views[m - 1], arrays[f"{tag}grad/x{m}"]), 1e-9, f"gradient by view {m}")
    gradients = by_name(by_weights, PLACES)
    for name, stored in under(arrays, f"{tag}grad/w/").items():
        assert_at_most(relative(gradients[name], stored), 1e-9, f"gradient by {name}")
    length = np.sqrt(sum(np.sum(g**2) for g in gradients.values()))
    assert_at_most(relative(length, arrays[f"{tag}grad/w_global_norm"]), 1e-9, "length of the gradient")
    assert {name for name, g in gradients.items() if not g.any()} == set(arrays[f"{tag}grad/w_without"])


@eqx.filter_jit
def descent(network, views, rate, weight, steps=10):
    """(losses before each step of plain descent and after the last, the network there)."""
    params, static = eqx.partition(network, eqx.is_inexact_array)
    objective = lambda params: total(eqx.combine(params, static), views, weight)[0]

    def step(params, _):
        value, gradient = jax.value_and_grad(objective)(params)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient), value

    params, values = jax.lax.scan(step, params, length=steps)
    return jnp.append(values, objective(params)), eqx.combine(params, static)


@pytest.mark.slow
@pytest.mark.parametrize(("tag", "rate"), [("", "1e-05"), ("lambda_ort0/", "0.001"), ("lambda_ort0/", "1e-05")])
def test_released_descent_agrees(tag, rate):
    arrays, network, views = released()
    values, end = descent(network, views, jnp.asarray(float(rate)), jnp.asarray(WEIGHTS[tag]))
    tolerance = max(1e-9, 1e-12 * float(arrays[f"{tag}sgd/lr{rate}/amplification"]))
    assert_at_most(relative(values, arrays[f"{tag}sgd/lr{rate}"]), tolerance, "losses")
    weights = by_name(end, PLACES)
    for name, stored in under(arrays, f"{tag}sgd/lr{rate}/w/").items():
        assert_at_most(relative(weights[name], stored), tolerance, f"{name} after the last step")


def test_the_ports_orthogonality_makes_descent_diverge():
    """At a rate of 0.001 the released run goes to 1e17, and has nothing to agree with."""
    arrays, network, views = released()
    assert float(arrays["sgd/lr0.001/amplification"]) > 1e9
    values, _ = descent(network, views, jnp.asarray(0.001), jnp.asarray(1.0))
    assert_at_least(values.max(), 100 * values[0], "largest loss")


FOUR = Hierarchy((6, 7, 5, 6), {(1, 2, 3, 4): 2, (1, 2, 3): 1, (1, 2): 1, (3, 4): 2, (1,): 1, (4,): 2})
TWO = Hierarchy((6, 5), {(1, 2): 2, (2,): 1})
SMALL = TsdConfig(hidden=(8,), training=DOUBLE)


@eqx.filter_jit
def built(hierarchy, views):
    network = build(jr.key(0), hierarchy, SMALL)
    return network.scores(views), network.outputs(views), *loss(network, Batch(views), jr.key(0), SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hierarchy", "expected"),
    [
        (FOUR, ["1111"] * 2 + ["1100"] + ["0011"] * 2 + ["1000"] * 2 + ["0100"] + ["0010"] + ["0001"] * 2),
        (TWO, ["11"] * 2 + ["01"]),
        (Hierarchy((6, 5, 4), {(1, 2): 2, (2, 3): 1, (3,): 2}), ["111"] * 2 + ["110"] * 2 + ["011"] + ["001"] * 2),
    ],
)
def test_widths_follow_the_hierarchy(hierarchy, expected):
    """Common, pairs, private with what no code stands for; a common code of the largest rank where no structure has all views."""
    held = membership(hierarchy, SMALL)
    assert ["".join("01"[int(m)] for m in column) for column in held.T] == expected
    rng = np.random.default_rng(0)
    views = tuple(jnp.asarray(rng.standard_normal((9, p))) for p in hierarchy.dims)
    scores, outputs, value, parts = built(hierarchy, views)
    assert scores.shape == (9, len(expected))
    assert outputs.shape == (9, 1)
    assert np.isfinite(value)
    assert (parts["pair"] > 0) == any(len(s) == 2 for s in hierarchy.structures if len(s) < hierarchy.n_modalities)
    assert_within(parts["supervisor"], np.log(3), 0.3, "supervisor at the start")


def test_disagreement_knows_no_scale():
    a, b = (jnp.asarray(x) for x in np.random.default_rng(0).standard_normal((2, 4000, 3)))
    assert_close(disagreement(3 * a, 3 * b), disagreement(a, b), "disagreement of thrice the codes", slack=1e11)
    assert_at_most(abs(disagreement(a, b) - 1), 0.05, "disagreement of unrelated codes, from 1")
    assert float(disagreement(a, a)) == 0


def test_overlap_is_the_squared_correlations():
    """Within codes and between them, but for two pairs of one view; a constant coordinate has none."""
    rng = np.random.default_rng(1)
    codes = [rng.standard_normal((30, width)) for width in (2, 1, 2, 3)]
    group = np.repeat(range(4), (2, 1, 2, 3))
    squares = np.corrcoef(np.concatenate(codes, axis=1).T) ** 2
    kept = [squares[i, j] for i in range(8) for j in range(8) if i != j and {group[i], group[j]} != {1, 2}]
    given = [jnp.asarray(code) for code in codes]
    assert_at_most(abs(overlap(given) - sum(kept) / 8), 1e-5, "difference")
    gradient = jax.grad(lambda a: overlap([a, *given[1:]]))(jnp.zeros((30, 2)))
    assert np.isfinite(gradient).all()


@cache
def fitted():
    """Views' shared factors and their own, under a link, with a response of all; the last 100 rows are new to the fit."""
    rng = np.random.default_rng(0)
    hierarchy = Hierarchy((12, 12, 12), {(1, 2, 3): 2, (1, 2): 1, (3,): 1, (1,): 1})
    z = rng.standard_normal((500, hierarchy.n_factors))
    loadings = rng.standard_normal((36, hierarchy.n_factors)) * hierarchy.mask
    X = jnp.asarray(np.sinh(z @ loadings.T / 2 + 0.3 * rng.standard_normal((500, 36))))
    views = [np.asarray(x) for x in split_views(X, hierarchy.dims)]
    training = TrainingConfig(steps=300, batch_size=100, learning_rate=3e-3)
    config = TsdConfig(hidden=(32,), training=training)
    return fit([x[:400] for x in views], hierarchy, config, y=z[:400].sum(axis=1), key=jr.key(0)), views, z


@pytest.mark.slow
@pytest.mark.long
def test_factors_are_recovered_by_their_own_columns():
    """One fit in six mixes what a pair shares with what is private (R² of single structures from .32 to .98, their mean from .62,
    of the response from .947, over six keys), and another processor is like another key: the bounds are on means."""
    fit_, views, z = fitted()
    assert int(fit_.status) == 0
    scores, hierarchy = np.asarray(fit_.transform(views)), fit_.hierarchy
    found = []
    for s in hierarchy.structures:
        own = (np.asarray(fit_.membership) == np.isin(hierarchy.modalities, s)[:, None]).all(axis=0)
        design = np.concatenate([np.ones((500, 1)), scores[:, own]], axis=1)
        coefficients = np.linalg.lstsq(design[:400], z[:400, hierarchy.columns(s)], rcond=None)[0]
        left = z[400:, hierarchy.columns(s)] - design[400:] @ coefficients
        found.append(1 - np.mean(left**2) / np.mean(z[400:, hierarchy.columns(s)] ** 2))
    assert_at_least(np.mean(found), 0.5, "mean R² by structure")
    y = z[400:].sum(axis=1)
    error = np.mean((fit_.predict([x[400:] for x in views]) - y) ** 2)
    assert_at_least(1 - error / np.mean(y**2), 0.85, "R² of the response")


def test_scores_are_of_single_rows_and_of_the_views_there():
    fit_, views, _ = fitted()
    whole = fit_.transform(views)
    assert relative(fit_.transform([x[3:5] for x in views]), whole[3:5]) < 1e-5
    presence = np.ones((500, 3), bool)
    presence[:10, 0], presence[10:20, :2] = False, False
    scores = fit_.transform(views, presence)
    held = np.asarray(fit_.membership)
    assert relative(scores[20:], whole[20:]) < 1e-6
    assert not np.asarray(scores[10:20, ~held[2]]).any()
    assert relative(scores[10:20, held.sum(axis=0) == 1], np.where(held[2], whole[10:20], 0)[:, held.sum(axis=0) == 1]) < 1e-6


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="hierarchy: has 2 modalities; expected 3"):
        fit([np.ones((8, 6)), np.ones((8, 5))], TWO, TsdConfig(variant="port"), key=jr.key(0))
    with pytest.raises(ValueError, match="hierarchy: has 1 modality; expected at least 2"):
        fit([np.ones((8, 6))], Hierarchy((6,), {(1,): 1}), key=jr.key(0))
    with pytest.raises(ValueError, match="reconstruction: is 1.0; expected 0"):
        TsdConfig(variant="port", reconstruction=1.0)
    with pytest.raises(ValueError, match="pair: is -1"):
        TsdConfig(pair=-1.0)
