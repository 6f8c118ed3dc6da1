"""Start real ranks for tests: any launcher around the command line, or a server that forks them."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revpatch.durable import to_plain
from revpatch.ledger.ledger import Ledger, effective

SERVER = Path(__file__).parent / "train/run_server.py"
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(ranks: int) -> list[str]:
    return [str(BIN / "torchrun"), f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]


def environment() -> dict[str, str]:
    """One thread a rank and no hub; nothing of a launcher around the tests."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    path = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}


def run(command: list[str], timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Runs a launcher to its end; if it does not end, kills it and all that it started, and fails."""
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"did not end within {timeout} s: {' '.join(command)}\n{output}") from None
    return subprocess.CompletedProcess(command, process.returncode, output)


def descendants(process: int) -> list[int]:
    """All that a process has started, and what these have."""
    children = [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return children + [pid for child in children for pid in descendants(child)]


def rank_pid(launcher: int, rank: int) -> int:
    """The process of a rank, among all that a launcher has started."""
    waiting = [launcher]
    while waiting:
        parent = waiting.pop()
        for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            variables = "\0" + Path(f"/proc/{pid}/environ").read_text()
            if f"\0RANK={rank}\0" in variables and "\0LOCAL_RANK=" in variables:
                return int(pid)
            waiting.append(int(pid))
    raise AssertionError(f"no rank {rank} under {launcher}")


class RunServer:
    """A process that forks ranks of the command line: see run_server.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def start(self, *args: object, output: Path, world: int = 1, **request: Any) -> list[int]:
        """Starts ranks and returns their process ids."""
        assert self.process.stdin is not None
        asked = {"args": [str(arg) for arg in args], "output": str(output), "world": world, **request}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        pids: list[int] = self._reply(60)["pids"]
        return pids

    def wait(self, timeout: float = 120) -> list[int]:
        """The ranks' exit codes; negative is a signal."""
        codes: list[int] = self._reply(timeout)["codes"]
        return codes

    def run(self, *args: object, output: Path, world: int = 1, timeout: float = 120, **request: Any) -> list[int]:
        """Starts ranks and waits for their end."""
        self.start(*args, output=output, world=world, **request)
        return self.wait(timeout)

    def check(self, name: str, config: Path, *overrides: str, ranks: int = 2, **request: Any) -> dict[str, Any]:
        """What a check of rank_checks.py found on so many ranks."""
        out, log = config.with_name(f"{name}.json"), config.with_name(f"{name}.log")
        codes = self.run(config, out, *overrides, output=log, world=ranks, check=name, **request)
        assert codes == [0] * ranks, log.read_text()
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    def close(self) -> None:
        """Ends it, and whatever it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _reply(self, timeout: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], timeout)[0]:
            self.close()
            raise AssertionError(f"the ranks did not end within {timeout} s")
        line = self.process.stdout.readline()
        assert line, "the server of runs has died"
        reply: dict[str, Any] = json.loads(line)
        return reply


@dataclass
class Runs:
    """Starts the command line on one config, each run in a folder of its own."""

    server: RunServer
    config: Path
    folder: Path
    harm: list[list[int]] = field(default_factory=list)

    def path(self, name: str) -> Path:
        return self.folder / name

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start(self, name: str, *options: str, **request: Any) -> list[int]:
        args = ["train", self.config, "--set", f"output_dir={self.path(name)}", *options]
        self.log(name).write_text("")
        return self.server.start(*args, output=self.log(name), **{"world": 2, "harm": self.harm, **request})

    def run(self, name: str, *options: str, timeout: float = 120, **request: Any) -> list[int]:
        self.start(name, *options, **request)
        return self.server.wait(timeout)

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        events = Ledger(self.path(name) / "ledger", readonly=True).journal.events()
        return [to_plain(event.as_record()) for event in effective(events) if event.event == kind]

    def commits(self, name: str) -> list[str]:
        return [event["sha256"] for event in self.events(name, "entry") if event["kind"] == "commit"]
