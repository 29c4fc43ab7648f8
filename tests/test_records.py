"""Health records: raw tables to events, labels, modalities; what may not enter; tables that are not what they should be."""

import gzip
import os
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import PLACES

import records
from hcl_jax.records import (
    HOSPITAL_TASKS,
    ICU_TASKS,
    Inputs,
    Task,
    check_meds,
    eicu,
    extract_eicu,
    extract_mimic_iv,
    fit,
    label,
    mimic_iv,
    read_groups,
    read_meds,
    split,
    suspects,
)
from hcl_jax.records.__main__ import main
from hcl_jax.records.leaks import column_auc
from hcl_jax.records.modalities import known

pytest.importorskip("meds")
START = datetime(2100, 1, 1)
MIMIC = {
    "readmission-30d": (260, 53),
    "readmission-30d-penultimate": (48, 16),
    "mortality-1y": (85, 16),
    "mortality-hospital": (245, 14),
    "los-7d": (245, 91),
    "los-next": (175, None),
}
EICU = {
    "mortality-hospital": (1442, 125),
    "icu-los-3d": (1442, 479),
    "not-home": (1314, 486),
    "icu-return": (1373, 68),
    "icu-los-remaining": (1442, None),
}
DEMOS = {
    "mimic_iv_demo": (extract_mimic_iv, HOSPITAL_TASKS, MIMIC),
    "eicu_demo/csv": (extract_eicu, ICU_TASKS, EICU),
}


@pytest.fixture(scope="session")
def extracted(tmp_path_factory):
    """The MEDS folder of a demo, extracted once a process."""
    done: dict[str, Path] = {}

    def of(name: str) -> Path:
        raw = Path(os.environ.get("HCL_DATA", PLACES["HCL_DATA"])) / name
        if not raw.exists():
            pytest.skip(f"{name} is not in HCL_DATA")
        if name not in done:
            done[name] = tmp_path_factory.mktemp("records") / "meds"
            DEMOS[name][0](raw, done[name])
        return done[name]

    return of


def write_table(folder: Path, name: str, columns, rows=()) -> Path:
    """A .csv.gz with these columns; a row is a dictionary, of which cells that lack are empty."""
    path = folder / f"{name}.csv.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(columns), *(",".join(str(row.get(column, "")) for column in columns) for row in rows)]
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    return path


def day(k: float) -> str:
    return str(START + timedelta(days=k))


def write_mimic(folder: Path, n: int = 60) -> Path:
    """Patients of two stays of two days, ten days apart, of which the first three die in the second, after it has ended; each
    has a laboratory value at the start of each stay, a diagnosis, a discharge summary, and every other one a report."""
    stays = [
        {"subject_id": s, "hadm_id": 10 * s + k, "admittime": day(12 * k), "dischtime": day(12 * k + 2), "race": "ANY"}
        | ({"deathtime": day(14.1), "hospital_expire_flag": 1} if k == 1 and s <= 3 else {"hospital_expire_flag": 0})
        for s in range(1, n + 1)
        for k in (0, 1)
    ]
    ids = [{name: row[name] for name in ("subject_id", "hadm_id")} for row in stays]
    when = [{"charttime": row["admittime"], "storetime": row["admittime"]} for row in stays]
    rows = {
        "hosp/patients": [{"subject_id": s, "gender": "F", "anchor_age": 50, "anchor_year": 2100} for s in range(1, n + 1)],
        "hosp/admissions": stays,
        "hosp/diagnoses_icd": [{**row, "icd_code": "I10", "icd_version": 10} for row in ids],
        "hosp/labevents": [
            {**row, **time, "itemid": 1, "valuenum": k, "value": k, "valueuom": "mg"}
            for k, (row, time) in enumerate(zip(ids, when, strict=True))
        ],
        "note/discharge": [
            {**row, "charttime": time["charttime"], "text": "summary of stay"} for row, time in zip(ids, when, strict=True)
        ],
        "note/radiology": [
            {**row, "charttime": time["charttime"], "storetime": day(0.5), "text": "clear lungs"}
            for row, time in list(zip(ids, when, strict=True))[::4]
        ],
    }
    for name, columns in {
        **mimic_iv.NEEDED,
        **{note: mimic_iv.OPTIONAL[note] for note in ("note/discharge", "note/radiology")},
    }.items():
        write_table(folder, name, list(columns), rows.get(name, ()))
    return folder


@pytest.fixture
def mimic(tmp_path):
    return write_mimic(tmp_path / "raw")


@pytest.mark.parametrize("name", DEMOS)
def test_demos_give_the_cohorts_that_their_raw_tables_give(name, extracted):
    """Counted once from the raw tables by themselves, without events."""
    path = extracted(name)
    found = {}
    for task in DEMOS[name][1]:
        flow = label(read_meds(path), task).flow
        assert flow["rows"].is_sorted(descending=True)
        found[task.name] = flow.select("rows", "positive").row(-1)
    assert found == DEMOS[name][2]
    check_meds(path)


def test_eicu_demo_has_the_patients_and_hospitals_of_its_cohort(extracted):
    path = extracted("eicu_demo/csv")
    labels = label(read_meds(path), ICU_TASKS[0]).table
    rows = labels.join(read_groups(path), on="subject_id")
    assert (rows["patient"].n_unique(), rows["hospital"].n_unique()) == (1268, 186)


def eicu_table(name: str, columns) -> pl.LazyFrame:
    """Columns of a raw table of eICU's demo that the extraction does not read."""
    folder = Path(os.environ.get("HCL_DATA", PLACES["HCL_DATA"])) / "eicu_demo/csv"
    return pl.read_csv(folder / f"{name}.csv.gz", columns=["patientunitstayid", *columns]).lazy()


def planted(events: pl.LazyFrame, rows: pl.LazyFrame, code: pl.Expr, value: pl.Expr) -> pl.LazyFrame:
    """Events with those of other rows at the admission to the unit."""
    unit = events.filter(pl.col("code").str.starts_with("ICU_ADMISSION")).select("subject_id", "time", "stay_id")
    joined = unit.join(rows, left_on="stay_id", right_on="patientunitstayid")
    new = joined.select("subject_id", "time", code=code, numeric_value=value.cast(pl.Float32), text_value=pl.lit(None, pl.String))
    return pl.concat([events.drop("stay_id"), new])


def found_in(events: pl.LazyFrame, labels: pl.DataFrame) -> set[str]:
    names, columns = fit(events, labels).single_columns(events, labels)
    return set(suspects(names, columns, labels["boolean_value"].to_numpy())["column"])


def test_eicu_demo_has_no_column_that_tells_death(extracted):
    events = read_meds(extracted("eicu_demo/csv"))
    assert found_in(events, label(events, ICU_TASKS[0]).table) == set()


def test_leaks_of_death_planted_in_eicu_demo_are_found(extracted):
    """Status at discharge and the care plan of the whole stay as of admission; outcomes among the predictors of APACHE."""
    events = read_meds(extracted("eicu_demo/csv"))
    late = pl.any_horizontal(pl.col("code").str.starts_with(word) for word in ("HOSPITAL_DISCHARGE", "CARE_PLAN"))
    early = events.with_columns(time=pl.when(late).then(pl.col("time").min().over("subject_id")).otherwise("time"))
    score = eicu_table("apachePredVar", ["diedinhospital", "dischargelocation"])
    long = score.unpivot(["diedinhospital", "dischargelocation"], index="patientunitstayid")
    leaks = planted(early, long, pl.col("variable"), pl.col("value"))
    found = found_in(leaks, label(events, ICU_TASKS[0]).table)
    assert {"HOSPITAL_DISCHARGE//EXPIRED//Death", "HOSPITAL_DISCHARGE//ALIVE//Home"} <= found
    assert {"diedinhospital last", "dischargelocation last"} <= found
    assert "CARE_PLAN//Care Limitation//Do not resuscitate" in found


def test_what_was_active_at_discharge_is_found_to_tell_a_return(extracted):
    events = read_meds(extracted("eicu_demo/csv"))
    plan = eicu_table("carePlanGeneral", ["cplitemoffset", "cplgroup", "cplitemvalue", "activeupondischarge"])
    code = pl.format("{}//{}//{}", "cplgroup", "cplitemvalue", "activeupondischarge")
    leaks = planted(events, plan.filter(pl.col("cplitemoffset") <= 1440), code, pl.lit(None))
    task = next(task for task in ICU_TASKS if task.name == "icu-return")
    assert "Care Limitation//Full therapy//false" in found_in(leaks, label(events, task).table)


def test_notes_codes_and_deaths_stand_where_they_were_known(mimic, tmp_path):
    extract_mimic_iv(mimic, tmp_path / "meds")
    rows = read_meds(tmp_path / "meds").filter(pl.col("subject_id") == 1).collect()

    def times(code):
        return [(time - START) / timedelta(days=1) for time in rows.filter(pl.col("code") == code)["time"]]

    assert times("NOTE//DISCHARGE") == [2, 14]
    assert times("DIAGNOSIS//ICD//10//I10") == [2, 14]
    assert times("NOTE//RADIOLOGY") == [0.5]
    assert times("MEDS_DEATH") == [pytest.approx(14.1)]
    labels = {task.name: label(read_meds(tmp_path / "meds"), task).table for task in HOSPITAL_TASKS}
    assert labels["mortality-hospital"]["boolean_value"].sum() == 3  # though the deaths are timed after the stays
    assert labels["readmission-30d"]["boolean_value"].sum() == 60
    assert labels["los-next"]["float_value"].to_list() == [2.0] * 60


def test_eicu_entries_stand_where_they_were_known(tmp_path):
    """A drug when it was ordered and started, APACHE's variables after a day, −1 is missing, a second stay at its own time."""
    stay = {
        "hospitaladmitoffset": -60,
        "hospitaldischargeyear": 2015,
        "hospitaldischargeoffset": 9000,
        "unitdischargeoffset": 2000,
    }
    stay |= {"patienthealthsystemstayid": 7, "hospitalid": 5, "uniquepid": "p", "age": "> 89", "hospitaldischargestatus": "Alive"}
    stay |= {"unitdischargestatus": "Alive", "hospitaldischargelocation": "Home"}
    rows = {
        "patient": [{**stay, "patientunitstayid": 1}, {**stay, "patientunitstayid": 2, "hospitaladmitoffset": -3000}],
        "medication": [{"patientunitstayid": 1, "drugorderoffset": 30, "drugstartoffset": -10, "drughiclseqno": 9}],
        "apacheApsVar": [{"patientunitstayid": 1, "ph": -1, "bun": 20}],
        "note": [{"patientunitstayid": 1, "noteenteredoffset": 5, "notepath": "notes/Progress Notes/Plan/stable"}],
    }
    for name, columns in eicu.TABLES.items():
        write_table(tmp_path / "raw", name, list(columns), rows.get(name, ()))
    extract_eicu(tmp_path / "raw", tmp_path / "meds")
    events = read_meds(tmp_path / "meds").collect()
    admitted = datetime(2015, 12, 31)

    def minutes(start):
        return [(time - admitted) / timedelta(minutes=1) for time in events.filter(pl.col("code").str.starts_with(start))["time"]]

    assert minutes("ICU_ADMISSION") == [60, 3000]
    assert minutes("MEDICATION//9") == [90]
    assert minutes("APS") == [60 + 1440]
    assert events.filter(pl.col("text_value").is_not_null())["text_value"].to_list() == ["Plan stable"]
    labels = {task.name: label(events.lazy(), task).table for task in ICU_TASKS}
    assert labels["icu-return"].rows() == [(7, admitted + timedelta(minutes=1500), True)]
    assert labels["icu-los-remaining"]["float_value"].to_list() == [pytest.approx(560 / 1440)]


def replace(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new, 1)


DAMAGE = {
    "missing column": ("hosp/labevents", lambda text: replace(text, "itemid", "other"), ("column itemid", "row 0")),
    "number in words": (
        "hosp/labevents",
        lambda text: replace(text, ",3,3,", ",3,three,"),
        ("column valuenum", "row 4", "'three'"),
    ),
    "no subject": ("hosp/diagnoses_icd", lambda text: replace(text, "\n2,", "\n,"), ("column subject_id", "row 3")),
    "no time": ("hosp/admissions", lambda text: replace(text, day(0), "2100-13-01 00:00:00"), ("column admittime", "row 1")),
    "stay twice": ("hosp/admissions", lambda text: replace(text, "\n2,21,", "\n2,20,"), ("column hadm_id", "row 4", "20")),
    "before birth": (
        "hosp/labevents",
        lambda text: text.replace(day(0), str(datetime(1999, 1, 1)), 2),
        ("column charttime", "row 1"),
    ),
    "row too long": ("hosp/labevents", lambda text: replace(text, "\n2,", "\n2,,"), ("row 3", "fields")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_tables_are_refused_with_file_column_and_row(damage, mimic, tmp_path):
    name, change, words = DAMAGE[damage]
    path = mimic / f"{name}.csv.gz"
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()).decode()).encode()))
    with pytest.raises(ValueError, match=name) as refused:
        extract_mimic_iv(mimic, tmp_path / "meds")
    message = str(refused.value)
    assert all(word in message for word in (str(path), *words)), message
    assert "\n" not in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]  # nothing half-written


@pytest.mark.parametrize("name", ["hosp/labevents", "hosp/admissions"])
def test_truncated_tables_are_refused_with_file_and_row(name, mimic, tmp_path):
    path = mimic / f"{name}.csv.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{name}\.csv\.gz: row \d+: .*expected a whole table"):
        extract_mimic_iv(mimic, tmp_path / "meds")


def test_missing_tables_and_existing_folders_are_refused(mimic, tmp_path):
    with pytest.raises(ValueError, match="exists; expected a new folder"):
        extract_mimic_iv(mimic, tmp_path)
    (mimic / "hosp/labevents.csv.gz").unlink()
    with pytest.raises(ValueError, match="labevents.csv.gz: no such file"):
        extract_mimic_iv(mimic, tmp_path / "meds")


def made(n: int = 120, seed: int = 0) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Events of n subjects over ten days, and a label each at five days, which a code at six days tells."""
    rng = np.random.default_rng(seed)
    y = rng.random(n) < 0.4
    rows = []
    for s in range(n):
        rows.append((s, START - timedelta(days=365 * 40 + s), "MEDS_BIRTH", None, None))
        for time in np.sort(rng.uniform(0, 10, 30)):
            kind, at = rng.integers(3), START + timedelta(days=float(time))
            if kind == 0:
                rows.append((s, at, f"CODE//{rng.integers(12)}", None, None))
            elif kind == 1:
                rows.append((s, at, f"LAB//{rng.integers(4)}", float(rng.normal()), None))
            elif s % 5:
                rows.append((s, at, "NOTE", None, " ".join(rng.choice(["alpha", "beta", "gamma", "delta"], 3))))
        rows.append((s, START + timedelta(days=6), f"OUTCOME//{y[s]}", None, None))
    columns = ("subject_id", "time", "code", "numeric_value", "text_value")
    schema = [pl.Int64, pl.Datetime("us"), pl.String, pl.Float32, pl.String]
    events = pl.DataFrame(rows, schema=dict(zip(columns, schema, strict=True)), orient="row")
    labels = pl.DataFrame({"subject_id": np.arange(n), "prediction_time": [START + timedelta(days=5)] * n, "boolean_value": y})
    return events, labels.with_columns(pl.col("prediction_time").cast(pl.Datetime("us")))


def assert_same_rows(one, other) -> None:
    for name, view in one.views.items():
        np.testing.assert_allclose(view, other.views[name], atol=1e-10)
    np.testing.assert_array_equal(one.presence, other.presence)
    np.testing.assert_array_equal(one.demographics, other.demographics)


def test_nothing_after_the_prediction_time_can_enter():
    events, labels = made()
    later = pl.col("time") > START + timedelta(days=5)
    changed = events.with_columns(
        code=pl.when(later).then(pl.lit("OTHER")).otherwise("code"),
        numeric_value=pl.when(later).then(9.0).otherwise("numeric_value"),
    )
    inputs = Inputs(rarest=5, width=6)
    rows = [
        fit(found.lazy(), labels, inputs).transform(found.lazy(), labels) for found in (events, events.filter(~later), changed)
    ]
    assert rows[0].views["codes"].shape[1] == 6
    for other in rows[1:]:
        assert_same_rows(rows[0], other)
    assert known(events.lazy(), labels).select(pl.col("time").max()).collect().item() <= START + timedelta(days=5)


def test_rows_are_transformed_one_by_one_by_what_training_rows_gave():
    events, labels = made()
    modalities = fit(events.lazy(), labels[:80], Inputs(rarest=5, width=6))
    rows = modalities.transform(events.lazy(), labels[80:])
    alone = [modalities.transform(events.lazy(), labels[k : k + 1]) for k in (80, 99, 119)]
    for row, k in zip(alone, (0, 19, 39), strict=True):
        np.testing.assert_allclose(row.views["codes"][0], rows.views["codes"][k], atol=1e-10)
        np.testing.assert_allclose(row.views["measurements"][0], rows.views["measurements"][k], atol=1e-10)
    without = events.filter(pl.col("subject_id") < 80)
    again = fit(without.lazy(), labels[:80], Inputs(rarest=5, width=6)).transform(events.lazy(), labels[80:])
    assert_same_rows(rows, again)


def test_modalities_that_a_row_lacks_are_missing():
    events, labels = made()
    rows = fit(events.lazy(), labels, Inputs(rarest=5, width=6)).transform(events.lazy(), labels)
    early = events.filter(pl.col("text_value").is_not_null() & (pl.col("time") <= START + timedelta(days=5)))
    no_text = ~labels["subject_id"].is_in(early["subject_id"].unique().implode()).to_numpy()
    assert no_text.sum() >= len(labels) / 5
    np.testing.assert_array_equal(rows.presence[:, 2], ~no_text)
    np.testing.assert_array_equal(np.isnan(rows.views["text"]).all(axis=1), no_text)
    assert np.isfinite(rows.views["text"][~no_text]).all()
    np.testing.assert_allclose(rows.demographics[:, 0], 40 + np.arange(len(labels)) / 365.25, atol=0.05)


def test_measurements_are_last_mean_and_count():
    times = [START + timedelta(days=k) for k in range(4)]
    rows = [(s, times[k], "LAB", float(k + s * k), None) for s in range(4) for k in range(4) if s != 3 or k == 0]
    schema = {"subject_id": pl.Int64, "time": pl.Datetime("us"), "code": pl.String, "numeric_value": pl.Float32}
    events = (
        pl.DataFrame(rows, schema={**schema, "text_value": pl.String}, orient="row")
        .sample(fraction=1.0, shuffle=True, seed=0)
        .lazy()
    )
    labels = pl.DataFrame({"subject_id": range(4), "prediction_time": [times[2]] * 4}).cast(
        {"prediction_time": pl.Datetime("us")}
    )
    modalities = fit(events, labels, Inputs(rarest=1))
    assert modalities.columns == ["LAB last", "LAB count"]  # the mean is half the last value here, and presence is everywhere
    last, count = (modalities.transform(events, labels).views["measurements"] * modalities.scales + modalities.means).T
    np.testing.assert_allclose(last, [2, 4, 6, 0])
    np.testing.assert_allclose(np.expm1(count), [3, 3, 3, 1])


def test_columns_that_tell_the_label_are_found():
    events, labels = made()
    y = labels["boolean_value"].to_numpy()
    inputs = Inputs(rarest=5, width=6)
    clean = fit(events.lazy(), labels, inputs).single_columns(events.lazy(), labels)
    assert len(suspects(*clean, y)) == 0
    leaked = events.with_columns(time=pl.when(pl.col("code").str.starts_with("OUTCOME")).then(START).otherwise("time")).lazy()
    found = suspects(*fit(leaked, labels, inputs).single_columns(leaked, labels), y)
    assert set(found["column"]) == {"OUTCOME//true", "OUTCOME//True", "OUTCOME//False"} & set(found["column"])
    assert len(found) == 2
    assert found["auc"].round(6).sort().to_list() == [0.0, 1.0]


def test_a_rare_column_that_is_pure_is_found():
    rng = np.random.default_rng(0)
    y = rng.random(2000) < 0.5
    columns = np.stack([y & (rng.random(2000) < 0.1), rng.random(2000) < 0.1], axis=1).astype(float)
    found = suspects(["tells", "noise"], columns, y)
    assert found.select("column", "reason").rows() == [("tells", "pure")]


def test_auc_of_columns_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    y, columns = rng.random(50) < 0.4, rng.integers(0, 4, (50, 6)).astype(float)
    expected = [metrics.roc_auc_score(y, column) for column in columns.T]
    np.testing.assert_allclose(column_auc(columns, y), expected)


def test_values_that_are_names_are_ordered_by_their_labels():
    rng = np.random.default_rng(0)
    place = rng.integers(0, 5, 600)
    columns = np.stack([place, rng.integers(0, 5, 600), rng.normal(size=600)], axis=1).astype(float)
    y = place == 2
    assert abs(column_auc(columns, y)[0] - 0.5) < 0.1
    assert suspects(["place", "noise", "normal"], columns, y).select("column", "auc").rows() == [("place", 1.0)]


def test_parts_share_no_patient_and_no_hospital():
    rng = np.random.default_rng(0)
    n = 1000
    groups = pl.DataFrame(
        {
            "subject_id": np.arange(n),
            "patient": rng.integers(0, 600, n).astype(str),
            "hospital": rng.integers(0, 80, n).astype(str),
        }
    )
    groups = groups.with_columns(hospital=pl.col("hospital").first().over("patient"))
    groups[0, "hospital"] = "elsewhere"
    labels = groups.select("subject_id").sample(fraction=1.0, shuffle=True, seed=1)
    for by in (("patient",), ("patient", "hospital")):
        parts = labels.join(groups, on="subject_id", maintain_order="left").with_columns(part=split(labels, groups, by, seed=0))
        for name in by:
            assert parts.group_by(name).agg(pl.col("part").n_unique())["part"].max() == 1
        shares = parts["part"].value_counts(normalize=True).sort("part")["proportion"].to_numpy()
        np.testing.assert_allclose(shares, [0.2, 0.7, 0.1], atol=0.05)
    assert np.any(split(labels, groups, seed=0) != split(labels, groups, seed=1))
    with pytest.raises(ValueError, match="by: is"):
        split(labels, groups, ("ward",), seed=0)


def test_the_command_writes_labels_and_cohorts(mimic, tmp_path, capsys):
    arguments = ["mimic-iv", str(mimic), str(tmp_path / "out"), "--leaks"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "mortality-1y: the " in shown
    assert "columns stand out in" in shown
    cohorts = pl.read_csv(tmp_path / "out" / "cohorts.csv")
    assert set(cohorts["task"]) == {task.name for task in HOSPITAL_TASKS}
    labels = pl.read_parquet(tmp_path / "out" / "labels" / "readmission-30d.parquet")
    assert labels.columns == ["subject_id", "prediction_time", "boolean_value"]
    assert main(arguments) == 2
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1
    assert "exists; expected a new folder" in refused


def test_the_benchmark_copies_patients(mimic, capsys):
    records.main(records.Arguments(mimic, (1, 3)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [int(line[0]) for line in lines] == [60, 180]
    assert int(lines[1][1]) == 3 * int(lines[0][1])


def write_meds_file(folder: Path, rows: pl.DataFrame, name: str = "0") -> Path:
    path = folder / "data" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.write_parquet(path)
    return path


OWN = pl.DataFrame(
    {
        "subject_id": [1, 1, 1, 1, 2, 2],
        "time": [START + timedelta(days=k) for k in (0, 3, 20, 22, 0, 9)],
        "code": ["HOSPITAL_ADMISSION", "HOSPITAL_DISCHARGE//HOME"] * 2 + ["HOSPITAL_ADMISSION", "HOSPITAL_DISCHARGE//DIED"],
    }
)


def test_any_meds_folder_is_read(tmp_path):
    """One without stay_id, values and groups: stays are an admission and the discharge that follows."""
    write_meds_file(tmp_path, OWN)
    check_meds(tmp_path)
    events = read_meds(tmp_path)
    found = {task.name: label(events, task).flow.select("rows", "positive").row(-1) for task in HOSPITAL_TASKS}
    assert found["readmission-30d"] == (2, 1)
    assert found["mortality-hospital"] == (3, 1)
    assert found["los-7d"] == (3, 1)
    assert read_groups(tmp_path)["patient"].to_list() == ["1", "2"]


BAD_FOLDERS = {
    "no code column": (OWN.drop("code"), "code"),
    "words for times": (OWN.with_columns(pl.col("code").alias("time")), "time"),
    "no code": (OWN.with_columns(code=pl.when(pl.col("subject_id") == 1).then("code")), "column code, row 5"),
    "out of order": (OWN[[1, 0, 2, 3, 4, 5]], "column time, row 2"),
    "subject apart": (OWN[[0, 1, 4, 5, 2, 3]], "column subject_id, row 5"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_folders_that_meds_does_not_allow_are_refused(case, tmp_path):
    rows, words = BAD_FOLDERS[case]
    path = write_meds_file(tmp_path, rows)
    with pytest.raises(ValueError, match=words) as refused:
        check_meds(tmp_path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_subject_in_two_files_is_refused(tmp_path):
    write_meds_file(tmp_path, OWN)
    write_meds_file(tmp_path, OWN[:2], "1")
    with pytest.raises(ValueError, match="column subject_id: 1 is in another file"):
        check_meds(tmp_path)


def test_tasks_without_stays_or_values_are_refused():
    with pytest.raises(ValueError, match="hold no codes ICU_ADMISSION"):
        label(OWN.with_columns(stay_id=pl.lit(None, pl.Int64)).lazy(), ICU_TASKS[0])
    gone = Task("gone", pl.col("end"), pl.col("next_start") > pl.col("end"))
    with pytest.raises(ValueError, match="has no value or time in 2 rows"):
        label(OWN.with_columns(stay_id=pl.lit(None, pl.Int64)).lazy(), gone)
