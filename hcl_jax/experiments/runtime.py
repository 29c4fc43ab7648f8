"""How an entry point sets JAX up: precision, host devices, threads, compilation cache. Called before anything is computed."""

import os
import platform
import zlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax
import scipy.linalg  # noqa: F401  # loads the LAPACK that JAX calls, so that `threadpool_limits` reaches it
from threadpoolctl import threadpool_limits

DTYPES = ("float32", "float64")
CACHE_VARIABLE = "HCL_COMPILATION_CACHE"  # a folder, or 0 for no cache
BATCHED_POOL_THREADS = 64
"""Threads of XLA's pool, which reads NPROC, when replicates run side by side. A batched LAPACK call waits, in a thread of the
pool, for others of that pool: with no more threads than devices all of them come to wait, for ever (jaxlib 0.10.2). Mapped
replicates make no batched LAPACK calls (tests/test_transforms.py holds that), and threads beyond one per device would only take
turns: they made a sweep on two cores 1.7 times slower."""
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def configure(dtype: str = "float64", devices: int | None = None, batched: bool = False) -> int:
    """Set JAX up for a study whose replicates do not depend on the number of devices, and say how many of them to use.

    On a CPU every core (or as many as `devices` says) becomes a host device that computes on one thread, in XLA and in LAPACK:
    replicates are spread over the devices, and no result depends on how a single product was divided. There are always two at
    least, the second idle where one was asked for: XLA simplifies a program for a single device in another way, and the last
    bits follow. `batched` replicates share one device. On accelerators all of them are used, or as many as `devices` says,
    whatever the cores. Products in float32 run at full precision. Compiled programs are kept in
    the user's cache folder, unless HCL_COMPILATION_CACHE=0. In a process whose devices are in use already, these stay. What
    XLA_FLAGS holds is kept: whoever sets `--xla_cpu_multi_thread_eigen` there, or names a file of flags, says whether products
    take several threads.

    Raises `ValueError` for an unknown dtype or a number of devices below 1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: unknown {dtype!r}; expected one of {', '.join(DTYPES)}")
    if devices is not None and devices < 1:
        raise ValueError(f"devices: is {devices}; expected at least 1")
    used = 1 if batched else devices or _available_cores()
    held = 1 if batched else max(2, used)
    _single_threaded_devices(held, BATCHED_POOL_THREADS if batched else held)
    jax.config.update("jax_enable_x64", dtype == "float64")
    jax.config.update("jax_default_matmul_precision", "highest")
    enable_compilation_cache()
    threadpool_limits(1)
    if jax.default_backend() != "cpu":
        return min(devices or jax.device_count(), jax.device_count())
    return used


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _single_threaded_devices(devices: int, pool_threads: int) -> None:
    os.environ["XLA_FLAGS"] = with_flag(os.environ.get("XLA_FLAGS", ""), "--xla_cpu_multi_thread_eigen=false")
    os.environ.setdefault("NPROC", str(pool_threads))
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:  # the devices are in use already: a test or a notebook
        return


def with_flag(flags: str, flag: str) -> str:
    """The value of XLA_FLAGS with a flag appended; unchanged where it sets that flag, or names a file of flags, as a value does
    that starts with neither a dash nor a space.

    >>> with_flag("--xla_dump_to=/tmp/x threads=1", "--xla_y=false")
    '--xla_dump_to=/tmp/x threads=1 --xla_y=false'
    """
    names_a_file = bool(flags) and not (flags[0] == "-" or flags[0].isspace())
    if names_a_file or flag.partition("=")[0] in (word.partition("=")[0] for word in flags.split()):
        return flags
    return f"{flags} {flag}" if flags else flag


def _machine_kind() -> str:
    """A short name of the processor: compiled programs are not for machines of another kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    except OSError:
        features = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, or where HCL_COMPILATION_CACHE says; not at all where that is 0."""
    setting = os.environ.get(CACHE_VARIABLE, "")
    if setting == "0":
        return
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(setting) if setting else user_cache / "hcl_jax"
    try:
        (folder / _machine_kind()).mkdir(parents=True, exist_ok=True)
    except OSError:  # no home to write to: compile each time
        return
    jax.config.update("jax_compilation_cache_dir", str(folder / _machine_kind()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@cache
def device_name() -> str:
    """What this process computes on: results are the same bits on devices of one name."""
    device = jax.devices()[0]
    return f"{device.device_kind} {_machine_kind()}"


def versions() -> dict[str, str]:
    """What numbers depend on beside the device."""
    packages = ("hcl_jax", "jax", "jaxlib", "equinox", "numpy", "polars")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def describe() -> dict[str, object]:
    """Versions, devices and precision of this process, for the manifest."""
    device = jax.devices()[0]
    return {
        "versions": versions(),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "machine": _machine_kind(),
        },
        "matmul_precision": jax.config.values["jax_default_matmul_precision"],
    }


class CompilationCounter:
    """Counts the programs that XLA is asked for while the block runs: each once, whether compiled or found in the cache.

    >>> with CompilationCounter() as compilations:
    ...     _ = jax.jit(lambda x: x + 3)(1.0)
    >>> compilations.count >= 1
    True
    """

    def __init__(self) -> None:
        self.count = 0

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == _COMPILE_EVENT

    def __enter__(self) -> "CompilationCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
