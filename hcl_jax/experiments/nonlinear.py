"""A replicate of the nonlinear study: how much of every structure's factors the scores of a method hold, whatever the link.

Rows are x = g(Λz + ε); a method sees n of them, and its scores of `N_TEST` others are compared with their z. Every method is one
program from the rows to its metrics.
"""

import dataclasses
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree

from hcl_jax.experiments.cell import hierarchy_columns, hierarchy_fields, join_fields, number_name, path_name
from hcl_jax.experiments.experiment import Outcome, Stage
from hcl_jax.experiments.mapping import spread
from hcl_jax.experiments.probes import r_squared, residual_variance
from hcl_jax.experiments.recovery import check_samples
from hcl_jax.fitted import Fitted, fit_estimator
from hcl_jax.links import check_link, sample_linked_observations, sample_links
from hcl_jax.model import Truth, check_latent, sample_normal_loadings
from hcl_jax.networks import NETWORKS, NetworkFit, hcl
from hcl_jax.networks.ceiling import fit_ceiling
from hcl_jax.networks.evidence import called_absent, evidence
from hcl_jax.scores import posterior_mean_scores
from hcl_jax.structure import Hierarchy, Structure

N_TEST = 2000
LINEAR, START, CEILING, ORACLE = "linear", "hcl-start", "supervised", "oracle"
NONLINEAR_METHODS = (LINEAR, START, *NETWORKS, CEILING, ORACLE)


@dataclass(frozen=True)
class NonlinearCell:
    """One setting of the nonlinear study. `fitted` is the hierarchy that methods are told, where it is not the truth's."""

    hierarchy: Hierarchy
    n: int
    noise_variance: float
    link: str = "leaky"
    latent: str = "gaussian"
    fitted: Hierarchy | None = None

    def __post_init__(self) -> None:
        if self.n < 20:
            raise ValueError(f"n_grid: holds {self.n}; expected at least 20 samples")
        if not 0 < self.noise_variance < float("inf"):
            raise ValueError(f"noise_variance: is {self.noise_variance}; expected a positive number")
        check_link(self.link)
        check_latent(self.latent)

    @property
    def told(self) -> Hierarchy:
        """The hierarchy that methods are told."""
        return self.hierarchy if self.fitted is None else self.fitted

    @property
    def draw_name(self) -> str:
        """Names the data."""
        fields = hierarchy_fields(self.hierarchy) | {"n": str(self.n), "noise_variance": number_name(self.noise_variance)}
        fields["link"] = self.link
        if self.latent != "gaussian":
            fields["latent"] = self.latent
        return join_fields(fields)

    @property
    def name(self) -> str:
        """`key=value` in a fixed order, defaults left out, as `path_name` makes it."""
        told = "" if self.fitted is None else f",told={str(self.fitted).replace(',', '+').replace(':', '-')}"
        return path_name(self.draw_name + told)

    def columns(self) -> dict[str, str | int | float]:
        """The cell's columns of a tidy table."""
        return {
            "cell": self.name,
            "n": self.n,
            "noise_variance": self.noise_variance,
            "link": self.link,
            "latent": self.latent,
            "told": "" if self.fitted is None else str(self.fitted),
            **hierarchy_columns(self.hierarchy),
        }


class Drawn(eqx.Module):
    """Rows of the views before (u) and after the link (x), and their factors: the last `N_TEST` are for testing."""

    truth: Truth
    u: Float[Array, "n d"]
    x: Float[Array, "n d"]
    z: Float[Array, "n K"]
    key: Array


@dataclass(frozen=True)
class DrawSpec:
    """What the program that draws is compiled for."""

    hierarchy: Hierarchy
    dtype: str
    n: int
    link: str
    latent: str

    @classmethod
    def of(cls, cell: NonlinearCell, dtype: str) -> "DrawSpec":
        return cls(cell.hierarchy, dtype, cell.n, cell.link, cell.latent)


def draw(spec: DrawSpec, shared: PyTree, replicate: Array) -> Drawn:
    """One replicate: loadings, links, rows."""
    seed, checksum, noise_variance = shared
    key = jr.fold_in(jr.fold_in(jr.key(seed), checksum), replicate)
    k_loadings, k_links, k_rows, k_method = jr.split(key, 4)
    dtype = jnp.dtype(spec.dtype)
    truth = Truth(sample_normal_loadings(k_loadings, spec.hierarchy, dtype), noise_variance, spec.hierarchy)
    links = sample_links(k_links, spec.link, spec.hierarchy, dtype)
    straight = sample_links(k_links, "identity", spec.hierarchy, dtype)
    n = spec.n + N_TEST
    views, z = sample_linked_observations(k_rows, truth, links, n, spec.latent)
    before, _ = sample_linked_observations(k_rows, truth, straight, n, spec.latent)
    return Drawn(truth, jnp.concatenate(before, axis=1), jnp.concatenate(views, axis=1), z, jr.key_data(k_method))


def outcome_of(method: str, told: Hierarchy, n: int, drawn: Drawn) -> Outcome:
    """The method fitted to the first n rows, and what its scores of the others hold."""
    truth = drawn.truth
    seen_by = "hcl" if method == START else method  # the same held-out rows
    key = jr.fold_in(jr.wrap_key_data(drawn.key), np.uint32(zlib.crc32(seen_by.encode())))
    views = [drawn.x[:, truth.hierarchy.rows(m)] for m in truth.hierarchy.modalities]
    train = [view[:n] for view in views]
    if method == ORACLE:
        score_map = posterior_mean_scores(truth.loadings, truth.noise_variance)
        return score_metrics(drawn.u @ score_map, jnp.asarray(truth.hierarchy.modality_mask), drawn.z, truth.hierarchy, n) | {
            "status": jnp.zeros((), jnp.int32),
            "steps": jnp.zeros((), jnp.int32),
        }
    if method == LINEAR:
        fitted: Fitted = fit_estimator(train, told, "hcl-ml", noise="feature")
    elif method == START:
        config = hcl.HclConfig()
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=0))
        fitted = hcl.fit(train, told, config, key=key)
    elif method == CEILING:
        fitted = fit_ceiling(train, truth.hierarchy, drawn.z[:n], key=key)
    else:
        fitted = NETWORKS[method](train, told, key=key)
    metrics = score_metrics(fitted.transform(views), fitted.membership, drawn.z, truth.hierarchy, n)
    if isinstance(fitted, NetworkFit) and isinstance(fitted.network, hcl.HclNetwork) and told != truth.hierarchy:
        metrics |= presence_metrics(fitted, drawn.x, truth.hierarchy)
    return metrics | {"status": fitted.status, "steps": fitted.steps}


def presence_metrics(fitted: NetworkFit, rows: Float[Array, "n d"], truth: Hierarchy) -> Outcome:
    """What the fit says of structures that are there, and of those that are offered and are not.

    `called_absent`: the share of the structures that the truth lacks, and that are called absent; `called_wrongly`: the number of
    those that it has, and are; `most_explained` and `least_correlation` of the latter, and both of the former.
    """
    correlation, explained = evidence(fitted.network, fitted.standardised(rows))
    shared = [s for s in fitted.hierarchy.structures if len(s) > 1]
    there = np.array([s in truth.structures for s in shared])
    called = called_absent(correlation, explained)
    dtype = rows.dtype
    return {
        "called_absent": jnp.mean(called[~there].astype(dtype)),
        "called_wrongly": jnp.sum(called[there].astype(dtype)),
        "present_explained": jnp.max(explained[there]).astype(dtype),
        "present_correlation": jnp.min(correlation[there]).astype(dtype),
        "absent_explained": jnp.min(explained[~there]).astype(dtype),
        "absent_correlation": jnp.max(correlation[~there]).astype(dtype),
    }


def score_metrics(
    scores: Float[Array, "n R"], membership: Array, z: Float[Array, "n K"], hierarchy: Hierarchy, n: int
) -> Outcome:
    """What scores hold of the true factors: linear regressions fitted to the first n rows, and judged on the others.

    | name | definition |
    |---|---|
    | `r_squared` | of the factors of each structure, regressed on the scores of that structure: mean over its factors |
    | `r_squared_all` | the same, on all scores |
    | `leak` | the largest R² of the factors of another structure, regressed on the scores of a structure |
    | `quadratic` | by structure: R² of its scores on squares and products of the factors of other structures, beyond these |

    0 where a method has no scores of a structure.
    """
    scores = scores.astype(z.dtype)
    patterns = [hierarchy.modality_mask[:, hierarchy.columns(s)][:, :1] for s in hierarchy.structures]
    own = [jnp.all(membership == jnp.asarray(pattern), axis=0) for pattern in patterns]
    held = jnp.stack([r_squared(jnp.where(mask[None, :], scores, 0), z, n) for mask in own])  # structures × K
    by_structure = jnp.stack([held[:, hierarchy.columns(s)].mean(axis=1) for s in hierarchy.structures], axis=1)
    everything = r_squared(scores, z, n)
    return {
        "r_squared": jnp.diagonal(by_structure),
        "r_squared_all": jnp.stack([everything[hierarchy.columns(s)].mean() for s in hierarchy.structures]),
        "leak": jnp.max(by_structure - jnp.diag(jnp.full(len(own), jnp.inf, z.dtype))),
        "quadratic": _quadratic_shares(scores, own, z, hierarchy, n),
    }


def _quadratic_shares(
    scores: Float[Array, "n R"], own: list[Array], z: Float[Array, "n K"], hierarchy: Hierarchy, n: int
) -> Float[Array, " S"]:
    """The share of the variance of each structure's scores that products of other structures' factors explain beyond all z."""
    i, j = np.triu_indices(z.shape[1])
    products = z[:, i] * z[:, j]
    of_column = np.repeat(np.arange(len(hierarchy.structures)), [rank for _, rank in hierarchy.ranks])
    total, linear = residual_variance(z[:, :0], scores, n), residual_variance(z, scores, n)
    shares = []
    for s, mask in enumerate(own):
        others = products[:, (of_column[i] != s) & (of_column[j] != s)]
        both = residual_variance(jnp.concatenate([z, others], axis=1), scores, n)
        share = jnp.maximum(linear - both, 0) / jnp.where(total > 0, total, 1)
        shares.append(jnp.sum(jnp.where(mask, share, 0)) / jnp.maximum(mask.sum(), 1).astype(z.dtype))
    return jnp.stack(shares)


@lru_cache
def draw_program(spec: DrawSpec, batched: bool) -> Callable[..., Drawn]:
    """(shared, replicates, counts) -> the draws of all replicates, each on its device."""
    return spread(partial(draw, spec), batched)


@lru_cache
def method_program(method: str, told: Hierarchy, n: int, batched: bool) -> Callable[..., Outcome]:
    """(None, draws, counts) -> the outcomes of all replicates."""
    return spread(lambda _, drawn: outcome_of(method, told, n, drawn), batched, runs_long=method in NETWORKS or method == CEILING)


@dataclass(frozen=True)
class Nonlinear:
    """The nonlinear study."""

    study: str = "nonlinear"

    def check(self, cell: NonlinearCell, method: str) -> None:
        if method in (LINEAR, START, "hcl", "hcl-copula", "hcl-flow"):
            check_samples("hcl-ml", cell.told.n_factors, cell.n * 9 // 10)

    def draw_key(self, cell: NonlinearCell, dtype: str) -> DrawSpec:
        return DrawSpec.of(cell, dtype)

    def draw_program(self, cell: NonlinearCell, dtype: str, batched: bool) -> Callable[..., Drawn]:
        return draw_program(DrawSpec.of(cell, dtype), batched)

    def shared_arguments(self, cell: NonlinearCell, seed: int, dtype: str) -> tuple:
        checksum = zlib.crc32(cell.draw_name.encode())
        return np.uint32(seed), np.uint32(checksum), np.dtype(dtype).type(cell.noise_variance)

    def stages(self, cell: NonlinearCell, method: str, batched: bool) -> tuple[Stage, ...]:
        return (Stage(method, method_program(method, cell.told, cell.n, batched), lambda drawn, _: drawn),)

    def structures(self, cell: NonlinearCell, method: str) -> tuple[Structure, ...]:
        return cell.hierarchy.structures

    def numbers_drawn(self, cell: NonlinearCell) -> int:
        return (cell.n + N_TEST) * (2 * cell.hierarchy.n_features + cell.hierarchy.n_factors)
