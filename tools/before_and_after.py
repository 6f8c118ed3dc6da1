"""What a run's base wrote before, after each phase, and with the newest commit's patch off, from the same prompts.

    python tools/before_and_after.py RUN [--base NAME]

The texts before and after the phases are those that the run wrote itself (`monitoring.samples` of its config); the
last are written here in the same way. Exits with 1 if one of these is not, to the letter, what the base wrote before.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path

from revpatch.config.file import load_config
from revpatch.generate import Sampler
from revpatch.ledger.events import Sample
from revpatch.patch.patched_model import set_gate
from revpatch.patches import load_patched
from revpatch.report.history import read_history
from revpatch.terminal import quiet_libraries
from revpatch.train.resume import CONFIG_NAME

WIDTH = 112


def told_by(run: Path) -> list[tuple[str, list[Sample]]]:
    """Return what a run wrote at its start and after each phase, oldest first.

    Raises ValueError when it has not written at its start and after a phase, or as `read_history`.
    """
    first, *others = read_history(run).samples or [("", [])]
    if not (first[1] and others):
        raise ValueError(
            f"{run}: expected texts of the run's start and of a commit, found none: let a phase end, with "
            "monitoring.samples.max_new_tokens above 0"
        )
    return [("before", first[1]), *((f"after {name}", texts) for name, texts in others)]


def written_off(run: Path, base: str | None) -> list[Sample]:
    """Return what the base writes from the same prompts with the run's newest commit on it and every gate at 0.

    Raises ValueError where the config names no prompts, or as `load_patched`.
    """
    config = load_config(run / CONFIG_NAME)
    if not config.monitoring.samples.prompts:
        raise ValueError(f"{run / CONFIG_NAME}: expected monitoring.samples.prompts, found none: train with some")
    model, _ = load_patched(run, base)
    set_gate(model, "off")
    of = config.base.model_copy(update={"model": base or config.base.model})
    return Sampler(model, of, config.monitoring.samples, {}).write()


def shown(states: list[tuple[str, list[Sample]]], off: list[Sample]) -> str:
    """Return each prompt with its texts one below the other, the runs of spaces in them made one."""
    before = states[0][1]
    width = max(len(title) for title, _ in states) + 2
    lines: list[str] = []
    for number, sample in enumerate(before):
        lines += ["", f"{' '.join(sample.prompt.split())} …"]
        texts = [(title, texts[number].text) for title, texts in states]
        same = off[number].text == sample.text
        texts.append(("patch off", "(the same as before)" if same else off[number].text))
        for title, text in texts:
            left = f"  {title:<{width}}"
            words = " ".join(text.split()) or "(nothing: the document ends)"
            lines.append(textwrap.fill(words, WIDTH, initial_indent=left, subsequent_indent=" " * len(left)))
    return "\n".join(lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description="What a base wrote before, after each phase, and with the patch off.")
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--base", help="base model; default: the name that the run gives")
    args = parser.parse_args()
    quiet_libraries()
    try:
        states = told_by(args.run)
        before = states[0][1]
        off = written_off(args.run, args.base)
    except (ValueError, OSError) as error:
        sys.exit(f"before_and_after: {error}")
    print(shown(states, off))
    different = sum(one.text != other.text for one, other in zip(off, before, strict=True))
    if different:
        sys.exit(f"With the patch off, {different} of {len(before)} texts are not what the base wrote before.")
    print(f"\nWith the patch off, all {len(before)} texts are what the base wrote before, to the letter.")


if __name__ == "__main__":
    main()
