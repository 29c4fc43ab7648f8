"""What a sweep would cost: one timed replicate a device for each program, and the time and memory that follow."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from hcl_jax.experiments.cell import Cell
from hcl_jax.experiments.mapping import Slots
from hcl_jax.experiments.replicate import errors_program, estimate_program, limit_program
from hcl_jax.experiments.sweep import GIB, Execution, Sweep, Task, chunk_size, draw_arguments, draw_program_of
from hcl_jax.limits import LIMITS


@dataclass(frozen=True)
class Cost:
    """One line of the projection. `seconds_each`: of a replicate, while the other devices are busy with one of theirs."""

    cell: str
    method: str
    replicates: int
    seconds_compiling: float
    seconds_each: float
    memory_gib: float
    devices: int

    @property
    def seconds(self) -> float:
        return self.seconds_compiling + self.replicates * self.seconds_each / self.devices


def project_costs(sweep: Sweep, tasks: list[Task], execution: Execution) -> list[Cost]:
    """Time every program (draw, methods, errors) once compiled, at the middle n of each setting, one replicate a device."""
    settings: dict[Cell, list[Task]] = {}
    for task in tasks:
        settings.setdefault(replace(task.cell, n=2), []).append(task)  # all of the cell but n
    return [cost for group in settings.values() for cost in _project_setting(sweep, group, execution)]


def _project_setting(sweep: Sweep, tasks: list[Task], execution: Execution) -> list[Cost]:
    cells = sorted({task.cell for task in tasks}, key=lambda cell: cell.n)
    cell, batched = cells[len(cells) // 2], execution.batched
    replicates = {method: sum(len(task.part) for task in tasks if task.method == method) for method in sweep.methods}
    used = execution.used_devices
    slots = Slots.spread(0, used, chunk_size(cell, sweep.dtype, execution), used)
    n_draws = sum(len(part) for _, part in {(task.cell.n, task.part) for task in tasks})
    arguments = draw_arguments(sweep, cell, slots)
    drawn, cost = _timed(cell, "(draw)", draw_program_of(sweep, cell, execution), arguments, n_draws, execution)
    costs, fits, counts = [cost], None, arguments[2]
    program: Callable[..., Any]
    for method in (method for method in sweep.methods if replicates[method]):
        if method in LIMITS:
            program, items = limit_program(method, batched), drawn
        else:
            program, items = estimate_program(method, cell.fitted_hierarchy, batched), drawn[1]
        result, cost = _timed(cell, method, program, (None, items, counts), replicates[method], execution)
        costs.append(cost)
        fits = fits if method in LIMITS else result
    if fits is not None:
        n_fits = sum(count for method, count in replicates.items() if method not in LIMITS)
        program, items = errors_program(cell.fitted_hierarchy, batched), (drawn[0], fits.loadings)
        costs.append(_timed(cell, "(errors)", program, (None, items, counts), n_fits, execution)[1])
    return costs


def _timed(cell: Cell, name: str, program: Any, arguments: tuple, replicates: int, execution: Execution) -> tuple[Any, Cost]:
    start = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    compiling = time.perf_counter() - start
    start = time.perf_counter()
    result = jax.block_until_ready(compiled(*arguments))
    elapsed = time.perf_counter() - start
    places = jax.tree.leaves(arguments[1])[0].shape[0] // jax.device_count()
    each = elapsed / (places if execution.batched else 1)
    return result, Cost(cell.name, name, replicates, compiling, each, _memory(compiled), execution.used_devices)


def _memory(compiled: Any) -> float:
    usage = compiled.memory_analysis()
    sizes = (usage.argument_size_in_bytes, usage.output_size_in_bytes, usage.temp_size_in_bytes)
    return jax.device_count() * sum(sizes) / GIB


def format_costs(costs: list[Cost]) -> str:
    """The projection as a table, its total below."""
    width = max(len(cost.cell) for cost in costs)
    header = f"{'setting, middle n':{width}}  {'method':20} {'replicates':>10} {'compile':>9} {'each':>9} {'total':>9} {'GiB':>7}"
    lines = [
        f"{c.cell:{width}}  {c.method:20} {c.replicates:10d} {c.seconds_compiling:8.1f}s {c.seconds_each:8.3g}s "
        f"{_duration(c.seconds):>9} {c.memory_gib:7.2f}"
        for c in costs
    ]
    total, memory = sum(cost.seconds for cost in costs), max(cost.memory_gib for cost in costs)
    footer = f"projected: {_duration(total)} on {costs[0].devices} devices, at most {memory:.2f} GiB on them at a time"
    return "\n".join([header, *lines, footer])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
