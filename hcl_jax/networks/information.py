"""Mutual information of two arrays, bounded by a critic that is trained on their rows."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, Key

from hcl_jax.compiled import compiled
from hcl_jax.networks.independence import classifier_information, classifier_log_likelihood, club, two_way_info_nce
from hcl_jax.networks.modules import CRITICS, Concatenated, Separable, redrawn
from hcl_jax.networks.network import check_widths
from hcl_jax.networks.training import Batch, TrainingConfig, held_out_rows, join_numbers, split_numbers, train_network
from hcl_jax.views import as_key, centre_and_scale, check_options


@dataclass(frozen=True)
class InformationConfig:
    """How the critic is trained, and of what batches bounds are taken: `training.batch_size` is N.

    objective: the critic learns by InfoNCE ("nce"), or tells true pairs from all others ("classifier", Tsai et al. 2020).
    critic: "separable" or "concatenated"; the second takes N² passes of its network a batch.
    hidden: widths of its hidden layers.
    """

    training: TrainingConfig = TrainingConfig(weight_decay=0.0, patience=1000)
    objective: Literal["nce", "classifier"] = "nce"
    critic: Literal["separable", "concatenated"] = "separable"
    hidden: tuple[int, ...] = (128, 128)

    def __post_init__(self) -> None:
        check_options(self, choices={"objective": ("nce", "classifier"), "critic": tuple(CRITICS)})
        check_widths(self, "hidden", least=1)
        if self.training.held_out == 0:
            raise ValueError(
                "training: holds out no rows; expected a positive share, as bounds are taken on rows that are held out"
            )


class Information(eqx.Module):
    """Bounds of I(X;Y) in nats, means over batches of rows that the critic has not seen."""

    lower: Float[Array, ""]
    """InfoNCE. Never more than `saturation`: near it, it says no more than that I is at least so large."""
    upper: Float[Array, ""]
    """NCE-CLUB: for the best critic I + KL(p_x p_y ‖ p_xy), which can be far above I; for others no bound."""
    saturation: Float[Array, ""]
    """log N, N samples a batch."""
    lower_error: Float[Array, ""]
    upper_error: Float[Array, ""]
    """Standard errors over batches; NaN where there is one."""
    classifier: Float[Array, ""]
    """The classifier's estimate, no bound; NaN where the critic has learned by InfoNCE."""
    status: Int[Array, ""]
    critic: Separable | Concatenated
    """Of standardised rows."""


def critic_loss(
    critic: Separable | Concatenated, batch: Batch, key: Key[Array, ""], config: InformationConfig
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Minus the mean of InfoNCE over both ways to normalise, or minus the classifier's log-likelihood."""
    scores = critic(*batch.views)
    gain = two_way_info_nce(scores) if config.objective == "nce" else classifier_log_likelihood(scores)
    return -gain, {"upper": club(scores, others_only=True)}


def critic_bounds(
    critic: Callable[[Array, Array], Array], x: Float[Array, "b n p"], y: Float[Array, "b n q"]
) -> Float[Array, "3 b"]:
    """InfoNCE, NCE-CLUB and the classifier's estimate of each of b batches."""

    def of(batch: tuple[Array, Array]) -> Array:
        scores = critic(*batch)
        return jnp.stack([two_way_info_nce(scores), club(scores, others_only=True), classifier_information(scores)])

    return lax.map(of, (x, y)).T


def mutual_information(x: Any, y: Any, config: InformationConfig = InformationConfig(), *, key: Any) -> Information:
    """Bounds of the mutual information of the rows of two arrays, n × p and n × q: InfoNCE and NCE-CLUB of Liang et al. 2023.

    A critic is trained by InfoNCE on most of the rows; both bounds are taken on the rest, in batches of N. Pure under `jit` and
    `vmap`. Raises `ValueError` for arrays that are no two tables of as many rows, or fewer than ten, and a missing key.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    for name, rows in (("x", x), ("y", y)):
        if rows.ndim != 2 or rows.shape[1] < 1 or not jnp.issubdtype(rows.dtype, jnp.floating):
            raise ValueError(f"{name}: has shape {rows.shape} of {rows.dtype}; expected rows × columns of floats")
    if x.shape[0] != y.shape[0] or x.shape[0] < 10:
        raise ValueError(f"y: has {y.shape[0]} rows, x {x.shape[0]}; expected as many, at least 10")
    key = as_key(key, "for the critic's start and its batches")
    static, numbers = split_numbers(config)
    critic, train, held, k_train = _prepare(static, numbers, x, y, key)
    trained = train_network(critic_loss, static, numbers, critic, train, held, k_train)
    return _bounds(static, trained.model, trained.status, held)


@compiled
def _prepare(
    static: InformationConfig, numbers: dict, x: Array, y: Array, key: Array
) -> tuple[Separable | Concatenated, Batch, Batch, Array]:
    config = join_numbers(static, numbers, static.training.dtype)
    dtype = jnp.dtype(config.training.dtype)
    k_build, k_rows, k_train = jr.split(key, 3)
    views = []
    for rows in (x, y):
        mean, deviation = centre_and_scale(rows)
        views.append(((rows - mean[None, :]) / deviation[None, :]).astype(dtype))
    order = jr.permutation(k_rows, x.shape[0])
    n_held = held_out_rows(x.shape[0], config.training.held_out)
    both = Batch(tuple(views))
    critic = redrawn(k_build, CRITICS[config.critic](k_build, x.shape[1], y.shape[1], config.hidden, dtype))
    return critic, both.of_rows(order[n_held:]), both.of_rows(order[:n_held]), k_train


@compiled
def _bounds(static: InformationConfig, critic: Separable | Concatenated, status: Array, held: Batch) -> Information:
    size = min(static.training.batch_size, held.n_rows)
    batches = held.n_rows // size
    x, y = (view[: batches * size].reshape(batches, size, -1) for view in held.views)
    found = critic_bounds(critic, x, y)
    (lower, upper, classifier), (lower_error, upper_error, _) = found.mean(axis=1), found.std(axis=1, ddof=1) / math.sqrt(batches)
    told = classifier if static.objective == "classifier" else jnp.full_like(classifier, jnp.nan)
    return Information(lower, upper, jnp.full_like(lower, math.log(size)), lower_error, upper_error, told, status, critic)
