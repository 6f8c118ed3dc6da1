"""Shards for a comparison, each built once: of files, of the standard library, and of what the base writes itself."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from revpatch.config import Config
from revpatch.corpus.build import build_shards
from revpatch.corpus.tokenizer import load_tokenizer
from revpatch.durable import sha256_of, sha256_of_file
from revpatch.shards.format import MANIFEST_NAME

PYTHON_CHARACTERS = 1_500_000
HOLDOUT = 0.1


@dataclass(frozen=True)
class Shelf:
    """Where the shards of one base are kept.

    Args:
        folder: of all of them; a set's name has a hash of what decides what is in it.
        base: folder of the base, whose tokenizer they are made with.
        block: tokens a block.
        threads: with which the base writes; two make a small one slower on a busy machine.
    """

    folder: Path
    base: Path
    block: int
    threads: int

    def build(self, name: str, source: Path) -> tuple[str, str]:
        """Training shards and held-out shards of a file of documents.

        Raises FileNotFoundError if it isn't there, ValueError if it holds no documents.
        """
        if not source.is_file():
            raise FileNotFoundError(f"{name}: expected a file of documents, found no {source}")
        decides = [sha256_of_file(source), sha256_of_file(self.base / "tokenizer.json"), self.block]
        out = self.folder / f"{name}-{sha256_of(json.dumps(decides).encode())[:12]}"
        if not (out / MANIFEST_NAME).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            tokenizer = load_tokenizer(str(self.base))
            build_shards([source], tokenizer, self.block, out, holdout=HOLDOUT)
        return str(out), f"{out}_probe"

    def python(self) -> Path:
        """A file of the standard library's modules, in the order of their names, one a document."""
        file, left = self.folder / "python.jsonl", PYTHON_CHARACTERS
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            if text.strip() and left > 0:
                lines.append(json.dumps({"id": path.name, "text": text}) + "\n")
                left -= len(text)
        file.write_text("".join(lines), encoding="utf-8")
        return file

    def own(self, blocks: int) -> tuple[str, str]:
        """What the base writes by itself: blocks to be replayed, and an eighth as many that are held out."""
        from revpatch.distributed import Launch
        from revpatch.distributed.ranks import process_group
        from revpatch.train.own_text import build_own_text
        from revpatch.train.startup import load_same_base

        config = Config.model_validate(
            {
                "output_dir": "none",
                "base": {"model": str(self.base), "dtype": "float32", "block_size": self.block},
                "replay": {"base": "self", "own_blocks": blocks},
                "build": {"folder": str(self.folder)},
                "optimizer": {"warmup_steps": 0},
                "phases": [{"name": "none", "shards": "none", "steps": 1}],
            }
        )
        torch.set_num_threads(self.threads)
        with process_group(Launch.from_environment(), torch.device("cpu"), timeout_minutes=60.0) as peers:
            folder = build_own_text(config, *load_same_base(config.base, peers), peers)
        return str(folder), f"{folder}_probe"
