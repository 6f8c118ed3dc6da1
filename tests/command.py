"""The command line, called in this process or one of its own: what it exits with, and what it prints."""

from __future__ import annotations

import json
import os
import subprocess
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


def in_a_process(*arguments: str) -> Result:
    """`python -m revpatch ...`, with nothing in the environment that would keep a library quiet."""
    names = (
        *LAUNCHER,
        "DS_ACCELERATOR",
        "TOKENIZERS_PARALLELISM",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "TRANSFORMERS_VERBOSITY",
    )
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-m", "revpatch", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    return Result(done.returncode, done.stdout, done.stderr)


def one_line(result: Result, *words: object) -> None:
    """A mistake: exit code 2, nothing on standard output, and one line that has these words."""
    assert (result.code, result.out) == (2, ""), result
    assert result.err.startswith("revpatch: ")
    assert result.err.count("\n") == 1, result.err
    missing = [str(word) for word in words if str(word) not in result.err]
    assert not missing, f"{missing} not in: {result.err}"
