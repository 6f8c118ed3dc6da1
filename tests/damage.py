"""What can happen to a shard, as tests do it to one: bytes flipped, zeroed, cut, swapped; the file gone or another.

webdataset itself takes most of these for the end of the tar. The shards have blocks of 16 tokens of two bytes each, and
are damaged at their fourth member.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from revpatch.stream.tars import HEADER_BYTES, stride_of

STRIDE = stride_of(32)
AT = 3 * STRIDE


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def zero(data: bytes, at: int, count: int) -> bytes:
    return data[:at] + bytes(count) + data[at + count :]


@dataclass(frozen=True)
class Damage:
    """What becomes of a shard's bytes, and the offset that is named: of the damaged member, or of the first wrong byte
    behind the last one."""

    change: Callable[[bytes], bytes]
    offset: int = AT


DAMAGES = {
    "a flipped bit in a block": Damage(lambda data: flip(data, AT + HEADER_BYTES + 5)),
    "a flipped bit in a name": Damage(lambda data: flip(data, AT + 3)),
    "a flipped bit in a checksum": Damage(lambda data: flip(data, AT + 150)),
    "a flipped bit in the padding": Damage(lambda data: flip(data, AT + HEADER_BYTES + 100)),
    "a flipped bit of no meaning in a header": Damage(lambda data: flip(data, AT + 110)),
    "flipped bits in two blocks": Damage(lambda data: flip(flip(data, AT + HEADER_BYTES + 5), AT + 2 * STRIDE + 5)),
    "a zeroed member": Damage(lambda data: zero(data, AT, STRIDE)),
    "a zeroed header": Damage(lambda data: zero(data, AT, HEADER_BYTES)),
    "zeroed data": Damage(lambda data: zero(data, AT + HEADER_BYTES, STRIDE - HEADER_BYTES)),
    "zeroed": Damage(lambda data: bytes(len(data)), 0),
    "cut inside a member": Damage(lambda data: data[: AT + HEADER_BYTES + 5]),
    "cut on a member boundary": Damage(lambda data: data[:AT]),
    "cut inside a header": Damage(lambda data: data[: AT + 100]),
    "emptied": Damage(lambda data: b"", 0),
    "two members swapped": Damage(
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
        path.write_bytes(DAMAGES[how].change(path.read_bytes()))
