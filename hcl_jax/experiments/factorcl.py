"""A replicate of the study of FactorCL: how well codes predict a label, by where its information lies, and what they hold.

Rows are x = Λz + ε; the label is the sign of a function of some of the factors z. A method sees n rows, and where it is
supervised their labels; linear probes of its codes are fitted to these rows and judged on `N_TEST` others. Every method is two
programs, from the rows to its codes and from the codes to the metrics.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from hcl_jax.experiments.cell import hierarchy_columns, hierarchy_fields, join_fields, number_name, path_name
from hcl_jax.experiments.experiment import Outcome, Stage
from hcl_jax.experiments.mapping import spread
from hcl_jax.experiments.probes import accuracy, gaussian_information, r_squared
from hcl_jax.model import Truth, sample_observations
from hcl_jax.networks import NETWORKS, NetworkFit, TrainingConfig, configuration, factorcl
from hcl_jax.structure import CONVERGED, Hierarchy, Structure, structure_name

N_TEST = 4000
RAW, UNTRAINED = "raw", "untrained"
BATCH, LEARNING_RATE = 128, 1e-3


class Design(NamedTuple):
    """How rows and labels are made: see `FactorclCell`."""

    coordinates: int
    """Of factors, or pairs of them, in the label."""
    pairs: bool
    positive: bool
    """Whether all loadings are."""


DESIGNS = {"sum": Design(8, False, False), "product": Design(4, True, False), "published": Design(48, False, True)}


class Variant(NamedTuple):
    """What a method is: an entry of `NETWORKS`, whether it sees labels, and its options."""

    network: str
    supervised: bool = False
    options: dict[str, Any] = {}
    shared_only: bool = False
    """Whether it is told of no structure but those that views share."""
    last: bool = False
    """Whether all steps are taken and the last state is kept, however the held-out loss has gone."""


LATTICE: dict[str, Any] = {"mode": "lattice"}
VARIANTS = {
    "factorcl-sup": Variant("factorcl", True, LATTICE),
    "factorcl-ssl": Variant("factorcl", False, LATTICE),
    "simclr": Variant("simclr"),
    "supcon": Variant("supcon", True),
    "cross-self": Variant("cross-self"),
    "cross-self-heads": Variant("cross-self-heads"),
    "factorcl-sup-pairwise": Variant("factorcl", True),
    "factorcl-sup-no-club": Variant("factorcl", True, LATTICE | {"club_weight": 0.0}),
    "factorcl-sup-terms": Variant("factorcl", True, {"heads": "term"}),
    "factorcl-sup-terms-no-club": Variant("factorcl", True, {"heads": "term", "club_weight": 0.0}),
    "factorcl-sup-shared": Variant("factorcl", True, LATTICE, shared_only=True),
    "factorcl-sup-plain": Variant("factorcl", True, LATTICE | {"codes": "plain", "critic_steps": 1}),
    "factorcl-sup-last": Variant("factorcl", True, LATTICE, last=True),
    "factorcl-sup-no-club-last": Variant("factorcl", True, LATTICE | {"club_weight": 0.0}, last=True),
    "factorcl-sup-plain-last": Variant("factorcl", True, LATTICE | {"codes": "plain", "critic_steps": 1}, last=True),
    "factorcl-ssl-published": Variant("factorcl", False, LATTICE | {"augmentation": "published"}),
    "factorcl-ssl-conditioned": Variant("factorcl", False, LATTICE | {"augmentation": "conditioned"}),
    "hcl": Variant("hcl"),
}
"""The methods, their baselines, and what the ablations leave out or put in its place."""
FACTORCL_METHODS = (RAW, UNTRAINED, *VARIANTS)


@dataclass(frozen=True)
class FactorclCell:
    """One setting.

    hierarchy: of the factors, as many of each structure as its rank. Loadings are normal, of variance one over the number of
    factors of the view, or in the "published" design uniform between 0 and 1.
    design: the label is the sign of a "sum" of 8 factors, or of 48 in the "published" design, or of a sum of products of two
    factors of a structure, two of what views share and two of what they do not ("product").
    share: of these, or of the variance of what the label is the sign of, that are of a single view; the rest are of several.
    label: structures that the label is made of; unless given all.
    steps, strength: of the training, and of augmentations by noise.
    """

    hierarchy: Hierarchy
    n: int
    noise_variance: float
    design: str = "sum"
    share: float = 0.5
    label: tuple[Structure, ...] = ()
    steps: int = 2000
    strength: float = 1.0
    weights: tuple[float, ...] = field(init=False, repr=False, compare=False)
    """Of every factor, or pair of factors, of the label."""

    def __post_init__(self) -> None:
        if self.n < 2 * BATCH:
            raise ValueError(f"n_grid: holds {self.n}; expected at least {2 * BATCH} samples")
        if not 0 <= self.noise_variance < float("inf"):
            raise ValueError(f"noise_variance: is {self.noise_variance}; expected a number from 0 on")
        if self.design not in DESIGNS:
            raise ValueError(f"design: unknown {self.design!r}; expected one of {', '.join(DESIGNS)}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: holds {self.share}; expected shares from 0 to 1")
        if self.steps < 1:
            raise ValueError(f"steps: is {self.steps}; expected at least 1")
        if not self.strength >= 0:
            raise ValueError(f"strength: holds {self.strength}; expected numbers from 0 on")
        named = {self.hierarchy.present(s, "label") for s in self.label}
        object.__setattr__(self, "label", tuple(s for s in self.hierarchy.structures if s in named))
        object.__setattr__(self, "weights", label_weights(self))

    @property
    def draw_name(self) -> str:
        """Names the data."""
        fields = {"design": self.design} | hierarchy_fields(self.hierarchy) | {"n": str(self.n)}
        fields |= {"noise_variance": number_name(self.noise_variance), "share": number_name(self.share)}
        if self.label:
            fields["label"] = "+".join(map(structure_name, self.label))
        return join_fields(fields)

    @property
    def name(self) -> str:
        """`key=value` in a fixed order, defaults left out, as `path_name` makes it."""
        fields = {} if self.steps == 2000 else {"steps": str(self.steps)}
        fields |= {} if self.strength == 1 else {"strength": number_name(self.strength)}
        return path_name(",".join(filter(None, [self.draw_name, join_fields(fields)])))

    def columns(self) -> dict[str, str | int | float]:
        """The cell's columns of a tidy table."""
        return {
            "cell": self.name,
            "n": self.n,
            "noise_variance": self.noise_variance,
            "design": self.design,
            "share": self.share,
            "label": "+".join(map(structure_name, self.label)),
            "training_steps": self.steps,
            "strength": self.strength,
            **hierarchy_columns(self.hierarchy),
        }


def label_weights(cell: FactorclCell) -> tuple[float, ...]:
    """The weight in the label of every factor, or of every pair of neighbours: 1 for the first so many of every structure, in a
    sum of products √ of what the share leaves to its level."""
    design = DESIGNS[cell.design]
    weights: dict[Structure, np.ndarray] = {}
    of_label = cell.label or cell.hierarchy.structures
    for s, rank in cell.hierarchy.ranks:
        places, share = rank // 2 if design.pairs else rank, cell.share if len(s) == 1 else 1 - cell.share
        alike = [other for other in of_label if (len(other) == 1) == (len(s) == 1)]
        weights[s] = np.zeros(places)
        if s not in of_label or share == 0:
            continue
        if design.pairs:
            count = max(1, design.coordinates // (2 * len(alike)))
            weights[s][:count] = math.sqrt(share / (len(alike) * count))
        else:
            exact = design.coordinates * share / len(alike)
            count = round(exact)
            weights[s][:count] = 1
            if abs(count - exact) > 1e-9:
                raise ValueError(
                    f"share: holds {cell.share}, which makes {exact:.3g} factors of {structure_name(s)}; expected whole"
                )
        if count > places:
            raise ValueError(f"rank: of {structure_name(s)} is {rank}; expected more, for {count} of its factors in the label")
    total = sum(map(np.sum, weights.values()))
    if not total:
        raise ValueError("label: names no structure of the share's level; expected one")
    return tuple(float(w) for s in cell.hierarchy.structures for w in weights[s])


class Drawn(eqx.Module):
    """Rows of all views, their factors and labels: the last `N_TEST` are for testing."""

    x: Float[Array, "n d"]
    z: Float[Array, "n K"]
    y: Int[Array, " n"]
    key: Array


@dataclass(frozen=True)
class DrawSpec:
    """What the program that draws is compiled for."""

    hierarchy: Hierarchy
    dtype: str
    n: int
    design: str


def draw(spec: DrawSpec, shared: PyTree, replicate: Array) -> Drawn:
    """One replicate: loadings, rows, labels."""
    seed, checksum, noise_variance, weights = shared
    key = jr.fold_in(jr.fold_in(jr.key(seed), checksum), replicate)
    k_loadings, k_rows, k_method = jr.split(key, 3)
    hierarchy, dtype, design = spec.hierarchy, jnp.dtype(spec.dtype), DESIGNS[spec.design]
    sample = jr.uniform if design.positive else jr.normal
    entries = sample(k_loadings, hierarchy.mask.shape, dtype)
    scale = np.ones(hierarchy.n_features) if design.positive else 1 / np.sqrt(hierarchy.mask.sum(axis=1))
    truth = Truth(jnp.where(hierarchy.mask, entries * jnp.asarray(scale, dtype)[:, None], 0), noise_variance, hierarchy)
    x, z = sample_observations(k_rows, truth, spec.n + N_TEST)
    parts = [z[:, hierarchy.columns(s)] for s in hierarchy.structures]
    if design.pairs:
        parts = [part[:, 0 : 2 * (part.shape[1] // 2) : 2] * part[:, 1::2] for part in parts]
    y = jnp.concatenate(parts, axis=1) @ weights > 0
    return Drawn(x, z, y.astype(jnp.int32), jr.key_data(k_method))


class Coded(eqx.Module):
    """Codes of all rows: the encoders', and those of every part by its structure's name, where the method has parts."""

    codes: Float[Array, "n R"]
    parts: dict[str, Float[Array, "n _r"]]
    status: Int[Array, ""]
    steps: Int[Array, ""]


@dataclass(frozen=True)
class CodeSpec:
    """What the program that makes codes is compiled for."""

    hierarchy: Hierarchy
    n: int
    steps: int
    strength: float

    @classmethod
    def of(cls, cell: FactorclCell, method: str) -> "CodeSpec":
        """Of networks that count no factors, the ranks are left out: they share programs."""
        told = cell.hierarchy
        if method != "hcl":
            told = Hierarchy(told.dims, dict.fromkeys(told.structures, 1))
        if method in VARIANTS and VARIANTS[method].shared_only:
            told = Hierarchy(told.dims, {s: rank for s, rank in told.ranks if len(s) > 1})
        return cls(told, cell.n, cell.steps, cell.strength)


def contrast_config(method: str, n_classes: int, steps: int = 2000, strength: float = 1.0) -> Any:
    """The configuration of a method: at most so many steps in batches of 128, at a rate of 10⁻³ at first, and no task's loss."""
    if method == UNTRAINED:
        return dataclasses.replace(contrast_config("factorcl-sup", n_classes), training=TrainingConfig(steps=0))
    variant = VARIANTS[method]
    config = configuration(variant.network)
    if variant.network == "hcl":
        return config
    own = {"patience": steps, "keep": "last"} if variant.last else {}
    training = dataclasses.replace(config.training, steps=steps, batch_size=BATCH, learning_rate=LEARNING_RATE, **own)
    options = {"n_classes": n_classes, "task_weight": 0.0, "strength": strength, "training": training}
    return dataclasses.replace(config, **options | variant.options)


def code(method: str, spec: CodeSpec, drawn: Drawn) -> Coded:
    """The method fitted to the first n rows, and its codes of all."""
    hierarchy = spec.hierarchy
    views = [drawn.x[:, hierarchy.rows(m)] for m in hierarchy.modalities]
    if method == RAW:
        return Coded(drawn.x, {}, jnp.asarray(CONVERGED, jnp.int32), jnp.zeros((), jnp.int32))
    key = jr.fold_in(jr.wrap_key_data(drawn.key), np.uint32(zlib.crc32(method.encode())))
    variant = VARIANTS.get(method, Variant("factorcl"))
    labels = {"y": drawn.y[: spec.n]} if variant.supervised else {}
    train = [view[: spec.n] for view in views]
    config = contrast_config(method, 2, spec.steps, spec.strength)
    fitted: Any = NETWORKS[variant.network](train, hierarchy, config=config, key=key, **labels)
    codes, parts = codes_of(fitted, views)
    return Coded(codes, parts, fitted.status, fitted.steps)


def codes_of(fitted: NetworkFit, views: list[Float[Array, "n _d"]]) -> tuple[Array, dict[str, Array]]:
    """(the encoders' codes, those of every part)."""
    scores, hierarchy = fitted.transform(views), fitted.hierarchy
    if fitted.method == "hcl":
        return scores, {structure_name(s): scores[:, hierarchy.columns(s)] for s in hierarchy.structures}
    if not isinstance(fitted.network, factorcl.Factorcl):
        return scores, {}
    heads, X = fitted.network.heads, jnp.concatenate(views, axis=1)
    z = fitted.network.embeddings(fitted.standardised(X))
    owners = factorcl.heads_of(hierarchy, fitted.config)
    parts: dict[str, list[Array]] = {}
    for (m, name), s in owners.items():
        parts.setdefault(structure_name(s), []).append(heads[m, name](z[m - 1]))
    return jnp.concatenate(z, axis=1), {name: jnp.concatenate(held, axis=1) for name, held in parts.items()}


def code_metrics(hierarchy: Hierarchy, n: int, item: tuple[Array, Array, Coded]) -> Outcome:
    """What codes hold: linear probes fitted to the first n rows, and judged on the others.

    | name | definition |
    |---|---|
    | `accuracy` | of the label, from the encoders' codes |
    | `r_squared`, `information` | by structure: R² of its factors, and Gaussian information in nats, from these codes |
    | `part_accuracy` | by structure: accuracy from the codes of its part |
    | `part_S`, `nats_S` | by structure: R² of its factors, and information, from the codes of the part S |
    """
    z, y, coded = item
    names = [structure_name(s) for s in hierarchy.structures]

    def held(codes: Array) -> tuple[Array, Array]:
        codes = codes.astype(z.dtype)
        explained = r_squared(codes, z, n)
        of = [hierarchy.columns(s) for s in hierarchy.structures]
        nats = [gaussian_information(codes, z[:, columns], n) for columns in of]
        return jnp.stack([explained[columns].mean() for columns in of]), jnp.stack(nats)

    explained, nats = held(coded.codes)
    outcome: Outcome = {"accuracy": accuracy(coded.codes.astype(z.dtype), y, n), "r_squared": explained, "information": nats}
    for name, codes in coded.parts.items():
        outcome[f"part_{name}"], outcome[f"nats_{name}"] = held(codes)
    if coded.parts:
        missing = jnp.full((), jnp.nan, z.dtype)
        found = {name: accuracy(codes.astype(z.dtype), y, n) for name, codes in coded.parts.items()}
        outcome["part_accuracy"] = jnp.stack([found.get(name, missing) for name in names])
    return outcome | {"status": coded.status, "steps": coded.steps}


@lru_cache
def draw_program(spec: DrawSpec, batched: bool) -> Callable[..., Drawn]:
    """(shared, replicates, counts) -> the draws of all replicates, each on its device."""
    return spread(partial(draw, spec), batched)


@lru_cache
def code_program(method: str, spec: CodeSpec, batched: bool) -> Callable[..., Coded]:
    """(None, draws, counts) -> the codes of all replicates."""
    return spread(lambda _, drawn: code(method, spec, drawn), batched, runs_long=method != RAW)


@lru_cache
def metrics_program(hierarchy: Hierarchy, n: int, batched: bool) -> Callable[..., Outcome]:
    """(None, (factors, labels, codes), counts) -> the metrics of all replicates."""
    return spread(lambda _, item: code_metrics(hierarchy, n, item), batched)


@dataclass(frozen=True)
class Factorcl:
    """The study of FactorCL."""

    study: str = "factorcl"

    def check(self, cell: FactorclCell, method: str) -> None:
        """Whatever a method refuses is found when its program is traced."""

    def draw_key(self, cell: FactorclCell, dtype: str) -> DrawSpec:
        return DrawSpec(cell.hierarchy, dtype, cell.n, cell.design)

    def draw_program(self, cell: FactorclCell, dtype: str, batched: bool) -> Callable[..., Drawn]:
        return draw_program(self.draw_key(cell, dtype), batched)

    def shared_arguments(self, cell: FactorclCell, seed: int, dtype: str) -> tuple:
        number = np.dtype(dtype).type
        checksum = zlib.crc32(cell.draw_name.encode())
        return np.uint32(seed), np.uint32(checksum), number(cell.noise_variance), np.asarray(cell.weights, dtype)

    def stages(self, cell: FactorclCell, method: str, batched: bool) -> tuple[Stage, ...]:
        program = code_program(method, CodeSpec.of(cell, method), batched)
        metrics = metrics_program(cell.hierarchy, cell.n, batched)
        return (
            Stage(method, program, lambda drawn, _: drawn),
            Stage(f"{method}:metrics", metrics, lambda drawn, coded: (drawn.z, drawn.y, coded)),
        )

    def structures(self, cell: FactorclCell, method: str) -> tuple[Structure, ...]:
        return cell.hierarchy.structures

    def numbers_drawn(self, cell: FactorclCell) -> int:
        return (cell.n + N_TEST) * (2 * cell.hierarchy.n_features + cell.hierarchy.n_factors)
