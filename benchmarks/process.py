"""What processes cost: start-up to the first token, memory beyond the model's, and the host's share of a step."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks import models
from benchmarks.measure import Row, single
from benchmarks.rivals import ROOT, tokens
from coordinator.cli.options import DEMO_IMAGE
from coordinator.config import parse_workers
from coordinator.model.gguf_file import open_model
from coordinator.model.image import load_image, preprocess
from coordinator.model.params import read_params
from coordinator.runtime.evaluate import StepResult
from coordinator.runtime.fleet import Fleet, FleetOptions
from coordinator.runtime.generate import Prompt, Timings, encode_images
from coordinator.runtime.session import Session, SessionOptions
from coordinator.schedule.placement import PlacementOptions
from protocol.errors import UsageError

WORKERS = "cpu:1,accel:2"
_MAIN = "from coordinator.cli import main; main()"


def startup(quick: bool) -> Iterator[Row]:
    """`crossdock run` of the bundled model and image on three workers, from the process's start to its first byte."""
    command = [sys.executable, "-c", _MAIN, "run", "--quiet", "--workers", WORKERS, "--n-predict", "4"]
    walls, processor = [], []
    for _ in range(4 if quick else 12):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            walls.append(time.perf_counter() - start)
            if not first:
                raise UsageError("crossdock run said nothing: see its message above")
            process.stdout.read()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    note = f"CPU time of all four processes to their end {statistics.median(processor[1:]):.2f} s"
    yield single("start", f"first token, bundled model, {WORKERS}, warm", walls[1:], "s", note)


def opened(fleet: Fleet, name: str, workers: str, layers: int | None, n_images: int) -> Session:
    """A started session of a benchmark's model, its images encoded and a short prompt evaluated."""
    model = open_model(models.model_file(name))
    params = read_params(model)
    fleet.start()
    options = SessionOptions(PlacementOptions(layers), n_ctx=min(512, params.text.n_ctx_train))
    session = Session(model, params, parse_workers(workers, 1), options, n_images=n_images)
    fleet.handshake()
    session.open(fleet)
    ids = tokens(16, params.text.n_vocab)
    if n_images:
        assert params.vision is not None
        assert params.image_token is not None
        ids[0] = params.image_token
        prompt = Prompt(tuple(ids), (preprocess(load_image(DEMO_IMAGE), params.vision),))
        encode_images(session, prompt, Timings())
    session.evaluate(ids)
    return session


def overhead(quick: bool) -> Iterator[Row]:
    """Wall time of a decode step less the time in kernels, over all workers: they take turns."""
    for workers in ("cpu:1", "cpu:1,accel:1", WORKERS):
        with Fleet(parse_workers(workers, 1), FleetOptions()) as fleet:
            session = opened(fleet, "demo", workers, 2 if workers == "cpu:1,accel:1" else None, 1)
            for _ in range(8):
                session.evaluate([5])
            results = [session.evaluate([5])[1] for _ in range(60 if quick else 200)]
            yield single("overhead", f"decode step outside kernels, bundled model, {workers}", _outside(results), "ms")


def _outside(results: list[StepResult]) -> list[float]:
    return [(r.wall_ns - sum(done.compute_ns for done in r.done.values())) / 1e6 for r in results]


def memory(_quick: bool) -> Iterator[Row]:
    """PSS of a worker's mappings but for the model file and its own and its peers' arenas, after prompt and decode."""
    for name, images in (("demo", 1), ("smollm2-q4_1", 0)):
        with Fleet(parse_workers(WORKERS, 1), FleetOptions()) as fleet:
            session = opened(fleet, name, WORKERS, None, images)
            session.evaluate([5])
            found = [beyond(process.pid, session.model.path) for process in fleet.processes]
            proportional, unique, resident = (max(column) / 1e6 for column in zip(*found, strict=True))
            note = f"largest of {len(found)} workers; private {unique:.0f} MB, resident {resident:.0f} MB"
            yield Row("memory", f"worker beyond the model's memory, {name}", proportional, "MB", note=note)


def beyond(pid: int, model: Path) -> tuple[int, int, int]:
    """Bytes PSS, private and resident of a process, less the model file's and arenas' mappings (from its smaps)."""
    sums: dict[str, int] = defaultdict(int)
    counts = True
    for line in Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):  # a mapping's first line: range, rights, offset, device, inode, path
            parts = line.split(maxsplit=5)
            path = parts[5] if len(parts) > 5 else ""
            arena = path.startswith("/memfd:crossdock-") and not path.startswith("/memfd:crossdock-board")
            counts = not arena and path != str(model.resolve())
        elif counts and rest.endswith("kB"):
            sums[key] += int(rest.split()[0]) * 1024
    return sums["Pss:"], sums["Private_Clean:"] + sums["Private_Dirty:"], sums["Rss:"]
