"""Tensors of running graphs, looked at without moving an offset: their values, their statistics, their bytes' hash."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from coordinator.graph.node import ABSENT, Dims, Graph, Tensor
from coordinator.schedule.lower import Lowered, TapPoint
from protocol.dtypes import DType
from protocol.errors import CapacityError, InputError, UsageError
from protocol.limits import MAX_BUFFER_NBYTES

Values = npt.NDArray[Any]

_NUMPY = {
    DType.F32: np.float32, DType.F16: np.float16, DType.BF16: np.uint16, DType.F64: np.float64,
    DType.I8: np.int8, DType.I16: np.int16, DType.I32: np.int32, DType.I64: np.int64,
}  # fmt: skip
"""Element types; those of quantised tensors are whole blocks."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_NAME_LENGTH = 80


@dataclass(frozen=True, slots=True)
class Patterns:
    """Regular expressions of which one has to occur in a tensor's name."""

    texts: tuple[str, ...]
    compiled: tuple[re.Pattern[str], ...]

    def __call__(self, tensor: Tensor) -> bool:
        """True for a tensor that is wanted."""
        return any(pattern.search(tensor.name) for pattern in self.compiled)


def compile_patterns(texts: Sequence[str]) -> Patterns:
    """Raises UsageError for what is no regular expression."""
    compiled = []
    for text in texts:
        try:
            compiled.append(re.compile(text))
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(f"--dump-tensor {text}: no regular expression: {error}") from None
    return Patterns(tuple(texts), tuple(compiled))


def check_patterns(patterns: Patterns, graphs: Sequence[Graph]) -> None:
    """Raises UsageError for a pattern that no node or input of any graph matches."""
    names = {g.tensors[i].name for g in graphs for i in (*g.nodes, *g.leafs) if g.tensors[i].buffer is None}
    names |= {g.tensors[i].name for g in graphs for i in g.nodes}
    for text, pattern in zip(patterns.texts, patterns.compiled, strict=True):
        if not any(pattern.search(name) for name in names):
            where = " or ".join(dict.fromkeys(graph.name for graph in graphs))
            last = graphs[0].tensors[graphs[0].nodes[-1]].name
            raise UsageError(
                f"--dump-tensor {text}: matches no node or input of {where}; expected a regular expression for names "
                f"such as {last}"
            )


@dataclass(frozen=True, slots=True)
class Tap:
    """A tensor of one evaluation. `data` holds the bytes that it spans, strides included, in a step's reply.

    `evaluation` counts those of the graph from 1, `step` the fleet's. `node` is the index in the graph, -1 for inputs,
    which are looked at before split 0 (`split` is -1). `occurrence` counts tensors of the same name in one graph, from
    0. `unread` inputs are debug tensors: nobody has to set them. `sources` are the names of what the node reads.
    """

    graph: str
    evaluation: int
    step: int
    node: int
    split: int
    worker: str
    op: str
    name: str
    occurrence: int
    unread: bool
    sources: tuple[str, ...]
    dtype: DType
    ne: Dims
    nb: Dims
    data: memoryview

    def elements(self) -> Values:
        """Strided view in numpy's order of extents (ne reversed); BF16 as 16-bit words, rows of blocks as bytes."""
        ne, nb = self.ne[::-1], self.nb[::-1]
        if self.dtype.quantised:
            shape = (*ne[:-1], ne[-1] // self.dtype.block * self.dtype.block_nbytes)
            return np.ndarray(shape, np.uint8, self.data, 0, (*nb[:-1], 1))
        return np.ndarray(ne, _NUMPY[self.dtype], self.data, 0, nb)

    def values(self) -> Values:
        """Numbers in numpy's order of extents: as they lie where numpy has the type, else as float32."""
        raw = self.elements()
        if self.dtype is DType.BF16:
            return (raw.astype(np.uint32) << 16).view(np.float32)
        if self.dtype.quantised:
            found: Values = dequantize(np.ascontiguousarray(raw), GGMLQuantizationType(self.dtype))
            return found
        return raw

    def sha256(self) -> str:
        """Of the elements one behind the other, whatever their strides."""
        return hashlib.sha256(np.ascontiguousarray(self.elements()).data.cast("B")).hexdigest()


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of a tensor's values: the first four of those that are finite, None where none is; `std` is the population's."""

    min: float | None
    max: float | None
    mean: float | None
    std: float | None
    n_nan: int
    n_inf: int


def statistics(values: Values) -> Statistics:
    """Of values of any shape, in float64."""
    flat = np.ascontiguousarray(values).reshape(-1)
    n_nan = n_inf = 0
    if flat.dtype.kind == "f":
        finite = np.isfinite(flat)
        if not finite.all():
            n_nan = int(np.isnan(flat).sum())
            n_inf = len(flat) - n_nan - int(finite.sum())
            flat = flat[finite]
    if not len(flat):
        return Statistics(None, None, None, None, n_nan, n_inf)
    wide = flat.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # sums of the largest float64 may overflow
        found = [float(value) for value in (wide.min(), wide.max(), wide.mean(), wide.std())]
    lowest, highest, mean, deviation = (value if math.isfinite(value) else None for value in found)
    return Statistics(lowest, highest, mean, deviation, n_nan, n_inf)


@dataclass(frozen=True, slots=True)
class Watched:
    """The taps of a shipped program, with what is the same in each of its steps."""

    lowered: Lowered
    workers: tuple[str, ...]
    occurrences: tuple[int, ...]  # by tensor
    read: frozenset[int]  # tensors that a node reads or is a view of

    def taps(self, graph: str, evaluation: int, step: int, replies: Mapping[int, memoryview]) -> Iterator[Tap]:
        """Taps of a step in the plan's order. `replies`: the bytes of all taps of each worker, in program order."""
        at = dict.fromkeys(replies, 0)
        for point in self.lowered.taps:
            start = at[point.worker]
            at[point.worker] = start + point.nbytes
            data = replies[point.worker][start : at[point.worker]]
            yield self._tap(point, graph, evaluation, step, data)

    def _tap(self, point: TapPoint, graph: str, evaluation: int, step: int, data: memoryview) -> Tap:
        tensors = self.lowered.plan.graph.tensors
        tensor = tensors[point.tensor]
        return Tap(
            graph, evaluation, step, point.node, point.split, self.workers[point.worker],
            "INPUT" if point.node < 0 else tensor.op.name, tensor.name, self.occurrences[point.tensor],
            point.node < 0 and point.tensor not in self.read,
            tuple(tensors[s].name for s in tensor.src if s != ABSENT), tensor.dtype, tensor.ne, tensor.nb, data,
        )  # fmt: skip


def watch(lowered: Lowered, patterns: Patterns) -> Watched:
    """Raises CapacityError when a worker's taps do not fit into one reply."""
    devices = tuple(device.name for device in lowered.plan.devices)
    total: Counter[int] = Counter()
    for point in lowered.taps:
        total[point.worker] += point.nbytes
    for worker, nbytes in total.items():
        if nbytes > MAX_BUFFER_NBYTES:
            shown = " ".join(f"--dump-tensor {text}" for text in patterns.texts)
            raise CapacityError(
                f"{shown}: {nbytes:,} bytes of the {lowered.plan.graph.name} graph on {devices[worker]} in one step, "
                f"at most {MAX_BUFFER_NBYTES:,}: expected fewer tensors"
            )
    seen: Counter[str] = Counter()
    occurrences = []
    read: set[int] = set()
    for tensor in lowered.plan.graph.tensors:
        occurrences.append(seen[tensor.name])
        seen[tensor.name] += 1
        read.update(tensor.src)
        if tensor.view_src is not None:
            read.add(tensor.view_src)
    return Watched(lowered, devices, tuple(occurrences), frozenset(read))


class DumpFolder:
    """Writes one .npy file per tap into a folder, which is made when it is not there.

    Names are made of what is safe everywhere. A file is written beside its name and then takes it: a link of that name
    is replaced, not followed. Raises InputError when the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{os.getpid()}.probe"
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as error:
            raise InputError(f"--dump-dir {folder}: cannot be written to: {error.strerror}") from None

    def write(self, tap: Tap) -> Path:
        """The file of a tap: values as `Tap.values` gives them. Raises InputError when it cannot be written."""
        name = _UNSAFE.sub("_", tap.name).strip("_")[:_NAME_LENGTH] or "unnamed"
        place = "input" if tap.node < 0 else f"{tap.node:04d}"
        stem = f"{_UNSAFE.sub('_', tap.graph)}-{tap.evaluation:04d}-{place}-{name}-{tap.occurrence}"
        path, draft = self.folder / f"{stem}.npy", self.folder / f".{stem}.{os.getpid()}"
        try:
            with draft.open("xb") as file:
                np.save(file, np.ascontiguousarray(tap.values()), allow_pickle=False)
            draft.replace(path)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from None
        return path
