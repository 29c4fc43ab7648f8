"""What the best possible method could reach, on the replicate's own draw (theory: Section 6)."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from hcl_jax.compiled import compiled
from hcl_jax.covariance import SampleCovariance, check_covariance
from hcl_jax.fisher import FisherOperator, Parameters
from hcl_jax.metrics import prediction_errors, recovery_errors
from hcl_jax.model import ResponseTruth, Truth, as_truth


def _check(truth: Truth, covariance: SampleCovariance) -> None:
    """Raise `ValueError` unless the two are of these types and have the same features."""
    as_truth(truth, Truth)
    check_covariance(covariance)
    d = truth.hierarchy.n_features
    if covariance.n_features != d:
        raise ValueError(f"covariance: has {covariance.n_features} features; expected {d}, as the truth has")


@compiled(check=_check)
def efficient_error(truth: Truth, covariance: SampleCovariance, max_steps: int = 500) -> tuple[Parameters, Array]:
    """((V, τ), converged): the error of an efficient estimator to first order, the projection of Z = S − Σ on the tangent space.

    The projection, in the Fisher form, solves H(V, τ) = −½∇ at the truth: it is one exact Fisher-scoring step from there.
    """
    operator = FisherOperator(truth.loadings, truth.noise_variance, truth.hierarchy, truth.noise)
    right = operator.minus_half_gradient(covariance.product(operator.image()), covariance.variances())
    tolerance = 1e-9 if truth.loadings.dtype == jnp.float64 else 1e-4
    solution = operator.solve(right, tolerance, max_steps)
    residual = [a - b for a, b in zip(operator.product(solution), right, strict=True)]
    size = [jnp.sqrt(sum(jnp.sum(part**2) for part in parts)) for parts in (residual, right)]
    return solution, size[0] <= 10 * tolerance * size[1]


@compiled(check=_check)
def cramer_rao(truth: Truth, covariance: SampleCovariance) -> dict[str, Array]:
    """`cramer-rao`: every metric of `recovery_errors` for an efficient estimator on this draw, as f(Λ + hV, Λ)/h with a small h.

    Its root mean square over draws is the Cramér–Rao bound of the metric. It bounds unbiased estimators locally: shrinkage
    may lie below it. Also `status` and `steps` of the solver.
    """
    (V, _), converged = efficient_error(truth, covariance)
    h = 1e-4 if truth.loadings.dtype == jnp.float64 else 1e-2
    errors = recovery_errors(truth.loadings + h * V, truth.hierarchy, truth.loadings, truth.hierarchy)
    limits = {name: value / h for name, value in errors.items()}
    finite = jnp.isfinite(limits["gram_frobenius"])
    status = jnp.where(finite, jnp.where(converged, 0, 1), 2)
    return limits | {"status": status, "steps": jnp.ones((), int)}


@compiled(check=_check)
def detection(truth: Truth, covariance: SampleCovariance) -> dict[str, Array]:
    """`detection`: how many of the K signal eigenvalues can be seen, with ν degrees of freedom.

    `visible_global`: eigenvalues of G above σ²√(d/ν), the threshold of methods that ignore the zero pattern. `visible_structure`,
    per structure: eigenvalues of Λ_sΛ_sᵀ above σ²√(Σ_{m∈s} d_m/ν).
    """
    hierarchy = truth.hierarchy
    L, noise, _ = truth.in_equal_noise()

    def count(loadings: Array, dim: int) -> Array:
        eigenvalues = jnp.linalg.eigvalsh(loadings.T @ loadings)
        return jnp.sum(eigenvalues > noise * jnp.sqrt(dim / covariance.nu)).astype(L.dtype)

    dims = [sum(hierarchy.dims[m - 1] for m in s) for s in hierarchy.structures]
    per_structure = [count(L[:, hierarchy.columns(s)], dim) for s, dim in zip(hierarchy.structures, dims, strict=True)]
    counts = {"visible_global": count(L, hierarchy.n_features), "visible_structure": jnp.stack(per_structure)}
    return counts | {"status": jnp.zeros((), int), "steps": jnp.zeros((), int)}


def bayes(truth: Truth, covariance: SampleCovariance | None = None) -> dict[str, Array]:
    """`bayes`: the prediction metrics of E[y|x] under the truth. Also `status` and `steps`.

    Raises `ValueError` for a truth without a response.
    """
    known = as_truth(truth, ResponseTruth)
    best = prediction_errors(known.conditional_mean(), jnp.zeros((), known.loadings.dtype), known)
    return best | {"status": jnp.zeros((), int), "steps": jnp.zeros((), int)}


LIMITS: dict[str, Callable[[Truth, SampleCovariance], dict[str, Array]]] = {
    "cramer-rao": cramer_rao,
    "detection": detection,
    "bayes": bayes,
}
