"""What rows of scores hold, by linear maps that are fitted to the first n rows and judged on the others."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def residuals(features: Float[Array, "n p"], targets: Float[Array, "n q"], n: int) -> Float[Array, "m q"]:
    """The targets of the rows from n on, less what a regression on the first n rows expects."""
    F = features - features[:n].mean(axis=0, keepdims=True)
    T = targets - targets[:n].mean(axis=0, keepdims=True)
    gram = F[:n].T @ F[:n] / n
    jitter = 1e-9 * jnp.trace(gram) / max(gram.shape[0], 1) + jnp.finfo(gram.dtype).tiny  # columns may be zero
    B = jnp.linalg.solve(gram + jitter * jnp.eye(gram.shape[0], dtype=gram.dtype), F[:n].T @ T[:n] / n)
    return T[n:] - F[n:] @ B


def residual_variance(features: Float[Array, "n p"], targets: Float[Array, "n q"], n: int) -> Float[Array, " q"]:
    """Mean squares of the residuals."""
    return jnp.mean(residuals(features, targets, n) ** 2, axis=0)


def r_squared(scores: Float[Array, "n R"], z: Float[Array, "n K"], n: int) -> Float[Array, " K"]:
    """Of every column of z, regressed on the scores of the first n rows, among the others."""
    return 1 - residual_variance(scores, z, n) / residual_variance(scores[:, :0], z, n)


def gaussian_information(scores: Float[Array, "n R"], z: Float[Array, "n K"], n: int) -> Float[Array, ""]:
    """½ log det Cov(z) − ½ log det Cov(z less its regression on the scores), in nats: −½ Σ log(1 − ρ²) over the canonical
    correlations ρ, the mutual information of scores and z where they are jointly Gaussian, else what a linear map finds."""

    def half_log_det(rest: Float[Array, "m K"]) -> Float[Array, ""]:
        return jnp.linalg.slogdet(rest.T @ rest / rest.shape[0])[1] / 2

    return half_log_det(residuals(scores[:, :0], z, n)) - half_log_det(residuals(scores, z, n))


def accuracy(features: Float[Array, "n p"], y: Num[Array, " n"], n: int) -> Float[Array, ""]:
    """The share of the rows from n on whose label, 0 or 1, has the sign of a least-squares fit of ±1 to the first n."""
    target = 2 * y.astype(features.dtype)[:, None] - 1
    centre = target[:n].mean()
    expected = (target - centre)[n:] - residuals(features, target, n)
    return jnp.mean(((expected[:, 0] + centre > 0) == (y[n:] > 0)).astype(features.dtype))
