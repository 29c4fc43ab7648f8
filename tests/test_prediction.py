"""Regressions from moments: against least squares on rows, scikit-learn, the optimality conditions, and the theory."""

import functools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.integrate import quad
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge

from hcl_jax import Hierarchy
from hcl_jax.limits import bayes
from hcl_jax.metrics import coefficient_errors, prediction_errors, symmetric_percentage_error
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
from hcl_jax.prediction import (
    PROJECTED,
    FoldMoments,
    choose_penalty,
    group_index,
    group_lasso,
    group_relevance,
    least_squares,
    least_squares_scores,
    posterior_mean_scores,
    ridge,
    softmax_regression,
)

HIERARCHY = Hierarchy((8, 7, 6), {(1, 2, 3): 3, (1, 2): 2, (3,): 2})
FOLDS = 4
solvers = {
    "least_squares": jax.jit(least_squares),
    "ridge": jax.jit(ridge),
    "evidence": jax.jit(functools.partial(ridge, choose="evidence")),
    "group_lasso": jax.jit(lambda moments, noise_gram=None: group_lasso(moments, HIERARCHY, noise_gram)),
    "adaptive": jax.jit(
        lambda moments, noise_gram=None: group_lasso(moments, HIERARCHY, noise_gram, rule="one-se", adaptive=1.0)
    ),
    "relevance": jax.jit(lambda moments: group_relevance(moments, HIERARCHY)),
}


def make_truth(seed=0, noise=0.3, support=None, hierarchy=HIERARCHY):
    k_loadings, k_beta = jr.split(jr.key(seed))
    loadings = sample_loadings(k_loadings, hierarchy, jnp.float64)
    beta = sample_coefficients(k_beta, hierarchy, support, jnp.float64)
    kind = "feature" if np.ndim(noise) else "shared"
    return ResponseTruth(loadings, jnp.asarray(noise), hierarchy, beta, jnp.asarray(0.1), noise=kind)


def labelled(truth, m, seed=1, shift=0.0):
    k_rows, k_response = jr.split(jr.key(seed))
    x, z = sample_observations(k_rows, truth, m)
    return x + shift, sample_response(k_response, truth, z) + shift


def centred(scores):
    return np.asarray(scores) - np.asarray(scores).mean(axis=0)


TRUTH = make_truth()
BY_FEATURE = make_truth(noise=np.linspace(0.1, 0.9, HIERARCHY.n_features))
X, Y = labelled(TRUTH, 203, shift=3.0)
SCORES = X @ least_squares_scores(TRUTH.loadings)


def test_projected_moments_are_the_moments_of_the_scores():
    score_map = least_squares_scores(TRUTH.loadings)
    projected, direct = FoldMoments.from_rows(X, Y, FOLDS).project(score_map), FoldMoments.from_rows(X @ score_map, Y, FOLDS)
    for name in ("count", "x", "xx", "xy", "y", "yy", "origin"):
        np.testing.assert_allclose(getattr(projected, name), getattr(direct, name), rtol=1e-10, atol=1e-9, err_msg=name)


def test_least_squares_is_that_of_the_rows():
    fit, reference = solvers["least_squares"](FoldMoments.from_rows(SCORES, Y, FOLDS)), LinearRegression().fit(SCORES, Y)
    np.testing.assert_allclose(fit.coefficients, reference.coef_, rtol=1e-9)
    np.testing.assert_allclose(fit.intercept, reference.intercept_, rtol=1e-9)


def test_ridge_is_that_of_the_rows_at_the_penalty_that_honest_folds_choose():
    fit = solvers["ridge"](FoldMoments.from_rows(SCORES, Y, FOLDS))
    unit = np.linalg.eigvalsh(np.cov(SCORES.T, bias=True)).mean()
    edges = [round(len(Y) * i / FOLDS) for i in range(FOLDS + 1)]

    def error(penalty):
        held = []
        for a, b in zip(edges[:-1], edges[1:], strict=True):
            keep = np.r_[0:a, b : len(Y)]
            model = Ridge(alpha=penalty * len(keep)).fit(SCORES[keep], Y[keep])
            held.append(np.mean((Y[a:b] - model.predict(SCORES[a:b])) ** 2))
        return np.mean(held)

    penalties = unit * np.logspace(3, -6, 50)
    best = penalties[np.argmin([error(p) for p in penalties])]
    np.testing.assert_allclose(fit.penalty, best, rtol=1e-6)
    reference = Ridge(alpha=best * len(Y)).fit(SCORES, Y)
    np.testing.assert_allclose(fit.coefficients, reference.coef_, rtol=1e-8)


def test_the_evidence_is_the_marginal_likelihood_of_the_rows():
    fit = solvers["evidence"](FoldMoments.from_rows(SCORES, Y, FOLDS))
    Z, y = centred(SCORES), np.asarray(Y - Y.mean())
    m = len(y)

    def evidence(penalty):  # log N(y; 0, s²(I + ZZᵀ/(mμ))) with s² where it is largest
        covariance = np.eye(m) + Z @ Z.T / (m * penalty)
        s_sq = y @ np.linalg.solve(covariance, y) / m
        return -m / 2 * np.log(s_sq) - np.linalg.slogdet(covariance)[1] / 2

    penalties = np.linalg.eigvalsh(Z.T @ Z / m).mean() * np.logspace(3, -6, 50)
    np.testing.assert_allclose(fit.penalty, penalties[np.argmax([evidence(p) for p in penalties])], rtol=1e-6)


@pytest.mark.parametrize("debias", [False, True])
def test_the_group_lasso_meets_its_optimality_conditions(debias):
    score_map = least_squares_scores(TRUTH.loadings)
    noise_gram = 0.3 * score_map.T @ score_map if debias else None
    fit = solvers["group_lasso"](FoldMoments.from_rows(SCORES, Y, FOLDS), noise_gram)
    Z, y = centred(SCORES), np.asarray(Y - Y.mean())
    H = Z.T @ Z / len(y) - (0 if noise_gram is None else noise_gram)
    gradient = H @ fit.coefficients - Z.T @ y / len(y)
    scale = np.linalg.norm(Z.T @ y / len(y))
    assert int(fit.status) == 0
    for s, rank in HIERARCHY.ranks:
        columns, weight = HIERARCHY.columns(s), float(fit.penalty) * np.sqrt(rank)
        b, g = fit.coefficients[columns], gradient[columns]
        if np.linalg.norm(b) > 0:
            np.testing.assert_allclose(g, -weight * b / np.linalg.norm(b), atol=1e-6 * scale)
        else:
            assert np.linalg.norm(g) <= weight * (1 + 1e-6)


def test_the_penalty_rules():
    errors = jnp.array([[5.0, 5.2], [2.2, 2.0], [1.0, 2.0], [0.9, 2.0], [1.5, 2.5]])
    assert int(choose_penalty(errors, "min")) == 3
    # mean 1.45, standard error 0.55: the first mean below 2.0 is the third
    assert int(choose_penalty(errors, "one-se")) == 2


def test_folds_are_honest():
    """A response that is noise: cross-validation has to see that no penalty is worth paying less than the largest for."""
    y = jr.normal(jr.key(5), Y.shape)
    fit = jax.jit(lambda moments: group_lasso(moments, HIERARCHY, rule="one-se"))(FoldMoments.from_rows(SCORES, y, FOLDS))
    assert float(jnp.abs(fit.coefficients).max()) == 0


def test_an_indefinite_moment_is_projected_and_said():
    score_map = least_squares_scores(TRUTH.loadings)
    scores = X[:8] @ score_map
    noise_gram = 0.3 * score_map.T @ score_map
    Z = centred(scores)
    assert np.linalg.eigvalsh(Z.T @ Z / 8 - noise_gram)[0] < 0, "the case is not indefinite"
    fit = solvers["least_squares"](FoldMoments.from_rows(scores, Y[:8], FOLDS), noise_gram)
    assert int(fit.status) == PROJECTED
    assert bool(jnp.isfinite(fit.coefficients).all())
    assert int(solvers["least_squares"](FoldMoments.from_rows(SCORES, Y, FOLDS), noise_gram).status) == 0


@pytest.mark.slow
def test_relevance_shrinks_what_does_not_help():
    truth = make_truth(support=((1, 2),))
    x, y = labelled(truth, 2000)
    fit = solvers["relevance"](FoldMoments.from_rows(x @ posterior_mean_scores(truth.loadings, truth.noise_variance), y, FOLDS))
    norms = np.sqrt(np.bincount(group_index(HIERARCHY), np.asarray(fit.coefficients) ** 2))
    assert int(fit.status) == 0
    assert norms[1] > 20 * max(norms[0], norms[2])


@pytest.mark.parametrize("name", ["least_squares", "ridge", "group_lasso", "adaptive", "relevance"])
@pytest.mark.slow
def test_float32_agrees_and_batches_agree(name):
    """To 1e-3: squared moments in single precision hold seven digits, and the path's stop is 1e-5."""
    rows, responses = labelled(TRUTH, 400)
    scores = rows @ least_squares_scores(TRUTH.loadings)
    moments = FoldMoments.from_rows(scores, responses, FOLDS)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), moments)
    expected = solvers[name](moments).coefficients
    np.testing.assert_allclose(solvers[name](single).coefficients, expected, atol=1e-3)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), moments)
    np.testing.assert_allclose(jax.vmap(solvers[name])(batch).coefficients[1], expected, atol=1e-6)


def test_posterior_means_are_the_conditional_expectation():
    scores = posterior_mean_scores(TRUTH.loadings, TRUTH.noise_variance)
    covariance = TRUTH.covariance()
    np.testing.assert_allclose(scores, jnp.linalg.solve(covariance, TRUTH.loadings), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scores @ TRUTH.coefficients, TRUTH.conditional_mean(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("truth", [TRUTH, BY_FEATURE], ids=["shared", "by feature"])
def test_errors_are_those_of_a_large_sample(truth):
    """Expectations against 400,000 rows: to four standard errors, of about 1e-3 relative each."""
    b, intercept = truth.conditional_mean() * 0.8 + 0.02, jnp.asarray(0.3)
    errors = prediction_errors(b, intercept, truth)
    x, y = labelled(truth, 400_000, seed=9)
    predicted = x @ b + intercept
    np.testing.assert_allclose(errors["rmse"], jnp.sqrt(jnp.mean((y - predicted) ** 2)), rtol=5e-3)
    np.testing.assert_allclose(
        errors["smape"], 200 * jnp.mean(jnp.abs(y - predicted) / (jnp.abs(y) + jnp.abs(predicted))), rtol=5e-3
    )
    np.testing.assert_allclose(errors["r_squared"], 1 - jnp.mean((y - predicted) ** 2) / jnp.var(y), atol=5e-3)
    oracle = x @ least_squares_scores(truth.loadings) @ truth.coefficients
    excess = jnp.mean((y - predicted) ** 2 - (y - oracle) ** 2)
    np.testing.assert_allclose(errors["excess_risk"], excess, atol=0.02)
    limit = bayes(truth)
    assert float(limit["bayes_excess"]) < 1e-20
    np.testing.assert_allclose(errors["rmse"] ** 2 - limit["rmse"] ** 2, errors["bayes_excess"], rtol=1e-9)
    np.testing.assert_allclose(limit["rmse"] ** 2, truth.conditional_variance(), rtol=1e-9)


def test_smape_of_pairs_that_are_known():
    assert float(symmetric_percentage_error(jnp.array([[1.0, 1.0], [1.0, 1.0]]), jnp.asarray(0.0))) < 1e-6
    np.testing.assert_allclose(symmetric_percentage_error(jnp.array([[1.0, 0.0], [0.0, 0.0]]), jnp.asarray(0.0)), 200, rtol=1e-6)
    # independent and of equal size
    expected = quad(lambda t: 2 * abs(np.cos(t) - np.sin(t)) / (abs(np.cos(t)) + abs(np.sin(t))), 0, 2 * np.pi, limit=200)[0]
    np.testing.assert_allclose(symmetric_percentage_error(jnp.eye(2), jnp.asarray(0.0)), 100 * expected / (2 * np.pi), rtol=1e-3)


def test_coefficients_are_compared_after_the_rotation_of_the_scores():
    """Λ̂_s = Λ_sQ_sᵀ has scores Q_s z_s, so that the coefficients to find are Q_sβ_s; r_s = 3 tells O from Oᵀ."""
    rotations = [jnp.linalg.qr(jr.normal(jr.key(i), (r, r)))[0] for i, (_, r) in enumerate(HIERARCHY.ranks)]
    Q = jax.scipy.linalg.block_diag(*rotations)
    errors = coefficient_errors(Q @ TRUTH.coefficients, TRUTH.loadings @ Q.T, HIERARCHY, TRUTH)
    assert float(errors["beta_error"]) < 1e-10
    wrong = coefficient_errors(Q.T @ TRUTH.coefficients, TRUTH.loadings @ Q.T, HIERARCHY, TRUTH)
    assert float(wrong["structure_beta_error"][0]) > 0.1


def test_selection_rates():
    truth = make_truth(support=((1, 2),))
    chosen = jnp.where(jnp.asarray(group_index(HIERARCHY)) <= 1, 1.0, 0.0)
    errors = coefficient_errors(chosen, truth.loadings, HIERARCHY, truth)
    assert [float(errors[k]) for k in ("true_positive_rate", "false_positive_rate", "exact_selection")] == [1.0, 0.5, 0.0]
    np.testing.assert_array_equal(errors["selected"], [1.0, 1.0, 0.0])


@pytest.mark.parametrize("n", [60, 15])
def test_rows_have_the_covariance_that_they_were_drawn_for(n):
    S = sample_wishart_covariance(jr.key(3), TRUTH, n) if n > 21 else sample_factored_covariance(jr.key(3), TRUTH, n)
    rows = sample_rows_given_covariance(jr.key(4), S, n)
    assert rows.shape == (n, 21)
    np.testing.assert_allclose(rows.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(rows.T @ rows / (n - 1), S.block(slice(None), slice(None)), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("x", "y", "folds", "message"),
    [
        (X[:3], Y[:3], 4, "n_folds: is 4; expected from 2 to the number of rows, 3"),
        (X, Y[:5], 4, "y: has shape"),
        (X, Y, 1, "n_folds: is 1; expected from 2"),
        (X.at[0, 0].set(jnp.nan), Y, 4, "x: holds NaN"),
        (X, Y.at[3].set(jnp.inf), 4, "y: holds NaN or infinite"),
    ],
)
def test_bad_rows_are_refused(x, y, folds, message):
    with pytest.raises(ValueError, match=message):
        FoldMoments.from_rows(x, y, folds)


def test_posterior_means_with_a_noise_variance_for_each_feature():
    """E[z|x] = Λᵀ(ΛΛᵀ + Ψ)⁻¹x, whatever Ψ; one number is a vector of equal ones, and without noise they are least squares."""
    L = np.asarray(TRUTH.loadings)
    psi = np.linspace(0.1, 3, len(L))
    expected = np.linalg.solve(L @ L.T + np.diag(psi), L)
    np.testing.assert_allclose(posterior_mean_scores(L, psi), expected, atol=1e-12)
    np.testing.assert_allclose(posterior_mean_scores(L, np.full(len(L), 0.7)), posterior_mean_scores(L, 0.7), atol=1e-12)
    np.testing.assert_allclose(posterior_mean_scores(L, 0), least_squares_scores(L), atol=1e-10)
    for wrong in (np.ones(3), np.ones(7), np.zeros(len(L)), -1.0, None, "low"):
        with pytest.raises(ValueError, match="noise_variance: "):
            posterior_mean_scores(L, wrong)


@pytest.mark.parametrize("name", ["least_squares", "ridge", "evidence", "group_lasso", "adaptive", "relevance"])
def test_scores_that_are_all_zero_get_coefficients_of_zero(name):
    fit = solvers[name](FoldMoments.from_rows(jnp.zeros_like(SCORES), Y, FOLDS))
    assert int(fit.status) == 0
    assert float(jnp.abs(fit.coefficients).max()) == 0
    np.testing.assert_allclose(fit.intercept, Y.mean(), rtol=1e-9)


def test_constant_scores_get_no_coefficient():
    scores = jnp.concatenate([SCORES, jnp.full((len(Y), 1), 7.0)], axis=1)
    for name in ("least_squares", "ridge"):
        fit = solvers[name](FoldMoments.from_rows(scores, Y, FOLDS))
        assert int(fit.status) == 0
        assert abs(float(fit.coefficients[-1])) < 1e-10


CENTRES = jr.normal(jr.key(11), (3, 7))
LABELS = jr.randint(jr.key(12), (150,), 0, 3)
POINTS = CENTRES[LABELS] + 1.2 * jr.normal(jr.key(13), (150, 7)) + 5.0
classify = jax.jit(lambda points, labels, key: softmax_regression(points, labels, 3, key=key, max_steps=3000))
classify_groups = jax.jit(lambda points, labels, key: softmax_regression(points, labels, 3, HIERARCHY, key=key, max_steps=3000))


def test_softmax_ridge_is_that_of_scikit_learn_at_its_penalty():
    """To 2e-3 of the coefficients: the accelerated steps stop at a relative change of 1e-5."""
    fit = classify(POINTS, LABELS, jr.key(0))
    assert int(fit.status) == 0
    reference = LogisticRegression(C=1 / (float(fit.penalty) * len(LABELS)), tol=1e-10, max_iter=10_000).fit(POINTS, LABELS)
    expected = reference.coef_.T - reference.coef_.mean(axis=0)[:, None]
    np.testing.assert_allclose(fit.coefficients, expected, atol=2e-3 * np.abs(expected).max())
    np.testing.assert_allclose(fit.log_probabilities(POINTS), reference.predict_log_proba(np.asarray(POINTS)), atol=2e-2)


def test_scores_by_fold_that_are_those_of_all_rows_change_nothing():
    fit = softmax_regression(POINTS, LABELS, 3, key=jr.key(0))
    by_fold = softmax_regression(POINTS, LABELS, 3, key=jr.key(0), fold_scores=jnp.stack([POINTS] * 5))
    for one, other in zip(jax.tree.leaves(fit), jax.tree.leaves(by_fold), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match=r"fold_scores: has shape \(4, 150, 7\); expected \(5, 150, 7\)"):
        softmax_regression(POINTS, LABELS, 3, key=jr.key(0), fold_scores=jnp.stack([POINTS] * 4))


def test_rows_that_only_fill_up_a_shape_change_nothing():
    """At one penalty: which fold a row falls into does depend on how many rows there are."""
    filled, labels = (
        jnp.concatenate([POINTS, 7 * jnp.ones((5, POINTS.shape[1]))]),
        jnp.concatenate([LABELS, jnp.zeros(5, LABELS.dtype)]),
    )
    options = {"key": jr.key(0), "n_penalties": 1, "max_steps": 3000}
    plain = softmax_regression(POINTS, LABELS, 3, **options)
    padded = softmax_regression(filled, labels, 3, counted=jnp.arange(len(filled)) < len(POINTS), **options)
    np.testing.assert_allclose(padded.coefficients, plain.coefficients, rtol=1e-3, atol=1e-5)  # steps end at 1e-5
    np.testing.assert_allclose(padded.intercept, plain.intercept, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match=r"counted: is bool of shape \(3,\); expected booleans of shape"):
        softmax_regression(POINTS, LABELS, 3, key=jr.key(0), counted=jnp.ones(3, bool))


def test_the_softmax_group_penalty_meets_its_optimality_conditions():
    fit = classify_groups(POINTS, LABELS, jr.key(0))
    probabilities = np.exp(fit.log_probabilities(POINTS))
    gradient = centred(POINTS).T @ (probabilities - np.eye(3)[np.asarray(LABELS)]) / len(LABELS)
    for s, rank in HIERARCHY.ranks:
        B, g = np.asarray(fit.coefficients[HIERARCHY.columns(s)]), gradient[HIERARCHY.columns(s)]
        weight = float(fit.penalty) * np.sqrt(rank)
        if np.linalg.norm(B) > 0:
            np.testing.assert_allclose(g, -weight * B / np.linalg.norm(B), atol=1e-3 * np.abs(gradient).max() + 1e-4)
        else:
            assert np.linalg.norm(g) <= weight * (1 + 1e-4)


def test_classes_without_signal_are_told_apart_by_nothing():
    labels = jr.randint(jr.key(21), (150,), 0, 3)
    fit = classify_groups(POINTS, labels, jr.key(0))
    informed = classify_groups(POINTS, LABELS, jr.key(0))
    assert float(jnp.linalg.norm(fit.coefficients)) < 0.3 * float(jnp.linalg.norm(informed.coefficients))


@pytest.mark.parametrize(
    ("labels", "n_classes", "message"),
    [
        (LABELS[:4], 3, "labels: has shape"),
        (LABELS.astype(float), 3, "labels: has type float64; expected integers from 0 to 2"),
        (LABELS + 1, 3, "labels: from 1 to 3; expected from 0 to 2"),
        (jnp.zeros_like(LABELS), 3, "labels: all rows are of class 0; expected at least two classes"),
        (LABELS, 1, "n_classes: is 1; expected an integer of at least 2"),
    ],
)
def test_bad_labels_are_refused(labels, n_classes, message):
    with pytest.raises(ValueError, match=message):
        softmax_regression(POINTS, labels, n_classes, key=jr.key(0))
