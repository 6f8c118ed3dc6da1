"""Where replay.base names no text, the base writes it itself: drawn fairly, once, by any number of ranks."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import Runs, RunServer
from tokenizers.processors import TemplateProcessing
from toy import BLOCK_SIZE, Toy, make_base, make_tokenizer

from revpatch.config import OWN_TEXT, Config
from revpatch.config.file import load_config
from revpatch.ledger.maintenance import verify
from revpatch.report.history import read_history
from revpatch.shards.shard_set import ShardSet
from revpatch.surgery.combine import Probes, revert
from revpatch.train.own_text import build_own_text
from revpatch.train.preflight import check
from revpatch.train.startup import BaseWeights, load_frozen_base

ALONE: Any = SimpleNamespace(rank=0, world=1, from_rank0=lambda value: value, gather=lambda value: [value])
EOS = 0


def config_file(toy: Toy, tmp_path: Path, **changes: Any) -> Path:
    """A phase of 2 steps, no text to replay and no held-out set."""
    phases = [{"name": "first", "shards": str(toy.shards("first")), "steps": 2}]
    plain = toy.settings(
        tmp_path, phases=phases, probes={"every": 2, "sets": []}, optimizer={"warmup_steps": 1}, replay={}
    )
    replay = {"blocks_per_phase": 8, "own_blocks": 40} | changes.pop("replay", {})
    settings = {**plain, "build": {"folder": str(tmp_path / "built")}, "replay": replay, **changes}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def written(config: Config) -> tuple[Path, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The folder, and the blocks that are replayed and those that are held out."""
    base = load_frozen_base(config.base, torch.device("cpu"))
    folder = build_own_text(config, base, BaseWeights.of(base), ALONE)
    sets = [ShardSet(folder), ShardSet(f"{folder}_probe")]
    blocks, held_out = (shards.read(np.arange(len(shards))) for shards in sets)
    return folder, blocks, held_out


def hashes(folder: Path) -> dict[str, tuple[str, int]]:
    """Of every file by its path: sha256 and when it was written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }


def contents(folder: Path) -> dict[str, str]:
    return {name: sha256 for name, (sha256, _) in hashes(folder).items()}


# The text


@pytest.fixture(scope="module")
def own(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("own")
    return written(load_config(config_file(toy, folder, replay={"own_blocks": 400})))


def test_half_of_the_blocks_begin_a_document_and_half_with_any_token_and_none_is_twice(own: tuple[Any, ...]) -> None:
    _, blocks, held_out = own
    assert (blocks.shape, held_out.shape) == ((400, BLOCK_SIZE), (50, BLOCK_SIZE))
    for some in (blocks, held_out):
        assert (some[::2, 0] == EOS).all() and (some[1::2, 0] != EOS).all()
    assert len(np.unique(blocks[1::2, 0])) > 120, "200 draws of 299 tokens"
    assert (blocks[:, 1:-1] == EOS).any(), "it continues after the end of a text"
    assert len(np.unique(np.concatenate([blocks, held_out]), axis=0)) == 450


def test_the_bases_loss_on_it_is_its_own_entropy(own: tuple[Any, ...], toy: Toy) -> None:
    _, blocks, _ = own
    base = make_base(len(toy.tokenizer))

    def losses(tokens: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each block: the mean loss of its tokens, and the mean entropy of what they were drawn from."""
        ids = torch.from_numpy(tokens)
        with torch.no_grad():
            log_p = base(ids).logits[:, :-1].log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return -log_p.gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1), entropy.mean(1)

    loss, entropy = losses(blocks)
    apart = loss - entropy
    assert abs(float(apart.mean())) < 4 * float(apart.std()) / len(blocks) ** 0.5
    noise = np.random.default_rng(0).integers(0, len(toy.tokenizer), blocks.shape)
    assert losses(noise)[0].mean() > loss.mean() + 0.5


def test_a_token_is_drawn_as_often_as_the_base_gives_it_weight(toy: Toy, tmp_path: Path) -> None:
    base = {"model": str(toy.base), "dtype": "float32", "block_size": 2}
    _, blocks, _ = written(load_config(config_file(toy, tmp_path, base=base, replay={"own_blocks": 8000})))
    with torch.no_grad():
        p = make_base(len(toy.tokenizer))(torch.tensor([[EOS]])).logits[0, -1].softmax(-1).numpy()
    found = np.bincount(blocks[::2, 1], minlength=len(p))
    chi_squared = float((np.square(found - 4000 * p) / (4000 * p)).sum())
    assert chi_squared < len(p) + 6 * (2 * len(p)) ** 0.5, chi_squared


def save(folder: Path, tokenizer: Any, embeddings: int) -> dict[str, Any]:
    make_base(embeddings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder), "dtype": "float32", "block_size": BLOCK_SIZE}


def test_only_tokens_with_an_embedding_are_drawn(toy: Toy, tmp_path: Path) -> None:
    wide = save(tmp_path / "wide", toy.tokenizer, 2 * len(toy.tokenizer))
    _, blocks, _ = written(load_config(config_file(toy, tmp_path, base=wide, replay={"own_blocks": 64})))
    assert blocks.max() < len(toy.tokenizer), "and an id"
    tokenizer = make_tokenizer()
    embeddings = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    more = save(tmp_path / "more", tokenizer, embeddings)
    folder, blocks, _ = written(load_config(config_file(toy, tmp_path, base=more)))
    assert blocks.max() < embeddings
    assert ShardSet(folder).manifest.last_id == embeddings - 1, "so that the base takes it"


def test_a_base_whose_documents_begin_with_bos_writes_such(toy: Toy, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    base = save(tmp_path / "framed", tokenizer, len(tokenizer))
    folder, blocks, _ = written(load_config(config_file(toy, tmp_path, base=base, replay={"own_blocks": 200})))
    assert (blocks[:, 0] == bos).all()
    assert not np.isin(blocks[1::2, 1], [bos, EOS]).any()
    assert len(np.unique(blocks[1::2, 1])) > 60
    assert ShardSet(folder).manifest.tokenizer.bos_token_ids == (bos,)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"seed": 5, "batch": {"new_blocks": 8, "replay_blocks": 8, "micro_blocks": 8}}, True),
        ({"replay": {"own_blocks": 41}}, False),
        ({"base": {"model": "another"}}, False),
    ],
)
def test_what_decides_the_content_decides_the_folder(
    toy: Toy, tmp_path: Path, changes: dict[str, Any], same: bool
) -> None:
    plain = {"model": str(toy.base), "dtype": "float32", "block_size": BLOCK_SIZE}
    first, blocks, _ = written(load_config(config_file(toy, tmp_path, base=plain)))
    before = hashes(first)
    if changes.get("base", {}).get("model"):
        make_base(len(toy.tokenizer), seed=1).save_pretrained(tmp_path / first.name)
        toy.tokenizer.save_pretrained(tmp_path / first.name)
        changes["base"]["model"] = str(tmp_path / first.name)
    changes = {**changes, "base": {**plain, **changes.get("base", {})}}
    second, others, _ = written(load_config(config_file(toy, tmp_path, **changes)))
    assert (second == first) == same
    assert hashes(first) == before, "what is there is left as it is"
    assert np.array_equal(blocks, others) == same


# The runs


@pytest.fixture(scope="module")
def runs(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """ "one" rank, and "two" that wrote into a folder of their own."""
    folder = tmp_path_factory.mktemp("runs")
    found = Runs(server, config_file(toy, folder), folder)
    assert found.run("one", world=1) == [0], found.log("one").read_text()
    assert found.run("two", "--set", f"build.folder={folder / 'other'}") == [0, 0], found.log("two").read_text()
    yield found


def test_any_number_of_ranks_writes_the_same_and_a_later_run_reads_it(runs: Runs) -> None:
    assert contents(runs.folder / "built") == contents(runs.folder / "other") != {}
    assert runs.log("two").read_text().count("blocks of text of its own") == 1
    before = hashes(runs.folder / "built")
    assert runs.run("again", "--set", "seed=3", world=1) == [0], runs.log("again").read_text()
    assert "text of its own" not in runs.log("again").read_text()
    assert hashes(runs.folder / "built") == before
    kept = load_config(runs.path("one") / "config.yaml")
    assert kept.replay.base == "self" and kept.probes.sets == [], "the run keeps the config as it was given"


def test_the_held_out_part_is_probed_and_guarded(runs: Runs) -> None:
    (commit,) = runs.events("one", "commit")
    assert list(commit["sets"]) == [OWN_TEXT]
    found = commit["sets"][OWN_TEXT]
    assert found["guarded"] and found["tolerance"] == 0.03 and found["base"] == found["before"] > 0
    assert len(found["block_losses"]) == 16
    history = read_history(runs.path("one"))
    assert (history.taught_by, history.tolerances) == ({OWN_TEXT: 0}, {OWN_TEXT: 0.03})
    assert verify(runs.path("one")).ok


def test_a_patch_that_is_made_of_its_patches_is_held_to_it(runs: Runs, tmp_path: Path) -> None:
    probes = Probes.of(runs.path("two"), [])
    (own,) = probes.sets
    assert own.name == OWN_TEXT and Path(own.shards).parent == runs.folder / "other"
    made = revert(shutil.copytree(runs.path("two"), tmp_path / "copy"), "first", layers=[0])
    assert made.sets[OWN_TEXT].guarded, made


def test_a_run_is_resumed_with_it_and_with_nothing_else(runs: Runs) -> None:
    killed = {"rank": 0, "target": "revpatch.train.trainer:Trainer._commit", "call": 1, "when": "before"}
    assert -9 in runs.run("on", "--set", "snapshot.every=1", kill=killed), runs.log("on").read_text()
    own = next(path for path in (runs.folder / "other").iterdir() if not path.name.endswith("_probe"))
    for option, word in ((f"replay.base={own}", "replay.base: 'self' then"), ("replay.own_blocks=48", "own_blocks")):
        assert runs.run("on", "--set", option) == [2, 2]
        assert word in runs.log("on").read_text()
    assert runs.run("on") == [0, 0], runs.log("on").read_text()
    assert "resuming the run" in runs.log("on").read_text()
    assert runs.commits("on") == runs.commits("two")
    assert load_config(runs.path("on") / "config.yaml").replay.base == "self"


@pytest.fixture
def here(runs: Runs, toy: Toy, tmp_path: Path) -> Runs:
    """Runs whose own text is not yet written."""
    return Runs(runs.server, config_file(toy, tmp_path), tmp_path)


@pytest.mark.parametrize(("target", "call", "when"), [("install_folder", 2, "before"), ("_Writer._draw", 9, "after")])
def test_one_that_was_killed_while_it_wrote_is_written_again(
    runs: Runs, here: Runs, target: str, call: int, when: str
) -> None:
    kill = {"rank": 0, "target": f"revpatch.train.own_text:{target}", "call": call, "when": when}
    assert -9 in here.run("run", kill=kill), here.log("run").read_text()
    assert here.run("run") == [0, 0], here.log("run").read_text()
    whole = {name: sha256 for name, sha256 in contents(here.folder / "built").items() if not name.startswith(".")}
    assert whole == contents(runs.folder / "other")


def test_what_is_refused_before_or_while_it_is_written(here: Runs) -> None:
    built, log = here.folder / "built", here.log("run")
    assert here.run("run", "--set", "phases.0.shards=nowhere") == [2, 2]
    assert "phases.0.shards = nowhere" in log.read_text() and not built.exists()
    here.path("run").mkdir()
    (here.path("run") / "thesis.txt").write_text("mine")
    assert here.run("run") == [2, 2]
    assert not built.exists() and (here.path("run") / "thesis.txt").read_text() == "mine"
    shutil.rmtree(here.path("run"))
    built.write_text("a file")
    assert here.run("run") == [2, 2]
    assert "replay.base = self: " in log.read_text() and str(built) in log.read_text()
    built.unlink()
    folder, _, _ = written(load_config(here.config))
    for part in ("", "_probe"):
        shard = Path(f"{folder}{part}") / "shard-000000.tar"
        whole = shard.read_bytes()
        shard.write_bytes(whole[:-512])
        assert here.run("run") == [2, 2]
        assert f"replay.base = self: {shard}: " in log.read_text()
        assert f"delete {folder}{part}, and the base writes it again" in log.read_text()
        shard.write_bytes(whole)
    assert here.run("run", also={"rank": 1, "options": ["--set", f"replay.base={folder}"]}) == [2, 2]
    assert "replay.base: 'self' on rank 0" in log.read_text()


def test_without_replay_nothing_is_written(toy: Toy, tmp_path: Path) -> None:
    plan = check(load_config(config_file(toy, tmp_path, batch={"new_blocks": 4, "replay_blocks": 0})), 1)
    assert plan.replay_base is None and plan.probes == []


def test_a_tolerance_that_would_never_apply_is_lowered(toy: Toy, tmp_path: Path) -> None:
    config = load_config(config_file(toy, tmp_path, rollback={"max_drift": 0.01}))
    (probe,) = config.with_own_text("folder").probes.sets
    assert (probe.tolerance, probe.shards, probe.max_blocks, probe.guard_after) == (0.01, "folder_probe", None, None)


def test_a_folder_named_self_is_meant_by_its_path(toy: Toy, tmp_path: Path) -> None:
    config = load_config(config_file(toy, tmp_path, replay={"base": "./self"}))
    with pytest.raises(ValueError, match=r"replay\.base = \./self: .*there is no manifest"):
        check(config, 1)
