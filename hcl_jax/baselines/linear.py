"""What the decompositions share: ranks and membership from a hierarchy, and how their options are checked."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hcl_jax.structure import Hierarchy


def given_ranks(hierarchy: Hierarchy) -> tuple[int, tuple[int, ...]]:
    """(joint rank, individual rank of every view) of methods without partial sharing: the rank of the structure of all views, and
    the sum over all other structures that contain the view."""
    joint = hierarchy.rank(tuple(hierarchy.modalities))
    return joint, tuple(len(hierarchy.active_columns(m)) - joint for m in hierarchy.modalities)


def check_given_ranks(joint_rank: int | None, individual_ranks: tuple[int, ...] | None) -> None:
    """Raise `ValueError` that names the option unless the ranks are left out or non-negative."""
    if joint_rank is not None and joint_rank < 0:
        raise ValueError(f"joint_rank: is {joint_rank}; expected a non-negative integer")
    if individual_ranks is not None and min(individual_ranks, default=0) < 0:
        raise ValueError(f"individual_ranks: are {individual_ranks}; expected non-negative integers")


def check_view_ranks(name: str, ranks: Sequence[int], dims: Sequence[int], n: int, least: int = 0) -> None:
    """Raise `ValueError` that names the option unless there is one rank a view, from `least` to what n rows of it can have."""
    if len(ranks) != len(dims):
        raise ValueError(f"{name}: are {tuple(ranks)}; expected {len(dims)} of them")
    for m, (rank, dim) in enumerate(zip(ranks, dims, strict=True), start=1):
        if not least <= rank <= min(n - 1, dim):
            raise ValueError(f"{name}: view {m} has rank {rank}; expected {least} to {min(n - 1, dim)} for {n} rows")


def joint_then_individual(joint: int, individual: Sequence[int]) -> Bool[np.ndarray, "M R"]:
    """The membership of columns that all views share, followed by those of each view."""
    views = np.arange(len(individual))
    return np.concatenate(
        [np.ones((len(views), joint), bool), np.repeat(np.eye(len(views), dtype=bool), individual, axis=1)], axis=1
    )


def stack_blocks(blocks: Sequence[Float[Array, "_p _r"]], dims: Sequence[int]) -> Float[Array, "d R"]:
    """Loadings of the views' own columns: block diagonal."""
    edges = np.cumsum([0, *dims])
    tall = [
        jnp.zeros((int(edges[-1]), block.shape[1]), block.dtype).at[a:b].set(block)
        for block, a, b in zip(blocks, edges[:-1], edges[1:], strict=True)
    ]
    return jnp.concatenate(tall, axis=1)
