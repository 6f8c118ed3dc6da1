"""The manifest: what is written is read, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_shards import make_manifest

from revpatch.shards.format import Manifest


def test_what_is_written_is_read_and_the_digest_is_of_the_content_not_of_the_layout(tmp_path: Path) -> None:
    manifest = replace(make_manifest([3, 4]), licence="public domain", note="é", max_tokens=30, holdout=0.5)
    manifest.write(tmp_path)
    path = tmp_path / "manifest.json"
    assert Manifest.read(tmp_path) == manifest
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert Manifest.read(tmp_path).digest == manifest.digest
    assert replace(manifest, note="other").digest != manifest.digest
    assert make_manifest([3, 4]).digest == "bb4538b04090c2ebdb8d199ce0ae000f564a2b9989aafd324f2e59e8b296b185", (
        "pinned: runs and patches name it"
    )


def change(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.update(values)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (change(version=99), "version"),
        (change(surprise=1), "surprise"),
        (lambda m: m.pop("blocks"), "blocks: expected a value, found 'nothing'"),
        (change(block_size="4"), "block_size: expected a whole number, 0 or more, found '4'"),
        (change(dtype="int32"), "dtype: expected 'uint16' or 'uint32', found 'int32'"),
        (change(blocks=8), "blocks: expected 7"),
        (change(tokens=27), "tokens: expected 28"),
        (change(sources=[1]), "sources[0]: expected text, found 1"),
        (change(holdout="none"), "holdout: expected a number"),
        (lambda m: m["shards"][1].update(name="../evil.tar"), "shards[1].name"),
        (lambda m: m["shards"][1].update(name=m["shards"][0]["name"]), "shards: expected names that differ"),
        (lambda m: m["shards"][1].update(sha256="xyz"), "shards[1].sha256"),
        (lambda m: m["tokenizer"].update(vocab_size=None), "tokenizer.vocab_size: expected a whole number"),
    ],
)
def test_a_manifest_that_is_not_sound_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], told: str
) -> None:
    make_manifest([3, 4]).write(tmp_path)
    path = tmp_path / "manifest.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"manifest\.json: ") as error:
        Manifest.read(tmp_path)
    assert told in str(error.value)


def test_no_manifest_and_half_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no manifest"):
        Manifest.read(tmp_path)
    for text, told in (('{"version": 1,', "not valid JSON"), ("[]", "expected an object")):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=told):
            Manifest.read(tmp_path)
