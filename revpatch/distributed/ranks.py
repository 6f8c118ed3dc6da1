"""How a rank talks to the others, once they have met.

Tensors go over nccl on GPUs and gloo on CPUs; verdicts and states go over a
gloo group beside it, so that no rank needs its GPU to hear what rank 0 decided.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from revpatch.distributed import Launch
from revpatch.distributed.meeting import meet, said_if_slow

T = TypeVar("T")
_LOST = ("gloo/transport", "Connection closed by peer", "Timed out waiting")
"""What torch's errors say when a peer is gone, where they have no type of their own."""


class Ranks:
    """The other ranks.

    Args:
        launch: where this one stands.
        device: where its tensors live.
        control: the group for verdicts and states; None for the default one.
    """

    def __init__(self, launch: Launch, device: torch.device, control: dist.ProcessGroup | None) -> None:
        self.launch, self.rank, self.world, self.device = launch, launch.rank, launch.world, device
        self.control = control

    def from_rank0(self, value: Any) -> Any:
        """Rank 0's value, on every rank; the others pass None."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def mean_(self, tensor: Tensor) -> Tensor:
        """Return the mean over ranks, in place; a NaN on one rank is a NaN on all."""
        dist.all_reduce(tensor)
        return tensor.div_(self.world)

    def agree(self, failure: T | None, interrupted: bool) -> tuple[list[T], bool]:
        """Return what the ranks have met, on every rank: every failure, by rank, and whether any was told to stop.

        It is one all-reduce of two numbers, between CPUs; only where there is a failure is it gathered too.
        """
        if self.world == 1:
            return [] if failure is None else [failure], interrupted
        flags = torch.tensor([failure is not None, interrupted], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.control)
        failed, stopped = flags.tolist()
        if not failed:
            return [], bool(stopped)
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, failure, group=self.control)
        return [each for each in found if each is not None], bool(stopped)

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier(group=self.control)


@contextmanager
def process_group(launch: Launch, device: torch.device, timeout_minutes: float) -> Iterator[Ranks]:
    """Joins the process group, and leaves it.

    Raises:
        ValueError: see `meet`.
        ConnectionError: a rank does not come, has ended, or does not answer in time.
    """
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = meet(launch, device, timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # by which deepspeed and accelerate choose the GPU
    try:
        with said_if_slow(launch, f"the ranks have met; {backend} is connecting them"):
            dist.init_process_group(
                backend,
                store=PrefixStore("group", store),
                rank=launch.rank,
                world_size=launch.world,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        found = " … ".join(dict.fromkeys((lines[0][:200], lines[-1][:200])))
        name = backend.upper()
        raise ConnectionError(
            f"{launch.world} ranks met at {launch.address}, but {backend} could not connect them ({found}): "
            f"{name}_SOCKET_IFNAME names the network card, a firewall may be between them, and `revpatch doctor` under "
            "the launcher looks at it"
        ) from error
    try:
        control = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else None
        peers = Ranks(launch, device, control)
        yield peers
        peers.barrier()
        # A gloo worker that frees the tensors of the last collective needs the interpreter's lock; if it first gets it
        # while the interpreter is shutting down, it aborts the process.
        time.sleep(0.2)
        dist.destroy_process_group()
    except BaseException as error:
        if launch.world == 1:  # with others, destroying it would wait for what they have begun with this one
            dist.destroy_process_group()
        if isinstance(error, RuntimeError) and _is_lost_peer(error):
            found = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise ConnectionError(
                f"another rank has ended or does not answer ({found}); why is in that rank's own message. Start the "
                "command again (a training resumes from its newest snapshot)"
            ) from error
        raise


def _is_lost_peer(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


def bfloat16_is_slow() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices more slowly than float32 ones, as those without instructions
    for it do: by up to 70 times."""

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
