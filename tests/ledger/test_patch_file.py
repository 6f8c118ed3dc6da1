"""Patch files: their names, the same bytes for the same patch, and nothing believed that is damaged or foreign."""

import errno
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from past_run import a_trained_run, metadata
from past_run import tensors as patch_tensors

from revpatch.durable import sha256_of
from revpatch.ledger.ledger import read_patch
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

METADATA = {"phase": "wikitext", "step": 500, "parent": None, "probes": {"base": 3.25}, "layers": [0, 1]}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def a_patch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer_01.gate.weight": torch.randn(8, generator=generator),
        "layer_00.coupling.F": torch.randn(4, 6, generator=generator).to(torch.bfloat16),
        "layer_00.log_scale": torch.tensor([0.0]),
    }


def a_file(folder: Path, name: str = "000_a_commit.safetensors") -> tuple[Path, str]:
    return folder / name, write_entry(folder / name, a_patch(), METADATA)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, "wikitext", "start"), "000_wikitext_start.safetensors"),
        ((0, "wikitext", "good", 500), "000_wikitext_good_step000000500.safetensors"),
        ((0, "wikitext", "rollback", 1000), "000_wikitext_rollback_step000001000.safetensors"),
        ((12, "imdb-v1.0", "commit"), "012_imdb-v1.0_commit.safetensors"),
    ],
)
def test_names(arguments, name):
    assert entry_name(*arguments) == name


@pytest.mark.parametrize("phase", ["../up", "a/b", "a..b", "", ".hidden", "a b", "a\n", "é", "/etc/passwd", "x" * 120])
def test_a_phase_name_cannot_leave_the_directory(phase):
    with pytest.raises(EntryError, match="can't be used"):
        entry_name(0, phase, "start")


@pytest.mark.parametrize(
    "arguments", [(0, "a", "best"), (0, "a", "good"), (0, "a", "commit", 5), (-1, "a", "start"), (0, "a", "good", -5)]
)
def test_names_that_make_no_sense(arguments):
    with pytest.raises(EntryError):
        entry_name(*arguments)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    dtype=st.sampled_from(DTYPES),
    plain=st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=9), max_size=3),
)
def test_what_is_written_is_read(tmp_path, shapes, dtype, plain):
    tensors = {f"t{i}": torch.ones(shape).to(dtype) for i, shape in enumerate(shapes)}
    path = tmp_path / "entry.safetensors"
    path.unlink(missing_ok=True)
    sha256 = write_entry(path, tensors, plain)
    read, said = read_entry(path, sha256)
    assert sha256 == sha256_of(path.read_bytes())
    assert (
        (tensors_digest(read), said) == (tensors_digest(tensors), plain) == (tensors_digest(read), read_metadata(path))
    )
    assert {name: (t.dtype, t.shape) for name, t in read.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }


def test_the_same_patch_has_the_same_bytes(tmp_path):
    patch = a_patch()
    reordered = {name: torch.nn.Parameter(patch[name].clone()) for name in reversed(list(patch))}
    reordered["layer_01.gate.weight"] = torch.stack([patch["layer_01.gate.weight"]] * 2, dim=1)[:, 0]  # a view
    shuffled = {key: METADATA[key] for key in reversed(list(METADATA))}
    assert serialise(reordered, shuffled) == serialise(patch, METADATA)
    assert a_file(tmp_path)[1] == a_file(tmp_path, "001_other_commit.safetensors")[1]
    code = (
        "import sys, torch; from revpatch.ledger.patch_file import serialise; from revpatch.durable import sha256_of\n"
        "t = {f'{a}{i}': torch.full((3,), float(i)) for i in range(12) for a in ('layer', 'tensors', '')}\n"
        "digest = sha256_of(serialise(t, {'x': 'layer', 'y': [1, 2]}))\n"
    )
    here: dict = {}
    exec(code, here)
    other = [sys.executable, "-c", f"{code}print(digest)"]
    process = subprocess.run(
        other, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "12345"}
    )
    assert process.stdout.split() == [here["digest"]]


def test_other_values_have_another_digest():
    patch = a_patch()
    other = {**patch, "layer_00.log_scale": torch.tensor([1e-7])}
    assert tensors_digest(other) != tensors_digest(patch)
    assert tensors_digest({"b": patch["layer_00.log_scale"]}) != tensors_digest({"a": patch["layer_00.log_scale"]})
    assert tensors_digest({"a": torch.zeros(2, 3)}) != tensors_digest({"a": torch.zeros(3, 2)})


def test_a_diverged_patch_can_be_recorded(tmp_path):
    path = tmp_path / "000_a_rollback_step000000001.safetensors"
    tensors, said = read_entry(
        path, write_entry(path, {"w": torch.tensor([float("nan"), float("inf")])}, {"loss": float("nan"), "t": (1, 2)})
    )
    assert tensors["w"].isnan().tolist() == [True, False]
    assert said == {"loss": "NaN", "t": [1, 2]}


@pytest.mark.parametrize(
    ("tensors", "plain", "message"),
    [
        ({"w": torch.zeros(2)}, {"config": {"path": Path("x")}}, r"metadata\.config\.path is a PosixPath"),
        ({"w": torch.zeros(2)}, {"w": torch.zeros(1)}, r"metadata\.w is a Tensor"),
        ({"w": torch.zeros(2)}, {"w": {1: 2}}, "the key 1 of type int"),
        ({"w": torch.zeros(2, dtype=torch.complex64)}, {}, "dtype torch.complex64"),
        ({"w": torch.eye(2).to_sparse()}, {}, "only dense tensors"),
        ({"w": torch.zeros(2, device="meta")}, {}, "only dense tensors"),
        ({"w": [1.0]}, {}, "'w' is a list"),
    ],
)
def test_what_cannot_be_kept_is_named(tmp_path, tensors, plain, message):
    with pytest.raises(EntryError, match=message):
        write_entry(tmp_path / "entry.safetensors", tensors, plain)
    with pytest.raises(EntryError, match=r"a patch is a \.safetensors file"):
        write_entry(tmp_path / "entry.pt", a_patch(), METADATA)
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_bit_is_seen(tmp_path):
    """With the journal's sha256 always; without it, unless it changes nothing of tensors and metadata."""
    path, sha256 = a_file(tmp_path)
    data, digest, refused = path.read_bytes(), tensors_digest(a_patch()), 0
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(EntryError, match=f"expected sha256 {sha256}, found.*has not been opened") as caught:
            read_entry(path, sha256)
        assert str(path) in str(caught.value)
        try:
            tensors, said = read_entry(path)
            assert (tensors_digest(tensors), said) == (digest, METADATA)
        except EntryError:
            refused += 1
    assert refused > 20


def _header(**changes):
    return {"format": FORMAT, "version": VERSION, "content_sha256": "0", "metadata": {}} | changes


def _packed(text: str | None) -> bytes:
    return safetensors.torch.save(a_patch(), metadata=None if text is None else {"revpatch": text})


DEEP = "[" * 100_000 + "]" * 100_000
FOREIGN = {
    "empty": b"",
    "cut in the length": b"\x10\x00",
    "a longer header than the file": b"\xff" * 200,
    "text": b"hello world, this is no patch",
    "a header that is no table": (4).to_bytes(8, "little") + b"[1] ",
    "a header nested too deep": len(DEEP).to_bytes(8, "little") + DEEP.encode(),
    "another program's": _packed(None),
    "no JSON": _packed("{"),
    "another format": _packed(json.dumps(_header(format="x"))),
    "a newer version": _packed(json.dumps(_header(version=VERSION + 1))),
    "an older version": _packed(json.dumps(_header(version=1))),
    "no metadata": _packed(json.dumps(_header(metadata=5))),
    "metadata nested too deep": _packed(json.dumps(_header()).replace("{}", f'{{"a": {DEEP}}}')),
    "another content": _packed(json.dumps(_header())),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_foreign_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "entry.safetensors"
    path.write_bytes(FOREIGN[kind])
    expected = {"a newer version": "install a newer revpatch", "an older version": r"install revpatch 0\.1"}.get(kind)
    for read in (read_entry, read_metadata, read_patch):
        if kind == "another content" and read is read_metadata:
            continue
        with pytest.raises(
            EntryError, match=expected or "not a revpatch entry|truncated or damaged|is damaged"
        ) as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_what_is_cut_is_refused(tmp_path):
    path, sha256 = a_file(tmp_path)
    data = path.read_bytes()
    for length in (0, 3, 7, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(EntryError, match="is not the file that was recorded"):
            read_entry(path, sha256)
        with pytest.raises(EntryError, match=r"truncated or damaged|not a revpatch entry"):
            read_entry(path)
    with pytest.raises(EntryError, match="can't be read: No such file"):
        read_entry(tmp_path / "none.safetensors")


class Evil:
    """Leaves a file behind when it is unpickled by anything that runs code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("name", ["000_a_commit.pt", "000_a_commit.safetensors"])
@pytest.mark.parametrize("pack", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_pickle_is_refused_and_not_run(tmp_path, name, pack):
    path, trace = tmp_path / name, tmp_path / "trace"
    pack({"header": "{}", "tensors": Evil(trace)}, path)
    for read in (read_entry, read_metadata, read_patch):
        message = r"expected a \.safetensors file.*revpatch 0\.1" if path.suffix == ".pt" else "damaged|not a revpatch"
        with pytest.raises(EntryError, match=message) as caught:
            read(path)
        assert str(path) in str(caught.value)
    assert not trace.exists()


def test_an_entry_is_never_overwritten(tmp_path):
    path, sha256 = a_file(tmp_path)
    assert write_entry(path, a_patch(), METADATA) == sha256
    with pytest.raises(EntryError, match=f"exists with other content: sha256 {sha256}"):
        write_entry(path, a_patch(), {**METADATA, "step": 501})
    assert sha256_of(path.read_bytes()) == sha256
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_nothing_behind_and_the_rest_untouched(tmp_path):
    a_file(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    code = (
        "import sys, torch; from pathlib import Path; from revpatch.ledger.patch_file import write_entry\n"
        "try: write_entry(Path(sys.argv[1]), {'w': torch.zeros(100_000)}, {})\n"
        "except OSError as error: print(error.filename); sys.exit(7)"
    )
    path = tmp_path / "001_a_commit.safetensors"
    process = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert (process.returncode, process.stdout.strip()) == (7, str(path)), process.stderr
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_entry_has_its_name_only_once_it_is_on_the_disk(tmp_path, monkeypatch):
    def failing(_):
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="the disk is broken"):
        a_file(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_read_by_its_safetensors_alone(tmp_path):
    write_folder(tmp_path / "mine", patch_tensors(1), metadata("commit", 5))
    (tmp_path / "mine/patch_config.json").write_text("edited by hand")
    patch = read_patch(tmp_path / "mine")
    assert (patch.metadata, patch.base["model"], patch.sidecar.bottleneck) == (metadata("commit", 5), "a/base", 4)
    with pytest.raises(EntryError, match="exists with other content"):
        write_folder(tmp_path / "mine", patch_tensors(2), metadata("commit", 5))


@pytest.mark.parametrize("command", [["log"], ["log", "--json"], ["verify"], ["prune", "--keep", "1"]])
def test_log_verify_and_prune_do_without_torch(tmp_path, command):
    a_trained_run(tmp_path)
    (tmp_path / "snapshot").mkdir()
    said = {"events": 0, "head": "", "entry": "x"}
    write_entry(tmp_path / "snapshot/step000000000020.safetensors", patch_tensors(1), said)
    code = (
        "import sys; from revpatch.cli import app; sys.argv[0] = 'revpatch'; app(standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'pyarrow'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "ledger", command[0], str(tmp_path), *command[1:]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
