"""`revpatch ledger log | verify | show | diff | restore | prune`: a run's history, read and worked on."""

from __future__ import annotations

import gc
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from revpatch.cli_options import (
    BaseOption,
    BlocksOption,
    JsonOption,
    ReferenceArgument,
    RunArgument,
    print_json,
    print_line,
)
from revpatch.monitoring.doing import doing
from revpatch.monitoring.terminal import console, say

app = typer.Typer(no_args_is_help=True)


@app.callback()
def common(context: typer.Context) -> None:
    """A run's history: read it, verify it, compare, restore and prune its patches."""
    # A long history is many small objects without cycles: looking for these takes a quarter of the time.
    if gc.isenabled():
        gc.disable()
        context.call_on_close(gc.enable)


@app.command("log")
def ledger_log(run: RunArgument, as_json: JsonOption = False) -> None:
    """List what happened in a run: entries, probes against their tolerance, rollbacks and why, commits."""
    from revpatch.ledger.log import as_json as told
    from revpatch.ledger.show import print_log

    if as_json:
        print_line(told(run))
    else:
        print_log(run, console)


@app.command("verify")
def ledger_verify(
    run: RunArgument,
    head: Annotated[
        str | None, typer.Option(help="A head of the journal that was noted earlier: it must still be part of it.")
    ] = None,
    hash_files: Annotated[
        bool, typer.Option("--hash/--no-hash", help="Hash every file, or look only for its size.")
    ] = True,
    removal: Annotated[
        bool,
        typer.Option("--removal", help="Prove too that the newest patch leaves no trace; needs the base."),
    ] = False,
    base: BaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the journal's hash chain, every entry's sha256, and what lies beside them.

    Ends with exit code 1 if there is anything wrong. The removal is proved only of a ledger that is whole.
    """
    from revpatch.ledger.audit import verify
    from revpatch.ledger.show import print_verdict

    with doing(f"hashing the files of {run}"):
        report = verify(run, head, hash_files)
    if not as_json:
        print_verdict(report, console)
    proof, unproved = None, None
    if removal and report.ok:
        from revpatch.surgery.removal import prove_removal

        try:
            proof = prove_removal(str(run), base)
        except (ValueError, OSError) as error:  # such as a base that is not here: the verdict above stands
            unproved = error
    if as_json:
        proven = {"removal": None if proof is None else proof.as_fields()} if removal else {}
        print_json({"ok": report.ok, **asdict(report), "directory": str(report.directory), **proven})
    elif proof is not None:
        from revpatch.surgery.show import print_removal

        print_removal(proof, console)
    elif removal and unproved is None:
        say("the removal was not looked into: it is proved of a ledger that is whole")
    if unproved is not None:
        raise unproved
    if not report.ok or (proof is not None and not proof.ok):
        raise typer.Exit(1)


@app.command("show")
def ledger_show(reference: ReferenceArgument, as_json: JsonOption = False) -> None:
    """Say what a patch is: where it comes from, its held-out losses, and each layer's norm, gate and scale."""
    from revpatch.ledger.inspection import inspect
    from revpatch.ledger.show_patch import print_patch

    facts = inspect(reference)
    if as_json:
        print_json(facts.as_fields())
    else:
        print_patch(facts, console)


@app.command("diff")
def ledger_diff(
    first: ReferenceArgument,
    second: ReferenceArgument,
    shards: Annotated[
        list[str] | None, typer.Option(help="Shards on which to measure the loss of each; needs the base. Repeatable.")
    ] = None,
    base: BaseOption = None,
    blocks: BlocksOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hold two patches of one base against each other: per layer norm, cosine, gate and scale; recorded losses."""
    from revpatch.ledger.inspection import compare
    from revpatch.ledger.show_patch import print_difference

    difference = compare(first, second)
    losses = {}
    if shards:
        from revpatch.surgery.losses import losses_of

        losses = losses_of([first, second], shards, base, blocks)
    if as_json:
        measured = {name: [of.as_fields() for of in found] for name, found in losses.items()}
        print_json(difference.as_fields() | ({"losses": measured} if shards else {}))
        return
    print_difference(difference, console)
    if shards:
        from revpatch.surgery.show import print_losses

        for name, found in losses.items():
            console.print(Text(name, "bold"))
            print_losses(found, console)


@app.command("restore")
def ledger_restore(
    reference: ReferenceArgument,
    run: Annotated[Path, typer.Option("--as-new-run", help="Folder to make; it must not exist or be empty.")],
    as_json: JsonOption = False,
) -> None:
    """Make a new run that begins with a patch of an old one; `revpatch train` goes on from there."""
    from revpatch.ledger.restoring import restore

    restored = restore(reference, run)
    assert restored.event is not None and restored.event.restored is not None
    source = restored.event.restored
    if as_json:
        print_json({"run": str(run), "name": restored.path.name, "sha256": restored.sha256, "source": source})
        return
    say(f"{run}: a new run that begins with {source['file']} (sha256 {source['sha256']})")
    say(f"to train on from there: revpatch train CONFIG --set output_dir={run}")


@app.command("prune")
def ledger_prune(
    run: RunArgument,
    keep: Annotated[int, typer.Option(min=1, help="Newest `good` entries to keep of each phase.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Free space: remove old good entries and what earlier resumes set aside; never a commit, nor what is needed."""
    from revpatch.ledger.pruning import prune
    from revpatch.ledger.show import size

    pruned = prune(run, keep, dry_run)
    if as_json:
        print_json(asdict(pruned))
        return
    for name, why in pruned.spared.items():
        say(f"kept {name}: {why}")
    for name in (*pruned.entries, *pruned.leftovers):
        say(f"{'would remove' if dry_run else 'removed'} {name}")
    count = f"{len(pruned.entries)} entries and {len(pruned.leftovers)} files set aside by earlier resumes"
    say(f"{run}: {count}, {size(pruned.bytes)} {'would be ' if dry_run else ''}freed")
