"""AJIVE against mvlearn's recorded fits, and what its definition promises."""

from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_at_most, assert_within, reference_arrays, relative
from scipy.linalg import subspace_angles

from hcl_jax import Hierarchy
from hcl_jax.baselines import ajive
from hcl_jax.baselines.ajive import AjiveConfig, null_draws, signal_of
from hcl_jax.fitted import activity

FIT = jax.jit(ajive.fit, static_argnums=(1, 2))
KEY = jr.key(0)
SMALL = Hierarchy((9, 8, 7), {(1, 2, 3): 2, (1, 2): 1, (1,): 1, (2,): 1, (3,): 2})
SELECTED = AjiveConfig("selected", n_draws=200)


@cache
def problem_of(name):
    """(stored, views, a hierarchy that only holds their dimensions)."""
    reference = reference_arrays(f"ajive_{name}")
    if name == "tcga":
        arrays = reference_arrays("tcga_brca5/tcga_brca5", "HCL_DATA")
        views = [jnp.asarray(arrays[key].astype(float)) for key in ("mrna", "meth", "mirna")]
    else:
        views = [jnp.asarray(reference[f"x{m}"]) for m in range(1, len(reference["init_signal_ranks"]) + 1)]
    everywhere = tuple(range(1, len(views) + 1))
    return reference, views, Hierarchy([view.shape[1] for view in views], {everywhere: 1})


def signal_ranks(stored):
    return tuple(int(t) for t in stored["init_signal_ranks"])


def centred(views):
    return [view - view.mean(axis=0)[None, :] for view in views]


def blocks(fitted):
    """(joint columns, individual columns of each view) that are used."""
    held = np.asarray(fitted.membership)
    joint = held.all(axis=0)
    return joint, [held[m] & ~joint for m in range(len(held))]


def ranks_of(fitted):
    joint, individual = blocks(fitted)
    return int(joint.sum()), [int(columns.sum()) for columns in individual]


ALL = ["a", *(pytest.param(name, marks=pytest.mark.slow) for name in ("b", "tcga"))]


@pytest.mark.parametrize("name", ALL)
def test_the_fit_is_that_of_mvlearn(name):
    """Ranks are those of its own draws; given these, nothing is left to chance, and what is left is rounding."""
    stored, views, hierarchy = problem_of(name)
    fitted = FIT(views, hierarchy, AjiveConfig("selected", signal_ranks=signal_ranks(stored)), key=KEY)
    assert int(fitted.status) == 0
    assert ranks_of(fitted) == (int(stored["joint_rank"]), stored["individual_ranks"].tolist())
    F, L = np.asarray(fitted.factors), np.asarray(fitted.loadings)
    joint, individual = blocks(fitted)
    C = stored["joint_scores"]
    assert_at_most(np.abs(F[:, joint] @ F[:, joint].T - C @ C.T).max(), 1e-11, "projection on the joint scores")
    edges = np.cumsum([0, *hierarchy.dims])
    for m, columns in enumerate(individual, start=1):
        rows = slice(edges[m - 1], edges[m])
        A = stored[f"indiv{m}_u"] * stored[f"indiv{m}_d"] @ stored[f"indiv{m}_v"].T
        assert_at_most(relative(F[:, columns] @ L[rows, columns].T, A), 1e-11, f"view {m}: individual part")
        assert_at_most(relative(F[:, joint] @ L[rows, joint].T, C @ stored[f"joint{m}_v"].T), 1e-11, f"view {m}: joint part")


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_given_joint_rank_is_taken_and_individual_ones_follow(name):
    stored, views, hierarchy = problem_of(name)
    joint_rank = int(stored["given_joint_rank_asked"])
    config = AjiveConfig("given_joint", signal_ranks=signal_ranks(stored), joint_rank=joint_rank)
    fitted = FIT(views, hierarchy, config, key=KEY)
    assert ranks_of(fitted) == (joint_rank, stored["given_individual_ranks"].tolist())
    C = np.asarray(fitted.factors)[:, blocks(fitted)[0]]
    assert_at_most(np.abs(C @ C.T - stored["given_joint_scores"] @ stored["given_joint_scores"].T).max(), 1e-11, "projection")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.slow
def test_thresholds_are_those_of_mvlearn(name):
    """The views' thresholds exactly. Draws of both programs: medians, and the percentiles that make the cutoffs.

    1,000 draws each: a percentile's standard error is about σ/√1000 · 2.1 at 5 and 95 % and · 1.25 in the middle, of normal
    draws; 5 of those of the difference are allowed.
    """
    stored, views, _ = problem_of(name)
    signals = [signal_of(Z, t) for Z, t in zip(centred(views), signal_ranks(stored), strict=True)]
    for signal, threshold in zip(signals, stored["sv_thresholds"], strict=True):
        assert_at_most(abs(float(signal.threshold) / threshold - 1), 1e-12, "relative error of a threshold")
    random, bounds = null_draws(signals, len(views[0]), 1000, jr.key(1))
    pairs = [(random, stored["random_sv_samples"]), *zip(np.asarray(bounds).T, stored["wedin_samples"], strict=True)]
    pairs.append((len(views) - np.sum(np.asarray(bounds) ** 2, axis=1), stored["wedin_sv_samples"]))
    for ours, theirs in pairs:
        error = np.sqrt(2 / 1000) * np.std(theirs)
        for q, factor in ((5, 2.1), (50, 1.25), (95, 2.1)):
            found = abs(np.percentile(np.asarray(ours), q) - np.percentile(theirs, q)) / (factor * error)
            assert_at_most(found, 5, f"percentile {q}: standard errors")


@pytest.mark.parametrize("name", ["a", "b"])
def test_singular_values_and_norms_of_candidates_are_those_of_mvlearn(name):
    stored, views, _ = problem_of(name)
    signals = [signal_of(Z, t) for Z, t in zip(centred(views), signal_ranks(stored), strict=True)]
    stacked = np.concatenate([np.asarray(signal.U) for signal in signals], axis=1)
    np.testing.assert_allclose(np.linalg.svd(stacked)[1][: stacked.shape[1]], stored["joint_singular_values"], atol=1e-12)
    width = min(signal_ranks(stored))
    C, squares, _ = ajive._common_directions(signals, width)
    np.testing.assert_allclose(np.sqrt(squares), stored["joint_singular_values"][:width], rtol=1e-12)
    norms = [np.linalg.norm(np.asarray(Z.T @ C), axis=0) for Z in centred(views)]
    np.testing.assert_allclose(norms, stored["candidate_norms"][:, :width], rtol=1e-10)


# Null draws against their plain definition


@pytest.mark.parametrize(("n", "dims"), [(30, (12, 40)), (12, (9, 20))])
@pytest.mark.slow
def test_null_draws_follow_their_definition(n, dims):
    """Random frames of full length by QR: p < n < q, and signals that nearly fill the space. Means of 600 draws each."""
    rng, t = np.random.default_rng(0), (3, 7)
    views = [rng.standard_normal((n, p)) for p in dims]
    views = [view - view.mean(axis=0) for view in views]
    signals = [signal_of(jnp.asarray(view), k) for view, k in zip(views, t, strict=True)]
    random, bounds = null_draws(signals, n, 600, KEY)

    def frame(size, k, without):
        Z = rng.standard_normal((size, k))
        return np.linalg.qr(Z - without @ (without.T @ Z))[0]

    def wedin(view, signal, k):
        U, W = np.asarray(signal.U), np.asarray(signal.W)
        right, left = frame(view.shape[1], min(k, view.shape[1] - k), W), frame(n, min(k, n - k), U)
        return min(1, max(np.linalg.norm(view @ right, 2), np.linalg.norm(view.T @ left, 2)) / float(signal.values[-1]))

    none = np.zeros((n, 0))
    plain = [np.linalg.norm(np.concatenate([frame(n, k, none) for k in t], axis=1), 2) ** 2 for _ in range(600)]
    pairs = [(np.asarray(random), np.array(plain))]
    for m, (view, signal, k) in enumerate(zip(views, signals, t, strict=True)):
        pairs.append((np.asarray(bounds[:, m]), np.array([wedin(view, signal, k) for _ in range(600)])))
    for ours, theirs in pairs:
        error = np.sqrt((ours.var() + theirs.var()) / 600)
        assert_at_most(abs(ours.mean() - theirs.mean()), 5 * error + 1e-12, "difference of the means")
        assert_at_most(ours.max(), 2 + 1e-12, "largest")


# The definition


def feng_toy(seed=0, n=100):
    """The two views of Feng et al. (2018), Figure 2: 100 and 500 features, one joint direction, one and two individual ones.

    View 1 is scaled by 5,000: the method is the same in any units. View 2's own parts: fifths of the samples on the first half of
    its features, shifted quarters on the second; the joint direction on the last fifth, with the opposite sign.
    """
    rng = np.random.default_rng(seed)
    half, quarters = np.repeat([1.0, -1], n // 2), np.repeat([-1.0, 1, -1, 1], n // 4)
    fifths = np.repeat([1.0, -1, 0, 1, -1], n // 5)
    x = np.zeros((n, 100))
    x[:, :50] += half[:, None]
    x += np.tile(quarters[:, None], 100)
    y = np.zeros((n, 500))
    y[:, -100:] -= half[:, None]
    y[:, :250] += fifths[:, None]
    y[:, 250:] += np.roll(quarters, n // 8)[:, None]
    return [jnp.asarray(5000 * (x + rng.standard_normal(x.shape))), jnp.asarray(y + rng.standard_normal(y.shape))], half


@pytest.mark.slow
def test_the_toy_of_the_paper_has_one_joint_direction():
    """t = (2, 3) gives one joint direction, and individual ranks of 1 and 2."""
    views, half = feng_toy()
    config = AjiveConfig("selected", signal_ranks=(2, 3), n_draws=200)
    fitted = FIT(views, Hierarchy((100, 500), {(1, 2): 1}), config, key=KEY)
    assert ranks_of(fitted) == (1, [1, 2])
    C = np.asarray(fitted.factors)[:, blocks(fitted)[0]].ravel()
    assert abs(C @ half) / np.linalg.norm(half) > 0.98


@cache
def small(n=60, hierarchy=SMALL, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    loadings = np.where(hierarchy.mask, rng.standard_normal(hierarchy.mask.shape), 0)
    X = rng.standard_normal((n, hierarchy.n_factors)) @ loadings.T + noise * rng.standard_normal((n, hierarchy.n_features))
    return [jnp.asarray(X[:, hierarchy.rows(m)] + m) for m in hierarchy.modalities]


@pytest.mark.slow
def test_equal_views_share_all_and_unrelated_ones_nothing():
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((200, 3)) @ rng.standard_normal((3, 12)) + 0.1 * rng.standard_normal((200, 12))
    pair = Hierarchy((12, 12), {(1, 2): 3})
    equal = FIT([jnp.asarray(signal)] * 2, pair, SELECTED, key=KEY)
    assert ranks_of(equal) == (3, [0, 0])
    unrelated = [jnp.asarray(rng.standard_normal((200, 12))) for _ in range(2)]
    assert ranks_of(FIT(unrelated, pair, SELECTED, key=KEY))[0] == 0


def test_squared_singular_values_of_two_views_are_one_plus_cosines():
    signals = [signal_of(Z, 3) for Z in centred(small()[:2])]
    _, squares, _ = ajive._common_directions(signals, 3)
    cosines = np.cos(subspace_angles(np.asarray(signals[0].U), np.asarray(signals[1].U)))
    np.testing.assert_allclose(np.asarray(squares), 1 + np.sort(cosines)[::-1], atol=1e-12)
    three = [signal_of(Z, 4) for Z in centred(small())]
    _, squares, _ = ajive._common_directions(three, 12)
    assert (np.asarray(squares) <= 3 + 1e-12).all()
    assert_within(np.asarray(squares).sum(), 12, 1e-10, "sum: the squared norm of the twelve columns")


def test_directions_that_a_view_hardly_has_are_dropped():
    """Both views agree on a direction, but the first has it with less variance than its noise."""
    rng = np.random.default_rng(3)
    z, own = rng.standard_normal((300, 2)), rng.standard_normal((300, 2))
    x1 = np.concatenate([5 * z[:, :1], 5 * own[:, :1], rng.standard_normal((300, 8))], axis=1)
    x2 = np.concatenate([5 * z[:, :1], 5 * own[:, 1:], rng.standard_normal((300, 8))], axis=1)
    views = [jnp.asarray(x) for x in (x1, x2)]
    signals = [signal_of(Z, 2) for Z in centred(views)]
    Z1 = np.asarray(centred(views)[0])
    weak = Z1 @ np.linalg.svd(Z1)[2][-1]  # its last principal component
    candidates = jnp.stack([jnp.asarray(z[:, 0] / np.linalg.norm(z[:, 0])), jnp.asarray(weak / np.linalg.norm(weak))], axis=1)
    held = ajive.identifiable(centred(views)[:1], signals[:1], candidates)
    assert np.asarray(held).tolist() == [True, False]
    both = ajive.identifiable(centred(views), signals, candidates)
    assert np.asarray(both).tolist() == [True, False]


def test_parts_are_orthogonal_and_scores_of_training_rows_are_the_factors():
    """The same linear map for all rows, exactly: no iteration, no shrinkage."""
    views = small()
    fitted = FIT(views, SMALL, AjiveConfig(), key=KEY)
    assert ranks_of(fitted) == (2, [2, 2, 2])
    F = np.asarray(fitted.factors)
    np.testing.assert_allclose(F[:, :2].T @ F[:, 2:], np.zeros((2, 6)), atol=1e-12)
    for block in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)):
        np.testing.assert_allclose(F[:, block].T @ F[:, block], np.eye(2), atol=1e-12)
    scores = np.asarray(fitted.transform(views))
    np.testing.assert_allclose(scores, F, atol=1e-12)
    alone = [fitted.transform([view[i : i + 1] for view in views]) for i in range(3)]
    np.testing.assert_allclose(np.concatenate(alone), scores[:3], rtol=1e-12, atol=1e-14)
    Z = np.concatenate([np.asarray(Z) for Z in centred(views)], axis=1)
    assert_within(float(fitted.objective), np.sum((Z - F @ np.asarray(fitted.loadings).T) ** 2), 1e-9, "objective")


@pytest.mark.slow
def test_units_of_a_view_do_not_matter():
    views = small()
    fitted = FIT(views, SMALL, SELECTED, key=KEY)
    scaled = FIT([1e3 * views[0], views[1], views[2]], SMALL, SELECTED, key=KEY)
    assert ranks_of(fitted) == ranks_of(scaled)
    joint = blocks(fitted)[0]
    C, D = np.asarray(fitted.factors)[:, joint], np.asarray(scaled.factors)[:, joint]
    np.testing.assert_allclose(C @ C.T, D @ D.T, atol=1e-11)


@pytest.mark.slow
def test_batched_fits_are_the_single_ones():
    """Ranks are traced: the second data set has other ones, in the same program."""
    second = [view[jr.permutation(jr.key(m), 60)] for m, view in enumerate(small())]
    batch = jax.jit(jax.vmap(lambda views: ajive.fit(views, SMALL, SELECTED, key=KEY)))(
        [jnp.stack(pair) for pair in zip(small(), second, strict=True)]
    )
    assert ranks_of(jax.tree.map(lambda leaf: leaf[0], batch)) != ranks_of(jax.tree.map(lambda leaf: leaf[1], batch))
    for i, views in enumerate((small(), second)):
        one = FIT(views, SMALL, SELECTED, key=KEY)
        other = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
        assert ranks_of(other) == ranks_of(one)
        np.testing.assert_allclose(other.factors @ other.loadings.T, one.factors @ one.loadings.T, atol=1e-10)


@pytest.mark.slow  # compiles every operation by itself
def test_the_plain_fit_is_the_compiled_one():
    one, other = (fit(small(), SMALL, SELECTED, key=KEY) for fit in (FIT, ajive.fit))
    assert ranks_of(other) == ranks_of(one)
    np.testing.assert_allclose(other.factors @ other.loadings.T, one.factors @ one.loadings.T, atol=1e-10)


@pytest.mark.parametrize(
    "hierarchy",
    [Hierarchy((6, 5), {(1, 2): 2, (1,): 1}), Hierarchy((5, 6, 5, 7), {(1, 2, 3, 4): 1, (1, 2): 1, (3, 4): 1, (2,): 2})],
)
def test_two_and_four_modalities(hierarchy):
    fitted = FIT(small(n=40, hierarchy=hierarchy), hierarchy, AjiveConfig(), key=KEY)
    everywhere = tuple(hierarchy.modalities)
    expected = {everywhere: hierarchy.rank(everywhere)}
    for m in hierarchy.modalities:
        expected[(m,)] = sum(rank for s, rank in hierarchy.ranks if m in s and s != everywhere)
    assert activity(fitted) == {s: rank for s, rank in expected.items() if rank}
    held = np.repeat(np.asarray(fitted.membership), hierarchy.dims, axis=0)
    assert (np.asarray(fitted.loadings)[~held] == 0).all()


@pytest.mark.slow
def test_single_precision_stays_single():
    views = [view.astype(jnp.float32) for view in small()]
    fitted = FIT(views, SMALL, SELECTED, key=KEY)
    floats = [leaf for leaf in jax.tree.leaves(fitted) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.dtype == jnp.float32 for leaf in floats)
    assert ranks_of(fitted) == ranks_of(FIT(small(), SMALL, SELECTED, key=KEY))


# Bad input


@pytest.mark.parametrize("config", [AjiveConfig(), SELECTED])
def test_features_without_variance_contribute_nothing(config):
    views = small()
    with_constants = [views[0].at[:, 0].set(3.0), views[1], jnp.full_like(views[2], 2.0)]
    fitted = FIT(with_constants, SMALL, config, key=KEY)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(fitted))
    L = np.asarray(fitted.loadings)
    assert np.abs(L[0]).max() < 1e-10
    assert np.abs(L[SMALL.rows(3)]).max() < 1e-10
    assert (3,) not in activity(fitted)


def test_bad_data_are_refused():
    views = small()
    with pytest.raises(ValueError, match="NaN"):
        ajive.fit([views[0].at[0, 0].set(jnp.nan), *views[1:]], SMALL, key=KEY)
    with pytest.raises(ValueError, match=r"view 2 has shape .*expected 60 rows"):
        ajive.fit([views[0], views[1][:-1], views[2]], SMALL, key=KEY)
    with pytest.raises(ValueError, match=r"signal_ranks: view 1 has rank 4; expected 1 to 3 for 4 rows"):
        ajive.fit([view[:4] for view in views], SMALL, key=KEY)
    with pytest.raises(ValueError, match=r"hierarchy: has 1 modality"):
        ajive.fit(views[:1], Hierarchy((9,), {(1,): 2}), key=KEY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": "scree"}, "ranks: is 'scree'; expected 'given'"),
        ({"signal_ranks": (0, 2)}, r"signal_ranks: are \(0, 2\); expected positive"),
        ({"joint_rank": -1}, "joint_rank: is -1"),
        ({"individual_ranks": (-1, 2)}, "individual_ranks: are"),
        ({"n_draws": 0}, "n_draws: is 0"),
        ({"wedin_percentile": 101.0}, "wedin_percentile: is 101"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AjiveConfig(**options)


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"signal_ranks: are \(2, 2\); expected 3"):
        ajive.fit(small(), SMALL, AjiveConfig(signal_ranks=(2, 2)), key=KEY)
    with pytest.raises(ValueError, match=r"individual_ranks: view 3 has rank 8; expected 0 to 7"):
        ajive.fit(small(), SMALL, AjiveConfig(individual_ranks=(1, 1, 8)), key=KEY)
    with pytest.raises(ValueError, match=r"joint_rank: is 13; expected at most 12"):
        ajive.fit(small(), SMALL, AjiveConfig(joint_rank=13), key=KEY)
