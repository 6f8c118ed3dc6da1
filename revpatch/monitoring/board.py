"""TensorBoard: the run's numbers as charts, its rollbacks and commits as text.

    objective/...                          whatever `scalars` is given, by tag
    probe/NAME/loss, reference, limit      a held-out loss, what it is compared with, and that plus its tolerance
    probe/NAME/rise                        loss minus reference
    gate/layer_00, scale/layer_00, ...     one chart a layer
    event/...                              text

Only the rank that writes has an enabled board; the others hold one that does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_SECONDS = 10


class Board:
    """Writes event files into `directory` (created with its parents) if `enabled`, else nothing at all.

    `purge_step`: after a resume, the first step that will be written again; TensorBoard then hides what an earlier
    process wrote from there on. Raises ImportError if tensorboard is not installed, OSError if the folder can't be
    made. Numbers are floats or what `float()` takes (one synchronisation each, for a tensor on a GPU); NaN is kept.
    """

    def __init__(self, directory: Path, enabled: bool = True, purge_step: int | None = None) -> None:
        self._writer = _open_writer(directory, purge_step) if enabled else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point on the chart of each tag."""
        if self._writer is not None:
            for tag, value in values.items():
                self._writer.add_scalar(tag, float(value), step)

    def probe(self, step: int, name: str, loss: float, reference: float, tolerance: float) -> None:
        """A probe's loss against its reference, in nats per token, and the limit that its tolerance sets."""
        values = {"loss": loss, "reference": reference, "limit": reference + tolerance, "rise": loss - reference}
        self.scalars(step, {f"probe/{name}/{key}": value for key, value in values.items()})

    def layers(self, step: int, values: Mapping[str, Mapping[int, float]]) -> None:
        """For each key ("gate", "scale", "patch_norm") a number by layer: `gate/layer_00`, ..."""
        for key, numbers in values.items():
            self.scalars(step, {f"{key}/layer_{layer:02d}": number for layer, number in numbers.items()})

    def text(self, step: int, tag: str, markdown: str) -> None:
        """A note, such as why the patch was rolled back."""
        if self._writer is not None:
            self._writer.add_text(tag, markdown, step)

    def close(self) -> None:
        """Writes what is still in memory, and closes the file; closing twice is fine."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_writer(directory: Path, purge_step: int | None) -> SummaryWriter:
    # tensorboard imports TensorFlow where there is one: seconds of start-up, and its greetings in the terminal. This
    # module's presence is tensorboard's own switch for going without.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    from torch.utils.tensorboard import SummaryWriter

    directory.mkdir(parents=True, exist_ok=True)
    return SummaryWriter(str(directory), purge_step=purge_step, flush_secs=_FLUSH_SECONDS)
