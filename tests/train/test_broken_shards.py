"""Shards that break while real ranks train: all stop at once, or all continue without the shard, from one step on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damage
from flaky_server import FlakyServer, drop, slow, status
from ranks import Runs, RunServer, run, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import BLOCK_SIZE, Toy
from waiting import until

from revpatch.config import BatchConfig
from revpatch.corpus.build import build_shards
from revpatch.distributed import Launch
from revpatch.distributed.ranks import Ranks
from revpatch.ledger.maintenance import verify
from revpatch.shards.cache import ShardCache
from revpatch.shards.format import Manifest
from revpatch.shards.mixture import Mixture
from revpatch.shards.quarantine import Quarantine
from revpatch.shards.shard_set import Corpus, ShardSet
from revpatch.train.batches import Batches

BLOCKS_PER_SHARD = 20


@pytest.fixture
def runs(toy: Toy, server: RunServer, tmp_path: Path) -> Runs:
    """A run over several shards, in a folder of their own, of which one may be damaged."""
    build_shards(
        [toy.folder / "first.jsonl"],
        toy.tokenizer,
        BLOCK_SIZE,
        tmp_path / "new",
        blocks_per_shard=BLOCKS_PER_SHARD,
        max_tokens=100 * BLOCK_SIZE,
    )
    config = toy.config_file(
        tmp_path,
        phases=[{"name": "first", "shards": str(tmp_path / "new"), "steps": 12}],
        probes={"every": 12, "sets": [{"name": "base", "shards": str(toy.shards("base_probe")), "max_blocks": 16}]},
        snapshot={"every": 4},
    )
    return Runs(server, config, tmp_path)


def broken_shard(runs: Runs, index: int) -> Path:
    return runs.folder / "new" / Manifest.read(runs.folder / "new").shards[index].name


FLIPPED = "a flipped bit in a block"
SHUFFLED = ["--set", "stream.shuffle_blocks=8"]
QUARANTINE = ["--set", "stream.on_error=quarantine", *SHUFFLED]


@pytest.mark.parametrize(
    ("how", "seen_at_the_start"),
    [
        (FLIPPED, False),
        ("a zeroed header", False),
        ("swapped", False),
        ("cut inside a member", True),
        ("missing", True),
    ],
)
def test_stop_names_the_shard_and_stops_all_ranks(runs: Runs, how: str, seen_at_the_start: bool) -> None:
    """What has another size is seen before the run begins."""
    path = broken_shard(runs, 1)
    damage(path, how)
    assert runs.run("run", *SHUFFLED) == [2, 2], runs.log("run").read_text()
    words = runs.log("run").read_text()
    assert str(path) in words and "shard 1 of" in words
    assert ("All ranks stop here" in words) != seen_at_the_start
    assert re.search(r"rank [01] on \S+: ", words)


def test_stop_names_a_shard_that_breaks_after_the_start(runs: Runs) -> None:
    waiting, path = runs.folder / "run.log.waiting", broken_shard(runs, 1)
    runs.start("run", wait_at={"target": "revpatch.train.state:Watch.measure", "call": 1})
    until(waiting.exists)
    damage(path, "cut inside a member")
    waiting.unlink()
    assert runs.server.wait(60) == [2, 2], runs.log("run").read_text()
    words = runs.log("run").read_text()
    assert str(path) in words and "shard 1 of 5" in words and "All ranks stop here" in words
    assert not runs.events("run", "commit")


@pytest.mark.parametrize("how", [FLIPPED, pytest.param("missing", marks=pytest.mark.slow)])
def test_quarantine_takes_it_out_for_all_ranks_from_one_step_on(runs: Runs, how: str) -> None:
    path = broken_shard(runs, 2)
    damage(path, how)
    found = {}
    for world in (1, 2, 4):
        options = [*QUARANTINE, "--set", f"monitoring.tensorboard={'true' if world == 2 else 'false'}"]
        assert runs.run(f"world{world}", *options, world=world) == [0] * world, runs.log(f"world{world}").read_text()
        events = runs.events(f"world{world}", "quarantine")
        assert [(event["shard"], event["location"]) for event in events] == [(2, str(path))]
        found[world] = [(event["phase"], event["step"]) for event in events]
        if world == 2:
            it_is_on_the_board(runs.path("world2") / "tensorboard", events[0]["step"], path)
        assert "on" in events[0]["reason"] and events[0]["reason"].startswith("rank ")
        sample = Manifest.read(runs.path(f"world{world}") / "replay/000_first")
        found[world] += [shard.sha256 for shard in sample.shards]
        assert verify(runs.path(f"world{world}")).ok
    assert found[1] == found[2] == found[4], "one step, and one sample, whatever the world"


def it_is_on_the_board(folder: Path, step: int, shard: Path) -> None:
    """What was taken out at a step is told in the Text tab, and marked in the charts of the probes."""
    main, marks = (EventAccumulator(str(each)).Reload() for each in (folder, folder / "quarantine"))
    (text,) = main.Tensors("event/quarantine/text_summary")
    assert text.step == step and f"on without {shard}" in text.tensor_proto.string_val[0].decode()
    assert [point.step for point in marks.Scalars("mark/base/quarantine")] == [step - 2, step - 1, step]


class OfTwo(Ranks):
    """This rank, and another that meets the same broken shards at the same steps."""

    def agree(self, failure: Any, interrupted: bool) -> tuple[list[Any], bool]:
        return [] if failure is None else [failure, replace(failure, reason="rank 1")], interrupted


def test_a_shard_that_is_met_twice_is_quarantined_once(runs: Runs) -> None:
    """By two ranks at one step, and again in a later phase."""
    damage(broken_shard(runs, 1), FLIPPED)
    peers, quarantine = OfTwo(Launch(0, 1, 0), torch.device("cpu"), None), Quarantine(0)
    batch = BatchConfig(new_blocks=4, replay_blocks=0, micro_blocks=4)
    found = []
    for first_step in (0, 24):
        with ShardSet(runs.folder / "new") as shards:  # which has forgotten what it met
            mixture = Mixture([shards.manifest], [1.0], 4, first_step, 8, repeat=True)
            batches = Batches(Corpus([shards]), mixture, None, batch, peers, first_step, quarantine, "quarantine")
            with closing(batches.stream(24)) as stream:
                found += [(first_step, broken.shard, broken.reason[:6]) for r in stream for broken in r.quarantined]
    assert found == [(0, 1, "rank 0")] and len(quarantine.broken) == 1


@pytest.fixture
def remote(runs: Runs) -> Iterator[FlakyServer]:
    """A real server of the shards that the run trains on."""
    server = FlakyServer(runs.folder / "new")
    yield server
    server.close()


def over_http(runs: Runs, remote: FlakyServer, name: str) -> list[str]:
    settings = {
        "phases.0.shards": remote.url,
        "stream.shard_cache": runs.folder / f"cache_{name}",
        "stream.shuffle_blocks": 8,
    }
    return [option for key, value in settings.items() for option in ("--set", f"{key}={value}")]


def test_a_run_over_http_is_the_run_from_disk_and_fetches_each_shard_once(runs: Runs, remote: FlakyServer) -> None:
    assert runs.run("disk", *SHUFFLED) == [0, 0]
    broken = [shard.name for shard in Manifest.read(runs.folder / "new").shards]
    remote.faults[broken[1]] = [status(503)]
    remote.faults[broken[2]] = [drop]
    assert runs.run("http", *over_http(runs, remote, "http")) == [0, 0], runs.log("http").read_text()
    assert runs.commits("http") == runs.commits("disk")
    fetched = Counter(name for name in remote.requests if name.endswith(".tar"))
    assert fetched == {name: 2 if name in broken[1:3] else 1 for name in broken}, "once for both ranks"


def test_a_shard_that_is_gone_from_the_server_is_quarantined_and_a_cache_without_room_is_no_broken_shard(
    runs: Runs, remote: FlakyServer
) -> None:
    gone = Manifest.read(runs.folder / "new").shards[3].name
    remote.always[gone] = status(404)
    options = [*over_http(runs, remote, "run"), *QUARANTINE]
    assert 0 not in runs.run("small", *options, "--set", "stream.shard_cache_gb=1e-6")
    assert "stream.shard_cache_gb" in runs.log("small").read_text() and not runs.events("small", "quarantine")
    assert runs.run("run", *options) == [0, 0], runs.log("run").read_text()
    assert f"{remote.url}/{gone}" in runs.log("run").read_text() and "404" in runs.log("run").read_text()
    assert [event["location"] for event in runs.events("run", "quarantine")] == [f"{remote.url}/{gone}"]


def test_a_shard_that_breaks_before_the_commit_is_read_around_in_the_sample(runs: Runs) -> None:
    options = QUARANTINE
    kill = {"rank": 0, "target": "revpatch.train.trainer:write_replay", "call": 1, "when": "before"}
    assert 0 not in runs.run("run", *options, kill=kill)
    broken_shard(runs, 1).unlink()
    assert runs.run("run", *options) == [0, 0], runs.log("run").read_text()
    assert [event["shard"] for event in runs.events("run", "quarantine")] == [1]
    assert Manifest.read(runs.path("run") / "replay/000_first").blocks == 8


def test_a_run_with_a_broken_shard_is_resumed_to_the_same_commit(runs: Runs, toy: Toy) -> None:
    """Of a mixture."""
    damage(broken_shard(runs, 3), FLIPPED)
    parts = [{"shards": str(runs.folder / "new"), "weight": 3}, {"shards": str(toy.shards("second"))}]
    phases = [{"name": "both", "shards": parts, "steps": 20}]
    options = [*QUARANTINE, "--set", f"phases={json.dumps(phases)}"]
    assert runs.run("through", *options) == [0, 0], runs.log("through").read_text()
    step = {"rank": 1, "target": "revpatch.step.engine:AccelerateEngine.train_step", "call": 15, "when": "before"}
    assert 0 not in runs.run("killed", *options, kill=step)
    assert runs.run("killed", *options) == [0, 0]
    assert runs.events("killed", "resume")[0]["snapshot"] == "step000000000012.safetensors"
    assert runs.commits("killed") == runs.commits("through")
    events = ([(e["shard"], e["step"]) for e in runs.events(name, "quarantine")] for name in ("killed", "through"))
    assert next(events) == next(events) != []


@pytest.mark.slow
def test_a_real_launcher_ends_too(runs: Runs) -> None:
    """The ranks end as processes do, with their reading threads in the middle of something."""
    damage(broken_shard(runs, 1), FLIPPED)
    done = run([*torchrun(2), "-m", "revpatch", "train", str(runs.config), *SHUFFLED], timeout=120)
    assert done.returncode != 0
    assert "All ranks stop here" in done.stdout and str(broken_shard(runs, 1)) in done.stdout
    assert "Traceback" not in done.stdout.split("torch/distributed")[0]


def test_the_next_shard_is_asked_for_before_its_first_step(
    remote: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shard in Manifest.read(tmp_path / "new").shards:
        remote.always[shard.name] = slow(0.2)
    monkeypatch.setattr("revpatch.train.batches.LOOK_AHEAD_STEPS", 8)
    peers = Ranks(Launch(0, 1, 0), torch.device("cpu"), None)
    with ShardCache(tmp_path / "cache", 10**8) as cache, ShardSet(remote.url, cache) as shards:
        mixture = Mixture([shards.manifest], [1.0], 1, 0, 1, repeat=False)
        batch = BatchConfig(new_blocks=1, replay_blocks=0, micro_blocks=1)
        batches = Batches(Corpus([shards]), mixture, None, batch, peers, 0, Quarantine(0))
        order = [int(shards.shards_of(mixture.block_ids(step))[0]) for step in range(0, 100, BLOCKS_PER_SHARD)]
        names = [shards.manifest.shards[index].name for index in order]
        with closing(batches.stream(3 * BLOCKS_PER_SHARD)) as stream:
            for step in range(1, 2 * BLOCKS_PER_SHARD):
                next(stream)
                # One step is read ahead of the caller besides, and one more of those that wait.
                if step in (BLOCKS_PER_SHARD - 8 + 1, 2 * BLOCKS_PER_SHARD - 8 + 1):
                    following = names[step // BLOCKS_PER_SHARD + 1]
                    until(lambda name=following: remote.count(name) == 1, f"{following} at step {step}", 10)
        assert all(remote.count(name) <= 1 for name in names)
