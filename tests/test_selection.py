"""Which structures and ranks data support: the evidence of columns, the table read, whole hierarchies found, and what is said of
them by permutations and halves of the data."""

import time

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import TWO, assert_at_least, assert_at_most, fitted_by, masked_normal, normal_truth, reference_arrays, relative
from test_compilation import compilations

from hcl_jax import Hierarchy, SampleCovariance, sample_wishart_covariance
from hcl_jax.estimators.missing import PatternMoments
from hcl_jax.estimators.variational import fit_posterior
from hcl_jax.selection import (
    Evidence,
    evidence,
    found_columns,
    half_split_stability,
    permutation_null,
    select,
    select_structures,
)
from hcl_jax.views import standardise

NOISE_OF_VIEWS = (0.2, 1.0, 3.0)
RANKS = {(1, 2, 3): 2, (1, 2): 2, (1,): 2}
SMALL = Hierarchy((15, 10, 20), RANKS)
OFFERED = Hierarchy(SMALL.dims, dict.fromkeys(RANKS, 3) | {(2, 3): 2, (3,): 2})


def small_problem(seed):
    truth = normal_truth(np.random.default_rng(seed), SMALL, np.repeat(NOISE_OF_VIEWS, SMALL.dims), "view")
    return truth, sample_wishart_covariance(jr.key(seed), truth, 1000)


def test_evidence_tells_what_is_there_from_what_is_not():
    """Of the columns offered, as many as there are stand far out, each in the modalities of one true structure."""
    for seed in range(3):
        _, S = small_problem(seed)
        posterior, _ = fit_posterior(S, OFFERED, noise="view")
        odds = evidence(posterior, S, OFFERED)
        columns = np.asarray(odds.columns)
        assert (np.asarray(odds.blocks)[~OFFERED.modality_mask] == 0).all()
        assert (columns[~np.asarray(posterior.kept).any(axis=0)] == 0).all(), "a pruned column has no evidence either way"
        ordered = np.sort(columns)[::-1]
        assert_at_least(ordered[5], 20, f"seed {seed}: the least log odds of the six columns that are there")
        assert_at_most(ordered[6], np.log(OFFERED.n_factors), f"seed {seed}: the largest of those that are not")


def test_hierarchies_are_found():
    for seed in range(3):
        _, S = small_problem(seed)
        assert select(S, OFFERED, noise="view") == SMALL, f"seed {seed}"


def test_hierarchies_of_standardised_views_are_found():
    """Standardising few features with equal noise makes noise that differs by feature: one variance a view finds up to ten more
    columns there."""
    truth = {(1, 2, 3): 1, (1,): 1, (2,): 1, (3,): 1}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        z = rng.standard_normal((300, 4))
        views = [
            z[:, [0, k]] @ rng.standard_normal((2, dim)) + sd * rng.standard_normal((300, dim))
            for k, dim, sd in ((1, 12, 1), (2, 10, 0.5), (3, 9, 1))
        ]
        S = SampleCovariance.from_data([standardise(view, view) for view in views])
        assert dict(select(S, Hierarchy.full((12, 10, 9), 2)).ranks) == truth, f"seed {seed}"


def test_noise_that_is_drawn_supports_no_hierarchy():
    rows = np.random.default_rng(0).standard_normal((500, TWO.n_features))
    with pytest.raises(ValueError, match="covariance: supports none of the 5 columns offered"):
        select(SampleCovariance.from_data(rows), TWO)


def test_found_columns_reads_the_table():
    """A block counts above log 7, of seven offered, a column above log 5."""
    blocks = np.array([[9.0, 0.2, 30.0, 0.0, 0.0], [8.0, 5.0, 0.0, 2.0, 9.0]])
    columns = np.array([15.0, 4.0, 30.0, 2.0, 1.5])
    assert found_columns(Evidence(jnp.asarray(columns), jnp.asarray(blocks)), TWO) == {(1, 2): [0], (2,): [1, 3], (1,): [2]}
    assert found_columns(Evidence(jnp.zeros(5), jnp.asarray(blocks)), TWO) == {}


def test_noise_supports_no_hierarchy():
    with pytest.raises(ValueError, match="covariance: supports none of the 5 columns offered; expected a visible factor"):
        select(SampleCovariance(2.0 * jnp.eye(16), n=500), TWO)


def small_views(seed=0, n=400, hierarchy=SMALL):
    """Rows of `SMALL`, standardised, with noise of variance 1."""
    rng = np.random.default_rng(seed)
    loadings = masked_normal(rng, hierarchy)
    rows = rng.standard_normal((n, hierarchy.n_factors)) @ loadings.T
    rows = rows + rng.standard_normal(rows.shape)
    return [standardise(rows[:, r], rows[:, r]) for r in map(hierarchy.rows, hierarchy.modalities)]


def covariance_of(views):
    return SampleCovariance.from_data(views)


def test_selections_come_with_their_evidence():
    """Ranks beyond those offered are found, and what each structure explains adds up to the signal's share of every view."""
    views = small_views()
    found = select_structures(covariance_of(views), Hierarchy(SMALL.dims, dict.fromkeys(RANKS, 1)), noise="feature")
    assert found.hierarchy == SMALL
    assert found.status == 0
    assert not any(found.at_cap.values())
    assert {s: len(odds) for s, odds in found.odds.items()} == RANKS
    assert min(map(min, found.odds.values())) > np.log(32)
    signal = (masked_normal(np.random.default_rng(0), SMALL) ** 2).sum(axis=1)
    shares = signal / (signal + 1)  # of every feature's variance
    for m in SMALL.modalities:
        explained = sum(share for (view, _), share in found.variance_explained.items() if view == m)
        assert_at_most(abs(explained - shares[SMALL.rows(m)].mean()), 0.05, f"view {m}: share explained, less the signal's")


def test_without_growth_ranks_are_caps_and_full_ones_are_flagged():
    offered = Hierarchy(SMALL.dims, {"123": 2, "12": 1, "1": 3, "3": 1})
    found = select_structures(covariance_of(small_views()), offered, noise="feature", grow=False)
    assert dict(found.hierarchy.ranks) == {(1, 2, 3): 2, (1, 2): 1, (1,): 2}
    assert found.at_cap == {(1, 2, 3): True, (1, 2): True, (1,): False, (3,): False}


def test_what_is_found_goes_to_the_structures_that_are_offered():
    """12 goes to 123 where that holds it, and to 1 and 2 where nothing does."""
    S = covariance_of(small_views())
    shared_and_private = Hierarchy(SMALL.dims, {"123": 1, "1": 1, "2": 1, "3": 1})
    assert dict(select_structures(S, shared_and_private, noise="feature").hierarchy.ranks) == {(1, 2, 3): 4, (1,): 2}
    private = Hierarchy(SMALL.dims, {"1": 1, "2": 1, "3": 1})
    assert dict(select_structures(S, private, noise="feature").hierarchy.ranks) == {(1,): 6, (2,): 4, (3,): 2}


def test_a_view_gets_no_more_columns_than_it_has_features():
    hierarchy = Hierarchy((12, 3), {"12": 2, "2": 1})
    found = select_structures(covariance_of(small_views(hierarchy=hierarchy)), dims=(12, 3), noise="view", floor=0.0)
    assert sum(rank for s, rank in found.hierarchy.ranks if 2 in s) <= 3


def test_structures_are_found_among_a_thousand_million():
    """Thirty views: a list of all structures, of the larger ones first, would not end, nor get to these."""
    truth = {tuple(range(1, 31)): 1, (2, 9, 17): 2, (4, 5): 1, (30,): 1}
    views = small_views(hierarchy=Hierarchy((20,) * 30, truth))
    found = select_structures(covariance_of(views), dims=(20,) * 30, noise="feature")
    assert dict(found.hierarchy.ranks) == truth
    assert found.offered is None
    assert found.at_cap == dict.fromkeys(truth, False)


def test_rows_that_lack_views_find_the_same():
    """A third of the rows lack one of three views."""
    views, presence = small_views(n=1000), np.ones((1000, 3), bool)
    presence[np.arange(0, 1000, 3), np.arange(0, 1000, 3) % 9 // 3] = False
    moments = PatternMoments.from_data(views, presence)
    assert select_structures(moments, noise="feature").hierarchy == SMALL


def test_what_is_shared_by_chance_is_not_kept():
    """Under permutations no shared column is; the data explain more than each of them does."""
    null = permutation_null(small_views(), SMALL, permutations=5, key=jr.key(0), noise="feature")
    assert {s: kept.tolist() for s, kept in null.kept.items()} == {(1, 2, 3): [0] * 5, (1, 2): [0] * 5}
    assert null.p_values == {(1, 2, 3): 1 / 6, (1, 2): 1 / 6}
    assert_at_least(null.observed[1, 2, 3], 10 * null.explained[1, 2, 3].max(), "share of 123, and 10 times that by chance")


def test_structures_that_are_there_are_stable_and_others_are_not():
    present = half_split_stability(small_views(), SMALL, splits=2, key=jr.key(0), noise="feature")
    for s, stability in present.items():
        assert_at_least(stability.cosine, 0.9, f"{s}: cosine of halves of 200 rows")
        assert not stability.unstable
    absent = Hierarchy(SMALL.dims, RANKS | {(2, 3): 1})
    assert half_split_stability(small_views(), absent, splits=2, key=jr.key(0), noise="feature")[2, 3].unstable


def test_folds_of_other_sizes_compile_nothing():
    views = small_views()
    hierarchy = SMALL

    def run(n):
        rows = [view[:n] for view in views]
        select_structures(SampleCovariance.from_data(rows, form="padded"), hierarchy, noise="feature")
        permutation_null(rows, hierarchy, permutations=1, key=jr.key(0), noise="feature")
        half_split_stability(rows, hierarchy, splits=1, key=jr.key(0), noise="feature")

    run(400)
    with compilations() as further:
        run(399)
        run(390)
    assert not further


def test_padded_folds_of_nearly_equal_size_compile_nothing():
    rows, wide = np.random.default_rng(0).standard_normal((34, 60)), Hierarchy((20, 40), {"12": 1, "1": 1})

    def fit(n):
        return fitted_by("hcl-ml")(SampleCovariance.from_data([rows[:n, :20], rows[:n, 20:]], form="padded"), wide)

    fit(33)
    with compilations() as further:
        fits = fit(34), fitted_by("hcl-ml")
    assert not further
    plain = fits[1](SampleCovariance.from_data([rows[:, :20], rows[:, 20:]]), wide)
    assert relative(fits[0].noise_variance, plain.noise_variance) < 1e-6  # the stopping tolerance of both is 1e-8


def test_bad_arguments():
    S, views = covariance_of(small_views()), small_views()
    for message, call in (
        ("offered, dims: expected a hierarchy", lambda: select_structures(S)),
        ("offered: has dims", lambda: select_structures(S, TWO)),
        ("noise: is 'row'", lambda: select_structures(S, SMALL, noise="row")),
        ("floor: ", lambda: select_structures(S, SMALL, floor=1.5)),
        ("dims: has dims", lambda: select_structures(S, dims=(15, 10, 21))),
        ("dims: is 0", lambda: select_structures(S, dims=(45, 0))),
        ("grow: is False", lambda: select_structures(S, dims=SMALL.dims, grow=False)),
        ("permutations: is 0", lambda: permutation_null(views, SMALL, permutations=0, key=jr.key(0))),
        ("splits: is 0", lambda: half_split_stability(views, SMALL, splits=0, key=jr.key(0))),
        ("views: have ", lambda: permutation_null(views[:2], SMALL, key=jr.key(0))),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


LARGE = Hierarchy((200, 100, 40), {"123": 3, "12": 2, "13": 1, "1": 3, "2": 2, "3": 2})


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["view", "feature"])
@pytest.mark.parametrize("n", [1000, 2000])
def test_structures_and_ranks_are_exact_in_the_full_lattice_with_unequal_noise(n, noise):
    """13 columns of 42 offered; loadings N(0, 0.25), noise variances 1, 0.3 and 3, standardised features: 20 draws."""
    exact = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        psi = np.repeat([1.0, 0.3, 3.0], LARGE.dims)
        rows = rng.standard_normal((n, 13)) @ (0.5 * masked_normal(rng, LARGE)).T
        rows = rows + np.sqrt(psi) * rng.standard_normal(rows.shape)
        views = [standardise(rows[:, r], rows[:, r]) for r in map(LARGE.rows, LARGE.modalities)]
        exact.append(select_structures(covariance_of(views), Hierarchy.full(LARGE.dims, 6), noise=noise).hierarchy == LARGE)
    assert_at_least(np.sum(exact), 18, "draws of 20 with all structures and ranks right")


@pytest.mark.slow
def test_tumours_whose_rows_are_permuted_share_nothing():
    """TCGA breast cancer: 347 tumours, 1,642 features of three kinds."""
    arrays = reference_arrays("tcga_brca5/tcga_brca5", "HCL_DATA")
    views = [standardise(view, view) for view in (np.asarray(arrays[name], float) for name in ("mrna", "meth", "mirna"))]
    S = covariance_of(views)
    start = time.perf_counter()
    found = select_structures(S, dims=[view.shape[1] for view in views])
    assert_at_most(time.perf_counter() - start, 60, "seconds, compilation included, of a selection that took over 15 minutes")
    assert found.hierarchy.rank("123") > 0
    null = permutation_null(views, found.hierarchy, permutations=20, key=jr.key(0))
    kept = sum(null.kept.values())
    assert_at_most((kept > 0).sum(), 2, "permutations of 20 in which a shared column is kept")


def many_views(seed):
    """(ten views of 50 features and 2,000 rows, twelve different structures of at most 4 of them): rank 2, loadings N(0, 4/50),
    noise variance 1, standardised."""
    rng = np.random.default_rng(seed)
    truth = {}
    while len(truth) < 12:
        truth[tuple(sorted(rng.choice(np.arange(1, 11), rng.integers(1, 5), replace=False).tolist()))] = 2
    hierarchy = Hierarchy((50,) * 10, truth)
    rows = rng.standard_normal((2000, 24)) @ (np.sqrt(4 / 50) * masked_normal(rng, hierarchy)).T
    rows = rows + rng.standard_normal(rows.shape)
    return [standardise(rows[:, r], rows[:, r]) for r in map(hierarchy.rows, hierarchy.modalities)], truth


def exact_structures(seed):
    """(how many of twelve have their rank, how many others are found, CPU seconds)."""
    views, truth = many_views(seed)
    start = time.process_time()
    found = dict(select_structures(covariance_of(views), dims=[50] * 10).hierarchy.ranks)
    seconds = time.process_time() - start
    return sum(found.get(s) == rank for s, rank in truth.items()), len(set(found) - set(truth)), seconds


@pytest.mark.slow
def test_twelve_structures_of_ten_views_are_found():
    """Five draws; CPU seconds, compilation included, bound what an idle machine needs."""
    exact, others, seconds = np.array([exact_structures(seed) for seed in range(5)]).T
    assert_at_least(exact.mean(), 10, "structures of 12 with their rank, mean of 5 draws")
    assert_at_most(others.mean(), 2, "structures that are not there, mean of 5 draws")
    assert_at_most(seconds.max(), 120, "CPU seconds of a draw")


FULL_SIZE = Hierarchy((60, 40, 80), RANKS)
NOISE_VARIANCES = {
    "view": lambda rng: np.repeat(NOISE_OF_VIEWS, FULL_SIZE.dims),
    "feature": lambda rng: rng.uniform(0.2, 3, FULL_SIZE.n_features),
}


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISE_VARIANCES)
def test_the_hierarchy_is_found_in_the_full_lattice_and_its_loadings_as_if_it_were_known(noise):
    """Twenty draws of n = 1,000: all seven structures of rank 3 offered, and hcl-ml told the true ones."""
    offered = Hierarchy.full(FULL_SIZE.dims, 3)
    exact, errors = [], {"hcl-vb": [], "hcl-ml": []}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        truth = normal_truth(rng, FULL_SIZE, NOISE_VARIANCES[noise](rng), noise)
        S = sample_wishart_covariance(jr.key(seed), truth, 1000)
        posterior, estimate = fit_posterior(S, offered, noise=noise)
        found = found_columns(evidence(posterior, S, offered), offered)
        exact.append({s: len(columns) for s, columns in found.items()} == RANKS)
        for name, fit in (("hcl-vb", estimate), ("hcl-ml", fitted_by("hcl-ml", noise=noise)(S, FULL_SIZE))):
            errors[name].append(relative(fit.loadings @ fit.loadings.T, truth.gram()))
    assert_at_least(np.mean(exact), 0.9, f"{noise}: share of draws in which the hierarchy is found")
    ratio = np.mean(errors["hcl-vb"]) / np.mean(errors["hcl-ml"])
    assert_at_most(ratio, 1.05, f"{noise}: mean Gram error of hcl-vb over that of hcl-ml told the hierarchy")
