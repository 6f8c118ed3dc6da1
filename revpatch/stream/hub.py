"""`hf:NAME[/CONFIG]:SPLIT[#column]`: documents out of a data set, by way of `datasets`, streamed.

NAME is a folder on this machine (of data files, or written by `save_to_disk`), or a data set of the hub. No code of
a data set is run. Rows come whole from the library, so a value must fit the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from revpatch.stream.documents import (
    BadDocument,
    Document,
    Input,
    Reading,
    check_text,
    file_identity,
    missing_column,
)


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
    name, colon, rest = spec.removeprefix("hf:").rpartition(":")
    split, _, column = rest.partition("#")
    if not colon or not name or not split:
        raise ValueError(f"{spec}: expected hf:NAME[/CONFIG]:SPLIT[#column], for example hf:wikitext:train")
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
    rows = iter(_open(parsed).skip(reading.skip))
    number = reading.skip
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # whatever the library, its readers and the network raise
            raise _failed(parsed, error) from error
        if row is None:
            return
        number += 1
        where = f"{parsed.spec}, row {number}"
        if column not in row:
            raise missing_column(where, column, list(row))
        yield Document(f"{parsed.spec}:{number}", check_text(row[column], where, column))


def _open(parsed: HubSpec) -> Any:
    """The split as an IterableDataset. Raises ValueError where it is not to be had, and says why."""
    splits = _open_splits(parsed)
    if parsed.split not in splits:
        raise ValueError(
            f"{parsed.spec}: expected one of the splits {', '.join(map(repr, splits))}, found {parsed.split!r}; "
            "name one of them after the last colon"
        )
    return splits[parsed.split]


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
