"""The clock: parts nest, and an inner one is not counted in the outer one."""

from __future__ import annotations

import time

import pytest
import torch

from revpatch.step.engine import Clock


def test_parts_add_up_and_an_inner_one_is_taken_out_of_the_outer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))

    def wait(seconds: float) -> None:
        now[0] += seconds

    for _ in range(2):
        with clock.part("backward"):
            wait(1.0)
            clock.timed("all_reduce", wait)(0.25)
            wait(1.0)
    with pytest.raises(RuntimeError), clock.part("optimizer"):
        wait(0.5)
        raise RuntimeError
    assert clock.take() == pytest.approx({"backward": 4.0, "all_reduce": 0.5, "optimizer": 0.5})
    assert clock.take() == {}
