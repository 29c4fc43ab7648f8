"""One boundary for data of every kind: the same numbers whatever holds them, and refusals that name what is wrong."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pandas as pd
import polars as pl
import pytest

from hcl_jax.views import as_key, as_labels, as_response, as_views, by_feature, centred, standardise, view_norms

A, B = np.arange(12.0).reshape(4, 3), np.array([[1.0], [0.0], [2.0], [5.0]])
NAMES = ("s3", "s1", "s4", "s2")


def frame(values, columns, index=None):
    return pd.DataFrame(values, columns=list(columns), index=index)


def forms():
    """The same two views, held in every way."""
    masked = np.ma.MaskedArray(A, mask=np.zeros(A.shape, bool))
    objects = np.array([[int(x) for x in row] for row in A], dtype=object)
    return {
        "arrays": [A, B],
        "tuple": (A, B),
        "generator": (view for view in (A, B)),
        "lists of lists": [A.tolist(), B.tolist()],
        "integers": [A.astype(np.int16), B.astype(np.uint8)],
        "half": [A.astype(np.float16), B.astype(np.float16)],
        "big-endian": [A.astype(">f8"), B.astype(">i4")],
        "jax": [jnp.asarray(A), jnp.asarray(B, jnp.float32)],
        "jax integers": [jnp.asarray(A, int), jnp.asarray(B, jnp.bfloat16)],
        "masked": [masked, B],
        "objects": [objects, B.astype(object)],
        "dictionary": {"view 1": A, "view 2": B},
        "polars": [pl.DataFrame(A), pl.DataFrame(B)],
        "pandas": [frame(A, ("a", "b", "c")), frame(B, ("z",))],
        "views": as_views([A, B]),
    }


@pytest.mark.parametrize("form", forms())
def test_the_same_views_whatever_holds_them(form):
    views = as_views(forms()[form])
    assert views.names == ("view 1", "view 2")
    assert views.dims == (3, 1)
    assert views.n_samples == 4
    assert all(matrix.dtype in (np.float32, np.float64) and np.dtype(matrix.dtype).isnative for matrix in views.matrices)
    np.testing.assert_array_equal(views.stacked(), np.concatenate([A, B], axis=1))


@pytest.mark.parametrize("one", [A, A.tolist(), jnp.asarray(A), pl.DataFrame(A), [A]], ids=lambda one: type(one).__name__)
def test_one_matrix_is_one_view(one):
    views = as_views(one, names=["alone"])
    assert views.names == ("alone",)
    np.testing.assert_array_equal(views.matrices[0], A)


def test_samples_are_aligned_by_name():
    order = [1, 3, 0, 2]
    named = [NAMES[i] for i in order]
    text = pl.DataFrame({"sample": named, "z": B[order, 0]})
    views = as_views({"a": frame(A, ("u", "v", "w"), NAMES), "b": text})
    assert views.sample_names == NAMES
    assert views.feature_names == (("u", "v", "w"), ("z",))
    np.testing.assert_array_equal(views.matrices[1], B)
    y = as_response(pd.Series(A[order, 1], named), 4, samples=views.sample_names)
    np.testing.assert_array_equal(y, A[:, 1])
    same_order = as_views([frame(A, ("u", "v", "w"), NAMES), B])  # no names: in the order that the others share
    np.testing.assert_array_equal(same_order.matrices[1], B)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "views: is None; expected matrices"),
        ("rna.csv", "views: is 'rna.csv'"),
        (3, "views: is 3"),
        ([], "views: are none; expected at least one"),
        ({}, "views: are none"),
        ([A[:, 0]], r"views: view 1 has shape \(4,\); expected a matrix, samples × features"),
        (np.zeros((2, 4, 3)), r"views: view 1 has shape \(2, 4, 3\)"),
        ([A, A[:, :0]], r"views: view 2 has shape \(4, 0\); expected at least one sample and one feature"),
        ([A[:0]], r"views: view 1 has shape \(0, 3\)"),
        ([A, B[:3]], r"views: view 2 has shape \(3, 1\); expected 4 rows, as view 1 has"),
        ([A, B + 1j], "views: view 2 has type complex128"),
        ([jnp.asarray(A + 0j)], "views: view 1 has type complex128"),
        ([A, [["high"], ["low"], ["high"], ["low"]]], "views: view 2 has type <U4, such as .*high.*; expected real numbers"),
        ({"rna": A, "dna": [[1], [None], [2], [3]]}, "views: view 'dna' holds NaN or infinite values in 1 of 4 cells"),
        ([np.array([[1, "low"], [2, 3]], dtype=object)], "views: view 1 holds 'low'; expected real numbers"),
        ([np.array([[1, 2j], [2, 3]], dtype=object)], "views: view 1 holds 2j; expected real numbers"),
        ([np.where(A > 9, np.nan, A), B], "views: view 1 holds NaN or infinite values in 2 of 12 cells; expected finite"),
        ([np.where(A > 9, np.inf, A), B], "views: view 1 holds NaN or infinite values in 2 of 12 cells"),
        ([np.ma.MaskedArray(A, mask=A < 1)], "views: view 1 holds NaN or infinite values in 1 of 12 cells"),
        ([pl.DataFrame({"a": [1, None]})], "views: view 1 holds NaN or infinite values in 1 of 2 cells"),
        ([pl.DataFrame({"a": [1, 2], "b": ["x", "y"]})], "views: view 1 holds 'x' in row 1 of column 'b'; expected"),
        ([pl.DataFrame({"s": ["x", "x"], "b": [1, 2]})], "views: view 1 samples 'x' occur more than once"),
        ([frame(A, ("a", "b", "a"))], "views: view 1 features 'a' occur more than once; expected each once"),
        ([[[1, 2], [3]]], "views: view 1 cannot be read as numbers"),
        ([np.array(["2020-01-01"], "M8[D]")[:, None]], "views: view 1 has type datetime64"),
        ([jr.split(jr.key(0), (2, 2))], "views: view 1 has type key"),
        (
            {"a": frame(A, "abc", NAMES), "b": frame(B, "z", ("s1", "s2", "s3", "s9"))},
            "views: view 'b' lacks 's4' and has 's9' beside them; expected the samples of view 'a'",
        ),
        (
            [frame(A, "abc", NAMES), frame(B, "z", NAMES[::-1]), B],
            "views: view 3 has no names of samples; expected some, as the others have them in unlike orders",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(data, message):
    with pytest.raises(ValueError, match=message) as refusal:
        as_views(data)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("names", [["a"], ["a", "a"], "ab"])
def test_names_of_views_are_checked(names):
    with pytest.raises(ValueError, match="names: "):
        as_views([A, B], names=names)


def test_compiled_code_looks_at_shapes_only():
    def total(a, b):
        return as_views([a, b]).stacked().sum()

    assert float(jax.jit(total)(jnp.asarray(A), jnp.asarray(B, int))) == A.sum() + B.sum()
    assert float(jax.vmap(total)(jnp.asarray(A)[None], jnp.asarray(B)[None])[0]) == A.sum() + B.sum()
    with pytest.raises(ValueError, match="expected 4 rows"):
        jax.jit(total)(jnp.asarray(A), jnp.asarray(B)[:3])
    with pytest.raises(ValueError, match="complex"):
        jax.jit(total)(jnp.asarray(A), jnp.asarray(B) + 1j)


def test_responses_labels_keys_and_noise():
    assert as_response([1, 2, 3, 4], 4).dtype == jnp.float64
    for wrong in (None, B, [1, 2], ["a"] * 4, [1, 2, None, 4], 1j * A[:, 0]):
        with pytest.raises(ValueError, match="y: "):
            as_response(wrong, 4)
    assert as_labels([0, 1, 1], 3, 2).tolist() == [0, 1, 1]
    for wrong in (None, [0, 1], [0.0, 1.0, 1.0], [0, 1, 2], [-1, 0, 1], [1, 1, 1], ["a", "b", "a"]):
        with pytest.raises(ValueError, match="labels: "):
            as_labels(wrong, 3, 2)
    assert (jr.key_data(as_key(jr.PRNGKey(3), "")) == jr.key_data(as_key(jr.key(3), ""))).all()
    for wrong in (None, 0, np.uint32([0, 1]), jr.split(jr.key(0)), jnp.zeros(2), "seed"):
        with pytest.raises(ValueError, match=r"key: is .*expected a random key such as jax.random.key\(0\), for the folds"):
            as_key(wrong, "for the folds")
    assert by_feature(0.5, 3, float).tolist() == [0.5] * 3
    for wrong in ([1, 2], -1.0, [[1.0]], None, "low", np.nan):
        with pytest.raises(ValueError, match="noise_variance: "):
            by_feature(wrong, 3, float)


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["numpy", "jax"])
def test_constant_is_what_varies_by_rounding_of_the_mean(run):
    rng = np.random.default_rng(0)
    z = rng.standard_normal(999)
    X = np.stack([np.full(999, 14.62), 1e-160 * z, 1e160 * z, 1e9 + 1e-3 * z, np.zeros(999), z], axis=1)
    Z, centre, deviation = (np.asarray(x) for x in run(centred)(X))
    assert (deviation[[0, 4]] == 0).all()
    assert (Z[:, [0, 4]] == 0).all()
    np.testing.assert_allclose(deviation[[1, 2, 3, 5]] / (1e-160, 1e160, 1e-3, 1), z.std(ddof=1), rtol=1e-4)
    np.testing.assert_allclose(centre[3], 1e9)
    new = X + 7.0
    found = np.asarray(run(standardise)(X, new))
    assert (found[:, [0, 4]] == 0).all()
    assert np.isfinite(found).all()
    np.testing.assert_allclose(run(standardise)(X, X)[:, 1], (z - z.mean()) / z.std(ddof=1), atol=1e-12)


def test_single_precision_far_from_zero():
    x = (1e6 + np.random.default_rng(0).standard_normal((4000, 1))).astype(np.float32)
    _, _, deviation = jax.jit(centred)(x)
    np.testing.assert_allclose(deviation, x.astype(float).std(axis=0, ddof=1), rtol=1e-4)


def test_rows_that_do_not_count_are_not_seen():
    X, kept = jnp.asarray(A), jnp.array([True, False, True, True])
    Z, centre, deviation = jax.jit(centred)(X.at[1].set(1e6), kept)
    np.testing.assert_allclose(centre, A[[0, 2, 3]].mean(axis=0))
    np.testing.assert_allclose(deviation, A[[0, 2, 3]].std(axis=0, ddof=1))
    assert (Z[1] == 0).all()


def test_norms_of_views_in_any_units():
    program = jax.jit(view_norms, static_argnums=1)
    X = np.random.default_rng(0).standard_normal((8, 5)) * (1, 1, 1, 1, 0)
    for units in (1e-160, 1.0, 1e160):
        found = np.asarray(program(X * units, (3, 1, 1)))
        np.testing.assert_allclose(found[[0, 2]] / units, np.linalg.norm(X[:, :3]), rtol=1e-12)
        assert found[4] == 1
