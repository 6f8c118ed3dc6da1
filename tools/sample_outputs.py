"""What each phase of a run changed, to be read: fixed prompts over every commit, as a Markdown page.

    python tools/sample_outputs.py RUN [--out FILE] [--base NAME] [--prompt TEXT ...] [--max-new-tokens 60] [--sampled]

Texts are greedy, so that two commits differ by what they learned alone; --sampled draws them, with one seed for all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from progress import Progress

from revpatch.generate import Sampling, Writer
from revpatch.ledger.ledger import Ledger, read_patch
from revpatch.patch.patched_model import load_tensors
from revpatch.patches import load_patched
from revpatch.terminal import quiet_libraries

PROMPTS = (
    "The most important thing about",
    "My fellow citizens,",
    "hacker: n.",
    "Once upon a time there was",
    "In the beginning the network",
    "She opened the door and",
)


def page(run: Path, prompts: list[str], sampling: Sampling, base: str | None = None) -> str:
    """The page's text.

    Raises:
        ValueError: the run has no commit, or what `load_patched` and `Writer` raise.
    """
    commits = [entry for entry in Ledger(run / "ledger", readonly=True).entries() if entry.kind == "commit"]
    if not commits:
        raise ValueError(f"{run} has no commit yet: there is nothing to read")
    model, tokenizer = load_patched(f"{run}@{commits[0].name}", base)
    writer = Writer(model, tokenizer, sampling)
    progress = Progress("sample_outputs.py", ["texts"] * (1 + len(commits)))
    with progress.step("texts"):
        texts = {"the base, without a patch": {prompt: next(writer.write(prompt, "off")) for prompt in prompts}}
    for entry in commits:
        load_tensors(model, read_patch(f"{run}@{entry.name}").tensors)
        with progress.step("texts"):
            texts[Path(entry.name).stem] = {prompt: next(writer.write(prompt)) for prompt in prompts}
    how = "greedy" if sampling.greedy else f"sampled with seed {sampling.seed}, temperature {sampling.temperature}"
    lines = [f"# What {run.name} writes", "", f"{len(commits)} commits, {len(prompts)} prompts, {how}.", ""]
    for prompt in prompts:
        lines += [f"## {_inline(prompt)}", ""]
        for name, written in texts.items():
            lines += [f"**{name}**", "", *_quoted(written[prompt]), ""]
    return "\n".join(lines)


def _inline(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\`*_[]<>#" else c for c in " ".join(text.split()))


def _quoted(text: str) -> list[str]:
    """Indented by four, which Markdown shows to the letter."""
    return [f"    {line}" for line in text.splitlines() or [""]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, help="file to write; default: standard output")
    parser.add_argument("--base", help="base model; default: the name that the run gives")
    parser.add_argument("--prompt", action="append", help="instead of the fixed ones; may be given several times")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--sampled", action="store_true")
    args: Any = parser.parse_args()
    quiet_libraries()
    sampling = Sampling(greedy=not args.sampled, max_new_tokens=args.max_new_tokens)
    try:
        text = page(args.run, args.prompt or list(PROMPTS), sampling, args.base)
    except (ValueError, OSError) as error:
        sys.exit(f"sample_outputs: {error}")
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
