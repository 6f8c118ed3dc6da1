"""Pretrains the demo base: a tiny GPT-2 with a byte-level BPE of its own, on State of the Union addresses.

    python tools/make_demo_base.py            # about 10 minutes on 2 cores; writes shards/demo_base

The same seed on the same machine gives the same model. Addresses that are held out for the probe (by a hash of their
text, as in `revpatch shards build --holdout`) are never read, neither for the vocabulary nor for the weights. The
weights are stored in bfloat16. The model card, README.md beside them, is written from what was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from progress import clock_time
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from revpatch.corpus.encode import is_held_out
from revpatch.corpus.sources import read_documents
from revpatch.distributed.ranks import bfloat16_is_slow

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "shards/text/sotu.jsonl.gz"
HOLDOUT = 0.06
VOCABULARY, BLOCK = 4096, 256
EOS = "<|endoftext|>"
PROMPTS = ["The state of our Union", "My fellow citizens,", "The war with Mexico", "In the past year the Treasury"]


def texts() -> tuple[list[str], list[str]]:
    """What it learns, and what is held out."""
    documents = [document.text for document in read_documents([TEXT])]
    held_out = [is_held_out(text, HOLDOUT) for text in documents]
    learned, probe = ([t for t, out in zip(documents, held_out, strict=True) if out is side] for side in (False, True))
    return learned, probe


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in GPT-2's form, trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS, model_max_length=256
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], block: int) -> Tensor:
    """(blocks, block) int64; every document ends with EOS."""
    row: list[int] = []
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        row += [*ids, tokenizer.eos_token_id]
    return torch.tensor(row[: len(row) // block * block]).view(-1, block)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> GPT2LMHeadModel:
    """The demo's GPT-2 with random weights, the same for the same seed."""
    set_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=BLOCK,
        n_embd=192,
        n_layer=4,
        n_head=3,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own GELU in one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, blocks: Tensor) -> float:
    """Mean nats per token over (blocks, block)."""
    model.eval()
    losses = [float(model(part, labels=part).loss) * len(part) for part in blocks.split(32)]
    model.train()
    return sum(losses) / len(blocks)


def unigram_loss(train: Tensor, probe: Tensor, vocabulary: int) -> float:
    """Nats per token of a unigram model with add-one smoothing."""
    counts = np.bincount(train.flatten().numpy(), minlength=vocabulary) + 1
    return float(-np.log(counts / counts.sum())[probe[:, 1:].flatten().numpy()].mean())


def pretrain(model: GPT2LMHeadModel, train: Tensor, steps: int, batch: int, lr: float, seed: int) -> None:
    """AdamW with warm-up and cosine, under bf16 autocast where the CPU gains by it, over seeded permutations."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(train), generator=generator) for _ in range(steps * batch // len(train) + 1)])
    began, fast_bfloat16 = time.time(), not bfloat16_is_slow()
    for step in range(steps):
        warm, done = min(1.0, (step + 1) / 100), step / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        tokens = train[order[step * batch : (step + 1) * batch]]
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step + 1 == steps:
            so_far = time.time() - began
            left = so_far / (step + 1) * (steps - step - 1)
            times = f"{clock_time(so_far)}, about {clock_time(left)} left"
            print(f"step {step + 1} of {steps}, loss {loss.item():.3f}; {times}", file=sys.stderr, flush=True)


@torch.no_grad()
def samples(model: GPT2LMHeadModel, tokenizer: Any) -> list[str]:
    """One nucleus sample per prompt."""
    model.eval()
    texts = []
    for prompt in PROMPTS:
        set_seed(0)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_p=0.9,
            temperature=0.8,
            max_new_tokens=50,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts.append(" ".join(tokenizer.decode(out[0], skip_special_tokens=True).split()))
    return texts


def model_card(facts: dict[str, Any], texts: list[str]) -> str:
    """The card, from the measured facts."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    quoted = "\n".join(f"- {text}" for text in texts)
    return f"""# The demo base

A tiny GPT-2 (`GPT2LMHeadModel`) with a byte-level BPE of its own, pretrained on State of the Union addresses. It is for
the demo and the tests of revpatch: a real language model that fits in a repository, and nothing that anyone should
believe or deploy. Made by `python tools/make_demo_base.py`; data, seed and steps below.

Data: State of the Union addresses, 1790 to 2021, `shards/text/sotu.jsonl.gz`; works of the US government, public
domain. Licence of the weights: CC0.

| what | value |
| --- | --- |
{rows}

Samples (nucleus 0.9, temperature 0.8, not chosen):

{quoted}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "shards/demo_base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="blocks of 256 tokens a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    train_texts, probe_texts = texts()
    tokenizer = train_tokenizer(train_texts, VOCABULARY)
    train, probe = encode(tokenizer, train_texts, BLOCK), encode(tokenizer, probe_texts, BLOCK)
    model = new_model(tokenizer, args.seed)
    untrained = held_out_loss(model, probe)
    began = time.time()
    pretrain(model, train, args.steps, args.batch, args.lr, args.seed)
    seconds = time.time() - began

    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    stored = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32)
    facts = {
        "parameters": f"{stored.num_parameters():,}",
        "shape": "4 layers, width 192, 3 heads, vocabulary 4,096, 256 positions",
        "training documents and tokens": f"{len(train_texts)}, {train.numel():,}",
        "held-out documents and tokens": f"{len(probe_texts)}, {probe.numel():,}",
        "steps, tokens a step, epochs": f"{args.steps:,}, {args.batch * BLOCK:,}, "
        f"{args.steps * args.batch / len(train):.1f}",
        "seed, peak learning rate": f"{args.seed}, {args.lr}",
        "training time on 2 CPU cores": f"{seconds / 60:.0f} minutes",
        "held-out loss, nats per token": f"{held_out_loss(stored, probe):.3f}",
        "the same, unigram model": f"{unigram_loss(train, probe, VOCABULARY):.3f}",
        "the same, untrained model": f"{untrained:.3f}",
    }
    reloaded = AutoTokenizer.from_pretrained(args.out)
    (args.out / "README.md").write_text(model_card(facts, samples(stored, reloaded)), encoding="utf-8")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
