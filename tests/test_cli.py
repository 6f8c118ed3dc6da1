"""The command line, as a person meets it: a real small run, text out of its patches, and plain words for mistakes."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from command import LAUNCHER, Call, Result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy import POSITIONS, Toy, save_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from revpatch.cli import main
from revpatch.config import Config, ConfigError
from revpatch.config_file import load_config
from revpatch.ledger.entry import read_entry, serialise, write_entry
from revpatch.ledger.journal import Journal
from revpatch.monitoring.terminal import log_to
from revpatch.stream.manifest import Manifest
from revpatch.training import startup
from revpatch.training.objective import TERMS
from revpatch.training.resume import stand

STEPS = {"first": 14, "second": 12}
PROMPT = "the little kettle"
NOISE = re.compile(r"warn|deprecat|traceback|it/s\]|\[W\d|\[rank\d|/site-packages/", re.IGNORECASE)
"""What libraries say of themselves; a run's own words have none of it."""


@dataclass
class Run:
    """A run that was trained once, and is read only."""

    directory: Path
    config: Path
    overrides: list[str]
    result: Result

    def entry(self, name: str) -> Path:
        return self.directory / "ledger" / name


def in_a_process(*arguments: str) -> Result:
    """`python -m revpatch ...`, with nothing in the environment that would keep a library quiet."""
    names = (
        *LAUNCHER,
        "DS_ACCELERATOR",
        "TOKENIZERS_PARALLELISM",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "TRANSFORMERS_VERBOSITY",
    )
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-m", "revpatch", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def run(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Run:
    tmp = tmp_path_factory.mktemp("cli")
    directory = tmp / "a run [b] :bug:"  # names that a careless console would change
    config = toy.config_file(
        tmp,
        output_dir=str(directory),
        objective={"gate_l1_weight": 0.01, "patch_l2_weight": 1e-4, "stats_drift_weight": 0.01},
        phases=[{"name": n, "shards": str(toy.shards(n)), "steps": steps} for n, steps in STEPS.items()],
        engine={"kind": "deepspeed"},
        monitoring={"tensorboard": True, "samples": {"max_new_tokens": 2}},
    )
    overrides = ["optimizer.lr=2e-2", "rollback.max_drift=2.0"]
    sets = [argument for override in overrides for argument in ("--set", override)]
    return Run(directory, config, overrides, in_a_process("train", str(config), *sets))


def one_line(result: Result, *words: object) -> None:
    """A mistake: exit code 2, nothing on standard output, and one line that has these words."""
    assert (result.code, result.out) == (2, ""), result
    assert result.err.startswith("revpatch: ")
    assert result.err.count("\n") == 1, result.err
    missing = [str(word) for word in words if str(word) not in result.err]
    assert not missing, f"{missing} not in: {result.err}"


# Training


def test_a_run_ends_well_and_says_nothing_but_its_own_words(run: Run) -> None:
    assert run.result.code == 0, run.result
    assert run.result.err == ""
    noise = [line for line in run.result.out.splitlines() if NOISE.search(line)]
    assert not noise, noise
    for word in ("ranks", "engine", "deepspeed, ZeRO 0", "trainable parameters", "frozen parameters", "inverse error"):
        assert word in run.result.out
    assert run.result.out.count(str(run.directory)) == 1
    assert f"{run.directory.name}: held-out losses" in run.result.out
    assert "first committed" in run.result.out
    assert "second committed" in run.result.out


def test_the_resolved_config_is_kept_with_the_run(run: Run) -> None:
    assert load_config(run.directory / "config.yaml") == load_config(run.config, run.overrides)
    assert load_config(run.directory / "config.yaml").optimizer.lr == 2e-2


def test_the_log_file_has_what_the_terminal_showed(run: Run) -> None:
    written = [line.split(" ", 2)[2] for line in (run.directory / "train.log").read_text("utf-8").splitlines()]
    shown = run.result.out.splitlines()
    assert len(written) > 10
    assert [line for line in written if line not in shown] == []


def test_commits_learned_their_corpora(run: Run) -> None:
    losses = {name: read_entry(run.entry(name))[1]["probes"] for name in ("000_first_start.pt", "001_second_commit.pt")}
    assert losses["001_second_commit.pt"]["first"] < losses["000_first_start.pt"]["first"] - 0.1
    assert losses["001_second_commit.pt"]["second"] < losses["000_first_start.pt"]["second"] - 0.1


@pytest.fixture(scope="module")
def events(run: Run) -> Any:
    return events_in(run.directory / "tensorboard")


def events_in(folder: Path) -> Any:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def steps_of(config: Config) -> tuple[list[int], list[int]]:
    """The global steps at which a line is logged, and at which the probes are read."""
    logged, probed, before = [], [], 0
    for phase in config.phases:
        for step in range(1, phase.steps + 1):
            probe = step % config.probes.every == 0 or step == phase.steps
            if probe or step % config.monitoring.every == 0:
                logged.append(before + step)
            if probe:
                probed.append(before + step)
        before += phase.steps
    return logged, probed


def test_tensorboard_has_every_term_rate_speed_and_layer_at_every_logged_step(events: Any, run: Run) -> None:
    logged, _ = steps_of(load_config(run.config))
    tags = [f"loss/{term}" for term in TERMS]
    tags += ["optimizer/lr", "optimizer/grad_norm", "speed/tokens_per_second"]
    tags += [f"{key}/layer_{layer:02d}" for key in ("gate", "scale", "patch_norm") for layer in (0, 1)]
    for tag in tags:
        points = events.Scalars(tag)
        assert [point.step for point in points] == logged, tag
        assert all(point.value == point.value for point in points), tag
    assert all(0 < point.value < 1 for point in events.Scalars("gate/layer_00"))
    assert all(point.value > 0 for point in events.Scalars("scale/layer_01"))
    assert all(point.value > 0 for point in events.Scalars("speed/tokens_per_second"))


def test_tensorboard_shows_where_the_time_goes_and_how_often_the_teacher_was_not_asked(events: Any, run: Run) -> None:
    logged, probed = steps_of(load_config(run.config))
    each_line = ("step", "waiting_for_data", "forward", "backward", "all_reduce", "optimizer", "logging")
    expected = dict.fromkeys(each_line, logged) | {"probe": probed}
    for name, steps in expected.items():
        assert [point.step for point in events.Scalars(f"time/{name}")] == steps, name
    for name in ("snapshot", "samples"):
        assert {point.step for point in events.Scalars(f"time/{name}")} >= {STEPS["first"], sum(STEPS.values())}, name
    parts = sum(events.Scalars(f"time/{name}")[0].value for name in each_line[1:-1])
    assert 0 < parts < events.Scalars("time/step")[0].value
    rates = events.Scalars("teacher/cache_hit_rate")
    assert [point.step for point in rates] == logged
    assert 0 < max(rate.value for rate in rates) < 1


def test_tensorboard_has_the_objective_as_the_sum_of_its_terms(events: Any, run: Run) -> None:
    objective = load_config(run.config).objective.model_dump()
    weights = {"lm": 1.0, "replay_lm": objective["replay_loss_weight"]}
    weights |= {term: objective[f"{term}_weight"] for term in TERMS if term not in ("loss", "lm", "replay_lm")}
    for i, total in enumerate(events.Scalars("loss/loss")):
        parts = sum(weight * events.Scalars(f"loss/{term}")[i].value for term, weight in weights.items())
        assert total.value == pytest.approx(parts, rel=1e-4)


def test_tensorboard_has_the_numbers_of_the_log(events: Any, run: Run) -> None:
    lines = [line for line in run.result.out.splitlines() if re.match(r"\w+ \d+/\d+  loss ", line)]
    assert len(lines) == len(events.Scalars("loss/loss"))
    for tag in ("loss", "lm", "replay_lm", "distill_kl"):
        shown = [float(re.search(rf" {tag} (\S+)", line).group(1)) for line in lines]  # type: ignore[union-attr]
        assert [point.value for point in events.Scalars(f"loss/{tag}")] == pytest.approx(shown, rel=1e-3)


def test_tensorboard_has_the_learning_rate_of_the_phase(events: Any) -> None:
    rates = {point.step: point.value for point in events.Scalars("optimizer/lr")}
    assert rates[STEPS["first"]] == pytest.approx(0.0, abs=1e-9)
    assert rates[sum(STEPS.values())] == pytest.approx(0.0, abs=1e-9)
    assert rates[4] > rates[8] > rates[12] > 0
    assert rates[18] > rates[12], "each phase warms up anew"


def test_tensorboard_has_the_probes_and_the_commits(events: Any, run: Run) -> None:
    _, probed = steps_of(load_config(run.config))
    first = STEPS["first"]
    # Each phase shows the state that it begins with, its probes, and the state that it commits.
    second = [first, *(step for step in probed if step > first), probed[-1]]
    shown = [0, *(step for step in probed if step <= first), first, *second]
    beside = {
        name: events_in(run.directory / "tensorboard" / name) for name in ("phase_start", "limit", "commit_limit")
    }
    for name in ("base", "first", "second"):
        for value in ("loss", "gate", "phase_start", "sparsity", "patch_norm"):
            assert [point.step for point in beside.get(value, events).Scalars(f"probe/{name}/{value}")] == shown
    guarded = {"base": shown, "first": second}
    for name, steps in guarded.items():
        for value in ("reference", "limit", "commit_limit", "rise"):
            assert [point.step for point in beside.get(value, events).Scalars(f"probe/{name}/{value}")] == steps
    limits = beside["limit"]
    assert "probe/second/limit" not in limits.Tags()["scalars"], "no phase after it guards it"
    for loss, limit in zip(events.Scalars("probe/base/reference"), limits.Scalars("probe/base/limit"), strict=True):
        assert limit.value == pytest.approx(loss.value + 0.5, rel=1e-5)
    journal = [json.loads(line) for line in run.entry("journal.jsonl").read_text("utf-8").splitlines()]
    measured = [e for e in journal if e["event"] in ("probe", "commit") or e.get("kind") == "start"]
    losses = [event["sets"]["first"]["loss"] for event in measured]
    assert [p.value for p in events.Scalars("probe/first/loss")] == pytest.approx(losses, rel=1e-6)
    (tag,) = [tag for tag in events.Tags()["tensors"] if tag.startswith("event/commit")]
    texts = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)}
    assert texts.keys() == {STEPS["first"], sum(STEPS.values())}
    assert "first committed" in texts[STEPS["first"]]
    # A vertical mark: three points, the last of which breaks the line, at rising steps, as some loaders want it.
    marks = events_in(run.directory / "tensorboard/commit").Scalars("mark/base/commit")
    assert [point.step for point in marks] == [step - before for step in texts for before in (2, 1, 0)]


def test_a_folder_that_holds_something_is_refused_and_left_as_it_is(toy: Toy, tmp_path: Path) -> None:
    taken = tmp_path / "run"
    taken.mkdir()
    (taken / "thesis.txt").write_text("ten years of work", encoding="utf-8")
    result = in_a_process("train", str(toy.config_file(tmp_path)))
    one_line(result, "output_dir", taken, "neither an empty folder nor a run", "another folder")
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
    assert (taken / "thesis.txt").read_text(encoding="utf-8") == "ten years of work"


def test_mistakes_in_a_config_are_told_in_words(toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    config = toy.config_file(tmp_path)
    one_line(revpatch("train", tmp_path / "none.yaml"), tmp_path / "none.yaml", "no such file")
    one_line(revpatch("train", config, "--set", "optimizer.lr"), "--set", "section.key=value")
    one_line(revpatch("train", config, "--set", "batch.new_blocks=3", "--set", "batch.micro_blocks=1"), "micro_blocks")
    one_line(revpatch("train", config, "--set", "phases.0.shards=nowhere"), "phases.0.shards", "nowhere")
    result = revpatch("train", config, "--set", "optimizer.rate=3", "--set", "seed=x")
    assert result.code == 2
    assert result.err.splitlines()[0] == f"revpatch: config {config}: 2 mistake(s)"
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_the_config_is_said_once_a_machine(
    revpatch: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert revpatch("train", tmp_path / "none.yaml") == Result(2, "", "")


def test_what_one_rank_meets_it_says(revpatch: Call, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    config = toy.config_file(tmp_path, replay={"base": str(tmp_path / "nowhere")})
    found = revpatch("train", config)
    assert found.code == 2
    assert "rank 1 on" in found.err
    assert "nowhere" in found.err


def test_a_developer_can_have_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVPATCH_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["revpatch", "train", str(tmp_path / "none.yaml")])
    with pytest.raises(FileNotFoundError):
        main()


def test_the_start_up_table_shows_paths_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    startup.show({"base": "/models/[bold]x[/bold] :bug:", "trainable parameters": 1234567})
    shown = capsys.readouterr().out
    assert "/models/[bold]x[/bold] :bug:" in shown
    assert "1,234,567" in shown


def test_warnings_of_libraries_are_kept_from_the_person_and_errors_are_not() -> None:
    code = (
        "from revpatch.monitoring.terminal import quiet_libraries; quiet_libraries(); import logging, warnings;"
        "warnings.warn('noise'); warnings.warn('noise', FutureWarning);"
        "names = ['DeepSpeed', 'transformers.x', 'accelerate', 'torch.distributed.run'];"
        "[logging.getLogger(name).warning('noise') for name in names];"
        "[logging.getLogger(name).error('trouble') for name in names]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "noise" not in done.stderr + done.stdout
    assert done.stderr.count("trouble") == 4


def test_log_lines_are_shown_and_written_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("revpatch")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "level", log.level)
    log_to(tmp_path / "train.log")
    words = "rolled back to [b]x[/b] :bug: " + "long " * 60
    log.info(words)
    assert capsys.readouterr().out == words + "\n"
    assert (tmp_path / "train.log").read_text(encoding="utf-8").endswith(f" {words}\n")
    for handler in log.handlers:
        handler.close()


# Help


def test_help_lists_the_commands() -> None:
    result = in_a_process("--help")
    assert result.code == 0
    assert result.err == ""
    for command in ("train", "generate", "shards", "ledger"):
        assert re.search(rf"\b{command}\b", result.out)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--help"], ["--set", "config"]),
        (
            ["generate", "--help"],
            [
                "--patch",
                "--patch-ckpt",
                "--prompt",
                "--prompt-file",
                "--gate",
                "--compare",
                "--json",
                "--greedy",
                "--top-k",
                "--num-samples",
                "--seed",
                "--base",
            ],
        ),
        (["shards", "build", "--help"], ["--tokenizer", "--block-size", "--out", "--holdout"]),
        (["ledger", "log", "--help"], ["run"]),
        (["ledger", "verify", "--help"], ["run"]),
    ],
)
def test_each_command_explains_itself(
    revpatch: Call, arguments: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = revpatch(*arguments)
    assert result.code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.out)
    assert [word for word in words if word not in plain] == []
    assert "local" + "_rank" not in plain


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["train"], ["generate", "--prompt", "x"], ["generate", "--patch", "x"], ["ledger", "log"]],
)
def test_an_incomplete_command_ends_with_2_and_its_usage(revpatch: Call, arguments: list[str]) -> None:
    result = revpatch(*arguments)
    assert result.code == 2
    assert "Usage" in result.err


# Shards


def test_shards_are_built_from_files(toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the patch learns what a stream brings\n\n" * 40, encoding="utf-8")
    lines = tmp_path / "b.jsonl"
    lines.write_text("".join(json.dumps({"body": f"it forgets little {i}"}) + "\n" for i in range(60)), "utf-8")
    out = tmp_path / "shards"
    arguments = ["shards", "build", text, "--tokenizer", toy.base, "--block-size", "8"]
    result = revpatch(*arguments, "--out", out, "--licence", "mine", "--note", "toy")
    assert result.code == 0, result
    manifest = Manifest.read(out)
    assert (manifest.block_size, manifest.licence, manifest.note) == (8, "mine", "toy")
    assert f"{manifest.blocks} blocks of 8 tokens from {manifest.documents} documents in 1 shards" in result.out
    both = tmp_path / "held"
    result = revpatch(
        *("shards", "build", lines, "--text-column", "body", "--tokenizer", toy.base, "--block-size", "4"),
        *("--out", both, "--holdout", "0.3", "--max-tokens", "64"),
    )
    assert result.code == 0, result
    assert Manifest.read(both).tokens == 64
    assert Manifest.read(tmp_path / "held_probe").split == "probe"


def test_mistakes_in_building_are_told_in_words(toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    text = tmp_path / "a.txt"
    text.write_text("the patch learns", encoding="utf-8")
    out = tmp_path / "out"

    def build(source: Path, tokenizer: Path, *more: str) -> Result:
        return revpatch("shards", "build", source, "--tokenizer", tokenizer, "--out", out, *more)

    one_line(build(tmp_path / "none.txt", toy.base), tmp_path / "none.txt", "no such file")
    one_line(build(text, tmp_path / "none"), "--tokenizer", tmp_path / "none")
    one_line(build(text, toy.base, "--block-size", "4096"), "not one block of 4096", "lower block_size")
    mute = tmp_path / "mute"
    mute.mkdir()
    (mute / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    one_line(build(text, mute), "tokenizer", mute, "tokenizer.json")
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("x", encoding="utf-8")
    one_line(build(text, toy.base, "--block-size", "2"), out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


# Ledger


def test_the_log_tells_the_run(run: Run, revpatch: Call) -> None:
    result = revpatch("ledger", "log", run.directory)
    assert (result.code, result.err) == (0, "")
    for phase, steps in STEPS.items():
        assert f"{phase}  phase_start" in result.out
        assert f"{phase} step {steps}  commit entry" in result.out
    assert "run_end" in result.out
    assert len(re.findall(r"step \d+  probe", result.out)) == 5


def test_verify_is_content_with_a_whole_ledger_and_not_with_a_flipped_bit(
    run: Run, revpatch: Call, tmp_path: Path
) -> None:
    result = revpatch("ledger", "verify", run.directory)
    assert (result.code, result.err) == (0, "")
    assert "the chain holds" in result.out
    copied = copy_of(run, tmp_path)
    entry = copied / "ledger/000_first_commit.pt"
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)
    result = revpatch("ledger", "verify", copied)
    assert result.code == 1
    assert "000_first_commit.pt" in result.out
    assert "sha256" in result.out


def test_the_base_of_a_trained_run_is_that_of_its_start_and_its_end(run: Run, revpatch: Call) -> None:
    told = revpatch("ledger", "verify", run.directory, "--removal", "--json").json()["removal"]
    assert [noted["event"] for noted in told["noted"]] == ["run", "run_end"]
    assert all(noted["same_weights"] for noted in told["noted"]) and told["ok"]
    journal = Journal(run.directory / "ledger/journal.jsonl", readonly=True).records()
    start, end = (event["bare_base"] for event in journal if "bare_base" in event)
    assert start == end


def test_training_on_does_not_set_a_made_patch_aside(run: Run, revpatch: Call, tmp_path: Path) -> None:
    copied = copy_of(run, tmp_path)
    (tmp_path / "alone").mkdir()
    shutil.copy(run.entry("000_first_commit.pt"), tmp_path / "alone/patch.pt")
    assert revpatch("ledger", "import", tmp_path / "alone/patch.pt", copied).code == 0
    before = Journal(copied / "ledger/journal.jsonl", readonly=True).head
    loaded = load_config(run.config, [*run.overrides, f"output_dir={copied}"])
    standing = stand(loaded, fresh=False, overwrite=False)  # nothing is left to train: nothing is set aside
    standing.lock.close()
    third = loaded.phases[0].model_copy(update={"name": "third"})
    with pytest.raises(
        ConfigError, match=r"would set aside 002_first_commit\.pt.*ledger restore \S.*@002_first_commit"
    ):
        stand(loaded.model_copy(update={"phases": [*loaded.phases, third]}), fresh=False, overwrite=False)
    assert Journal(copied / "ledger/journal.jsonl", readonly=True).head == before


def test_a_folder_that_is_no_run(revpatch: Call, tmp_path: Path) -> None:
    one_line(revpatch("ledger", "log", tmp_path), tmp_path, "not there")
    assert revpatch("ledger", "verify", tmp_path).code == 1


def copy_of(run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run.directory, tmp_path / "copied"))


# Text


@pytest.fixture
def text(run: Run, revpatch: Call) -> Callable[..., str]:
    """text(*options): what is written after the prompt by the last commit, and nothing else is."""

    def write(*options: str) -> str:
        result = revpatch(
            "generate",
            "--patch",
            run.entry("001_second_commit.pt"),
            "--prompt",
            PROMPT,
            "--max-new-tokens",
            "16",
            *options,
        )
        assert (result.code, result.err) == (0, ""), result
        return result.out

    return write


def base_writes(toy: Toy, **options: Any) -> str:
    """The base's own text, without a patch."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy.base), AutoTokenizer.from_pretrained(toy.base)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    torch.manual_seed(options.pop("seed", 0))
    out = model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, pad_token_id=0, **options)
    decoded: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return decoded + "\n"


def test_gate_off_is_the_bases_own_text(toy: Toy, text: Callable[..., str]) -> None:
    plain = ["--gate", "off", "--repetition-penalty", "1", "--no-repeat-ngram", "0"]
    assert text(*plain, "--greedy") == base_writes(toy, do_sample=False)
    drawn = base_writes(toy, do_sample=True, temperature=0.7, top_p=0.8, top_k=0, seed=5)
    assert text(*plain, "--temperature", "0.7", "--top-p", "0.8", "--seed", "5") == drawn
    controlled = base_writes(toy, do_sample=False, repetition_penalty=1.15, no_repeat_ngram_size=4)
    assert text("--gate", "off", "--greedy") == controlled


def test_the_patch_speaks_when_it_is_on(text: Callable[..., str]) -> None:
    learned, held_open, off = (text("--greedy", "--gate", gate) for gate in ("learned", "on", "off"))
    assert len({learned, held_open, off}) > 1
    assert learned != off
    assert text("--greedy") == learned, "learned is the default"
    assert all(written.startswith(PROMPT) for written in (learned, held_open, off))


def test_the_seed_decides_what_is_drawn(text: Callable[..., str]) -> None:
    drawn = [text("--seed", seed, "--temperature", "2") for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_the_other_name_of_the_option_and_safetensors_give_the_same(
    run: Run, text: Callable[..., str], revpatch: Call, tmp_path: Path
) -> None:
    entry = run.entry("001_second_commit.pt")
    exported = tmp_path / "patch.safetensors"
    exported.write_bytes(serialise(*read_entry(entry), suffix=".safetensors"))
    for path in (entry, exported):
        result = revpatch("generate", "--patch-ckpt", path, "--prompt", PROMPT, "--max-new-tokens", "16", "--greedy")
        assert (result.code, result.out) == (0, text("--greedy")), result


def test_generating_in_a_process_of_its_own_prints_the_text_alone(run: Run, text: Callable[..., str]) -> None:
    result = in_a_process(
        *("generate", "--patch", str(run.entry("001_second_commit.pt")), "--prompt", PROMPT), "--max-new-tokens", "16"
    )
    assert result == Result(0, text(), "")


def test_text_is_printed_to_the_letter(run: Run, revpatch: Call) -> None:
    prompt = ":bug: [bold]x[/bold]\ta\\b"
    result = revpatch(
        *("generate", "--patch", run.entry("001_second_commit.pt"), "--prompt", prompt, "--max-new-tokens", "1"),
        "--greedy",
    )
    assert result.code == 0
    assert result.out.startswith(prompt)


def test_no_more_is_written_than_the_model_has_room_for(run: Run, toy: Toy, revpatch: Call) -> None:
    prompt = " ".join(["the"] * (POSITIONS - 2))
    tokens = len(toy.tokenizer(prompt).input_ids)
    assert tokens == POSITIONS - 2
    command = ["generate", "--patch", run.entry("001_second_commit.pt"), "--prompt", prompt, "--greedy"]
    result = revpatch(*command)
    assert (result.code, result.err) == (0, ""), result
    assert len(result.out) > len(prompt)
    one_line(revpatch(*command, "--max-new-tokens", "50"), POSITIONS, "at most 2", "--max-new-tokens")


def test_a_run_or_an_entry_of_it_may_be_named(run: Run, text: Callable[..., str], revpatch: Call) -> None:
    written = {}
    for reference in ("", "@001_second_commit", "@commit", "@commit~1", "@000_first_commit", "@start~1"):
        result = revpatch(
            *("generate", "--patch", f"{run.directory}{reference}", "--prompt", PROMPT, "--max-new-tokens", "16"),
            "--greedy",
        )
        assert (result.code, result.err) == (0, ""), result
        written[reference] = result.out
    assert written[""] == written["@001_second_commit"] == written["@commit"] == text("--greedy")
    assert written["@commit~1"] == written["@000_first_commit"] != written[""]
    assert written["@start~1"] == text("--greedy", "--gate", "off"), "a patch begins as the identity"


def test_several_prompts_and_samples(run: Run, text: Callable[..., str], revpatch: Call, tmp_path: Path) -> None:
    """Each prompt's texts are what they are alone; a sample is told from another."""
    file = tmp_path / "prompts.txt"
    file.write_text("rusty gates\n\nkettle\n", encoding="utf-8")
    command = [
        "generate",
        "--patch",
        run.directory,
        "--prompt",
        PROMPT,
        "--prompt-file",
        file,
        "--max-new-tokens",
        "16",
    ]
    result = revpatch(*command)
    assert (result.code, result.err) == (0, "")
    first, rest = result.out.removeprefix("[prompt 1 of 3, sample 1 of 1]\n").split("[prompt 2 of 3, sample 1 of 1]\n")
    second, third = rest.split("[prompt 3 of 3, sample 1 of 1]\n")
    assert first == text()
    assert second.startswith("rusty gates")
    assert third.startswith("kettle")
    result = revpatch(*command, "--json", "--num-samples", "2", "--temperature", "2")
    told = json.loads(result.out)
    assert [(t["prompt"], t["sample"]) for t in told["texts"]] == [
        (prompt, sample) for prompt in (PROMPT, "rusty gates", "kettle") for sample in (1, 2)
    ]
    assert told["texts"][0]["text"] != told["texts"][1]["text"]
    assert all(t["text"].startswith(t["prompt"]) and t["gate"] == "learned" for t in told["texts"])
    shown = revpatch(*command, "--num-samples", "2", "--temperature", "2").out
    heads = [f"[prompt {prompt} of 3, sample {sample} of 2]" for prompt in (1, 2, 3) for sample in (1, 2)]
    assert shown == "".join(f"{head}\n{t['text']}\n" for head, t in zip(heads, told["texts"], strict=True))


def test_top_k_of_one_is_greedy(text: Callable[..., str]) -> None:
    assert text("--top-k", "1", "--temperature", "3") == text("--greedy")
    assert text("--top-k", "300", "--seed", "3") == text("--seed", "3")


def test_off_and_learned_side_by_side(text: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = text("--compare", "--greedy")
    assert re.search(r"off\s+. learned", shown)
    columns = [[cell.strip() for cell in line.split("\u2502")[1:3]] for line in shown.splitlines() if "\u2502" in line]
    assert {len(row) for row in columns} == {2}
    off, learned = ("".join("".join(column).split()) for column in zip(*columns, strict=True))
    assert off == "".join(text("--greedy", "--gate", "off").split())
    assert learned == "".join(text("--greedy").split())
    told = json.loads(text("--compare", "--greedy", "--json"))
    assert [t["gate"] for t in told["texts"]] == ["off", "learned"]
    assert [t["text"] + "\n" for t in told["texts"]] == [
        text("--greedy", "--gate", gate) for gate in ("off", "learned")
    ]


def test_a_text_is_shown_while_it_is_written(run: Run, monkeypatch: pytest.MonkeyPatch, revpatch: Call) -> None:
    """Some of it is on the terminal before the last token is drawn."""
    from transformers import TextStreamer

    seen: list[tuple[str, bool]] = []
    show = TextStreamer.on_finalized_text

    def showing(self: TextStreamer, text: str, stream_end: bool = False) -> None:
        seen.append((text, stream_end))
        show(self, text, stream_end)

    monkeypatch.setattr(TextStreamer, "on_finalized_text", showing)
    command = ["generate", "--patch", run.directory, "--prompt", PROMPT, "--max-new-tokens", "24"]
    result = revpatch(*command)
    assert len([text for text, _ in seen if text]) > 3
    assert "".join(text for text, _ in seen) + "\n" == result.out
    seen.clear()
    revpatch(*command, "--num-samples", "2")
    assert [end for _, end in seen].count(True) == 2, "several are shown as they are written too"
    seen.clear()
    assert json.loads(revpatch(*command, "--json").out)["texts"][0]["text"] + "\n" == result.out
    assert not seen


def test_a_page_shows_what_each_commit_writes(run: Run, text: Callable[..., str], tmp_path: Path) -> None:
    plain = ["--repetition-penalty", "1.15", "--no-repeat-ngram", "4", "--greedy"]
    tool, page = Path(__file__).resolve().parent.parent / "tools/sample_outputs.py", tmp_path / "page.md"
    command = [sys.executable, str(tool), str(run.directory), "--prompt", PROMPT, "--max-new-tokens", "16"]
    subprocess.run([*command, "--out", str(page)], check=True, capture_output=True)
    told = page.read_text(encoding="utf-8")
    parts = re.split(r"\*\*(.+)\*\*\n\n", told)
    assert parts[1::2] == ["the base, without a patch", "000_first_commit", "001_second_commit"]
    shown = ["".join(part.split()) for part in parts[2::2]]
    assert shown[0] == "".join(text(*plain, "--gate", "off").split())
    assert shown[2] == "".join(text(*plain).split())
    assert f"## {PROMPT}" in told
    done = subprocess.run([*command[:2], str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def test_mistakes_in_generating_are_told_in_words(run: Run, toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    entry = run.entry("001_second_commit.pt")

    def refused(*words: object, patch: Path = entry, prompt: str = PROMPT, more: tuple[str | Path, ...] = ()) -> None:
        one_line(revpatch("generate", "--patch", patch, "--prompt", prompt, *more), *words)

    refused("--prompt is empty", prompt="")
    long = " ".join(["the"] * POSITIONS)
    refused("--prompt", POSITIONS, "tokens", "cut the prompt", prompt=long)
    refused("--prompt", "cut the prompt", prompt=long * 20)
    refused("--gate 'half'", "learned, on or off", more=("--gate", "half"))
    refused("--compare", "leave out --gate on", more=("--gate", "on", "--compare"))
    refused("--greedy", "all 3 samples", "--num-samples", more=("--greedy", "--num-samples", "3"))
    for option in ("--temperature", "--top-p", "--top-k", "--seed"):
        refused("--greedy draws nothing", option, more=("--greedy", option, "1"))
    blank = tmp_path / "blank.txt"
    blank.write_text("\n \n", encoding="utf-8")
    refused("--prompt-file", blank, "a prompt a line", more=("--prompt-file", blank))
    refused("--prompt-file", entry, "no UTF-8", more=("--prompt-file", entry))
    refused(tmp_path / "nowhere.txt", more=("--prompt-file", tmp_path / "nowhere.txt"))
    refused(tmp_path / "none.pt", "no such file", patch=tmp_path / "none.pt")
    refused(tmp_path, "a folder without ledger", patch=tmp_path)
    other = save_base(tmp_path / "other", toy.tokenizer, seed=1)
    refused(entry, "sha256", other, "--base", more=("--base", other))
    refused(tmp_path / "gone", "--base", more=("--base", tmp_path / "gone"))
    cut = tmp_path / "cut.pt"
    cut.write_bytes(entry.read_bytes()[:-1000])
    refused(cut, "truncated or damaged", patch=cut)
    script = tmp_path / "script.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(script))
    refused(script, "a TorchScript archive", "Nothing in it was run", patch=script)
    tensors, metadata = read_entry(entry)
    for number, (key, value) in enumerate((("dtype", "nonsense"), ("dtype", 16), ("sha256", 7), ("model", ["x"]))):
        wrong = tmp_path / f"wrong{number}.pt"
        write_entry(wrong, tensors, {**metadata, "base": {**metadata["base"], key: value}})
        refused(wrong, f"base.{key}", repr(value), patch=wrong)
    torn = Path(shutil.copytree(toy.base, tmp_path / "torn"))
    (torn / "model.safetensors").write_bytes((toy.base / "model.safetensors").read_bytes()[:-1000])
    refused(torn, "can't be loaded", "--base", more=("--base", torn))
    empty = tmp_path / "empty.pt"
    empty.touch()
    refused(empty, "not a revpatch entry", patch=empty)
    foreign = tmp_path / "foreign.pt"
    torch.save({"a": torch.ones(2)}, foreign)
    refused(foreign, "not a revpatch entry", patch=foreign)
    config = run.directory / "config.yaml"
    refused(config, patch=config)


def test_an_entry_that_was_changed_in_its_ledger_is_refused(run: Run, revpatch: Call, tmp_path: Path) -> None:
    entry = copy_of(run, tmp_path) / "ledger/001_second_commit.pt"
    tensors, metadata = read_entry(entry)
    name = next(iter(tensors))
    entry.write_bytes(serialise({**tensors, name: tensors[name] + 1}, metadata))
    one_line(revpatch("generate", "--patch", entry, "--prompt", "x"), entry, "not the file that was recorded", "sha256")
    alone = tmp_path / entry.name
    alone.write_bytes(entry.read_bytes())
    assert revpatch("generate", "--patch", alone, "--prompt", "x", "--greedy").code == 0, "it is sound by itself"
    stray = entry.with_name("stray.pt")
    stray.write_bytes(entry.read_bytes())
    one_line(revpatch("generate", "--patch", stray, "--prompt", "x"), "stray.pt", "is not in")


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_code_in_a_patch_file_is_refused_and_not_run(revpatch: Call, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    bare, packed = tmp_path / "bare.pt", tmp_path / "packed.pt"
    bare.write_bytes(pickle.dumps(Bomb(mark)))
    torch.save({"header": "{}", "tensors": Bomb(mark)}, packed)
    for path in (bare, packed):
        one_line(revpatch("generate", "--patch", path, "--prompt", "x"), path, "executed" if path == packed else "run")
        assert not mark.exists()
    pickle.loads(bare.read_bytes())  # noqa: S301  (the bomb works)
    assert mark.exists()
