"""SLIDE (Gaynanova and Li, 2019): orthonormal scores, each seen by the views that its structure names.

Z, the views centred and each scaled to Frobenius norm 1, is decomposed as U Vᵀ + noise with UᵀU = I; V has the rows of view m
zero in every column whose structure leaves m out. The structures are given, or chosen along a penalised path by
bi-cross-validation.

Both problems are solved in V alone. For a given V the best orthonormal U is the polar factor of ZV, which leaves to minimise

    F(V) = ½‖V‖² − ‖ZV‖_* + λ Σ_{m,j} ‖V_m[:, j]‖,        ½‖Z − UVᵀ‖² = F(V) + ½‖Z‖² at λ = 0,

over V with the zero pattern. One step V ← shrink_λ(ZᵀU(V)) minimises over U and then over V, so F never rises; it needs ZᵀZ only,
and the number of rows no longer counts once that is formed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from hcl_jax.compiled import compiled
from hcl_jax.estimators.estimate import CONVERGED, NON_FINITE, OUT_OF_STEPS, default_tolerance
from hcl_jax.fitted import LinearFit, stack_views
from hcl_jax.linalg import inverse_root, leading_left_vectors, least_squares_map, singular_values, top_eigenpairs_of, triangle
from hcl_jax.structure import Hierarchy, as_hierarchy
from hcl_jax.views import as_key, centred, check_options, view_norms

DEFAULT_WIDTH = 64
LONGEST_STRIDE = 1e4  # of an extrapolation, in plain steps


@dataclass(frozen=True)
class SlideConfig:
    """Options of SLIDE; the paper's values where it has one.

    `ranks`: "given" takes every structure of the hierarchy as often as its rank; "bcv" chooses among the structures of the
    penalised path by bi-cross-validation, and uses of the hierarchy its dimensions only. `tolerance`: relative change of the
    loadings in one plain step at which a fit stops (None: 1e-8, in single precision 1e-4), or `max_steps`. `accelerate`:
    extrapolate (see `squarem`). The path has `n_penalties` penalties from the largest singular value of a view down to
    `smallest_penalty`; a penalty is done when a step lowers the objective by less than `path_tolerance`, or after
    `path_max_steps`. `width`: columns that the path starts with, one more than "bcv" can choose (None: 64, less where there are
    fewer rows or features). The paper starts with as many as the data have, at many times the cost; sparse structures, well
    below the width, come out the same. `folds`: of the rows, and of the features of each view; `fold_tolerance`: as `tolerance`,
    in the fits of the bi-cross-validation, whose errors it moves by some thousandths, as the package's own stop does.
    `scale_views`: to Frobenius norm 1 each, as the paper does; else the noise keeps what it has in common between views.

    Where noise is as strong as the signal the path may hold no shared structure at all, the penalised objective being lower with
    a column for each view: the bi-cross-validation then cannot choose what it would prefer.

    Raises `ValueError` that names the option when its value is out of range.
    """

    ranks: str = "given"
    tolerance: float | None = None
    max_steps: int = 5000
    accelerate: bool = True
    n_penalties: int = 50
    smallest_penalty: float = 0.01
    path_tolerance: float = 1e-6
    path_max_steps: int = 1000
    width: int | None = None
    folds: tuple[int, int] = (3, 3)
    fold_tolerance: float = 1e-3
    scale_views: bool = True

    def __post_init__(self) -> None:
        if self.ranks == "bcv" and not self.scale_views:
            raise ValueError("scale_views: is False; expected True with ranks='bcv', whose folds are scaled by view")
        check_options(
            self,
            choices={"ranks": ("given", "bcv")},
            positive=("tolerance", "path_tolerance", "fold_tolerance", "smallest_penalty"),
            least={"max_steps": 1, "path_max_steps": 1, "n_penalties": 1, "width": 2},
        )
        if len(self.folds) != 2 or min(self.folds) < 2:
            raise ValueError(f"folds: is {self.folds}; expected two numbers, of row and of column folds, each at least 2")


class FixedPoint(NamedTuple):
    """Where an iteration ended: the point, whether its last plain step moved it by at most the tolerance, and how many steps."""

    point: Any
    converged: Bool[Array, ""]
    steps: Int[Array, ""]


def squarem(
    step: Callable[[Any], tuple[Any, Float[Array, ""]]],
    start: Any,
    *,
    tolerance: float,
    max_steps: int,
    objective_tolerance: float = 0.0,
    accelerate: bool = True,
) -> FixedPoint:
    """A fixed point of `step`, which maps a point (a pytree) to the next one and to the objective *at the given point*.

    Squared extrapolation (Varadhan and Roland, 2008, scheme S3): from x₀ two plain steps x₁, x₂, then on to
    x₀ + 2a r + a² v with r = x₁ − x₀, v = x₂ − 2x₁ + x₀, a = ‖r‖/‖v‖ ≥ 1. Where the objective is then higher than before, the
    extrapolation is dropped and the last plain step taken instead, so that a `step` that never raises the objective converges
    to a fixed point of the same kind in a fraction of the steps. Stops when ‖r‖ ≤ tolerance·‖x₀‖, or when a plain step lowers
    the objective by less than `objective_tolerance`, and returns the outcome of a plain step.
    """

    def norm(x):
        return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x)))

    def minus(a, b):
        return jax.tree.map(jnp.subtract, a, b)

    def cycle(state):
        x0, plain, best, steps, _ = state
        x1, objective = step(x0)
        x2, next_objective = step(x1)
        r = minus(x1, x0)
        v = minus(minus(x2, x1), r)
        length, bend = norm(r), norm(v)
        limit = LONGEST_STRIDE if accelerate else 1.0  # a = 1 gives x₂
        a = jnp.clip(jnp.where(bend > 0, length / jnp.where(bend > 0, bend, 1), 1), 1, limit)
        onward = jax.tree.map(lambda x, r, v: x + 2 * a * r + a**2 * v, x0, r, v)
        done = (length <= tolerance * norm(x0)) | (objective - next_objective < objective_tolerance)
        worse = objective > best + 8 * jnp.finfo(best.dtype).eps * jnp.abs(best)
        kept = (onward, x2, next_objective, steps + 2, done)
        dropped = (plain, plain, jnp.full_like(best, jnp.inf), steps + 2, jnp.asarray(False))
        return jax.tree.map(partial(jnp.where, worse), dropped, kept)

    infinity = jnp.asarray(jnp.inf, dtype=jax.tree.leaves(start)[0].dtype)
    state = (start, start, infinity, jnp.asarray(0), jnp.asarray(False))
    _, point, _, steps, done = lax.while_loop(lambda state: ~state[4] & (state[3] < max_steps), cycle, state)
    return FixedPoint(point, done, steps)


def moments(Z: Float[Array, "n d"]) -> Callable[[Float[Array, "d R"]], Float[Array, "d R"]]:
    """V ↦ ZᵀZV, by way of the d × d matrix where that is cheaper."""
    if Z.shape[1] <= 2 * Z.shape[0]:
        S = Z.T @ Z
        return lambda V: S @ V
    return lambda V: Z.T @ (Z @ V)


def leading_loadings(Z: Float[Array, "n d"], width: int) -> Float[Array, "d width"]:
    """ZᵀU for the leading left singular vectors U: loadings of the unconstrained decomposition, zero where Z has no more rank."""
    n, d = Z.shape
    rank = min(n, d, width)
    if n >= d:
        values, vectors = top_eigenpairs_of(Z.T @ Z, rank)
        found = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
    else:
        found = Z.T @ leading_left_vectors(Z, rank)
    return jnp.pad(found, ((0, 0), (0, width - rank)))


def centre_and_scale(
    X: Float[Array, "n d"], dims: Sequence[int], each_view: bool = True
) -> tuple[Float[Array, "n d"], Float[Array, " d"], Float[Array, " d"]]:
    """(Z, centre, scale): the columns centred, each view then of Frobenius norm 1, or all together. Constant columns become 0."""
    Z, centre, _ = centred(X)
    scale = view_norms(Z, dims if each_view else (Z.shape[1],))
    return Z / scale[None, :], centre, scale


def feature_mask(membership: Bool[Array, "M R"], dims: Sequence[int]) -> Bool[Array, "d R"]:
    """The zero pattern of the loadings."""
    return jnp.repeat(membership, np.array(dims), axis=0, total_repeat_length=sum(dims))


def column_norms(V: Float[Array, "d R"], dims: Sequence[int]) -> Float[Array, "M R"]:
    """‖V_m[:, j]‖ of every view m and column j."""
    edges = np.cumsum([0, *dims])
    return jnp.stack([jnp.linalg.norm(V[a:b], axis=0) for a, b in zip(edges[:-1], edges[1:], strict=True)])


def _step(product, mask, dims, penalty, V):
    """One plain step from V, and F(V)."""
    SV = product(V)
    root, nuclear = inverse_root(V.T @ SV)
    W = jnp.where(mask, SV @ root, 0)  # ZᵀU
    objective = jnp.sum(V**2) / 2 - nuclear
    if penalty is None:
        return W, objective
    norms = column_norms(W, dims)
    kept = jnp.where(norms > penalty, 1 - penalty / jnp.where(norms > penalty, norms, 1), 0)
    W = W * jnp.repeat(kept, np.array(dims), axis=0, total_repeat_length=sum(dims))
    return W, objective + penalty * jnp.sum(column_norms(V, dims))


def _given(Z: Float[Array, "n d"], start: Float[Array, "d R"], mask: Bool[Array, "d R"], config: SlideConfig, tolerance: float):
    """The fixed point for a given zero pattern, from leading loadings."""
    step = partial(_step, moments(Z), mask, None, None)
    start = jnp.where(mask, start, 0)
    return squarem(step, start, tolerance=tolerance, max_steps=config.max_steps, accelerate=config.accelerate)


def scores_of(Z: Float[Array, "n d"], V: Float[Array, "d R"]) -> Float[Array, "n R"]:
    """The orthonormal scores that go with the loadings: the polar factor of ZV, zero in a zero column."""
    B = Z @ V
    return B @ inverse_root(B.T @ B)[0]


def canonical_columns(V: Float[Array, "d R"], membership: Bool[Array, "M R"]) -> tuple[Float[Array, "R R"], Bool[Array, "M R"]]:
    """(O, membership of V O): the rotation that leaves each structure its span, its columns then orthogonal, the largest first;
    structures in the order of `Hierarchy`, unused columns last. Neither V Vᵀ within a structure nor U Vᵀ changes."""
    keys = (*(~membership[m] for m in reversed(range(membership.shape[0]))), -membership.sum(axis=0))
    order = jnp.lexsort(keys)
    ordered = membership[:, order]
    new = jnp.concatenate([jnp.zeros(1, dtype=bool), (ordered[:, 1:] != ordered[:, :-1]).any(axis=0)])
    place = jnp.cumsum(new)  # of each ordered column's structure
    same = place[:, None] == place[None, :]
    gram = jnp.where(same, V[:, order].T @ V[:, order], 0)
    size = jnp.trace(gram)
    gram = gram / jnp.where(size > 0, size, 1)  # eigenvalues from 0 to 1: twice the place keeps structures apart, and in order
    _, vectors = jnp.linalg.eigh(gram - jnp.diag(2 * place.astype(V.dtype)))
    O = jnp.where(same, vectors[:, ::-1], 0)
    return jnp.zeros_like(O).at[order].set(O), ordered


def fit(
    views: Any,
    hierarchy: Hierarchy,
    config: SlideConfig = SlideConfig(),
    *,
    y: Any = None,
    key: Any = None,
) -> LinearFit:
    """SLIDE of the views; y is not used, and key only draws the folds of "bcv".

    `factors` are the orthonormal scores U, whose entries are of size 1/√n, and `objective` is ‖Z − UVᵀ‖². Scores of rows are
    their least-squares scores ZV(VᵀV)⁻¹. For the training rows these span the same space as U, and
    U = polar(transform(views) VᵀV): the two are equal where every structure holds all views, and V is then ZᵀU. The number of
    columns is that of the hierarchy's factors, or with "bcv" the `width`, of which those not chosen are unused.

    Raises `ValueError` for what `check_views` refuses, a key that is needed and missing, and rows that are too few: fewer than
    one more than the factors, or than 2 in a fold.
    """
    return _decomposition(stack_views(views, as_hierarchy(hierarchy).dims), hierarchy, config, key)


@compiled
def _decomposition(X: Float[Array, "n d"], hierarchy: Hierarchy, config: SlideConfig, key: Any) -> LinearFit:
    """The fit to views side by side."""
    dims = hierarchy.dims
    Z, centre, scale = centre_and_scale(X, dims, config.scale_views)
    n = Z.shape[0]
    if config.ranks == "bcv":
        _check_folds(n, dims, config)
    elif n <= hierarchy.n_factors:
        raise ValueError(f"views: have {n} rows; expected more than the {hierarchy.n_factors} factors of the hierarchy")
    if config.ranks == "given":
        membership = jnp.asarray(hierarchy.modality_mask)
    else:
        path = penalised_path(Z, dims, config)
        structures, count = distinct_structures(path, n, dims, config)
        row_folds, column_folds = draw_folds(as_key(key, "for the folds"), n, dims, config)
        errors = bi_cross_validation(Z, dims, structures, count, row_folds, column_folds, config)
        membership = structures[jnp.argmin(errors.sum(axis=0))]
    mask = feature_mask(membership, dims)
    tolerance = default_tolerance(Z.dtype) if config.tolerance is None else config.tolerance
    found = _given(Z, leading_loadings(Z, membership.shape[1]), mask, config, tolerance)
    rotation, membership = canonical_columns(found.point, membership)
    V = jnp.where(feature_mask(membership, dims), found.point @ rotation, 0)
    U = scores_of(Z, V)
    objective = jnp.sum((Z - U @ V.T) ** 2)
    status = jnp.where(jnp.isfinite(objective), jnp.where(found.converged, CONVERGED, OUT_OF_STEPS), NON_FINITE)
    return LinearFit(
        centre=centre,
        scale=scale,
        loadings=V,
        factors=U,
        score_map=least_squares_map(V),
        membership=membership,
        objective=objective,
        status=status,
        steps=found.steps,
        dims=dims,
    )


class SlidePath(eqx.Module):
    """Solutions of min ½‖Z − UVᵀ‖² + λ Σ_{m,j} ‖V_m[:, j]‖ over orthonormal U, from the largest penalty to the smallest."""

    penalties: Float[Array, " L"]
    loadings: Float[Array, "L d width"]
    """Scores that go with them: `scores_of`."""
    norms: Float[Array, "L M width"]
    """‖V_m[:, j]‖: zero where the column leaves the view out."""
    objective: Float[Array, " L"]
    """Less ½‖Z‖²."""
    steps: Int[Array, " L"]


def penalised_path(Z: Float[Array, "n d"], dims: Sequence[int], config: SlideConfig) -> SlidePath:
    """The path for standardised Z: solved from the smallest penalty, starting there at all leading singular vectors, each
    penalty from the solution of the one before. A column that is zero once stays so."""
    n, d = Z.shape
    width = min(n - 1, d, DEFAULT_WIDTH if config.width is None else config.width)
    edges = np.cumsum([0, *dims])
    tops = [singular_values(Z[:, a:b], 1)[0] for a, b in zip(edges[:-1], edges[1:], strict=True)]
    top = jnp.maximum(jnp.stack(tops).max(), config.smallest_penalty)
    exponents = jnp.linspace(0, 1, config.n_penalties, dtype=Z.dtype)
    penalties = top * (config.smallest_penalty / top) ** exponents
    product = moments(Z)

    def solve(V, penalty):
        step = partial(_step, product, True, tuple(dims), penalty)
        found = squarem(
            step,
            V,
            tolerance=0.0,
            objective_tolerance=config.path_tolerance,
            max_steps=config.path_max_steps,
            accelerate=config.accelerate,
        )
        V = found.point
        return V, (V, column_norms(V, dims), step(V)[1], found.steps)

    start = leading_loadings(Z, width)
    _, (loadings, norms, objective, steps) = lax.scan(solve, start, penalties, reverse=True)
    return SlidePath(penalties, loadings, norms, objective, steps)


def distinct_structures(
    path: SlidePath, n: int, dims: Sequence[int], config: SlideConfig
) -> tuple[Bool[Array, "L M width"], Int[Array, ""]]:
    """(list, its length): the patterns of zeros along the path from the largest penalty on, each without its unused columns and
    once in a row, up to the first with more columns than the bi-cross-validation could fit: a share (K − 1)/K of the rows or
    the features for K folds, of all views or of one; and only where the path, had it had more columns, might not have used more.
    Entries past the length are empty."""
    share = min(config.folds)  # the coarser folding leaves fewer
    width = path.norms.shape[2]
    most, most_of_view = (np.minimum(n, size) * (share - 1) // share for size in (sum(dims), np.array(dims)))

    def visit(state, norms):
        held, count, latest, stopped = state
        present = norms > 0
        order = jnp.argsort(~present.any(axis=0), stable=True)
        present = present[:, order]
        columns, by_view = present.any(axis=0).sum(), present.sum(axis=1)
        stopped |= (columns > min(int(most), width - 1)) | (by_view > jnp.asarray(most_of_view)).any()
        take = ~stopped & (columns > 0) & (present != latest).any()
        held = jnp.where(take, held.at[count].set(present), held)
        return (held, count + take.astype(count.dtype), jnp.where(take, present, latest), stopped), None

    blank = jnp.zeros(path.norms.shape, dtype=bool)
    state = (blank, jnp.asarray(0), blank[0], jnp.asarray(False))
    (held, count, _, _), _ = lax.scan(visit, state, path.norms)
    return held, count


def _check_folds(n: int, dims: Sequence[int], config: SlideConfig) -> None:
    if n < 2 * config.folds[0]:
        raise ValueError(f"views: have {n} rows; expected at least 2 in each of {config.folds[0]} row folds")
    if min(dims) < config.folds[1]:
        raise ValueError(f"views: have {tuple(dims)} features; expected at least one in each of {config.folds[1]} column folds")


def draw_folds(
    key: Key[Array, ""], n: int, dims: Sequence[int], config: SlideConfig
) -> tuple[Int[Array, " n"], Int[Array, " d"]]:
    """Folds of the rows, and of the features within each view, counted from 0 and of equal size up to one."""
    row_key, column_key = jr.split(key)
    rows = jr.permutation(row_key, jnp.arange(n) % config.folds[0])
    keys = jr.split(column_key, len(dims))
    columns = [jr.permutation(k, jnp.arange(d) % config.folds[1]) for k, d in zip(keys, dims, strict=True)]
    return rows, jnp.concatenate(columns)


def bi_cross_validation(
    Z: Float[Array, "n d"],
    dims: Sequence[int],
    structures: Bool[Array, "L M width"],
    count: Int[Array, ""] | int,
    row_folds: Int[Array, " n"],
    column_folds: Int[Array, " d"],
    config: SlideConfig,
) -> Float[Array, "blocks L"]:
    """Errors of the first `count` structures in predicting every block of held-out rows and features, row folds outermost;
    infinite for the rest of the list.

    Z is the standardised data. For a block, SLIDE is fitted to the other rows and features, standardised anew among themselves.
    The held-out features are regressed on its scores, the held-out rows' scores found from their other features, and the error
    is the sum over views of the squared error of the held-out block relative to its variation. Each block is a program over
    masks, the same for every split of the data and for every structure.

    Raises `ValueError` when there are fewer than two rows in a fold, or a view has fewer features than folds.
    """
    n, d = Z.shape
    _check_folds(n, dims, config)
    width = structures.shape[2]
    view_of = np.repeat(np.arange(len(dims)), dims)
    most_kept = d - sum(d_m // config.folds[1] for d_m in dims)

    def by_view(squares: Float[Array, " d"]) -> Float[Array, " M"]:
        return jnp.zeros(len(dims), dtype=Z.dtype).at[view_of].add(squares)

    def row_fold(fold):
        out = row_folds == fold
        n_in, n_out = (~out).sum().astype(Z.dtype), out.sum().astype(Z.dtype)
        mean = jnp.sum(jnp.where(out[:, None], 0, Z), axis=0) / n_in
        inside = triangle(jnp.where(out[:, None], 0, Z - mean[None, :]))
        rows = jnp.where(out[:, None], Z, 0)
        spread = jnp.where(out[:, None], Z - jnp.sum(rows, axis=0, keepdims=True) / n_out, 0)
        variation, outside = jnp.sum(spread**2, axis=0), triangle(rows)

        def column_fold(fold):
            hidden = column_folds == fold
            kept = jnp.argsort(hidden, stable=True)[:most_kept]  # folds of a view differ by one: a few hidden ones, as zeros
            view = jnp.asarray(view_of)[kept]
            shown = jnp.where(hidden[None, :], 0, inside)[:, kept]
            norms = jnp.sqrt(jnp.zeros(len(dims), dtype=Z.dtype).at[view].add(jnp.sum(shown**2, axis=0)))
            scale = jnp.where(norms > 0, norms, 1)[view]
            inner = shown / scale[None, :]
            start = leading_loadings(inner, width)
            total = by_view(jnp.where(hidden, variation, 0))
            total = jnp.where(total > 0, total, 1)

            def error(membership):
                V = _given(inner, start, membership[view], config, config.fold_tolerance).point
                U = scores_of(inner, V)
                shown_loadings = jnp.column_stack([(jnp.sqrt(n_in) * jnp.where(hidden, 0, mean))[kept], V * scale[:, None]])
                hidden_loadings = jnp.where(hidden[:, None], jnp.column_stack([jnp.sqrt(n_in) * mean, inside.T @ U]), 0)
                scores = outside[:, kept] @ least_squares_map(shown_loadings)
                wrong = jnp.where(hidden[None, :], outside - scores @ hidden_loadings.T, 0)
                return jnp.sum(by_view(jnp.sum(wrong**2, axis=0)) / total)

            def next_structure(state):
                i, errors = state
                return i + 1, errors.at[i].set(error(structures[i]))

            unknown = jnp.full(structures.shape[0], jnp.inf, dtype=Z.dtype)
            return lax.while_loop(lambda state: state[0] < count, next_structure, (jnp.asarray(0), unknown))[1]

        return lax.map(column_fold, jnp.arange(config.folds[1]))

    return lax.map(row_fold, jnp.arange(config.folds[0])).reshape(-1, structures.shape[0])
