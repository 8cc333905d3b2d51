"""How values are shown to a person: counts with the right plural, untrusted values, HTML for a notebook.

Text from a file or a network can contain anything: sequences that repaint a terminal, characters that reverse the order
of letters, 100 kB without a space. `visible` and `bounded` make it fit for a screen; consoles, pages and errors apply
them, so no other code has to.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape

LONGEST_VALUE = 200
"""Maximum number of characters of a value that an error shows."""

# Control characters, also those of eight bits; invisible marks, but not the joiners of emoji and Persian; line and
# paragraph separators; what turns the direction of text around; half surrogate pairs; invisible tags
_UNSEEN = (
    "\\x7f-\\x9f\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb"
    "\\ud800-\\udfff\\U000e0000-\\U000e0fff"
)
_HIDDEN_BUT_LAYOUT = re.compile(f"[\\x00-\\x08\\x0b-\\x1f{_UNSEEN}]")
_HIDDEN = re.compile(f"[\\x00-\\x1f{_UNSEEN}]")
_HIDDEN_IN_JSON = re.compile(f"[{_UNSEEN}]")
_MORE = f"{{{LONGEST_VALUE + 1},}}"
_LONG_VALUE = re.compile(rf"(?<=')[^']{_MORE}(?=')|[^\s']{_MORE}")
_TAIL = 150


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`: a number and what it counts."""
    return f"{number} {noun if number == 1 else noun + 's'}"


def some(names: Iterable[object]) -> str:
    """At most five of the names, sorted, and how many more there are."""
    ordered = sorted(map(str, names))
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def size_text(size: float) -> str:
    """Bytes as readable text, in units of 1000, with three digits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            value = size / factor
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{size:.0f} B"


def number(value: float) -> str:
    """A score with three decimals; zero has no sign."""
    return f"{round(value, 3) + 0.0:.3f}"


def signed(delta: float) -> str:
    """A difference with three decimals and its sign; one that rounds to zero has a plus."""
    return f"{round(delta, 3) + 0.0:+.3f}"


def compact(value: float) -> str:
    """A number of any magnitude, with three digits."""
    return f"{value:.3g}"


def interval(bounds: Sequence[float], form: Callable[[float], str] = number) -> str:
    """A confidence interval, with a dash for an unbounded side."""
    low, high = (form(bound) if math.isfinite(bound) else "-" for bound in bounds)
    return f"[{low}, {high}]"


def visible(text: str, *, lines: bool = False) -> str:
    """`text` with invisible characters written as in Python: `\\x1b`, `\\u202e`, `\\n`.

    Args:
        text: text of any origin.
        lines: whether line feeds and tabs stay.
    """
    return (_HIDDEN_BUT_LAYOUT if lines else _HIDDEN).sub(_escape, text)


def visible_json(text: str) -> str:
    """A JSON text of the same value, with invisible characters as JSON escapes."""
    return _HIDDEN_IN_JSON.sub(lambda match: json.dumps(match[0])[1:-1], text)


def cut(text: str) -> str:
    """At most `LONGEST_VALUE` characters of `text`, and the total number if that is not all."""
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text):,} characters)"


def plot_label(text: str) -> str:
    """`text` as a matplotlib title or label: neither a formula (`$`) nor a name that a legend leaves out (`_a`)."""
    shown = visible(cut(text)).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def bounded(text: str, most: int = 600) -> str:
    """A sentence with quoted values and words cut at `LONGEST_VALUE`; above `most` characters it loses its middle."""
    text = _LONG_VALUE.sub(lambda match: cut(match[0]), text)
    return text if len(text) <= most else f"{text[: most - _TAIL]} ... {text[-_TAIL:]}"


def html_text(title: str, text: str = "") -> str:
    """A heading, and below it the lines unchanged."""
    lines = f'<pre style="max-height:24em;overflow:auto">{_html(text)}</pre>' if text else ""
    return f"<div><b>{_html(title)}</b>{lines}</div>"


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A heading and a table; every cell is text."""
    head = "".join(f"<th>{_html(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_html(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div><b>{_html(title)}</b><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def data_uri(kind: str, data: bytes) -> str:
    """An image file of the media type `image/<kind>` as a URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def html_picture(png: bytes, caption: str, width: int) -> str:
    """An inlined PNG, `width` CSS pixels wide, with a caption; enlarged pixels stay square."""
    source, text = data_uri("png", png), _html(caption)
    style = f"max-width:{width}px;width:100%;image-rendering:pixelated"
    return (
        f'<figure style="display:inline-block;margin:4px;max-width:{width}px">'
        f'<img src="{source}" alt="{text}" style="{style}"><figcaption>{text}</figcaption></figure>'
    )


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()


def _html(text: str) -> str:
    return escape(visible(text, lines=True))
