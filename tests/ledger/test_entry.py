"""Entry files: their names, and the same bytes for the same patch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from an_entry import METADATA, a_patch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from revpatch.durable import sha256_of
from revpatch.ledger.entry import EntryError, entry_name, read_entry, serialise, tensors_digest, write_entry

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


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
