"""`revpatch generate`: text with a patch on, off or as learned; streamed, side by side, or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table
from rich.text import Text

from revpatch.cli.options import BaseOption, JsonOption, print_json
from revpatch.terminal import console, doing, reader_has_gone

if TYPE_CHECKING:
    from revpatch.generate import Writer


COMPARED = ("off", "learned")


def generate(
    patch: Annotated[
        str, typer.Option("--patch", "--patch-ckpt", help="A file, a run (its newest commit), RUN@ENTRY or a folder.")
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue; may be given several times.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file with a prompt a line.")] = None,
    base: BaseOption = None,
    gate: Annotated[
        str | None, typer.Option(help="learned (default), on (all gates 1) or off (the base alone).")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Off and learned, side by side.")] = False,
    as_json: JsonOption = False,
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token each time.")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens to write; default 80, or what the model has room for.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0.01, help="Of the sampling; default 0.8.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.01, max=1.0, help="Mass of the nucleus; default 0.9.")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, help="Draw from the likeliest tokens alone; 0 (default) is all.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(min=1.0, help="1 is none.")] = 1.15,
    no_repeat_ngram: Annotated[int, typer.Option(min=0, help="No n-gram of this size twice; 0 allows it.")] = 4,
    num_samples: Annotated[int, typer.Option(min=1, help="Texts for each prompt.")] = 1,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Of the sampling, anew for each prompt; default 0.")
    ] = None,
) -> None:
    """Write text with a patch on, off, or as its gates have learned; shown as it is written."""
    if prompt is None and prompt_file is None:
        raise typer.BadParameter("give --prompt or --prompt-file", param_hint="--prompt")
    if compare and gate is not None:
        raise ValueError(f"--compare shows the gate off and learned: leave out --gate {gate}")
    drawing = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    given: dict[str, Any] = {name: value for name, value in drawing.items() if value is not None}
    if greedy and given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"--greedy draws nothing, so {options} would change nothing: leave out one or the other")
    places = [*((text, "--prompt") for text in prompt or []), *(_lines(prompt_file) if prompt_file else [])]
    prompts = [text for text, _ in places]
    from revpatch.generate import Sampling, Writer

    always: dict[str, Any] = {"repetition_penalty": repetition_penalty, "no_repeat_ngram": no_repeat_ngram}
    sampling = Sampling(greedy, max_new_tokens, num_samples=num_samples, **always, **given)
    with doing("loading the base and the patch"):
        writer = Writer.load(patch, sampling, base)
    for text, where in places:
        writer.check(text, where)
    gates = COMPARED if compare else (gate or "learned",)
    if as_json:
        print_json({"patch": patch, "seed": sampling.seed, "texts": _texts(writer, prompts, gates)})
    elif compare:
        _print_compared(writer, prompts)
    else:
        _print_texts(writer, prompts, gates[0])


def _lines(file: Path) -> list[tuple[str, str]]:
    """Return the prompts of a file, and what a message calls each; ValueError if there are none."""
    from revpatch.corpus.documents import decoded

    text = decoded(file.read_bytes(), f"--prompt-file {file}").replace("\r\n", "\n").replace("\r", "\n")
    # At line feeds alone: splitlines also cuts at U+2028 and its like, which are part of a text.
    lines = [(line, f"--prompt-file {file}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"--prompt-file {file} is empty: give a text file, a prompt a line")
    return lines


def _print_texts(writer: Writer, prompts: list[str], gate: str) -> None:
    """A single text is all that is printed; several have a line before each that says which it is."""
    from transformers import TextStreamer

    samples = writer.sampling.num_samples
    for number, prompt in enumerate(prompts, 1):
        streamer = TextStreamer(writer.tokenizer, skip_special_tokens=True)
        texts = writer.write(prompt, gate, streamer)
        for sample in range(1, samples + 1):
            if reader_has_gone():
                return
            if len(prompts) * samples > 1:
                typer.echo(f"[prompt {number} of {len(prompts)}, sample {sample} of {samples}]")
            next(texts)


def _texts(writer: Writer, prompts: list[str], gates: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "gate": gate, "sample": sample, "text": text}
        for prompt in prompts
        for gate in gates
        for sample, text in enumerate(writer.write(prompt, gate), 1)
    ]


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
