"""What `crossdock reproduce` prints: a table of answers per cause and ownership, and the stories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from coordinator.ownership.facts import Finding
from coordinator.report.story import finding_document, print_findings
from coordinator.report.text import plain
from coordinator.runtime.reproduce import Cause, Outcome


@dataclass(frozen=True, slots=True)
class Result:
    """A cause in one mode of ownership."""

    cause: Cause
    ownership: str
    right: str
    outcomes: tuple[Outcome, ...]

    def is_wrong(self, outcome: Outcome) -> bool:
        """True when a run that was not stopped says something else than it should."""
        return outcome.finding is None and outcome.answer != self.right


def print_result(console: Console, result: Result) -> None:
    """A row per run, then the first story."""
    scheduler = "one scheduler" if result.cause.share_scheduler else "a scheduler for each graph"
    console.print(f"[bold]{result.cause.ident.upper()}[/]  {plain(result.cause.title)}")
    heading = f"{scheduler}, {result.ownership} ownership"
    width = max(len(heading) - 2, *(len(_label(outcome)) for outcome in result.outcomes)) + 2
    console.print(f"{heading:<{width + 2}}  embeddings   answer")
    for outcome in result.outcomes:
        digest = f"{outcome.embeddings[:4]}...{outcome.embeddings[-2:]}" if outcome.embeddings else "-"
        text = _answer(outcome)
        mark = "   [bold]<- wrong[/]" if result.is_wrong(outcome) else ""
        console.print(f"  {_label(outcome):<{width}}  {digest:<11}  {plain(text)}{mark}")
    if any(result.is_wrong(outcome) for outcome in result.outcomes):
        console.print(plain(result.cause.moral))
    told = stories(result.outcomes)
    if told:
        console.print()
        print_findings(console, told[:1])


def stories(outcomes: Sequence[Outcome]) -> list[Finding]:
    """Findings that bytes bear out first."""
    found = [outcome.finding for outcome in outcomes if outcome.finding is not None]
    return sorted(found, key=lambda f: f.latent)


def result_document(result: Result) -> dict[str, Any]:
    """The same facts for programs."""
    return {
        "cause": result.cause.ident,
        "title": result.cause.title,
        "ownership": result.ownership,
        "right": result.right,
        "runs": [
            {
                "label": outcome.variant.label,
                "n_gpu_layers": outcome.variant.n_gpu_layers,
                "debug_tensors": list(outcome.variant.debug),
                "pins": [list(pin) for pin in outcome.variant.pins],
                "embeddings_sha256": outcome.embeddings,
                "answer": outcome.answer,
                "wrong": result.is_wrong(outcome),
                "finding": None if outcome.finding is None else finding_document(outcome.finding),
            }
            for outcome in result.outcomes
        ],
    }


def _label(outcome: Outcome) -> str:
    layers = f"n-gpu-layers {outcome.variant.n_gpu_layers}"
    return f"{outcome.variant.label}, {layers}" if outcome.variant.label else layers


def _answer(outcome: Outcome) -> str:
    if outcome.finding is None:
        return outcome.answer
    kind = str(outcome.finding.kind).replace("-", " ")
    return f"stopped: {kind}{' (its bytes are intact, by luck)' if outcome.finding.latent else ''}"
