"""`revpatch probe` and the `revpatch ledger` commands that work on patches: bisect, revert, merge, export, import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from revpatch.cli_options import BaseOption, BlocksOption, JsonOption, RunArgument, print_json
from revpatch.monitoring.terminal import console, say

ShardsOption = Annotated[
    list[str] | None, typer.Option(help="Folder or URL of held-out shards; may be given several times.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Write the entry even if the guard doesn't agree.")]
ConfidenceOption = Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of the intervals.")]


def add_to(app: typer.Typer, ledger: typer.Typer) -> None:
    """Puts the commands on the main app and on that of `revpatch ledger`."""
    app.command()(probe)
    ledger.command("bisect")(ledger_bisect)
    ledger.command("revert")(ledger_revert)
    ledger.command("merge")(ledger_merge)
    ledger.command("export")(ledger_export)
    ledger.command("import")(ledger_import)


def probe(
    patch: Annotated[str, typer.Option(help="FILE, RUN or RUN@ENTRY; none for the base alone.")],
    shards: ShardsOption = None,
    more: Annotated[list[str] | None, typer.Argument(help="More shards, after --shards.", metavar="[DIR]...")] = None,
    base: BaseOption = None,
    dtype: Annotated[str | None, typer.Option(help="Of a base alone: float32 (default) or bfloat16.")] = None,
    blocks: BlocksOption = None,
    confidence: ConfidenceOption = 0.95,
    as_json: JsonOption = False,
) -> None:
    """Measure the losses and perplexities of a patch on any shards, beside those of its base alone.

    Under torchrun (or another launcher) the ranks share the blocks, and rank 0 prints.
    """
    from revpatch.surgery.losses import SetLoss
    from revpatch.surgery.losses import probe as measure
    from revpatch.surgery.show import print_losses
    from revpatch.training.launch import process_group
    from revpatch.training.launcher_variables import Launch

    launch = Launch.from_environment()
    device = launch.device()
    found: list[SetLoss]
    with process_group(launch, device, timeout_minutes=60) as peers:
        found = measure(patch, [*(shards or []), *(more or [])], base, dtype, blocks, confidence, peers)
    if launch.rank != 0:
        return
    if as_json:
        print_json({"patch": patch, "ranks": launch.world, "sets": [of.as_fields() for of in found]})
    else:
        print_losses(found, console)


def ledger_bisect(
    run: RunArgument,
    shards: Annotated[str, typer.Option(help="Folder or URL of the held-out shards that got worse.")],
    above: Annotated[
        float | None,
        typer.Option(help="Limit in nats per token; default: halfway from the start to the newest commit."),
    ] = None,
    base: BaseOption = None,
    blocks: BlocksOption = None,
    confidence: ConfidenceOption = 0.95,
    as_json: JsonOption = False,
) -> None:
    """Find the commit, and then the layers' sidecars, that made a held-out text worse, in as few evaluations as can be.

    With --json, evaluations are told on standard error as they are made.
    """
    from revpatch.surgery.bisection import bisect
    from revpatch.surgery.show import print_bisection, print_evaluation

    _alone()
    progress = Console(stderr=True, soft_wrap=True, emoji=False) if as_json else console
    found = bisect(run, shards, above, base, blocks, confidence, lambda done: print_evaluation(done, progress))
    if as_json:
        print_json(found.as_fields())
    else:
        print_bisection(found, console)


def ledger_revert(
    run: RunArgument,
    phase: Annotated[str, typer.Argument(help="Name of the committed phase to take out.")],
    layers: Annotated[
        str | None, typer.Option(help="Bypass the sidecars after these blocks (3,7) instead of subtracting.")
    ] = None,
    shards: ShardsOption = None,
    base: BaseOption = None,
    blocks: BlocksOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Take one earlier phase's change out of the newest patch; writes a new commit if the guard agrees."""
    from revpatch.surgery.revert import revert

    _alone()
    numbers = None if layers is None else _numbers(layers, "--layers", int)
    _print_made(revert(run, phase, numbers, shards, base, blocks, force), as_json)


def ledger_merge(
    a: Annotated[str, typer.Argument(help="FILE, RUN or RUN@ENTRY.")],
    b: Annotated[str, typer.Argument(help="Another of the same base and sidecar config.")],
    out: Annotated[Path, typer.Option(help="A run, whose ledger gets the new commit, or a new folder.")],
    weights: Annotated[str, typer.Option(help="wa,wb as they are: 0.5,0.5 is the mean, 1,1 the sum.")] = "0.5,0.5",
    shards: ShardsOption = None,
    base: BaseOption = None,
    blocks: BlocksOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge two patches of one base, parameter by parameter; writes a new commit if the guard agrees."""
    from revpatch.surgery.merge import merge

    _alone()
    pair = _numbers(weights, "--weights", float)
    if len(pair) != 2:
        raise ValueError(f"--weights {weights}: expected two numbers with a comma between them, as 0.5,0.5")
    _print_made(merge((a, b), (pair[0], pair[1]), out, shards, base, blocks, force), as_json)


def ledger_export(
    patch: Annotated[str, typer.Argument(help="FILE, RUN or RUN@ENTRY.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    to: Annotated[
        str, typer.Option(help="safetensors (the entry alone), or hf (a model that transformers loads by itself).")
    ] = "safetensors",
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a patch as a safetensors file, or with its base as a model that needs no revpatch."""
    from revpatch.surgery.export import export

    _alone()
    files = export(patch, to, out, base)
    if as_json:
        print_json({"patch": patch, "to": to, "files": {str(path): path.stat().st_size for path in files}})
        return
    for path in files:
        say(f"{path}  {path.stat().st_size:,} bytes")


def ledger_import(
    source: Annotated[Path, typer.Argument(help="A patch file, or a folder of export or save_pretrained.")],
    run: Annotated[Path, typer.Argument(help="A run, or a new folder.")],
    as_json: JsonOption = False,
) -> None:
    """Bring a patch into a run's ledger, as its newest commit; no code in it is run."""
    from revpatch.surgery.importing import import_patch

    _alone()
    _print_made(import_patch(source, run), as_json)


def _print_made(made: Any, as_json: bool) -> None:
    from revpatch.surgery.show import print_made

    if as_json:
        print_json(made.as_fields())
    else:
        print_made(made, console)
    if made.name is None:
        raise typer.Exit(1)


def _numbers(text: str, option: str, kind: Any) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        example = "3,7" if kind is int else "0.5,0.5"
        raise ValueError(f"{option} {text}: expected numbers with commas between them, as {example}") from None


def _alone() -> None:
    from revpatch.training.launcher_variables import read_launch

    if read_launch(os.environ).world != 1:
        raise ValueError("this command runs in one process: start it without a launcher (probe takes any number)")
