"""What a sweep would cost: one timed replicate a device for each program, and the time and memory that follow."""

import time
from dataclasses import dataclass, replace
from typing import Any

import jax

from hcl_jax.experiments.experiment import AnyCell
from hcl_jax.experiments.mapping import Slots
from hcl_jax.experiments.sweep import GIB, Execution, Sweep, Task, chunk_size, draw_arguments, draw_program_of


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
    """Time every program (draw, and the stages of each method) once compiled, at the middle n of each setting, one replicate a
    device."""
    settings: dict[tuple, list[Task]] = {}
    for task in tasks:
        others = {name: value for name, value in task.cell.columns().items() if name not in ("cell", "n")}
        settings.setdefault(tuple(others.items()), []).append(task)
    return [cost for group in settings.values() for cost in _project_setting(sweep, group, execution)]


def _project_setting(sweep: Sweep, tasks: list[Task], execution: Execution) -> list[Cost]:
    cells = sorted({task.cell for task in tasks}, key=lambda cell: cell.n)
    cell = cells[len(cells) // 2]
    used = execution.used_devices
    slots = Slots.spread(0, used, chunk_size(sweep, cell, execution), used)
    n_draws = sum(len(part) for _, part in {(task.cell.n, task.part) for task in tasks})
    arguments = draw_arguments(sweep, cell, slots)
    drawn, cost = _timed(cell, "(draw)", draw_program_of(sweep, cell, execution), arguments, n_draws, execution)
    programs: dict[Any, tuple[Any, Cost]] = {}
    for method in sweep.methods:
        replicates, result = sum(len(task.part) for task in tasks if task.method == method), None
        if not replicates:
            continue
        for number, stage in enumerate(sweep.experiment.stages(cell, method, execution.batched)):
            known = programs.get(stage.program)
            if known is None:
                items = (None, stage.items(drawn, result), arguments[2])
                programs[stage.program] = _timed(cell, stage.name, stage.program, items, replicates, execution)
            elif number:  # first stages are shared by the methods that build on them; later ones run for each method
                programs[stage.program] = known[0], replace(known[1], replicates=known[1].replicates + replicates)
            result = programs[stage.program][0]
    costs = sorted((cost for _, cost in programs.values()), key=lambda cost: cost.method.startswith("("))
    return [cost, *costs]  # what several methods share comes last


def _timed(cell: AnyCell, name: str, program: Any, arguments: tuple, replicates: int, execution: Execution) -> tuple[Any, Cost]:
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
