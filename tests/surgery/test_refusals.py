"""What the commands on patches refuse: one line that names it, exit code 2, and nothing is written."""

from __future__ import annotations

import fcntl
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import one_line
from made_up import MadeUp, patch_tensors, plus
from safetensors.torch import load_file, save_file
from toy import Toy

from revpatch.durable import canonical_json, sha256_of
from revpatch.ledger.patch_file import write_entry
from revpatch.surgery import exchange


@pytest.fixture(scope="module")
def world(toy: Toy, identity: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with runs and patches of many kinds; no test may change it."""
    folder = tmp_path_factory.mktemp("world")
    plain, base, sidecar = patch_tensors(), identity["base"], identity["sidecar"]
    others: dict[str, tuple[Any, dict[str, Any]]] = {
        "run": (plain, {}),
        "locked": (plain, {}),
        "bare": (plain, {}),
        "sha": (plain, {"base": {**base, "sha256": "1" * 64}}),
        "gate": (patch_tensors(gate="token"), {"sidecar": {**sidecar, "gate": "token"}}),
        "shape": (patch_tensors(depth=3), {}),
    }
    for name, (tensors, changed) in others.items():
        run = MadeUp.of(folder / name, toy, identity, config=name in ("run", "locked"))
        run.phase("first", tensors, plus(tensors, 1e-3, 0), **changed)
    alone = MadeUp.of(folder / "alone", toy, identity)
    alone.ledger.record("commit", 0, "first", 1, plain, identity)
    imported = MadeUp.of(folder / "imported", toy, identity)
    imported.phase("second", plain, plus(plain, 1e-3, 0))
    imported.ledger.record("commit", 1, "first", 0, plain, identity, made_by={"operation": "import"})
    (folder / "taken").mkdir()
    (folder / "taken/thesis.txt").touch()
    (folder / "mine.jsonl").write_text('{"text": "x"}\n')
    said = {**identity, "phase": "first"}
    nan = {**plain, "01.coupling.log_scale": plain["01.coupling.log_scale"] + float("nan")}
    write_entry(folder / "nan.safetensors", nan, said)
    write_entry(folder / "long.safetensors", plain, {**said, "phase": "p" * 106})
    write_entry(folder / "wide.safetensors", patch_tensors(bottleneck=8), said)
    write_entry(folder / "other.safetensors", plain, {**said, "base": {**base, "sha256": "0" * 64}})

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folder / "ran",))

    torch.save({"header": "{}", "tensors": Evil()}, folder / "evil.safetensors", pickle_module=pickle)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(exchange, "prove", lambda *_: None)  # which takes seconds
        exchange.export(str(folder / "run"), "hf", folder / "hf")
    with (folder / "locked/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def content(folder: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of all files."""
    stats = {str(path): path.stat() for path in folder.rglob("*") if path.name != ".lock"}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items() if not Path(name).is_dir()}


REFUSED = {
    "revert run third": "no commit of a phase 'third'; committed are first",
    "revert run first --layers 0,9": "no sidecar after block 9: the patch has sidecars after blocks [0, 1]",
    "revert run first --layers a": "--layers a: expected numbers",
    "revert bare first": "no bare/config.yaml",
    "revert none first --shards {probe}": "expected the folder of a run",
    "revert alone first": "bypass sidecars instead (--layers)",
    "revert locked first": "another process",
    "revert imported first": "001_first_commit.safetensors was imported",
    "merge run sha --out x": "are patches of two bases",
    "merge run gate --out x": "sidecar.gate = prefix and token",
    "merge run shape --out x": "are of two shapes: 02.",
    "merge run run --out sha": "Only patches of one base go together",
    "merge run run --out taken": "Nothing was overwritten",
    "merge run run --weights 1 --out x": "expected two numbers",
    "merge run run --weights nan,1 --out x": "two finite numbers",
    "merge run run --weights 0,0 --out x": "not both 0",
    "merge shape shape --out x": "name held-out shards with --shards",
    "export run --out taken": "Nothing was overwritten",
    "export run --to onnx --out x": "--to onnx: expected one of safetensors, hf",
    "export run --to hf --base no --out x": "name its folder with",
    "export run@/etc/passwd --out x": "is looked at",
    "import evil.safetensors run": "truncated or damaged",
    "import nan.safetensors x": "01.coupling.log_scale holds values that are not finite",
    "import long.safetensors x": "at most 128 characters",
    "import shape/ledger/000_first_commit.safetensors run": "of two shapes",
    "import hf taken": "Nothing was overwritten",
    "probe --patch none --shards {probe}": "--patch none needs --base",
    "probe --patch none --base nowhere --shards {probe}": "no such local folder",
    "probe --patch none --base {base}": "--shards is missing",
    "probe --patch none --base {base} --dtype float16 --shards {probe}": "--dtype float16: choose float32 or bfloat16",
    "probe --patch none --base {base} --shards nowhere": "there is no manifest",
    "probe --patch none --base {base} --shards mine.jsonl": "is raw text",
    "probe --patch run --dtype float32 --shards {probe}": "--dtype is for --patch none",
    "probe --patch other.safetensors --shards {probe}": "patch of a base with sha256 0000",
    "probe --patch wide.safetensors --shards {probe}": "expected shape",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_refusal_names_what_is_wrong_and_writes_nothing(
    world: Path, toy: Toy, revpatch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(world)
    before = content(world)
    command = line.format(probe=toy.shards("base_probe"), base=toy.base).split()
    one_line(revpatch(*command if command[0] == "probe" else ["ledger", *command]), REFUSED[line])
    assert content(world) == before and not (world / "x").exists()


def edit(change: Callable[[dict[str, Any]], Any], rehash: bool = True) -> Callable[[Path], None]:
    """Change the table `revpatch` of an exported folder and, as whoever knows the format can, its hash."""

    def edited(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(said := config["revpatch"])
        if rehash and said.pop("content_sha256", None):
            said["content_sha256"] = sha256_of(canonical_json(said).encode())
        (folder / "config.json").write_text(json.dumps(config))

    return edited


def tamper(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["revpatch.sidecars.00.coupling.log_scale"] += 1e-7
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def index(folder: Path) -> None:
    places = {"revpatch.sidecars.00.coupling.log_scale": "../hf/model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


UNHASHED = "config.json: its table `revpatch` should hash to"
DAMAGE: list[tuple[Callable[[Path], Any], str]] = [
    (tamper, "its sidecars should hash to"),
    (cut, "can't be read as safetensors"),
    (index, "no '..'"),
    (edit(lambda said: said["entry"].update(phase="../../evil")), "phase name '../../evil'"),
    (edit(lambda said: said["entry"]["base"].update(sha256="2" * 64)), "sha256 2222"),
    (edit(lambda said: said["entry"].pop("base")), "not a patch"),
    (edit(lambda said: said.clear()), "expected a table `revpatch`"),
    (edit(lambda said: said["entry"]["sidecar"].update(gate="token"), rehash=False), UNHASHED),
    (edit(lambda said: said["entry"].update(probes={"general": 1.0}), rehash=False), UNHASHED),
    (edit(lambda said: said.pop("content_sha256"), rehash=False), "has no content_sha256"),
    (lambda folder: (folder / "config.json").write_text("[" * 100_000), "expected a table `revpatch`"),
    (lambda folder: (folder / "config.json").unlink(), "is not a revpatch entry"),
    (lambda folder: (folder / "model.safetensors").unlink(), "can't be read as safetensors"),
]


def test_a_damaged_or_edited_export_is_not_imported(world: Path, tmp_path: Path, revpatch: Callable[..., Any]) -> None:
    before = content(world)
    for number, (change, words) in enumerate(DAMAGE):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(world / "hf", copy)
        change(copy)
        one_line(revpatch("ledger", "import", copy, world / "run"), words)
    assert content(world) == before
