"""`revpatch shards build | verify | show`: any corpus to token shards, and a look into them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn

from revpatch.monitoring.terminal import console

if TYPE_CHECKING:
    from revpatch.stream.build import Progress as BuildProgress

app = typer.Typer(help="Build token shards, and look into them.", no_args_is_help=True)
SECONDS_BETWEEN_LINES = 30.0

FolderArgument = Annotated[Path, typer.Argument(help="Folder of the shards.")]


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@app.command()
def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files (.txt, .jsonl, also .gz and .zst; .parquet), folders or globs of them, "
            "hf:NAME:SPLIT or hf:NAME/CONFIG:SPLIT#column, wds:URL of tars of .txt or .json members."
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="Hugging Face name or local folder of the tokenizer.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    block_size: Annotated[int, typer.Option(min=2, help="Tokens a block.")] = 1024,
    text_column: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    holdout: Annotated[
        float, typer.Option(help="Fraction of the documents that goes to OUT_probe, by a hash of their text.")
    ] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard, in MiB.")] = 64,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that tokenise; default: the CPUs there are. 1: none but this.")
    ] = None,
    licence: Annotated[str | None, typer.Option(help="Rights in the text, kept in the manifest.")] = None,
    note: Annotated[str | None, typer.Option(help="What the text is, kept in the manifest.")] = None,
) -> None:
    """Turn documents into webdataset tars of token blocks with a manifest. The same command goes on after a kill."""
    from revpatch.stream.build import build_shards

    loaded = _load_tokenizer(tokenizer)
    try:
        with _shown() as show:
            manifest = build_shards(
                sources,
                loaded,
                block_size,
                out,
                text_column=text_column,
                licence=licence,
                note=note,
                holdout=holdout,
                max_tokens=max_tokens,
                shard_bytes=shard_mb * 2**20,
                workers=workers or _cores(),
                progress=show,
            )
    except KeyboardInterrupt:
        _say(f"{out}: stopped; run the same command again to go on from where it was a few seconds ago")
        raise typer.Exit(130) from None
    _say(
        f"{out}: {manifest.blocks:,} blocks of {manifest.block_size} tokens from {manifest.documents:,} documents in "
        f"{len(manifest.shards)} shards"
    )


@app.command()
def verify(folder: FolderArgument) -> None:
    """Read and hash every shard; names those that are broken and ends with exit code 1 if there are any."""
    from revpatch.stream.inspection import verify_shards
    from revpatch.stream.manifest import Manifest

    total = sum(shard.bytes for shard in Manifest.read(folder).shards)
    with Progress(BarColumn(), TextColumn("{task.percentage:.0f} % read"), console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        reports = list(verify_shards(folder, lambda count: bar.advance(task, count)))
    broken = [report for report in reports if report.faults]
    for report in broken:
        _say(f"{report.path}: {'; '.join(report.faults)}")
    if broken:
        _say(
            f"{len(broken)} of {len(reports)} shards are broken; copy these files again from where they came, or build "
            "the shards again into a new folder"
        )
        raise typer.Exit(1)
    _say(f"{folder}: all {len(reports)} shards are what the manifest says, {total:,} bytes")


@app.command()
def show(
    folder: FolderArgument,
    tokenizer: Annotated[
        str | None, typer.Option(help="Hugging Face name or local folder; default: the name in the manifest.")
    ] = None,
    blocks: Annotated[int, typer.Option(min=0, help="How many blocks to decode.")] = 3,
) -> None:
    """Say what is in a folder of shards, and decode a few blocks of it."""
    from revpatch.stream.inspection import sample_blocks
    from revpatch.stream.manifest import Manifest, tokenizer_fingerprint

    manifest = Manifest.read(folder)
    lengths = f"{manifest.blocks:,} blocks of {manifest.block_size} tokens ({manifest.dtype})"
    _say(f"{folder}: split {manifest.split}, {lengths} in {len(manifest.shards)} shards")
    facts = {
        "documents": f"{manifest.documents:,}, and {manifest.empty_documents:,} empty ones",
        "tokens": f"{manifest.tokens:,}, of which {manifest.dropped_tokens:,} fill no block",
        "bytes": f"{sum(shard.bytes for shard in manifest.shards):,}",
        "tokenizer": f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids",
        "sources": ", ".join(manifest.sources),
        "text column": manifest.text_column,
        "holdout": manifest.holdout,
        "max tokens": manifest.max_tokens,
        "licence": manifest.licence,
        "note": manifest.note,
        "digest": manifest.digest,
    }
    for name, value in facts.items():
        if value is not None:
            _say(f"  {name:12} {value}")
    if not blocks:
        return
    loaded = _load_tokenizer(tokenizer or manifest.tokenizer.name)
    if tokenizer_fingerprint(loaded) != manifest.tokenizer.fingerprint:
        raise ValueError(
            f"{folder}: built with tokenizer {manifest.tokenizer.name!r} of fingerprint "
            f"{manifest.tokenizer.fingerprint}, and {tokenizer or manifest.tokenizer.name!r} has another "
            f"({tokenizer_fingerprint(loaded)}); name the right one with --tokenizer"
        )
    for block, tokens in zip(*sample_blocks(folder, blocks), strict=True):
        _say(f"--- block {block} ---\n{loaded.decode(tokens.tolist())}")


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--tokenizer {name}: {str(error).splitlines()[0]}") from error


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False)


class _Speed:
    """Tokens a second since the first progress that was seen, so that what an earlier call did does not count."""

    def __init__(self) -> None:
        self._first: tuple[float, int, int] | None = None

    def describe(self, progress: BuildProgress) -> str:
        """One line: what is done, how fast, and how long it will take."""
        now = time.monotonic()
        first = self._first = self._first or (now, progress.tokens, progress.bytes_read)
        seconds = max(now - first[0], 1e-9)
        speed = (progress.tokens - first[1]) / seconds
        text = f"{progress.documents:,} documents, {progress.tokens:,} tokens, {speed:,.0f} tokens/s"
        if progress.bytes_in_all:
            text += f", {progress.bytes_read / 2**20:,.0f} of {progress.bytes_in_all / 2**20:,.0f} MiB"
            bytes_a_second = (progress.bytes_read - first[2]) / seconds
            if bytes_a_second:
                left = int((progress.bytes_in_all - progress.bytes_read) / bytes_a_second)
                text += f", {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        return text


@contextmanager
def _shown() -> Iterator[Any]:
    """Gives what `build_shards` calls with its progress: a bar on a terminal, else a line now and then."""
    speed = _Speed()
    if not console.is_terminal:
        last = time.monotonic()

        def line(progress: BuildProgress) -> None:
            nonlocal last
            text = speed.describe(progress)
            if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                _say(text)

        yield line
        return
    with Progress(BarColumn(), TextColumn("{task.description}"), console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def update(progress: BuildProgress) -> None:
            bar.update(
                task, description=speed.describe(progress), total=progress.bytes_in_all, completed=progress.bytes_read
            )

        yield update
