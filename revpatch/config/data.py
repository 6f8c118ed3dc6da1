"""The sections of a config that say what is read: batches, replay, streams, phases."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from revpatch.config.section import ConfigError, Name, NonNegative, Positive, PositiveFloat, Section, Text

SELF = "self"
"""The `replay.base` that stands for text of the base's own."""


class BatchConfig(Section):
    """Blocks per optimizer step."""

    new_blocks: Positive = 32
    """New blocks per optimizer step over all ranks; also the number of lanes."""
    replay_blocks: NonNegative = 8
    """Replayed blocks per optimizer step over all ranks."""
    micro_blocks: Positive = 5
    """At most this many blocks, new and replayed together, go through the model at once on a rank."""

    def accumulation(self, world: int) -> int:
        """Micro-batches per optimizer step on each of `world` ranks: the fewest that split new and replay evenly.

        Raises:
            ConfigError: the blocks can't be split over the ranks, or into micro-batches this small.
        """
        for key, blocks in (("batch.new_blocks", self.new_blocks), ("batch.replay_blocks", self.replay_blocks)):
            if blocks % world:
                raise ConfigError(
                    f"{key} = {blocks} can't be split evenly over {world} ranks ({blocks} % {world} = "
                    f"{blocks % world}): choose a multiple of {world}, or another number of ranks"
                )
        new, replay = self.new_blocks // world, self.replay_blocks // world
        for steps in range(1, new + 1):
            if new % steps == 0 and replay % steps == 0 and (new + replay) // steps <= self.micro_blocks:
                return steps
        raise ConfigError(
            f"batch.micro_blocks = {self.micro_blocks}: {new} new and {replay} replayed blocks a rank can't be split "
            f"into equal micro-batches of at most {self.micro_blocks} blocks; raise micro_blocks, or choose new_blocks "
            "and replay_blocks with a larger common divisor"
        )


class ReplayConfig(Section):
    """What is rehearsed."""

    base: Text = SELF
    """What is rehearsed from phase 1 on: `self`, text that the unpatched base writes by itself before the first step;
    or shards of text that it knows. `./self` is a folder of that name. The base writes a held-out part too, which is
    a guarded probe set named `own_text`; both are kept in `build.folder`, for all runs of that base."""
    own_blocks: Positive = 512
    """Blocks that the base writes to be rehearsed; it writes an eighth as many, at least 16, to be held out."""
    blocks_per_phase: Positive = 4096
    """Blocks kept of each phase (a bottom-k sample) for the phases after it."""


class StreamConfig(Section):
    """How blocks are read.

    Wherever the config names `shards`, that is a folder built by `revpatch shards build`; the URL of such a folder
    (https://..., s3://..., or what else fsspec knows); `pipe:COMMAND` with {name} in it for the file's name; or a raw
    source (.txt, .jsonl, .parquet, hf:..., wds:..., a folder or glob of files), whose shards are built on first use.
    """

    on_error: Literal["stop", "quarantine"] = "stop"
    """A broken shard stops the run, or is taken out for all ranks alike and written in the journal."""
    shuffle_blocks: Positive = 8192
    """Blocks in the shuffling window."""
    shard_cache: Text | None = "~/.cache/revpatch/shards"
    """Folder on local disk for shards that lie elsewhere, shared by all processes of a machine."""
    shard_cache_gb: PositiveFloat = 20.0
    """Size that the shard cache may reach, in 10⁹ bytes."""


class BuildConfig(Section):
    """How the shards of a raw source are built on first use, by rank 0, with the base's tokenizer and block_size."""

    folder: Text = "data/built"
    """Folder in which they are kept, each set in a folder named after its source and how it was built; and the text
    that a base writes by itself."""
    text_column: Text = "text"
    """Field or column that holds the text."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the documents held out of a source that both a phase (or replay) and a probe set name: the one gets
    the training side, the other the held-out side."""


class WeightedShards(Section):
    """One part of a mixture."""

    shards: Text
    """Shards of this part."""
    weight: PositiveFloat = 1.0
    """Share of the phase's new blocks, relative to the other parts' weights."""


class PhaseConfig(Section):
    """One new corpus."""

    name: Name
    """Name of the phase; it names the files of the ledger."""
    shards: Text | Annotated[list[WeightedShards], Field(min_length=1)]
    """Token shards, or a mixture of several sets with weights."""
    steps: Positive
    """Optimizer steps."""
    repeat: bool = True
    """Begin another epoch when the shards are used up; if false, steps must fit in one epoch."""

    @property
    def parts(self) -> list[WeightedShards]:
        """The sets of shards with their weights; one, unless the phase names a mixture."""
        return [WeightedShards(shards=self.shards)] if isinstance(self.shards, str) else self.shards
