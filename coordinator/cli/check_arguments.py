"""Arguments of `crossdock check` and `crossdock scenario`."""

from __future__ import annotations

import argparse

from coordinator.cli.plan_arguments import add_devices, add_layout, add_model

MODES = ("faithful", "strict", "safe")


def add_check(parser: argparse.ArgumentParser) -> None:
    """Arguments of `crossdock check`."""
    add_model(parser)
    add_devices(parser.add_argument_group("devices"))
    add_layout(parser.add_argument_group("what lies where"))
    group = parser.add_argument_group("what is checked")
    group.add_argument("--ownership", choices=MODES, default="safe",
                       help="safe (default): the vision output is kept, as crossdock run does; faithful, strict: the "
                       "language graph reads it where the vision graph left it, as ggml does")  # fmt: skip
    group.add_argument("--alternatives", action=argparse.BooleanOptionalAction, default=None,
                       help="plan what would hide it: debug inputs, pins, layers (default: small graphs)")  # fmt: skip
    group.add_argument("--json", action="store_true", help="one JSON document instead of text")


def add_scenario(parser: argparse.ArgumentParser) -> None:
    """Arguments of `crossdock scenario`."""
    parser.add_argument("name", nargs="?", default="all", metavar="NAME", help="such as s1 or h14, a TOML file, or all")
    parser.add_argument("--ownership", choices=MODES, default=None, help="one mode (default: all three)")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")


def add_reproduce(parser: argparse.ArgumentParser) -> None:
    """Arguments of `crossdock reproduce`."""
    parser.add_argument("discussion", metavar="NUMBER", help="of llama.cpp: 10780")
    parser.add_argument("--cause", action="append", choices=("s1", "s2", "s3", "s4", "s5"),
                        help="a cause behind the symptom (default: s1); may be given several times")  # fmt: skip
    parser.add_argument("--ownership", action="append", choices=("safe", "strict", "faithful"),
                        help="only this mode; may be given several times (default: all three)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
