"""Signals, without a run around them: what ends the process, when, and with which code."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

PROCESS = """
import signal, sys, time
if sys.argv[1] == "nohup":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from revpatch.distributed.signals import EXIT_CODE, Interruption
interruption = Interruption()
interruption.training = sys.argv[1] != "starting"
print("ready", flush=True)
deadline = time.monotonic() + 20
while not interruption() and time.monotonic() < deadline:
    time.sleep(0.01)
interruption.settled = sys.argv[1] == "settled"
print("told", flush=True)
sys.stdin.readline()  # the step in progress
sys.exit(EXIT_CODE)
"""
PAUSE = 0.4
"""After a signal and the tenth of a second after it: half a second between two."""


@pytest.mark.parametrize(
    ("state", "sent", "code"),
    [
        ("starting", [signal.SIGTERM], 75),
        ("training", [signal.SIGINT, signal.SIGTERM], 75),  # a launcher that the terminal signals as well
        ("training", [signal.SIGINT, PAUSE, signal.SIGINT], 130),
        ("training", [signal.SIGHUP, PAUSE, signal.SIGHUP], 75),  # of the terminal, and of the shell
        ("nohup", [signal.SIGHUP, PAUSE, signal.SIGTERM], 75),
        ("settled", [signal.SIGTERM, PAUSE, signal.SIGTERM, PAUSE, signal.SIGINT], 75),
        ("training", [signal.SIGUSR1, PAUSE, signal.SIGTERM], 75),
        ("training", [signal.SIGTERM, PAUSE, signal.SIGTERM], 143),
    ],
    ids=str,
)
def test_a_first_sigterm_lets_the_step_end_and_a_second_does_not(
    state: str, sent: list[signal.Signals | float], code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROCESS, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for each in sent:
        if isinstance(each, signal.Signals):
            process.send_signal(each)
            time.sleep(0.1)
        else:
            time.sleep(each)
    process.communicate("go on\n" if process.poll() is None else None, timeout=20)
    assert process.returncode == code
