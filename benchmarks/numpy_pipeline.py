"""The published pipeline of one replicate in plain NumPy and SciPy, written as a careful user would write it.

Draw the data, form the sample covariance, take its eigenvalues for the noise variance, extract blocks (`hcl_svd`),
descend (`hcl_grad`). The two algorithms are the released code's, for three modalities that share all seven structures at one
rank, with columns in the order 123, 12, 13, 23, 1, 2, 3. Everything follows the dtype of its input. Independent of hcl_jax, it
serves to check and to time it.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import scipy.linalg as sla
import scipy.sparse.linalg as spla

Array = np.ndarray

STRUCTURES = ((1, 2, 3), (1, 2), (1, 3), (2, 3), (1,), (2,), (3,))
LANCZOS_ABOVE = 250  # for smaller matrices a full eigen-decomposition is as fast


def structure_columns(structure: tuple[int, ...], rank: int) -> slice:
    start = STRUCTURES.index(structure) * rank
    return slice(start, start + rank)


def modality_rows(dims: Sequence[int]) -> list[slice]:
    ends = np.cumsum(dims)
    return [slice(int(end - dim), int(end)) for dim, end in zip(dims, ends, strict=True)]


def loading_mask(dims: Sequence[int], rank: int, dtype: np.dtype) -> Array:
    """d × 7·rank: one where the modality sees the structure."""
    mask = np.zeros((sum(dims), len(STRUCTURES) * rank), dtype)
    for m, rows in enumerate(modality_rows(dims), start=1):
        for s in STRUCTURES:
            mask[rows, structure_columns(s, rank)] = m in s
    return mask


def haar(rng: np.random.Generator, rows: int, columns: int) -> Array:
    Q, R = np.linalg.qr(rng.standard_normal((rows, columns)))
    return Q * np.sign(np.diag(R))


def draw_loadings(rng: np.random.Generator, dims: Sequence[int], rank: int, dtype: np.dtype) -> Array:
    """Blocks U D Vᵀ with Haar U and V, and sorted uniform(0.5, 1.5) singular values."""
    loadings = np.zeros((sum(dims), len(STRUCTURES) * rank), dtype)
    for m, (dim, rows) in enumerate(zip(dims, modality_rows(dims), strict=True), start=1):
        for s in STRUCTURES:
            if m in s:
                D = np.sort(rng.uniform(0.5, 1.5, rank))[::-1]
                loadings[rows, structure_columns(s, rank)] = (haar(rng, dim, rank) * D) @ haar(rng, rank, rank).T
    return loadings


def draw_data(rng: np.random.Generator, loadings: Array, noise_variance: float, n: int) -> Array:
    """n rows of Λz + ε."""
    d, K = loadings.shape
    z = rng.standard_normal((n, K), dtype=loadings.dtype)
    x = rng.standard_normal((n, d), dtype=loadings.dtype)
    x *= loadings.dtype.type(np.sqrt(noise_variance))
    x += z @ loadings.T
    return x


def sample_covariance(x: Array) -> Array:
    """Divisor n − 1. Centres x in place."""
    x -= x.mean(axis=0)
    return (x.T @ x) / x.dtype.type(len(x) - 1)


def mean_small_eigenvalue(S: Array, K: int) -> float:
    """Mean of the d − K smallest eigenvalues: the noise variance."""
    return sla.eigvalsh(S, check_finite=False)[: len(S) - K].mean()


def largest_eigenpairs(A: Array, k: int) -> tuple[Array, Array]:
    """The k eigenpairs of largest absolute value."""
    if len(A) > LANCZOS_ABOVE and 4 * k < len(A):
        return spla.eigsh(A, k, which="LM", v0=np.ones(len(A), A.dtype))
    values, vectors = sla.eigh(A, check_finite=False, driver="evd")
    keep = np.argsort(-np.abs(values))[:k]
    return values[keep], vectors[:, keep]


def top_loading(A: Array, k: int) -> Array:
    values, vectors = largest_eigenpairs(A, k)
    return vectors * np.sqrt(np.abs(values))


def conditioned(A: Array, own: slice | Array, other: Array, inverse: tuple[Array, Array]) -> Array:
    """A_mm − A_mc (A_cc)⁺ A_cm, from the eigenpairs that the pseudo-inverse keeps."""
    values, vectors = inverse
    B = A[own][:, other] @ vectors
    return A[own][:, own] - (B / values) @ B.T


def hcl_svd(S_denoised: Array, dims: Sequence[int], rank: int) -> Array:
    """The published blockwise initialiser; each modality of a structure is extracted on its own, unaligned."""
    rows = [np.arange(sum(dims))[r] for r in modality_rows(dims)]
    loadings = np.zeros((sum(dims), len(STRUCTURES) * rank), S_denoised.dtype)
    S1 = S_denoised.copy()
    for m in range(3):
        other = np.concatenate([rows[j] for j in range(3) if j != m])
        inverse = largest_eigenpairs(S_denoised[np.ix_(other, other)], 6 * rank)
        block = top_loading(conditioned(S_denoised, rows[m], other, inverse), rank)
        loadings[rows[m], structure_columns((m + 1,), rank)] = block
        S1[np.ix_(rows[m], rows[m])] -= block @ block.T
    for pair in combinations(range(3), 2):
        c = rows[3 - sum(pair)]
        inverse = largest_eigenpairs(S1[np.ix_(c, c)], 3 * rank)
        for m in pair:
            block = top_loading(conditioned(S1, rows[m], c, inverse), rank)
            loadings[rows[m], structure_columns((pair[0] + 1, pair[1] + 1), rank)] = block
    for m in range(3):
        P = loadings[rows[m], rank : 4 * rank]
        loadings[rows[m], :rank] = top_loading(S1[np.ix_(rows[m], rows[m])] - P @ P.T, rank)
    return loadings


def objective(V: Array, SV: Array, S_norm_sq: float) -> float:
    """½‖VVᵀ − S̃‖_F² from S̃V, without forming VVᵀ."""
    VtV = V.T @ V
    return 0.5 * (np.vdot(VtV, VtV) - 2 * np.vdot(V, SV) + S_norm_sq)


def descent_step(V: Array, SV: Array, mask: Array, step: float) -> Array:
    return V - V.dtype.type(2 * step) * (V @ (V.T @ V) - SV) * mask


def hcl_grad(S_denoised: Array, start: Array, mask: Array) -> tuple[Array, int]:
    """The published descent: steps i = 0, 1, …; step length 1e-4, cut to a tenth after i = 10, 20, …; stops once i > 100 and the
    loss stands still, at i = 1000 at the latest."""
    V, step, previous = start, 1e-4, np.inf
    S_norm_sq = np.vdot(S_denoised, S_denoised)
    for i in range(1000):
        SV = S_denoised @ V
        loss = objective(V, SV, S_norm_sq)
        if i > 100 and abs(loss - previous) < 1e-6:
            break
        previous = loss
        V = descent_step(V, SV, mask, step)
        if i > 0 and i % 10 == 0:
            step /= 10
    return V, i


def descend_to(
    S_denoised: Array, start: Array, mask: Array, step: float, target: float, max_steps: int
) -> tuple[Array, int, float]:
    """The same descent with a constant step, until the objective is at most `target`; not part of the published code."""
    V, SV, steps = start, S_denoised @ start, 0
    S_norm_sq = np.vdot(S_denoised, S_denoised)
    while (reached := objective(V, SV, S_norm_sq)) > target and steps < max_steps:
        V = descent_step(V, SV, mask, step)
        SV = S_denoised @ V
        steps += 1
    return V, steps, float(reached)


def fit(S: Array, dims: Sequence[int], rank: int) -> tuple[Array, int]:
    """Noise variance, blockwise initialiser and descent: loadings, and the step at which the descent stopped."""
    sigma_sq = mean_small_eigenvalue(S, len(STRUCTURES) * rank)
    S_denoised = S - sigma_sq * np.eye(len(S), dtype=S.dtype)
    return hcl_grad(S_denoised, hcl_svd(S_denoised, dims, rank), loading_mask(dims, rank, S.dtype))


def replicate(rng: np.random.Generator, dims: Sequence[int], rank: int, noise_variance: float, n: int, dtype: np.dtype) -> Array:
    """One replicate of the published study, as the released code runs it."""
    loadings = draw_loadings(rng, dims, rank, dtype)
    S = sample_covariance(draw_data(rng, loadings, noise_variance, n))
    return fit(S, dims, rank)[0]
