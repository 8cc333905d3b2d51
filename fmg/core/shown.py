"""How values show themselves to a person: counts with the right plural, and the HTML that a notebook displays."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 image`, `2 images`: a number and what it counts; `plural` for a noun that does not just take an s."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def html_text(title: str, text: str = "") -> str:
    """A heading, and below it lines as they are."""
    lines = f'<pre style="max-height:24em;overflow:auto">{escape(text)}</pre>' if text else ""
    return f"<div><b>{escape(title)}</b>{lines}</div>"


def html_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A heading and a table; every cell is text."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div><b>{escape(title)}</b><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def html_picture(png: bytes, caption: str, width: int) -> str:
    """An inlined PNG, `width` CSS pixels wide, with a caption; the pixels of an enlarged one stay squares."""
    source, text = f"data:image/png;base64,{base64.b64encode(png).decode()}", escape(caption)
    style = f"max-width:{width}px;width:100%;image-rendering:pixelated"
    return (
        f'<figure style="display:inline-block;margin:4px;max-width:{width}px">'
        f'<img src="{source}" alt="{text}" style="{style}"><figcaption>{text}</figcaption></figure>'
    )
