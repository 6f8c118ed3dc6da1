"""What is chosen before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy import Toy

from revpatch.training.startup import choose_matmul_precision


@pytest.mark.parametrize(
    ("device", "dtype", "tf32", "chosen"),
    [
        ("cuda", "bfloat16", True, ["high"]),
        ("cuda", "bfloat16", False, []),
        ("cuda", "float32", True, []),
        ("cpu", "bfloat16", True, []),
    ],
)
def test_tf32_is_for_sidecars_on_a_bfloat16_base_on_a_gpu(
    device: str, dtype: str, tf32: bool, chosen: list[str], toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", found.append)
    config = toy.config(tmp_path, base={"dtype": dtype}, engine={"tf32": tf32})
    choose_matmul_precision(config, torch.device(device))
    assert found == chosen
