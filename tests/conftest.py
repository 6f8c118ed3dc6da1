"""Fixtures for all tests: no hub, one thread, and one small world a session."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("REVPATCH_SAY_AFTER", "3600")  # a busy machine is slow, and shows no more for it

from collections.abc import Iterator

import pytest
import torch
from browser import Browser, install_browser
from command import Call, caller
from hypothesis import settings
from ranks import RunServer
from toy import Toy, build_toy

# A busy machine is no failure: nothing here is timed by the clock.
settings.register_profile("revpatch", deadline=None)
settings.load_profile("revpatch")
# What is started in the background of a script ignores these, and so would every run that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none. A file's tests stay in one of the worker processes, as they share
    what is costly to make; so do all those of one trained run (cli), and those that set up the machine itself (launch:
    network namespaces, sshd, Slurm)."""
    if not torch.cuda.is_available():
        needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in needs_gpu]
        config.hook.pytest_deselected(items=needs_gpu)
    for item in items:
        file = item.path.relative_to(HERE)
        item.add_marker(pytest.mark.xdist_group(file.parts[0] if file.parts[0] in ("cli", "launch") else str(file)))
    items.sort(key=lambda item: item.path.name != "test_demo.py")  # the longest first, or one process waits for it


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say that tests were left out: a run without a GPU shows nothing about one."""
    if not torch.cuda.is_available():
        terminalreporter.write_line("no NVIDIA GPU here: tests marked gpu are left out")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Without their groups each process would make all that is costly, the demo's run too."""
    if getattr(session.config.option, "loadgroup", False):  # in a process that pytest-xdist started with it
        lost = [item.nodeid for item in session.items if "@" not in item.nodeid.rpartition("::")[2]]
        assert not lost, f"pytest-xdist does not see the groups of {lost[:3]}; see pytest's bound in pyproject.toml"


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """Each test begins with a log that no run before it, in this process, has sent to its console and file."""
    log = logging.getLogger("revpatch")
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = True
    log.setLevel(logging.NOTSET)
    yield


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The base, the tokenizer and the shards of tests/toy.py; read only."""
    return build_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium; installed first where there is none, and a failure where that can't be done."""
    install_browser()
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def server() -> Iterator[RunServer]:
    """Forks ranks of the command line."""
    server = RunServer()
    yield server
    server.close()


@pytest.fixture
def revpatch(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """revpatch(*arguments): the command line, in this process."""
    return caller(monkeypatch, capfd)
