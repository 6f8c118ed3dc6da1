"""`revpatch shards build | verify | show`: any corpus to token shards, and a look into them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn

from revpatch.distributed import cores
from revpatch.terminal import console, doing, say

if TYPE_CHECKING:
    from revpatch.shards.format import Manifest


app = typer.Typer(help="Build token shards, and look into them.", no_args_is_help=True)

FolderArgument = Annotated[Path, typer.Argument(help="Folder of the shards.")]


class OnBad(str, Enum):
    """What becomes of a build at a document that can't be read."""

    stop = "stop"
    skip = "skip"


@app.command()
def build(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Files (.txt, .md, .jsonl, .ndjson, .json, .csv, .tsv, also .gz, .bz2, .xz, .zst; .parquet), folders "
            "or globs of them, hf:NAME:SPLIT or hf:NAME/CONFIG:SPLIT#column, wds:URL of tars of such files."
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="Hugging Face name or local folder of the tokenizer.")],
    out: Annotated[Path, typer.Option(help="Folder to write: new or empty, or this very build's.")],
    block_size: Annotated[int, typer.Option(min=2, help="Tokens a block.")] = 1024,
    text_column: Annotated[str, typer.Option(help="Field or column that holds the text.")] = "text",
    holdout: Annotated[
        float,
        typer.Option(
            help="Fraction of the documents that goes to OUT_probe, by a hash of their text; of the only document, its "
            "end does."
        ),
    ] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    on_bad: Annotated[
        OnBad, typer.Option(help="A document that can't be read: stop there, or skip it and count it in the manifest.")
    ] = OnBad.stop,
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a shard, in MiB.")] = 64,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that tokenise; default: the CPUs it may use. 1: none but this."),
    ] = None,
    max_lost: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Fraction of the characters that the tokenizer may fail to spell.")
    ] = 0.01,
    licence: Annotated[str | None, typer.Option(help="Rights in the text, kept in the manifest.")] = None,
    note: Annotated[str | None, typer.Option(help="What the text is, kept in the manifest.")] = None,
) -> None:
    """Turn documents into webdataset tars of token blocks with a manifest. The same command resumes after a kill."""
    from revpatch.corpus.build import build_shards
    from revpatch.corpus.progress import shown_progress

    loaded = _load_tokenizer(tokenizer)
    try:
        with shown_progress() as show:
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
                workers=workers or cores(),
                on_bad=on_bad.value,
                max_lost=max_lost,
                progress=show,
            )
    except KeyboardInterrupt:
        say(f"{out}: stopped; run the same command again to resume from where it was a few seconds ago")
        raise typer.Exit(130) from None
    say(
        f"{out}: {manifest.blocks:,} blocks of {manifest.block_size} tokens from {manifest.documents:,} documents in "
        f"{len(manifest.shards)} shards"
    )
    if manifest.holdout_rule == "tail":
        say(f"the text is one document: the last {manifest.holdout:g} of it is in {out}_probe")
    _say_what_was_left_out(manifest)


@app.command()
def verify(folder: FolderArgument) -> None:
    """Read and hash every shard; names those that are broken and ends with exit code 1 if there are any."""
    from revpatch.shards.format import Manifest
    from revpatch.shards.shard_set import verify_shards

    total = sum(shard.bytes for shard in Manifest.read(folder).shards)
    with (
        Progress(
            BarColumn(),
            TextColumn("{task.percentage:.0f} % read"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ) as bar,
        doing(f"reading {folder}", enabled=not console.is_terminal) as far,
    ):
        task = bar.add_task("", total=total)

        def advance(count: int) -> None:
            bar.advance(task, count)
            far(int(bar.tasks[task].completed) >> 20, total >> 20, "MiB")

        reports = list(verify_shards(folder, advance))
    broken = [report for report in reports if report.faults]
    for report in broken:
        say(f"{report.path}: {'; '.join(report.faults)}")
    if broken:
        say(
            f"{len(broken)} of {len(reports)} shards are broken; copy these files again from where they came, or build "
            "the shards again into a new folder"
        )
        raise typer.Exit(1)
    say(f"{folder}: all {len(reports)} shards are what the manifest says, {total:,} bytes")


@app.command()
def show(
    folder: FolderArgument,
    tokenizer: Annotated[
        str | None, typer.Option(help="Hugging Face name or local folder; default: the name in the manifest.")
    ] = None,
    blocks: Annotated[int, typer.Option(min=0, help="How many blocks to decode.")] = 3,
) -> None:
    """Say what is in a folder of shards, and decode a few blocks of it."""
    from revpatch.corpus.tokenizer import tokenizer_fingerprint
    from revpatch.shards.format import Manifest
    from revpatch.shards.shard_set import sample_blocks

    manifest = Manifest.read(folder)
    lengths = f"{manifest.blocks:,} blocks of {manifest.block_size} tokens ({manifest.dtype})"
    say(f"{folder}: split {manifest.split}, {lengths} in {len(manifest.shards)} shards")
    facts = {
        "documents": f"{manifest.documents:,}, and {manifest.empty_documents:,} empty ones",
        "tokens": f"{manifest.tokens:,}, of which {manifest.dropped_tokens:,} fill no block",
        "bytes": f"{sum(shard.bytes for shard in manifest.shards):,}",
        "tokenizer": f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids",
        "sources": ", ".join(manifest.sources),
        "text column": manifest.text_column,
        "holdout": f"{manifest.holdout}{', the end of the only document' * (manifest.holdout_rule == 'tail')}",
        "max tokens": manifest.max_tokens,
        "licence": manifest.licence,
        "note": manifest.note,
        "lost": _lost_of(manifest),
        "special": manifest.special_tokens or None,
        "digest": manifest.digest,
    }
    for name, value in facts.items():
        if value is not None:
            say(f"  {name:12} {value}")
    _say_what_was_left_out(manifest)
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
        say(f"--- block {block} ---\n{loaded.decode(tokens.tolist())}")


def _say_what_was_left_out(manifest: Manifest) -> None:
    if not manifest.bad_documents:
        return
    say(f"{manifest.bad_documents:,} documents could not be read and were left out:")
    for reason in manifest.bad:
        say(f"  {reason}")
    if manifest.bad_documents > len(manifest.bad):
        say(f"  and {manifest.bad_documents - len(manifest.bad):,} more")


def _lost_of(manifest: Manifest) -> str | None:
    lost, characters = manifest.lost_characters, manifest.characters
    return f"{lost:,} of {characters:,} characters, which the tokenizer can't spell" if lost else None


def _load_tokenizer(name: str) -> Any:
    from revpatch.corpus.tokenizer import load_tokenizer

    try:
        return load_tokenizer(name)
    except ValueError as error:
        raise ValueError(f"--tokenizer {error}") from error
