"""Methods that learn nonlinear maps, one a file: `fit(views, hierarchy, config, *, y=None, key) -> NetworkFit`."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hcl_jax.fitted import Fitted
from hcl_jax.networks import convirt, deepjive, dlf, factorcl, hcl, hcl_released, links, misa, simclr, tsd
from hcl_jax.networks.network import Method, NetworkConfig, NetworkFit, load_fit
from hcl_jax.networks.training import TrainingConfig

NETWORKS: dict[str, Callable[..., Fitted]] = {
    "hcl": hcl.fit,
    "hcl-copula": links.fit_copula,
    "hcl-flow": links.fit_flow,
    "hcl-released": hcl_released.fit,
    "misa": misa.fit,
    "misa-official": partial(misa.fit, config=misa.MisaConfig(variant="official")),
    "misa-port": partial(misa.fit, config=misa.MisaConfig(variant="port")),
    "convirt": convirt.fit,
    "convirt-paper": partial(convirt.fit, config=convirt.ConvirtConfig(variant="paper")),
    "deepjive": deepjive.fit,
    "deepjive-exchange": partial(deepjive.fit, config=deepjive.DeepjiveConfig(identity="exchange")),
    "deepjive-merged": partial(deepjive.fit, config=deepjive.DeepjiveConfig(identity="merged", restarts=3)),
    "dlf": dlf.fit,
    "dlf-official": partial(dlf.fit, config=dlf.DlfConfig(variant="official")),
    "dlf-port": partial(dlf.fit, config=dlf.DlfConfig(variant="port")),
    "factorcl": factorcl.fit,
    "factorcl-published": partial(factorcl.fit, config=factorcl.FactorclConfig(variant="published")),
    "simclr": simclr.fit,
    "simclr-published": partial(simclr.fit, config=simclr.SimclrConfig(variant="published")),
    "supcon": partial(simclr.fit, config=simclr.SimclrConfig(positives="label")),
    "cross-self": partial(simclr.fit, config=simclr.SimclrConfig(objective="cross-self")),
    "cross-self-heads": partial(simclr.fit, config=simclr.SimclrConfig(objective="cross-self-heads")),
    "tsd": tsd.fit,
    "tsd-port": partial(tsd.fit, config=tsd.TsdConfig(variant="port")),
}
"""`NETWORKS[name](views, hierarchy, *, y=None, key)`: the repaired methods, and behind the dash their published variants."""

BLIND = ("hcl-copula", "hcl-flow")
"""Entries that take no response."""

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (hcl, links, hcl_released, misa, convirt, deepjive, dlf, factorcl, tsd)
}


def configuration(name: str) -> Any:
    """The configuration that an entry of `NETWORKS` has by default."""
    return inspect.signature(NETWORKS[name]).parameters["config"].default


def load(path: Path | str) -> NetworkFit:
    """A fit that was saved by `NetworkFit.save`: the same bits. Raises `ValueError` for a file that is not one."""
    return load_fit(path, METHODS)


__all__ = ["BLIND", "NETWORKS", "NetworkConfig", "NetworkFit", "TrainingConfig", "configuration", "load"]
