"""`crossdock run`: the main job, from files to a streamed answer."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from coordinator.cli import options
from coordinator.model.chat import ChatTemplate, Message
from coordinator.model.gguf_file import open_model
from coordinator.model.hparams import ModelParams
from coordinator.model.image import Tiles, load_image, preprocess
from coordinator.model.params import read_params
from coordinator.model.sampling import Sampler, SamplingParams
from coordinator.model.tokens import Tokenizer
from coordinator.ownership.violation import OwnershipError
from coordinator.report import run as report
from coordinator.report.story import finding_document, print_findings
from coordinator.report.text import notes, plain, printable, watched
from coordinator.runtime.explain import explain_run
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.generate import Prompt, Timings, check_prompt, encode_images, generate
from coordinator.runtime.session import Session
from protocol.errors import Exit, InputError, UsageError

QUESTION = "Describe this image."
_CUT = {"length": "--n-predict", "context": "the end of the context (--ctx-size)"}


def run(chosen: argparse.Namespace) -> int:
    """Describe images or continue text; the answer goes to stdout, everything else to stderr."""
    started = _process_start()
    console = notes()
    talk = not (chosen.quiet or chosen.json)
    workers, fleet_options = options.topology(chosen), options.fleet_options(chosen)
    session_options, sampler = (
        options.session_options(chosen),
        Sampler(_sampling(chosen), silent=chosen.ownership == "faithful"),
    )
    model = open_model(options.model_path(chosen))
    with Fleet(workers, fleet_options) as fleet:
        fleet.start()  # the workers load their kernels while we read and plan
        with _progress(console, talk, "reading"):
            params = read_params(model)
            tokenizer = Tokenizer.from_metadata(model.metadata, model.path.name)
            chat = ChatTemplate.from_metadata(model.metadata, tokenizer)
            prompt, note = _prompt(chosen, params, tokenizer, chat)
            session = Session(model, params, workers, session_options, n_images=len(prompt.images))
            check_prompt(prompt, params.image_token, session.n_ctx)
        if talk:
            console.print(f"[bold]workers[/]   {report.workers_line(workers, fleet_options.transport, fleet.plane)}")
            console.print(f"[bold]model[/]     {report.model_line(params, model.weights)}")
            if note:
                console.print(f"[bold]note[/]      {plain(note)}")
        with _progress(console, talk, "starting workers"):
            fleet.handshake()
        with _progress(console, talk, "loading weights"):
            session.open(fleet)
        timings = Timings()
        pieces: list[tuple[int, str]] = []
        try:
            with _progress(console, talk, "encoding the image" if prompt.images else "evaluating the prompt"):
                encode_images(session, prompt, timings)
                answer = generate(session, tokenizer, prompt, sampler, chosen.n_predict, timings)
                first = next(answer, None)
            first_ns = time.time_ns() - started
            pieces = [] if first is None else [first]
            if not chosen.json:
                _write(pieces, talk)
            for piece in answer:
                pieces.append(piece)
                if not chosen.json:
                    _write([piece], False)
        except OwnershipError as error:
            return _stopped(chosen, console, session, len(prompt.tokens), error)
        peaks = session.peak_memory()
    tokens = [token for token, _ in pieces if token >= 0]
    if chosen.json:
        text = "".join(text for _, text in pieces)
        print(json.dumps(report.run_document(session, timings, tokens, text, first_ns, peaks), ensure_ascii=False))
    else:
        print(flush=True)
    if talk:
        if timings.stop != "stop":
            console.print(f"[bold]cut[/]       the answer ended by {_CUT[timings.stop]}")
        _summary(console, session, timings, first_ns, peaks)
    return Exit.OK


def _stopped(
    chosen: argparse.Namespace, console: Console, session: Session, n_prompt: int, error: OwnershipError
) -> int:
    """Tell the story of the read that strict ownership has stopped."""
    found = explain_run(session, error.finding, n_prompt)
    if chosen.json:
        print(json.dumps({"finding": finding_document(found)}, ensure_ascii=False))
    else:
        print_findings(console, [found])
    return Exit.FOUND


def _write(pieces: list[tuple[int, str]], first: bool) -> None:
    if first and sys.stdout.isatty():
        print()
    text = "".join(text for _, text in pieces)
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _summary(console: Console, session: Session, timings: Timings, first_ns: int, peaks: list[int]) -> None:
    console.print()
    console.print(f"[bold]plan[/]      {report.plan_line(timings)}")
    console.print(report.speed_line(timings, first_ns))
    kept = report.kept_line(session)
    if kept:
        console.print(kept)
    console.print()
    console.print(report.graphs_table(timings, session.topology.names))
    console.print()
    console.print(report.memory_table(session, peaks))


def _sampling(chosen: argparse.Namespace) -> SamplingParams:
    if chosen.temperature == 0:
        return SamplingParams(repeat_penalty=chosen.repeat_penalty)
    return SamplingParams(
        chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p, chosen.repeat_penalty, seed=chosen.seed
    )


def _prompt(
    chosen: argparse.Namespace, params: ModelParams, tokenizer: Tokenizer, chat: ChatTemplate
) -> tuple[Prompt, str]:
    """Tokens and tiles of what was asked, and why the model's own chat template was not used ("" if it was).

    Raises InputError or UsageError for what the model cannot take.
    """
    files = _images(chosen)
    if files and params.vision is None:
        raise InputError(f"the model ({params.arch}) takes no images, {len(files)} given")
    text = chosen.prompt if chosen.prompt is not None else (QUESTION if files else None)
    if text is None:
        raise UsageError("nothing to do: give a --prompt or an --image")
    note = ""
    if not chosen.raw:
        messages = [Message("user", text, len(files))]
        if chosen.system:
            messages.insert(0, Message("system", chosen.system))
        rendered = chat.render(messages)
        text, note = rendered.text, rendered.note
    ids = tokenizer.encode(text, parse_special=True)
    return Prompt(tuple(ids), tuple(_tiles(file, params) for file in files)), note


def _images(chosen: argparse.Namespace) -> list[Path]:
    if chosen.image:
        return [Path(file) for file in chosen.image]
    bundled = chosen.model is None and not chosen.no_image and options.DEMO_IMAGE.is_file()
    return [options.DEMO_IMAGE] if bundled else []


def _tiles(file: Path, params: ModelParams) -> Tiles:
    assert params.vision is not None
    return preprocess(load_image(file), params.vision)


@contextmanager
def _progress(console: Console, talk: bool, what: str) -> Iterator[None]:
    """A spinner while something takes its time, on terminals only."""
    if not (talk and watched()):
        yield
        return
    with console.status(what):
        yield


def _process_start() -> int:
    """When this process started, in nanoseconds since the epoch; now, where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time_ns() - int((uptime - ticks / os.sysconf("SC_CLK_TCK")) * 1e9)
    except (OSError, IndexError, ValueError):
        return time.time_ns()
