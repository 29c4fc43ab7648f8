"""A replicate of the recovery study as pure functions, and the programs that map them over replicates and devices.

A replicate is drawn by one program, estimated by one more per method, and measured by a last one that all methods share. They are
compiled apart, so that a further method cannot change the bits of another one, and n, the noise variance and the seed are traced:
a grid over them reuses the programs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators import ESTIMATORS
from hcl_jax.estimators.estimate import Estimate, without_name
from hcl_jax.experiments.cell import Cell
from hcl_jax.experiments.experiment import Outcome, Stage
from hcl_jax.experiments.mapping import spread
from hcl_jax.experiments.methods import LIKELIHOOD_METHODS, estimator, split_noise
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

Drawn = tuple[Truth, SampleCovariance]
RECOVERY_LIMITS = ("cramer-rao", "detection")
RECOVERY_METHODS = (*ESTIMATORS, *RECOVERY_LIMITS)


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


def estimate(method: str, fitted: Hierarchy, covariance: SampleCovariance) -> Estimate:
    """The method's estimate for the hierarchy that it is told."""
    return without_name(estimator(method)(covariance, fitted))


def errors(fitted: Hierarchy, truth: Truth, loadings: Float[Array, "d K"]) -> Outcome:
    """All metrics of estimated loadings."""
    structures = structures_of(fitted, truth.hierarchy)
    return recovery_errors(loadings, fitted, truth.loadings, truth.hierarchy) | kept_ranks(loadings, fitted, structures)


def limit(method: str, truth: Truth, covariance: SampleCovariance) -> Outcome:
    """The metrics of a limit on the replicate's own draw, with its `status` and `steps`."""
    return LIMITS[method](truth, covariance)


def check_samples(method: str, n_factors: int, n: int) -> None:
    """Raise `ValueError` where a likelihood method has as many factors as degrees of freedom."""
    if split_noise(method)[0] in LIKELIHOOD_METHODS and n_factors >= n - 1:
        raise ValueError(f"n_grid: holds {n}; {method} with {n_factors} factors expects more than {n_factors + 1} samples")


def structures_of(fitted: Hierarchy, true: Hierarchy) -> tuple[Structure, ...]:
    """The structures that the metrics of a fit run over."""
    return fitted.union(true).structures


def metric_names() -> tuple[str, ...]:
    """Every metric that a method may be stored with."""
    hierarchy = Hierarchy((2, 2), {(1, 2): 1})

    def all_metrics(loadings: Array, matrix: Array, one: Array) -> Outcome:
        truth, covariance = Truth(loadings, one, hierarchy), SampleCovariance(matrix, n=one)
        outcomes = [errors(hierarchy, truth, loadings), *(limit(name, truth, covariance) for name in RECOVERY_LIMITS)]
        return {name: value for outcome in outcomes for name, value in outcome.items()}

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 1), (4, 4), ())]
    return tuple(sorted(set(jax.eval_shape(all_metrics, *shapes)) - {"status", "steps"}))


def kept_ranks(loadings: Float[Array, "d K"], fitted: Hierarchy, structures: tuple[Structure, ...]) -> Outcome:
    """How many columns an estimate has not pruned, of each structure (`kept_rank`) and each of its blocks (`block_kept_rank`)."""
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


@lru_cache
def draw_program(spec: DrawSpec, batched: bool) -> Callable[..., Drawn]:
    """(shared, replicates, counts) -> the truths and covariances of all replicates, each on its device."""
    return spread(partial(_draw_from_root, spec), batched)


@lru_cache
def estimate_program(method: str, fitted: Hierarchy, batched: bool) -> Callable[..., Estimate]:
    """(None, covariances, counts) -> the estimates of all replicates."""
    return spread(lambda _, covariance: estimate(method, fitted, covariance), batched)


@lru_cache
def errors_program(fitted: Hierarchy, batched: bool) -> Callable[..., Outcome]:
    """(None, (truths, estimates), counts) -> the outcomes of all replicates. One program serves all methods."""

    def outcome(_: None, item: tuple[Truth, Estimate]) -> Outcome:
        truth, estimate = item
        return errors(fitted, truth, estimate.loadings) | {"status": estimate.status, "steps": estimate.steps}

    return spread(outcome, batched)


@lru_cache
def limit_program(method: str, batched: bool) -> Callable[..., Outcome]:
    """(None, (truths, covariances), counts) -> the outcomes of all replicates."""
    return spread(lambda _, item: limit(method, *item), batched)


@dataclass(frozen=True)
class Recovery:
    """The recovery study. `loadings` holds the fitted loadings of real data, by their label."""

    loadings: dict[str, np.ndarray] = field(default_factory=dict)
    study: str = "recovery"

    def check(self, cell: Cell, method: str) -> None:
        check_samples(method, cell.fitted_hierarchy.n_factors, cell.n)

    def draw_key(self, cell: Cell, dtype: str) -> DrawSpec:
        return DrawSpec.of(cell, dtype)

    def draw_program(self, cell: Cell, dtype: str, batched: bool) -> Callable[..., Drawn]:
        return draw_program(DrawSpec.of(cell, dtype), batched)

    def shared_arguments(self, cell: Cell, seed: int, dtype: str) -> tuple:
        return shared_arguments(cell, seed, dtype, self.loadings.get(cell.loadings))

    def stages(self, cell: Cell, method: str, batched: bool) -> tuple[Stage, ...]:
        if method in LIMITS:
            return (Stage(method, limit_program(method, batched), lambda drawn, _: drawn),)
        fitted = cell.fitted_hierarchy
        return (
            Stage(method, estimate_program(method, fitted, batched), lambda drawn, _: drawn[1]),
            Stage("(errors)", errors_program(fitted, batched), lambda drawn, estimates: (drawn[0], estimates)),
        )

    def structures(self, cell: Cell, method: str) -> tuple[Structure, ...]:
        return cell.hierarchy.structures if method in LIMITS else structures_of(cell.fitted_hierarchy, cell.hierarchy)

    def numbers_drawn(self, cell: Cell) -> int:
        held_as_rows = cell.sampling == "wishart" and cell.n <= cell.hierarchy.n_features
        return (cell.n if held_as_rows else cell.hierarchy.n_features) * cell.hierarchy.n_features


def shared_arguments(cell: Cell, seed: int, dtype: str, loadings: np.ndarray | None) -> tuple:
    """What all replicates of a cell's draw have in common, as host scalars of fixed types."""
    scalar = np.dtype(dtype).type
    held = None if loadings is None else np.asarray(loadings, dtype)
    return np.uint32(seed), np.uint32(cell.draw_checksum), scalar(cell.n), scalar(cell.noise_variance), held
