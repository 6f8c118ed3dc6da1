"""The proof that a patch is out: the base's sha256, and bit-identical logits before it, with it off, and after it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from revpatch.patch.patched_model import active_patch, attach, base_sha256, detach, set_gate
from revpatch.surgery.subject import Entry, Subject

_ROWS, _TOKENS = 2, 16


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
        """Whether nothing of the patch is left, to the bit."""
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

    @property
    def ok(self) -> bool:
        """Whether the base is the patch's, and every check holds."""
        return self.base_expected == self.base_found and bool(self.checks) and all(check.ok for check in self.checks)

    def as_fields(self) -> dict[str, Any]:
        """The fields by name, and `ok`."""
        return {**asdict(self), "ok": self.ok}


def prove_removal(reference: str, base: str | None = None) -> RemovalReport:
    """Holds the base as it is loaded from disk against the same base with the patch off, and after `detach`.

    Done in float32 and in the dtype that the patch was trained in. A base with another sha256 is reported, and then
    nothing is run; what can't be loaded is raised.

    Args:
        reference: FILE, RUN or RUN@REF.
        base: name or folder of the base; None is the one that the patch names.

    Raises:
        ValueError, OSError: there is no such patch or base, or one of them is damaged.
    """
    entry = Entry.read(reference)
    name = base or entry.base["model"]
    revision = entry.base.get("revision") if base is None else None
    report: RemovalReport | None = None
    for dtype in dict.fromkeys((entry.base["dtype"], "float32")):
        subject = Subject.bare(name, revision, dtype)
        detach(subject.model)  # as it came from disk
        if report is None:
            report = RemovalReport(reference, entry.sha256, name, entry.base["sha256"], subject.sha256)
        if report.base_expected != report.base_found:
            break
        report.checks.append(_check(subject, entry, dtype))
    assert report is not None
    return report


def _check(subject: Subject, entry: Entry, dtype: str) -> RemovalCheck:
    model, patch = subject.model, subject.patch_of(entry)
    before, untouched = base_sha256(model), _logits(model)
    attach(model, patch)
    with active_patch(model, patch):
        on = _logits(model)
    set_gate(model, "off")
    off = _logits(model)
    detach(model)
    changed = float((on.float() - untouched.float()).abs().max())
    detached = _logits(model)
    return RemovalCheck(dtype, _sha256(untouched), _sha256(off), _sha256(detached), changed, before, base_sha256(model))


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """(rows, tokens, vocabulary), of tokens that are the same everywhere."""
    config = model.config
    vocabulary = int(config.vocab_size)  # type: ignore[union-attr, arg-type]
    tokens = (torch.arange(_ROWS * _TOKENS).view(_ROWS, _TOKENS) * 7919 + 11) % vocabulary
    logits: Tensor = model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False).logits
    return logits


def _sha256(logits: Tensor) -> str:
    return hashlib.sha256(logits.cpu().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()
