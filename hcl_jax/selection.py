"""Which structures and ranks the data support, read off a variational posterior (theory: Section 3)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hcl_jax.compiled import compiled
from hcl_jax.covariance import SampleCovariance
from hcl_jax.estimators.variational import Posterior, fit_posterior
from hcl_jax.fisher import pool
from hcl_jax.structure import Hierarchy, Structure


class Evidence(NamedTuple):
    """Log posterior odds of presence against absence, in nats at even prior odds: of every column, and of its block in every
    modality given that it is there."""

    columns: Float[Array, " K"]
    blocks: Float[Array, "M K"]


@compiled
def evidence(posterior: Posterior, covariance: SampleCovariance, hierarchy: Hierarchy) -> Evidence:
    """By how much the bound falls when a block, or a column with its scores, is taken out and the rest stays.

    A block alone, given the scores: ½ Σ_j [E[λ_jk]²/C_jkk + log(α_k C_jkk)], the marginal likelihood of the block's regressions
    with the prior over that without. A column: the sum of its blocks less what its scores cost, (ν/2)(Ω_kk − 1 + log (C_z⁻¹)_kk),
    their divergence from the prior. What the rest would gain by adapting is left out, so presence is favoured a little.
    """
    variances = posterior.variances(hierarchy)
    kept = variances > 0
    held = jnp.where(kept, variances, 1)
    prior = jnp.diagonal(posterior.prior, axis1=1, axis2=2)
    alpha = jnp.repeat(1 / jnp.where(prior > 0, prior, 1), np.array(hierarchy.dims), axis=0, total_repeat_length=len(variances))
    gains = jnp.where(kept, posterior.mean**2 / held + jnp.log(held * alpha), 0)
    blocks = pool(gains, hierarchy, "view") / 2
    scores = posterior.scores(covariance, hierarchy)
    cost = covariance.nu / 2 * (jnp.diagonal(scores.omega) - 1 + jnp.log(jnp.diagonal(scores.precision)))
    return Evidence(blocks.sum(axis=0) - cost, blocks)


def found_columns(odds: Evidence, hierarchy: Hierarchy) -> dict[Structure, list[int]]:
    """The columns that the data support, by the structure of the modalities in which they do: the ranks and structures that
    `hcl-vb` finds when it is given more than there are.

    A block, and a column, counts where its posterior odds exceed the number of those offered: at the prior odds that leave one
    of them to chance, presence is then the more probable.
    """
    columns, blocks = np.asarray(odds.columns), np.asarray(odds.blocks)
    seen = (blocks > np.log(hierarchy.modality_mask.sum())) & (columns > np.log(hierarchy.n_factors))[None, :]
    found: dict[Structure, list[int]] = {}
    for column in np.flatnonzero(seen.any(axis=0)):
        structure = tuple(int(m) + 1 for m in np.flatnonzero(seen[:, column]))
        found.setdefault(structure, []).append(int(column))
    return found


def select(covariance: SampleCovariance, hierarchy: Hierarchy, *, noise: str = "feature") -> Hierarchy:
    """The structures and ranks that data support, of those that a generous hierarchy offers: `found_columns` of `hcl-vb`.

    `noise`: that of a feature is its own, unless it is known to be that of its view or of all: standardising a view with few
    features makes their noise differ, and with one variance a view the posterior then makes private columns of the difference.
    Raises `ValueError` when no column stands out, and where `hcl_vb` does.
    """
    posterior, _ = fit_posterior(covariance, hierarchy, noise=noise)
    found = found_columns(evidence(posterior, covariance, hierarchy), hierarchy)
    if not found:
        raise ValueError(f"covariance: supports none of the {hierarchy.n_factors} columns offered; expected a visible factor")
    return Hierarchy(hierarchy.dims, {s: len(columns) for s, columns in found.items()})
