"""A set of shards that tests get from elsewhere, and what is to be said of one that is broken."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest

from revpatch.shards.format import Manifest, ShardError
from revpatch.shards.shard_set import ShardSet

BLOCKS = np.random.default_rng(0).integers(0, 2**16, size=(53, 16))


def second(folder: Path) -> Path:
    return folder / Manifest.read(folder).shards[1].name


def check_broken(shards: ShardSet, *words: str) -> ShardError:
    placed = f"{shards.location}/" if not shards.location.startswith("pipe:") else "pipe:"
    with pytest.raises(ShardError) as caught:
        shards.read(np.array([9, 14]))
    error, message = caught.value, str(caught.value)
    fault = error.fault
    assert fault is not None and fault.shard == 1
    assert fault.location.startswith(placed) and "shard-000001.tar" in fault.location
    assert message.startswith(f"{fault.location}: shard 1 of 6: expected "), message
    for word in words:
        assert word in message, message
    np.testing.assert_array_equal(shards.read(np.array([9, 20])), BLOCKS[[9, 20]])
    start = time.monotonic()
    with pytest.raises(ShardError, match=re.escape(message)):
        shards.read(np.array([14]))
    assert time.monotonic() - start < 0.1
    return error
