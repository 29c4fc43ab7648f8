"""How alike, how dependent or how far apart representations are: the terms that the losses of deep methods are made of.

Arrays in, a scalar out. What is compared is n samples × r coordinates, or the score matrix of a critic, whose diagonal holds
the pairs that belong together. Every default has finite gradients everywhere: the norm of a zero vector, the moments of equal
samples and the mean of nothing have gradient 0. Where released code guards its norms otherwise, `unit` says how.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from hcl_jax.contrastive import linear_loss, similarities, softmax_loss
from hcl_jax.structure import Hierarchy

Normaliser = Callable[[Float[Array, "n r"]], Float[Array, "n r"]]
"""Rows of length 1: `unit`, or a `partial` of it with the guard of some released code."""
Scalar = float | Float[Array, ""]
BINS = 7
"""Classes into which a response that is a number is cut where samples are to have equal labels."""


def unit(
    a: Float[Array, "*batch r"], *, floor: float = 0.0, inside: float = 0.0, outside: float = 0.0, held: bool = False
) -> Float[Array, "*batch r"]:
    """a / (√(max(‖a‖, floor)² + inside) + outside) along the last axis; with no guard, 0 where a is 0.

    With `held` the length counts as a constant in the derivative. A guard δ makes the gradient at a = 0 as large as 1/δ.
    """
    squared = jnp.sum(a**2, axis=-1, keepdims=True)
    long = squared > floor**2
    safe = jnp.sqrt(jnp.where(long, squared, floor**2 or 1.0) + inside) + outside
    least = math.sqrt(floor**2 + inside) + outside
    scale = jnp.where(long, 1 / safe, 1 / least if least > 0 else 0.0)
    return a * (jax.lax.stop_gradient(scale) if held else scale)


def _length(a: Float[Array, "*batch r"]) -> Float[Array, "*batch"]:
    """‖a‖ along the last axis, of gradient 0 where a is 0."""
    squared = jnp.sum(a**2, axis=-1)
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)


def same_label(labels: Num[Array, " n"]) -> Bool[Array, "n n"]:
    """Which pairs of samples have equal labels."""
    return labels[:, None] == labels[None, :]


def first_label(y: Num[Array, "n ..."]) -> Num[Array, " n"]:
    """Classes, or the first of the responses."""
    return y if y.ndim == 1 else y[:, 0]


def binned(labels: Num[Array, " n"]) -> Num[Array, " n"]:
    """Numbers replaced by the mean of those in the same of `BINS` bins between quantiles; classes as they are."""
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        return labels
    edges = jnp.quantile(labels, jnp.asarray(np.arange(1, BINS) / BINS, labels.dtype))
    held = jnp.searchsorted(edges, labels, side="right")[:, None] == jnp.arange(BINS, dtype=jnp.int32)[None, :]
    count = jnp.maximum(held.sum(axis=0), 1).astype(labels.dtype)
    means = jnp.where(held, labels[:, None], 0).sum(axis=0) / count
    return jnp.where(held, means[None, :], 0).sum(axis=1)


def _centred(a: Float[Array, "n r"]) -> Float[Array, "n r"]:
    return a - a.mean(axis=0, keepdims=True)


def _mean_where(values: Float[Array, "..."], kept: Bool[Array, "..."], axis: int | None = None) -> Float[Array, "..."]:
    count = jnp.maximum(kept.sum(axis), 1).astype(values.dtype)
    return jnp.where(kept, values, 0).sum(axis) / count


def cmd(a: Float[Array, "n r"], b: Float[Array, "m r"], moments: int = 5) -> Float[Array, ""]:
    """Central moment discrepancy: ‖mean(a) − mean(b)‖ + Σ_{k=2..K} ‖c_k(a) − c_k(b)‖, c_k the coordinates' k-th central moments.

    Zellinger et al. 2017, arXiv 1702.08811, without the factors of the interval that holds the data, as MISA uses it. The
    moments are divided by n. Meant for bounded representations: the fifth moment of others explodes.
    """
    central_a, central_b = _centred(a), _centred(b)
    differences = [a.mean(axis=0) - b.mean(axis=0)]
    differences += [jnp.mean(central_a**k, axis=0) - jnp.mean(central_b**k, axis=0) for k in range(2, moments + 1)]
    return _length(jnp.stack(differences)).sum()


def difference(
    a: Float[Array, "n r"],
    b: Float[Array, "n q"],
    *,
    normalise: Normaliser = unit,
    reduce: Callable[[Float[Array, "r q"]], Float[Array, ""]] = jnp.mean,
) -> Float[Array, ""]:
    """MISA's difference loss: the mean (or what `reduce` says) of the squared entries of ãᵀb̃, centred, then rows normalised.

    Hazarika et al. 2020, arXiv 2005.03545. The released code holds the norms constant, `unit(held=True, outside=1e-6)`; the
    port to HCL has `unit(floor=1e-8)` and the sum of squares.
    """
    return reduce((normalise(_centred(a)).T @ normalise(_centred(b))) ** 2)


def cross_covariance(a: Float[Array, "n r"], b: Float[Array, "n q"]) -> Float[Array, ""]:
    """‖Cov(a, b)‖_F², the covariance divided by n."""
    return jnp.sum((_centred(a).T @ _centred(b) / a.shape[0]) ** 2)


def orthogonality(a: Float[Array, "n r"], b: Float[Array, "n r"], *, normalise: Normaliser = unit) -> Float[Array, ""]:
    """The mean over samples of max(0, cos(a_i, b_i)): DLF's orthogonality loss (Wang et al. 2025)."""
    return jnp.mean(jax.nn.relu(jnp.sum(normalise(a) * normalise(b), axis=1)))


def gaussian_kernel(a: Float[Array, "n r"], sigma: Scalar | None = None) -> Float[Array, "n n"]:
    """exp(−‖a_i − a_j‖² / 2σ²); σ unless given the median distance of two samples, held constant, 1 where that is 0.

    Squared distances are expanded about the mean, so that an offset of the data costs no digits.
    """
    a = _centred(a)
    squared = jnp.sum(a**2, axis=1)
    distances = squared[:, None] + squared[None, :] - 2 * a @ a.T
    variance = _median_off_diagonal(distances, squared.max()) if sigma is None else sigma**2
    return jnp.exp(-distances / (2 * variance))


def _median_off_diagonal(distances: Float[Array, "n n"], largest: Float[Array, ""]) -> Float[Array, ""]:
    """The median squared distance, 1 where it is nothing but rounding."""
    if distances.shape[0] < 2:
        return jnp.ones((), distances.dtype)
    median = jax.lax.stop_gradient(jnp.median(distances[np.triu_indices(distances.shape[0], 1)]))
    rounding = 32 * jnp.finfo(distances.dtype).eps * jax.lax.stop_gradient(largest)
    return jnp.where(median > rounding, median, 1)


def hsic(
    a: Float[Array, "n r"], b: Float[Array, "n q"], sigma: Scalar | None = None, *, least_samples: int = 2
) -> Float[Array, ""]:
    """tr(KHLH)/(n−1)², the biased estimate of the Hilbert–Schmidt independence criterion with Gaussian kernels, H = I − 11ᵀ/n.

    Gretton et al. 2005, definition 2. One bandwidth for both, or unless given the median distance of each. 0 for fewer than
    `least_samples`; the port of TSD to HCL asks for 4, and for σ = 1.
    """
    n = a.shape[0]
    if n < max(least_samples, 2):
        return jnp.zeros((), a.dtype)
    K, L = (_centred(_centred(gaussian_kernel(x, sigma)).T) for x in (a, b))
    return jnp.sum(K * L) / (n - 1) ** 2


def third_moments(representations: Float[Array, "n K"], groups: Int[np.ndarray, " K"]) -> Float[Array, ""]:
    """An unbiased estimate of (1/6) Σ T_abc² over the triples (a, b, c) of coordinates not all of one group, T = E h_a h_b h_c.

    `groups` numbers the structure of each coordinate. Zero in the mean where the groups are independent and their means zero,
    whatever holds within a group; it sees dependence that leaves groups uncorrelated. T is estimated from each half of the batch
    and the two estimates multiplied. Means are not subtracted: centring each half would bias it. May be negative. O(nK³).
    """
    n, K = representations.shape
    if n < 2:
        raise ValueError(f"representations: has {n} samples; expected at least 2, one for each half")
    halves = representations[: n // 2], representations[n // 2 :]
    first, second = (jnp.einsum("na,nb->nab", h, h).reshape(-1, K * K).T @ h / h.shape[0] for h in halves)
    a, b, c = (np.expand_dims(groups, tuple({0, 1, 2} - {axis})) for axis in range(3))
    unlike = ((a != b) | (b != c)).reshape(K * K, K)
    return jnp.sum(jnp.where(unlike, first * second, 0)) / 6


def first_match_triplet(
    blocks: Float[Array, "M n r"], labels: Num[Array, " n"], margin: Scalar = 1.0, *, normalise: Normaliser = unit
) -> Float[Array, ""]:
    """The mean over anchors (m, i) of max(0, cos(anchor, negative) − cos(anchor, positive) + margin); 0 if all labels are equal.

    As the port of DLF to HCL has it: the positive is the first sample of the batch with the anchor's label, possibly the
    anchor's own, in the first other modality; the negative the first with another label in the anchor's modality. Nothing
    else of the batch counts, so `triplet_hinge` uses far more of it. The port's guard is `unit(floor=1e-8)`.
    """
    if blocks.shape[0] < 2:
        raise ValueError(f"blocks: has {blocks.shape[0]} modality; expected at least 2, positives come from another")
    same = same_label(labels)
    units = jax.vmap(normalise)(blocks)
    positives = units[np.array([1] + [0] * (blocks.shape[0] - 1))][:, jnp.argmax(same, axis=1)]
    negatives = units[:, jnp.argmin(same, axis=1)]
    cosines = jnp.sum(units * (negatives - positives), axis=-1)
    return jnp.where(same.all(), 0, jnp.mean(jax.nn.relu(cosines + margin)))


def triplet_hinge(
    features: Float[Array, "n r"], labels: Num[Array, " n"], margin: Scalar = 0.15, *, normalise: Normaliser = unit
) -> Float[Array, ""]:
    """The mean of max(0, margin·|y_a − y_q| − cos(a, p) + cos(a, q)) over p ≠ a of a's label and q of others, then over all a.

    DLF's triplet loss (Wang et al. 2025) on the samples of all modalities one below the other; anchors that lack p or q are
    left out. Its guard is `unit(inside=1e-8)`. Sorting the positives of an anchor makes this O(n² log n), without the n³ triples.
    """
    units = normalise(features)
    cosines, same, targets = units @ units.T, same_label(labels), labels.astype(features.dtype)
    reach = cosines + margin * jnp.abs(targets[:, None] - targets[None, :])
    positive = same & ~np.eye(len(labels), dtype=bool)
    excess = jax.vmap(_hinge_sums)(cosines, positive, reach)
    by_anchor = _mean_where(excess, ~same, axis=1) / jnp.maximum(positive.sum(axis=1), 1).astype(features.dtype)
    return _mean_where(by_anchor, positive.any(axis=1) & ~same.all(axis=1))


def _hinge_sums(values: Float[Array, " n"], kept: Bool[Array, " n"], reach: Float[Array, " n"]) -> Float[Array, " n"]:
    """Σ_p max(0, reach_q − value_p) over the kept p, for every q."""
    ordered = jnp.sort(jnp.where(kept, values, jnp.inf))
    sums = jnp.concatenate([jnp.zeros(1, values.dtype), jnp.cumsum(jnp.where(jnp.isfinite(ordered), ordered, 0))])
    below = jnp.searchsorted(ordered, reach)
    return below.astype(values.dtype) * reach - sums[below]


def info_nce(scores: Float[Array, "n n"], alike: Bool[Array, "n n"] | None = None) -> Float[Array, ""]:
    """mean_i s_ii − mean_i log Σ_j exp(s_ij) + log n: a lower bound of the mutual information, at most log n for any scores.

    Van den Oord et al. 2018. To minimise without the constant there is `contrastive.softmax_loss`. The transposed scores are
    normalised the other way round, which is another bound of the same.

    alike: the pairs i, j whose conditions are equal, `same_label(labels)`. Only these are compared, and n becomes their number
    for every i: a lower bound of the mutual information given the labels.
    """
    if alike is None:
        return math.log(scores.shape[0]) - softmax_loss(scores, 1.0)
    kept = jnp.where(alike, scores, jnp.finfo(scores.dtype).min)
    count = alike.sum(axis=1).astype(scores.dtype)
    return jnp.mean(jnp.diagonal(scores) - jax.nn.logsumexp(kept, axis=1) + jnp.log(count))


def two_way_info_nce(scores: Float[Array, "n n"], alike: Bool[Array, "n n"] | None = None) -> Float[Array, ""]:
    """The mean of `info_nce` over both ways to normalise."""
    return (info_nce(scores, alike) + info_nce(scores.T, alike)) / 2


def symmetric_info_nce(scores: Float[Array, "n n"], temperature: Scalar = 0.1, weight: Scalar = 0.75) -> Float[Array, ""]:
    """λ × the cross-entropy of the rows of s/τ + (1 − λ) × that of its columns: the loss of ConVIRT (Zhang et al. 2022, eq. 4).

    There the scores are cosines; the port to HCL guards them with `unit(floor=1e-12)` and trains with τ = λ = 1.
    """
    return weight * softmax_loss(scores, temperature) + (1 - weight) * softmax_loss(scores.T, temperature)


def club(scores: Float[Array, "n n"], alike: Bool[Array, "n n"] | None = None, *, others_only: bool = False) -> Float[Array, ""]:
    """mean_i s_ii − mean_ij s_ij: in the mean (1 − 1/n) times an upper bound of the mutual information, for the right scores.

    These are log p(y_j|x_i), Cheng et al. 2020, or those of the critic that maximises `info_nce`, the NCE-CLUB of Liang et al.
    2023. Of any others it bounds nothing.

    alike: the pairs i, j whose conditions are equal, `same_label(labels)`; then mean_i (s_ii − mean_j s_ij) over these j, a bound
    of the mutual information given the labels. others_only: the second mean is over j ≠ i, which takes the factor 1 − 1/n off;
    a sample without others counts 0.
    """
    n = scores.shape[0]
    if alike is None and not others_only:
        return jnp.trace(scores) / n - scores.mean()
    compared = jnp.ones((n, n), bool) if alike is None else alike
    if others_only:
        compared = compared & ~np.eye(n, dtype=bool)
    excess = jnp.diagonal(scores) - _mean_where(scores, compared, axis=1)
    return jnp.where(compared.any(axis=1), excess, 0).mean()


def classifier_log_likelihood(scores: Float[Array, "n n"]) -> Float[Array, ""]:
    """The mean over all pairs of log σ(s_ij) on the diagonal and log σ(−s_ij) off it: true pairs told from all others.

    The probabilistic classifier of Tsai et al. 2020; to maximise.
    """
    own = np.eye(scores.shape[0], dtype=bool)
    return jnp.mean(jax.nn.log_sigmoid(jnp.where(own, scores, -scores)))


def classifier_information(scores: Float[Array, "n n"], clip: float = 1e-6) -> Float[Array, ""]:
    """mean_i log((n−1) p_i/(1−p_i)), p_i = σ(s_ii) kept within [clip, 1−clip]: mutual information from a classifier's scores.

    Tsai et al. 2020. The clipping is of the scores themselves, which loses no digits.
    """
    n = scores.shape[0]
    if n < 2:
        raise ValueError(f"scores: has {n} samples; expected at least 2, one of them a negative")
    bound = math.log((1 - clip) / clip)
    return jnp.mean(jnp.clip(jnp.diagonal(scores), -bound, bound)) + math.log(n - 1)


def supcon(
    features: Float[Array, "n views r"],
    positives: Bool[Array, "n n"] | None = None,
    *,
    temperature: Scalar = 0.07,
    base_temperature: Scalar = 0.07,
    anchor_views: int | None = None,
) -> Float[Array, ""]:
    """−(τ/τ₀) mean_a mean_{p ∈ P(a)} log( exp(⟨a, p⟩/τ) / Σ_{j≠a} exp(⟨a, j⟩/τ) ): Khosla et al. 2020, eq. 2.

    P(a): all views but a itself of the samples marked in a's row of `positives` (`same_label(labels)`), unless given those of
    a's own sample, which is SimCLR. Only the first `anchor_views` views are anchors, unless given all; anchors without a
    positive are left out, where the released code returns NaN. Features are used as they are, which the authors normalise.
    """
    n, views, r = features.shape
    stacked = features.transpose(1, 0, 2).reshape(views * n, r)
    anchors = (views if anchor_views is None else anchor_views) * n
    own = np.eye(anchors, views * n, dtype=bool)
    marked = jnp.eye(n, dtype=bool) if positives is None else positives
    positive = jnp.tile(marked, (anchors // n, views)) & ~own
    logits = stacked[:anchors] @ stacked.T / temperature
    # finite, so that a lone sample gives 0 and not NaN
    total = jax.nn.logsumexp(jnp.where(own, jnp.finfo(logits.dtype).min, logits), axis=1, keepdims=True)
    by_anchor = _mean_where(logits - total, positive, axis=1)
    return -temperature / base_temperature * _mean_where(by_anchor, positive.any(axis=1))


def unit_structures(representations: Float[Array, "M n K"], hierarchy: Hierarchy) -> Float[Array, "M n K"]:
    """Every modality's and sample's vector of every structure, of length 1; 0 where it is 0."""
    return jnp.concatenate([unit(representations[..., hierarchy.columns(s)]) for s in hierarchy.structures], axis=-1)


def signed_overlap(representations: Float[Array, "M n K"], hierarchy: Hierarchy) -> Float[Array, ""]:
    """Σ_m Σ_i Σ_{s,t} ⟨h_{i,s}^(m), h_{i,t}^(m)⟩ over the first min(r_s, r_t) coordinates: the released HCL code's regulariser.

    Equal to Σ_{m,i} ‖Σ_s h_{i,s}^(m)‖², shorter vectors filled up with zeros. Its least value is reached where structures
    point in opposite directions, not where they are unrelated, and it grows with the batch: to train, use
    `contrastive.structure_overlap`.
    """
    total = jnp.zeros((*representations.shape[:2], max(rank for _, rank in hierarchy.ranks)), representations.dtype)
    for s, rank in hierarchy.ranks:
        total = total.at[..., :rank].add(representations[..., hierarchy.columns(s)])
    return jnp.sum(total**2)


def hcl_loss(representations: Float[Array, "M n K"], hierarchy: Hierarchy, penalty: Scalar = 1.0) -> Float[Array, ""]:
    """The loss of the released HCL code: eq. (2)'s contrast of unit vectors + penalty × `signed_overlap` of them."""
    units = unit_structures(representations, hierarchy)
    return linear_loss(similarities(units, hierarchy)) + penalty * signed_overlap(units, hierarchy)
