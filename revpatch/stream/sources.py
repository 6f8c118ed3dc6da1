"""What people name as sources, and the documents in it: files, folders and globs of them, `hf:` and `wds:`.

    corpus.jsonl.zst            a file; its ending says how it is read (files.py)
    corpus, 'corpus/**/*.txt'   all files of a known ending below a folder, or that match, in the order of their names
    hf:NAME[/CONFIG]:SPLIT[#column]     a data set of the hub, or on this machine (hub.py)
    wds:URL                     tars of text; {000..009} is spelled out (raw_tars.py)

A path that is there is taken to the letter, whatever `#`, `[` or `{` is in it. Sources are read in the order given,
so that the same sources give the same documents. What a folder has that is not read is counted in a warning.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from revpatch.stream.documents import BadDocument, Document, Input, Reading
from revpatch.stream.files import ENDINGS, counted, file_input, known_ending, last_ending
from revpatch.stream.hub import hub_input
from revpatch.stream.manifest import MANIFEST_NAME
from revpatch.stream.raw_tars import tar_inputs
from revpatch.stream.remote import is_remote

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
