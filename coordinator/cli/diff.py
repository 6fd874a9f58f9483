"""`crossdock diff`: two recordings, or two configurations that are run now, tensor by tensor."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from coordinator.cli import options
from coordinator.cli.parser import run_options
from coordinator.cli.run import header_of, read_job, sampler_of
from coordinator.model.gguf_file import open_model
from coordinator.ownership.violation import OwnershipError
from coordinator.report.diff import comparison_document, print_comparison
from coordinator.report.plan import answer
from coordinator.report.text import notes, plain, watched
from coordinator.runtime.compare import compare
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.generate import Timings, encode_images, generate
from coordinator.runtime.recording import Recorder, Recording, read_recording
from protocol.errors import Exit, UsageError


def diff(chosen: argparse.Namespace) -> int:
    """Compare two runs; exits with FOUND when they differ."""
    sides = [(text, _source(text, chosen)) for text in (chosen.a.strip(), chosen.b.strip())]
    a, b = (side if isinstance(side, Recording) else _run(text, side) for text, side in sides)
    found = compare(a, b)
    if chosen.json:
        print(json.dumps(comparison_document(found)))
    else:
        with answer() as console:
            print_comparison(console, found)
    return Exit.FOUND if found.differs else Exit.OK


def _source(text: str, chosen: argparse.Namespace) -> Recording | argparse.Namespace:
    """A recording, or what to run. Raises UsageError for what is neither."""
    if not text or text.startswith("-"):
        return run_options(text, chosen)
    if not Path(text).is_file():
        raise UsageError(
            f"diff {text}: no such file; expected one of `crossdock run --record`, or options in quotes such as "
            '"-ngl 3"'
        )
    return read_recording(Path(text))


def _run(label: str, chosen: argparse.Namespace) -> Recording:
    """Run with everything looked at, silently; a read that strict ownership stops ends the recording."""
    workers, fleet_options = options.topology(chosen), options.fleet_options(chosen)
    session_options = options.session_options(chosen, tuple(chosen.dump_tensor) or (options.EVERYTHING,))
    sampler, model, recorder = sampler_of(chosen), open_model(options.weights_path(chosen)), Recorder()
    pieces: list[tuple[int, str]] = []
    stopped = ""
    console = notes()
    if watched():
        console.print(f"[bold]running[/]   {plain(label) or 'without options'}")
    with Fleet(workers, fleet_options) as fleet:
        fleet.start()
        job = read_job(chosen, model, workers, session_options)
        fleet.handshake()
        job.session.open(fleet)
        job.session.on_tensor = recorder.add
        timings = Timings()
        try:
            encode_images(job.session, job.prompt, timings)
            for piece in generate(job.session, job.tokenizer, job.prompt, sampler, chosen.n_predict, timings):
                pieces.append(piece)
        except OwnershipError as error:
            stopped = str(error)
    return recorder.finish(label, header_of(chosen, job.session), pieces, stopped)
