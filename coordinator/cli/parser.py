"""Arguments of all commands."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module, metadata

from coordinator.cli.bench_arguments import add_bench
from coordinator.cli.calibrate_arguments import add_calibrate
from coordinator.cli.check_arguments import add_check, add_reproduce, add_scenario
from coordinator.cli.clocks import add_clocks
from coordinator.cli.files import check_files
from coordinator.cli.plan_arguments import add_plan
from coordinator.cli.simulate_arguments import add_hardware, add_simulate
from coordinator.cli.values import Parser, at_least, layers
from protocol.errors import UsageError

Command = Callable[[], int]


def parse(arguments: list[str]) -> Command:
    """The command to run. Raises UsageError for arguments that cannot be meant."""
    parser = Parser(
        prog="crossdock",
        description="A laboratory for ggml-style multi-backend scheduling of vision-language models.",
        epilog="exit status: 0 fine, 1 internal error, 2 usage, 3 model file, 4 input, 5 does not fit, "
        "6 worker, 7 protocol, 8 something was found, 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"crossdock {metadata.version('crossdock')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    commands.type = str  # all words behind it pass by here, and are for the command's own parser to check
    add_run(commands.add_parser("run", help="describe images or continue text, across worker processes"))
    add_diff(commands.add_parser("diff", help="name the first tensor in which two runs differ, and what becomes of it"))
    add_plan(commands.add_parser("plan", help="show what would run where, and what it would need, without running it"))
    add_check(commands.add_parser("check", help="find memory that is read after somebody else took it over, in plans"))
    add_scenario(commands.add_parser("scenario", help="act out such hazards on real bytes, in each mode of ownership"))
    add_reproduce(commands.add_parser("reproduce", help="replay a known discussion on the bundled model"))
    add_simulate(commands.add_parser("simulate", help="time it on modelled hardware, without having it"))
    add_hardware(commands.add_parser("devices", help="list the models of devices and links, with their sources"))
    add_calibrate(commands.add_parser("calibrate", help="measure this machine's workers and write a model of them"))
    add_bench(commands.add_parser("bench", help="measure prompts, decoding and images, and how they scale"))
    add_convert(commands.add_parser("convert", help="turn a Hugging Face folder into one GGUF file"))
    add_doctor(commands.add_parser("doctor", help="say what this machine has, and what replaces what it lacks"))
    chosen, unknown = parser.parse_known_args(_as_meant(arguments))
    if unknown:
        raise UsageError(_unrecognized(unknown, commands.choices[chosen.command]))
    check_files(chosen)
    return _command(chosen)


def _as_meant(arguments: list[str]) -> list[str]:
    """`help`, and what argparse would take for something else. Raises UsageError for what stands at a wrong place."""
    if not arguments:
        raise UsageError("expected a command, such as crossdock run (crossdock --help lists them)")
    first = arguments[0]
    if first == "help":
        return [*arguments[1:2], "--help"]
    if first.startswith("-") and first not in ("-h", "--help", "--version"):
        raise UsageError(f"{first}: options stand behind the command: crossdock run {first} ... (see crossdock --help)")
    return quoted(arguments) if first == "diff" else arguments


def _unrecognized(words: list[str], parser: argparse.ArgumentParser) -> str:
    """What to write instead, as far as that can be guessed."""
    command, option = parser.prog.split()[-1], words[0].partition("=")[0]
    near = get_close_matches(option, re.findall(r"--[a-z][a-z-]*", parser.format_help()), 1, _ALIKE)
    if option in ("-", "--", "-m", "--model") or not option.startswith("-"):
        hint = _PLACES.get(command, "")
    else:
        hint = f": is {near[0]} meant?" if near else ""
    return f"unrecognized arguments: {' '.join(words)}{hint} (see {parser.prog} --help)"


_ALIKE = 0.7
_MODEL_ALONE = ": MODEL is the one argument without an option"
_PLACES = {
    "run": ": expected --prompt TEXT, --image FILE or --model GGUF", "bench": ": expected --model GGUF",
    "plan": _MODEL_ALONE, "check": _MODEL_ALONE, "simulate": _MODEL_ALONE, "devices": ": expected --system TOML",
    "diff": ": expected two runs, options of each in quotes", "calibrate": ": expected --output TOML",
}  # fmt: skip
"""Where words without an option belong, by command."""


def quoted(arguments: list[str]) -> list[str]:
    """Options in quotes are no option to argparse when they begin with a space."""
    return [f" {text}" if text.startswith("-") and " " in text else text for text in arguments]


def run_options(text: str, common: argparse.Namespace) -> argparse.Namespace:
    """Options of `crossdock run` in one text, on top of `common`. Raises UsageError."""
    parser = Parser(prog="crossdock diff", add_help=False)
    add_job(parser)
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"diff {text}: {error}") from None
    return parser.parse_args(words, argparse.Namespace(**vars(common)))


_MODULES = {
    "run": "run:run",
    "diff": "diff:diff",
    "plan": "plan:plan",
    "check": "check:check",
    "scenario": "scenario:scenario",
    "reproduce": "reproduce:reproduce_discussion",
    "simulate": "simulate:simulate",
    "devices": "devices:devices",
    "calibrate": "calibrate:calibrate",
    "bench": "bench:bench",
    "convert": "convert:convert",
    "doctor": "doctor:doctor",
}
"""Module of coordinator.cli and function of each command."""


def _command(chosen: argparse.Namespace) -> Command:
    """Bind the chosen command; its module is imported only now, since some take long to load."""
    module, _, function = _MODULES[chosen.command].partition(":")
    command: Callable[[argparse.Namespace], int] = getattr(import_module(f"coordinator.cli.{module}"), function)
    return lambda: command(chosen)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Arguments of `crossdock run`."""
    add_job(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON document instead of text")
    output.add_argument("-q", "--quiet", action="store_true", help="the answer alone")
    output.add_argument("--dump-tensor", action="append", default=[], metavar="REGEX",
                        help="print a line for each tensor whose name matches, of any graph on any worker")  # fmt: skip
    output.add_argument("--dump-dir", metavar="DIR", help="save those tensors there as well, one .npy file each")
    output.add_argument("--record", metavar="FILE", help="record all tensors (or those) for `crossdock diff`")
    add_clocks(parser.add_argument_group("time"))


def add_diff(parser: argparse.ArgumentParser) -> None:
    """Arguments of `crossdock diff`."""
    for name in ("a", "b"):
        parser.add_argument(name, type=str, metavar=name.upper(),
                            help='a file of `crossdock run --record`, or options of `crossdock run` in quotes: '
                            '"-ngl 3" ("" for none, "-nkvo " for one alone)')  # fmt: skip
    add_job(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON document instead of text")
    output.add_argument("--dump-tensor", action="append", default=[], metavar="REGEX",
                        help="compare only tensors whose names match (default: all)")  # fmt: skip


def add_job(parser: argparse.ArgumentParser) -> None:
    """What to run: model, prompt, sampling and placement."""
    text = parser.add_argument_group("prompt")
    text.add_argument("-m", "--model", metavar="GGUF", help="model file (default: the bundled demo model)")
    text.add_argument("-i", "--image", action="append", metavar="FILE", help="image; may be given several times")
    text.add_argument("--no-image", action="store_true", help="do not take the bundled image with the bundled model")
    text.add_argument("-p", "--prompt", type=str,
                      help='question or text (default with an image: "Describe this image.")')  # fmt: skip
    text.add_argument("-s", "--system", dest="system_message", metavar="TEXT", type=str, help="system message")
    text.add_argument("--raw", action="store_true", help="take the prompt as it is, without the chat template")
    text.add_argument("-n", "--n-predict", type=at_least(0), default=128, metavar="N", help="at most N new tokens")
    text.add_argument("-c", "--ctx-size", type=at_least(0), default=0, metavar="N", help="context, 0: the model's")
    text.add_argument("-ub", "--ubatch", type=at_least(1), default=512, metavar="N", help="prompt tokens at a time")
    add_sampling(parser.add_argument_group("sampling"))
    add_placement(parser.add_argument_group("workers and placement"))


def add_sampling(group: argparse._ArgumentGroup) -> None:
    """Arguments that choose the next token."""
    group.add_argument("--temperature", "--temp", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    group.add_argument("--top-k", type=at_least(0), default=40, metavar="K", help="0: all")
    group.add_argument("--top-p", type=float, default=0.95, metavar="P", help="1: all")
    group.add_argument("--min-p", type=float, default=0.05, metavar="P", help="0: all")
    group.add_argument("--repeat-penalty", type=float, default=1.0, metavar="R", help="1: none")
    group.add_argument("--seed", type=at_least(0), default=0, metavar="S")


def add_placement(group: argparse._ArgumentGroup) -> None:
    """Arguments that say which workers there are and what lies where."""
    group.add_argument("-w", "--workers", metavar="KIND:N[:MEMORY],...",
                       help="kinds cpu, accel, null (default: cpu:1,accel:2)")  # fmt: skip
    group.add_argument("--topology", metavar="TOML", help="workers from a file instead")
    group.add_argument("-t", "--threads", type=at_least(1), metavar="N", help="threads of each worker (default 1)")
    group.add_argument("-ngl", "--n-gpu-layers", type=layers, default=None, metavar="N", help="N or all (default)")
    group.add_argument("-ts", "--tensor-split", metavar="A,B,...", help="proportions of the accelerators")
    group.add_argument("-ot", "--override-tensor", action="append", default=[], metavar="REGEX=WORKER",
                       help="weights that match lie there")  # fmt: skip
    group.add_argument("-nkvo", "--no-kv-offload", action="store_true", help="keep the KV cache in host memory")
    group.add_argument("-ctk", "--kv-type", choices=("f16", "f32"), default="f16", help="type of the KV cache")
    group.add_argument("--share-scheduler", action=argparse.BooleanOptionalAction, default=True,
                       help="vision and language graphs on one scheduler")  # fmt: skip
    group.add_argument("--pin", action="append", default=[], metavar="TENSOR=WORKER",
                       help="a graph's tensor lies there (ggml_backend_sched_set_tensor_backend)")  # fmt: skip
    group.add_argument("--check", action="store_true", help="compare every read with who wrote its bytes last")
    group.add_argument("--ownership", choices=("safe", "strict", "faithful"), default="safe",
                       help="what outlives its graph gets memory of its own (safe), stays where it is as in ggml "
                       "(faithful), or stays and every read is checked (strict)")  # fmt: skip
    group.add_argument("--debug-tensor", action="append", default=[], metavar="NAME_copy",
                       help="add an unused input shaped like tensor NAME")  # fmt: skip
    group.add_argument("--arithmetic", choices=("exact", "ggml"), default="exact",
                       help="ggml: the bits of ggml's own kernels on AVX2")  # fmt: skip
    group.add_argument("--transport", choices=("ipc", "tcp"), default="ipc", help="between processes of this machine")
    group.add_argument("--port", type=at_least(0), default=0, metavar="N", help="tcp control port (default: any free)")
    group.add_argument("--stall-timeout", type=float, default=60.0, metavar="S",
                       help="give up when no worker makes progress for S seconds")  # fmt: skip


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Arguments of `crossdock convert`."""
    parser.add_argument("folder", metavar="HF_DIR", help="config.json, *.safetensors, tokenizer.json, ...")
    parser.add_argument("-o", "--output", required=True, metavar="GGUF")
    parser.add_argument("--type", choices=("f32", "f16", "bf16", "q8_0", "q4_0"), default="f16", help="of the matrices")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Arguments of `crossdock doctor`."""
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
