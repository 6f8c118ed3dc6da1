"""Coloured lines, many of them: rich's own printing takes a tenth of a millisecond each, and a log has thousands."""

from __future__ import annotations

from collections.abc import Iterable

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style


class Painter:
    """Writes lines to a console: in colour if it has colours, and free of what would steer a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        coloured = console.color_system is not None and not console.no_color
        self._system = ColorSystem.STANDARD if coloured else None
        self._marks: dict[str, tuple[str, str]] = {}

    def __call__(self, text: str, style: str = "") -> str:
        """The text in a style of rich ("bold red"). Escape and other control characters become "?"."""
        if not text.isprintable():
            text = "".join(character if character.isprintable() else "?" for character in text)
        if not style or self._system is None:
            return text
        before, after = self._marks.get(style) or self._learn(style)
        return f"{before}{text}{after}"

    def print(self, lines: Iterable[str]) -> None:
        """Writes lines that were made of pieces of `__call__`."""
        write = self.console.file.write
        for line in lines:
            write(f"{line}\n")
        self.console.file.flush()

    def _learn(self, style: str) -> tuple[str, str]:
        before, _, after = Style.parse(style).render("|", color_system=self._system).partition("|")
        self._marks[style] = before, after
        return before, after
