"""What a comparison is made on: the base, the corpora that are taught, the held-out sets, sizes and rates."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from compare_text import Shelf

ROOT = Path(__file__).resolve().parent.parent
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
    """What the base itself wrote: the part that is replayed and the held-out part."""
    old: dict[str, str]
    """Held-out shards of what the base knew before, by name; none of them is replayed when its own text is."""
    old_replay: str | None
    """Real old text, to be replayed instead of the base's own."""
    never: dict[str, str]
    """Held-out shards of what nobody teaches."""
    block: int = 128
    steps: int = 60
    """Optimizer steps a phase."""
    warmup: int = 10
    new_blocks: int = 10
    replay_blocks: int = 2
    checks: int = 4
    """Measurements a phase, evenly spread."""
    main_blocks: int = 32
    """Held-out blocks of the corpora and of the base's own text."""
    other_blocks: int = 16
    bottleneck: int = 32
    threads: int = 1
    """Of one cell."""
    workers: int = 2
    """Cells at a time, where there are cores for them."""
    seconds_a_step: float = 0.3
    """A first guess, until a cell is done."""
    seeds: tuple[int, ...] = (0, 1, 2)
    extra: tuple[str, ...] = ("shadow",)
    """Families of peers, beside LoRA and full fine-tuning, that can be put on this base."""

    @property
    def held_out(self) -> dict[str, str]:
        """Every held-out set, those that are measured on more blocks first."""
        taught = {name: probe for name, (_, probe) in self.corpora.items()}
        return {OWN: self.own[1], **taught, **self.old, **self.never}

    def begun(self, phases: int) -> Tier:
        """The tier whose first corpora alone are taught; the others are held-out sets that the base knew before.

        Raises ValueError for a number of phases that it has not.
        """
        if not 1 <= phases <= len(self.corpora):
            raise ValueError(f"--phases {phases}: expected 1 to {len(self.corpora)}")
        taught = list(self.corpora)[:phases]
        rest = {name: probe for name, (_, probe) in self.corpora.items() if name not in taught}
        return replace(self, corpora={name: self.corpora[name] for name in taught}, old={**self.old, **rest})

    @property
    def main(self) -> tuple[str, ...]:
        """The sets that are measured on `main_blocks`."""
        return OWN, *self.corpora


RATES = {"ours": 6e-3, "lora": 4e-3, "full": 2.5e-4, "oft": 4e-3, "osf": 2e-4, "shadow": 2e-3}
"""Where the sweep of each family begins."""


def tiny(folder: Path) -> Tier:
    """The bundled base and corpora, and the standard library's source as a corpus of quite another kind."""
    demo, shelf = "shards/demo", Shelf(folder / "tiny", ROOT / "shards/demo_base", 128, threads=1)
    return Tier(
        name="tiny",
        base="shards/demo_base",
        corpora={
            "jargon": (f"{demo}/jargon", f"{demo}/jargon_probe"),
            "devil": (f"{demo}/devil", f"{demo}/devil_probe"),
            "python": shelf.build("python", shelf.python()),
        },
        own=shelf.own(512),
        old={"sotu": f"{demo}/sotu_probe"},
        old_replay=f"{demo}/sotu",
        never={"scrambled": f"{demo}/scrambled_probe"},
    )


def smoke(folder: Path) -> Tier:
    """The smallest comparison that goes through everything: a phase of four steps."""
    whole = tiny(folder)
    small = {"steps": 4, "warmup": 1, "checks": 2, "main_blocks": 4, "other_blocks": 4, "seeds": (0,)}
    return replace(whole, name="smoke", corpora={"jargon": whole.corpora["jargon"]}, **small)  # type: ignore[arg-type]


def custom(
    folder: Path,
    base: Path,
    corpora: dict[str, Path],
    old: dict[str, Path],
    never: dict[str, Path],
    name: str = "custom",
) -> Tier:
    """A base and files of documents, with the sizes of the real tier.

    Raises FileNotFoundError, ValueError for what can't be read.
    """
    shelf = Shelf(folder / name, base, 128, threads=1)
    held_out = {name: shelf.build(name, file)[1] for name, file in {**old, **never}.items()}
    return Tier(
        name=name,
        base=str(base),
        corpora={name: shelf.build(name, file) for name, file in corpora.items()},
        own=shelf.own(256),
        old={name: held_out[name] for name in old},
        old_replay=None,
        never={name: held_out[name] for name in never},
        steps=40,
        checks=2,
        main_blocks=24,
        other_blocks=12,
        bottleneck=64,
        seconds_a_step=12.0,
        extra=("shadow",) if _is_gpt2(base) else ("oft", "osf", "shadow"),
    )


def _is_gpt2(base: Path) -> bool:
    """Whether its layers are of GPT-2's own kind, which OFT and OSF don't know."""
    return bool(json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"] == "gpt2")


def real(folder: Path, data: Path) -> Tier:
    """SmolLM2-135M and the corpora that tools/real_tier.py makes.

    Raises FileNotFoundError, with the command that makes it, for what is missing.
    """
    corpora = {name: data / f"{name}.jsonl" for name in ("french", "perl")}
    old = {
        "python": data / "python.jsonl",
        "sotu": ROOT / "shards/text/sotu.jsonl.gz",
        "english": data / "english.jsonl",
    }
    base = data / "smollm2"
    for path in (base, *corpora.values(), *old.values()):
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: python tools/real_tier.py --folder {data}")
    never = {"jargon": ROOT / "shards/text/jargon.jsonl.gz"}
    return custom(folder, base.resolve(), corpora, old, never, "real")
