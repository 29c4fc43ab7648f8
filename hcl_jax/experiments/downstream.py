"""A replicate of the downstream study: representations from n unlabelled rows, regressions of a response on m labelled ones.

A method is named REPRESENTATION+REGRESSION. Its first stage, the representation, is shared by all regressions on it. The labelled
rows enter as second moments by fold, and errors are expectations under the truth: no test sample, and no noise from one.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree

from hcl_jax.baselines import BASELINES
from hcl_jax.baselines.linear import LinearFit, own_prediction
from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators import ESTIMATORS
from hcl_jax.estimators.estimate import Estimate
from hcl_jax.experiments.cell import hierarchy_columns, hierarchy_fields, join_fields, number_name, path_name
from hcl_jax.experiments.experiment import Outcome, Stage
from hcl_jax.experiments.mapping import spread
from hcl_jax.experiments.methods import is_estimator
from hcl_jax.experiments.recovery import check_samples, estimate_program
from hcl_jax.limits import bayes
from hcl_jax.metrics import coefficient_errors, prediction_errors
from hcl_jax.model import (
    ResponseTruth,
    sample_coefficients,
    sample_factored_covariance,
    sample_loadings,
    sample_observations,
    sample_response,
    sample_rows_given_covariance,
    sample_wishart_covariance,
)
from hcl_jax.prediction import (
    FoldMoments,
    Regression,
    group_lasso,
    group_relevance,
    least_squares,
    least_squares_scores,
    posterior_mean_scores,
    ridge,
)
from hcl_jax.structure import CONVERGED, NON_FINITE, ON_BOUND, OUT_OF_STEPS, Hierarchy, Structure, structure_name

N_FOLDS = 5
RAW, LIMIT, OWN = "raw", "bayes", "own"


@dataclass(frozen=True)
class DownstreamCell:
    """One setting of the downstream study."""

    hierarchy: Hierarchy
    n: int
    m: int
    """Labelled rows."""
    noise_variance: float
    response_noise_variance: float = 0.1
    support: tuple[Structure, ...] = ()
    """Structures with non-zero coefficients, kept in the order of the hierarchy; all of them where none is named."""

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"n_grid: holds {self.n}; expected at least 2 samples")
        if self.m < 2 * N_FOLDS:
            raise ValueError(f"m_grid: holds {self.m}; expected at least {2 * N_FOLDS} labelled rows, two a fold")
        for name in ("noise_variance", "response_noise_variance"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: is {getattr(self, name)}; expected a positive number")
        named = {self.hierarchy.present(s, "support") for s in self.support}
        object.__setattr__(self, "support", tuple(s for s in self.hierarchy.structures if s in named))

    @property
    def draw_name(self) -> str:
        """Names the data."""
        fields = hierarchy_fields(self.hierarchy) | {"n": str(self.n), "m": str(self.m)}
        fields["noise_variance"] = number_name(self.noise_variance)
        if self.response_noise_variance != 0.1:
            fields["response_noise_variance"] = number_name(self.response_noise_variance)
        if self.support:
            fields["support"] = "+".join(map(structure_name, self.support))
        return join_fields(fields)

    @property
    def name(self) -> str:
        """`key=value` in a fixed order, defaults left out, as `path_name` makes it."""
        return path_name(self.draw_name)

    def columns(self) -> dict[str, str | int | float]:
        """The cell's columns of a tidy table."""
        return {
            "cell": self.name,
            "n": self.n,
            "m": self.m,
            "noise_variance": self.noise_variance,
            "response_noise_variance": self.response_noise_variance,
            "support": "+".join(map(structure_name, self.support)),
            **hierarchy_columns(self.hierarchy),
        }


class Drawn(eqx.Module):
    """The truth, the sample covariance of n unlabelled rows, the moments of m labelled ones, and the key of the former rows."""

    truth: ResponseTruth
    covariance: SampleCovariance
    moments: FoldMoments
    row_key: Array


@dataclass(frozen=True)
class DrawSpec:
    """What the program that draws is compiled for. `n_samples` is None unless there are fewer samples than features."""

    hierarchy: Hierarchy
    dtype: str
    m: int
    support: tuple[Structure, ...]
    n_samples: int | None

    @classmethod
    def of(cls, cell: DownstreamCell, dtype: str) -> "DrawSpec":
        n_samples = cell.n if cell.n - 1 < cell.hierarchy.n_features else None
        return cls(cell.hierarchy, dtype, cell.m, cell.support, n_samples)


def draw(spec: DrawSpec, shared: PyTree, replicate: Array) -> Drawn:
    """One replicate: loadings and coefficients, S from its law, labelled rows from theirs."""
    seed, checksum, n, noise_variance, response_noise_variance = shared
    key = jr.fold_in(jr.fold_in(jr.key(seed), checksum), replicate)
    k_loadings, k_beta, k_covariance, k_rows, k_labelled, k_response = jr.split(key, 6)
    dtype = jnp.dtype(spec.dtype)
    loadings = sample_loadings(k_loadings, spec.hierarchy, dtype)
    beta = sample_coefficients(k_beta, spec.hierarchy, spec.support or None, dtype)
    truth = ResponseTruth(loadings, noise_variance, spec.hierarchy, beta, response_noise_variance)
    if spec.n_samples is None:
        covariance = sample_wishart_covariance(k_covariance, truth, n)
    else:
        covariance = sample_factored_covariance(k_covariance, truth, spec.n_samples)
    x, z = sample_observations(k_labelled, truth, spec.m)
    moments = FoldMoments.from_rows(x, sample_response(k_response, truth, z), N_FOLDS)
    return Drawn(truth, covariance, moments, jr.key_data(k_rows))


def unlabelled_rows(drawn: Drawn, n: int) -> tuple[list[Float[Array, "n _d"]], Float[Array, " n"]]:
    """The views behind the covariance of a draw, and the responses of their rows, which only supervised methods may see."""
    k_rows, k_response = jr.split(jr.wrap_key_data(drawn.row_key))
    rows = sample_rows_given_covariance(k_rows, drawn.covariance, n)
    hierarchy, truth = drawn.truth.hierarchy, drawn.truth
    noise = jnp.sqrt(truth.conditional_variance()) * jr.normal(k_response, (n,), rows.dtype)
    return [rows[:, hierarchy.rows(m)] for m in hierarchy.modalities], rows @ truth.conditional_mean() + noise


def fit_baseline(name: str, hierarchy: Hierarchy, n: int, drawn: Drawn) -> LinearFit:
    """A baseline on the rows; its own randomness folds in the crc32 of its name. The training factors are not kept."""
    views, y = unlabelled_rows(drawn, n)
    key = jr.fold_in(jr.wrap_key_data(drawn.row_key), np.uint32(zlib.crc32(name.encode())))
    fitted = BASELINES[name](views, hierarchy, y=y, key=key)
    return eqx.tree_at(lambda fit: fit.factors, fitted, fitted.factors[:0])


Scores = tuple[Float[Array, "d R"], Regression]
"""The map from features to scores, and the regression on these."""


def _on_posterior_means(regress: Callable[[FoldMoments, Hierarchy], Regression], fit: Estimate, drawn: Drawn) -> Scores:
    score_map = posterior_mean_scores(fit.loadings, fit.noise_variance)
    return score_map, regress(drawn.moments.project(score_map), drawn.truth.hierarchy)


def _debiased(regress: Callable[[FoldMoments, Hierarchy, Array], Regression], fit: Estimate, drawn: Drawn) -> Scores:
    score_map = least_squares_scores(fit.loadings)
    noise = jnp.broadcast_to(fit.noise_variance, score_map.shape[:1])  # one value, or one a feature
    noise_gram = (score_map.T * noise[None, :]) @ score_map
    return score_map, regress(drawn.moments.project(score_map), drawn.truth.hierarchy, noise_gram)


HCL_REGRESSIONS: dict[str, Callable[[Estimate, Drawn], Scores]] = {
    "posterior": partial(_on_posterior_means, lambda moments, _: least_squares(moments)),
    "posterior-ridge": partial(_on_posterior_means, lambda moments, _: ridge(moments)),
    "posterior-evidence": partial(_on_posterior_means, lambda moments, _: ridge(moments, "evidence")),
    "posterior-group": partial(_on_posterior_means, group_lasso),
    "posterior-group-adaptive": partial(_on_posterior_means, partial(group_lasso, adaptive=1.0)),
    "posterior-relevance": partial(_on_posterior_means, group_relevance),
    "least-squares": partial(_debiased, lambda moments, _, __: least_squares(moments)),
    "debiased": partial(_debiased, lambda moments, _, noise_gram: least_squares(moments, noise_gram)),
    "debiased-group": partial(_debiased, group_lasso),
    "debiased-group-one-se": partial(_debiased, partial(group_lasso, rule="one-se")),
    "debiased-group-adaptive": partial(_debiased, partial(group_lasso, rule="one-se", adaptive=1.0)),
}
"""Regressions on the scores of estimated loadings: posterior means, or (debiased) least squares scores."""
SCORE_REGRESSIONS: dict[str, Callable[[FoldMoments], Regression]] = {"least-squares": least_squares, "ridge": ridge}
"""Regressions on the scores of any other representation. Supervised ones may also predict on their OWN."""


SUPERVISED = tuple(name for name in BASELINES if name.startswith(("sjive", "mmfl")))
"""Representations that see the response."""


def split_method(method: str) -> tuple[str, str]:
    """(representation, regression) of a method's name."""
    representation, _, regression = method.partition("+")
    return representation, regression


def known_methods() -> tuple[str, ...]:
    """Every method of the study."""
    hcl = [f"{name}+{regression}" for name in ESTIMATORS for regression in HCL_REGRESSIONS]
    others = [f"{name}+{regression}" for name in (RAW, *BASELINES) for regression in SCORE_REGRESSIONS]
    own = [f"{name}+{OWN}" for name in SUPERVISED]
    return (*hcl, *others, *own, LIMIT)


def estimate_outcome(regression: str, fit: Estimate, drawn: Drawn) -> Outcome:
    """All metrics of a regression on the scores of estimated loadings."""
    score_map, result = HCL_REGRESSIONS[regression](fit, drawn)
    outcome = prediction_errors(score_map @ result.coefficients, result.intercept, drawn.truth)
    outcome |= coefficient_errors(result.coefficients, fit.loadings, drawn.truth.hierarchy, drawn.truth)
    return outcome | {"status": _worse(fit.status, result.status), "steps": fit.steps}


def score_outcome(regression: str, fit: LinearFit | None, drawn: Drawn) -> Outcome:
    """All metrics of a regression on linear scores, or on the features themselves."""
    if fit is None:
        result, score_map = SCORE_REGRESSIONS[regression](drawn.moments), None
        status, steps = result.status, jnp.zeros((), int)
        coefficients, intercept = result.coefficients, result.intercept
    else:
        score_map, status, steps = fit.score_map / fit.scale[:, None], fit.status, fit.steps
        if regression == OWN:
            own, offset = own_prediction(fit)
            coefficients = score_map @ own
            intercept = offset - fit.centre @ coefficients
        else:
            result = SCORE_REGRESSIONS[regression](drawn.moments.project(score_map))
            coefficients, intercept, status = score_map @ result.coefficients, result.intercept, _worse(status, result.status)
    return prediction_errors(coefficients, intercept, drawn.truth) | {"status": status, "steps": steps}


def _worse(fit: Array, regression: Array) -> Array:
    """Non-finite before out of steps before projected before converged."""
    severity = {CONVERGED: 0, ON_BOUND: 1, OUT_OF_STEPS: 2, NON_FINITE: 3}
    order = jnp.array([severity[code] for code in sorted(severity)])
    return jnp.where(order[fit] >= order[regression], fit, regression)


@lru_cache
def draw_program(spec: DrawSpec, batched: bool) -> Callable[..., Drawn]:
    """(shared, replicates, counts) -> the draws of all replicates, each on its device."""
    return spread(partial(draw, spec), batched)


@lru_cache
def baseline_program(name: str, hierarchy: Hierarchy, n: int, batched: bool) -> Callable[..., LinearFit]:
    """(None, draws, counts) -> the fits of all replicates."""
    return spread(lambda _, drawn: fit_baseline(name, hierarchy, n, drawn), batched)


@lru_cache
def outcome_program(regression: str, estimated: bool, batched: bool) -> Callable[..., Outcome]:
    """(None, (fits, draws), counts) -> the outcomes of all replicates. One program serves all representations of a kind."""
    outcome = estimate_outcome if estimated else score_outcome
    return spread(lambda _, item: outcome(regression, *item), batched)


@lru_cache
def limit_program(batched: bool) -> Callable[..., Outcome]:
    """(None, truths, counts) -> the outcomes of all replicates."""
    return spread(lambda _, truth: bayes(truth), batched)


@dataclass(frozen=True)
class Downstream:
    """The downstream study."""

    study: str = "downstream"

    def check(self, cell: DownstreamCell, method: str) -> None:
        check_samples(split_method(method)[0], cell.hierarchy.n_factors, cell.n)

    def draw_key(self, cell: DownstreamCell, dtype: str) -> DrawSpec:
        return DrawSpec.of(cell, dtype)

    def draw_program(self, cell: DownstreamCell, dtype: str, batched: bool) -> Callable[..., Drawn]:
        return draw_program(DrawSpec.of(cell, dtype), batched)

    def shared_arguments(self, cell: DownstreamCell, seed: int, dtype: str) -> tuple:
        scalar, checksum = np.dtype(dtype).type, zlib.crc32(cell.draw_name.encode())
        numbers = (cell.n, cell.noise_variance, cell.response_noise_variance)
        return np.uint32(seed), np.uint32(checksum), *map(scalar, numbers)

    def stages(self, cell: DownstreamCell, method: str, batched: bool) -> tuple[Stage, ...]:
        if method == LIMIT:
            return (Stage(LIMIT, limit_program(batched), lambda drawn, _: drawn.truth),)
        representation, regression = split_method(method)
        if representation == RAW:
            return (Stage(method, outcome_program(regression, False, batched), lambda drawn, _: (None, drawn)),)
        estimated = is_estimator(representation)
        if estimated:
            program = estimate_program(representation, cell.hierarchy, batched)
            first = Stage(representation, program, lambda drawn, _: drawn.covariance)
        else:
            fit = baseline_program(representation, cell.hierarchy, cell.n, batched)
            first = Stage(representation, fit, lambda drawn, _: drawn)
        last = Stage(f"(+{regression})", outcome_program(regression, estimated, batched), lambda drawn, fits: (fits, drawn))
        return first, last

    def structures(self, cell: DownstreamCell, method: str) -> tuple[Structure, ...]:
        return cell.hierarchy.structures

    def numbers_drawn(self, cell: DownstreamCell) -> int:
        return (N_FOLDS + 1) * cell.hierarchy.n_features**2
