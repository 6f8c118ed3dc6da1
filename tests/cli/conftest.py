"""One small run, trained by the command line; it is read only."""

from __future__ import annotations

import pytest
from command import in_a_process
from toy import Toy
from trained_run import STEPS, Run


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
