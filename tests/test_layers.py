"""The rules of the house, read off the imports: who may know of whom.

A file imports from floors below its own, or from its own room, never in a circle. Imports inside functions count too;
those under `if TYPE_CHECKING:` exist for readers alone, and still may not go up.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import revpatch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "revpatch"
FLOORS = {
    "revpatch.config": 0,
    "revpatch.durable": 0,
    "revpatch.distributed": 0,
    "revpatch.terminal": 0,
    "revpatch.patch": 1,
    "revpatch.shards": 1,
    "revpatch.ledger": 1,
    "revpatch.corpus": 2,
    "revpatch.base": 2,
    "revpatch.patches": 3,
    "revpatch.generate": 4,
    "revpatch.step": 4,
    "revpatch.evaluation": 5,
    "revpatch.monitoring": 6,
    "revpatch.train": 7,
    "revpatch.surgery": 8,
    "revpatch.report": 8,
    "revpatch.doctor": 8,
    "revpatch.cli": 9,
    "revpatch.__main__": 10,
}
"""Room, and its floor."""


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


@cache
def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written out in full"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" if f"{module}.{alias.name}" in FILES else module for alias in node.names}
        elif path == PACKAGE / "__init__.py" and isinstance(node, ast.Call):
            continue  # imports by its table, which a test holds against its own imports for type checkers
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            assert isinstance(node.args[0], ast.Constant), f"{path}: imports a module whose name is computed"
            found.add(str(node.args[0].value))
    return found


def own_imports(module: str) -> set[str]:
    return {name for name in imports(FILES[module]) if name.split(".")[0] == "revpatch"}


def names(found: set[str], *packages: str) -> list[str]:
    return sorted(name for name in found for package in packages if name == package or name.startswith(f"{package}."))


def test_no_way_of_importing_escapes(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        "import a.b as c, d\nfrom revpatch import config\nfrom revpatch.patch.gates import Gate as G\n"
        "def f():\n    from e.f import g\n    importlib.import_module('h.i')\n"
        "if TYPE_CHECKING:\n    import j\n",
        encoding="utf-8",
    )
    assert imports(file) == {"a.b", "d", "revpatch.config", "revpatch.patch.gates", "e.f", "h.i", "j"}


def test_every_file_has_a_room_and_every_room_a_file() -> None:
    rooms = {room_of(module) for module in FILES if module != "revpatch"}
    assert rooms == FLOORS.keys()


def test_a_file_imports_from_below_or_from_its_own_room_never_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for name in sorted(own_imports(module) & FILES.keys()):
                visit(name, (*above, module))
            done.add(module)

    for module in FILES:
        visit(module, ())
        if module != "revpatch":
            others = {room_of(name) for name in own_imports(module)} - {"revpatch", room_of(module)}
            wrong = [room for room in others if FLOORS[room] >= FLOORS[room_of(module)]]
            assert not wrong, f"{module} (floor {FLOORS[room_of(module)]}) imports {wrong}, not below it"


def test_the_package_itself_imports_nothing_of_its_own_until_it_is_asked() -> None:
    told = (
        "import sys, revpatch; before = set(sys.modules); revpatch.SidecarConfig; print(*before); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, cwd=ROOT)
    before, after = (line.split() for line in done.stdout.splitlines())
    assert names(set(before), "revpatch") == ["revpatch"], "`import revpatch` must stay cheap"
    assert not names(set(before), "torch", "transformers", "numpy", "pydantic")
    assert "revpatch.config" in after


def test_what_the_package_imports_when_it_is_asked_is_what_type_checkers_see() -> None:
    tree = ast.parse(FILES["revpatch"].read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.asname: node.module for node in checked.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == revpatch._HOME
    outside = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)]
    assert {ast.unparse(node).split()[1] for node in outside} == {"__future__", "importlib", "typing"}
    for name in revpatch.__all__:
        assert getattr(revpatch, name).__module__.startswith("revpatch."), name
    assert set(revpatch.__all__) <= set(dir(revpatch))
    with pytest.raises(AttributeError, match="'revpatch' has no attribute 'nothing'"):
        _ = revpatch.nothing


FORBIDDEN = {
    "revpatch.config": ("torch", "transformers", "numpy", "deepspeed", "accelerate"),
    "revpatch.patch": ("torch.distributed", "pathlib", "os", "io", "revpatch.shards", "revpatch.ledger"),
    "revpatch.shards": ("torch", "revpatch.patch"),
    "revpatch.corpus": ("torch", "revpatch.patch"),
    "revpatch.ledger": ("torch.distributed",),
    "revpatch.evaluation.guard": ("torch", "os", "pathlib", "random", "time", "revpatch"),
}
"""What a room or a file knows nothing of: the config is read without torch, the stream knows no model, the patch no
file, the guard is a pure function of numbers."""


def test_what_a_room_knows_nothing_of() -> None:
    for place, forbidden in FORBIDDEN.items():
        files = [module for module in FILES if module == place or module.startswith(f"{place}.")]
        assert files
        for module in files:
            assert not names(imports(FILES[module]), *forbidden), module
    for module in FILES:
        if room_of(module) in ("revpatch.shards", "revpatch.corpus", "revpatch.patch", "revpatch.ledger"):
            nodes = list(ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))))
            attributes = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
            texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
            assert not names(attributes, "torch.distributed"), module
            assert not texts & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}, f"{module} asks for its rank"


def test_only_the_engine_trains_with_deepspeed_and_accelerate() -> None:
    """accelerate's trackers are no part of its training: one file talks to them, and to nothing else of it."""
    found = {module: names(imports(path), "deepspeed", "accelerate") for module, path in FILES.items()}
    assert {module for module, those in found.items() if those} == {
        "revpatch.step.engine",
        "revpatch.monitoring.trackers",
    }
    assert found["revpatch.monitoring.trackers"] == ["accelerate.tracking"]
