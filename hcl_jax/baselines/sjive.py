"""sJIVE: joint and individual parts of several views that also explain a response (Palzer et al., 2022)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from hcl_jax.baselines.linear import check_given_ranks, check_view_ranks, given_ranks, joint_then_individual
from hcl_jax.compiled import compiled
from hcl_jax.estimators.estimate import default_tolerance
from hcl_jax.fitted import LinearFit, stack_with_response
from hcl_jax.linalg import (
    GUARD,
    Anderson,
    improved_left_vectors,
    leading_left_vectors,
    least_squares_map,
    principal_axes,
    triangle,
)
from hcl_jax.structure import Hierarchy, as_hierarchy
from hcl_jax.views import as_key, centred, check_options


@dataclass(frozen=True)
class SjiveConfig:
    """Options of `fit`.

    eta: the weight of the views against the response, between 0 and 1; None: of `etas` the one of least squared error in
        `folds`-fold cross-validation, with folds shuffled by the key (the authors' are contiguous).
    ranks: "given", or "forward": from ranks of 0, one is added to the joint or to one individual rank, whichever lowers the
        cross-validated squared error most, as long as it does so by more than `improvement` times the variance of the response.
        At `eta`, or at 0.5 if that is to be chosen, afterwards.
    joint_rank, individual_ranks: the given ranks, or the largest ones that the selection may reach (its arrays are that wide).
        None: of the hierarchy. The joint rank is that of the structure of all views, and a view's individual rank the sum over
        all other structures that contain it.
    start: of the alternation. "joint", the authors': the best approximation of views and response side by side. "shared": the
        directions that the views' leading score spaces, of r_J + r_m columns each, have most in common. Both ended at the same
        objective wherever both converged, "shared" in a quarter to a twentieth of the sweeps.
    tolerance: of the change of the individual parts in a sweep over the norm of the data; None: 1e-7 in float64, 1e-4 in
        float32. The authors stop at a change of the objective of 1e-3.
    path_tolerance, path_max_steps: the same in cross-validation. Only small η, which lets the response be fitted by anything,
        needs more sweeps.
    """

    eta: float | None = None
    etas: tuple[float, ...] = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
    folds: int = 5
    ranks: str = "given"
    improvement: float = 0.01
    joint_rank: int | None = None
    individual_ranks: tuple[int, ...] | None = None
    start: str = "shared"
    tolerance: float | None = None
    max_steps: int = 2000
    path_tolerance: float = 1e-4
    path_max_steps: int = 50

    def __post_init__(self) -> None:
        if self.eta is not None and not 0 < self.eta < 1:
            raise ValueError(f"eta: is {self.eta}; expected a number between 0 and 1")
        if not self.etas or not all(0 < eta < 1 for eta in self.etas):
            raise ValueError(f"etas: are {self.etas}; expected numbers between 0 and 1")
        check_options(
            self,
            choices={"ranks": ("given", "forward"), "start": ("joint", "shared")},
            positive=("tolerance", "path_tolerance"),
            least={"folds": 2, "max_steps": 1, "path_max_steps": 1},
        )
        if not self.improvement >= 0:
            raise ValueError(f"improvement: is {self.improvement}; expected a non-negative number")
        check_given_ranks(self.joint_rank, self.individual_ranks)


class _Standardised(NamedTuple):
    """[Z, response], or what has the same inner products of columns in fewer rows, and the constants."""

    core: Float[Array, "q e"]
    centre: Float[Array, " e"]
    scale: Float[Array, " e"]

    def reduced(self) -> "_Standardised":
        return self._replace(core=triangle(self.core))


class _Blocks(NamedTuple):
    """J = V_J V_Jᵀ[Z, y] and A_m = V_m C_mᵀ, C_m's last row that of the response; weighted by the roots of η and 1 − η."""

    joint: Float[Array, "q r"]
    individual: tuple[Float[Array, "q _r"], ...]
    individual_loadings: tuple[Float[Array, "_p _r"], ...]


class _State(NamedTuple):
    blocks: _Blocks
    tracked: tuple[Float[Array, "q _k"], ...]
    value: Float[Array, ""]
    parts: Float[Array, "q a"]
    """The individual parts, each with its share of the response, that the last accepted sweep gave."""
    ahead: Float[Array, "q a"]
    memory: Anderson
    change: Float[Array, ""]
    step: Int[Array, ""]


def _standardise_rows(columns: Float[Array, "n e"], counts: Bool[Array, " n"]) -> _Standardised:
    """Mean 0 and variance 1 (of n − 1) in the rows that count, the others 0; constant columns become 0."""
    Z, centre, deviation = centred(columns, counts)
    scale = jnp.where(deviation > 0, deviation, 1)
    return _Standardised(Z / scale[None, :], centre, scale)


def _leading(T: Float[Array, "q p"], tracked: Float[Array, "q k"]) -> Float[Array, "q k"]:
    """The leading left singular vectors: of a large matrix the best in the span of [V, TTᵀV], V those tracked from the last
    sweep, which capture no less than V does."""
    k = tracked.shape[1]
    if 6 * k > min(T.shape) or k == 0:
        return leading_left_vectors(T, k)
    return improved_left_vectors(T, tracked)


def _truncated(vectors: Float[Array, "q k"], width: int, rank: Int[Array, ""]) -> Float[Array, "q w"]:
    return jnp.where((jnp.arange(width, dtype=rank.dtype) < rank)[None, :], vectors[:, :width], 0)


class _Problem(NamedTuple):
    """min η‖Z − J − A‖² + (1 − η)‖y − its parts‖² at given ranks, in the coordinates of `core`."""

    core: Float[Array, "q e"]
    dims: tuple[int, ...]
    widths: tuple[int, ...]
    ranks: Int[Array, " blocks"]

    @property
    def views(self) -> list[Float[Array, "q _p"]]:
        return jnp.split(self.core[:, :-1], np.cumsum(self.dims)[:-1], axis=1)

    def split(self, parts: Float[Array, "q a"]) -> list[Float[Array, "q _p"]]:
        """A_m with the response's column last, one after the other."""
        return jnp.split(parts, np.cumsum([p + 1 for p in self.dims])[:-1], axis=1)

    def left_over(self, parts: Float[Array, "q a"]) -> Float[Array, "q e"]:
        """[Z, y] − A: what the joint part is the best approximation of."""
        blocks = self.split(parts)
        response = sum((block[:, -1] for block in blocks), start=jnp.zeros_like(self.core[:, -1]))
        return self.core - jnp.concatenate([*(block[:, :-1] for block in blocks), response[:, None]], axis=1)

    def sweep(
        self, parts: Float[Array, "q a"], tracked: Sequence[Float[Array, "q _k"]], joint: Float[Array, "q k"] | None = None
    ) -> tuple[Float[Array, "q a"], tuple[Float[Array, "q _k"], ...], _Blocks, Float[Array, ""]]:
        """(individual parts, tracked vectors, blocks, objective) after one pass over the joint part and all views.

        Each step is the exact minimiser given the others, subject to V_JᵀV_m = 0, where decompositions are exact.
        """
        joint = _leading(self.left_over(parts), tracked[0]) if joint is None else joint
        V_J = _truncated(joint, self.widths[0], self.ranks[0])
        kept = [joint]
        response = [block[:, -1] for block in self.split(parts)]
        out, vectors, loadings = [], [], []
        for m, Z in enumerate(self.views):
            others = sum((b for i, b in enumerate(response) if i != m), start=jnp.zeros_like(response[0]))
            target = jnp.concatenate([Z, (self.core[:, -1] - others)[:, None]], axis=1)
            target = target - V_J @ (V_J.T @ target)
            kept.append(_leading(target, tracked[m + 1]))
            V = _truncated(kept[-1], self.widths[m + 1], self.ranks[m + 1])
            vectors.append(V)
            loadings.append(target.T @ V)
            out.append(V @ loadings[-1].T)
            response[m] = out[-1][:, -1]
        new = jnp.concatenate(out, axis=1)
        left = self.left_over(new)
        value = jnp.sum((left - V_J @ (V_J.T @ left)) ** 2)
        return new, tuple(kept), _Blocks(V_J, tuple(vectors), tuple(loadings)), value


def _solve(problem: _Problem, tolerance: float | Float[Array, ""], max_steps: int | Int[Array, ""], start: str) -> _State:
    """The alternation of the paper as a map of the individual parts, extrapolated by Anderson's method.

    An extrapolation from which a sweep ends with a higher objective is dropped, and a plain sweep follows.
    """
    core, (q, e) = problem.core, problem.core.shape
    dtype, infinite = core.dtype, jnp.array(jnp.inf, problem.core.dtype)
    norm = jnp.maximum(jnp.linalg.norm(core), jnp.finfo(dtype).tiny)
    shapes = [e, *(p + 1 for p in problem.dims)]
    guards = [min(width + GUARD, q, p) if width else 0 for width, p in zip(problem.widths, shapes, strict=True)]

    def step(state: _State) -> _State:
        new, tracked, blocks, value = problem.sweep(state.ahead, state.tracked)
        move = new - state.ahead
        memory = state.memory.push(new.ravel(), move.ravel())
        ahead = memory.extrapolate().reshape(new.shape)
        accepted = _State(blocks, tracked, value, new, ahead, memory, jnp.linalg.norm(move), state.step + 1)
        back = state._replace(ahead=state.parts, memory=Anderson.empty(new.size, dtype), change=infinite, step=state.step + 1)
        dropped = (value > state.value * (1 + 100 * jnp.finfo(dtype).eps)) & (state.memory.used >= 0)
        return jax.tree.map(lambda a, b: jnp.where(dropped, b, a), accepted, back)

    def unfinished(state: _State) -> Bool[Array, ""]:
        return (state.change > tolerance * norm) & (state.step < max_steps)

    nothing = jnp.zeros((q, sum(shapes[1:])), dtype)
    joint = leading_left_vectors(_start_matrix(problem, start), guards[0])
    V_J = _truncated(joint, problem.widths[0], problem.ranks[0])
    tracked = [joint]
    for Z, guard in zip(problem.views, guards[1:], strict=True):
        target = jnp.concatenate([Z, problem.core[:, -1:]], axis=1)
        tracked.append(leading_left_vectors(target - V_J @ (V_J.T @ target), guard))
    parts, kept, blocks, value = problem.sweep(nothing, tracked, joint)
    first = _State(blocks, kept, value, parts, parts, Anderson.empty(parts.size, dtype), infinite, jnp.ones((), jnp.int32))
    return lax.while_loop(unfinished, step, first)


def _start_matrix(problem: _Problem, start: str) -> Float[Array, "q p"]:
    if start == "joint":
        return problem.core
    spaces = []
    for Z, width, rank in zip(problem.views, problem.widths[1:], problem.ranks[1:], strict=True):
        most = min(width + problem.widths[0], *Z.shape)
        spaces.append(_truncated(leading_left_vectors(Z, most), most, rank + problem.ranks[0]))
    return jnp.concatenate(spaces, axis=1)


class _Model(NamedTuple):
    """Loadings and coefficients whose columns [L; θ] have norm 1, and the scores that go with them."""

    loadings: Float[Array, "d R"]
    theta: Float[Array, " R"]
    scores: Float[Array, "q R"]


def _model(problem: _Problem, eta: Float[Array, ""], blocks: _Blocks) -> _Model:
    """The weights of η taken off again. Columns of the joint part are its singular vectors, the largest first."""
    V_J, d = blocks.joint, problem.core.shape[1] - 1
    B = problem.core.T @ V_J
    if problem.widths[0]:
        turn = principal_axes(B)
        V_J, B = V_J @ turn, B @ turn
    edges = np.cumsum([0, *problem.dims])
    columns = [B]
    for a, b, L in zip(edges[:-1], edges[1:], blocks.individual_loadings, strict=True):
        columns.append(jnp.zeros((d + 1, L.shape[1]), L.dtype).at[a:b].set(L[:-1]).at[-1].set(L[-1]))
    both, V = jnp.concatenate(columns, axis=1), jnp.concatenate([V_J, *blocks.individual], axis=1)
    used = jnp.linalg.norm(both, axis=0) > 100 * jnp.finfo(V.dtype).eps * jnp.linalg.norm(problem.core)
    both = _weighted(both.T, 1 / eta, 1 / (1 - eta)).T
    sign = jnp.where(jnp.sum(both, axis=0) < 0, -1, 1).astype(V.dtype)
    size = jnp.where(used, jnp.linalg.norm(both, axis=0), 1) * sign
    both, scores = jnp.where(used[None, :], both / size[None, :], 0), jnp.where(used[None, :], V * size[None, :], 0)
    return _Model(both[:-1], both[-1], scores)


def _weighted(columns: Float[Array, "q e"], views: Float[Array, ""], response: Float[Array, ""]) -> Float[Array, "q e"]:
    """The columns of the views, and the last one, of the response, times the roots of their weights."""
    last = jnp.arange(columns.shape[1]) == columns.shape[1] - 1
    return columns * jnp.sqrt(jnp.where(last, response, views))[None, :]


class _Fit(NamedTuple):
    model: _Model
    value: Float[Array, ""]
    converged: Bool[Array, ""]
    steps: Int[Array, ""]


def _fitted(
    core: Float[Array, "q e"],
    dims: tuple[int, ...],
    widths: tuple[int, ...],
    ranks: Int[Array, " blocks"],
    eta: Float[Array, ""],
    start: str,
    tolerance: float | Float[Array, ""],
    max_steps: int | Int[Array, ""],
) -> _Fit:
    problem = _Problem(_weighted(core, eta, 1 - eta), dims, widths, ranks)
    state = _solve(problem, tolerance, max_steps, start)
    converged = state.change <= tolerance * jnp.linalg.norm(problem.core)
    return _Fit(_model(problem, eta, state.blocks), state.value, converged, state.step)


class _Folds(NamedTuple):
    """Training rows of every fold, reduced, and which rows are held out."""

    training: _Standardised
    held: Bool[Array, "folds n"]


def _folds(columns: Float[Array, "n e"], folds: int, key: PRNGKeyArray) -> _Folds:
    n = columns.shape[0]
    fold = jnp.zeros(n, jnp.int32).at[jr.permutation(key, n)].set(jnp.arange(n, dtype=jnp.int32) % folds)
    held = fold[None, :] == jnp.arange(folds, dtype=jnp.int32)[:, None]
    return _Folds(lax.map(lambda out: _standardise_rows(columns, ~out).reduced(), held), held)


def _held_out_error(
    columns: Float[Array, "n e"], training: _Standardised, held: Bool[Array, " n"], model: _Model
) -> Float[Array, ""]:
    """The squared error of the held-out responses over the variance of all of them."""
    deviation = centred(columns[:, -1:])[2][0]
    spread = jnp.where(deviation > 0, deviation, 1)
    Z = (columns - training.centre[None, :]) / training.scale[None, :]
    predicted = Z[:, :-1] @ (least_squares_map(model.loadings) @ model.theta)
    wrong = jnp.sum(jnp.where(held, (Z[:, -1] - predicted) ** 2, 0)) * (training.scale[-1] / spread) ** 2
    return wrong / (columns.shape[0] - 1)


def _cross_validate(
    columns: Float[Array, "n e"],
    folds: _Folds,
    dims: tuple[int, ...],
    widths: tuple[int, ...],
    ranks: Int[Array, "grid blocks"],
    eta: Float[Array, ""],
    config: SjiveConfig,
) -> Float[Array, " grid"]:
    """Mean squared error of the held-out responses at every one of the ranks, over the variance of the response."""

    def held_out(fold: tuple[_Standardised, Bool[Array, " n"]]) -> Float[Array, " grid"]:
        def error(at: Int[Array, " blocks"]) -> Float[Array, ""]:
            core, start = fold[0].core, config.start
            fit = _fitted(core, dims, widths, at, eta, start, config.path_tolerance, config.path_max_steps)
            return _held_out_error(columns, *fold, fit.model)

        return lax.map(error, ranks)

    return jnp.sum(lax.map(held_out, (folds.training, folds.held)), axis=0)


def _fitted_at_best_eta(
    columns: Float[Array, "n e"],
    everything: _Standardised,
    folds: _Folds,
    dims: tuple[int, ...],
    widths: tuple[int, ...],
    ranks: Int[Array, " blocks"],
    config: SjiveConfig,
    tolerance: float,
) -> _Fit:
    """The fit of all rows at the η of least cross-validated error. It is the last step of the loop over folds and η, so that
    there is one solver to compile."""
    etas = jnp.array(config.etas, columns.dtype)
    last = config.folds * etas.size
    whole = _Folds(everything, jnp.zeros(columns.shape[0], bool))
    samples = jax.tree.map(lambda leaf, last: jnp.concatenate([leaf, last[None]]), folds, whole)

    def step(state: tuple[Float[Array, " grid"], _Fit], task: Int[Array, ""]) -> tuple[tuple[Float[Array, " grid"], _Fit], None]:
        errors, is_last = state[0], task == last
        training, held = jax.tree.map(lambda leaf: leaf[task // etas.size], samples)
        point = jnp.where(is_last, jnp.argmin(errors), task % etas.size)
        near = jnp.where(is_last, tolerance, config.path_tolerance).astype(columns.dtype)
        most = jnp.where(is_last, config.max_steps, config.path_max_steps).astype(jnp.int32)
        fit = _fitted(training.core, dims, widths, ranks, etas[point], config.start, near, most)
        return (errors.at[point].add(_held_out_error(columns, training, held, fit.model)), fit), None

    shapes = jax.eval_shape(lambda core: _fitted(core, dims, widths, ranks, etas[0], config.start, 1.0, 1), everything.core)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return lax.scan(step, (jnp.zeros_like(etas), nothing), jnp.arange(last + 1))[0][1]


def _forward(
    columns: Float[Array, "n e"],
    folds: _Folds,
    dims: tuple[int, ...],
    widths: tuple[int, ...],
    config: SjiveConfig,
) -> Int[Array, " blocks"]:
    """Ranks by forward selection: one more at a time, while it lowers the cross-validated error enough."""
    most = jnp.array(widths, jnp.int32)
    eta = jnp.array(0.5 if config.eta is None else config.eta, columns.dtype)

    def unfinished(state):
        _, _, improved = state
        return improved

    def grow(state):
        ranks, least, _ = state
        larger = ranks[None, :] + jnp.eye(len(widths), dtype=jnp.int32)
        errors = _cross_validate(columns, folds, dims, widths, jnp.minimum(larger, most[None, :]), eta, config)
        errors = jnp.where(ranks < most, errors, jnp.inf)
        best = jnp.argmin(errors)
        improved = errors[best] < least - config.improvement
        return jnp.where(improved, larger[best], ranks), jnp.where(improved, errors[best], least), improved

    one = jnp.ones((), columns.dtype)
    ranks, _, _ = lax.while_loop(unfinished, grow, (jnp.zeros_like(most), one, jnp.array(True)))
    return ranks


def _widths(hierarchy: Hierarchy, config: SjiveConfig, n: int) -> tuple[int, ...]:
    """(joint, individual of every view): the given ranks, or the largest that a selection may reach."""
    joint, individual = given_ranks(hierarchy)
    joint = joint if config.joint_rank is None else config.joint_rank
    individual = individual if config.individual_ranks is None else config.individual_ranks
    if joint > min(n - 1, hierarchy.n_features):
        raise ValueError(f"joint_rank: is {joint}; expected at most {min(n - 1, hierarchy.n_features)} for {n} rows")
    check_view_ranks("individual_ranks", individual, hierarchy.dims, n)
    if joint + sum(individual) == 0:
        raise ValueError("joint_rank, individual_ranks: are all 0; expected a positive rank")
    return (joint, *individual)


def fit(
    views: Any,
    hierarchy: Hierarchy,
    config: SjiveConfig = SjiveConfig(),
    *,
    y: Any = None,
    key: Any = None,
    ranks: Int[Array, " blocks"] | None = None,
) -> LinearFit:
    """min η Σ_m ‖Z_m − S_J U_mᵀ − S_m W_mᵀ‖² + (1 − η)‖y − S_J θ₁ − Σ_m S_m θ₂ₘ‖² subject to S_JᵀS_m = 0.

    Z and y are standardised by variable. Columns of `loadings` are those of U, with [U; θ₁] of norm 1, then W_1, …, W_M, with
    [W_m; θ₂ₘ] of norm 1; `factors` are the scores S that minimise, `coefficients` θ in units of y, `objective` the above.

    The alternation of Palzer et al. (2022): the joint part is the best approximation of its rank of what the individual parts
    leave of [√η Z, √(1 − η) y]; those of a view that of what the joint part and the other views' share of y leave, in the
    complement of V_J. Everything runs on the triangle of a QR decomposition, large singular vectors are improved from the last
    ones, and sweeps are extrapolated (Anderson): same fixed points in fewer sweeps.

    `transform` and `predict` know no response: scores are least squares on all loadings, where the authors' alternating
    prediction ends. `factors` saw the response and are held to S_JᵀS_m = 0, and differ from the scores of `transform` on the
    training rows by that: the more the smaller η is. Without noise the two are equal.

    `ranks`, if given, are (joint, individual ranks) that may be traced, such as those of another method's selection, at most
    those of the config or the hierarchy.

    Raises `ValueError` for what `check_views` refuses, a response or a needed key that is missing, fewer rows than folds, and
    ranks that do not fit.
    """
    X, y = stack_with_response(views, as_hierarchy(hierarchy).dims, y)
    return _decomposition(X, y, hierarchy, config, key, ranks)


@compiled
def _decomposition(
    X: Float[Array, "n d"],
    y: Float[Array, " n"],
    hierarchy: Hierarchy,
    config: SjiveConfig,
    key: Any,
    ranks: Int[Array, " blocks"] | None,
) -> LinearFit:
    """The fit to views side by side."""
    n = X.shape[0]
    chooses = config.eta is None or config.ranks == "forward"
    needed = max(3, 2 * config.folds if chooses else 0)
    if n < needed:
        raise ValueError(f"views: have {n} rows; expected at least {needed}, two for each fold")
    columns = jnp.concatenate([X, y[:, None]], axis=1)
    widths, dims = _widths(hierarchy, config, n), hierarchy.dims

    at = jnp.array(widths, jnp.int32) if ranks is None else jnp.minimum(ranks.astype(jnp.int32), jnp.array(widths, jnp.int32))
    tolerance = default_tolerance(X.dtype, double=1e-7) if config.tolerance is None else config.tolerance
    whole = _standardise_rows(columns, jnp.ones(n, bool))
    basis, core = jnp.linalg.qr(whole.core) if n > columns.shape[1] else (None, whole.core)
    everything = whole._replace(core=core)
    if chooses:
        folds = _folds(columns, config.folds, as_key(key, "for the folds"))
    if config.ranks == "forward":
        at = _forward(columns, folds, dims, widths, config)
    if config.eta is None:
        model, value, converged, steps = _fitted_at_best_eta(columns, everything, folds, dims, widths, at, config, tolerance)
    else:
        eta = jnp.array(config.eta, X.dtype)
        model, value, converged, steps = _fitted(
            everything.core, dims, widths, at, eta, config.start, tolerance, config.max_steps
        )
    factors = model.scores if basis is None else basis @ model.scores
    used = jnp.any(model.scores != 0, axis=0)
    status = jnp.where(jnp.isfinite(value), jnp.where(converged, 0, 1), 2)
    return LinearFit(
        centre=everything.centre[:-1],
        scale=everything.scale[:-1],
        loadings=model.loadings,
        factors=factors,
        score_map=least_squares_map(model.loadings),
        membership=jnp.asarray(joint_then_individual(widths[0], widths[1:])) & used[None, :],
        objective=value,
        status=status,
        steps=steps,
        dims=dims,
        coefficients=model.theta * everything.scale[-1],
        intercept=everything.centre[-1],
    )
