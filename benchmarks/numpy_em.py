"""Expectation–maximisation for the hierarchical likelihood in plain NumPy, written as a careful user would write it.

The model is x = Λz + ε with z ~ N(0, I), ε ~ N(0, σ²I), and Λ zero where a modality does not see a structure. All that EM needs
of the rows is S: with W = ΛᵀΛ + σ²I,

    E-step  C = E[xzᵀ] = S Λ W⁻¹,   E[zzᵀ] = σ²W⁻¹ + W⁻¹ΛᵀC
    M-step  Λ_mA = C_mA E[zzᵀ]_AA⁻¹ for every modality m, over the columns A that it sees;   σ² = (tr S − Σ Λ∘C)/d

One product with S an iteration, O(dK²) beside it (Rubin and Thayer, 1982, with one noise variance and a zero pattern). Everything
follows the dtype of its input. Independent of hcl_jax, it serves to check and to time it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.linalg as sla

Array = np.ndarray
Modality = tuple[slice, Array]
"""The rows of a modality, and the columns that it sees."""


def em_steps(S: Array, loadings: Array, noise_variance: float, modalities: Sequence[Modality]) -> Iterator[tuple[Array, float]]:
    """(Λ, σ²) after the first iteration, the second, and so on without end."""
    d, K = loadings.shape
    trace, identity = np.trace(S), np.eye(K, dtype=S.dtype)
    noise_variance = S.dtype.type(noise_variance)
    while True:
        W = loadings.T @ loadings + noise_variance * identity
        inverse = sla.cho_solve(sla.cho_factor(W, check_finite=False), identity, check_finite=False)
        C = (S @ loadings) @ inverse
        second = noise_variance * inverse + inverse @ (loadings.T @ C)
        loadings = np.zeros_like(loadings)
        for rows, columns in modalities:
            factor = sla.cho_factor(second[np.ix_(columns, columns)], check_finite=False)
            loadings[rows, columns] = sla.cho_solve(factor, C[rows, columns].T, check_finite=False).T
        noise_variance = (trace - np.vdot(loadings, C)) / S.dtype.type(d)
        yield loadings, float(noise_variance)


def log_likelihood_per_row(S: Array, loadings: Array, noise_variance: float) -> float:
    """−½(d log 2π + log det Σ + tr(Σ⁻¹S)), Σ = ΛΛᵀ + σ²I: the mean over rows of which S is the covariance. In float64."""
    S, loadings, noise = S.astype(float), loadings.astype(float), float(noise_variance)
    d, K = loadings.shape
    factor = sla.cho_factor(loadings.T @ loadings + noise * np.eye(K))
    log_det = (d - K) * np.log(noise) + 2 * np.sum(np.log(np.diagonal(factor[0])))
    explained = np.trace(sla.cho_solve(factor, loadings.T @ (S @ loadings)))
    return float(-0.5 * (d * np.log(2 * np.pi) + log_det + (np.trace(S) - explained) / noise))
