"""The folder of a build that is not finished, beside the folder that it will become: `.NAME.building/`

    lock               held by the build that is at work, with its process id
    recipe.json        what is built, of what; another recipe is refused
    checkpoint.json    where the build is, written every few seconds, after what it counts on is on the disk
    all, train, probe  the shards so far

A killed build leaves it, and the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from revpatch.durable import sync_directory


class UnfinishedBuild:
    """Owns the folder while it is open.

    Raises BlockingIOError when another build has it, and FileExistsError when it holds another recipe's build.
    """

    def __init__(self, out: Path, recipe: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        self.folder = out.with_name(f".{out.name}.building")
        self._out = out
        self._lock = self._acquire()
        try:
            self.checkpoint: dict[str, Any] | None = self._read("checkpoint.json")
            self._check_recipe(recipe, inputs)
            self._write("recipe.json", {**recipe, "inputs": inputs})
        except BaseException:
            os.close(self._lock)
            raise

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Make this the place to go on from."""
        self._write("checkpoint.json", checkpoint)
        self.checkpoint = checkpoint

    def close(self, *, keep: bool) -> None:
        """Let go of the folder, and remove it unless a later build shall go on from it."""
        if not keep:
            # First out of the way: a build that begins meanwhile may lock a file in it, and lose it.
            aside = self.folder.with_name(f"{self.folder.name}-{os.urandom(4).hex()}")
            with contextlib.suppress(FileNotFoundError):
                self.folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        os.close(self._lock)

    def _acquire(self) -> int:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / "lock"
            try:
                lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # the build that had it has just finished
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(lock, 20, 0).decode() or "unknown"
                os.close(lock)
                raise BlockingIOError(
                    f"{self._out}: another build into this folder is at work (process {owner}); "
                    "wait until it has ended, or choose another folder"
                ) from None
            if path.exists() and os.fstat(lock).st_ino == path.stat().st_ino:
                os.ftruncate(lock, 0)
                os.pwrite(lock, str(os.getpid()).encode(), 0)
                return lock
            os.close(lock)  # of a folder that was removed meanwhile

    def _check_recipe(self, recipe: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        found = self._read("recipe.json")
        if found is None or self.checkpoint is None:
            self.checkpoint = None
            return
        differing = [
            f"{key} is {value!r} and was {found.get(key)!r}" for key, value in recipe.items() if found.get(key) != value
        ]
        begun = self.checkpoint["position"]["input"] + 1
        for i, (now, before) in enumerate(zip(inputs, found["inputs"], strict=False)):
            # What has not been read yet may have been mended meanwhile.
            if now != before and (i < begun or now["name"] != before["name"]):
                differing.append(f"{now['name']} has changed" if now["name"] == before["name"] else f"source {i + 1}")
        if len(inputs) != len(found["inputs"]):
            differing.append(f"there are {len(inputs)} files and were {len(found['inputs'])}")
        if differing:
            raise FileExistsError(
                f"{self.folder}: holds an unfinished build of another recipe: {'; '.join(differing[:5])}. "
                "Run the command that it was started with to go on, or delete that folder to start anew"
            )

    def _read(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(
                f"{self.folder / name}: not valid JSON ({error}); delete {self.folder} to start anew"
            ) from None

    def _write(self, name: str, value: Any) -> None:
        temporary = self.folder / f"{name}.new"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.folder / name)
        sync_directory(self.folder)
