"""Seconds and memory of the extraction of MIMIC-IV by the number of patients: copies of its demo, with numbers of their own.

python benchmarks/records.py RAW --copies 1 15 60
"""

import gzip
import tempfile
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import tyro

from hcl_jax.records import extract_mimic_iv, read_meds
from hcl_jax.records.mimic_iv import NEEDED
from measuring import PeakMemory, run_script, timed


@dataclass(frozen=True)
class Arguments:
    raw: tyro.conf.Positional[Path]
    """The folder of MIMIC-IV's demo, which holds hosp/."""
    copies: tuple[int, ...] = (1, 15)
    """How often each patient comes."""


def write_copies(raw: Path, folder: Path, copies: int) -> None:
    """The tables that are needed, their patients and stays `copies` times."""
    for name in NEEDED:
        path = folder / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pl.read_csv(raw / f"{name}.csv.gz", infer_schema=False)
        steps = {"subject_id": 10**6, "hadm_id": 10**8}
        with gzip.open(path, "wb", compresslevel=1) as file:
            for k in range(copies):
                moved = [pl.col(key).cast(pl.Int64) + k * step for key, step in steps.items() if key in table.columns]
                file.write(table.with_columns(moved).write_csv(include_header=k == 0).encode())


def main(arguments: Arguments) -> None:
    if min(arguments.copies, default=0) < 1:
        raise ValueError(f"--copies: is {arguments.copies}; expected positive integers")
    print(f"{'patients':>9} {'events':>10} {'seconds':>8} {'memory, MB':>11}")
    for copies in arguments.copies:
        with tempfile.TemporaryDirectory() as place:
            raw, meds = Path(place) / "raw", Path(place) / "meds"
            write_copies(arguments.raw, raw, copies)
            with PeakMemory() as peak:
                _, seconds = timed(lambda raw=raw, meds=meds: extract_mimic_iv(raw, meds))
            patients, events = read_meds(meds).select(pl.col("subject_id").n_unique(), n=pl.len()).collect().row(0)
        print(f"{patients:9d} {events:10d} {seconds:8.1f} {peak.growth / 1e6:11.0f}")


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
