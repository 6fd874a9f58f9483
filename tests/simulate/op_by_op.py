"""Published rates of single devices op by op: `python tests/simulate/op_by_op.py` compares them with the laws."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median

from machines import PCIE, host, machine

from coordinator.model.hparams import ModelParams, RopeParams, TextParams
from coordinator.model.presets import Blueprint, make_weights
from coordinator.simulate.cases import Case
from coordinator.simulate.engine import simulate
from coordinator.simulate.hardware import DeviceModel, Work
from coordinator.simulate.known import constants
from coordinator.simulate.law import device_of
from coordinator.simulate.lowered import time_program
from coordinator.simulate.machine import make_machine
from coordinator.simulate.models import _known
from coordinator.simulate.rates import LAST_LOGITS, spared_weights
from coordinator.simulate.series import Load, Options, Series, make_series
from coordinator.simulate.verdicts import Outcome, predict_table
from protocol.dtypes import DType

TABLE = Path(__file__).parents[2] / "benchmarks" / "published" / "rates.csv"
GROUPS = tuple(f"{kind} {cls}" for kind in ("prompt", "decode") for cls in ("nvidia", "apple", "amd"))
LONGEST = 8192
"""Tokens of a test, its depth included: longer ones take long to plan and are few."""


def suited(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The rows of one device and a dense model whose dimensions are known."""
    return [
        o for o in outcomes
        if o.case is not None and o.group in GROUPS and o.case.mode == "one" and not o.case.load.guessed
        and o.case.test.n + o.case.test.depth <= LONGEST
    ]  # fmt: skip


def blueprint_of(case: Case) -> Blueprint:
    """The row's model in its main type, with as many weights as it has: the width of the MLP follows from them."""
    load, name = case.load, re.sub(r"[\s_]+", "-", case.row.model.strip().lower())
    family = _known(name)
    assert family is not None
    head = 128 if family.heads >= 2048 else 64
    embedding = family.vocab * family.embd
    layer = (load.weights - embedding) / family.layers
    n_ff = round((layer - 2 * (family.heads + family.kv) * family.embd) / (3 * family.embd) / 256) * 256
    text = TextParams(
        n_layer=family.layers, n_embd=family.embd, n_ff=n_ff, n_head=family.heads // head,
        n_head_kv=family.kv // head, head_dim=head, n_vocab=family.vocab, n_ctx_train=2 * LONGEST, rms_eps=1e-5,
        rope=RopeParams(n_dims=head, mode=0, freq_base=1e4), tied_output=family.tied,
    )  # fmt: skip
    params = ModelParams("llama", name, text, None, None)
    return Blueprint(params, make_weights(params, lambda _, shape: load.dtype if len(shape) > 1 else DType.F32))


@dataclass
class Planned:
    """Series by model, type and test: plans do not depend on how fast a device is."""

    series: dict[tuple[object, ...], Series] = field(default_factory=dict)

    def of(self, case: Case) -> Series:
        """A prompt of the test's length, or one token at the depth of its mean one."""
        test = case.test
        key = (case.row.model, case.load.dtype, test)
        if key not in self.series:
            depth = max(1, test.depth + test.n // 2)
            load = Load(test.n, 0, 0, test.ubatch) if test.kind == "prompt" else Load(depth, 1, 0)
            cards = machine(DeviceModel("gpu0", "nvidia", 0, 1e12, {"f16": 1e14}))
            self.series[key] = make_series(blueprint_of(case), cards, Options(), load)
        return self.series[key]

    def tokens_per_s(self, case: Case) -> float:
        """The row's rate with every op of its plan counted for itself."""
        series, spec = self.of(case), case.specs[0]
        law = device_of(spec, constants(spec.cls), case.row.year, flash=case.flash)
        cards = make_machine([replace(law, name="gpu0"), host()], lambda source, target: PCIE)
        jobs = [job for job in series.jobs if job.tag == ("prompt" if case.test.kind == "prompt" else "token")]
        timed = [time_program(lowered, cards.models, cards.fabric) for lowered in series.lowered]
        end_s = simulate([True, False], cards.fabric, timed, [jobs]).end_s
        if case.test.kind == "decode":
            return 1 / end_s
        return case.test.n / (end_s + law.busy_s(_unspared(case)))


def _unspared(case: Case) -> Work:
    """What builds from before LAST_LOGITS multiplied besides: plans are those of later ones."""
    tokens = 0 if case.row.year >= LAST_LOGITS else case.test.n - len(range(0, case.test.n, case.test.ubatch))
    return Work("matmat", case.load.dtype, flops=int(2 * spared_weights(case.load) * tokens), op="MUL_MAT")


def errors(outcomes: Sequence[Outcome]) -> Mapping[str, list[float]]:
    """predicted / measured - 1, op by op, by group."""
    planned, found = Planned(), dict[str, list[float]]()
    for outcome in outcomes:
        assert outcome.case is not None
        found.setdefault(outcome.group, []).append(planned.tokens_per_s(outcome.case) / outcome.row.tps - 1)
    return found


def main() -> None:
    rows = suited(predict_table(TABLE))
    found = errors(rows)
    print("group          rows  law: mean |error|  median  op by op: mean |error|  median")
    for group in GROUPS:
        law = [o.error for o in rows if o.group == group and o.error is not None]
        ops = found[group]
        print(f"{group:14} {len(ops):4} {mean(map(abs, law)):18.1%} {median(law):+7.1%} "
              f"{mean(map(abs, ops)):23.1%} {median(ops):+7.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
