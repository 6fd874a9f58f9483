"""What `crossdock run` says around the answer: workers, model, plan, and the table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from coordinator.config import Topology
from coordinator.model.hparams import ModelParams, WeightInfo
from coordinator.report.text import plain, plural, show_bytes, show_time
from coordinator.runtime.evaluate import Shipped
from coordinator.runtime.generate import Timings
from coordinator.runtime.session import Session
from coordinator.schedule.links import sent_bytes
from protocol.timing import PS

_KIND = {"cpu": "host", "accel": "sim", "null": "computes nothing"}


def workers_line(topology: Topology, transport: str, plane: str) -> str:
    """`cpu0 (host, 2 threads)   accel0 (sim, 64 MiB)      ipc, one host`."""
    parts = []
    for spec in (topology.workers[-1], *topology.workers[:-1]):
        facts = [_KIND[spec.kind]]
        if spec.threads > 1:
            facts.append(plural(spec.threads, "thread"))
        if spec.memory is not None:
            facts.append(show_bytes(spec.memory))
        parts.append(f"{spec.name} ({', '.join(facts)})")
    how = "shared memory" if plane == "shared" else "messages"
    return "   ".join(parts) + f"      {transport}, {how}, one host"


def model_line(params: ModelParams, weights: Mapping[str, WeightInfo]) -> str:
    """`crossdock-demo q8_0, mllama, 1.6 M parameters: 5 text layers (cross 1, 3), 3+1 vision layers`."""
    count, by_type = 0, dict[str, int]()
    for info in weights.values():
        n = info.ne[0] * info.ne[1] * info.ne[2] * info.ne[3]
        count += n
        by_type[info.dtype.label] = by_type.get(info.dtype.label, 0) + n
    main = max(by_type, key=lambda label: by_type[label])
    size = f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
    text = f"{plain(params.name)} {main}, {params.arch}, {size} parameters: {params.text.n_layer} text layers"
    if params.text.cross_layers:
        text += f" (cross {', '.join(map(str, params.text.cross_layers))})"
    if params.vision is not None:
        text += f", {params.vision.n_layer}+{params.vision.n_global} vision layers"
    return text


def plan_line(timings: Timings) -> str:
    """`vision 3 splits, language 3 splits; 61.4 KiB cross the docks per image, 1.5 KiB per token`."""
    graphs, costs = [], []
    if timings.vision is not None:
        graphs.append(f"vision {plural(len(timings.vision.plan.splits), 'split')}")
        costs.append(f"{show_bytes(_crossing(timings.vision))} cross the docks per image")
    if timings.prompt is not None:
        graphs.append(f"language {plural(len(timings.prompt.plan.splits), 'split')}")
        costs.append(f"{show_bytes(_crossing(timings.prompt))} per prompt")
    if timings.decode is not None:
        costs.append(f"{show_bytes(_crossing(timings.decode))} per token")
    return ", ".join(graphs) + "; " + ", ".join(costs)


def _crossing(shipped: Shipped) -> int:
    return sum(sent_bytes(shipped.lowered).values())


def speed_line(timings: Timings, first_token_ns: int) -> str:
    """`encode 12 ms · prompt 23 tokens 9 ms · 12 tokens, 410/s · first token 0.9 s after start`."""
    parts = []
    if timings.digests:
        parts.append(f"encode {show_time(timings.encode_ns)}")
    parts.append(f"prompt {plural(timings.n_prompt, 'token')} {show_time(timings.prompt_ns)}")
    if timings.n_decoded:
        parts.append(f"{plural(timings.n_decoded + 1, 'token')}, {timings.tokens_per_second:,.0f}/s")
    if timings.n_made:
        parts.append(f"first token {first_token_ns / 1e9:.1f} s after start")
    return " · ".join(parts)


def virtual_line(timings: Timings, devices: Sequence[str]) -> str:
    """`on the modelled gpu0, cpu: encode 1.52 ms · prompt 15 tokens 1.07 ms`, by the virtual clock."""
    parts = []
    if timings.digests:
        parts.append(f"encode {_ms(timings.encode_ps)}")
    parts.append(f"prompt {plural(timings.n_prompt, 'token')} {_ms(timings.prompt_ps)}")
    if timings.n_decoded and timings.decode_ps:
        parts.append(f"{plural(timings.n_decoded + 1, 'token')}, {timings.n_decoded * PS / timings.decode_ps:,.0f}/s")
    return f"on the modelled {', '.join(devices)}: " + " · ".join(parts)


def _ms(ps: int) -> str:
    return f"{ps / 1e9:.3g} ms"


def virtual_document(timings: Timings, devices: Sequence[str]) -> dict[str, Any]:
    """The virtual clock's times for programs."""
    return {
        "devices": list(devices),
        "encode_ms": timings.encode_ps / 1e9,
        "prompt_ms": timings.prompt_ps / 1e9,
        "decode_ms": timings.decode_ps / 1e9,
    }


def kept_line(session: Session) -> str:
    """What safe ownership keeps for the language graph, "" for nothing."""
    kept = sum(budget.parts.get("kept", 0) for budget in session.budgets)
    return f"kept for the language graph: vision_output {show_bytes(kept)} (safe ownership)" if kept else ""


def graphs_table(timings: Timings, names: Sequence[str]) -> Table:
    """Splits per graph, and bytes per link and evaluation."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in ("graph", "nodes", "splits", "where", "bytes per link and evaluation"):
        table.add_column(header, justify="right" if header in ("nodes", "splits") else "left")
    for label, shipped in (("vision", timings.vision), ("prompt", timings.prompt), ("token", timings.decode)):
        if shipped is not None:
            where = dict.fromkeys(names[split.backend] for split in shipped.plan.splits)
            links = [f"{names[a]} -> {names[b]} {show_bytes(n)}" for (a, b), n in sent_bytes(shipped.lowered).items()]
            nodes, splits = len(shipped.plan.graph.nodes), len(shipped.plan.splits)
            table.add_row(label, str(nodes), str(splits), ", ".join(where), ", ".join(links) or "-")
    return table


def memory_table(session: Session, peaks: Sequence[int]) -> Table:
    """Bytes per worker and purpose, against the worker's limit, and what the whole process has used at most."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("weights", "KV", "kept", "compute")
    for header in ("worker", *columns, "total", "limit", "process"):
        table.add_column(header, justify="left" if header == "worker" else "right")
    workers = zip(session.topology.workers, session.budgets, peaks, strict=True)
    for spec, budget, peak in workers:
        parts = [show_bytes(budget.parts[c]) if budget.parts.get(c) else "-" for c in columns]
        if spec.name == session.topology.workers[-1].name and not budget.parts.get("weights"):
            parts[0] = "mapped"
        limit = "-" if spec.memory is None else show_bytes(spec.memory)
        table.add_row(spec.name, *parts, show_bytes(budget.total), limit, show_bytes(peak))
    return table


def run_document(
    session: Session, timings: Timings, tokens: Sequence[int], text: str, first_token_ns: int, peaks: Sequence[int]
) -> dict[str, Any]:
    """The same facts for programs (`--json`)."""
    names = session.topology.names
    graphs = {"vision": timings.vision, "prompt": timings.prompt, "token": timings.decode}
    machine = None if session.stopwatch is None else session.stopwatch.machine
    return {
        "model": {"file": session.model.path.name, "arch": session.params.arch, "name": session.params.name},
        "text": text,
        "stop": timings.stop,
        "tokens": list(tokens),
        "embeddings_sha256": timings.digests,
        "workers": [
            {
                "name": spec.name,
                "kind": spec.kind,
                "threads": spec.threads,
                "limit": spec.memory,
                "bytes": budget.parts,
                "process_bytes": peak,
            }
            for spec, budget, peak in zip(session.topology.workers, session.budgets, peaks, strict=True)
        ],
        "graphs": {
            label: {
                "nodes": len(shipped.plan.graph.nodes),
                "splits": len(shipped.plan.splits),
                "links": [
                    {"from": names[a], "to": names[b], "bytes": n} for (a, b), n in sent_bytes(shipped.lowered).items()
                ],
            }
            for label, shipped in graphs.items()
            if shipped is not None
        },
        "timings": {
            "encode_ms": timings.encode_ns / 1e6,
            "prompt_ms": timings.prompt_ns / 1e6,
            "prompt_tokens": timings.n_prompt,
            "decode_ms": timings.decode_ns / 1e6,
            "decoded_tokens": timings.n_decoded,
            "first_token_ms": first_token_ns / 1e6,
        },
        **({} if machine is None else {"virtual": virtual_document(timings, machine.names)}),
    }
