"""Any method on views that have been read: the settings of a fit, structures and ranks, the fit, scores of rows."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from hcl_jax.baselines import BASELINES, SUPERVISED
from hcl_jax.compiled import bucket
from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators import ESTIMATORS
from hcl_jax.estimators.missing import PatternMoments
from hcl_jax.fisher import NOISE
from hcl_jax.fitted import Fitted, LinearFit, fit_estimator
from hcl_jax.networks import BLIND, NETWORKS, configuration
from hcl_jax.outcomes import Outcome
from hcl_jax.selection import select_structures
from hcl_jax.structure import Hierarchy, Structure, full_lattice, labelled_structure, structure_label
from hcl_jax.views import Views, check_count, check_options, presence_table, standardise

MISSING = ("model", "impute-cells", "complete")
METHOD_NAMES = (*ESTIMATORS, *BASELINES, *NETWORKS)
FEW_FEATURES = 30
"""Views of fewer have noise by feature in the search for structures."""


@dataclass(frozen=True)
class Settings:
    """The arguments of `fit`, but for the data."""

    method: str = "hcl-vb"
    structures: Any = "all"
    ranks: Any = "auto"
    noise: str = "view"
    standardise: bool = True
    missing: str = "model"
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self, choices={"method": METHOD_NAMES, "noise": NOISE, "missing": MISSING})
        check_count(self.seed, "seed", 0)
        if not isinstance(self.standardise, bool):
            raise ValueError(f"standardise: is {self.standardise!r}; expected True or False")

    @property
    def key(self) -> Key[Array, ""]:
        return jr.key(self.seed)

    @property
    def lacking(self) -> str:
        """What `fit_estimator` calls `missing`."""
        return "impute-cells" if self.missing == "impute-cells" else "views"

    def search_noise(self, dims: Sequence[int]) -> str:
        """The noise of the search for structures: by feature where features were brought to variance 1 and some view has few of
        them. Standardised features differ in noise, and there odds would take the difference for factors; in views of many the
        floor of variance explained sees to that."""
        return "feature" if self.standardise and min(dims) < FEW_FEATURES else self.noise

    def in_names(self, names: Sequence[str]) -> "Settings":
        """The same, with structures by the names of their views. Raises `ValueError` for one that cannot be."""
        structures, ranks = self.structures, self.ranks
        if structures != "all":
            if isinstance(structures, str) or not isinstance(structures, Sequence) or not structures:
                raise ValueError(f"structures: is {structures!r}; expected 'all', or a list such as [{names[0]!r}]")
            read = [labelled_structure(s, names, "structures") for s in structures]
            structures = tuple(structure_label(s, names) for s in read)
        if isinstance(ranks, Mapping):
            ranks = {structure_label(labelled_structure(s, names, "ranks"), names): rank for s, rank in ranks.items()}
        elif ranks != "auto":
            check_count(ranks, "ranks", 1)
        return dataclasses.replace(self, structures=structures, ranks=ranks)


def choose_hierarchy(read: Views, settings: Settings) -> tuple[Hierarchy, tuple[Structure, ...]]:
    """(structures and ranks, as the settings give them or as the data support them; those that have all columns offered)."""
    names, ranks = read.names, settings.ranks
    if isinstance(ranks, Mapping):
        return Hierarchy(read.dims, {labelled_structure(s, names, "ranks"): rank for s, rank in ranks.items()}), ()
    listed = settings.structures != "all"
    wanted = [labelled_structure(s, names, "structures") for s in settings.structures] if listed else []
    if ranks != "auto":
        return Hierarchy(read.dims, dict.fromkeys(wanted if listed else full_lattice(len(names)), ranks)), ()
    offered = Hierarchy(read.dims, dict.fromkeys(wanted, 1)) if listed else None
    selection = select_structures(_covariance(read, settings), offered, dims=read.dims, noise=settings.search_noise(read.dims))
    return selection.hierarchy, tuple(s for s in selection.hierarchy.structures if selection.at_cap[s])


def _covariance(read: Views, settings: Settings) -> SampleCovariance | PatternMoments:
    """Of standardised features, where rows lack views by pattern of presence; single cells that are missing are at the mean."""
    matrices = list(read.matrices)
    if settings.missing == "impute-cells":
        matrices = [np.where(np.isnan(X), np.nanmean(X, axis=0, keepdims=True), X) for X in map(np.asarray, matrices)]
    if presence_table(read).all() or settings.missing == "impute-cells":
        filled = np.concatenate(matrices, axis=1)
        return SampleCovariance.from_data(standardise(filled, filled), form="padded")
    moments = PatternMoments.from_data(matrices)
    variances = moments.covariance().variances()
    return moments.divided_by(jnp.where(variances > 0, jnp.sqrt(variances), jnp.inf))


def fit_method(
    read: Views, hierarchy: Hierarchy, settings: Settings, response: Float[np.ndarray, " n"] | None, outcome: Outcome | None
) -> Fitted:
    """The fit of the settings' method; `response` is what it sees of the outcome."""
    method, matrices = settings.method, list(read.matrices)
    if method in ESTIMATORS:
        options = {"noise": settings.noise} if "noise" in inspect.signature(ESTIMATORS[method]).parameters else {}
        return fit_estimator(matrices, hierarchy, method, missing=settings.lacking, scaled=settings.standardise, **options)
    if method in BASELINES:
        return BASELINES[method](matrices, hierarchy, y=response, key=settings.key)
    config, n_classes = configuration(method), None if outcome is None or outcome.classes is None else len(outcome.classes)
    if response is not None and n_classes is not None and hasattr(config, "n_classes"):
        config, response = dataclasses.replace(config, n_classes=n_classes), response.astype(np.int32)
    return NETWORKS[method](matrices, hierarchy, config=config, y=response, key=settings.key)


def response_of(method: str, outcome: Outcome | None) -> Float[np.ndarray, " n"] | None:
    """What a supervised method sees of the outcome. Raises `ValueError` for an outcome that it cannot take."""
    if outcome is None:
        if method in SUPERVISED:
            raise ValueError(f"y: is None; expected an outcome, which {method} is fitted to")
        return None
    if method in SUPERVISED and outcome.classes is not None and len(outcome.classes) > 2:
        raise ValueError(f"y: has {len(outcome.classes)} classes; expected numbers or two classes, as {method} is a regression")
    if outcome.kind == "survival":  # networks do without
        if method in SUPERVISED:
            raise ValueError(f"y: are survival times; expected numbers or two classes, as {method} is a regression")
        return None
    if outcome.known.all():
        return outcome.values
    if method in SUPERVISED or method in NETWORKS and method not in BLIND:
        unknown = f"{int((~outcome.known).sum())} of {len(outcome.known)} samples"
        raise ValueError(f"y: is unknown for {unknown}; expected an outcome for each, as {method} is fitted to it")
    return None


def scores_of(fitted: Fitted, read: Views, settings: Settings) -> Float[np.ndarray, "n R"]:
    """Those of rows, whatever they lack: what is expected of factors is linear in what is expected of the cells."""
    matrices = _filled_up(read)
    if settings.missing == "impute-cells" and isinstance(fitted, LinearFit):
        filled = np.asarray(fitted.impute(matrices, missing="impute-cells")[0])
        matrices = np.split(filled, np.cumsum(fitted.dims)[:-1], axis=1)
    return np.asarray(fitted.transform(matrices))[: read.n_samples]


def completed(fitted: LinearFit, read: Views, settings: Settings) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"]]:
    """(all views side by side, what is missing predicted; standard deviations of the predictions)."""
    values, deviations = fitted.impute(_filled_up(read), missing=settings.lacking)
    return np.asarray(values)[: read.n_samples], np.asarray(deviations)[: read.n_samples]


def _filled_up(read: Views) -> list[np.ndarray]:
    """The views with their last row repeated up to a shared number of rows: no number of samples has its own program."""
    extra = bucket(read.n_samples) - read.n_samples
    return [np.concatenate([matrix, np.repeat(np.asarray(matrix)[-1:], extra, axis=0)]) for matrix in read.matrices]
