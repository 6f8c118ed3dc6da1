"""Short texts that rank 0 writes at the run's start and at each commit, always from the same prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from revpatch.config import BaseConfig, SamplesConfig
from revpatch.ledger.events import Sample
from revpatch.patch.patched_model import switchboard
from revpatch.stream.tokenizer import prompt_ids, read_tokenizer

PROMPT_TOKENS = 16
"""Of a held-out block, where the config names no prompts."""
MAX_PROMPTS = 8


class Sampler:
    """Writes on from a few prompts with the patch that is on the model: greedily, so it draws no random number.

    Args:
        base: the patched base model, in eval mode.
        of: the base's config, which names its tokenizer.
        config: the prompts, and how much to write.
        blocks: by held-out set (blocks, time) int64; their beginnings are the prompts if the config has none.
    """

    def __init__(
        self, base: nn.Module, of: BaseConfig, config: SamplesConfig, blocks: dict[str, NDArray[np.int64]]
    ) -> None:
        self.base, self.max_new_tokens = base, config.max_new_tokens
        self.tokenizer: Any = read_tokenizer(of.model, of.revision)[0]  # the run's plan has the notices
        given = [prompt_ids(self.tokenizer, prompt) for prompt in config.prompts]
        # The second half of a block, where a document is under way.
        held_out = [rows[0, rows.shape[1] // 2 :][:PROMPT_TOKENS].tolist() for rows in blocks.values()]
        self.prompts: list[list[int]] = [ids for ids in given or held_out if ids][:MAX_PROMPTS]

    def write(self) -> list[Sample]:
        """Return for each prompt the text after it."""
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            return self._write()

    def _write(self) -> list[Sample]:
        device = next(self.base.parameters()).device
        room: int = self.base.config.max_position_embeddings  # type: ignore[union-attr, assignment]
        written = []
        for prompt in self.prompts:
            ids = torch.tensor([prompt[: room - 1]], device=device)
            out = self.base.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=min(self.max_new_tokens, room - ids.shape[1]),
                no_repeat_ngram_size=4,
                pad_token_id=self.tokenizer.eos_token_id,
                use_cache=switchboard(self.base).attached.config.gate != "seq",
            )
            text = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            written.append(Sample(prompt=self.tokenizer.decode(ids[0], skip_special_tokens=True), text=text))
        return written
