"""The source of `modeling_revpatch.py`: the patch's own files, one after another, without the imports between them.

There is no second implementation: every line of `revpatch/patch/` that the patched model needs is taken as it stands,
and what is added are two classes that transformers can load by name. The file needs torch and transformers alone.
"""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import transformers

from revpatch.patch.families import FAMILIES

_ROOT = "revpatch.patch.patched_model"
_ROOM = "revpatch.patch."
_CONFIG = "revpatch.config"
FILE_NAME = "modeling_revpatch.py"
PREFIX = "revpatch.sidecars."
"""What the names of the sidecars' tensors begin with in the weights of an exported model."""
MODEL_TYPE = "revpatch_"
"""What an exported config's model_type begins with; the base's follows. transformers doesn't know it, so that it asks
for trust_remote_code instead of loading the base without the patch."""

_HEAD = '''"""A causal language model with a revpatch patch on it: gated sidecars after the blocks of a frozen base.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.set_gate("off")               # the base alone, to the bit; "learned" and "on" are the others
    with model.patch_disabled(): ...    # the same, for a while

Written by `revpatch ledger export --to hf` from revpatch's own source.
"""

from __future__ import annotations

from types import SimpleNamespace

import transformers
from transformers import {config_class}, {model_class}

try:
    from transformers.utils.output_capturing import _active_collector
except ImportError as error:
    raise ImportError(
        "this model was written with transformers {version}, whose insides it uses, and the one here, "
        f"{{transformers.__version__}}, lacks them: pip install transformers=={version}"
    ) from error


class SidecarConfig(SimpleNamespace):
    """The knobs of the sidecars, as config.json has them."""
'''

_TAIL = '''
# What transformers loads

FAMILIES["{prefix}{kind}"] = {family!r}


class RevpatchConfig({config_class}):
    """The base's config; `revpatch` in it says what the patch is and where it came from."""

    model_type = "{prefix}{kind}"


class RevpatchForCausalLM({model_class}):
    """The base with its patch on. The sidecars are float32, whatever the base is held in."""

    config_class = RevpatchConfig
    _keep_in_fp32_modules_strict = ["revpatch"]

    def __init__(self, config):
        super().__init__(config)
        sidecar = SidecarConfig(**config.revpatch["sidecar"])
        self.revpatch = wrap(self, Patch(width_of(self), len(blocks_of(self)), sidecar))
        del self.save_pretrained  # here the sidecars are weights of the model, and the names those of its class

    def set_gate(self, mode):
        """As learned ("learned"), all gates held at 1 ("on"), or the patch bypassed ("off")."""
        set_gate(self, mode)

    def patch_disabled(self):
        """A context in which the base runs alone."""
        return patch_disabled(self)
'''


def modeling_source(model_class: str, config_class: str, kind: str) -> str:
    """Return the file's text, for a base of these classes of transformers and this model_type."""
    names: dict[str, Any] = {"model_class": model_class, "config_class": config_class, "kind": kind}
    names |= {"prefix": MODEL_TYPE, "version": transformers.__version__, "family": FAMILIES[kind]}
    seen: dict[str, str] = {}
    parts = [_HEAD.format(**names)]
    for module in _in_order(_ROOT):
        text = _path_of(module).read_text(encoding="utf-8")
        for name in _defined(text):
            assert name not in seen, f"{module} and {seen[name]} both define {name}: in one file they would clash"
            seen[name] = module
        parts.append(f"\n# {module.replace('.', '/')}.py\n{_without_own_imports(text, module)}")
    return "\n".join([*parts, _TAIL.format(**names)])


def _in_order(root: str) -> list[str]:
    """Return the modules of the patch that `root` needs, each after those that it needs itself."""
    order: list[str] = []

    def visit(module: str) -> None:
        if module in order:
            return
        for node in ast.walk(ast.parse(_path_of(module).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_ROOM):
                visit(str(node.module))
        order.append(module)

    visit(root)
    return order


def _path_of(module: str) -> Path:
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None, module
    return Path(found.origin)


def _defined(text: str) -> list[str]:
    """Return the names that a module defines at its top; of those it imports there are no two of one name by
    convention."""
    names: list[str] = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


def _without_own_imports(text: str, module: str) -> str:
    """Return the module's lines without its docstring and without imports of its own package and of __future__."""
    tree, lines = ast.parse(text), text.splitlines()
    top = set(map(id, tree.body))
    if ast.get_docstring(tree) is not None:
        _blank(lines, tree.body[0], "")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("revpatch") for alias in node.names), f"{module}: import names from it"
        if not isinstance(node, ast.ImportFrom):
            continue
        source = node.module or ""
        if source == "__future__" or source.startswith(_ROOM) or source == _CONFIG:
            taken = {alias.name for alias in node.names}
            assert source != _CONFIG or taken == {"SidecarConfig"}, f"{module}: {taken} are not in an exported model"
            assert all(alias.asname in (None, alias.name) for alias in node.names), f"{module}: under another name"
            _blank(lines, node, "" if id(node) in top else "pass")
        else:
            assert not source.startswith("revpatch"), f"{module}: imports {source}, which is not in an exported model"
    return "\n".join(lines).strip("\n") + "\n"


def _blank(lines: list[str], node: ast.stmt, instead: str) -> None:
    assert node.end_lineno is not None
    first = lines[node.lineno - 1]
    for number in range(node.lineno - 1, node.end_lineno):
        lines[number] = ""
    lines[node.lineno - 1] = first[: node.col_offset] + instead
