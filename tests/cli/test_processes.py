"""What only the real command shows: signals before it has begun, too few open files, expressions that never end."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from tests.faults.harness import COMMAND, Job, Result, catches_signals, end_unfinished, run, stat
from tests.patience import LATE_S

INTERRUPTED = ["crossdock: interrupted   [exit 130]"]
TEXT = ["run", "-p", "hello", "-n", 2, "-q"]


@pytest.fixture(autouse=True)
def _tidy() -> Iterator[None]:
    yield
    end_unfinished()


# ---- signals

SIGNALLED = """
import os, sys
left = [{number}] * {times}
def hook(event, arguments):
    while event == "import" and arguments[0] == {module!r} and left:
        os.kill(os.getpid(), left.pop())
sys.addaudithook(hook)
from coordinator.cli import main
main()
"""
EARLY = (
    "contextlib",
    "re",
    "coordinator.runtime",
    "coordinator.runtime.signals",
    "signal",
    "typing",
    "protocol.errors",
)


@pytest.mark.parametrize(
    ("module", "times"), [*((module, times) for module in EARLY for times in (1, 2)), ("numpy", 2), ("zmq", 1)]
)
def test_interrupt_while_modules_are_imported(module: str, times: int) -> None:
    program = SIGNALLED.format(number=int(signal.SIGINT), times=times, module=module)
    result = run(TEXT, command=[sys.executable, "-c", program])
    assert (result.stderr.splitlines(), result.status, result.leftovers) == (INTERRUPTED, 130, [])


MOMENTS = 20


@pytest.mark.slow
def test_two_signals_at_any_early_moment() -> None:
    """From the very first millisecond: what comes before our first line is Python's to tell, or nobody's."""
    first = Job(["run", "-p", "hello", "-n", 1000, "-q"])
    began = time.monotonic()
    assert first.wait_until(lambda: catches_signals(first))
    early_s = time.monotonic() - began
    end_unfinished()
    ours = 0
    for moment in range(MOMENTS):
        number = (signal.SIGINT, signal.SIGTERM)[moment % 2]
        job = Job(["run", "-p", "hello", "-n", 1000, "-q"])
        time.sleep(4 * early_s * moment / MOMENTS)
        for _ in range(2):
            os.kill(job.pid, number)
            time.sleep(0.002)
        result = job.finish()
        where = f"{number.name} after {4000 * early_s * moment / MOMENTS:.0f} ms: {result}"
        assert result.leftovers == [], where
        assert "/coordinator/" not in result.stderr, where
        if "Traceback" not in result.stderr and result.status != -number:
            assert (result.stderr.splitlines(), result.status) == (INTERRUPTED, 130), where
            ours += 1
    assert ours


ENDLESS = r"([\w.]+)+!"


def test_interrupt_of_an_expression_that_never_ends() -> None:
    """`re` looks for signals while it matches."""
    job = Job(["run", "-p", "hello", "--dump-tensor", ENDLESS])
    assert job.wait_until(lambda: seconds(job) > 1.5)
    began = time.monotonic()
    os.kill(job.pid, signal.SIGINT)
    result = job.finish()
    assert (result.stderr.splitlines()[-1:], result.status, result.leftovers) == (INTERRUPTED, 130, [])
    assert time.monotonic() - began < LATE_S


def seconds(job: Job) -> float:
    """Of processor time: what comes before the matching takes less."""
    fields = stat(job.pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


# ---- open files


def limited(n: int, *more: object, which: str = "") -> Result:
    return run([*TEXT, *more], command=["sh", "-c", f'ulimit -{which}n {n}; exec "$0" "$@"', COMMAND])


def test_too_few_open_files() -> None:
    limited(8).check(5, "3 workers need up to", "open files: 8 are allowed here", "ulimit -n")


def test_as_many_open_files_as_are_said_to_be_needed() -> None:
    """With the plane that takes most of them."""
    more = ["-w", "cpu:1,accel:3", "--transport", "tcp"]
    needed = re.search(r"need up to (\d+) open files: 20 .* \(ulimit -n (\d+)\)", limited(20, *more).check(5))
    assert needed is not None
    assert needed[1] == needed[2]
    result = limited(int(needed[1]), *more)
    assert (result.status, result.stderr, result.leftovers) == (0, "", [])


def test_a_soft_limit_is_raised() -> None:
    result = limited(20, which="S")
    assert (result.status, result.stderr, result.leftovers) == (0, "", [])
