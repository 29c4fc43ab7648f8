"""MMFL (Mao et al., 2026; arXiv 2409.20559): a decomposition with given structures, and a linear prediction from its scores.

Over orthonormal U, V with the zero pattern of the hierarchy, β and b it minimises, for Z as in `slide` and a real response

    λ‖Z − UVᵀ‖² + Σ_i (y_i − u_iᵀβ − b)² + γ‖β‖²;    for labels ±1 the sum is    Σ_i max(0, 1 − y_i(u_iᵀβ + b))².

The squared hinge is the least square over targets on the right side, min_{y_i t_i ≥ 1} (t_i − u_iᵀβ − b)², so both are one
problem with a target t; t = y in a regression. Given the rest each of V = zero pattern of ZᵀU, β = Uᵀ(t − b)/(1 + γ), t,
b = mean(t) and U = polar(λZV + (t − b)βᵀ) is an exact minimiser, and the objective never rises. In a regression the response is
thus a further view of one feature, seen by every structure. The published algorithm, an augmented Lagrangian with penalty μ, has
the same fixed points and is kept as `solver="alm"`; there is no μ in the problem, and none in the default solver.

Where the released code departs from this: a real response had the one-sided rule of the labels, and U was not the minimiser.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from hcl_jax.baselines.slide import (
    canonical_columns,
    centre_and_scale,
    feature_mask,
    leading_loadings,
    moments,
    squarem,
)
from hcl_jax.compiled import compiled
from hcl_jax.estimators.estimate import CONVERGED, NON_FINITE, OUT_OF_STEPS, default_tolerance
from hcl_jax.fitted import LinearFit, stack_with_response
from hcl_jax.linalg import inverse_root, least_squares_map
from hcl_jax.structure import Hierarchy, as_hierarchy
from hcl_jax.views import as_key, centred, check_options, norms, view_norms


def _values(option: float | tuple[float, ...]) -> tuple[float, ...]:
    return option if isinstance(option, tuple) else (option,)


@dataclass(frozen=True)
class MmflConfig:
    """Options of MMFL.

    `task`: "regression", or "classification" of labels −1 and 1. `lam`, `gamma`: λ and γ; where either is a tuple, the pair is
    chosen by cross-validation with `folds` folds. With `relative`, λ is in units of d·‖y − ȳ‖²/‖Z‖², which makes the response
    weigh as much as one of d average features at λ = 1: what the paper's λ = 1 amounts to for features and response of unit
    variance, here for any number of rows and any scaling. Without, λ multiplies ‖Z − UVᵀ‖², each view of norm 1, as it stands.
    U being orthonormal, γ shrinks β by 1/(1 + γ) whatever the number of rows: the paper's γ = 1 halves what a regression
    predicts, which a further regression on the scores undoes. `oos`: how rows are scored without their response, by "eq11" of the
    paper, the ridge λzV(λVᵀV + ββᵀ)⁻¹ that takes the response to be the intercept, or by "ls", least squares on the loadings.
    `solver`: "alternating", or "alm" with penalty `mu`, many times slower. `tolerance`: relative change in one step at which to
    stop (None: 1e-8, in single precision 1e-4), or after `max_steps`. `accelerate`: as in SLIDE.

    Raises `ValueError` that names the option when its value is out of range.
    """

    task: str = "regression"
    lam: float | tuple[float, ...] = 1.0
    relative: bool = True
    gamma: float | tuple[float, ...] = 1.0
    oos: str = "eq11"
    folds: int = 5
    solver: str = "alternating"
    mu: float = 1.0
    tolerance: float | None = None
    max_steps: int = 5000
    accelerate: bool = True

    def __post_init__(self) -> None:
        check_options(
            self,
            choices={"task": ("regression", "classification"), "oos": ("eq11", "ls"), "solver": ("alternating", "alm")},
            positive=("mu", "tolerance"),
            least={"folds": 2, "max_steps": 1},
        )
        if not _values(self.lam) or not all(lam > 0 for lam in _values(self.lam)):
            raise ValueError(f"lam: is {self.lam}; expected a positive number, or a tuple of them")
        if not _values(self.gamma) or not all(gamma >= 0 for gamma in _values(self.gamma)):
            raise ValueError(f"gamma: is {self.gamma}; expected a number of at least 0, or a tuple of them")

    @property
    def weights(self) -> tuple[tuple[float, float], ...]:
        """All pairs (λ, γ), λ outermost."""
        return tuple((lam, gamma) for lam in _values(self.lam) for gamma in _values(self.gamma))


class _Solution(NamedTuple):
    """In units of the response's spread."""

    scores: Float[Array, "n R"]
    loadings: Float[Array, "d R"]
    coefficients: Float[Array, " R"]
    intercept: Float[Array, ""]
    converged: Bool[Array, ""]
    steps: Int[Array, ""]


class _Problem(NamedTuple):
    """Standardised rows, of which those not `inside` are zero; response and margin 1 in units of the response's spread."""

    Z: Float[Array, "n d"]
    y: Float[Array, " n"]
    inside: Bool[Array, " n"]
    margin: Float[Array, ""]
    mask: Bool[Array, "d R"]
    start: Float[Array, "d R"]


def _targets(problem: _Problem, predicted: Float[Array, " n"], config: MmflConfig) -> Float[Array, " n"]:
    """t: the response itself, or the nearest value to the prediction on the label's side of the margin."""
    if config.task == "regression":
        return problem.y
    sign = jnp.sign(problem.y)
    return sign * jnp.maximum(problem.margin, sign * predicted)


def _alternate(problem: _Problem, weights: Float[Array, "2"], config: MmflConfig, tolerance: float) -> _Solution:
    """Exact alternating minimisation in (V, β, t): U is the polar factor of B = λZV + (t − b)βᵀ, and enters only through ZᵀU,
    Uᵀ(t − b) and Uβ, so that a step costs d²R + nd."""
    Z, (lam, gamma), product = problem.Z, weights, moments(problem.Z)
    n_inside = problem.inside.sum().astype(Z.dtype)

    def centred(t):
        t = _targets(problem, t, config)  # an extrapolated target may have left its side
        b = jnp.sum(jnp.where(problem.inside, t, 0)) / n_inside
        return jnp.where(problem.inside, t - b, 0), b

    def root_of(V, beta, t):
        SV, zt, tt = product(V), Z.T @ t, t @ t
        cross = jnp.outer(V.T @ zt, beta)
        root, nuclear = inverse_root(lam**2 * V.T @ SV + lam * (cross + cross.T) + tt * jnp.outer(beta, beta))
        return SV, zt, tt, root, nuclear

    def step(state):
        V, beta, target = state
        t, b = centred(target)
        SV, zt, tt, root, nuclear = root_of(V, beta, t)
        objective = lam * jnp.sum(V**2) + tt + (1 + gamma) * beta @ beta - 2 * nuclear
        W = (lam * SV + jnp.outer(zt, beta)) @ root
        new = root @ (lam * V.T @ zt + tt * beta) / (1 + gamma)
        along = root @ new
        predicted = lam * (Z @ (V @ along)) + t * (beta @ along) + b  # Uβ + b
        return (jnp.where(problem.mask, W, 0), new, _targets(problem, predicted, config)), objective

    t, _ = centred(problem.y)
    sizes = jnp.sum(problem.start**2, axis=0)
    beta = jnp.where(sizes > 0, problem.start.T @ (Z.T @ t) / jnp.where(sizes > 0, sizes, 1), 0) / (1 + gamma)
    start = (jnp.where(problem.mask, problem.start, 0), beta, problem.y)
    found = squarem(step, start, tolerance=tolerance, max_steps=config.max_steps, accelerate=config.accelerate)
    V, beta, target = found.point
    t, b = centred(target)
    U = (lam * Z @ V + jnp.outer(t, beta)) @ root_of(V, beta, t)[3]
    return _Solution(U, V, beta, b, found.converged, found.steps)


def _augmented_lagrangian(problem: _Problem, weights: Float[Array, "2"], config: MmflConfig, tolerance: float) -> _Solution:
    """The published iteration with the exact U: z is held to y − Uβ − b by a dual q and the penalty μ."""
    Z, y, inside, mu = problem.Z, problem.y, problem.inside, config.mu
    lam, gamma = weights
    n_inside = inside.sum().astype(Z.dtype)

    def polar(B):
        return B @ inverse_root(B.T @ B)[0]

    def step(state):
        U, z, q, b, *_, steps = state
        V = jnp.where(problem.mask, Z.T @ U, 0)
        beta = mu / (2 * gamma + mu) * U.T @ (y - b - z - q / mu)
        b = jnp.sum(jnp.where(inside, y - z - U @ beta - q / mu, 0)) / n_inside
        s = y - U @ beta - b - q / mu
        penalised = s * y > 0 if config.task == "classification" else jnp.ones_like(inside)
        z = jnp.where(inside, jnp.where(penalised, s / (1 + 2 / mu), s), 0)
        U_next = polar(lam * Z @ V + mu / 2 * jnp.outer(jnp.where(inside, y - b - z - q / mu, 0), beta))
        violation = jnp.where(inside, z - y + U_next @ beta + b, 0)
        change = jnp.maximum(jnp.linalg.norm(U_next - U), jnp.linalg.norm(violation))
        return U_next, z, q + mu * violation, b, beta, change, steps + 1

    zero = jnp.zeros_like(y)
    start = (polar(Z @ problem.start), zero, zero, zero[0], problem.start[0], jnp.full_like(zero[0], jnp.inf), jnp.asarray(0))
    U, _, _, b, beta, change, steps = lax.while_loop(lambda s: (s[5] > tolerance) & (s[6] < config.max_steps), step, start)
    return _Solution(U, jnp.where(problem.mask, Z.T @ U, 0), beta, b, change <= tolerance, steps)


def _problem(Z, y, inside, mask, n_columns, config):
    """(the problem in units of the response's spread, that spread, λ = 1 in the config's units)."""
    spread = norms(centred(y[:, None], inside)[0])[0]
    spread = jnp.where(spread > 0, spread, 1)
    size = jnp.sum(Z**2)
    unit = Z.shape[1] / jnp.where(size > 0, size, 1) if config.relative else 1 / spread**2
    problem = _Problem(Z, jnp.where(inside, y, 0) / spread, inside, 1 / spread, mask, leading_loadings(Z, n_columns))
    return problem, spread, unit


def _solve(problem: _Problem, weights: Float[Array, "2"], config: MmflConfig) -> _Solution:
    tolerance = default_tolerance(problem.Z.dtype) if config.tolerance is None else config.tolerance
    solver = _alternate if config.solver == "alternating" else _augmented_lagrangian
    return solver(problem, weights, config, tolerance)


def _score_map(solution: _Solution, lam: Float[Array, ""], config: MmflConfig) -> Float[Array, "d R"]:
    V = solution.loadings
    if config.oos == "ls":
        return least_squares_map(V)
    root = jnp.sqrt(lam)
    return root * least_squares_map(jnp.concatenate([root * V, solution.coefficients[None, :]]))[:-1]


def fit(
    views: Any,
    hierarchy: Hierarchy,
    config: MmflConfig = MmflConfig(),
    *,
    y: Any = None,
    key: Any = None,
) -> LinearFit:
    """MMFL of the views and y; key only draws the folds of a cross-validation.

    `factors` are the orthonormal U, which have seen the response; `objective` is the one above, in the response's units. Scores
    of rows, T = transform(views), see the views only. For the training rows U = polar(λTVᵀV + (t − b)βᵀ) with "ls", and
    U = polar(T(λVᵀV + ββᵀ) + (t − b)βᵀ) with "eq11"; the two kinds of score differ by an R × R matrix, and the predictions
    Tβ + b by one factor, 1/(1 + βᵀ(λVᵀV)⁻¹β), towards b.

    Raises `ValueError` for what `check_views` refuses, a key that is needed and missing, a response that is missing, not finite,
    not of the task's kind or of one class only, or rows that are fewer than one more than the factors.
    """
    X, y = stack_with_response(views, as_hierarchy(hierarchy).dims, y)
    if config.task == "classification" and not isinstance(y, jax.core.Tracer) and set(np.unique(y).tolist()) != {-1.0, 1.0}:
        raise ValueError(f"y: holds {np.unique(y).tolist()[:5]}; expected both labels −1 and 1, and no other value")
    return _decomposition(X, y, hierarchy, config, key)


@compiled
def _decomposition(
    X: Float[Array, "n d"], y: Float[Array, " n"], hierarchy: Hierarchy, config: MmflConfig, key: Any
) -> LinearFit:
    """The fit to views side by side."""
    n = X.shape[0]
    folds = config.folds if len(config.weights) > 1 else 1
    training_rows = n - -(-n // folds) if folds > 1 else n
    if training_rows <= hierarchy.n_factors:
        held = f", of which a fold is fitted to {training_rows}" if folds > 1 else ""
        raise ValueError(f"views: have {n} rows{held}; expected more than the {hierarchy.n_factors} factors of the hierarchy")
    Z, centre, scale = centre_and_scale(X, hierarchy.dims)
    weights = jnp.asarray(config.weights, dtype=Z.dtype)
    best = jnp.zeros((), int)
    if folds > 1:
        best = jnp.argmin(cross_validation(X, hierarchy, config, y=y, key=as_key(key, "for the folds")))
    membership = jnp.asarray(hierarchy.modality_mask)
    mask, everyone = feature_mask(membership, hierarchy.dims), jnp.ones(n, dtype=bool)
    problem, spread, unit = _problem(Z, y, everyone, mask, hierarchy.n_factors, config)
    lam, gamma = weights[best, 0] * unit, weights[best, 1]
    found = _solve(problem, jnp.stack([lam, gamma]), config)
    rotation, _ = canonical_columns(found.loadings, membership)
    V = jnp.where(mask, found.loadings @ rotation, 0)
    turned = found._replace(scores=found.scores @ rotation, loadings=V, coefficients=rotation.T @ found.coefficients)
    U, beta, b = turned.scores, turned.coefficients * spread, turned.intercept * spread
    wrong = _loss(y, U @ beta + b, config)
    objective = lam * spread**2 * jnp.sum((Z - U @ V.T) ** 2) + jnp.sum(wrong) + gamma * beta @ beta
    status = jnp.where(jnp.isfinite(objective), jnp.where(found.converged, CONVERGED, OUT_OF_STEPS), NON_FINITE)
    score_map = _score_map(turned, lam, config)
    return LinearFit(
        centre=centre,
        scale=scale,
        loadings=V,
        factors=U,
        score_map=score_map,
        membership=membership,
        objective=objective,
        status=status,
        steps=found.steps,
        dims=hierarchy.dims,
        coefficients=beta,
        intercept=b,
    )


def _loss(y: Float[Array, " n"], predicted: Float[Array, " n"], config: MmflConfig) -> Float[Array, " n"]:
    if config.task == "regression":
        return (y - predicted) ** 2
    return jnp.maximum(1 - y * predicted, 0) ** 2


def cross_validation(
    X: Float[Array, "n d"],
    hierarchy: Hierarchy,
    config: MmflConfig,
    *,
    y: Float[Array, " n"],
    key: Key[Array, ""],
) -> Float[Array, " L"]:
    """Mean loss in predicting held-out rows, for every (λ, γ) of the config's `weights`: the squared error, or the squared hinge.

    Everything that a fold's rows are held out from, centring and scaling too, sees the other rows only. The folds are random, of
    equal size up to one, and of labels hold equal shares.
    """
    X, _, _ = centre_and_scale(X, hierarchy.dims)  # only to be far from rounding: every fold centres and scales anew
    n = X.shape[0]
    order = jr.permutation(key, n)
    if config.task == "classification":
        order = order[jnp.argsort(y[order], stable=True)]
    fold_of = jnp.zeros(n, dtype=order.dtype).at[order].set(jnp.arange(n, dtype=order.dtype) % config.folds)
    mask = feature_mask(jnp.asarray(hierarchy.modality_mask), hierarchy.dims)

    def losses(fold):
        inside = fold_of != fold
        training, mean, _ = centred(X, inside)
        norms = view_norms(training, hierarchy.dims)
        Z = (X - mean[None, :]) / norms[None, :]
        problem, spread, unit = _problem(training / norms[None, :], y, inside, mask, hierarchy.n_factors, config)

        def loss(weights):
            lam, gamma = weights[0] * unit, weights[1]
            found = _solve(problem, jnp.stack([lam, gamma]), config)
            scores = Z @ _score_map(found, lam, config)
            predicted = spread * (scores @ found.coefficients + found.intercept)
            return jnp.sum(jnp.where(inside, 0, _loss(y, predicted, config)))

        return lax.map(loss, jnp.asarray(config.weights, dtype=X.dtype))

    return lax.map(losses, jnp.arange(config.folds, dtype=fold_of.dtype)).sum(axis=0) / n
