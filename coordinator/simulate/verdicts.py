"""A whole table of published rates: each row's prediction or why there is none, and how the groups came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from coordinator.simulate.cases import Case, case_of
from coordinator.simulate.claims import NO_CLAIM, fault_of, group_of
from coordinator.simulate.fit import Measured
from coordinator.simulate.hosts import find_host, known_hosts
from coordinator.simulate.known import anchor_name, calibrated
from coordinator.simulate.published import Row, read_rows
from coordinator.simulate.rates import Ask, tokens_per_s
from protocol.errors import InputError


@dataclass(frozen=True, slots=True)
class Outcome:
    """One row. `predicted` in tokens/s, None when `why` says why not; `group` as in claims, "fault" for unfair rows."""

    row: Row
    case: Case | None
    predicted: float | None
    group: str
    why: str

    @property
    def error(self) -> float | None:
        """predicted / measured - 1, None without a prediction."""
        return None if self.predicted is None else self.predicted / self.row.tps - 1.0


@dataclass(frozen=True, slots=True)
class GroupFigures:
    """How a group of rows came out: errors are fractions, `bias` the median of the signed ones."""

    group: str
    n: int
    mape: float
    bias: float
    within: float


def predict_table(path: Path) -> list[Outcome]:
    """Every row of a table. Raises InputError for a file that is no table of rates."""
    ask = Ask()
    return [_outcome(row, ask) for row in read_rows(path)]


def measured_cases(outcomes: Sequence[Outcome]) -> list[Measured]:
    """The rows that can be predicted, for fitting and judging."""
    return [Measured(o.case, o.row.tps) for o in outcomes if o.case is not None]


def figures(outcomes: Sequence[Outcome]) -> list[GroupFigures]:
    """By group in alphabetical order; rows without a prediction are not in it."""
    groups: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            groups.setdefault(outcome.group, []).append(outcome.error)
    return [
        GroupFigures(group, len(e), mean(abs(x) for x in e), median(e), mean(abs(x) <= 0.15 for x in e))
        for group, e in sorted(groups.items())
    ]


def reasons(outcomes: Sequence[Outcome]) -> Mapping[str, int]:
    """Why rows were not predicted, or count for nothing, and how many."""
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        if outcome.predicted is None or outcome.group == "fault":
            counts[outcome.why] += 1
        elif outcome.group in NO_CLAIM:
            counts[f"no promise: {NO_CLAIM[outcome.group]}"] += 1
    return dict(counts.most_common())


def _outcome(row: Row, ask: Ask) -> Outcome:
    try:
        case = case_of(row)
    except InputError as error:
        return Outcome(row, None, None, "none", str(error))
    fault = fault_of(case)
    group = "fault" if fault else group_of(case)
    return Outcome(row, case, tokens_per_s(case, ask), group if _calibrated(case, group) else "unmeasured", fault)


def _calibrated(case: Case, group: str) -> bool:
    """Whether the calibration that a promise asks for is there."""
    row = case.row
    if group == "decode cpu":
        return case.specs[0].name in calibrated()
    if group == "decode offload":
        return find_host(known_hosts(), row.hardware, row.model) is not None
    if group == "decode rpc":
        return all(anchor_name(spec.name, row.model, row.quant) in calibrated() for spec in case.specs)
    return True
