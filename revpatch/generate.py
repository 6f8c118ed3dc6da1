"""Text from a base with a patch on it, off, or gated as learned; also the samples that a run writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from revpatch.config import BaseConfig, SamplesConfig
from revpatch.corpus.tokenizer import prompt_ids, read_tokenizer
from revpatch.ledger.events import Sample
from revpatch.patch.patched_model import GateMode, set_gate, switchboard
from revpatch.patches import load_patched

DEFAULT_NEW_TOKENS = 80


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    greedy: bool = False
    max_new_tokens: int | None = None
    """Tokens to write; None is `DEFAULT_NEW_TOKENS`, or what the model's positions leave room for."""
    temperature: float = 0.8
    top_p: float = 0.9
    top_k: int = 0
    """The likeliest tokens that are drawn from; 0 is all."""
    repetition_penalty: float = 1.15
    no_repeat_ngram: int = 4
    """No n-gram of this size twice; 0 allows it."""
    num_samples: int = 1
    """Texts for each prompt."""
    seed: int = 0
    """Set anew for each prompt, so that its texts don't hang on the prompts before it."""


class Writer:
    """Writes on from prompts.

    Args:
        model: patched, in eval mode; it is moved to a GPU if there is one.
        tokenizer: of the model.

    Raises:
        ValueError: several greedy samples are asked for.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, sampling: Sampling) -> None:
        if sampling.greedy and sampling.num_samples > 1:
            raise ValueError(
                f"--greedy draws nothing, so all {sampling.num_samples} samples of a prompt would be the same: leave "
                "out --greedy or --num-samples"
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        switchboard(model).attached.to(self.device)
        self.tokenizer = tokenizer
        self.sampling = sampling

    @classmethod
    def load(cls, patch: str | Path, sampling: Sampling, base: str | None = None) -> Writer:
        """Return a writer with the patch and the base that `load_patched` finds; raises as it does."""
        return cls(*load_patched(patch, base), sampling)

    def check(self, prompt: str, where: str = "--prompt") -> tuple[Tensor, int]:
        """Return the prompt's token ids, (1, time), and how many tokens to write.

        Args:
            where: what a message calls the prompt.

        Raises:
            ValueError: the prompt is empty, or leaves no room to write.
        """
        embeddings = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
        ids = torch.tensor([prompt_ids(self.tokenizer, prompt, embeddings, where)], dtype=torch.int64)
        if ids.shape[1] == 0:
            raise ValueError(f"{where} is empty: give the model at least one token to continue")
        wanted, positions = self.sampling.max_new_tokens, int(self.model.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]
        room = positions - ids.shape[1]
        if room < (wanted or 1):
            raise ValueError(
                f"{where} has {ids.shape[1]} tokens and the model reads at most {positions}, which leaves no room "
                f"for {wanted or 1} new ones: cut the prompt, or ask for at most {max(room, 0)} (--max-new-tokens)"
            )
        return ids.to(self.device), wanted or min(DEFAULT_NEW_TOKENS, room)

    def write(self, prompt: str, gate: str = "learned", streamer: Any = None) -> Iterator[str]:
        """The prompt and what the model writes after it, once for each sample; each is written when it is asked for.

        One after the other, so that a sample is the same whether it is shown as it is written or not.

        Args:
            prompt: at least one token long.
            gate: "learned", "on" or "off".
            streamer: of transformers; is handed the tokens as they are written.

        Raises:
            ValueError: an unknown gate mode; as `check`.
        """
        if gate not in ("learned", "on", "off"):
            raise ValueError(f"--gate {gate!r}: choose learned, on or off")
        ids, new_tokens = self.check(prompt)
        set_gate(self.model, cast(GateMode, gate))
        torch.manual_seed(self.sampling.seed)
        for _ in range(self.sampling.num_samples):
            yield self._sample(ids, new_tokens, streamer)

    def _sample(self, ids: Tensor, new_tokens: int, streamer: Any) -> str:
        how = self.sampling
        drawn = {} if how.greedy else {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k}
        out = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=not how.greedy,
            max_new_tokens=new_tokens,
            repetition_penalty=how.repetition_penalty,
            no_repeat_ngram_size=how.no_repeat_ngram,
            pad_token_id=self.tokenizer.eos_token_id,
            use_cache=switchboard(self.model).attached.config.gate != "seq",
            streamer=streamer,
            **drawn,
        )
        text: str = self.tokenizer.decode(out[0], skip_special_tokens=True)
        return text


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
