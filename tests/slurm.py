"""A real Slurm on this machine, for tests: munge, the controller and one node, in a folder of their own.

    with Slurm(folder) as slurm:
        job = slurm.call("sbatch", "--parsable", "job.sbatch")
        slurm.wait(job, "COMPLETED", within=60)

The daemons listen on loopback, and end with it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from ranks import environment, free_port
from waiting import until

CONFIG = """ClusterName=revpatch
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
# A requeued job waits as long as a credential lives: two minutes, or at least five seconds.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """See above."""

    def __init__(self, folder: Path) -> None:
        self.logs = folder / "slurm"
        # A socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.environment = {**environment(), "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        self.logs.mkdir()
        for name in ("state", "spool", "munge"):
            (self.folder / name).mkdir(mode=0o700)
        ports = (free_port(), free_port())
        named = {"folder": self.folder, "host": socket.gethostname(), "user": "root", "ports": ports}
        config = CONFIG.format(**named, cpus=os.cpu_count())
        (self.folder / "slurm.conf").write_text(config)
        munge = self.folder / "munge"
        key = munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": key, "pid-file": munge / "pid", "log-file": munge / "log", "seed-file": munge / "seed"}
        self._daemon(
            "munged",
            "--foreground",
            "--force",
            f"--socket={self.folder / 'munge.socket'}",
            *(f"--{name}={file}" for name, file in files.items()),
        )
        self._until(lambda: (self.folder / "munge.socket").exists(), 10, "munged")
        self._daemon("slurmctld", "-D", "-c")
        self._daemon("slurmd", "-D")
        self._until(lambda: "idle" in self.call("sinfo", "--noheader", "--format=%T"), 30, "slurmd")

    def _daemon(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
        assert program is not None, f"no {name}: run bash tests/packages.sh"
        with (self.logs / name).open("ab") as log:
            self.daemons.append(subprocess.Popen([program, *arguments], env=self.environment, stdout=log, stderr=log))

    def _until(self, holds: Callable[[], bool], within: float, what: str) -> None:
        until(holds, lambda: f"{what}\n{self.said()}", within)

    def said(self) -> str:
        """What the daemons have said."""
        return "\n".join(f"{file.name}:\n{file.read_text()}" for file in sorted(self.logs.iterdir()))

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """Runs one of Slurm's commands and returns what it prints."""
        done = subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else f"{command[0]}: {done.stderr.strip()}"

    def wait(self, job: str, state: str, within: float) -> None:
        """Waits until a job is in a state, as squeue names them."""
        self._until(
            lambda: state in self.call("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"),
            within,
            f"job {job}",
        )

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if len(self.daemons) > 1:
            self.call("scancel", "--full", "--signal=KILL", "--user=root")
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder)
