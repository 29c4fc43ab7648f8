"""MIMIC-IV as MEDS events: https://physionet.org/content/mimiciv/ (2.0 and later), its open demo, and MIMIC-IV-Note.

Times are those at which an entry was known. Diagnoses, procedures and DRG codes are billed after the stay and stand at its end,
as discharge summaries do; laboratory results stand where they were stored. How a stay ended is told by the events of discharge
and death alone; DRG severity and mortality, the output of a grouper, are not read. Births are on 1 July: half a year is the mean
of what the anchor leaves open. A death of which only the day is known is at its end.
"""

from pathlib import Path

import polars as pl

from hcl_jax.records.meds import BIRTH, DEATH, Events, code, events, write_meds
from hcl_jax.records.tables import Kind, Table, refuse_repeated, scan

STAY: dict[str, Kind] = {"subject_id": "id", "hadm_id": "int"}
ITEM: dict[str, Kind] = {**STAY, "itemid": "int", "storetime": "time"}
NEEDED: dict[str, dict[str, Kind]] = {
    "hosp/patients": {"subject_id": "id", "gender": "text", "anchor_age": "int", "anchor_year": "int", "dod": "date"},
    "hosp/admissions": {
        "subject_id": "id",
        "hadm_id": "id",
        **dict.fromkeys(("admittime", "dischtime", "deathtime"), "time"),
        **dict.fromkeys(("admission_type", "admission_location", "discharge_location", "insurance", "language"), "text"),
        **dict.fromkeys(("marital_status", "race"), "text"),
        "hospital_expire_flag": "int",
    },
    "hosp/diagnoses_icd": {**STAY, "icd_code": "text", "icd_version": "int"},
    "hosp/procedures_icd": {**STAY, "icd_code": "text", "icd_version": "int"},
    "hosp/drgcodes": {**STAY, "drg_type": "text", "drg_code": "text"},
    "hosp/labevents": {**ITEM, "charttime": "time", "value": "text", "valuenum": "float", "valueuom": "text"},
    "hosp/prescriptions": {**STAY, "starttime": "time", "drug": "text"},
}
OPTIONAL: dict[str, dict[str, Kind]] = {
    "icu/icustays": {**STAY, "intime": "time", "outtime": "time", "first_careunit": "text", "last_careunit": "text"},
    "icu/procedureevents": {**ITEM, "starttime": "time"},
    "icu/inputevents": {**ITEM, "starttime": "time"},
    "icu/outputevents": {**ITEM, "charttime": "time", "value": "float", "valueuom": "text"},
    "icu/chartevents": {**ITEM, "charttime": "time", "valuenum": "float", "valueuom": "text"},
    "note/discharge": {**STAY, "charttime": "time", "text": "text"},
    "note/radiology": {**STAY, "charttime": "time", "storetime": "time", "text": "text"},
}
"""Read if they are there: the demo has no notes and no chartevents."""
HOSPITAL_ADMISSION, HOSPITAL_DISCHARGE = "HOSPITAL_ADMISSION", "HOSPITAL_DISCHARGE"


def extract_mimic_iv(raw: Path | str, output: Path | str, name: str = "MIMIC-IV") -> None:
    """Write the MEDS folder `output` from the folder `raw`, which holds hosp/, and icu/ and note/ if they are wanted.

    Raises `ValueError` in one line with file, column and row for tables that are not what they should be.
    """
    tables = {table: Table(Path(raw), table, columns) for table, columns in {**NEEDED, **OPTIONAL}.items()}
    tables = {table: held for table, held in tables.items() if table in NEEDED or held.path.exists()}
    refuse_repeated(tables["hosp/patients"], "subject_id")
    refuse_repeated(tables["hosp/admissions"], "hadm_id")
    frames = {table: scan(held) for table, held in tables.items()}
    parts = [*_patients(tables, frames), *_admissions(tables, frames), *_billed(tables, frames), *_charted(tables, frames)]
    patients = frames["hosp/patients"].select("subject_id", patient=pl.col("subject_id").cast(pl.String)).collect()
    write_meds(output, parts, patients.with_columns(hospital=pl.lit(None, pl.String)), {"dataset_name": name})


def _patients(tables: dict[str, Table], frames: dict[str, pl.LazyFrame]) -> list[Events]:
    table = tables["hosp/patients"]
    died = frames["hosp/admissions"].group_by("subject_id").agg(pl.col("deathtime").min())
    frame = frames["hosp/patients"].join(died, on="subject_id", how="left")
    birth = pl.datetime(pl.col("anchor_year") - pl.col("anchor_age"), 7, 1)
    death = pl.coalesce("deathtime", pl.col("dod") + pl.duration(days=1, seconds=-1))
    return [
        events(frame, table, "anchor_year", code=code(BIRTH), time=birth),
        events(frame, table, "dod", code=code(DEATH), time=death),
        events(frame, table, "gender", code=code("GENDER", pl.col("gender")), time=None),
    ]


def _admissions(tables: dict[str, Table], frames: dict[str, pl.LazyFrame]) -> list[Events]:
    table, frame = tables["hosp/admissions"], frames["hosp/admissions"]
    start, end, stay = pl.col("admittime"), pl.col("dischtime"), pl.col("hadm_id")
    status = pl.when(pl.col("hospital_expire_flag") == 1).then(pl.lit("EXPIRED")).otherwise(pl.lit("ALIVE"))
    admitted = code(HOSPITAL_ADMISSION, pl.col("admission_type"), pl.col("admission_location"))
    left = code(HOSPITAL_DISCHARGE, status, pl.col("discharge_location"))
    found = [
        events(frame, table, "admittime", code=admitted, time=start, stay=stay),
        events(frame, table, "dischtime", code=left, time=end, stay=stay),
    ]
    for about in ("insurance", "language", "marital_status", "race"):
        found.append(events(frame, table, "admittime", code=code(about.upper(), pl.col(about)), time=start, stay=stay))
    if "icu/icustays" in tables:
        table, frame = tables["icu/icustays"], frames["icu/icustays"]
        entered, left = code("ICU_ADMISSION", pl.col("first_careunit")), code("ICU_DISCHARGE", pl.col("last_careunit"))
        found.append(events(frame, table, "intime", code=entered, time=pl.col("intime"), stay=stay))
        found.append(events(frame, table, "outtime", code=left, time=pl.col("outtime"), stay=stay))
    return found


def _billed(tables: dict[str, Table], frames: dict[str, pl.LazyFrame]) -> list[Events]:
    """What is written when a stay has ended: codes for its bill, and its summary."""
    ends = frames["hosp/admissions"].select("hadm_id", "dischtime")
    icd = code("ICD", pl.col("icd_version"), pl.col("icd_code"))
    codes = {
        "hosp/diagnoses_icd": code("DIAGNOSIS", icd),
        "hosp/procedures_icd": code("PROCEDURE", icd),
        "hosp/drgcodes": code("DRG", pl.col("drg_type"), pl.col("drg_code")),
        "note/discharge": code("NOTE", "DISCHARGE"),
    }
    found = []
    for name in filter(tables.__contains__, codes):
        frame = frames[name].join(ends, on="hadm_id", how="left")
        note = name == "note/discharge"
        time = pl.max_horizontal("charttime", "dischtime") if note else pl.col("dischtime")
        text = pl.col("text") if note else None
        column = "charttime" if note else "hadm_id"
        found.append(events(frame, tables[name], column, code=codes[name], time=time, text=text, stay=pl.col("hadm_id")))
    return found


def _charted(tables: dict[str, Table], frames: dict[str, pl.LazyFrame]) -> list[Events]:
    """What is measured, given and reported during a stay, when it was known. Laboratory results in words are codes."""
    item, unit = pl.col("itemid"), pl.col("valueuom")
    lab = pl.when(pl.col("valuenum").is_null()).then(code("LAB", item, pl.col("value"))).otherwise(code("LAB", item, unit))
    forms: dict[str, tuple[str, pl.Expr, str | None, str | None]] = {
        "hosp/labevents": ("charttime", lab, "valuenum", None),
        "hosp/prescriptions": ("starttime", code("MEDICATION", pl.col("drug")), None, None),
        "icu/procedureevents": ("starttime", code("ICU_PROCEDURE", item), None, None),
        "icu/inputevents": ("starttime", code("INFUSION", item), None, None),
        "icu/outputevents": ("charttime", code("OUTPUT", item, unit), "value", None),
        "icu/chartevents": ("charttime", code("CHART", item, unit), "valuenum", None),
        "note/radiology": ("charttime", code("NOTE", "RADIOLOGY"), None, "text"),
    }
    found = []
    for name in filter(tables.__contains__, forms):
        column, word, value, text = forms[name]
        time = pl.max_horizontal(column, "storetime") if "storetime" in tables[name].columns else pl.col(column)
        kind = {"value": None if value is None else pl.col(value), "text": None if text is None else pl.col(text)}
        found.append(events(frames[name], tables[name], column, code=word, time=time, stay=pl.col("hadm_id"), **kind))
    return found
