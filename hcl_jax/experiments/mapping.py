"""Maps a program over replicates and devices, so that a replicate's bits depend on neither."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from hcl_jax.compiled import compiler_options

AXIS = "replicates"
Program = Callable[[PyTree, PyTree], PyTree]
"""(what all replicates share, what one replicate has) -> result."""


def _one_by_one(program: Program, shared: PyTree, items: PyTree, count: Array) -> PyTree:
    """The unbatched program on the first `count` items, one after the other.

    The trip count is traced and both ends of the body are barriers: neither the number of replicates nor the size of the buffers
    can reach into the program, so the bits of a replicate do not depend on its company.
    """

    def body(i: Array, buffers: PyTree) -> PyTree:
        item = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, keepdims=False), items)
        out = lax.optimization_barrier(program(shared, lax.optimization_barrier(item)))
        return jax.tree.map(lambda buffer, leaf: lax.dynamic_update_index_in_dim(buffer, leaf, i, 0), buffers, out)

    size = jax.tree.leaves(items)[0].shape[0]
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), items)
    buffers = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), leaf.dtype), jax.eval_shape(program, shared, first))
    return lax.fori_loop(0, count[0], body, buffers)


@lru_cache
def mesh() -> jax.sharding.Mesh:
    """All devices in a row."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def spread(program: Program, batched: bool, runs_long: bool = False) -> Callable[..., PyTree]:
    """(shared, items, counts) -> results, with the items' leading axis spread over the devices; `runs_long` as of `compiled`."""
    if batched:
        every = lambda shared, items, _counts: jax.vmap(partial(program, shared))(items)
        return jax.jit(every, compiler_options=compiler_options(runs_long))
    run, split, whole = partial(_one_by_one, program), PartitionSpec(AXIS), PartitionSpec()
    mapped = jax.shard_map(run, mesh=mesh(), in_specs=(whole, split, split), out_specs=split, check_vma=False)
    return jax.jit(mapped, compiler_options=compiler_options(runs_long))


@dataclass(frozen=True)
class Slots:
    """Where each replicate of a chunk is computed: `size` places a device, of which the first `counts` are used."""

    replicates: np.ndarray
    counts: np.ndarray

    @classmethod
    def spread(cls, first: int, count: int, size: int, used: int | None = None) -> "Slots":
        """`count` replicates from `first` on, dealt out evenly over the devices, or the first `used` of them.

        The places that are left repeat the last replicate and are not read.
        """
        held = jax.device_count()
        used = min(used or held, held)
        shares = [len(share) for share in np.array_split(np.arange(count), used)]
        counts = np.array(shares + [0] * (held - used), dtype=np.int32)
        starts = first + np.concatenate([[0], np.cumsum(counts)[:-1]])
        places = starts[:, None] + np.minimum(np.arange(size), np.maximum(counts[:, None] - 1, 0))
        return cls(places.ravel().astype(np.uint32), counts)

    def read(self, results: np.ndarray) -> np.ndarray:
        """The results in the places that are used, in the order of the replicates."""
        used = np.arange(len(self.replicates) // len(self.counts)) < self.counts[:, None]
        return results[used.ravel()]


def place(values: Any, split: bool) -> Any:
    """Host values on the devices, without compiling anything: split over them, or whole on each."""
    sharding = NamedSharding(mesh(), PartitionSpec(AXIS) if split else PartitionSpec())
    return jax.tree.map(lambda value: jax.device_put(value, sharding), values)
