"""What `crossdock simulate --search` says: the placement, and what keeps it from being faster."""

from __future__ import annotations

from typing import Any

from coordinator.report.simulate import cause_lines, prediction_document
from coordinator.report.text import plain, plural, show_bytes
from coordinator.simulate.predict import Phase
from coordinator.simulate.search import Found


def search_line(found: Found) -> str:
    """`--n-gpu-layers 41 --tensor-split 21,20, devices gpu1, gpu0   (57 placements simulated)`."""
    command = f"--n-gpu-layers {found.n_gpu_layers}"
    if len(found.counts) > 1 and found.n_gpu_layers:
        command += f" --tensor-split {','.join(map(str, found.counts))}"
    order = f", devices in the order {', '.join(found.order)}" if len(found.order) > 1 else ""
    return plain(f"{command}{order}   ({plural(found.n_tried, 'placement')} simulated)")


def limit_lines(found: Found) -> list[str]:
    """What keeps it from being faster: memory, else where the time goes."""
    if found.limits:
        return [
            f"memory of {plain(limit.device)}: a layer more would be faster and takes {show_bytes(limit.needed)}, "
            f"{show_bytes(limit.free)} are free"
            for limit in found.limits
        ]
    phase = _goal_phase(found)
    return [f"{phase.tag}: {plain(line.strip())}" for line in cause_lines(found.prediction, phase)[:2]]


def _goal_phase(found: Found) -> Phase:
    """The phase that takes most of what was searched to be short."""
    wanted = {"tokens": ("token",), "first-token": ("vision", "prompt")}.get(found.goal, ())
    phases = found.prediction.phases
    return max([phase for phase in phases if phase.tag in wanted] or phases, key=lambda phase: phase.seconds)


def search_document(found: Found) -> dict[str, Any]:
    """The answer of a search for programs."""
    return {
        "order": list(found.order),
        "n_gpu_layers": found.n_gpu_layers,
        "tensor_split": list(found.counts),
        "placements": found.n_tried,
        "limits": limit_lines(found),
        **prediction_document(found.prediction),
    }
