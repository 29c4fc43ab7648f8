"""Random input: whatever is given, the answer is a result, or an error in one line that says what is wrong; never a crash, a
silent NaN or a hang. 2,000 examples; command lines are fuzzed up to where programs would be compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance
from hcl_jax.estimators.estimate import CONVERGED, NON_FINITE
from hcl_jax.experiments.command_line import check_options, error_line, make_hierarchy
from hcl_jax.experiments.downstream import known_methods
from hcl_jax.streaming import accumulate
from simulations import downstream, recovery

pytestmark = pytest.mark.slow
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


def fuzzed(examples: int):
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=SLOW)


def said_in_one_line(error: ValueError, what: str) -> None:
    """An error that a user can act on: one line that begins with what it is about."""
    text = str(error)
    assert text, f"{what}: an error without a message"
    assert "\n" not in text, f"{what}: {text!r} is more than one line"
    assert ":" in text or "--" in text, f"{what}: {text!r} names no argument"


words = st.one_of(
    st.sampled_from(
        ["123:2", "12", "1.10:2", "hcl-ml", "naive-svd", "gaussian", "true", "float32", "0", "-1", "nan", "inf", "1e400", ""]
    ),
    st.integers(-3, 10**7).map(str),
    st.floats().map(str),
    st.text(max_size=8).filter(lambda text: not text.startswith("-") and "\x00" not in text),
)


def command_lines(study) -> st.SearchStrategy[list[str]]:
    """Some of the study's options, each with a few words, right or wrong."""
    names = [field for field in study.__dataclass_fields__ if field not in ("loadings_from", "views", "list_methods")]
    option = st.sampled_from([*names, "no-such-option"]).map(lambda name: f"--{name.replace('_', '-')}")
    return st.lists(st.tuples(option, st.lists(words, max_size=3)), max_size=4).map(
        lambda given: [w for o, ws in given for w in (o, *ws)]
    )


def read_recovery(arguments: list[str]) -> None:
    study = recovery.parse_study(arguments)
    recovery.check(study)
    recovery.make_cells(study, [make_hierarchy(dims, study.rank, study.structures) for dims in study.dims])


def read_downstream(arguments: list[str]) -> None:
    study = downstream.parse_study(arguments)
    check_options(study, known_methods())
    downstream.make_cells(study)


@pytest.mark.parametrize(
    ("read", "study"), [(read_recovery, recovery.Study), (read_downstream, downstream.Study)], ids=["recovery", "downstream"]
)
def test_command_lines(read, study):
    @fuzzed(300)
    @given(command_lines(study))
    def check(arguments):
        try:
            read(arguments)
        except ValueError as error:
            said_in_one_line(ValueError(error_line(study, error)), f"{arguments}")

    check()


@fuzzed(400)
@given(
    st.lists(st.integers(-1, 12), max_size=5),
    st.dictionaries(st.lists(st.integers(-1, 6), max_size=4).map(tuple), st.integers(-1, 5), max_size=6),
)
def test_hierarchies(dims, ranks):
    try:
        hierarchy = Hierarchy(tuple(dims), ranks)
    except ValueError as error:
        said_in_one_line(error, f"Hierarchy({dims}, {ranks})")
        return
    assert hierarchy.n_features == sum(dims)
    assert hierarchy.mask.shape == (hierarchy.n_features, hierarchy.n_factors)
    assert hierarchy.n_factors == sum(ranks.values())


@fuzzed(200)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.integers(-2, 3), st.lists(words, max_size=4))
def test_structures_by_name(dims, rank, structures):
    try:
        hierarchy = make_hierarchy(dims, rank, structures)
    except ValueError as error:
        said_in_one_line(error, f"make_hierarchy({dims}, {rank}, {structures})")
        return
    assert hierarchy.dims == tuple(dims)


entries = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1e-300, 1e300, np.nan, np.inf]), st.floats(-1e6, 1e6))
view_arrays = st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(0, 2**31), entries)


@fuzzed(300)
@given(st.lists(view_arrays, max_size=3), st.sampled_from(["auto", "rows", "matrix", "", "dense"]))
def test_views(shapes, form):
    """Views of a few rows, one entry of each set to something extreme."""
    views = []
    for n, d, seed, entry in shapes:
        view = np.random.default_rng(seed).standard_normal((n, d))
        if n:
            view[seed % n, seed % d] = entry
        views.append(jnp.asarray(view))
    try:
        covariance = SampleCovariance.from_data(views, form=form)
    except ValueError as error:
        said_in_one_line(error, f"from_data({shapes}, {form!r})")
    else:
        largest = max(float(jnp.abs(view).max()) for view in views)
        assert largest > 1e150 or bool(jnp.isfinite(covariance.trace()))
    try:
        sums = accumulate([[np.asarray(view) for view in views]])
    except ValueError as error:
        said_in_one_line(error, f"accumulate({shapes})")
    else:
        assert sums.n == views[0].shape[0]


HIERARCHIES = (Hierarchy.full((4, 3), 1), Hierarchy((3, 4, 2), {(1, 2, 3): 1, (2,): 2}), Hierarchy((6,), {(1,): 2}))
FITTED = ("hcl-svd", "hcl-gn", "hcl-ml", "hcl-vb")
PROGRAMS = {
    (name, hierarchy): jax.jit(lambda S, name=name, hierarchy=hierarchy: ESTIMATORS[name](S, hierarchy))
    for name in FITTED
    for hierarchy in HIERARCHIES
}  # twelve shapes


@fuzzed(500)
@given(
    st.sampled_from(list(PROGRAMS)),
    st.integers(0, 2**31),
    st.integers(1, 12),  # no trace, no covariance
    st.lists(st.integers(-8, 8), min_size=10, max_size=10),
    st.integers(3, 10**6),
)
def test_estimators(program, seed, rank, exponents, n):
    """Covariances of any rank, features in any units."""
    name, hierarchy = program
    d = hierarchy.n_features
    root = np.random.default_rng(seed).standard_normal((d, rank)) * 10.0 ** np.array(exponents[:d])[:, None]
    estimate = PROGRAMS[program](SampleCovariance(jnp.asarray(root @ root.T), n=n))
    if int(estimate.status) == NON_FINITE:
        return
    for value in (estimate.loadings, estimate.noise_variance, estimate.objective):
        assert bool(jnp.isfinite(value).all()), f"{name} {hierarchy} seed {seed}: not finite, and status {int(estimate.status)}"
    if int(estimate.status) == CONVERGED:
        size = float(jnp.linalg.norm(estimate.loadings.T @ estimate.loadings) / np.linalg.norm(root.T @ root))
        assert size < 10, f"{name} {hierarchy} seed {seed} rank {rank} {exponents} {n}: {size:.3g} times the data, and converged"
