"""The journal's schema: what is written is proper, what is read is the line again, and the docs name every field."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from past_events import KNOWN, add, add_line, reading

from revpatch.durable import to_plain
from revpatch.ledger.events import KINDS, Event, ProbeReading, RolledBack, UnknownEvent
from revpatch.ledger.journal import EVENT_FIELDS, Journal, JournalError
from revpatch.ledger.ledger import Ledger
from revpatch.ledger.maintenance import verify

RUNS = Path(__file__).parents[2] / "docs/RUNS.md"


def own_fields(kind: type[Event]) -> list[str]:
    return [name for name in kind.model_fields if name not in EVENT_FIELDS]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_and_is_the_line_again(tmp_path: Path, kind: str) -> None:
    journal = Journal(tmp_path / "ledger/journal.jsonl")
    written = add(journal, kind)
    (event,) = Journal(journal.path, readonly=True).events(KINDS[kind])
    assert event == written and type(event) is KINDS[kind]
    line = journal.path.read_text().rstrip("\n")
    assert json.dumps(to_plain(event.as_record()), separators=(",", ":")) == line
    names = list(json.loads(line))
    assert names == [*EVENT_FIELDS[:3], *(n for n in own_fields(KINDS[kind]) if n in names), EVENT_FIELDS[3]]
    assert set(KNOWN[kind]) <= set(names)


def test_numbers_that_are_not_finite_are_spelt_and_read_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "ledger/journal.jsonl")
    sets = {"a": reading(float("nan"), low=float("-inf"), block_losses=[1.0, float("inf")])}
    add(journal, "probe", sets=sets, training={"lm": float("nan")})
    told = journal.records()[0]
    assert told["sets"]["a"]["block_losses"] == [1.0, "Infinity"] and told["sets"]["a"]["low"] == "-Infinity"
    assert (told["sets"]["a"]["loss"], told["training"]) == ("NaN", {"lm": "NaN"})
    assert to_plain(Journal(journal.path).events()[0].as_record()) == told


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("probe", {"step": "7"}, "field step: "),
    ("probe", {"step": 7.0}, "field step: "),
    ("probe", {"step": True}, "field step: "),
    ("probe", {"step": -1}, "field step: "),
    ("probe", {"phase": None}, "field phase: "),
    ("probe", {"note": "x"}, "field note: Extra inputs"),
    ("probe", {"sets": {"base": {"loss": 3.5}}}, "field sets.base.reference: Field required"),
    ("probe", {"sets": {"base": {**reading().model_dump(exclude_unset=True), "los": 1.0}}}, "field sets.base.los: "),
    ("probe", {"sets": {"base": reading().model_copy(update={"loss": "3.5"})}}, "field sets.base.loss: .*number"),
    ("probe", {"training": {"lm": "nan"}}, "field training.lm: .*number"),
    ("rollback", {"window": [1]}, "field window: "),
    ("rollback", {"restored": None}, "field restored: "),
    ("commit", {"inverse_error": 0.1}, "field inverse_error: "),
    ("entry", {"file": "../x.safetensors"}, r"field file: .*'\.\./x\.safetensors' can't be used"),
    ("entry", {"bytes": "12"}, "field bytes: "),
    ("entry", {"base_at": {"model": "a/base"}}, "field base_at.folder: Field required"),
    ("run", {"bare_base": {"dtype": "float32"}}, "field bare_base.weights: Field required"),
    ("resume", {"superseded": "a.safetensors"}, "field superseded: "),
    ("samples", {"texts": [{"prompt": "the"}]}, r"field texts\.0\.text: Field required"),
    ("pruned", {"files": [1]}, r"field files\.0: "),
]


@pytest.mark.parametrize(("kind", "change", "words"), WRONG)
def test_what_is_wrong_is_not_written_and_is_named_where_it_is_read(
    tmp_path: Path, kind: str, change: dict[str, Any], words: str
) -> None:
    journal = Journal(tmp_path / "ledger/journal.jsonl")
    add(journal, "interrupted")
    before = journal.path.read_bytes()
    with pytest.raises(JournalError, match=rf"^event '{kind}': {words}"):
        add(journal, kind, **change)
    assert journal.path.read_bytes() == before
    add_line(journal, kind, **to_plain({**KNOWN[kind], **change}))
    line = rf"line 2 is no proper `{kind}` event: {words}"
    for kinds in ((), (KINDS[kind],)):
        with pytest.raises(JournalError, match=rf"ledger/journal\.jsonl {line}"):
            journal.events(*kinds)
    assert [problem.where for problem in verify(tmp_path).problems if re.search(line, problem.what)] == [
        "journal.jsonl"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_that_is_always_there_can_be_left_out(tmp_path: Path, kind: str) -> None:
    journal = Journal(tmp_path / "ledger/journal.jsonl")
    needed = [name for name in own_fields(KINDS[kind]) if KINDS[kind].model_fields[name].is_required()]
    assert needed
    for name in needed:
        with pytest.raises(JournalError, match=rf"^event '{kind}': field {name}: Field required"):
            journal.append(kind, **{key: value for key, value in KNOWN[kind].items() if key != name})
    assert journal.path.read_bytes() == b""


def test_a_kind_of_another_version_is_read_and_not_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "ledger/journal.jsonl")
    with pytest.raises(JournalError, match="event 'quarantined': a journal has no such kind; it has run, phase_start"):
        journal.append("quarantined", shard=1)
    add_line(journal, "quarantined", shard=1, why={"a": None})
    (event,) = journal.events()
    assert isinstance(event, UnknownEvent) and to_plain(event.as_record()) == journal.records()[0]
    assert list(event.as_record()) == ["seq", "time", "event", "shard", "why", "previous"]
    assert journal.events(RolledBack) == []
    assert verify(tmp_path).ok


def test_an_improper_line_stops_only_those_that_need_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "ledger/journal.jsonl")
    add_line(journal, "probe", step="many")
    assert Ledger(tmp_path / "ledger").entries() == []
    add_line(journal, "entry", file="a.safetensors")
    with pytest.raises(JournalError, match=r"journal\.jsonl line 2 is no proper `entry` event: field kind: "):
        Ledger(tmp_path / "ledger")


def test_the_docs_name_every_kind_and_every_field_in_order() -> None:
    table, _, rest = RUNS.read_text(encoding="utf-8").partition("| event | fields | says |\n")[2].partition("\n\n")
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()[1:]]
    told = {re.findall(r"`(\w+)`", kind)[0]: re.findall(r"`(\w+)`", fields) for kind, fields, _ in rows}
    assert told == {name: own_fields(kind) for name, kind in KINDS.items()}
    of_a_set = rest.partition("Of each probe set")[2].partition("\n\n")[0]
    assert set(ProbeReading.model_fields) == set(re.findall(r"`(\w+)`", of_a_set)) - {"sets", "start", "commit"}
