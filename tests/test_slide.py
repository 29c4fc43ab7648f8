"""SLIDE: the stored fits of the authors' package, its identities, and what the package's own defects amount to."""

from functools import cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_at_least, assert_at_most, assert_close, orthogonal, reference_arrays, relative

from hcl_jax import Hierarchy
from hcl_jax.baselines import slide
from hcl_jax.baselines.slide import SlideConfig
from hcl_jax.fitted import activity, column_structures, variance_explained

THREE = Hierarchy((7, 6, 8), {(1, 2, 3): 2, (1, 2): 1, (2, 3): 1, (1,): 1, (3,): 2})
PAIR = Hierarchy((6, 7), {(1,): 2, (2,): 2})
FOUR = Hierarchy((4, 5, 4, 6), {(1, 2): 1, (2, 3): 1, (1, 2, 3, 4): 1, (4,): 2})
KEY = jr.key(0)

compiled = jax.jit(slide.fit, static_argnames=("hierarchy", "config"))


def stored_views(stored):
    return [jnp.asarray(stored[f"x{m}"]) for m in (1, 2, 3) if f"x{m}" in stored]


def stored_hierarchy(stored):
    dims = [view.shape[1] for view in stored_views(stored)]
    ranks = {}
    for name in stored["column_structure"]:
        structure = tuple(int(m) for m in name)
        ranks[structure] = ranks.get(structure, 0) + 1
    return Hierarchy(dims, ranks)


def draw(hierarchy, n=60, seed=0, noise=0.5):
    """Views of the model, with means."""
    rng = np.random.default_rng(seed)
    W = np.where(hierarchy.mask, rng.standard_normal(hierarchy.mask.shape), 0)
    X = 3 + rng.standard_normal((n, hierarchy.n_factors)) @ W.T + noise * rng.standard_normal((n, hierarchy.n_features))
    return [jnp.asarray(X[:, hierarchy.rows(m)]) for m in hierarchy.modalities]


def standardised(views):
    centred = [np.asarray(view) - np.asarray(view).mean(axis=0) for view in views]
    return np.hstack([view / np.linalg.norm(view) for view in centred])


def numpy_polar(B):
    left, _, right = np.linalg.svd(B, full_matrices=False)
    return left @ right


def numpy_given(Z, mask, change, max_steps=20000):
    """The package's loop: plain steps until ‖Δ(UVᵀ)‖² falls below `change`; all objectives on the way."""
    U = np.linalg.svd(Z, full_matrices=False)[0][:, : mask.shape[1]]
    V, objectives = np.where(mask, Z.T @ U, 0), []
    for _ in range(max_steps):
        last = U @ V.T
        U = numpy_polar(Z @ V)
        V = np.where(mask, Z.T @ U, 0)
        objectives.append(np.sum((Z - U @ V.T) ** 2))
        if np.sum((U @ V.T - last) ** 2) < change:
            break
    return U, V, objectives


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_fit_at_the_true_structure_agrees(name):
    """Tolerance: both stop at a relative change of 1e-8 to 1e-11 of a slowly converging iteration, and the error of the
    product is some hundred times the last change; the objective's is its square."""
    stored = reference_arrays(f"slide_{name}")
    hierarchy = stored_hierarchy(stored)
    fitted = compiled(stored_views(stored), hierarchy, key=KEY)
    assert fitted.status == 0
    ours = fitted.factors @ fitted.loadings.T
    assert_at_most(relative(ours, stored["tight_u"] @ stored["tight_v"].T), 1e-6, f"{name}: relative error of UVᵀ")
    gap = abs(float(fitted.objective / stored["tight_objective"]) - 1)
    assert_at_most(gap, 1e-12, f"{name}: relative error of the objective")
    assert_at_most(np.abs(fitted.centre - stored["center"]).max(), 1e-12, f"{name}: error of the means")
    norms = np.repeat(np.sqrt(stored["norms_squared"]), hierarchy.dims)
    assert_at_most(relative(fitted.scale, norms), 1e-12, f"{name}: relative error of the scale")
    # the package's default stop is what is loose: its own two fits are further apart than ours is from the tight one
    assert_at_least(relative(stored["u"] @ stored["v"].T, stored["tight_u"] @ stored["tight_v"].T), 1e-2, "default stop")


@cache
def path_of(name):
    """The path of a stored data set by plain steps, and its structures: (Z, path, list)."""
    views = stored_views(reference_arrays(f"slide_{name}"))
    n, dims = views[0].shape[0], tuple(view.shape[1] for view in views)
    config = SlideConfig(width=min(n - 1, sum(dims)) if name == "b" else 60, accelerate=False)

    @jax.jit
    def run(Z):
        path = slide.penalised_path(Z, dims, config)
        return path, *slide.distinct_structures(path, n, dims, config)

    Z = jnp.asarray(standardised(views))
    path, structures, count = run(Z)
    return Z, path, [np.asarray(S)[:, np.asarray(S).any(axis=0)] for S in structures[: int(count)]]


def stored_structures(stored):
    counts = stored["structure_list_ncol"].astype(int)
    return [S[:, :columns] > 0 for S, columns in zip(stored["structure_list"], counts, strict=True)]


def test_the_path_agrees():
    """b, with as many columns as the package. A penalty is done when a step lowers the objective by less than 1e-6, and the
    error left is a few times that."""
    stored = reference_arrays("slide_b")
    _, path, ours = path_of("b")
    theirs = stored_structures(stored)
    assert_at_most(relative(path.penalties, stored["path_lambda"]), 1e-12, "relative error of the penalties")
    assert not np.asarray(path.norms[0]).any(), "nothing is left at the largest penalty"
    worst = np.abs(np.asarray(path.objective) - stored["path_objective"]).max()
    assert_at_most(worst, 5e-6, "largest difference of a path objective")
    assert len(ours) == len(theirs)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.slow
def test_a_narrower_path_finds_the_same_structures():
    """a, from 60 columns in place of 149: every structure of the package's list of up to 17 columns is on it. Objectives are
    those of local minima, of which the way down from more columns may find another: the largest gap is 3e-5 of about 0.4."""
    stored = reference_arrays("slide_a")
    _, path, ours = path_of("a")

    def sorted_columns(S):
        return sorted(map(tuple, S.T.tolist()))

    found = [sorted_columns(S) for S in ours]
    for S in stored_structures(stored):
        if S.shape[1] <= 17:
            assert sorted_columns(S) in found
    worst = np.abs(np.asarray(path.objective) - stored["path_objective"])[:17].max()
    assert_at_most(worst, 2e-4, "largest difference of a path objective, up to 17 columns")


def test_scores_on_the_path_belong_to_their_own_penalty():
    """The package returns with each V the scores of the next penalty; ours give the objective with their own V, and the stored
    ones, recomputed with copies, do so too."""
    stored = reference_arrays("slide_b")
    Z, path, _ = path_of("b")

    def objective(U, V, penalty):
        norms = np.linalg.norm(V[:100], axis=0).sum() + np.linalg.norm(V[100:], axis=0).sum()
        return np.sum(V**2) / 2 - np.trace(V.T @ np.asarray(Z).T @ U) + penalty * norms

    at = 24
    V, penalty = np.asarray(path.loadings[at]), float(path.penalties[at])
    found = objective(np.asarray(slide.scores_of(Z, path.loadings[at])), V, penalty)
    assert_at_most(abs(found - float(path.objective[at])), 1e-12, "difference from the path's own objective")
    theirs = objective(stored["path_at24_u"], stored["path_at24_v"], penalty)
    assert_at_most(abs(theirs - stored["path_objective"][at]), 1e-12, "difference of the stored objective from the stored U, V")
    assert_at_most(abs(found - theirs), 5e-6, "difference from the package's objective, up to its stopping rule")
    wrong = objective(np.asarray(slide.scores_of(Z, path.loadings[at + 1])), V, penalty)
    assert_at_least(wrong - found, 1e-4, "what the scores of the next smaller penalty cost")


def numpy_block_error(stored, membership, row_fold, column_fold, change):
    """One block of the bi-cross-validation as the package does it, written out with explicit sub-matrices."""
    views = [np.asarray(view) for view in stored_views(stored)]
    out = stored["bcv_fold_rows"] == row_fold
    edges = np.cumsum([0, *(view.shape[1] for view in views)])
    hidden = [stored["bcv_fold_cols"][a:b] == column_fold for a, b in zip(edges[:-1], edges[1:], strict=True)]
    views = [(view - view.mean(axis=0)) / np.linalg.norm(view - view.mean(axis=0)) for view in views]
    seen = [view[~out][:, ~h] for view, h in zip(views, hidden, strict=True)]
    means = [view.mean(axis=0) for view in seen]
    centred = [view - mean for view, mean in zip(seen, means, strict=True)]
    norms = [np.linalg.norm(view) for view in centred]
    Z = np.hstack([view / norm for view, norm in zip(centred, norms, strict=True)])
    sizes = [view.shape[1] for view in seen]
    U, V, _ = numpy_given(Z, np.repeat(membership, sizes, axis=0) > 0, change)
    root = np.sqrt((~out).sum())
    V = np.column_stack([root * np.concatenate(means), V * np.repeat(norms, sizes)[:, None]])
    U = np.column_stack([np.full((~out).sum(), 1 / root), U])
    scores = np.hstack([view[out][:, ~h] for view, h in zip(views, hidden, strict=True)]) @ np.linalg.pinv(V.T)
    error = 0.0
    for view, h in zip(views, hidden, strict=True):
        target = view[out][:, h]
        predicted = scores @ (view[~out][:, h].T @ U).T
        error += np.sum((target - predicted) ** 2) / np.sum((target - target.mean(axis=0)) ** 2)
    return error


@pytest.mark.parametrize("name", [pytest.param("a", marks=pytest.mark.slow), "b"])
def test_bi_cross_validation_agrees_at_the_stored_folds(name):
    """The package's fits stop at ‖Δ(UVᵀ)‖² < 1e-6, which moves a block's error by some thousandths: with that stop a block
    written out in NumPy gives the stored error to rounding, run to its limit it gives ours."""
    stored = reference_arrays(f"slide_{name}")
    views = stored_views(stored)
    chosen = int(stored["bcv_selected_index"])
    indices = np.array([max(chosen - 2, 0), chosen - 1, chosen, chosen + 1])
    widest = int(stored["structure_list_ncol"][indices].max())
    structures = jnp.asarray(stored["structure_list"][indices][:, :, :widest] > 0)
    folds = [jnp.asarray(stored[f"bcv_fold_{side}"].astype(int) - 1) for side in ("rows", "cols")]
    config = SlideConfig(ranks="bcv", fold_tolerance=1e-9, max_steps=20000)
    dims = tuple(view.shape[1] for view in views)

    @jax.jit
    def run(Z):
        return slide.bi_cross_validation(Z, dims, structures, len(indices), *folds, config)

    errors = np.asarray(run(jnp.asarray(standardised(views))))
    recorded = stored["bcv_error"][:, indices]
    assert errors.sum(axis=0).argmin() == recorded.sum(axis=0).argmin() == 2
    assert_at_most(relative(errors, recorded), 5e-3, f"{name}: relative difference from the stored errors")
    membership = stored["structure_list"][chosen][:, : int(stored["structure_list_ncol"][chosen])]
    loose, tight = (numpy_block_error(stored, membership, 1, 2, change) for change in (1e-6, 1e-20))
    assert_at_most(abs(loose / recorded[1, 2] - 1), 1e-9, f"{name}: a block's error, stopped as the package does")
    assert_at_most(abs(tight / errors[1, 2] - 1), 1e-6, f"{name}: a block's error at the limit")


def test_a_structure_shared_by_all_is_the_singular_value_decomposition():
    hierarchy = Hierarchy((7, 6, 8), {(1, 2, 3): 4})
    views = draw(THREE)
    fitted = compiled(views, hierarchy, key=KEY)
    left, values, right = np.linalg.svd(standardised(views), full_matrices=False)
    assert_close(fitted.factors @ fitted.loadings.T, (left[:, :4] * values[:4]) @ right[:4], "decomposition of rank 4")
    assert_close(fitted.transform(views), fitted.factors, "least-squares scores of the training rows")
    assert_close(jnp.linalg.norm(fitted.loadings, axis=0), values[:4], "columns in order, their lengths the singular values")


@pytest.mark.parametrize("accelerate", [True, False])
def test_the_fit_is_the_fixed_point_of_plain_steps_which_lower_the_objective(accelerate):
    """To 1e-6: the last change is 1e-8, and the error of a slow iteration a multiple of that."""
    views = draw(THREE, noise=1.0)
    Z = standardised(views)
    fitted = compiled(views, THREE, SlideConfig(accelerate=accelerate), key=KEY)
    U, V, objectives = numpy_given(Z, THREE.mask, 1e-22)
    rises = np.diff(objectives).max()
    assert_at_most(rises, 1e-13, "largest rise of the objective in a plain step")
    assert_at_most(relative(fitted.factors @ fitted.loadings.T, U @ V.T), 1e-6, "relative difference of UVᵀ")
    assert fitted.status == 0
    assert_close(fitted.factors.T @ fitted.factors, np.eye(THREE.n_factors), "UᵀU")
    assert_close(fitted.objective, np.sum((Z - np.asarray(fitted.factors @ fitted.loadings.T)) ** 2), "objective")
    assert np.array_equal(np.asarray(fitted.loadings) != 0, THREE.mask)


def test_individual_structures_cost_at_least_separate_decompositions():
    """With equality where the views' leading score spaces are orthogonal to each other, and only there."""
    rng = np.random.default_rng(3)

    def losses(views):
        separate = sum(
            float(np.sum(np.linalg.svd(np.asarray(v) - np.asarray(v).mean(axis=0), compute_uv=False)[2:] ** 2))
            / float(np.sum((np.asarray(v) - np.asarray(v).mean(axis=0)) ** 2))
            for v in views
        )
        return float(compiled(views, PAIR, key=KEY).objective), separate

    views = draw(Hierarchy((6, 7), {(1, 2): 2}))
    ours, separate = losses(views)
    assert_at_least(ours - separate, 0.1, "excess over separate decompositions where the views share their scores")
    frame = orthogonal(rng, 60)
    frame, _ = np.linalg.qr(frame[:, :13] - frame[:, :13].mean(axis=0))
    halves = [frame[:, :6] * np.arange(6, 0, -1), frame[:, 6:] * np.arange(7, 0, -1)]
    nudge = 1e-3  # else every leading vector lies in one view, and a column given to the other one starts at a saddle, at zero
    ours, separate = losses([jnp.asarray(h @ orthogonal(rng, h.shape[1]) + nudge * rng.standard_normal(h.shape)) for h in halves])
    assert_at_most(abs(ours - separate), 10 * nudge**2, "difference where the score spaces are all but orthogonal")


def test_variance_explained_is_that_of_the_columns():
    views = draw(THREE)
    fitted = compiled(views, THREE, key=KEY)
    Z, U, V = standardised(views), np.asarray(fitted.transform(views)), np.asarray(fitted.loadings)
    table = variance_explained(fitted, views)
    column = THREE.columns((1, 2)).start
    rows = THREE.rows(1)
    expected = 1 - np.sum((Z[:, rows] - np.outer(U[:, column], V[rows, column])) ** 2)
    assert_at_most(abs(table[1, (1, 2)] - expected), 1e-12, "error of the share of view 1 explained by 12")
    assert table[3, (1, 2)] == 0
    assert activity(fitted) == dict(THREE.ranks)


@pytest.mark.parametrize(("hierarchy", "n"), [(PAIR, 60), (THREE, 60), (FOUR, 9)], ids=["2", "3", "4, more features than rows"])
def test_scores_of_rows(hierarchy, n):
    """Row by row, and for the training rows U = polar(scores · VᵀV): the same space as U."""
    views = draw(hierarchy, n)
    fitted = compiled(views, hierarchy, key=KEY)
    scores = fitted.transform(views)
    V = np.asarray(fitted.loadings)
    assert_close(scores, standardised(views) @ np.linalg.pinv(V.T), "least-squares scores")
    assert_close(numpy_polar(np.asarray(scores) @ V.T @ V), fitted.factors, "training scores, made orthonormal")
    rows = jnp.concatenate([fitted.transform([view[i : i + 1] for view in views]) for i in range(5)])
    assert_close(rows, scores[:5], "one row at a time")
    U, V, _ = numpy_given(standardised(views), hierarchy.mask, 1e-22)
    assert_at_most(relative(fitted.factors @ fitted.loadings.T, U @ V.T), 1e-6, "relative difference of UVᵀ")
    assert column_structures(fitted) == tuple(s for s, rank in hierarchy.ranks for _ in range(rank))


def test_new_rows_are_scored_by_training_constants():
    """The package standardises new rows among themselves, so that a row's scores change with its company; ours do not."""
    stored = reference_arrays("slide_b")
    hierarchy = stored_hierarchy(stored)
    fitted = compiled(stored_views(stored), hierarchy, key=KEY)
    new = [jnp.asarray(stored[f"xnew{m}"]) for m in (1, 2)]
    scores = fitted.transform(new)
    assert_close(fitted.transform([view[:3] for view in new]), scores[:3], "scores of three of twenty rows")
    Z = standardised(new)
    theirs = numpy_polar(Z @ stored["v"])
    assert_at_most(relative(theirs, stored["scores_test"]), 1e-9, "the package's scores, recomputed")
    three = numpy_polar(standardised([np.asarray(view)[:10] for view in new]) @ stored["v"])
    assert_at_least(relative(three, theirs[:10]), 0.1, "change of the package's scores of ten rows without the other ten")


@pytest.mark.slow
def test_bcv_finds_the_structures():
    hierarchy = Hierarchy((12, 12, 12), {(1, 2, 3): 1, (1, 2): 1, (3,): 1})
    views = draw(hierarchy, n=90, seed=2, noise=0.3)
    config = SlideConfig(ranks="bcv", width=8, n_penalties=20)
    fitted = compiled(views, hierarchy, config, key=KEY)
    assert activity(fitted) == dict(hierarchy.ranks)
    assert fitted.loadings.shape == (36, 8)
    unused = ~np.asarray(fitted.membership).any(axis=0)
    assert unused.tolist() == [False] * 3 + [True] * 5
    assert not np.asarray(fitted.loadings)[:, unused].any()
    assert not np.asarray(fitted.factors)[:, unused].any()
    U, V, _ = numpy_given(standardised(views), hierarchy.mask, 1e-22)
    assert_at_most(relative(fitted.factors @ fitted.loadings.T, U @ V.T), 1e-6, "relative difference from the fit as chosen")


def test_drawn_folds_are_balanced():
    config = SlideConfig(folds=(3, 4))
    rows, columns = slide.draw_folds(KEY, 11, (9, 6), config)
    assert sorted(np.bincount(rows).tolist()) == [3, 4, 4]
    assert sorted(np.bincount(columns[:9]).tolist()) == [2, 2, 2, 3]
    assert sorted(np.bincount(columns[9:], minlength=4).tolist()) == [1, 1, 2, 2]
    assert (slide.draw_folds(jr.key(1), 11, (9, 6), config)[0] != rows).any()


def test_a_batch_equals_its_members():
    """To the tolerance of the stop, which rounding can move by a cycle; a batch runs until its last member is done."""
    datasets = [draw(THREE, seed=seed) for seed in (1, 2)]
    batch = [jnp.stack(pair) for pair in zip(*datasets, strict=True)]
    together = jax.jit(jax.vmap(lambda views: slide.fit(views, THREE, key=KEY)))(batch)
    for i, views in enumerate(datasets):
        alone = compiled(views, THREE, key=KEY)
        product = together.factors[i] @ together.loadings[i].T
        assert_at_most(relative(product, alone.factors @ alone.loadings.T), 1e-6, "relative difference in a batch")


@pytest.mark.slow
def test_plain_equals_compiled():
    views = draw(PAIR)
    plain, fast = slide.fit(views, PAIR, key=KEY), compiled(views, PAIR, key=KEY)
    assert_at_most(relative(plain.factors @ plain.loadings.T, fast.factors @ fast.loadings.T), 1e-6, "relative difference")


def test_single_precision_is_kept():
    views = [view.astype(jnp.float32) for view in draw(THREE)]
    fitted = compiled(views, THREE, key=KEY)
    assert {x.dtype for x in jax.tree.leaves(fitted) if jnp.issubdtype(x.dtype, jnp.floating)} == {jnp.dtype(jnp.float32)}
    double = compiled(draw(THREE), THREE, key=KEY)
    assert fitted.status == 0
    assert_at_most(relative(fitted.factors @ fitted.loadings.T, double.factors @ double.loadings.T), 1e-2, "relative difference")


def test_constant_features_and_views_contribute_nothing():
    views = draw(THREE)
    views[0] = views[0].at[:, 2].set(0.1)
    fitted = compiled(views, THREE, key=KEY)
    assert not np.asarray(fitted.loadings)[2].any()
    views[1] = jnp.full_like(views[1], 0.3)
    fitted = compiled(views, THREE, key=KEY)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fitted))
    assert not np.asarray(fitted.loadings)[THREE.rows(2)].any()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"ranks": "aic"}, "ranks"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"width": 1}, "width"),
        ({"folds": (1, 3)}, "folds"),
        ({"smallest_penalty": -1.0}, "smallest_penalty"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        SlideConfig(**options)


def test_bad_views_are_named():
    views = draw(THREE)
    with pytest.raises(ValueError, match="view 2 has shape"):
        slide.fit([views[0], views[1][:-1], views[2]], THREE, key=KEY)
    with pytest.raises(ValueError, match="view 3 holds NaN"):
        slide.fit([views[0], views[1], views[2].at[0, 0].set(jnp.nan)], THREE, key=KEY)
    with pytest.raises(ValueError, match="7 rows; expected more than the 7 factors"):
        slide.fit([view[:7] for view in views], THREE, key=KEY)
    with pytest.raises(ValueError, match="at least 2 in each of 3 row folds"):
        slide.fit([view[:5] for view in views], THREE, SlideConfig(ranks="bcv"), key=KEY)


@pytest.mark.slow
def test_views_may_keep_their_common_scale():
    """Where views are of one scale already, scaling changes nothing; where one is larger, its factors come to count for more."""
    rng = np.random.default_rng(0)
    hierarchy = Hierarchy((6, 6), {(1, 2): 1})
    shared, strong = rng.standard_normal((2, 50, 1))
    views = [np.hstack([shared + strong] * 6) + 0.1 * rng.standard_normal((50, 6)), np.hstack([shared - strong] * 6)]
    views = [jnp.asarray(view / np.linalg.norm(view - view.mean(axis=0))) for view in views]

    def signal(factor, config):
        fitted = slide.fit([factor * views[0], views[1]], hierarchy, config, key=jr.key(0))
        return fitted.factors @ fitted.loadings.T * fitted.scale[None, :]

    kept, scaled = slide.SlideConfig(scale_views=False), slide.SlideConfig()
    np.testing.assert_allclose(signal(1.0, kept), signal(1.0, scaled), atol=1e-6)
    large = 10 * (views[0] - views[0].mean(axis=0)[None, :])
    left = [float(jnp.linalg.norm(large - signal(10.0, config)[:, :6])) for config in (kept, scaled)]
    assert left[0] < left[1] / 2, left
    with pytest.raises(ValueError, match="scale_views: is False; expected True with ranks='bcv'"):
        slide.SlideConfig(ranks="bcv", scale_views=False)
