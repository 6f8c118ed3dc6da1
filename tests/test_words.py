"""The house's words: one name for one thing, and plain English in code and docs."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLD_WORDS = {
    r"\b[Uu]?n?rehears": "replay",
    r"\b(go|goes|going|gone|went) on with\b": "resume",
    r"\btak(e|es|en|ing) up\b": "load",
    r"\bput(s|ting)? down\b": "record",
    r"\b[Bb]are base\b": "unpatched base",
    r"\bhow-manieth\b": "number",
    r"\bAs a row's\b": "a sentence",
}
"""What was written once, and what the field says instead."""
READ = ("README.md", "docs", "configs", "launch", "docker", "revpatch", "tools", "tests")
ENDINGS = (".py", ".md", ".yaml", ".sh", ".sbatch")
COMMANDS = ("revpatch/cli/", "revpatch/__main__.py", "revpatch/surgery/load_back.py")
"""Their functions are named after what people type, or run outside of the package."""


def files() -> list[Path]:
    named = [ROOT / name for name in READ]
    inside = [path for top in named if top.is_dir() for path in sorted(top.rglob("*"))]
    return [path for path in (*named, *inside) if path.suffix in ENDINGS and path != Path(__file__).resolve()]


@pytest.mark.parametrize("old", OLD_WORDS)
def test_old_words_are_gone(old: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(old, line)
    ]
    assert not found, f"say {OLD_WORDS[old]!r}:\n" + "\n".join(found)


def test_a_public_name_is_given_once() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "revpatch").rglob("*.py")):
        place = str(path.relative_to(ROOT))
        if place.startswith(COMMANDS):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(place)
    assert not {name: places for name, places in homes.items() if len(places) > 1}


def test_docstrings_of_functions_begin_with_a_sentence() -> None:
    """Not with "What ..." or "Whether ...", which are no sentences."""
    wrong = []
    for path in sorted((ROOT / "revpatch").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and re.match(
                r"(What|Whether|How|Where|Which|Why)\b", ast.get_docstring(node) or ""
            ):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}")
    assert not wrong, "\n".join(wrong)
