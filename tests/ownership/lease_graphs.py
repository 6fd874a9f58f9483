"""Random graphs over two to four devices, and what they mean: one sequential evaluation, every tensor by itself."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from coordinator.graph.node import ABSENT, NO_FLAGS, BufferRef, Dims, Graph, Tensor, contiguous_nb, make_graph
from coordinator.schedule.plan import Device
from protocol.dtypes import DType
from protocol.ops import WRITES_ONLY, Flag, Op, Usage

Bytes = npt.NDArray[np.uint8]
Who = npt.NDArray[np.int64]
Spots = npt.NDArray[np.int64]

POISON = 0xA5
NOBODY = -1
SHAPES: tuple[Dims, ...] = ((8, 1, 1, 1), (16, 1, 1, 1), (8, 4, 1, 1), (16, 4, 1, 1), (4, 8, 2, 1), (64, 2, 1, 1))
CACHE: Dims = (16, 8, 1, 1)
KEPT: Dims = (128, 1, 1, 1)  # room for any tensor
INPLACE = (Op.ADD, Op.MUL, Op.SCALE, Op.SUB)
N_SRC = {Op.ADD: 2, Op.MUL: 2, Op.SUB: 2, Op.MUL_MAT: 2, Op.CONCAT: 2, Op.FLASH_ATTN_EXT: 4}


@dataclass(frozen=True, slots=True)
class Value:
    """Bytes, and for each of them the write that made it (NOBODY: none)."""

    data: Bytes
    who: Who


def random_devices(rng: random.Random, n: int) -> tuple[Device, ...]:
    """`n` devices with memory of their own, the last the host's."""
    made = [
        Device(
            f"accel{k}", buft=f"accel{k}", alignment=rng.choice([32, 128]), max_size=rng.choice([None, None, 1024]),
            unsupported_ops=frozenset({op.name for op in (Op.CONCAT, Op.CONT) if rng.random() < 0.15}),
        )
        for k in range(n - 1)
    ]  # fmt: skip
    return (*made, Device("cpu0", kind="cpu", buft="cpu0", is_host=True))


class _Maker:
    """Adds f32 tensors; nodes read what is recent more often."""

    def __init__(self, rng: random.Random, devices: Sequence[Device]) -> None:
        self.rng, self.devices = rng, devices
        self.tensors: list[Tensor] = []
        self.readable: list[int] = []
        self.pins: list[tuple[int, str]] = []

    def add(self, name: str, ne: Dims, **facts: object) -> Tensor:
        facts.setdefault("nb", contiguous_nb(DType.F32, ne))
        made = Tensor(len(self.tensors), name, DType.F32, ne, **facts)  # type: ignore[arg-type]
        self.tensors.append(made)
        return made

    def pick(self) -> Tensor:
        recent = self.readable[-4:] if self.rng.random() < 0.6 else self.readable
        return self.tensors[self.rng.choice(recent)]

    def on_some_device(self, name: str) -> Tensor:
        wanted = f"{name}{self.rng.randrange(len(self.devices))}"
        return next(t for t in self.tensors if t.name == wanted)

    def leafs(self) -> None:
        rng = self.rng
        for k in range(rng.randint(1, 3)):
            self.readable.append(self.add(f"in{k}", rng.choice(SHAPES), flags=Flag.INPUT).id)
        for k, device in enumerate(self.devices):
            assert device.buft
            self.add(f"w{k}", SHAPES[3], buffer=BufferRef(device.buft, Usage.WEIGHTS))
            for name, ne in ((f"cache{k}", CACHE), (f"kept{k}", KEPT)):
                made = self.add(name, ne, buffer=BufferRef(device.buft, Usage.ANY))
                if rng.random() < 0.5:
                    self.readable.append(made.id)

    def view(self, of: Tensor) -> Tensor:
        rng = self.rng
        ne, nb, offs = list(of.ne), list(of.nb), of.view_offs
        op = rng.choice((Op.VIEW, Op.PERMUTE))
        if op is Op.PERMUTE:
            axes = rng.sample(range(3), 3)
            ne, nb = [of.ne[a] for a in axes] + [1], [of.nb[a] for a in axes] + [of.nb[3]]
        elif ne[1] > 1:
            first = rng.randrange(ne[1])
            offs += first * nb[1]
            ne[1] = rng.randint(1, ne[1] - first)
        root = of.id if of.view_src is None else of.view_src
        dims: Dims = (ne[0], ne[1], ne[2], ne[3])
        return self.add(f"v{len(self.tensors)}", dims, nb=tuple(nb), op=op, src=(of.id,), view_src=root, view_offs=offs)

    def node(self) -> Tensor:
        rng = self.rng
        kind = rng.random()
        if kind < 0.15:
            made = self.view(self.pick())
        else:
            op = rng.choice(INPLACE if kind < 0.7 else (Op.MUL_MAT, Op.CONT, Op.CONCAT, Op.FLASH_ATTN_EXT))
            first = self.pick()
            src = [first.id, *(self.pick().id for _ in range(N_SRC.get(op, 1) - 1))]
            if op is Op.MUL_MAT:
                src[0] = self.on_some_device("w").id
            if len(src) > 2 and rng.random() < 0.3:
                src[2] = ABSENT
            plain = first.nb == contiguous_nb(DType.F32, first.ne)
            ne = first.ne if op in INPLACE and plain else rng.choice(SHAPES)
            flags = Flag.OUTPUT if rng.random() < 0.15 else NO_FLAGS
            made = self.add(f"n{len(self.tensors)}", ne, op=op, src=tuple(src), flags=flags)
            if rng.random() < 0.5:
                self.pins.append((made.id, rng.choice(self.devices).name))
        self.readable.append(made.id)
        return made

    def branch(self, near: str, far: str) -> None:
        """Some nodes on one device and the last on another, from which nothing comes back."""
        made = self.pick()
        for device in [near] * self.rng.randint(1, 3) + [far]:
            made = self.add(f"n{len(self.tensors)}", SHAPES[3], op=Op.MUL_MAT, src=(made.id, self.pick().id))
            self.pins.append((made.id, device))

    def store(self) -> Tensor:
        """A copy of some node into rows of a cache."""
        cache = self.on_some_device("cache")
        view = self.view(cache)
        source = self.pick()
        return self.add(
            f"stored{len(self.tensors)}", view.ne, nb=view.nb, op=Op.CPY, src=(source.id, view.id),
            view_src=cache.id, view_offs=view.view_offs,
        )  # fmt: skip


def random_graph(rng: random.Random, devices: Sequence[Device]) -> Graph:
    """One graph; what it leaves to chance is placement: half of its nodes are pinned somewhere.

    A cache is not read after it was written: a device's copy of it would be the one made before, in ggml too.
    """
    while True:
        maker = _Maker(rng, devices)
        maker.leafs()
        near, far = (device.name for device in rng.sample(devices, 2))
        branching = rng.choice((0.0, 0.0, 0.5))
        for _ in range(rng.choice((3, 6, 12, 20))):
            if rng.random() < branching:
                maker.branch(near, far)
            else:
                maker.node()
        last = maker.add("y", SHAPES[2], op=Op.ADD, src=(maker.pick().id, maker.pick().id), flags=Flag.OUTPUT)
        expand = [t.id for t in maker.tensors if t.name.startswith("n") and rng.random() < 0.4]
        expand.append(last.id)
        expand += [maker.store().id for _ in range(rng.choice((0, 0, 1, 2)))]
        graph = make_graph("g", maker.tensors, expand)
        reached = {*graph.nodes}
        pins = tuple(pin for pin in maker.pins if pin[0] in reached)
        graph = make_graph("g", maker.tensors, expand, pins)
        if not _reads_after_write(graph):
            return graph


def _reads_after_write(graph: Graph) -> bool:
    written: set[int] = set()
    for ident in graph.nodes:
        node = graph.tensors[ident]
        for k, s in enumerate(node.src):
            if s != ABSENT and node.op != Op.VIEW and WRITES_ONLY.get(node.op) != k and root_of(graph, s) in written:
                return True
        if node.op is Op.CPY:
            if root_of(graph, ident) in written:
                return True
            written.add(root_of(graph, ident))
    return False


def root_of(graph: Graph, ident: int) -> int:
    """The tensor whose memory a view lies in."""
    view_src = graph.tensors[ident].view_src
    return ident if view_src is None else view_src


@lru_cache(maxsize=4096)
def spots(ne: Dims, nb: Dims) -> Spots:
    """Offsets in bytes of every byte of every f32 element, in the order of the elements."""
    grid = np.zeros((), np.int64)
    for n, b in zip(ne, nb, strict=True):
        grid = (np.arange(n, dtype=np.int64) * b).reshape(-1, *[1] * grid.ndim) + grid
    return (grid.reshape(-1, 1) + np.arange(4)).reshape(-1)


def mix(op: Op, salt: int, sources: Sequence[Bytes], nbytes: int) -> Bytes:
    """What an op gives: every byte of every source counts, and where it stands."""
    out = np.full(nbytes, (op * 7 + salt * 13 + 1) & 0xFF, np.uint8)
    for source in sources:
        padded = np.zeros(-(-source.size // nbytes) * nbytes, np.uint8)
        padded[: source.size] = source
        out = out * np.uint8(5) + np.arange(nbytes, dtype=np.uint8)
        for part in padded.reshape(-1, nbytes):
            out = out * np.uint8(3) + part
    return out


@dataclass(frozen=True, slots=True)
class Meant:
    """One evaluation as it is meant.

    `reads` are what source k of node i reads, `writers` the numbers of what node i writes, `inputs` what is to be set,
    `outputs` the graph's outputs; both by name.
    """

    reads: dict[tuple[int, int], Value] = field(default_factory=dict)
    writers: dict[int, int] = field(default_factory=dict)
    inputs: dict[str, Value] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)


class Meaning:
    """Evaluates graphs one after the other, in order, each tensor in memory of its own; residents last.

    Writes are numbered: `name(who)` says which node of which evaluation it was.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.residents: dict[str, Value] = {}
        self.names: list[str] = []

    def writer(self, name: str) -> int:
        """The number of a new write."""
        self.names.append(name)
        return len(self.names) - 1

    def name(self, who: int) -> str:
        """Whose write it was."""
        return "nobody" if who == NOBODY else self.names[who]

    def resident(self, tensor: Tensor) -> Value:
        """What a resident tensor holds before the next evaluation."""
        if tensor.name not in self.residents:
            who = self.writer(f"load of {tensor.name}")
            data = self.rng.integers(0, 256, tensor.nbytes, np.uint8)
            self.residents[tensor.name] = Value(data, np.full(tensor.nbytes, who))
        return self.residents[tensor.name]

    def evaluate(self, graph: Graph, number: int, keeps: Mapping[str, str]) -> Meant:
        """The next evaluation; `keeps` name residents by the output whose bytes they get at its end."""
        meant = Meant()
        memory = {t.id: self.resident(t) for t in graph.tensors if t.buffer is not None}
        for ident in graph.leafs:
            tensor = graph.tensors[ident]
            if tensor.flags & Flag.INPUT:
                data = self.rng.integers(0, 256, tensor.nbytes, np.uint8)
                value = Value(data, np.full(tensor.nbytes, self.writer(f"{number}.{tensor.name}")))
                meant.inputs[tensor.name] = memory[ident] = value
        for index, ident in enumerate(graph.nodes):
            if not graph.tensors[ident].is_view_op:
                meant.writers[index] = self.writer(f"{number}.{graph.tensors[ident].name}")
                self._node(graph, index, graph.tensors[ident], memory, meant)
        for name in output_names(graph):
            meant.outputs[name] = value = memory[graph.by_name[name]]
            if name in keeps:
                target = self.residents[keeps[name]]
                target.data[: value.data.size], target.who[: value.who.size] = value.data, value.who
        return meant

    def _node(self, graph: Graph, index: int, node: Tensor, memory: dict[int, Value], meant: Meant) -> None:
        sources = []
        for k, s in enumerate(node.src):
            if s == ABSENT or WRITES_ONLY.get(node.op) == k:
                continue
            tensor, root = graph.tensors[s], memory[root_of(graph, s)]
            at = spots(tensor.ne, tensor.nb) + tensor.view_offs
            meant.reads[index, k] = Value(root.data[at], root.who[at])
            sources.append(root.data[at])
        at = spots(node.ne, node.nb) + node.view_offs
        if node.view_src is None:
            memory[node.id] = Value(np.full(node.nbytes, POISON, np.uint8), np.full(node.nbytes, NOBODY))
        target = memory[root_of(graph, node.id)]
        target.data[at] = mix(node.op, index, sources, at.size)
        target.who[at] = meant.writers[index]


def output_names(graph: Graph) -> list[str]:
    """Tensors of the graph that are flagged OUTPUT."""
    return [graph.tensors[i].name for i in graph.nodes if graph.tensors[i].flags & Flag.OUTPUT]
