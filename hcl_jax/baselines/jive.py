"""JIVE: parts of the data that all views share, and parts of one view each (Lock et al., 2013; O'Connell and Lock, 2016)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from hcl_jax.alignment import align_globally
from hcl_jax.baselines.linear import check_given_ranks, check_view_ranks, given_ranks, joint_then_individual, stack_blocks
from hcl_jax.compiled import compiled
from hcl_jax.fitted import LinearFit, stack_views
from hcl_jax.linalg import (
    GUARD,
    Anderson,
    improved_left_vectors,
    inverse_root,
    largest_roots,
    leading_left_vectors,
    least_squares_map,
    principal_axes,
    singular_values,
)
from hcl_jax.structure import CONVERGED, NON_FINITE, OUT_OF_STEPS, Hierarchy, as_hierarchy
from hcl_jax.views import as_key, centred, check_options, view_norms

WARM_FROM = 3  # times the columns of the warm-started basis: from this size of a matrix on it beats an eigendecomposition


@dataclass(frozen=True)
class JiveConfig:
    """Options of `fit`.

    ranks: "given", by "permutation" (Lock et al., 2013) or by "bic" (O'Connell and Lock, 2016).
    joint_rank, individual_ranks: the given ranks, or the largest ones that a selection considers (its arrays are that wide).
        None: of the hierarchy. Given, the joint rank is that of the structure of all views, and a view's individual rank the sum
        over all other structures that contain it. Considered, an individual rank may be that of all structures that contain the
        view, and the joint rank the smallest of these.
    orthogonal_individual: whether the individual scores of different views are kept orthogonal as well. The model of the 2013
        paper does not; the R package does by default. The iteration then need not lower the objective, and where it ends
        depends on where it starts.
    start: of the alternation. "zero": individual parts of 0, so that the first joint part is the best approximation of all data;
        "r.jive": the R package's −1 in every entry, on its own scale. "shared": the directions that the views' leading score
        spaces, of r_J + r_m columns each, have most in common (where AJIVE begins). With factors that some views share, the
        other two first take the strongest for joint; from "shared" the objective ended no higher wherever this was tried, and
        up to thirty times fewer steps were needed.
    tolerance: the iteration stops when neither part changes by more than this times the norm of the data (at least 100
        roundings), or after max_steps.
    n_permutations, level: the null distribution's draws, and the level of the permutation test of every singular value.
    round_tolerance: stands in for `tolerance` in the fits between rounds, which only serve the next choice of ranks.
    max_rounds: of choosing ranks and fitting anew; a selection by permutation ends when the ranks repeat.
    scale_views: to Frobenius norm 1 each, as the papers do; else the noise keeps what it has in common between views.
    """

    ranks: str = "given"
    joint_rank: int | None = None
    individual_ranks: tuple[int, ...] | None = None
    orthogonal_individual: bool = False
    start: str = "shared"
    tolerance: float = 1e-6
    max_steps: int = 1000
    n_permutations: int = 100
    level: float = 0.05
    round_tolerance: float = 1e-4
    max_rounds: int = 10
    scale_views: bool = True

    def __post_init__(self) -> None:
        check_options(
            self,
            choices={"ranks": ("given", "permutation", "bic"), "start": ("shared", "zero", "r.jive")},
            positive=("tolerance", "round_tolerance"),
            least={"max_steps": 1, "n_permutations": 1, "max_rounds": 1},
        )
        check_given_ranks(self.joint_rank, self.individual_ranks)
        if not 0 < self.level < 1:
            raise ValueError(f"level: is {self.level}; expected a number between 0 and 1")


class _Parts(NamedTuple):
    """J = V_J L_Jᵀ and A_m = V_m L_mᵀ in coordinates of the sample space, unused columns zero; V's orthonormal otherwise."""

    joint: Float[Array, "q r"]
    joint_loadings: Float[Array, "d r"]
    individual: tuple[Float[Array, "q _r"], ...]
    individual_loadings: tuple[Float[Array, "_p _r"], ...]
    status: Int[Array, ""]
    steps: Int[Array, ""]

    def joint_part(self) -> Float[Array, "q d"]:
        return self.joint @ self.joint_loadings.T

    def individual_part(self) -> Float[Array, "q d"]:
        pairs = zip(self.individual, self.individual_loadings, strict=True)
        return jnp.concatenate([V @ L.T for V, L in pairs], axis=1)


def fit(
    views: Any,
    hierarchy: Hierarchy,
    config: JiveConfig = JiveConfig(),
    *,
    y: Any = None,
    key: Any = None,
) -> LinearFit:
    """Z_m = J_m + A_m + E_m of every view, minimising ‖E‖²_F subject to joint and individual scores being orthogonal.

    Z are the centred views, each divided by its Frobenius norm; [J_1 … J_M] has rank r_J and A_m rank r_m. The alternation of
    Lock et al. (2013), Section 2.4 and supplement: J is the best approximation of Z − A of its rank; A_m is that of
    (I − V_J V_Jᵀ)Z_m. `objective` is ‖E‖²_F; the columns of `factors` are V_J (joint, shared by all views), then V_m of each
    view, orthonormal within each block, and V_JᵀV_m = 0. The response is not used, the key only by permutations.

    Scores of rows, old and new, are the least-squares scores on all loadings together, which is where the alternating
    prediction of the R package ends. At the fixed point those of the training rows are the factors, as E is orthogonal to every
    loading there; with `orthogonal_individual` an individual score may differ by what its view has in the directions of the
    other views' individual scores, which the constraint forbids to the factors.

    Everything runs on the min(n, d) × d triangle of a QR decomposition. Where a large matrix needs few singular vectors these
    take one Rayleigh–Ritz step a sweep from the last ones: same fixed points, and the objective still never rises. With
    `orthogonal_individual`, whose end depends on the path, every sweep decomposes exactly.

    A selection by permutation starts at ranks of 0 and repeats: joint rank by the singular values of Z − A against those with
    the samples of each view permuted, never below the last; individual ranks by those of Z_m − J_m against those with the
    entries of every variable permuted; fit. By BIC: the one further rank that lowers BIC most, until none does.

    Raises `ValueError` for what `check_views` refuses, a key that is needed and missing, and ranks that do not fit.
    """
    return _decomposition(_checked(views, hierarchy), hierarchy, config, key)


@compiled
def _decomposition(X: Float[Array, "n d"], hierarchy: Hierarchy, config: JiveConfig, key: Any) -> LinearFit:
    """The fit to views side by side."""
    n, d = X.shape
    widths = _widths(hierarchy, config, n)
    edges = tuple(int(edge) for edge in np.cumsum([0, *hierarchy.dims]))
    Z, centre, _ = centred(X)
    scale = view_norms(Z, hierarchy.dims if config.scale_views else (d,))
    Z = Z / scale[None, :]
    basis, core = jnp.linalg.qr(Z) if n > d else (None, Z)
    if config.start == "r.jive":  # the direction of constant scores, which centred data lack
        core = jnp.concatenate([core, jnp.zeros((1, d), X.dtype)])

    def scores_of(V: Float[Array, "q r"]) -> Float[Array, "n r"]:
        rows = V[: min(n, d)]
        scores = rows if basis is None else basis @ rows
        return scores + V[-1:] / np.sqrt(n).item() if config.start == "r.jive" else scores

    at_ranks = partial(_solve, core, n, edges, widths, config)
    if config.ranks == "given":
        parts = at_ranks(jnp.array(widths, jnp.int32), config.tolerance)
    elif config.ranks == "permutation":
        parts = _by_permutation(at_ranks, core, Z, scores_of, edges, widths, config, as_key(key, "for the permutations"))
    else:
        parts = _by_bic(at_ranks, core, n, edges, widths, config)

    loadings = jnp.concatenate([parts.joint_loadings, stack_blocks(parts.individual_loadings, hierarchy.dims)], axis=1)
    used = jnp.any(loadings != 0, axis=0)
    return LinearFit(
        centre=centre,
        scale=scale,
        loadings=loadings,
        factors=scores_of(jnp.concatenate([parts.joint, *parts.individual], axis=1)),
        score_map=least_squares_map(loadings),
        membership=jnp.asarray(joint_then_individual(widths[0], widths[1:])) & used[None, :],
        objective=jnp.sum((core - parts.joint_part() - parts.individual_part()) ** 2),
        status=parts.status,
        steps=parts.steps,
        dims=hierarchy.dims,
    )


def _checked(views: Any, hierarchy: Hierarchy) -> Float[Array, "n d"]:
    X = stack_views(views, as_hierarchy(hierarchy).dims)
    if X.shape[0] < 2:
        raise ValueError(f"views: have {X.shape[0]} rows; expected at least 2")
    return X


def _widths(hierarchy: Hierarchy, config: JiveConfig, n: int) -> tuple[int, ...]:
    """(joint, individual of every view): the given ranks, or the largest that a selection considers."""
    most = min(n - 1, hierarchy.n_features)
    joint, individual = given_ranks(hierarchy)
    if config.ranks != "given":
        seen = [joint + rank for rank in individual]
        joint, individual = min(*seen, most), tuple(min(t, n - 1, p) for t, p in zip(seen, hierarchy.dims, strict=True))
    joint = joint if config.joint_rank is None else config.joint_rank
    individual = individual if config.individual_ranks is None else config.individual_ranks
    if joint > most:
        raise ValueError(f"joint_rank: is {joint}; expected at most {most} for {n} rows")
    check_view_ranks("individual_ranks", individual, hierarchy.dims, n)
    return (joint, *individual)


def _with_guard(width: int, shape: tuple[int, ...]) -> int:
    """Columns to track: with a guard where these are improved from sweep to sweep, which pays in a large matrix."""
    return width + GUARD if width and WARM_FROM * 2 * (width + GUARD) <= min(shape) else width


def _leading(matrix: Float[Array, "q p"], tracked: Float[Array, "q k"], width: int) -> Float[Array, "q k"]:
    """The leading left vectors: improved from the tracked ones if there is a guard among them, else decomposed."""
    k = tracked.shape[1]
    return improved_left_vectors(matrix, tracked) if k > width else leading_left_vectors(matrix, k)


class _Problem(NamedTuple):
    """The compressed data with all that is known before the first sweep."""

    core: Float[Array, "q d"]
    rows: list[Float[Array, "q _p"]]
    masks: list[Bool[Array, " _r"]]
    start: Float[Array, "q d"] | None
    shared_start: bool
    tolerance: Float[Array, ""]

    def decomposed_start(self, k: int) -> Float[Array, "q k"]:
        """The leading left vectors of Z − A at the start, or of the views' own leading score spaces side by side."""
        if self.shared_start:
            widths = [min(self.masks[0].size + mask.size, *Z.shape) for Z, mask in zip(self.rows, self.masks[1:], strict=True)]
            ranks = [self.masks[0].sum() + mask.sum() for mask in self.masks[1:]]
            spaces = [
                jnp.where((jnp.arange(width) < rank)[None, :], leading_left_vectors(Z, width), 0)
                for Z, width, rank in zip(self.rows, widths, ranks, strict=True)
            ]
            return leading_left_vectors(jnp.concatenate(spaces, axis=1), k)
        if self.start is None:
            return leading_left_vectors(self.core, k)
        return jnp.linalg.svd(self.core - self.start, full_matrices=False)[0][:, :k]  # too large for a Gram matrix

    def block(
        self, matrix: Float[Array, "q p"], vectors: Float[Array, "q k"], block: int
    ) -> tuple[Float[Array, "q r"], Float[Array, "p r"]]:
        """(V, L) of the approximation V Lᵀ of the block's rank; directions without variance are left out."""
        V = vectors[:, : self.masks[block].size]
        L = matrix.T @ V
        active = self.masks[block] & (jnp.linalg.norm(L, axis=0) > 100 * jnp.finfo(L.dtype).eps)
        return jnp.where(active[None, :], V, 0), jnp.where(active[None, :], L, 0)


def _solve(
    core: Float[Array, "q d"],
    n: int,
    edges: tuple[int, ...],
    widths: tuple[int, ...],
    config: JiveConfig,
    ranks: Int[Array, " blocks"],
    tolerance: float | Float[Array, ""],
) -> _Parts:
    """The fit at (r_J, r_1, …, r_M), at most `widths`."""
    rows = [core[:, a:b] for a, b in pairwise(edges)]
    masks = [jnp.arange(width, dtype=ranks.dtype) < rank for width, rank in zip(widths, ranks, strict=True)]
    start = None
    if config.start == "r.jive":  # −1 in every entry of views of norm 1/√(nd)
        start = jnp.zeros_like(core).at[-1].set(-n * np.sqrt(core.shape[1]).item())
    relative = jnp.maximum(jnp.asarray(tolerance, core.dtype), 100 * jnp.finfo(core.dtype).eps)
    smallest_move = relative * jnp.linalg.norm(core)
    problem = _Problem(core, rows, masks, start, config.start == "shared", smallest_move)
    plain = config.orthogonal_individual or not widths[0]
    parts, change = (_alternate if plain else _accelerate)(problem, config)
    moving = change > smallest_move
    healthy = moving | (jnp.isfinite(change) & jnp.isfinite(core).all())
    status = jnp.where(healthy, jnp.where(moving, OUT_OF_STEPS, CONVERGED), NON_FINITE)
    return parts._replace(status=status.astype(jnp.int32))


def _move(parts: _Parts, old: _Parts) -> Float[Array, ""]:
    """The larger change of the joint and the individual part."""
    joint = jnp.linalg.norm(parts.joint_part() - old.joint_part())
    return jnp.maximum(joint, jnp.linalg.norm(parts.individual_part() - old.individual_part()))


def _alternate(problem: _Problem, config: JiveConfig) -> tuple[_Parts, Float[Array, ""]]:
    """The plain alternation, and its last change. Every sweep decomposes exactly, so that the path is that of the R package."""
    core, rows, masks = problem.core, problem.rows, problem.masks
    n_views, orthogonal = len(rows), config.orthogonal_individual
    edges = np.cumsum([0, *(Z.shape[1] for Z in rows)])

    def sweep(vectors: Float[Array, "q r"], D: Float[Array, "q d"], V: list, first: bool) -> _Parts:
        V_J, L_J = problem.block(D, vectors, 0)
        V, L = list(V), []
        for m, (a, b) in enumerate(pairwise(edges)):
            left = _without(V_J, rows[m] - V_J @ L_J[a:b].T)
            if orthogonal and not first:
                left = _without_others(V, m, left)
            V[m], L_m = problem.block(left, leading_left_vectors(left, masks[m + 1].size), m + 1)
            L.append(L_m)
        if orthogonal and first:
            projected = [_without_others(V, m, V[m] @ L[m].T) for m in range(n_views)]
            pairs = [problem.block(A, leading_left_vectors(A, masks[m + 1].size), m + 1) for m, A in enumerate(projected)]
            V, L = [V_m for V_m, _ in pairs], [L_m for _, L_m in pairs]
        zero = jnp.zeros((), jnp.int32)
        return _Parts(V_J, L_J, tuple(V), tuple(L), status=zero, steps=zero + 1)

    def step(state: tuple[_Parts, Float[Array, ""]]) -> tuple[_Parts, Float[Array, ""]]:
        old, _ = state
        D = core - old.individual_part()
        parts = sweep(leading_left_vectors(D, masks[0].size), D, list(old.individual), first=False)
        return parts._replace(steps=old.steps + 1), _move(parts, old)

    def unfinished(state: tuple[_Parts, Float[Array, ""]]) -> Bool[Array, ""]:
        return (state[1] > problem.tolerance) & (state[0].steps < config.max_steps)

    D = core if problem.start is None else core - problem.start
    nothing = [jnp.zeros((core.shape[0], mask.size), core.dtype) for mask in masks[1:]]
    first = sweep(problem.decomposed_start(masks[0].size), D, nothing, first=True)
    return lax.while_loop(unfinished, step, (first, jnp.array(jnp.inf, core.dtype)))


class _Search(NamedTuple):
    """Accepted parts, where to go next, and what the extrapolation remembers."""

    parts: _Parts
    value: Float[Array, ""]
    tracked: tuple[Float[Array, "q _k"], ...]
    next: Float[Array, "q r"]
    plain: Float[Array, "q r"]
    is_plain: Bool[Array, ""]
    memory: Anderson
    change: Float[Array, ""]


def _accelerate(problem: _Problem, config: JiveConfig) -> tuple[_Parts, Float[Array, ""]]:
    """The alternation as a map V_J ↦ V_J, extrapolated, and its last change.

    Given V_J the best individual parts are known, so that ‖E‖² is a function of V_J alone; an extrapolation that raises it is
    replaced by the plain step, which cannot. Bases are aligned with one another before differences are taken.
    """
    core, rows, masks = problem.core, problem.rows, problem.masks
    (q, _), width, dtype = core.shape, masks[0].size, core.dtype
    eps = jnp.finfo(dtype).eps

    def individual(V_J: Float[Array, "q r"], tracked: Sequence) -> tuple[tuple, tuple, tuple]:
        V, L, vectors = [], [], []
        for m, Z in enumerate(rows):
            left = _without(V_J, Z)
            vectors.append(_leading(left, tracked[m], masks[m + 1].size))
            V_m, L_m = problem.block(left, vectors[m], m + 1)
            V.append(V_m)
            L.append(L_m)
        return tuple(V), tuple(L), tuple(vectors)

    def step(state: _Search) -> _Search:
        V_J = state.next
        V, L, vectors = individual(V_J, state.tracked[1:])
        parts = _Parts(V_J, core.T @ V_J, V, L, state.parts.status, state.parts.steps + 1)
        D = core - parts.individual_part()
        value = jnp.sum((D - parts.joint_part()) ** 2)
        own = jnp.pad(masks[0], (0, state.tracked[0].shape[1] - width))
        joint = _leading(D, jnp.where(own[None, :], _padded(V_J, state.tracked[0]), state.tracked[0]), width)
        plain = align_globally(jnp.where(masks[0][None, :], joint[:, :width], 0), V_J)
        memory = state.memory.push(plain.ravel(), (plain - V_J).ravel())
        ahead = _nearest_frame(memory.extrapolate().reshape(q, width))
        change = _move(parts, state.parts)
        accepted = _Search(parts, value, (joint, *vectors), ahead, plain, memory.used == 0, memory, change)
        back = state._replace(
            parts=state.parts._replace(steps=state.parts.steps + 1),
            next=state.plain,
            is_plain=jnp.array(True),
            memory=Anderson.empty(q * width, dtype),
            change=jnp.full_like(state.change, jnp.inf),
        )
        worse = (value > state.value * (1 + 100 * eps)) & ~state.is_plain
        return jax.tree.map(lambda new, old: jnp.where(worse, old, new), accepted, back)

    def unfinished(state: _Search) -> Bool[Array, ""]:
        return (state.change > problem.tolerance) & (state.parts.steps < config.max_steps)

    joint = problem.decomposed_start(_with_guard(width, core.shape))
    V_J = jnp.where(masks[0][None, :], joint[:, :width], 0)
    vectors = [
        leading_left_vectors(_without(V_J, Z), _with_guard(mask.size, Z.shape)) for Z, mask in zip(rows, masks[1:], strict=True)
    ]
    zero, infinite = jnp.zeros((), jnp.int32), jnp.array(jnp.inf, dtype)
    nothing = tuple(jnp.zeros((q, mask.size), dtype) for mask in masks[1:])
    unloaded = tuple(jnp.zeros((Z.shape[1], mask.size), dtype) for Z, mask in zip(rows, masks[1:], strict=True))
    parts = _Parts(V_J, jnp.zeros((core.shape[1], width), dtype), nothing, unloaded, zero, zero)
    memory = Anderson.empty(q * width, dtype)
    start = _Search(parts, infinite, (joint, *vectors), V_J, V_J, jnp.array(True), memory, infinite)
    end = lax.while_loop(unfinished, step, start)
    V, L = end.parts.joint, end.parts.joint_loadings
    V, L = problem.block(core, V @ principal_axes(L), 0)  # singular vectors of the joint part
    return end.parts._replace(joint=V, joint_loadings=L), end.change


def _padded(V: Float[Array, "q r"], like: Float[Array, "q k"]) -> Float[Array, "q k"]:
    return jnp.zeros_like(like).at[:, : V.shape[1]].set(V)


def _nearest_frame(V: Float[Array, "q r"]) -> Float[Array, "q r"]:
    """The nearest matrix with orthonormal columns; columns of zeros stay."""
    return V @ inverse_root(V.T @ V)[0]


def _without(V: Float[Array, "q r"], matrix: Float[Array, "q p"]) -> Float[Array, "q p"]:
    return matrix - V @ (V.T @ matrix)


def _without_others(V: Sequence[Float[Array, "q _r"]], m: int, matrix: Float[Array, "q p"]) -> Float[Array, "q p"]:
    for other, vectors in enumerate(V):
        matrix = matrix if other == m else _without(vectors, matrix)
    return matrix


def _no_parts(at_ranks, n_blocks: int) -> tuple[Int[Array, " blocks"], _Parts]:
    ranks = jnp.zeros(n_blocks, jnp.int32)
    return ranks, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(at_ranks, ranks, 1.0))


def _by_permutation(at_ranks, core, Z, scores_of, edges, widths, config: JiveConfig, key: PRNGKeyArray) -> _Parts:
    """The fit at the ranks that permutations choose; out of steps where these still change in the last round."""

    def choose(parts: _Parts, key: PRNGKeyArray) -> Int[Array, " blocks"]:
        k_joint, k_individual = jr.split(key)
        observed = core - parts.individual_part()
        individual = zip(parts.individual, parts.individual_loadings, strict=True)
        rest = [Z[:, a:b] - scores_of(V) @ L.T for (a, b), (V, L) in zip(pairwise(edges), individual, strict=True)]
        null = joint_null(rest, widths[0], config.n_permutations, k_joint)
        ranks = [_leading_run(singular_values(observed, widths[0]), null, config.level)]
        observed = core - parts.joint_part()
        rest = Z - scores_of(parts.joint) @ parts.joint_loadings.T
        nulls = individual_nulls([rest[:, a:b] for a, b in pairwise(edges)], widths[1:], config.n_permutations, k_individual)
        for (a, b), width, null in zip(pairwise(edges), widths[1:], nulls, strict=True):
            ranks.append(_leading_run(singular_values(observed[:, a:b], width), null, config.level))
        return jnp.stack(ranks)

    def another(state) -> Bool[Array, ""]:
        _, changed, count, _ = state
        return changed & (count < config.max_rounds)

    def one_round(state):
        ranks, _, count, parts = state
        chosen = choose(parts, jr.fold_in(key, count))
        chosen = chosen.at[0].max(ranks[0])
        changed = jnp.any(chosen != ranks) | (count == 0)
        last = ~changed | (count + 1 == config.max_rounds)
        tolerance = jnp.where(last, config.tolerance, max(config.round_tolerance, config.tolerance)).astype(core.dtype)
        return chosen, changed, count + 1, at_ranks(chosen, tolerance)

    ranks, parts = _no_parts(at_ranks, len(widths))
    _, changed, _, parts = lax.while_loop(another, one_round, (ranks, jnp.array(True), jnp.zeros((), jnp.int32), parts))
    return parts._replace(status=jnp.where(changed & (parts.status == 0), 1, parts.status))


def _leading_run(observed: Float[Array, " k"], null: Float[Array, "draws k"], level: float) -> Int[Array, ""]:
    """How many of the first singular values exceed the null distribution's quantile of the same index."""
    cut = jnp.quantile(null, 1 - level, axis=0).astype(observed.dtype)
    return jnp.sum(jnp.cumprod((observed > cut).astype(jnp.int32))).astype(jnp.int32)


def _permutation(key: PRNGKeyArray, shape: tuple[int, ...]) -> Int[Array, "..."]:
    return jnp.argsort(jr.bits(key, shape), axis=-1)


def joint_null(rest: Sequence[Float[Array, "n _p"]], k: int, n_draws: int, key: PRNGKeyArray) -> Float[Array, "draws k"]:
    """The k largest singular values of [Y_1 … Y_M] with the samples of each view permuted, for every draw; in float32.

    Through the smaller Gram matrix: of the features, where only blocks between views change, or of the samples, where the views'
    own Gram matrices are permuted and added up. The first view can stay as it is.
    """
    rest = [Y.astype(jnp.float32) for Y in rest]
    n, d = rest[0].shape[0], sum(Y.shape[1] for Y in rest)

    def by_samples(grams: list[Float[Array, "n n"]], orders: Int[Array, "M1 n"]) -> Float[Array, "n n"]:
        return grams[0] + sum(gram[order][:, order] for gram, order in zip(grams[1:], orders, strict=True))

    def by_features(grams: list[Float[Array, "_p _p"]], orders: Int[Array, "M1 n"]) -> Float[Array, "d d"]:
        moved = [rest[0], *(Y[order] for Y, order in zip(rest[1:], orders, strict=True))]
        blocks = [[grams[i] if i == j else moved[i].T @ moved[j] for j in range(i + 1)] for i in range(len(moved))]
        full = [[blocks[max(i, j)][min(i, j)] for j in range(len(moved))] for i in range(len(moved))]
        return jnp.block([[b if i >= j else b.T for j, b in enumerate(row)] for i, row in enumerate(full)])

    grams = [Y @ Y.T if n <= d else Y.T @ Y for Y in rest]
    gram_of = by_samples if n <= d else by_features

    def draw(key: PRNGKeyArray) -> Float[Array, " k"]:
        return largest_roots(gram_of(grams, _permutation(key, (len(rest) - 1, n))), k)

    return lax.map(draw, jr.split(key, n_draws))


def individual_nulls(
    rest: Sequence[Float[Array, "n _p"]], ks: Sequence[int], n_draws: int, key: PRNGKeyArray
) -> list[Float[Array, "draws _k"]]:
    """The k_m largest singular values of every Y_m with the entries of each variable permuted, for every draw; in float32.

    One permutation a variable is drawn, the same for all views, as these are tested one by one; a draw then applies them to the
    rows in a new order. The permutations of each draw are independent and uniform, and it costs no sorting of n × p numbers.
    """
    k_pool, k_draws = jr.split(key)
    columns = [Y.T.astype(jnp.float32) for Y in rest]
    n = rest[0].shape[0]
    pool = _permutation(k_pool, (max(Y.shape[0] for Y in columns), n))

    def draw(key: PRNGKeyArray) -> tuple[Float[Array, " _k"], ...]:
        orders = _permutation(key, (n,))[pool]
        moved = [jnp.take_along_axis(Y, orders[: Y.shape[0]], axis=1) for Y in columns]
        return tuple(singular_values(Y, k) for Y, k in zip(moved, ks, strict=True))

    return list(lax.map(draw, jr.split(k_draws, n_draws)))


def bic(errors: Float[Array, " M"], ranks: Int[Array, " blocks"], n: int, dims: Sequence[int]) -> Float[Array, ""]:
    """Σ_m N_m log(SSE_m/N_m) + k log Σ N_m, with N_m = n p_m and k the free parameters of loadings and scores."""
    r, dtype = ranks.astype(errors.dtype), errors.dtype
    entries = jnp.array([n * p for p in dims], dtype)

    def orthonormal(size: int | Array, rank: Array) -> Array:
        return rank * size - rank * (rank - 1) / 2  # Σ_{j<r} (size − j)

    count = orthonormal(sum(dims), r[0]) + orthonormal(n, r[0])
    for p, rank in zip(dims, r[1:], strict=True):
        count = count + orthonormal(p, rank) + orthonormal(n - r[0], rank)
    held = jnp.where(errors > 0, errors, 1)
    return jnp.sum(jnp.where(errors > 0, entries * jnp.log(held / entries), 0)) + count * jnp.log(jnp.sum(entries))


def _by_bic(at_ranks, core, n: int, edges, widths, config: JiveConfig) -> _Parts:
    """The fit at the ranks that BIC chooses greedily, from none."""
    dims = [b - a for a, b in pairwise(edges)]
    largest = jnp.array(widths, jnp.int32)

    def criterion(parts: _Parts, ranks: Int[Array, " blocks"]) -> Float[Array, ""]:
        E = core - parts.joint_part() - parts.individual_part()
        errors = jnp.stack([jnp.sum(E[:, a:b] ** 2) for a, b in pairwise(edges)])
        return jnp.where(jnp.all(ranks <= largest), bic(errors, ranks, n, dims), jnp.inf)

    def candidate(ranks: Int[Array, " blocks"]) -> tuple[Float[Array, ""], _Parts]:
        parts = at_ranks(ranks, config.tolerance)
        return criterion(parts, ranks), parts

    def one_more(state):
        ranks, value, _, parts = state
        tried = ranks[None, :] + jnp.eye(len(widths), dtype=jnp.int32)
        values, fits = lax.map(candidate, tried)
        best = jnp.argmin(values)
        lower = values[best] < value
        chosen = jax.tree.map(lambda new, old: jnp.where(lower, new[best], old), fits, parts)
        return jnp.where(lower, tried[best], ranks), jnp.where(lower, values[best], value), lower, chosen

    ranks, parts = _no_parts(at_ranks, len(widths))
    start = (ranks, criterion(parts, ranks), jnp.array(True), parts)
    return lax.while_loop(lambda state: state[2], one_more, start)[-1]
