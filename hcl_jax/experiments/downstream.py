"""A replicate of the downstream study: representations from n unlabelled rows, regressions of a response on m labelled ones.

A method is named REPRESENTATION+REGRESSION. Its first stage, the representation, is shared by all regressions on it. The labelled
rows enter as second moments by fold, and errors are expectations under the truth: no test sample, and no noise from one. Scores
that are no linear map of the features, and features that are seen through a link, are judged on `N_TEST` rows of their own, by
the distance from E[y|x].
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PyTree

from hcl_jax.baselines import BASELINES, SUPERVISED
from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators import ESTIMATORS
from hcl_jax.estimators.estimate import Estimate
from hcl_jax.experiments.cell import hierarchy_columns, hierarchy_fields, join_fields, number_name, path_name
from hcl_jax.experiments.experiment import Outcome, Stage
from hcl_jax.experiments.mapping import spread
from hcl_jax.experiments.methods import is_estimator
from hcl_jax.experiments.recovery import check_samples, estimate_program
from hcl_jax.experiments.searched import study_config
from hcl_jax.fitted import Fitted, LinearFit
from hcl_jax.limits import bayes
from hcl_jax.links import LOSSY, Link, check_link, sample_links
from hcl_jax.marginals import Standardisation
from hcl_jax.metrics import coefficient_errors, prediction_errors, prediction_errors_on_rows
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
from hcl_jax.networks import BLIND, NETWORKS
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
N_TEST = 20_000
RAW, LIMIT, OWN, TUNED = "raw", "bayes", "own", "tuned"


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
    link: str = "identity"
    """Between the linear model and the features, one of `LINKS` that has an inverse."""

    def __post_init__(self) -> None:
        if self.n < 2:
            raise ValueError(f"n_grid: holds {self.n}; expected at least 2 samples")
        if self.m < 2 * N_FOLDS:
            raise ValueError(f"m_grid: holds {self.m}; expected at least {2 * N_FOLDS} labelled rows, two a fold")
        for name in ("noise_variance", "response_noise_variance"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: is {getattr(self, name)}; expected a positive number")
        check_link(self.link)
        if self.link in LOSSY:
            raise ValueError(
                f"link: is {self.link!r}; expected one with an inverse, as the Bayes limit is that of the linear model"
            )
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
        if self.link != "identity":
            fields["link"] = self.link
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
            "link": self.link,
            **hierarchy_columns(self.hierarchy),
        }


class Source(eqx.Module):
    """What draws the rows of a replicate, again and again: the truth, links, and keys."""

    truth: ResponseTruth
    row_key: Array
    labelled_keys: Array
    links: tuple[Link, ...]
    linked: bool = eqx.field(static=True)

    def seen(self, u: Float[Array, "n d"]) -> list[Float[Array, "n _d"]]:
        """The views of rows of the linear model."""
        hierarchy = self.truth.hierarchy
        return [link.forward(u[:, hierarchy.rows(m)]) for m, link in zip(hierarchy.modalities, self.links, strict=True)]

    def labelled_rows(self, m: int) -> tuple[list[Float[Array, "m _d"]], Float[Array, " m"]]:
        """The views of the labelled rows, and their responses."""
        k_rows, k_response = jr.wrap_key_data(self.labelled_keys)
        u, z = sample_observations(k_rows, self.truth, m)
        return self.seen(u), sample_response(k_response, self.truth, z)

    def fresh_rows(self) -> tuple[list[Float[Array, "n _d"]], Float[Array, "n d"], Float[Array, " n"]]:
        """(views, the same before the link, responses) of `N_TEST` rows that no method sees."""
        k_rows, k_response = jr.split(jr.fold_in(jr.wrap_key_data(self.row_key), 1))
        u, z = sample_observations(k_rows, self.truth, N_TEST)
        return self.seen(u), u, sample_response(k_response, self.truth, z)


class Drawn(Source):
    """The sample covariance of n unlabelled rows, and the moments of m labelled ones.

    Through a link, both are of standardised features, with the means and scales of the n rows.
    """

    covariance: SampleCovariance
    moments: FoldMoments
    standardisation: Standardisation | None

    def features(self, views: Sequence[Float[Array, "n _d"]]) -> Float[Array, "n d"]:
        """Views side by side, as the covariance and the moments see them."""
        X = jnp.concatenate(views, axis=1)
        return X if self.standardisation is None else self.standardisation(X)


@dataclass(frozen=True)
class DrawSpec:
    """What the program that draws is compiled for. `n_samples` is None unless there are fewer samples than features."""

    hierarchy: Hierarchy
    dtype: str
    m: int
    support: tuple[Structure, ...]
    n_samples: int | None
    link: str = "identity"

    @classmethod
    def of(cls, cell: DownstreamCell, dtype: str) -> "DrawSpec":
        as_rows = cell.n - 1 < cell.hierarchy.n_features or cell.link != "identity"
        return cls(cell.hierarchy, dtype, cell.m, cell.support, cell.n if as_rows else None, cell.link)


def draw(spec: DrawSpec, shared: PyTree, replicate: Array) -> Drawn:
    """One replicate: loadings and coefficients, S from its law, labelled rows from theirs."""
    seed, checksum, n, noise_variance, response_noise_variance = shared
    key = jr.fold_in(jr.fold_in(jr.key(seed), checksum), replicate)
    k_loadings, k_beta, k_covariance, k_rows, k_labelled, k_response = jr.split(key, 6)
    dtype = jnp.dtype(spec.dtype)
    loadings = sample_loadings(k_loadings, spec.hierarchy, dtype)
    beta = sample_coefficients(k_beta, spec.hierarchy, spec.support or None, dtype)
    truth = ResponseTruth(loadings, noise_variance, spec.hierarchy, beta, response_noise_variance)
    keys = jr.key_data(jnp.stack([k_labelled, k_response]))
    links = sample_links(jr.fold_in(key, np.uint32(zlib.crc32(b"links"))), spec.link, spec.hierarchy, dtype)
    source = Source(truth, jr.key_data(k_rows), keys, links, spec.link != "identity")
    views, y = source.labelled_rows(spec.m)
    x, own = jnp.concatenate(views, axis=1), None
    if source.linked:
        assert spec.n_samples is not None, "what is seen through a link is drawn as rows"
        seen = jnp.concatenate(source.seen(_linked_rows(source, spec.n_samples)), axis=1)
        own = Standardisation.of(seen)
        covariance, x = SampleCovariance.from_data(own(seen)), own(x)
    elif spec.n_samples is None:
        covariance = sample_wishart_covariance(k_covariance, truth, n)
    else:
        covariance = sample_factored_covariance(k_covariance, truth, spec.n_samples)
    moments = FoldMoments.from_rows(x, y, N_FOLDS)
    return Drawn(source.truth, source.row_key, keys, links, source.linked, covariance, moments, own)


def _linked_rows(source: Source, n: int) -> Float[Array, "n d"]:
    """The unlabelled rows before the link."""
    k_rows, _ = jr.split(jr.wrap_key_data(source.row_key))
    return sample_observations(k_rows, source.truth, n)[0]


def unlabelled_rows(drawn: Drawn, n: int) -> tuple[list[Float[Array, "n _d"]], Float[Array, " n"]]:
    """The views behind the covariance of a draw, and the responses of their rows, which only supervised methods may see."""
    k_rows, k_response = jr.split(jr.wrap_key_data(drawn.row_key))
    truth = drawn.truth
    rows = _linked_rows(drawn, n) if drawn.linked else sample_rows_given_covariance(k_rows, drawn.covariance, n)
    noise = jnp.sqrt(truth.conditional_variance()) * jr.normal(k_response, (n,), rows.dtype)
    return drawn.seen(rows), rows @ truth.conditional_mean() + noise


def fit_network(name: str, hierarchy: Hierarchy, n: int, supervision: str, drawn: Drawn) -> Fitted:
    """A network on the rows; on their responses too where it is supervised."""
    views, y = unlabelled_rows(drawn, n)
    key = jr.fold_in(jr.wrap_key_data(drawn.row_key), np.uint32(zlib.crc32(name.encode())))
    options = {} if supervision == "none" else {"y": y}
    return NETWORKS[name](views, hierarchy, config=study_config(name, supervision), key=key, **options)


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


SUPERVISIONS = {OWN: "joint", TUNED: "tuned"}
"""How a network whose own prediction is asked for has seen the responses; any other has not."""


def split_method(method: str) -> tuple[str, str]:
    """(representation, regression) of a method's name."""
    representation, _, regression = method.partition("+")
    return representation, regression


def known_methods() -> tuple[str, ...]:
    """Every method of the study."""
    hcl = [f"{name}+{regression}" for name in ESTIMATORS for regression in HCL_REGRESSIONS]
    others = [f"{name}+{regression}" for name in (RAW, *BASELINES) for regression in SCORE_REGRESSIONS]
    own = [f"{name}+{OWN}" for name in SUPERVISED]
    networks = [f"{name}+{regression}" for name in NETWORKS for regression in (*SCORE_REGRESSIONS, OWN, TUNED)]
    blind = [f"{name}+{kind}" for name in BLIND for kind in (OWN, TUNED)]
    return (*hcl, *others, *own, *(method for method in networks if method not in blind), LIMIT)


def estimate_outcome(regression: str, fit: Estimate, drawn: Drawn) -> Outcome:
    """All metrics of a regression on the scores of estimated loadings."""
    score_map, result = HCL_REGRESSIONS[regression](fit, drawn)
    outcome = linear_errors(score_map @ result.coefficients, result.intercept, drawn)
    if not drawn.linked:  # loadings of features seen through a link are not the truth's
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
            own, offset = fit.own_prediction()
            coefficients = score_map @ own
            intercept = offset - fit.centre @ coefficients
        else:
            result = SCORE_REGRESSIONS[regression](drawn.moments.project(score_map))
            coefficients, intercept, status = score_map @ result.coefficients, result.intercept, _worse(status, result.status)
    return linear_errors(coefficients, intercept, drawn) | {"status": status, "steps": steps}


def network_outcome(regression: str, m: int, fit: Fitted, drawn: Drawn) -> Outcome:
    """All metrics of a regression on scores that are no linear map, or of a supervised network's own prediction."""
    views, u, y = drawn.fresh_rows()
    if regression in SCORE_REGRESSIONS:
        labelled, responses = drawn.labelled_rows(m)
        result = SCORE_REGRESSIONS[regression](FoldMoments.from_rows(fit.transform(labelled), responses, N_FOLDS))
        predicted = fit.transform(views) @ result.coefficients + result.intercept
        status = _worse(fit.status, result.status)
    else:
        predicted, status = fit.predict(views), fit.status
    return prediction_errors_on_rows(predicted, u, y, drawn.truth) | {"status": status, "steps": fit.steps}


def linear_errors(coefficients: Float[Array, " d"], intercept: Float[Array, ""], drawn: Drawn) -> Outcome:
    """The errors of ŷ = bᵀx + intercept: in expectation, or on rows where features are seen through a link."""
    if not drawn.linked:
        return prediction_errors(coefficients, intercept, drawn.truth)
    views, u, y = drawn.fresh_rows()
    return prediction_errors_on_rows(drawn.features(views) @ coefficients + intercept, u, y, drawn.truth)


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
def network_program(name: str, hierarchy: Hierarchy, n: int, supervision: str, batched: bool) -> Callable[..., Fitted]:
    """(None, draws, counts) -> the fits of all replicates."""
    return spread(lambda _, drawn: fit_network(name, hierarchy, n, supervision, drawn), batched, runs_long=True)


@lru_cache
def network_outcome_program(regression: str, m: int, batched: bool) -> Callable[..., Outcome]:
    """(None, (fits, draws), counts) -> the outcomes of all replicates."""
    return spread(lambda _, item: network_outcome(regression, m, *item), batched)


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
        if representation in NETWORKS:
            kind = SUPERVISIONS.get(regression, "none")
            fits = network_program(representation, cell.hierarchy, cell.n, kind, batched)
            outcome = network_outcome_program(regression, cell.m, batched)
            return (
                Stage(representation if kind == "none" else f"{representation} ({kind})", fits, lambda drawn, _: drawn),
                Stage(f"(+{regression})", outcome, lambda drawn, fits: (fits, drawn)),
            )
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
