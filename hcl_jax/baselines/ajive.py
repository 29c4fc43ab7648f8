"""AJIVE: joint scores from the angles between the views' signal spaces (Feng, Jiang, Hannig and Marron, 2018)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from hcl_jax.baselines.linear import check_given_ranks, check_view_ranks, given_ranks, joint_then_individual, stack_blocks
from hcl_jax.compiled import compiled
from hcl_jax.fitted import LinearFit, stack_views
from hcl_jax.linalg import spectral_norm, top_eigenpairs_of
from hcl_jax.structure import Hierarchy, as_hierarchy
from hcl_jax.views import as_key, centred, check_options, view_norms


@dataclass(frozen=True)
class AjiveConfig:
    """Options of `fit`.

    ranks: "given" takes the joint and the individual ranks as given, "given_joint" only the joint one, "selected" neither.
    signal_ranks: the initial rank t_m of each view. None: the sum of the hierarchy's ranks over all structures that contain it.
    joint_rank: where given; None: the hierarchy's rank of the structure of all views.
    individual_ranks: where given; None: t_m less the joint rank.
    n_draws: of the random directions and of each of the Wedin bounds.
    random_percentile, wedin_percentile: of their draws, which make the two thresholds.
    """

    ranks: str = "given"
    signal_ranks: tuple[int, ...] | None = None
    joint_rank: int | None = None
    individual_ranks: tuple[int, ...] | None = None
    n_draws: int = 1000
    random_percentile: float = 95.0
    wedin_percentile: float = 5.0

    def __post_init__(self) -> None:
        check_options(self, choices={"ranks": ("given", "given_joint", "selected")}, least={"n_draws": 1})
        if self.signal_ranks is not None and min(self.signal_ranks, default=1) < 1:
            raise ValueError(f"signal_ranks: are {self.signal_ranks}; expected positive integers")
        check_given_ranks(self.joint_rank, self.individual_ranks)
        for name in ("random_percentile", "wedin_percentile"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{name}: is {getattr(self, name)}; expected a number from 0 to 100")


class Signal(NamedTuple):
    """A view's leading singular vectors and values, U diag(values) Wᵀ, and all its other singular values."""

    U: Float[Array, "n t"]
    values: Float[Array, " t"]
    W: Float[Array, "p t"]
    rest: Float[Array, " k"]

    @property
    def threshold(self) -> Float[Array, ""]:
        """Half way between the last singular value of the signal and the first that is not."""
        return (self.values[-1] + (self.rest[0] if self.rest.size else 0)) / 2


def fit(
    views: Any,
    hierarchy: Hierarchy,
    config: AjiveConfig = AjiveConfig(),
    *,
    y: Any = None,
    key: Any = None,
) -> LinearFit:
    """X_m = J_m + A_m + E_m of every centred view, with scores C that all views share and C ⊥ A_m.

    1. Every view is cut to its signal rank, X_m ≈ U_m D_m W_mᵀ. 2. The left singular vectors C of [U_1 … U_M] are the directions
    most in common: the squared singular values, between 0 and M, are M where all views agree. Those above `joint_threshold` are
    joint, less any direction in which some view has less than its own threshold. 3. J_m = CCᵀX_m; A_m keeps of (I − CCᵀ)X_m the
    singular values above the view's threshold, of which there are no more than t_m, or the given rank. Given joint ranks are
    not checked for identifiability.

    The views are not scaled: the decomposition of one scaled is the same, scaled. `objective` is ‖E‖²_F. Columns: C, then the
    scores of each view's individual part, orthonormal within each block. All these are linear in the data (C = Σ_m X_m B_m with
    B_m = W_m D_m⁻¹ Q_m diag(σ)⁻¹, Q_m the view's block of right singular vectors; individual scores are x_m less its joint part,
    on the individual loadings), and the same map gives scores of other rows: those of the training rows are the factors.
    A direction that the view's data lack gets a column of zeros.

    The response is not used, the key only by "selected". Raises `ValueError` for what `check_views` refuses, a key that is
    needed and missing, and ranks that do not fit.
    """
    return _decomposition(stack_views(views, as_hierarchy(hierarchy).dims), hierarchy, config, key)


@compiled
def _decomposition(X: Float[Array, "n d"], hierarchy: Hierarchy, config: AjiveConfig, key: Any) -> LinearFit:
    """The fit to views side by side."""
    n = X.shape[0]
    signal_ranks, joint_rank, individual_ranks = _ranks(hierarchy, config, n)
    edges = np.cumsum([0, *hierarchy.dims])
    Z, centre, _ = centred(X)
    unit = view_norms(Z, (Z.shape[1],))[0]  # squares of the data may leave the range of numbers
    parts = [Z[:, a:b] / unit for a, b in pairwise(edges)]
    signals = [signal_of(part, t) for part, t in zip(parts, signal_ranks, strict=True)]

    width = min(signal_ranks) if config.ranks == "selected" else joint_rank
    C, squares, directions = _common_directions(signals, width)
    kept = jnp.ones(width, bool)
    if config.ranks == "selected":
        cut = joint_threshold(signals, n, config, as_key(key, "for the random directions"))
        kept = jnp.cumprod((squares > cut).astype(jnp.int32)) > 0
        kept = kept & identifiable(parts, signals, C)
    kept = kept & (squares > 1e3 * jnp.finfo(X.dtype).eps)
    C, directions = jnp.where(kept[None, :], C, 0), jnp.where(kept[None, :], directions, 0)

    joint_loadings = jnp.concatenate([part.T @ C for part in parts])
    factors, blocks, maps, used = [C], [], [directions], [kept]
    for m, (part, signal) in enumerate(zip(parts, signals, strict=True)):
        rows = slice(int(edges[m]), int(edges[m + 1]))
        joint = joint_loadings[rows]
        left = signal_of(part - C @ joint.T, individual_ranks[m])
        held = left.values > 1e3 * jnp.finfo(X.dtype).eps * signal.values[0]
        if config.ranks != "given":
            held = held & (left.values > signal.threshold)
        inverse = jnp.where(held, 1 / jnp.where(held, left.values, 1), 0)
        onto = left.W * inverse[None, :]
        factors.append(jnp.where(held[None, :], left.U, 0))
        blocks.append(left.W * jnp.where(held, left.values, 0)[None, :])
        maps.append((-directions @ (joint.T @ onto)).at[rows].add(onto))
        used.append(held)
    F, L = jnp.concatenate(factors, axis=1), jnp.concatenate([joint_loadings, stack_blocks(blocks, hierarchy.dims)], axis=1)
    return LinearFit(
        centre=centre,
        scale=jnp.ones_like(centre),
        loadings=unit * L,
        factors=F,
        score_map=jnp.concatenate(maps, axis=1) / unit,
        membership=jnp.asarray(joint_then_individual(width, individual_ranks)) & jnp.concatenate(used)[None, :],
        objective=unit**2 * jnp.sum((jnp.concatenate(parts, axis=1) - F @ L.T) ** 2),
        status=jnp.where(jnp.isfinite(L).all(), 0, 2).astype(jnp.int32),
        steps=jnp.ones((), jnp.int32),
        dims=hierarchy.dims,
    )


def _ranks(hierarchy: Hierarchy, config: AjiveConfig, n: int) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Signal ranks, joint rank, and widths of the individual parts."""
    signal = config.signal_ranks
    if signal is None:
        signal = tuple(len(hierarchy.active_columns(m)) for m in hierarchy.modalities)
    joint = given_ranks(hierarchy)[0] if config.joint_rank is None else config.joint_rank
    individual = tuple(max(t - joint, 0) for t in signal) if config.individual_ranks is None else config.individual_ranks
    if config.ranks != "given":
        individual = signal  # no more singular values can exceed the threshold, as those of a projection interlace
    check_view_ranks("signal_ranks", signal, hierarchy.dims, n, least=1)
    check_view_ranks("individual_ranks", individual, hierarchy.dims, n)
    if config.ranks != "selected" and joint > sum(signal):
        raise ValueError(f"joint_rank: is {joint}; expected at most {sum(signal)}, the sum of the signal ranks")
    return signal, joint, individual


def signal_of(Z: Float[Array, "n p"], t: int) -> Signal:
    """The singular value decomposition, by the Gram matrix of the smaller side."""
    n, p = Z.shape
    values, vectors = top_eigenpairs_of(Z.T @ Z if p <= n else Z @ Z.T, min(n, p))
    roots, vectors = jnp.sqrt(jnp.maximum(values, 0)), vectors[:, :t]
    inverse = jnp.where(roots[:t] > 0, 1 / jnp.where(roots[:t] > 0, roots[:t], 1), 0)
    other = (Z @ vectors if p <= n else Z.T @ vectors) * inverse[None, :]
    U, W = (other, vectors) if p <= n else (vectors, other)
    return Signal(U, roots[:t], W, roots[t:])


def _common_directions(
    signals: Sequence[Signal], width: int
) -> tuple[Float[Array, "n r"], Float[Array, " r"], Float[Array, "d r"]]:
    """(C, σ², B): the leading left singular vectors of [U_1 … U_M], squared singular values, and B with C = X B."""
    stacked = jnp.concatenate([signal.U for signal in signals], axis=1)
    squares, right = top_eigenpairs_of(stacked.T @ stacked, width)
    right = right / jnp.sqrt(jnp.where(squares > 0, squares, 1))[None, :]
    edges = np.cumsum([0, *(signal.values.size for signal in signals)])
    blocks = []
    for signal, (a, b) in zip(signals, pairwise(edges), strict=True):
        inverse = jnp.where(signal.values > 0, 1 / jnp.where(signal.values > 0, signal.values, 1), 0)
        blocks.append(signal.W @ (inverse[:, None] * right[a:b]))
    return stacked @ right, squares, jnp.concatenate(blocks)


def identifiable(centred: Sequence[Float[Array, "n _p"]], signals: Sequence[Signal], C: Float[Array, "n r"]) -> Bool[Array, " r"]:
    """Whether ‖X_mᵀc‖ reaches the threshold of every view, for every direction c."""
    held = [jnp.linalg.norm(Z.T @ C, axis=0) >= signal.threshold for Z, signal in zip(centred, signals, strict=True)]
    return jnp.all(jnp.stack(held), axis=0)


def joint_threshold(signals: Sequence[Signal], n: int, config: AjiveConfig, key: PRNGKeyArray) -> Float[Array, ""]:
    """What σ² has to exceed: the larger of the random-direction and the Wedin threshold."""
    random, bounds = null_draws(signals, n, config.n_draws, key)
    wedin = len(signals) - jnp.sum(bounds**2, axis=1)
    return jnp.maximum(jnp.percentile(random, config.random_percentile), jnp.percentile(wedin, config.wedin_percentile))


def null_draws(
    signals: Sequence[Signal], n: int, n_draws: int, key: PRNGKeyArray
) -> tuple[Float[Array, " draws"], Float[Array, "draws M"]]:
    """(Random directions, Wedin bounds).

    Random directions: σ_1² of [Q_1 … Q_M], Q_m independent and uniform among the n × t_m matrices with orthonormal columns.
    Wedin bounds: min(1, max(‖X_m B‖₂, ‖X_mᵀB'‖₂)/d_t), where random orthonormal t-frames B ⊥ W_m and B' ⊥ U_m stand in for noise.
    In the singular vectors of the rest both norms are those of diag(rest) times the first rows of a uniform frame of p − t or
    n − t dimensions. Uniform frames are Z(ZᵀZ)^(−1/2) for a normal Z, up to a rotation; of the rows of Z that the formulas do
    not name only the Gram matrix matters, which is drawn without them: no draw costs more for more samples.
    """
    dtype = signals[0].U.dtype
    ranks = [signal.values.size for signal in signals]
    edges = np.cumsum([0, *ranks])
    frames = [(signal.rest, size - t) for signal, t in zip(signals, ranks, strict=True) for size in (signal.W.shape[0], n)]
    hidden = [(n, int(edges[-1]))]  # sizes of the matrices of which only the Gram matrix is drawn
    hidden += [(max(size - rest.size, 0), min(ranks[i // 2], size)) for i, (rest, size) in enumerate(frames)]
    freedom = np.concatenate([size - np.arange(columns) for size, columns in hidden if size >= columns])
    k_chi, k_draws = jr.split(key)
    chi = jnp.sqrt(2 * jr.gamma(k_chi, jnp.asarray(freedom / 2, dtype)[None, :], (n_draws, freedom.size), dtype))

    def draw(item: tuple[PRNGKeyArray, Float[Array, " k"]]) -> tuple[Float[Array, ""], Float[Array, " M"]]:
        keys, unused = jr.split(item[0], 2 * len(hidden)), item[1]
        factors = []
        for (size, columns), key in zip(hidden, keys, strict=False):
            taken = columns if size >= columns else 0
            factors.append(_normal_factor(key, size, columns, unused[:taken]))
            unused = unused[taken:]
        R = factors[0]
        random = spectral_norm(jnp.concatenate([_whitened(R[:, a:b], R[:, a:b]) for a, b in pairwise(edges)], axis=1)) ** 2
        norms = []
        for (rest, size), others, key in zip(frames, factors[1:], keys[len(hidden) :], strict=False):
            seen = jr.normal(key, (min(rest.size, size), others.shape[1]), dtype)
            frame = _whitened(seen, jnp.concatenate([seen, others]))
            norms.append(spectral_norm(rest[: seen.shape[0], None] * frame))
        return random, jnp.maximum(jnp.stack(norms[::2]), jnp.stack(norms[1::2]))

    random, largest = lax.map(draw, (jr.split(k_draws, n_draws), chi))
    last = jnp.stack([signal.values[-1] for signal in signals])
    bounds = jnp.minimum(largest / jnp.where(last > 0, last, 1)[None, :], 1)
    return random, jnp.where(last[None, :] > 0, bounds, 1)


def _normal_factor(key: PRNGKeyArray, size: int, columns: int, chi: Float[Array, " chi"]) -> Float[Array, "rows k"]:
    """R with RᵀR distributed as ZᵀZ, Z a matrix of standard normals: Bartlett's triangle, or Z itself where it is wide."""
    if size < columns:
        return jr.normal(key, (size, columns), chi.dtype)
    return jnp.triu(jr.normal(key, (columns, columns), chi.dtype), 1) + jnp.diag(chi)


def _whitened(part: Float[Array, "k t"], whole: Float[Array, "rows t"]) -> Float[Array, "k t"]:
    """`part` (ZᵀZ)^(−1/2), Z = `whole`, up to a rotation from the right."""
    if 0 in part.shape:
        return part
    return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(whole.T @ whole), part.T, lower=True).T
