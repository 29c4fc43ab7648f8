"""Changed copies of rows, for losses that ask which copy belongs to which row.

A copy says of a row what the change has left: what a loss of copies can keep is decided here.
"""

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from hcl_jax.linalg import inverse_root
from hcl_jax.networks.modules import Constant
from hcl_jax.networks.training import Batch
from hcl_jax.structure import Hierarchy

Rows = Float[Array, "n _p"]
Augmentation = Literal["noise", "conditioned", "published"]
AUGMENTATIONS = ("noise", "conditioned", "published")
RIDGE = 1e-2
"""Added to the variances of standardised features before they are whitened."""


def with_noise(key: Key[Array, ""], x: Float[Array, "n p"], strength: float | Float[Array, ""]) -> Float[Array, "n p"]:
    """x + strength × standard normal noise."""
    return x + strength * jr.normal(key, x.shape, x.dtype)


def as_published(key: Key[Array, ""], x: Float[Array, "n p"]) -> Float[Array, "n p"]:
    """Of every row, with equal chances: its halves swapped, noise of 0.01 added, a tenth of its features set to 0, or itself.

    The choices of Liang et al. 2023 for vectors; their code makes one choice a batch.
    """
    k_choice, k_noise, k_kept = jr.split(key, 3)
    choice = jr.randint(k_choice, (x.shape[0], 1), 0, 4)
    swapped = jnp.roll(x, -(x.shape[1] // 2), axis=1)
    masked = jnp.where(jr.bernoulli(k_kept, 0.9, x.shape), x, 0)
    copies = [swapped, with_noise(k_noise, x, 0.01), masked, x]
    return jnp.select([choice == i for i in range(len(copies))], copies)


def shared_directions(views: tuple[Rows, ...]) -> tuple[Float[Array, "_p _p"], ...]:
    """For every view the projector, p × p, on the directions that the views before it predict; 0 for the first.

    Directions of canonical variates (ridge-regularised) whose correlation is larger than noise of so many features makes it,
    √(p/n) + √(q/n).
    """
    projectors = []
    for m, view in enumerate(views):
        p = view.shape[1]
        if m == 0:
            projectors.append(jnp.zeros((p, p), view.dtype))
            continue
        before = jnp.concatenate(views[:m], axis=1)
        n, q = before.shape
        a, b = (rows - rows.mean(axis=0, keepdims=True) for rows in (view, before))
        root_a, root_b = (
            inverse_root(rows.T @ rows / n + RIDGE * jnp.eye(rows.shape[1], dtype=rows.dtype))[0] for rows in (a, b)
        )
        left, correlations, _ = jnp.linalg.svd(root_a @ (a.T @ b / n) @ root_b, full_matrices=False)
        found = correlations > (p / n) ** 0.5 + (q / n) ** 0.5
        directions = jnp.where(found[None, :], root_a @ left, 0)
        basis, lengths, _ = jnp.linalg.svd(directions, full_matrices=False)
        basis = jnp.where((lengths > 1e-3 * lengths[0])[None, :], basis, 0)
        projectors.append(basis @ basis.T)
    return tuple(projectors)


def none_spared(hierarchy: Hierarchy, config: Any) -> tuple[Constant, ...]:
    """The projectors of a network with "conditioned" copies before its training rows are known: 0. None for other copies."""
    if config.augmentation != "conditioned":
        return ()
    return tuple(Constant(jnp.zeros((d, d), config.training.dtype)) for d in hierarchy.dims)


def find_spared(network: Any, rows: Batch, hierarchy: Hierarchy, config: Any) -> Any:
    """The network, whose "conditioned" copies spare the `shared_directions` of the training rows."""
    if config.augmentation != "conditioned":
        return network
    return eqx.tree_at(lambda net: net.spared, network, tuple(map(Constant, shared_directions(rows.views))))


def augmented(
    key: Key[Array, ""],
    views: tuple[Rows, ...],
    kind: Augmentation,
    strength: float | Float[Array, ""],
    spared: tuple[Constant, ...],
) -> tuple[Rows, ...]:
    """A changed copy of every view, each by its own key.

    "noise" adds noise of that strength to every feature, "published" is `as_published`; "conditioned" adds noise to the first
    view and, to each later one, only where it leaves the `spared` directions alone, those that say what the views before it say:
    the multimodal augmentation of Liang et al. 2023 (definition 5), for vectors.
    """
    keys = jr.split(key, len(views))
    if kind == "published":
        return tuple(as_published(k, x) for k, x in zip(keys, views, strict=True))
    changed = tuple(with_noise(k, x, strength) for k, x in zip(keys, views, strict=True))
    if kind == "noise":
        return changed
    return tuple(y - (y - x) @ P.value for x, y, P in zip(views, changed, spared, strict=True))
