"""The commands explain themselves."""

from __future__ import annotations

import re

import pytest
from command import Call, in_a_process


def test_help_lists_the_commands() -> None:
    result = in_a_process("--help")
    assert result.code == 0
    assert result.err == ""
    for command in ("train", "generate", "shards", "ledger"):
        assert re.search(rf"\b{command}\b", result.out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--help"], ["--set", "config"]),
        (
            ["generate", "--help"],
            ["--patch", "--prompt-file", "--gate", "--compare", "--json", "--num-samples", "--base"],
        ),
        (["shards", "build", "--help"], ["--tokenizer", "--block-size", "--out", "--holdout"]),
        (["ledger", "verify", "--help"], ["run"]),
    ],
)
def test_each_command_explains_itself(
    revpatch: Call, arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = revpatch(*arguments)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.out)
    assert result.code == 0 and not [word for word in words if word not in plain]
    assert "local" + "_rank" not in plain


@pytest.mark.parametrize("arguments", [["frobnicate"], ["train"], ["generate", "--prompt", "x"]])
def test_an_incomplete_command_ends_with_2_and_its_usage(revpatch: Call, arguments: list[str]) -> None:
    result = revpatch(*arguments)
    assert result.code == 2 and "Usage" in result.err
