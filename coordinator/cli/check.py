"""`crossdock check`: lifetime hazards of graphs that share a scheduler, found before anything runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import chain

from coordinator.cli import options
from coordinator.cli.documents import from_document
from coordinator.cli.plan import setting_of
from coordinator.ownership.check import Alternative, alternatives, check_plans, explain
from coordinator.ownership.loans import check_loans
from coordinator.ownership.programs import document_sequence, model_alternatives, model_sequence
from coordinator.ownership.sequence import Sequence
from coordinator.report.plan import answer
from coordinator.report.story import finding_document, print_findings, summary
from protocol.errors import Exit, UsageError

SMALL = 2000
"""Nodes of all graphs up to which alternatives are planned unless told otherwise: a second or so."""


def check(chosen: argparse.Namespace) -> int:
    """List hazards; exits with FOUND when there are some."""
    if chosen.graph is not None:
        if chosen.model is not None:
            raise UsageError(f"--graph {chosen.graph} and MODEL do not go together: the document says everything")
        _, sequence = from_document(chosen.graph, document_sequence)
        more: Iterator[Alternative] = iter(())
    else:
        sequence, more = _model(chosen)
    plans, findings = check_plans(sequence)
    findings += tuple(found for plan in plans for found in check_loans(plan))
    if _is_small(sequence) if chosen.alternatives is None else chosen.alternatives:
        findings = explain(findings, chain(alternatives(sequence), more))
    if chosen.json:
        document = {"graphs": list(sequence.graphs), "findings": [finding_document(f) for f in findings]}
        print(json.dumps(document, ensure_ascii=False))
    else:
        with answer() as console:
            print_findings(console, findings)
            if findings:
                console.print()
            console.print(summary(findings, len(sequence.graphs)))
    return Exit.FOUND if findings else Exit.OK


def _is_small(sequence: Sequence) -> bool:
    return sum(len(spec.graph.nodes) for spec in sequence.graphs.values()) <= SMALL


def _model(chosen: argparse.Namespace) -> tuple[Sequence, Iterator[Alternative]]:
    blueprint = options.blueprint(chosen)
    setting = setting_of(chosen)
    sequence = model_sequence(blueprint, setting, safe=chosen.ownership == "safe")
    return sequence, model_alternatives(blueprint, setting)
