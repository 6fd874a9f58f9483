"""Many random documents against real ggml: `python -m tests.conformance.long --documents 20000 --seed 1`."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from protocol.errors import CrossdockError
from tests.conformance.compare import RescueError, differences, plan_ours
from tests.conformance.documents import random_document
from tests.conformance.server import RealServer

REGRESSIONS = Path(__file__).parent / "regressions"


def compare(server: RealServer, doc: dict[str, Any]) -> tuple[str, list[str]]:
    """Plan a document both ways: how it went, and the differences.

    Where one side refuses (we with an error, ggml by aborting), the other one has to refuse as well.
    """
    try:
        ours: list[dict[str, Any]] | str = plan_ours(doc)
    except RescueError:
        return "undefined", []
    except CrossdockError as error:
        ours = str(error)
    real = server.plan(doc)
    if isinstance(real, str) and "ggml-impl.h:318" in real:
        # Roots of views that are no part of the graph fill ggml's hash table, which is sized without them.
        return "undefined", []
    if isinstance(ours, str) or isinstance(real, str):
        if isinstance(ours, str) and isinstance(real, str) and _same_reason(ours, real):
            return "refused", []
        return "differs", [f"ours: {_short(ours)}; ggml: {_short(real)}"]
    found = differences(ours, real, len(doc["devices"]))
    return ("differs" if found else "same"), found


REASONS = (
    ("pre-allocated tensor", "pre-allocated tensor"),
    ("no device supports", "*cur_backend_id != -1"),
    ("lies in no buffer", "buffer_id >= 0"),
    ("still allocated", "!sched->is_alloc"),
    ("neither allocated nor part", "src_backend_id != -1"),
)
"""Our words and ggml's for the same refusal."""


def _short(result: list[dict[str, Any]] | str) -> str:
    return result if isinstance(result, str) else "planned"


def _same_reason(ours: str, real: str) -> bool:
    return any(a in ours and b in real for a, b in REASONS)


def main() -> int:
    """Compare and print a summary line; the status is 1 if anything differed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stop-after", type=int, default=10, help="differing documents")
    parser.add_argument("--keep", action="store_true", help="write differing documents as regressions")
    args = parser.parse_args()
    server = RealServer()
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    for k in range(args.documents):
        doc = random_document(random.Random(args.seed * 1_000_003 + k))
        outcome, found = compare(server, doc)
        counts[outcome] += 1
        counts["graphs"] += len(doc["graphs"])
        counts["tensors"] += sum(len(g["tensors"]) for g in doc["graphs"])
        if found:
            print(f"document {k} of seed {args.seed}: {found[0]}", file=sys.stderr)
            if args.keep:
                (REGRESSIONS / f"seed{args.seed}-{k}.json").write_text(json.dumps(doc))
            if counts["differs"] >= args.stop_after:
                break
    server.close()
    print(
        f"conformance: {args.documents} documents, {counts['graphs']} graphs, "
        f"{counts['tensors']} tensors: {counts['differs']} differ, {counts['refused']} refused by both, "
        f"{counts['undefined']} undefined in ggml "
        f"(seed {args.seed}, {time.perf_counter() - start:.0f} s)"
    )
    return 1 if counts["differs"] else 0


if __name__ == "__main__":
    sys.exit(main())
