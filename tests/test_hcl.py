"""Nonlinear HCL: whitening, axes, scores; and what it recovers."""

import dataclasses

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers import assert_at_least, assert_at_most, assert_close, assert_within, relative

from hcl_jax import ESTIMATORS, Hierarchy, SampleCovariance
from hcl_jax.experiments.nonlinear import DrawSpec, draw, score_metrics
from hcl_jax.linalg import inverse_root
from hcl_jax.networks import TrainingConfig, hcl
from hcl_jax.networks.evidence import called_absent
from hcl_jax.views import standardise

DOUBLE = TrainingConfig(dtype="float64")
H = Hierarchy((12, 10, 8), {"123": 2, "12": 1, "1": 1, "2": 2, "3": 1})


def test_newton_reaches_the_symmetric_root():
    A = jr.normal(jr.key(0), (40, 8))
    C = A.T @ A / 40
    assert_close(hcl.newton_inverse_root(C), inverse_root(C)[0], "C^(-1/2)", slack=1e12)  # the ridge of 1e-5


def test_whitened_coordinates_are_uncorrelated_and_near_the_raw_ones():
    raw = jr.normal(jr.key(0), (500, 6)) @ (jnp.eye(6) + 0.1 * jr.normal(jr.key(1), (6, 6))) + 3.0
    h = hcl.whiten(raw)
    np.testing.assert_allclose(h.T @ h / 500, jnp.eye(6), atol=1e-4)
    assert float(jnp.diag(jnp.corrcoef(h, raw, rowvar=False)[:6, 6:]).min()) > 0.95


@pytest.mark.parametrize("correlations", [(0.9, 0.6), (0.95, 0.8, 0.5)])
def test_shared_axes_find_how_well_each_modality_knows_the_factor(correlations):
    n, r = 100_000, 2
    z = jr.normal(jr.key(0), (n, r)) * jnp.ones((1, r))
    mixing = jnp.linalg.qr(jr.normal(jr.key(2), (r, r)))[0]
    strength = jnp.array([1.0, 0.7])  # of the two factors, so that their axes can be told apart
    blocks = []
    for m, c in enumerate(correlations):
        a = c * strength
        blocks.append((a[None, :] * z + jnp.sqrt(1 - a**2)[None, :] * jr.normal(jr.key(10 + m), (n, r))) @ mixing.T)
    Q, a = hcl.shared_axes(blocks)
    np.testing.assert_allclose(jnp.abs(Q.T @ mixing), jnp.eye(r)[::-1], atol=0.03)
    if len(correlations) > 2:  # of two, only the product is known
        for m, c in enumerate(correlations):
            assert_within(a[m, 1], c, 0.02, f"reliability of modality {m + 1}")
    else:
        assert_within(a[0, 1] * a[1, 1], correlations[0] * correlations[1], 0.02, "product of the reliabilities")


def views_of(link, n, hierarchy=H, seed=0):
    spec = DrawSpec(hierarchy, "float64", n, link, "gaussian")
    drawn = draw(spec, (np.uint32(0), np.uint32(seed), jnp.asarray(0.09)), jnp.uint32(0))
    views = [drawn.x[:, hierarchy.rows(m)] for m in hierarchy.modalities]
    return views, drawn.z


@pytest.mark.slow
@pytest.mark.long
def test_scores_are_posterior_means_under_the_learned_correlations():
    views, _ = views_of("leaky", 300)
    fitted = hcl.fit(views, H, hcl.HclConfig(training=TrainingConfig(steps=0)), key=jr.key(0))
    network = fitted.network
    rotated = [
        h @ network.rotation[np.ix_(c, c)]
        for h, c in zip(
            network.whitened(tuple(v for v in _standardised(fitted, views))),
            [H.active_columns(m) for m in H.modalities],
            strict=True,
        )
    ]
    k = H.columns("12").start
    a = np.asarray(network.reliability[:2, k], float)
    own = np.stack([np.asarray(rotated[m][:, list(H.active_columns(m + 1)).index(k)], float) for m in range(2)], axis=1)
    covariance = np.outer(a, a) + np.diag(1 - a**2)
    np.testing.assert_allclose(fitted.transform(views)[:, k], own @ np.linalg.solve(covariance, a), rtol=1e-4, atol=1e-4)
    alone = fitted.transform(views, jnp.zeros((300 + 2000, 3), bool).at[:, 0].set(True))
    np.testing.assert_allclose(alone[:, k], a[0] * own[:, 0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(alone[:, H.columns("3")], 0)


def _standardised(fitted, views):
    X = fitted.marginals(jnp.concatenate(views, axis=1)).astype(jnp.float32)
    return jnp.split(X, np.cumsum(H.dims)[:-1], axis=1)


@pytest.mark.slow
def test_linear_encoders_and_the_linear_loss_are_the_masked_approximation():
    """Eq. (2), full batch: the Gram matrix of hcl-gn, whose noise variance is given."""
    hierarchy = Hierarchy((8, 7, 6), {"123": 1, "12": 1, "3": 1})
    views, _ = views_of("identity", 400, hierarchy)
    train = [view[:400] for view in views]
    X = jnp.concatenate(train, axis=1)
    S = SampleCovariance.from_data(standardise(X, X))
    exact = ESTIMATORS["hcl-gn"](S, hierarchy)
    training = TrainingConfig(
        steps=1500, batch_size=400, learning_rate=0.02, weight_decay=0.0, held_out=0.0, round_steps=100, dtype="float64"
    )
    config = hcl.HclConfig(
        training=training,
        inputs="standardised",
        encoder="linear",
        loss="linear",
        whiten=False,
        noise_variance=float(exact.noise_variance),
    )
    fitted = hcl.fit(train, hierarchy, config, key=jr.key(0))
    F = hcl.linear_map(fitted.network)
    assert_at_most(relative(F @ F.T, exact.loadings @ exact.loadings.T), 1e-3, "Gram matrix of linear encoders beside hcl-gn")


@pytest.mark.parametrize("similarity", ["distance", "gaussian", "inner", "cosine", "bilinear"])
@pytest.mark.parametrize("form", ["pairwise", "softmax"])
def test_contrasts_are_their_formulas(form, similarity):
    weights = (1.0, 2.0, 1.0, 0.5, 1.0)
    config = hcl.HclConfig(loss=form, similarity=similarity, structure_weights=weights, temperature=0.7, training=DOUBLE)
    network = hcl.build(jr.key(0), H, config)
    h = [jr.normal(jr.key(m), (9, len(H.active_columns(m)))) for m in H.modalities]

    def ell(s, m, other):
        a, b = (np.asarray(h[k - 1][:, np.isin(H.active_columns(k), np.arange(H.n_factors)[H.columns(s)])]) for k in (m, other))
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None, :]
        lengths = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None, :]
        return {
            "distance": a @ b.T - squares / 2,
            "gaussian": (0.9 * a @ b.T - 0.81 * squares / 2) / 0.19,
            "cosine": a @ b.T / lengths,
        }.get(similarity, a @ b.T)

    def softmax(phi):
        return np.mean(np.log(np.exp(phi / 0.7).sum(axis=1)) - np.diag(phi) / 0.7)

    weight_of = dict(zip(H.structures, weights, strict=True))
    if form == "pairwise":
        expected = 0.0
        for m, other in [(1, 2), (1, 3), (2, 3)]:
            phi = sum(weight_of[s] * ell(s, m, other) for s in H.structures if {m, other} <= set(s))
            expected += (softmax(phi) + softmax(phi.T)) / 2
        found = sum(hcl._pair_contrast(network, h, m, other, config) for m, other in [(1, 2), (1, 3), (2, 3)])
    else:
        phi = sum(weight_of[s] * ell(s, m, other) for s in H.structures for m in s for other in s)
        expected, found = softmax(phi), hcl._joint_contrast(network, h, config)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_training_beats_the_linear_start_on_a_link_that_mixes_features():
    views, z = views_of("leaky", 1500)
    train = [view[:1500] for view in views]
    config = hcl.HclConfig(training=dataclasses.replace(hcl.HclConfig().training, batch_size=256, steps=200))
    held = {}
    for name, steps in (("start", 0), ("trained", 200)):
        own = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=steps))
        fitted = hcl.fit(train, H, own, key=jr.key(1))
        held[name] = score_metrics(fitted.transform(views), fitted.membership, z, H, 1500)
    gain = held["trained"]["r_squared"].mean() - held["start"]["r_squared"].mean()
    assert_at_least(gain, 0.01, "R² of all structures, beside the linear start's")
    assert_at_most(held["trained"]["leak"], 0.02, "leak")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("n_classes", [None, 3])
def test_the_supervised_head_starts_at_a_linear_prediction(n_classes):
    """A fit of no steps predicts as a ridge regression on its encoders' outputs does."""
    views, z = views_of("identity", 800)
    signal = z @ jr.normal(jr.key(3), (z.shape[1],))
    classes = jnp.searchsorted(jnp.quantile(signal, jnp.array([1 / 3, 2 / 3])), signal).astype(jnp.int32)
    y = signal + 0.3 * jr.normal(jr.key(4), signal.shape) if n_classes is None else classes
    training = TrainingConfig(steps=0, dtype="float64")
    fitted = hcl.fit([v[:600] for v in views], H, hcl.HclConfig(training=training, n_classes=n_classes), y=y[:600], key=jr.key(0))
    predicted = fitted.predict([v[600:] for v in views])
    if n_classes is None:
        assert_at_least(1 - jnp.mean((predicted - y[600:]) ** 2) / jnp.var(y), 0.8, "R² of new rows")
    else:
        assert_at_least(np.mean(np.asarray(predicted).argmax(axis=1) == np.asarray(y[600:])), 0.65, "accuracy on new rows")


def test_structures_are_absent_beside_the_others_or_by_what_explains_them():
    """Correlations near those that were met with structure 123, and 12, offered and absent."""
    called = lambda correlation, explained: called_absent(jnp.array(correlation), jnp.array(explained)).tolist()
    assert called([0.62, 0.94, 0.93, 0.94], [0.03, -0.05, -0.05, -0.04]) == [True, False, False, False]
    assert called([0.94, 0.82, 0.93, 0.94], [-0.05, 0.45, -0.05, -0.04]) == [False, True, False, False]
    assert called([0.5, 0.45, 0.55, 0.5], [-0.05, 0.0, -0.05, 0.1]) == [False] * 4  # noise that all of them share
    assert called([0.2], [0.0]) == [True]
