"""The folder of a build that is not finished, beside the folder that it will become: `.NAME.building/`

    lock               held by the build that is at work, with its process id
    recipe.json        what is built, of what; another recipe is refused
    checkpoint.json    where the build is, written every few seconds, after what it counts on is on the disk
    all, train, probe  the shards so far

A killed build leaves it, and the same command resumes from the last checkpoint. What is told of the inputs may be
another then from the place on where reading resumes; what was read must be what it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

from revpatch.durable import sync_directory
from revpatch.locks import lock_file


class UnfinishedBuild:
    """Owns the folder while it is open.

    `checkpoint` is where to resume, or None. `changed` says that the input in which that lies is not what it was when
    the checkpoint was written, so that what had been read of it must be compared.

    Raises BlockingIOError when another build has it, and FileExistsError when it holds another recipe's build.
    """

    def __init__(self, out: Path, recipe: dict[str, Any], inputs: list[dict[str, Any]]) -> None:
        self.folder = out.with_name(f".{out.name}.building")
        self._out = out
        self._lock = self._acquire()
        try:
            self.checkpoint: dict[str, Any] | None = self._read("checkpoint.json")
            self.changed = self._check_recipe(recipe, inputs)
            self._recipe: dict[str, Any] | None = {**recipe, "inputs": inputs}
            if self.checkpoint is None:
                self._write_recipe()
        except BaseException:
            self._lock.close()
            raise

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Make this the place to resume from."""
        if self._recipe is not None:
            self._write_recipe()
        self._write("checkpoint.json", checkpoint)
        self.checkpoint = checkpoint

    def close(self, *, keep: bool) -> None:
        """Let go of the folder, and remove it unless a later build shall resume from it."""
        if not keep:
            # First out of the way: a build that begins meanwhile may lock a file in it, and lose it.
            aside = self.folder.with_name(f"{self.folder.name}-{os.urandom(4).hex()}")
            with contextlib.suppress(FileNotFoundError):
                self.folder.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        self._lock.close()

    def _acquire(self) -> IO[Any]:
        path = self.folder / "lock"
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                if (lock := lock_file(path)) is not None:
                    path.write_text(str(os.getpid()), encoding="ascii")
                    return lock
                owner = path.read_text(encoding="ascii") or "unknown"
            except FileNotFoundError:  # the build that had it has just finished
                continue
            raise BlockingIOError(
                f"{self._out}: another build into this folder is at work (process {owner}); "
                "wait until it has ended, or choose another folder"
            )

    def _check_recipe(self, recipe: dict[str, Any], inputs: list[dict[str, Any]]) -> bool:
        """Refuse another recipe, and inputs that are not those that were read. Return whether the one is changed in
        which reading resumes."""
        found = self._read("recipe.json")
        if found is None or self.checkpoint is None:
            self.checkpoint = None
            return False
        differing = [
            f"{key} is {value!r} and was {found.get(key)!r}" for key, value in recipe.items() if found.get(key) != value
        ]
        there = found["inputs"]
        here = self.checkpoint["position"]["input"]
        if here == len(there) and len(inputs) != len(there):
            differing.append(f"there are {len(inputs)} files and were {len(there)}, which had all been read")
        for i, before in enumerate(there[: here + 1]):
            now = inputs[i] if i < len(inputs) else {"name": "nothing"}
            if now["name"] != before["name"]:
                differing.append(f"file {i + 1} is {now['name']} and was {before['name']}, which had been read")
            elif now != before and i < here:
                differing.append(f"{now['name']} has changed after it had been read")
        if differing:
            raise FileExistsError(
                f"{self.folder}: holds an unfinished build of another recipe: {'; '.join(differing[:5])}. "
                "Run the command that it was started with to resume it, or delete that folder to start anew"
            )
        return bool(here < len(there) and inputs[here] != there[here])

    def _write_recipe(self) -> None:
        assert self._recipe is not None
        self._write("recipe.json", self._recipe)
        self._recipe = None

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
