"""Entry files: the same bytes for the same patch, nothing believed that is damaged, nothing run that is code."""

import errno
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

from revpatch.durable import sha256_of
from revpatch.ledger.entry import EntryError, entry_name, read_entry, serialise, tensors_digest, write_entry

METADATA = {"phase": "wikitext", "step": 500, "parent": None, "probes": {"base": 3.25}, "layers": [0, 1]}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def a_patch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "layer_01.gate.weight": torch.randn(8, generator=generator),
        "layer_00.coupling.F": torch.randn(4, 6, generator=generator).to(torch.bfloat16),
        "layer_00.log_scale": torch.tensor([0.0]),
    }


class Evil:
    """Leaves a file behind when it is unpickled by anything that runs code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0, "wikitext", "start"), "000_wikitext_start.pt"),
        ((0, "wikitext", "good", 500), "000_wikitext_good_step000000500.pt"),
        ((0, "wikitext", "rollback", 1000), "000_wikitext_rollback_step000001000.pt"),
        ((12, "imdb-v1.0", "commit"), "012_imdb-v1.0_commit.pt"),
    ],
)
def test_names(arguments, name):
    assert entry_name(*arguments) == name
    assert entry_name(*arguments, suffix=".safetensors") == name.replace(".pt", ".safetensors")


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


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / f"000_a_start{suffix}"
    sha256 = write_entry(path, a_patch(), METADATA)
    tensors, metadata = read_entry(path, sha256)
    assert sha256 == sha256_of(path.read_bytes())
    assert metadata == METADATA
    assert tensors.keys() == a_patch().keys()
    for name, tensor in a_patch().items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4),
    dtype=st.sampled_from(DTYPES),
    suffix=st.sampled_from([".pt", ".safetensors"]),
)
def test_any_shape_and_dtype_survives(tmp_path, shapes, dtype, suffix):
    tensors = {f"t{i}": torch.ones(shape).to(dtype) for i, shape in enumerate(shapes)}
    path = tmp_path / f"entry{suffix}"
    path.unlink(missing_ok=True)
    read, _ = read_entry(path, write_entry(path, tensors, {}))
    assert tensors_digest(read) == tensors_digest(tensors)
    assert {name: (t.dtype, t.shape) for name, t in read.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }


def test_equal_names_give_equal_bytes_whoever_made_the_string():
    """Pickle writes a string it has met (the same object, not an equal one) as a reference."""
    one = {"tensors": torch.zeros(1), "header": torch.ones(1)}
    other = {"".join(name): tensor for name, tensor in one.items()}
    other = {name[:3] + name[3:]: tensor for name, tensor in other.items()}
    assert serialise(one, {}) == serialise(other, {})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_same_patch_has_the_same_bytes(tmp_path, suffix):
    patch = a_patch()
    reordered = {name: torch.nn.Parameter(patch[name].clone()) for name in reversed(list(patch))}
    # A view into a larger storage, and strings that are equal without being the same object.
    reordered["layer_01.gate.weight"] = torch.stack([patch["layer_01.gate.weight"]] * 2, dim=1)[:, 0]
    metadata = {key: METADATA[key] for key in reversed(list(METADATA))}
    metadata["phase"] = "".join(["wiki", "text"])
    assert serialise(reordered, metadata, suffix) == serialise(patch, METADATA, suffix)
    first = write_entry(tmp_path / f"000_a_start{suffix}", patch, METADATA)
    assert write_entry(tmp_path / f"000_another_commit{suffix}", patch, METADATA) == first


def test_the_same_patch_has_the_same_bytes_in_another_process():
    code = (
        "import torch; from revpatch.ledger.entry import SUFFIXES, serialise\n"
        "from revpatch.durable import sha256_of\n"
        "t = {f'{a}{i}': torch.full((3,), float(i)) for i in range(12) for a in ('layer', 'tensors', '')}\n"
        "digests = [sha256_of(serialise(t, {'x': 'layer', 'y': [1, 2]}, suffix)) for suffix in SUFFIXES]\n"
    )
    here: dict = {}
    exec(code, here)
    process = subprocess.run(
        [sys.executable, "-c", code + "print(*digests)"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )
    assert process.stdout.split() == here["digests"]


def test_other_values_have_another_digest():
    patch = a_patch()
    other = {**patch, "layer_00.log_scale": torch.tensor([1e-7])}
    assert tensors_digest(other) != tensors_digest(patch)
    assert tensors_digest({"b": patch["layer_00.log_scale"]}) != tensors_digest({"a": patch["layer_00.log_scale"]})
    assert tensors_digest({"a": torch.zeros(2, 3)}) != tensors_digest({"a": torch.zeros(3, 2)})


def test_a_diverged_patch_can_be_recorded(tmp_path):
    path = tmp_path / "000_a_rollback_step000000001.pt"
    tensors, metadata = read_entry(
        path, write_entry(path, {"w": torch.tensor([float("nan"), float("inf")])}, {"loss": float("nan"), "t": (1, 2)})
    )
    assert tensors["w"].isnan().tolist() == [True, False]
    assert metadata == {"loss": "NaN", "t": [1, 2]}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
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
def test_what_cannot_be_kept_is_named(tmp_path, tensors, metadata, message):
    with pytest.raises(EntryError, match=message):
        write_entry(tmp_path / "entry.pt", tensors, metadata)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_is_never_overwritten(tmp_path):
    path = tmp_path / "000_a_start.pt"
    sha256 = write_entry(path, a_patch(), METADATA)
    assert write_entry(path, a_patch(), METADATA) == sha256
    with pytest.raises(EntryError, match=f"exists with other content: sha256 {sha256}"):
        write_entry(path, a_patch(), {**METADATA, "step": 501})
    assert sha256_of(path.read_bytes()) == sha256
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_full_disk_leaves_nothing_behind_and_the_rest_untouched(tmp_path):
    write_entry(tmp_path / "000_a_start.pt", a_patch(), METADATA)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    code = (
        "import sys, torch; from pathlib import Path; from revpatch.ledger.entry import write_entry\n"
        "try: write_entry(Path(sys.argv[1]), {'w': torch.zeros(100_000)}, {})\n"
        "except OSError as error: print(error.filename); sys.exit(7)"
    )
    path = tmp_path / "000_a_commit.pt"
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
        write_entry(tmp_path / "000_a_start.pt", a_patch(), METADATA)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_flipped_bit_is_seen_with_the_sha256(tmp_path, suffix):
    path = tmp_path / f"entry{suffix}"
    sha256 = write_entry(path, a_patch(), METADATA)
    data = path.read_bytes()
    for position in range(0, len(data), 97):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(EntryError, match=f"expected sha256 {sha256}, found") as caught:
            read_entry(path, sha256)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_flipped_bit_never_changes_anything_unseen_without_the_sha256(tmp_path, suffix):
    path = tmp_path / f"entry{suffix}"
    write_entry(path, a_patch(), METADATA)
    digest, data = tensors_digest(a_patch()), path.read_bytes()
    refused = 0
    for position in range(0, len(data), 11):
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            tensors, metadata = read_entry(path)
            assert (tensors_digest(tensors), metadata) == (digest, METADATA)
        except EntryError:
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated(tmp_path, suffix):
    path = tmp_path / f"entry{suffix}"
    sha256 = write_entry(path, a_patch(), METADATA)
    data = path.read_bytes()
    for length in (0, 3, 7, 20, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(EntryError, match="is not the file that was recorded"):
            read_entry(path, sha256)
        with pytest.raises(EntryError, match=r"truncated or damaged|not a revpatch entry") as caught:
            read_entry(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("how", ["in torch.save", "bare pickle", "as the header", "in a legacy file"])
def test_code_is_refused_and_not_run(tmp_path, how):
    path, trace = tmp_path / "000_a_commit.pt", tmp_path / "trace"
    if how == "bare pickle":
        path.write_bytes(pickle.dumps({"header": "{}", "tensors": Evil(trace)}))
    elif how == "as the header":
        torch.save({"header": Evil(trace), "tensors": {}}, path)
    else:
        torch.save(
            {"header": "{}", "tensors": {"w": Evil(trace)}}, path, _use_new_zipfile_serialization=how == "in torch.save"
        )
    with pytest.raises(EntryError, match=r"Nothing (was executed|in it was run)") as caught:
        read_entry(path)
    assert str(path) in str(caught.value)
    assert not trace.exists()
    torch.load(path, weights_only=False) if how != "bare pickle" else pickle.loads(path.read_bytes())  # noqa: S301
    assert trace.exists(), "the file would have run its code in other hands"


def test_the_sha256_is_checked_before_the_file_is_opened(tmp_path, monkeypatch):
    path = tmp_path / "entry.pt"
    write_entry(path, a_patch(), METADATA)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled before it was verified"))
    with pytest.raises(EntryError, match="has not been opened"):
        read_entry(path, "0" * 64)


@pytest.mark.parametrize(
    "payload",
    [
        [1, 2],
        {"state_dict": {"w": torch.zeros(2)}},
        {"header": 5, "tensors": {}},
        {"header": "{}", "tensors": {}},
        {"header": '{"format": "revpatch-entry", "version": 1}', "tensors": {}},
        {"header": '{"format": "revpatch-entry", "version": 1}', "tensors": [torch.zeros(2)]},
        {"header": '{"format":"revpatch-entry","version":1,"metadata":{},"content_sha256":""}', "tensors": {"w": 1}},
    ],
)
def test_another_programs_file_is_no_entry(tmp_path, payload):
    path = tmp_path / "model.pt"
    torch.save(payload, path)
    with pytest.raises(EntryError, match="is not a revpatch entry"):
        read_entry(path)


def test_other_strangers(tmp_path):
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("model.safetensors", "text.pt", "text.safetensors", "missing.pt"):
        with pytest.raises(EntryError, match=r"not a revpatch entry|no safetensors file|can't be read"):
            read_entry(tmp_path / name)


def test_a_newer_format_asks_for_a_newer_revpatch(tmp_path):
    path = tmp_path / "entry.pt"
    torch.save({"header": '{"format": "revpatch-entry", "version": 2}', "tensors": {}}, path)
    with pytest.raises(EntryError, match="format version 2, and this revpatch reads version 1"):
        read_entry(path)
