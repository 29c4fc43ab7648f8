"""Health records: raw tables to MEDS events, to labels of tasks, to three modalities at a prediction time."""

from hcl_jax.records.eicu import extract_eicu
from hcl_jax.records.leaks import suspects
from hcl_jax.records.meds import check_meds, read_groups, read_meds
from hcl_jax.records.mimic_iv import extract_mimic_iv
from hcl_jax.records.modalities import Inputs, Modalities, Rows, fit
from hcl_jax.records.splits import split
from hcl_jax.records.tasks import HOSPITAL_TASKS, ICU_TASKS, Task, label

__all__ = [
    "HOSPITAL_TASKS",
    "ICU_TASKS",
    "Inputs",
    "Modalities",
    "Rows",
    "Task",
    "check_meds",
    "extract_eicu",
    "extract_mimic_iv",
    "fit",
    "label",
    "read_groups",
    "read_meds",
    "split",
    "suspects",
]
