"""revpatch: teach a frozen causal language model new corpora, one after another, as a small removable patch.

What is listed here is the interface for Python; docs/PATCHES.md shows its use. Names are imported when they are first
used, so that `import revpatch` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revpatch.config import SidecarConfig as SidecarConfig
    from revpatch.patch.channels import measure_channels as measure_channels
    from revpatch.patch.patched_model import Patch as Patch
    from revpatch.patch.patched_model import active_patch as active_patch
    from revpatch.patch.patched_model import attach as attach
    from revpatch.patch.patched_model import detach as detach
    from revpatch.patch.patched_model import is_patched as is_patched
    from revpatch.patch.patched_model import patch_disabled as patch_disabled
    from revpatch.patch.patched_model import set_gate as set_gate
    from revpatch.patches import add_patch as add_patch
    from revpatch.patches import from_pretrained as from_pretrained
    from revpatch.patches import load_patch as load_patch
    from revpatch.patches import load_patched as load_patched
    from revpatch.patches import patch_names as patch_names
    from revpatch.patches import remove_patch as remove_patch
    from revpatch.patches import save_patch as save_patch
    from revpatch.patches import save_pretrained as save_pretrained
    from revpatch.patches import set_patch as set_patch

_HOME = {
    "SidecarConfig": "revpatch.config",
    "from_pretrained": "revpatch.patches",
    "load_patch": "revpatch.patches",
    "load_patched": "revpatch.patches",
    "measure_channels": "revpatch.patch.channels",
    "add_patch": "revpatch.patches",
    "patch_names": "revpatch.patches",
    "remove_patch": "revpatch.patches",
    "set_patch": "revpatch.patches",
    "Patch": "revpatch.patch.patched_model",
    "active_patch": "revpatch.patch.patched_model",
    "attach": "revpatch.patch.patched_model",
    "detach": "revpatch.patch.patched_model",
    "is_patched": "revpatch.patch.patched_model",
    "patch_disabled": "revpatch.patch.patched_model",
    "set_gate": "revpatch.patch.patched_model",
    "save_patch": "revpatch.patches",
    "save_pretrained": "revpatch.patches",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Return the names above, when they are first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'revpatch' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
