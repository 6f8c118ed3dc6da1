"""Losses and perplexities of any patch, or of none, on any shards, with intervals; on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from revpatch.ledger.references import read_patch
from revpatch.patch.patched_model import switchboard
from revpatch.surgery.held_out import HeldOut, sets_of
from revpatch.surgery.subject import Subject, of_base
from revpatch.training.guard import mean_interval
from revpatch.training.launch import Peers
from revpatch.training.probe import Measurement, put_together

Losses = NDArray[np.float64]


@dataclass(frozen=True)
class SetLoss:
    """One set under one patch. Losses in nats per token; an interval is None where there is 1 block.

    `loss` is the mean over blocks, `low` to `high` its t-interval; perplexities are their exponentials. `rise` is the
    mean over blocks of the loss less that of `against` on the same block, so what makes a block hard cancels.
    """

    name: str
    shards: str
    blocks: int
    loss: float
    low: float | None
    high: float | None
    perplexity: float
    perplexity_low: float | None
    perplexity_high: float | None
    gate: float | None
    """Mean gate; None without a patch."""
    against: str | None = None
    reference: float | None = None
    rise: float | None = None
    rise_low: float | None = None
    rise_high: float | None = None

    def as_fields(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def probe(
    reference: str,
    shards: Sequence[str],
    base: str | None = None,
    dtype: str | None = None,
    blocks: int | None = None,
    confidence: float = 0.95,
    peers: Peers | None = None,
) -> list[SetLoss]:
    """The losses of a patch beside those of its base alone, or of a base alone.

    Args:
        reference: FILE, RUN or RUN@REF; "none" for the base alone.
        shards: folders or URLs of token shards.
        base: name or folder of the base; None is the one that the patch names.
        dtype: in which a base alone is held, "float32" (None) or "bfloat16"; a patch says itself.
        blocks: at most so many of each set, evenly spread.
        confidence: of the intervals.
        peers: the other ranks, each of which measures a share of the blocks. All ranks get the whole.

    Raises:
        ValueError, OSError: as `load_patched` and `HeldOut` do; "none" without a base; a dtype beside a patch.
    """
    sets = sets_of(shards, blocks)
    device = None if peers is None else peers.device
    if reference == "none":
        if base is None:
            raise ValueError("--patch none needs --base NAME: which base?")
        if dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"--dtype {dtype}: choose float32 or bfloat16")
        subject, patch = Subject.bare(base, dtype=dtype or "float32", device=device), None
    else:
        if dtype is not None:
            raise ValueError(f"--dtype is for --patch none: {reference} says in which its base is held")
        subject = Subject.of(reference, base, device)
        patch = switchboard(subject.model).attached
    held_out = HeldOut(subject, sets, (0, 1) if peers is None else (peers.rank, peers.world))
    measured = _whole(held_out, held_out.measure(patch), peers)
    if patch is None:
        return _report(held_out, measured, confidence)
    return _report(held_out, measured, confidence, "the base alone", _whole(held_out, held_out.measure(None), peers))


def losses_of(
    references: Sequence[str],
    shards: Sequence[str],
    base: str | None = None,
    blocks: int | None = None,
    confidence: float = 0.95,
) -> dict[str, list[SetLoss]]:
    """The loss of each of several patches of one base; each but the first also against the first, paired.

    Args:
        references: FILE, RUN or RUN@REF each.
        shards, base, blocks, confidence: as in `probe`.

    Raises:
        ValueError, OSError: as `probe`; patches of different bases.
    """
    entries = [of_base(read_patch(reference)) for reference in references]
    subject = Subject.of(references[0], base)
    patches = [subject.patch_of(entry) for entry in entries]
    held_out = HeldOut(subject, sets_of(shards, blocks))
    found: dict[str, list[SetLoss]] = {}
    first: dict[str, Measurement] | None = None
    for reference, patch in zip(references, patches, strict=True):
        measured = held_out.measure(patch)
        found[reference] = _report(held_out, measured, confidence, references[0], first)
        first = first or measured
    return found


def interval(values: Losses, confidence: float) -> tuple[float, float | None, float | None]:
    """The mean of (blocks,) values and its t-interval, which 1 block doesn't have."""
    if len(values) < 2:
        return float(values.mean()), None, None
    return mean_interval(values, confidence)


def _report(
    held_out: HeldOut,
    measured: dict[str, Measurement],
    confidence: float,
    against: str | None = None,
    reference: dict[str, Measurement] | None = None,
) -> list[SetLoss]:
    report = []
    for config in held_out.sets:
        now = measured[config.name]
        mean, low, high = interval(now.losses, confidence)
        beside: dict[str, Any] = {}
        if reference is not None:
            before = reference[config.name]
            rise, rise_low, rise_high = interval(now.losses - before.losses, confidence)
            beside = {"against": against, "reference": before.loss}
            beside |= {"rise": rise, "rise_low": rise_low, "rise_high": rise_high}
        report.append(
            SetLoss(
                config.name,
                config.shards,
                len(now.losses),
                mean,
                low,
                high,
                _perplexity(mean),
                None if low is None else _perplexity(low),
                None if high is None else _perplexity(high),
                now.gate if now.gates else None,
                **beside,
            )
        )
    return report


def _whole(held_out: HeldOut, part: dict[str, Measurement], peers: Peers | None) -> dict[str, Measurement]:
    """Every rank's share put together."""
    return part if peers is None or peers.world == 1 else put_together(peers.gather(part), held_out.blocks)


def _perplexity(loss: float) -> float:
    with np.errstate(over="ignore"):  # infinite, then
        return float(np.exp(loss))
