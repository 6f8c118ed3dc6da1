"""Shards that lie elsewhere are asked for before the step that reads them: new blocks' and replayed ones'."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from flaky_server import FlakyServer, slow
from toy import Toy
from waiting import until

from revpatch.config import BatchConfig
from revpatch.corpus.build import build_shards
from revpatch.distributed import Launch
from revpatch.distributed.ranks import Ranks
from revpatch.shards.cache import ShardCache
from revpatch.shards.mixture import Mixture
from revpatch.shards.quarantine import Quarantine
from revpatch.shards.replay import ReplayMixture
from revpatch.shards.shard_set import Corpus, ShardSet
from revpatch.train.batches import Batches

BLOCKS_PER_SHARD = 20
AHEAD = 8


@pytest.fixture
def server(toy: Toy, tmp_path: Path) -> Iterator[FlakyServer]:
    """A slow one, of five shards of 20 blocks."""
    build_shards(
        [toy.folder / "first.jsonl"],
        toy.tokenizer,
        16,
        tmp_path / "set",
        blocks_per_shard=BLOCKS_PER_SHARD,
        max_tokens=16 * 5 * BLOCKS_PER_SHARD,
    )
    flaky = FlakyServer(tmp_path / "set")
    for path in (tmp_path / "set").glob("*.tar"):
        flaky.always[path.name] = slow(0.2)
    yield flaky
    flaky.close()


def test_the_next_shard_is_asked_for_before_its_first_step(
    server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revpatch.train.batches.LOOK_AHEAD_STEPS", AHEAD)
    peers = Ranks(Launch(0, 1, 0), torch.device("cpu"), None)
    with ShardCache(tmp_path / "cache", 10**8) as cache, ShardSet(server.url, cache) as shards:
        mixture = Mixture([shards.manifest], [1.0], 1, 0, 1, repeat=False)
        batch = BatchConfig(new_blocks=1, replay_blocks=0, micro_blocks=1)
        batches = Batches(Corpus([shards]), mixture, None, batch, peers, 0, Quarantine(0))
        order = [int(shards.shards_of(mixture.block_ids(step))[0]) for step in range(0, 100, BLOCKS_PER_SHARD)]
        names = [shards.manifest.shards[index].name for index in order]
        with closing(batches.stream(3 * BLOCKS_PER_SHARD)) as stream:
            for step in range(1, 2 * BLOCKS_PER_SHARD):
                next(stream)
                # One step is read ahead of the caller besides, and one more of those that wait.
                if step in (BLOCKS_PER_SHARD - AHEAD + 1, 2 * BLOCKS_PER_SHARD - AHEAD + 1):
                    following = names[step // BLOCKS_PER_SHARD + 1]
                    until(lambda name=following: server.count(name) == 1, f"{following} at step {step}", 10)
        assert all(server.count(name) <= 1 for name in names)


def test_rehearsed_shards_are_asked_for_ahead_too(
    toy: Toy, server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("revpatch.train.batches.LOOK_AHEAD_STEPS", 40)
    peers = Ranks(Launch(0, 1, 0), torch.device("cpu"), None)
    with ShardCache(tmp_path / "cache", 10**8) as cache, ShardSet(server.url, cache) as base:
        corpus = Corpus([ShardSet(toy.shards("first"))])
        mixture = Mixture([corpus.sets[0].manifest], [1.0], 1, 0, 1, repeat=True)
        replay = ReplayMixture([base], 1, seed=0)
        batch = BatchConfig(new_blocks=1, replay_blocks=1, micro_blocks=2)
        soon = {int(base.shards_of(replay.locate(step)[1])[0]) for step in range(7, 40)}
        names = {base.manifest.shards[index].name for index in soon}
        assert len(names) > 3
        with closing(Batches(corpus, mixture, replay, batch, peers, 0, Quarantine(0)).stream(100)) as stream:
            next(stream)
            until(lambda: names <= set(server.requests), "all of them at the first step", 10)
