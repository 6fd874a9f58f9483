"""Why a split starts where it does, in words: the scheduler's cause with the names behind it."""

from __future__ import annotations

from coordinator.graph.node import ABSENT, Tensor
from coordinator.schedule.plan import Device, Plan
from protocol.ops import Op, Usage


def first_node(plan: Plan, number: int) -> Tensor | None:
    """The node that started split `number`; views start none. None for a graph of nothing but views."""
    split = plan.splits[number]
    nodes = (plan.graph.tensors[ident] for ident in plan.graph.nodes[split.start : split.end])
    return next((tensor for tensor in nodes if not tensor.is_view_op), None)


def because(plan: Plan, number: int) -> str:
    """`blk.0.attn_q.weight is host memory, batch 512 >= 32: offloaded (1.off)`."""
    node, split = first_node(plan, number), plan.splits[number]
    if node is None:
        return "nothing but views"
    cause = plan.cause[node.id]
    text = f"{_reason(plan, node, cause, plan.devices[split.backend])} ({cause})"
    extra = _same_device(plan, node, split.cause)
    return text if extra is None else f"{text}; {extra} ({split.cause})"


def _same_device(plan: Plan, node: Tensor, cause: str) -> str | None:
    """Why a split starts though the device stays."""
    if cause == "5.full":
        return "the split before has all the inputs it can take"
    if cause != "5.weight":
        return None
    backend = plan.backend[node.id]
    name = next((t.name for t in _sources(plan, node) if _is_weight(t) and plan.backend[t.id] != backend), "a weight")
    return f"works on a copy of {name}"


def _reason(plan: Plan, node: Tensor, cause: str, device: Device) -> str:
    tensors = plan.graph.tensors
    if cause.startswith("1.wgt"):
        weight = tensors[node.src[int(cause.removeprefix("1.wgt"))]]
        return f"{weight.name} lies on {_home(plan, weight)}"
    if cause == "1.off":
        weight = next(t for t in _sources(plan, node) if _is_weight(t))
        return f"{weight.name} is host memory, batch {_batch(node)} >= {device.offload_min_batch}: offloaded"
    if cause in ("1.dst", "1.vsrc", "4.vsrc") and node.view_src is not None:
        return f"{_called(node)} writes to {tensors[node.view_src].name} on {_home(plan, tensors[node.view_src])}"
    unable = [d.name for d in plan.devices if node.op.name in d.unsupported_ops]
    if cause in ("2.sup", "3.best", "") and unable:
        return f"{node.op.name} does not run on {', '.join(unable)}"
    words = {
        "usr": f"{node.name} is bound to {device.name}",
        "1.dst": f"{node.name} lies on {device.name}",
        "1.inp": f"{node.name} is an input",
        "2.sup": f"{_called(node)} has no weight: it goes with its neighbours on {device.name}",
        "3.best": f"{device.name} can read most of what {node.name} needs",
        "3.upg": f"{device.name} reads the same memory and comes first",
        "4.cur": f"{node.name} is needed on {device.name}",
    }
    return words.get(cause, f"{node.name} was left to {device.name}")


def _called(node: Tensor) -> str:
    return node.op.name if not node.name or node.name.startswith("node_") else f"{node.op.name} {node.name}"


def _sources(plan: Plan, node: Tensor) -> list[Tensor]:
    return [plan.graph.tensors[ident] for ident in node.src if ident != ABSENT]


def _is_weight(tensor: Tensor) -> bool:
    return tensor.buffer is not None and tensor.buffer.usage == Usage.WEIGHTS


def _home(plan: Plan, tensor: Tensor) -> str:
    """The device in whose memory a tensor lies; its buffer type where that is no device's."""
    if tensor.buffer is None:
        return plan.devices[plan.backend[tensor.id]].name
    buft = tensor.buffer.buft
    return next((d.name for d in plan.devices if (d.buft or d.name) == buft), buft)


def _batch(node: Tensor) -> int:
    """Rows that a weight is used for, as the scheduler counts them."""
    if node.op == Op.GET_ROWS:
        return 0
    if node.op == Op.MUL_MAT:
        return node.ne[1]
    if node.op in (Op.MUL_MAT_ID, Op.ROPE):
        return node.ne[2]
    return node.ne[1] * node.ne[2] * node.ne[3]
