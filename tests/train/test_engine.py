"""The engines on real ranks: exact rollback at every ZeRO stage, the bytes on the wire, the same losses."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from ranks import RunServer
from toy import Toy

ENGINES = {
    "zero0": {"kind": "deepspeed", "stage": 0},
    "zero1": {"kind": "deepspeed", "stage": 1},
    "zero2": {"kind": "deepspeed", "stage": 2},
    "accelerate": {"kind": "accelerate"},
}
VARIABLES = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}
FactsOf = Callable[..., dict[str, Any]]

zero = [pytest.param(stage, marks=pytest.mark.slow) for stage in ("zero1", "zero2")]
each_engine = pytest.mark.parametrize("engine", ["zero0", "accelerate", *zero])
fast_engines = pytest.mark.parametrize("engine", ["zero0", "accelerate"])


@pytest.fixture(scope="module")
def facts_of(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> FactsOf:
    """facts_of(engine, ranks=2): what `whole_engine` of rank_checks.py finds; each is run once."""

    @lru_cache
    def find(engine: str, ranks: int, variables: bool) -> dict[str, Any]:
        tmp = tmp_path_factory.mktemp(engine)
        wanted = dict(ENGINES[engine])
        if "stage" in wanted:
            file = tmp / "deepspeed.json"
            file.write_text(json.dumps({"zero_optimization": {"stage": wanted.pop("stage")}}))
            wanted["deepspeed"] = str(file)
        config = toy.config_file(tmp, engine=wanted, base={"dtype": "bfloat16"}, batch={"micro_blocks": 2})
        return server.check("whole_engine", config, ranks=ranks, environ=VARIABLES if variables else {})

    return lambda engine, ranks=2, variables=False: find(engine, ranks, variables)


@each_engine
def test_a_rollback_is_exact_on_every_rank_moments_included(facts_of: FactsOf, engine: str) -> None:
    found = facts_of(engine)
    assert found["moved_by"] > 1e-3, "the steps between must have changed the patch, or this shows nothing"
    assert found["restored"] == found["good"], "parameters, masters and moments are those of the good state"
    assert found["same_patch"] == [True, True], "a step at rate 0 leaves the patch where it was, on every rank"
    assert found["same_masters"] == [True, True]
    assert found["with_moments"] == [found["reference"]] * 2, (
        "the step after a rollback is the one after the good state"
    )
    assert found["step"] == [5, 6]


@fast_engines
def test_a_step_reduces_exactly_the_sidecars_and_reads_nothing_from_the_device(facts_of: FactsOf, engine: str) -> None:
    """Each read would make the host wait for a GPU. Two micro-batches, clipping, optimizer and the sums of the log.

    torch's fused AdamW reads its step counts on CPUs; on GPUs its kernel is handed where they lie.
    """
    found = facts_of(engine)
    assert found["moved"] == {"gloo:all_reduce": 4 * found["parameters"]}
    assert [read for read in found["reads"] if "aten::_fused_adamw_" not in read] == []


@pytest.mark.parametrize("engine", zero)
def test_zero_moves_nothing_but_sidecars(facts_of: FactsOf, engine: str) -> None:
    """ZeRO reduces gradients to their owners (ZeRO 2 in each of the 2 micro-batches) and gathers the new weights."""
    found = facts_of(engine)
    sidecars = 4 * found["parameters"]
    micro_batches = 2 if engine == "zero2" else 1
    # Partitions are padded to equal length, and norms and flags of 4 bytes travel too.
    assert sidecars * micro_batches <= found["moved"]["gloo:all_reduce"] <= sidecars * micro_batches + 64
    assert sum(found["moved"].values()) < sidecars * (micro_batches + 1) + 256


@pytest.mark.parametrize(
    ("engine", "ranks"),
    [("accelerate", 2), ("zero0", 1), *(pytest.param(f"zero{n}", 2, marks=pytest.mark.slow) for n in (1, 2))],
)
def test_the_same_losses_as_deepspeed_on_two_ranks(facts_of: FactsOf, engine: str, ranks: int) -> None:
    expected, found = facts_of("zero0"), facts_of(engine, ranks)
    assert expected["losses"][-1][1] < expected["losses"][0][1] - 0.05, "it must learn, or equal losses show nothing"
    assert found["world"] == ranks
    for ours, theirs in zip(expected["losses"], found["losses"], strict=True):
        # A last bit of one of the bfloat16 base's states moves the KL, a twentieth of a nat, by some 1e-5.
        assert theirs == pytest.approx(ours, rel=1e-4, abs=5e-5)
    assert min(expected["norms"]) > 0
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-2), "the gradient's norm over all ranks"


@each_engine
def test_training_leaves_the_base_as_it_was(facts_of: FactsOf, engine: str) -> None:
    found = facts_of(engine)
    assert found["base_unchanged"]
    assert not found["base_has_grad"]


def test_accelerates_variables_do_not_change_the_training(facts_of: FactsOf) -> None:
    assert facts_of("accelerate", variables=True)["losses"] == facts_of("accelerate")["losses"]


@fast_engines
def test_an_engine_that_sees_other_ranks_than_the_launcher_is_stopped(facts_of: FactsOf, engine: str) -> None:
    words = f"the {ENGINES[engine]['kind']} engine sees 2 ranks, the launcher started 4"
    assert words in facts_of(engine)["another_world"]
