"""What is chosen before the first step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy import Toy

from revpatch.train.startup import choose_matmul_precision


@pytest.mark.parametrize(
    ("device", "dtype", "chosen"),
    [
        ("cuda", "bfloat16", ["high"]),
        ("cuda", "float32", []),
        ("cpu", "bfloat16", []),
    ],
)
def test_tf32_is_for_sidecars_on_a_bfloat16_base_on_a_gpu(
    device: str, dtype: str, chosen: list[str], toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", found.append)
    config = toy.config(tmp_path, base={"dtype": dtype})
    choose_matmul_precision(config, torch.device(device))
    assert found == chosen
