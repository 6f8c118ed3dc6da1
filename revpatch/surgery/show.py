"""What the operations found, for people; lines that stay readable in a narrow terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from revpatch.surgery.bisection import Bisection, Evaluation
from revpatch.surgery.losses import SetLoss
from revpatch.surgery.new_entry import Made
from revpatch.surgery.removal import MOMENTS, RemovalReport


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


def print_made(made: Made, console: Console) -> None:
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
