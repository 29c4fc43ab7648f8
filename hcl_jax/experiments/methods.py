"""The names of methods in `--methods`: an entry of a registry, or one of the likelihood estimators told how noise differs.

`hcl-vb@view` is `hcl-vb` with one noise variance a view, `hcl-ml@feature` is `hcl-ml` with one a feature; a regression may
follow, as in `hcl-vb@view+posterior`.
"""

from collections.abc import Callable, Iterable
from functools import partial

from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators import ESTIMATORS, Estimate
from hcl_jax.fisher import NOISE
from hcl_jax.structure import Hierarchy

LIKELIHOOD_METHODS = ("hcl-ml", "hcl-vb")
"""They take `noise`, and are unbounded where there are as many factors as degrees of freedom."""


def split_noise(method: str) -> tuple[str, str | None]:
    """(the name without its kind of noise, that kind).

    >>> split_noise("hcl-vb@view+posterior")
    ('hcl-vb+posterior', 'view')
    >>> split_noise("hcl-vb")
    ('hcl-vb', None)
    """
    representation, plus, regression = method.partition("+")
    name, at, noise = representation.partition("@")
    return name + plus + regression, noise if at else None


def is_estimator(representation: str) -> bool:
    """Whether this, up to its kind of noise, is an entry of `ESTIMATORS`."""
    return split_noise(representation)[0] in ESTIMATORS


def estimator(name: str) -> Callable[[SampleCovariance, Hierarchy], Estimate]:
    """The estimator of that name. Raises `ValueError` as `check_methods` does."""
    check_methods([name], ESTIMATORS)
    known, noise = split_noise(name)
    entry: Callable[..., Estimate] = ESTIMATORS[known]
    return entry if noise is None else partial(entry, noise=noise)


def check_methods(methods: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` unless every name is known, up to a kind of noise that its estimator takes."""
    known = tuple(known)
    for method in methods:
        name, noise = split_noise(method)
        check_known([name if noise is not None else method], known)
        if noise is None:
            continue
        if noise not in NOISE:
            raise ValueError(f"methods: {method!r} has unknown noise; expected one of {', '.join(NOISE)} behind the @")
        if name.partition("+")[0] not in LIKELIHOOD_METHODS:
            raise ValueError(f"methods: {method!r} takes no noise; expected {' or '.join(LIKELIHOOD_METHODS)} before the @")


def check_known(methods: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ValueError` unless every name is among those known."""
    known = tuple(known)
    for method in methods:
        if method not in known:
            raise ValueError(f"methods: unknown {method!r}; expected some of {', '.join(known)}")
