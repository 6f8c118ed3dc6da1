"""Patch files: the same bytes for the same patch, nothing believed that is damaged or foreign; found by name, looked at
and compared."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from full_disk import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from past_run import BASE, COMMIT, START, a_run, contents, good, metadata, tensors
from rich.console import Console

from revpatch.config import SidecarConfig
from revpatch.durable import sha256_of
from revpatch.ledger.inspect import compare_patches, inspect, print_difference, print_patch
from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.ledger.patch_file import (
    FORMAT,
    VERSION,
    EntryError,
    entry_name,
    read_entry,
    read_metadata,
    serialise,
    tensors_digest,
    write_entry,
    write_folder,
)
from revpatch.patch.gates import PrefixGate

METADATA = {"phase": "wikitext", "step": 500, "parent": None, "probes": {"base": 3.25}, "layers": [0, 1]}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def a_patch() -> dict[str, torch.Tensor]:
    return {
        "layer_01.gate.weight": torch.arange(8) / 7,
        "layer_00.coupling.F": (torch.arange(24) / 23).reshape(4, 6).to(torch.bfloat16),
        "layer_00.log_scale": torch.tensor([0.0]),
    }


def a_file(folder: Path, name: str = COMMIT) -> tuple[Path, str]:
    return folder / name, write_entry(folder / name, a_patch(), METADATA)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, "wikitext", "start"), "000_wikitext_start.safetensors"),
        ((0, "wikitext", "good", 500), "000_wikitext_good_step000000500.safetensors"),
        ((12, "imdb-v1.0", "commit"), "012_imdb-v1.0_commit.safetensors"),
        *(
            ((0, phase, "start"), "can't be used")
            for phase in ("../up", "a/b", "a..b", "", ".a", "a\n", "é", "x" * 120)
        ),
        ((0, "a", "best"), "kind 'best' is none of start, good"),
        ((0, "a", "good"), "needs a step"),
        ((0, "a", "commit", 5), "has no step"),
        ((-1, "a", "start"), "must not be negative"),
    ],
)
def test_names_of_entries(arguments: tuple[Any, ...], name: str) -> None:
    if name.endswith(".safetensors"):
        assert entry_name(*arguments) == name
    else:
        with pytest.raises(EntryError, match=name):
            entry_name(*arguments)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    dtype=st.sampled_from(DTYPES),
    plain=st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=9), max_size=3),
)
def test_what_is_written_is_read(tmp_path: Path, shapes: list[list[int]], dtype: torch.dtype, plain: Any) -> None:
    given = {f"t{i}": torch.ones(shape).to(dtype) for i, shape in enumerate(shapes)}
    path = tmp_path / "entry.safetensors"
    path.unlink(missing_ok=True)
    sha256 = write_entry(path, given, plain)
    read, said = read_entry(path, sha256)
    assert sha256 == sha256_of(path.read_bytes())
    assert said == plain == read_metadata(path)
    assert tensors_digest(read) == tensors_digest(given)
    assert {n: (t.dtype, t.shape) for n, t in read.items()} == {n: (t.dtype, t.shape) for n, t in given.items()}


def test_the_same_patch_has_the_same_bytes_everywhere(tmp_path: Path) -> None:
    patch = a_patch()
    reordered = {name: torch.nn.Parameter(patch[name].clone()) for name in reversed(list(patch))}
    reordered["layer_01.gate.weight"] = torch.stack([patch["layer_01.gate.weight"]] * 2, dim=1)[:, 0]  # type: ignore[assignment]
    shuffled = {key: METADATA[key] for key in reversed(list(METADATA))}
    data = serialise(reordered, shuffled)  # type: ignore[arg-type]
    assert data == serialise(patch, METADATA)
    assert sha256_of(data) == "293223d9377a4642a8c3336fe0b52a8fc5df79abf5d6d782f398bd03a2d1e4d7", (
        "of another process, machine or version of this format"
    )
    assert a_file(tmp_path)[1] == a_file(tmp_path, "001_other_commit.safetensors")[1]
    others = [{**patch, "layer_00.log_scale": torch.tensor([1e-7])}, {**patch, "layer_00.log_scale": torch.zeros(1, 1)}]
    others.append({("b" if name == "layer_00.log_scale" else name): tensor for name, tensor in patch.items()})
    assert len({tensors_digest(each) for each in (patch, *others)}) == 4


def test_a_diverged_patch_can_be_recorded(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    values, said = {"w": torch.tensor([float("nan"), float("inf")])}, {"loss": float("nan"), "t": (1, 2)}
    found, told = read_entry(path, write_entry(path, values, said))
    assert found["w"].isnan().tolist() == [True, False]
    assert told == {"loss": "NaN", "t": [1, 2]}


@pytest.mark.parametrize(
    ("values", "plain", "words"),
    [
        ({"w": torch.zeros(2)}, {"config": {"path": Path("x")}}, r"metadata\.config\.path is a PosixPath"),
        ({"w": torch.zeros(2)}, {"w": {1: 2}}, "the key 1 of type int"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, {}, "dtype torch.complex64"),
        ({"w": torch.zeros(2, device="meta")}, {}, "only dense tensors"),
        ({"w": [1.0]}, {}, "'w' is a list"),
    ],
)
def test_what_cannot_be_kept_is_named(tmp_path: Path, values: Any, plain: dict[str, Any], words: str) -> None:
    with pytest.raises(EntryError, match=words):
        write_entry(tmp_path / "entry.safetensors", values, plain)
    with pytest.raises(EntryError, match=r"a patch is a \.safetensors file"):
        write_entry(tmp_path / "entry.pt", a_patch(), METADATA)
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_and_every_cut_is_seen(tmp_path: Path) -> None:
    """With the journal's sha256 always; without it, unless it changes nothing of tensors and metadata."""
    path, sha256 = a_file(tmp_path)
    data, digest, refused = path.read_bytes(), tensors_digest(a_patch()), 0
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(EntryError, match=f"{path} is not the file .*sha256 {sha256}, found.*has not been opened"):
            read_entry(path, sha256)
        try:
            found, said = read_entry(path)
            assert (tensors_digest(found), said) == (digest, METADATA)
        except EntryError:
            refused += 1
    assert refused > 20
    for length in (0, 3, 7, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(EntryError, match="is not the file that was recorded"):
            read_entry(path, sha256)
        with pytest.raises(EntryError, match=r"truncated or damaged|not a revpatch entry"):
            read_entry(path)


def _packed(text: str | None = None, **changes: Any) -> bytes:
    header = {"format": FORMAT, "version": VERSION, "content_sha256": "0", "metadata": {}} | changes
    text = json.dumps(header) if text is None else text
    return safetensors.torch.save(a_patch(), metadata={"revpatch": text})


DEEP = "[" * 100_000 + "]" * 100_000
NO_FILE, FOREIGN = "truncated or damaged, or no safetensors file", "is not a revpatch entry"
STRANGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", NO_FILE),
    "a longer header than the file": (b"\xff" * 200, NO_FILE),
    "text": (b"hello world, this is no patch", NO_FILE),
    "a header that is no table": ((4).to_bytes(8, "little") + b"[1] ", NO_FILE),
    "a header nested too deep": (len(DEEP).to_bytes(8, "little") + DEEP.encode(), NO_FILE),
    "another program's": (safetensors.torch.save(a_patch()), FOREIGN),
    "no JSON": (_packed("{"), FOREIGN),
    "another format": (_packed(format="x"), FOREIGN),
    "a newer version": (_packed(version=VERSION + 1), "install a newer revpatch"),
    "an older version": (_packed(version=1), r"install revpatch 0\.1"),
    "no metadata": (_packed(metadata=5), FOREIGN),
    "metadata nested too deep": (_packed(f'{{"format": "{FORMAT}", "metadata": {DEEP}}}'), FOREIGN),
    "another content": (_packed(), "is damaged: tensors and metadata should hash to 0"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_what_is_foreign_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "entry.safetensors"
    data, words = STRANGE[kind]
    path.write_bytes(data)
    for read in (read_entry, read_patch, *([] if kind == "another content" else [read_metadata])):
        with pytest.raises(EntryError, match=f"{path}.*{words}"):
            read(path)


class Evil:
    """Leaves a file behind when it is unpickled by anything that runs code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("name", ["000_a_commit.pt", COMMIT])
def test_a_pickle_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    path, trace = tmp_path / name, tmp_path / "trace"
    words = r"expected a \.safetensors file.*revpatch 0\.1" if path.suffix == ".pt" else "damaged|not a revpatch"
    for pack in (torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))):
        pack({"header": "{}", "tensors": Evil(trace)}, path)
        for read in (read_entry, read_metadata, read_patch):
            with pytest.raises(EntryError, match=f"{path}.*({words})"):
                read(path)
    assert not trace.exists()


def test_an_entry_is_never_overwritten_and_appears_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    path, sha256 = a_file(tmp_path)
    assert write_entry(path, a_patch(), METADATA) == sha256
    before = contents(tmp_path)
    with pytest.raises(EntryError, match=f"exists with other content: sha256 {sha256}"):
        write_entry(path, a_patch(), {**METADATA, "step": 501})
    big = {"w": torch.zeros(100_000)}
    with full_disk(50_000), pytest.raises(OSError, match=r"File too large.*/a\.safetensors"):
        write_entry(tmp_path / "a.safetensors", big, {})
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="the disk is broken"):
        write_entry(tmp_path / "a.safetensors", big, {})
    assert contents(tmp_path) == before


def test_a_folder_is_read_by_its_safetensors_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "mine", tensors(1), metadata("commit", 5))
    (tmp_path / "mine/patch_config.json").write_text("edited by hand")
    patch = read_patch(tmp_path / "mine")
    assert (patch.metadata, patch.base["model"], patch.sidecar.bottleneck) == (metadata("commit", 5), "a/base", 4)
    with pytest.raises(EntryError, match="exists with other content"):
        write_folder(tmp_path / "mine", tensors(2), metadata("commit", 5))


# By name.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("past") / "a run@home [b]"
    a_run(run)
    return run


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("", COMMIT),
        (f"/ledger/{COMMIT}", COMMIT),
        ("@commit", COMMIT),
        ("@head", COMMIT),
        ("@head~1", good(50)),
        ("@start", START),
        ("@good~2", good(30)),
        ("@rollback", "000_wiki_rollback_step000000025.safetensors"),
        (f"@{COMMIT.removesuffix('.safetensors')}", COMMIT),
        (f"@{good(10)}", good(10)),
        ("@good~5", (EntryError, "has 5 good entries")),
        ("@nothing", (EntryError, f"is not in .*Entries there: {START}")),
        ("@good~", (EntryError, "is not in")),
        *((f"@{name}", (EntryError, "without '/' and '..'")) for name in ("../../etc/passwd", "/etc/passwd")),
        ("/ledger/none.safetensors", (FileNotFoundError, "no such file or folder")),
    ],
)
def test_an_entry_is_found_by_name_or_by_counting_back(run: Path, reference: str, found: Any) -> None:
    if isinstance(found, str):
        patch = read_patch(f"{run}{reference}")
        assert patch.path.name == found and patch.event is not None and patch.event.name == found
    else:
        with pytest.raises(found[0], match=found[1]):
            read_patch(f"{run}{reference}")


def test_a_run_without_a_commit_is_told_how_to_name_another_entry(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger").record("start", 0, "wiki", 0, {"w": torch.zeros(1)}, {})
    with pytest.raises(EntryError, match=r"no commit yet.*@head.*000_wiki_start"):
        read_patch(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="a folder without ledger"):
        read_patch(tmp_path / "empty")


# Looked at and compared, by numbers that are worked out here once more.


def test_a_patch_is_shown_with_its_layers(run: Path) -> None:
    facts, values = inspect(f"{run}@good"), tensors(50)
    assert (facts.name, facts.parent, facts.metadata["base"]) == (good(50), good(40), BASE)
    assert facts.recorded is not None and facts.recorded.step == 50
    for layer, found in enumerate(facts.layers):
        own = {name: value for name, value in values.items() if name.startswith(f"0{layer}.coupling.")}
        scale = own.pop(f"0{layer}.coupling.log_scale")
        assert found.norm == pytest.approx(sum(float((t.double() ** 2).sum()) for t in own.values()) ** 0.5)
        assert found.scale == pytest.approx(float(scale.exp()))
        gate = PrefixGate(8)
        gate.load_state_dict({key: values[f"0{layer}.gates.0.{key}"] for key in ("weight", "bias")})
        assert found.gate == pytest.approx(gate(torch.zeros(1, 1, 8)).item())
        assert found.gate_weight == pytest.approx(float(values[f"0{layer}.gates.0.weight"].norm()))


def test_two_patches_are_compared(run: Path, tmp_path: Path) -> None:
    difference = compare_patches(f"{run}@good~4", str(run))
    first, second = tensors(10), tensors(50)
    for row in difference.layers:
        names = [n for n in sorted(first) if n.startswith(f"0{row.layer}.coupling.") and "log_scale" not in n]
        a, b = (torch.cat([found[name].double().flatten() for name in names]) for found in (first, second))
        assert row.distance == pytest.approx(float((a - b).norm()))
        assert row.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(a, b, dim=0)))
        assert row.first.norm == pytest.approx(float(a.norm())) and row.second.norm == pytest.approx(float(b.norm()))
    assert difference.probes == {"base": {"loss": [3.01, 3.05], "gate": [0.51, 0.55]}}
    same = compare_patches(str(run), f"{run}@commit")
    assert [(row.distance, row.cosine) for row in same.layers] == [(0, pytest.approx(1))] * 2
    zero = str(tmp_path / "zero.safetensors")
    write_entry(Path(zero), {n: torch.zeros_like(value) for n, value in first.items()}, metadata("start", 0))
    (row, _) = compare_patches(zero, zero).layers
    assert row.cosine is None and row.first.norm == 0 and row.first.gate == 0.5 and row.first.scale == 1


NARROW = SidecarConfig(bottleneck=2)
OTHERS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor], str]] = {
    "family": ({"base": {**BASE, "family": "llama"}}, tensors(1), "is a patch of a gpt2 model and .* of a llama"),
    "base": ({"base": {**BASE, "sha256": "c" * 64}}, tensors(1), "two bases: a/base .*bbbb.* and a/base .*ccc"),
    "knobs": (
        {"sidecar": NARROW.model_dump(mode="json")},
        tensors(1, NARROW),
        "of two shapes: sidecar.bottleneck = 4 and 2",
    ),
    "more layers": ({}, tensors(1, blocks=3), r"of two shapes: 02\.\S+ is missing and"),
    "channels": (
        {},
        {n: 2 * t if n.endswith("channels") else t for n, t in tensors(1).items()},
        "measured the base's channels on different text",
    ),
    "no patch": ({"base": None}, tensors(1), "not a patch"),
    "other tensors": ({}, {"w": torch.zeros(2)}, "of two shapes"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_cannot_be_compared_is_refused(run: Path, tmp_path: Path, what: str) -> None:
    changes, values, words = OTHERS[what]
    write_entry(tmp_path / "other.safetensors", values, metadata("commit", 5, **changes))
    with pytest.raises(EntryError, match=words):
        compare_patches(str(run), str(tmp_path / "other.safetensors"))
    if what == "other tensors":
        with pytest.raises(EntryError, match="is no sidecar's"):
            inspect(str(tmp_path / "other.safetensors"))


def test_what_is_printed_of_a_file_without_a_journal(run: Path, tmp_path: Path) -> None:
    alone, text = str(shutil.copy(run / "ledger" / COMMIT, tmp_path)), io.StringIO()
    print_patch(inspect(alone), Console(file=text, width=200))
    assert "commit of phase wiki, step 50" in text.getvalue() and "recorded" not in text.getvalue()
    print_difference(compare_patches(alone, alone), Console(file=text, width=200))
    assert "no held-out losses were recorded" in text.getvalue()
