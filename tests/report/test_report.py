"""`revpatch report` of a small run with rollbacks, and a page that no text of a journal can break."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from past_events import add
from ranks import RunServer
from toy import Toy
from typer.testing import CliRunner

from revpatch.cli import app
from revpatch.config import ConfigError
from revpatch.ledger.events import Sample
from revpatch.ledger.journal import Journal, JournalError
from revpatch.report import Report, report_of
from revpatch.report.history import RunHistory, TimelineEvent
from revpatch.report.page import Chart, Line, page_of


@pytest.fixture(scope="module")
def run(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first phase is rolled back at step 6, its second at 6 and, for good, at 12."""
    folder = tmp_path_factory.mktemp("report")
    samples = {"samples": {"prompts": ["the <b>patch</b>", "the cat"], "max_new_tokens": 6}}
    phases = [
        {"name": name, "shards": str(toy.shards(name)), "steps": n} for name, n in (("first", 24), ("second", 12))
    ]
    config = toy.config_file(folder, monitoring=samples, rollback={"max_rollbacks": 1}, phases=phases)
    harm = [[0, 6], [1, 6], [1, 12]]
    assert server.run("train", config, output=folder / "log", harm=harm) == [0], (folder / "log").read_text()
    return folder / "run"


def test_the_report_is_of_the_journal(run: Path) -> None:
    found = report_of(run)
    events = Journal(run / "ledger/journal.jsonl", readonly=True).records()
    commits = [event["sets"] for event in events if event["event"] == "commit"]
    assert found.matrix is not None
    assert found.matrix.rows == ["base", "first", "second"]
    assert found.matrix.taught_by == [0, 1, 2]
    assert found.matrix.values[1:].tolist() == [[-values["loss"] for values in sets.values()] for sets in commits]
    assert (found.matrix.values[2] == found.matrix.values[1]).all(), "the second phase was given up"
    for losses, value in zip(found.matrix.losses[1], found.matrix.values[1], strict=True):
        assert losses.shape == (16,)
        assert losses.mean() == pytest.approx(-value, abs=1e-5)
    checks = {check.name: check for check in found.checks}
    assert checks["plasticity"].passed
    assert checks["ledger usefulness"].passed
    assert [row.what for row in checks["ledger usefulness"].rows][::2] == [
        "first at step 6: restored",
        "second at step 6: restored",
        "second at step 12: restored",
    ]
    went_on = [row.figure for row in checks["ledger usefulness"].rows][1::2]
    assert went_on == ["next: probe", "next: probe", "next: run_end"]
    gain = found.matrix.difference(1, 0, 1)
    assert gain.low > 0
    assert found.measures["BWT"].value == 0
    assert [h.step for h in found.run.happenings if h.kind == "rollback"] == [6, 30, 36]
    assert [after for after, _ in found.run.samples] == ["base", "first", "second"]
    texts = [[sample.text for sample in texts] for _, texts in found.run.samples]
    samples = [event["texts"] for event in events if event["event"] == "samples"]
    assert texts == [[sample["text"] for sample in texts] for texts in samples]
    assert texts[1] == texts[2], "the second phase was given up"
    assert found.run.environment["ranks"] == "1"
    assert found.run.phases[0].probes[1].training["lm"] > 0


def test_the_command_prints_writes_and_gives_json(run: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["report", str(run), "--html"])
    assert shown.exit_code == 0, shown.output
    for words in ("plasticity", "BWT", "rolled back to 000_first_start.safetensors", "intervals of 95%"):
        assert words in shown.output
    for words in ("sample, base: the <b>patch</b>", "head of the journal"):
        assert words in shown.output
    page = (run / "report.html").read_text("utf-8")
    assert "the &lt;b&gt;patch&lt;/b&gt;" in page
    assert "<b>patch" not in page
    answer = CliRunner().invoke(app, ["report", str(run), "--json", "--out", str(tmp_path / "page.html")])
    found = json.loads(answer.output)
    assert np.array(found["matrix"]["R"]).shape == (3, 3)
    assert {check["name"]: check["passed"] for check in found["checks"]}["plasticity"] is True
    assert (tmp_path / "page.html").read_text("utf-8") == page


def test_a_run_that_was_killed_is_reported_as_far_as_it_goes(run: Path, tmp_path: Path) -> None:
    lines = (run / "ledger/journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "ledger").mkdir()
    shutil.copy(run / "config.yaml", tmp_path)
    for count in range(1, len(lines)):
        (tmp_path / "ledger/journal.jsonl").write_text("".join(lines[:count]))
        found = report_of(tmp_path)
        assert page_of(found).endswith("</html>\n")
        rollbacks = [rollback for phase in found.run.phases for rollback in phase.rollbacks]
        if rollbacks and json.loads(lines[count - 1])["event"] == "rollback":
            assert rollbacks[-1].went_on == ""
            journal = Journal(tmp_path / "ledger/journal.jsonl")
            add(journal, "interrupted", phase=found.run.phases[-1].name, step=6)  # which needs no step of training
            assert report_of(tmp_path).run.phases[-1].rollbacks[-1].went_on == ""


def test_what_came_after_the_run_and_a_run_without_probe_sets_are_reported(run: Path, tmp_path: Path) -> None:
    after, bare = tmp_path / "after", tmp_path / "bare"
    for folder in (after, bare):
        folder.mkdir()
        shutil.copy(run / "config.yaml", folder)
    shutil.copytree(run / "ledger", after / "ledger")
    made = {"operation": "revert", "phase": "first"}
    named = {"kind": "commit", "phase": "revert-first", "phase_index": 2, "step": 0, "file": "002_x_commit.safetensors"}
    add(Journal(after / "ledger/journal.jsonl"), "entry", **named, made_by=made)
    assert report_of(after).run.happenings[-1].words == "revert made 002_x_commit.safetensors"
    config = yaml.safe_load((run / "config.yaml").read_text())
    (bare / "config.yaml").write_text(yaml.safe_dump({**config, "probes": {"sets": []}}))
    journal = Journal(bare / "ledger/journal.jsonl")
    add(journal, "phase_start", phase="first")
    add(journal, "commit", phase="first")
    found = report_of(bare)
    assert found.unjudged == "The run has no probe sets: nothing is judged."
    assert found.unjudged in page_of(found)


def test_what_is_no_run_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"journal\.jsonl is not there"):
        report_of(tmp_path)
    shutil.copytree(run / "ledger", tmp_path / "ledger")
    with pytest.raises((ConfigError, FileNotFoundError), match=r"config\.yaml"):
        report_of(tmp_path)
    (tmp_path / "ledger/journal.jsonl").write_text("")
    with pytest.raises(JournalError, match=r"journal\.jsonl is empty.*backup"):
        report_of(tmp_path)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("line", "polyline", "circle") and self.open[-1] != tag:
            return
        assert self.open.pop() == tag


def test_no_text_of_the_journal_becomes_markup(run: Path) -> None:
    evil = "</title></small><script src='http://x/y.js'></script><img src=x onerror=alert(1)>\"'&"
    plain = report_of(run)
    history = RunHistory(
        Path(evil),
        plain.run.phases,
        plain.run.taught_by,
        plain.run.tolerances,
        happenings=[TimelineEvent(evil, 6, "rollback", evil)],
        samples=[(evil, [Sample(prompt=evil, text=evil)])],
        environment={"state": evil, evil: evil},
    )
    for check in plain.checks:
        check.figure = check.question = evil
    page = page_of(Report(history, plain.matrix, plain.measures, plain.checks))
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    assert not tags.seen & {"script", "img", "iframe", "object"}
    assert not {name for name in tags.attributes if name.startswith("on") or name == "src"}
    assert "http" not in page.replace(evil.replace("<", "&lt;"), "").split("<body>")[0]


def test_a_chart_breaks_its_line_where_there_is_no_number() -> None:
    nan = float("nan")
    line = Line("a", [(0, 1.0), (1, 2.0), (2, nan), (3, 1.5), (4, 1.0)], "red")
    assert line.stretches() == [[(0, 1.0), (1, 2.0)], [(3, 1.5), (4, 1.0)]]
    assert Chart("t", [Line("a", [(0, nan)], "red")], []).empty
    (long,) = Line("a", [(i, float(i % 7)) for i in range(100_000)], "red").stretches()
    assert len(long) <= 1001 and long[-1] == (99_999, float(99_999 % 7))
