"""The measuring tools: what they count is right, and the benchmark refuses to time a wrong step."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


def workload(dtype: torch.dtype = torch.float32) -> Any:
    from bench_workload import Workload

    return Workload("tiny", 4, 2, 64, dtype)


@pytest.mark.parametrize("cached", [False, True])
def test_the_arithmetic_past_one_machine_is_what_torch_counts(monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    import scale_model
    from bench_measure import flops_of
    from bench_ours import Ours

    for name, value in {"VOCABULARY": 211, "BLOCK": 64, "BOTTLENECK": 4}.items():
        monkeypatch.setattr(scale_model, name, value)
    ours = Ours(workload(), cached=cached)
    work = scale_model.Shape(2, 32).step(4, 2, cached)
    assert flops_of(ours) == pytest.approx(work.total, rel=0.02)
    assert scale_model.Shape(2, 32).trained == sum(p.numel() for p in ours.patch.parameters())
    machine = scale_model.Machine(peak=100.0, float32=1.0, efficiency=0.5, bus=1.0, latency=0.0)
    assert machine.seconds(work) == pytest.approx((work.base / 50 + work.sidecars / 0.5) / 1e12)


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench_oracle import check
    from bench_ours import Ours

    ours = Ours(workload())
    assert check("ours", ours) < 1e-5
    right = ours.objective.forward
    monkeypatch.setattr(ours.objective, "forward", lambda *args: right(*args)._replace(loss=1.001 * right(*args).loss))
    with pytest.raises(SystemExit, match="No times are given"):
        check("ours", ours)


def test_terms_in_one_anothers_place_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench_oracle import check
    from bench_ours import Ours

    ours = Ours(workload())
    right = ours.weigh
    monkeypatch.setattr(ours, "weigh", lambda replay, kl: right(kl, replay))
    with pytest.raises(SystemExit, match="No times are given"):
        check("ours", ours)


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_cache_that_gives_back_other_states_is_seen(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    from bench_oracle import check
    from bench_ours import Ours

    ours = Ours(workload(), cached=True)
    assert check("ours-cached", ours) < 1e-5
    get = ours.teacher.cache.get
    ours.teacher.forget()

    def other(*args: Any) -> Any:
        found = get(*args)
        return None if found is None else tuple(wrong * states for states in found)

    monkeypatch.setattr(ours.teacher.cache, "get", other)
    with pytest.raises(SystemExit, match="No times are given"):
        check("ours-cached", ours)


def test_a_step_that_fills_the_cache_finds_nothing_in_it_and_the_next_one_all() -> None:
    from bench_ours import Ours, OursFilling

    for ours, rate in ((OursFilling(workload()), 0.0), (Ours(workload(), cached=True), 1.0)):
        ours.step()
        ours.teacher.cache.take_rate()
        ours.step()
        assert ours.teacher.cache.take_rate() == rate


def test_a_peer_that_multiplies_float32_is_held_to_that_whatever_the_bases_are() -> None:
    from bench_oracle import check
    from bench_peers import Textbook

    textbook = Textbook(workload(torch.bfloat16))
    assert check("textbook-fp32", textbook) < 1e-5
    right = textbook.loss
    textbook.loss = lambda *args: 1.001 * right(*args)  # type: ignore[method-assign]
    with pytest.raises(SystemExit, match="float32"):
        check("textbook-fp32", textbook)


def found(dtype: torch.dtype = torch.float32) -> Any:
    """What a benchmark of LoRA without the textbook's loop might have measured."""
    from bench_rows import Found

    names = ("ours", "ours-cached", "ours-filling", "lora-lm")
    seconds = {name: [1.0 + number, 2.0 + number] for number, name in enumerate(names)}
    seconds |= {"loss: ours": [1.0], "loss: textbook": [3.0], "rate": [4.0, 4.0]}
    counted = dict.fromkeys(names, 2)
    return Found(workload(dtype), seconds, counted, dict.fromkeys(names, 2.0**20), dict.fromkeys(names, 1e-7))


def test_all_that_was_asked_is_in_the_table_measured_or_not(tmp_path: Path) -> None:
    from bench_rows import merged, rows_of
    from figures import Figure, read_figures, write_figures

    rows = {row.name: row for row in merged(rows_of(found()), [])}
    asked = [row for row in rows.values() if row.asked]
    assert len(asked) == 11
    assert [row.measured for row in asked if row.measured is not None] == [3.0]  # the loss alone
    assert rows["lora-lm (float32 base) / ours"].measured == pytest.approx((4 / 1 + 5 / 2) / 2)
    in_bfloat16 = {row.name: row for row in rows_of(found(torch.bfloat16))}
    assert in_bfloat16["lora-lm / ours"].measured is not None
    assert in_bfloat16["share of the bfloat16 matrix-product rate"].measured == pytest.approx((2 / 4 + 1 / 4) / 2)

    file = tmp_path / "ranks.json"
    name = "global throughput, 2 ranks on 2 cores / 1 on 1"
    write_figures("", [Figure.at_least(name, 1.85, 1.9, "times"), Figure.plain("step, lora-lm", 1.0, "s")], file)
    rows = {row.name: row for row in merged([Figure.plain("step, lora-lm", 2.0, "s")], [file])}
    assert rows[name].holds
    assert (rows["step, lora-lm"].measured, rows["step, lora-lm (ranks.json)"].measured) == (2.0, 1.0)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"ranks\.json: expected figures"):
        read_figures(file)


def test_the_cost_of_a_cache_is_that_of_filling_it_and_of_what_has_no_room() -> None:
    from bench_rows import spread_cost

    times, block = found(), 64 * 32 * 4  # medians: 1.5 without, 2.5 all found, 3.5 none found
    assert spread_cost(times, 0, [1000], 100).measured == pytest.approx(1.0)
    assert spread_cost(times, 10**9, [1], 10**6).measured == pytest.approx(2.5 / 1.5, rel=1e-3)
    assert spread_cost(times, 10**14, [10**9], 10).measured == pytest.approx(3.5 / 1.5, rel=1e-3)
    half = spread_cost(times, 500 * block, [1000], 10**6).measured
    assert half == pytest.approx((0.5 * 2.5 + 0.5 * 1.5) / 1.5, rel=1e-3)
    small_first = spread_cost(times, 10 * block, [10**6, 10], 10**6).measured
    assert small_first == pytest.approx((0.5 * 2.5 + 0.5 * 1.5) / 1.5, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "expected 1 or more"),
        (["--replay=0"], "replay = 0: expected 1 or more blocks"),
        (["--block=65"], "the tiny shape reads 2 to 64 tokens"),
        (["--peers=loar"], "--peers: unknown loar; choose from ours,"),
        (["--merge=README.md"], "README.md: expected figures"),
    ],
)
def test_a_call_that_can_not_be_measured_is_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    import bench

    base = ["bench.py", "--shape=tiny", "--block=32", f"--threads={torch.get_num_threads()}"]
    monkeypatch.setattr(sys, "argv", [*base, *options] if options else [*base, "--rounds=0"])
    with pytest.raises(SystemExit) as raised:
        bench.main()
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


def test_a_peer_that_this_cpu_is_too_slow_for_is_named() -> None:
    from bench import chosen, parse

    _, arguments = parse(["--peers=textbook-bf16,lora-lm"])
    names, note = chosen(arguments, slow=True)
    assert names == ["ours", "ours-cached", "ours-filling", "lora-lm"]
    assert note.startswith("textbook-bf16: left out")
    everything = ["ours", "ours-cached", "ours-filling", "textbook-bf16", "lora-lm"]
    assert chosen(arguments, slow=False)[0] == everything
    arguments.dtype = "bfloat16"
    assert chosen(arguments, slow=True) == (everything, ""), "asked for all the same"


def test_a_step_that_has_no_room_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_growth
    from bench_workload import Workload

    monkeypatch.setattr(bench_growth, "free_bytes", lambda: 3 * 10**9)
    monkeypatch.setattr(bench_growth, "Ours", None)
    large = Workload("gpt2", 16, 8, 1024, torch.float32, micro_blocks=24)
    assert str(bench_growth.seconds_of(large)).startswith("not measured: needs 2")


def test_the_share_of_the_rate_comes_from_a_measured_file(tmp_path: Path) -> None:
    import scale_model
    from figures import Figure, write_figures

    file = tmp_path / "bench.json"
    rows = [
        Figure.at_least("share of the bfloat16 matrix-product rate", 0.75, None, "of it"),
        Figure.plain("share of the float32 matrix-product rate", 0.6, "of it"),
    ]
    write_figures("", rows, file)
    assert scale_model.share_of(file) == (0.6, "measured by bench.py, float32 on a CPU")
    write_figures("", rows[:1], file)
    with pytest.raises(ValueError, match=r"bench\.json: expected a share"):
        scale_model.share_of(file)


def test_a_profiled_step_is_the_same_step_and_every_part_of_it_is_seen() -> None:
    import profile_step
    from bench_ours import Ours

    plain, marked, watch = Ours(workload()), Ours(workload()), profile_step.Stopwatch()
    profile_step.mark_all(marked, watch)
    for _ in range(2):
        plain.step()
        seconds = profile_step.step(marked, watch)
    assert seconds.keys() == set(profile_step.ORDER)
    assert all(torch.equal(a, b) for a, b in zip(plain.trainable(), marked.trainable(), strict=True))


def test_a_peers_memory_is_that_of_its_step_and_its_state() -> None:
    from bench_measure import peak_of
    from bench_workload import Workload

    kept = 12 * 128 * 4 * 12 * 192 * 4  # at least what the products of a block, of four, hand on
    peak = peak_of("ours", Workload("demo", 8, 4, 128, torch.float32, micro_blocks=12), 1)
    assert kept < peak < 10 * kept


@pytest.mark.slow
def test_the_benchmark_ends_with_its_table_and_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(TOOLS / "bench.py"), "--shape=tiny", "--block=32", "--rounds=1", f"--json={file}"]
    options = ["--peers=lora-lm", "--checkpointing", "--dtype=float32"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert "frozen bases in float32" in written["head"]
    figures = {figure["name"]: figure for figure in written["figures"]}
    assert figures["lora-lm (float32 base) / ours"]["measured"] > 0
    assert figures["lora-lm / ours"] == {
        "name": "lora-lm / ours",
        "asked": ">= 1.3",
        "measured": None,
        "unit": "times",
        "holds": False,
    }
    assert figures["relative gradient error, ours-checkpointing"]["measured"] < 1e-5
    assert "peak memory, ours-checkpointing (float32 base)" in figures
    assert "lora-lm / ours" in done.stdout


@pytest.mark.parametrize("weights", [{}, {"gate_l1_weight": 0.1}, {"gate_l1_weight": 0.1, "patch_l2_weight": 0.1}])
def test_steps_leave_nothing_in_memory(weights: dict[str, float]) -> None:
    """What is recomputed in the backward pass was once never freed, if no gradient was asked of one of its outputs."""
    from bench_ours import Ours
    from bench_workload import Workload

    from revpatch.train.startup import resident_bytes

    ours = Ours(Workload("demo", 2, 2, 128, torch.float32))
    ours.objective.config = ours.objective.config.model_copy(update=weights)
    sizes = []
    for steps in (3, 6):
        for _ in range(steps):
            ours.step()
        sizes.append(resident_bytes())
    assert sizes[1] - sizes[0] < 20 * 2**20, f"grew by {(sizes[1] - sizes[0]) / 2**20:.0f} MiB in 6 steps, of 46 once"


REPORTS = """
import json, os, signal, subprocess, sys, time
file = next(word.removeprefix("--json=") for word in sys.argv if word.startswith("--json="))
row = {"name": "speed", "asked": ">= 1", "measured": 2.0, "unit": "times", "holds": True}
open(file, "w").write(json.dumps({"head": "", "figures": [row]}))
print("measured one thing", file=sys.stderr, flush=True)
"""
"""A part that has measured one thing; what it does next is in the table."""


@pytest.mark.parametrize(
    ("then", "seconds", "status", "measured"),
    [
        ("", 20, r"done", 2.0),
        ("sys.exit(1)", 20, r"failed \(exit code 1\): measured one thing", 2.0),
        ("1 / 0", 20, r"failed \(exit code 1\): ZeroDivisionError.*", 2.0),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 20, r"failed \(signal SIGSEGV\).*", 2.0),
        ("subprocess.Popen(['sleep', '321.5']); time.sleep(60)", 2, r"timed out after 2 s; what .* counts", 2.0),
        ("import no_such_package.part", 20, r"not run: needs the package no_such_package", 2.0),
        ("os.remove(file); sys.exit(3)", 20, r"failed \(exit code 3\).*", None),
        ("", 0, r"not run: the time was up", None),
    ],
)
def test_a_part_that_fails_or_hangs_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, then: str, seconds: float, status: str, measured: float | None
) -> None:
    import gpu_check

    monkeypatch.setattr(gpu_check, "TOOLS", tmp_path)
    (tmp_path / "first.py").write_text(REPORTS + then)
    (tmp_path / "second.py").write_text(REPORTS)
    asked = (("speed", ">= 1", "times"), ("never measured", ">= 5", "times"))
    parts = [
        gpu_check.Part("first", "", seconds, ("first.py",), asked=asked),
        gpu_check.Part("second", "", 20, ("second.py",), asked=asked[:1]),
    ]
    file = tmp_path / "gpu.json"
    check = gpu_check.Check(parts, file, minutes=1, cpu=False)
    check.run()
    found = json.loads(file.read_text())
    first, second = found["parts"]
    assert re.fullmatch(status, first["status"])
    assert second["status"] == "done"
    figures = {row["name"]: row for row in found["figures"]}
    assert figures["first: speed"]["measured"] == measured
    assert figures["first: speed"]["holds"] is (measured is not None)
    assert figures["first: never measured"] == {
        "name": "first: never measured",
        "asked": ">= 5",
        "measured": None,
        "unit": "times",
        "holds": False,
    }
    assert figures["second: speed"]["holds"]
    assert check.done is (first["status"] == "done")
    left = subprocess.run(["pgrep", "-f", "sleep 321.5"], capture_output=True, text=True, check=False).stdout
    assert not left, "what a part has started ends with it"


def test_what_was_measured_before_a_stop_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gpu_check

    monkeypatch.setattr(gpu_check, "TOOLS", tmp_path)
    (tmp_path / "part.py").write_text(REPORTS + "import signal; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)")
    parts = [gpu_check.Part(name, "", 60, ("part.py",)) for name in ("one", "two")]
    gpu_check.Check(parts, tmp_path / "gpu.json", minutes=2, cpu=False).run()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["status"] for part in found["parts"]] == ["stopped; what it had measured counts", "not run yet"]
    assert [(row["name"], row["measured"]) for row in found["figures"]] == [("one: speed", 2.0)]


def test_the_notice_of_the_mode_that_shows_waits_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says it when the mode is set for the first time in a process."""
    import gpu_parts
    import torch

    notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: warnings.warn(notice, stacklevel=1))
    assert gpu_parts.waits(lambda: None, "cuda") == []
    wait = "called a synchronizing CUDA operation (Triggered internally)"
    (found,) = gpu_parts.waits(lambda: warnings.warn(wait, stacklevel=1), "cuda")
    assert found.startswith("test_tools.py:") and wait in found


def test_a_rate_of_our_own_step_needs_no_package_of_the_others() -> None:
    code = "import sys; sys.modules['peft'] = None; import bench_measure, bench_ours; bench_measure.rates"
    subprocess.run([sys.executable, "-c", code], cwd=TOOLS, check=True)


def test_the_time_is_one_for_all_parts_and_the_file_is_there_from_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gpu_check

    monkeypatch.setattr(gpu_check, "TOOLS", tmp_path)
    (tmp_path / "part.py").write_text(REPORTS + "time.sleep(60)")
    file = tmp_path / "gpu.json"
    parts = [gpu_check.Part(name, "", 60, ("part.py",)) for name in ("one", "two")]
    seen: list[list[str]] = []
    write = gpu_check.Check.write

    def spied(self: Any) -> None:
        write(self)
        seen.append([part["status"] for part in json.loads(file.read_text())["parts"]])

    monkeypatch.setattr(gpu_check.Check, "write", spied)
    gpu_check.Check(parts, file, minutes=(gpu_check.WRITING + 1.5) / 60, cpu=False).run()
    assert seen[0] == ["not run yet", "not run yet"]
    assert seen[1][0].startswith("timed out after")
    assert seen[-1][1].startswith(("timed out", "not run: the time was up"))


def test_packages_that_are_not_there_or_too_old_are_named(tmp_path: Path) -> None:
    import gpu_check

    file = tmp_path / "pyproject.toml"
    file.write_text('dependencies = ["torch>=2.10", "transformers>=999.1", "no-such-package>=1.0,<2"]\n')
    old, none = gpu_check.packages(file)
    assert re.fullmatch(r"transformers [\d.]+ is installed; the project asks for 999.1 or newer", old)
    assert none == "no-such-package is not installed; the project asks for 1.0 or newer"
    assert gpu_check.packages(gpu_check.ROOT / "pyproject.toml") == []


def test_a_machine_without_a_gpu_is_told_so_and_nothing_else_is_tried(tmp_path: Path) -> None:
    """Where there is a GPU the variable hides it."""
    file = tmp_path / "gpu.json"
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--only", "machine", "step", f"--json={file}"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert "torch finds no NVIDIA GPU that it can use here" in done.stderr
    found = json.loads(file.read_text())
    assert found["parts"][1]["status"] == "not run: no GPU"
    assert [row["holds"] for row in found["figures"]] == [False, False]


def replay(file: Path, *parts: str) -> dict[str, Any]:
    """What `gpu_check.py --cpu` wrote."""
    only = ["--only", *parts] if parts else []
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--cpu", "--minutes=20", *only, f"--json={file}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    assert [part["status"] for part in found["parts"]] == ["done"] * len(found["parts"])
    assert not any(row["asked"] for row in found["figures"]), "nothing of a CPU is held against what a GPU is asked"
    assert "of 20:00" in done.stderr
    return found


def test_the_shortest_rehearsal_of_a_gpus_check(tmp_path: Path) -> None:
    found = replay(tmp_path / "gpu.json", "nccl")
    assert {row["name"]: row["measured"] for row in found["figures"]} == {"nccl: gloo with one rank": "gloo"}


@pytest.mark.slow
def test_every_part_of_a_gpus_check_runs_on_a_cpu(tmp_path: Path) -> None:
    import gpu_check

    found = replay(tmp_path / "gpu.json")
    assert [part["name"] for part in found["parts"]] == [part.name for part in gpu_check.PARTS]
    names = {row["name"] for row in found["figures"]}
    for part in gpu_check.PARTS:
        assert any(name.startswith(f"{part.name}: ") for name in names), part.name


def test_what_is_left_is_told_from_steps_of_the_same_kind(capsys: pytest.CaptureFixture[str]) -> None:
    from progress import Progress

    now = [0.0]
    progress = Progress("tool", ["short", "long", "short", "long"], lambda: now[0])
    for kind, seconds in (("short", 2), ("long", 60), ("short", 2), ("long", 60)):
        with progress.step(kind):
            now[0] += seconds
    assert capsys.readouterr().err.splitlines() == [
        "tool: 1 of 4, short; 0:00",
        "tool: 2 of 4, long; 0:02, about 0:06 left",
        "tool: 3 of 4, short; 1:02, about 1:02 left",
        "tool: 4 of 4, long; 1:04, about 1:00 left",
        "tool: done after 2:04",
    ]


@pytest.mark.parametrize(
    ("tool", "options"),
    [
        ("profile_step", ["--shape=tiny", "--block=32", "--threads=1", "--steps=1"]),
        pytest.param("bench_streams", ["--blocks=600", "--rounds=1"], marks=pytest.mark.slow),
        pytest.param("bench_data", ["--megabytes=0.3", "--rounds=1"], marks=pytest.mark.slow),
        pytest.param("bench_ledger", ["--entries=20", "--rounds=1", "--large=2"], marks=pytest.mark.slow),
        pytest.param("bench_ranks", ["--shape=tiny", "--rounds=1", "--steps=1"], marks=pytest.mark.slow),
        pytest.param("bench_run", ["--steps=20"], marks=pytest.mark.slow),
        pytest.param(
            "bench_generate", ["--bases=demo", "--rounds=1", "--tokens=4", "--threads=1"], marks=pytest.mark.slow
        ),
    ],
)
def test_a_tool_says_how_far_it_is_and_writes_its_figures(tool: str, options: list[str], tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(TOOLS / f"{tool}.py"), *options, f"--json={file}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith(f"{tool}.py: ")]
    assert re.match(rf"{tool}.py: 1 of \d+, ", said[0]), done.stderr
    assert "left" in "".join(said) or len(said) < 4
    assert said[-1].startswith(f"{tool}.py: done after "), done.stderr
    assert {"name", "asked", "measured", "unit", "holds"} == set(json.loads(file.read_text())["figures"][0])


def test_causal_attention_of_a_gpu_is_counted_by_half() -> None:
    """By its shapes, on tensors without values: torch counts all of the matrix."""
    from bench_measure import ATTENTION
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.empty(2, 3, 64, 16, device="meta")
    counts = []
    for mapping in ({}, ATTENTION):
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.0, True)
        counts.append(counter.get_total_flops())
    assert counts[0] == 2 * counts[1] > 0
