"""Views with what a decomposition found of them as one MuData object. Needs the extra `mudata`."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float

from hcl_jax.views import Views, presence_table

KEY = "hcl"
"""Of what is found, in obsm, varm and uns."""


def as_mudata(
    read: Views,
    scores: Float[np.ndarray, "n R"],
    score_names: Sequence[str],
    loadings: Sequence[Float[np.ndarray, "_ R"]],
    tables: Mapping[str, pl.DataFrame],
) -> Any:
    """One modality a view, of the samples that have it, with the view's `loadings` in varm["hcl"]; scores in obsm["hcl"],
    their names and the `tables` in uns["hcl"] of the whole. Samples without names are called 0, 1, …; those that lack all views
    are left out.

    Raises `ValueError` where mudata is not installed.
    """
    try:
        import anndata
        import mudata
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ValueError(f"to_mudata: needs the package {error.name}; expected it from pip install hcl_jax[mudata]") from None
    samples = np.array([str(name) for name in read.sample_names or range(read.n_samples)])
    held = {}
    parts = zip(read.names, read.matrices, read.feature_names, presence_table(read).T, loadings, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions to come
        for name, matrix, features, there, of_view in parts:
            obs, var = pd.DataFrame(index=pd.Index(samples[there])), pd.DataFrame(index=pd.Index(list(features)))
            held[name] = anndata.AnnData(X=np.asarray(matrix)[there], obs=obs, var=var, varm={KEY: np.asarray(of_view)})
        whole = mudata.MuData(held)
    place = {sample: row for row, sample in enumerate(samples)}
    whole.obsm[KEY] = scores[[place[name] for name in whole.obs_names]]
    frames = {name: pd.DataFrame(table.to_dict(as_series=False)) for name, table in tables.items()}
    whole.uns[KEY] = {"scores": np.array(score_names)} | {
        name: frame.set_axis(frame.index.astype(str)) for name, frame in frames.items()
    }
    return whole
