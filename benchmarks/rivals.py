"""Two ways to evaluate tokens with a model file: crossdock's workers, and llama.cpp with or without RPC servers."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.config import parse_workers
from coordinator.model.gguf_file import open_model
from coordinator.model.params import read_params
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.session import Session, SessionOptions
from coordinator.schedule.placement import PlacementOptions
from protocol.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
_START_S = 180.0


def tokens(n: int, n_vocab: int, seed: int = 0) -> list[int]:
    """Random token ids: what is evaluated does not change how long it takes."""
    draw = random.Random(seed)
    return [draw.randrange(n_vocab) for _ in range(n)]


def cpu_s(pids: Sequence[int]) -> float:
    """Processor time of all threads of these processes so far, in seconds."""
    tasks = (task for pid in pids for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


class Ours:
    """A session of crossdock on workers of its own."""

    def __init__(self, model: Path, workers: str, threads: int, n_gpu_layers: int | None, n_ctx: int) -> None:
        file = open_model(model)
        params, topology = read_params(file), parse_workers(workers, threads)
        options = SessionOptions(PlacementOptions(n_gpu_layers), n_ctx=n_ctx)
        self._stack = ExitStack()
        self.fleet = self._stack.enter_context(Fleet(topology, FleetOptions()))
        self.fleet.start()
        self.session = Session(file, params, topology, options)
        self.fleet.handshake()
        self.session.open(self.fleet)
        self.n_vocab = params.text.n_vocab
        self.pids = [os.getpid(), *(process.pid for process in self.fleet.processes)]
        self.last: NDArray[np.float32] = np.empty(0, np.float32)

    def __enter__(self) -> Ours:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, tb)

    def restart(self) -> None:
        """Forget all tokens."""
        self.session.restart()

    def evaluate(self, batches: Sequence[Sequence[int]]) -> float:
        """Seconds for these batches of tokens, one after the other."""
        start = time.perf_counter()
        for batch in batches:
            self.last, _, _ = self.session.evaluate(batch)
        return time.perf_counter() - start

    def logits(self) -> NDArray[np.float32]:
        """Those of the last token."""
        return self.last


class Peer:
    """llama.cpp in a process of its own (benchmarks/peer.py), with one RPC server process per entry of `servers`.

    All of them are halted while nobody asks, for threads that poll would take processors from rivals.
    `python` is an interpreter that has llama-cpp-python. Raises UsageError when it cannot be started.
    """

    def __init__(
        self, model: Path, threads: int, n_ctx: int, *, python: str = "", servers: int = 0, n_gpu_layers: int = 0,
        repack: bool = True,
    ) -> None:  # fmt: skip
        self.python = python or sys.executable
        # where others want processors too, threads that poll for ever are slower than threads that sleep
        self.environment = {"OMP_WAIT_POLICY": "passive"} | os.environ | {"PYTHONPATH": str(ROOT)}
        self.pids: list[int] = []
        self._stack = ExitStack()
        try:
            endpoints = [self._stack.enter_context(self._server(threads)) for _ in range(servers)]
            self.process = self._stack.enter_context(self._start("model", stdin=subprocess.PIPE))
            wish = {"do": "load", "model": str(model), "threads": threads, "n_ctx": n_ctx, "n_ubatch": 512,
                    "rpc": endpoints, "n_gpu_layers": n_gpu_layers, "repack": repack}  # fmt: skip
            self.system = str(self._ask(wish))
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, tb)

    def restart(self) -> None:
        """Forget all tokens."""
        self._ask({"do": "restart"})

    def evaluate(self, batches: Sequence[Sequence[int]]) -> float:
        """Seconds for these batches of tokens, as the other process measures them."""
        return float(self._ask({"do": "evaluate", "batches": [list(batch) for batch in batches]}))

    def logits(self) -> NDArray[np.float32]:
        """Those of the last token."""
        return np.array(self._ask({"do": "logits"}), np.float32)

    @contextmanager
    def _start(self, *arguments: str, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
        command = [self.python, "-m", "benchmarks.peer", *arguments]
        process = subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE if stdin == subprocess.PIPE else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if stdin != subprocess.PIPE else None, env=self.environment, cwd=ROOT,
        )  # fmt: skip
        self.pids.append(process.pid)
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    @contextmanager
    def _server(self, threads: int) -> Iterator[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with self._start("rpc", f"127.0.0.1:{port}", str(threads)) as process:
            deadline = time.monotonic() + _START_S
            while time.monotonic() < deadline and process.poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            else:
                raise UsageError("llama.cpp's RPC server did not start: was llama-cpp-python built with GGML_RPC=ON?")
            yield f"127.0.0.1:{port}"

    def _ask(self, request: dict[str, Any]) -> Any:
        for pid in self.pids:
            os.kill(pid, signal.SIGCONT)
        try:
            return self._answer(request)
        finally:
            for pid in self.pids:
                os.kill(pid, signal.SIGSTOP)

    def _answer(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], _START_S)
            line = self.process.stdout.readline() if ready else b""
        except BrokenPipeError:
            line = b""
        if not line:
            raise UsageError(
                f"{self.python} -m benchmarks.peer gave no answer to {request['do']}: does it have llama_cpp?"
            )
        return json.loads(line)


def agreement(ours: Ours, peer: Peer, prompt: Sequence[int]) -> float:
    """Cosine of both logits after a prompt: below some 0.99 they did not run the same model."""
    values = []
    for rival in (ours, peer):
        rival.restart()
        rival.evaluate([prompt])
        logits = np.asarray(rival.logits(), np.float64)
        values.append(logits - logits.mean())
        rival.restart()
    a, b = values
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
