"""How the downstream study fits networks: one budget for all, and each with the numbers that its own search chose.

Every method has as many trials, on one draw that no study uses (simulations/search.py): the defaults first, then random numbers
about them. A representation is searched by the error of ridge regression on its scores, supervised training by its own.
"""

import dataclasses
from typing import Any

import numpy as np

from hcl_jax.networks import configuration

BUDGET = {"steps": 1000, "batch_size": 256}
"""Of every network in the downstream study: steps at most, and rows a step."""

LEARNING_RATE = "training.learning_rate"
SPACES: dict[str, tuple[str, ...]] = {
    "hcl": ("temperature", "exclusivity", "reconstruction", "independence"),
    "misa": ("similarity", "difference", "reconstruction"),
    "convirt": ("temperature",),
    "dlf": ("reconstruction", "specific", "alignment", "triplet", "orthogonality"),
    "tsd": ("common", "pair", "private", "orthogonality", "supervisor", "reconstruction"),
}
"""The numbers of each configuration that are searched, beside the learning rate, and the task's weight where there is one."""

CHOSEN: dict[str, dict[str, float]] = {
    "convirt": {},
    "convirt (joint)": {"training.learning_rate": 0.00101, "temperature": 0.0109, "task_weight": 1.52},
    "dlf": {
        "training.learning_rate": 0.000591,
        "reconstruction": 0.387,
        "specific": 0.597,
        "alignment": 0.506,
        "triplet": 0.0803,
        "orthogonality": 0.00216,
    },
    "dlf (joint)": {
        "training.learning_rate": 0.000207,
        "reconstruction": 0.148,
        "specific": 0.0673,
        "alignment": 0.0835,
        "triplet": 0.00612,
        "orthogonality": 0.0132,
        "task_weight": 2.71,
    },
    "hcl": {},
    "hcl (joint)": {},
    "misa": {"training.learning_rate": 0.00802, "similarity": 0.768, "difference": 2.75, "reconstruction": 1.39},
    "misa (joint)": {},
    "tsd": {
        "training.learning_rate": 0.00107,
        "common": 0.327,
        "pair": 0.611,
        "private": 0.404,
        "orthogonality": 1.64,
        "supervisor": 1.22,
        "reconstruction": 20.8,
    },
    "tsd (joint)": {
        "training.learning_rate": 0.000637,
        "common": 0.369,
        "pair": 9.43,
        "private": 3.94,
        "orthogonality": 0.327,
        "supervisor": 0.335,
        "reconstruction": 18.4,
        "task_weight": 0.191,
    },
}
"""By method, and `method (joint)` for supervised training: what differs from the defaults. From docs/tables/search.csv."""


def study_config(name: str, supervision: str, *, chosen: bool = True) -> Any:
    """The configuration with which the study fits a network, with its chosen numbers or its own; entries of `NETWORKS` that are
    not searched keep their defaults."""
    config = configuration(name)
    if name not in SPACES:
        return config if supervision == "none" else dataclasses.replace(config, supervision=supervision)
    config = dataclasses.replace(config, supervision=supervision, training=dataclasses.replace(config.training, **BUDGET))
    return with_numbers(config, CHOSEN[searched_name(name, supervision)]) if chosen else config


def searched_name(name: str, supervision: str) -> str:
    """Of a search: what supervised training finds serves training that is tuned as well."""
    return name if supervision == "none" else f"{name} (joint)"


def trial_numbers(name: str, supervision: str, trial: int, seed: int = 0) -> dict[str, float]:
    """The numbers of a trial, by path: none for trial 0, the defaults; then the learning rate times 10^U(−¾, ½), weights and
    temperatures times 10^U(−1, 1)."""
    if trial == 0:
        return {}
    rng = np.random.default_rng([seed, trial, *name.encode()])
    config = configuration(name)
    paths = (*SPACES[name], *(() if supervision == "none" else ("task_weight",)))
    numbers = {path: _rounded(getattr(config, path) * 10 ** rng.uniform(-1, 1)) for path in paths}
    return {LEARNING_RATE: _rounded(config.training.learning_rate * 10 ** rng.uniform(-0.75, 0.5))} | numbers


def _rounded(number: float) -> float:
    """To three significant digits, so that a table and a program can hold it."""
    return float(f"{number:.3g}")


def with_numbers(config: Any, numbers: dict[str, float]) -> Any:
    """The configuration with these numbers, by path."""
    own = {path: number for path, number in numbers.items() if path != LEARNING_RATE}
    training = config.training
    if LEARNING_RATE in numbers:
        training = dataclasses.replace(training, learning_rate=numbers[LEARNING_RATE])
    return dataclasses.replace(config, training=training, **own)
