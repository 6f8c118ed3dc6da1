"""The proof of removal holds for a sound patch, and fails when anything at all of it is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import MadeUp, patch_tensors
from past_events import add, add_line
from torch import nn
from toy import Toy, save_base
from transformers import AutoModelForCausalLM

from revpatch.evaluation import proofs as removal
from revpatch.evaluation.proofs import fingerprint_base, prove_removal

Make = Callable[..., MadeUp]


@pytest.fixture
def run(make_run: Make) -> MadeUp:
    run = make_run(config=False)
    run.phase("first", patch_tensors(strength=0), patch_tensors(strength=1.0))
    return run


def test_a_sound_patch_leaves_nothing_in_the_dtype_of_the_entry_and_in_float32(run: MadeUp) -> None:
    base = {**run.metadata["base"], "dtype": "bfloat16"}
    run.phase("second", patch_tensors(strength=0), patch_tensors(strength=1.0), base=base)
    report = prove_removal(f"{run.directory}@commit")
    assert report.ok and [check.dtype for check in report.checks] == ["bfloat16", "float32"]
    for check in report.checks:
        assert check.untouched == check.off == check.detached
        assert check.changed > 0.1, "what is compared must be seen to differ at all"
    assert report.checks[0].untouched != report.checks[1].untouched


def test_a_patch_that_touches_the_base_is_caught(run: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    attach = removal.attach

    def careless(model: nn.Module, patch: Any) -> Any:
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-6
        return attach(model, patch)

    monkeypatch.setattr(removal, "attach", careless)
    (check,) = prove_removal(str(run.directory)).checks
    assert not check.ok
    assert check.base_before != check.base_after


def test_a_gate_that_is_not_off_is_caught(run: MadeUp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "set_gate", lambda model, mode: None)
    (check,) = prove_removal(str(run.directory)).checks
    assert not check.ok
    assert check.untouched == check.detached != check.off


def test_the_base_is_held_against_what_training_noted(
    run: MadeUp, toy: Toy, revpatch: Callable[..., Any], tmp_path: Path
) -> None:
    bare = fingerprint_base(AutoModelForCausalLM.from_pretrained(toy.base, dtype=torch.float32).eval())
    add(run.ledger.journal, "run", bare_base=bare)
    add(run.ledger.journal, "run_end", bare_base=bare)
    report = prove_removal(str(run.directory))
    assert report.ok and [(n.event, n.same_weights, n.same_logits, n.same_place) for n in report.noted] == [
        ("run", True, True, True),
        ("run_end", True, True, True),
    ]
    other_host = bare.where.model_copy(update={"host": "another"})
    elsewhere = bare.model_copy(update={"logits": "0" * 64, "where": other_host})
    add(run.ledger.journal, "run_end", bare_base=elsewhere)
    shown = revpatch("ledger", "verify", run.directory, "--removal")
    assert shown.code == 0 and "differ in bits, which proves nothing" in shown.out
    for of, what in ((bare, "logits"), (elsewhere, "weights")):
        add(run.ledger.journal, "run_end", bare_base=of.model_copy(update={what: "0" * 64}))
        report = prove_removal(str(run.directory))
        assert not report.ok and [noted.ok for noted in report.noted] == [True, False]
    failed = revpatch("ledger", "verify", run.directory, "--removal")
    assert failed.code == 1 and "not so: float32: at the run's end, the base's weights" in failed.out


END_GONE, TORN = "no event of the run's end", "its last line is cut short"


@pytest.mark.parametrize(
    ("events", "cut", "words"),
    [
        (["run", "run_end"], 0, ""),
        (["run", "run_end"], None, END_GONE),  # the whole last line
        (["run", "run_end"], 1, TORN),  # without its line feed alone
        (["run", "run_end", "resume"], 0, END_GONE),
        (["run_end"], 0, "no event of the run's start"),
    ],
)
def test_what_the_journal_does_not_say_is_not_proved(
    run: MadeUp, toy: Toy, revpatch: Callable[..., Any], events: list[str], cut: int | None, words: str
) -> None:
    bare = fingerprint_base(AutoModelForCausalLM.from_pretrained(toy.base, dtype=torch.float32).eval())
    journal = run.ledger.journal
    add(journal, "phase_start")
    for event in events:
        noted = {"bare_base": bare} if event in ("run", "run_end") else {}
        noted |= {"undoes_from": len(journal.records()) - 1} if event == "resume" else {}
        add(journal, event, **noted)
    lines = journal.path.read_bytes()
    whole = lines[: lines.rstrip(b"\n").rindex(b"\n") + 1]
    journal.path.write_bytes(whole if cut is None else lines[: len(lines) - cut])
    shown = revpatch("ledger", "verify", run.directory, "--removal")
    assert words in shown.out and ("without a trace" in shown.out) == (shown.code == 0) == (not words), shown
    if words not in ("", TORN):
        told = json.loads(revpatch("ledger", "verify", run.directory, "--removal", "--json").out)
        assert told["ok"] and not told["removal"]["ok"] and words in " ".join(told["removal"]["unproved"])
        assert "the patch comes off the base as it is now" in shown.out


def test_an_event_that_notes_nothing_of_the_base_proves_nothing(run: MadeUp, revpatch: Callable[..., Any]) -> None:
    add_line(run.ledger.journal, "run_end")
    words = f"line {len(run.ledger.journal.records())} is no proper `run_end` event: field bare_base: Field required"
    shown = revpatch("ledger", "verify", run.directory, "--removal")
    assert shown.code == 1 and words in shown.out and "the removal was not looked into" in shown.out


def test_the_verdict_on_the_ledger_comes_first(
    run: MadeUp, toy: Toy, tmp_path: Path, revpatch: Callable[..., Any]
) -> None:
    other = save_base(tmp_path / "other", toy.tokenizer, seed=5)
    failed = revpatch("ledger", "verify", run.directory, "--removal", "--base", other)
    assert failed.code == 1 and "NOT proved" in failed.out
    report = prove_removal(str(run.directory), str(other))
    assert not report.ok and report.checks == [] and report.base_expected != report.base_found
    told = revpatch("ledger", "verify", run.directory, "--removal", "--json").json()
    assert told["ok"] and told["removal"]["ok"] and told["removal"]["noted"] == []
    gone = revpatch("ledger", "verify", run.directory, "--removal", "--base", tmp_path / "gone")
    assert gone.code == 2 and "the chain holds" in gone.out and "--base" in gone.err and gone.err.count("\n") == 1
    gone = revpatch("ledger", "verify", run.directory, "--removal", "--base", tmp_path / "gone", "--json")
    assert gone.code == 2 and json.loads(gone.out)["ok"] and json.loads(gone.out)["removal"] is None
    journal = run.directory / "ledger/journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"step":12', b'"step":13', 1))
    broken = revpatch("ledger", "verify", run.directory, "--removal")
    assert (broken.code, broken.err) == (1, "")
    assert "line 2 names the line before it" in broken.out and "the removal was not looked into" in broken.out
