"""Real ssh daemons on both of two hosts, for tests: keys and configuration in a folder of their own.

    with Sshd(hosts, folder) as sshd:
        hosts.start(0, ["ssh", "node1", "hostname"], log, **sshd.variables)

The variables put first on PATH an `ssh` that reads that configuration and nothing of the user's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

from ranks import BIN
from two_hosts import TwoHosts
from waiting import until

PRIVILEGES = Path("/run/sshd")
"""sshd's folder for privilege separation, which Debian's service makes."""


class Sshd:
    """See above; `variables` are for `TwoHosts.start`."""

    def __init__(self, hosts: TwoHosts, folder: Path) -> None:
        self.hosts, self.folder = hosts, folder / "ssh"
        self.variables = {"PATH": f"{self.folder}:{BIN}:{os.environ['PATH']}"}
        self._made = False

    def __enter__(self) -> Sshd:
        daemon = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
        assert daemon is not None and shutil.which("pdsh") is not None, "no sshd or pdsh: run bash tests/packages.sh"
        self.folder.mkdir(mode=0o700)
        key, host_key = self.folder / "key", self.folder / "host_key"
        for file in (key, host_key):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(file)], check=True)
        public = host_key.with_suffix(".pub").read_text()
        (self.folder / "known_hosts").write_text("".join(f"node{node} {public}" for node in (0, 1)))
        client = self._write("config", {"IdentityFile": key, "UserKnownHostsFile": self.folder / "known_hosts"})
        wrapper = self.folder / "ssh"
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {client} "$@"\n')
        wrapper.chmod(0o700)
        server = {
            "HostKey": host_key,
            "AuthorizedKeysFile": key.with_suffix(".pub"),
            "StrictModes": "no",
            "UsePAM": "no",
            "PidFile": "none",
        }
        if not PRIVILEGES.exists():
            PRIVILEGES.mkdir(mode=0o755)
            self._made = True
        for node in (0, 1):
            file = self._write(f"sshd{node}", {"ListenAddress": self.hosts.addresses[node], **server})
            self.hosts.start(node, [daemon, "-D", "-e", "-f", str(file)], self.folder / "log")
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _write(self, name: str, settings: dict[str, object]) -> Path:
        file = self.folder / name
        file.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
        return file

    def _wait(self) -> None:
        log = self.folder / "log"
        for node in ("node0", "node1"):
            check = ["ssh", node, "true"]
            until(
                lambda check=check: self.hosts.start(0, check, log, **self.variables).wait(20) == 0,
                lambda node=node: f"ssh to {node}: {log.read_text()}",
                30,
            )

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._made:  # the daemons end with the hosts
            PRIVILEGES.rmdir()
