"""Two hosts on one machine, for tests of launchers: network namespaces joined by a pair of virtual cables.

    with TwoHosts(folder) as hosts:
        process = hosts.start(0, ["torchrun", ...], log)      # on node0; node1 is 10.77.N.2
        assert process.wait(120) == 0

Each has an address, a name and an /etc/hosts of its own and reaches nothing but the other. Leaving it kills what still
runs in them and takes them away. It needs root and iproute2; without these it fails and says so.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType

from ranks import environment
from waiting import until

NETNS = Path("/etc/netns")


class TwoHosts:
    """See above.

    Args:
        folder: for the daemons' files.

    Attributes:
        addresses: of the two, by node; their names are node0 and node1.
    """

    def __init__(self, folder: Path) -> None:
        number = os.getpid() % 200
        self.folder = folder
        self.names = [f"revpatch-{os.getpid()}-{node}" for node in (0, 1)]
        self.addresses = [f"10.77.{number}.{node + 1}" for node in (0, 1)]
        self._links = [f"rp{os.getpid()}n{node}" for node in (0, 1)]
        self._made: list[Path] = []

    def __enter__(self) -> TwoHosts:
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise AssertionError("two hosts need root and the command `ip` (Debian's iproute2)")
        try:
            self._make()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _make(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
            hosts = NETNS / name / "hosts"  # `ip netns exec` shows it as /etc/hosts
            for folder in (NETNS, hosts.parent):
                if not folder.exists():
                    folder.mkdir()
                    self._made.append(folder)
            lines = ["127.0.0.1 localhost", *(f"{self.addresses[node]} node{node}" for node in (0, 1))]
            hosts.write_text("\n".join(lines) + "\n")
        _ip("link", "add", self._links[0], "type", "veth", "peer", "name", self._links[1])
        for name, link, address in zip(self.names, self._links, self.addresses, strict=True):
            _ip("link", "set", link, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            _ip("-n", name, "link", "set", link, "up")
            _ip("-n", name, "link", "set", "lo", "up")

    def command(self, node: int, command: list[str]) -> list[str]:
        """The command, on a node."""
        named = ["unshare", "--uts", "bash", "-c", f'hostname node{node} && exec "$@"', "bash"]
        return ["ip", "netns", "exec", self.names[node], *named, *command]

    def start(self, node: int, command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Starts a command on a node; what it says goes to the end of `log`."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(node, command), env={**environment(), **variables}, stdout=file, stderr=file
            )

    def processes(self, node: int) -> list[int]:
        """All that run on a node."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[node]], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def rank(self, rank: int, within: float = 300) -> int:
        """The process of a rank, on whichever node; waits for it."""

        def running() -> int | None:
            for pid in [pid for node in (0, 1) for pid in self.processes(node)]:
                try:
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if f"RANK={rank}".encode() in variables and any(each.startswith(b"LOCAL_RANK=") for each in variables):
                    return pid
            return None

        found = until(running, f"rank {rank}", within)
        assert found is not None
        return found

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for node, name in enumerate(self.names):
            while left := self.processes(node):
                for pid in left:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                time.sleep(0.05)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        for folder in reversed(self._made):
            (folder / "hosts").unlink(missing_ok=True)
            folder.rmdir()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr.strip()}; two hosts need CAP_NET_ADMIN"
