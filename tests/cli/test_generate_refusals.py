"""What can't be generated from is refused in words, and code in a patch file is not run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from command import Call, one_line
from toy import POSITIONS, Toy, save_base
from trained_run import PROMPT, Run, copy_of

from revpatch.ledger.patch_file import read_entry, serialise, write_entry


def test_mistakes_in_generating_are_told_in_words(run: Run, toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    entry = run.entry("001_second_commit.safetensors")

    def refused(*words: object, patch: Path = entry, prompt: str = PROMPT, more: tuple[object, ...] = ()) -> None:
        one_line(revpatch("generate", "--patch", patch, "--prompt", prompt, *more), *words)

    refused("--prompt is empty", prompt="")
    long = " ".join(["the"] * POSITIONS)
    refused("--prompt", POSITIONS, "tokens", "cut the prompt", prompt=long)
    refused("--gate 'half'", "learned, on or off", more=("--gate", "half"))
    refused("--compare", "leave out --gate on", more=("--gate", "on", "--compare"))
    refused("--greedy", "all 3 samples", "--num-samples", more=("--greedy", "--num-samples", "3"))
    refused("--greedy draws nothing", "--top-p", more=("--greedy", "--top-p", "1"))
    prompts = tmp_path / "prompts.txt"
    for content, words in (
        (b"\n \n", "a prompt a line"),
        ("the patch\n".encode("utf-16"), "iconv -f utf-16"),  # as PowerShell's > writes it
        (f"{PROMPT}\n\n{long}\n".encode(), f"{prompts}:3 has"),
        (b"a\n\nan\xff\n", "0xff at offset 5 (line 3)"),
    ):
        prompts.write_bytes(content)
        refused("--prompt-file", prompts, words, more=("--prompt-file", prompts))
    refused("--prompt-file", tmp_path / "nowhere.txt", "spelling", more=("--prompt-file", tmp_path / "nowhere.txt"))
    refused(tmp_path / "none.safetensors", "no such file", patch=tmp_path / "none.safetensors")
    refused(tmp_path, "a folder without ledger", patch=tmp_path)
    other = save_base(tmp_path / "other", toy.tokenizer, seed=1)
    refused(entry, "sha256", other, "--base", more=("--base", other))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(entry.read_bytes()[:-1000])
    refused(cut, "truncated or damaged", patch=cut)
    tensors, metadata = read_entry(entry)
    write_entry(
        wrong := tmp_path / "wrong.safetensors", tensors, {**metadata, "base": {**metadata["base"], "dtype": 16}}
    )
    refused(wrong, "base.dtype", 16, patch=wrong)
    refused(run.directory / "config.yaml", patch=run.directory / "config.yaml")


def test_an_entry_that_was_changed_in_its_ledger_is_refused(run: Run, revpatch: Call, tmp_path: Path) -> None:
    entry = copy_of(run, tmp_path) / "ledger/001_second_commit.safetensors"
    tensors, metadata = read_entry(entry)
    name = next(iter(tensors))
    entry.write_bytes(serialise({**tensors, name: tensors[name] + 1}, metadata))
    one_line(revpatch("generate", "--patch", entry, "--prompt", "x"), entry, "not the file that was recorded", "sha256")
    alone = tmp_path / entry.name
    alone.write_bytes(entry.read_bytes())
    assert revpatch("generate", "--patch", alone, "--prompt", "x", "--greedy").code == 0, "it is sound by itself"
    stray = entry.with_name("stray.safetensors")
    stray.write_bytes(entry.read_bytes())
    one_line(revpatch("generate", "--patch", stray, "--prompt", "x"), "stray.safetensors", "is not in")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_code_in_a_patch_file_is_refused_and_not_run(revpatch: Call, tmp_path: Path) -> None:
    mark, file = tmp_path / "it ran", tmp_path / "bare.safetensors"
    file.write_bytes(pickle.dumps(Bomb(mark)))
    one_line(revpatch("generate", "--patch", file, "--prompt", "x"), file, "truncated or damaged")
    assert not mark.exists()
    pickle.loads(file.read_bytes())  # noqa: S301  (the bomb works)
    assert mark.exists()
