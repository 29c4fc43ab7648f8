"""What every method that sees rows returns: scores of any rows, and which views hold each column of them."""

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators import BY_PATTERN, ESTIMATORS, Estimate
from hcl_jax.estimators.cells import cell_posterior, complete_cells, hcl_ml_by_cell
from hcl_jax.estimators.missing import (
    PatternMoments,
    posterior_covariances,
    posterior_scores,
    predicted_variances,
    regression_spread,
    view_grams,
)
from hcl_jax.fisher import noise_by_feature
from hcl_jax.scores import posterior_mean_scores
from hcl_jax.structure import Hierarchy, Structure, as_hierarchy
from hcl_jax.views import Views, as_response, as_views, centre_and_scale, presence_of, standardise

MISSING = ("views", "impute-cells")
"""What rows may lack: whole views, single cells being an error that counts them; or any cells."""


class Fitted(eqx.Module):
    """A method fitted to rows: all that studies, figures and tables of importance know of it.

    R columns of scores, each shared by the views in which `membership` holds; a column without any is unused, and zero. The
    number of columns is static and the membership traced, so that fits whose ranks the data choose can be mapped and batched.
    """

    membership: eqx.AbstractVar[Bool[Array, "M R"]]
    status: eqx.AbstractVar[Int[Array, ""]]
    """0 converged, or at its end; 1 out of steps; 2 non-finite."""
    steps: eqx.AbstractVar[Int[Array, ""]]
    dims: eqx.AbstractVar[tuple[int, ...]]

    @abstractmethod
    def transform(self, views: Any, presence: Any = None) -> Float[Array, "n R"]:
        """Scores of any rows, with the training means and scales: those of a row depend on that row alone.

        A view that a row lacks is NaN throughout, or False in `presence` (n × M), whatever then stands there. Raises `ValueError`
        for what `as_views` refuses, and where the method cannot score such rows.
        """

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(description, which JSON can hold, with a `kind`; arrays by name), from which the same bits are read again. Raises
        `ValueError` where the method has none."""
        raise ValueError(f"fitted: {type(self).__name__} cannot be saved; expected a linear fit, a copula or a network")

    @abstractmethod
    def predict(self, views: Any) -> Float[Array, "..."]:
        """What a supervised method expects of the response. Raises `ValueError` for an unsupervised one."""


class LinearFit(Fitted):
    """A fitted decomposition Z ≈ factors loadingsᵀ of the standardised data Z = (X − centre)/scale, X all views side by side."""

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
    steps: Int[Array, ""]
    dims: tuple[int, ...] = eqx.field(static=True)
    coefficients: Float[Array, " R"] | None = None
    """Of the response on the scores, where the method is supervised."""
    intercept: Float[Array, ""] | None = None
    noise_variance: Float[Array, " d"] | None = None
    """Of the standardised features, where scores are posterior means: a row that lacks views then has them too."""
    spread: Float[Array, "M p p"] | None = None
    """What estimation adds to the variance of predicted views, `regression_spread`, of fits to rows that lack views."""

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(description, arrays): all that `linear_from_state` needs for the same bits."""
        names = [item.name for item in dataclasses.fields(self) if item.name != "dims" and getattr(self, item.name) is not None]
        return {"kind": "linear", "dims": self.dims}, {name: np.asarray(getattr(self, name)) for name in names}

    def standardise(self, views: Any) -> Float[Array, "n d"]:
        """Z = (X − centre)/scale, with the training means and scales, in the precision of the fit."""
        X = stack_views(views, self.dims).astype(self.centre.dtype)
        return (X - self.centre[None, :]) / self.scale[None, :]

    def transform(self, views: Any, presence: Any = None) -> Float[Array, "n R"]:
        X, present = read_rows(views, self.dims, presence)
        Z = (X.astype(self.centre.dtype) - self.centre[None, :]) / self.scale[None, :]
        if present is None:
            return Z @ self.score_map
        if self.noise_variance is None:
            raise ValueError("views: lack some rows of some view; expected whole ones, as this decomposition has no other scores")
        return posterior_scores(Z, present, self.loadings, self.noise_variance, self.dims)[0]

    def score_covariances(self, presence: Any) -> Float[Array, "n R R"]:
        """Var(z | the views that are present) of every row of `presence` (n × M booleans); it is the same for all rows that have
        the same views.

        Raises `ValueError` for another `presence`, and where the method has no noise model.
        """
        given = presence if isinstance(presence, jax.Array) else np.asarray(presence)
        if given.dtype != bool or given.ndim != 2 or given.shape[1] != len(self.dims):
            raise ValueError(f"presence: is {given.dtype} of shape {given.shape}; expected booleans, rows × {len(self.dims)}")
        return posterior_covariances(view_grams(self.loadings, self._noise(), self.dims), jnp.asarray(given))[0]

    def impute(
        self, views: Any, presence: Any = None, *, missing: str = "views"
    ) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
        """(all views side by side with those that a row lacks predicted, standard deviations of the predictions), in the units of
        the data.

        A view is predicted by μ_m + Λ^(m)E[z | the views that are present], with covariance Λ^(m)V_PΛ^(m)ᵀ + Ψ_m and, where the
        fit knows it, what the estimation adds; what is present stays as it is, with deviation 0. With `missing="impute-cells"`
        any cells may be NaN, and are predicted from all others of their row. Raises `ValueError` as `transform` does, and where
        the method has no noise model.
        """
        _check_missing(missing)
        if missing == "impute-cells":
            psi, cells = self._noise(), read_cells(views, self.dims, presence)
            Z = (cells.astype(psi.dtype) - self.centre[None, :]) / self.scale[None, :]
            zero = jnp.zeros_like(self.centre)
            values, deviations = complete_cells(Z, self.loadings, psi, zero)
            scale = jnp.where(jnp.isfinite(self.scale), self.scale, 0)
            predicted = self.centre[None, :] + scale[None, :] * values
            return jnp.where(jnp.isnan(cells), predicted, cells), scale[None, :] * deviations
        X, present = read_rows(views, self.dims, presence)
        psi = self._noise()
        if present is None:
            return X, jnp.zeros_like(X)
        Z = (X.astype(psi.dtype) - self.centre[None, :]) / self.scale[None, :]
        scores, posterior, pattern = posterior_scores(Z, present, self.loadings, psi, self.dims)
        variances = predicted_variances(scores, posterior, pattern, self.loadings, psi, self.dims, self.spread)
        scale = jnp.where(jnp.isfinite(self.scale), self.scale, 0)  # constant features are their mean
        predicted = self.centre[None, :] + scale[None, :] * (scores @ self.loadings.T)
        seen = present[:, np.repeat(np.arange(len(self.dims)), self.dims)]
        return jnp.where(seen, X, predicted), jnp.where(seen, 0, scale[None, :] * jnp.sqrt(variances))

    def _noise(self) -> Float[Array, " d"]:
        """Raises `ValueError` where the method has no noise model."""
        if self.noise_variance is None:
            raise ValueError("fitted: this decomposition has no noise variances; expected a likelihood or spectral fit that has")
        return self.noise_variance

    def predict(self, views: Any) -> Float[Array, " n"]:
        coefficients, intercept = self.own_prediction()
        return self.transform(views) @ coefficients + intercept

    def own_prediction(self) -> tuple[Float[Array, " R"], Float[Array, ""]]:
        """(coefficients on the scores, intercept) of a supervised method. Raises `ValueError` for an unsupervised one."""
        if self.coefficients is None or self.intercept is None:
            raise ValueError("fitted: this method saw no response; expected a supervised one, or regress on its scores")
        return self.coefficients, self.intercept

    def part(self, columns: Any) -> Float[Array, "n d"]:
        """What the chosen columns contribute to the training data, in the units of the data (without the means).

        Raises `ValueError` unless `columns` are R booleans.
        """
        chosen = columns if isinstance(columns, jax.Array) else np.asarray(columns)
        if chosen.dtype != bool or chosen.shape != self.loadings.shape[1:]:
            raise ValueError(f"columns: are {chosen.dtype} of shape {chosen.shape}; expected {self.loadings.shape[1]} booleans")
        kept = jnp.where(chosen[None, :], self.factors, 0)
        return kept @ self.loadings.T * self.scale[None, :]


def linear_from_state(description: Mapping[str, Any], arrays: Mapping[str, Any]) -> LinearFit:
    """The fit of which this is the `state`. Raises `TypeError` for what is missing."""
    return LinearFit(dims=tuple(description["dims"]), **{name: jnp.asarray(array) for name, array in arrays.items()})


def check_views(views: Any, dims: Sequence[int], *, least: int = 2, absent: bool = False, cells: bool = False) -> Views:
    """The views that `as_views` reads, of these dimensions.

    Raises `ValueError` for fewer views than the `least`, other numbers of views or features than the hierarchy has, and what
    `as_views` refuses.
    """
    if len(dims) < least:
        raise ValueError(
            f"hierarchy: has {len(dims)} modality; expected at least {least}, as baselines tell what views share "
            "(ESTIMATORS take one)"
        )
    read = as_views(views, absent=absent, cells=cells)
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


def read_rows(views: Any, dims: Sequence[int], presence: Any = None) -> tuple[Float[Array, "n d"], Bool[Array, "n M"] | None]:
    """(all views side by side with 0 for those that a row lacks, which are there), the latter None where all of them are.

    Raises `ValueError` as `check_views` does, and for a `presence` that is not n × M booleans.
    """
    read = check_views(views, dims, least=1, absent=True)
    X, present = read.stacked(), presence_of(read, presence)
    if presence is None and not isinstance(present, jax.core.Tracer) and bool(present.all()):
        return X, None
    if presence is None and isinstance(present, jax.core.Tracer):
        return X, None  # values cannot be looked at here: rows without a view are told by `presence`
    return jnp.where(jnp.repeat(present, np.array(dims), axis=1, total_repeat_length=sum(dims)), X, 0), present


def read_cells(views: Any, dims: Sequence[int], presence: Any = None) -> Float[Array, "n d"]:
    """All views side by side, NaN in the cells that are missing and in views that a row lacks by `presence`.

    Raises `ValueError` as `read_rows` does, but for missing cells.
    """
    read = check_views(views, dims, least=1, cells=True)
    present = presence_of(read, presence)
    return jnp.where(present[:, np.repeat(np.arange(len(dims)), dims)], read.stacked(), jnp.nan)


def _check_missing(missing: str) -> None:
    if missing not in MISSING:
        raise ValueError(f"missing: is {missing!r}; expected one of {', '.join(MISSING)}")


def column_structures(fitted: Fitted) -> tuple[Structure, ...]:
    """The structure of every column, () where it is unused."""
    held = np.asarray(fitted.membership)
    return tuple(tuple(int(m) + 1 for m in np.flatnonzero(column)) for column in held.T)


def active_structures(columns: Sequence[Structure]) -> tuple[Structure, ...]:
    """The structures that have columns, larger ones first."""
    return tuple(sorted({s for s in columns if s}, key=lambda s: (-len(s), s)))


def activity(fitted: Fitted) -> dict[Structure, int]:
    """How many columns each structure has, larger structures first."""
    columns = column_structures(fitted)
    return {s: columns.count(s) for s in active_structures(columns)}


def variance_explained(fitted: Fitted, views: Any) -> dict[tuple[int, Structure], float]:
    """1 − ‖Z_m − T_s L_{m,s}ᵀ‖²/‖Z_m‖² for every view m and active structure s, of any rows, with T = `transform` of them: the
    share of the view's variance about the training means that the structure's columns explain alone. 0 where there is none.

    L are the loadings of a linear fit; of any other, the least-squares coefficients of the standardised views of these rows,
    which have to be more than the structure has columns.
    """
    scores, by_column, edges = fitted.transform(views), column_structures(fitted), np.cumsum([0, *fitted.dims])
    if isinstance(fitted, LinearFit):
        Z = fitted.standardise(views)
    else:
        X = stack_views(views, fitted.dims)
        Z, scores = standardise(X, X).astype(scores.dtype), scores - scores.mean(axis=0, keepdims=True)
    table = {}
    for s in activity(fitted):
        T = scores[:, np.array([column == s for column in by_column])]
        if isinstance(fitted, LinearFit):
            loadings = fitted.loadings[:, np.array([column == s for column in by_column])]
        else:
            loadings = jnp.linalg.lstsq(T, Z)[0].T
        left = Z - T @ loadings.T
        for m in range(1, len(fitted.dims) + 1):
            rows = slice(edges[m - 1], edges[m])
            total = float(jnp.sum(Z[:, rows] ** 2))
            table[m, s] = 1 - float(jnp.sum(left[:, rows] ** 2)) / total if total > 0 else 0.0
    return table


def fit_estimator(
    views: Any,
    hierarchy: Hierarchy,
    name: str = "hcl-ml",
    *,
    presence: Any = None,
    missing: str = "views",
    scaled: bool = True,
    **options: Any,
) -> LinearFit:
    """An entry of `ESTIMATORS` fitted to rows, whose scores are posterior means: views are centred, and features brought to a
    standard deviation of 1 where they are `scaled`. `options` are the estimator's, such as `noise="view"`.

    A view that a row lacks is NaN throughout, or False in `presence` (n × M); `BY_PATTERN` has the estimators that take such
    rows, and fit to what is there (means too). Single cells that are missing are an error that counts them, or, with
    `missing="impute-cells"`, latent as well: `hcl-ml` then maximises the likelihood of all cells that are there. Raises
    `ValueError` for an unknown name, one that takes no such rows, and for what `check_views` refuses.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"name: unknown estimator {name!r}; expected one of {', '.join(ESTIMATORS)}")
    _check_missing(missing)
    if missing == "impute-cells":
        return _fit_to_cells(read_cells(views, as_hierarchy(hierarchy).dims, presence), hierarchy, name, scaled, options)
    X, present = read_rows(views, as_hierarchy(hierarchy).dims, presence)
    if present is None:
        held: Any = X if isinstance(X, jax.core.Tracer) else np.asarray(X)  # on the host no number of rows has its own program
        centre, deviation = centre_and_scale(held)
        scale = deviation if scaled else (deviation > -1).astype(deviation.dtype)
        Z = (held - centre[None, :]) / scale[None, :]
        estimate = ESTIMATORS[name](SampleCovariance.from_data(Z, form="padded"), hierarchy, **options)
        score_map = posterior_mean_scores(estimate.loadings, estimate.noise_variance)
        factors = Z @ (score_map if isinstance(Z, jax.core.Tracer) else np.asarray(score_map))
        return _linear_fit(jnp.asarray(centre), jnp.asarray(scale), estimate, jnp.asarray(factors), hierarchy)
    if name not in BY_PATTERN:
        raise ValueError(f"name: is {name!r}, and views lack some rows; expected one of {', '.join(BY_PATTERN)}, or whole views")
    in_units = PatternMoments.from_data(views, presence)
    scale = _scale_of(in_units.covariance().variances(), scaled)
    moments = in_units.divided_by(scale)
    estimate, mean = BY_PATTERN[name](moments, hierarchy, **options)
    psi = noise_by_feature(estimate.noise_variance, hierarchy.n_features)
    centre = jnp.where(jnp.isfinite(scale), scale * mean, in_units.centre)
    factors, _, _ = posterior_scores((X - centre[None, :]) / scale[None, :], present, estimate.loadings, psi, hierarchy.dims)
    return _linear_fit(centre, scale, estimate, factors, hierarchy, regression_spread(moments, hierarchy, estimate, mean))


def _scale_of(variances: Float[Array, " d"], scaled: bool) -> Float[Array, " d"]:
    """Standard deviations, infinite ones of features that are constant; ones where features are not scaled."""
    return jnp.where(variances > 0, jnp.sqrt(variances), jnp.inf) if scaled else jnp.ones_like(variances)


def _fit_to_cells(X: Float[Array, "n d"], hierarchy: Hierarchy, name: str, scaled: bool, options: dict[str, Any]) -> LinearFit:
    """`hcl-ml` of rows that lack cells, which are NaN."""
    if name != "hcl-ml":
        raise ValueError(f"name: is {name!r}, and cells may be missing; expected hcl-ml, or whole views")
    origin = jnp.nanmean(X, axis=0)
    scale = _scale_of(jnp.nanvar(X - origin[None, :], axis=0, ddof=1), scaled)
    estimate, mean = hcl_ml_by_cell((X - origin[None, :]) / scale[None, :], hierarchy, **options)
    psi = noise_by_feature(estimate.noise_variance, hierarchy.n_features)
    centre = jnp.where(jnp.isfinite(scale), origin + scale * mean, origin)
    Z = (X - centre[None, :]) / scale[None, :]
    factors, _, _ = cell_posterior(Z, ~jnp.isnan(X), estimate.loadings, psi)
    return _linear_fit(centre, scale, estimate, factors, hierarchy)


def _linear_fit(
    centre: Float[Array, " d"],
    scale: Float[Array, " d"],
    estimate: Estimate,
    factors: Float[Array, "n K"],
    hierarchy: Hierarchy,
    spread: Float[Array, "M p p"] | None = None,
) -> LinearFit:
    """The fit of an estimate in units of the scale."""
    return LinearFit(
        centre=centre,
        scale=scale,
        loadings=estimate.loadings,
        factors=factors,
        score_map=posterior_mean_scores(estimate.loadings, estimate.noise_variance),
        membership=jnp.asarray(hierarchy.modality_mask),
        objective=estimate.objective,
        status=estimate.status,
        steps=estimate.steps,
        dims=hierarchy.dims,
        noise_variance=noise_by_feature(estimate.noise_variance, hierarchy.n_features),
        spread=spread,
    )
