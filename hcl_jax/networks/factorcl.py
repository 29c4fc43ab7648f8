"""FactorCL: what views share about a task, and what each has for itself, by bounds of mutual information (Liang et al. 2023).

I(X₁,X₂;Y) = S + U₁ + U₂, S = I(X₁;X₂) − I(X₁;X₂|Y) and U₁ = I(X₁;Y) − I(X₁;X₂) + I(X₁;X₂|Y). What is to grow is bounded from
below (InfoNCE, "nce"), what is to fall from above (NCE-CLUB, "club"). Without labels a changed copy of the views stands for Y.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from hcl_jax.networks.augmentation import AUGMENTATIONS, Augmentation, augmented, find_spared, none_spared
from hcl_jax.networks.independence import binned, club, first_label, info_nce, same_label, two_way_info_nce
from hcl_jax.networks.modules import CRITICS, Concatenated, Constant, Perceptron, Separable, redrawn, whitened
from hcl_jax.networks.network import (
    HEAD,
    Method,
    Network,
    NetworkConfig,
    NetworkFit,
    Rows,
    check_modalities,
    check_widths,
    fit_network,
)
from hcl_jax.networks.training import Batch, Critics, TrainingConfig
from hcl_jax.structure import Hierarchy, Structure, structure_name
from hcl_jax.views import check_options

Head = tuple[int, str]
"""(View, part or term): whose code a head makes, and for what."""


class Preset(NamedTuple):
    """What tells the variants apart; see the options of the same names."""

    inputs: Literal["normal", "standardised"]
    heads: Literal["part", "term"]
    critic: Literal["separable", "concatenated"]
    condition: Literal["mask", "concatenate"]
    augmentation: Augmentation
    scores: Literal["heads", "backbones"]
    floor: bool
    codes: Literal["plain", "whitened"]
    critic_speed: float
    critic_steps: int


PRESETS = {
    "default": Preset("normal", "part", "separable", "mask", "noise", "heads", True, "whitened", 3.0, 3),
    "published": Preset("standardised", "term", "concatenated", "concatenate", "published", "backbones", False, "plain", 1.0, 1),
}


@dataclass(frozen=True)
class FactorclConfig(NetworkConfig):
    """Options of `fit`. None: as the variant has it, filled in when the configuration is made.

    variant: "published" has the losses of the authors' code, the slip of its self-supervised conditional CLUB included.
    inputs: as of every network; None: "normal" for the default variant, "standardised" for the published one.
    mode: "pairwise" has a shared part for every pair of views and a unique one for every view, "lattice" a part for every
    structure of the hierarchy. With two views and all their structures they are the same.
    heads: "part" has one for every view and part, used by all bounds that define the part, "term" one for every view and bound,
    as published: then what an upper bound pushes out of its own head nothing else ever sees.
    critic: "separable" or "concatenated"; the second takes n² passes of its network a batch of n.
    condition: on labels; "mask" compares samples of one label and shows the critic the label, "concatenate" shows it to the
    critic on the left side alone, as published, which estimates I((X₁,Y);X₂). A response that is a number is cut into bins for
    the mask. On copies it is always by concatenation.
    augmentation, strength: see `augmentation.augmented`.
    scores: what `transform` returns, codes of the "heads" or of the "backbones".
    floor: upper bounds below 0 count as 0, and cannot fall without end.
    codes: what critics see of the codes of a batch. "plain" ones can be hidden from them: made small, they carry as much
    information, and critics of upper bounds need long to find it. Those that are "whitened" have no scale.
    critic_speed: the learning rate of the critics of upper bounds, as a multiple of that of the rest. critic_steps: their steps
    after each of the others.
    club_weight: of the upper bounds, beside 1 of the lower ones.
    width: of all codes. hidden, head_hidden, critic_hidden: widths of hidden layers; the authors have width 128, 512, 512 and
    512; 128 and 128; and 512 and 512.
    """

    presets: ClassVar = PRESETS
    training: TrainingConfig = TrainingConfig(weight_decay=0.0)
    variant: Literal["default", "published"] = "default"
    inputs: Literal["normal", "standardised"] | None = None  # type: ignore[assignment]
    mode: Literal["pairwise", "lattice"] = "pairwise"
    heads: Literal["part", "term"] | None = None
    critic: Literal["separable", "concatenated"] | None = None
    condition: Literal["mask", "concatenate"] | None = None
    augmentation: Augmentation | None = None
    strength: float = 1.0
    scores: Literal["heads", "backbones"] | None = None
    floor: bool | None = None
    codes: Literal["plain", "whitened"] | None = None
    critic_speed: float | None = None
    critic_steps: int | None = None
    club_weight: float = 1.0
    width: int = 16
    hidden: tuple[int, ...] = (128, 128)
    head_hidden: tuple[int, ...] = (32,)
    critic_hidden: tuple[int, ...] = (64,)

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {
            "mode": ("pairwise", "lattice"),
            "heads": ("part", "term"),
            "critic": tuple(CRITICS),
            "condition": ("mask", "concatenate"),
            "augmentation": AUGMENTATIONS,
            "scores": ("heads", "backbones"),
            "codes": ("plain", "whitened"),
        }
        check_options(
            self,
            choices=choices,
            positive=("critic_speed",),
            least={"strength": 0, "club_weight": 0, "critic_steps": 1, "width": 1},
        )
        check_widths(self, "hidden", "head_hidden", "critic_hidden", least=1)
        if self.mode == "lattice" and self.heads == "term":
            raise ValueError("heads: is 'term'; expected 'part' for the lattice, whose parts are told apart by their codes")


class Term(NamedTuple):
    """One bound: of the information between the codes of views, or between a view's code and the response (`right` empty)."""

    name: str
    upper: bool
    structure: Structure
    left: tuple[int, ...]
    right: tuple[int, ...]
    given: bool
    """Whether it is conditional on the response."""
    weight: float

    @property
    def of_response(self) -> bool:
        return self.given or not self.right

    def critic(self, labelled: bool) -> str:
        """The name of its critic, another one with copies in place of the response."""
        return self.name if labelled or not self.of_response else f"{self.name}'"


def structures(hierarchy: Hierarchy, config: FactorclConfig) -> tuple[Structure, ...]:
    """What has a part."""
    views = tuple(hierarchy.modalities)
    if config.mode == "lattice":
        return hierarchy.structures
    return (*combinations(views, 2), *((m,) for m in views))


def terms(hierarchy: Hierarchy, config: FactorclConfig) -> tuple[Term, ...]:
    """All bounds of the objective; both orders of two views or groups of views are one term.

    Structure A of several views: mean_{a∈A} [NCE(X_a; X_A∖a) − CLUB(X_a; X_A∖a | Y)], and in the lattice − CLUB(X_A; all others),
    which leaves to A what only its views share. Of one view a: NCE(X_a; Y) − CLUB(X_a; X_others) + NCE(X_a; X_others | Y); with
    two views the last two are the same for both, and count once.
    """
    found: dict[str, Term] = {}
    views = tuple(hierarchy.modalities)

    def add(kind: str, structure: Structure, left: Structure, right: Structure, given: bool = False, weight: float = 1.0) -> None:
        if right:
            left, right = sorted((left, right))
        name = f"{kind}({structure_name(left)};{structure_name(right) if right else 'y'}{'|y' if given else ''})"
        before = found[name].weight if name in found else 0.0
        found[name] = Term(name, kind != "nce", structure, left, right, given, before + weight)

    for s in structures(hierarchy, config):
        if len(s) > 1:
            for a in s:
                others = tuple(m for m in s if m != a)
                add("nce", s, (a,), others, weight=1 / len(s))
                add("club", s, (a,), others, given=True, weight=1 / len(s))
            outside = tuple(m for m in views if m not in s)
            if config.mode == "lattice" and outside:
                add("only", s, s, outside)
        else:
            others = tuple(m for m in views if m not in s)
            weight = 1 / 2 if len(views) == 2 and len(_unique(hierarchy, config)) == 2 else 1.0
            add("nce", s, s, ())
            add("club", s, s, others, weight=weight)
            add("nce", s, s, others, given=True, weight=weight)
    return tuple(found.values())


def applies(term: Term, labelled: bool, config: FactorclConfig) -> bool:
    """Whether a term counts. Conditions on copies go by concatenation, which estimates I((X₁,X₁');(X₂,X₂')) ≥ I(X₁;X₂): on codes
    that other terms share, an upper bound of it takes away all that InfoNCE finds, and a lower one brings back what CLUB takes
    away. They count only where every term has heads of its own, as published."""
    return labelled or not term.given or config.heads == "term"


def _unique(hierarchy: Hierarchy, config: FactorclConfig) -> list[Structure]:
    return [s for s in structures(hierarchy, config) if len(s) == 1]


def heads_of(hierarchy: Hierarchy, config: FactorclConfig) -> dict[Head, Structure]:
    """All heads, in the order of their columns, and of which structure their codes are."""
    if config.heads == "part":
        return {(m, structure_name(s)): s for s in structures(hierarchy, config) for m in s}
    held = [(m, term) for term in terms(hierarchy, config) for m in (*term.left, *term.right)]
    return {(m, term.name): term.structure if len(term.structure) > 1 else (m,) for m, term in held}


def head_of(m: int, term: Term, heads: Any) -> Head | None:
    """What stands for view m in a term: the term's own head, else that of the term's structure if the view is in it, else that
    of what is unique to the view; None, its backbone, where there is none, and outside of a structure that is to exclude it."""
    if (m, term.name) in heads:
        return m, term.name
    if m in term.structure:
        return m, structure_name(term.structure)
    unique = (m, structure_name((m,)))
    return unique if unique in heads and len(term.structure) == 1 else None


class Factorcl(Network):
    """Encoders, heads on their codes, critics of lower and of upper bounds, and the supervised head."""

    backbones: tuple[Perceptron, ...]
    heads: dict[Head, Perceptron]
    lower: dict[str, Separable | Concatenated]
    upper: dict[str, Separable | Concatenated]
    head: Perceptron
    spared: tuple[Constant, ...]
    """Directions that "conditioned" copies leave alone."""
    columns: tuple[Head, ...] = eqx.field(static=True)
    """Heads whose codes are the scores; none: the backbones' are."""
    terms: tuple[Term, ...] = eqx.field(static=True)

    def embeddings(self, views: tuple[Rows, ...]) -> list[Float[Array, "n r"]]:
        """Codes of the backbones."""
        return [backbone(x) for backbone, x in zip(self.backbones, views, strict=True)]

    def scores(self, views: tuple[Rows, ...], present: Bool[Array, "n M"] | None = None) -> Float[Array, "n R"]:
        """Codes side by side; those of an absent view are those of its mean."""
        z = self.embeddings(views)
        return jnp.concatenate([self.heads[m, part](z[m - 1]) for m, part in self.columns] or z, axis=1)

    def outputs(self, views: tuple[Rows, ...]) -> Float[Array, "n o"]:
        return self.head(self.scores(views))


def build(key: Key[Array, ""], hierarchy: Hierarchy, config: FactorclConfig) -> Factorcl:
    """Random encoders, heads and critics; those for labels and those for copies, as training may go from one to the other."""
    dtype, r = jnp.dtype(config.training.dtype), config.width
    perceptron = lambda *widths: Perceptron(key, widths, dtype=dtype)  # drawn anew below
    heads = heads_of(hierarchy, config)
    assert config.critic is not None, "filled in when the configuration was made"
    critics: dict[bool, dict[str, Separable | Concatenated]] = {False: {}, True: {}}
    for term in terms(hierarchy, config):
        for labelled in (True, False):
            if not applies(term, labelled, config):
                continue
            p, q = _widths(term, config, labelled)
            critics[term.upper][term.critic(labelled)] = CRITICS[config.critic](key, p, q, config.critic_hidden, dtype)
    columns = tuple(heads) if config.scores == "heads" else ()
    network = Factorcl(
        backbones=tuple(perceptron(d, *config.hidden, r) for d in hierarchy.dims),
        heads={head: perceptron(r, *config.head_hidden, r) for head in heads},
        lower=critics[False],
        upper=critics[True],
        head=perceptron((len(columns) or hierarchy.n_modalities) * r, HEAD, config.n_outputs),
        spared=none_spared(hierarchy, config),
        columns=columns,
        terms=terms(hierarchy, config),
    )
    return redrawn(key, network)


def _widths(term: Term, config: FactorclConfig, labelled: bool) -> tuple[int, int]:
    """Of what the term's critic sees on its left and on its right."""
    left, right = config.width * len(term.left), config.width * len(term.right)
    if not term.right:
        number = 1 if config.variant == "published" else config.n_outputs
        return left, number if labelled else config.width
    if not term.given:
        return left, right
    if not labelled:
        return 2 * left, 2 * right
    return left + config.n_outputs, right + (config.n_outputs if config.condition == "mask" else 0)


class Sides(NamedTuple):
    """What the bounds of one batch are made of."""

    embeddings: tuple[tuple[Rows, ...], ...]
    """By view: the backbone's codes, and where there are no labels those of the copies."""
    codes: dict[Head, tuple[Rows, ...]]
    """The same by head."""
    label: Float[Array, "n o"] | None
    number: Float[Array, "n _o"] | None
    """The label as a partner of its own: as the published code has it, one number."""
    alike: Bool[Array, "n n"] | None


def sides(network: Factorcl, batch: Batch, copies: tuple[Rows, ...] | None, config: FactorclConfig) -> Sides:
    """Codes of a batch and of its copies, and its labels."""
    seen = batch.views if copies is None else tuple(map(jnp.concatenate, zip(batch.views, copies, strict=True)))
    z = network.embeddings(seen)
    seen_as = whitened if config.codes == "whitened" else lambda code: code
    split = lambda code: tuple(jnp.split(seen_as(code), 1 if copies is None else 2))
    codes = {(m, part): split(head(z[m - 1])) for (m, part), head in network.heads.items()}
    embeddings = tuple(map(split, z))
    if batch.y is None:
        return Sides(embeddings, codes, None, None, None)
    dtype = z[0].dtype
    label = batch.y if config.n_classes is None else jax.nn.one_hot(batch.y, config.n_classes, dtype=dtype)
    number = first_label(batch.y)[:, None].astype(dtype) if config.variant == "published" else label
    alike = same_label(binned(first_label(batch.y))) if config.condition == "mask" else None
    return Sides(embeddings, codes, label, number, alike)


def scores_of(network: Factorcl, term: Term, held: Sides, config: FactorclConfig) -> Float[Array, "n n"]:
    """The critic's scores of all pairs of a left and a right side."""
    critic = (network.upper if term.upper else network.lower)[term.critic(held.label is not None)]

    def of(views: Sequence[int], copy: bool = False) -> Rows:
        codes = []
        for m in views:
            head = head_of(m, term, network.heads)
            if head is None:  # the view is no part of the structure, and need not hide from it
                codes.append(jax.lax.stop_gradient(held.embeddings[m - 1][copy]))
            else:
                codes.append(held.codes[head][copy])
        return jnp.concatenate(codes, axis=1)

    if not term.right:
        right = of(term.left, copy=True) if held.number is None else held.number
        return critic(of(term.left), right)
    left, right = of(term.left), of(term.right)
    if term.given and held.label is not None:
        left = jnp.concatenate([left, held.label], axis=1)
        right = jnp.concatenate([right, held.label], axis=1) if config.condition == "mask" else right
    elif term.given:
        copy = not (config.variant == "published" and term.upper)  # the released code has the views themselves twice
        left, right = (jnp.concatenate([of(views), of(views, copy=copy)], axis=1) for views in (term.left, term.right))
    return critic(left, right)


def lower_bound(scores: Float[Array, "n n"], alike: Bool[Array, "n n"] | None, config: FactorclConfig) -> Float[Array, ""]:
    """InfoNCE: the mean of both ways to normalise, or as published for every right side over the left ones."""
    return info_nce(scores.T, alike) if config.variant == "published" else two_way_info_nce(scores, alike)


def _copies(key: Key[Array, ""], network: Factorcl, batch: Batch, config: FactorclConfig) -> tuple[Rows, ...] | None:
    if batch.y is not None:
        return None
    assert config.augmentation is not None, "filled in when the configuration was made"
    return augmented(key, batch.views, config.augmentation, config.strength, network.spared)


def bounds(
    network: Factorcl, batch: Batch, copies: tuple[Rows, ...] | None, config: FactorclConfig
) -> dict[str, Float[Array, ""]]:
    """Every term's bound, without its weight and sign; by labels, or unless given by copies."""
    held = sides(network, batch, copies, config)
    parts = {}
    for term in network.terms:
        if not applies(term, batch.y is not None, config):
            continue
        scores, alike = scores_of(network, term, held, config), held.alike if term.given else None
        parts[term.name] = club(scores, alike) if term.upper else lower_bound(scores, alike, config)
    return parts


def objective(network: Factorcl, parts: dict[str, Float[Array, ""]], config: FactorclConfig) -> Float[Array, ""]:
    """Upper bounds less lower ones, by their weights; upper ones below the floor count as 0."""
    total = jnp.zeros((), next(iter(parts.values())).dtype)
    for term in network.terms:
        if term.name not in parts:
            continue
        value = parts[term.name]
        upper = config.club_weight * (jax.nn.relu(value) if config.floor else value)
        signed = upper if term.upper else -value
        total = total + term.weight * signed
    return total


def loss(
    network: Factorcl, batch: Batch, key: Key[Array, ""], config: FactorclConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What encoders, heads and the critics of lower bounds minimise; see `fit`."""
    parts = bounds(network, batch, _copies(key, network, batch, config), config)
    return objective(network, parts, config), parts


def upper_loss(network: Factorcl, held: Sides, config: FactorclConfig) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Minus InfoNCE of the critics of upper bounds: its best critic is the one that the upper bound is for."""
    parts = {
        term.name: -lower_bound(scores_of(network, term, held, config), held.alike if term.given else None, config)
        for term in network.terms
        if term.upper and applies(term, held.label is not None, config)
    }
    return jnp.sum(jnp.stack([*parts.values()])), parts


def learning(
    network: Factorcl, batch: Batch, key: Key[Array, ""], config: FactorclConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """What the critics of upper bounds minimise."""
    return upper_loss(network, sides(network, batch, _copies(key, network, batch, config), config), config)


def upper_critics(network: Factorcl) -> dict[str, Any]:
    """Those that take turns with the rest."""
    return network.upper


def membership(hierarchy: Hierarchy, config: FactorclConfig) -> np.ndarray:
    """A head's columns are those of its structure's views, a backbone's of its view."""
    M, heads = hierarchy.n_modalities, heads_of(hierarchy, config)
    owners = list(heads.values()) if config.scores == "heads" else [(m,) for m in hierarchy.modalities]
    held = np.array([[m in owner for owner in owners] for m in range(1, M + 1)])
    return np.repeat(held, config.width, axis=1)


def check(hierarchy: Hierarchy, config: FactorclConfig) -> None:
    """Raise `ValueError` for a single view."""
    check_modalities(hierarchy, "views are compared")


METHOD = Method(
    "factorcl", FactorclConfig, build, loss, membership, find_spared, check=check, critics=Critics(upper_critics, learning)
)


def fit(
    views: Any, hierarchy: Hierarchy, config: FactorclConfig = FactorclConfig(), *, y: Any = None, key: Any, **options: Any
) -> NetworkFit:
    """FactorCL on rows: with a response the supervised objective, without one the self-supervised, copies in its place.

    Least Σ CLUB − Σ NCE over the terms of every part (`terms`), one optimiser for encoders, heads and critics of lower bounds;
    the critics of upper bounds follow each step with `critic_steps` of their own, on minus InfoNCE. Scores are the codes of all
    heads, part by part, or those of the backbones. `task_weight=0` leaves the representation to the bounds, to be probed: the
    supervised head then learns nothing. Untrained encoders are those of `TrainingConfig(steps=0)`. Options as in `fit_network`.

    Departures of the default variant from the authors' code: codes by part, separable critics, conditions by mask, both ways to
    normalise, upper bounds that count from 0 on; see `FactorclConfig`. Critics of upper bounds see training rows only.
    """
    return fit_network(METHOD, views, hierarchy, config, y=y, key=key, **options)
