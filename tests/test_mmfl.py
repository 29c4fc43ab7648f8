"""MMFL: its identities, its published iteration written out, and what the released code had wrong. No reference outputs exist."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_at_least, assert_at_most, assert_close, relative

from hcl_jax import Hierarchy
from hcl_jax.baselines import mmfl, slide
from hcl_jax.baselines.mmfl import MmflConfig

THREE = Hierarchy((8, 7, 6), {(1, 2, 3): 1, (1, 2): 1, (2, 3): 1, (1,): 1, (3,): 1})
TWO = Hierarchy((6, 5), {(1, 2): 2, (1,): 1, (2,): 1})
FOUR = Hierarchy((4, 5, 4, 6), {(1, 2): 1, (2, 3): 1, (1, 2, 3, 4): 1, (4,): 2})
KEY = jr.key(0)
CLASSES = MmflConfig(task="classification")

compiled = jax.jit(mmfl.fit, static_argnames=("hierarchy", "config"))


def draw(hierarchy=THREE, n=80, seed=0, classes=False, noise=0.7):
    """(views, y) of the model, y from all factors; of uneven labels, or with a mean of 5 and mostly positive."""
    rng = np.random.default_rng(seed)
    W = np.where(hierarchy.mask, rng.standard_normal(hierarchy.mask.shape), 0)
    z = rng.standard_normal((n, hierarchy.n_factors))
    X = 3 + z @ W.T + noise * rng.standard_normal((n, hierarchy.n_features))
    signal = z @ rng.standard_normal(hierarchy.n_factors) + 0.5 * rng.standard_normal(n)
    y = np.where(signal > 0.3, 1.0, -1.0) if classes else 5 + signal
    return [jnp.asarray(X[:, hierarchy.rows(m)]) for m in hierarchy.modalities], jnp.asarray(y)


def config_for(classes, **options):
    return MmflConfig(task="classification" if classes else "regression", **options)


def standardised(views):
    centred = [np.asarray(view) - np.asarray(view).mean(axis=0) for view in views]
    return np.hstack([view / np.linalg.norm(view) for view in centred])


def lam_of(views, y, lam=1.0):
    """λ in the units of the objective."""
    y = np.asarray(y)
    return lam * sum(view.shape[1] for view in views) * np.sum((y - y.mean()) ** 2) / len(views)


def polar(B):
    left, _, right = np.linalg.svd(B, full_matrices=False)
    return left @ right


def target_of(y, predicted, classes):
    """What the square of the loss is taken to: the response, or for a label past its margin the prediction itself."""
    return np.where(y * predicted > 1, predicted, y) if classes else y


def objective(Z, mask, y, U, V, beta, b, lam, gamma, classes):
    margin = np.maximum(1 - y * (U @ beta + b), 0) if classes else y - U @ beta - b
    assert not V[~mask].any()
    return lam * np.sum((Z - U @ V.T) ** 2) + np.sum(margin**2) + gamma * np.sum(beta**2)


def numpy_augmented_lagrangian(Z, mask, y, lam, gamma, classes, mu=1.0, released=False, steps=20000):
    """The published iteration from its own description; with `released`, its U step and its z step for a real response."""
    n, r = len(y), mask.shape[1]
    U, z, q, b = np.linalg.svd(Z, full_matrices=False)[0][:, :r], np.zeros(n), np.zeros(n), 0.0
    for _ in range(steps):
        V = np.where(mask, Z.T @ U, 0)
        beta = mu / (2 * gamma + mu) * U.T @ (y - b - z - q / mu)
        b = np.mean(y - z - U @ beta - q / mu)
        s = y - U @ beta - b - q / mu
        z = np.where((y * s > 0) | (not classes and not released), s / (1 + 2 / mu), s)
        B = lam * Z @ V + mu / 2 * np.outer(y - b - z - q / mu, beta)
        if released:
            B = B @ np.linalg.pinv(lam * V.T @ V + mu / 2 * np.outer(beta, beta))
        last, U = U, polar(B)
        q = q + mu * (z - y + U @ beta + b)
        if np.linalg.norm(U - last) < 1e-9:
            break
    return U, np.where(mask, Z.T @ U, 0), beta, b, np.abs(z - y + U @ beta + b).max()


@pytest.mark.parametrize("classes", [False, True])
def test_the_published_iteration_has_the_same_fixed_point(classes):
    """Its constraint holds at the end, and its U is ours to 1e-6, some hundred times the last change of either."""
    views, y = draw(classes=classes)
    Z, lam = standardised(views), lam_of(views, y)
    fitted = compiled(views, THREE, config_for(classes), y=y, key=KEY)
    assert fitted.status == 0
    U, V, beta, b, violation = numpy_augmented_lagrangian(Z, THREE.mask, np.asarray(y), lam, 1.0, classes)
    assert_at_most(violation, 1e-4, "violation of the constraint z = y − Uβ − b")
    assert_at_most(relative(fitted.factors @ fitted.loadings.T, U @ V.T), 1e-6, "relative difference of UVᵀ")
    assert_at_most(relative(fitted.factors @ fitted.coefficients + fitted.intercept, U @ beta + b), 1e-6, "difference of Uβ + b")
    theirs = objective(Z, THREE.mask, np.asarray(y), U, V, beta, b, lam, 1.0, classes)
    assert_at_most(abs(fitted.objective / theirs - 1), 1e-9, "relative difference of the objectives")
    ours = (fitted.factors, fitted.loadings, fitted.coefficients, fitted.intercept)
    recomputed = objective(Z, THREE.mask, np.asarray(y), *(np.asarray(x) for x in ours), lam, 1.0, classes)
    assert_close(fitted.objective, recomputed, "the objective of the fit")
    assert_close(fitted.factors.T @ fitted.factors, np.eye(THREE.n_factors), "UᵀU")


@pytest.mark.parametrize("classes", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_solver_of_the_published_iteration(classes):
    views, y = draw(classes=classes)
    direct = compiled(views, THREE, config_for(classes), y=y, key=KEY)
    slow = compiled(views, THREE, config_for(classes, solver="alm", max_steps=20000), y=y, key=KEY)
    assert slow.status == 0, "the constraint holds to the tolerance"
    assert_at_most(relative(slow.factors @ slow.loadings.T, direct.factors @ direct.loadings.T), 1e-6, "difference of UVᵀ")
    assert_at_most(relative(slow.score_map, direct.score_map), 1e-5, "relative difference of the scores' map")
    assert_at_most(abs(slow.objective / direct.objective - 1), 1e-9, "relative difference of the objectives")


@pytest.mark.parametrize("classes", [False, True])
def test_no_small_change_of_a_fit_is_better(classes):
    """Random moves of U on the constraint and of β and b, all else at its best, raise the objective."""
    views, y = draw(classes=classes)
    Z, lam, labels = standardised(views), lam_of(views, y), np.asarray(y)
    fitted = compiled(views, THREE, config_for(classes), y=y, key=KEY)
    U, beta, b = np.asarray(fitted.factors), np.asarray(fitted.coefficients), float(fitted.intercept)
    rng = np.random.default_rng(0)
    for _ in range(20):
        moved = np.linalg.qr(U + 1e-3 * rng.standard_normal(U.shape))[0]
        moved = moved * np.sign(np.sum(moved * U, axis=0))
        new_beta, new_b = beta + 1e-3 * rng.standard_normal(beta.shape), b + 1e-3 * rng.standard_normal()
        V = np.where(THREE.mask, Z.T @ moved, 0)
        assert objective(Z, THREE.mask, labels, moved, V, new_beta, new_b, lam, 1.0, classes) > fitted.objective


def test_a_real_response_needs_the_two_sided_loss():
    """The released code penalises residuals on the response's side of zero only: with a positive response its predictions
    overshoot. Ours have the response's mean."""
    views, y = draw()
    Z, lam = standardised(views), lam_of(views, y)
    fitted = compiled(views, THREE, y=y, key=KEY)
    assert_close(fitted.intercept, y.mean(), "intercept")
    assert_close(jnp.mean(fitted.factors @ fitted.coefficients), 0.0, "mean of Uβ", slack=1e5)
    U, _, beta, b, _ = numpy_augmented_lagrangian(Z, THREE.mask, np.asarray(y), lam, 1.0, False, released=True, steps=500)
    assert_at_least(np.mean(U @ beta + b) - float(y.mean()), 0.5, "excess of the released code's mean prediction")


def test_a_regression_is_slide_with_the_response_as_a_view_that_every_structure_sees():
    """The response's view has the squared norm 1/(λ(1 + γ)) of the response in units where it is 1."""
    views, y = draw()
    gamma = 0.5
    fitted = compiled(views, THREE, MmflConfig(gamma=gamma), y=y, key=KEY)
    Z, lam = standardised(views), lam_of(views, y)
    response = (np.asarray(y) - np.asarray(y).mean()) / np.sqrt(lam * (1 + gamma))
    stacked, mask = np.column_stack([Z, response]), np.vstack([THREE.mask, np.ones((1, THREE.n_factors), dtype=bool)])
    U = np.linalg.svd(stacked, full_matrices=False)[0][:, : THREE.n_factors]
    for _ in range(5000):
        V = np.where(mask, stacked.T @ U, 0)
        U = polar(stacked @ V)
    assert_at_most(relative(fitted.factors @ fitted.factors.T, U @ U.T), 1e-6, "relative difference of the score spaces")
    beta = np.asarray(fitted.factors).T @ (U @ V[-1]) * np.sqrt(lam * (1 + gamma)) / (1 + gamma)
    assert_at_most(relative(fitted.coefficients, beta), 1e-6, "relative difference of the coefficients")


@pytest.mark.parametrize(("options", "classes"), [({"gamma": 1e10}, False), ({"lam": 1e10}, True)], ids=["gamma", "lam"])
def test_without_the_response_it_is_slide(options, classes):
    """β = 0 at large γ, and at large λ the response has no weight against the views."""
    views, y = draw(classes=classes)
    fitted = compiled(views, THREE, config_for(classes, **options), y=y, key=KEY)
    alone = jax.jit(slide.fit, static_argnames=("hierarchy",))(views, THREE, key=KEY)
    assert_at_most(relative(fitted.factors @ fitted.loadings.T, alone.factors @ alone.loadings.T), 1e-6, "difference of UVᵀ")
    if "gamma" in options:
        assert_at_most(jnp.linalg.norm(fitted.coefficients) / jnp.linalg.norm(y), 1e-9, "‖β‖/‖y‖")


def test_flipped_labels_flip_the_coefficients():
    views, y = draw(classes=True)
    fitted = compiled(views, THREE, CLASSES, y=y, key=KEY)
    flipped = compiled(views, THREE, CLASSES, y=-y, key=KEY)
    assert_at_most(relative(flipped.factors @ flipped.coefficients, -(fitted.factors @ fitted.coefficients)), 1e-6, "Uβ")
    assert_at_most(relative(flipped.intercept, -fitted.intercept), 1e-6, "b")
    assert_at_most(
        relative(flipped.factors @ flipped.factors.T, fitted.factors @ fitted.factors.T), 1e-6, "projection on the scores"
    )


def test_separable_classes_are_told_apart():
    """In training by the fitted Uβ + b, and by the views alone, old rows and new."""
    views, _ = draw(n=120, noise=0.05)
    first = np.asarray(views[0][:, 0])
    y = jnp.asarray(np.where(first > np.median(first), 1.0, -1.0))
    shifted = [view + 4 * y[:, None] for view in views]
    train, test = [view[:80] for view in shifted], [view[80:] for view in shifted]
    fitted = compiled(train, THREE, CLASSES, y=y[:80], key=KEY)
    assert bool(((fitted.factors @ fitted.coefficients + fitted.intercept) * y[:80] > 0).all())
    assert bool((fitted.predict(train) * y[:80] > 0).all())
    assert bool((fitted.predict(test) * y[80:] > 0).all())


@pytest.mark.parametrize(
    ("hierarchy", "n", "classes", "oos"),
    [
        (THREE, 80, True, "eq11"),
        (FOUR, 9, False, "ls"),
        *(pytest.param(TWO, 80, classes, oos, marks=pytest.mark.slow) for classes in (False, True) for oos in ("eq11", "ls")),
    ],
)
@pytest.mark.slow
def test_scores_of_rows(hierarchy, n, classes, oos):
    """Row by row; and for the training rows U = polar(T(λVᵀV + ββᵀ) + (t − b)βᵀ), the ββᵀ missing from least squares."""
    views, y = draw(hierarchy, n, classes=classes)
    fitted = compiled(views, hierarchy, config_for(classes, oos=oos), y=y, key=KEY)
    scores = fitted.transform(views)
    U, V, beta = (np.asarray(x) for x in (fitted.factors, fitted.loadings, fitted.coefficients))
    b, lam = float(fitted.intercept), lam_of(views, y)
    weights = lam * V.T @ V + (np.outer(beta, beta) if oos == "eq11" else 0)
    assert_close(scores, lam * standardised(views) @ V @ np.linalg.inv(weights), "scores")
    t = target_of(np.asarray(y), U @ beta + b, classes)
    assert_at_most(relative(polar(np.asarray(scores) @ weights + np.outer(t - b, beta)), U), 1e-6, "difference from U")
    few = jnp.concatenate([fitted.transform([view[i : i + 1] for view in views]) for i in range(5)])
    assert_close(few, scores[:5], "one row at a time")
    assert_close(fitted.predict(views), scores @ fitted.coefficients + fitted.intercept, "prediction")


def test_both_kinds_of_score_predict_the_same_up_to_a_factor():
    views, y = draw()
    by_ridge, by_squares = (compiled(views, THREE, MmflConfig(oos=oos), y=y, key=KEY) for oos in ("eq11", "ls"))
    V, beta = np.asarray(by_squares.loadings), np.asarray(by_squares.coefficients)
    factor = 1 / (1 + beta @ np.linalg.solve(lam_of(views, y) * V.T @ V, beta))
    expected = factor * (by_squares.predict(views) - y.mean()) + y.mean()
    assert_at_most(relative(by_ridge.predict(views), expected), 1e-9, "relative difference of the predictions")
    assert 0 < factor < 1


def test_lam_does_not_depend_on_units_or_numbers_of_rows():
    """Views in other units, a response in other units, every row twice: the same fit, to the tolerance of the stop."""
    views, y = draw()
    fitted = compiled(views, THREE, y=y, key=KEY)
    rescaled = compiled([10 * views[0], views[1], views[2] / 7], THREE, y=3 * y, key=KEY)
    predicted = fitted.factors @ fitted.coefficients
    assert_at_most(relative(rescaled.factors @ rescaled.coefficients, 3 * predicted), 1e-6, "other units")
    doubled = compiled([jnp.concatenate([view, view]) for view in views], THREE, y=jnp.concatenate([y, y]), key=KEY)
    assert_at_most(relative(doubled.predict(views), fitted.predict(views)), 1e-6, "every row twice")
    absolute = MmflConfig(lam=float(lam_of(views, y)), relative=False)
    assert_at_most(relative(compiled(views, THREE, absolute, y=y, key=KEY).score_map, fitted.score_map), 1e-6, "λ as it stands")


@pytest.mark.parametrize("classes", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_cross_validation_is_honest(classes):
    """The held-out loss of a pair of weights is that of fits to the other rows."""
    views, y = draw(n=60, classes=classes)
    config = config_for(classes, lam=(1e-3, 1.0), gamma=(0.1, 100.0), folds=3)
    losses = jax.jit(partial(mmfl.cross_validation, hierarchy=THREE, config=config))(jnp.hstack(views), y=y, key=KEY)
    order = jr.permutation(KEY, 60)
    order = order[jnp.argsort(y[order], stable=True)] if classes else order
    fold_of = np.zeros(60, dtype=int)
    fold_of[np.asarray(order)] = np.arange(60) % 3
    expected = 0.0
    for fold in range(3):
        inside = fold_of != fold
        fitted = compiled([view[inside] for view in views], THREE, config_for(classes, gamma=0.1), y=y[inside], key=KEY)
        predicted = np.asarray(fitted.predict([view[~inside] for view in views]))
        held = np.asarray(y)[~inside]
        expected += np.sum(np.maximum(1 - held * predicted, 0) ** 2 if classes else (held - predicted) ** 2) / 60
    assert config.weights[2] == (1.0, 0.1)
    assert_at_most(abs(float(losses[2]) / expected - 1), 1e-6, "relative difference of the held-out loss, up to the fits' stop")


@pytest.mark.slow
def test_a_fit_takes_the_weights_that_cross_validation_finds_best():
    views, y = draw(n=60)
    config = MmflConfig(lam=(1e-3, 1.0), gamma=(100.0, 0.1), folds=3)
    losses = jax.jit(partial(mmfl.cross_validation, hierarchy=THREE, config=config))(jnp.hstack(views), y=y, key=KEY)
    lam, gamma = config.weights[int(np.argmin(losses))]
    assert gamma == 0.1
    chosen = compiled(views, THREE, config, y=y, key=KEY)
    alone = compiled(views, THREE, MmflConfig(lam=lam, gamma=gamma), y=y, key=KEY)
    assert_at_most(relative(chosen.score_map, alone.score_map), 1e-6, "difference from the fit at the best weights")


def test_a_batch_equals_its_members():
    datasets = [draw(seed=seed, classes=True) for seed in (1, 2)]
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *datasets)
    together = jax.jit(jax.vmap(lambda views, y: mmfl.fit(views, THREE, CLASSES, y=y, key=KEY)))(*batch)
    for i, (views, y) in enumerate(datasets):
        alone = compiled(views, THREE, CLASSES, y=y, key=KEY)
        assert_at_most(relative(together.score_map[i], alone.score_map), 1e-5, "relative difference in a batch")


@pytest.mark.slow
def test_plain_equals_compiled():
    views, y = draw(TWO)
    plain, fast = mmfl.fit(views, TWO, y=y, key=KEY), compiled(views, TWO, y=y, key=KEY)
    assert_at_most(relative(plain.score_map, fast.score_map), 1e-5, "relative difference")


def test_constant_features_contribute_nothing():
    views, y = draw()
    views[0] = views[0].at[:, 2].set(0.1)
    fitted = compiled(views, THREE, y=y, key=KEY)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(fitted))
    assert not np.asarray(fitted.loadings)[2].any()
    assert not np.asarray(fitted.score_map)[2].any()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"task": "ranking"}, "task"),
        ({"lam": 0.0}, "lam"),
        ({"lam": ()}, "lam"),
        ({"gamma": -1.0}, "gamma"),
        ({"mu": 0.0}, "mu"),
        ({"oos": "map"}, "oos"),
        ({"folds": 1}, "folds"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        MmflConfig(**options)


def test_bad_data_are_named():
    views, y = draw()
    labels = draw(classes=True)[1]
    with pytest.raises(ValueError, match="^y: is None"):
        mmfl.fit(views, THREE, key=KEY)
    with pytest.raises(ValueError, match=r"^y: has shape \(79,\)"):
        mmfl.fit(views, THREE, y=y[:-1], key=KEY)
    with pytest.raises(ValueError, match="^y: holds NaN"):
        mmfl.fit(views, THREE, y=y.at[0].set(jnp.nan), key=KEY)
    with pytest.raises(ValueError, match="both labels"):
        mmfl.fit(views, THREE, CLASSES, y=y, key=KEY)
    with pytest.raises(ValueError, match="both labels"):
        mmfl.fit(views, THREE, CLASSES, y=jnp.abs(labels), key=KEY)
    with pytest.raises(ValueError, match="5 rows; expected more than the 5 factors"):
        mmfl.fit([view[:5] for view in views], THREE, y=y[:5], key=KEY)
    with pytest.raises(ValueError, match="of which a fold is fitted to 4"):
        mmfl.fit([view[:6] for view in views], THREE, MmflConfig(lam=(1.0, 2.0), folds=3), y=y[:6], key=KEY)
    with pytest.raises(ValueError, match="view 1 holds NaN"):
        mmfl.fit([view.at[0, 0].set(jnp.nan) for view in views], THREE, y=y, key=KEY)
