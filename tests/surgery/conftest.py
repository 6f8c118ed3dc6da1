"""Fixtures: the metadata of patches of the toy base, and a run that was never trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import MadeUp
from toy import Toy
from transformers import AutoModelForCausalLM

from revpatch.config import SidecarConfig
from revpatch.corpus.tokenizer import tokenizer_fingerprint
from revpatch.patch.patched_model import base_sha256


@pytest.fixture(scope="session")
def identity(toy: Toy) -> dict[str, Any]:
    base = AutoModelForCausalLM.from_pretrained(toy.base, dtype=torch.float32)
    sha256 = base_sha256(base, rounded=True)
    return {
        "base": {"model": str(toy.base), "revision": None, "sha256": sha256, "dtype": "float32"},
        "tokenizer": tokenizer_fingerprint(toy.tokenizer),
        "sidecar": SidecarConfig(bottleneck=4).model_dump(mode="json"),
        "seed": 0,
    }


@pytest.fixture
def make_run(toy: Toy, identity: dict[str, Any], tmp_path: Path) -> Callable[..., MadeUp]:
    """make_run(name="run", config=True)."""
    return lambda name="run", config=True: MadeUp.of(tmp_path / name, toy, identity, config)
