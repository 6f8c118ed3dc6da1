"""Files from anywhere but the local disk: `pipe:` commands, http(s), and what else fsspec opens (s3, gs, memory, ...).

A file is streamed whole, and a failed attempt is made again after a pause, but never for ever: the number of attempts
is bounded, and so is the time that one may pass without a byte. It has no bound on its whole time, as shards are large.
"""

from __future__ import annotations

import io
import logging
import os
import random
import select
import signal
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import fsspec

_log = logging.getLogger(__name__)

CONNECT_SECONDS = 30.0
READ_SECONDS = 60.0
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
RETRIES = 5
"""Attempts at a file after the first one has failed."""
_CHUNK = 2**20
_PIPE = "pipe:"
_PLACE = "{name}"
_TRANSIENT = (408, 425, 429)  # and 500 to 599

Result = TypeVar("Result")


def is_remote(location: str) -> bool:
    """Return whether this is no path: a `pipe:` command, or an URL."""
    return location.startswith(_PIPE) or "://" in location


def url_in(location: str, name: str) -> str:
    """Return the URL of the file `name` in a remote folder.

    Raises ValueError for a `pipe:` without the place of the name, and for an http URL that does not end in a path.
    """
    if location.startswith(_PIPE):
        if _PLACE not in location:
            raise ValueError(
                f"{location}: expected {_PLACE} in the command, found none: it stands for the file's name; "
                f"for example pipe:ssh host cat /data/wikitext/{_PLACE}"
            )
        return location.replace(_PLACE, name)
    if _is_http(location) and ("?" in location or "#" in location):
        raise ValueError(
            f"{location}: expected the URL of a folder, found one with '?' or '#', to which no file name can be added; "
            f"use a command instead: pipe:curl -sfL 'https://host/data/{_PLACE}?key=...'"
        )
    return f"{location.rstrip('/')}/{name}"


def stream(url: str) -> Generator[bytes, None, None]:
    """The content of a remote file, in pieces of at most 1 MiB; one attempt.

    Raises ValueError when the protocol is unknown or needs a package that is not installed, OSError for a command that
    fails or stalls, and whatever fsspec and its implementations raise.
    """
    return _stream_pipe(url.removeprefix(_PIPE)) if url.startswith(_PIPE) else _stream_fsspec(url)


def is_final(error: Exception) -> bool:
    """Return whether trying again is no use: the file is not there, or is not for us."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status not in _TRANSIENT and status < 500
    return isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | ValueError)


def describe(error: Exception) -> str:
    """Return what went wrong, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "nothing (not found, as HTTP 404)"
    if not str(error) and isinstance(error.__cause__, Exception):  # fsspec's time-outs say nothing themselves
        return describe(error.__cause__)
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP {status} {getattr(error, 'message', '')}".rstrip()
    return f"{type(error).__name__}: {error}".rstrip(": ")


def with_retries(
    url: str, attempt: Callable[[], Result], retries: int, final: Callable[[Exception], bool] = is_final
) -> Result:
    """Return what `attempt` returns, made again at most `retries` times. Raises its first final error, or its last
    one."""
    wait = FIRST_WAIT_SECONDS
    for tried in range(1, retries + 1):
        try:
            return attempt()
        except Exception as error:  # each implementation of fsspec raises errors of its own
            if final(error):
                raise
            pause = min(wait, LONGEST_WAIT_SECONDS) * random.uniform(0.75, 1.25)  # ranks should not come all at once
            _log.warning("%s: %s; retry %d of %d in %.1f s", url, describe(error), tried, retries, pause)
            time.sleep(pause)
            wait *= 2
    return attempt()


def write_all(file: io.RawIOBase, data: bytes) -> None:
    """Write all of the data, of which a disk that is nearly full takes a part. Raises OSError where it takes none."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) or 0 :]


def read_all(url: str) -> bytes:
    """Return a small file, whole.

    Raises FileNotFoundError when it is not there, ValueError as `stream` does, and ConnectionError for all else.
    """
    try:
        return with_retries(url, lambda: b"".join(stream(url)), RETRIES)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:
        raise ConnectionError(f"{url}: expected a file, found {describe(error)}; check the URL and the host") from error


def _is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def _stream_fsspec(url: str) -> Generator[bytes, None, None]:
    options: dict[str, Any] = {}
    if _is_http(url):
        # Streamed in one request. The size, which is not used then, saves a HEAD request, whose failures of every kind
        # fsspec takes for "not found".
        options = {"block_size": 0, "size": 1}
    filesystem, path = _filesystem(url)
    with filesystem.open(path, "rb", **options) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _filesystem(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if _is_http(url):
        import aiohttp  # 0.2 s, which those with local shards need not wait for

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        options["client_kwargs"] = {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}
    try:
        filesystem, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or error.name or "the package it names"
        raise ValueError(f"{url}: its protocol needs a package: pip install {package} ({error})") from error
    except ValueError as error:
        raise ValueError(f"{url}: expected a folder, pipe:, http(s):// or a protocol of fsspec: {error}") from error
    return filesystem, path


def _stream_pipe(command: str) -> Generator[bytes, None, None]:
    from webdataset import utils as webdataset_utils  # which imports torch, and takes seconds
    from webdataset.gopen import Pipe

    if webdataset_utils.enforce_security:
        raise ValueError(f"{_PIPE}{command}: commands are forbidden by WDS_SECURE; unset it, or use another location")
    # A session of its own, so that all of a command that stalls can be killed.
    pipe = Pipe(command, mode="rb", shell=True, bufsize=0, start_new_session=True)
    poll = select.poll()
    poll.register(pipe.stream, select.POLLIN)
    try:
        while poll.poll(READ_SECONDS * 1000):
            chunk = pipe.stream.read(_CHUNK)
            if not chunk:
                break
            yield chunk
        else:
            raise TimeoutError(f"the command gave no byte for {READ_SECONDS:g} s")
        status = pipe.proc.wait(READ_SECONDS)
        if status:  # webdataset itself lets a stream pass whose command died of a broken pipe
            raise OSError(f"the command ended with exit code {status}")
    finally:
        if pipe.proc.poll() is None:
            os.killpg(pipe.proc.pid, signal.SIGKILL)
        pipe.stream.close()
        pipe.proc.wait()
