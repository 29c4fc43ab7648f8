"""Numbers and findings in words."""

import math
import re
from typing import Any

from hcl_jax.decomposition import Decomposition
from hcl_jax.report.content import Prediction, Sureness

UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""Characters that neither HTML nor SVG may hold."""
METRICS = {
    "r_squared": "R²",
    "rmse": "RMSE",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "log_loss": "log loss, nats",
    "concordance": "concordance",
}
METHODS = {"hcl_jax": "this decomposition", "pca": "as many principal components", "features": "all features"}
ABSENT = "–"


def printable(text: str) -> str:
    """The text, with the replacement character for whatever a page may not hold."""
    return UNPRINTABLE.sub("\ufffd", text)


def percent(value: float | None) -> str:
    """A share, such as 12.3 %."""
    return ABSENT if value is None or math.isnan(value) else f"{100 * value:.1f} %".replace("-", "−")


def number(value: float | None, digits: int = 3) -> str:
    """To so many significant digits."""
    if value is None or math.isnan(value):
        return ABSENT
    return f"{value:#.{digits}g}".rstrip(".").replace("-", "−")


def measure(name: str) -> str:
    """The words for a metric or a method."""
    return (METRICS | METHODS).get(name, name)


def verdict_section(
    decomposition: Decomposition, structures: dict[str, Any], sureness: Sureness, prediction: Prediction
) -> dict[str, list[str]]:
    """Findings and warnings, one sentence each."""
    findings = [_in_all(decomposition, structures["rows"]), *_of_structures(structures["rows"], assessed=sureness.absent is None)]
    warnings = list(decomposition.warnings)
    if sureness.absent is None and all(row["doubtful"] for row in structures["rows"]):
        warnings.append("No structure is reproducible: take none of them for a finding.")
    if prediction.outcome:
        findings.append(_of_outcome(prediction))
    warnings += _rivals(prediction)
    return {"findings": findings, "warnings": warnings}


def _in_all(decomposition: Decomposition, rows: list[dict[str, Any]]) -> str:
    shared = sum(row["n_views"] > 1 for row in rows)
    several = f"{counted(len(decomposition.view_names), 'view')} of {counted(decomposition.n_samples, 'sample')}"
    totals = [float(total) for total in decomposition.shares.total[:, 0]]
    least, most = percent(min(totals)), percent(max(totals))
    part = f"{least} of the variance" if least == most else f"between {least} and {most} of the variance of a view"
    return (
        f"In {several}, {counted(len(rows), 'structure')} {'was' if len(rows) == 1 else 'were'} found, {shared} of them shared "
        f"by several views, with {counted(sum(row['rank'] for row in rows), 'factor')} in all. Together they explain {part}."
    )


def _of_structures(rows: list[dict[str, Any]], *, assessed: bool) -> list[str]:
    """A sentence for every structure that can be relied on, and one for the others."""
    said = []
    for row in rows:
        if not row["doubtful"]:
            shared, share = row["n_views"] > 1, percent(row["share"])
            factors = counted(row["rank"], "shared factor") if shared else f"{counted(row['rank'], 'factor')} of its own"
            variance = f"{share} of their variance on average" if shared else f"{share} of its variance"
            said.append(f"{row['structure']}: {factors}, {variance}{_sure(row) if assessed else ''}.")
    doubtful = [f"{row['structure']} ({row['verdict']})" for row in rows if row["doubtful"]]
    if doubtful:
        said.append(f"Not to be relied on: {', '.join(doubtful)}.")
    return said


def _sure(row: dict[str, Any]) -> str:
    chance = row["p_value"]
    beyond = "" if chance is None or math.isnan(chance) else f", p = {number(chance, 2)}"
    return f"; {row['verdict']} (stability {number(row['stability'], 2)}{beyond})"


def _of_outcome(prediction: Prediction) -> str:
    held, metric = _first_metric(prediction), measure(prediction.metrics[0])
    return (
        f"The outcome, {prediction.outcome_name}, of samples that were not seen is predicted with {metric} {held['hcl_jax']}; "
        f"from as many principal components with {held['pca']}, and from all features with {held['features']}."
    )


def _first_metric(prediction: Prediction) -> dict[str, str]:
    """By method, mean ± standard error."""
    pairs = {method: values[prediction.metrics[0]] for method, values in prediction.outcome}
    return {method: f"{number(mean)} ± {number(error, 2)}" for method, (mean, error) in pairs.items()}


def _rivals(prediction: Prediction) -> list[str]:
    """Where something simpler predicts better."""
    found = []
    if prediction.outcome:
        metric, held = prediction.metrics[0], _first_metric(prediction)
        means = {method: values[metric][0] for method, values in prediction.outcome}
        for rival in ("pca", "features"):
            if means[rival] > means["hcl_jax"]:
                found.append(
                    f"{measure(rival).capitalize()} predict {prediction.outcome_name} better than this decomposition does: "
                    f"{measure(metric)} {held[rival]} and {held['hcl_jax']}."
                )
    for row in prediction.views:
        if row["hcl_jax"] is not None and row["ridge"] is not None and row["ridge"] > row["hcl_jax"]:
            found.append(
                f"Ridge regression predicts {row['view']} from the other views better than this decomposition does: "
                f"R² {number(row['ridge'])} and {number(row['hcl_jax'])}."
            )
    return found


def counted(n: int, noun: str) -> str:
    """Such as 1 sample, 347 samples."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}".replace(",", "\u202f")
