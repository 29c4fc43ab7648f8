"""Outcomes of every kind, the regressions on scores that predict them, and the front door with survival times and subjects."""

import re
from dataclasses import replace
from functools import cache

import jax.random as jr
import numpy as np
import pandas as pd
import pytest
from test_decomposition import RANKS, N, drawn

import hcl_jax
from hcl_jax.assessment import folds_of
from hcl_jax.decomposition import fit, load
from hcl_jax.heads import fit_head, outcome_errors
from hcl_jax.outcomes import Outcome, as_outcome, repeated, survival
from hcl_jax.prediction import concordance, cox_regression, random_intercept


def scores_and_times(n: int, K: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(scores, times of which the first score sets the hazard, whether the event was seen)."""
    generator = np.random.default_rng(7)
    scores = generator.normal(size=(n, K)) @ np.diag(np.arange(1, K + 1)) + 5
    died = generator.exponential(size=n) * np.exp(-1.5 * scores[:, 0])
    left = generator.exponential(size=n) * np.exp(-7)
    return scores, np.minimum(died, left), died <= left


@cache
def timed() -> tuple[pd.Series, pd.Series, pd.Series]:
    """(months until an event whose hazard the first shared factor drives, whether it was seen, another patient a visit)."""
    _, number, _ = drawn()
    generator = np.random.default_rng(5)
    died = generator.exponential(size=N) * np.exp(-1.5 * number)
    left = pd.Series(2 * generator.exponential(size=N), index=number.index)
    months = pd.Series(np.minimum(died, left), index=number.index, name="months")
    return months, died <= left, pd.Series(generator.integers(0, 25, N), index=number.index)


@cache
def of_survival():
    frames, _, _ = drawn()
    months, event, _ = timed()
    return fit(frames, y=survival(months[::-1], event), ranks=RANKS)


def test_survival_times_are_predicted_by_cox_regression():
    scores, times, events = scores_and_times(128)  # a size that is not padded
    outcome = as_outcome(survival(times, events), 128)
    head = fit_head(scores, outcome, jr.key(3))
    scaled = (scores - scores.mean(axis=0)) / scores.std(axis=0)
    direct = cox_regression(scaled, times, events, choose="cv", key=jr.key(3))
    said = head.predict(scores)
    np.testing.assert_allclose(said - said[0], np.asarray(direct.log_hazard(scaled) - direct.log_hazard(scaled)[0]), rtol=1e-9)
    assert abs(said.mean()) < 1e-9
    found = outcome_errors(outcome, head, scores)
    assert found == {"concordance": pytest.approx(float(concordance(said, times, events).estimate), abs=1e-12)}
    assert 0.75 < found["concordance"] < 1


def test_rows_that_pad_count_for_nothing():
    scores, times, events = scores_and_times(120)
    head = fit_head(scores, as_outcome(survival(times, events), 120), jr.key(3))
    scaled = (scores - scores.mean(axis=0)) / scores.std(axis=0)
    free = cox_regression(scaled, times, events)
    direct = cox_regression(scaled, times, events, choose="cv", key=jr.key(3))
    got = head.coefficients[:, 0] * scores.std(axis=0)
    assert np.linalg.norm(got) < np.linalg.norm(free.coefficients)  # the penalty draws them to 0
    errors = np.sqrt(np.diagonal(direct.covariance))
    assert (np.abs(got - np.asarray(direct.coefficients)) < errors).all()  # other folds, another penalty
    extra = np.r_[times, [times.min() / 2] * 8], np.r_[events, [False] * 8]
    padded = cox_regression(np.concatenate([scaled, np.zeros((8, 3))]), *extra, penalty=2.0)
    np.testing.assert_allclose(padded.coefficients, cox_regression(scaled, times, events, penalty=2.0).coefficients, rtol=1e-8)


def test_repeated_measurements_are_predicted_with_an_intercept_by_subject():
    generator = np.random.default_rng(1)
    scores, subjects = generator.normal(size=(90, 3)) + 2, generator.integers(0, 12, 90)
    values = scores[:, 0] + 3 * generator.normal(size=12)[subjects] + 0.2 * generator.normal(size=90)
    outcome = as_outcome(repeated(values, [f"subject {s}" for s in subjects]), 90)
    assert outcome.kind == "repeated"
    head = fit_head(scores, outcome, jr.key(0))
    direct = random_intercept(scores, values, subjects)
    np.testing.assert_allclose(head.coefficients[:, 0], np.asarray(direct.coefficients), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(head.predict(scores), np.asarray(direct.predict(scores)), rtol=1e-6)
    plain = fit_head(scores, Outcome(values, outcome.known), jr.key(0))
    assert abs(head.coefficients[0, 0] - 1) < abs(plain.coefficients[0, 0] - 1)  # the intercepts are most of its noise
    many = generator.normal(size=(90, 60))
    assert np.isfinite(fit_head(many, outcome, jr.key(0)).predict(many)).all()  # more than rows can bear without a penalty


def test_folds_keep_subjects_together_and_share_the_events():
    _, event, subject = timed()
    months = timed()[0]
    fold = folds_of(N, as_outcome(repeated(months, subject), N), 5, jr.key(0))
    assert all(len(set(fold[subject == s])) == 1 for s in set(subject))
    assert np.ptp(np.bincount(fold)) <= 3
    outcome = as_outcome(survival(months, event), N)
    assert np.ptp(np.bincount(folds_of(N, outcome, 7, jr.key(0)), weights=outcome.events)) <= 1
    with pytest.raises(ValueError, match="cv: is 30, of 25 subjects; expected at most as many folds"):
        folds_of(N, as_outcome(repeated(months, subject), N), 30, jr.key(0))
    few = replace(outcome, events=np.arange(N) < 5)
    with pytest.raises(ValueError, match="cv: is 6, of 5 events; expected at most as many folds"):
        folds_of(N, few, 6, jr.key(0))


def test_samples_of_which_something_is_missing_are_unknown():
    months, event, _ = timed()
    outcome = as_outcome(survival(months.iloc[:100], event.iloc[20:]), N, list(months.index))
    np.testing.assert_array_equal(np.flatnonzero(outcome.known), np.arange(20, 100))
    np.testing.assert_array_equal(outcome.values[20:100], months.iloc[20:100])
    assert (outcome.kind, outcome.name) == ("survival", "months")
    assert as_outcome(survival(list(range(1, 9)), [1, 0] * 3 + [1, 1]), 8).events.tolist() == [True, False] * 3 + [True, True]


GOOD = {"time": np.arange(1.0, N + 1), "event": np.arange(N) % 2 == 0}
OF = {"values": np.arange(float(N)), "subject": np.arange(N) // 3}
BAD = [
    ({"time": np.arange(N)}, "time: holds 0; expected times above 0"),
    ({"time": -GOOD["time"]}, "time: holds -120; expected times above 0"),
    ({"time": np.r_[np.inf, GOOD["time"][1:]]}, "time: holds infinite values in 1 of 120 samples"),
    ({"time": ["soon"] * N}, "time: has type"),
    ({"time": GOOD["time"][1:]}, "time: has shape (119,); expected (120,), one value for each sample"),
    ({"time": None}, "time: is None; expected an outcome"),
    ({"time": {"someone": 1.0}}, "time: names none of the samples; expected names such as 'patient 0'"),
    ({"event": np.arange(N)}, "event: holds 2; expected True (the event) or False"),
    ({"event": ["yes", "no"] * 60}, "event: holds 'yes'; expected True (the event) or False"),
    ({"event": np.zeros(N, bool)}, "event: has 0 events in 120 samples; expected at least 5"),
    ({"event": [None] * (N - 3) + [True] * 3}, "y: has 3 known values of 120; expected at least 5"),
    ({"values": ["high"] * N}, "values: has type"),
    ({"values": np.ones(N)}, "values: is 1.0 in all samples; expected values that differ"),
    ({"subject": np.zeros(N)}, "subject: is 0.0 in all samples; expected at least two subjects"),
    ({"subject": np.arange(N)}, "subject: is another one in every sample; expected at least two subjects"),
]


@pytest.mark.parametrize(("given", "said"), BAD, ids=[said[:30] for _, said in BAD])
def test_what_cannot_be_is_said_before_anything_is_computed(given, said):
    y = survival(**GOOD | given) if next(iter(given)) in GOOD else repeated(**OF | given)
    with pytest.raises(ValueError, match=re.escape(said)):
        fit(drawn()[0], y=y, ranks=RANKS)


def test_supervised_regressions_take_no_survival_times():
    with pytest.raises(ValueError, match="y: are survival times; expected numbers or two classes, as sjive is a regression"):
        fit(drawn()[0], y=survival(**GOOD), ranks=RANKS, method="sjive")


def test_the_front_door_names_them():
    assert (hcl_jax.survival, hcl_jax.repeated) == (survival, repeated)


@pytest.mark.slow
def test_hazards_are_predicted_for_samples_that_were_not_seen(tmp_path):
    frames, number, _ = drawn()
    got = of_survival()
    hazard = got.predict(frames)
    assert np.corrcoef(hazard, number)[0, 1] > 0.95  # as the hazard rises with the factor
    seen = got.evaluate(3)
    held = {row["method"]: row for row in seen.outcome.iter_rows(named=True)}
    assert set(held) == {"hcl_jax", "pca", "features"}
    assert {row["metric"] for row in held.values()} == {"concordance"}
    best = float(concordance(number, *timed()[:2]).estimate)
    assert best - 0.06 < held["hcl_jax"]["mean"] < best + 0.03
    assert seen.structures["structure"][0] == "rna+meth+mirna"
    assert seen.structures["drop"][0] > 0.15
    assert len(seen.predictions) == N
    got.save(tmp_path / "fit.npz")
    again = load(tmp_path / "fit.npz")
    np.testing.assert_array_equal(again.predict(frames), hazard)
    assert (again.head.kind, again.outcome_name) == ("survival", "months")
    with pytest.raises(ValueError, match="head: is of kind 'survival'; expected classes for probabilities"):
        again.predict_probabilities(frames)


def test_nothing_is_predicted_where_the_hazard_has_nothing_to_do_with_the_views():
    frames, number, _ = drawn()
    generator = np.random.default_rng(11)
    y = survival(generator.exponential(size=N), generator.random(N) < 0.7)
    seen = fit(frames, y=y, ranks=RANKS).evaluate(3)
    assert all(abs(mean - 0.5) < 0.12 for mean in seen.outcome["mean"])


@pytest.mark.slow
def test_visits_of_subjects_that_were_not_seen(tmp_path):
    frames, number, _ = drawn()
    subject = timed()[2]
    values = number + 2 * pd.Series(np.random.default_rng(2).normal(size=25)).reindex(subject).to_numpy()
    got = fit(frames, y=repeated(values, subject), ranks=RANKS)
    direct = random_intercept(got.score_matrix(got.data), values.to_numpy(), subject.to_numpy())
    np.testing.assert_allclose(got.predict(frames), np.asarray(direct.predict(got.score_matrix(got.data))), rtol=1e-6, atol=1e-8)
    seen = got.evaluate(3)
    assert set(seen.outcome["metric"]) == {"r_squared", "rmse"}
    assert seen.structures["structure"][0] == "rna+meth+mirna"
    got.save(tmp_path / "fit.npz")
    assert load(tmp_path / "fit.npz").head.kind == "repeated"
