"""The eICU Collaborative Research Database, version 2.0, as MEDS events: https://physionet.org/content/eicu-crd/, and its demo.

A subject is a hospital stay, since stays of one year cannot be ordered on one clock; `groups.parquet` holds its patient
(`uniquepid`) and hospital, by which rows are split. A subject's clock starts with the hospital stay, on 31 December of the year
of discharge. Entries stand where they were entered, drugs where they were ordered and had started, the variables of the APACHE
score 24 hours after ICU admission.

Not read, since they tell how a stay ended or were written afterwards: `apachePatientResult`, `apachePredVar`,
`activeupondischarge` in any table, `dischargeweight`, and times at which drugs were stopped.
"""

from collections.abc import Callable
from pathlib import Path

import polars as pl

from hcl_jax.records.meds import BIRTH, DEATH, Events, code, events, write_meds
from hcl_jax.records.tables import Kind, Table, refuse_repeated, scan

STAY: dict[str, Kind] = {"patientunitstayid": "id"}
VITALS = (
    *("noninvasivesystolic", "noninvasivediastolic", "noninvasivemean", "paop", "cardiacoutput", "cardiacinput"),
    *("svr", "svri", "pvr", "pvri"),
)
APS = (
    *("intubated", "vent", "dialysis", "eyes", "motor", "verbal", "meds", "urine", "wbc", "temperature", "respiratoryrate"),
    *("sodium", "heartrate", "meanbp", "ph", "hematocrit", "creatinine", "albumin", "pao2", "pco2", "bun", "glucose"),
    *("bilirubin", "fio2"),
)
TABLES: dict[str, dict[str, Kind]] = {
    "patient": {
        **STAY,
        **dict.fromkeys(("patienthealthsystemstayid", "hospitalid", "hospitaldischargeyear", "hospitaladmitoffset"), "id"),
        **dict.fromkeys(("hospitaldischargeoffset", "unitdischargeoffset"), "id"),
        **dict.fromkeys(
            ("uniquepid", "age", "gender", "ethnicity", "unittype", "hospitaladmitsource", "unitadmitsource"), "text"
        ),
        **dict.fromkeys(("hospitaldischargestatus", "hospitaldischargelocation"), "text"),
        **dict.fromkeys(("unitdischargestatus", "unitdischargelocation"), "text"),
        **dict.fromkeys(("admissionheight", "admissionweight"), "float"),
    },
    "diagnosis": {**STAY, "diagnosisoffset": "int", "diagnosisstring": "text"},
    "treatment": {**STAY, "treatmentoffset": "int", "treatmentstring": "text"},
    "medication": {
        **STAY,
        "drugorderoffset": "int",
        "drugstartoffset": "int",
        "drughiclseqno": "int",
        "drugordercancelled": "text",
    },
    "infusiondrug": {**STAY, "infusionoffset": "int", "drugname": "text"},
    "admissionDx": {**STAY, "admitdxenteredoffset": "int", "admitdxpath": "text"},
    "allergy": {**STAY, "allergyenteredoffset": "int", "allergyname": "text"},
    "admissiondrug": {**STAY, "drugenteredoffset": "int", "drughiclseqno": "int"},
    "carePlanGeneral": {**STAY, "cplitemoffset": "int", "cplgroup": "text", "cplitemvalue": "text"},
    "vitalAperiodic": {**STAY, "observationoffset": "int", **dict.fromkeys(VITALS, "float")},
    "respiratoryCharting": {**STAY, "respchartentryoffset": "int", "respchartvaluelabel": "text", "respchartvalue": "text"},
    "apacheApsVar": {**STAY, **dict.fromkeys(APS, "float")},
    "physicalExam": {
        **STAY,
        "physicalexamoffset": "int",
        "physicalexampath": "text",
        "physicalexamvalue": "text",
        "physicalexamtext": "text",
    },
    "pastHistory": {**STAY, "pasthistoryenteredoffset": "int", "pasthistorypath": "text"},
    "note": {**STAY, "noteenteredoffset": "int", "notepath": "text"},
}
HOUR = 60
DAY = 24 * HOUR


def extract_eicu(raw: Path | str, output: Path | str, name: str = "eICU-CRD") -> None:
    """Write the MEDS folder `output` from the folder `raw` of .csv.gz tables.

    Raises `ValueError` in one line with file, column and row for tables that are not what they should be.
    """
    tables = {table: Table(Path(raw), table, columns) for table, columns in TABLES.items()}
    refuse_repeated(tables["patient"], "patientunitstayid")
    frames = {table: scan(held) for table, held in tables.items()}
    start = pl.datetime(pl.col("hospitaldischargeyear"), 12, 31) - pl.duration(minutes=pl.col("hospitaladmitoffset"))
    patients = frames["patient"].rename({"patienthealthsystemstayid": "subject_id"}).with_columns(start=start)
    clock = patients.select("patientunitstayid", "subject_id", "start")
    parts = _stays(tables["patient"], patients)
    for table, read in READERS.items():
        parts.append(read(tables[table], frames[table].join(clock, on="patientunitstayid")))
    groups = patients.select("subject_id", patient="uniquepid", hospital=pl.col("hospitalid").cast(pl.String))
    write_meds(output, parts, groups.unique("subject_id", keep="first", maintain_order=True).collect(), {"dataset_name": name})


def _stays(table: Table, patients: pl.LazyFrame) -> list[Events]:
    """Stays in hospital, one a subject, and in its units; what is known of the patient on admission."""
    hospital = patients.unique("subject_id", keep="first", maintain_order=True)
    status = {which: pl.col(f"{which}dischargestatus").str.to_uppercase() for which in ("hospital", "unit")}
    admitted = pl.col("start") + pl.duration(minutes=pl.col("hospitaladmitoffset"))
    left = {which: pl.col("start") + pl.duration(minutes=pl.col(f"{which}dischargeoffset")) for which in status}
    ended = {which: (status[which], pl.col(f"{which}dischargelocation")) for which in status}
    age = pl.when(pl.col("age") == "> 89").then(pl.lit(90)).otherwise(pl.col("age").cast(pl.Int64, strict=False))
    birth = pl.datetime(pl.col("hospitaldischargeyear") - age, 7, 1)
    died = pl.when(status["hospital"] == "EXPIRED").then(left["hospital"])
    stay, start = pl.col("patientunitstayid"), pl.col("start")
    about = {"UNIT_ADMIT_SOURCE": "unitadmitsource", "HOSPITAL_ADMIT_SOURCE": "hospitaladmitsource"}
    return [
        events(hospital, table, "age", code=code(BIRTH), time=birth),
        events(hospital, table, "hospitaldischargeoffset", code=code(DEATH), time=died),
        events(hospital, table, "gender", code=code("GENDER", pl.col("gender")), time=None),
        events(hospital, table, "ethnicity", code=code("ETHNICITY", pl.col("ethnicity")), time=None),
        events(hospital, table, "hospitaladmitoffset", code=code("HOSPITAL_ADMISSION"), time=admitted),
        events(
            hospital, table, "hospitaldischargeoffset", code=code("HOSPITAL_DISCHARGE", *ended["hospital"]), time=left["hospital"]
        ),
        events(patients, table, "patientunitstayid", code=code("ICU_ADMISSION", pl.col("unittype")), time=start, stay=stay),
        events(patients, table, "unitdischargeoffset", code=code("ICU_DISCHARGE", *ended["unit"]), time=left["unit"], stay=stay),
        *(events(patients, table, name, code=code(word, pl.col(name)), time=start, stay=stay) for word, name in about.items()),
        *(
            events(patients.filter(pl.col(name) > 0), table, name, code=code(word), time=start, stay=stay, value=pl.col(name))
            for word, name in {"HEIGHT": "admissionheight", "WEIGHT": "admissionweight"}.items()
        ),
    ]


def _entries(word: str, offset: str, *parts: str) -> Callable[[Table, pl.LazyFrame], Events]:
    """Codes from columns; rows that lack one are left out."""

    def read(table: Table, frame: pl.LazyFrame) -> Events:
        return _timed(frame.drop_nulls(parts), table, offset, code(word, *map(pl.col, parts)))

    return read


def _texts(word: str, offset: str, path: str) -> Callable[[Table, pl.LazyFrame], Events]:
    """Templated entries: the words of the path that was chosen, `notes/Progress Notes/` left out."""

    def read(table: Table, frame: pl.LazyFrame) -> Events:
        return _timed(frame, table, offset, code("NOTE", word), text=_words(path))

    return read


def _words(path: str) -> pl.Expr:
    return pl.col(path).str.strip_prefix("notes/Progress Notes/").str.replace_all("/", " ", literal=True)


def _medication(table: Table, frame: pl.LazyFrame) -> Events:
    given = frame.filter(pl.col("drugordercancelled").fill_null("No") != "Yes").drop_nulls("drughiclseqno")
    known = given.with_columns(known=pl.max_horizontal("drugorderoffset", "drugstartoffset"))
    return _timed(known, table, "known", code("MEDICATION", pl.col("drughiclseqno")), column="drugstartoffset")


def _vitals(table: Table, frame: pl.LazyFrame) -> Events:
    long = _long(frame, ("observationoffset",), VITALS)
    return _timed(long, table, "observationoffset", code("VITAL", pl.col("variable")), value=pl.col("value"))


def _respiratory(table: Table, frame: pl.LazyFrame) -> Events:
    value = pl.col("respchartvalue").str.strip_chars("% ").cast(pl.Float64, strict=False)
    kept = frame.with_columns(value=value).drop_nulls("value")
    return _timed(kept, table, "respchartentryoffset", code("RESPIRATORY", pl.col("respchartvaluelabel")), value=pl.col("value"))


def _scores(table: Table, frame: pl.LazyFrame) -> Events:
    """APACHE variables, the worst of the first 24 hours; −1 is missing."""
    long = _long(frame, (), APS).filter(pl.col("value") != -1).with_columns(known=pl.lit(DAY))
    return _timed(long, table, "known", code("APS", pl.col("variable")), value=pl.col("value"), column="patientunitstayid")


def _exam(table: Table, frame: pl.LazyFrame) -> Events:
    """Numbers are measurements, the rest templated entries."""
    number = pl.col("physicalexamtext").cast(pl.Float64, strict=False)
    name = pl.when(number.is_not_null()).then(code("EXAM", pl.col("physicalexamvalue"))).otherwise(code("NOTE", "EXAM"))
    text = pl.when(number.is_null()).then(_words("physicalexampath"))
    return _timed(frame, table, "physicalexamoffset", name, value=number, text=text)


def _long(frame: pl.LazyFrame, kept: tuple[str, ...], columns: tuple[str, ...]) -> pl.LazyFrame:
    index = ["row", "patientunitstayid", "subject_id", "start", *kept]
    return frame.unpivot(list(columns), index=index).drop_nulls("value")


def _timed(
    frame: pl.LazyFrame, table: Table, offset: str, name: pl.Expr, *, value: pl.Expr | None = None, text: pl.Expr | None = None,
    column: str | None = None,
) -> Events:  # fmt: skip
    """Events at minutes `offset` after the admission to the unit."""
    time = pl.col("start") + pl.duration(minutes=pl.col(offset))
    return events(frame, table, column or offset, code=name, time=time, value=value, text=text, stay=pl.col("patientunitstayid"))


READERS: dict[str, Callable[[Table, pl.LazyFrame], Events]] = {
    "diagnosis": _entries("DIAGNOSIS", "diagnosisoffset", "diagnosisstring"),
    "treatment": _entries("TREATMENT", "treatmentoffset", "treatmentstring"),
    "medication": _medication,
    "infusiondrug": _entries("INFUSION", "infusionoffset", "drugname"),
    "admissionDx": _entries("ADMISSION_DIAGNOSIS", "admitdxenteredoffset", "admitdxpath"),
    "allergy": _entries("ALLERGY", "allergyenteredoffset", "allergyname"),
    "admissiondrug": _entries("HOME_MEDICATION", "drugenteredoffset", "drughiclseqno"),
    "carePlanGeneral": _entries("CARE_PLAN", "cplitemoffset", "cplgroup", "cplitemvalue"),
    "vitalAperiodic": _vitals,
    "respiratoryCharting": _respiratory,
    "apacheApsVar": _scores,
    "physicalExam": _exam,
    "pastHistory": _texts("HISTORY", "pasthistoryenteredoffset", "pasthistorypath"),
    "note": _texts("ENTRY", "noteenteredoffset", "notepath"),
}
