"""Hierarchical nuclear norm penalisation (Yi, Wong and Gaynanova, 2023; arXiv 2206.12891)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from hcl_jax.compiled import compiled
from hcl_jax.estimators.estimate import default_tolerance
from hcl_jax.fitted import LinearFit, stack_views
from hcl_jax.linalg import least_squares_map, spd_inverse
from hcl_jax.structure import Hierarchy, Structure, as_hierarchy, full_lattice
from hcl_jax.views import as_key, centred, check_options, view_norms

RANK_TOLERANCE = 1e-3  # singular values of standardised views below this are zero
CHECK_EVERY = 5  # passes between two evaluations of the duality gap, which costs about as much as one pass


@dataclass(frozen=True)
class HnnConfig:
    """Options of `fit`."""

    penalties: tuple[float, ...] | None = None
    """By size of structure, largest first: the paper's (λ, κ, τ), for two views (λ, τ). None: by bi-cross-validation."""
    fractions: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4)
    """Of the largest penalty of each size, the values that bi-cross-validation tries, in all combinations that add up to at most
    1 and are not all 0: 123 for three views, about 20 seconds of one core at 300 features. The authors' grid has 0 and 20
    values spaced evenly in logarithm from exp(−5) for each size: some thousand combinations."""
    rule: str = "one-se"
    """`one-se`: of the combinations whose error is within a standard error of the least, the one of smallest rank."""
    weights: str = "sure"
    """How the penalty of a size is shared by the structures of that size."""
    ranks: str = "given"
    """`given`: every structure gets the hierarchy's rank, where the signal has as many dimensions; `angle`: at most that many
    (or `width`), of directions that all its views hold up to `angle`. Either takes these first, the strongest first."""
    angle: float = 0.1
    """A direction is held by all views of a structure if its mean squared cosine with their column spaces exceeds 1 − angle."""
    width: int | None = None
    """Most columns of every structure of the lattice; None: the hierarchy's rank, and no columns for absent structures."""
    tolerance: float | None = None
    """Duality gap over objective at which to stop; None: 1e-7 in float64, 1e-5 in float32."""
    max_steps: int = 2000
    path_tolerance: float = 1e-3
    """The same in bi-cross-validation, whose fits only order the penalties."""
    path_max_steps: int = 100

    def __post_init__(self):
        if self.penalties is not None and not all(value >= 0 for value in self.penalties):
            raise ValueError(f"penalties: are {self.penalties}; expected non-negative numbers")
        if not self.fractions or not all(0 <= value <= 1 for value in self.fractions) or not any(self.fractions):
            raise ValueError(f"fractions: are {self.fractions}; expected numbers from 0 to 1, one of them positive")
        check_options(
            self,
            choices={"rule": ("one-se", "minimum"), "weights": ("sure", "equal"), "ranks": ("given", "angle")},
            positive=("tolerance", "path_tolerance"),
            least={"width": 1, "max_steps": 1, "path_max_steps": 1},
        )
        if not 0 < self.angle < 1:
            raise ValueError(f"angle: is {self.angle}; expected a number between 0 and 1")


class Signal(eqx.Module):
    """The minimiser of the penalised problem, with its certificate."""

    signal: Float[Array, "q d"]
    duals: tuple[Float[Array, "q _d"], ...]
    """One Y_A a structure, in the order of `full_lattice`, of spectral norm at most λ_A; the signal is Z − Σ_A Y_A."""
    objective: Float[Array, ""]
    gap: Float[Array, ""]
    """Objective less the dual value: the objective exceeds the minimum by no more, and ½‖signal − minimiser‖² is no larger."""
    status: Int[Array, ""]
    steps: Int[Array, ""]


def _spectral_ball(T: Float[Array, "q p"], radius: Float[Array, ""]) -> Float[Array, "q p"]:
    """The nearest matrix whose singular values are at most the radius: T g(TᵀT), g(s) = min(1, radius/√s).

    g is bounded and 1 near 0, so that squaring the singular values costs no accuracy; T less this is T with its singular values
    soft-thresholded.
    """

    def project(T: Float[Array, "q p"]) -> Float[Array, "q p"]:
        wide = T.shape[0] < T.shape[1]
        values, vectors = jnp.linalg.eigh(T @ T.T if wide else T.T @ T)
        factor = jnp.minimum(1, radius / jnp.sqrt(jnp.maximum(values, jnp.finfo(T.dtype).tiny)))
        shrink = (vectors * factor[None, :]) @ vectors.T
        return shrink @ T if wide else T @ shrink

    return lax.cond(radius > 0, project, jnp.zeros_like, T)


def _singular_values(T: Float[Array, "q p"]) -> Float[Array, " s"]:
    """‖T vᵢ‖ over the eigenvectors of TᵀT, largest first: each right to a rounding of the largest, where the roots of the
    eigenvalues would be so to the root of one. Their sum is never below the nuclear norm."""
    side = T.T if T.shape[0] < T.shape[1] else T
    _, vectors = jnp.linalg.eigh(side.T @ side)
    return jnp.linalg.norm(side @ vectors, axis=0)[::-1]


def _split(matrix: Float[Array, "q _d"], widths: Sequence[int]) -> list[Float[Array, "q _p"]]:
    return jnp.split(matrix, np.cumsum(widths)[:-1], axis=1)


def _dot(a: Sequence[Float[Array, "q _p"]], b: Sequence[Float[Array, "q _p"]]) -> Float[Array, ""]:
    return sum((jnp.vdot(x, y) for x, y in zip(a, b, strict=True)), start=jnp.zeros((), a[0].dtype))


def penalised_signal(
    Z: Float[Array, "q d"],
    penalties: Float[Array, " S"],
    dims: Sequence[int],
    *,
    start: tuple[Float[Array, "q _d"], ...] | None = None,
    tolerance: float | None = None,
    max_steps: int = 2000,
) -> Signal:
    """argmin_M ½‖Z − M‖² + Σ_A λ_A‖M_A‖_*, M_A the columns of the views in A, over all S = 2^M − 1 structures A.

    The dual is min ½‖Z − Σ_A Y_A‖² over ‖Y_A‖₂ ≤ λ_A. Given the others each Y_A has a closed form with step 1, the projection of
    Y_A + M_A on its spectral ball, whatever the number of views: a pass takes all structures in turn, small ones first, each
    from the residual that the one before left (Dykstra's algorithm). Passes are extrapolated by Nesterov's momentum, which
    starts again when it points uphill; an extrapolated pass that raises the dual objective is dropped, and a plain one, which
    cannot raise it, follows. About a third of the passes of simultaneous steps of length 1/2^(M−1) (FISTA).

    `penalties` in the order of `full_lattice`; a penalty of 0 leaves its structure out. Stops when the duality gap is at most
    `tolerance` (default 1e-8 in float64, 1e-5 in float32) times the objective; looks every 5 passes.
    """
    structures = full_lattice(len(dims))
    tolerance = default_tolerance(Z.dtype, double=1e-8, single=1e-5) if tolerance is None else tolerance
    order = sorted(range(len(structures)), key=lambda i: len(structures[i]))
    widths = [[dims[m - 1] for m in s] for s in structures]
    if start is None:
        start = tuple(jnp.zeros((Z.shape[0], sum(w)), Z.dtype) for w in widths)

    def residual(Y: Sequence[Float[Array, "q _d"]]) -> list[Float[Array, "q _p"]]:
        views = _split(Z, dims)
        for s, width, dual in zip(structures, widths, Y, strict=True):
            for m, block in zip(s, _split(dual, width), strict=True):
                views[m - 1] = views[m - 1] - block
        return views

    def columns(views: Sequence[Float[Array, "q _p"]], i: int) -> Float[Array, "q _d"]:
        return jnp.concatenate([views[m - 1] for m in structures[i]], axis=1)

    def one_pass(Y: Sequence[Float[Array, "q _d"]]) -> tuple[tuple[Float[Array, "q _d"], ...], Float[Array, ""]]:
        views, out = residual(Y), list(Y)
        for i in order:
            out[i] = _spectral_ball(Y[i] + columns(views, i), penalties[i])
            for m, change in zip(structures[i], _split(Y[i] - out[i], widths[i]), strict=True):
                views[m - 1] = views[m - 1] + change
        return tuple(out), _dot(views, views) / 2

    def certificate(Y: Sequence[Float[Array, "q _d"]]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        views = residual(Y)
        penalty, inner = jnp.zeros((), Z.dtype), jnp.zeros((), Z.dtype)
        for i in range(len(structures)):
            part = columns(views, i)
            norm = lax.cond(penalties[i] > 0, lambda T: jnp.sum(_singular_values(T)), lambda T: jnp.zeros((), T.dtype), part)
            penalty, inner = penalty + penalties[i] * norm, inner + jnp.vdot(part, Y[i])
        left = sum((_dot([b], [b]) for b in map(jnp.subtract, _split(Z, dims), views)), start=jnp.zeros((), Z.dtype))
        return left / 2 + penalty, penalty - inner

    def body(state):
        def accelerated(_, inner):
            Y, ahead, t, value = inner
            new, new_value = one_pass(ahead)
            dropped = (new_value > value) & (t > 1)
            differences = [a - b for a, b in zip(new, Y, strict=True)]
            uphill = _dot([a - b for a, b in zip(ahead, new, strict=True)], differences) > 0
            t = jnp.where(dropped | uphill, 1, t)
            t_next = (1 + jnp.sqrt(1 + 4 * t**2)) / 2
            momentum = jnp.where(dropped, 0, (t - 1) / t_next)
            Y_next = tuple(jnp.where(dropped, b, a) for a, b in zip(new, Y, strict=True))
            ahead = tuple(a + momentum * c for a, c in zip(Y_next, differences, strict=True))
            return Y_next, ahead, jnp.where(dropped, 1, t_next), jnp.where(dropped, value, new_value)

        inner, _, _, step = state
        inner = lax.fori_loop(0, CHECK_EVERY, accelerated, inner)
        return inner, *certificate(inner[0]), step + CHECK_EVERY

    def running(state):
        _, objective, gap, step = state
        return (gap > tolerance * objective) & (step < max_steps)

    one, infinity = jnp.ones((), Z.dtype), jnp.full((), jnp.inf, Z.dtype)
    first = ((start, start, one, infinity), one, infinity, jnp.zeros((), int))
    (Y, _, _, _), objective, gap, steps = lax.while_loop(running, body, first)
    status = jnp.where(jnp.isfinite(gap), jnp.where(gap > tolerance * objective, 1, 0), 2)
    return Signal(jnp.concatenate(residual(Y), axis=1), Y, objective, gap, status, steps)


def noise_level(values: Float[Array, " s"], n: int, p: int) -> Float[Array, ""]:
    """The noise's standard deviation from the singular values of an n × p matrix: their median over the one of unit noise.

    √(λ*²)/ω(β) of Gavish and Donoho (2014), with their cubic for ω; within 0.2 % of the median of the Marchenko–Pastur law.
    """
    beta = min(n, p) / max(n, p)
    hard = np.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + np.sqrt(beta**2 + 14 * beta + 1)))
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    middle = values.size // 2
    median = values[middle] if values.size % 2 else (values[middle - 1] + values[middle]) / 2
    return median / float(np.sqrt(max(n, p)) * hard / omega)


def sure_threshold(values: Float[Array, " s"], n: int, p: int) -> Float[Array, ""]:
    """The soft threshold of least unbiased risk estimate (Candès, Sing-Long and Trzasko, 2013), of 1,000 between 0 and σ₁.

    −npτ² + Σ min(λ², σᵢ²) + 2τ² div(λ), div = |n − p| Σ (1 − λ/σᵢ)₊ + #{σᵢ > λ} + 2 Σ_{i≠j} σᵢ(σᵢ − λ)₊/(σᵢ² − σⱼ²), with τ from
    `noise_level`. The estimate has poles at equal singular values and jumps at all, so that its exact minimiser means less than
    one on a grid.
    """
    noise = noise_level(values, n, p)
    kept = values > RANK_TOLERANCE * jnp.where(values[0] > 0, values[0], 1)
    apart = (values[:, None] - values[None, :]) * (values[:, None] + values[None, :])
    usable = (apart != 0) & kept[None, :] & kept[:, None] & ~jnp.eye(values.size, dtype=bool)
    inverse = jnp.sum(jnp.where(usable, 1 / jnp.where(usable, apart, 1), 0), axis=1)
    weight = jnp.where(kept, abs(n - p) / jnp.where(kept, values, 1) + 2 * values * inverse, 0)
    grid = jnp.linspace(0, values[0], 1000)
    above = jnp.maximum(values[None, :] - grid[:, None], 0)
    divergence = above @ weight + jnp.sum(((above > 0) & kept[None, :]).astype(values.dtype), axis=1)
    risk = jnp.sum(jnp.minimum(values[None, :], grid[:, None]) ** 2, axis=1) + 2 * noise**2 * divergence
    return grid[jnp.argmin(risk)]


def structure_weights(
    Z: Float[Array, "q d"],
    dims: Sequence[int],
    n: int,
    rule: str = "sure",
    narrow: Sequence[int] | None = None,
) -> tuple[Float[Array, " S"], Float[Array, " M"]]:
    """(w_A, largest penalty by size of structure): λ_A = (penalty of its size) w_A, the w_A of a size adding up to 1.

    Z may be reduced, to fewer rows than n and to `narrow` columns a view. `sure`: proportional to the `sure_threshold` of Z_A.
    At the largest penalty of a size, max σ₁(Z_A)/w_A over its structures, the signal is 0.
    """
    edges = np.cumsum([0, *(dims if narrow is None else narrow)])
    structures = full_lattice(len(dims))
    weights, tops = [], []
    for size in range(len(dims), 0, -1):
        members = [s for s in structures if len(s) == size]
        values = [_singular_values(jnp.concatenate([Z[:, edges[m - 1] : edges[m]] for m in s], axis=1)) for s in members]
        columns = [sum(dims[m - 1] for m in s) for s in members]
        if rule == "sure":
            raw = jnp.stack([sure_threshold(v, n, p) for v, p in zip(values, columns, strict=True)])
        else:
            raw = jnp.ones(len(members), Z.dtype)
        share = raw / jnp.where(jnp.sum(raw) > 0, jnp.sum(raw), 1)
        first = jnp.stack([v[0] for v in values])
        weights.append(share)
        tops.append(jnp.max(jnp.where(share > 0, first / jnp.where(share > 0, share, 1), 0)))
    return jnp.concatenate(weights), jnp.stack(tops)


def _by_structure(levels: Float[Array, " M"], weights: Float[Array, " S"]) -> Float[Array, " S"]:
    """λ_A = (penalty of the size of A) w_A."""
    n_modalities = levels.shape[0]
    sizes = np.array([len(s) for s in full_lattice(n_modalities)])
    return levels[n_modalities - sizes] * weights


def refit_bases(signal: Float[Array, "q d"], dims: Sequence[int]) -> tuple[list[Float[Array, "q _w"]], Int[Array, ""]]:
    """(P_d by view, rank of the signal): orthonormal bases, padded with zero columns, of the signal's column space by view.

    Singular values above 1e-3 count. P_d spans U Uᵀ U_d, U and U_d the column spaces of the whole signal and of view d's part:
    the refitted signal is P_d P_dᵀ Z_d, without the shrinkage of the penalty.
    """

    def column_space(T: Float[Array, "q p"]) -> tuple[Float[Array, "q s"], Bool[Array, " s"]]:
        wide = T.shape[0] < T.shape[1]
        values, vectors = jnp.linalg.eigh(T @ T.T if wide else T.T @ T)
        kept = values > RANK_TOLERANCE**2
        if not wide:
            vectors = T @ vectors / jnp.sqrt(jnp.where(kept, values, 1))[None, :]
        return jnp.where(kept[None, :], vectors, 0), kept

    U, kept = column_space(signal)
    bases = [column_space(U @ (U.T @ column_space(part)[0]))[0] for part in _split(signal, dims)]
    return bases, jnp.sum(kept)


def penalty_grid(fractions: Sequence[float], n_modalities: int) -> np.ndarray:
    """G × M fractions of the largest penalties: all combinations adding up to at most 1, without 0 throughout.

    Beyond the plane the signal is 0 or nearly so. Neighbours differ in one size only, so that fits can start from the last one.
    """
    rows: list[tuple[float, ...]] = [()]
    for _ in range(n_modalities):
        rows = [(*row, f) for i, row in enumerate(rows) for f in (fractions if i % 2 == 0 else fractions[::-1])]
    kept = [row for row in rows if 0 < sum(row) <= 1 + 1e-12]
    return np.array(kept)


def _narrow(Z: Float[Array, "q d"], dims: Sequence[int]) -> tuple[Float[Array, "q _d"], tuple[int, ...]]:
    """Each view rotated to at most q columns: column spaces, and singular values of any views side by side, stay as they are."""
    views = [part if part.shape[1] <= part.shape[0] else jnp.linalg.qr(part.T, mode="r").T for part in _split(Z, dims)]
    return jnp.concatenate(views, axis=1), tuple(view.shape[1] for view in views)


class BiCrossValidation(eqx.Module):
    """Held-out errors of a grid of penalties."""

    levels: Float[Array, "G M"]
    errors: Float[Array, "G blocks M"]
    """By grid point, held-out block (row fold outer, column fold inner) and view, relative to the block's own variance."""
    ranks: Float[Array, " G"]
    """Of the fitted signal, averaged over the blocks."""

    def mean(self) -> Float[Array, " G"]:
        return jnp.mean(self.errors, axis=(1, 2))

    def choose(self, rule: str) -> Int[Array, ""]:
        """Where the grid has least error; or, of the points within a standard error of it, the one of smallest rank, and of
        least error among these."""
        by_block = jnp.mean(self.errors, axis=2)
        mean, best = self.mean(), jnp.argmin(self.mean())
        if rule == "minimum":
            return best
        blocks = by_block.shape[1]
        standard_error = jnp.std(by_block[best], ddof=1) / np.sqrt(blocks)
        near = mean <= mean[best] + standard_error
        smallest = jnp.min(jnp.where(near, self.ranks, jnp.inf))
        return jnp.argmin(jnp.where(near & (self.ranks == smallest), mean, jnp.inf))


def _halves(order: Int[Array, " n"]) -> tuple[Int[Array, "2 h"], Bool[Array, "2 h"]]:
    """(two folds, which of their entries count): the second is padded where their sizes differ."""
    half = -(-order.size // 2)
    padded = jnp.concatenate([order, jnp.zeros(2 * half - order.size, order.dtype)])
    return padded.reshape(2, half), (jnp.arange(2 * half) < order.size).reshape(2, half)


def _held_out_error(
    basis: Float[Array, "q w"],
    fitted: Float[Array, "q p"],
    target: Float[Array, "q h"],
    known: Float[Array, "r p"],
    unknown: Float[Array, "r h"],
    level: Float[Array, "1 _d"] | None,
) -> Float[Array, ""]:
    """Of one view: ‖X_jk − X_j¬k M̂⁺ X_¬jk‖², M̂ = P Pᵀ X_¬j¬k, by the pseudoinverse of Pᵀ X_¬j¬k; `level` is the row of the
    means of both parts, where the data keep them."""
    small, right = basis.T @ fitted, basis.T @ target
    if level is not None:
        split = fitted.shape[1]
        small, right = jnp.concatenate([level[:, :split], small]), jnp.concatenate([level[:, split:], right])
    return jnp.sum((unknown - known @ (least_squares_map(small.T) @ right)) ** 2)


def bi_cross_validate(
    X: Float[Array, "n d"],
    dims: Sequence[int],
    levels: Float[Array, "G M"],
    weights: Float[Array, " S"],
    row_order: Int[Array, " n"],
    column_orders: Sequence[Int[Array, " _p"]],
    *,
    tolerance: float = 1e-3,
    max_steps: int = 100,
    centred: bool = True,
) -> BiCrossValidation:
    """2 × 2 bi-cross-validation (Owen and Perry, 2009): rows, and the features of every view, are halved in the given orders.

    For a held-out block X_d[j, k] the signal M̂ is fitted and refitted on X[¬j, ¬k], standardised by itself; the prediction is
    X_d[j, ¬k] M̂_d⁺ X_d[¬j, k]. All blocks have the means of the training rows taken off first (`centred`), so that shifting
    the data changes nothing; the authors take them raw and add the training means to M̂ instead.

    Every block is reduced first by a QR decomposition, which makes the cost of a fit free of n; the fits of a block go along
    the grid, each from the last one's duals, scaled to the new penalties.
    """
    n_modalities = len(dims)
    rows, rows_count = _halves(row_order)
    columns = [_halves(order) for order in column_orders]
    widths = [count.shape[1] for _, count in columns]
    edges, total = np.cumsum([0, *dims]), sum(widths)

    def features(M: Float[Array, "h d"], fold: Int[Array, ""]) -> Float[Array, "h _p"]:
        return jnp.concatenate(
            [
                jnp.where(count[fold][None, :], M[:, a + index[fold]], 0)
                for a, (index, count) in zip(edges, columns, strict=False)
            ],
            axis=1,
        )

    def block(number: Int[Array, ""]) -> tuple[Float[Array, "G M"], Float[Array, " G"]]:
        j, k = number // 2, number % 2
        seen, seen_count = rows[1 - j], rows_count[1 - j].astype(X.dtype)
        held, held_count = rows[j], rows_count[j].astype(X.dtype)
        n_seen, n_held = jnp.sum(seen_count), jnp.sum(held_count)
        train = jnp.where(seen_count[:, None] > 0, X[seen], 0)
        test = jnp.where(held_count[:, None] > 0, X[held], 0)
        means = jnp.sum(train, axis=0) / n_seen
        if centred:
            test = (test - means[None, :]) * held_count[:, None]
        ones = seen_count[:, None] / jnp.sqrt(n_seen)
        R = jnp.linalg.qr(jnp.concatenate([ones, features(train, 1 - k), features(train, k)], axis=1), mode="r")
        R = R[: 1 + total]
        level, fitted, target = R[:1, 1:], R[1:, 1 : 1 + total], R[1:, 1 + total :]
        Z = fitted / view_norms(fitted, widths)[None, :]
        Z, narrow = _narrow(Z, widths)

        known, unknown = features(test, 1 - k), features(test, k)
        own = unknown - jnp.where(held_count[:, None] > 0, jnp.sum(unknown, axis=0)[None, :] / n_held, 0)
        if test.shape[0] > 2 * total:
            both = jnp.linalg.qr(jnp.concatenate([known, unknown], axis=1), mode="r")
            known, unknown = both[:, :total], both[:, total:]
        sizes = jnp.stack([jnp.sum(part**2) for part in _split(own, widths)])
        sizes = jnp.where(sizes > 0, sizes, 1)

        def point(carry, level_penalties):
            duals, last = carry
            penalties = _by_structure(level_penalties, weights)
            ratio = jnp.where(last > 0, penalties / jnp.where(last > 0, last, 1), 1)
            start = tuple(Y * r for Y, r in zip(duals, ratio, strict=True))
            found = penalised_signal(Z, penalties, narrow, start=start, tolerance=tolerance, max_steps=max_steps)
            bases, rank = refit_bases(found.signal, narrow)
            parts = (_split(M, widths) for M in (fitted, target, known, unknown))
            levels_by_view = [
                jnp.concatenate([a, b], axis=1)
                for a, b in zip(_split(level[:, :total], widths), _split(level[:, total:], widths), strict=True)
            ]
            inputs = zip(bases, *parts, levels_by_view, strict=True)
            errors = [_held_out_error(P, f, t, kn, un, None if centred else lv) for P, f, t, kn, un, lv in inputs]
            return (found.duals, penalties), (jnp.stack(errors) / sizes, rank.astype(X.dtype))

        zeros = tuple(jnp.zeros((Z.shape[0], sum(narrow[m - 1] for m in s)), X.dtype) for s in full_lattice(n_modalities))
        _, (errors, ranks) = lax.scan(point, (zeros, jnp.zeros_like(weights)), levels)
        return errors, ranks

    errors, ranks = lax.map(block, jnp.arange(4))
    return BiCrossValidation(levels, jnp.swapaxes(errors, 0, 1), jnp.mean(ranks, axis=0))


def _choose_levels(
    X: Float[Array, "n d"],
    dims: Sequence[int],
    config: HnnConfig,
    weights: Float[Array, " S"],
    largest: Float[Array, " M"],
    key: Key[Array, ""],
) -> Float[Array, " M"]:
    """The penalties by size of structure that bi-cross-validation prefers, among fractions of the largest ones."""
    grid = jnp.asarray(penalty_grid(config.fractions, len(dims)), X.dtype) * largest[None, :]
    row_key, *column_keys = jr.split(key, 1 + len(dims))
    orders = [jr.permutation(k, dim) for k, dim in zip(column_keys, dims, strict=True)]
    rows, tolerance, max_steps = jr.permutation(row_key, X.shape[0]), config.path_tolerance, config.path_max_steps
    held_out = bi_cross_validate(X, dims, grid, weights, rows, orders, tolerance=tolerance, max_steps=max_steps)
    return grid[held_out.choose(config.rule)]


def structure_scores(
    bases: Sequence[Float[Array, "q _w"]],
    parts: Sequence[Float[Array, "q _p"]],
    widths: Sequence[tuple[Structure, int]],
    angle: float,
    given: bool,
) -> tuple[Float[Array, "q R"], Bool[Array, " R"]]:
    """(Q, which columns are in use): directions common to the views of each structure, larger structures first.

    `bases` P_d span the column spaces of the views' signals, `parts` are the signals. Of a structure A, in the complement of
    the directions found for the structures that contain A: the eigenvectors of (1/|A|) Σ_{d∈A} P_d P_dᵀ, whose eigenvalues are
    mean squared cosines with the column spaces. All above 1 − `angle` are common to the views, and ordered by how strong they
    are in every one: by the parallel sum (Σ_d E_d⁻¹)⁻¹ of the views' Gram matrices E_d among them. Then come the others, down to
    nothing if the ranks are `given`, or else not at all. Columns of a structure are orthonormal, and orthogonal to those of the
    structures above it; unused ones are 0.
    """
    eye = jnp.eye(bases[0].shape[0], dtype=bases[0].dtype)
    found: dict[Structure, Float[Array, "q _r"]] = {}
    used = []
    for structure, width in widths:
        above = [Q for other, Q in found.items() if set(other) > set(structure)]
        rest = eye
        if above:
            taken = jnp.concatenate(above, axis=1)
            rest = eye - least_squares_map(taken) @ taken.T
        stacked = rest @ jnp.concatenate([bases[m - 1] for m in structure], axis=1) / np.sqrt(len(structure))
        cosines, vectors = jnp.linalg.eigh(stacked @ stacked.T)
        common = cosines > 1 - angle
        within = jnp.where(common[None, :], vectors, 0)
        inverses = []
        for m in structure:
            part = within.T @ parts[m - 1]
            inverses.append(spd_inverse(part @ part.T + RANK_TOLERANCE**2 * eye)[0])
        strength, _ = spd_inverse(sum(inverses[1:], start=inverses[0]))
        inner = jnp.where(common[:, None] & common[None, :], strength + 2 * eye, 0)
        order, turn = jnp.linalg.eigh(inner + jnp.diag(jnp.where(common, 0, cosines)))
        order, chosen = order[::-1][:width], (vectors @ turn)[:, ::-1][:, :width]
        kept = order > (RANK_TOLERANCE if given else 1)
        found[structure] = jnp.where(kept[None, :], chosen, 0)
        used.append(kept)
    return jnp.concatenate(list(found.values()), axis=1), jnp.concatenate(used)


def fit(
    views: Any,
    hierarchy: Hierarchy,
    config: HnnConfig = HnnConfig(),
    *,
    y: Any = None,
    key: Any = None,
) -> LinearFit:
    """Hierarchical nuclear norm: min_M ½‖Z − M‖² + Σ_A λ_A‖M_A‖_* of the centred views of unit Frobenius norm, then scores.

    Penalties by size of structure, shared within a size by SURE weights (`structure_weights`), chosen by 2 × 2
    bi-cross-validation with `key` unless given. The minimiser (`penalised_signal`) is refitted (`refit_bases`). The paper stops
    at the signal; scores by structure are built here from its column spaces (`structure_scores`), scaled to a mean square of 1
    where in use, and loadings are the least-squares ones of the refitted signal of each view on the scores of its structures.
    `y` is not used.

    `factors` come from the column spaces of the signal; `transform` gives the least-squares scores of a row on the loadings,
    for training rows as for new ones. The two are equal where the data are a sum of structures without noise; otherwise
    those of `transform` fit the data at least as well, as nothing restrains them, and they hold the noise within the
    loadings' span. `objective` is that of the penalised problem, `steps` are its passes.

    Raises `ValueError` for what `check_views` refuses, a key that is needed and missing, and options that do not fit the data.
    """
    return _decomposition(stack_views(views, as_hierarchy(hierarchy).dims), hierarchy, config, key)


@compiled
def _decomposition(X: Float[Array, "n d"], hierarchy: Hierarchy, config: HnnConfig, key: Any) -> LinearFit:
    """The fit to views side by side."""
    n, d = X.shape
    n_modalities = hierarchy.n_modalities
    if config.penalties is None:
        key = as_key(key, "for the halves of the bi-cross-validation that chooses the penalties")
    if config.penalties is not None and len(config.penalties) != n_modalities:
        raise ValueError(f"penalties: has {len(config.penalties)} values; expected one a size of structure, {n_modalities}")
    widths = hierarchy.ranks
    if config.width is not None:
        widths = tuple((s, config.width) for s in full_lattice(n_modalities))
        if config.width > min(hierarchy.dims):
            raise ValueError(
                f"width: is {config.width}; expected at most {min(hierarchy.dims)}, the features of the smallest view"
            )
    if config.penalties is None and not len(penalty_grid(config.fractions, n_modalities)):
        raise ValueError(f"fractions: are {config.fractions}; expected some that, one a size of structure, add up to at most 1")
    needed = max(4 if config.penalties is None else 2, max(rank for _, rank in widths) + 1)
    if n < needed:
        raise ValueError(f"views: have {n} rows; expected at least {needed}")

    Z, centre, _ = centred(X)
    scale = view_norms(Z, hierarchy.dims)
    Z = Z / scale[None, :]
    rotation, compressed = jnp.linalg.qr(Z) if n > d else (None, Z)
    narrow, narrow_dims = _narrow(compressed, hierarchy.dims)
    weights, largest = structure_weights(narrow, hierarchy.dims, n, config.weights, narrow_dims)

    if config.penalties is None:
        levels = _choose_levels(Z, hierarchy.dims, config, weights, largest, key)
    else:
        levels = jnp.asarray(config.penalties, X.dtype)

    tolerance = default_tolerance(X.dtype, double=1e-7, single=1e-5) if config.tolerance is None else config.tolerance
    penalties = _by_structure(levels, weights)
    found = penalised_signal(narrow, penalties, narrow_dims, tolerance=tolerance, max_steps=config.max_steps)
    bases, _ = refit_bases(found.signal, narrow_dims)
    refitted = [P @ (P.T @ part) for P, part in zip(bases, _split(compressed, hierarchy.dims), strict=True)]
    scores, used = structure_scores(bases, refitted, widths, config.angle, config.ranks == "given")

    held = np.array([[m in s for s, rank in widths for _ in range(rank)] for m in hierarchy.modalities])
    owns = [jnp.where(seen[None, :], scores, 0) for seen in held]
    blocks = [part.T @ least_squares_map(own) for part, own in zip(refitted, owns, strict=True)]
    root = np.sqrt(n)
    membership = jnp.asarray(held) & used[None, :]
    loadings = jnp.where(jnp.repeat(membership, np.array(hierarchy.dims), axis=0), jnp.concatenate(blocks, axis=0) / root, 0)
    factors = (scores if rotation is None else rotation @ scores) * root
    return LinearFit(
        centre=centre,
        scale=scale,
        loadings=loadings,
        factors=factors,
        score_map=least_squares_map(loadings),
        membership=membership,
        objective=found.objective,
        status=found.status,
        steps=found.steps,
        dims=hierarchy.dims,
    )
