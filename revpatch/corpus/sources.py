"""What people name as sources, and the documents in it: files, folders and globs of them, `hf:` and `wds:`.

    corpus.jsonl.zst            a file; its ending says how it is read (readers.py)
    corpus, 'corpus/**/*.txt'   all files of a known ending below a folder, or that match, in the order of their names
    hf:NAME[/CONFIG]:SPLIT[#column]     a data set of the hub or of this machine, by way of `datasets`, streamed
    wds:URL                     tars of text; {000..009} is spelled out (raw_tars.py)

A path that is there is taken to the letter, whatever `#`, `[` or `{` is in it. The same sources give the same documents
in the same order. What a folder has that is not read is counted in a warning. No code of a data set is run.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from revpatch.corpus.documents import (
    BadDocument,
    Document,
    Input,
    Reading,
    document_of_row,
    file_identity,
    readable,
)
from revpatch.corpus.raw_tars import tar_inputs
from revpatch.corpus.readers import ENDINGS, counted, file_input, known_ending, last_ending
from revpatch.shards.format import MANIFEST_NAME
from revpatch.shards.remote import is_remote

_PART = r"[^:#\[\]+/]+(?:\[[^\]]*\])?(?:\([a-z0-9_]+\))?"
_SPEC = re.compile(rf"(?P<name>.+):(?P<split>{_PART}(?:\+{_PART})*)(?:#(?P<column>.*))?", re.DOTALL)
_MANY = 2**62  # rows of a split whose length nobody knows


@dataclass(frozen=True)
class HubSpec:
    """The parts of a spec; `candidates` are the (name, config) that it may mean, the likelier first."""

    spec: str
    candidates: tuple[tuple[str, str | None], ...]
    split: str
    column: str | None


def hub_input(spec: str) -> Input:
    """Return the rows of one split. Raises ValueError for a spec that can't be understood."""
    parsed = parse_hub_spec(spec)
    folder = Path(parsed.candidates[0][0])
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    identity = {"spec": spec, "files": [file_identity(file) for file in files]}
    return Input(spec, identity, None, partial(_read, parsed))


def parse_hub_spec(spec: str) -> HubSpec:
    """Take a spec apart; a folder that is there wins over a name of the hub."""
    matched = _SPEC.fullmatch(spec.removeprefix("hf:"))
    if matched is None:
        raise ValueError(
            f"{spec}: expected hf:NAME[/CONFIG]:SPLIT[#column], for example hf:wikitext:train, or train[:10%]"
        )
    name, split, column = matched["name"], matched["split"], matched["column"]
    path, parts = Path(name).expanduser(), name.split("/")
    candidates: tuple[tuple[str, str | None], ...]
    if path.is_dir():
        candidates = ((str(path), None),)
    elif path.is_absolute() or parts[0].startswith((".", "~")) or len(parts) > 3:
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{spec}: no folder {path}; check the path, which is relative to {Path.cwd()}")
        candidates = ((str(path.parent), path.name),)
    elif len(parts) == 3:
        candidates = ((f"{parts[0]}/{parts[1]}", parts[2]),)
    elif len(parts) == 2 and Path(parts[0]).is_dir():
        candidates = ((parts[0], parts[1]),)
    elif len(parts) == 2:
        candidates = ((name, None), (parts[0], parts[1]))
    else:
        candidates = ((name, None),)
    return HubSpec(spec, candidates, split, column or None)


def _read(parsed: HubSpec, reading: Reading) -> Iterator[Document | BadDocument]:
    column = parsed.column or reading.text_column
    rows = iter(_open(parsed, reading.skip))
    number = reading.skip
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # whatever the library, its readers and the network raise
            raise _failed(parsed, error) from error
        if row is None:
            return
        number += 1
        where, name = f"{parsed.spec}, row {number}", f"{parsed.spec}:{number}"
        if column not in row and number == reading.skip + 1:  # all rows have the same columns
            document_of_row(row, where, name, column)
        yield readable(name, partial(document_of_row, row, where, name, column))


def _open(parsed: HubSpec, skip: int) -> Iterator[Any]:
    """Return the rows from `skip` on. Raises ValueError where the split is not to be had, and says why."""
    splits = _open_splits(parsed)
    parts = _slices(parsed, splits)
    if len(parts) > 1:
        return islice(chain.from_iterable(_rows(splits, *part) for part in parts), skip, None)
    ((name, first, last),) = parts
    return iter(_rows(splits, name, first + skip, last))


def _rows(splits: dict[str, Any], name: str, first: int, last: int | None) -> Any:
    rows = splits[name].skip(first) if first else splits[name]
    return rows if last is None else rows.take(max(0, last - first))


def _slices(parsed: HubSpec, splits: dict[str, Any]) -> list[tuple[str, int, int | None]]:
    """Return the parts of the split: name, first row, and the row after the last one, None for the end.

    Raises ValueError for a split that is not there, and a slice that needs the number of rows where nobody knows it.
    """
    from datasets import ReadInstruction

    if parsed.split in splits:
        return [(parsed.split, 0, None)]
    names = re.findall(r"([^+\[(]+)(?:\[[^\]]*\])?(?:\([^)]*\))?(?:\+|$)", parsed.split)
    missing = next((name for name in names if name not in splits), None)
    if missing is not None or not names:
        raise ValueError(
            f"{parsed.spec}: expected one of the splits {', '.join(map(repr, splits))}, found "
            f"{missing or parsed.split!r}; name one of them after the last colon"
        )
    lengths = dict.fromkeys(names, _MANY)
    if re.search(r"\[[^\]]*[%-]", parsed.split):  # counted from the end, or in percent
        lengths = {name: _rows_in(parsed, splits[name], name) for name in lengths}
    try:
        parts = ReadInstruction.from_spec(parsed.split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{parsed.spec}: expected a split such as train, train[:5000] or train[10%:20%], found {parsed.split!r} "
            f"({reason}); write it so"
        ) from None
    return [(p.splitname, p.from_ or 0, None if p.to in (None, lengths[p.splitname]) else p.to) for p in parts]


def _rows_in(parsed: HubSpec, rows: Any, name: str) -> int:
    """Return how many rows a split has: on this machine they are counted, on the hub its card may say it."""
    if Path(parsed.candidates[0][0]).is_dir():
        try:
            return sum(1 for _ in rows)
        except Exception as error:  # whatever the library and its readers raise
            raise _failed(parsed, error) from error
    try:
        return int(rows.info.splits[name].num_examples)
    except (AttributeError, KeyError, TypeError):
        raise ValueError(
            f"{parsed.spec}: expected a slice by rows, found one that needs the number of all rows of {name!r}, which "
            f"the data set does not say; write rows, for example {name}[:5000]"
        ) from None


def _open_splits(parsed: HubSpec) -> dict[str, Any]:
    from datasets import disable_progress_bars, load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    disable_progress_bars()
    folder = Path(parsed.candidates[0][0])
    try:
        if (folder / "dataset_dict.json").is_file():
            return {name: rows.to_iterable_dataset() for name, rows in load_from_disk(str(folder)).items()}
        if (folder / "state.json").is_file():
            saved = load_from_disk(str(folder))
            return {str(saved.split or "train"): saved.to_iterable_dataset()}
        for name, config in parsed.candidates[:-1]:
            try:
                return dict(load_dataset(name, config, streaming=True))
            except DatasetNotFoundError:
                continue
        name, config = parsed.candidates[-1]
        return dict(load_dataset(name, config, streaming=True))
    except Exception as error:  # whatever the library, its readers and the network raise
        raise _failed(parsed, error) from error


def _failed(parsed: HubSpec, error: Exception) -> Exception:
    tried = " or ".join(name + (f", config {config}" if config else "") for name, config in parsed.candidates)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, ConnectionError) or "offline" in reason.lower():
        return ConnectionError(
            f"{parsed.spec}: the hub can't be reached to read {tried} ({reason}); connect this machine and unset "
            "HF_HUB_OFFLINE, or name a folder that holds the data"
        )
    return ValueError(
        f"{parsed.spec}: datasets can't read {tried} ({reason}); check the name and the config, or download it and "
        "name the folder"
    )


_log = logging.getLogger(__name__)
_HIDDEN = "hidden (.NAME, __MACOSX)"
_HOW = {
    **dict.fromkeys((".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst"), "name it wds:{path}"),
    ".zip": "unpack it (unzip {path} -d FOLDER) and name the folder",
    ".7z": "unpack it (7z x {path}) and name what was in it",
    ".arrow": "name its folder: hf:FOLDER:SPLIT",
    ".pdf": "make text of it: pdftotext {path} NAME.txt",
    **dict.fromkeys((".docx", ".odt", ".epub", ".html", ".htm", ".rtf"), "make text of it: pandoc {path} -o NAME.md"),
}
"""What to do with files of endings that are not read."""


def find_inputs(sources: Iterable[str | Path], *, warn: bool = True) -> list[Input]:
    """Return all inputs of the sources, in order.

    Nothing is read yet, but that what is on this machine is there. With `warn` the log counts what folders hold that is
    not read. Raises FileNotFoundError for a missing file and ValueError for an unknown ending, a folder or a glob
    without any file, and a spec that can't be understood.
    """
    return [found for source in sources for found in _inputs_of(str(source), warn)]


def read_documents(sources: Iterable[str | Path], text_column: str = "text") -> Iterator[Document]:
    """Return the documents of all sources, in order.

    All paths are checked before the first document is read. Raises what `find_inputs` does, and ValueError for a
    document that can't be read, such as text that is not UTF-8, broken JSON, or a line whose `text_column` is missing.
    """
    inputs = find_inputs(sources)
    return (document for found in inputs for document in _readable_documents(found, text_column))


def is_raw_source(spec: str) -> bool:
    """Return whether this names text to build shards from, not a folder of shards: `hf:`, `wds:`, files, globs, or a
    folder of them. Raises ValueError for a folder of both."""
    if spec.startswith(("hf:", "wds:")):
        return True
    if is_remote(spec):
        return False
    path = Path(spec)
    if path.is_dir():
        return not (path / MANIFEST_NAME).exists() and _is_folder_of_text(path)
    if path.name == MANIFEST_NAME:
        return False
    return known_ending(path.name) is not None or path.is_file() or glob.has_magic(spec)


def name_of_source(source: str | Path) -> str:
    """Return what a manifest calls a source: its last part, as a folder of this machine says nothing on another.

    A byte of a file's name that is no UTF-8 is written as a backslash and its number.
    """
    spec = str(source)
    for kind in ("hf:", "wds:"):
        body = spec.removeprefix(kind)
        if body != spec:
            plain_hub_name = kind == "hf:" and not body.startswith((".", "/", "~")) and not Path(body).parent.is_dir()
            name = spec if plain_hub_name else kind + body.rpartition("/")[2]
            return name.encode("utf-8", "backslashreplace").decode()
    name = Path(spec).name or Path(spec).resolve().name
    return name.encode("utf-8", "backslashreplace").decode()


def _inputs_of(spec: str, warn: bool) -> list[Input]:
    if spec.startswith("hf:"):
        return [hub_input(spec)]
    if spec.startswith("wds:"):
        return tar_inputs(spec)
    path = Path(spec)
    if path.is_dir():
        return _inputs_in(path, warn)
    if path.exists():
        return [file_input(_with_known_ending(path))]
    if glob.has_magic(spec):
        matches = sorted(Path(name) for name in glob.glob(spec, recursive=True))  # noqa: PTH207  (Path's knows no absolute pattern)
        files = [match for match in matches if match.is_file()]
        if not files:
            raise FileNotFoundError(f"{spec}: no file matches; check the pattern, which is relative to {Path.cwd()}")
        folders = sum(match.is_dir() for match in matches)
        if warn and folders and "**" not in spec:
            _log.warning("%s: %d folders that match are left out; write ** for what is below folders", spec, folders)
        if warn and len(files) + folders < len(matches):
            _log.warning("%s: %d links that lead nowhere are left out", spec, len(matches) - len(files) - folders)
        return [file_input(_with_known_ending(file)) for file in files]
    raise FileNotFoundError(f"{path}: no such file; check the path, which is relative to {Path.cwd()}")


def _inputs_in(folder: Path, warn: bool) -> list[Input]:
    for name in ("dataset_dict.json", "state.json"):
        if (folder / name).is_file() and any((folder.glob("*.arrow"), folder.glob("*/*.arrow"))):
            raise ValueError(f"{folder}: is a data set that save_to_disk wrote; name a split of it: hf:{folder}:train")
    left_out: Counter[str] = Counter()
    files = sorted(_files_below(folder, left_out))
    if not files:
        raise ValueError(
            f"{folder}: expected a folder with files that end in {ENDINGS}, found none of them in it"
            f"{', but ' + counted(left_out) if left_out else ''}; {_hint(left_out) or 'name another folder, or files'}"
        )
    if left_out and warn:
        hint = _hint(left_out)
        _log.warning("%s: files left out, as they are not read: %s%s", folder, counted(left_out), hint and f" ({hint})")
    return [file_input(file) for file in files]


def _hint(left_out: Counter[str]) -> str:
    """Return what to do with the most frequent of the endings for which that is known."""
    ending = next((kind for kind, _ in left_out.most_common() if _how(kind, "FILE")), "")
    return f"of {ending}: {_how(ending, 'FILE')}" if ending else ""


def _how(ending: str, path: str) -> str:
    how = _HOW.get(".tar" if ending.startswith(".tar.") else ending)
    return how.format(path=path) if how else ""


def _with_known_ending(path: Path) -> Path:
    if known_ending(path.name) is None:
        ending = last_ending(path.name)
        how = _how(ending, str(path)) or (
            "where it is plain text, rename it to end in .txt; else write its documents as JSONL, one "
            '{"text": ...} a line'
        )
        raise ValueError(f"{path}: expected a file ending in {ENDINGS}, found {ending!r}; {how}")
    return path


def _is_folder_of_text(folder: Path) -> bool:
    text = next(_files_below(folder, Counter()), None)
    if text is None:
        return False
    sets = sorted(manifest.parent.name for manifest in folder.glob(f"*/{MANIFEST_NAME}"))
    if sets:
        raise ValueError(
            f"{folder}: expected a set of shards or a folder of text, found both: the sets {', '.join(sets[:5])}, and "
            f"{text.relative_to(folder)}; name one of the sets, or move the text into a folder of its own"
        )
    return True


def _files_below(folder: Path, left_out: Counter[str]) -> Iterator[Path]:
    """Yield the files that are read, and count the others.

    As a glob, it leaves hidden files and folders out and follows links; what it has seen it does not enter again. Sets
    of shards are no text, whatever lies in their folders.
    """
    seen = set()
    for parent, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        stat = Path(parent).stat()
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        if MANIFEST_NAME in names and any(name.endswith(".tar") for name in names):
            left_out["folders that are sets of shards"] += 1
            folders.clear()
            continue
        left_out[_HIDDEN] += sum(map(_is_hidden, (*folders, *names)))
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        for name in names:
            path = Path(parent, name)
            if _is_hidden(name):
                continue
            if not path.is_file():
                left_out["links that lead nowhere" if path.is_symlink() else "no regular files"] += 1
            elif known_ending(name) is None:
                left_out[last_ending(name)] += 1
            else:
                yield path
    left_out += Counter()  # without those of which there are none


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _refuse(error: OSError) -> None:
    raise error


def _readable_documents(found: Input, text_column: str) -> Iterator[Document]:
    for document in found.read(Reading(text_column)):
        if isinstance(document, BadDocument):
            raise ValueError(document.reason)
        yield document
