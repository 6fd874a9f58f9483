"""`crossdock run`: the main job, from files to a streamed answer."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from coordinator.cli import options
from coordinator.cli.clocks import patient, stopwatch_of, write_run_trace
from coordinator.config import Topology
from coordinator.model.chat import ChatTemplate, Message
from coordinator.model.gguf_file import ModelFile, open_model
from coordinator.model.hparams import ModelParams
from coordinator.model.image import Tiles, load_image, preprocess
from coordinator.model.params import read_params
from coordinator.model.sampling import Sampler, SamplingParams
from coordinator.model.tokens import Tokenizer
from coordinator.ownership.violation import OwnershipError
from coordinator.report import run as report
from coordinator.report.story import finding_document, print_findings
from coordinator.report.taps import Looking
from coordinator.report.text import notes, plain, printable, watched
from coordinator.runtime.explain import explain_run
from coordinator.runtime.fleet import Fleet
from coordinator.runtime.generate import Prompt, Timings, check_prompt, encode_images, generate
from coordinator.runtime.memory import Progress
from coordinator.runtime.recording import Header, header
from coordinator.runtime.session import Session, SessionOptions
from protocol.errors import Exit, InputError, UsageError

QUESTION = "Describe this image."
_SHOWING = frozenset({
    "command", "a", "b", "json", "quiet", "dump_tensor", "dump_dir", "record", "trace", "memory_map", "simulate",
    "network", "pace",
})  # fmt: skip
_CUT = {"length": "--n-predict", "context": "the end of the context (--ctx-size)"}


@dataclass(frozen=True, slots=True)
class Job:
    """What there is to do, read and planned; `note` as for `_prompt`."""

    session: Session
    tokenizer: Tokenizer
    prompt: Prompt
    note: str


def read_job(chosen: argparse.Namespace, model: ModelFile, workers: Topology, session_options: SessionOptions) -> Job:
    """Everything that is known before a worker is needed. Raises what model, prompt or images are wrong with."""
    params = read_params(model)
    tokenizer = Tokenizer.from_metadata(model.metadata, model.path.name)
    chat = ChatTemplate.from_metadata(model.metadata, tokenizer)
    prompt, note = _prompt(chosen, params, tokenizer, chat)
    session = Session(model, params, workers, session_options, n_images=len(prompt.images))
    check_prompt(prompt, params.image_token, session.n_ctx)
    return Job(session, tokenizer, prompt, note)


def run(chosen: argparse.Namespace) -> int:
    """Describe images or continue text; the answer goes to stdout, everything else to stderr."""
    started = _process_start()
    console = notes()
    talk = not (chosen.quiet or chosen.json)
    workers, fleet_options = options.topology(chosen), patient(chosen, options.fleet_options(chosen))
    session_options, sampler = options.session_options(chosen, _taps(chosen)), sampler_of(chosen)
    stopwatch = stopwatch_of(chosen, workers)
    model = open_model(options.weights_path(chosen))
    with _looking(chosen, console) as look, Fleet(workers, fleet_options) as fleet:
        fleet.start()  # the workers load their kernels while we read and plan
        with _progress(console, talk, "reading"):
            job = read_job(chosen, model, workers, session_options)
            session, prompt = job.session, job.prompt
            look.begin(header_of(chosen, session))
            session.on_tensor, session.stopwatch = look, stopwatch
        if talk:
            console.print(f"[bold]workers[/]   {report.workers_line(workers, fleet_options.transport, fleet.plane)}")
            console.print(f"[bold]model[/]     {report.model_line(session.params, model.weights)}")
            if job.note:
                console.print(f"[bold]note[/]      {plain(job.note)}")
        with _progress(console, talk, "starting workers"):
            fleet.handshake()
        with _loading(console, talk) as loaded:
            session.open(fleet, loaded)
        timings = Timings()
        pieces: list[tuple[int, str]] = []
        try:
            with _progress(console, talk, "encoding the image" if prompt.images else "evaluating the prompt"):
                encode_images(session, prompt, timings)
                answer = generate(session, job.tokenizer, prompt, sampler, chosen.n_predict, timings)
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
            look.finish(pieces, str(error))
            write_run_trace(chosen, stopwatch, workers)
            return _stopped(chosen, console, session, len(prompt.tokens), error)
        look.finish(pieces)
        peaks = session.peak_memory()
    write_run_trace(chosen, stopwatch, workers)
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
    if session.stopwatch is not None and session.stopwatch.machine is not None:
        console.print(report.virtual_line(timings, session.stopwatch.machine.names))
    kept = report.kept_line(session)
    if kept:
        console.print(kept)
    console.print()
    console.print(report.graphs_table(timings, session.topology.names))
    console.print()
    console.print(report.memory_table(session, peaks))


def _taps(chosen: argparse.Namespace) -> tuple[str, ...]:
    """Regular expressions for what is looked at; for a recording that says nothing of it, everything."""
    if chosen.dump_dir is not None and not chosen.dump_tensor:
        raise UsageError(f"--dump-dir {chosen.dump_dir}: expected --dump-tensor REGEX with it")
    everything = (options.EVERYTHING,) if chosen.record is not None else ()
    return tuple(chosen.dump_tensor) or everything


def _looking(chosen: argparse.Namespace, console: Console) -> Looking:
    folder = None if chosen.dump_dir is None else Path(chosen.dump_dir)
    record = None if chosen.record is None else Path(chosen.record)
    return Looking(console, show=bool(chosen.dump_tensor), folder=folder, record=record)


def header_of(chosen: argparse.Namespace, session: Session) -> Header:
    """What a recording says about a run: all options but those that say what is shown."""
    asked = {name: value for name, value in vars(chosen).items() if name not in _SHOWING}
    return header(session.model.fingerprint, session.model.path.name, session.topology.names, asked)


def sampler_of(chosen: argparse.Namespace) -> Sampler:
    """How tokens are chosen; silent about what is no number where that is what the run is to show."""
    return Sampler(_sampling(chosen), silent=chosen.ownership == "faithful")


def _sampling(chosen: argparse.Namespace) -> SamplingParams:
    asked = SamplingParams(
        chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p, chosen.repeat_penalty, seed=chosen.seed
    )  # checked although the best token needs none of it
    return SamplingParams(repeat_penalty=chosen.repeat_penalty) if chosen.temperature == 0 else asked


def _prompt(
    chosen: argparse.Namespace, params: ModelParams, tokenizer: Tokenizer, chat: ChatTemplate
) -> tuple[Prompt, str]:
    """Tokens and tiles of what was asked, and why the model's own chat template was not used ("" if it was).

    Raises InputError or UsageError for what the model cannot take.
    """
    if chosen.raw and chosen.system_message:
        raise UsageError("--system goes without --raw: a raw prompt has no place for it")
    files = _images(chosen)
    if files and params.vision is None:
        raise InputError(f"the model ({params.arch}) takes no images, {len(files)} given")
    text = chosen.prompt if chosen.prompt is not None else (QUESTION if files else None)
    if text is None:
        raise UsageError("nothing to do: give a --prompt or an --image")
    note = ""
    if not chosen.raw:
        messages = [Message("user", text, len(files))]
        if chosen.system_message:
            messages.insert(0, Message("system", chosen.system_message))
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


@contextmanager
def _loading(console: Console, talk: bool) -> Iterator[Progress]:
    """A bar of what accelerators have copied, on terminals only; where nothing is copied it never fills."""
    if not (talk and watched()):
        yield lambda done, total: None
        return
    from rich import progress  # takes its time to import, for nothing but this

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(binary_units=True)
    )  # fmt: skip
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading weights", total=None)

        def loaded(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield loaded


def _process_start() -> int:
    """When this process started, in nanoseconds since the epoch; now, where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time_ns() - int((uptime - ticks / os.sysconf("SC_CLK_TCK")) * 1e9)
    except (OSError, IndexError, ValueError):
        return time.time_ns()
