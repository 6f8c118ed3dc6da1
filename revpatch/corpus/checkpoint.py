"""What a build has written so far, and the folder of it beside the one that it will become: `.NAME.building/`

    lock               held by the build that is at work, with its process id
    recipe.json        what is built, of what; another recipe is refused
    checkpoint.json    where the build is, written every few seconds, after what it counts on is on the disk
    all, train, probe  the shards so far of each split

A killed build leaves it, and the same command resumes from the last checkpoint. What is told of the inputs may be
another then from the place on where reading resumes; what was read must be what it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from revpatch.corpus.encode import COUNTED, Encoded
from revpatch.durable import lock_file, sync_directory
from revpatch.shards.format import Shard, ShardWriter

BAD_LISTED = 20
"""So many of the documents that were left out are listed."""


class Split:
    """One side: its counters, its shards, and the tokens that don't fill a block yet."""

    def __init__(self, folder: Path, dtype: str, block_size: int, blocks_per_shard: int) -> None:
        self.folder = folder
        self.writer = ShardWriter(folder, dtype, blocks_per_shard)
        self.block_size = block_size
        self.documents = 0
        self.empty_documents = 0
        self.tokens = 0
        self.highest_id = 0
        self.counts = np.zeros(len(COUNTED), dtype=np.int64)
        self.rest = np.empty(0, dtype=dtype)

    def append(self, ids: np.ndarray[Any, Any]) -> None:
        """Write the blocks that these tokens fill, and keep the rest."""
        self.tokens += len(ids)
        row = np.concatenate([self.rest, ids])
        whole = len(row) // self.block_size * self.block_size
        if whole:
            self.highest_id = max(self.highest_id, int(row[:whole].max()))
        self.writer.write(row[:whole].reshape(-1, self.block_size))
        self.rest = row[whole:].copy()

    def state(self) -> dict[str, Any]:
        """Return all that `restore` needs, as plain values; what was written is on the disk when this returns."""
        self.writer.sync()
        return {
            "documents": self.documents,
            "empty_documents": self.empty_documents,
            "tokens": self.tokens,
            "highest_id": self.highest_id,
            "counts": self.counts.tolist(),
            "rest": self.rest.tolist(),
            "shards": [asdict(shard) for shard in self.writer.shards],
            "open_blocks": self.writer.open_blocks,
        }

    def restore(self, state: dict[str, Any], *, is_whole: bool) -> None:
        """Go on from a state. Raises ShardError when the shards' files are not what it says.

        A split that is whole is not written any more, and its files may have been moved to where they belong.
        """
        self.documents, self.empty_documents = state["documents"], state["empty_documents"]
        self.tokens = state["tokens"]
        # Not in what an older revpatch left: then nothing is known of the ids.
        self.highest_id = state.get("highest_id", np.iinfo(self.rest.dtype).max)
        counts = state.get("counts", [])  # an older revpatch counted less
        self.counts[: len(counts)] = counts
        self.rest = np.array(state["rest"], dtype=self.rest.dtype)
        shards = [Shard(**shard) for shard in state["shards"]]
        if is_whole:
            self.writer.shards, self.writer.blocks = shards, sum(shard.blocks for shard in shards)
        else:
            self.writer.resume(shards, state["open_blocks"], self.block_size * self.rest.itemsize)


class Splits:
    """Both sides, or one when nothing is held out.

    Args:
        train: takes the documents that are not held out, up to `limit` tokens, where everything ends.
        probe: takes the others.

    Documents that were left out are on neither side: `bad_documents` counts them, and `bad` lists the first.
    """

    def __init__(
        self, train: Split, probe: Split | None, limit: int | None, eos: int, bos: tuple[int, ...] = ()
    ) -> None:
        self.train = train
        self.probe = probe
        self.limit = limit
        self.bad_documents = 0
        self.bad: list[str] = []
        self._eos = np.array([eos], dtype=train.rest.dtype)
        self._bos = np.array(bos, dtype=train.rest.dtype)
        self._open_tokens = 0

    @property
    def sides(self) -> list[Split]:
        return [self.train] + ([self.probe] if self.probe is not None else [])

    @property
    def full(self) -> bool:
        return self.limit is not None and self.train.tokens >= self.limit

    def start(self) -> None:
        """Make the folders, without what a killed build may have left in them before its first checkpoint."""
        for row in self.sides:
            shutil.rmtree(row.folder, ignore_errors=True)
            row.folder.mkdir(parents=True)

    def close(self) -> None:
        """Finish the last shards."""
        for row in self.sides:
            row.writer.close()

    def counts(self) -> tuple[int, int, int]:
        """Documents, tokens and blocks of both sides together."""
        documents, tokens, blocks = zip(
            *((row.documents, row.tokens, row.writer.blocks) for row in self.sides), strict=True
        )
        return sum(documents), sum(tokens), sum(blocks)

    def text_counts(self) -> tuple[int, int, int, int]:
        """Return the columns of `COUNTED`, of both sides together."""
        characters, lost, special, pages = np.sum([row.counts for row in self.sides], axis=0).tolist()
        return characters, lost, special, pages

    def add_documents(self, encoded: Encoded, bad: Sequence[tuple[int, str]] = ()) -> None:
        """Take whole documents, in order, until the training side is full.

        `bad` are those left out between them: the number of documents before each, and what is told of it.
        """
        ids, lengths, held_out, counts = encoded.ids, encoded.lengths, encoded.held_out, encoded.counts
        if self.limit is not None and len(lengths):
            after = self.train.tokens + np.cumsum(np.where(held_out, 0, lengths))
            if after[-1] >= self.limit:
                last = int(np.argmax(after >= self.limit))
                lengths, held_out, counts = lengths[: last + 1].copy(), held_out[: last + 1], counts[: last + 1]
                lengths[last] -= after[last] - self.limit
                ids = ids[: lengths.sum()]
        held_ids = np.repeat(held_out, lengths)
        self._add(self.train, ids[~held_ids], lengths[~held_out], counts[~held_out])
        if self.probe is not None:
            self._add(self.probe, ids[held_ids], lengths[held_out], counts[held_out])
        # Not those behind the document that made it full, as another number of documents a chunk would not reach them.
        told = [reason for place, reason in bad if not self.full or place < len(lengths)]
        self.bad_documents += len(told)
        self.bad = [*self.bad, *told][:BAD_LISTED]

    def add_piece(self, encoded: Encoded, held_out: bool, last: bool) -> None:
        """Take the next piece of a long document; all of its pieces go to one side."""
        row, ids = self.probe if held_out and self.probe is not None else self.train, encoded.ids
        row.counts += encoded.counts.sum(axis=0)
        if len(ids) and not self._open_tokens and not np.array_equal(ids[: len(self._bos)], self._bos):
            ids = np.concatenate([self._bos, ids])
        self._open_tokens += len(ids)
        if last and self._open_tokens:
            ids = np.concatenate([ids, self._eos])
        if self.limit is not None and row is self.train:
            ids = ids[: self.limit - row.tokens]
        row.append(ids)
        if last or self.full:
            row.documents += bool(self._open_tokens)
            row.empty_documents += not self._open_tokens
            self._open_tokens = 0

    def state(self) -> dict[str, Any]:
        """As a split's."""
        probe = self.probe.state() if self.probe is not None else None
        bad = {"bad_documents": self.bad_documents, "bad": self.bad}
        return {"train": self.train.state(), "probe": probe, "open_tokens": self._open_tokens, **bad}

    def restore(self, state: dict[str, Any], *, is_whole: bool) -> None:
        """As a split's."""
        self.train.restore(state["train"], is_whole=is_whole)
        if self.probe is not None:
            self.probe.restore(state["probe"], is_whole=is_whole)
        self._open_tokens = state["open_tokens"]
        self.bad_documents, self.bad = state["bad_documents"], state["bad"]

    @staticmethod
    def _add(
        split: Split, ids: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]
    ) -> None:
        split.counts += counts.sum(axis=0)
        split.documents += int(np.count_nonzero(lengths))
        split.empty_documents += int(np.count_nonzero(lengths == 0))
        split.append(ids)


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
