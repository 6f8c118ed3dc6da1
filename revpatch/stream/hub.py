"""`hf:NAME[/CONFIG]:SPLIT[#column]`: documents out of a data set, by way of `datasets`, streamed.

NAME is a folder on this machine (of data files, or written by `save_to_disk`), or a data set of the hub. SPLIT may be
sliced and added to, as `datasets` writes it: train[:5000], train[10%:20%]+test. No code of a data set is run. Rows come
whole from the library, so a value must fit the memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from revpatch.stream.documents import (
    BadDocument,
    Document,
    Input,
    Reading,
    document_of_row,
    file_identity,
    readable,
)

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
    """The rows of one split. Raises ValueError for a spec that can't be understood."""
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
