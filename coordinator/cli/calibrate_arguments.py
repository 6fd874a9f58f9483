"""Arguments of `crossdock calibrate`."""

from __future__ import annotations

import argparse

from coordinator.cli.values import at_least


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Where to write, and what to describe."""
    parser.add_argument("-o", "--output", required=True, metavar="TOML",
                        help="the system; the networks go to NAME-network.toml and NAME-messages.toml")  # fmt: skip
    parser.add_argument("-w", "--workers", metavar="KIND:N[:MEMORY],...",
                        help="workers that the system is to have, as in run (default: cpu:1,accel:2)")  # fmt: skip
    parser.add_argument("-t", "--threads", type=at_least(1), default=1, metavar="N",
                        help="threads of each worker (default: %(default)s)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="four types of weights, fewer samples")
