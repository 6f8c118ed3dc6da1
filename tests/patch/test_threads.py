"""A patched model in several threads: what belongs to a call is its own, or the call is refused; real threads."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from patching import Config, Logits, Randomize, some_ids
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from revpatch.patch.families import blocks_of
from revpatch.patch.patched_model import (
    Patch,
    active_patch,
    attach,
    detach,
    is_patched,
    patch_disabled,
    recording,
    set_gate,
    switchboard,
)
from revpatch.patches import add_patch, remove_patch, set_patch
from revpatch.step.frozen_base import LayerRecorder

WAIT = 60
Patched = Callable[..., Any]
Job = Callable[[], Any]


def padded(pads: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and mask of two rows, one with so many places of padding on its left."""
    ids = some_ids(2, 9, seed)
    mask = torch.ones_like(ids)
    mask[1, :pads] = 0
    return ids, mask


@contextmanager
def met_in_the_middle(model: Any, threads: int) -> Iterator[None]:
    """No thread's first call goes beyond the first block before all have come there."""
    barrier, met = threading.Barrier(threads, timeout=WAIT), threading.local()

    def wait(*_: object) -> None:
        if not getattr(met, "already", False):
            met.already = True
            barrier.wait()

    hook = blocks_of(model)[0].block.register_forward_hook(wait)
    try:
        yield
    finally:
        hook.remove()


def together(model: Any, *jobs: Job) -> list[Any]:
    """What each job gives or raises, all begun before any has passed the first block."""

    def run(job: Job) -> Any:
        try:
            return job()
        except ValueError as error:
            return error

    with met_in_the_middle(model, len(jobs)), ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(WAIT) for future in [pool.submit(run, job) for job in jobs]]


def greedy(model: Any, ids: Tensor, mask: Tensor, **more: Any) -> Tensor:
    out: Tensor = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **more
    )
    return out


def two(patched: Patched, sidecar_config: Config, randomize: Randomize, gate: str = "prefix") -> tuple[Any, Patch]:
    """A model with two patches that write otherwise, the first chosen, and the second."""
    model = patched("gpt2", strength=3.0, gate=gate)
    return model, randomize(add_patch(model, sidecar_config(gate=gate), name="b"), 7, 3.0)


def disabled(model: Any, job: Job) -> Job:
    def run() -> Any:
        with patch_disabled(model):
            return job()

    return run


def under(model: Any, patch: Patch, job: Job) -> Job:
    def run() -> Any:
        with active_patch(model, patch):
            return job()

    return run


@pytest.mark.parametrize("gate", ["prefix", "seq", "token"])
@pytest.mark.parametrize("call", ["logits", "generate"])
def test_calls_side_by_side_are_as_alone(
    patched: Patched, logits: Logits, sidecar_config: Config, randomize: Randomize, gate: str, call: str
) -> None:
    """Masks, patches and the gates' past."""
    model, b = two(patched, sidecar_config, randomize, gate)

    def of(pads: int, seed: int) -> Job:
        ids, mask = padded(pads, seed)
        if call == "logits":
            return lambda: logits(model, ids, mask)
        return lambda: greedy(model, ids, mask, use_cache=gate != "seq")

    a = switchboard(model).attached
    jobs = [under(model, a, of(5, 5)), disabled(model, of(2, 6)), under(model, b, of(0, 5)), under(model, a, of(1, 8))]
    alone = [job() for job in jobs]
    assert not torch.equal(alone[0], alone[2])
    for found, expected in zip(together(model, *jobs), alone, strict=True):
        assert torch.equal(found, expected)
    plain = [of(5, 5), of(2, 6), of(0, 7)]
    alone = [job() for job in plain]
    for found, expected in zip(together(model, *plain), alone, strict=True):
        assert torch.equal(found, expected)


def test_many_calls_at_random_moments(patched: Patched, logits: Logits) -> None:
    model = patched("gpt2", strength=2.0)
    calls = [padded(pads, seed) for seed, pads in enumerate([0, 1, 3, 5])]
    alone = [logits(model, *call) for call in calls]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: logits(model, *calls[i % 4]), range(200)))
    assert sum(not torch.equal(one, alone[i % 4]) for i, one in enumerate(found)) == 0


class OnToken(BaseStreamer):  # type: ignore[misc]
    """Calls a job in another thread, once, after a few tokens."""

    def __init__(self, job: Job) -> None:
        self.job, self.tokens, self.error = job, 0, ""

    def put(self, value: Tensor) -> None:
        self.tokens += 1
        if self.tokens == 4:
            with ThreadPoolExecutor(1) as pool:
                self.error = str(pool.submit(self.job).exception(WAIT) or "")

    def end(self) -> None:
        pass


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    ("switch", "refused"),
    [
        (lambda model: set_patch(model, "b"), ""),
        (lambda model: set_gate(model, "off"), ""),
        (lambda model: set_gate(model, "on"), ""),
        (lambda model: (set_patch(model, "b"), remove_patch(model, "default")), ""),
        (detach, "generate is under way in the thread 'MainThread': take the patch off when it has ended"),
    ],
    ids=["set_patch", "off", "on", "remove_patch", "detach"],
)
def test_a_text_is_written_to_its_end_as_it_was_begun(
    patched: Patched,
    sidecar_config: Config,
    randomize: Randomize,
    switch: Callable[[Any], Any],
    refused: str,
    cached: bool,
) -> None:
    model, _ = two(patched, sidecar_config, randomize)
    ids, mask = some_ids(1, 5), torch.ones(1, 5, dtype=torch.long)
    before = greedy(model, ids, mask, use_cache=cached)
    streamer = OnToken(lambda: switch(model))
    assert torch.equal(greedy(model, ids, mask, use_cache=cached, streamer=streamer), before)
    assert streamer.error == refused
    assert is_patched(model)
    again = greedy(model, ids, mask, use_cache=cached)
    assert torch.equal(again, before) == bool(refused), "the next text is of what was switched to"


def test_switching_in_the_midst_of_ones_own_text_is_refused(patched: Patched) -> None:
    model = patched("gpt2")
    ids = some_ids(1, 5)
    streamer = OnToken(lambda: None)
    streamer.put = lambda value: set_gate(model, "off")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="generate is in force: leave it before"):
        greedy(model, ids, torch.ones_like(ids), streamer=streamer)
    set_gate(model, "off")


@pytest.mark.parametrize("context", ["patch_disabled", "active_patch"])
def test_a_thread_that_does_not_say_what_it_is_to_run_with_is_refused(
    patched: Patched, logits: Logits, sidecar_config: Config, randomize: Randomize, context: str
) -> None:
    """`with patch_disabled(model): pool.map(...)`: a thread of a pool can't be told from one that serves others."""
    model, b = two(patched, sidecar_config, randomize)
    ids = some_ids()
    mask, learned = torch.ones_like(ids), logits(model, ids)
    words = rf"{context} is in force in the thread 'MainThread', and this call, in the thread .*in this thread too"
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model, ids).result(WAIT), learned), "the pool's thread was there before"
        with patch_disabled(model) if context == "patch_disabled" else active_patch(model, b):
            here = logits(model, ids)
            for job in (lambda: logits(model, ids), lambda: greedy(model, ids, mask)):
                with pytest.raises(ValueError, match=words):
                    pool.submit(job).result(WAIT)
            job = disabled(model, lambda: logits(model, ids))
            assert torch.equal(pool.submit(job).result(WAIT), here) == (context == "patch_disabled")
            pool.submit(set_gate, model, "on").result(WAIT)
            assert torch.equal(logits(model, ids), here), "what others choose does not reach what is in force here"
            pool.submit(set_gate, model, "learned").result(WAIT)
        assert torch.equal(pool.submit(logits, model, ids).result(WAIT), learned)


def test_what_copies_the_context_runs_under_it(patched: Patched, logits: Logits) -> None:
    model, ids = patched("gpt2"), some_ids()
    learned = logits(model, ids)
    with patch_disabled(model):
        base = logits(model, ids)
    begun, go_on = asyncio.Event, asyncio.Event

    async def off(begun: asyncio.Event, go_on: asyncio.Event) -> list[Tensor]:
        with patch_disabled(model):
            begun.set()
            await go_on.wait()
            return [logits(model, ids), await asyncio.to_thread(logits, model, ids)]

    async def both() -> tuple[list[Tensor], Tensor]:
        events = begun(), go_on()
        task = asyncio.create_task(off(*events))
        await events[0].wait()
        with pytest.raises(ValueError, match="patch_disabled is in force"):
            logits(model, ids)
        with active_patch(model, switchboard(model).attached):
            own = logits(model, ids)
        events[1].set()
        return await task, own

    disabled, own = asyncio.run(both())
    assert all(torch.equal(each, base) for each in disabled) and torch.equal(own, learned)
    assert torch.equal(logits(model, ids), learned)


def test_a_recording_sees_its_own_threads_calls_alone(patched: Patched, logits: Logits) -> None:
    model, ids = patched("gpt2"), some_ids()
    recorders = [LayerRecorder(), LayerRecorder()]

    def record(recorder: LayerRecorder) -> Job:
        def run() -> None:
            with recording(model, recorder):
                logits(model, ids)

        return run

    together(model, *map(record, recorders), lambda: logits(model, ids))
    assert [len(recorder.gates) for recorder in recorders] == [3, 3]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_call_that_is_under_way_ends_as_it_began_when_a_patch_is_put_on_or_taken_off(
    patched: Patched, logits: Logits, family: str
) -> None:
    model, ids = patched(family), some_ids()
    learned = logits(model, ids)
    patch = detach(model)
    base = logits(model, ids)
    for change, expected in ((lambda: attach(model, patch), base), (lambda: detach(model), learned)):
        first = blocks_of(model)[0]
        begun, go_on = threading.Event(), threading.Event()
        hook = getattr(first, "block", first).register_forward_hook(
            lambda *_, begun=begun, go_on=go_on: (begun.set(), go_on.wait(WAIT), None)[2]
        )
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(logits, model, ids)
            assert begun.wait(WAIT)
            hook.remove()
            change()
            go_on.set()
            assert torch.equal(call.result(WAIT), expected)
    assert torch.equal(logits(model, ids), base)


def test_an_error_in_a_call_leaves_nothing_behind(patched: Patched, logits: Logits) -> None:
    model = patched("gpt2")
    ids, mask = padded(4, 5)
    expected = logits(model, ids, mask)
    with pytest.raises(IndexError):
        logits(model, ids + 1000, mask)
    assert switchboard(model).here.call is None
    assert torch.equal(logits(model, ids, mask), expected)


def test_a_copy_knows_nothing_of_what_is_in_force(patched: Patched, logits: Logits) -> None:
    model, ids = patched("gpt2"), some_ids()
    learned, text = logits(model, ids), greedy(model, ids, torch.ones_like(ids))
    with patch_disabled(model):
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied, ids), learned)
    del model
    set_gate(copied, "off")
    assert not torch.equal(greedy(copied, ids, torch.ones_like(ids)), text)
    set_gate(copied, "learned")
    assert torch.equal(greedy(copied, ids, torch.ones_like(ids)), text)
    detach(copied)
    assert "generate" not in vars(copied)


def test_patched_blocks_that_are_recomputed_in_the_backward_pass_are_refused(patched: Patched) -> None:
    from torch.utils.checkpoint import checkpoint

    model, ids = patched("gpt2"), some_ids()
    for block in blocks_of(model):
        inner = block.forward
        block.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)
    loss = model(ids, use_cache=False).logits.square().mean()
    with pytest.raises(ValueError, match=r"computed anew in the backward pass.*gradient_checkpointing_enable"):
        loss.backward()


MOVED: dict[str, tuple[Callable[[list[Any]], list[Any]], str]] = {
    "exchanged": (lambda blocks: [blocks[1], blocks[0], blocks[2]], "1, 0, 2"),
    "the first taken out": (lambda blocks: blocks[1:], "1, 2"),
    "the last taken out": (lambda blocks: blocks[:-1], "0, 1"),
    "one within taken out": (lambda blocks: [blocks[0], blocks[2]], "0, 2"),
    "one twice": (lambda blocks: [*blocks, blocks[2]], "0, 1, 2, 2"),
    "one without the patch": (lambda blocks: [*blocks[:2], blocks[2].block], "0, 1, none"),
    "fewer, without the patch": (lambda blocks: [block.block for block in blocks[:-1]], "none, none"),
}


@pytest.mark.parametrize("mode", ["learned", "off"])
@pytest.mark.parametrize("case", MOVED)
def test_blocks_that_were_moved_are_refused(patched: Patched, case: str, mode: Any) -> None:
    model, ids = patched("gpt2", gate="token"), some_ids()
    move, found = MOVED[case]
    set_gate(model, mode)
    blocks = list(model.transformer.h)
    del model.transformer.h[:]
    model.transformer.h.extend(move(blocks))
    for call in (lambda: model(ids), lambda: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=f"expected blocks 0 to 2 in their order, found {found}: put them back"):
            call()
    model.transformer.h = torch.nn.ModuleList(blocks)
    model(ids)
