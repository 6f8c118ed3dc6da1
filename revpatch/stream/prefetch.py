"""One thread that reads the next batches while this one trains.

with Prefetcher(lambda step: shards.read(lanes.block_ids(step, start, stop)), range(first, last)) as batches:
    for batch in batches: ...
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


@dataclass
class _Fetched(Generic[Batch]):
    batch: Batch


class Prefetcher(Iterator[Batch], Generic[Batch]):
    """`fetch(step)` for every step, in order, ahead of the caller.

    At most `depth` batches wait for the caller, and one more is fetched. What `fetch` or `steps` raises is raised by
    `next` at the very step it belongs to, after the batches before it; nothing is fetched after that. Close it, or use
    it as a context.
    """

    def __init__(self, fetch: Callable[[int], Batch], steps: Iterable[int], depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; at least 1 batch must fit")
        self._fetch = fetch
        self._steps = steps
        self._depth = depth
        self._room = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[_Fetched[Batch] | BaseException] = queue.SimpleQueue()
        self._closing = threading.Event()
        self.waited = 0.0
        """Seconds that the caller has waited for batches in all."""
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="revpatch-prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Prefetcher[Batch]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Prefetcher[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch. Raises StopIteration at the end of the steps and RuntimeError once closed."""
        if self._closing.is_set():
            raise RuntimeError("the prefetcher is closed; make a new one")
        if self._end is None:
            began = time.monotonic()
            ready = self._ready.get()
            self.waited += time.monotonic() - began
            if isinstance(ready, _Fetched):
                self._room.release()
                return ready.batch
            self._end = ready
        raise self._end  # again at every further call: an error must not turn into a quiet end

    def close(self) -> None:
        """Stop reading and wait for the thread. May be called again."""
        self._closing.set()
        self._room.release(self._depth + 1)  # the thread may be waiting for room
        self._thread.join()

    def _run(self) -> None:
        try:
            for step in self._steps:
                if self._closing.is_set():
                    return
                batch = self._fetch(step)
                self._room.acquire()
                self._ready.put(_Fetched(batch))
            self._ready.put(StopIteration())
        except BaseException as error:  # handed over: it belongs to the caller
            self._ready.put(error)
