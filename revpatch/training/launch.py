"""Where this process stands among its peers, and how it talks to them.

Every launcher (deepspeed, torchrun, accelerate launch) sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT;
plain python sets none, and is one process. Tensors go over nccl on GPUs and gloo on CPUs; verdicts and states go over a
gloo group beside it, so that no rank needs its GPU to hear what rank 0 decided.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_LOST = ("gloo/transport", "Connection closed by peer", "Timed out waiting")
"""What torch's errors say when a peer is gone, where they have no type of their own."""


@dataclass(frozen=True)
class Launch:
    """What the launcher said."""

    rank: int
    world: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> Launch:
        """Reads the launcher's variables, and sets those of a single process where there was no launcher.

        Raises:
            ValueError: some of the variables are set and others missing, or they contradict one another.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        found = {name: os.environ[name] for name in names if name in os.environ}
        if not {"RANK", "WORLD_SIZE"} & found.keys():
            single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            os.environ.update(single, MASTER_PORT=str(_free_port()))
            return cls(0, 1, 0)
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(
                f"the launcher set {', '.join(sorted(found))} but not {', '.join(missing)}: start with torchrun, "
                "deepspeed or accelerate launch, or set all of them"
            )
        try:
            rank, world, local_rank = (int(found[name]) for name in names[:3])
        except ValueError:
            raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers, found {found}") from None
        if not 0 <= rank < world or not 0 <= local_rank < world:
            raise ValueError(f"RANK={rank} and LOCAL_RANK={local_rank} must lie in 0 to WORLD_SIZE-1={world - 1}")
        return cls(rank, world, local_rank)

    def device(self) -> torch.device:
        """This rank's GPU, or the CPU where there is none.

        Raises:
            ValueError: there are GPUs, but fewer than ranks on this machine.
        """
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if self.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK={self.local_rank}, but this machine shows {torch.cuda.device_count()} GPUs: start at most "
                "one rank a GPU"
            )
        return torch.device("cuda", self.local_rank)


class Peers:
    """The other ranks.

    Args:
        launch: where this one stands.
        device: where its tensors live.
        control: the group for verdicts and states; None for the default one.
        reading: the group in which the reading threads meet, beside what the main threads do.
    """

    def __init__(
        self,
        launch: Launch,
        device: torch.device,
        control: dist.ProcessGroup | None,
        reading: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.world, self.device = launch.rank, launch.world, device
        self.control, self.reading = control, reading

    def from_rank0(self, value: Any) -> Any:
        """Rank 0's value, on every rank; the others pass None."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def mean_(self, tensor: Tensor) -> Tensor:
        """The mean over ranks, in place; a NaN on one rank is a NaN on all."""
        dist.all_reduce(tensor)
        return tensor.div_(self.world)

    def agree(self, failure: T | None, interrupted: bool) -> tuple[list[T], bool]:
        """What the reading threads of all ranks have met: every failure, by rank, and whether any was told to stop."""
        if self.world == 1:
            return [] if failure is None else [failure], interrupted
        flags = torch.tensor([failure is not None, interrupted], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.reading)
        failed, stopped = flags.tolist()
        if not failed:
            return [], bool(stopped)
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, failure, group=self.reading)
        return [each for each in found if each is not None], bool(stopped)

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier(group=self.control)


@contextmanager
def process_group(launch: Launch, device: torch.device, timeout_minutes: float) -> Iterator[Peers]:
    """Joins the process group, and leaves it.

    Raises:
        ConnectionError: another rank has ended, or does not answer in time.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        control = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else None
        reading = dist.new_group(backend="gloo", timeout=timeout) if launch.world > 1 else None
        peers = Peers(launch, device, control, reading)
        yield peers
        peers.barrier()
        # A gloo worker that frees the tensors of the last collective needs the interpreter's lock; if it first gets it
        # while the interpreter is shutting down, it aborts the process.
        time.sleep(0.2)
        dist.destroy_process_group()
    except BaseException as error:
        if launch.world == 1:  # with others, destroying it would wait for what the reading thread has begun with them
            dist.destroy_process_group()
        if isinstance(error, RuntimeError) and _is_lost_peer(error):
            found = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ConnectionError(
                f"another rank has ended or does not answer ({found}); why is in that rank's own message. Start the "
                "command again (a training goes on from its newest snapshot)"
            ) from error
        raise


def _is_lost_peer(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


def launch_id() -> str | None:
    """What is the same whenever one launcher starts one command again: of Slurm the job and its step, of torchrun its
    own process on this machine; None under launchers that start nothing again, or don't say so."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"slurm {job}.{os.environ.get('SLURM_STEP_ID', '')}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        started = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        return f"torchrun {socket.gethostname()} {os.getppid()} {started}"
    return None


def bfloat16_is_slow() -> bool:
    """Whether this CPU multiplies bfloat16 matrices more slowly than float32 ones, as those without instructions for
    it do: by up to 70 times."""

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(192, 192, dtype=dtype)
        times = []
        for _ in range(8):
            began = time.thread_time()  # not what other processes take of this core
            matrix @ matrix
            times.append(time.thread_time() - began)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return seconds(torch.bfloat16) > seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
