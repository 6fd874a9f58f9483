"""Arguments of `crossdock simulate` and `crossdock devices`."""

from __future__ import annotations

import argparse

from coordinator.cli.plan_arguments import add_layout
from coordinator.cli.values import at_least

GOALS = ("tokens", "first-token", "total")


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """Arguments of `crossdock simulate`."""
    parser.add_argument("model", nargs="?", metavar="MODEL",
                        help="GGUF file (its header is enough), config.json or its folder, or a preset: "
                        "llama-3.2-11b-vision, llama-3.2-90b-vision, smollm2-135m (default: the bundled "
                        "demo model)")  # fmt: skip
    add_machine(parser.add_argument_group("machine"))
    add_request(parser.add_argument_group("request"))
    add_layout(parser.add_argument_group("what lies where"))
    add_questions(parser.add_argument_group("what to find out"))
    add_published(parser.add_argument_group("published measurements"))
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON document instead of tables")


def add_machine(group: argparse._ArgumentGroup) -> None:
    """What the model is to run on."""
    group.add_argument("--system", metavar="TOML", help="devices in priority order, the host's CPU last")
    group.add_argument("--network", default="pcie4x16", metavar="TOML|LINK",
                       help="links between them, or one kind of link for all (default: %(default)s)")  # fmt: skip
    group.add_argument("--parallel", action="store_true", help="4 copies of every input: micro-batches overlap")
    group.add_argument("--op-offload", action=argparse.BooleanOptionalAction, default=True,
                       help="devices may take ops whose weights lie in host memory")  # fmt: skip
    group.add_argument("--share-scheduler", action=argparse.BooleanOptionalAction, default=True,
                       help="vision and language graphs on one scheduler")  # fmt: skip
    group.add_argument("--seed", type=at_least(0), default=0, metavar="S", help="of the links' jitter, and of --splits")


def add_request(group: argparse._ArgumentGroup) -> None:
    """What it is to do."""
    group.add_argument("--images", type=at_least(0), metavar="N",
                       help="0: text, cross layers left out (default: 1, of a model that takes images)")  # fmt: skip
    group.add_argument("--prompt", type=at_least(1), default=512, metavar="N", help="tokens of the prompt")
    group.add_argument("-n", "--predict", type=at_least(0), default=128, metavar="N", help="tokens after it")
    group.add_argument("-ub", "--ubatch", type=at_least(1), default=512, metavar="N", help="prompt tokens at a time")
    group.add_argument("--batch", type=at_least(1), default=1, metavar="N", help="sequences that are decoded together")
    group.add_argument("--requests", type=at_least(1), default=1, metavar="N",
                       help="requests under way at once, each with caches of its own")  # fmt: skip
    group.add_argument("-c", "--ctx-size", type=at_least(0), default=0, metavar="N",
                       help="positions of a sequence's cache, 0: as many as are needed, at least 4096")  # fmt: skip
    group.add_argument("--weights-type", action="append", default=[], metavar="[PART=]TYPE",
                       help="type of the matrices of a preset or config.json, as in crossdock plan")  # fmt: skip


def add_questions(group: argparse._ArgumentGroup) -> None:
    """What is asked beyond one prediction."""
    group.add_argument("--sweep", metavar="KEY=VALUES,...",
                       help="every combination, such as n-gpu-layers=0..40,batch=1,4,16; --plot draws it")  # fmt: skip
    group.add_argument("--search", nargs="?", const="tokens", choices=GOALS, metavar="GOAL",
                       help="the best device order, layers and split for tokens (per second, default), first-token or "
                       "total")  # fmt: skip
    group.add_argument("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev or chrome://tracing")
    group.add_argument("--check", action="store_true", help="check conservation laws while simulating")
    group.add_argument("-q", "--quiet", action="store_true", help="times and rates alone")


def add_published(group: argparse._ArgumentGroup) -> None:
    """Arguments that compare the models of hardware with what others have measured."""
    group.add_argument("--published", metavar="CSV", help="predict each row of a table of published rates")
    group.add_argument("--splits", action="store_true",
                       help="fit to half of the table's devices, judge on the others, 20 times")  # fmt: skip
    group.add_argument("--plot", metavar="FILE", help="draw a sweep, or measured against predicted: SVG or PNG")


def add_hardware(parser: argparse.ArgumentParser) -> None:
    """Arguments of `crossdock devices`."""
    parser.add_argument("--system", metavar="TOML", help="the devices of this file instead of the presets")
    parser.add_argument("--network", metavar="TOML|LINK", help="the links of this file, or one, instead of the presets")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
