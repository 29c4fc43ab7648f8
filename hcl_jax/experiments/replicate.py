"""One replicate as pure functions, and the programs that map them over replicates and devices.

A replicate is drawn by one program and analysed by one more per method. They are compiled apart, so that a further method cannot
change the bits of another one, and n, the noise variance and the seed are traced: a grid over them reuses the programs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Key, PyTree

from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators import ESTIMATORS
from hcl_jax.experiments.cell import Cell
from hcl_jax.limits import LIMITS
from hcl_jax.metrics import recovery_errors
from hcl_jax.model import (
    Truth,
    sample_data_covariance,
    sample_factored_covariance,
    sample_truth,
    sample_wishart_covariance,
)
from hcl_jax.structure import Hierarchy, Structure

Outcome = dict[str, Array]
Drawn = tuple[Truth, SampleCovariance]
AXIS = "replicates"


@dataclass(frozen=True)
class DrawSpec:
    """What the program that draws is compiled for. `n_samples` is None unless there are fewer samples than features."""

    hierarchy: Hierarchy
    dtype: str
    latent: str = "gaussian"
    sampling: str = "wishart"
    n_samples: int | None = None

    @classmethod
    def of(cls, cell: Cell, dtype: str) -> "DrawSpec":
        factored = cell.sampling == "wishart" and cell.n - 1 < cell.hierarchy.n_features
        return cls(cell.hierarchy, dtype, cell.latent, cell.sampling, cell.n if factored else None)


def draw(
    spec: DrawSpec,
    key: Key[Array, ""],
    n: Float[Array, ""],
    noise_variance: Float[Array, ""],
    loadings: Float[Array, "d K"] | None = None,
) -> Drawn:
    """The truth and the sample covariance of one replicate; the given loadings, where there are any, are every replicate's."""
    k_truth, k_sample = jr.split(key)
    if loadings is None:
        truth = sample_truth(k_truth, spec.hierarchy, noise_variance, jnp.dtype(spec.dtype))
    else:
        truth = Truth(loadings, noise_variance, spec.hierarchy)
    if spec.n_samples is not None:
        return truth, sample_factored_covariance(k_sample, truth, spec.n_samples)
    if spec.sampling == "data":
        return truth, sample_data_covariance(k_sample, truth, n, spec.latent)
    return truth, sample_wishart_covariance(k_sample, truth, n)


def analyse(method: str, fitted: Hierarchy, truth: Truth, covariance: SampleCovariance) -> Outcome:
    """All metrics of one method on one replicate, with its `status` and `steps`."""
    if method in LIMITS:
        return dict(LIMITS[method](truth, covariance))
    estimate = ESTIMATORS[method](covariance, fitted)
    errors = recovery_errors(estimate.loadings, fitted, truth.loadings, truth.hierarchy)
    kept = kept_ranks(estimate.loadings, fitted, structures_of(method, fitted, truth.hierarchy))
    return errors | kept | {"status": estimate.status, "steps": estimate.steps}


def structures_of(method: str, fitted: Hierarchy, true: Hierarchy) -> tuple[Structure, ...]:
    """The structures that the metrics of a method run over."""
    return (true if method in LIMITS else fitted.union(true)).structures


def kept_ranks(loadings: Float[Array, "d K"], fitted: Hierarchy, structures: tuple[Structure, ...]) -> Outcome:
    """How many columns an estimate has not pruned: of each structure (`kept_rank`), and of each of its blocks (`block_kept_rank`)."""
    energy = jnp.stack([jnp.sum(loadings[fitted.rows(m)] ** 2, axis=0) for m in fitted.modalities])
    visible = energy > 1e-6 * jnp.max(energy)
    empty = jnp.zeros((fitted.n_modalities, 0), bool)
    columns = [visible[:, fitted.columns(s)] if s in fitted.structures else empty for s in structures]
    return {
        "kept_rank": jnp.stack([jnp.sum(jnp.any(block, axis=0)) for block in columns]),
        "block_kept_rank": jnp.stack([jnp.sum(block, axis=1) for block in columns]),
    }


def _draw_from_root(spec: DrawSpec, shared: PyTree, replicate: Array) -> Drawn:
    seed, checksum, n, noise_variance, loadings = shared
    key = jr.fold_in(jr.fold_in(jr.key(seed), checksum), replicate)
    return draw(spec, key, n, noise_variance, loadings)


def _analyse_item(method: str, fitted: Hierarchy, _shared: PyTree, item: Drawn) -> Outcome:
    return analyse(method, fitted, *item)


def _one_by_one(program: Callable[[PyTree, PyTree], PyTree], shared: PyTree, items: PyTree, count: Array) -> PyTree:
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


def _batched(program: Callable[[PyTree, PyTree], PyTree], shared: PyTree, items: PyTree, _count: Array) -> PyTree:
    return jax.vmap(partial(program, shared))(items)


@lru_cache
def mesh() -> jax.sharding.Mesh:
    """All devices in a row."""
    return jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def _spread(program: Callable[[PyTree, PyTree], PyTree], batched: bool) -> Callable[..., PyTree]:
    """(shared, items, counts) -> results, with the items' leading axis spread over the devices."""
    run = partial(_batched if batched else _one_by_one, program)
    split, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.jit(jax.shard_map(run, mesh=mesh(), in_specs=(whole, split, split), out_specs=split, check_vma=False))


@lru_cache
def draw_program(spec: DrawSpec, batched: bool) -> Callable[..., Drawn]:
    """(shared, replicates, counts) -> the truths and covariances of all replicates, each on its device."""
    return _spread(partial(_draw_from_root, spec), batched)


@lru_cache
def method_program(method: str, fitted: Hierarchy, batched: bool) -> Callable[..., Outcome]:
    """(None, (truths, covariances), counts) -> the outcomes of all replicates."""
    return _spread(partial(_analyse_item, method, fitted), batched)


@dataclass(frozen=True)
class Slots:
    """Where each replicate of a chunk is computed: `size` places a device, of which the first `counts` are used."""

    replicates: np.ndarray
    counts: np.ndarray

    @classmethod
    def spread(cls, first: int, count: int, size: int) -> "Slots":
        """`count` replicates from `first` on, dealt out evenly; the places that are left repeat the last one and are not read."""
        n_devices = jax.device_count()
        counts = np.array([len(part) for part in np.array_split(np.arange(count), n_devices)], dtype=np.int32)
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


def shared_arguments(cell: Cell, seed: int, dtype: str, loadings: np.ndarray | None) -> tuple:
    """What all replicates of a cell's draw have in common, as host scalars of fixed types."""
    scalar = np.dtype(dtype).type
    held = None if loadings is None else np.asarray(loadings, dtype)
    return np.uint32(seed), np.uint32(cell.draw_checksum), scalar(cell.n), scalar(cell.noise_variance), held
