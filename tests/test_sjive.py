"""sJIVE: against the R package, limits in η, constraints, cross-validation."""

from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_at_least, assert_at_most, assert_within, numpy_loadings, reference_arrays, relative
from scipy.linalg import subspace_angles

from hcl_jax import Hierarchy
from hcl_jax.baselines.sjive import SjiveConfig, _Problem, fit
from hcl_jax.fitted import activity

SMALL = Hierarchy((9, 7), {(1, 2): 2, (1,): 1, (2,): 2})
THREE = Hierarchy((6, 5, 7), {(1, 2, 3): 1, (1, 2): 1, (3,): 1})
FOUR = Hierarchy((5, 4, 6, 5), {(1, 2, 3, 4): 1, (1,): 1, (2, 3): 1})
HALF, VIEWS_ONLY, RESPONSE = (SjiveConfig(eta=eta, max_steps=200) for eta in (0.5, 1 - 1e-6, 1e-4))


def views_of(reference, kind="x"):
    return [jnp.asarray(reference[f"{kind}{m}"]) for m in (1, 2, 3) if f"{kind}{m}" in reference]


@cache
def compiled(hierarchy, config):
    return jax.jit(lambda views, y, key: fit(views, hierarchy, config, y=y, key=key))


@cache
def refitted(name, eta):
    reference = reference_arrays(f"sjive_{name}")
    views = views_of(reference)
    ranks = {(m,): int(r) for m, r in enumerate(reference["rank_indiv"], start=1)}
    ranks[tuple(range(1, len(views) + 1))] = int(reference["rank_joint"])
    hierarchy = Hierarchy([x.shape[1] for x in views], ranks)
    config = SjiveConfig(eta=eta, max_steps=200)
    return compiled(hierarchy, config)(views, jnp.asarray(reference["y"]), jr.key(0)), hierarchy


def parts_of(reference, prefix, n_views):
    joint = np.concatenate([reference[f"{prefix}u{m}"] for m in range(1, n_views + 1)])
    yield reference[f"{prefix}scores_joint"] @ joint.T
    for m in range(1, n_views + 1):
        yield reference[f"{prefix}scores_indiv{m}"] @ reference[f"{prefix}w{m}"].T


def our_parts(found, hierarchy):
    edges = np.cumsum([0, *hierarchy.dims])
    columns = np.array([sum(column) for column in np.asarray(found.membership).T])
    F, L = np.asarray(found.factors), np.asarray(found.loadings)
    yield F[:, columns > 1] @ L[:, columns > 1].T
    for m, (a, b) in enumerate(pairwise(edges)):
        own = (columns == 1) & np.asarray(found.membership)[m]
        yield F[:, own] @ L[a:b, own].T


@pytest.mark.parametrize("name", ["a", "b"])
class TestAgainstTheRPackage:
    def test_the_tight_fit_agrees(self, name):
        """The package stops at a change of 1e-11 of the objective, ours at one of 1e-7 of the parts, both near the square root
        of what the objective can tell."""
        reference = reference_arrays(f"sjive_{name}")
        found, hierarchy = refitted(name, 0.5)
        assert int(found.status) == 0
        assert_within(float(found.objective), reference["tight_objective"], 1e-6, f"{name}: objective")
        parts = zip(our_parts(found, hierarchy), parts_of(reference, "tight_", hierarchy.n_modalities), strict=True)
        for block, (ours, theirs) in enumerate(parts):
            assert_at_most(relative(ours, theirs), 1e-5, f"{name}: difference of part {block}")
        y = np.asarray(found.factors @ found.coefficients + found.intercept)
        assert_at_most(np.abs(y - reference["tight_fitted_y"]).max(), 5e-5, f"{name}: fitted response")
        new = found.predict(views_of(reference, "xnew"))
        assert_at_most(np.abs(new - reference["tight_pred_y"]).max(), 1e-4, f"{name}: predicted response")

    def test_loadings_and_coefficients_agree_up_to_sign(self, name):
        reference = reference_arrays(f"sjive_{name}")
        found, hierarchy = refitted(name, 0.5)
        L, theta = np.asarray(found.loadings), np.asarray(found.coefficients) / reference["y_scale"]
        n_views = hierarchy.n_modalities
        both = np.concatenate([*(reference[f"tight_u{m}"] for m in range(1, n_views + 1)), reference["tight_theta1"][None]])
        r = both.shape[1]
        mine = np.concatenate([L[:, :r], theta[None, :r]])
        np.testing.assert_allclose(np.linalg.norm(mine, axis=0), 1, rtol=1e-12)
        cosines = np.abs((mine * both).sum(0))
        assert_at_most(np.abs(cosines - 1).max(), 1e-8, f"{name}: joint columns, 1 − |cosine|")

    @pytest.mark.parametrize(("prefix", "eta"), [("eta09_", 0.9), ("eta01_", 0.1)])
    def test_the_default_stop_of_the_package_is_above_our_objective(self, name, prefix, eta):
        """Its stop, a change of 1e-3 of an objective of thousands, leaves it up to 1 % above the objective that 200 of our
        sweeps reach (a at η = 0.1, where the response is fitted by almost anything)."""
        reference = reference_arrays(f"sjive_{name}")
        found, _ = refitted(name, eta)
        assert_at_most(float(found.objective), float(reference[f"{prefix}objective"]), f"{name}: objective, against theirs")
        below = 0.02 if (name, eta) == ("a", 0.1) else 1e-5
        assert_at_least(float(found.objective), float(reference[f"{prefix}objective"]) * (1 - below), f"{name}: objective")


def draw(hierarchy, n=60, noise=0.5, seed=0):
    """Views and response of exactly uncorrelated unit scores."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((n, hierarchy.n_factors))
    scores = np.linalg.qr(scores - scores.mean(0))[0] * np.sqrt(n)
    X = scores @ numpy_loadings(rng, hierarchy).T + noise * rng.standard_normal((n, hierarchy.n_features))
    beta = rng.standard_normal(hierarchy.n_factors)
    y = scores @ beta + noise * rng.standard_normal(n) + 3
    return [jnp.asarray(X[:, hierarchy.rows(m)] + m) for m in hierarchy.modalities], jnp.asarray(y)


def standardised(views, y):
    columns = np.concatenate([*(np.asarray(x) for x in views), np.asarray(y)[:, None]], axis=1)
    return (columns - columns.mean(0)) / columns.std(0, ddof=1)


@pytest.mark.parametrize("hierarchy", [SMALL, THREE, FOUR])
class TestConstraintsAndObjective:
    def test_joint_and_individual_scores_are_orthogonal(self, hierarchy):
        views, y = draw(hierarchy)
        found = compiled(hierarchy, HALF)(views, y, jr.key(0))
        r = hierarchy.rank(tuple(hierarchy.modalities))
        F = np.asarray(found.factors)
        sizes = np.linalg.norm(F, axis=0)
        assert_at_most(np.abs((F / sizes)[:, :r].T @ (F / sizes)[:, r:]).max(), 1e-12, "cosine of joint and individual scores")

    def test_the_objective_is_what_it_says(self, hierarchy):
        views, y = draw(hierarchy)
        found = compiled(hierarchy, HALF)(views, y, jr.key(0))
        columns = standardised(views, y)
        F, theta = np.asarray(found.factors), np.asarray(found.coefficients) / np.asarray(y).std(ddof=1)
        views_left = ((columns[:, :-1] - F @ np.asarray(found.loadings).T) ** 2).sum()
        response_left = ((columns[:, -1] - F @ theta) ** 2).sum()
        assert_at_most(abs((views_left + response_left) / 2 / float(found.objective) - 1), 1e-9, "objective recomputed")


@pytest.mark.parametrize("guard", [0, 2])
def test_plain_sweeps_never_raise_the_objective(guard):
    """Nor where singular vectors are improved from the last ones: of the larger views, without a guard."""
    wide = Hierarchy((20, 15, 25), {(1, 2, 3): 1, (1, 2): 1, (3,): 1})
    views, y = draw(wide, noise=1.0)
    core = jnp.asarray(standardised(views, y)) / np.sqrt(2)
    ranks = (1, 1, 1, 1)
    problem = _Problem(core, wide.dims, ranks, jnp.asarray(ranks, jnp.int32))
    sweep = jax.jit(problem.sweep)
    parts, values = jnp.zeros((60, sum(wide.dims) + 3)), []
    tracked = tuple(jnp.eye(60, 1 + guard) for _ in ranks)
    for _ in range(15):
        parts, tracked, _, value = sweep(parts, tracked)
        values.append(float(value))
    assert (np.diff(values) <= 1e-12 * values[0]).all()
    assert values[-1] < values[0]


def plain_jive(Z, dims, r, individual, sweeps=3000):
    """The alternation of Lock et al. written out in NumPy."""
    edges = np.cumsum([0, *dims])
    A = np.zeros_like(Z)
    for _ in range(sweeps):
        V = np.linalg.svd(Z - A)[0][:, :r]
        left = Z - V @ (V.T @ Z)
        for (a, b), k in zip(pairwise(edges), individual, strict=True):
            U, s, Wt = np.linalg.svd(left[:, a:b], full_matrices=False)
            A[:, a:b] = U[:, :k] * s[:k] @ Wt[:k]
    return V, A


def test_without_weight_on_the_response_it_is_jive():
    views, y = draw(SMALL)
    V, A = plain_jive(standardised(views, y)[:, :-1], SMALL.dims, 2, (1, 2), sweeps=300)
    found = compiled(SMALL, VIEWS_ONLY)(views, y, jr.key(0))
    F = np.asarray(found.factors)
    assert_at_most(subspace_angles(F[:, :2], V).max(), 1e-3, "angle of the joint scores and JIVE's")
    assert_at_most(relative(F[:, 2:] @ np.asarray(found.loadings)[:, 2:].T, A), 1e-3, "individual parts against JIVE's")


def test_almost_all_weight_on_the_response_fits_it():
    views, y = draw(SMALL, noise=2.0)
    residuals = {}
    for config in (RESPONSE, HALF):
        found = compiled(SMALL, config)(views, y, jr.key(0))
        left = np.asarray(found.factors @ found.coefficients + found.intercept) - np.asarray(y)
        residuals[config.eta] = float((left**2).mean() / np.asarray(y).var())
    assert_at_most(residuals[1e-4], 1e-3, "1 − R² of the training response at η = 0.0001")
    assert_at_least(residuals[0.5], 0.01, "1 − R² at η = 0.5")


class TestScores:
    def test_without_noise_transform_gives_the_factors_and_predict_the_response(self):
        views, y = draw(SMALL, noise=0.0)
        found = compiled(SMALL, HALF)(views, y, jr.key(0))
        assert_at_most(relative(found.transform(views), found.factors), 1e-6, "transform of noise-free training rows")
        assert_at_most(np.abs(found.predict(views) - y).max(), 1e-6, "error of the noise-free response")
        assert activity(found) == dict(SMALL.ranks)

    def test_transform_is_least_squares_and_leaves_the_factors_the_less_the_larger_eta(self):
        views, y = draw(SMALL, noise=1.0)
        Z, apart = standardised(views, y)[:, :-1], []
        for config in (RESPONSE, HALF, VIEWS_ONLY):
            found = compiled(SMALL, config)(views, y, jr.key(0))
            scores, L = np.asarray(found.transform(views)), np.asarray(found.loadings)
            assert_at_most(np.abs((Z - scores @ L.T) @ L).max(), 1e-10, "residual along the loadings")
            apart.append(relative(scores, found.factors))
        assert apart[0] > apart[1] > apart[2]
        assert_at_most(apart[2], 1e-3, "transform against factors where the response has no weight")

    def test_one_row_at_a_time_and_all_at_once_agree(self):
        views, y = draw(SMALL)
        found = compiled(SMALL, HALF)(views, y, jr.key(0))
        for function in (found.transform, found.predict):
            rows = jnp.concatenate([function([x[i : i + 1] for x in views]) for i in range(5)])
            np.testing.assert_allclose(rows, function([x[:5] for x in views]), rtol=1e-12, atol=1e-12)

    @pytest.mark.slow
    def test_more_features_than_rows(self):
        """Without the QR decomposition: the same rows three times over, which do use it, give the same regression."""
        wide = Hierarchy((20, 15), {(1, 2): 1, (1,): 1, (2,): 1})
        views, y = draw(wide, n=20)
        thrice = [jnp.concatenate([x] * 3) for x in views], jnp.concatenate([y] * 3)
        regressions = []
        for rows in ((views, y), thrice):
            found = compiled(wide, HALF)(*rows, jr.key(0))
            assert int(found.status) == 0
            regressions.append(found.score_map @ found.coefficients / found.scale)
        assert_at_most(relative(*regressions), 1e-5, "regression of 20 rows and of the same rows three times")

    def test_constant_columns_contribute_nothing(self):
        views, y = draw(SMALL)
        views[0] = views[0].at[:, 3].set(2.0)
        views[1] = jnp.full_like(views[1], 0.1)
        found = compiled(SMALL, HALF)(views, y, jr.key(0))
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(found) if leaf.dtype.kind == "f")
        np.testing.assert_allclose(found.loadings[3], 0, atol=1e-12)
        np.testing.assert_allclose(found.loadings[9:], 0, atol=1e-12)


CHOSEN = SjiveConfig(etas=(1e-4, 0.5, 1 - 1e-6), folds=3, path_max_steps=200, path_tolerance=1e-6, max_steps=200)


class TestSelection:
    @pytest.mark.slow
    def test_eta_of_least_error_is_taken(self):
        """The folds made here from the same permutation, every fit one of its own on the training rows."""
        views, y = draw(SMALL, n=90, noise=1.0)
        fold = np.empty(90, int)
        fold[np.asarray(jr.permutation(jr.key(0), 90))] = np.arange(90) % 3
        errors = []
        for config in (RESPONSE, HALF, VIEWS_ONLY):
            left = np.empty(90)
            for held in (fold == f for f in range(3)):
                found = compiled(SMALL, config)([x[~held] for x in views], y[~held], jr.key(0))
                left[held] = y[held] - found.predict([x[held] for x in views])
            errors.append((left**2).mean())
        best = (RESPONSE, HALF, VIEWS_ONLY)[int(np.argmin(errors))]
        chosen = compiled(SMALL, CHOSEN)(views, y, jr.key(0))
        expected = compiled(SMALL, best)(views, y, jr.key(0))
        assert float(chosen.objective) == pytest.approx(float(expected.objective), rel=1e-9)

    @pytest.mark.slow
    def test_forward_selection_finds_what_the_response_needs(self):
        """The response is one joint factor: one joint component is chosen, and at most as much again."""
        rng = np.random.default_rng(1)
        views, _ = draw(SMALL, n=90, noise=0.3)
        hierarchy = Hierarchy(SMALL.dims, {(1, 2): 2, (1,): 2, (2,): 2})
        scores = np.linalg.svd(standardised(views, np.arange(90.0))[:, :-1])[0][:, 0]
        y = jnp.asarray(scores * 10 + 0.1 * rng.standard_normal(90))
        found = compiled(hierarchy, SjiveConfig(eta=0.5, ranks="forward", folds=3))(views, y, jr.key(0))
        table = activity(found)
        assert table.get((1, 2), 0) >= 1
        assert sum(table.values()) <= 2
        noise = jnp.asarray(rng.standard_normal(90))
        nothing = compiled(hierarchy, SjiveConfig(eta=0.5, ranks="forward", folds=3))(views, noise, jr.key(0))
        assert sum(activity(nothing).values()) <= 1

    def test_ranks_may_be_traced(self):
        views, y = draw(SMALL)
        room = SjiveConfig(eta=0.5, joint_rank=3, individual_ranks=(3, 3))
        run = jax.jit(lambda views, y, ranks: fit(views, SMALL, room, y=y, ranks=ranks))
        found, exact = run(views, y, jnp.array([2, 1, 2])), compiled(SMALL, HALF)(views, y, jr.key(0))
        assert activity(found) == dict(SMALL.ranks)
        assert_at_most(abs(float(found.objective) / float(exact.objective) - 1), 1e-9, "objective in wider arrays")
        np.testing.assert_allclose(found.predict(views), exact.predict(views), atol=1e-5)

    @pytest.mark.parametrize("config", [HALF, pytest.param(CHOSEN, marks=pytest.mark.slow)])
    def test_vmap_changes_nothing(self, config):
        """Up to the stop, a change of 1e-7."""
        draws = [draw(SMALL, seed=seed) for seed in (0, 1)]
        keys = jr.split(jr.key(3), 2)
        singles = [compiled(SMALL, config)(*pair, key) for pair, key in zip(draws, keys, strict=True)]
        views = [jnp.stack(pair) for pair in zip(*(d[0] for d in draws), strict=True)]
        run = jax.jit(jax.vmap(lambda views, y, key: fit(views, SMALL, config, y=y, key=key)))
        both = run(views, jnp.stack([d[1] for d in draws]), keys)
        for i, single in enumerate(singles):
            signal = single.factors @ single.loadings.T
            assert_at_most(relative(both.factors[i] @ both.loadings[i].T, signal), 1e-5, "vmap against one by one")

    @pytest.mark.slow  # compiles every operation by itself
    def test_jit_changes_nothing(self):
        views, y = draw(SMALL)
        plain, once = fit(views, SMALL, HALF, y=y), compiled(SMALL, HALF)(views, y, jr.key(0))
        assert_at_most(relative(plain.factors @ plain.loadings.T, once.factors @ once.loadings.T), 1e-5, "plain against jit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 1.0}, "eta"),
        ({"etas": ()}, "etas"),
        ({"folds": 1}, "folds"),
        ({"ranks": "bic"}, "ranks"),
        ({"start": "zero"}, "start"),
        ({"improvement": -0.1}, "improvement"),
        ({"joint_rank": -1}, "joint_rank"),
        ({"individual_ranks": (1, -1)}, "individual_ranks"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_steps": 0}, "max_steps"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SjiveConfig(**options)


def test_bad_input_is_refused():
    views, y = draw(SMALL, n=20)
    with pytest.raises(ValueError, match="y: is None"):
        fit(views, SMALL, HALF)
    with pytest.raises(ValueError, match="y: has shape"):
        fit(views, SMALL, HALF, y=y[:10])
    with pytest.raises(ValueError, match="key"):
        fit(views, SMALL, y=y)
    with pytest.raises(ValueError, match="view 2"):
        fit([views[0], views[1][:10]], SMALL, HALF, y=y)
    with pytest.raises(ValueError, match="NaN"):
        fit(views, SMALL, HALF, y=y.at[0].set(jnp.nan))
    with pytest.raises(ValueError, match="rows"):
        fit([x[:9] for x in views], SMALL, y=y[:9], key=jr.key(0))
    with pytest.raises(ValueError, match="individual_ranks: are"):
        fit(views, SMALL, SjiveConfig(eta=0.5, individual_ranks=(1, 1, 1)), y=y)
    with pytest.raises(ValueError, match="view 2 has rank 8"):
        fit(views, SMALL, SjiveConfig(eta=0.5, individual_ranks=(1, 8)), y=y)
    with pytest.raises(ValueError, match="modality"):
        fit(views[:1], Hierarchy((9,), {(1,): 1}), HALF, y=y)
