"""Time of our networks beside modules that were written in PyTorch for the purpose, and of replicates side by side.

    python -m pip install -e '.[benchmarks]'     # PyTorch; without it our own figures alone
    python benchmarks/networks.py                # prints four tables
    python benchmarks/networks.py --tables steps --networks misa dlf-labels --rounds 11

Steps: loss, gradient and Adam, of the variants that the released HCL code defines. Ours is what training does, `train_network` on
an epoch of that many batches, divided by their number: clipping, weight decay, and a look at a held-out batch at the start and at
the end are in the time. PyTorch (`torch_networks.py`) goes through as many rows, from the same weights. Its triplets of DLF are
looked up in a Python loop over the anchors, as in the released code. r = 5 leaves MISA and DLF one head.

Fits: default nonlinear HCL with that batch size, from the rows to its stop, beside so many epochs of the released HCL in PyTorch,
from the rows too. They are seen through leaky links.

Replicates: draws and fits of HCL by the program that a study runs, mapped over the cores, and one after the other in a process of
one core. `losses differ by` compares the two.

FactorCL: a supervised step with critics of the width that the authors have, separable ones and ones of all pairs, whose first
layers are split; beside these what they are in PyTorch, of all pairs as the authors have them. `main` is the step of encoders,
heads and critics of lower bounds, `critic` one of the critics of upper bounds, as that of a main step with three of them and
without. With --published all widths are the authors' (a step takes seconds), without it encoders and heads are our default ones.

All is in float32, one thread a core; competitors take turns. Compilation is timed by itself, and nothing is taken from the
compilation cache; `compiled` counts the programs that were compiled after the first call.
"""

import dataclasses
import importlib.util
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array

from hcl_jax import Hierarchy, Truth
from hcl_jax.experiments import CompilationCounter, configure
from hcl_jax.experiments.mapping import Slots, place, spread
from hcl_jax.links import sample_linked_observations, sample_links
from hcl_jax.model import sample_normal_loadings
from hcl_jax.networks import NetworkConfig, NetworkFit, TrainingConfig, convirt, dlf, factorcl, hcl, hcl_released, misa, tsd
from hcl_jax.networks.network import Method
from hcl_jax.networks.training import Batch, make_step, split_numbers, train_network
from measuring import check_known, check_rounds, interleaved, restrict_to_cores, run_script, timed

SEED = 0
TORCH = importlib.util.find_spec("torch") is not None
NO_TORCH = "PyTorch is not installed: python -m pip install -e '.[benchmarks]'"
CLASSES = 2
LEARNING_RATE = 1e-4
"""Of steps: small, as the fifth moments of the port of MISA explode at large ones."""
NOISE_VARIANCE, LINK = 0.09, "leaky"
"""Of the rows that are fitted, as in the nonlinear study."""
FIT_SHARE, TIMES_AS_FAST = 0.25, 1.7
"""What the whole fit is to take of the released one's time at most, and the replicates to gain from two idle cores at least."""


class Case(NamedTuple):
    """A network whose steps are timed."""

    method: Method
    config: Callable[..., NetworkConfig]
    labels: bool = False
    limit: float = 1.3
    """What a step is to take of PyTorch's time at most."""


CASES = {
    "hcl-released": Case(hcl_released.METHOD, hcl_released.HclReleasedConfig),
    "convirt": Case(convirt.METHOD, partial(convirt.ConvirtConfig, variant="port")),
    "misa": Case(misa.METHOD, partial(misa.MisaConfig, variant="port", heads=1)),
    "dlf": Case(dlf.METHOD, partial(dlf.DlfConfig, variant="port", heads=1)),
    "dlf-labels": Case(dlf.METHOD, partial(dlf.DlfConfig, variant="port", heads=1), labels=True, limit=0.5),
    "tsd": Case(tsd.METHOD, partial(tsd.TsdConfig, variant="port")),
}


@dataclass(frozen=True)
class Arguments:
    """Time networks beside PyTorch's."""

    tables: tuple[str, ...] = ("steps", "fits", "replicates", "factorcl")
    """Which tables."""
    published: bool = False
    """Whether FactorCL has the authors' widths throughout."""
    networks: tuple[str, ...] = tuple(CASES)
    """Whose steps."""
    dims: tuple[int, int, int] = (100, 100, 100)
    """Features of each view."""
    rank: int = 5
    """Of each of the seven structures."""
    batch: int = 256
    """Rows of a step."""
    steps: int = 50
    """Steps that are timed together."""
    rounds: int = 5
    """Turns of each, of steps and of replicates; the tables have the median."""
    n: int = 30_000
    """Rows of whole fits."""
    epochs: int = 50
    """Of the released HCL."""
    fit_rounds: int = 1
    """Turns of each whole fit."""
    replicates: int = 16
    """How many."""
    replicate_n: int = 2_000
    """Rows of a replicate."""
    replicate_steps: int = 200
    """Steps of a replicate, at least: whole rounds."""
    threads: int = 2
    """Cores over which replicates are mapped."""

    @property
    def hierarchy(self) -> Hierarchy:
        return Hierarchy.full(self.dims, self.rank)


def start(threads: int) -> None:
    """Begin a process with so many cores, of one thread each."""
    os.environ["HCL_COMPILATION_CACHE"] = "0"
    restrict_to_cores(threads)
    configure("float32", threads)


class Ours(NamedTuple):
    """What is trained, and a whole training of it."""

    network: Any
    run: Callable[[], Any]


def our_epoch(case: Case, rows: Batch, arguments: Arguments) -> Ours:
    """An epoch of our training."""
    training = TrainingConfig(
        steps=arguments.steps,
        batch_size=arguments.batch,
        round_steps=arguments.steps,
        learning_rate=LEARNING_RATE,
        schedule="constant",
    )
    config = case.config(training=training, n_classes=CLASSES)
    network = jax.jit(case.method.build, static_argnums=(1, 2))(jr.key(SEED), arguments.hierarchy, config)
    static, numbers = split_numbers(config)
    held, key = rows.of_rows(jnp.arange(arguments.batch)), jr.key(SEED + 1)
    return Ours(network, lambda: train_network(case.method.loss, static, numbers, network, rows, held, key))


def step_rows(case: Case, arguments: Arguments) -> Batch:
    """Standard normal views, and labels for those who ask for them."""
    k_views, k_labels = jr.split(jr.key(SEED + 2))
    n = arguments.steps * arguments.batch
    views = tuple(jr.normal(jr.fold_in(k_views, m), (n, d), jnp.float32) for m, d in enumerate(arguments.dims))
    return Batch(views, jr.randint(k_labels, (n,), 0, CLASSES) if case.labels else None)


def weights_by_name(network: Any) -> dict[str, np.ndarray]:
    """Weights by the names that they have in PyTorch: `encoders.0.layers.2.weight`."""
    leaves = jax.tree_util.tree_leaves_with_path(network)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def torch_module(name: str, hierarchy: Hierarchy, config: Any, network: Any) -> Any:
    """PyTorch's module with our weights."""
    from torch_networks import MODULES, with_weights

    ranks = {rank for _, rank in hierarchy.ranks}
    return with_weights(MODULES[name](hierarchy.dims, hierarchy.structures, *ranks, config.hidden), weights_by_name(network))


def torch_epoch(name: str, network: Any, rows: Batch, arguments: Arguments) -> Callable[[], Any]:
    """An epoch in PyTorch."""
    from torch_networks import make_epoch

    module = torch_module(name, arguments.hierarchy, CASES[name].config(), network)
    return make_epoch(module, rows.views, rows.y, arguments.batch, LEARNING_RATE)


class Beside(NamedTuple):
    """Median seconds of ours and of PyTorch's, None without it; of the first call of ours, what it took longer; programs compiled
    since."""

    ours: float
    theirs: float | None
    compiling: float
    compiled: int

    @classmethod
    def of(cls, ours: Callable[[], Any], theirs: Callable[[], Any] | None, rounds: int) -> "Beside":
        """Turns of both, after a call of ours that compiles."""
        first = timed(ours)[1]
        both = {"ours": ours} if theirs is None else {"ours": ours, "theirs": theirs}
        with CompilationCounter() as compilations:
            seconds = {name: statistics.median(times) for name, times in interleaved(both, rounds).items()}
        return cls(seconds["ours"], seconds.get("theirs"), first - seconds["ours"], compilations.count)

    @property
    def share(self) -> str:
        return "–" if self.theirs is None else f"{self.ours / self.theirs:.2f}"


def measure_steps(name: str, arguments: Arguments) -> Beside:
    """Of an epoch."""
    rows = step_rows(CASES[name], arguments)
    ours = our_epoch(CASES[name], rows, arguments)
    theirs = torch_epoch(name, ours.network, rows, arguments) if TORCH else None
    if theirs:
        theirs()  # what PyTorch sets up once
    return Beside.of(ours.run, theirs, arguments.rounds)


def draw_views(key: Array, hierarchy: Hierarchy, n: int) -> tuple[Array, ...]:
    """n rows of each view, of loadings and links of their own."""
    k_loadings, k_links, k_rows = jr.split(key, 3)
    loadings = sample_normal_loadings(k_loadings, hierarchy, jnp.float32)
    truth = Truth(loadings, jnp.asarray(NOISE_VARIANCE, jnp.float32), hierarchy)
    return sample_linked_observations(k_rows, truth, sample_links(k_links, LINK, hierarchy, jnp.float32), n)[0]


def default_config(**training: Any) -> hcl.HclConfig:
    """Default nonlinear HCL, but for this of its training."""
    return hcl.HclConfig(training=dataclasses.replace(hcl.HclConfig().training, **training))


class WholeFit(NamedTuple):
    """Seconds of whole fits, and how many steps ours took."""

    beside: Beside
    steps: int
    status: int


def measure_fits(arguments: Arguments) -> WholeFit:
    """Our fit to its stop, and the released one."""
    hierarchy, config = arguments.hierarchy, default_config(batch_size=arguments.batch)
    views = jax.jit(draw_views, static_argnums=(1, 2))(jr.key(SEED), hierarchy, arguments.n)
    fits: list[NetworkFit] = []

    def ours() -> NetworkFit:
        fits.append(hcl.fit(views, hierarchy, config, key=jr.key(SEED)))
        return fits[-1]

    beside = Beside.of(ours, released_fit(views, arguments) if TORCH else None, arguments.fit_rounds)
    return WholeFit(beside, int(fits[-1].steps), int(fits[-1].status))


def released_fit(views: tuple[Array, ...], arguments: Arguments) -> Callable[[], Any]:
    """All epochs of the released HCL in PyTorch, standardising included."""
    config = hcl_released.HclReleasedConfig()
    network = jax.jit(hcl_released.build, static_argnums=(1, 2))(jr.key(SEED), arguments.hierarchy, config)
    given = [np.asarray(view) for view in views]

    def fit() -> None:
        standardised = tuple((view - view.mean(axis=0)) / view.std(axis=0) for view in given)
        epoch = torch_epoch("hcl-released", network, Batch(standardised), arguments)
        for _ in range(arguments.epochs):
            epoch()

    return fit


@lru_cache
def replicates_program(arguments: Arguments) -> Callable[..., Any]:
    """(None, numbers of replicates, counts) -> held-out losses and steps."""
    hierarchy = arguments.hierarchy
    config = default_config(batch_size=arguments.batch, steps=arguments.replicate_steps, patience=arguments.replicate_steps)

    def replicate(_: None, number: Array) -> tuple[Array, Array]:
        k_data, k_fit = jr.split(jr.fold_in(jr.key(SEED), number))
        fitted = hcl.fit(draw_views(k_data, hierarchy, arguments.replicate_n), hierarchy, config, key=k_fit)
        return jnp.nanmin(fitted.history["held_out"]), fitted.steps

    return spread(replicate, batched=False, runs_long=True)


class Swept(NamedTuple):
    """All replicates, once."""

    seconds: float
    compiled: int
    losses: np.ndarray
    steps: int


def sweep(arguments: Arguments, cores: int) -> Swept:
    """All replicates in this process, on so many devices."""
    slots = Slots.spread(0, arguments.replicates, -(-arguments.replicates // cores), cores)
    placed = place((slots.replicates, slots.counts), split=True)
    with CompilationCounter() as compilations:
        (losses, steps), seconds = timed(lambda: replicates_program(arguments)(None, *placed))
    return Swept(seconds, compilations.count, slots.read(np.asarray(losses)), int(slots.read(np.asarray(steps)).max()))


def measure_replicates(arguments: Arguments, pools: dict[int, ProcessPoolExecutor]) -> dict[int, list[Swept]]:
    """By the number of cores: the sweep that compiles, and those that are timed."""
    runs: dict[int, list[Swept]] = {cores: [] for cores in pools}
    turn = lambda cores: runs[cores].append(pools[cores].submit(sweep, arguments, cores).result())
    interleaved({str(cores): partial(turn, cores) for cores in pools}, 1 + arguments.rounds)
    return runs


def print_header(*cells: str) -> None:
    print(f"\n| {' | '.join(cells)} |\n" + "|---" * len(cells) + "|", flush=True)


def milliseconds(seconds: float | None, count: int) -> str:
    return "–" if seconds is None else f"{1e3 * seconds / count:.2f}"


def print_steps(arguments: Arguments, single: ProcessPoolExecutor) -> None:
    """A row a network."""
    print_header("a step of", "ours, ms", "PyTorch, ms", "ours / PyTorch", "at most", "compiling, s", "compiled")
    for name in arguments.networks:
        found = single.submit(measure_steps, name, arguments).result()
        ours, theirs = (milliseconds(seconds, arguments.steps) for seconds in (found.ours, found.theirs))
        end = f"{CASES[name].limit:g} | {found.compiling:.1f} | {found.compiled}"
        print(f"| {name} | {ours} | {theirs} | {found.share} | {end} |", flush=True)


def print_fits(arguments: Arguments, single: ProcessPoolExecutor) -> None:
    """One row."""
    released = f"released HCL, {arguments.epochs} epochs, s"
    print_header("n", "default HCL, s", "its steps", "status", released, "ours / released", "at most", "compiling, s", "compiled")
    found, steps, status = single.submit(measure_fits, arguments).result()
    theirs = "–" if found.theirs is None else f"{found.theirs:.3g}"
    begin = f"{arguments.n:,} | {found.ours:.3g} | {steps} | {status}"
    print(f"| {begin} | {theirs} | {found.share} | {FIT_SHARE} | {found.compiling:.1f} | {found.compiled} |", flush=True)


def print_replicates(arguments: Arguments, pools: dict[int, ProcessPoolExecutor]) -> None:
    """One row."""
    swept = f"on {arguments.threads} cores, s"
    differ = "losses differ by"
    print_header("n", "replicates", "steps", swept, "on one, s", "times as fast", "at least", "compiling, s", "compiled", differ)
    runs = measure_replicates(arguments, pools)
    seconds = {cores: statistics.median(run.seconds for run in held[1:]) for cores, held in runs.items()}
    both, one = runs[arguments.threads], runs[1]
    compiled = sum(run.compiled for run in both[1:] + one[1:])
    apart = np.abs(both[-1].losses - one[-1].losses).max()
    print(
        f"| {arguments.replicate_n:,} | {arguments.replicates} | {one[-1].steps} | {seconds[arguments.threads]:.3g} "
        f"| {seconds[1]:.3g} | {seconds[1] / seconds[arguments.threads]:.2f} | {TIMES_AS_FAST} "
        f"| {both[0].seconds - seconds[arguments.threads]:.1f} | {compiled} | {apart:.2g} |",
        flush=True,
    )


CRITIC_STEPS = 3
SEPARABLE_SHARE, CONCATENATED_SHARE = 1 / 20, 0.75
"""What a main step with separable critics is to take of one with critics of all pairs at most, and that of PyTorch's."""
PUBLISHED_WIDTHS: dict[str, Any] = {"width": 128, "hidden": (512, 512, 512), "head_hidden": (128, 128)}


def factorcl_config(critic: str, arguments: Arguments) -> factorcl.FactorclConfig:
    """The published FactorCL, with the authors' critics; encoders and heads may be ours."""
    widths = PUBLISHED_WIDTHS if arguments.published else {}
    training = TrainingConfig(learning_rate=LEARNING_RATE, weight_decay=0.0, schedule="constant")
    return factorcl.FactorclConfig(
        variant="published", critic=critic, critic_hidden=(512, 512), n_classes=CLASSES, training=training, **widths
    )


def factorcl_hierarchy(arguments: Arguments) -> Hierarchy:
    """Of the first two views."""
    return Hierarchy.shared_and_private(arguments.dims[:2], 1, 1)


def factorcl_rows(arguments: Arguments) -> Batch:
    """One batch of the first two views, and its labels."""
    rows = step_rows(CASES["dlf-labels"], dataclasses.replace(arguments, steps=1))
    return Batch(rows.views[:2], rows.y)


def factorcl_steps(critic: str, rows: Batch, arguments: Arguments) -> tuple[Any, dict[str, Callable[[], Any]]]:
    """(the network, a main step and one that critics of upper bounds follow)."""
    config = factorcl_config(critic, arguments)
    network = jax.jit(factorcl.build, static_argnums=(1, 2))(jr.key(SEED), factorcl_hierarchy(arguments), config)
    moving, step, _ = make_step(factorcl.loss, factorcl.METHOD.critics, config, network, n_steps=1)
    run, key = jax.jit(step), jr.key(SEED)

    def of(critic_steps: int) -> Callable[[], Any]:
        theirs = jax.tree.map(lambda leaf: jnp.stack([leaf] * CRITIC_STEPS)[:critic_steps], (rows, key))
        with jax.numpy_dtype_promotion("standard"):
            run(moving, (rows, key, theirs))
        return lambda: run(moving, (rows, key, theirs))

    return network, {"main": of(0), "followed": of(CRITIC_STEPS)}


def torch_factorcl_steps(network: Any, rows: Batch, arguments: Arguments) -> dict[str, Callable[[], Any]]:
    """Both in PyTorch, from the same weights."""
    from torch_networks import Factorcl, make_factorcl_steps, with_weights

    config = factorcl_config("concatenated", arguments)
    widths = (config.width, config.hidden, config.head_hidden, config.critic_hidden)
    module = with_weights(Factorcl(arguments.dims[:2], *widths, CLASSES), weights_by_name(network))
    main, critics = make_factorcl_steps(module, rows.views, rows.y, LEARNING_RATE)

    def followed() -> None:
        main()
        for _ in range(CRITIC_STEPS):
            critics()

    return {"main": main, "followed": followed}


def measure_factorcl(arguments: Arguments) -> dict[str, tuple[float, float]]:
    """Median seconds of a main step, and of one of the critics, by who takes it."""
    rows = factorcl_rows(arguments)
    _, separable = factorcl_steps("separable", rows, arguments)
    network, concatenated = factorcl_steps("concatenated", rows, arguments)
    of = {"separable": separable, "concatenated": concatenated}
    if TORCH:
        of["PyTorch"] = torch_factorcl_steps(network, rows, arguments)
    competitors = {f"{name}/{kind}": run for name, both in of.items() for kind, run in both.items()}
    seconds = {name: statistics.median(times) for name, times in interleaved(competitors, arguments.rounds).items()}
    of_critics = lambda name: (seconds[f"{name}/followed"] - seconds[f"{name}/main"]) / CRITIC_STEPS
    return {name: (seconds[f"{name}/main"], of_critics(name)) for name in of}


def print_factorcl(arguments: Arguments, single: ProcessPoolExecutor) -> None:
    """A row a kind of critics."""
    print_header("FactorCL, critics", "main, ms", "critic, ms", "main / that of the row below", "at most")
    found = single.submit(measure_factorcl, arguments).result()
    names, limits = list(found), {"separable": SEPARABLE_SHARE, "concatenated": CONCATENATED_SHARE}
    for name, below in zip(names, [*names[1:], None], strict=True):
        main, critic = (milliseconds(seconds, 1) for seconds in found[name])
        share = "–" if below is None else f"{found[name][0] / found[below][0]:.3f}"
        print(f"| {name} | {main} | {critic} | {share} | {limits.get(name, '–')} |", flush=True)


TABLES = ("steps", "fits", "replicates", "factorcl")


def check(arguments: Arguments) -> None:
    """Raise `ValueError` that names the argument."""
    check_known("tables", arguments.tables, TABLES)
    check_known("networks", arguments.networks, CASES)
    check_rounds(arguments.rounds)
    least = {"batch": 4, "steps": 1, "epochs": 1, "fit_rounds": 1, "replicates": 1, "replicate_steps": 1, "rank": 1}
    for name, bound in least.items():
        if getattr(arguments, name) < bound:
            raise ValueError(f"--{name.replace('_', '-')}: is {getattr(arguments, name)}; expected at least {bound}")
    enough = 2 * arguments.hierarchy.n_factors
    for name in ("n", "replicate_n"):
        if getattr(arguments, name) < enough:
            raise ValueError(
                f"--{name.replace('_', '-')}: is {getattr(arguments, name)}; expected at least {enough}, twice the factors"
            )


def main(arguments: Arguments) -> None:
    check(arguments)
    restrict_to_cores(arguments.threads if "replicates" in arguments.tables else 1)
    if not TORCH:
        print(NO_TORCH, flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, start, (1,)) as single:
        if "steps" in arguments.tables:
            print_steps(arguments, single)
        if "fits" in arguments.tables:
            print_fits(arguments, single)
        if "factorcl" in arguments.tables:
            print_factorcl(arguments, single)
        if "replicates" in arguments.tables:
            with ProcessPoolExecutor(1, context, start, (arguments.threads,)) as several:
                print_replicates(arguments, {1: single} | {arguments.threads: several})


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
