"""Arguments of `crossdock plan`, and the devices that `--device` and `--host` describe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from coordinator.cli.values import at_least, layers
from coordinator.config import NAME, parse_size
from protocol.errors import UsageError

DEVICE_KEYS = ("type", "align", "buft", "max", "reads", "unsupported", "offload", "batch")
DEVICE_HELP = (
    "a device in priority order, instead of --workers; KEYs: type=gpu|igpu|accel, align=BYTES, buft=NAME (buffer "
    "type), max=SIZE (largest buffer), reads=BUFT+... (further buffer types), unsupported=OP+..., "
    "offload=OP+...|all|none (ops it takes though their weights lie in host memory), batch=ROWS (from which on)"
)


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Arguments of `crossdock plan`."""
    add_model(parser)
    add_devices(parser.add_argument_group("devices"))
    add_layout(parser.add_argument_group("what lies where"))
    add_questions(parser.add_argument_group("what to show"))


def add_model(parser: argparse.ArgumentParser) -> None:
    """What is planned."""
    parser.add_argument("model", nargs="?", metavar="MODEL",
                        help="GGUF file (its header is enough), config.json or its folder, or a preset: "
                        "llama-3.2-11b-vision, llama-3.2-90b-vision, smollm2-135m (default: the bundled "
                        "demo model)")  # fmt: skip
    parser.add_argument("--graph", metavar="FILE", help="plan the graphs of a JSON document instead, - for stdin")
    group = parser.add_argument_group("graphs")
    group.add_argument("--phase", type=_phases, default=("vision", "prompt", "token"), metavar="PHASE,...",
                       help="vision, prompt, token: the graphs that are planned, in turn (default: all)")  # fmt: skip
    group.add_argument("--dialect", choices=("2026", "2024"), default="2026", help="llama.cpp of which year")
    group.add_argument("--weights-type", action="append", default=[], metavar="[PART=]TYPE",
                       help="type of the matrices of a preset or config.json; PART: text, vision, embd, output or a "
                       "regular expression; may be given several times")  # fmt: skip
    group.add_argument("--images", type=at_least(0), metavar="N",
                       help="0: text, cross layers left out (default: 1, of a model that takes images)")  # fmt: skip
    group.add_argument(
        "-c", "--ctx-size", type=at_least(0), default=0, metavar="N", help="0: the model's, at most 4096"
    )
    group.add_argument("-ub", "--ubatch", type=at_least(1), default=512, metavar="N", help="tokens of the prompt graph")
    group.add_argument("--kv", type=at_least(0), default=0, metavar="N", help="cache positions read (default: all)")
    group.add_argument("--outputs", type=_outputs, default=1, metavar="N", help="rows of logits, or all (default 1)")
    group.add_argument("--debug-tensor", action="append", default=[], metavar="NAME_copy",
                       help="add an unused input shaped like tensor NAME")  # fmt: skip


def add_devices(group: argparse._ArgumentGroup) -> None:
    """Where it is planned."""
    group.add_argument("--device", action="append", default=[], metavar="NAME[:MEMORY][:KEY=VALUE]...",
                       help=DEVICE_HELP)  # fmt: skip
    group.add_argument("--host", default="CPU", metavar="NAME[:MEMORY][:KEY=VALUE]...",
                       help="the CPU behind them, written alike (default: %(default)s)")  # fmt: skip
    group.add_argument("-w", "--workers", default=None, metavar="KIND:N[:MEMORY],...",
                       help="the devices of a run (default: cpu:1,accel:2)")  # fmt: skip
    group.add_argument("--topology", metavar="TOML", help="workers from a file instead")
    group.add_argument("--op-offload", action=argparse.BooleanOptionalAction, default=True,
                       help="devices may take ops whose weights lie in host memory")  # fmt: skip
    group.add_argument("--parallel", action="store_true", help="4 copies of every input (pipeline parallelism)")
    group.add_argument("--share-scheduler", action=argparse.BooleanOptionalAction, default=True,
                       help="vision and language graphs on one scheduler")  # fmt: skip


def add_layout(group: argparse._ArgumentGroup) -> None:
    """Which weights and caches lie on which device."""
    group.add_argument("-ngl", "--n-gpu-layers", type=layers, default=None, metavar="N", help="N or all (default)")
    group.add_argument("-ts", "--tensor-split", metavar="A,B,...", help="proportions of the devices")
    group.add_argument("-ot", "--override-tensor", action="append", default=[], metavar="REGEX=DEVICE",
                       help="weights that match lie there")  # fmt: skip
    group.add_argument("-nkvo", "--no-kv-offload", action="store_true", help="keep the KV cache in host memory")
    group.add_argument("-ctk", "--kv-type", choices=("f16", "f32"), default="f16", help="type of the KV cache")


def add_questions(group: argparse._ArgumentGroup) -> None:
    """What is to be known about it."""
    group.add_argument("--why", action="store_true", help="every split and what started it")
    group.add_argument("-q", "--quiet", action="store_true", help="leave the splits out")
    group.add_argument("--json", action="store_true", help="one JSON document instead of text (--format json)")
    group.add_argument("--format", choices=("text", "json", "dot", "mermaid"), default="text")
    group.add_argument("--check", action="store_true", help="prove each plan another way, too")
    group.add_argument("--dump", choices=("graph", "assign", "splits", "alloc", "plan"),
                       help="JSON of a stage: graph, devices and causes, splits, places, or all of it")  # fmt: skip
    group.add_argument("--memory-map", metavar="FILE",
                       help="draw who holds which bytes of compute memory when: SVG or PNG")  # fmt: skip
    group.add_argument("--fit", action="store_true", help="find the most --n-gpu-layers that fit the devices' MEMORY")
    group.add_argument("--diff", nargs=argparse.REMAINDER, metavar="OPTION",
                       help="compare with the plan that the OPTIONs after it give, such as --diff -ngl 36")  # fmt: skip


def device_fields(text: str, option: str) -> tuple[str, int | None, Mapping[str, str]]:
    """Name, memory in bytes (None: unlimited) and keys of `gpu0:24GiB:align=128`. Raises UsageError."""
    where = f"{option} {text}"
    name, *rest = text.split(":")
    if NAME.fullmatch(name) is None:
        raise UsageError(f"{where}: name {name!r}: expected a letter, then letters, digits, - and _, at most 32")
    memory = parse_size(rest.pop(0), where) if rest and "=" not in rest[0] else None
    keys: dict[str, str] = {}
    for part in rest:
        key, separator, value = part.partition("=")
        if not separator or key not in DEVICE_KEYS:
            raise UsageError(f"{where}: {part!r}: expected KEY=VALUE with KEY one of {', '.join(DEVICE_KEYS)}")
        if key in keys:
            raise UsageError(f"{where}: {key} is given twice")
        keys[key] = value
    return name, memory, keys


def _outputs(text: str) -> int | None:
    return None if text == "all" else at_least(1)(text)


def _phases(text: str) -> tuple[str, ...]:
    phases = tuple(part.strip() for part in text.split(","))
    for phase in phases:
        if phase not in ("vision", "prompt", "token"):
            raise argparse.ArgumentTypeError(f"{phase!r} is no phase: expected vision, prompt or token")
    return phases
