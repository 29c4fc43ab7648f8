"""Joint and individual ranks of nonlinear views: AJIVE's second step on separate autoencoders' scores (arXiv 2507.19682)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Key

from hcl_jax.baselines.ajive import null_draws, signal_of
from hcl_jax.compiled import compiled
from hcl_jax.linalg import singular_values
from hcl_jax.networks.deepjive import DeepjiveConfig, fit
from hcl_jax.networks.network import split_views
from hcl_jax.structure import Hierarchy
from hcl_jax.views import as_key, as_views, check_count

DRAWS = 1000
"""Of random subspaces."""


class Ranks(NamedTuple):
    """What `choose_ranks` found."""

    joint: int
    individual: tuple[int, ...]
    squares: Float[np.ndarray, " t"]
    """Squared singular values of the views' bases side by side, between 0 and the number of views."""
    threshold: float
    """What they have to exceed."""

    def hierarchy(self, dims: Sequence[int]) -> Hierarchy:
        """A structure of all views, where there is one, and one for each."""
        everyone = tuple(range(1, len(dims) + 1))
        return Hierarchy(dims, {everyone: self.joint} | {(m,): rank for m, rank in enumerate(self.individual, start=1)})


def choose_ranks(
    views: Any, latents: Sequence[int], config: DeepjiveConfig | None = None, *, key: Any, percentile: float = 95.0
) -> Ranks:
    """Joint and individual ranks by AJIVE's second step on the scores of separate autoencoders.

    Autoencoder m has `latents[m]` = t_m codes; of the orthonormal bases of their scores the directions count as joint whose
    squared singular value exceeds that percentile of those of random subspaces; r_m = t_m − r_J, at least 1. Scores have no noise
    beside them, so that AJIVE's other threshold, Wedin's, does not apply.

    Raises `ValueError` for numbers of codes that are not positive or not one a view, a missing key, and what `fit` refuses.
    """
    read = as_views(views)
    if len(latents) != len(read.dims):
        raise ValueError(f"latents: are {len(latents)}; expected {len(read.dims)}, one a view")
    for t in latents:
        check_count(t, "latents", 1)
    k_fit, k_null = jr.split(as_key(key, "for the autoencoders and the random directions"))
    separate = Hierarchy(read.dims, {(m,): t for m, t in enumerate(latents, start=1)})
    fitted = fit(views, separate, config or DeepjiveConfig(), key=k_fit)
    scores = fitted.transform(views)
    squares, null = _common_squares(scores - scores.mean(axis=0, keepdims=True), tuple(latents), k_null)
    threshold = float(np.percentile(null, percentile))
    joint = min(int((np.asarray(squares) > threshold).sum()), min(latents))
    return Ranks(joint, tuple(max(t - joint, 1) for t in latents), np.asarray(squares), threshold)


@compiled
def _common_squares(scores: Float[Array, "n R"], latents: tuple[int, ...], key: Key[Array, ""]) -> tuple[Array, Array]:
    """(squared singular values of the bases side by side, of random ones the largest)."""
    signals = [signal_of(own, own.shape[1]) for own in split_views(scores, latents)]
    stacked = jnp.concatenate([signal.U for signal in signals], axis=1)
    squares = singular_values(stacked, sum(latents)) ** 2
    return squares, null_draws(signals, scores.shape[0], DRAWS, key)[0]
