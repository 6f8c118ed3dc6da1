"""What a comparison is made on: the base, the corpora that are taught, the held-out sets, sizes and rates."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from revpatch.stream.build import build_shards
from revpatch.stream.manifest import MANIFEST_NAME

ROOT = Path(__file__).resolve().parent.parent
PYTHON_CHARACTERS = 1_500_000
OWN = "own"
"""The held-out part of what the base itself wrote: the first old set of every comparison."""


@dataclass(frozen=True)
class Tier:
    """One setting, the same for every method."""

    name: str
    base: str
    corpora: dict[str, tuple[str, str]]
    """By name, in the order in which they are taught: training shards and held-out shards."""
    own: tuple[str, str]
    """What the base itself wrote: the part that is rehearsed and the held-out part."""
    old: dict[str, str]
    """Held-out shards of what the base knew before, by name; none of them is rehearsed when its own text is."""
    old_replay: str | None
    """Real old text, to be rehearsed instead of the base's own."""
    never: dict[str, str]
    """Held-out shards of what nobody teaches."""
    block: int = 128
    steps: int = 80
    """Optimizer steps a phase."""
    warmup: int = 10
    new_blocks: int = 8
    replay_blocks: int = 4
    checks: int = 4
    """Measurements a phase, evenly spread."""
    main_blocks: int = 48
    """Held-out blocks of the corpora and of the base's own text."""
    other_blocks: int = 32
    bottleneck: int = 32
    threads: int = 1
    """Of one cell."""
    workers: int = 2
    """Cells at a time, where there are cores for them."""
    seconds_a_step: float = 0.3
    """A first guess, until a cell is done."""
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def held_out(self) -> dict[str, str]:
        """Every held-out set, those that are measured on more blocks first."""
        taught = {name: probe for name, (_, probe) in self.corpora.items()}
        return {OWN: self.own[1], **taught, **self.old, **self.never}

    @property
    def main(self) -> tuple[str, ...]:
        """The sets that are measured on `main_blocks`."""
        return OWN, *self.corpora


RATES = {"ours": 6e-3, "lora": 4e-3, "full": 5e-4, "oft": 4e-3, "osf": 2e-4, "shadow": 2e-3}
"""Where the sweep of each family begins."""


def tiny(folder: Path) -> Tier:
    """The bundled base and corpora, and the standard library's source as a corpus of quite another kind."""
    demo = "shards/demo"
    python = str(python_shards(folder / "python"))
    return Tier(
        name="tiny",
        base="shards/demo_base",
        corpora={
            "jargon": (f"{demo}/jargon", f"{demo}/jargon_probe"),
            "devil": (f"{demo}/devil", f"{demo}/devil_probe"),
            "python": (python, f"{python}_probe"),
        },
        own=(f"{demo}/sotu", f"{demo}/sotu_probe"),
        old={"sotu": f"{demo}/sotu_probe"},
        old_replay=f"{demo}/sotu",
        never={"scrambled": f"{demo}/scrambled_probe"},
    )


def smoke(folder: Path) -> Tier:
    """The smallest comparison that goes through everything."""
    whole = tiny(folder)
    return Tier(
        **{
            **vars(whole),
            "name": "smoke",
            "corpora": {"jargon": whole.corpora["jargon"]},
            "steps": 4,
            "warmup": 1,
            "checks": 2,
            "main_blocks": 4,
            "other_blocks": 4,
            "seeds": (0,),
        }
    )


def python_shards(out: Path) -> Path:
    """Shards of the standard library's own source, one module a document; built once."""
    if not (out / MANIFEST_NAME).exists():
        library = Path(sysconfig.get_paths()["stdlib"])
        out.parent.mkdir(parents=True, exist_ok=True)
        source, left = out.parent / f"{out.name}.jsonl", PYTHON_CHARACTERS
        with source.open("w", encoding="utf-8") as file:
            for path in sorted(library.glob("*.py")):
                text = path.read_text(encoding="utf-8")
                if text.strip() and left > 0:
                    file.write(json.dumps({"id": path.name, "text": text}) + "\n")
                    left -= len(text)
        build_shards(
            [source],
            AutoTokenizer.from_pretrained(ROOT / "shards/demo_base"),
            128,
            out,
            licence="PSF-2.0",
            note="modules of Python's standard library",
            holdout=0.1,
        )
    return out
