"""Patches brought into a ledger, and what is refused at the door."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import one_line
from made_up import MadeUp, patch_tensors
from past_events import add
from safetensors.torch import load_file, save_file
from toy import Toy
from transformers import AutoModelForCausalLM

from revpatch.config import SidecarConfig
from revpatch.durable import canonical_json, sha256_of
from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.ledger.maintenance import verify
from revpatch.ledger.patch_file import write_entry
from revpatch.patch.patched_model import base_sha256
from revpatch.patches import load_patched, save_pretrained
from revpatch.surgery.exchange import export, import_patch

Make = Callable[..., MadeUp]


@pytest.fixture(autouse=True)
def _unproved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are not loaded back, which takes seconds."""
    monkeypatch.setattr("revpatch.surgery.exchange.prove", lambda *_: None)


@pytest.fixture
def run(make_run: Make) -> MadeUp:
    run = make_run(config=False)
    run.phase("first", patch_tensors(strength=0), patch_tensors(1))
    return run


@pytest.fixture
def folder(run: MadeUp, tmp_path: Path) -> Path:
    export(str(run.directory), "hf", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("to", ["file", "safetensors", "hf", "save_pretrained"])
def test_a_patch_comes_back_as_the_newest_commit(run: MadeUp, tmp_path: Path, to: str) -> None:
    (tmp_path / "there").mkdir()
    source = tmp_path / "there/out"
    if to == "save_pretrained":
        save_pretrained(load_patched(run.directory)[0], source)
        imported_name = "imported"
    else:
        files = export(str(run.directory), "hf" if to == "hf" else "safetensors", source)
        source, imported_name = files[0] if to == "file" else source, "first"
    for target, name in (
        (run.directory, f"001_{imported_name}_commit.safetensors"),
        (tmp_path / "new", f"000_{imported_name}_commit.safetensors"),
    ):
        made = import_patch(source, target)
        assert made.name == name
        tensors, metadata = (patch := read_patch(target)).tensors, patch.metadata
        expected, said = (patch := read_patch(f"{run.directory}@000_first_commit")).tensors, patch.metadata
        assert tensors.keys() == expected.keys() and all(torch.equal(tensors[n], expected[n]) for n in expected)
        assert metadata["made_by"]["operation"] == "import"
        assert {key: said[key] for key in run.metadata} == run.metadata
        if target == run.directory:
            assert metadata["base"] == run.metadata["base"]
        assert metadata["base"]["sha256"] == run.metadata["base"]["sha256"]
        assert metadata["sidecar"] == run.metadata["sidecar"]
        assert metadata.get("tokenizer") == (None if to == "save_pretrained" else run.metadata["tokenizer"])
        assert verify(target).ok


@pytest.mark.parametrize("moment", ["surgery.combine.Ledger.__init__", "ledger.journal.Journal.append"])
def test_an_import_into_a_new_run_that_was_killed_is_done_again(
    run: MadeUp, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(f"revpatch.{moment}", gone)
        with pytest.raises(KeyboardInterrupt):
            import_patch(folder, tmp_path / "new")
    assert (tmp_path / "new").is_dir()
    assert import_patch(folder, tmp_path / "new").name == "000_first_commit.safetensors"
    assert verify(tmp_path / "new").ok


def test_the_sha256_of_the_origin_is_kept(run: MadeUp, folder: Path) -> None:
    origin = run.ledger.newest()
    assert origin is not None
    made = import_patch(folder, run.directory)
    assert made.made_by["sha256"] == origin.sha256
    newest = run.ledger.newest()
    assert newest is not None and newest.made_by == made.made_by


def edit(folder: Path, change: Callable[[dict[str, Any]], None], rehash: bool = True) -> None:
    """Changes the table `revpatch` and, as whoever knows the format can, its hash."""
    config = json.loads((folder / "config.json").read_text())
    said = config["revpatch"]
    change(said)
    if rehash and said.pop("content_sha256", None):
        said["content_sha256"] = sha256_of(canonical_json(said).encode())
    (folder / "config.json").write_text(json.dumps(config))


def test_a_changed_tensor_a_foreign_name_and_a_foreign_base_are_refused(
    run: MadeUp, folder: Path, tmp_path: Path, revpatch: Callable[..., Any]
) -> None:
    events = len(run.ledger.journal.records())

    def tamper(copy: Path) -> None:
        weights = load_file(copy / "model.safetensors")
        weights["revpatch.sidecars.00.coupling.log_scale"] += 1e-7
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    def cut(copy: Path) -> None:
        data = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(data[: len(data) // 2])

    def index(copy: Path) -> None:
        places = {"revpatch.sidecars.00.coupling.log_scale": "../hf/model.safetensors"}
        (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    for number, (change, words) in enumerate(
        (
            (tamper, "its sidecars should hash to"),
            (cut, "can't be read as safetensors"),
            (index, "no '..'"),
            (lambda copy: edit(copy, lambda said: said["entry"].update(phase="../../evil")), "phase name '../../evil'"),
            (lambda copy: edit(copy, lambda said: said["entry"].update(phase="/etc/evil")), "phase name '/etc/evil'"),
            (lambda copy: edit(copy, lambda said: said["entry"]["base"].update(sha256="2" * 64)), "sha256 2222"),
            (lambda copy: edit(copy, lambda said: said["entry"].pop("base")), "not a patch"),
            (lambda copy: edit(copy, lambda said: said.clear()), "expected a table `revpatch`"),
            (lambda copy: (copy / "config.json").unlink(), "is not a revpatch entry"),
            (lambda copy: (copy / "model.safetensors").unlink(), "can't be read as safetensors"),
        )
    ):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(folder, copy)
        change(copy)
        result = revpatch("ledger", "import", copy, run.directory)
        assert (result.code, result.out) == (2, ""), result
        assert words in result.err and result.err.count("\n") == 1, result.err
    assert len(run.ledger.journal.records()) == events


@pytest.mark.parametrize("change", ["gate", "probes", "sidecar", "no hash", "deep"])
def test_what_an_exported_folder_says_of_its_patch_is_held_to_its_hash(
    run: MadeUp, folder: Path, revpatch: Callable[..., Any], change: str
) -> None:
    events, words = len(run.ledger.journal.records()), "config.json: its table `revpatch` should hash to"
    if change == "gate":
        edit(folder, lambda said: said["entry"]["sidecar"].update(gate="token"), rehash=False)
    elif change == "probes":
        edit(folder, lambda said: said["entry"].update(probes={"general": 1.0}), rehash=False)
    elif change == "sidecar":
        edit(folder, lambda said: said["sidecar"].update(activation="relu"), rehash=False)
    elif change == "no hash":
        edit(folder, lambda said: said.pop("content_sha256"), rehash=False)
        words = "has no content_sha256"
    else:
        (folder / "config.json").write_text("[" * 100_000)
        words = "expected a table `revpatch`"
    result = revpatch("ledger", "import", folder, run.directory)
    assert (result.code, result.out) == (2, ""), result
    assert words in result.err and result.err.count("\n") == 1, result.err
    assert len(run.ledger.journal.records()) == events


def test_what_is_not_finite_leaves_no_folder(run: MadeUp, tmp_path: Path, revpatch: Callable[..., Any]) -> None:
    tensors = patch_tensors(1)
    tensors["01.coupling.log_scale"] = torch.tensor(float("nan")).expand_as(tensors["01.coupling.log_scale"])
    write_entry(tmp_path / "nan.safetensors", tensors, {**run.metadata, "phase": "first"})
    result = revpatch("ledger", "import", tmp_path / "nan.safetensors", tmp_path / "new")
    assert result.code == 2 and "01.coupling.log_scale holds values that are not finite" in result.err
    assert not (tmp_path / "new").exists()


def test_a_name_that_no_entry_can_have_leaves_no_folder(run: MadeUp, tmp_path: Path) -> None:
    for length in (105, 106):
        write_entry(tmp_path / f"{length}.safetensors", patch_tensors(1), {**run.metadata, "phase": "p" * length})
    with pytest.raises(ValueError, match=r"106\.safetensors: entry name '000_p.*at most 128 characters"):
        import_patch(tmp_path / "106.safetensors", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert import_patch(tmp_path / "105.safetensors", tmp_path / "new").name == f"000_{'p' * 105}_commit.safetensors"


def test_how_a_patch_was_begun_does_not_keep_it_out(run: MadeUp, tmp_path: Path) -> None:
    sidecar = {**run.metadata["sidecar"], "init_scale": 0.5, "layers": [0, 1], "check_invertibility": False}
    write_entry(
        tmp_path / "other.safetensors", patch_tensors(2), {**run.metadata, "phase": "first", "sidecar": sidecar}
    )
    assert import_patch(tmp_path / "other.safetensors", run.directory).name == "001_first_commit.safetensors"


def test_no_code_is_run_and_no_other_shape_is_taken(
    run: MadeUp, folder: Path, tmp_path: Path, revpatch: Callable[..., Any]
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    (folder / "modeling_revpatch.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    import_patch(folder, tmp_path / "new")
    torch.save({"header": "{}", "tensors": Evil()}, tmp_path / "evil.safetensors", pickle_module=pickle)
    write_entry(tmp_path / "deep.safetensors", patch_tensors(depth=3), {**run.metadata, "phase": "first"})
    for source, words in (
        (tmp_path / "evil.safetensors", "truncated or damaged"),
        (tmp_path / "deep.safetensors", "of two shapes"),
    ):
        result = revpatch("ledger", "import", source, run.directory)
        assert (result.code, result.out) == (2, ""), result
        assert words in result.err, result.err
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.txt").touch()
    refused = revpatch("ledger", "import", folder, tmp_path / "taken")
    assert refused.code == 2 and "Nothing was overwritten" in refused.err
    assert not (tmp_path / "ran").exists()


def placed(toy: Toy, project: Path, noted: Any = "folder") -> Path:
    """A run of a base that was called base/mine in a project's folder; `noted` is what its journal says of it."""
    shutil.copytree(toy.base, project / "base/mine")
    run = project / "runs/x"
    base = AutoModelForCausalLM.from_pretrained(toy.base, dtype=torch.float32)
    names = {"model": "base/mine", "revision": None, "sha256": base_sha256(base, rounded=True), "dtype": "float32"}
    metadata = {"base": names, "sidecar": SidecarConfig(bottleneck=4).model_dump(mode="json"), "phase": "first"}
    ledger = Ledger(run / "ledger")
    if noted is not None:
        folder = str(project / "base/mine") if noted == "folder" else None
        add(ledger.journal, "run", base_at={"model": "base/mine", "folder": folder})
    ledger.record("commit", 0, "first", 1, patch_tensors(1), metadata)
    (run / "config.yaml").write_text("output_dir: runs/x\n", encoding="utf-8")
    return run


GONE = ("it was a folder when", "base/mine", "the hub was not asked", "--base")
HUB = ("base/mine", "name its folder with --base")


@pytest.mark.parametrize(
    ("noted", "moved", "here", "words"),
    [
        ("folder", None, False, ()),  # named from another folder
        ("folder", "the project", False, ()),
        ("folder", "the run", False, ()),
        ("folder", "the base", False, GONE),
        ("folder", "the base", True, ()),  # there is one of that name where the command is given
        (None, None, False, ()),  # an older run: its config says where the project is
        (None, "the run", False, HUB),
        ("hub", "the base", False, HUB),
    ],
)
def test_a_run_finds_its_base_from_any_folder(
    toy: Toy,
    tmp_path: Path,
    revpatch: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    noted: str | None,
    moved: str | None,
    here: bool,
    words: tuple[str, ...],
) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = placed(toy, project, noted)
    if moved == "the project":
        run = project.rename(tmp_path / "other") / "runs/x"
    elif moved == "the run":
        run = Path(shutil.move(run, tmp_path / "alone"))
    elif moved == "the base":
        (project / "base").rename((elsewhere if here else tmp_path) / "base")
    monkeypatch.chdir(elsewhere)
    lines = tmp_path / "prompts.txt"  # a mark of the order of bytes, line feeds of DOS, and what is none
    lines.write_bytes("\ufeffthe patch\r\n\r\none\u2028two\x0bthree\x85\n".encode())
    result = revpatch("generate", "--patch", run, "--prompt-file", lines, "--max-new-tokens", "2", "--json")
    if words:
        one_line(result, *words)
        return
    prompts = [text["prompt"] for text in result.json()["texts"]]
    assert prompts == ["the patch", "one\u2028two\x0bthree\x85"]
    if moved is None and noted:
        for command in (
            ["import", f"{run}/ledger/000_first_commit.safetensors", "new"],
            ["restore", run, "--as-new-run", "new"],
        ):
            assert revpatch("ledger", *command).code == 0
            event = Ledger(Path("new/ledger"), readonly=True).journal.records()[-1]
            assert event["base_at"] == {"model": "base/mine", "folder": str(project / "base/mine")}
            shutil.rmtree("new")
