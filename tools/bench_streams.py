"""What reading shards costs, and how well it shuffles, beside what is asked.

    python tools/bench_streams.py [--json FILE] [--blocks 40000] [--rounds 5]

Builds sets of random tokens in a temporary folder and measures:

- blocks/s of ShardSet.read, hashing included, over those of a bare webdataset loop over the same tars, in turn within
  each round, page cache warm; in batches of 32 blocks, in the lanes' order (window 8192) and one after another;
- the first batch at step 0, in the middle and at the end, of shards that are hashed already and of a set just opened;
- shards fetched from an HTTP server on loopback to start in the middle;
- the spread of block positions in the order of the corpus within a batch of 32 over that of a random permutation, and
  the same of the batches' mean positions: if documents are sorted, this is what is left of the sorting. Lanes alone
  spread a batch over the corpus; what a window adds shows in how far a lane jumps from one block to the next.

Prints a table and exits with 1 if a figure does not hold.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from figures import Figure, machine, show
from progress import Progress
from random_shards import write_random_set

from revpatch.shards.cache import ShardCache
from revpatch.shards.format import Manifest
from revpatch.shards.mixture import Lanes
from revpatch.shards.shard_set import ShardSet

LANES, WINDOW, SHARDS = 32, 8192, 12
WINDOWS = (1, 64, 1024, 8192)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_bare(folder: Path, manifest: Manifest) -> None:
    found = 0
    for sample in webdataset.WebDataset([str(folder / shard.name) for shard in manifest.shards], shardshuffle=False):
        np.frombuffer(sample["bin"], dtype="<u2")
        found += 1
    assert found == manifest.blocks


def read_lanes(folder: Path, lanes: Lanes) -> None:
    with ShardSet(folder) as shards:
        for step in range(lanes.steps_per_epoch()):
            shards.read(lanes.block_ids(step))


def read_sequential(folder: Path, manifest: Manifest) -> None:
    with ShardSet(folder) as shards:
        for start in range(0, manifest.blocks - LANES + 1, LANES):
            shards.read(np.arange(start, start + LANES))


def speed(folder: Path, manifest: Manifest, rounds: int, progress: Progress) -> list[Figure]:
    """Blocks/s over those of a bare loop; each round measures all, so that a busy machine is busy for all."""
    lanes = Lanes(manifest, LANES, 0, WINDOW, repeat=False)
    ways = {
        "bare": lambda: read_bare(folder, manifest),
        "lanes": lambda: read_lanes(folder, lanes),
        "sequential": lambda: read_sequential(folder, manifest),
    }
    times = []
    for number in range(rounds + 1):
        with progress.step(reading(manifest.block_size)):
            measured = {way: seconds(work) for way, work in ways.items()}
        if number:  # the first round fills the page cache
            times.append(measured)
    rows = []
    for way in ("lanes", "sequential"):
        ratio = statistics.median(measured["bare"] / measured[way] for measured in times)
        rate = manifest.blocks / statistics.median(measured[way] for measured in times)
        name = f"blocks/s, {manifest.block_size} tokens, {way} ({rate:,.0f}) / bare webdataset"
        rows.append(Figure(name, ">= 0.9", round(ratio, 2), "ratio", ratio >= 0.9))
    return rows


def reading(block_size: int) -> str:
    """The step of reading all blocks of that size in every way."""
    return f"reading blocks of {block_size} tokens"


def seek(folder: Path, manifest: Manifest, rounds: int) -> list[Figure]:
    """Milliseconds to the first batch of a fresh order, at three places."""
    last = Lanes(manifest, LANES, 0, WINDOW, repeat=False).steps_per_epoch() - 1
    steps = {"step 0": 0, "the middle": last // 2, "the end": last}

    def first_batch(shards: ShardSet, step: int) -> None:
        shards.read(Lanes(manifest, LANES, 0, WINDOW, repeat=False).block_ids(step))

    def cold(step: int) -> None:
        with ShardSet(folder) as shards:
            first_batch(shards, step)

    rows = []
    with ShardSet(folder) as shards:
        shards.verify()
        for kind, work in (("hashed", partial(first_batch, shards)), ("just opened", cold)):
            times = [{place: seconds(partial(work, step)) for place, step in steps.items()} for _ in range(4 * rounds)]
            medians = {place: statistics.median(measured[place] for measured in times) for place in steps}
            for place, median in medians.items():
                ratio = median / medians["step 0"]
                asked = "<= 2 × step 0" if place != "step 0" else "the measure"
                rows.append(Figure(f"first batch at {place}, {kind}", asked, round(1000 * median, 2), "ms", ratio <= 2))
    return rows


_requests: list[str] = []


class _CountingHandler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        _requests.append(self.path)
        super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


def fetched(folder: Path, manifest: Manifest, cache: Path) -> list[Figure]:
    """Shards fetched for the first batch in the middle, by a rank that has 4 of the lanes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_CountingHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with ShardCache(cache, 2**34) as opened, ShardSet(f"http://127.0.0.1:{server.server_port}", opened) as shards:
        lanes = Lanes(manifest, LANES, 0, WINDOW, repeat=False)
        shards.read(lanes.block_ids(lanes.steps_per_epoch() // 2, 0, 4))
    server.shutdown()
    count = sum(path.endswith(".tar") for path in _requests)
    name = f"shards of {len(manifest.shards)} fetched to start 4 lanes in the middle, over http"
    return [Figure(name, "<= 4", count, "shards", count <= 4)]


def shuffling(manifest: Manifest) -> list[Figure]:
    """Positions within batches, against a random permutation of all blocks; the smallest window that is as good."""
    rows, good = [], None
    random = np.random.default_rng(0).permutation(manifest.blocks)
    reference = _spread(random[: manifest.blocks // LANES * LANES].reshape(-1, LANES) / manifest.blocks)
    for window in WINDOWS:
        lanes = Lanes(manifest, LANES, 0, window, repeat=False)
        batches = np.array([lanes.block_ids(step) for step in range(lanes.steps_per_epoch())]) / manifest.blocks
        step = np.abs(np.diff(batches, axis=0)).mean() * 3  # two random positions are a third of the corpus apart
        within, means = (found / expected for found, expected in zip(_spread(batches), reference, strict=True))
        if good is None and within >= 0.95:
            good = window
        holds = within >= 0.95 or window < WINDOW
        asked = ">= 0.95" if window >= WINDOW else "to compare"
        rows.append(Figure(f"spread within a batch / random, window {window}", asked, round(within, 3), "ratio", holds))
        rows.append(
            Figure(f"variance of batch means / random, window {window}", "to compare", round(means, 2), "ratio", True)
        )
        rows.append(
            Figure(
                f"a lane's distance to its next block / random, window {window}",
                "to compare",
                round(step, 3),
                "ratio",
                True,
            )
        )
    rows.append(
        Figure("smallest window with a spread >= 0.95", f"<= {WINDOW}", good or "none", "blocks", good is not None)
    )
    return rows


def _spread(positions: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Root mean variance within batches, variance of the batches' means; (batches, lanes) of 0 to 1."""
    return float(np.sqrt(positions.var(axis=1).mean())), float(positions.mean(axis=1).var())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--blocks", type=int, default=40_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        wide, narrow = Path(name) / "wide", Path(name) / "narrow"
        per_shard, sizes = -(-args.blocks // SHARDS), {wide: 1024, narrow: 128}
        speeds = [reading(size) for size in sizes.values()] * (args.rounds + 1)
        others = ("first batches", "fetching over http", "orders")
        progress = Progress("bench_streams.py", [*["writing shards"] * len(sizes), *speeds, *others])
        manifests, rows = {}, []
        for folder, size in sizes.items():
            with progress.step("writing shards"):
                manifests[folder] = write_random_set(folder, args.blocks, size, per_shard, 2**16 - 1)
        for folder, manifest in manifests.items():
            rows += speed(folder, manifest, args.rounds, progress)
        with progress.step("first batches"):
            rows += seek(wide, manifests[wide], args.rounds)
        with progress.step("fetching over http"):
            rows += fetched(narrow, manifests[narrow], Path(name) / "cache")
        with progress.step("orders"):
            rows += shuffling(manifests[narrow])
    show(f"{args.blocks} blocks\n{machine('webdataset')}", rows, args.json)
    sys.exit(not all(row.holds for row in rows))


if __name__ == "__main__":
    main()
