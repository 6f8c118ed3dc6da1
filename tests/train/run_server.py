"""Runs the command line in real processes for tests, one a rank, without importing torch anew for each of them.

    request, a JSON line:  {"args": ["train", CONFIG, ...], "world": 2, "output": FILE, "kill": {...}, "harm": [[0, 6]]}
    replies:               {"pids": [...]} at once, {"codes": [...]} when all have ended (negative: the signal)

The processes are forked, so that each is what `python -m revpatch` would be, seconds earlier. `kill` names a rank and
a moment at which it sends itself SIGKILL: the n-th call of "module:function", before it, after it, or ("half") when it
has written half of what it was to write. `wait_at` names a call before which it makes a file OUTPUT.waiting, and waits
until that is removed. `harm` names probes, by phase and step, that find every loss worse by 1 nat. `swap` has one rank
find another folder, `also` gives one more options. `limit` is the most bytes that a file may get, as on a disk that is
full. `cwd` is where they run. `environ` are further variables of theirs, `environs` those of each rank; null takes one
away, and FREE_PORT in one is a port that is free. `closed` are descriptors that are closed. `check` names what of
rank_checks.py is run in place of the command line.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

HALF = ("revpatch.ledger.patch_file:write_atomically", "revpatch.train.snapshot:write_atomically")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def wait_in(file: Path) -> None:
    file.touch()
    deadline = time.monotonic() + 60
    while file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def arm(target: str, call: int, when: str, act: Callable[[], None]) -> None:
    """Lets this process act at a moment."""
    module_name, _, names = target.partition(":")
    holder: Any = importlib.import_module(module_name)
    *path, last = names.split(".")
    for name in path:
        holder = getattr(holder, name)
    original, calls = getattr(holder, last), [0]

    def armed(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and when == "before":
            act()
        if calls[0] == call and when == "half":
            write_half(*args)
        result = original(*args, **options)
        if calls[0] == call and when == "after":
            act()
        return result

    def write_half(*args: Any) -> None:
        if target in HALF:
            path, data = args
            path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp").write_bytes(data[: len(data) // 2])
        else:  # Journal._write
            journal, data = args
            with journal.path.open("ab") as file:
                file.write(data[: len(data) // 2])
        act()

    setattr(holder, last, armed)


def make_worse(harm: list[list[int]]) -> None:
    from revpatch.train.state import Watch
    from revpatch.train.trainer import Trainer

    probe, measure = Trainer._probe, Watch.measure
    now: list[Any] = [None]

    def probing(self: Any, phase: Any, step: int) -> Any:
        now[0] = [phase.index, step]
        try:
            return probe(self, phase, step)
        finally:
            now[0] = None

    def measuring(self: Any) -> Any:
        rise = 1.0 if now[0] in harm else 0.0
        return {key: replace(m, losses=m.losses + rise) for key, m in measure(self).items()}

    Trainer._probe = probing  # type: ignore[method-assign]
    Watch.measure = measuring  # type: ignore[method-assign]


def swap_folders(path: str, other: str) -> None:
    from revpatch.shards.shard_set import ShardSet

    made = ShardSet.__init__

    def make(self: Any, location: Any, *args: Any) -> None:
        made(self, other if str(location) == path else location, *args)

    ShardSet.__init__ = make  # type: ignore[method-assign]


def child(rank: int, port: int, request: dict[str, Any]) -> None:
    world = request["world"]
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own = request["environs"][rank] if "environs" in request else {}
    for key, value in {**places, **request.get("environ", {}), **own}.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = str(value).replace("FREE_PORT", str(port))
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    for descriptor in request.get("closed", []):
        os.close(descriptor)
        setattr(sys, ("stdin", "stdout", "stderr")[descriptor], None)
    os.chdir(request.get("cwd", "."))
    from revpatch import cli

    kill = request.get("kill")
    if kill is not None and kill["rank"] in (rank, "all"):
        arm(kill["target"], kill["call"], kill["when"], die)
    if (wait := request.get("wait_at")) is not None:
        arm(wait["target"], wait["call"], "before", lambda: wait_in(Path(request["output"] + ".waiting")))
    if (limit := request.get("limit")) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    make_worse(request.get("harm", []))
    if (swap := request.get("swap")) is not None and swap["rank"] == rank:
        swap_folders(*swap["path"])
    also = request.get("also", {"rank": None})
    sys.argv = ["revpatch", *request["args"], *(also["options"] if also["rank"] == rank else [])]
    try:
        if (check := request.get("check")) is not None:
            import rank_checks

            rank_checks.main(check, *request["args"])
        else:
            cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)


def main() -> None:
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401
    import torch
    from torch.utils import tensorboard  # noqa: F401
    from transformers.models.gpt2 import modeling_gpt2, tokenization_gpt2  # noqa: F401

    import revpatch.train.run  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        Path(request["output"]).touch()
        pids = []
        for rank in range(request["world"]):
            pid = os.fork()
            if pid == 0:
                child(rank, port, request)
            pids.append(pid)
        print(json.dumps({"pids": pids}), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"codes": codes}), flush=True)


if __name__ == "__main__":
    main()
