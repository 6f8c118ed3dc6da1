"""The subject of an operation: a base that is loaded once, and any number of patches for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from revpatch.config import BaseConfig, SidecarConfig
from revpatch.durable import sha256_of_file
from revpatch.ledger.entry import EntryError
from revpatch.ledger.history import Ledger, Recorded
from revpatch.ledger.references import Located, locate
from revpatch.loading import load_patched, whose
from revpatch.patch.families import blocks_of, width_of
from revpatch.patch.patched_model import Patch, attach, base_sha256, check_fits, load_tensors, switchboard
from revpatch.training.startup import load_base


@dataclass(frozen=True)
class Entry:
    """A patch that was read: its tensors, and what it says of itself."""

    reference: str
    """What a person called it."""
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    sha256: str
    """Of its file."""
    base: dict[str, Any] = field(default_factory=dict)
    """Model, revision, dtype and sha256 of the base it belongs to."""
    sidecar: SidecarConfig = field(default_factory=SidecarConfig)

    @classmethod
    def of(cls, reference: str, tensors: dict[str, Tensor], metadata: dict[str, Any], sha256: str) -> Entry:
        """The entry, once its metadata says whose patch it is. Raises EntryError if it doesn't."""
        base, sidecar = whose(reference, metadata)
        if base["dtype"] not in ("bfloat16", "float32"):
            raise EntryError(f"{reference}: expected a base of dtype bfloat16 or float32, found {base['dtype']!r}")
        return cls(reference, tensors, metadata, sha256, base, sidecar)

    @classmethod
    def read(cls, reference: str) -> Entry:
        """What `reference` (FILE, RUN or RUN@REF) names. Raises as `locate` and `read_entry` do."""
        return cls.located(locate(reference), reference)

    @classmethod
    def located(cls, located: Located, reference: str) -> Entry:
        """The same, of what was found already."""
        tensors, metadata = located.load()
        recorded = located.recorded
        return cls.of(reference, tensors, metadata, recorded.sha256 if recorded else sha256_of_file(located.path))

    @classmethod
    def recorded(cls, ledger: Ledger, entry: Recorded) -> Entry:
        """An entry of a ledger, checked against its journal."""
        return cls.located(Located(ledger.directory / entry.name, ledger, entry), entry.name)


def check_one_kind(first: Entry, *others: Entry) -> None:
    """Raises ValueError, naming both sides, unless all are patches for one base with one sidecar and one shape."""
    for other in others:
        if other.base["sha256"] != first.base["sha256"]:
            raise ValueError(
                f"{other.reference} is a patch of a base with sha256 {other.base['sha256'][:16]}…, and "
                f"{first.reference} of one with {first.base['sha256'][:16]}…: only patches of one base go together"
            )
        here, there = first.sidecar.model_dump(), other.sidecar.model_dump()
        # Whether the inverse was tested at start-up says nothing of the patch.
        differing = [key for key in here if here[key] != there[key] and key != "check_invertibility"]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{other.reference} has sidecar.{key} = {there[key]}, and {first.reference} has {here[key]}: only "
                "patches of one sidecar config go together"
            )
        shapes = [{name: tuple(tensor.shape) for name, tensor in of.tensors.items()} for of in (first, other)]
        if shapes[0] != shapes[1]:
            name = min(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
            raise ValueError(
                f"{name}: shape {shapes[1].get(name, 'none')} in {other.reference}, {shapes[0].get(name, 'none')} in "
                f"{first.reference}: they are patches of models of different shape"
            )


class Subject:
    """A base on its device in eval mode, wrapped by `attach`.

    Args:
        model: the wrapped base.
        tokenizer: its tokenizer.
        sha256: of its weights rounded to bfloat16, as patches name it; None to hash them now.
        device: where it goes; None is the GPU, or the CPU where there is none.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, sha256: str | None, device: torch.device | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.sha256 = sha256 or base_sha256(model, rounded=True)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(self.device)
        switchboard(model).attached.to(self.device)

    @classmethod
    def of(cls, reference: str, base: str | None = None, device: torch.device | None = None) -> Subject:
        """The base of a patch, in the dtype that it was trained in. Raises as `load_patched` does."""
        model, tokenizer = load_patched(reference, base)
        return cls(model, tokenizer, None, device)

    @classmethod
    def bare(
        cls, name: str, revision: str | None = None, dtype: str = "float32", device: torch.device | None = None
    ) -> Subject:
        """A base that no patch has been named for. Raises ConfigError if it can't be had or is of an unknown family."""
        model = load_base(
            BaseConfig.model_validate({"model": name, "revision": revision, "dtype": dtype}), torch.device("cpu")
        )
        attach(model, SidecarConfig(bottleneck=1))
        return cls(model, AutoTokenizer.from_pretrained(name, revision=revision), None, device)

    def patch_of(self, entry: Entry) -> Patch:
        """The entry's patch on this base's device, to be put on with `active_patch`.

        Raises:
            ValueError: it is a patch of another base, shape or family.
        """
        if entry.base["sha256"] != self.sha256:
            raise ValueError(
                f"{entry.reference} is a patch of a base with sha256 {entry.base['sha256'][:16]}…, but this base has "
                f"{self.sha256[:16]}…: name the right base with --base"
            )
        return self.patch_from(entry, entry.tensors)

    def patch_from(self, entry: Entry, tensors: dict[str, Tensor]) -> Patch:
        """A patch of that entry's kind with other tensors. Raises ValueError if they don't fit."""
        try:
            patch = Patch(width_of(self.model), len(blocks_of(self.model)), entry.sidecar)
            check_fits(self.model, patch)
            load_tensors(patch, tensors)
        except ValueError as error:
            raise ValueError(f"{entry.reference}: {error}") from error
        return patch.requires_grad_(False).to(self.device)
