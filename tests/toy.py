"""A whole small world for tests: a tokenizer, a random GPT-2, three made-up corpora as shards, and a config of a run.

    toy = build_toy(folder)                                     # once a session: the fixture `toy` of tests/conftest.py
    path = toy.config_file(tmp_path, engine={"kind": "accelerate"}, phases=[...])
    config = toy.config(tmp_path, batch={"new_blocks": 8})

Each corpus has words of its own, so that a patch can learn one and be held to another, and a held-out side.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from revpatch.config import Config
from revpatch.config.file import load_config
from revpatch.corpus.build import build_shards

WORDS = ["the", "patch", "learns", "what", "a", "stream", "brings", "and", "forgets", "little", "of", "it"]
CORPORA = {
    "base": WORDS,
    "first": ["kettle", "boils", "under", "seven", "moons", "while", "our", "cat", "sings", "low"],
    "second": ["rusty", "gates", "open", "by", "night", "for", "those", "who", "count", "backwards"],
}
"""The corpora and their words; `base` is what is replayed from the first phase on."""
Module = TypeVar("Module", bound=nn.Module)
BLOCK_SIZE, POSITIONS, WIDTH, LAYERS = 16, 64, 32, 2


def make_text(i: int, words: list[str] = WORDS) -> str:
    """Document i: a number, so that no two are equal, and some words."""
    generator = np.random.default_rng(i)
    return f"document {i}: " + " ".join(generator.choice(words, size=generator.integers(5, 40)))


def make_tokenizer(vocab_size: int = 300) -> Any:
    """A byte-level BPE that has seen the base corpus alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(i) for i in range(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def make_base(vocab_size: int, width: int = WIDTH, seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2 whose logits are far from uniform; dropout is on in its config, as in the real one's."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=POSITIONS,
        n_embd=width,
        n_layer=LAYERS,
        n_head=1 if width % 2 else 2,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).eval()


def save_base(folder: Path, tokenizer: Any, width: int = WIDTH, seed: int = 0) -> Path:
    """A base model and its tokenizer in a folder, as `from_pretrained` reads them."""
    make_base(len(tokenizer), width, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_it_look_trained(module: Module, seed: int = 1, strength: float = 1.0) -> Module:
    """Weights of the size that training reaches: gates well away from one half, updates comparable to the stream."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("log_scale"):
                parameter.copy_(0.2 * noise)
            elif "gates." in name:
                parameter.copy_(1.5 * noise)
            elif parameter.dim() == 2:
                parameter.copy_(strength * noise / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.3 * strength * noise)
        of_base = torch.Generator().manual_seed(0)
        for _, channels in module.named_buffers():  # of a patch: no two channels alike, and the same for any weights
            channels.copy_(torch.exp(0.5 * torch.randn(channels.shape, generator=of_base, dtype=torch.float64)))
    return module


@dataclass(frozen=True)
class Toy:
    """What `build_toy` made; `base` and every folder of shards are read only."""

    folder: Path
    base: Path
    tokenizer: Any

    def shards(self, name: str) -> Path:
        """The shards of a corpus: "base", "first", "second", or one of these with "_probe" after it."""
        return self.folder / name

    def settings(self, tmp: Path, **overrides: Any) -> dict[str, Any]:
        """A valid run in `tmp`/run: two phases of 12 steps, three probe sets, replay. Overrides are merged, key by
        key, into what is there; lists are replaced."""
        plain = {
            "output_dir": str(tmp / "run"),
            "base": {"model": str(self.base), "dtype": "float32", "block_size": BLOCK_SIZE},
            "sidecar": {"bottleneck": 8},
            "optimizer": {"lr": 1.0e-2, "warmup_steps": 2},
            "batch": {"new_blocks": 4, "replay_blocks": 4, "micro_blocks": 4},
            "replay": {"base": str(self.shards("base")), "blocks_per_phase": 8},
            "phases": [{"name": name, "shards": str(self.shards(name)), "steps": 12} for name in ("first", "second")],
            "probes": {
                "every": 6,
                "sets": [
                    {"name": "base", "shards": str(self.shards("base_probe")), "tolerance": 0.5, "max_blocks": 16},
                    *(
                        {
                            "name": name,
                            "shards": str(self.shards(f"{name}_probe")),
                            "tolerance": 0.5,
                            "max_blocks": 16,
                            "guard_after": name,
                        }
                        for name in ("first", "second")
                    ),
                ],
            },
            "rollback": {"max_drift": 1.0},
            "engine": {"kind": "accelerate"},
            "monitoring": {"every": 4, "tensorboard": False, "samples": {"max_new_tokens": 0}},
        }
        return _merged(plain, overrides)

    def config(self, tmp: Path, **overrides: Any) -> Config:
        """The same, as a Config."""
        return load_config(self.config_file(tmp, **overrides))

    def config_file(self, tmp: Path, **overrides: Any) -> Path:
        """The same, as a YAML file in `tmp`."""
        path = tmp / "config.yaml"
        path.write_text(yaml.safe_dump(self.settings(tmp, **overrides), sort_keys=False), encoding="utf-8")
        return path


def build_toy(folder: Path, documents: int = 120) -> Toy:
    """Builds it all in `folder`: the base in base_model, the shards by their names. About a second."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    base = save_base(folder / "base_model", tokenizer)
    for name, words in CORPORA.items():
        source = folder / f"{name}.jsonl"
        lines = (json.dumps({"text": make_text(i, words)}) + "\n" for i in range(documents))
        source.write_text("".join(lines), encoding="utf-8")
        build_shards([source], tokenizer, BLOCK_SIZE, folder / name, holdout=0.2)
    return Toy(folder, base, tokenizer)


def _merged(plain: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(plain[key], value) if isinstance(value, dict) and isinstance(plain.get(key), dict) else value
        for key, value in overrides.items()
    }
    return {**plain, **both}
