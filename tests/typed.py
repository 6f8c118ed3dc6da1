"""What the docs show to be typed, and a folder in which it is typed.

for name, block in blocks_of("docs/RUNS.md").items():   # indented and fenced ones; a blank line ends the former
    block.name, block.text                              # "docs/RUNS.md: revpatch report RUN ...", its lines

typist = Typist(server, folder, {"RUN": "runs/mine"})
typist.types(block)     # every `revpatch ...` of it, each in a process of its own; gives codes and words
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ranks import RunServer

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Block:
    """A block of a document; `name` is the document's and the first line's, without its comment."""

    name: str
    text: str


def blocks_of(document: str) -> dict[str, Block]:
    """The blocks of a document by name; those within a fence are not taken apart."""
    found, lines, fenced = list[str](), list[str](), False
    for line in [*(ROOT / document).read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line if fenced else line[4:])
            continue
        if lines:
            found.append("\n".join(lines))
        lines = []
    blocks = [Block(f"{document}: {first_line(text)}", text) for text in found]
    assert len({block.name for block in blocks}) == len(blocks), f"two blocks of {document} begin alike"
    return {block.name: block for block in blocks}


def first_line(text: str) -> str:
    return re.split(r"\s{2,}#|\s{2,}", text.strip().splitlines()[0])[0]


@dataclass
class Typist:
    """Types blocks in a folder. `instead`: patterns, and what is typed in their place; each must be met with."""

    server: RunServer
    folder: Path
    instead: Mapping[str, str]
    met: set[str] = field(default_factory=set)

    def types(self, block: Block, *left_out: str) -> list[tuple[int, str]]:
        """Exit code of each command of a block, and what it printed. `left_out`: how the lines begin that are not
        typed."""
        said = list[tuple[int, str]]()
        for line in block.text.replace("\\\n", " ").replace("\n   ", " ").splitlines():
            if line.startswith(left_out):
                continue
            words = shlex.split(self.put(line), comments=True)
            if not words:
                continue
            assert words[0] == "revpatch", f"{line}: not a command of revpatch, so it must be named as left out"
            output = self.folder / "said"
            output.unlink(missing_ok=True)
            (code,) = self.server.run(*words[1:], output=output, cwd=str(self.folder))
            said.append((code, output.read_text()))
        return said

    def put(self, text: str) -> str:
        """The text with what is typed instead."""
        for pattern, other in self.instead.items():
            text, count = re.subn(pattern, other, text)
            if count:
                self.met.add(pattern)
        return text
