"""The kinds of events that a journal holds, each a model: its fields are those of the line, in the line's order.

Losses are means in nats per predicted token. A float that is not finite is spelt "NaN", "Infinity" or "-Infinity" in
the line and is a float here. docs/RUNS.md has the table of kinds and fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetPydanticSchema,
    ValidationError,
)
from pydantic_core import core_schema

from revpatch.ledger.patch_file import check_name


def _number(source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
    spelt = core_schema.literal_schema(["NaN", "Infinity", "-Infinity"])
    either = (handler(source), core_schema.no_info_after_validator_function(float, spelt))
    words = 'Input should be a number, or "NaN", "Infinity" or "-Infinity"'
    return core_schema.union_schema([*either], custom_error_type="number", custom_error_message=words)


Float = Annotated[float, GetPydanticSchema(_number)]
"""A float as the journal spells it."""
Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, AfterValidator(lambda name: check_name(name, "entry name"))]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ProbeReading(_Model):
    """What was measured on one probe set, and what it was held against."""

    loss: Float
    """Of the patch that was probed."""
    reference: Float
    """The loss of the last good state; of a commit that of the phase's start, of a patch that was made not trained the
    highest among the patches that it was made of."""
    rise: Float
    """`loss` less `reference`."""
    drift: Float
    """`loss` less `before`."""
    tolerance: Float
    """The rise up to which a state may be called good."""
    low: Float | None = None
    """Lower end of the interval of `rise`, over blocks; only of a guarded set."""
    high: Float | None = None
    """Upper end of it."""
    guarded: bool
    """Whether the guard looked at the set."""
    before: Float | None = None
    """The loss at the phase's start; only in training."""
    base: Float | None = None
    """The loss of the unpatched base; only in training."""
    gate: Float
    """Mean gate over tokens and layers, 0 to 1."""
    sparsity: Float | None = None
    """Share of tokens, over layers, whose gate is below 0.1; only in training."""
    patch_norm: Float
    """Root mean square over tokens of ‖h − u‖, mean over layers."""
    block_losses: list[Float] | None = None
    """The loss of each block of the set; only of the first start and of commits."""


Readings = dict[str, ProbeReading]
"""By the name of the probe set."""


class BaseIdentity(_Model):
    """The base of a run."""

    model: str
    """Its name on a hub or its folder, as the config has it."""
    family: str
    """transformers' `model_type`."""
    revision: str | None
    sha256: str
    """Of its weights, rounded to bfloat16."""
    dtype: str


class BasePlace(_Model):
    """Where a base lay."""

    model: str
    """What the config calls it."""
    folder: str | None
    """The absolute path of that folder; None for a hub's name."""


class ComputedAt(_Model):
    """What the last bits of logits depend on besides the weights."""

    host: str
    device: str
    threads: int
    """CPU threads of the process."""
    torch: str
    """Its version."""
    alignment: str
    """Digest of where in memory each parameter begins, modulo 64 bytes."""


class BareBase(_Model):
    """The base without a patch."""

    dtype: str
    weights: str
    """Exact sha256 of the weights in this dtype."""
    logits: str
    """sha256 of the bits of the logits of fixed tokens."""
    where: ComputedAt


class Sample(_Model):
    """A text that the model has written on from a prompt."""

    prompt: str
    text: str


class Event(_Model):
    """A line of the journal, of whatever kind."""

    seq: int
    """The line's number, from 0."""
    time: str
    """When it was written: ISO 8601, UTC, microseconds."""
    event: str
    """The kind."""
    previous: str
    """sha256 of the line before."""

    def as_record(self) -> dict[str, Any]:
        """Return the line's fields in its order; floats that are not finite are still floats."""
        record = self.model_dump(exclude_unset=True)
        previous = record.pop("previous")
        return {**record, "previous": previous}


class UnknownEvent(Event):
    """An event of a kind that this version doesn't write, with whatever fields it has."""

    model_config = ConfigDict(extra="allow")


class RunBegun(Event):
    """The run begins: its first event, or the first after a resume that had no snapshot."""

    event: Literal["run"]
    base: BaseIdentity
    bare_base: BareBase
    """Before anything is put on it."""
    base_at: BasePlace
    seed: int
    facts: dict[str, Any]
    """What the start-up table shows: ranks, device, engine, versions, numbers of parameters and bytes, ..."""
    origin: FileName | None = None
    """The entry that a restored run begins with."""


class PhaseBegun(Event):
    """A phase begins."""

    event: Literal["phase_start"]
    phase: str
    phase_index: Count
    """From 0."""
    steps: Count
    """Optimizer steps that it is to have."""


class Probed(Event):
    """The probe sets were measured in training."""

    event: Literal["probe"]
    phase: str
    step: Count
    """Optimizer steps of the phase so far."""
    sets: Readings
    training: dict[str, Float]
    """Means since the last log line: each term of the loss, unweighted, and `tokens_per_second`."""


class SamplesWritten(Event):
    """Texts were written from the same prompts as ever."""

    event: Literal["samples"]
    phase: str
    """After which phase; at the run's start `base`, or the file of the patch that it begins with."""
    global_step: Count
    """Optimizer steps of the run so far."""
    texts: list[Sample]


class EntryWritten(Event):
    """A patch file was written."""

    event: Literal["entry"]
    kind: str
    """start, good, rollback, commit or origin."""
    phase: str
    """The phase's name; of a patch that was made not trained what stands in its place."""
    phase_index: Count
    step: Count
    """Optimizer steps of the phase at which it was taken."""
    file: FileName
    """In the folder of the journal."""
    sha256: str
    """Of the file."""
    bytes: Count
    """The file's size."""
    sets: Readings | None = None
    """The probes of that state; empty where they were not measured."""
    made_by: dict[str, Any] | None = None
    """Of a patch that was made not trained: `operation`, and the sha256 of all that went into it."""
    restored: dict[str, Any] | None = None
    """Of an origin: `from` (as it was named), file, sha256, kind, phase, phase_index, step, and the old journal's
    head."""
    base_at: BasePlace | None = None

    @property
    def name(self) -> str:
        """Return what people call the entry: its file."""
        return self.file


class RolledBack(Event):
    """A state was given up, and training went back to an earlier one."""

    event: Literal["rollback"]
    phase: str
    step: Count
    """Optimizer steps of the phase at which it was given up."""
    to_file: str
    """The entry that it went back to."""
    reason: str
    window: Annotated[list[Count], Field(min_length=2, max_length=2)]
    """First and last step that is undone."""
    new_lr_factor: Float
    """What the learning rate is multiplied by from here on."""
    restored: Readings
    """The probes as they were measured after it."""


class PhaseCommitted(Event):
    """A phase ends, with its last good state."""

    event: Literal["commit"]
    phase: str
    step: Count
    """The step of the phase at which that state was reached; 0 is as it began."""
    file: FileName
    rollbacks: Count
    """States that the phase gave up."""
    inverse_error: str | None
    """How far undoing the patch misses, in words; None where it was not asked for."""
    sets: Readings


class ShardQuarantined(Event):
    """A broken shard is read around."""

    event: Literal["quarantine"]
    phase: str
    step: Count
    """The step of the phase from which on."""
    digest: str
    """Of the set of shards."""
    shard: Count
    """Its number in the set, from 0."""
    since: Count
    """The step of the run from which on."""
    location: str
    """The shard's file or URL."""
    reason: str


class Interrupted(Event):
    """A signal stopped the run, with a snapshot."""

    event: Literal["interrupted"]
    phase: str
    step: Count
    """Optimizer steps of the phase made."""


class RunResumed(Event):
    """The run was resumed, from a snapshot or from its beginning."""

    event: Literal["resume"]
    undoes_from: Count
    """`seq` of the first event that no longer counts."""
    superseded: list[str]
    """Entries that were set aside, and will be made again."""
    snapshot: str | None
    """The file's name; None: begun again."""
    changed: dict[str, list[Any]]
    """Config keys whose values are others than before: [old, new]."""
    orphans: list[str]
    """Files that a crash had left."""
    facts: dict[str, Any]
    """As in `run`."""
    base_at: BasePlace


class OrphanFound(Event):
    """A file that no line vouched for was set aside, or removed if it was half-written."""

    event: Literal["orphan"]
    file: str
    moved_to: str | None
    """Its new name; None: it was removed."""
    sha256: str | None = None
    """Of the file; not of a half-written one."""
    bytes: Count


class EntriesPruned(Event):
    """Files were removed."""

    event: Literal["pruned"]
    files: list[str]
    """Entries."""
    leftovers: list[str] | None = None
    """Files that earlier resumes had set aside."""
    bytes: Count
    """Freed."""


class TornEnd(Event):
    """The end of a line that a crash cut short was set aside."""

    event: Literal["torn"]
    file: str
    """Where it is kept."""
    bytes: Count


class RunEnded(Event):
    """Every phase is committed."""

    event: Literal["run_end"]
    bare_base: BareBase
    """With the patch off."""


KINDS: Mapping[str, type[Event]] = {
    "run": RunBegun,
    "phase_start": PhaseBegun,
    "probe": Probed,
    "samples": SamplesWritten,
    "entry": EntryWritten,
    "rollback": RolledBack,
    "commit": PhaseCommitted,
    "quarantine": ShardQuarantined,
    "interrupted": Interrupted,
    "resume": RunResumed,
    "orphan": OrphanFound,
    "pruned": EntriesPruned,
    "torn": TornEnd,
    "run_end": RunEnded,
}
"""What the code writes, by what a line calls it."""


def event_of(record: Mapping[str, Any]) -> Event:
    """Return a line's event; an UnknownEvent for a kind that is not in `KINDS`.

    Raises ValueError, with the fields that are missing, wrong or unknown, for a known kind.
    """
    try:
        return KINDS.get(record["event"], UnknownEvent).model_validate(record)
    except ValidationError as error:
        raise ValueError("; ".join(_words(found) for found in error.errors(include_url=False))) from error


def readings_of(plain: Mapping[str, Any]) -> Readings:
    """Return readings that were packed as plain values. Raises pydantic's ValidationError."""
    return {name: ProbeReading.model_validate(values) for name, values in plain.items()}


def _words(found: Any) -> str:
    shown = "" if found["type"] == "missing" else f" (found {str(found['input'])[:60]!r})"
    return f"field {'.'.join(map(str, found['loc']))}: {found['msg']}{shown}"
