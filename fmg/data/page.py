"""A self-contained HTML page from typed blocks, for the reports of runs and evaluations.

Images are inlined; there are no scripts and nothing to load, and a content security policy forbids both. The template
escapes every text, since prompts and file names can contain anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from typing import ClassVar, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from PIL import Image

from fmg.core.display import data_uri, visible
from fmg.version import __version__

_SMALL = 128
_LARGE = 512


@dataclass(frozen=True)
class Picture:
    """An inlined image.

    Attributes:
        source: data URI.
        caption: text below it; empty for none.
        alt: what it shows, for screen readers.
        pixelated: whether enlarged pixels stay square.
        layout: `picture`: a tile among others; `wide`: up to half of a wide page, or all of a narrow one.
    """

    source: str
    caption: str
    alt: str
    pixelated: bool = False
    layout: Literal["picture", "wide"] = "picture"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Table:
    """A table. Columns named in `numbers` are right-aligned; every row has as many cells as `columns`."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Gallery:
    """Images side by side, as many as fit, below a title."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]
    title: str = ""

    @property
    def narrow(self) -> bool:
        """Whether two such galleries fit side by side on a wide screen."""
        return len(self.pictures) <= 4 and not any(picture.layout != "picture" for picture in self.pictures)


@dataclass(frozen=True)
class Listing:
    """Lines of code, with comments in grey."""

    kind: ClassVar[str] = "listing"
    lines: Sequence[tuple[str, str]]


Block = Text | Table | Gallery | Listing


@dataclass(frozen=True)
class Section:
    """A heading and its blocks; a folded section opens with a click."""

    title: str
    blocks: Sequence[Block]
    folded: bool = False


@dataclass(frozen=True)
class Tile:
    """A headline number: its name, its value, and what it is compared with."""

    name: str
    value: str
    note: str


def page(title: str, subtitle: str, tiles: Sequence[Tile], sections: Sequence[Section]) -> str:
    """The HTML of a page."""
    return _template().render(title=title, subtitle=subtitle, tiles=tiles, sections=sections, version=__version__)


def inline_image(image: Image.Image, side: int = _LARGE) -> tuple[str, bool]:
    """The data URI of an image scaled down to `side`, and whether it is small enough to be shown pixelated.

    Small images stay exact (PNG); large ones become JPEG, a tenth of the size.
    """
    shown = image.convert("RGB")
    if max(shown.size) > side:
        shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    small = max(shown.size) <= _SMALL
    file = BytesIO()
    if small:
        shown.save(file, format="PNG")
        return data_uri("png", file.getvalue()), True
    shown.save(file, format="JPEG", quality=85)
    return data_uri("jpeg", file.getvalue()), False


@cache
def _template() -> Template:
    loader = PackageLoader("fmg.data")
    environment = Environment(
        loader=loader,
        autoescape=True,
        finalize=lambda value: visible(value, lines=True) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
