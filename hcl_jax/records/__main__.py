"""From raw tables to events, labels and a look for leaks: `python -m hcl_jax.records mimic-iv RAW OUTPUT`."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl
import tyro

from hcl_jax.records.eicu import extract_eicu
from hcl_jax.records.leaks import suspects
from hcl_jax.records.meds import check_meds, read_groups, read_meds
from hcl_jax.records.mimic_iv import extract_mimic_iv
from hcl_jax.records.modalities import fit
from hcl_jax.records.splits import PARTS, split
from hcl_jax.records.tasks import HOSPITAL_TASKS, ICU_TASKS, label

EXTRACT = {"mimic-iv": extract_mimic_iv, "eicu": extract_eicu}


@dataclass(frozen=True)
class Records:
    """Write OUTPUT/meds (unless RAW is one), OUTPUT/labels/<task>.parquet, and OUTPUT/cohorts.csv: what each filter leaves."""

    source: tyro.conf.Positional[Literal["mimic-iv", "eicu", "meds"]]
    """What RAW is: tables of MIMIC-IV or of eICU, or any MEDS folder."""
    raw: tyro.conf.Positional[Path]
    output: tyro.conf.Positional[Path]
    leaks: bool = False
    """Also look for single columns that tell a label, on the training rows of a split by patient."""
    seed: int = 0
    """Of that split."""

    def run(self) -> None:
        start = time.monotonic()
        folder = self.raw
        if self.source in EXTRACT:
            folder = self.output / "meds"
            EXTRACT[self.source](self.raw, folder)
        events = read_meds(folder)
        cohorts = []
        (self.output / "labels").mkdir(parents=True, exist_ok=True)
        for task in ICU_TASKS if self.source == "eicu" else HOSPITAL_TASKS:
            found = label(events, task)
            found.table.write_parquet(self.output / "labels" / f"{task.name}.parquet")
            cohorts.append(found.flow.select(pl.lit(task.name).alias("task"), pl.all()))
        table = pl.concat(cohorts)
        table.write_csv(self.output / "cohorts.csv")
        print(f"extracted and labelled in {time.monotonic() - start:.1f} s")
        with pl.Config(tbl_rows=-1, tbl_hide_dataframe_shape=True, tbl_hide_column_data_types=True, fmt_str_lengths=80):
            print(table)
        check_meds(folder)
        if self.leaks:
            self.report_leaks(folder)

    def report_leaks(self, folder: Path) -> None:
        events, groups = read_meds(folder), read_groups(folder)
        for path in sorted((self.output / "labels").glob("*.parquet")):
            labels = pl.read_parquet(path)
            if "boolean_value" not in labels.columns:
                continue
            training = labels.filter(pl.Series(split(labels, groups, seed=self.seed) == PARTS[0]))
            if training["boolean_value"].n_unique() < 2:
                print(f"{path.stem}: the {len(training)} training rows are of one class")
                continue
            names, columns = fit(events, training).single_columns(events, training)
            found = suspects(names, columns, training["boolean_value"].to_numpy())
            print(f"{path.stem}: {len(found)} of {len(names)} columns stand out in {len(training)} training rows")
            for column, auc, rows, positive, reason in found.rows():
                print(f"  {column}: AUC {auc:.3f}, not 0 in {rows} rows, of which {positive:.1%} positive ({reason})")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 2, after one line, for tables that are not what they should be."""
    try:
        tyro.cli(Records, prog="python -m hcl_jax.records", args=arguments).run()
    except ValueError as error:
        print(f"records: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
