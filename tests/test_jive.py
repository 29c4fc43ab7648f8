"""JIVE against r.jive's recorded fits, and what its definition promises."""

from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import CHAIN, assert_at_least, assert_at_most, assert_within, orthogonal, reference_arrays, relative

from hcl_jax import Hierarchy
from hcl_jax.baselines import jive
from hcl_jax.baselines.jive import JiveConfig
from hcl_jax.fitted import activity
from hcl_jax.linalg import least_squares_map

FIT = jax.jit(jive.fit, static_argnums=(1, 2))
KEY = jr.key(0)
SMALL = Hierarchy((9, 8, 7), {(1, 2, 3): 2, (1, 2): 1, (1,): 1, (2,): 1, (3,): 2})
TIGHT = JiveConfig(tolerance=1e-11)


def problem_of(stored):
    """(views, hierarchy with the given ranks)."""
    M = len(stored["rank_indiv"])
    views = [jnp.asarray(stored[f"x{m}"]) for m in range(1, M + 1)]
    ranks = {tuple(range(1, M + 1)): int(stored["rank_joint"])}
    ranks |= {(m,): int(r) for m, r in enumerate(stored["rank_indiv"], start=1)}
    return views, Hierarchy([view.shape[1] for view in views], ranks)


def entries(views):
    """Σ_k n p_k: the package's views have squared norm one over this."""
    return sum(view.size for view in views)


def parts_of(fitted):
    """(J, A) on the scale of views of norm one."""
    F, L = np.asarray(fitted.factors), np.asarray(fitted.loadings)
    joint = np.asarray(fitted.membership).sum(axis=0) > 1
    return F[:, joint] @ L[:, joint].T, F[:, ~joint] @ L[:, ~joint].T


def stored_parts(stored, variant):
    M = len(stored["rank_indiv"])
    J = stored[f"{variant}joint_u"] * stored[f"{variant}joint_d"] @ stored[f"{variant}joint_v"].T
    blocks = [tuple(stored[f"{variant}indiv{m}_{x}"] for x in "udv") for m in range(1, M + 1)]
    return J, np.concatenate([u * d @ v.T for u, d, v in blocks], axis=1)


def assert_agrees(fitted, stored, variant, views, parts, objective):
    root = np.sqrt(entries(views))
    for name, ours, theirs in zip("JA", parts_of(fitted), stored_parts(stored, variant), strict=True):
        assert_at_most(relative(ours, root * theirs), parts, f"{variant}: relative error of {name}")
    assert_at_most(
        abs(float(fitted.objective) / entries(views) / stored[f"{variant}objective_scaled"] - 1),
        objective,
        f"{variant}: relative difference of the objective",
    )


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_fit_is_that_of_r_jive_without_orthogonal_individual_scores(name):
    """1e-9: both stop at moves of 1e-12, on the way to one minimum, whichever the start."""
    stored = reference_arrays(f"rjive_{name}")
    views, hierarchy = problem_of(stored)
    fitted = FIT(views, hierarchy, JiveConfig(tolerance=1e-12), key=KEY)
    assert int(fitted.status) == 0
    assert_agrees(fitted, stored, "noorth_tight_", views, parts=1e-9, objective=1e-12)
    np.testing.assert_allclose(fitted.centre, np.concatenate([stored[f"center{m + 1}"] for m in range(len(views))]), atol=1e-13)
    ours = np.unique(np.asarray(fitted.scale))
    np.testing.assert_allclose(ours, np.unique(stored["scale"]) / np.sqrt(entries(views)), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "variant"), [("a", "tight_"), pytest.param("a", "noest_", marks=pytest.mark.slow), ("b", "noest_")]
)
def test_the_path_is_that_of_r_jive_from_its_start(name, variant):
    """With orthogonal individual scores the end depends on the path: same start, same number of steps, same parts.

    `tight_` of b is left out: there the package's −1 stands in coordinates whose signs its linear algebra library chose.
    """
    stored = reference_arrays(f"rjive_{name}")
    views, hierarchy = problem_of(stored)
    tolerance = 1e-12 if variant == "tight_" else 1e-6
    config = JiveConfig(orthogonal_individual=True, start="r.jive", tolerance=tolerance)
    fitted = FIT(views, hierarchy, config, key=KEY)
    assert int(fitted.steps) == int(stored[f"{variant}iterations"])
    assert_agrees(fitted, stored, variant, views, parts=1e-9, objective=1e-11)
    gram = np.asarray(fitted.factors.T @ fitted.factors)
    assert_at_most(np.abs(gram - np.eye(len(gram))).max(), 4e-7, "all scores orthonormal, as far as the package's are")


def test_the_start_decides_where_orthogonal_individual_scores_end():
    """r.jive's start of −1 is an accident of its code that moves its joint part by 45 %."""
    stored = reference_arrays("rjive_a")
    views, hierarchy = problem_of(stored)
    fitted = FIT(views, hierarchy, JiveConfig(orthogonal_individual=True, start="zero"), key=KEY)
    J = stored_parts(stored, "tight_")[0] * np.sqrt(entries(views))
    assert_within(relative(parts_of(fitted)[0], J), 0.45, 0.01, "relative difference of the joint parts")
    assert_within(float(fitted.objective) / entries(views), 4.942013e-5, 1e-10, "objective, as recorded beside the package's")


def test_scores_of_new_rows_are_those_of_r_jive():
    """5e-5: the package's alternation stops at relative changes of 1e-9 of the error, 2e-5 from its limit."""
    stored = reference_arrays("rjive_a")
    views, hierarchy = problem_of(stored)
    fitted = FIT(views, hierarchy, JiveConfig(orthogonal_individual=True, start="r.jive"), key=KEY)
    new = [stored[f"xnew{m}"] for m in (1, 2, 3)]
    scores = np.asarray(fitted.transform([jnp.asarray(view) for view in new]))
    reconstructed = scores @ np.asarray(fitted.loadings).T * np.asarray(fitted.scale) + np.asarray(fitted.centre)
    recorded = np.concatenate([stored[f"pred_recon{m}"] for m in (1, 2, 3)], axis=1)
    assert_at_most(relative(reconstructed, recorded), 5e-5, "relative error of the reconstruction")
    joint = scores[:, :2] @ np.asarray(fitted.loadings[:, :2]).T / np.sqrt(entries(views))
    assert_at_most(relative(joint, stored["pred_joint_scores"] @ stored["pred_joint_load"].T), 5e-5, "of the joint part")


@pytest.mark.parametrize("name", ["a", "b"])
def test_r_jive_predicts_least_squares_scores(name):
    """On the stored loadings, so that nothing but the map is compared."""
    stored = reference_arrays(f"rjive_{name}")
    M = len(stored["rank_indiv"])
    blocks = [stored[f"pred_indiv_load{m}"] for m in range(1, M + 1)]
    d, widths = len(stored["pred_joint_load"]), [block.shape[1] for block in blocks]
    loadings = np.zeros((d, sum(widths)))
    row = column = 0
    for block in blocks:
        loadings[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    score_map = least_squares_map(jnp.asarray(np.concatenate([stored["pred_joint_load"], loadings], axis=1)))
    rows = [(stored[f"xnew{m}"] - stored[f"center{m}"]) / stored["scale"][m - 1] for m in range(1, M + 1)]
    scores = np.concatenate(rows, axis=1) @ np.asarray(score_map)
    recorded = [stored["pred_joint_scores"], *(stored[f"pred_indiv_scores{m}"] for m in range(1, M + 1))]
    assert_at_most(relative(scores, np.concatenate(recorded, axis=1)), 3e-5, "relative error of the scores")


def ranks_of(fitted):
    M = fitted.membership.shape[0]
    found = activity(fitted)
    return found.get(tuple(range(1, M + 1)), 0), [found.get((m,), 0) for m in range(1, M + 1)]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", [pytest.param("a", marks=SLOW), "b"])
@pytest.mark.parametrize(("prefix", "orthogonal_individual"), [pytest.param("perm_", True, marks=SLOW), ("perm_noorth_", False)])
@pytest.mark.slow
def test_permutations_choose_the_ranks_of_r_jive(name, prefix, orthogonal_individual):
    """The draws differ, the choice is far enough from the thresholds. Partially shared factors inflate the joint rank of a."""
    stored = reference_arrays(f"rjive_{name}")
    views, hierarchy = problem_of(stored)
    start = "r.jive" if orthogonal_individual else "shared"
    config = JiveConfig("permutation", orthogonal_individual=orthogonal_individual, start=start)
    fitted = FIT(views, hierarchy, config, key=KEY)
    assert int(fitted.status) == 0
    assert ranks_of(fitted) == (int(stored[f"{prefix}rank_joint"]), stored[f"{prefix}rank_indiv"].tolist())
    if orthogonal_individual:  # at its own ranks, so a selection ends at the tolerance of a fit
        difference = abs(float(fitted.objective) / entries(views) / stored["perm_objective_scaled"] - 1)
        assert_at_most(difference, 1e-6, "relative difference of the objective")


@pytest.mark.parametrize("name", ["a", pytest.param("b", marks=SLOW)])
def test_bic_chooses_the_ranks_of_r_jive(name):
    stored = reference_arrays(f"rjive_{name}")
    views, hierarchy = problem_of(stored)
    fitted = FIT(views, hierarchy, JiveConfig("bic"), key=KEY)
    assert ranks_of(fitted) == (int(stored["bic_rank_joint"]), stored["bic_rank_indiv"].tolist())
    difference = abs(float(fitted.objective) / entries(views) / stored["bic_objective_scaled"] - 1)
    assert_at_most(difference, 1e-12, "relative difference of the objective")


# The definition


@cache
def small(n=60, hierarchy=SMALL, seed=0, noise=0.3):
    rng = np.random.default_rng(seed)
    loadings = np.where(hierarchy.mask, rng.standard_normal(hierarchy.mask.shape), 0)
    X = rng.standard_normal((n, hierarchy.n_factors)) @ loadings.T + noise * rng.standard_normal((n, hierarchy.n_features))
    return [jnp.asarray(X[:, hierarchy.rows(m)] + m) for m in hierarchy.modalities]


def standardised(fitted, views):
    X = np.concatenate([np.asarray(view) for view in views], axis=1)
    return (X - np.asarray(fitted.centre)) / np.asarray(fitted.scale)


def truncated(matrix, rank):
    u, d, v = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * d[:rank] @ v[:rank]


def test_joint_scores_are_orthogonal_to_individual_ones_and_errors_add_up():
    fitted = FIT(small(), SMALL, TIGHT, key=KEY)
    F, (J, A), Z = np.asarray(fitted.factors), parts_of(fitted), standardised(fitted, small())
    assert_at_most(np.abs(F[:, :2].T @ F[:, 2:]).max(), 1e-8, "inner products of joint and individual scores")
    for block in (slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)):
        np.testing.assert_allclose(F[:, block].T @ F[:, block], np.eye(2), atol=1e-12)
    for m in SMALL.modalities:
        rows = SMALL.rows(m)
        total = sum(np.sum(part[:, rows] ** 2) for part in (J, A, Z - J - A))
        assert_at_most(abs(np.sum(Z[:, rows] ** 2) - total), 1e-8, f"view {m}: what squares of the parts miss")
    assert_at_most(abs(float(fitted.objective) - np.sum((Z - J - A) ** 2)), 1e-12, "error of the objective")
    by_part = np.asarray(fitted.part(jnp.arange(8) < 2))
    np.testing.assert_allclose(by_part, J * np.asarray(fitted.scale), atol=1e-12)


def test_without_individual_parts_it_is_the_best_approximation_of_all_views():
    fitted = FIT(small(), SMALL, JiveConfig(individual_ranks=(0, 0, 0)), key=KEY)
    assert relative(parts_of(fitted)[0], truncated(standardised(fitted, small()), 2)) < 1e-12
    zero = FIT(small(), SMALL, JiveConfig(individual_ranks=(0, 0, 0), start="zero", max_steps=1), key=KEY)
    assert relative(parts_of(zero)[0], truncated(standardised(zero, small()), 2)) < 1e-12  # in one step


def test_without_a_joint_part_it_is_the_best_approximation_of_each_view():
    fitted = FIT(small(), SMALL, JiveConfig(joint_rank=0), key=KEY)
    Z = standardised(fitted, small())
    expected = [truncated(Z[:, SMALL.rows(m)], SMALL_RANKS[m]) for m in SMALL.modalities]
    assert relative(parts_of(fitted)[1], np.concatenate(expected, axis=1)) < 1e-12
    assert (~np.asarray(fitted.membership)[1:, :2]).all()


SMALL_RANKS = {1: 2, 2: 2, 3: 2}  # of all structures that contain the view, but for the joint one


@pytest.mark.slow
def test_more_steps_never_raise_the_objective():
    errors = [float(FIT(small(), SMALL, JiveConfig(max_steps=k, start="zero"), key=KEY).objective) for k in (1, 6)]
    assert (np.diff(errors) <= 1e-14).all()
    assert errors[0] > errors[-1] + 1e-4


def test_parts_do_not_depend_on_the_coordinates_of_features():
    rng = np.random.default_rng(1)
    turns = [orthogonal(rng, p) for p in SMALL.dims]
    fitted = FIT(small(), SMALL, TIGHT, key=KEY)
    turned = FIT([view @ jnp.asarray(turn) for view, turn in zip(small(), turns, strict=True)], SMALL, TIGHT, key=KEY)
    block = np.zeros((SMALL.n_features, SMALL.n_features))
    for m, turn in zip(SMALL.modalities, turns, strict=True):
        block[SMALL.rows(m), SMALL.rows(m)] = turn
    for ours, other in zip(parts_of(fitted), parts_of(turned), strict=True):
        assert_at_most(relative(ours @ block, other), 1e-8, "relative difference")


def test_fewer_rows_than_features_and_more_give_the_same_algorithm():
    """Rows of zeros added to centred data change nothing but whether n exceeds d."""
    views = [view[:20] - view[:20].mean(axis=0)[None, :] for view in small()]
    padded = [jnp.concatenate([view, jnp.zeros((40, view.shape[1]))]) for view in views]
    fitted, longer = (FIT(data, SMALL, TIGHT, key=KEY) for data in (views, padded))
    for ours, other in zip(parts_of(fitted), parts_of(longer), strict=True):
        assert_at_most(relative(other[:20], ours), 1e-8, "relative difference")


# Scores


def test_scores_of_training_rows_are_the_factors_and_rows_stand_alone():
    """1e-6: E is orthogonal to the joint loadings up to the last move, 1e-11, over the gap of the singular values."""
    views = small()
    fitted = FIT(views, SMALL, TIGHT, key=KEY)
    scores = np.asarray(fitted.transform(views))
    assert_at_most(relative(scores, fitted.factors), 1e-6, "relative difference of scores and factors")
    alone = [fitted.transform([view[i : i + 1] for view in views]) for i in range(3)]
    np.testing.assert_allclose(np.concatenate(alone), scores[:3], rtol=1e-12, atol=1e-14)


def test_orthogonal_individual_scores_lack_what_other_views_claim():
    """(scores − factors)LᵀL = EL: nothing in the joint columns, and in a view's own only directions of the others' scores."""
    views = small()
    fitted = FIT(views, SMALL, JiveConfig(tolerance=1e-11, orthogonal_individual=True), key=KEY)
    F, L = np.asarray(fitted.factors), np.asarray(fitted.loadings)
    np.testing.assert_allclose(F.T @ F, np.eye(8), atol=1e-7)
    lacking = (np.asarray(fitted.transform(views)) - F) @ (L.T @ L)
    assert_at_most(np.abs(lacking[:, :2]).max(), 1e-8, "of the joint scores")
    for m in range(3):
        own = slice(2 + 2 * m, 4 + 2 * m)
        others = np.delete(F[:, 2:], range(2 * m, 2 * m + 2), axis=1)
        assert_at_most(np.abs(lacking[:, own] - others @ (others.T @ lacking[:, own])).max(), 1e-8, "outside the others' span")
    assert_at_least(np.abs(lacking).max(), 1e-4, "what is lacking")


@pytest.mark.slow
def test_batched_fits_are_the_single_ones():
    """1e-8: batched products round otherwise, and fits stop at moves of 1e-11."""
    both = (small(), small(seed=5))
    stacked = [jnp.stack(pair) for pair in zip(*both, strict=True)]
    batch = jax.jit(jax.vmap(lambda views: jive.fit(views, SMALL, TIGHT, key=KEY)))(stacked)
    for i, views in enumerate(both):
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], batch), FIT(views, SMALL, TIGHT, key=KEY))


@pytest.mark.slow  # compiles every operation by itself
def test_the_plain_fit_is_the_compiled_one():
    assert_same(jive.fit(small(), SMALL, TIGHT, key=KEY), FIT(small(), SMALL, TIGHT, key=KEY))


def assert_same(fitted, other):
    for ours, theirs in zip(parts_of(fitted), parts_of(other), strict=True):
        assert_at_most(relative(ours, theirs), 1e-8, "relative difference of a part")
    assert_at_most(abs(float(fitted.objective - other.objective)), 1e-12, "difference of the objective")


@pytest.mark.slow
def test_selections_can_be_batched():
    """Ranks are traced: two data sets with different ranks in one program."""
    config = JiveConfig("permutation", n_permutations=40, level=0.01)
    batches = [jnp.stack([x, x[jr.permutation(jr.key(m + 10), len(x))]]) for m, x in enumerate(small(noise=0.1))]
    fitted = jax.jit(jax.vmap(lambda views: jive.fit(views, SMALL, config, key=KEY)))(batches)
    ranks = [ranks_of(jax.tree.map(lambda leaf, i=i: leaf[i], fitted)) for i in range(2)]
    assert ranks[0][0] >= 2  # shared by all, and by two
    assert ranks[1][0] == 0  # their samples do not belong together


@pytest.mark.parametrize("hierarchy", [Hierarchy((6, 5), {(1, 2): 2, (1,): 1}), CHAIN])
def test_two_and_four_modalities(hierarchy):
    views = small(n=40, hierarchy=hierarchy)
    fitted = FIT(views, hierarchy, JiveConfig(), key=KEY)
    everywhere = tuple(hierarchy.modalities)
    expected = {everywhere: hierarchy.rank(everywhere)}
    for m in hierarchy.modalities:
        expected[(m,)] = sum(rank for s, rank in hierarchy.ranks if m in s and s != everywhere)
    assert activity(fitted) == {s: rank for s, rank in expected.items() if rank}
    assert int(fitted.status) == 0
    held = np.repeat(np.asarray(fitted.membership), hierarchy.dims, axis=0)
    assert (np.asarray(fitted.loadings)[~held] == 0).all()


@pytest.mark.slow
def test_single_precision_stays_single():
    views = [view.astype(jnp.float32) for view in small()]
    fitted = FIT(views, SMALL, JiveConfig(), key=KEY)
    assert int(fitted.status) == 0
    floats = [leaf for leaf in jax.tree.leaves(fitted) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.dtype == jnp.float32 for leaf in floats)
    double = FIT(small(), SMALL, JiveConfig(), key=KEY)
    assert_at_most(relative(parts_of(fitted)[0], parts_of(double)[0]), 1e-2, "relative difference of the joint parts")


# The null distributions


@pytest.mark.parametrize("n", [40, 15])
def test_null_distributions_are_those_of_plain_permutations(n):
    """Means of 400 draws of both, within 5 standard errors of their difference; d = 24 is between the two n."""
    rng = np.random.default_rng(2)
    views = [np.asarray(view[:n] - view[:n].mean(axis=0)[None, :]) for view in small()]
    ours = np.asarray(jive.joint_null([jnp.asarray(v) for v in views], 3, 400, KEY))
    own = jive.individual_nulls([jnp.asarray(v) for v in views], (3, 2, 1), 400, jr.key(1))
    joint = [np.linalg.svd(np.concatenate([rng.permutation(v) for v in views], axis=1))[1][:3] for _ in range(400)]
    pairs = [(ours, joint)]
    for view, draws, k in zip(views, own, (3, 2, 1), strict=True):
        pairs.append((draws, [np.linalg.svd(rng.permuted(view, axis=0))[1][:k] for _ in range(400)]))
    for found, expected in pairs:
        found, expected = np.asarray(found, float), np.asarray(expected)
        error = np.sqrt((found.var(axis=0) + expected.var(axis=0)) / 400)
        assert_at_most((np.abs(found.mean(axis=0) - expected.mean(axis=0)) / error).max(), 5, "standard errors")
        assert_within((found.std(axis=0) / expected.std(axis=0))[0], 1, 0.25, "ratio of the spreads")  # its error is 5 %


def test_bic_counts_parameters():
    """One joint rank of n = 5 samples and 3 + 2 features: 5 + 5 parameters; one individual rank more: 3 + (5 − 1)."""
    errors = jnp.array([2.0, 3.0])
    fixed = 15 * np.log(2 / 15) + 10 * np.log(3 / 10)
    value = float(jive.bic(errors, jnp.array([1, 1, 0]), 5, (3, 2)))
    assert value == pytest.approx(fixed + (10 + 7) * np.log(25))


# Bad input


def test_features_without_variance_contribute_nothing():
    views = small()
    with_constants = [views[0].at[:, 0].set(3.0), views[1], jnp.full_like(views[2], 2.0)]
    fitted = FIT(with_constants, SMALL, JiveConfig(), key=KEY)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(fitted))
    L = np.asarray(fitted.loadings)
    assert np.abs(L[0]).max() < 1e-12
    assert np.abs(L[SMALL.rows(3)]).max() < 1e-12
    assert (3,) not in activity(fitted)
    assert int(fitted.status) == 0


def test_bad_data_are_refused():
    views = small()
    with pytest.raises(ValueError, match="NaN"):
        jive.fit([views[0].at[0, 0].set(jnp.nan), *views[1:]], SMALL, key=KEY)
    with pytest.raises(ValueError, match=r"view 2 has shape .*expected 60 rows"):
        jive.fit([views[0], views[1][:-1], views[2]], SMALL, key=KEY)
    with pytest.raises(ValueError, match=r"expected \(9, 8, 7\)"):
        jive.fit([views[1], views[0], views[2]], SMALL, key=KEY)
    with pytest.raises(ValueError, match=r"joint_rank: is 2; expected at most 1 for 2 rows"):
        jive.fit([view[:2] for view in views], SMALL, key=KEY)
    with pytest.raises(ValueError, match="1 rows; expected at least 2"):
        jive.fit([view[:1] for view in views], SMALL, key=KEY)
    with pytest.raises(ValueError, match=r"hierarchy: has 1 modality"):
        jive.fit(views[:1], Hierarchy((9,), {(1,): 2}), key=KEY)
    assert int(FIT([views[0].at[0, 0].set(jnp.nan), *views[1:]], SMALL, JiveConfig(), key=KEY).status) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": "aic"}, "ranks: is 'aic'; expected 'given'"),
        ({"start": "one"}, "start: is 'one'"),
        ({"joint_rank": -1}, "joint_rank: is -1"),
        ({"individual_ranks": (1, -2)}, "individual_ranks: are"),
        ({"tolerance": 0.0}, "tolerance: is 0.0"),
        ({"round_tolerance": -1.0}, "round_tolerance: is -1.0"),
        ({"level": 1.0}, "level: is 1.0"),
        ({"n_permutations": 0}, "n_permutations: is 0"),
        ({"max_steps": 0}, "max_steps: is 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        JiveConfig(**options)


def test_ranks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"individual_ranks: are \(1,\); expected 3"):
        jive.fit(small(), SMALL, JiveConfig(individual_ranks=(1,)), key=KEY)
    with pytest.raises(ValueError, match=r"individual_ranks: view 3 has rank 8; expected 0 to 7"):
        jive.fit(small(), SMALL, JiveConfig(individual_ranks=(1, 1, 8)), key=KEY)
