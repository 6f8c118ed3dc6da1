"""The engines on real ranks: exact rollback at every ZeRO stage, the bytes on the wire, the same losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from ranks import rank_check
from toy import Toy

ENGINES = {
    "zero0": {"kind": "deepspeed", "stage": 0},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero2": {"kind": "deepspeed", "stage": 2},
    "accelerate": {"kind": "accelerate"},
}


@pytest.fixture(scope="module")
def facts_of(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What `whole_engine` of rank_checks.py finds with an engine on so many ranks; each is launched once."""

    @lru_cache
    def launch(engine: str, ranks: int = 2) -> dict[str, Any]:
        tmp = tmp_path_factory.mktemp(engine)
        wanted = dict(ENGINES[engine])
        if "stage" in wanted:
            file = tmp / "deepspeed.json"
            file.write_text(json.dumps({"zero_optimization": {"stage": wanted.pop("stage")}}))
            wanted["deepspeed"] = str(file)
        config = toy.config_file(tmp, engine=wanted, base={"dtype": "bfloat16"}, batch={"micro_blocks": 2})
        return rank_check("whole_engine", config, ranks=ranks)

    return launch


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rollback_is_exact_on_every_rank_moments_included(
    facts_of: Callable[..., dict[str, Any]], engine: str
) -> None:
    found = facts_of(engine)
    assert found["moved_by"] > 1e-3, "the steps between must have changed the patch, or this shows nothing"
    assert found["restored"] == found["good"], "parameters, masters and moments are those of the good state"
    assert found["same_patch"] == [True, True], "a step at rate 0 leaves the patch where it was, on every rank"
    assert found["same_masters"] == [True, True]
    assert found["with_moments"] == [found["reference"]] * 2, (
        "the step after a rollback is the one after the good state"
    )
    assert found["step"] == [5, 6]


@pytest.mark.parametrize("engine", ["zero0", "accelerate"])
def test_one_step_reduces_exactly_the_sidecars(facts_of: Callable[..., dict[str, Any]], engine: str) -> None:
    found = facts_of(engine)
    assert found["moved"] == {"gloo:all_reduce": 4 * found["parameters"]}


@pytest.mark.parametrize("engine", ["zero0", "accelerate"])
def test_a_step_reads_nothing_from_the_device(facts_of: Callable[..., dict[str, Any]], engine: str) -> None:
    """Each read would make the host wait for a GPU. Two micro-batches, clipping, optimizer and the sums of the log.

    torch's fused AdamW reads its step counts on CPUs; on GPUs its kernel is handed where they lie.
    """
    assert [read for read in facts_of(engine)["reads"] if "aten::_fused_adamw_" not in read] == []


@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_zero_moves_nothing_but_sidecars(facts_of: Callable[..., dict[str, Any]], engine: str) -> None:
    """ZeRO reduces gradients to their owners (ZeRO 2 in each of the 2 micro-batches) and gathers the new weights."""
    found = facts_of(engine)
    sidecars = 4 * found["parameters"]
    micro_batches = 2 if engine == "zero2" else 1
    # Partitions are padded to equal length, and norms and flags of 4 bytes travel too.
    assert sidecars * micro_batches <= found["moved"]["gloo:all_reduce"] <= sidecars * micro_batches + 64
    assert sum(found["moved"].values()) < sidecars * (micro_batches + 1) + 256


@pytest.mark.parametrize(("engine", "ranks"), [("accelerate", 2), ("zero0", 1), ("zero1", 2), ("zero2", 2)])
def test_the_same_losses_as_deepspeed_on_two_ranks(
    facts_of: Callable[..., dict[str, Any]], engine: str, ranks: int
) -> None:
    expected, found = facts_of("zero0"), facts_of(engine, ranks)
    assert expected["losses"][-1][1] < expected["losses"][0][1] - 0.05, "it must learn, or equal losses show nothing"
    assert found["world"] == ranks
    for ours, theirs in zip(expected["losses"], found["losses"], strict=True):
        # A last bit of one of the bfloat16 base's states moves the KL, a twentieth of a nat, by some 1e-5.
        assert theirs == pytest.approx(ours, rel=1e-4, abs=5e-5)
    assert min(expected["norms"]) > 0
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-2), "the gradient's norm over all ranks"


@pytest.mark.parametrize("engine", ENGINES)
def test_training_leaves_the_base_as_it_was(facts_of: Callable[..., dict[str, Any]], engine: str) -> None:
    found = facts_of(engine)
    assert found["base_unchanged"]
    assert not found["base_has_grad"]


@pytest.mark.parametrize(
    "variables",
    [{"ACCELERATE_MIXED_PRECISION": "bf16"}, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}],
    ids=["precision", "accumulation"],
)
def test_accelerates_variables_do_not_change_the_training(
    facts_of: Callable[..., dict[str, Any]],
    toy: Toy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = toy.config_file(tmp_path, base={"dtype": "bfloat16"}, batch={"micro_blocks": 2})
    assert rank_check("whole_engine", config)["losses"] == facts_of("accelerate")["losses"]


@pytest.mark.parametrize("engine", ["zero0", "accelerate"])
def test_an_engine_that_sees_other_ranks_than_the_launcher_is_stopped(toy: Toy, tmp_path: Path, engine: str) -> None:
    kind = str(ENGINES[engine]["kind"])
    found = rank_check("another_world", toy.config_file(tmp_path, engine={"kind": kind}), ranks=1)
    assert f"the {kind} engine sees 1 ranks, the launcher started 2" in found["error"]
