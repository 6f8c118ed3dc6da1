"""The machine around a command: its terminal, its CPUs, its file systems, its home, and what ends it from outside."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import pwd
import select
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import Call
from full_disk import full_disk
from ranks import Runs, RunServer
from toy import Toy
from waiting import until

from revpatch import doctor
from revpatch.distributed import cores, quota_of
from revpatch.durable import lock_file, sync_directory, write_atomically
from revpatch.monitoring.tensorboard import Board
from revpatch.shards.cache import PlacedShard, ShardCache, ShardCacheError
from revpatch.shards.format import Shard

# --- what is printed gets lost ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(toy: Toy, server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of one short config; that in "whole" was seen to its end."""
    folder = tmp_path_factory.mktemp("lost")
    phases = [{"name": "first", "shards": str(toy.shards("first")), "steps": 4}]
    config = toy.config_file(folder, phases=phases, probes={"every": 2, "sets": []}, monitoring={"every": 1})
    runs = Runs(server, config, folder)
    assert runs.run("whole", world=1) == [0], runs.log("whole").read_text()
    return runs


def a_pipe(runs: Runs, start: Callable[[str], object]) -> None:
    """Whose reader ends after the first bytes."""
    path = runs.folder / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # first, as a writer waits for one
    start(str(path))
    until(lambda: select.select([reader], [], [], 1)[0] and os.read(reader, 10))
    os.close(reader)


@pytest.mark.parametrize("where", ["a pipe", "a full device"])
def test_training_does_not_depend_on_what_is_printed(runs: Runs, where: str) -> None:
    name = where.replace(" ", "_")
    options = ["train", runs.config, "--set", f"output_dir={runs.path(name)}"]
    if where == "a pipe":
        a_pipe(runs, lambda output: [runs.server.start(*options, output=Path(output))])
    else:
        runs.server.start(*options, output=Path("/dev/full"))
    assert runs.server.wait() == [0]
    assert runs.commits(name) == runs.commits("whole")
    assert "first committed" in (runs.path(name) / "train.log").read_text(encoding="utf-8")


def test_event_files_on_a_full_disk_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("revpatch"), "propagate", True)
    with full_disk(1000), Board(tmp_path / "tensorboard") as board:
        for step in range(500):
            board.scalars(step, {"loss/lm": 1.0, "probe/x/limit": 2.0})
        board.text(500, "event/commit", "kept")
    assert [record.getMessage().count("TensorBoard's files are left out") for record in caplog.records] == [1]
    assert "Traceback" not in "".join(capfd.readouterr())
    assert not [thread for thread in threading.enumerate() if thread.name == "revpatch-doing"]


# --- what ends a command ----------------------------------------------------------------------------------------------

ENDS: list[tuple[BaseException, int, list[str]]] = [
    (KeyboardInterrupt(), 130, ["stopped by Ctrl-C"]),
    (MemoryError(), 1, ["this machine has no memory left", "batch.micro_blocks"]),
    (
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ..."),
        1,
        ["the GPU has no memory left", "Tried to allocate 2 GiB", "batch.micro_blocks"],
    ),
    (RecursionError("maximum recursion depth exceeded"), 2, ["nested too deeply"]),
    (ModuleNotFoundError("No module named 'x'", name="x.y"), 1, ["package x", "pip install x"]),
    (PermissionError(errno.EACCES, "Permission denied", "/.cache/huggingface/hub"), 2, ["HF_HOME names another"]),
    (FileNotFoundError(errno.ENOENT, "No such file", "x"), 2, ["x: No such file", "spelling"]),
    (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, ["/x: No space left", "make room"]),
    (ValueError("Expecting\n value"), 2, ["Expecting value", "not foreseen"]),
]
"""What a command raises from a library; the exit code, and words of the one line."""


@pytest.mark.parametrize(("error", "code", "words"), ENDS)
def test_what_ends_a_command_is_one_line(
    revpatch: Call, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: list[str]
) -> None:
    def fail(places: Any) -> None:
        (lambda: (_ for _ in ()).throw(error))().__next__()  # no `raise` of revpatch's

    monkeypatch.setattr(doctor, "examine", fail)
    result = revpatch("doctor")
    assert (result.code, result.out) == (code, ""), result
    assert result.err.startswith("revpatch: ") and result.err.count("\n") == 1, result.err
    assert [word for word in words if word not in result.err] == [], result.err


def test_a_fault_of_ours_is_called_one_and_shows_where(revpatch: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: dict[str, int] = {}
    monkeypatch.setattr(doctor, "examine", lambda places: nothing["x"])
    result = revpatch("doctor")
    first, second, *_ = result.err.splitlines()
    assert result.code == 1 and second.startswith("Traceback")
    assert "internal error" in first and "KeyError" in first and "report it" in first


# --- what a command is busy with --------------------------------------------------------------------------------------


def test_a_slow_command_says_what_it_does(
    runs: Runs, revpatch: Call, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs.run("slow", world=1, environ={"REVPATCH_SAY_AFTER": "0"}) == [0]
    shown = runs.log("slow").read_text()
    stages = [
        "loading torch and transformers (",
        "checking base, tokenizer and shards (",
        f"loading the base {toy.base} (",
        "hashing the base, reading the probe sets (",
        "first 1/4",
    ]
    found = [shown.find(stage) for stage in stages]
    assert -1 not in found and found == sorted(found), shown
    assert "so far" not in runs.log("whole").read_text(), "a quick one says nothing"
    monkeypatch.setenv("REVPATCH_SAY_AFTER", "0")
    result = revpatch("probe", "--patch", runs.path("whole"), toy.shards("base_probe"), "--json")
    assert "loading the base" in result.err and "measuring the losses on base_probe" in result.err
    assert json.loads(result.out)["ranks"] == 1


# --- CPUs, locks, folders, homes, marks -------------------------------------------------------------------------------

V1 = {"proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n"}
V1 |= {f"sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_{name}_us": n for name, n in (("quota", "200000"), ("period", "100000"))}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 0.5),
        (V1, 2.0),
        ({"proc/self/cgroup": "??\n0::/\n", "sys/fs/cgroup/cpu.max": "x y z"}, None),
    ],
)
def test_no_more_cpus_are_used_than_there_is_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: float | None
) -> None:
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert quota_of(tmp_path) == quota
    assert cores(tmp_path) == (64 if quota is None else max(1, int(quota)))


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """No file can be locked but those among this machine's temporary files, as on a shared file system."""
    flock = fcntl.flock

    def refuse(file: Any, how: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if not Path(f"/proc/self/fd/{descriptor}").readlink().name.startswith("revpatch-"):
            raise OSError(number, os.strerror(number))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_no_file_can_be_locked_this_machine_is_kept_out_and_others_are_named(
    toy: Toy,
    tmp_path: Path,
    revpatch: Call,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(logging.getLogger("revpatch"), "propagate", True)
    without_locks(monkeypatch, number)
    first = lock_file(tmp_path / "held")
    assert first is not None and lock_file(tmp_path / "held") is None
    assert f"{tmp_path}: its file system has no locks" in caplog.text and "another machine" in caplog.text
    first.close()
    (tmp_path / "text.txt").write_text("the patch learns what a stream brings " * 20)
    made = revpatch(
        "shards", "build", tmp_path / "text.txt", "--tokenizer", toy.base, "--block-size", 16, "--out", tmp_path / "out"
    )
    assert made.code == 0 and revpatch("shards", "verify", tmp_path / "out").code == 0
    with pytest.raises(ShardCacheError, match=r"no locks.*shard_cache to a folder on a local disk"):
        ShardCache(tmp_path / "cache", 1000).get(PlacedShard("pipe:true", 0, 1, Shard("a", 1, 10, "0" * 64), 0, ""))


@pytest.mark.parametrize(("number", "tolerated"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_folders_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, tolerated: bool
) -> None:
    sync = os.fsync

    def refuse(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    if tolerated:
        write_atomically(tmp_path / "file", b"whole")
        assert (tmp_path / "file").read_bytes() == b"whole"
    else:
        with pytest.raises(OSError, match="could not be synced") as caught:
            sync_directory(tmp_path)
        assert caught.value.filename == str(tmp_path)


def test_caches_go_to_a_private_folder_where_there_is_no_home(
    tmp_path: Path, revpatch: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(user: int) -> Any:
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("USER", "")
    monkeypatch.setenv("HOME", "")
    result = revpatch("ledger", "log", tmp_path / "none")
    folder = tmp_path / f"revpatch-home-{os.geteuid()}"
    first, second = result.err.splitlines()
    assert result.code == 2 and "none" in second
    assert f"no home folder, so caches go to {folder}" in first and "HF_HOME" in first
    assert os.environ["HOME"] == str(folder) and folder.stat().st_mode & 0o777 == 0o700


def test_a_run_where_no_folder_can_be_made(toy: Toy, tmp_path: Path, revpatch: Call) -> None:
    (tmp_path / "file").write_text("")
    result = revpatch("train", toy.config_file(tmp_path), "--set", f"output_dir={tmp_path / 'file/run'}")
    assert result.code == 2 and "Traceback" not in result.err
    words = f"output_dir = {tmp_path / 'file/run'}: the folder can't be made"
    assert words in result.err and "--set output_dir" in result.err, result.err
