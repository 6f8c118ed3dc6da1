"""What the commands have in common: arguments and options of one meaning, and how JSON is printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from revpatch.durable import to_plain
from revpatch.terminal import console

if TYPE_CHECKING:
    from revpatch.config import Config


RunArgument = Annotated[Path, typer.Argument(help="Folder of the run.")]
ReferenceArgument = Annotated[
    str, typer.Argument(metavar="REF", help="A patch file, a run (its newest commit), or RUN@ENTRY.")
]
BaseOption = Annotated[str | None, typer.Option(help="Base model; default: the name that the patch was trained with.")]
BlocksOption = Annotated[
    int | None, typer.Option(min=1, help="Use at most so many blocks of each set, evenly spread; default all.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


def load_config_once(path: Path, overrides: list[str] | None = None) -> Config:
    """Return the config of a command that a launcher may have started on many ranks. A wrong one is the same on every
    rank of a machine: one of them raises what `load_config` does, the others exit with 2 and say nothing."""
    from revpatch.config.file import load_config

    try:
        return load_config(path, overrides)
    except (ValueError, OSError):
        from revpatch.distributed import rank_and_local_rank

        if rank_and_local_rank()[1] != 0:
            sys.exit(2)
        raise


def print_json(value: Any) -> None:
    """Prints one line of JSON; numbers that are not finite become "NaN", "Infinity" and "-Infinity"."""
    print_line(json.dumps(to_plain(value), allow_nan=False))


def print_line(text: str) -> None:
    """Prints a line as it is, however long."""
    console.file.write(f"{text}\n")
    console.file.flush()
