"""Whoever dies or is interrupted, whenever: one line that says so, at once, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Job, catches_signals, end_unfinished, stat
from tests.patience import LATE_S

pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture(autouse=True)
def _tidy() -> Iterator[None]:
    yield
    end_unfinished()


INTERRUPTED = "crossdock: interrupted   [exit 130]"
WORKERS = ["-w", "cpu:1,accel:1"]


def decoding(model: Path, *more: object) -> list[object]:
    """Arguments of a run that generates text for minutes."""
    return ["run", "-m", model, *WORKERS, "-p", "hello", "--raw", "-n", 30000, "-c", 32768, "-q", *more]


def has_workers(job: Job) -> bool:
    return len(job.workers()) == 2


def is_loading(job: Job) -> bool:
    """The workers have said hello: their sockets are there."""
    return has_workers(job) and len(list(Path(job.tmp).glob("*/*.sock"))) >= 3


def is_decoding(job: Job) -> bool:
    return len(job.stdout()) > 20


STAGES: dict[str, Callable[[Job], bool]] = {
    "reading": catches_signals, "starting": has_workers, "loading": is_loading, "decoding": is_decoding,
}  # fmt: skip


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "stage", [pytest.param("starting", marks=SLOW), pytest.param("loading", marks=SLOW), "decoding"]
)
def test_killed_worker(stage: str, long_model: Path) -> None:
    job = Job(decoding(long_model))
    assert job.wait_until(lambda: STAGES[stage](job)), job.stderr()
    os.kill(job.workers()["accel0"], signal.SIGKILL)
    line = job.finish().check(6, "accel0 was killed by SIGKILL", "out of memory?")
    if stage == "decoding":
        assert " the language graph" in line


@SLOW
def test_killed_worker_while_encoding(model: Path, image: Path) -> None:
    """Many evaluations of the vision graph, so that there is time to hit one."""
    job = Job(["run", "-m", model, *WORKERS, *["-i", image] * 40, "-n", 1, "-q", "--ubatch", 8])
    try:
        job.wait_until(lambda: is_loading(job))
        worker = job.workers()["cpu0"]
        busy = ticks(worker)
        job.wait_until(lambda: ticks(worker) > busy + 2)
        os.kill(worker, signal.SIGKILL)
    finally:
        result = job.finish()
    result.check(6, "cpu0 was killed by SIGKILL")


def ticks(pid: int) -> int:
    """Hundredths of a second of processor time."""
    fields = stat(pid)
    return int(fields[11]) + int(fields[12]) if fields else 0


@SLOW
def test_stopped_worker(long_model: Path) -> None:
    job = Job(decoding(long_model, "--stall-timeout", 4))
    assert job.wait_until(lambda: is_decoding(job)), job.stderr()
    began = time.monotonic()
    os.kill(job.workers()["accel0"], signal.SIGSTOP)
    result = job.finish()
    line = result.check(6, "no worker made progress for 4 s during the language graph", "accel0 (stopped)")
    assert "--stall-timeout" in line
    assert 4 < time.monotonic() - began < LATE_S


@SLOW
def test_stopped_worker_dies_with_its_coordinator(long_model: Path) -> None:
    job = Job(decoding(long_model))
    assert job.wait_until(lambda: is_decoding(job))
    stopped = list(job.workers().values())
    for worker in stopped:
        os.kill(worker, signal.SIGSTOP)
    assert job.wait_until(lambda: all(is_stopped(worker) for worker in stopped))
    os.kill(job.pid, signal.SIGKILL)
    assert job.finish().leftovers == []


def is_stopped(pid: int) -> bool:
    """A signal takes a moment to stop a process with several threads, and until the last of them has stopped the system
    does not care whether its parent dies."""
    threads = [stat(int(thread.name)) for thread in Path(f"/proc/{pid}/task").iterdir()]
    return all(not thread or thread[0] == "T" for thread in threads)


@SLOW
def test_last_words(model: Path, tmp_path: Path) -> None:
    """A worker whose kernels print something and give up."""
    import workers

    patch = f"""
__path__ = [{str(Path(workers.__file__).parent)!r}]
import os, sys
import workers.run as module
def dying(self, program, step, inputs):
    if self.index == 1:
        self.board.show(self.index, step, 3, 7)
        print("the tea is cold")
        print("I \\033[31mresign", flush=True)
        os._exit(3)
    return kept(self, program, step, inputs)
kept, module.Runner.run = module.Runner.run, dying
"""
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").write_text(patch)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    job = Job(["run", "-m", model, "-p", "hello", "-n", 1, "-q"], env={"PYTHONPATH": path})
    job.finish().check(6, "accel1 ended with status 3 in split 7 of the language graph; its last words: I [31mresign")


@pytest.mark.parametrize(
    "stage", ["reading", pytest.param("starting", marks=SLOW), pytest.param("loading", marks=SLOW), "decoding"]
)
def test_killed_coordinator(stage: str, long_model: Path) -> None:
    job = Job(decoding(long_model))
    assert job.wait_until(lambda: STAGES[stage](job)), job.stderr()
    os.kill(job.pid, signal.SIGKILL)
    result = job.finish()
    assert result.leftovers == []
    assert result.stderr == ""


FAST = {("key", "reading"), ("key", "decoding")}


@pytest.mark.parametrize(
    ("how", "stage"),
    [
        pytest.param(how, stage, marks=() if (how, stage) in FAST else SLOW)
        for how in ("key", "SIGINT", "SIGTERM")
        for stage in STAGES
    ],
)
def test_interrupt(how: str, stage: str, long_model: Path) -> None:
    """`key`: as the terminal does it, to every process of the foreground group."""
    job = Job(decoding(long_model))
    assert job.wait_until(lambda: STAGES[stage](job)), job.stderr()
    if how == "key":
        os.killpg(job.pid, signal.SIGINT)
    else:
        os.kill(job.pid, signal.Signals[how])
    result = job.finish()
    assert result.stderr.splitlines() == [INTERRUPTED]
    assert result.status == 130
    assert result.leftovers == []


@SLOW
def test_impatient_interrupts(long_model: Path) -> None:
    job = Job(decoding(long_model))
    job.wait_until(lambda: is_decoding(job))
    for _ in range(2):
        os.kill(job.pid, signal.SIGINT)
        time.sleep(0.002)
    result = job.finish()
    assert (result.status, result.stderr.splitlines(), result.leftovers) == (130, [INTERRUPTED], [])


MOMENTS = int(os.environ.get("FAULT_MOMENTS", "8"))
"""Moments per signal; a long run takes 100."""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_any_moment(number: signal.Signals, model: Path, image: Path) -> None:
    """Moments spread evenly over a whole life, from the first handler to the last line."""
    arguments = ["run", "-m", model, *WORKERS, "-i", image, "-n", 20, "-q"]
    job = Job(arguments)
    job.wait_until(lambda: catches_signals(job))
    began = time.monotonic()
    assert job.finish().status == 0
    life = time.monotonic() - began
    may_stay = "/crossdock-run-" if number == signal.SIGKILL else ""  # nobody is left to remove it: the next run does
    for k in range(MOMENTS):
        moment = life * (k + number / 16) / MOMENTS  # each signal at moments of its own
        job = Job(arguments)
        job.wait_until(lambda: catches_signals(job))  # noqa: B023
        time.sleep(moment)
        os.killpg(job.pid, number)
        result = job.finish(may_stay=may_stay)
        where = f"{number.name} after {moment:.3f} of {life:.3f} s: {result}"
        assert result.leftovers == [], where
        if number == signal.SIGKILL:
            assert (result.status, result.stderr) in ((0, ""), (-9, "")), where
            continue
        if result.status == 0:  # it was faster this time
            continue
        assert (result.status, result.stderr.splitlines()) == (130, [INTERRUPTED]), where


@SLOW
def test_reader_leaves_early(long_model: Path) -> None:
    read, write = os.pipe()
    job = Job(decoding(long_model), stdout=write)
    os.close(write)
    with subprocess.Popen(["head", "-c", "1"], stdin=read, stdout=subprocess.PIPE) as head:
        os.close(read)
        assert head.communicate()[0]
    result = job.finish()
    assert (result.status, result.stderr, result.leftovers) == (0, "", [])
