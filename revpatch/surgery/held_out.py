"""Held-out shards opened for a base, and its losses on them under any patch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from revpatch.config import ProbeSetConfig, StreamConfig
from revpatch.monitoring.doing import doing
from revpatch.patch.patched_model import Patch, active_patch
from revpatch.stream.manifest import Manifest
from revpatch.stream.shard_set import ShardSet
from revpatch.stream.sources import is_raw_source
from revpatch.stream.tokenizer import check_made_for, log_notices, tokenizer_fingerprint
from revpatch.surgery.subject import Subject
from revpatch.training.preflight import shard_cache
from revpatch.training.probe import Measurement, Prober

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
        cache = shard_cache(stream or StreamConfig(), [config.shards for config in sets])
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
