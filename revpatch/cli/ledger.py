"""`revpatch probe` and `revpatch ledger ...`: a run's history read, proved and changed, and what of it people see."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from revpatch.cli.options import (
    BaseOption,
    BlocksOption,
    JsonOption,
    ReferenceArgument,
    RunArgument,
    print_json,
    print_line,
)
from revpatch.terminal import console, doing, say

if TYPE_CHECKING:  # they import torch, which `revpatch --help` shall not wait for
    from revpatch.evaluation.losses import SetLoss
    from revpatch.evaluation.proofs import RemovalReport
    from revpatch.surgery.bisect import Bisection, Evaluation
    from revpatch.surgery.combine import DerivedCommit


app = typer.Typer(no_args_is_help=True)


def print_losses(losses: Sequence[SetLoss], console: Console) -> None:
    """A paragraph a set: loss, perplexity, and the rise against the base alone."""
    for of in losses:
        text = Text.assemble((of.name, "bold"), f"  {of.blocks} blocks of {of.shards}\n")
        text.append(f"  loss {of.loss:.4f}{_interval(of.low, of.high)} nats per token\n")
        text.append(f"  perplexity {of.perplexity:.2f}{_interval(of.perplexity_low, of.perplexity_high, 2)}")
        if of.rise is not None and of.reference is not None:
            text.append(f"\n  against {of.against}: {of.reference:.4f} ")
            text.append(f"{of.rise:+.4f}{_interval(of.rise_low, of.rise_high)}", _colour(of.rise_low, of.rise_high))
        if of.gate is not None:
            text.append(f"\n  gate {of.gate:.3f}")
        console.print(text, soft_wrap=True)


def print_removal(report: RemovalReport, console: Console) -> None:
    """A line a check, and the verdict."""
    from revpatch.evaluation.proofs import MOMENTS

    same = report.base_expected == report.base_found
    lines = [(same, f"base {report.model}: sha256 {report.base_found}")]
    if not same:
        lines = [(False, f"base {report.model}: expected sha256 {report.base_expected}, found {report.base_found}")]
    for check in report.checks:
        for what, logits in (("with the gate off", check.off), ("after detach", check.detached)):
            lines.append((check.untouched == logits, f"{check.dtype}: {what}, logits are the base's to the bit"))
        lines.append((check.base_before == check.base_after, f"{check.dtype}: the base's weights are unchanged"))
        lines.append((True, f"{check.dtype}: with the patch on, logits differ by up to {check.changed:.4g}"))
    for noted in report.noted:
        moment = f"{noted.dtype}: at {MOMENTS[noted.event]}"
        lines.append((noted.same_weights, f"{moment}, the base's weights had the same sha256 {noted.weights}"))
        if noted.same_place or noted.same_logits:
            lines.append((noted.same_logits, f"{moment}, its logits were the same to the bit"))
        else:
            words = "its logits differ in bits, which proves nothing: they were computed elsewhere or otherwise"
            lines.append((True, f"{moment}, {words}"))
    if report.checks and not report.noted and not report.unproved:
        lines.append((True, "what the base was in training is not in the journal: today's is held against itself"))
    for holds, words in lines:
        console.print(Text.assemble(("✓ ", "green") if holds else ("✗ not so: ", "red"), words), soft_wrap=True)
    for words in report.unproved:
        console.print(Text.assemble(("? ", "yellow"), f"not proved: {words}"), soft_wrap=True)
    verdict = "the patch can be removed without a trace" if report.ok else "the removal is NOT proved"
    if report.holds and not report.ok:
        verdict = "the patch comes off the base as it is now; that training left the base alone is NOT proved"
    console.print(Text(f"{report.reference}: {verdict}", "green" if report.ok else "red"), soft_wrap=True)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """One line."""
    without = f" without the sidecars of {_blocks(evaluation.bypassed)}" if evaluation.bypassed else ""
    mark = {None: "", True: "  above", False: "  not above"}[evaluation.above]
    line = f"{evaluation.number:3}  {evaluation.loss:.4f}{mark}  {evaluation.state}{without}"
    console.print(Text(line), soft_wrap=True)


def print_bisection(found: Bisection, console: Console) -> None:
    """The commit and the layers, or why there are none."""
    text = Text()
    if found.commit is not None:
        text.append(found.commit, "bold red").append(
            f" is the first commit found above {_limit(found)} on {found.shards}: {found.loss:.4f}, "
            f"against {found.loss_before:.4f} of {found.before} ({found.evaluations_to_commit} evaluations)"
        )
    if found.layers:
        text.append(f"\nwithout the sidecars of {_blocks(found.layers)} it is not ({len(found.evaluations)} in all)")
    if found.note:
        text.append("\n" if text else "").append(found.note)
    console.print(text, soft_wrap=True)


def print_made(made: DerivedCommit, console: Console) -> None:
    """The probes before and after, the verdict, and what was written."""
    for name, reading in made.sets.items():
        limit = f" / {reading.tolerance:g}" if reading.guarded else ", not guarded"
        high = reading.guarded and not reading.drift <= reading.tolerance
        line = Text(f"{name}  {reading.reference:.4f} -> {reading.loss:.4f} ")
        console.print(line.append(f"({reading.drift:+.4f}{limit})", "red" if high else ""), soft_wrap=True)
    if not made.agrees:
        console.print(Text(f"the guard does not agree: {made.reason}", "red"), soft_wrap=True)
    if made.name is None:
        console.print("nothing was written; --force writes it all the same", soft_wrap=True)
    else:
        console.print(Text.assemble((made.name, "bold green"), f" in {made.run}  sha256 {made.sha256}"), soft_wrap=True)


def _interval(low: float | None, high: float | None, digits: int = 4) -> str:
    return "" if low is None or high is None else f" ({low:.{digits}f} to {high:.{digits}f})"


def _colour(low: float | None, high: float | None) -> str:
    if low is not None and low > 0:
        return "red"
    return "green" if high is not None and high < 0 else ""


def _limit(found: Bisection) -> str:
    return "every finite loss" if found.above == sys.float_info.max else f"{found.above:.4f} nats per token"


def _blocks(layers: Sequence[int]) -> str:
    return f"block{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


ShardsOption = Annotated[
    list[str] | None, typer.Option(help="Folder or URL of held-out shards; may be given several times.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Write the entry even if the guard doesn't agree.")]
ConfidenceOption = Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of the intervals.")]


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
    from revpatch.distributed import Launch
    from revpatch.distributed.ranks import process_group
    from revpatch.evaluation.losses import probe_losses

    launch = Launch.from_environment()
    device = launch.device()
    found: list[SetLoss]
    with process_group(launch, device, timeout_minutes=60) as peers:
        found = probe_losses(patch, [*(shards or []), *(more or [])], base, dtype, blocks, confidence, peers)
    if launch.rank != 0:
        return
    if as_json:
        print_json({"patch": patch, "ranks": launch.world, "sets": [of.as_fields() for of in found]})
    else:
        print_losses(found, console)


@app.command("bisect")
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
    from revpatch.surgery.bisect import bisect

    _alone()
    progress = Console(stderr=True, soft_wrap=True, emoji=False) if as_json else console
    found = bisect(run, shards, above, base, blocks, confidence, lambda done: print_evaluation(done, progress))
    if as_json:
        print_json(found.as_fields())
    else:
        print_bisection(found, console)


@app.command("revert")
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
    from revpatch.surgery.combine import revert

    _alone()
    numbers = None if layers is None else _numbers(layers, "--layers", int)
    _print_made(revert(run, phase, numbers, shards, base, blocks, force), as_json)


@app.command("merge")
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
    from revpatch.surgery.combine import merge

    _alone()
    pair = _numbers(weights, "--weights", float)
    if len(pair) != 2:
        raise ValueError(f"--weights {weights}: expected two numbers with a comma between them, as 0.5,0.5")
    _print_made(merge((a, b), (pair[0], pair[1]), out, shards, base, blocks, force), as_json)


@app.command("export")
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
    from revpatch.surgery.exchange import export

    _alone()
    files = export(patch, to, out, base, (lambda words: None) if as_json else say)
    if as_json:
        print_json({"patch": patch, "to": to, "files": {str(path): path.stat().st_size for path in files}})
        return
    for path in files:
        say(f"{path}  {path.stat().st_size:,} bytes")


@app.command("import")
def ledger_import(
    source: Annotated[Path, typer.Argument(help="A patch file, or a folder of export or save_pretrained.")],
    run: Annotated[Path, typer.Argument(help="A run, or a new folder.")],
    as_json: JsonOption = False,
) -> None:
    """Bring a patch into a run's ledger, as its newest commit; no code in it is run."""
    from revpatch.surgery.exchange import import_patch

    _alone()
    _print_made(import_patch(source, run), as_json)


def _print_made(made: Any, as_json: bool) -> None:

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
    from revpatch.distributed import read_launch

    if read_launch(os.environ).world != 1:
        raise ValueError("this command runs in one process: start it without a launcher (probe takes any number)")


@app.callback()
def common(context: typer.Context) -> None:
    """A run's history: read it, verify it, compare, restore and prune its patches."""
    # A long history is many small objects without cycles: looking for these takes a quarter of the time.
    if gc.isenabled():
        gc.disable()
        context.call_on_close(gc.enable)


@app.command("log")
def ledger_log(
    run: RunArgument,
    everything: Annotated[bool, typer.Option("--all", help="Every event, not the last 100.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List what happened in a run: entries, probes against their tolerance, rollbacks and why, commits."""
    from revpatch.ledger.log import as_json as told
    from revpatch.ledger.log import print_log

    if as_json:
        print_line(told(run))
    else:
        print_log(run, console, None if everything else 100)


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
    from revpatch.ledger.maintenance import print_verdict, verify

    with doing(f"hashing the files of {run}"):
        report = verify(run, head, hash_files)
    if not as_json:
        print_verdict(report, console)
    proof, unproved = None, None
    if removal and report.ok:
        from revpatch.evaluation.proofs import prove_removal

        try:
            proof = prove_removal(str(run), base)
        except (ValueError, OSError) as error:  # such as a base that is not here: the verdict above stands
            unproved = error
    if as_json:
        proven = {"removal": None if proof is None else proof.as_fields()} if removal else {}
        print_json({"ok": report.ok, **asdict(report), "directory": str(report.directory), **proven})
    elif proof is not None:
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
    from revpatch.ledger.inspect import inspect, print_patch

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
    from revpatch.ledger.inspect import compare_patches, print_difference

    difference = compare_patches(first, second)
    losses = {}
    if shards:
        from revpatch.evaluation.losses import losses_of

        losses = losses_of([first, second], shards, base, blocks)
    if as_json:
        measured = {name: [of.as_fields() for of in found] for name, found in losses.items()}
        print_json(difference.as_fields() | ({"losses": measured} if shards else {}))
        return
    print_difference(difference, console)
    if shards:
        for name, found in losses.items():
            console.print(Text(name, "bold"))
            print_losses(found, console)


@app.command("restore")
def ledger_restore(
    reference: ReferenceArgument,
    run: Annotated[Path, typer.Option("--as-new-run", help="Folder to make; it must not exist or be empty.")],
    as_json: JsonOption = False,
) -> None:
    """Make a new run that begins with a patch of an old one; `revpatch train` resumes from there."""
    from revpatch.ledger.maintenance import restore_run

    restored = restore_run(reference, run)
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
    from revpatch.durable import size
    from revpatch.ledger.maintenance import prune

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
