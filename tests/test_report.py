"""The report of a decomposition: what its sections say, that it is one file that stands alone, and that names stay names."""

import re
import shutil
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

from hcl_jax.assessment import Evaluation
from hcl_jax.decomposition import Decomposition, fit, load
from hcl_jax.outcomes import as_outcome
from hcl_jax.report import write_report
from hcl_jax.report.drawings import bar_looks, inline_svg, scores_drawing, shares_drawing, short
from hcl_jax.report.words import counted, number, percent
from hcl_jax.selection import PermutationNull, Stability

HOSTILE = '<b>&"x"'
NAMES = (HOSTILE, "meth $a$")
RANKS = {f"{HOSTILE}+meth $a$": 2, HOSTILE: 1, "meth $a$": 1}
SECTIONS = ("verdict", "data", "variance", "structures", "scores", "features", "prediction", "settings")
N = 40


def drawn() -> tuple[dict[str, pd.DataFrame], pd.Series]:
    """(two views with two shared factors and one of each, a number that the first says)."""
    generator = np.random.default_rng(4)
    z = generator.normal(size=(N, 4))
    frames = {}
    for m, name in enumerate(NAMES):
        X = z[:, [0, 1, 2 + m]] @ generator.normal(size=(3, 6)) + 0.4 * generator.normal(size=(N, 6))
        frames[name] = pd.DataFrame(X, columns=[f"f<{m}{j}>" for j in range(6)], index=[f"s{i}" for i in range(N)])
    return frames, pd.Series(z[:, 0], index=frames[HOSTILE].index, name="<i>pressure")


@cache
def fitted() -> Decomposition:
    frames, number = drawn()
    return fit(frames, y=number.iloc[:35], ranks=RANKS, method="hcl-svd")


def assessed(p_value: float = 0.02, stability: float = 0.9) -> Decomposition:
    """The same, with an assessment that the test says: the last structure has the stability, the shared one the p-value."""
    held = replace(fitted())
    explained = np.array([2.0] * round(100 * p_value - 1) + [0.0] * round(100 * (1 - p_value)))
    held.__dict__["null"] = PermutationNull({(1, 2): np.ones(99, int)}, {(1, 2): explained}, {(1, 2): 1.0})
    held.__dict__["stability"] = {s: Stability(0.9, 0.02) for s in held.active} | {held.active[-1]: Stability(stability, 0.3)}
    return held


def evaluation(ridge: float = 0.1, pca: float = 0.5) -> Evaluation:
    rows = [
        {"method": method, "metric": metric, "mean": mean, "standard_error": 0.01, "folds": [mean, mean]}
        for method, mean in (("hcl_jax", 0.6), ("pca", pca), ("features", 0.55))
        for metric in ("r_squared", "rmse")
    ]
    return Evaluation(
        pl.DataFrame(rows),
        pl.DataFrame({"view": NAMES, "hcl_jax": [0.4, 0.3], "ridge": [ridge, 0.2]}),
        pl.DataFrame({"structure": list(RANKS)[:2], "drop": [0.5, -0.001], "standard_error": [0.01, None], "n_folds": [3, 1]}),
        pl.DataFrame({"row": [0], "predicted": [0.1]}),
    )


def written(tmp_path, monkeypatch, decomposition=None, seen=None, **options) -> tuple[str, ET.Element]:
    """(the text of the report, its elements as a strict parser of XML reads them)."""
    monkeypatch.setattr(Decomposition, "evaluate", lambda self, cv: evaluation() if seen is None else seen)
    path = write_report(decomposition or assessed(), tmp_path / "report.html", cv=3, **options)
    text = path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".npz"] == ["report.html"]
    return text, ET.fromstring(text)


@cache
def usual() -> ET.Element:
    """The report of the assessed decomposition."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        return written(Path(folder), patch)[1]


def section(root: ET.Element, name: str) -> ET.Element:
    found = root.find(f".//section[@id='{name}']")
    assert found is not None, name
    return found


def said(element: ET.Element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def test_sections_say_what_was_found(tmp_path, monkeypatch):
    _, root = written(tmp_path, monkeypatch, title="A <study>")
    assert [element.get("id") for element in root.iter("section")] == list(SECTIONS)
    assert said(root.find(".//h1")) == "A <study>"
    verdict = said(section(root, "verdict"))
    assert "3 structures were found, 1 of them shared by several views, with 4 factors in all." in verdict
    assert "reproducible (stability 0.90, p = 0.020)" in verdict
    assert "The outcome, <i>pressure, of samples that were not seen is predicted with R² 0.600 ± 0.010" in verdict
    assert "Warnings" not in verdict
    data = said(section(root, "data"))
    assert "40 samples; the outcome, <i>pressure, is known for 35: a number from" in data
    assert "with 99 permutations" in said(section(root, "structures"))
    assert len(list(section(root, "features").iter("h3"))) == 3
    prediction = said(section(root, "prediction"))
    assert "fitted again without each of 3 folds" in prediction
    assert "this decomposition 0.600 ± 0.010" in prediction
    assert "−0.0010" in prediction
    assert "1 of 3" in prediction
    settings = said(section(root, "settings"))
    assert "method 'hcl-svd'" in settings
    assert f"ranks={fitted().settings.ranks!r}" in settings
    assert 'write_report(found, "report.html", cv=3)' in settings
    for name in ("hcl_jax", "jax", "numpy", "Python"):
        assert re.search(rf"\b{name} \d", settings)


def test_the_call_in_a_report_is_the_call_that_was_made():
    code = "".join(usual().find(".//pre").itertext())
    called = {}
    exec(
        code.replace("from hcl_jax.decomposition import fit", "").replace("from hcl_jax.report import write_report", ""),
        {"fit": lambda data, **options: called.update(options), "write_report": lambda *_, **__: None, "data": 0, "y": 1},
    )
    assert called == {"y": 1, "ranks": RANKS, "method": "hcl-svd", "seed": 0}


def test_a_report_stands_alone(tmp_path, monkeypatch):
    text, root = written(tmp_path, monkeypatch)
    assert not re.search(r"https?:|//[a-z]|@import", text)
    assert not {"script", "link", "img", "iframe", "object", "b", "i"} & {element.tag for element in root.iter()}
    assert not any(key in ("src", "data") or key.startswith("on") for element in root.iter() for key in element.attrib)
    names = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(set(names)) == len(names)
    asked = re.findall(r'(?:href="|url\()#([^")]+)', text)
    assert asked
    assert set(asked) <= set(names)
    assert "@media print" in text


def test_names_stay_names():
    """A strict parser finds them as text, in the tables and in both drawings."""
    assert not {"b", "i", "x"} & {element.tag for element in usual().iter()}
    drawings = list(usual().iter("svg"))
    assert len(drawings) == 2
    for drawing in drawings:
        texts = [said(element) for element in drawing.iter("text")]
        assert any(HOSTILE in shown for shown in texts)
        assert any("meth $a$" in shown for shown in texts)


def test_the_numbers_are_those_of_the_decomposition():
    root = usual()
    table = section(root, "variance").find(".//table[@id='shares']")
    expected = fitted().variance_explained().set_index(["structure", "view"])
    shown = 0
    for row in table.find("tbody"):
        label = said(row.find("th"))
        for view, cell in zip(NAMES, row.findall("td"), strict=True):
            value = cell.find("data")
            assert (value is None) == ((label, view) not in expected.index)
            if value is not None:
                share, low, high = expected.loc[(label, view), ["share", "low", "high"]]
                assert abs(float(value.get("value")) - share) < 1e-12
                assert said(cell) == f"{percent(share)} {percent(low)} to {percent(high)}"
                shown += 1
    assert shown == len(expected)
    shares = [float(cell.get("value")) for cell in section(root, "structures").iter("data")]
    np.testing.assert_allclose(shares, fitted().structures["share"], rtol=1e-12)
    held = [float(cell.get("value")) for cell in section(root, "features").iter("data")]
    tables = [
        fitted().top_features(s, 10)["share"] for s in fitted().structures.sort_values("share", ascending=False)["structure"]
    ]
    np.testing.assert_allclose(held, np.concatenate(tables), rtol=1e-12)


def test_what_is_not_to_be_relied_on_is_grey_and_said(tmp_path, monkeypatch):
    text, root = written(tmp_path, monkeypatch, assessed(p_value=0.5, stability=0.2))
    rows = [said(row.find("th")) for row in root.iter("tr") if row.get("class") == "doubtful"]
    assert rows == [fitted().label(s) for s in fitted().active if s in ((1, 2), fitted().active[-1])]
    verdict = said(section(root, "verdict"))
    assert f"{HOSTILE}+meth $a$ (not above chance)" in verdict
    assert f"{fitted().label(fitted().active[-1])} (unstable)" in verdict
    assert "#bbbbbb" in text
    assert not any("#bbbbbb" in value for element in usual().iter() for value in element.attrib.values())


def test_where_something_simpler_is_better_a_warning_says_so(tmp_path, monkeypatch):
    _, root = written(tmp_path, monkeypatch, seen=evaluation(ridge=0.45, pca=0.7))
    warnings = [said(item) for item in section(root, "verdict").find("div").iter("li")]
    assert warnings == [
        "As many principal components predict <i>pressure better than this decomposition does: "
        "R² 0.700 ± 0.010 and 0.600 ± 0.010.",
        f"Ridge regression predicts {HOSTILE} from the other views better than this decomposition does: R² 0.450 and 0.400.",
    ]


def test_a_loaded_decomposition_says_what_is_not_there(tmp_path, monkeypatch):
    fitted().save(tmp_path / "fit.npz")
    _, root = written(tmp_path, monkeypatch, load(tmp_path / "fit.npz"))
    for name, what in (
        ("data", "Which samples have which views is not in this report."),
        ("structures", "How sure structures are is not in this report."),
        ("scores", "Scores of the samples are not in this report."),
        ("prediction", "How well samples that were not seen are predicted is not in this report."),
    ):
        assert f"{what} This decomposition was loaded from a file, which holds no data." in said(section(root, name))
    assert said(section(root, "variance")) == said(section(usual(), "variance"))
    assert "stability" not in said(section(root, "verdict"))


def test_too_few_whole_samples_are_no_obstacle(tmp_path, monkeypatch):
    data = fitted().data
    lacking = replace(
        data, matrices=tuple(np.where(np.arange(N)[:, None] % 2 == m, np.nan, X) for m, X in enumerate(data.matrices))
    )
    monkeypatch.setattr(Decomposition, "score_matrix", lambda self, read: np.zeros((N, 4)))
    _, root = written(tmp_path, monkeypatch, replace(fitted(), data=lacking))
    assert "have 0 samples that lack nothing" in said(section(root, "structures"))
    table = section(root, "data").findall(".//table")[1]
    assert [[mark.get("aria-label") for mark in row.iter("span")] for row in table.find("tbody")] == [
        ["absent", "present"],
        ["present", "absent"],
    ]


def test_the_same_report_has_the_same_bytes_and_can_leave_the_folds_out(tmp_path, monkeypatch):
    _, root = written(tmp_path, monkeypatch)
    assert ET.tostring(root) == ET.tostring(usual())
    text = write_report(assessed(), tmp_path / "report.html", cv=None).read_text(encoding="utf-8")
    assert "Cross-validation was not asked for." in text


@pytest.mark.parametrize(
    ("path", "options", "said_of_it"),
    [
        ("nowhere/report.html", {}, "path: the folder"),
        (".", {}, "is a folder; expected a file"),
        ("report.html", {"cv": 1}, "cv: is 1; expected an integer of at least 2"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_computed(tmp_path, monkeypatch, path, options, said_of_it):
    monkeypatch.setattr(Decomposition, "evaluate", lambda self, cv: pytest.fail("computed"))
    with pytest.raises(ValueError, match=re.escape(said_of_it)):
        write_report(assessed(), tmp_path / path, **options)
    assert list(tmp_path.iterdir()) == []


def test_classes_have_colours_and_markers_of_their_own():
    classes = as_outcome([f"class {i % 12}" for i in range(N)], N)
    drawing = ET.fromstring(scores_drawing(replace(fitted(), outcome=classes), fitted().active, set()))
    texts = [said(element) for element in drawing.iter("text")]
    assert [text for text in texts if "class" in text] == [*[f"class {i}" for i in (0, 1, 10, 11, 2, 3, 4, 5)], "other classes"]


def test_many_structures_can_be_told_apart():
    assert len(set(bar_looks([i == 3 for i in range(31)]))) == 31


def test_drawings_on_one_page_do_not_share_names():
    source = b"""<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="1" height="1">
    <metadata>x</metadata><defs><path id="p" d="M0 0"/></defs><g clip-path="url(#p)"><use xlink:href="#p"/></g>
    <text>id="p" &lt;</text></svg>"""
    root = ET.fromstring(inline_svg(source, "one", 'a "drawing"'))
    assert root.get("aria-label") == 'a "drawing"'
    assert root.find("metadata") is None
    assert root.find(".//path").get("id") == "one-p"
    assert root.find(".//use").get("href") == "#one-p"
    assert root.find("g").get("clip-path") == "url(#one-p)"
    assert root.find("text").text == 'id="p" <'


def test_characters_that_no_page_may_hold_are_replaced(tmp_path, monkeypatch):
    odd = replace(assessed(), view_names=("a\x00\x1b", "語\x85"))
    odd.__dict__.update({name: assessed().__dict__[name] for name in ("null", "stability")})
    text, _ = written(tmp_path, monkeypatch, odd)
    assert "a\ufffd\ufffd" in text
    assert "語\ufffd" in text


def test_survival_times_are_told_from_other_outcomes(tmp_path, monkeypatch):
    held = assessed()
    outcome = held.outcome
    died = replace(outcome, values=np.abs(outcome.values) + 1, events=np.arange(len(outcome.values)) % 2 == 0)
    object.__setattr__(held, "outcome", died)
    object.__setattr__(held, "head", replace(held.head, kind="survival"))
    seen = evaluation()
    concordances = seen.outcome.filter(pl.col("metric") == "r_squared").with_columns(pl.lit("concordance").alias("metric"))
    _, root = written(tmp_path, monkeypatch, held, replace(seen, outcome=concordances))
    assert f"of which {died.events[died.known].sum()} end with the event" in said(section(root, "data"))
    prediction = said(section(root, "prediction"))
    assert "loss of concordance without it" in prediction
    assert "Cox regressions with a ridge penalty" in prediction
    assert "predicted with concordance 0.600 ± 0.010" in said(section(root, "verdict"))


def test_shares_have_bounds_or_the_reason_why_not(tmp_path, monkeypatch):
    assert "Shares have no intervals here: hcl-svd has none" in said(section(usual(), "features"))
    plain = Decomposition.top_features
    bounded = lambda self, s, n, level: plain(self, s, n).assign(low=[0.125, *[np.nan] * (len(plain(self, s, n)) - 1)], high=0.5)
    monkeypatch.setattr(Decomposition, "without_intervals", None)
    monkeypatch.setattr(Decomposition, "top_features", bounded)
    _, root = written(tmp_path, monkeypatch)
    features = section(root, "features")
    assert said(features).count("12.5 % to 50.0 %") == len(fitted().active)
    assert "bounds of 90.0 % confidence" in said(features)


def test_words():
    assert [percent(value) for value in (0.12345, -0.01, None, float("nan"))] == ["12.3 %", "−1.0 %", "–", "–"]
    assert [number(value) for value in (0.9, 120.0, -0.5, 3e-7, None)] == ["0.900", "120", "−0.500", "3.00e−07", "–"]
    assert [counted(1, "view"), counted(12345, "view")] == ["1 view", "12\u202f345 views"]
    assert short("a  b\n" + "c" * 40 + "d", 8) == "a b …ccd"
    assert short("a  b", 8) == "a b"


def test_shares_are_drawn_where_they_end():
    """The lengths of the bars of a view are its shares."""
    root = ET.fromstring(shares_drawing(fitted(), set()))
    patches = [root.find(f".//g[@id='shares_drawing-patch_{i}']/path").get("d") for i in range(3, 7)]  # the axes come first
    ends = [[float(word) for word in re.findall(r"[ML] ([-\d.]+)", patch)] for patch in patches]
    bars = np.array([max(places) - min(places) for places in ends])
    expected = [fitted().shares.share[m - 1, i] for i, s in enumerate(fitted().active) for m in s]
    np.testing.assert_allclose(bars / bars.sum(), expected / np.sum(expected), atol=1e-4)  # SVG has six decimals of a point


@pytest.mark.slow
def test_a_report_of_real_fits_prints(tmp_path):
    """With its assessment and folds, through a browser to a PDF of several pages."""
    frames, number = drawn()
    path = write_report(fit(frames, y=number, ranks=RANKS), tmp_path / "report.html", cv=2)
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    assert not [element for element in root.iter("p") if element.get("class") == "absent"]
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium to print the report with")
    printed = tmp_path / "report.pdf"
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         f"--print-to-pdf={printed}", path.as_uri()],
        check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert printed.read_bytes().startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes())) >= 2
