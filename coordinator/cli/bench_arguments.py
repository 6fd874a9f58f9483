"""Arguments of `crossdock bench`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from coordinator.cli.values import at_least


def numbers(low: int) -> Callable[[str], tuple[int, ...]]:
    """An argparse type: integers from `low` on, separated by commas; none for an empty text."""
    one = at_least(low)

    def several(text: str) -> tuple[int, ...]:
        try:
            return tuple(one(part) for part in text.split(",") if part.strip())
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: expected numbers separated by commas") from None

    return several


def shares(text: str) -> tuple[str, ...]:
    """An argparse type: numbers of layers, `half` or `all`, separated by commas."""
    parts = tuple(part.strip() for part in text.split(","))
    try:
        for part in parts:
            if part not in ("half", "all"):
                at_least(0)(part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers, half or all, separated by commas") from None
    return parts


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Arguments of `crossdock bench`; what is not given depends on what is measured (cli/bench.py)."""
    parser.add_argument("what", nargs="?", choices=("rates", "scaling"), default="rates",
                        help="rates of prompts, decoding and images (default), or how they change with workers, "
                        "layers, threads and micro-batches")  # fmt: skip
    tests = parser.add_argument_group("tests")
    tests.add_argument("-m", "--model", metavar="GGUF", help="model file (default: the bundled demo model)")
    tests.add_argument("-p", "--n-prompt", type=numbers(0), metavar="N,...", help="prompts of N tokens, 0: none (512)")
    tests.add_argument("-n", "--n-gen", type=numbers(0), metavar="N,...", help="N tokens one by one, 0: none (128)")
    tests.add_argument("--no-image", action="store_true", help="the language model alone")
    tests.add_argument("-r", "--repetitions", type=at_least(1), metavar="N", help="of each test, after one to warm up")
    group = parser.add_argument_group("workers and placement, each combination of which is measured")
    group.add_argument("-w", "--workers", action="append", metavar="KIND:N[:MEMORY],...",
                       help="as in run; may be given several times (cpu:1). With --simulate numbers of "
                       "accelerators instead: the largest, or all that are meant (64)")  # fmt: skip
    group.add_argument("-t", "--threads", type=numbers(1), metavar="N,...", help="threads of each worker (1)")
    group.add_argument("-ngl", "--n-gpu-layers", type=shares, metavar="N,...",
                       help="layers on accelerators: numbers, half or all (all)")  # fmt: skip
    group.add_argument("-ub", "--ubatch", type=numbers(1), metavar="N,...", help="prompt tokens at a time (512)")
    group.add_argument("-ctk", "--kv-type", choices=("f16", "f32"), default="f16", help="type of the KV cache")
    group.add_argument("--arithmetic", choices=("exact", "ggml"), default="exact",
                       help="ggml: the bits of ggml's own kernels on AVX2")  # fmt: skip
    group.add_argument("--transport", choices=("ipc", "tcp"), default="ipc", help="between processes of this machine")
    add_simulated(parser.add_argument_group("scaling on modelled hardware, beside what was measured"))
    output = parser.add_argument_group("output")
    formats = output.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    formats.add_argument("--markdown", action="store_true", help="a Markdown table")
    output.add_argument("--plot", metavar="FILE", help="scaling as a picture too: .svg, .png or .pdf")


def add_simulated(group: argparse._ArgumentGroup) -> None:
    """Arguments of `crossdock bench scaling --simulate`."""
    group.add_argument("--simulate", nargs="?", const="", type=str, metavar="TOML",
                       help="continue the curves of 1 to 4 processes with simulated workers, all like the first "
                       "device of this system (default: here.toml, as crossdock calibrate writes it)")  # fmt: skip
    group.add_argument("--network", metavar="TOML|LINK",
                       help="their links (default: NAME-network.toml beside the system, else pcie4x16)")  # fmt: skip
    group.add_argument("--no-real", action="store_true", help="simulate only: no process is started")
    group.add_argument("--stages", type=at_least(1), metavar="N",
                       help="workers of one pipeline in the curve of many sequences (4)")  # fmt: skip
    group.add_argument("--requests", type=at_least(1), metavar="N",
                       help="sequences under way at once in that curve (64, but no more than workers)")  # fmt: skip
