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
    """`settle(step, fetch(step))` for every step, in order, ahead of the caller.

    At most `depth` settled batches wait for the caller, and one more is fetched; it is settled when one is taken. What
    `fetch`, `settle` or `steps` raises is raised by `next` at the very step it belongs to, after the batches before it;
    nothing is fetched after that. Close it, or use it as a context.

    `settle` may meet other processes, if all take batches and close at the same steps: a thread that is closed settles
    what the fastest one can have settled, `depth` steps after the last that was taken, so that none is left waiting for
    another. After an error there is no such step: leaving the context by one doesn't wait for a thread that settles.
    """

    def __init__(
        self,
        fetch: Callable[[int], Batch],
        steps: Iterable[int],
        depth: int = 2,
        settle: Callable[[int, Batch], Batch] | None = None,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; at least 1 batch must fit")
        self._fetch, self._settle = fetch, settle
        self._steps = steps
        self._depth = depth
        self._room = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[_Fetched[Batch] | BaseException] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._taken = 0
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
        if error is None or self._settle is None:
            self.close()
        else:
            self._settle = None
            self._closing.set()
            self._room.release()

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
                self._taken += 1
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
            for number, step in enumerate(self._steps, start=1):
                if self._past_the_end(number):
                    return
                batch = self._fetch(step)
                self._room.acquire()
                settle = self._settle
                if self._past_the_end(number):
                    return
                if settle is not None:
                    batch = settle(step, batch)
                self._ready.put(_Fetched(batch))
            self._ready.put(StopIteration())
        except BaseException as error:  # handed over: it belongs to the caller
            self._ready.put(error)

    def _past_the_end(self, number: int) -> bool:
        """Whether the batch of this number will be neither taken nor settled by another process."""
        return self._closing.is_set() and (self._settle is None or number > self._taken + self._depth)
