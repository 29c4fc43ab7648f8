"""Tasks: which stays are rows, when something is predicted, and what. Labels follow the `LabelSchema` of MEDS.

A `Task` is expressions in the columns of a table of stays, one a stay in hospital or in a unit:

    subject_id, stay_id, start, end, status (ALIVE, EXPIRED or UNKNOWN at its end), location (where to), number (from 1, of the
    subject's), n_later, next_start, next_end, last_start (the latest of the subject's), death, birth;
    of stays in units also hospital_end, hospital_status, hospital_location: of a subject that is one hospital stay.

They are made from the events alone, so a task runs on any MEDS folder whose codes of admission and discharge start with the words
of `Task.stay`. Codes of discharge are `WORD//STATUS//LOCATION`; without a status, a death by the end of the stay tells it.
"""

from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

from hcl_jax.records.meds import BIRTH, DEATH

HOSPITAL = ("HOSPITAL_ADMISSION", "HOSPITAL_DISCHARGE")
ICU = ("ICU_ADMISSION", "ICU_DISCHARGE")
START, END = pl.col("start"), pl.col("end")
DAY = pl.duration(days=1)
Filter = tuple[str, pl.Expr]


@dataclass(frozen=True)
class Task:
    """Rows are the stays that pass all filters, in their order; a Boolean `value` is a class, a number is a float_value."""

    name: str
    prediction_time: pl.Expr
    value: pl.Expr
    cohort: tuple[Filter, ...] = ()
    stay: tuple[str, str] = HOSPITAL


class Labels(NamedTuple):
    """The labels of a task, and how its cohort came about."""

    table: pl.DataFrame
    """subject_id, prediction_time and boolean_value or float_value, in the order of the first two."""
    flow: pl.DataFrame
    """filter, rows, subjects, positive (null of a number): what each filter of the cohort leaves."""


def label(events: pl.LazyFrame, task: Task) -> Labels:
    """The labels of a task, and how many rows each filter leaves.

    Raises `ValueError` for events without such stays, and for a value that is null in a row of the cohort.
    """
    from meds import LabelSchema

    rows = (
        stays(events, task.stay).with_columns(prediction_time=task.prediction_time, value=task.value).collect(engine="streaming")
    )
    if not len(rows):
        raise ValueError(
            f"events: hold no codes {task.stay[0]} and {task.stay[1]} of one stay; expected those of the task {task.name}"
        )
    flow = [_count("all stays", rows)]
    for name, test in task.cohort:
        rows = rows.filter(test)
        flow.append(_count(name, rows))
    if rows["value"].null_count() or rows["prediction_time"].null_count():
        raise ValueError(
            f"task {task.name}: has no value or time in {rows['value'].null_count()} rows; expected a filter that leaves them out"
        )
    boolean = rows.schema["value"] == pl.Boolean
    value = pl.col("value").alias("boolean_value") if boolean else pl.col("value").cast(pl.Float32).alias("float_value")
    table = rows.select("subject_id", "prediction_time", value).sort("subject_id", "prediction_time")
    LabelSchema.align(table.to_arrow())
    return Labels(table, pl.DataFrame(flow))


def stays(events: pl.LazyFrame, words: tuple[str, str] = HOSPITAL) -> pl.LazyFrame:
    """Stays of a kind: from an event whose code starts with the first word to one that starts with the second.

    Events of one `stay_id` are one stay; without it, an admission and what follows until the next one.
    """
    rows = _pairs(events, words)
    for code, name in ((DEATH, "death"), (BIRTH, "birth")):
        times = events.filter(pl.col("code") == code).group_by("subject_id").agg(pl.col("time").min().alias(name))
        rows = rows.join(times, on="subject_id", how="left")
    told = pl.col("status").str.to_uppercase()
    dead = told.is_in(["EXPIRED", "DIED", "DEAD"]) | (~told.is_in(["ALIVE", "UNKNOWN"]) & (pl.col("death") <= END))
    rows = rows.sort("subject_id", "start", "end").with_columns(
        status=pl.when(dead.fill_null(False))
        .then(pl.lit("EXPIRED"))
        .otherwise(pl.when(told == "UNKNOWN").then("status").otherwise(pl.lit("ALIVE"))),
        number=pl.int_range(1, pl.len() + 1).over("subject_id"),
        n_later=pl.int_range(pl.len()).reverse().over("subject_id"),
        next_start=START.shift(-1).over("subject_id"),
        next_end=END.shift(-1).over("subject_id"),
        last_start=START.max().over("subject_id"),
    )
    if words == HOSPITAL:
        return rows
    location = pl.col("location").replace("UNKNOWN", None)
    hospital = stays(events).filter(pl.col("number") == 1)
    around = hospital.select("subject_id", hospital_end="end", hospital_status="status", hospital_location=location)
    return rows.join(around, on="subject_id", how="left")


def _pairs(events: pl.LazyFrame, words: tuple[str, str]) -> pl.LazyFrame:
    """subject_id, stay_id, start, end, and status and location from the code of the end."""
    first, last = (pl.col("code").str.starts_with(word) for word in words)
    found = events.filter(first | last).select("subject_id", "time", "code", "stay_id")
    ordered = found.sort("subject_id", "time", maintain_order=True)
    number = first.cast(pl.Int64).cum_sum().over("subject_id")
    parts = pl.col("code").filter(last).last().str.split("//")
    pairs = (
        ordered.with_columns(key=pl.coalesce("stay_id", -number))
        .group_by("subject_id", "key")
        .agg(
            stay_id=pl.col("stay_id").first(),
            start=pl.col("time").filter(first).first(),
            end=pl.col("time").filter(last).last(),
            status=parts.list.get(1, null_on_oob=True),
            location=parts.list.get(2, null_on_oob=True),
        )
    )
    return pairs.drop_nulls(["start", "end"]).drop("key")


def _count(name: str, rows: pl.DataFrame) -> dict[str, object]:
    positive = int(rows["value"].sum()) if rows.schema["value"] == pl.Boolean else None
    return {"filter": name, "rows": len(rows), "subjects": rows["subject_id"].n_unique(), "positive": positive}


def _days(span: pl.Expr) -> pl.Expr:
    return span.dt.total_microseconds() / 86_400_000_000


LEFT_ALIVE: Filter = ("discharged alive", pl.col("status") == "ALIVE")
FIRST_DAY: Filter = ("in hospital for 24 hours", END - START >= DAY)
BACK_SOON = (pl.col("next_start") - END <= 30 * DAY).fill_null(False)
DEAD_SOON = (pl.col("death") - END <= 365 * DAY).fill_null(False)

HOSPITAL_TASKS = (
    Task("readmission-30d", END, BACK_SOON, (LEFT_ALIVE,)),
    Task("readmission-30d-penultimate", END, BACK_SOON, (LEFT_ALIVE, ("the last but one", pl.col("n_later") == 1))),
    Task("mortality-1y", END, DEAD_SOON, (LEFT_ALIVE, ("the last", pl.col("n_later") == 0))),
    Task("mortality-hospital", START + DAY, pl.col("status") == "EXPIRED", (FIRST_DAY,)),
    Task("los-7d", START + DAY, END - START > 7 * DAY, (FIRST_DAY,)),
    Task("los-next", END, _days(pl.col("next_end") - pl.col("next_start")), (("with a later stay", pl.col("n_later") > 0),)),
)
"""Of MIMIC-IV and other records of several stays a patient; the paper's readmission is the penultimate one."""

AGE = (START - pl.col("birth")).dt.total_days() / 365.25
IN_UNIT = (
    ("the first stay in a unit", pl.col("number") == 1),
    ("in the unit for 24 hours", END - START >= DAY),
    ("in hospital for 24 hours", pl.col("hospital_end") - START >= DAY),
    ("of 18 years or unknown age", (AGE >= 18).fill_null(True)),
    ("with a known end", pl.col("hospital_status").is_in(["ALIVE", "EXPIRED"])),
)
SURVIVED: Filter = ("left the hospital alive", pl.col("hospital_status") == "ALIVE")
LOCATED: Filter = ("where to is known", pl.col("hospital_location").is_not_null())
LEFT_UNIT: Filter = ("left the unit alive", pl.col("status") == "ALIVE")
RETURN = (pl.col("last_start") - END >= pl.duration(hours=6)).fill_null(False)

ICU_TASKS = (
    Task("mortality-hospital", START + DAY, pl.col("hospital_status") == "EXPIRED", IN_UNIT, ICU),
    Task("icu-los-3d", START + DAY, END - START > 3 * DAY, IN_UNIT, ICU),
    Task("not-home", START + DAY, pl.col("hospital_location") != "Home", (*IN_UNIT, SURVIVED, LOCATED), ICU),
    Task("icu-return", START + DAY, RETURN, (*IN_UNIT, LEFT_UNIT), ICU),
    Task("icu-los-remaining", START + DAY, _days(END - START - DAY), IN_UNIT, ICU),
)
"""Of eICU, 24 hours after the first admission to a unit."""
