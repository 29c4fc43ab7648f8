"""Which structures and ranks data support: read off variational posteriors, checked by permutations and on halves of the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key
from scipy.optimize import linear_sum_assignment

from hcl_jax.compiled import compiled
from hcl_jax.covariance import SampleCovariance, check_covariance
from hcl_jax.estimators.group_factors import Found, group_factors, principal_start
from hcl_jax.estimators.missing import PatternMoments
from hcl_jax.estimators.reduced_patterns import reduced_patterns
from hcl_jax.estimators.variational import Posterior
from hcl_jax.fisher import pool
from hcl_jax.reduced import Moments, ReducedViews, reduced_covariance, reduced_rows
from hcl_jax.structure import Hierarchy, Structure, as_hierarchy
from hcl_jax.views import as_key, as_number, check_count

FLOOR = 0.01
"""Share of a view's variance that a column has to explain to count there."""
COLUMNS = 32
"""A search opens a power of 2 times as many, so that data of one kind find the program that is there."""
ROOM = 0.75  # share of the open columns that may be in use: a search that needs more gets twice as many
COMPLETIONS = 2  # of rows that lack views, by what was found
UNSTABLE = 0.5
"""Cosine of halves below which a structure is called unstable."""


class Evidence(NamedTuple):
    """Log posterior odds of presence against absence, in nats at even prior odds: of every column, and of its block in every
    modality given that it is there."""

    columns: Float[Array, " K"]
    blocks: Float[Array, "M K"]


@dataclass(frozen=True)
class Selection:
    """The structures and ranks that data support."""

    hierarchy: Hierarchy
    offered: Hierarchy | None
    """None where any structure was."""
    odds: dict[Structure, tuple[float, ...]]
    """Log posterior odds of the columns of every structure that is kept, largest first."""
    variance_explained: dict[tuple[int, Structure], float]
    """The share of the variance of view m that the columns of a structure explain."""
    at_cap: dict[Structure, bool]
    """Of every structure offered or kept: whether there may be more columns than are kept, as it has all that it could have."""
    status: int
    """Of the last fit: 0 converged, 1 out of steps, 2 non-finite, 3 with the noise of a view on its bound."""


class Stability(NamedTuple):
    """Mean cosine of a structure's Gram matrices in two halves of the data, and its standard deviation over splits."""

    cosine: float
    spread: float

    @property
    def unstable(self) -> bool:
        return not self.cosine >= UNSTABLE


@dataclass(frozen=True)
class PermutationNull:
    """What is found of each shared structure where the rows of every view are permuted, so that nothing is shared."""

    kept: dict[Structure, np.ndarray]
    """How many columns, by permutation; structures that the hierarchy lacks are here where they were found."""
    explained: dict[Structure, np.ndarray]
    """The share of variance that its best columns, as many as its rank, explain in the view where each explains least."""
    observed: dict[Structure, float]
    """The same of the data as they are."""

    @property
    def p_values(self) -> dict[Structure, float]:
        """(1 + how many permutations explain as much)/(1 + permutations), of every shared structure of the hierarchy."""
        return {s: float((1 + (null >= self.observed[s]).sum()) / (1 + len(null))) for s, null in self.explained.items()}


@compiled
def evidence(posterior: Posterior, covariance: SampleCovariance, hierarchy: Hierarchy) -> Evidence:
    """By how much the bound falls when a block, or a column with its scores, is taken out and the rest stays.

    A block alone, given the scores: ½ Σ_j [E[λ_jk]²/C_jkk + log(α_k C_jkk)], the marginal likelihood of the block's regressions
    with the prior over that without. A column: the sum of its blocks less what its scores cost, (ν/2)(Ω_kk − 1 + log (C_z⁻¹)_kk),
    their divergence from the prior. What the rest would gain by adapting is left out, so presence is favoured a little.
    """
    variances = posterior.variances(hierarchy)
    kept = variances > 0
    held = jnp.where(kept, variances, 1)
    prior = jnp.diagonal(posterior.prior, axis1=1, axis2=2)
    alpha = jnp.repeat(1 / jnp.where(prior > 0, prior, 1), np.array(hierarchy.dims), axis=0, total_repeat_length=len(variances))
    gains = jnp.where(kept, posterior.mean**2 / held + jnp.log(held * alpha), 0)
    blocks = pool(gains, hierarchy, "view") / 2
    scores = posterior.scores(covariance, hierarchy)
    cost = covariance.nu / 2 * (jnp.diagonal(scores.omega) - 1 + jnp.log(jnp.diagonal(scores.precision)))
    return Evidence(blocks.sum(axis=0) - cost, blocks)


def found_columns(odds: Evidence, hierarchy: Hierarchy) -> dict[Structure, list[int]]:
    """The columns that the data support, by the structure of the modalities in which they do: the ranks and structures that
    `hcl-vb` finds when it is given more than there are.

    A block, and a column, counts where its posterior odds exceed the number of those offered: at the prior odds that leave one
    of them to chance, presence is then the more probable.
    """
    columns, blocks = np.asarray(odds.columns), np.asarray(odds.blocks)
    seen = (blocks > np.log(hierarchy.modality_mask.sum())) & (columns > np.log(hierarchy.n_factors))[None, :]
    found: dict[Structure, list[int]] = {}
    for column in np.flatnonzero(seen.any(axis=0)):
        structure = tuple(int(m) + 1 for m in np.flatnonzero(seen[:, column]))
        found.setdefault(structure, []).append(int(column))
    return found


class _Column(NamedTuple):
    """A column that is there: the views in which it is, its odds, and the share that it explains of every view."""

    pattern: Structure
    odds: float
    shares: np.ndarray


def shares_of(found: Found, reduced: ReducedViews) -> np.ndarray:
    """The share of a view's variance that each column explains, M × K."""
    mean = np.asarray(found.posterior.mean, float)
    return np.einsum("mqk,mqr,mrk->mk", mean, reduced.metrics, mean)


def _seen(found: Found, reduced: ReducedViews, floor: float) -> np.ndarray:
    """Which blocks count, M × K: by odds as in `found_columns`, and where the column explains the floor."""
    columns, blocks = np.asarray(found.column_odds), np.asarray(found.block_odds)
    return (blocks > np.log(blocks.size)) & (columns > np.log(columns.size)) & (shares_of(found, reduced) >= floor)


def _present(found: Found, reduced: ReducedViews, floor: float) -> list[_Column]:
    """The columns that stand out in some view, those of the largest odds first."""
    seen, shares, columns = _seen(found, reduced, floor), shares_of(found, reduced), np.asarray(found.column_odds)
    listed = [
        _Column(tuple(int(m) + 1 for m in np.flatnonzero(seen[:, k])), float(columns[k]), shares[:, k])
        for k in np.flatnonzero(seen.any(axis=0))
    ]
    return sorted(listed, key=lambda column: -column.odds)


def _open_fit(moments: Moments, n_columns: int) -> Found:
    """The fit in which every view may have a block of every column."""
    member = jnp.ones((len(moments.dims), n_columns), bool)
    return group_factors(moments, member, principal_start(moments, n_columns))


def _bucket(needed: float) -> int:
    """The least number of columns that a search opens which is no less."""
    return next(size for size in (COLUMNS * 2**k for k in count()) if size >= needed)


def _searched(reduced: ReducedViews, floor: float) -> tuple[Found, list[_Column]]:
    """(fit, columns) with so many columns open that not all are needed."""
    moments = reduced.moments
    size = _bucket(((reduced.visible > 0) & (reduced.visible >= floor)).sum(axis=1).max() / ROOM)
    most = _bucket(min(float(moments.dims.sum()), float(moments.nu)))
    while True:
        found = _open_fit(moments, size)
        present = _present(found, reduced, floor)
        if len(present) <= ROOM * size or size >= most:
            return found, present
        size *= 2


def _as_offered(pattern: Structure, structures: Sequence[Structure] | None) -> list[Structure]:
    """The structures that make up for a pattern: itself where it is offered, as all are where there is no list; else the smallest
    offered one that holds it; else the largest ones in it that together leave the least of it."""
    if structures is None or pattern in structures:
        return [pattern]
    holding = [s for s in structures if set(pattern) <= set(s)]
    if holding:
        return [min(holding, key=len)]
    parts, left = [], set(pattern)
    for s in sorted((s for s in structures if set(s) <= left), key=lambda s: -len(s)):
        if set(s) <= left:
            parts.append(s)
            left -= set(s)
    return parts


def select_structures(
    covariance: SampleCovariance | PatternMoments,
    offered: Hierarchy | None = None,
    *,
    dims: Sequence[int] | None = None,
    noise: str = "view",
    grow: bool = True,
    floor: float = FLOOR,
) -> Selection:
    """The structures and ranks that data support, with the evidence.

    Views are reduced to principal axes in units of their noise (`hcl_jax.reduced`); a variational fit then opens every block of
    every column to find those that there are (`hcl_jax.estimators.group_factors`). A column counts in the views where its
    posterior odds exceed the number of blocks that were open, and where it explains at least the `floor`, a share of the view's
    variance: below it, odds tell what the data depart from the model by. Its structure is the set of these views; where a list
    `offered` lacks it, the smallest offered structure that holds it, or those that make it up.

    With `grow` the offered ranks are a beginning: structures get what is found, within what features and samples can tell.
    Without it they are caps. Without a hierarchy, views of these `dims` are offered every structure, and none is listed before it
    is found, so that there may be tens of views. `noise`: variances by view or by feature; one for all is the former, with views
    that happen to agree. Rows that lack views come as `PatternMoments`, and are completed by what is found. Raises `ValueError`
    when no column stands out, and for arguments that cannot be.
    """
    as_number(floor, "floor", "a share from 0 to 1", lambda share: 0 <= share < 1)
    sizes = _sizes(covariance, offered, dims)
    if offered is None and not grow:
        raise ValueError("grow: is False; expected True, or a hierarchy whose ranks are the caps")
    if isinstance(covariance, PatternMoments):
        reduced, found, present = _searched_by_pattern(covariance, noise, floor)
    else:
        reduced = reduced_covariance(covariance, sizes, noise)
        found, present = _searched(reduced, floor)
    structures = None if offered is None else offered.structures
    caps = None if offered is None or grow else dict(offered.ranks)
    kept, refused = _placed(present, sizes, structures, caps, min(sum(sizes), int(reduced.moments.nu)) - 1)
    if not kept:
        n_offered = found.column_odds.shape[0] if offered is None else offered.n_factors
        raise ValueError(f"covariance: supports none of the {n_offered} columns offered; expected a visible factor")
    hierarchy = Hierarchy(sizes, {s: len(columns) for s, columns in kept.items()})
    listed = structures or (*hierarchy.structures, *sorted(refused - set(hierarchy.structures)))
    at_cap = {s: s in refused or (caps is not None and hierarchy.rank(s) == caps[s]) for s in listed}
    explained = {(m, s): float(sum(c.shares[m - 1] for c in kept[s])) for s in hierarchy.structures for m in s}
    odds = {s: tuple(column.odds for column in kept[s]) for s in hierarchy.structures}
    return Selection(hierarchy, offered, odds, explained, at_cap, int(found.status))


def _sizes(covariance: Any, offered: Hierarchy | None, dims: Sequence[int] | None) -> tuple[int, ...]:
    """The numbers of features of the views. Raises `ValueError` where nothing says them, and unless they are the covariance's."""
    if offered is not None:
        _check_features(covariance, offered, "offered")
        return offered.dims
    _check_kind(covariance)
    known = covariance.dims if isinstance(covariance, PatternMoments) else dims
    if known is None:
        raise ValueError("offered, dims: expected a hierarchy, or the numbers of features of the views")
    for dim in known:
        check_count(dim, "dims", 1)
    sizes = tuple(int(dim) for dim in known)
    _check_sizes(covariance, sizes, "dims")
    return sizes


def _check_kind(covariance: Any) -> None:
    """Raise `ValueError` unless these are moments that structures can be selected from."""
    if not isinstance(covariance, PatternMoments):
        check_covariance(covariance)


def _check_features(covariance: Any, hierarchy: Any, argument: str) -> None:
    """Raise `ValueError` that names the argument unless it is a hierarchy of the covariance's features."""
    _check_kind(covariance)
    _check_sizes(covariance, as_hierarchy(hierarchy, argument).dims, argument)


def _check_sizes(covariance: Any, dims: tuple[int, ...], argument: str) -> None:
    """Raise `ValueError` that names the argument unless the covariance is one of views of these sizes."""
    by_view = isinstance(covariance, PatternMoments)
    features = sum(covariance.dims) if by_view else covariance.n_features
    if sum(dims) != features or (by_view and dims != covariance.dims):
        raise ValueError(f"{argument}: has dims {dims}; expected those of the views, {features} features in all")


def _searched_by_pattern(moments: PatternMoments, noise: str, floor: float) -> tuple[ReducedViews, Found, list[_Column]]:
    """(views, fit, columns) of rows that lack views: first by the rows that have both of two, which do not quite agree with each
    other and so make faint columns; then by rows that the columns found have completed."""
    patterns = reduced_patterns(moments, noise)
    reduced = patterns.views
    found, present = _searched(reduced, floor)
    for _ in range(COMPLETIONS):
        posterior = found.posterior
        loadings = np.where(_seen(found, reduced, floor)[:, None, :], np.asarray(posterior.mean, float), 0)
        reduced = patterns.completed(loadings, np.asarray(posterior.noise, float))
        found = _open_fit(reduced.moments, found.column_odds.shape[0])
        present = _present(found, reduced, floor)
    return reduced, found, present


def _placed(
    present: list[_Column],
    dims: Sequence[int],
    structures: Sequence[Structure] | None,
    caps: dict[Structure, int] | None,
    room: int,
) -> tuple[dict[Structure, list[_Column]], set[Structure]]:
    """(columns by structure, structures that got fewer than were found), those of the largest odds first: within the caps, the
    features of every view, and `room` columns in all."""
    kept: dict[Structure, list[_Column]] = {}
    refused, left = set(), dict(enumerate(dims, start=1))
    for column in present:
        for s in _as_offered(column.pattern, structures):
            full = caps is not None and len(kept.get(s, ())) >= caps[s]
            if full or room < 1 or any(left[m] < 1 for m in s):
                refused.add(s)
                continue
            kept.setdefault(s, []).append(column)
            room -= 1
            for m in s:
                left[m] -= 1
    return kept, refused


def select(covariance: SampleCovariance, hierarchy: Hierarchy, *, noise: str = "feature") -> Hierarchy:
    """The structures and ranks that data support, of those that a generous hierarchy offers and within its ranks, as
    `select_structures` finds them.

    `noise`: that of a feature is its own, unless it is known to be that of its view or of all. Raises `ValueError` when no column
    stands out, and for arguments that cannot be.
    """
    _check_features(covariance, hierarchy, "hierarchy")
    return select_structures(covariance, hierarchy, noise=noise, grow=False).hierarchy


def _shared(shares: np.ndarray, structure: Structure, rank: int) -> float:
    """The variance that the best columns explain in the view of a structure where each explains least."""
    least = np.sort(shares[[m - 1 for m in structure]].min(axis=0))
    return float(least[::-1][:rank].sum())


def permutation_null(
    views: Any,
    hierarchy: Hierarchy,
    *,
    permutations: int = 20,
    key: Key[Array, ""],
    noise: str = "view",
    floor: float = FLOOR,
    scaled: bool = True,
) -> PermutationNull:
    """What `select_structures` finds of shared structures where nothing is shared, and how much variance it explains: the rows of
    each view are permuted by themselves, which leaves all that a view has of its own as it is.

    Private structures are no part of it: permutations do not change what they are. All permutations go through one program.
    Raises `ValueError` as `reduced_rows` does, for other views than the hierarchy has, and for bad options.
    """
    key = as_key(key, "to permute rows with")
    check_count(permutations, "permutations", 1)
    reduced = _reduced_as(views, hierarchy, noise, scaled)
    found, present = _searched(reduced, floor)
    size = found.column_odds.shape[0]
    rng, fits = _generator(key), []
    for _ in range(permutations):
        rows = np.stack([view[rng.permutation(len(view))] for view in np.swapaxes(_rows(reduced), 0, 1)], axis=1)
        fit = _open_fit(reduced.of_rows(rows), size)
        fits.append((shares_of(fit, reduced), [column.pattern for column in _present(fit, reduced, floor)]))
    shared = [s for s in hierarchy.structures if len(s) > 1]
    others = {s for _, patterns in fits for s in patterns if len(s) > 1} - set(shared)
    kept = {s: np.array([patterns.count(s) for _, patterns in fits]) for s in (*shared, *sorted(others))}
    explained = {s: np.array([_shared(table, s, hierarchy.rank(s)) for table, _ in fits]) for s in shared}
    observed = {s: _shared(shares_of(found, reduced), s, hierarchy.rank(s)) for s in shared}
    return PermutationNull(kept, explained, observed)


def _rows(reduced: ReducedViews) -> np.ndarray:
    assert reduced.rows is not None, "they were reduced from rows"
    return reduced.rows


def _generator(key: Key[Array, ""]) -> np.random.Generator:
    """NumPy's, whose orders of rows need no program for every number of them."""
    return np.random.default_rng(np.asarray(jr.key_data(key)))


def _reduced_as(views: Any, hierarchy: Hierarchy, noise: str, scaled: bool) -> ReducedViews:
    """The views reduced. Raises `ValueError` unless they are those of the hierarchy."""
    reduced = reduced_rows(views, noise, scaled=scaled)
    found = tuple(int(dim) for dim in reduced.moments.dims)
    if found != as_hierarchy(hierarchy).dims:
        raise ValueError(f"views: have {found} features; expected {hierarchy.dims}")
    return reduced


def half_split_stability(
    views: Any, hierarchy: Hierarchy, *, splits: int = 10, key: Key[Array, ""], noise: str = "view", scaled: bool = True
) -> dict[Structure, Stability]:
    """How alike the structures are that two halves of the rows give: the cosine of their Gram matrices Λ_sΛ_sᵀ, by structure.

    Each half is searched as `select_structures` does, its columns are given to the structures of the hierarchy that they are
    nearest to, and the hierarchy is fitted from there: nothing passes from one half to the other. Gram matrices are what is
    identified; their cosine weighs directions by the variance that they explain, where subspaces of scores would count a faint
    column as much as a strong one. Every view is scaled to a variance of 1, so that large ones do not decide. Raises `ValueError`
    as `permutation_null` does.
    """
    key = as_key(key, "to split rows with")
    check_count(splits, "splits", 1)
    reduced = _reduced_as(views, hierarchy, noise, scaled)
    n, rng = len(_rows(reduced)), _generator(key)
    if n < 6:
        raise ValueError(f"views: have {n} rows; expected at least 6, three in each half")
    cosines = []
    for _ in range(splits):
        order = rng.permutation(n)
        A, B = (_loadings_of_half(reduced, hierarchy, half) for half in np.array_split(order, 2))
        cosines.append([_gram_cosine(A, B, reduced.metrics, hierarchy, s) for s in hierarchy.structures])
    table = np.array(cosines)
    spreads = table.std(axis=0, ddof=1) if splits > 1 else np.full(len(hierarchy.structures), np.nan)
    return {s: Stability(float(c), float(sd)) for s, c, sd in zip(hierarchy.structures, table.mean(axis=0), spreads, strict=True)}


def _loadings_of_half(reduced: ReducedViews, hierarchy: Hierarchy, half: np.ndarray) -> np.ndarray:
    """M × q × K loadings of the hierarchy fitted to some of the rows."""
    moments = reduced.of_rows(_rows(reduced)[half])
    size = _bucket(hierarchy.n_factors / ROOM)
    free = _open_fit(moments, size)
    signs = np.where(hierarchy.modality_mask, 1, -1)
    levels = np.log1p(shares_of(free, reduced) / FLOOR) - np.log(2)  # positive above the floor
    columns, slots = linear_sum_assignment(levels.T @ signs, maximize=True)
    start = np.zeros_like(np.asarray(free.posterior.mean))
    start[:, :, slots] = np.asarray(free.posterior.mean)[:, :, columns]
    member = np.pad(hierarchy.modality_mask, ((0, 0), (0, size - hierarchy.n_factors)))
    return np.asarray(group_factors(moments, jnp.asarray(member), jnp.asarray(start)).posterior.mean, float)


def _gram_cosine(A: np.ndarray, B: np.ndarray, metrics: np.ndarray, hierarchy: Hierarchy, structure: Structure) -> float:
    """⟨AAᵀ, BBᵀ⟩/(‖AAᵀ‖‖BBᵀ‖) of the columns of a structure; 0 where one of them is empty."""
    columns = hierarchy.columns(structure)

    def inner(left: np.ndarray, right: np.ndarray) -> float:
        gram = np.einsum("mqk,mqr,mrl->kl", left[:, :, columns], metrics, right[:, :, columns])
        return float((gram**2).sum())

    size = inner(A, A) * inner(B, B)
    return inner(A, B) / size**0.5 if size > 0 else 0.0
