"""The documentation builds without network, and every tutorial has its page there."""

import html
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT


def text_of(page):
    return html.unescape(re.sub(r"<[^>]+>", "", page))


@pytest.mark.slow
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    for tutorial in (ROOT / "docs/tutorials").glob("*.py"):
        assert tutorial.read_text().split("\n", 1)[0].strip('"')[:40] in text_of(pages[f"tutorials/{tutorial.stem}.html"])
    assert "The decomposition of several views of the same samples" in pages["reference.html"]  # from a docstring
    for name, page in pages.items():
        assert not re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="https?://[^"]*"', page), name
