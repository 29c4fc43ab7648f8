"""Stored weights of networks that were written in PyTorch, in the places of ours.

A place is a function from our network to the array that a name of the state dictionary stands for, or to the arrays that it holds
one below the other.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_at_most, relative

TOLERANCE = 1e-9
DIVERGED = 1e9
"""An amplification of rounding from which on a run is not compared."""

Places = dict[str, Callable[[Any], Any]]


def linear(name: str, where: Callable[[Any], Any]) -> Places:
    """A linear layer, or a norm."""
    return {f"{name}.weight": lambda net: where(net).weight, f"{name}.bias": lambda net: where(net).bias}


def perceptron(name: str, where: Callable[[Any], Any], n_layers: int) -> Places:
    """Linear layers at every second place of a sequence, activations between them."""
    places = {}
    for i in range(n_layers):
        places |= linear(f"{name}.{2 * i}", lambda net, i=i: where(net).layers[i])
    return places


def transformer(name: str, where: Callable[[Any], Any]) -> Places:
    """A layer whose queries, keys and values have one matrix."""
    places = {
        f"{name}.self_attn.in_proj_{kind}": lambda net, kind=kind: tuple(
            getattr(getattr(where(net), part), kind) for part in ("query", "key", "value")
        )
        for kind in ("weight", "bias")
    }
    ours = {"self_attn.out_proj": "output", "linear1": "first", "linear2": "second", "norm1": "attended", "norm2": "fed"}
    for theirs, field in ours.items():
        places |= linear(f"{name}.{theirs}", lambda net, field=field: getattr(where(net), field))
    return places


def load(network: Any, arrays: dict[str, np.ndarray], places: Places) -> Any:
    """The network with the weights `w/<name>`, of which there have to be as many as places, in its own precision."""
    stored = {name.removeprefix("w/"): value for name, value in arrays.items() if name.startswith("w/")}
    assert set(stored) == set(places), f"without a place or a weight: {sorted(set(stored) ^ set(places))}"
    for name, where in places.items():
        old = jax.tree.leaves(where(network))
        new = np.split(stored[name], len(old))
        assert [leaf.shape for leaf in old] == [leaf.shape for leaf in new], name
        new = [jnp.asarray(leaf, like.dtype) for leaf, like in zip(new, old, strict=True)]
        network = eqx.tree_at(lambda net, where=where: jax.tree.leaves(where(net)), network, new)
    return network


def by_name(network: Any, places: Places) -> dict[str, np.ndarray]:
    """Weights, or gradients with respect to them, as the state dictionary names them."""
    return {
        name: np.concatenate([np.asarray(leaf) for leaf in jax.tree.leaves(where(network))]) for name, where in places.items()
    }


def inputs(arrays: dict[str, np.ndarray]) -> tuple[jax.Array, ...]:
    """The stored views x1, x2, … in float64."""
    names = sorted(name for name in arrays if name[0] == "x" and name[1:].isdecimal())
    return tuple(jnp.asarray(arrays[name], jnp.float64) for name in names)


def check_loss(
    arrays: dict[str, np.ndarray], network: Any, places: Places, value_of: Callable[[Any, tuple], Any], tag: str = ""
) -> None:
    """The stored total of a loss of (network, views), its gradients, and its course along gradient descent at the rates that did
    not diverge there; `tag` leads to other settings on the same weights."""
    arrays = arrays | {name.removeprefix(tag): value for name, value in arrays.items() if tag and name.startswith(tag)}
    evaluate = jax.jit(jax.value_and_grad(lambda both: value_of(*both)))  # one program for all steps
    views = inputs(arrays)
    value, (by_weight, by_view) = evaluate((network, views))
    assert_at_most(relative(value, arrays["loss/total"]), TOLERANCE, f"{tag}total")
    for m, gradient in enumerate(by_view, start=1):
        assert_at_most(relative(gradient, arrays[f"grad/x{m}"]), TOLERANCE, f"{tag}gradient by view {m}")
    gradients = by_name(by_weight, places)
    _check_weights(arrays, "grad/w/", gradients, TOLERANCE, tag)
    size = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))
    assert_at_most(relative(size, arrays["grad/w_global_norm"]), TOLERANCE, f"{tag}norm of the gradient")
    without = {name for name, gradient in gradients.items() if not np.any(gradient)}
    assert without == set(arrays["grad/w_without"].tolist()) & set(places)
    for rate in ("0.001", "1e-05"):
        amplification = float(arrays[f"sgd/lr{rate}/amplification"])
        if not amplification < DIVERGED:  # nor where it is NaN
            continue
        tolerance = max(amplification * 1e-12, TOLERANCE)
        moved, losses = network, []
        for _ in range(10):
            value, (gradient, _) = evaluate((moved, views))
            moved = jax.tree.map(lambda w, g, rate=float(rate): w - rate * g, moved, gradient)
            losses.append(value)
        losses.append(evaluate((moved, views))[0])
        assert_at_most(relative(losses, arrays[f"sgd/lr{rate}"]), tolerance, f"{tag}losses at {rate}")
        _check_weights(arrays, f"sgd/lr{rate}/w/", by_name(moved, places), tolerance, tag)


def _check_weights(arrays: dict[str, np.ndarray], prefix: str, found: dict[str, np.ndarray], tolerance: float, tag: str) -> None:
    kept = [name for name in arrays if name.startswith(prefix)]
    assert kept
    for name in kept:
        assert_at_most(relative(found[name.removeprefix(prefix)], arrays[name]), tolerance, f"{tag}{name}")
