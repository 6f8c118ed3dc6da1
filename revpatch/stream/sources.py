"""What people name as sources, and the documents in it: files, folders and globs of them, `hf:` and `wds:`.

    corpus.jsonl.zst            a file; its ending says how it is read (files.py)
    corpus, 'corpus/**/*.txt'   all files of a known ending below a folder, or that match, in the order of their names
    hf:NAME[/CONFIG]:SPLIT[#column]     a data set of the hub, or on this machine (hub.py)
    wds:URL                     tars of .txt and .json members; {000..009} is spelled out (raw_tars.py)

A path that is there is taken to the letter, whatever `#`, `[` or `{` is in it. Sources are read in the order given,
so that the same sources give the same documents.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from revpatch.stream.documents import BadDocument, Document, Input, Reading
from revpatch.stream.files import READERS, file_input, known_ending
from revpatch.stream.hub import hub_input
from revpatch.stream.manifest import MANIFEST_NAME
from revpatch.stream.raw_tars import tar_inputs
from revpatch.stream.remote import is_remote


def find_inputs(sources: Iterable[str | Path]) -> list[Input]:
    """All inputs of the sources, in order. Nothing is read yet, but that what is on this machine is there.

    Raises FileNotFoundError for a missing file and ValueError for an unknown ending, a folder or a glob without
    any file, and a spec that can't be understood.
    """
    return [found for source in sources for found in _inputs_of(str(source))]


def read_documents(sources: Iterable[str | Path], text_column: str = "text") -> Iterator[Document]:
    """The documents of all sources, in order.

    All paths are checked before the first document is read. Raises what `find_inputs` does, and ValueError for text
    that is not UTF-8, broken JSON, or a line whose `text_column` is missing or no text.
    """
    inputs = find_inputs(sources)
    return (document for found in inputs for document in _readable_documents(found, text_column))


def is_raw_source(spec: str) -> bool:
    """Whether this names text to build shards from, not a folder of shards: `hf:`, `wds:`, files, globs, or a folder of
    them. Raises ValueError for a folder of both."""
    if spec.startswith(("hf:", "wds:")):
        return True
    if is_remote(spec):
        return False
    path = Path(spec)
    if path.is_dir():
        return not (path / MANIFEST_NAME).exists() and _is_folder_of_text(path)
    return known_ending(path.name) is not None or glob.has_magic(spec)


def name_of_source(source: str | Path) -> str:
    """What a manifest calls a source: its last part, as a folder of this machine says nothing on another."""
    spec = str(source)
    for kind in ("hf:", "wds:"):
        body = spec.removeprefix(kind)
        if body != spec:
            plain_hub_name = kind == "hf:" and not body.startswith((".", "/", "~")) and not Path(body).parent.is_dir()
            return spec if plain_hub_name else kind + body.rpartition("/")[2]
    return Path(spec).name or Path(spec).resolve().name


def _inputs_of(spec: str) -> list[Input]:
    if spec.startswith("hf:"):
        return [hub_input(spec)]
    if spec.startswith("wds:"):
        return tar_inputs(spec)
    path = Path(spec)
    if path.is_dir():
        files = sorted(_files_below(path))
        if not files:
            raise ValueError(
                f"{path}: expected a folder with files that end in {', '.join(READERS)}, found none of them in it; "
                "name another folder, or the files themselves"
            )
        return [file_input(file) for file in files]
    if path.exists():
        return [file_input(_with_known_ending(path))]
    if glob.has_magic(spec):
        matches = sorted(Path(name) for name in glob.glob(spec, recursive=True))  # noqa: PTH207  (Path's knows no absolute pattern)
        files = [match for match in matches if match.is_file()]
        if not files:
            raise FileNotFoundError(f"{spec}: no file matches; check the pattern, which is relative to {Path.cwd()}")
        return [file_input(_with_known_ending(file)) for file in files]
    raise FileNotFoundError(f"{path}: no such file; check the path, which is relative to {Path.cwd()}")


def _with_known_ending(path: Path) -> Path:
    if known_ending(path.name) is None:
        raise ValueError(
            f"{path}: expected a file ending in {', '.join(READERS)}, found {path.suffix or 'no ending'!r}; "
            'rename it, or write its documents as JSONL, one {"text": ...} a line'
        )
    return path


def _is_folder_of_text(folder: Path) -> bool:
    text = next(_files_below(folder), None)
    if text is None:
        return False
    sets = sorted(manifest.parent.name for manifest in folder.glob(f"*/{MANIFEST_NAME}"))
    if sets:
        raise ValueError(
            f"{folder}: expected a set of shards or a folder of text, found both: the sets {', '.join(sets[:5])}, and "
            f"{text.relative_to(folder)}; name one of the sets, or move the text into a folder of its own"
        )
    return True


def _files_below(folder: Path) -> Iterator[Path]:
    """As a glob, it leaves hidden files and folders out and follows links; what it has seen it does not enter again."""
    seen = set()
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        stat = Path(parent).stat()
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            path = Path(parent, name)
            if not name.startswith(".") and known_ending(name) is not None and path.is_file():
                yield path


def _refuse(error: OSError) -> None:
    raise error


def _readable_documents(found: Input, text_column: str) -> Iterator[Document]:
    for document in found.read(Reading(text_column)):
        if isinstance(document, BadDocument):
            raise ValueError(document.reason)
        yield document
