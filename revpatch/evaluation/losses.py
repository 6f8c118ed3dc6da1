"""Held-out losses of any patch, or of none, on any shards, with intervals: `revpatch probe`, on any number of ranks."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from revpatch.base import DTYPES, BaseNotFoundError, load_base
from revpatch.config import ProbeSetConfig, SidecarConfig, StreamConfig
from revpatch.corpus.sources import is_raw_source
from revpatch.corpus.tokenizer import check_made_for, load_tokenizer, log_notices, tokenizer_fingerprint
from revpatch.distributed.ranks import Ranks
from revpatch.evaluation.guard import mean_interval
from revpatch.evaluation.probe import Measurement, Prober, put_together
from revpatch.ledger.inspect import check_comparable
from revpatch.ledger.ledger import PatchFile, read_patch
from revpatch.ledger.patch_file import EntryError
from revpatch.patch.families import blocks_of, width_of
from revpatch.patch.patched_model import Patch, active_patch, attach, base_sha256, check_fits, load_tensors, switchboard
from revpatch.patches import load_hashed
from revpatch.shards.cache import cache_for
from revpatch.shards.format import Manifest
from revpatch.shards.shard_set import ShardSet
from revpatch.terminal import doing


def of_base(patch: PatchFile) -> PatchFile:
    """Return the patch, once its metadata says which base it belongs to. Raises EntryError if it doesn't."""
    _ = patch.sidecar
    if patch.base["sha256"] is None:
        raise EntryError(
            f"{patch.reference} doesn't say which base it is a patch of: save it from the model that it is on"
        )
    if patch.base["dtype"] not in ("bfloat16", "float32"):
        raise EntryError(
            f"{patch.reference}: expected a base of dtype bfloat16 or float32, found {patch.base['dtype']!r}"
        )
    return patch


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def check_one_kind(first: PatchFile, *others: PatchFile) -> None:
    """Raises EntryError, naming both sides, unless all are patches of one base whose weights mean the same."""
    for other in others:
        pair = first, other
        said = tuple({**patch.metadata, "sidecar": patch.sidecar.model_dump(mode="json")} for patch in pair)
        check_comparable((first.reference, other.reference), (said[0], said[1]), (first.tensors, other.tensors))


class Subject:
    """A base on its device in eval mode, wrapped by `attach`.

    Args:
        model: the wrapped base.
        tokenizer: its tokenizer.
        sha256: of its weights rounded to bfloat16, as patches name it; None to hash them now.
        device: where it goes; None is the GPU, or the CPU where there is none.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, sha256: str | None, device: torch.device | None = None):
        self.model, self.tokenizer = model, tokenizer
        with doing("hashing the base", enabled=_first()):
            self.sha256 = sha256 or base_sha256(model, rounded=True)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(self.device)

    @classmethod
    def of(cls, reference: str, base: str | None = None, device: torch.device | None = None) -> Subject:
        """Return the base of a patch, in the dtype that it was trained in. Raises as `load_patched` does."""
        with doing(f"loading the base of {reference}", enabled=_first()):
            loaded = load_hashed(reference, base)
        return cls(*loaded, device)

    @classmethod
    def bare(
        cls, name: str, revision: str | None = None, dtype: str = "float32", device: torch.device | None = None
    ) -> Subject:
        """Return a base that no patch has been named for. Raises ValueError if it can't be had or is of an unknown
        family."""
        try:
            with doing(f"loading the base {name} in {dtype}", enabled=_first()):
                model = load_base(name, revision, DTYPES[dtype])
        except BaseNotFoundError as error:
            raise ValueError(f"base {name}: {error}; name its folder with --base") from error
        except ValueError as error:
            raise ValueError(f"base {name}: {error}") from error
        attach(model, SidecarConfig(bottleneck=1))
        return cls(model, load_tokenizer(name, revision), None, device)

    def patch_of(self, entry: PatchFile) -> Patch:
        """Return the entry's patch on this base's device, to be put on with `active_patch`.

        Raises:
            ValueError: it is a patch of another base, shape or family.
        """
        if entry.base["sha256"] != self.sha256:
            raise ValueError(
                f"{entry.reference} is a patch of a base with sha256 {entry.base['sha256'][:16]}…, but this base has "
                f"{self.sha256[:16]}…: name the right base with --base"
            )
        return self.patch_from(entry, entry.tensors)

    def patch_from(self, entry: PatchFile, tensors: dict[str, Tensor]) -> Patch:
        """Return a patch of that entry's kind with other tensors. Raises ValueError if they don't fit."""
        try:
            patch = Patch(width_of(self.model), len(blocks_of(self.model)), entry.sidecar)
            check_fits(self.model, patch)
            load_tensors(patch, tensors)
        except ValueError as error:
            raise ValueError(f"{entry.reference}: {error}") from error
        return patch.requires_grad_(False).to(self.device)


TOKENS_AT_ONCE = 4096
"""At most so many tokens, and at least one block, go through the model at once."""


def sets_of(places: Sequence[str], blocks: int | None = None) -> list[ProbeSetConfig]:
    """Probe sets for folders (or URLs) of shards, named after the last part of each; `blocks` is the most to use.

    Raises:
        ValueError: there are none.
    """
    if not places:
        raise ValueError("--shards is missing: name at least one folder of held-out shards")
    sets: list[ProbeSetConfig] = []
    for place in places:
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", place.rstrip("/").rpartition("/")[2]).strip("-_")[:56] or "set"
        taken = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other.name) is not None for other in sets)
        sets.append(ProbeSetConfig(name=f"{name}-{taken + 1}" if taken else name, shards=place, max_blocks=blocks))
    return sets


class HeldOut:
    """Probe sets, opened, checked against a base, and read.

    Args:
        subject: the base.
        sets: the sets; `max_blocks` of each is kept to.
        share: (rank, world), as in `Prober`.
        stream: where shards that lie elsewhere are cached.

    Raises:
        ValueError, OSError: shards are missing, broken, raw text, or made for another tokenizer or a longer context.
    """

    def __init__(
        self,
        subject: Subject,
        sets: list[ProbeSetConfig],
        share: tuple[int, int] = (0, 1),
        stream: StreamConfig | None = None,
    ) -> None:
        self.subject, self.sets, self.share = subject, sets, share
        cache = cache_for(stream or StreamConfig(), [config.shards for config in sets])
        opened = []
        for config in sets:
            if is_raw_source(config.shards):
                raise ValueError(
                    f"{config.shards} is raw text, and a loss needs token shards: name the folder that `revpatch "
                    "shards build` made of it (a run that built it on first use says where in its log)"
                )
            shards = ShardSet(config.shards, cache)
            _check(config.shards, shards.manifest, subject)
            opened.append((config, shards))
        longest = max(shards.block_size for _, shards in opened)
        self._prober = Prober(subject.model, opened, max(1, TOKENS_AT_ONCE // longest), share)
        self.blocks = {c.name: min(len(shards), c.max_blocks or len(shards)) for c, shards in opened}
        """Blocks used of each set, over all ranks."""
        for _, shards in opened:
            shards.close()

    def measure(self, patch: Patch | None) -> dict[str, Measurement]:
        """This rank's share of each set under a patch, or under the base alone."""
        names = ", ".join(config.name for config in self.sets)
        with (
            active_patch(self.subject.model, patch),
            doing(f"measuring the losses on {names}", enabled=self.share[0] == 0) as far,
        ):
            return self._prober.measure(far)


def _check(place: str, manifest: Manifest, subject: Subject) -> None:
    tokenizer, embeddings = subject.tokenizer, subject.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    fingerprint = tokenizer_fingerprint(tokenizer)
    if line := check_made_for(place, manifest, tokenizer, fingerprint, str(tokenizer.name_or_path), embeddings):
        log_notices([line])
    positions = int(subject.model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
    if manifest.block_size > positions:
        raise ValueError(
            f"{place}: its blocks have {manifest.block_size} tokens, and the base reads at most {positions}: build the "
            "shards anew with a smaller --block-size"
        )
    if manifest.block_size < 2:
        raise ValueError(f"{place}: blocks of 1 token have nothing to predict: build the shards anew with longer ones")


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
        """Return the fields by name."""
        return asdict(self)


def probe_losses(
    reference: str,
    shards: Sequence[str],
    base: str | None = None,
    dtype: str | None = None,
    blocks: int | None = None,
    confidence: float = 0.95,
    peers: Ranks | None = None,
) -> list[SetLoss]:
    """Return the losses of a patch beside those of its base alone, or of a base alone.

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
    """Return the loss of each of several patches of one base; each but the first also against the first, paired.

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
    """Return the mean of (blocks,) values and its t-interval, which 1 block doesn't have."""
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


def _whole(held_out: HeldOut, part: dict[str, Measurement], peers: Ranks | None) -> dict[str, Measurement]:
    """Return every rank's share put together."""
    return part if peers is None or peers.world == 1 else put_together(peers.gather(part), held_out.blocks)


def _perplexity(loss: float) -> float:
    with np.errstate(over="ignore"):  # infinite, then
        return float(np.exp(loss))
