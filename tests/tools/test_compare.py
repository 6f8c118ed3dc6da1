"""The comparison: the same blocks for all, a store that survives, curves and figures that are right, true peers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def a_tier(**changes: Any) -> Any:
    """Two phases of three steps on bundled data."""
    from compare_tiers import Tier

    demo = "shards/demo"
    tier = Tier(
        name="test",
        base="shards/demo_base",
        corpora={name: (f"{demo}/{name}", f"{demo}/{name}_probe") for name in ("jargon", "devil")},
        own=(f"{demo}/sotu", f"{demo}/sotu_probe"),
        old={"sotu": f"{demo}/sotu_probe"},
        old_replay=f"{demo}/sotu",
        never={"scrambled": f"{demo}/scrambled_probe"},
        steps=3,
        warmup=1,
        checks=1,
        main_blocks=2,
        other_blocks=2,
    )
    return replace(tier, **changes)


def a_result(lr: float, points: list[tuple[float, float]], method: str = "ours", seed: int = 0, **more: Any) -> Any:
    """A made-up cell of one phase: (learned, rise) at each checkpoint."""
    checks = [
        {"phase": 0, "step": step, "losses": {"new": 5.0 - x, "own": 2.0 + y, "python": 3.0 + y}}
        for step, (x, y) in enumerate([(0.0, 0.0), *points])
    ]
    gates = [{"new": [0.9, 0.8], "own": [0.1, 0.2], "python": [0.1, 0.85]}]
    key = {"method": method, "lr": lr, "seed": seed, "knobs": {}}
    costs = {"seconds_a_step": 1.0, "trainable": 10, "bytes": 40, "flops_a_new_token": 6}
    return {"key": key, "checks": checks, "block_gates": gates, "diverged": False, "seconds": 1.0, **costs, **more}


# the same blocks


@pytest.mark.parametrize("joint", ["no", "yes"])
def test_peers_read_the_blocks_that_the_product_trains_on(
    joint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, in every step of every phase, what is replayed of an earlier phase included."""
    from compare_cells import Cell
    from compare_data import Course, config_of

    from revpatch.train.batches import Batches
    from revpatch.train.run import train_run

    trained: list[tuple[torch.Tensor, Any]] = []
    to_device = Batches.to_device

    def watched(self: Batches, micro_batches: Any) -> Any:
        found = list(micro_batches)
        trained.extend((part.new, part.replay) for part in found)
        return to_device(self, found)

    monkeypatch.setattr(Batches, "to_device", watched)
    knobs = (("joint", joint),)
    train_run(config_of(a_tier(), Cell("ours", 1e-3, 7, knobs), tmp_path / "run"))
    for method in ("lora+replay+kl", "full+replay"):
        peers = config_of(a_tier(), Cell(method, 4e-3, 7, knobs), tmp_path / method)
        course = Course(peers, tmp_path / f"replay of {method}")
        steps = [step for index in range(len(peers.phases)) for step in course.steps(index)]
        assert len(steps) == len(trained) == 6
        for (new, replay, keys), (of_ours, replayed) in zip(steps, trained, strict=True):
            assert torch.equal(new, of_ours)
            assert torch.equal(replay, replayed)
            assert len(keys) == len(replay) == 2
    alone = config_of(a_tier(), Cell("lora", 4e-3, 7, knobs), tmp_path / "alone")
    first, replay, _ = next(Course(alone, tmp_path / "none").steps(0))
    assert torch.equal(first, trained[0][0])
    assert replay is None


# peers


def a_base(kind: str) -> Any:
    """The bundled base, or a small one of Llama's family: OFT and OSF know no layers of GPT-2's kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from revpatch.base import load_base

    torch.manual_seed(0)
    if kind == "gpt2":
        return load_base(str(ROOT / "shards/demo_base"), None, torch.float32)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).eval()


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "gpt2") for family in ("lora", "full", "shadow")),
        *((family, "llama") for family in ("lora", "full", "oft", "osf", "shadow")),
    ],
)
def test_a_peer_begins_as_the_bare_base_and_learns(family: str, kind: str, tmp_path: Path) -> None:
    from compare_cells import Cell
    from compare_data import Course, config_of
    from compare_peers import PEERS, loss_of

    from revpatch.step.frozen_base import last_hidden_states

    config = config_of(a_tier(), Cell(f"{family}+replay+kl", 1e-3), tmp_path)
    student = PEERS[family](a_base(kind).requires_grad_(False), config)
    new, replay, keys = next(Course(config, tmp_path).steps(0))
    base = a_base(kind)
    with torch.no_grad():
        before, expected = student.hidden(new), last_hidden_states(base, new)
    torch.testing.assert_close(before, expected, rtol=1e-3, atol=1e-3)
    loss = loss_of(student, None, new, replay, keys, 1.0)
    for _ in range(2):  # at the first step LoRA's first matrices have no gradient yet
        loss = loss_of(student, None, new, replay, keys, 1.0)
        loss.backward()
        with torch.no_grad():
            for parameter in student.learns:
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
                    parameter.grad = None
    with torch.no_grad():
        assert float(loss_of(student, None, new, replay, keys, 1.0)) < float(loss)
        assert not torch.equal(student.hidden(new), expected)
        if family in ("lora", "oft"):  # the others' switch is none, or needs the adapter's own forward pass
            with student.adapter.disable_adapter():
                assert torch.equal(student.hidden(new), expected)


def test_lora_trains_as_much_as_ours_within_a_tenth(tmp_path: Path) -> None:
    from compare_cells import Cell
    from compare_data import config_of
    from compare_peers import make_student, trainable_of_ours

    cell = Cell("lora", 1e-3)
    config = config_of(a_tier(), cell, tmp_path)
    student = make_student(cell, config)
    learns = sum(parameter.numel() for parameter in student.learns)
    assert learns == pytest.approx(trainable_of_ours(student.model, config), rel=0.1)


@pytest.mark.parametrize("family", ["lora", "full"])
def test_a_peers_loss_is_the_textbooks(family: str, tmp_path: Path) -> None:
    """LM of new and replayed blocks, and the KL to the model as it was, by plain logits."""
    import torch.nn.functional as F
    from compare_cells import Cell
    from compare_data import Course, config_of
    from compare_peers import Teacher, frozen, loss_of, make_student

    cell = Cell(f"{family}+replay+kl", 1e-3)
    config = config_of(a_tier(), cell, tmp_path)
    student = make_student(cell, config)
    teacher = Teacher(student, frozen(student), "none")
    new, replay, keys = next(Course(config, tmp_path).steps(0))
    with torch.no_grad():
        for number, parameter in enumerate(student.learns):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter += 0.02 * noise
        found = loss_of(student, teacher, new, replay, keys, 3.0)
        again = loss_of(student, teacher, new, replay, keys, 3.0)

        def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
            return F.log_softmax(model(tokens).logits[:, :-1].flatten(0, 1).double(), dim=-1)

        lm = [F.nll_loss(logits(student.model, tokens), tokens[:, 1:].flatten()) for tokens in (new, replay)]
        said, target = logits(student.model, replay), logits(teacher.student.model, replay)
        kl = F.kl_div(said, target, log_target=True, reduction="batchmean")
    assert float(kl) > 1e-3
    torch.testing.assert_close(found.double(), sum(lm) + 3 * kl, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, again), "what the teacher said is kept"


# curves


def test_forgetting_at_equal_learning_is_read_between_checkpoints() -> None:
    from compare_curves import curves_of, learned_within, most_learned, rise_at

    slow, fast = a_result(1e-3, [(0.5, 0.01), (1.0, 0.02)]), a_result(4e-3, [(1.0, 0.10), (2.0, 0.40)])
    curves = curves_of([fast, slow], ["new"], "own")
    assert most_learned(curves) == pytest.approx(2.0)
    assert rise_at(curves, 0.75) == pytest.approx(0.015)
    assert rise_at(curves, 1.5) == pytest.approx(0.21), "between the rates' ends, below the fast one's own line"
    assert rise_at(curves[:2], 1.5) == pytest.approx(0.25)
    assert rise_at(curves, 2.5) is None
    assert learned_within(curves, 0.02) == pytest.approx(1.0)
    assert learned_within(curves[:2], 0.25) == pytest.approx(1.5)


def test_a_cell_that_diverged_is_no_part_of_a_curve() -> None:
    from compare_curves import curves_of

    assert curves_of([{"key": {"lr": 1.0}, "diverged": True, "checks": []}], ["new"], "own") == []


def test_auc_counts_ties_half() -> None:
    from compare_curves import auc

    assert auc([0.9, 0.8], [0.1, 0.2]) == 1.0
    assert auc([0.9, 0.8], [0.1, 0.85]) == 0.75
    assert auc([0.5], [0.5]) == 0.5


def test_figures_say_what_was_asked_and_whether_it_holds() -> None:
    from compare_figures import figures_of

    tier = a_tier(corpora={"new": ("", "")}, old={"python": ""}, never={})
    rival = a_result(4e-3, [(1.0, 0.1), (1.8, 0.2)], "lora+replay+kl")
    rows = {row.name: row for row in figures_of(tier, [a_result(6e-3, [(1.0, 0.01), (2.0, 0.03)]), rival])}
    ratio = rows["own text's rise at equal learning, ours / lora+replay+kl, after new"]
    assert ratio.measured == pytest.approx(0.026 / 0.2, rel=1e-3)
    assert ratio.holds
    assert rows["learned at no more forgetting of own text, ours / best lora+replay+kl, after new"].measured == (
        pytest.approx(2.0 / 1.8, rel=1e-3)
    )
    assert rows["gate's AUC, new against own"].measured == 1.0
    assert not rows["gate's AUC, new against python"].holds
    plain = rows["own's rise at equal learning, ours / lora without replay, after new"]
    assert (plain.measured, plain.holds) == (None, False)


def test_an_old_set_that_falls_is_named_and_not_counted() -> None:
    from compare_figures import figures_of

    tier = a_tier(corpora={"new": ("", "")}, old={"python": ""}, never={})
    both = [a_result(6e-3, [(1.0, -0.1)]), a_result(4e-3, [(1.0, -0.2)], "lora+replay+kl")]
    rows = {row.name: row for row in figures_of(tier, both)}
    assert (
        rows["old sets that fall under lora+replay+kl, not counted as forgotten, after new"].measured == "own, python"
    )
    assert rows["own text's rise at equal learning, ours / lora+replay+kl, after new"].measured is None


# what is run


def test_a_sweep_is_widened_until_its_best_is_not_at_an_edge() -> None:
    from compare_plan import sweep

    tier = a_tier(corpora={"new": ("", "")})
    done: dict[float, Any] = {}

    def find(cell: Any) -> Any:
        return done.get(cell.lr)

    cells, best = sweep(tier, "ours", find)
    assert ([cell.lr for cell in cells], best) == ([0.003, 0.006, 0.012, 0.024], [])
    for lr, learned in ((0.003, 1.2), (0.006, 1.1), (0.012, 1.0), (0.024, 0.9)):
        done[lr] = a_result(lr, [(learned, lr)])
    cells, best = sweep(tier, "ours", find)
    assert (cells[0].lr, best) == (0.0015, [])
    done[0.0015] = a_result(0.0015, [(1.15, 0.1)])
    cells, best = sweep(tier, "ours", find)
    assert (len(cells), [cell.lr for cell in best]) == (5, [0.003])
    done[0.0015] = {"key": {"lr": 0.0015}, "diverged": True, "checks": []}
    assert sweep(tier, "ours", find)[1] == best


def test_what_matters_most_comes_first() -> None:
    from compare_plan import plan

    cells = plan(a_tier(), lambda cell: None, short=True, also=["ours[sidecar.bottleneck=8]"])
    order = list(dict.fromkeys(cell.variant for cell in cells))
    assert order[:3] == ["ours", "lora+replay+kl", "ours[sidecar.bottleneck=8]"]
    assert cells[8].overrides == ["sidecar.bottleneck=8"]


def test_a_knob_is_part_of_the_key_and_of_the_products_config(tmp_path: Path) -> None:
    from compare_cells import Cell, digest_of
    from compare_data import config_of, fingerprint, key_of

    tier, knobs = a_tier(), (("sidecar.bottleneck", "8"),)
    facts = fingerprint(tier)
    cells = [
        Cell("ours", 1e-3),
        Cell("ours", 2e-3),
        Cell("ours", 1e-3, 1),
        Cell("ours", 1e-3, 0, knobs),
        Cell("ours", 1e-3, 0, (("replay", "none"),)),
        Cell("lora", 1e-3),
    ]
    keys = {digest_of(key_of(tier, cell, facts)) for cell in cells}
    keys.add(digest_of(key_of(replace(tier, steps=4), cells[0], facts)))
    assert len(keys) == len(cells) + 1
    assert config_of(tier, cells[3], tmp_path).sidecar.bottleneck == 8
    assert config_of(tier, cells[4], tmp_path).batch.replay_blocks == 0


# the store


def test_a_store_drops_a_line_that_was_cut_short_and_keeps_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from compare_cells import Store

    file = tmp_path / "deep/cells.jsonl"
    store = Store(file)
    store.add(a_result(1e-3, [(1.0, 0.1)]))
    store.add(a_result(2e-3, [(1.0, 0.1)]))
    file.write_bytes(file.read_bytes()[:-20])
    again = Store(file)
    assert "the last line was cut short" in capsys.readouterr().err
    assert again.get(a_result(1e-3, [])["key"]) is not None
    assert again.get(a_result(2e-3, [])["key"]) is None
    again.add(a_result(2e-3, [(1.0, 0.1)]))
    assert len(Store(file).found) == 2
    file.write_text("{}\n")
    with pytest.raises(ValueError, match=r"cells\.jsonl, line 1: expected a finished cell"):
        Store(file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "--only=("], "unterminated"),
        (["tiny", "--also=ours["], "expected a method like"),
        (["custom"], "expected --base FOLDER"),
        (["custom", "--corpus=x"], "expected NAME=FILE"),
        (["real", "--data=nowhere"], "tools/real_tier.py --folder nowhere"),
    ],
)
def test_a_call_that_can_not_be_made_is_refused_in_a_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import compare

    with pytest.raises(SystemExit) as raised:
        compare.main(words)
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_smallest_comparison_ends_with_its_table_and_is_not_run_twice(tmp_path: Path) -> None:
    store, file, image = tmp_path / "cells.jsonl", tmp_path / "figures.json", tmp_path / "curves.png"
    command = [sys.executable, str(TOOLS / "compare.py"), "tiny", "--smoke", f"--store={store}", f"--json={file}"]
    command += [f"--plot={image}", f"--folder={tmp_path}"]
    first = subprocess.run([*command, "--only=^ours"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "compare.py: 1 of 1, ours lr=0.006 seed=0" in first.stderr
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 of 1, lora+replay+kl lr=0.004 seed=0" in done.stderr, "and not ours again"
    assert "lora+replay+kl" in done.stdout
    figures = {figure["name"]: figure for figure in json.loads(file.read_text())["figures"]}
    bare = [
        figures[f"loss of jargon, {method}, the unpatched base"]["measured"] for method in ("ours", "lora+replay+kl")
    ]
    assert bare[0] == pytest.approx(bare[1], rel=1e-3)
    assert figures["gate's AUC, jargon against own"]["asked"] == ">= 0.98"
    assert image.stat().st_size > 1000
    assert all(json.loads(line)["flops_a_new_token"] > 1e6 for line in store.read_text().splitlines())
