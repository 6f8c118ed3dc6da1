"""What can't be generated from is refused in words, and code in a patch file is not run."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from command import Call, one_line
from toy import POSITIONS, Toy, save_base
from trained_run import PROMPT, Run, copy_of

from revpatch.ledger.patch_file import read_entry, serialise, write_entry


def test_mistakes_in_generating_are_told_in_words(run: Run, toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    entry = run.entry("001_second_commit.safetensors")

    def refused(*words: object, patch: Path = entry, prompt: str = PROMPT, more: tuple[str | Path, ...] = ()) -> None:
        one_line(revpatch("generate", "--patch", patch, "--prompt", prompt, *more), *words)

    refused("--prompt is empty", prompt="")
    long = " ".join(["the"] * POSITIONS)
    refused("--prompt", POSITIONS, "tokens", "cut the prompt", prompt=long)
    refused("--prompt", "cut the prompt", prompt=long * 20)
    refused("--gate 'half'", "learned, on or off", more=("--gate", "half"))
    refused("--compare", "leave out --gate on", more=("--gate", "on", "--compare"))
    refused("--greedy", "all 3 samples", "--num-samples", more=("--greedy", "--num-samples", "3"))
    for option in ("--temperature", "--top-p", "--top-k", "--seed"):
        refused("--greedy draws nothing", option, more=("--greedy", option, "1"))
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n", encoding="utf-8")
    refused("--prompt-file", blank, "a prompt a line", more=("--prompt-file", blank))
    refused("--prompt-file", entry, "expected", more=("--prompt-file", entry))
    for encoding in ("utf-16", "utf-16-le", "utf-32"):  # as PowerShell's > writes them, with a mark or without
        blank.write_bytes("the patch learns\nwhat a stream brings\n".encode(encoding))
        refused("--prompt-file", blank, f"iconv -f {encoding[:6]}", more=("--prompt-file", blank))
    blank.write_text(f"{PROMPT}\n\n{long}\n", encoding="utf-8")
    refused(f"--prompt-file {blank}:3 has", "cut the prompt", more=("--prompt-file", blank))
    for junk, told in (
        (b"\xff", "0xff at offset 5 (line 3)"),
        (b"\0", "1 NUL among 7 bytes, the first at offset 5 (line 3)"),
    ):
        blank.write_bytes(b"a\n\nan" + junk + b"\n")
        refused(f"--prompt-file {blank}: ", told, more=("--prompt-file", blank))
    refused("--prompt-file", tmp_path, "Is a directory", "name a file", more=("--prompt-file", tmp_path))
    refused("--prompt-file", tmp_path / "nowhere.txt", "spelling", more=("--prompt-file", tmp_path / "nowhere.txt"))
    refused(tmp_path / "none.safetensors", "no such file", patch=tmp_path / "none.safetensors")
    refused(tmp_path, "a folder without ledger", patch=tmp_path)
    other = save_base(tmp_path / "other", toy.tokenizer, seed=1)
    refused(entry, "sha256", other, "--base", more=("--base", other))
    refused(tmp_path / "gone", "--base", more=("--base", tmp_path / "gone"))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(entry.read_bytes()[:-1000])
    refused(cut, "truncated or damaged", patch=cut)
    tensors, metadata = read_entry(entry)
    for number, (key, value) in enumerate((("dtype", "nonsense"), ("dtype", 16), ("sha256", 7), ("model", ["x"]))):
        wrong = tmp_path / f"wrong{number}.safetensors"
        write_entry(wrong, tensors, {**metadata, "base": {**metadata["base"], key: value}})
        refused(wrong, f"base.{key}", repr(value), patch=wrong)
    torn = Path(shutil.copytree(toy.base, tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes((toy.base / "model.safetensors").read_bytes()[:-1000])
    refused(torn / "model.safetensors", "truncated", more=("--base", torn))
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    refused(empty, "truncated or damaged", patch=empty)
    foreign = tmp_path / "foreign.safetensors"
    torch.save({"a": torch.ones(2)}, foreign)
    refused(foreign, "truncated or damaged", patch=foreign)
    config = run.directory / "config.yaml"
    refused(config, patch=config)


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
    mark = tmp_path / "it ran"
    bare, packed = tmp_path / "bare.safetensors", tmp_path / "packed.safetensors"
    bare.write_bytes(pickle.dumps(Bomb(mark)))
    torch.save({"header": "{}", "tensors": Bomb(mark)}, packed)
    for path in (bare, packed):
        one_line(revpatch("generate", "--patch", path, "--prompt", "x"), path, "truncated or damaged")
        assert not mark.exists()
    pickle.loads(bare.read_bytes())  # noqa: S301  (the bomb works)
    assert mark.exists()
