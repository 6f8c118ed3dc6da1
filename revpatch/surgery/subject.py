"""The subject of an operation: a base that is loaded once, and any number of patches for it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from revpatch.base import DTYPES, BaseNotFoundError, load_base
from revpatch.config import SidecarConfig
from revpatch.ledger.history import PatchFile
from revpatch.ledger.layers import check_comparable
from revpatch.ledger.patch_file import EntryError
from revpatch.loading import load_hashed
from revpatch.monitoring.doing import doing
from revpatch.patch.families import blocks_of, width_of
from revpatch.patch.patched_model import Patch, attach, base_sha256, check_fits, load_tensors
from revpatch.stream.tokenizer import load_tokenizer


def of_base(patch: PatchFile) -> PatchFile:
    """Return the patch, once its metadata says which base it belongs to. Raises EntryError if it doesn't."""
    _ = patch.sidecar
    if patch.base["sha256"] is None:
        raise EntryError(
            f"{patch.reference} doesn't say which base it is a patch of: save it from the model that it is on"
        )
    if patch.base["dtype"] not in ("bfloat16", "float32"):
        raise EntryError(
            f"{patch.reference}: expected a base of dtype bfloat16 or float32, found {patch.base['dtype']!r}"
        )
    return patch


def _first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def check_one_kind(first: PatchFile, *others: PatchFile) -> None:
    """Raises EntryError, naming both sides, unless all are patches of one base whose weights mean the same."""
    for other in others:
        pair = first, other
        said = tuple({**of.metadata, "sidecar": of.sidecar.model_dump(mode="json")} for of in pair)
        check_comparable((first.reference, other.reference), (said[0], said[1]), (first.tensors, other.tensors))


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
        with doing("hashing the base", enabled=_first()):
            self.sha256 = sha256 or base_sha256(model, rounded=True)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(self.device)

    @classmethod
    def of(cls, reference: str, base: str | None = None, device: torch.device | None = None) -> Subject:
        """The base of a patch, in the dtype that it was trained in. Raises as `load_patched` does."""
        with doing(f"loading the base of {reference}", enabled=_first()):
            loaded = load_hashed(reference, base)
        return cls(*loaded, device)

    @classmethod
    def bare(
        cls, name: str, revision: str | None = None, dtype: str = "float32", device: torch.device | None = None
    ) -> Subject:
        """A base that no patch has been named for. Raises ValueError if it can't be had or is of an unknown family."""
        try:
            with doing(f"loading the base {name} in {dtype}", enabled=_first()):
                model = load_base(name, revision, DTYPES[dtype])
        except BaseNotFoundError as error:
            raise ValueError(f"base {name}: {error}; name its folder with --base") from error
        except ValueError as error:
            raise ValueError(f"base {name}: {error}") from error
        attach(model, SidecarConfig(bottleneck=1))
        return cls(model, load_tokenizer(name, revision), None, device)

    def patch_of(self, entry: PatchFile) -> Patch:
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

    def patch_from(self, entry: PatchFile, tensors: dict[str, Tensor]) -> Patch:
        """A patch of that entry's kind with other tensors. Raises ValueError if they don't fit."""
        try:
            patch = Patch(width_of(self.model), len(blocks_of(self.model)), entry.sidecar)
            check_fits(self.model, patch)
            load_tensors(patch, tensors)
        except ValueError as error:
            raise ValueError(f"{entry.reference}: {error}") from error
        return patch.requires_grad_(False).to(self.device)
