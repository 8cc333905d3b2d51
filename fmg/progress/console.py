"""Rich's console for text of strangers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fmg.core.display import visible


class SafeConsole(Console):
    """A console whose text can hold anything: nothing in it moves the cursor or sets the title of the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Text of a string as it will be shown, so that tables leave the room for it."""
        return super().render_str(visible(text, lines=True), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The same for what was made from text elsewhere; what Rich does to the terminal itself stays."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text, lines=True), style, control)
