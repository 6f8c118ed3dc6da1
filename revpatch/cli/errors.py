"""What an exception that ends a command says to the person who gave it, and the exit code that goes with it.

A message that this package wrote itself is passed on as it is. Those of libraries and of the system get what they lack:
the file, what to do, or a word that revpatch has not foreseen them.
"""

from __future__ import annotations

import errno
import linecache
import os
import platform
import socket
import sys
import traceback
from itertools import pairwise
from pathlib import Path

EXIT_FAILED, EXIT_REFUSED, EXIT_CTRL_C = 1, 2, 130
_PACKAGE = str(Path(__file__).resolve().parent.parent) + os.sep
_NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "out of memory", "Cannot allocate memory", "ALLOC_FAILED")
"""Of RuntimeErrors by which torch and its libraries say so."""
_OF_PLACES = ("--prompt-file", "--out", "--as-new-run", "--base", "--tokenizer", "--patch", "--patch-ckpt")
"""Options whose value is a file or a folder."""
_REMEDIES = {
    errno.ENOENT: "look at its spelling, and make the folder that it lies in if it is to be written",
    errno.EISDIR: "name a file, or move that folder away",
    errno.ENOTDIR: "a part of that path is a file: name another place",
    errno.EEXIST: "name another, or move it away",
    errno.ELOOP: "its links lead to one another: name the file itself",
    errno.ETXTBSY: "a program that is running uses it: end that, or name another",
    errno.EBUSY: "another program uses it: end that, or name another",
    errno.ETIMEDOUT: "its disk or its server does not answer: look at the system's log",
    errno.EACCES: "give this user the right to it, or name another place",
    errno.EPERM: "give this user the right to it, or name another place",
    errno.EROFS: "its disk is mounted for reading only: name another place",
    errno.ENOSPC: "make room there, and give the same command again",
    errno.EDQUOT: "make room there, and give the same command again",
    errno.EMFILE: "raise the limit of open files: ulimit -n 65536",
    errno.ENFILE: "this machine has too many open files: end other programs",
    errno.ENOMEM: "free memory on this machine: end other programs",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EIO: "its disk or its server fails: look at the system's log",
    errno.ESTALE: "its server has lost it: mount that folder again",
}


def tell(error: BaseException) -> int:
    """Says on standard error why a command ended, with the rank that met it; returns the exit code.

    REVPATCH_TRACEBACK=1 in the environment raises the error instead, to show where it came from.
    """
    if os.environ.get("REVPATCH_TRACEBACK"):
        raise error
    words, code = explain(error)
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f", rank {rank} on {socket.gethostname()}"
    sys.stderr.write(f"revpatch{where}: {words}\n")
    return code


def explain(error: BaseException) -> tuple[str, int]:
    """Return what to say of an error, and the exit code."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C", EXIT_CTRL_C
    if _is_out_of_memory(error):
        return _out_of_memory(error), EXIT_FAILED
    if isinstance(error, RecursionError):
        return (
            "a file that was read holds lists or objects nested too deeply; REVPATCH_TRACEBACK=1 shows which it was",
            EXIT_REFUSED,
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("revpatch"):
        return _missing(error), EXIT_FAILED
    if isinstance(error, OSError):
        return _of_the_system(error), EXIT_FAILED if isinstance(error, ConnectionError) else EXIT_REFUSED
    if isinstance(error, (ValueError, RuntimeError)) and _is_ours(error):
        return str(error), EXIT_REFUSED if isinstance(error, ValueError) else EXIT_FAILED
    if isinstance(error, ValueError):
        return f"{_one_line(error)} ({_unforeseen(error)})", EXIT_REFUSED
    return _internal(error), EXIT_FAILED


def _is_ours(error: BaseException) -> bool:
    """Return whether a `raise` of this package has made the error, and not a library's, or a built-in function."""
    trace = error.__traceback__
    if trace is None:
        return True
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename
    if not str(Path(file).resolve()).startswith(_PACKAGE):
        return False
    line = linecache.getline(file, trace.tb_lineno).strip()
    return not line or line.startswith("raise")


def _of_the_system(error: OSError) -> str:
    if error.errno is None:
        return _one_line(error)
    reason = error.strerror or type(error).__name__
    if error.filename is None:
        return f"{reason} ({_unforeseen(error)})" + _remedy(error, "; ")
    file = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes, os.PathLike)) else str(error.filename)
    return f"{_option_of(file)}{file}: {reason}" + _remedy(error, "; ")


def _option_of(file: str) -> str:
    """Return the option that names a file, a folder above it, or what is written beside it first (`.NAME.unfinished`),
    as it stands before the file's name in a message; empty if none does."""
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    above = (Path(file).absolute(), *Path(file).absolute().parents)
    for option, value in pairwise(words):
        place = Path(value).absolute()
        first = f".{place.name}."
        if option in _OF_PLACES and any(
            each == place or (each.parent == place.parent and each.name.startswith(first)) for each in above
        ):
            return f"{option} "
    return ""


def _remedy(error: OSError, before: str) -> str:
    found = _REMEDIES.get(error.errno or 0, "")
    if isinstance(error.filename, str) and (variable := _cache_of(error.filename)):
        found = f"{found}; {variable} names another folder" if found else f"{variable} names another folder"
    return before + found if found else ""


def _cache_of(file: str) -> str | None:
    """Return the variable that moves a library's cache, if the file lies in one."""
    parts = Path(file).parts
    known = {"huggingface": "HF_HOME", "torch_extensions": "TORCH_EXTENSIONS_DIR", ".triton": "TRITON_CACHE_DIR"}
    return next((variable for name, variable in known.items() if name in parts), None)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _out_of_memory(error: BaseException) -> str:
    on_gpu = "CUDA" in str(error) or "HIP" in str(error)
    found = ". ".join(_one_line(error).split(". ")[:2])[:200].rstrip(".")
    where = "the GPU has no memory left" if on_gpu else "this machine has no memory left"
    said = f" ({found})" if found else ""
    return (
        f"{where}{said}. In training set batch.micro_blocks lower (the batch stays what it is), "
        "base.activation_checkpointing=true, base.dtype=bfloat16 or a smaller base.block_size, or start fewer ranks a "
        "machine; elsewhere end what else uses it, or take a smaller base. The same command resumes a training"
    )


def _missing(error: ImportError) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f"the package {package} is needed for this, and is not installed: pip install {package}"
    package = (error.name or "a package").partition(".")[0]
    return f"{package} is installed, and can't be imported: {_one_line(error)}; install it again in this environment"


def _unforeseen(error: BaseException) -> str:
    return f"{type(error).__name__}, not foreseen here; REVPATCH_TRACEBACK=1 shows where it came from"


def _internal(error: BaseException) -> str:
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
    torch = getattr(sys.modules.get("torch"), "__version__", "not loaded")
    return (
        f"internal error, which is a fault of revpatch and no mistake of yours: {type(error).__name__}: "
        f"{_one_line(error)[:200]}. Please report it with the command, its config and all that follows (python "
        f"{platform.python_version()}, torch {torch})\n{trace}"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
