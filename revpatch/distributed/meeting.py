"""How the ranks of a run find each other at MASTER_ADDR:MASTER_PORT, and what is said of one that does not come.

Rank 0 serves a store there. Every rank leaves a claim in it (its rank, machine and device), and all wait until all
claims are there. torch's own rendezvous waits without a word, and takes two processes of one rank.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from revpatch.distributed import Launch

JOIN_SECONDS = 600.0
"""How long ranks wait for one that does not come, or as long as for one another in all else, if that is less."""
NOTICE_SECONDS = 30.0
"""When it is said that, and for whom, a rank is waiting."""
_NAME_SECONDS = 30.0
"""How long a name is looked up again: a pod's may come after its peers."""
_ANSWER_SECONDS = 30.0
"""How long what listens at the port may take to answer as rank 0 does."""
_POLL_SECONDS = 0.2
_NO_LAUNCHER = "if one process was meant, unset RANK and WORLD_SIZE"


def meet(launch: Launch, device: torch.device, timeout: timedelta) -> Store:
    """Return the store in which all ranks have met.

    Raises:
        ValueError: MASTER_ADDR or MASTER_PORT can't be used, or two ranks contradict each other.
        ConnectionError: a rank has not come in time.
    """
    if launch.world == 1:
        return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun serves it, and has counted the ranks
        with said_if_slow(launch, f"torchrun's store at {launch.address}:{launch.port} does not answer"):
            store = TCPStore(launch.address, launch.port, is_master=False, timeout=timeout)
        return PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    return _Meeting(launch, device, timeout).hold()


@contextmanager
def said_if_slow(launch: Launch, what: str) -> Iterator[None]:
    """Says on standard error what is waited for, if it takes long; once a machine."""
    if launch.world == 1 or launch.local_rank != 0:
        yield
        return
    timer = threading.Timer(NOTICE_SECONDS, _say, (launch, f"{what} ({NOTICE_SECONDS:g} s so far)"))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Meeting:
    """The ranks' meeting, as one of them holds it."""

    def __init__(self, launch: Launch, device: torch.device, timeout: timedelta) -> None:
        self.launch, self.timeout = launch, timeout
        self.where = f"MASTER_ADDR={launch.address}, MASTER_PORT={launch.port}"
        self.seconds = min(JOIN_SECONDS, timeout.total_seconds())
        now = time.monotonic()
        self.deadline, self.notice = now + self.seconds, now + min(NOTICE_SECONDS, self.seconds / 2)
        self.host = socket.gethostname()
        self.claim: dict[str, Any] = {"rank": launch.rank, "world": launch.world, "host": self.host, "pid": os.getpid()}
        self.claim["device"] = _device_name(device)

    def hold(self) -> Store:
        """Return the store when all are there; raises what `meet` does."""
        self._find_address()
        store = self._serve() if self.launch.rank == 0 else self._reach()
        try:
            self._meet_in(PrefixStore("meeting", store))
        except (ValueError, ConnectionError):
            if self.launch.rank == 0:
                time.sleep(5 * _POLL_SECONDS)  # the store ends with this process, and the others read why in it
            raise
        except RuntimeError as error:
            raise ConnectionError(
                f"rank 0 has ended while the ranks were meeting at {self.where}: why is in its own message"
            ) from error
        return store

    def _find_address(self) -> None:
        until = time.monotonic() + min(_NAME_SECONDS, self.seconds)
        while True:
            try:
                socket.getaddrinfo(self.launch.address, self.launch.port, type=socket.SOCK_STREAM)
                return
            except (OSError, UnicodeError) as error:
                if time.monotonic() > until:
                    raise ValueError(
                        f"MASTER_ADDR={self.launch.address} can't be found from {self.host} ({error}): give the name "
                        "or the IP address of the machine of rank 0, or mend /etc/hosts or the DNS"
                    ) from error
            time.sleep(_POLL_SECONDS)

    def _serve(self) -> Store:
        """Rank 0's store; MASTER_ADDR must lead to it."""
        address, port = self.launch.address, self.launch.port
        try:
            store = TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True, timeout=self.timeout
            )
        except dist.DistNetworkError as error:
            found = re.search(r"name: (\w+), message: (.*)", str(error))
            why = str(error).splitlines()[0][:200] if found is None else found[2]
            taken = ", which may be another run, or a second process with RANK=0" if "EADDRINUSE" in str(error) else ""
            raise ValueError(
                f"MASTER_PORT={port} can't be used on {self.host} ({why}{taken}): give all ranks another one, from "
                "1024 to 65535 (--master_port of torchrun and deepspeed, --main_process_port of accelerate)"
            ) from error
        store.set("served by", token := uuid4().hex)
        try:
            socket.create_connection((address, port), timeout=10).close()
        except OSError as error:
            raise ValueError(
                f"MASTER_ADDR={address} does not lead to rank 0, which is this process on {self.host} ({error}): give "
                f"all ranks the name or an address of {self.host}, or start RANK=0 on {address}"
            ) from error
        if self._connect().get("served by") != token.encode():
            raise ValueError(
                f"MASTER_ADDR={address} leads to another process with RANK=0 than this one on {self.host}: give every "
                "rank its own RANK, and start RANK=0 on that machine alone"
            )
        return store

    def _reach(self) -> Store:
        """Rank 0's store, as soon as it is there."""
        launch = self.launch
        while True:
            try:
                socket.create_connection((launch.address, launch.port), timeout=5).close()
                return self._connect()
            except OSError as error:
                if time.monotonic() > self.deadline:
                    raise ConnectionError(
                        f"rank 0 of {launch.world} did not come within {_in_words(self.seconds)} ({self.where}: "
                        f"{error}): start it, or see its own message; {_NO_LAUNCHER}"
                    ) from error
                if launch.local_rank == 0:
                    self._notice(f"rank 0 of {launch.world} ({error})")
            time.sleep(_POLL_SECONDS)

    def _connect(self) -> TCPStore:
        """Return a client of the store. What listens there may be something else, for whose answer torch waits without
        end."""
        made: list[TCPStore] = []

        def connect() -> None:
            with suppress(RuntimeError):
                made.append(TCPStore(self.launch.address, self.launch.port, is_master=False, timeout=self.timeout))

        connecting = threading.Thread(target=connect, daemon=True)
        connecting.start()
        connecting.join(min(_ANSWER_SECONDS, self.seconds))
        if not made:
            raise ValueError(
                f"what listens at {self.where} does not answer as rank 0 of a run does: give all ranks a MASTER_PORT "
                "that nothing else uses"
            )
        return made[0]

    def _meet_in(self, store: Store) -> None:
        rank, world = self.launch.rank, self.launch.world
        self._check_not_over(store)
        while rank != 0 and not store.check(["0"]):
            self._wait(store, [0])
        if rank != 0 and (first := json.loads(store.get("0")))["world"] != world:
            self._refuse(
                store,
                f"rank {rank} on {self.host} was started with WORLD_SIZE={world}, and rank 0 on {first['host']} with "
                f"WORLD_SIZE={first['world']}: give all ranks the same, the number of all of them",
            )
        mine = json.dumps(self.claim)
        if (held := store.compare_set(str(rank), "", mine).decode()) != mine:
            other = json.loads(held)
            self._refuse(
                store,
                f"two processes have RANK={rank}, {other['pid']} on {other['host']} and {self.claim['pid']} on "
                f"{self.host} ({self.where}): give every process a RANK of its own",
            )
        store.add("came", 1)
        while store.add("came", 0) < world:
            self._wait(store, [] if rank else None)
        self._check_devices([json.loads(claim) for claim in store.multi_get([str(each) for each in range(world)])])

    def _wait(self, store: Store, missing: list[int] | None) -> None:
        """A moment, unless the meeting is over. `missing`: ranks that are known to be; None: they are looked up, if it
        comes to saying who they are, and []: rank 0 says it."""
        self._check_not_over(store)
        now = time.monotonic()
        if now > (self.deadline if self.launch.rank == 0 else self.deadline + 2):
            names = self._missing(store)
            why = (
                f"{self.launch.world - len(names)} of {self.launch.world} ranks came to {self.where} within "
                f"{_in_words(self.seconds)}, and {_ranks_in_words(names)} did not: start them all, or see their own "
                f"messages; {_NO_LAUNCHER}"
            )
            self._end(store, why, wrong=False)
            raise ConnectionError(why)
        if now > self.notice and missing != []:
            names = missing or self._missing(store)
            self._notice(f"{_ranks_in_words(names)} of {self.launch.world}")
        time.sleep(_POLL_SECONDS)

    def _check_not_over(self, store: Store) -> None:
        """Raises what another rank has ended the meeting with."""
        if store.check(["over"]):
            over = json.loads(store.get("over"))
            raise (ValueError if over["wrong"] else ConnectionError)(over["why"])

    def _missing(self, store: Store) -> list[int]:
        return [rank for rank in range(self.launch.world) if not store.check([str(rank)])]

    def _notice(self, whom: str) -> None:
        if time.monotonic() > self.notice:
            self.notice = float("inf")
            until = max(self.deadline - time.monotonic(), 0)
            _say(self.launch, f"waiting for {whom} at {self.where}, {_in_words(until)} at most from now")

    def _refuse(self, store: Store, why: str) -> NoReturn:
        """Tells the others too, which would wait for a rank that can't come."""
        self._end(store, why, wrong=True)
        raise ValueError(why)

    def _end(self, store: Store, why: str, wrong: bool) -> None:
        store.set("over", json.dumps({"why": why, "wrong": wrong}))

    def _check_devices(self, claims: list[dict[str, Any]]) -> None:
        """Raises ValueError if ranks have unlike devices, or share a GPU, on which nccl would stop."""
        seen: dict[tuple[str, str], int] = {}
        for claim in claims:
            rank, host, device = claim["rank"], claim["host"], claim["device"]
            first = claims[0]["device"]
            if (device == "cpu") != (first == "cpu"):
                without, beside = (rank, 0) if device == "cpu" else (0, rank)
                raise ValueError(
                    f"rank {without} on {claims[without]['host']} sees no GPU, and rank {beside} on "
                    f"{claims[beside]['host']} has one: show each rank a GPU, or none to all (CUDA_VISIBLE_DEVICES)"
                )
            if device != "cpu" and (other := seen.setdefault((host, device), rank)) != rank:
                raise ValueError(
                    f"ranks {other} and {rank} on {host} have the same GPU: show each rank one of its own "
                    "(CUDA_VISIBLE_DEVICES; srun --gpus-per-task=1), or give each its LOCAL_RANK"
                )


def _device_name(device: torch.device) -> str:
    """Return which GPU it is, whatever its number in this process; "cpu" for none."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    return str(getattr(properties, "uuid", None) or f"{os.environ.get('CUDA_VISIBLE_DEVICES')} {device.index}")


def _say(launch: Launch, words: str) -> None:
    with suppress(OSError, ValueError):  # who reads it may be gone
        sys.stderr.write(f"revpatch, rank {launch.rank} on {socket.gethostname()}: {words}\n")
        sys.stderr.flush()


def _ranks_in_words(ranks: list[int], most: int = 8) -> str:
    named = ", ".join(map(str, ranks[:most])) + (f" and {len(ranks) - most} others" if len(ranks) > most else "")
    return f"rank{'s' * (len(ranks) != 1)} {named}"


def _in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
