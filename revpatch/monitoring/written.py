"""What an earlier process wrote into TensorBoard's event files, for a run that goes on from before its last step."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType


def without_tensorflow() -> None:
    """Comes before anything of tensorboard is imported. It imports TensorFlow where there is one: seconds of start-up,
    and its greetings in the terminal. This module's presence is tensorboard's own switch for going without."""
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))


def tags_from(directory: Path, step: int, prefix: str) -> list[str]:
    """The tags with this prefix that have a point at `step` or later in the event files of `directory`, not of the
    folders in it; a file whose end is torn is read up to there."""
    without_tensorflow()
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    found = set()
    for file in sorted(directory.glob("events.out.tfevents.*")):
        for record in RawEventFileLoader(str(file)).Load():
            if prefix.encode() not in record:  # most aren't, and parsing is what takes time
                continue
            event = Event.FromString(record)
            if event.step >= step:
                found |= {value.tag for value in event.summary.value if value.tag.startswith(prefix)}
    return sorted(found)
