"""A set of shards of one size for tests of the cache, and processes that read it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

from revpatch.shards.format import Manifest

BLOCKS = np.random.default_rng(1).integers(0, 2**16, size=(60, 16))
SHARD_BYTES = 20480
READER = """
import os, sys
import numpy as np
from revpatch.shards.cache import ShardCache
from revpatch.shards.shard_set import ShardSet

url, folder, budget, processes, reads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
children = []
for rank in range(1, processes):  # forked, as importing takes seconds
    children.append(os.fork())
    if not children[-1]:
        break
else:
    rank = 0
random = np.random.default_rng(rank if reads > 2 else 0)
with ShardCache(folder, budget) as cache:
    shards = ShardSet(url, cache)
    for _ in range(reads):
        ids = random.integers(0, len(shards), size=4)
        line = " ".join(map(str, [*ids, *shards.read(ids)[:, 0]]))
        os.write(1, f"{line}\\n".encode())  # in one piece
sys.exit(any(os.waitpid(child, 0)[1] for child in children if rank == 0))
"""


def check_output(process: subprocess.Popen, reads: int) -> None:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    lines = [list(map(int, line.split())) for line in output.splitlines()]
    assert len(lines) == reads
    for line in lines:
        assert line[4:] == BLOCKS[line[:4], 0].tolist()


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def tar_of(folder: Path, where: Path, shard: int) -> Path:
    return where / f"{Manifest.read(folder).shards[shard].sha256}.tar"
