"""Decompositions as MuData objects, and back through the reader."""

import sys

import numpy as np
import pytest
from test_decomposition import RANKS, N, decomposed, drawn

from hcl_jax.decomposition import fit, load
from hcl_jax.reading import read_views

mudata = pytest.importorskip("mudata")


@pytest.mark.filterwarnings("ignore")  # mudata's own, of versions to come
def test_views_scores_loadings_and_shares_go_to_a_file_and_come_back(tmp_path):
    frames, _, _ = drawn()
    frames = frames | {"meth": frames["meth"].iloc[20:]}  # not every patient has it
    got = fit(frames, ranks=RANKS)
    got.to_mudata().write(tmp_path / "fit.h5mu")
    again, read = read_views(tmp_path / "fit.h5mu"), got.data
    assert (again.names, again.feature_names, again.sample_names) == (read.names, read.feature_names, read.sample_names)
    for one, other in zip(again.matrices, read.matrices, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(
        fit(tmp_path / "fit.h5mu", ranks=RANKS).reading.loadings, got.reading.loadings, rtol=1e-12, atol=1e-14
    )
    whole = mudata.read_h5mu(tmp_path / "fit.h5mu")
    assert whole.mod["meth"].n_obs == N - 20
    order = [whole.obs_names.get_loc(name) for name in got.scores().index]
    np.testing.assert_array_equal(whole.obsm["hcl"][order], got.scores().to_numpy())
    assert list(whole.uns["hcl"]["scores"]) == list(got.score_names)
    seen = got.loadings("meth").set_index("feature")
    columns = [got.score_names.index(name) for name in seen.columns]
    np.testing.assert_array_equal(whole.mod["meth"].varm["hcl"][:, columns], seen.to_numpy())
    assert list(whole.mod["meth"].var_names) == list(seen.index)
    shares = whole.uns["hcl"]["variance_explained"]
    np.testing.assert_array_equal(shares["share"], got.variance_explained()["share"])
    assert list(shares["view"]) == list(got.variance_explained()["view"])
    assert list(whole.uns["hcl"]["structures"]["rank"]) == list(got.structures["rank"])


@pytest.mark.filterwarnings("ignore")
def test_other_samples_and_samples_without_names(tmp_path):
    frames, _, _ = drawn()
    decomposed().save(tmp_path / "fit.npz")
    loaded = load(tmp_path / "fit.npz")
    new = {name: frame.iloc[5:9].to_numpy() for name, frame in frames.items()}
    whole = loaded.to_mudata(new)
    assert list(whole.obs_names) == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(whole.obsm["hcl"], loaded.transform(new).to_numpy())
    with pytest.raises(ValueError, match="data: are not kept in a file"):
        loaded.to_mudata()


def test_what_it_needs_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "mudata", None)
    with pytest.raises(ValueError, match=r"to_mudata: needs the package mudata; expected it from pip install hcl_jax\[mudata\]"):
        decomposed().to_mudata()
