"""Where the base of a run's patches lies. Entries say what it is called, and a name can be a folder's or a hub's.

A journal's `base_at` says which of the two it was, and where the folder was then:

    {"model": "shards/demo_base", "folder": "/home/me/project/shards/demo_base"}     folder: null is a hub's name

So a run can be named from any folder, and what was a folder is never asked of a hub, where it may be a stranger's name.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from revpatch.ledger.events import BasePlace, EntryWritten, RunBegun, RunResumed
from revpatch.ledger.history import PatchFile, run_of

CONFIG_NAME = "config.yaml"


def place_now(model: str) -> BasePlace:
    """Return what a journal is to say of a base that is being used under this name."""
    return BasePlace(model=model, folder=str(Path(model).absolute()) if Path(model).is_dir() else None)


def folder_noted(patch: PatchFile, model: str) -> BasePlace | None:
    """Return the base's folder as the journal last noted it, whether it is still there or not; of a file without a
    journal, the folder of that name here. None if there is none, or it is a hub's name."""
    place = place_now(model) if patch.ledger is None else _noted(patch, model)
    return None if place is None or place.folder is None else place


def base_place(patch: PatchFile, model: str) -> str:
    """Return what the base of a patch that is called `model` is to be loaded from.

    That is the folder that the journal notes; if it is not there, the folder of that name beside the run as it was
    beside it in training, or here; and the name itself, if nothing says that it was a folder.

    Raises:
        FileNotFoundError: it was a folder, and is in none of these places.
    """
    if Path(model).is_absolute():
        return model
    noted = None if patch.ledger is None else _noted(patch, model)
    folder = None if noted is None else noted.folder
    beside = _project_of(patch)
    places = [Path(folder)] if folder is not None else []
    places += [] if beside is None else [beside / model]
    places.append(Path(model))
    found = next((place for place in places if place.is_dir()), None)
    if found is not None:
        return str(found)
    if folder is None:
        return model
    looked = ", ".join(dict.fromkeys(str(place.absolute()) for place in places))
    raise FileNotFoundError(
        f"base {model}: it was a folder when {patch.path} was made, and is not there any more (looked for {looked}); "
        "the hub was not asked: name the folder with --base (base=)"
    )


def _noted(patch: PatchFile, model: str) -> BasePlace | None:
    """Return the newest note of a base of that name."""
    assert patch.ledger is not None
    for event in reversed(patch.ledger.journal.events(RunBegun, RunResumed, EntryWritten)):
        assert isinstance(event, RunBegun | RunResumed | EntryWritten)
        place = event.base_at
        if place is not None and place.model == model:
            return place
    return None


def _project_of(patch: PatchFile) -> Path | None:
    """Return the folder that paths in the run's config begin at, found by where the run lies and what its config calls
    that place: /here/runs/x whose `output_dir` is runs/x was trained in /here."""
    if patch.ledger is None:
        return None
    run = run_of(patch.ledger.directory).resolve()
    try:
        said = yaml.safe_load((run / CONFIG_NAME).read_text(encoding="utf-8"))["output_dir"]
        own = Path(os.path.normpath(said))
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    count = len(own.parts)
    if own.is_absolute() or ".." in own.parts or run.parts[-count:] != own.parts:
        return None
    return Path(*run.parts[:-count])
