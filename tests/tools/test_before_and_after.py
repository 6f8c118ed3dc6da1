"""The page of what a base wrote before, after each phase, and with the patch off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import in_a_process
from toy import Toy

TOOL = Path(__file__).resolve().parents[2] / "tools/before_and_after.py"
PROMPTS = ["the little kettle", "a river"]


@pytest.fixture(scope="module")
def trained(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before_and_after")
    samples = {"prompts": PROMPTS, "max_new_tokens": 12}
    done = in_a_process("train", str(toy.config_file(folder, monitoring={"samples": samples})))
    assert done.code == 0, done.err
    return folder / "run"


def show(run: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), str(run), *options], capture_output=True, text=True)


def test_each_prompt_has_its_texts_in_order_and_the_patch_is_off_at_last(trained: Path) -> None:
    done = show(trained)
    assert done.returncode == 0, done.stderr
    events = map(json.loads, (trained / "ledger/journal.jsonl").read_text().splitlines())
    written = [event["texts"] for event in events if event["event"] == "samples"]
    assert len({texts[0]["text"] for texts in written}) > 1, "a patch that changes nothing shows nothing"
    expected = []
    for number in range(len(PROMPTS)):
        expected.append(f"{PROMPTS[number]} …")
        for title, texts in zip(("before", "after first", "after second"), written, strict=True):
            expected.append(f"{title} {texts[number]['text']}")
        expected.append("patch off (the same as before)")
    expected.append("With the patch off, all 2 texts are what the base wrote before, to the letter.")
    assert done.stdout.split() == " ".join(expected).split()


def test_a_base_that_writes_otherwise_is_an_error(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    import before_and_after

    right: Callable[..., None] = before_and_after.set_gate
    monkeypatch.setattr(before_and_after, "set_gate", lambda model, mode: right(model, "learned"))
    monkeypatch.setattr(sys, "argv", ["before_and_after.py", str(trained)])
    with pytest.raises(SystemExit, match=r"With the patch off, [12] of 2 texts are not what the base wrote before"):
        before_and_after.main()


def test_what_is_no_such_run_is_told_in_a_line(tmp_path: Path) -> None:
    done = show(tmp_path)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
