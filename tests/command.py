"""The command line, called in this process: what it exits with, and what it prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Result:
    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one document that was printed; strictly JSON, so without NaN."""
        assert (self.code, self.err) == (0, ""), self
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


Call = Callable[..., Result]


def caller(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """call(*arguments): `revpatch ...`, alone as without a launcher."""
    from revpatch.cli import main

    for name in LAUNCHER:
        monkeypatch.setenv(name, "")  # so that what a command sets is undone with it
        monkeypatch.delenv(name)

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["revpatch", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code
        return Result(code if isinstance(code, int) else int(code is not None), *capfd.readouterr())

    return call
