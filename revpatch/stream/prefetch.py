"""One thread that reads the next batches while this one trains.

with Prefetcher(lambda step: shards.read(lanes.block_ids(step, start, stop)), range(first, last)) as batches:
    for batch in batches: ...
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


@dataclass
class _Fetched(Generic[Batch]):
    batch: Batch


class Prefetcher(Iterator[Batch], Generic[Batch]):
    """`fetch(step)` for every step, in order, at most `depth` finished batches ahead of the caller.

    What `fetch` or `steps` raises is raised by `next` at the very step it belongs to, after the batches before it;
    nothing is fetched after that. Close it, or use it as a context: the thread ends with the fetch it is in.
    """

    def __init__(self, fetch: Callable[[int], Batch], steps: Iterable[int], depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; at least 1 batch must fit")
        self._fetch = fetch
        self._steps = steps
        self._ready: queue.Queue[_Fetched[Batch] | BaseException] = queue.Queue(depth)
        self._closing = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="revpatch-prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Prefetcher[Batch]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Prefetcher[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises StopIteration at the end of the steps and RuntimeError once closed."""
        if self._closing.is_set():
            raise RuntimeError("the prefetcher is closed; make a new one")
        if self._end is None:
            ready = self._ready.get()
            if isinstance(ready, _Fetched):
                return ready.batch
            self._end = ready
        raise self._end  # again at every further call: an error must not turn into a quiet end

    def close(self) -> None:
        """Stop reading and wait for the thread. May be called again."""
        self._closing.set()
        while self._thread.is_alive():
            try:  # the thread may be waiting for room
                self._ready.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _run(self) -> None:
        try:
            for step in self._steps:
                if self._closing.is_set():
                    return
                self._ready.put(_Fetched(self._fetch(step)))
            self._ready.put(StopIteration())
        except BaseException as error:  # handed over: it belongs to the caller
            self._ready.put(error)
