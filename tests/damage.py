"""What can happen to a shard, as tests do it to one: bytes flipped, zeroed, cut, swapped; the file gone or another.

webdataset itself takes most of these for the end of the tar. The shards have blocks of 16 tokens of two bytes each, and
are damaged at their fourth member.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from revpatch.shards.format import HEADER_BYTES, stride_of

STRIDE = stride_of(32)
AT = 3 * STRIDE


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def zero(data: bytes, at: int, count: int) -> bytes:
    return data[:at] + bytes(count) + data[at + count :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit in a block": lambda data: flip(data, AT + HEADER_BYTES + 5),
    "a flipped bit in the padding": lambda data: flip(data, AT + HEADER_BYTES + 100),
    "a flipped bit in the tar's end": lambda data: flip(data, 10 * STRIDE + 7),
    "a zeroed header": lambda data: zero(data, AT, HEADER_BYTES),
    "zeroed": lambda data: bytes(len(data)),
    "cut inside a member": lambda data: data[: AT + HEADER_BYTES + 5],
    "cut on a member boundary": lambda data: data[:AT],
    "cut inside a header": lambda data: data[: AT + 100],
    "emptied": lambda data: b"",
    "longer": lambda data: data + bytes(512),
    "two members swapped": (
        lambda data: data[:AT] + data[AT + STRIDE : AT + 2 * STRIDE] + data[AT : AT + STRIDE] + data[AT + 2 * STRIDE :]
    ),
}


def damage(path: Path, how: str) -> None:
    """Does to a shard what DAMAGES has under this name; or it is "missing"; or "swapped", for the third of its set."""
    if how == "missing":
        path.unlink()
    elif how == "swapped":
        path.write_bytes(path.with_name("shard-000002.tar").read_bytes())
    else:
        path.write_bytes(DAMAGES[how](path.read_bytes()))
