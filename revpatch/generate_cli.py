"""`revpatch generate`: text with a patch on, off or as learned; streamed, side by side, or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from revpatch.monitoring.terminal import console

if TYPE_CHECKING:
    from revpatch.generate import Writer

COMPARED = ("off", "learned")


def generate(
    patch: Annotated[
        str, typer.Option("--patch", "--patch-ckpt", help="A file, a run (its newest commit), RUN@ENTRY or a folder.")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to go on from; may be given several times.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file with a prompt a line.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model; default: the name that the patch was trained with.")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help="learned (default), on (all gates 1) or off (the base alone).")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Off and learned, side by side.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, when all is written.")] = False,
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token each time.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to write; default 80, or what the model has room for.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampling.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Mass of the nucleus.")] = 0.9,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the likeliest tokens alone; 0 is all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(min=1.0, help="1 is none.")] = 1.15,
    no_repeat_ngram: Annotated[int, typer.Option(min=0, help="No n-gram of this size twice; 0 allows it.")] = 4,
    num_samples: Annotated[int, typer.Option(min=1, help="Texts for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling, anew for each prompt.")] = 0,
) -> None:
    """Write text with a patch on, off, or as its gates have learned; a single text is shown as it is written."""
    if prompt is None and prompt_file is None:
        raise typer.BadParameter("give --prompt or --prompt-file", param_hint="--prompt")
    if compare and gate is not None:
        raise ValueError(f"--compare shows the gate off and learned: leave out --gate {gate}")
    prompts = [*(prompt or []), *(_lines(prompt_file) if prompt_file else [])]
    from revpatch.generate import Sampling, Writer

    sampling = Sampling(
        *(greedy, max_new_tokens, temperature, top_p, top_k, repetition_penalty, no_repeat_ngram, num_samples, seed)
    )
    writer = Writer.load(patch, sampling, base)
    for text in prompts:
        writer.check(text)
    gates = COMPARED if compare else (gate or "learned",)
    if as_json:
        _print_json(writer, patch, prompts, gates)
    elif compare:
        _print_compared(writer, prompts)
    else:
        _print_texts(writer, prompts, gates[0])


def _lines(file: Path) -> list[str]:
    """The prompts of a file; ValueError if there are none."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt-file {file} is no UTF-8 text ({error}): give a text file, a prompt a line"
        ) from error
    if not lines:
        raise ValueError(f"--prompt-file {file} is empty: give a text file, a prompt a line")
    return lines


def _print_texts(writer: Writer, prompts: list[str], gate: str) -> None:
    """A single text is all that is printed; several have a line before each that says which it is."""
    samples = writer.sampling.num_samples
    for number, prompt in enumerate(prompts, 1):
        heads = [f"[prompt {number} of {len(prompts)}, sample {i} of {samples}]" for i in range(1, samples + 1)]
        several = len(prompts) * samples > 1
        if samples == 1:
            from transformers import TextStreamer

            if several:
                typer.echo(heads[0])
            writer.write(prompt, gate, TextStreamer(writer.tokenizer, skip_special_tokens=True))
            continue
        for head, text in zip(heads, writer.write(prompt, gate), strict=True):
            typer.echo(head)
            typer.echo(text)  # as it is: a console would expand tabs and :names:


def _print_json(writer: Writer, patch: str, prompts: list[str], gates: tuple[str, ...]) -> None:
    texts = [
        {"prompt": prompt, "gate": gate, "sample": sample, "text": text}
        for prompt in prompts
        for gate in gates
        for sample, text in enumerate(writer.write(prompt, gate), 1)
    ]
    typer.echo(json.dumps({"patch": patch, "seed": writer.sampling.seed, "texts": texts}, ensure_ascii=False, indent=1))


def _print_compared(writer: Writer, prompts: list[str]) -> None:
    """A table with a row for each sample; the prompt dim, what is written in the colour of its column."""
    colours = {"off": "yellow", "learned": "green"}
    for prompt in prompts:
        table = Table(
            *(Column(gate, header_style=f"bold {colours[gate]}", ratio=1) for gate in COMPARED), show_lines=True
        )
        table.expand = True
        columns = [[_coloured(prompt, text, colours[gate]) for text in writer.write(prompt, gate)] for gate in COMPARED]
        for off, learned in zip(*columns, strict=True):
            table.add_row(off, learned)
        console.print(table, soft_wrap=False)


def _coloured(prompt: str, text: str, colour: str) -> Text:
    begins = text.startswith(prompt)  # not if the tokenizer doesn't give a text back to the letter
    shown = Text(prompt if begins else "", style="dim")
    return shown.append(text[len(prompt) :] if begins else text, style=colour)
