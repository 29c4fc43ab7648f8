"""The report of a decomposition: one HTML file that explains itself, without scripts and without anything to fetch.

Needs the extra `report` (jinja2).
"""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hcl_jax.decomposition import Decomposition
from hcl_jax.npz import checked_destination
from hcl_jax.report.content import assessed, cross_validated, data_section, settings_section, share_table, structure_section
from hcl_jax.report.drawings import scores_drawing, shares_drawing
from hcl_jax.report.words import measure, number, percent, printable, verdict_section
from hcl_jax.views import check_count

__all__ = ["write_report"]


def write_report(decomposition: Decomposition, path: Path | str, *, cv: int | None = 5, title: str | None = None) -> Path:
    """Write what a decomposition found, and how sure that is, as one HTML file; returns its path.

    Verdict and warnings, the data, variance explained, structures with p-values and stability, scores, top features, prediction
    of the outcome and of views in `cv` folds beside principal components, all features and ridge regression, and what it takes
    to compute it again. Assessment and folds are fits of their own, minutes for large data: None leaves the folds out. A
    decomposition that was loaded has no data, and its report says what is missing for that.

    Raises `ValueError`, before anything is computed, for a folder that does not exist and a number of folds that cannot be.
    """
    destination = checked_destination(path)
    if cv is not None:
        check_count(cv, "cv", 2)
    page = _environment().get_template("report.html").render(**_sections(decomposition, cv, title))
    temporary = destination.with_name(destination.name + ".tmp")
    temporary.write_text(printable(page), encoding="utf-8")
    return temporary.replace(destination)


def _sections(decomposition: Decomposition, cv: int | None, title: str | None) -> dict[str, Any]:
    prediction = cross_validated(decomposition, cv)
    sureness = assessed(decomposition)
    structures = structure_section(decomposition, sureness)
    doubtful = {row["structure"] for row in structures["rows"] if row["doubtful"]}
    return {
        "title": title or f"Decomposition of {', '.join(decomposition.view_names)}",
        "verdict": verdict_section(decomposition, structures, sureness, prediction),
        "data": data_section(decomposition),
        "shares": share_table(decomposition),
        "shares_drawing": shares_drawing(decomposition, doubtful),
        "structures": structures,
        "scores": None if decomposition.data is None else scores_drawing(decomposition, structures["best"], doubtful),
        "prediction": prediction,
        "cv": cv,
        "settings": settings_section(decomposition),
    }


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hcl_jax.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "number": number, "measure": measure}
    return environment
