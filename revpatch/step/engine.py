"""The engines: gradients averaged over the ranks, AdamW's groups and rate, its whole state in and out, and the clock.

The only file that trains with deepspeed and accelerate. Both engines take the same `PatchObjective`, whose parameters
are the sidecars alone, so what is broadcast, partitioned or reduced is the sidecars and nothing else. `EngineState`
knows no engine, no world size and no ZeRO stage: by parameter name the float32 master and Adam's two moments, and one
step count. Under ZeRO 1 and 2 the next step copies the partitioned masters over the module's parameters, so a load that
forgot them would be undone one step later.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from revpatch.config import Config, ConfigError, OptimizerConfig
from revpatch.config.file import read_deepspeed_config
from revpatch.distributed.ranks import Ranks
from revpatch.patch.sidecar import Patch
from revpatch.step.objective import PatchObjective, StepOutput
from revpatch.step.teacher import Key


class Clock:
    """Sums the seconds of named parts.

    Args:
        device: on which the parts run.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._events: list[tuple[str, str | None, Any, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is done inside."""
        outer = self._open[-1] if self._open else None
        self._open.append(name)
        start = self._mark()
        try:
            yield
        finally:
            self._open.pop()
            if self._on_gpu:
                self._events.append((name, outer, start, self._mark()))
            else:
                self._add(name, outer, time.perf_counter() - start)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, timed as a part."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return timed

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call; waits for the GPU to be done with them."""
        for name, outer, start, end in self._events:
            end.synchronize()
            self._add(name, outer, start.elapsed_time(end) / 1e3)
        seconds, self._seconds, self._events = self._seconds, {}, []
        return seconds

    def _mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # type: ignore[no-untyped-call]
        return event

    def _add(self, name: str, outer: str | None, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if outer is not None:
            self._seconds[outer] = self._seconds.get(outer, 0.0) - seconds


EPS = 1.0e-8
"""Of AdamW: added to the root of the second moment."""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the rate of step 1 ≤ step ≤ steps of a phase: linear warm-up, then a cosine to zero, or constant."""
    if step <= config.warmup_steps:
        return config.lr * (step / config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def make_optimizer(patch: Patch, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the sidecars in three groups, each with its share of the rate: projections, scales, gates.

    Only the projections' weights decay.
    """
    projections: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    gates: list[nn.Parameter] = []
    for name, parameter in patch.named_parameters():
        (gates if ".gates." in name else scales if name.endswith("log_scale") else projections).append(parameter)
    groups = [
        {"params": projections, "lr_factor": 1.0, "weight_decay": config.weight_decay},
        {"params": scales, "lr_factor": 1.0, "weight_decay": 0.0},
        {"params": gates, "lr_factor": config.gate_lr / config.lr, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=EPS, weight_decay=0.0, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Gives each group the rate times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]


MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class EngineState:
    """What an optimizer is, whatever the engine: CPU tensors by parameter name."""

    master: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]]
    """"exp_avg" and "exp_avg_sq", each by parameter name."""
    step: int


def fresh_state(patch: Patch) -> EngineState:
    """Return the state of an optimizer that has made no step, at the patch's present weights."""
    master = {name: p.detach().to("cpu", torch.float32, copy=True) for name, p in patch.named_parameters()}
    zeros = {key: {name: torch.zeros_like(p) for name, p in master.items()} for key in MOMENTS}
    return EngineState(master, zeros, 0)


class TorchState:
    """State in and out of a plain torch AdamW over the module's own parameters."""

    def __init__(self, patch: Patch, optimizer: torch.optim.Optimizer) -> None:
        self.patch, self.optimizer = patch, optimizer

    def state(self) -> EngineState:
        state = fresh_state(self.patch)
        for name, parameter in self.patch.named_parameters():
            held = self.optimizer.state.get(parameter)
            if held:
                state.step = int(held["step"])
                for key in MOMENTS:
                    state.moments[key][name] = held[key].detach().to("cpu", copy=True)
        return state

    @torch.no_grad()
    def load(self, state: EngineState) -> None:
        for name, parameter in self.patch.named_parameters():
            parameter.copy_(state.master[name])
            held = held_of(self.optimizer, parameter)
            held["step"].fill_(state.step)
            for key in MOMENTS:
                held[key].copy_(state.moments[key][name])


def held_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return the state of one tensor, made as torch's fused AdamW makes it if there is none yet."""
    held: dict[str, Any] = optimizer.state[parameter]
    if not held:
        held["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for key in MOMENTS:
            held[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return held


class MicroBatch(NamedTuple):
    """What goes through the model at once on a rank."""

    new: Tensor
    """(n, time) int64."""
    replay: Tensor | None = None
    """(r, time) int64; None when nothing is replayed."""
    keys: Sequence[Key] | None = None
    """Of the replayed blocks, the same for the same tokens alone: what the teacher's cache knows them by."""


class Engine(Protocol):
    """One optimizer step over all ranks, and the state around it."""

    kind: str
    zero_stage: int
    world: int
    clock: Clock
    """Has the parts forward, backward and optimizer, and all_reduce where it is a part of its own."""

    def train_step(self, micro_batches: Iterable[MicroBatch], rate: float) -> tuple[Tensor, Tensor]:
        """Forward, backward and optimizer step; the mean of `StepOutput.terms` and `.layers` on this rank."""
        ...

    def grad_norm(self) -> float | Tensor | None:
        """Global L2 norm of the last step's gradient before clipping."""
        ...

    def overlapped(self) -> dict[str, float]:
        """Mean seconds a step of what runs beside other parts."""
        ...

    def state(self) -> EngineState:
        """Return the whole state, the same on every rank; all ranks take part."""
        ...

    def load(self, state: EngineState) -> None:
        """Writes masters, moments, step and the module's parameters; all ranks take part."""
        ...


def make_engine(config: Config, objective: PatchObjective, peers: Ranks) -> Engine:
    """Return the engine that the config asks for.

    Raises:
        ConfigError: see `read_deepspeed_config`.
        RuntimeError: the engine's world is not the launcher's.
    """
    accumulation = config.batch.accumulation(peers.world)
    if config.engine.kind == "accelerate":
        engine: Engine = AccelerateEngine(config, objective, peers, accumulation)
    else:
        engine = DeepSpeedEngine(config, objective, peers, accumulation)
    if engine.world != peers.world:
        raise RuntimeError(
            f"the {engine.kind} engine sees {engine.world} ranks, the launcher started {peers.world}: each would train "
            "alone; check that the launcher's variables reach every process"
        )
    return engine


class _ZeroState:
    """State in and out of DeepSpeed's ZeRO 1 and 2, whose masters and moments are flat partitions."""

    def __init__(self, patch: Patch, zero: Any) -> None:
        self.patch, self.zero = patch, zero
        for group in zero.optimizer.param_groups:
            for partition in group["params"]:
                held_of(zero.optimizer, partition)
        zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def state(self) -> EngineState:
        """Return every rank fills in what it holds, and one sum brings all together; DeepSpeed's `safe_get_full_...`
        would take three for each parameter, and a step would stand still for them."""
        named = dict(self.patch.named_parameters())
        sizes = [parameter.numel() for parameter in named.values()]
        first = next(iter(named.values()))
        flat = first.new_zeros((1 + len(MOMENTS), sum(sizes)), dtype=torch.float32)
        for parameter, end in zip(named.values(), accumulate(sizes), strict=True):
            held: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # None where other ranks hold all of it
            if held is not None:
                start = end - parameter.numel() + held.lp_fragment_address.start
                for row, key in zip(flat, (None, *MOMENTS), strict=True):
                    row[start : start + held.lp_fragment_address.numel] = held.get_hp_fragment(key)
        dist.all_reduce(flat, group=first._dp_group)  # type: ignore[attr-defined]
        master, *moments = (
            {name: part.reshape(named[name].shape).clone() for name, part in zip(named, row.split(sizes), strict=True)}
            for row in flat.cpu()
        )
        partition = self.zero.optimizer.param_groups[0]["params"][0]
        step = int(self.zero.optimizer.state[partition]["step"])
        return EngineState(master, dict(zip(MOMENTS, moments, strict=True)), step)

    @torch.no_grad()
    def load(self, state: EngineState) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        for name, parameter in self.patch.named_parameters():
            parameter.copy_(state.master[name])
            safe_set_full_fp32_param(parameter, state.master[name].to(parameter.device))
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, state.moments[key][name].to(parameter.device), key)
        for group in self.zero.optimizer.param_groups:
            for partition in group["params"]:
                self.zero.optimizer.state[partition]["step"].fill_(state.step)


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0, 1 or 2 over float32 sidecars."""

    kind = "deepspeed"

    def __init__(self, config: Config, objective: PatchObjective, peers: Ranks, accumulation: int) -> None:
        settings = read_deepspeed_config(config.engine.deepspeed)
        if peers.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        # DeepSpeed's shared-memory all-reduce for CPUs is compiled at first use behind a lock file that outlives a
        # killed process; gloo needs none of it.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
        deepspeed.init_distributed(dist_backend="nccl" if peers.device.type == "cuda" else "gloo", verbose=False)
        settings |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": config.optimizer.max_grad_norm,
            "steps_per_print": None,
        }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=objective,
            optimizer=make_optimizer(objective.patch, config.optimizer),
            config=settings,
            dist_init_required=False,
        )
        self.zero_stage = int(self.engine.zero_optimization_stage())
        self.world = int(self.engine.world_size)
        self.patch = patch = objective.patch
        self.clock = Clock(peers.device)
        self.engine.allreduce_gradients = self.clock.timed("all_reduce", self.engine.allreduce_gradients)
        self.max_grad_norm = config.optimizer.max_grad_norm
        self._norm: Tensor | None = None
        if not self.zero_stage:  # DeepSpeed's own would form the norm and keep it with ZeRO 1 and 2 alone
            self.engine.clip_fp32_gradients = self._clip
        self._state = _ZeroState(patch, self.optimizer) if self.zero_stage else TorchState(patch, self.optimizer)

    def train_step(self, micro_batches: Iterable[MicroBatch], rate: float) -> tuple[Tensor, Tensor]:
        """See `Engine.train_step`."""
        set_learning_rate(self.optimizer, rate)
        outputs = []
        for batch in micro_batches:
            with self.clock.part("forward"):
                output: StepOutput = self.engine(*batch)
            with self.clock.part("backward"):
                self.engine.backward(output.loss)
            with self.clock.part("optimizer"):
                self.engine.step()
            outputs.append((output.terms, output.layers))
        return _means(outputs)

    def _clip(self) -> None:
        self._norm = torch.nn.utils.clip_grad_norm_(self.patch.parameters(), self.max_grad_norm)

    def grad_norm(self) -> float | Tensor | None:
        """See `Engine.grad_norm`."""
        norm: float | Tensor | None = self.engine.get_global_grad_norm() if self.zero_stage else self._norm
        return norm

    def overlapped(self) -> dict[str, float]:
        """See `Engine.overlapped`."""
        return {}

    def state(self) -> EngineState:
        """See `Engine.state`."""
        return self._state.state()

    def load(self, state: EngineState) -> None:
        """See `Engine.load`."""
        self._state.load(state)


class AccelerateEngine:
    """Plain data parallel through accelerate."""

    kind = "accelerate"
    zero_stage = 0

    def __init__(self, config: Config, objective: PatchObjective, peers: Ranks, accumulation: int) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        plain = DistributedDataParallelKwargs(broadcast_buffers=False)  # they are frozen
        self.accelerator = Accelerator(cpu=peers.device.type == "cpu", mixed_precision="no", kwargs_handlers=[plain])
        found = self.accelerator.distributed_type.value
        if found not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise ConfigError(
                f"engine.kind = accelerate is plain data parallel, but ACCELERATE_* variables or a saved accelerate "
                f"config ask for {found}: launch without it, or use engine.kind: deepspeed"
            )
        self.accumulation = accumulation
        self.optimizer = make_optimizer(objective.patch, config.optimizer)
        self.module = self.accelerator.prepare_model(objective)
        self.patch = objective.patch
        self.max_grad_norm = config.optimizer.max_grad_norm
        self.clock = Clock(peers.device)
        self.world = int(self.accelerator.num_processes)
        self._norm: Tensor | None = None
        self._state = TorchState(objective.patch, self.optimizer)

    def train_step(self, micro_batches: Iterable[MicroBatch], rate: float) -> tuple[Tensor, Tensor]:
        """See `Engine.train_step`."""
        set_learning_rate(self.optimizer, rate)
        outputs = []
        for number, batch in enumerate(micro_batches, start=1):
            last = number == self.accumulation
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                with self.clock.part("forward"):
                    output: StepOutput = self.module(*batch)
                with self.clock.part("backward"):
                    (output.loss / self.accumulation).backward()
            outputs.append((output.terms, output.layers))
        with self.clock.part("optimizer"):
            self._norm = torch.nn.utils.clip_grad_norm_(self.patch.parameters(), self.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return _means(outputs)

    def grad_norm(self) -> float | Tensor | None:
        """See `Engine.grad_norm`."""
        return self._norm

    def overlapped(self) -> dict[str, float]:
        """See `Engine.overlapped`; DistributedDataParallel reduces beside the backward pass, and times it now and
        then."""
        if self.world == 1:
            return {}
        return {"all_reduce": self.module._get_ddp_logging_data().get("avg_backward_comm_time", 0) / 1e9}

    def state(self) -> EngineState:
        """See `Engine.state`."""
        return self._state.state()

    def load(self, state: EngineState) -> None:
        """See `Engine.load`."""
        self._state.load(state)


def _means(outputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    terms, layers = zip(*outputs, strict=True)
    return torch.stack(terms).mean(0), torch.stack(layers).mean(0)
