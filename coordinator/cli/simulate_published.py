"""`crossdock simulate --published`: published rates against what the models of hardware predict for them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from coordinator.report.rates import (
    groups_table,
    judged_points,
    outcome_points,
    plot_rates,
    reasons_table,
    row_record,
    rows_table,
    verdict_record,
    verdicts_table,
)
from coordinator.simulate.judge import HELD_OUT, N_SPLITS, judge
from coordinator.simulate.verdicts import Outcome, figures, measured_cases, predict_table, reasons
from protocol.errors import Exit, InputError, UsageError

_NOTE = (
    "The shipped constants are fitted to the table in benchmarks/published: for rows of that table these errors are "
    "those of a fit. --splits judges on devices that a fit has not seen."
)


def simulate_published(chosen: argparse.Namespace) -> int:
    """Predict every row of the table, or with `--splits` judge the laws on unseen devices. Raises UsageError."""
    _check_questions(chosen)
    outcomes = predict_table(Path(chosen.published))
    if chosen.splits:
        return _splits(outcomes, chosen)
    if chosen.plot:
        plot_rates(Path(chosen.plot), outcome_points(outcomes), "published rates, by the shipped constants")
    if chosen.json:
        print(json.dumps([row_record(outcome) for outcome in outcomes]))
        return Exit.OK
    console = _console()
    console.print(rows_table(outcomes))
    console.print()
    console.print(groups_table(figures(outcomes)))
    _print_reasons(console, outcomes)
    console.print(f"\n{_NOTE}")
    return Exit.OK


def _check_questions(chosen: argparse.Namespace) -> None:
    """Refuse what would have no effect: rows say themselves what they are about. Raises UsageError."""
    if chosen.model is not None:
        raise UsageError(f"--published {chosen.published}: its rows name their models: leave {chosen.model} out")
    for name in ("system", "sweep", "search", "trace"):
        if getattr(chosen, name) is not None:
            raise UsageError(f"--published and --{name} are two answers: choose one")


def _splits(outcomes: list[Outcome], chosen: argparse.Namespace) -> int:
    cases = measured_cases(outcomes)
    if len({m.case.row.hardware for m in cases}) < 4:
        raise InputError(f"{chosen.published}: --splits needs rows of at least 4 devices")
    verdicts, judged = judge(cases, seed=chosen.seed, progress=_progress)
    if chosen.plot:
        plot_rates(Path(chosen.plot), judged_points(judged), f"published rates, on devices not seen by the fit "
                   f"(median of {N_SPLITS} splits)")  # fmt: skip
    if chosen.json:
        print(json.dumps({"splits": N_SPLITS, "held_out": HELD_OUT, "promises": [verdict_record(v) for v in verdicts],
                          "left_out": dict(reasons(outcomes))}))  # fmt: skip
        return Exit.OK
    console = _console()
    console.print(
        f"{N_SPLITS} random splits (seed {chosen.seed}); constants fitted to {1 - HELD_OUT:.0%} of each class's "
        "devices, mean |error| on the rows of the others:\n"
    )
    console.print(verdicts_table(verdicts))
    _print_reasons(console, outcomes)
    return Exit.OK


def _print_reasons(console: Console, outcomes: list[Outcome]) -> None:
    found = reasons(outcomes)
    if found:
        console.print()
        console.print(reasons_table(found))


def _progress(done: int) -> None:
    if sys.stderr.isatty():
        print(f"\rsplit {done} of {N_SPLITS}", end="\n" if done == N_SPLITS else "", file=sys.stderr, flush=True)


def _console() -> Console:
    """Tables keep their width where nobody looks at a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)
