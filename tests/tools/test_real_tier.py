"""What a comparison on a real model is made of: text in documents of sensible size, and clear words where a part of it
can't be made. Nothing is downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent.parent / "tools"

PAGE = """<?xml version="1.0"?><html><head><title>Not text</title></head><body>
<div id="banner"><a href="x"><span class="text">Download</span></a></div><p id="title"><img src="y" /></p>
<ul class="docnav top"><li><strong>Next</strong></li></ul>
<h2 class="title">6.1. <code>apt</code> and
 its kin</h2><div class="toc"><dl><dt>6.1.1. Contents</dt></dl></div>
<div class="para">One
  paragraph &amp; <a id="z" class="indexterm"></a>another.</div><pre class="screen">$ <strong>apt update</strong>
  indented
</pre><div><h3>6.1.1. {part}</h3><div class="para">{text}</div></div>
<ul class="docnav"><li>Up</li></ul></body></html>"""


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def page(part: str, text: str) -> str:
    return PAGE.replace("{part}", part).replace("{text}", text)


def test_a_page_is_its_text_by_section_without_navigation() -> None:
    from real_text import html_sections

    assert html_sections(page("Updating", "The list.")) == [
        ["6.1. apt and its kin", "One paragraph & another.", "$ apt update\n  indented"],
        ["6.1.1. Updating", "The list."],
    ]


def test_what_was_not_translated_is_left_out(tmp_path: Path) -> None:
    from real_text import manual_documents

    for language, part in (("en", page("Updating", "The list.")), ("fr", page("Mettre à jour", "La liste."))):
        (tmp_path / language).mkdir()
        (tmp_path / language / "apt.html").write_text(part, encoding="utf-8")
    found = list(manual_documents(tmp_path / "fr", original=tmp_path / "en"))
    assert found == [{"id": "apt-001", "text": "6.1.1. Mettre à jour\n\nLa liste."}]


def test_a_manual_page_is_divided_at_its_headings() -> None:
    from real_text import pod_documents

    body = "    Text of it. " * 30
    text = f"NAME\n    perlx - short\n\nDESCRIPTION\n{body}\n\n  Part\n{body}\n\nSEE ALSO\n    perly\n"
    text = text.replace("SEE ALSO", f"BUGS\n{body}\n\nSEE ALSO")
    found = list(pod_documents("perlx", text))
    assert [d["id"] for d in found] == ["perlx-001", "perlx-002"]
    assert found[1]["text"].startswith("BUGS\n") and found[1]["text"].endswith("SEE ALSO\n    perly")


def test_a_module_is_divided_before_functions_and_their_decorators() -> None:
    from real_text import python_documents

    body = "    x = 1  # a line\n\n" * 30
    source = f'"""Of it."""\n\nimport os\n\n\ndef f():\n{body}\n\n@once\ndef g():\n{body}\nclass A:\n{body}'
    firsts = [d["text"].splitlines()[0] for d in python_documents("m", source)]
    assert firsts == ['"""Of it."""', "@once", "class A:"]


@pytest.mark.parametrize(
    ("text", "between"), [("word " * 30_000, ""), ("a line\n" * 5_000, "\n"), ("a paragraph of it\n\n" * 3_000, "\n\n")]
)
def test_a_long_section_is_divided_where_it_can_be_and_nothing_is_lost(text: str, between: str) -> None:
    from real_text import LONGEST, sized

    pieces = [document["text"] for document in sized("x", [text])]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert len(pieces) == 1 or max(map(len, pieces)) <= LONGEST
    assert (len(pieces) > 1) == bool(between)  # one line is not divided


def run(folder: Path, *names: str, path: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "real_tier.py"), "--folder", str(folder), *names]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": path, "PYTHONPATH": str(TOOLS.parent)})


def test_a_missing_program_is_named_and_the_rest_is_made_once(tmp_path: Path) -> None:
    done = run(tmp_path, "perl", "english", "python")
    assert done.returncode == 1
    assert (
        "perl: expected the program pod2text (Debian and Ubuntu have it), found none: any other .jsonl" in done.stderr
    )
    assert "english: expected the program dpkg-deb" in done.stderr and "python:" not in done.stderr
    made = tmp_path / "python.jsonl"
    documents = [json.loads(line) for line in made.read_text(encoding="utf-8").splitlines()]
    assert len({d["id"] for d in documents}) == len(documents) > 100
    assert sum(len(d["text"]) for d in documents) > 300_000
    assert "PSF License" in (tmp_path / "python.about.txt").read_text(encoding="utf-8")
    before = made.read_bytes()
    again = run(tmp_path, "python")
    assert again.returncode == 0 and f"{made} is there already" in again.stdout and made.read_bytes() == before


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "german")
    assert done.returncode == 2
    assert "expected one of smollm2, french, english, perl, python, found german" in done.stderr


def test_a_package_that_reads_the_weights_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    import real_tier

    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)
    with pytest.raises(real_tier.Unavailable, match=r"expected the package gguf.* -m pip install gguf==0\.19\.0"):
        real_tier.make_model(tmp_path, None)
