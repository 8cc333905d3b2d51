"""Hooks of mkdocs.yml: pages from outside `docs/`, API pages, links to the source, and formulas as MathML.

Formulas become MathML while the site is built, by latex2mathml, so that they are shown without a script or a network.
"""

from __future__ import annotations

import posixpath
import re
from html import escape, unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]

# pages of the site that lie elsewhere in the repository
OUTSIDE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}

ROOMS = {
    "core": "Values, protocols, errors, events",
    "registry": "Components by name",
    "recipe": "Recipes",
    "flow": "Paths and flow maps",
    "stochasticizers": "Stochasticizers",
    "models": "Models",
    "rewards": "Rewards",
    "data": "Prompts and run folders",
    "rl": "Rollouts and objectives",
    "worlds": "Embedded worlds",
    "inference": "Generators, backends, artifacts",
    "eval": "Evaluation",
    "conformance": "Conformance checks",
    "training": "Training",
    "export": "Export",
}

_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^(```+).*?^\1 *$", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the decision records and the API pages to the navigation."""
    records = [f"adr/{file.name}" for file in sorted((ROOT / "docs" / "adr").glob("0*.md"))]
    pages = [{title: f"api/{room}.md"} for room, title in ROOMS.items() if (ROOT / "fmg" / room).is_dir()]
    assert config.nav is not None
    config.nav.append({"Decisions": ["adr/README.md", *records]})
    config.nav.append({"API": [{"fmg": "api/fmg.md"}, *pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not files of `docs/`."""
    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "api/fmg.md", content=public_page()))
    for room in ROOMS:
        if (ROOT / "fmg" / room).is_dir():
            files.append(File.generated(config, f"api/{room}.md", content=room_page(room)))
    return files


def public_page() -> str:
    """The names of `fmg.__all__`."""
    source = (ROOT / "fmg" / "__init__.py").read_text(encoding="utf-8")
    homes = re.findall(r'^    "(\w+)": "([\w.]+)",$', source, re.MULTILINE)
    names = "\n".join(f"::: fmg.{name}\n" for name, _ in homes)
    return f"# fmg\n\nThe public functions and classes. [Python](../python.md) shows them in use.\n\n{names}"


def room_page(room: str) -> str:
    """Every public module of a room, with its public members."""
    modules = []
    for file in sorted((ROOT / "fmg" / room).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        # re-exported names are shown where they are defined
        passes_on = file.stem == "__init__" and not re.search(
            r"^(class|def) (?!__)", file.read_text("utf-8"), re.MULTILINE
        )
        options = "    options:\n      members: false\n" if passes_on else ""
        modules.append(f"::: {module}\n{options}")
    return f"---\nsearch:\n  boost: 0.5\n---\n\n# {ROOMS[room]}\n\n" + "\n".join(modules)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at pages of the site, and links to other files of the repository at copies of them."""
    name = page.file.src_uri
    home = posixpath.dirname(OUTSIDE.get(name) or f"docs/{name}")
    pages = {source: target for target, source in OUTSIDE.items()}

    def follow(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(home, target))
        if (ROOT / path).is_dir():
            path = f"{path}/README.md"
        if path in pages:
            where = pages[path]
        elif path.startswith("docs/"):
            where = path.removeprefix("docs/")
        elif (ROOT / path).is_file():
            where = f"source/{path}.txt" if path.endswith(".md") else f"source/{path}"
            if files.get_file_from_path(where) is None:
                files.append(File.generated(config, where, abs_src_path=str(ROOT / path)))
        else:
            return match[0]
        return posixpath.relpath(where, posixpath.dirname(name) or ".") + anchor

    # a code fence contains no links
    pieces, end = [], 0
    for fence in _FENCE.finditer(markdown):
        pieces += [_LINK.sub(follow, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, _LINK.sub(follow, markdown[end:])])


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas within sentences."""
    return re.sub(r'<span class="arithmatex">\\\((.+?)\\\)</span>', lambda match: mathml(unescape(match[1])), html)


def formula(source: str, language: str, css_class: str, *_: Any, **__: Any) -> str:
    """A block of math; `\\tag{n}` becomes its number and the target of `#eq-n`."""
    tag = re.search(r"\\tag\{(\d+)\}", source)
    body = mathml(re.sub(r"\\tag\{\d+\}", "", source).strip(), display="block")
    number = f'<span class="number">({tag[1]})</span>' if tag else ""
    anchor = f' id="eq-{tag[1]}"' if tag else ""
    return f'<div class="{escape(css_class)}"{anchor}>{body}{number}</div>'


def mathml(latex: str, display: str = "inline") -> str:
    """MathML of a formula."""
    return convert(latex.strip(), display=display)
