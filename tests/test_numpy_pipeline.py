"""The NumPy pipeline of the benchmarks against the stored outputs of the released code, and against truth by construction."""

import numpy as np
import pytest
from helpers import reference_arrays

from benchmarks import numpy_pipeline as pipeline

DTYPES = [np.float32, np.float64]


def load(name, dtype):
    arrays = reference_arrays(f"published_{name}")
    return {key: array.astype(dtype) if array.dtype.kind == "f" else array for key, array in arrays.items()}


@pytest.fixture(
    params=[(name, dtype) for name in ("small", "medium") for dtype in DTYPES], ids=lambda c: f"{c[0]}-{c[1].__name__}"
)
def published(request):
    return load(*request.param)


def denoised(published):
    S = published["sample_covariance"]
    return S - published["noise_variance"] * np.eye(len(S), dtype=S.dtype)


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def blocks(dims, rank):
    for m, rows in enumerate(pipeline.modality_rows(dims), start=1):
        yield from ((rows, pipeline.structure_columns(s, rank)) for s in pipeline.STRUCTURES if m in s)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_covariance_agrees(dtype):
    published = load("small", dtype)  # the only one stored with its data
    np.testing.assert_allclose(pipeline.sample_covariance(published["x"].copy()), published["sample_covariance"], atol=2e-6)


def test_noise_variance_agrees(published):
    K = 7 * int(published["rank"])
    assert pipeline.mean_small_eigenvalue(published["sample_covariance"], K) == pytest.approx(
        published["noise_variance"], rel=1e-5
    )


def test_initialiser_agrees_in_every_block(published):
    dims, rank = published["dims"].tolist(), int(published["rank"])
    loadings = pipeline.hcl_svd(denoised(published), dims, rank)
    for rows, columns in blocks(dims, rank):
        ours, theirs = loadings[rows, columns], published["hcl_svd"][rows, columns]
        assert relative(ours @ ours.T, theirs @ theirs.T) < 2e-5


def test_descent_from_the_stored_start_agrees(published):
    mask = pipeline.loading_mask(published["dims"].tolist(), int(published["rank"]), published["hcl_svd"].dtype)
    loadings, step = pipeline.hcl_grad(denoised(published), published["hcl_svd"], mask)
    assert step == 101
    assert loadings.dtype == mask.dtype
    assert relative(loadings, published["hcl_gd"]) < 2e-6


def test_descent_recovers_the_population_from_a_start_nearby():
    rng = np.random.default_rng(0)
    dims, rank = (12, 15, 18), 1
    truth = pipeline.draw_loadings(rng, dims, rank, np.dtype(float))
    mask = pipeline.loading_mask(dims, rank, truth.dtype)
    G = truth @ truth.T
    start = truth + 0.01 * mask * rng.standard_normal(truth.shape)
    step = 0.2 / np.linalg.eigvalsh(G)[-1]
    loadings, _, objective = pipeline.descend_to(G, start, mask, step, target=1e-12, max_steps=5_000)
    assert objective <= 1e-12
    assert relative(loadings @ loadings.T, G) < 1e-5


def test_lanczos_and_full_decomposition_agree(monkeypatch):
    rng = np.random.default_rng(1)
    A = np.diag(np.concatenate([[9.0, -7.0, 5.0], 0.1 * rng.standard_normal(57)]))
    full = pipeline.top_loading(A, 3)
    monkeypatch.setattr(pipeline, "LANCZOS_ABOVE", 10)
    lanczos = pipeline.top_loading(A, 3)
    np.testing.assert_allclose(lanczos @ lanczos.T, full @ full.T, atol=1e-10)
