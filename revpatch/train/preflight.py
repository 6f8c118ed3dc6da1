"""What can be refused before any process group is formed: shards, tokenizer, base and engine against the config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from revpatch.base import Base
from revpatch.config import SELF, BaseConfig, Config, ConfigError, PhaseConfig
from revpatch.config.file import read_deepspeed_config
from revpatch.corpus.tokenizer import check_made_for, prompt_ids, read_tokenizer, tokenizer_fingerprint, tokenizer_info
from revpatch.monitoring.trackers import check_trackers
from revpatch.shards.cache import cache_for
from revpatch.shards.format import Manifest
from revpatch.shards.mixture import Mixture
from revpatch.shards.shard_set import Corpus, ShardSet


@dataclass
class Plan:
    """What a run reads, opened and checked."""

    phases: dict[int, Corpus]
    """By the number of the config's phase."""
    mixtures: dict[int, Mixture]
    """The order of each phase's blocks."""
    missing: dict[int, ConfigError]
    """Phases whose shards are not to be had, and why; a run that has committed them needs none."""
    replay_base: ShardSet | None
    probes: list[ShardSet]
    """In the order of the config's probe sets."""
    tokenizer: str
    """Fingerprint of the tokenizer of base and shards."""
    notices: list[str]
    """Lines about tokenizer and shards that a person should see."""

    def digests(self, config: Config, phase: int | None) -> dict[str, list[str]]:
        """Digests of the sets that are in use in a phase, or between phases, by the config's key."""
        found = {
            f"probes.sets {s.name}": [p.manifest.digest] for s, p in zip(config.probes.sets, self.probes, strict=True)
        }
        if self.replay_base is not None:
            found["replay.base"] = [self.replay_base.manifest.digest]
        if phase is not None:
            corpus = self.phases.get(phase)
            found[f"phases {config.phases[phase].name}"] = [] if corpus is None else corpus.digests
        return found

    def check_phases(self, first: int) -> None:
        """Raises ConfigError if the shards of a phase from this one on are not to be had."""
        for index, error in self.missing.items():
            if index >= first:
                raise error


def check(
    config: Config, world: int, begun: bool = False, not_built: Mapping[int, ConfigError] = MappingProxyType({})
) -> Plan:
    """Opens what the config names. Of a run that has `begun` the plan says which phases' shards are missing, those
    among them that could not be built: they may be committed.

    Raises:
        ConfigError: a combination can't work, or shards are missing or (unless broken ones are quarantined) of another
            size; the message names key, value, and what to do.
        FileNotFoundError: DeepSpeed's file is missing.
    """
    checked = check_base(config, world)
    cache = cache_for(config.stream, [place for _, place in locations(config)])
    opened: dict[str, ShardSet] = {}
    missing = dict(not_built)
    for key, place in locations(config):
        if key.startswith("phases.") and phase_of(key) in not_built:
            continue
        try:
            shards = ShardSet(place, cache)
            if config.stream.on_error == "stop":
                shards.check_sizes()
            opened[key] = shards
        except (OSError, ValueError) as error:
            refusal = ConfigError(f"{key} = {place}: {error}")
            if not begun or not key.startswith("phases."):
                raise refusal from None
            missing.setdefault(phase_of(key), refusal)
            continue
        if other_frame := _check_shards(key, place, shards.manifest, config, checked):
            if not begun:
                raise ConfigError(other_frame)
            checked.notices.append(other_frame)
    there = {index: phase for index, phase in enumerate(config.phases) if index not in missing}
    corpora = {index: Corpus([opened[key] for key in _part_keys(index, phase)]) for index, phase in there.items()}
    mixtures = {index: _mixture(config, index, corpus) for index, corpus in corpora.items()}
    _check_held_out(config, opened)
    return Plan(
        phases=corpora,
        mixtures=mixtures,
        missing=missing,
        replay_base=opened.get("replay.base"),
        probes=[opened[f"probes.sets.{index}.shards"] for index in range(len(config.probes.sets))],
        tokenizer=checked.fingerprint,
        notices=checked.notices,
    )


@dataclass(frozen=True)
class CheckedBase:
    """A base's configuration, its tokenizer and the fingerprint of that, and lines about it for a person."""

    architecture: Any
    tokenizer: Any
    fingerprint: str
    notices: list[str]


def check_base(config: Config, world: int) -> CheckedBase:
    """Return what needs no shards: ranks, engine and base.

    Raises:
        ConfigError, FileNotFoundError: as `check`.
    """
    check_trackers(config.monitoring.trackers)
    config.batch.accumulation(world)
    read_deepspeed_config(config.engine.deepspeed)
    architecture = _architecture(config.base)
    _check_layers(config, architecture)
    checked = _checked_base(config.base, architecture)
    samples = config.monitoring.samples
    for index, prompt in enumerate(samples.prompts if samples.max_new_tokens else []):
        try:
            prompt_ids(checked.tokenizer, prompt, architecture.vocab_size, f"monitoring.samples.prompts.{index}")
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if config.replays_own_text:
        try:
            tokenizer_info(checked.tokenizer)
        except ValueError as error:
            raise ConfigError(f"replay.base = {SELF}: {error}") from error
    return checked


def locations(config: Config) -> Iterator[tuple[str, str]]:
    """Every key that names shards, and what it names. Text that the base writes by itself has no name yet."""
    for index, phase in enumerate(config.phases):
        for key, part in zip(_part_keys(index, phase), phase.parts, strict=True):
            yield key, part.shards
    if config.batch.replay_blocks and not config.replays_own_text:
        yield "replay.base", config.replay.base
    for index, probe in enumerate(config.probes.sets):
        yield f"probes.sets.{index}.shards", probe.shards


def phase_of(key: str) -> int:
    """Return the number of the phase whose shards a key names."""
    return int(key.split(".")[1])


def _part_keys(index: int, phase: PhaseConfig) -> list[str]:
    if isinstance(phase.shards, str):
        return [f"phases.{index}.shards"]
    return [f"phases.{index}.shards.{part}.shards" for part in range(len(phase.shards))]


def _mixture(config: Config, index: int, corpus: Corpus) -> Mixture:
    phase = config.phases[index]
    names = ", ".join(part.shards for part in phase.parts)
    try:
        mixture = Mixture(
            [shards.manifest for shards in corpus.sets],
            [part.weight for part in phase.parts],
            config.batch.new_blocks,
            config.seed + index,
            config.stream.shuffle_blocks,
            phase.repeat,
        )
    except ValueError as error:
        raise ConfigError(f"phases.{index}.shards = {names}: {error}") from None
    if mixture.total_steps is not None and phase.steps > mixture.total_steps:
        raise ConfigError(
            f"phases.{index}.steps = {phase.steps}, but {names} holds {mixture.total_steps} steps an epoch of "
            f"{config.batch.new_blocks} blocks: set repeat: true, or steps to at most {mixture.total_steps}"
        )
    return mixture


def _architecture(base: BaseConfig) -> Any:
    try:
        found = Base.find(base.model, base.revision)
        found.check()
    except (OSError, ValueError) as error:
        raise ConfigError(f"base.model = {base.model}: {error}") from error
    architecture = found.config
    if architecture.hidden_size % 2:
        raise ConfigError(
            f"base.model = {base.model}: its width {architecture.hidden_size} is odd, and the coupling splits it in "
            "halves: choose a model of even width"
        )
    positions = architecture.max_position_embeddings
    if base.block_size > positions:
        raise ConfigError(
            f"base.block_size = {base.block_size}, but {base.model} reads at most {positions} tokens: lower it"
        )
    return architecture


def _check_layers(config: Config, architecture: Any) -> None:
    layers, blocks = config.sidecar.layers, architecture.num_hidden_layers
    if layers != "all" and max(layers) >= blocks:
        raise ConfigError(
            f"sidecar.layers = {layers}: there is no block {max(layers)}; {config.base.model} has blocks 0 to "
            f"{blocks - 1}"
        )


def _checked_base(base: BaseConfig, architecture: Any) -> CheckedBase:
    try:
        tokenizer, notices = read_tokenizer(base.model, base.revision)
        return CheckedBase(architecture, tokenizer, tokenizer_fingerprint(tokenizer), notices)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base.model = {base.model}: its tokenizer can't be used: {_first_line(error)}") from error


def _check_shards(key: str, folder: str, manifest: Manifest, config: Config, base: CheckedBase) -> str | None:
    """Returns as `check_made_for`."""
    if manifest.block_size != config.base.block_size:
        raise ConfigError(
            f"{key} = {folder}: its blocks have {manifest.block_size} tokens, base.block_size is "
            f"{config.base.block_size}: set one to the other, or build the shards anew"
        )
    embeddings = base.architecture.vocab_size
    place = f"{key} = {folder}"
    try:
        return check_made_for(place, manifest, base.tokenizer, base.fingerprint, config.base.model, embeddings)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_held_out(config: Config, opened: dict[str, ShardSet]) -> None:
    # By the shards' hashes: a manifest's digest also tells apart two builds of one text under different notes.
    trained = {
        shard.sha256: key for key in opened if not key.startswith("probes.") for shard in opened[key].manifest.shards
    }
    for index, probe in enumerate(config.probes.sets):
        shards = opened[f"probes.sets.{index}.shards"]
        shared = [trained[shard.sha256] for shard in shards.manifest.shards if shard.sha256 in trained]
        if shared:
            raise ConfigError(
                f"probes.sets.{index}.shards = {probe.shards} holds shards that {shared[0]} trains on: a probe must be "
                "held out; build with --holdout and use the _probe folder"
            )
        used = min(len(shards), probe.max_blocks or len(shards))
        if used < 2:
            raise ConfigError(
                f"probes.sets.{index} = {probe.name}: {used} block, but a paired comparison needs at least 2: hold out "
                "more, or raise max_blocks"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
