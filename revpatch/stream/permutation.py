"""Integer hashes and permutations that are the same on every platform and in every version of numpy.

numpy's generators promise equal bits but not equal shuffles between versions, and a shuffle needs a list. What a run
has trained on must be told from (seed, step) alone for as long as the run is kept, so the arithmetic is written out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

UInt64s = np.ndarray[Any, np.dtype[np.uint64]]
_ROUNDS = 16  # with 12, ranges of 3 to 7 are seen to be permuted unevenly
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(x: Any) -> UInt64s:
    """splitmix64's finaliser: a bijection of 64-bit integers in which every input bit moves every output bit."""
    x = np.asarray(x, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: UInt64s = x ^ (x >> np.uint64(31))
    return result


def hash64(*words: Any) -> UInt64s:
    """Hash integers, or arrays of them that broadcast, into uint64. Any integers: taken modulo 2^64.

    A bijection in the last word, given the others: block ids under one seed never collide.
    """
    state: UInt64s = np.zeros((), dtype=np.uint64)
    for word in words:
        word = np.uint64(word % 2**64) if isinstance(word, int) else np.asarray(word).astype(np.uint64)
        with np.errstate(over="ignore"):
            state = mix64((state + GOLDEN) ^ word)
    return state


def permute(index: np.ndarray[Any, Any], size: np.ndarray[Any, Any], key: UInt64s) -> np.ndarray[Any, Any]:
    """Where a keyed permutation of range(size) sends each index, elementwise: (n,) -> (n,) int64.

    A Feistel network on the next power of two above `size`, walked until it lands below `size`. The power is less
    than 2 × size, so that takes 2 rounds on average; time and memory do not depend on `size`.
    """
    assert np.all((index >= 0) & (index < size)), "an index lies outside of its range"
    result = index.astype(np.uint64)
    size = np.broadcast_to(size, index.shape).astype(np.uint64)
    key = np.broadcast_to(key, index.shape)
    assert index.ndim == 1
    todo = np.arange(len(result))
    while len(todo):
        result[todo] = _feistel(result[todo], size[todo], key[todo])
        todo = todo[result[todo] >= size[todo]]
    return result.astype(np.int64)


def _feistel(x: UInt64s, size: UInt64s, key: UInt64s) -> UInt64s:
    # frexp is exact below 2^53: the exponent of size - 1 is its number of bits.
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1].astype(np.uint64)
    low_bits = bits // np.uint64(2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (bits - low_bits)) - np.uint64(1)
    low, high = x & low_mask, x >> low_bits
    for i in range(_ROUNDS):
        with np.errstate(over="ignore"):
            key = key + GOLDEN
        if i % 2:
            low = low ^ (mix64(key ^ high) & low_mask)
        else:
            high = high ^ (mix64(key ^ low) & high_mask)
    result: UInt64s = (high << low_bits) | low
    return result
