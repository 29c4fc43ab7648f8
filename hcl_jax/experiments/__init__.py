"""The experiment engine: replicates as pure functions, sweeps over cells, results on disk."""

from hcl_jax.experiments.cell import FITTED, Cell, fitted_hierarchy
from hcl_jax.experiments.dry_run import format_costs, project_costs
from hcl_jax.experiments.executors import run_sweep
from hcl_jax.experiments.recovery import Recovery
from hcl_jax.experiments.runtime import CompilationCounter, configure
from hcl_jax.experiments.store import OutputError, Store, read_results
from hcl_jax.experiments.summary import format_summary, summarise
from hcl_jax.experiments.sweep import Execution, Sweep

__all__ = [
    "FITTED",
    "Cell",
    "CompilationCounter",
    "Execution",
    "OutputError",
    "Recovery",
    "Store",
    "Sweep",
    "configure",
    "fitted_hierarchy",
    "format_costs",
    "format_summary",
    "project_costs",
    "read_results",
    "run_sweep",
    "summarise",
]
