"""What can be proved of a patch: that it is out, that the base was left alone, how well its map can be inverted.

A run's journal keeps the base's sha256 and its logits on fixed tokens, at its start and its end. Weights are compared
anywhere. Kernels add in another order on another machine, with other threads or at another alignment in memory, so
logits are comparable only between equal `where`s. The residual placement is inverted by a fixed-point iteration that
converges while the gated change is a contraction, which a strong patch need not be: so that is a report.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from revpatch.evaluation.losses import Subject, of_base
from revpatch.ledger.events import BareBase, ComputedAt, Event, PhaseBegun, RunBegun, RunEnded, RunResumed
from revpatch.ledger.ledger import PatchFile, base_place, effective, read_patch
from revpatch.patch.families import body_of
from revpatch.patch.patched_model import (
    Patch,
    active_patch,
    attach,
    base_parameters,
    base_sha256,
    detach,
    recording,
    set_gate,
)
from revpatch.patch.sidecar import Sidecar, SidecarOutput
from revpatch.terminal import doing

_ROWS, _TOKENS = 2, 16


def fingerprint_base(model: nn.Module, weights: str | None = None) -> BareBase:
    """Return what the journal keeps of it.

    The model is bare, or its patch is disabled, and in eval mode. `weights` is the sha256 if it is known already.
    """
    return BareBase(
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        weights=weights or base_sha256(model),
        logits=logits_sha256(logits_of(model)),
        where=_where(model),
    )


def logits_of(model: nn.Module) -> Tensor:
    """(rows, tokens, vocabulary), of tokens that are the same everywhere."""
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    tokens = (torch.arange(_ROWS * _TOKENS).view(_ROWS, _TOKENS) * 7919 + 11) % vocabulary
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled kernels may add in another order
        logits: Tensor = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits
    return logits


def logits_sha256(logits: Tensor) -> str:
    """Return the sha256 of their bits."""
    return hashlib.sha256(logits.cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _where(model: nn.Module) -> ComputedAt:
    alignments = [parameter.data_ptr() % 64 for _, parameter in base_parameters(model)]
    device = next(model.parameters()).device
    return ComputedAt(
        host=platform.node(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        alignment=hashlib.sha256(str(alignments).encode()).hexdigest()[:16],
    )


@dataclass(frozen=True)
class Invertibility:
    """Over all sidecars of a patch."""

    error: float
    """The largest ‖u − u*‖ / ‖u‖, where u* is recovered from h."""
    converged: int
    """Sidecars whose inversion converged."""
    sidecars: int

    def __str__(self) -> str:
        if self.converged == self.sidecars:
            return f"{self.error:.1e}"
        return f"{self.error:.1e}; {self.sidecars - self.converged} of {self.sidecars} sidecars are no contraction"


@torch.no_grad()
def measure_invertibility(base: nn.Module, patch: Patch, tokens: Tensor, noise: float = 0.0) -> Invertibility:
    """Inverts every sidecar on what it is given in a forward pass.

    Args:
        base: the model that carries the patch.
        patch: the active patch.
        tokens: (rows, time) int64.
        noise: deviation of normal noise that is added to the weights meanwhile: a fresh patch is the identity, whose
            inverse would show nothing.
    """
    recorder = _Inputs()
    with recording(base, recorder):
        body_of(base)(tokens, use_cache=False)
    error, converged = 0.0, 0
    for module, u in zip(patch.sidecars.values(), recorder.inputs, strict=True):
        sidecar = cast(Sidecar, module)
        own = {name: value.clone() for name, value in sidecar.state_dict().items()}
        generator = torch.Generator().manual_seed(0)
        for parameter in sidecar.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * noise).to(parameter.device))
        inversion = sidecar.inverse(sidecar(u).hidden)
        sidecar.load_state_dict(own)
        error = max(error, float((inversion.hidden - u).norm() / u.norm()))
        converged += inversion.converged
    return Invertibility(error, converged, len(recorder.inputs))


class _Inputs:
    """Keeps what each sidecar was given, (rows, time, d) float32."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []

    def measure(self, output: SidecarOutput) -> tuple[Tensor]:
        return (output.hidden.float() - output.update.float(),)

    def record(self, layer: int, hidden: Tensor, measured: tuple[Tensor, ...]) -> None:
        self.inputs.append(measured[0])

    def record_plain(self, layer: int, hidden: Tensor) -> None:
        pass


MOMENTS = {"run": "the run's start", "run_end": "the run's end"}
"""Events of the journal that note the unpatched base."""
_OF_TRAINING = (RunBegun, RunEnded, PhaseBegun, RunResumed)


@dataclass(frozen=True)
class BaseFingerprint:
    """What the journal noted of the unpatched base at one of `MOMENTS`, held against today's in the same dtype."""

    event: str
    dtype: str
    weights: str
    """Exact sha256 then."""
    same_weights: bool
    same_logits: bool
    same_place: bool
    """Both were computed on one host, with the same threads, torch and alignment; else logits prove nothing."""

    @property
    def ok(self) -> bool:
        """Return whether the weights are the same, and the logits where they can be compared."""
        return self.same_weights and (self.same_logits or not self.same_place)


@dataclass(frozen=True)
class RemovalCheck:
    """One dtype. Logits are those of fixed tokens, by their sha256; `changed` is the largest difference that the
    patch makes when it is on, so that what is compared can be seen to differ at all."""

    dtype: str
    untouched: str
    off: str
    detached: str
    changed: float
    base_before: str
    """Exact sha256 of the base's weights in this dtype, before the patch was put on."""
    base_after: str

    @property
    def ok(self) -> bool:
        """Return whether nothing of the patch is left, to the bit."""
        return self.untouched == self.off == self.detached and self.base_before == self.base_after


@dataclass(frozen=True)
class RemovalReport:
    """What `prove_removal` found. `base_expected` is what the patch says of its base, `base_found` what is there."""

    reference: str
    sha256: str
    model: str
    base_expected: str
    base_found: str
    checks: list[RemovalCheck] = field(default_factory=list)
    noted: list[BaseFingerprint] = field(default_factory=list)
    """Empty if the journal has none: it is of an older run, or none was found beside the patch."""
    unproved: list[str] = field(default_factory=list)
    """What the journal of a training should say of the base, and doesn't."""

    @property
    def ok(self) -> bool:
        """Return whether the base is the patch's, every check holds, and nothing is left unproved."""
        return self.holds and not self.unproved

    @property
    def holds(self) -> bool:
        """Return whether the base is the patch's, and every check holds that there was something for."""
        same = self.base_expected == self.base_found and bool(self.checks)
        return same and all(check.ok for check in self.checks) and all(noted.ok for noted in self.noted)

    def as_fields(self) -> dict[str, Any]:
        """Return the fields by name, and `ok`."""
        return {**asdict(self), "ok": self.ok}


def prove_removal(reference: str, base: str | None = None) -> RemovalReport:
    """Holds the base as it is loaded from disk against the same base with the patch off, and after `detach`; and
    against what the journal noted of it.

    Done in float32 and in the dtype that the patch was trained in. A base with another sha256 is reported, and then
    nothing is run; what can't be loaded is raised.

    Args:
        reference: FILE, RUN or RUN@REF.
        base: name or folder of the base; None is the one that the patch names.

    Raises:
        ValueError, OSError: there is no such patch or base, or one of them is damaged.
    """
    entry = of_base(read_patch(reference))
    events = [] if entry.ledger is None else effective(entry.ledger.journal.events(*_OF_TRAINING))
    then = {event.event: event.bare_base for event in events if isinstance(event, RunBegun | RunEnded)}
    name = base or base_place(entry, entry.base["model"])
    revision = entry.base.get("revision") if base is None else None
    report: RemovalReport | None = None
    for dtype in dict.fromkeys((entry.base["dtype"], "float32")):
        subject = Subject.bare(name, revision, dtype)
        detach(subject.model)  # as it came from disk
        if report is None:
            report = RemovalReport(reference, entry.sha256, name, entry.base["sha256"], subject.sha256)
            report.unproved.extend(_unproved(events))
        if report.base_expected != report.base_found:
            break
        with doing(f"hashing the base and its logits in {dtype}"):
            today = fingerprint_base(subject.model)
        report.noted.extend(
            _held_against(event, recorded, today) for event, recorded in then.items() if recorded.dtype == dtype
        )
        with doing(f"comparing the base before, with and after the patch in {dtype}"):
            report.checks.append(_check(subject, entry, dtype))
    assert report is not None
    return report


def _check(subject: Subject, entry: PatchFile, dtype: str) -> RemovalCheck:
    model, patch = subject.model, subject.patch_of(entry)
    before, untouched = base_sha256(model), logits_of(model)
    attach(model, patch)
    with active_patch(model, patch):
        on = logits_of(model)
    set_gate(model, "off")
    off = logits_of(model)
    detach(model)
    changed = float((on.float() - untouched.float()).abs().max())
    bits = [logits_sha256(logits) for logits in (untouched, off, logits_of(model))]
    return RemovalCheck(dtype, bits[0], bits[1], bits[2], changed, before, base_sha256(model))


def _unproved(events: Sequence[Event]) -> list[str]:
    """Return what is missing of `MOMENTS` in the events of a training; nothing for a ledger that was not trained in."""
    if all(isinstance(event, RunEnded) for event in events):
        return []
    found = {event.event for event in events}
    words = {
        "run": "the journal has no event of the run's start",
        "run_end": "the journal has no event of the run's end: the run trains still, was stopped, or the journal's "
        "last lines are gone (take it from a backup; `train` resumes a run that was stopped)",
    }
    return [words[event] for event in MOMENTS if event not in found]


def _held_against(event: str, then: BareBase, today: BareBase) -> BaseFingerprint:
    weights, logits = then.weights == today.weights, then.logits == today.logits
    return BaseFingerprint(event, then.dtype, then.weights, weights, logits, then.where == today.where)
