"""What all matrix decompositions end in: scores of a row are a linear map of it, whatever led there."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.structure import Hierarchy, Structure


class LinearFit(eqx.Module):
    """A fitted decomposition Z ≈ factors loadingsᵀ of the standardised data Z = (X − centre)/scale, X all views side by side.

    R columns, each shared by the views in which `membership` holds; a column without any is unused, and zero. The number of
    columns is static and the membership traced, so that fits whose ranks are chosen from the data can be mapped and batched.
    """

    centre: Float[Array, " d"]
    scale: Float[Array, " d"]
    loadings: Float[Array, "d R"]
    """Zero where the membership does not hold."""
    factors: Float[Array, "n R"]
    """Of the training rows, as the algorithm leaves them: its orthogonality constraints hold for these."""
    score_map: Float[Array, "d R"]
    """Scores of standardised rows Z are Z score_map: the same map for training rows and new ones, row by row."""
    membership: Bool[Array, "M R"]
    objective: Float[Array, ""]
    status: Int[Array, ""]
    """0 converged, 1 out of steps, 2 non-finite."""
    steps: Int[Array, ""]
    dims: tuple[int, ...] = eqx.field(static=True)
    coefficients: Float[Array, " R"] | None = None
    """Of the response on the scores, where the method is supervised."""
    intercept: Float[Array, ""] | None = None


def stack_views(views: Sequence[Array], dims: Sequence[int]) -> Float[Array, "n d"]:
    """All views side by side.

    Raises `ValueError` for fewer than two views, and one that names the view when its number of rows differs from the first
    one's, its number of features from that in `dims`, or, outside of compiled code, when it holds values that are not finite.
    """
    if len(dims) < 2:
        raise ValueError(f"hierarchy: has {len(dims)} modality; expected at least 2")
    if len(views) != len(dims):
        raise ValueError(f"views: are {len(views)}; expected {len(dims)}, one a modality of the hierarchy")
    n = views[0].shape[0]
    for number, view in enumerate(views, start=1):
        if view.ndim != 2 or view.shape[0] != n:
            raise ValueError(f"views: view {number} has shape {view.shape}; expected {n} rows, as view 1 has")
        if not isinstance(view, jax.core.Tracer) and not bool(jnp.isfinite(view).all()):
            raise ValueError(f"views: view {number} holds NaN or infinite values; expected finite numbers")
    got = tuple(view.shape[1] for view in views)
    if got != tuple(dims):
        raise ValueError(f"views: have {got} features; expected {tuple(dims)}")
    return jnp.concatenate([jnp.asarray(view) for view in views], axis=1)


def standardise(fitted: LinearFit, views: Sequence[Float[Array, "n _d"]]) -> Float[Array, "n d"]:
    """Z = (X − centre)/scale, with the training means and scales."""
    return (stack_views(views, fitted.dims) - fitted.centre[None, :]) / fitted.scale[None, :]


def transform(fitted: LinearFit, views: Sequence[Float[Array, "n _d"]]) -> Float[Array, "n R"]:
    """Scores of any rows: each row's depend on that row alone."""
    return standardise(fitted, views) @ fitted.score_map


def predict(fitted: LinearFit, views: Sequence[Float[Array, "n _d"]]) -> Float[Array, " n"]:
    """The response that a supervised method expects. Raises `ValueError` for an unsupervised one."""
    coefficients, intercept = own_prediction(fitted)
    return transform(fitted, views) @ coefficients + intercept


def own_prediction(fitted: LinearFit) -> tuple[Float[Array, " R"], Float[Array, ""]]:
    """(coefficients on the scores, intercept) of a supervised method. Raises `ValueError` for an unsupervised one."""
    if fitted.coefficients is None or fitted.intercept is None:
        raise ValueError("fitted: this method saw no response; expected a supervised one, or regress on its scores")
    return fitted.coefficients, fitted.intercept


def part(fitted: LinearFit, columns: Bool[Array, " R"]) -> Float[Array, "n d"]:
    """What the chosen columns contribute to the training data, in the units of the data (without the means)."""
    kept = jnp.where(columns[None, :], fitted.factors, 0)
    return kept @ fitted.loadings.T * fitted.scale[None, :]


def column_structures(fitted: LinearFit) -> tuple[Structure, ...]:
    """The structure of every column, () where it is unused."""
    held = np.asarray(fitted.membership)
    return tuple(tuple(int(m) + 1 for m in np.flatnonzero(column)) for column in held.T)


def activity(fitted: LinearFit) -> dict[Structure, int]:
    """How many columns each structure has, larger structures first."""
    structures = [s for s in column_structures(fitted) if s]
    return {s: structures.count(s) for s in sorted(set(structures), key=lambda s: (-len(s), s))}


def variance_explained(fitted: LinearFit, views: Sequence[Float[Array, "n _d"]]) -> dict[tuple[int, Structure], float]:
    """1 − ‖Z_m − F_s L_{m,s}ᵀ‖²/‖Z_m‖² for every view m and active structure s, on the training views: the share of the view's
    variance that the structure's columns explain alone."""
    Z = standardise(fitted, views)
    by_column, edges = column_structures(fitted), np.cumsum([0, *fitted.dims])
    table = {}
    for s in activity(fitted):
        columns = np.array([column == s for column in by_column])
        explained = fitted.factors[:, columns] @ fitted.loadings[:, columns].T
        for m in range(1, len(fitted.dims) + 1):
            rows = slice(edges[m - 1], edges[m])
            left = jnp.sum((Z[:, rows] - explained[:, rows]) ** 2)
            table[m, s] = float(1 - left / jnp.sum(Z[:, rows] ** 2))
    return table


def view_norms(X: Float[Array, "n d"], dims: Sequence[int]) -> Float[Array, " d"]:
    """The Frobenius norm of every view, repeated over its features; 1 for a view without variance."""
    edges = np.cumsum([0, *dims])
    norms = jnp.stack([jnp.linalg.norm(X[:, a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)])
    return jnp.repeat(jnp.where(norms > 0, norms, 1), np.array(dims), total_repeat_length=int(edges[-1]))


def given_ranks(hierarchy: Hierarchy) -> tuple[int, tuple[int, ...]]:
    """(joint rank, individual rank of every view) of methods without partial sharing: the rank of the structure of all views, and
    the sum over all other structures that contain the view."""
    joint = hierarchy.rank(tuple(hierarchy.modalities))
    return joint, tuple(len(hierarchy.active_columns(m)) - joint for m in hierarchy.modalities)


def check_given_ranks(joint_rank: int | None, individual_ranks: tuple[int, ...] | None) -> None:
    """Raise `ValueError` that names the option unless the ranks are left out or non-negative."""
    if joint_rank is not None and joint_rank < 0:
        raise ValueError(f"joint_rank: is {joint_rank}; expected a non-negative integer")
    if individual_ranks is not None and min(individual_ranks, default=0) < 0:
        raise ValueError(f"individual_ranks: are {individual_ranks}; expected non-negative integers")


def check_view_ranks(name: str, ranks: Sequence[int], dims: Sequence[int], n: int, least: int = 0) -> None:
    """Raise `ValueError` that names the option unless there is one rank a view, from `least` to what n rows of it can have."""
    if len(ranks) != len(dims):
        raise ValueError(f"{name}: are {tuple(ranks)}; expected {len(dims)} of them")
    for m, (rank, dim) in enumerate(zip(ranks, dims, strict=True), start=1):
        if not least <= rank <= min(n - 1, dim):
            raise ValueError(f"{name}: view {m} has rank {rank}; expected {least} to {min(n - 1, dim)} for {n} rows")


def joint_then_individual(joint: int, individual: Sequence[int]) -> Bool[np.ndarray, "M R"]:
    """The membership of columns that all views share, followed by those of each view."""
    views = np.arange(len(individual))
    return np.concatenate(
        [np.ones((len(views), joint), bool), np.repeat(np.eye(len(views), dtype=bool), individual, axis=1)], axis=1
    )


def stack_blocks(blocks: Sequence[Float[Array, "_p _r"]], dims: Sequence[int]) -> Float[Array, "d R"]:
    """Loadings of the views' own columns: block diagonal."""
    edges = np.cumsum([0, *dims])
    tall = [
        jnp.zeros((int(edges[-1]), block.shape[1]), block.dtype).at[a:b].set(block)
        for block, a, b in zip(blocks, edges[:-1], edges[1:], strict=True)
    ]
    return jnp.concatenate(tall, axis=1)
