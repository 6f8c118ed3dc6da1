"""Measures how fast corpora become shards, against the bare tokenizer on the same text.

    python tools/bench_data.py [--megabytes 48] [--rounds 3] [--json FILE]

The text is the bundled documents, repeated with their words varied, as one JSONL file. Tokenizers: the demo base's,
and a byte-level BPE of up to 50,000 tokens trained here on that text. Rounds are interleaved, so that what else the
machine does falls on all alike, and medians are compared.

"bare" is encode_batch_fast on texts that are in memory, with one thread, in batches of a building chunk's size. Two
such processes at once show what the machine can give to two workers: on a busy or a virtual one, less than twice as
much. "building" is all of `build_shards`, from the file to the manifest, start of the workers included. Exits
with 1 if a figure does not hold.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from figures import Figure, machine, show
from progress import Progress
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from revpatch.corpus.build import build_shards
from revpatch.corpus.chunks import CHUNK_CHARACTERS

ROOT = Path(__file__).resolve().parent.parent
BLOCK_SIZE = 1024
ASKED = {"building, 1 worker / bare tokenizer": 0.9, "building, 2 workers / 1 worker": 1.7}


class LightTokenizer:
    """What building asks of a tokenizer of transformers."""

    eos_token_id, all_special_tokens = 0, ("<|endoftext|>",)

    def __init__(self, name: str, backend: Tokenizer) -> None:
        self.name_or_path = name
        self.backend_tokenizer = backend
        self.get_vocab: Callable[[], dict[str, int]] = backend.get_vocab

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()


def varied_texts(megabytes: float) -> list[str]:
    """Bundled documents, the first time as they are and then with some words exchanged."""
    originals = [
        str(json.loads(line)["text"])
        for path in sorted((ROOT / "shards/text").glob("*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    ]
    generator = random.Random(0)
    words = sorted({word for text in originals for word in text.split()})
    texts: list[str] = []
    size = 0
    while size < megabytes * 1e6:
        text = originals[len(texts) % len(originals)]
        if len(texts) >= len(originals):
            text = " ".join(w if generator.random() < 0.9 else generator.choice(words) for w in text.split(" "))
        texts.append(text)
        size += len(text.encode())
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> LightTokenizer:
    """A byte-level BPE, as GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return LightTokenizer("bench", backend)


def batches(texts: list[str]) -> Iterator[list[str]]:
    """Batches of the size that building uses."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= CHUNK_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def bare(texts: list[str], tokenizer: LightTokenizer) -> float:
    """Tokens a second of the tokenizer alone."""
    tokenizer = LightTokenizer("bare", Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))  # with no cache filled
    start = time.perf_counter()
    tokens = 0
    for batch in batches(texts):
        tokens += sum(map(len, tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)))
    return tokens / (time.perf_counter() - start)


def bare_twice(texts: list[str], tokenizer: LightTokenizer) -> float:
    """Tokens a second of two such processes at once, each with all texts: what the machine can give."""
    state = tokenizer.backend_tokenizer.to_str()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        return sum(pool.starmap(_bare_from, [(texts, state)] * 2, chunksize=1))


def _bare_from(texts: list[str], state: str) -> float:
    return bare(texts, LightTokenizer("bare", Tokenizer.from_str(state)))


def building(source: Path, tokenizer: LightTokenizer, folder: Path, workers: int) -> float:
    """Tokens a second of a whole build."""
    start = time.perf_counter()
    manifest = build_shards(source, tokenizer, BLOCK_SIZE, folder / "out", workers=workers)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder / "out")
    return manifest.tokens / seconds


WAYS = ("bare tokenizer", "bare tokenizer, 2 processes at once", "building, 1 worker", "building, 2 workers")


def measure(
    source: Path, texts: list[str], tokenizer: LightTokenizer, rounds: int, progress: Progress
) -> dict[str, float]:
    """The medians of each way, in tokens a second."""
    ways: tuple[Callable[[], float], ...] = (
        lambda: bare(texts, tokenizer),
        lambda: bare_twice(texts, tokenizer),
        lambda: building(source, tokenizer, source.parent, 1),
        lambda: building(source, tokenizer, source.parent, 2),
    )
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, way in zip(WAYS, ways, strict=True):
            with progress.step(name):
                speeds[name].append(way())
    return {name: statistics.median(values) for name, values in speeds.items()}


def figures_of(vocabulary: int, speeds: dict[str, float]) -> list[Figure]:
    """The speeds and their ratios."""
    one = speeds["building, 1 worker"]
    ratios = (one / speeds["bare tokenizer"], speeds["building, 2 workers"] / one)
    return [
        *(Figure.plain(f"{name}, {vocabulary} ids", speed, "tokens/s") for name, speed in speeds.items()),
        *(
            Figure.at_least(f"{name}, {vocabulary} ids", asked, ratio, "times")
            for (name, asked), ratio in zip(ASKED.items(), ratios, strict=True)
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    progress = Progress("bench_data.py", ["text", "training a tokenizer", *WAYS * (2 * arguments.rounds)])
    with progress.step("text"):
        texts = varied_texts(arguments.megabytes)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    title = (
        f"{len(texts)} documents, {megabytes:.1f} MB of text as JSONL, blocks of {BLOCK_SIZE}; medians of "
        f"{arguments.rounds} interleaved rounds; load {os.getloadavg()[0]:.1f} at the start\n{machine('tokenizers')}"
    )
    demo = LightTokenizer("demo_base", Tokenizer.from_file(str(ROOT / "shards/demo_base/tokenizer.json")))
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "bench.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        with progress.step("training a tokenizer"):
            trained = train_tokenizer(texts, 50_000)
        for tokenizer in (demo, trained):
            figures += figures_of(len(tokenizer), measure(source, texts, tokenizer, arguments.rounds, progress))
    show(title, figures, arguments.json)
    sys.exit(0 if all(figure.holds for figure in figures) else 1)


if __name__ == "__main__":
    main()
