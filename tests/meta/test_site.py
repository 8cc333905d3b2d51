"""The documentation site builds without a warning, and a browser shows its pages at two widths."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
PAGES = ("index.html", "math.html", "benchmarks.html", "rewards.html", "api/fmg.html")
WIDTHS = (1280, 420)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere_and_have_their_formulas(site: Path) -> None:
    loaded = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=\"?https?:|<link[^>]*rel=\"?stylesheet[^>]*https?:")
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text(encoding="utf-8")), page
    formulas = (site / "math.html").read_text(encoding="utf-8")
    numbers = (ROOT / "docs" / "math.md").read_text(encoding="utf-8").count("\\tag{")
    assert formulas.count('class="formula" id="eq-') == numbers
    assert "\\frac" not in formulas
    assert "$" not in re.sub(r"<(script|code|annotation)\b.*?</\1>", "", formulas, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium (apt-get install chromium)")
def test_a_browser_shows_the_pages(site: Path, tmp_path: Path) -> None:
    """Every picture decodes, and no page is wider than its window."""
    probe = """<script>addEventListener('load', () => {
      const shown = [...document.querySelectorAll('iframe')].map(frame => {
        const page = frame.contentDocument, root = page.documentElement;
        return {page: frame.title, title: page.title,
                height: root.scrollHeight, wide: root.scrollWidth - root.clientWidth,
                broken: [...page.images].filter(image => !image.naturalWidth).map(image => image.src)};
      });
      document.title = JSON.stringify(shown);
    });</script>"""
    frames = [
        f'<iframe title="{page} {width}" src="{page}" width="{width}" height="900"></iframe>'
        for page in PAGES
        for width in WIDTHS
    ]
    (site / "probe.html").write_text(f"<title></title>{probe}{''.join(frames)}", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    shown = subprocess.run(
        [
            CHROMIUM,
            *options,
            f"--user-data-dir={tmp_path / 'user'}",
            "--window-size=1400,1000",
            "--dump-dom",
            (site / "probe.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found = json.loads(shown.stdout.partition("<title>")[2].partition("</title>")[0])
    assert len(found) == len(frames)
    for page in found:
        assert page["title"], page
        assert page["height"] > 800, page
        assert page["wide"] <= 0, page
        assert not page["broken"], page
