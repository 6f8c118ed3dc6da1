"""Documents of sensible size from a manual's HTML, from perl's pod and from Python source. Imports no torch.

A document is {"id", "text"}. Each begins where a section, or a function or class, does, and none is much longer than
LONGEST characters, so that whole documents can be held out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

SHORTEST, LONGEST = 400, 8_000
"""Characters of a document: a shorter section is put to the one after it, a longer one divided."""
_BLOCKS = {
    "p",
    "div",
    "li",
    "dt",
    "dd",
    "tr",
    "td",
    "th",
    "pre",
    "ul",
    "ol",
    "dl",
    "table",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
}
_HEADINGS = {"h1", "h2", "h3"}
_NO_TEXT_CLASSES = {"docnav", "toc", "index"}
_NO_TEXT_IDS = {"banner", "title"}
_VOID = {"br", "img", "hr", "meta", "link", "col", "input"}

Document = dict[str, str]


class _Page(HTMLParser):
    """The blocks of text of a page, in sections that begin at its headings; navigation and contents are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[list[str]] = [[]]
        self.current: list[str] = []
        self.skipped = 0
        self.plain = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag in _VOID:
            return
        classes = set((found.get("class") or "").split())
        if self.skipped or tag == "head" or classes & _NO_TEXT_CLASSES or found.get("id") in _NO_TEXT_IDS:
            self.skipped += 1
            return
        if tag in _BLOCKS:
            self._end_block()
        if tag in _HEADINGS and self.sections[-1]:
            self.sections.append([])
        if tag == "pre":
            self.plain += 1

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An empty element has no text."""

    def handle_endtag(self, tag: str) -> None:
        if tag in _VOID:
            return
        if self.skipped:
            self.skipped -= 1
            return
        if tag in _BLOCKS:
            self._end_block()
        if tag == "pre":
            self.plain -= 1

    def handle_data(self, data: str) -> None:
        if not self.skipped:
            self.current.append(data)

    def close(self) -> None:
        super().close()
        self._end_block()

    def _end_block(self) -> None:
        text = "".join(self.current)
        text = text.strip("\n").rstrip() if self.plain else " ".join(text.split())
        if text.strip():
            self.sections[-1].append(text)
        self.current = []


def html_sections(page: str) -> list[list[str]]:
    """Return the blocks of text (paragraphs, headings, listings) of each section of a well-formed page."""
    reader = _Page()
    reader.feed(page)
    reader.close()
    return [section for section in reader.sections if section]


def manual_documents(folder: Path, original: Path | None = None) -> Iterator[Document]:
    """Yield the sections of all pages of a manual.

    Args:
        original: the same manual in the language that it was written in. A block that is the same there was not
            translated, or is a listing, and is left out.
    """
    for path in sorted(folder.glob("*.html")):
        sections = html_sections(path.read_text(encoding="utf-8"))
        if original is not None and (original / path.name).is_file():
            page = (original / path.name).read_text(encoding="utf-8")
            same = {block for section in html_sections(page) for block in section}
            sections = [[block for block in section if block not in same] for section in sections]
        yield from sized(path.stem, ("\n\n".join(section) for section in sections))


def pod_documents(name: str, text: str) -> Iterator[Document]:
    """Yield the sections of a page that pod2text made: a heading stands at a line's beginning, its text does not."""
    yield from sized(name, re.split(r"\n(?=\S)", text))


def python_documents(name: str, source: str) -> Iterator[Document]:
    """Yield the pieces of a module, divided before functions, classes and what decorates them."""
    yield from sized(name, re.split(r"\n+(?=(?:@|def |class |async def ))", source), between="\n\n\n")


def sized(name: str, sections: Iterable[str], between: str = "\n\n") -> Iterator[Document]:
    """Yield documents of sections in their order: short ones together, long ones divided at empty lines."""
    pieces: list[str] = []
    waiting = ""
    for section in sections:
        section = section.strip("\n").rstrip()
        if not section:
            continue
        waiting = f"{waiting}{between}{section}" if waiting else section
        if len(waiting) >= SHORTEST:
            pieces += _divided(waiting)
            waiting = ""
    if waiting and pieces:
        pieces[-1] += between + waiting
    elif waiting:
        pieces.append(waiting)
    for number, piece in enumerate(pieces, 1):
        yield {"id": f"{name}-{number:03d}", "text": piece}


def _divided(text: str) -> list[str]:
    if len(text) <= LONGEST:
        return [text]
    size = len(text) / -(-len(text) // LONGEST)  # pieces of about the same size
    pieces, current = [], ""
    for paragraph in re.split(r"(?<=\n)\s*\n", text):
        # One that is long for itself, such as a listing, is divided at its lines.
        for part in [paragraph] if len(paragraph) <= size else paragraph.splitlines(keepends=True):
            if current and len(current) + len(part) > size:
                pieces.append(current.rstrip())
                current = ""
            current += part
        current += "\n"
    return [*pieces, current.rstrip()]
