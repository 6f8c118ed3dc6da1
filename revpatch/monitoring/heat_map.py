"""A number a layer over the steps of a run, as a picture: layers from top to bottom, steps from left to right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_COLUMNS = 256
_ANCHORS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)
_WIDTH, _HEIGHT, TITLE_HEIGHT = 384, 192, 28


def colours(shares: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Viridis at shares in [0, 1], any shape (...): (..., 3) uint8, dark to light; what is not finite is grey."""
    finite = np.isfinite(shares)
    at = np.clip(np.where(finite, shares, 0.0), 0.0, 1.0) * (len(_ANCHORS) - 1)
    channels = [np.interp(at, np.arange(len(_ANCHORS)), _ANCHORS[:, c]) for c in range(3)]
    picture = np.stack(channels, axis=-1).round().astype(np.uint8)
    picture[~finite] = 128
    return picture


def ink_on(red: int, green: int, blue: int) -> str:
    """Black or white, whichever is read on a colour of 0 to 255 a channel."""
    return "#000000" if red * 0.3 + green * 0.6 + blue * 0.1 > 120 else "#ffffff"


class HeatMap:
    """Collects columns; neighbours are averaged when there are more than `MAX_COLUMNS`, so its memory is bounded."""

    def __init__(self) -> None:
        self._columns: list[NDArray[np.float64]] = []
        self._steps: list[int] = []
        self._stride = 1
        self._waiting: list[NDArray[np.float64]] = []

    def add(self, step: int, values: Sequence[float]) -> None:
        """The number of each layer at a step; always as many layers."""
        self._waiting.append(np.asarray(values, dtype=np.float64))
        if len(self._waiting) < self._stride:
            return
        self._columns.append(np.mean(self._waiting, axis=0))
        self._steps.append(step)
        self._waiting = []
        if len(self._columns) > MAX_COLUMNS:
            pairs = zip(self._columns[::2], self._columns[1::2], strict=False)
            odd = self._columns[len(self._columns) // 2 * 2 :]
            self._columns = [(a + b) / 2 for a, b in pairs]
            self._steps = self._steps[1::2]
            self._stride *= 2
            self._waiting = odd

    def grid(self) -> NDArray[np.float64]:
        """(layers, columns) float64."""
        return np.stack(self._columns, axis=1) if self._columns else np.empty((0, 0))

    def picture(self, name: str) -> NDArray[np.uint8] | None:
        """(height, width, 3) uint8, with a title that says what the colours mean; None if nothing was added."""
        from PIL import Image, ImageDraw

        grid = self.grid()
        if not grid.size:
            return None
        finite = grid[np.isfinite(grid)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        cells = colours((grid - low) / max(high - low, 1e-12))
        height, width = (max(1, whole // count) for whole, count in zip((_HEIGHT, _WIDTH), grid.shape, strict=True))
        body = cells.repeat(height, axis=0).repeat(width, axis=1)
        whole = Image.new("RGB", (max(body.shape[1], _WIDTH), body.shape[0] + TITLE_HEIGHT), "white")
        whole.paste(Image.fromarray(body), (0, TITLE_HEIGHT))
        title = f"{name}: {low:.3g} (dark) to {high:.3g} (light)\nlayers downwards, steps {self._steps[0]} to "
        ImageDraw.Draw(whole).text((2, 0), f"{title}{self._steps[-1]}", fill="black")
        return np.asarray(whole)
