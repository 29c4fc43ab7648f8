"""What all matrix decompositions end in: scores of a row are a linear map of it, whatever led there."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.structure import Hierarchy, Structure
from hcl_jax.views import Views, as_response, as_views


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


def check_views(views: Any, dims: Sequence[int]) -> Views:
    """The views that `as_views` reads, of these dimensions.

    Raises `ValueError` for fewer than two views, other numbers of views or features than the hierarchy has, and what `as_views`
    refuses.
    """
    if len(dims) < 2:
        raise ValueError(
            f"hierarchy: has {len(dims)} modality; expected at least 2, as baselines tell what views share (ESTIMATORS take one)"
        )
    read = as_views(views)
    if len(read.names) != len(dims):
        raise ValueError(f"views: are {len(read.names)}; expected {len(dims)}, one a modality of the hierarchy")
    if read.dims != tuple(dims):
        raise ValueError(f"views: have {read.dims} features; expected {tuple(dims)}")
    return read


def stack_views(views: Any, dims: Sequence[int]) -> Float[Array, "n d"]:
    """All views side by side, checked as `check_views` does."""
    return check_views(views, dims).stacked()


def stack_with_response(views: Any, dims: Sequence[int], y: Any) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """(all views side by side, the response in their precision and the order of their samples), checked."""
    read = check_views(views, dims)
    X = read.stacked()
    return X, as_response(y, read.n_samples, samples=read.sample_names).astype(X.dtype)


def standardise(fitted: LinearFit, views: Any) -> Float[Array, "n d"]:
    """Z = (X − centre)/scale, with the training means and scales, in the precision of the fit."""
    X = stack_views(views, fitted.dims).astype(fitted.centre.dtype)
    return (X - fitted.centre[None, :]) / fitted.scale[None, :]


def transform(fitted: LinearFit, views: Any) -> Float[Array, "n R"]:
    """Scores of any rows: each row's depend on that row alone."""
    return standardise(fitted, views) @ fitted.score_map


def predict(fitted: LinearFit, views: Any) -> Float[Array, " n"]:
    """The response that a supervised method expects. Raises `ValueError` for an unsupervised one."""
    coefficients, intercept = own_prediction(fitted)
    return transform(fitted, views) @ coefficients + intercept


def own_prediction(fitted: LinearFit) -> tuple[Float[Array, " R"], Float[Array, ""]]:
    """(coefficients on the scores, intercept) of a supervised method. Raises `ValueError` for an unsupervised one."""
    if fitted.coefficients is None or fitted.intercept is None:
        raise ValueError("fitted: this method saw no response; expected a supervised one, or regress on its scores")
    return fitted.coefficients, fitted.intercept


def part(fitted: LinearFit, columns: Any) -> Float[Array, "n d"]:
    """What the chosen columns contribute to the training data, in the units of the data (without the means).

    Raises `ValueError` unless `columns` are R booleans.
    """
    chosen = columns if isinstance(columns, jax.Array) else np.asarray(columns)
    if chosen.dtype != bool or chosen.shape != fitted.loadings.shape[1:]:
        raise ValueError(f"columns: are {chosen.dtype} of shape {chosen.shape}; expected {fitted.loadings.shape[1]} booleans")
    kept = jnp.where(chosen[None, :], fitted.factors, 0)
    return kept @ fitted.loadings.T * fitted.scale[None, :]


def column_structures(fitted: LinearFit) -> tuple[Structure, ...]:
    """The structure of every column, () where it is unused."""
    held = np.asarray(fitted.membership)
    return tuple(tuple(int(m) + 1 for m in np.flatnonzero(column)) for column in held.T)


def activity(fitted: LinearFit) -> dict[Structure, int]:
    """How many columns each structure has, larger structures first."""
    structures = [s for s in column_structures(fitted) if s]
    return {s: structures.count(s) for s in sorted(set(structures), key=lambda s: (-len(s), s))}


def variance_explained(fitted: LinearFit, views: Any) -> dict[tuple[int, Structure], float]:
    """1 − ‖Z_m − T_s L_{m,s}ᵀ‖²/‖Z_m‖² for every view m and active structure s, of any rows, with T = `transform` of them: the
    share of the view's variance about the training means that the structure's columns explain alone. 0 where there is none."""
    Z = standardise(fitted, views)
    scores, by_column, edges = Z @ fitted.score_map, column_structures(fitted), np.cumsum([0, *fitted.dims])
    table = {}
    for s in activity(fitted):
        columns = np.array([column == s for column in by_column])
        left = Z - scores[:, columns] @ fitted.loadings[:, columns].T
        for m in range(1, len(fitted.dims) + 1):
            rows = slice(edges[m - 1], edges[m])
            total = float(jnp.sum(Z[:, rows] ** 2))
            table[m, s] = 1 - float(jnp.sum(left[:, rows] ** 2)) / total if total > 0 else 0.0
    return table


def given_ranks(hierarchy: Hierarchy) -> tuple[int, tuple[int, ...]]:
    """(joint rank, individual rank of every view) of methods without partial sharing: the rank of the structure of all views, and
    the sum over all other structures that contain the view."""
    joint = hierarchy.rank(tuple(hierarchy.modalities))
    return joint, tuple(len(hierarchy.active_columns(m)) - joint for m in hierarchy.modalities)


def check_options(
    options: Any, *, choices: dict[str, tuple[str, ...]], positive: Sequence[str] = (), least: dict[str, int] | None = None
) -> None:
    """Raise `ValueError` that names the option unless each is among its choices, positive, or at least so large. None passes."""
    for name, allowed in choices.items():
        if getattr(options, name) not in allowed:
            listed = f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}"
            raise ValueError(f"{name}: is {getattr(options, name)!r}; expected {listed}")
    given = {name: getattr(options, name) for name in (*positive, *(least or {})) if getattr(options, name) is not None}
    for name, value in given.items():
        if name in positive and not value > 0:
            raise ValueError(f"{name}: is {value}; expected a positive number")
        if least and name in least and not value >= least[name]:
            raise ValueError(f"{name}: is {value}; expected at least {least[name]}")


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
