"""What the symptom of a run's finding depends on: the same run planned with other layers and debug tensors."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from coordinator.model.presets import Blueprint
from coordinator.ownership.check import alternatives, check_sequence, explain
from coordinator.ownership.facts import Finding
from coordinator.ownership.programs import model_alternatives, model_sequence
from coordinator.runtime.session import KV_PADDING, Session
from coordinator.schedule.outline import Setting

SMALL = 2000
"""Nodes of all graphs up to which alternatives are planned: a second or so."""


def explain_run(session: Session, finding: Finding, n_prompt: int) -> Finding:
    """The finding with what would hide it, or show it when it is hidden now; as it is when plans do not show it.

    `n_prompt` are the tokens of the run's first prompt batch.
    """
    n_tokens = min(n_prompt, session.options.n_ubatch)
    options = session.options
    setting = Setting(
        devices=session.devices,
        limits=tuple(spec.memory for spec in session.topology.workers),
        placement=options.placement,
        n_images=session.n_images,
        n_tokens=n_tokens,
        n_ctx=session.n_ctx,
        n_kv=min(session.n_ctx, -(-n_tokens // KV_PADDING) * KV_PADDING),
        kv_dtype=options.kv_dtype,
        debug=options.debug,
        share_scheduler=options.share_scheduler,
        op_offload=False,
    )
    blueprint = Blueprint(session.params, session.model.weights)
    sequence = model_sequence(blueprint, setting, safe=False)
    if sum(len(spec.graph.nodes) for spec in sequence.graphs.values()) > SMALL:
        return finding
    planned = [
        f for f in check_sequence(sequence) if f.kind is finding.kind and _bare(f.tensor) == _bare(finding.tensor)
    ]
    if not planned:
        return finding
    told = explain(planned[:1], chain(alternatives(sequence), model_alternatives(blueprint, setting)))[0]
    return replace(finding, hidden_by=told.hidden_by, shown_by=told.shown_by)


def _bare(tensor: str) -> str:
    return tensor.rpartition(".")[2]
