"""Patches put on, chosen and taken off: what is refused, and that each call and thread keeps what it began with."""

from __future__ import annotations

import copy
import pickle
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from patching import Build, every_family, knobs, largest, logits, some_ids, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertLMHeadModel
from transformers.generation.streamers import BaseStreamer

import revpatch
from revpatch import Patch, active_patch, add_patch, attach, detach, patch_disabled, remove_patch, set_gate, set_patch
from revpatch.patch.families import blocks_of
from revpatch.patch.patched_model import PatchedBlock, patch_state, switchboard

WAIT = 60
Job = Callable[[], Any]


def bert(_: Any) -> nn.Module:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return BertLMHeadModel(BertConfig(vocab_size=20, is_decoder=True, **sizes))


ON_SEVERAL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "meta": (lambda model: model.to("meta"), "on the meta device"),
    "a block on meta": (lambda model: model.transformer.h[1].to("meta"), r"h\.1\.\S+ is on the meta device"),
    "cpu_offload": (lambda model: cpu_offload(model, torch.device("cpu")), "where it offloads to the CPU or the disk"),
    "disk_offload": (lambda model: disk_offload(model, tempfile.mkdtemp(), torch.device("cpu")), "where it offloads"),
    "ZeRO 3": (lambda model: setattr(next(model.parameters()), "ds_id", 0), "lie on several ranks"),
}


@pytest.mark.parametrize("case", ON_SEVERAL)
def test_a_model_that_is_not_whole_on_one_device_is_refused(
    patched: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spoil, words = ON_SEVERAL[case]
    model = patched("gpt2")
    revpatch.save_patch(model, tmp_path / "a.safetensors")
    detach(model)
    spoil(model)
    for put_on in (lambda: attach(model, knobs()), lambda: revpatch.load_patch(model, tmp_path / "a.safetensors")):
        with pytest.raises(ValueError, match=words) as caught:
            put_on()
        assert "hold it on one device" in str(caught.value) and "\n" not in str(caught.value)
        assert not revpatch.is_patched(model)


@pytest.mark.parametrize(
    ("make", "patch", "words"),
    [
        (lambda build: build("gpt2", width=15), knobs(), "15 is odd"),
        (lambda build: build("qwen3"), knobs(layers=[0, 3]), "block 3.*blocks 0 to 2"),
        (bert, knobs(), r"'bert'.*gpt2, llama, qwen2, qwen3.*add one to FAMILIES in .*families\.py"),
        (lambda build: build("gpt2"), (8, 3), "width of 8.*width is 16"),
        (lambda build: build("llama"), (16, 2), "2 blocks.*has 3"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_left_as_it_was(
    build: Build, make: Callable[[Any], Any], patch: Any, words: str
) -> None:
    model = make(build)
    with pytest.raises(ValueError, match=words):
        attach(model, Patch(*patch, knobs()) if isinstance(patch, tuple) else patch)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, PatchedBlock) or module._forward_pre_hooks for module in model.modules())


def test_a_patched_model_is_not_saved_as_if_it_were_the_base(build: Build, tmp_path: Path) -> None:
    model, ids = build("gpt2"), some_ids()
    base = logits(model, ids)
    patch = trained(attach(model, knobs()))
    learned = logits(model, ids)
    with patch_disabled(model):  # of which a copy knows nothing
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied, ids), learned)
    for each in (model, copied, pickle.loads(pickle.dumps(model))):  # noqa: S301  (made here)
        with pytest.raises(ValueError, match=r"detach\(model\) first, or revpatch\.save_pretrained"):
            each.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    with torch.no_grad():
        switchboard(copied).attached.sidecar(0).coupling.log_scale.add_(1)  # type: ignore[union-attr]
    assert switchboard(copied).attached is not patch
    assert not torch.equal(logits(copied, ids), logits(model, ids)), "each has a patch of its own"
    model.probe = nn.Linear(2, 2)  # what was added since stays as it is
    model.probe.bias.requires_grad_(False)
    for each in (copied, model):
        detach(each)
        each.save_pretrained(tmp_path / "base")
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / "base"), ids), base)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["probe.bias"]


def two(build: Build, family: str = "gpt2", gate: str = "prefix") -> tuple[Any, Patch, Patch]:
    """A model with the patches "a", which is on, and "b", of another kind."""
    model = build(family)
    a = trained(attach(model, knobs(gate=gate), name="a"), 1, 3.0)
    return model, a, trained(add_patch(model, knobs(gate=gate, placement="coupled", layers=[2, 0]), "b"), 2, 3.0)


@every_family
def test_each_of_several_patches_gives_what_it_gives_alone(build: Build, family: str) -> None:
    ids = some_ids()
    base = logits(build(family), ids)
    model, a, b = two(build, family)
    alone = {}
    for name, patch in (("a", a), ("b", b)):
        attach(other := build(family), patch)
        alone[name] = logits(other, ids)
    assert largest(alone["a"], alone["b"]) > 0.05
    assert torch.equal(logits(model, ids), alone["a"]), "the first one is on until another is chosen"
    held = [(p, p.data_ptr()) for module in (model, a, b) for p in module.parameters()]
    for name in ("b", "a", "b"):
        set_patch(model, name)
        for patch, expected in ((None, base), (a, alone["a"]), (b, alone["b"])):
            with active_patch(model, patch):
                assert torch.equal(logits(model, ids), expected)
            with pytest.raises(RuntimeError, match="boom"), active_patch(model, patch):
                raise RuntimeError("boom")
            assert torch.equal(logits(model, ids), alone[name])
    now = [p for module in (model, a, b) for p in module.parameters()]
    assert all(p is was and p.data_ptr() == place for p, (was, place) in zip(now, held, strict=True)), "nothing copied"
    set_gate(model, "off")
    set_patch(model, "a")
    assert torch.equal(logits(model, ids), base), "the gates' mode outlives a switch"
    set_gate(model, "learned")
    assert torch.equal(logits(model, ids), alone["a"])
    set_patch(model, "b")
    assert remove_patch(model, "a") is a and revpatch.patch_names(model) == ["b"]
    assert torch.equal(logits(model, ids), alone["b"])
    assert detach(model) is b
    assert torch.equal(logits(model, ids), base)


def test_refusals_change_nothing(build: Build) -> None:
    model, a, _ = two(build)
    before, unpatched = logits(model, some_ids()), build()
    calls: list[tuple[str, Job]] = [
        ("no patch named 'c' on the model; there: a, b", lambda: set_patch(model, "c")),
        ("no patch named 'c' on the model; there: a, b", lambda: remove_patch(model, "c")),
        ("'a' is the chosen one.*set_patch another", lambda: remove_patch(model, "a")),
        ("patch named 'b' already.*another name", lambda: add_patch(model, knobs(), "b")),
        ("2 blocks, the model has 3", lambda: add_patch(model, Patch(16, 2, knobs()), "c")),
        ("width of 8.*width is 16", lambda: active_patch(model, Patch(8, 3, knobs())).__enter__()),
        ("already: detach.* or add_patch", lambda: attach(model, a)),
        ("'half'.*'learned', 'on' or 'off'", lambda: set_gate(model, "half")),  # type: ignore[arg-type]
    ]
    for call in (detach, switchboard, patch_state, revpatch.patch_names, lambda m: add_patch(m, a, "c")):
        calls.append(("carries no patch.*attach", lambda call=call: call(unpatched)))
    for words, job in calls:
        with pytest.raises(ValueError, match=words):
            job()
    with patch_disabled(model):
        for switch, to in ((set_patch, "b"), (remove_patch, "b"), (set_gate, "on")):
            with pytest.raises(ValueError, match="is in force: leave it"):
                switch(model, to)  # type: ignore[operator]
    assert revpatch.patch_names(model) == ["a", "b"]
    assert torch.equal(logits(model, some_ids()), before)


def test_sidecars_follow_their_blocks_to_another_device_in_their_own_dtype(build: Build) -> None:
    model, *patches = two(build, "llama")
    for place, device in ((torch.bfloat16, "cpu"), ("meta", "meta")):
        model.to(place)
        assert {(p.device.type, p.dtype) for patch in patches for p in patch.parameters()} == {(device, torch.float32)}


MOVED: dict[str, tuple[Callable[[list[Any]], list[Any]], str]] = {
    "exchanged": (lambda blocks: [blocks[1], blocks[0], blocks[2]], "1, 0, 2"),
    "one without the patch": (lambda blocks: [*blocks[:2], blocks[2].block], "0, 1, none"),
    "fewer, without the patch": (lambda blocks: [block.block for block in blocks[:-1]], "none, none"),
}


@pytest.mark.parametrize("case", MOVED)
def test_blocks_that_were_moved_are_refused(patched: Build, case: str) -> None:
    model, ids = patched("gpt2", gate="token"), some_ids()
    move, found = MOVED[case]
    blocks = list(model.transformer.h)
    for mode in ("learned", "off"):
        set_gate(model, mode)  # type: ignore[arg-type]
        model.transformer.h = nn.ModuleList(move(blocks))
        for call in (lambda: model(ids), lambda: model.generate(ids, max_new_tokens=2)):
            with pytest.raises(ValueError, match=f"expected blocks 0 to 2 .*, found {found}: put them back"):
                call()
        model.transformer.h = nn.ModuleList(blocks)
        model(ids)


def test_patched_blocks_that_are_recomputed_in_the_backward_pass_are_refused(patched: Build) -> None:
    model = patched("gpt2")
    for block in blocks_of(model):
        inner = block.forward
        block.forward = lambda *a, inner=inner, **k: checkpoint(inner, *a, use_reentrant=False, **k)  # type: ignore[method-assign]
    loss = model(some_ids(), use_cache=False).logits.square().mean()
    with pytest.raises(ValueError, match=r"computed anew in the backward pass.*gradient_checkpointing_enable"):
        loss.backward()


# Several threads, real ones.


def together(model: Any, *jobs: Job) -> list[Any]:
    """Return what the jobs give: no thread's first call goes beyond the first block before all have come there."""
    barrier, met = threading.Barrier(len(jobs), timeout=WAIT), threading.local()

    def wait(*_: object) -> None:
        if not getattr(met, "already", False):
            met.already = True
            barrier.wait()

    hook = blocks_of(model)[0].block.register_forward_hook(wait)
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = [future.result(WAIT) for future in [pool.submit(job) for job in jobs]]
    hook.remove()
    return found


def greedy(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    length = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    out: Tensor = model.generate(ids, attention_mask=mask, **length, **more)
    return out


def under(model: Any, patch: Patch | None, job: Job) -> Job:
    def run() -> Any:
        with active_patch(model, patch):
            return job()

    return run


@pytest.mark.parametrize("gate", ["prefix", "seq", "token"])
@pytest.mark.parametrize("call", [logits, lambda *a: greedy(*a, use_cache=False), greedy])
def test_calls_side_by_side_are_as_alone(build: Build, gate: str, call: Callable[..., Any]) -> None:
    """Masks, patches and the gates' past."""
    model, a, b = two(build, gate=gate)
    if gate == "seq" and call is greedy:
        return
    of = []
    for pads, seed in ((5, 5), (2, 6), (0, 5), (1, 8)):
        ids, mask = some_ids(2, 9, seed), torch.ones(2, 9, dtype=torch.long)
        mask[1, :pads] = 0
        of.append(partial(call, model, ids, mask))
    chosen = [under(model, patch, job) for patch, job in zip((a, None, b, a), of, strict=True)]
    for jobs in (chosen, of):
        alone = [job() for job in jobs]
        assert not torch.equal(alone[0], alone[2])
        assert all(torch.equal(x, y) for x, y in zip(together(model, *jobs), alone, strict=True))


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
        (lambda model: set_gate(model, "off"), ""),
        (lambda model: (set_patch(model, "b"), remove_patch(model, "a")), ""),
        (detach, "generate is under way in the thread 'MainThread': take the patch off when it has ended"),
    ],
    ids=["off", "another", "detach"],
)
def test_a_text_is_written_to_its_end_as_it_was_begun(
    build: Build, switch: Callable[[Any], Any], refused: str, cached: bool
) -> None:
    model, ids = two(build)[0], some_ids(1, 5)
    before = greedy(model, ids, use_cache=cached)
    streamer = OnToken(lambda: switch(model))
    assert torch.equal(greedy(model, ids, use_cache=cached, streamer=streamer), before)
    assert streamer.error == refused
    again = greedy(model, ids, use_cache=cached)
    assert torch.equal(again, before) == bool(refused), "the next text is of what was switched to"
    streamer.put = lambda value: set_gate(model, "off")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="generate is in force: leave it before"):
        greedy(model, ids, streamer=streamer)
    set_gate(model, "off")


@pytest.mark.parametrize("context", ["patch_disabled", "active_patch"])
def test_a_thread_that_does_not_say_what_it_is_to_run_with_is_refused(build: Build, context: str) -> None:
    """`with patch_disabled(model): pool.map(...)`: a thread of a pool can't be told from one that serves others."""
    model, _, b = two(build)
    patch, ids = None if context == "patch_disabled" else b, some_ids()
    learned, began_before = logits(model, ids), copy_context()
    words = rf"{context} is in force in the thread 'MainThread', and this call, in the thread .*in this thread too"
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(logits, model, ids).result(WAIT), learned), "the pool's thread was there before"
        with active_patch(model, patch):
            here = logits(model, ids)
            for job in (lambda: logits(model, ids), lambda: greedy(model, ids)):
                with pytest.raises(ValueError, match=words):
                    pool.submit(job).result(WAIT)
            with pytest.raises(ValueError, match=f"{context} is in force"):
                began_before.run(logits, model, ids)  # another asyncio task of this thread
            inside = copy_context()  # as asyncio.to_thread does
            for job in (under(model, patch, lambda: logits(model, ids)), partial(inside.run, logits, model, ids)):
                assert torch.equal(pool.submit(job).result(WAIT), here)
            pool.submit(set_gate, model, "on").result(WAIT)
            assert torch.equal(logits(model, ids), here), "what others choose does not reach what is in force here"
            pool.submit(set_gate, model, "learned").result(WAIT)
        assert torch.equal(pool.submit(logits, model, ids).result(WAIT), learned)


def test_a_call_ends_as_it_began_when_a_patch_is_put_on_or_taken_off(patched: Build) -> None:
    model, ids = patched("gpt2"), some_ids()
    learned = logits(model, ids)
    patch = detach(model)
    base = logits(model, ids)
    for change, expected in ((lambda: attach(model, patch), base), (lambda: detach(model), learned)):
        first = blocks_of(model)[0]
        begun, go = threading.Event(), threading.Event()
        hook = getattr(first, "block", first).register_forward_hook(
            lambda *_, begun=begun, go=go: (begun.set(), go.wait(WAIT), None)[2]
        )
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(logits, model, ids)
            assert begun.wait(WAIT)
            hook.remove()
            change()
            go.set()
            assert torch.equal(call.result(WAIT), expected)
    assert torch.equal(logits(model, ids), base)


def test_an_error_in_a_call_leaves_nothing_behind(patched: Build) -> None:
    model, ids = patched("gpt2"), some_ids()
    expected = logits(model, ids)
    with pytest.raises(IndexError):
        logits(model, ids + 1000, torch.tensor([[1] * 9, [0] * 4 + [1] * 5]))
    assert switchboard(model).here.call is None
    assert torch.equal(logits(model, ids), expected)
