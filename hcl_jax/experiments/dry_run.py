"""What a sweep would cost: one timed replicate a device for each program, and the time and memory that follow."""

import time
from dataclasses import dataclass, replace

import jax

from hcl_jax.experiments.cell import Cell
from hcl_jax.experiments.replicate import Slots, method_program, place
from hcl_jax.experiments.store import Part
from hcl_jax.experiments.sweep import Draws, Execution, Sweep, Task, check_tasks, chunk_size, draw_arguments, draw_program_of

_GIB = 2**30


@dataclass(frozen=True)
class Cost:
    """One line of the projection. `seconds_each` is what a replicate takes while the other devices are busy with one of theirs."""

    cell: str
    method: str
    replicates: int
    seconds_compiling: float
    seconds_each: float
    memory_gib: float

    @property
    def seconds(self) -> float:
        return self.seconds_compiling + self.replicates * self.seconds_each / jax.device_count()


def project_costs(sweep: Sweep, tasks: list[Task], execution: Execution) -> list[Cost]:
    """Time every program (the draw, each method) once compiled, at the middle n of each setting, with a replicate on every device.

    Raises `ValueError` for what a method refuses.
    """
    check_tasks(sweep, tasks, execution)
    draws, costs = Draws(sweep, execution), []
    groups: dict[tuple, dict[str, list[Task]]] = {}
    for task in tasks:
        groups.setdefault(_setting(task), {}).setdefault(task.method, []).append(task)
    for by_method in groups.values():
        cells = sorted({task.cell for group in by_method.values() for task in group}, key=lambda cell: cell.n)
        middle = cells[len(cells) // 2]
        parts = {(task.cell.draw_name, task.part) for group in by_method.values() for task in group}
        costs.append(_time_draw(sweep, middle, sum(len(part) for _, part in parts), execution))
        for method, group in by_method.items():
            costs.append(_time_method(Task(middle, method, Part(0, jax.device_count() - 1)), group, draws))
    return costs


def _setting(task: Task) -> tuple:
    """What a program is timed for: all of the cell but n."""
    return (replace(task.cell, n=2),)


def _time_draw(sweep: Sweep, cell: Cell, replicates: int, execution: Execution) -> Cost:
    arguments = draw_arguments(sweep, cell, Slots.spread(0, jax.device_count(), chunk_size(cell, sweep.dtype, execution)))
    return _timed(cell.name, "(draw)", draw_program_of(sweep, cell, execution), arguments, replicates, execution)


def _time_method(sample: Task, group: list[Task], draws: Draws) -> Cost:
    ((drawn, slots),) = draws.chunks(sample)
    program = method_program(sample.method, sample.cell.fitted_hierarchy, draws.execution.batched)
    arguments = (None, drawn, place(slots.counts, split=True))
    replicates = sum(len(task.part) for task in group)
    return _timed(sample.cell.name, sample.method, program, arguments, replicates, draws.execution)


def _timed(cell: str, method: str, program, arguments: tuple, replicates: int, execution: Execution) -> Cost:
    jax.block_until_ready(arguments[1])
    start = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    compiling = time.perf_counter() - start
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    elapsed = time.perf_counter() - start
    places = jax.tree.leaves(arguments[1])[0].shape[0] // jax.device_count()
    return Cost(cell, method, replicates, compiling, elapsed / (places if execution.batched else 1), _memory(compiled))


def _memory(compiled) -> float:
    usage = compiled.memory_analysis()
    sizes = (usage.argument_size_in_bytes, usage.output_size_in_bytes, usage.temp_size_in_bytes)
    return jax.device_count() * sum(sizes) / _GIB


def format_costs(costs: list[Cost]) -> str:
    """The projection as a table, its total below."""
    width = max(len(cost.cell) for cost in costs)
    header = f"{'cell (at the middle n)':{width}}  {'method':20} {'replicates':>10} {'compile s':>10} {'s each':>10} {'total':>9} {'GiB':>7}"
    lines = [
        f"{c.cell:{width}}  {c.method:20} {c.replicates:10d} {c.seconds_compiling:10.1f} {c.seconds_each:10.3g} "
        f"{_duration(c.seconds):>9} {c.memory_gib:7.2f}"
        for c in costs
    ]
    total, memory = sum(cost.seconds for cost in costs), max(cost.memory_gib for cost in costs)
    footer = f"projected: {_duration(total)} on {jax.device_count()} devices, at most {memory:.2f} GiB on them at a time"
    return "\n".join([header, *lines, footer])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"
