"""Random documents: graphs of every kind that the scheduler treats differently, over random devices."""

from __future__ import annotations

import copy
import random
from typing import Any

Json = dict[str, Any]

INPLACE = ["ADD", "MUL", "SCALE", "UNARY", "RMS_NORM", "SOFT_MAX", "ROPE", "DIV", "SUB", "DIAG_MASK_INF"]
OTHER = ["MUL_MAT", "GET_ROWS", "CONT", "CONCAT", "FLASH_ATTN_EXT", "SET_ROWS", "GLU", "IM2COL", "MUL_MAT_ID", "CLAMP"]
VIEWS = ["VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"]
N_SRC = {"ADD": 2, "MUL": 2, "DIV": 2, "SUB": 2, "SOFT_MAX": 2, "ROPE": 3, "MUL_MAT": 2, "GET_ROWS": 2, "CONCAT": 2,
         "FLASH_ATTN_EXT": 4, "SET_ROWS": 2, "GLU": 2, "MUL_MAT_ID": 3, "CPY": 2}  # fmt: skip
SHAPES = [
    [8, 1, 1, 1],
    [8, 1, 1, 1],
    [8, 4, 1, 1],
    [4, 8, 1, 1],
    [32, 3, 2, 1],
    [64, 8, 1, 1],
    [100, 1, 5, 1],
    [512, 2, 1, 1],
]
BYTES = {"f32": (1, 4), "f16": (1, 2), "q8_0": (32, 34)}


def strides(dtype: str, ne: list[int]) -> list[int]:
    """Contiguous strides in bytes."""
    block, nbytes = BYTES[dtype]
    nb1 = nbytes * (ne[0] // block)
    return [nbytes, nb1, nb1 * ne[1], nb1 * ne[1] * ne[2]]


def span(t: Json) -> int:
    """Bytes that a tensor spans."""
    block, nbytes = BYTES[t["type"]]
    first = nbytes + (t["ne"][0] - 1) * t["nb"][0] if block == 1 else t["ne"][0] * t["nb"][0] // block
    return int(first + sum((n - 1) * b for n, b in zip(t["ne"][1:], t["nb"][1:], strict=True)))


class GraphMaker:
    """Grows one random graph, tensor by tensor."""

    def __init__(self, rng: random.Random, devices: list[Json], tame: bool = False) -> None:
        self.rng, self.tame = rng, tame
        self.bufts = sorted({b for d in devices for b in (d["buft"], *d["extra_bufts"])})
        self.tensors: list[Json] = []

    def add(self, **facts: Any) -> Json:
        """Append a tensor; what is not given gets its default."""
        ident = len(self.tensors)
        t = {"id": ident, "name": f"t{ident}", "type": "f32", "op": "NONE", "flags": [], "src": [], "view_src": None,
             "view_offs": 0, "buffer": None} | facts  # fmt: skip
        t.setdefault("nb", strides(t["type"], t["ne"]))
        self.tensors.append(t)
        return t

    def leaf(self, kind: str | None = None) -> Json:
        """A tensor that nothing computes: an input, a weight, a cache or a plain one."""
        rng = self.rng
        kind = kind or rng.choice(["input"] * 5 + ["weight"] * 5 + ["any"] * 3 + ["plain"] * (not self.tame))
        ne = list(rng.choice(SHAPES))
        dtype = rng.choice(["q8_0", "f16"]) if kind == "weight" and ne[0] % 32 == 0 and rng.random() < 0.5 else "f32"
        buffer = None
        if kind in ("weight", "any"):
            usage = "weights" if kind == "weight" else rng.choice(["any", "any", "compute"])
            buffer = {"buft": rng.choice(self.bufts), "usage": usage}
        flags = ["input"] if kind == "input" else []
        if rng.random() < 0.05:
            flags.append("output")
        if rng.random() < 0.03 and not self.tame:
            flags.append("param")  # makes it a node
        made = self.add(ne=ne, type=dtype, buffer=buffer, flags=flags)
        if rng.random() < 0.03:
            made["name"] = ""  # ggml then names it by its number
        return made

    def alias(self) -> Json:
        """A view that is no view op: a leaf made before the graph, sometimes of a tensor outside of it."""
        target = self.pick()
        root = target if target["view_src"] is None else self.tensors[target["view_src"]]
        made = self.add(
            type=target["type"], ne=list(target["ne"]), nb=list(target["nb"]), view_src=root["id"],
            view_offs=target["view_offs"],
        )  # fmt: skip
        if root["buffer"] and self.rng.random() < 0.5:
            made["buffer"] = dict(root["buffer"])
        elif not root["buffer"] and "input" not in root["flags"] and self.rng.random() < 0.7:
            made["flags"] = ["input"]
        return made

    def view(self, parent: Json, op: str) -> Json:
        """A view of `parent`, of the same or a smaller shape."""
        rng = self.rng
        root = parent if parent["view_src"] is None else self.tensors[parent["view_src"]]
        ne, nb, offs = list(parent["ne"]), list(parent["nb"]), parent["view_offs"]
        if op == "PERMUTE":
            axes = rng.sample(range(4), 4)
            ne, nb = [ne[a] for a in axes], [nb[a] for a in axes]
        elif op == "TRANSPOSE":
            ne[0], ne[1], nb[0], nb[1] = ne[1], ne[0], nb[1], nb[0]
        elif op == "VIEW" and ne[1] > 1 and rng.random() < 0.7:
            first = rng.randrange(ne[1])
            offs += first * nb[1]
            ne[1] = rng.randint(1, ne[1] - first)
        if parent["type"] == "q8_0":
            ne, nb, offs = list(parent["ne"]), list(parent["nb"]), parent["view_offs"]
        return self.add(
            op=op, type=parent["type"], ne=ne, nb=nb, src=[parent["id"]], view_src=root["id"], view_offs=offs
        )

    def pick(self) -> Json:
        """A tensor to read, a recent one more often."""
        rng = self.rng
        recent = self.tensors[-5:]
        return rng.choice(recent if rng.random() < 0.6 else self.tensors)

    def node(self) -> Json:
        """One more node."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.2:
            made = self.view(self.pick(), rng.choice(VIEWS))
        elif kind < 0.27 and not self.tame:
            made = self.copy_into()
        elif kind < 0.31:
            made = self.wide()
        elif kind < 0.325 and not self.tame:
            made = self.alias()
        else:
            op = rng.choice(INPLACE if kind < 0.7 else OTHER)
            first = self.pick()
            src = [first["id"]] + [self.pick()["id"] for _ in range(N_SRC.get(op, 1) - 1)]
            if len(src) > 2 and rng.random() < 0.3:
                src[rng.randrange(1, len(src))] = None
            plain = first["type"] == "f32" and rng.random() < 0.8
            same = plain and op in INPLACE
            ne = list(first["ne"]) if same else list(rng.choice(SHAPES))
            nb = list(first["nb"]) if same and rng.random() < 0.9 else strides("f32", ne)
            made = self.add(op=op, ne=ne, nb=nb, src=src)
            if rng.random() < 0.02 and not self.tame:
                made["buffer"] = {"buft": rng.choice(self.bufts), "usage": rng.choice(["any", "compute", "weights"])}
        if rng.random() < 0.08 and not (self.tame and made["view_src"] is not None):
            made["flags"] = sorted({*made["flags"], "output"})
        if rng.random() < 0.03 and not self.tame:
            made["flags"] = sorted({*made["flags"], "input"})
        return made

    def copy_into(self) -> Json:
        """A CPY whose result is a view of its destination, itself often a view of a cache."""
        source, target = self.pick(), self.pick()
        if self.rng.random() < 0.5:
            target = self.view(target, "VIEW")
        root = target["id"] if target["view_src"] is None else target["view_src"]
        return self.add(
            op="CPY", type=target["type"], ne=list(target["ne"]), nb=list(target["nb"]),
            src=[source["id"], target["id"]], view_src=root, view_offs=target["view_offs"],
        )  # fmt: skip

    def sum_up(self) -> list[int]:
        """A chain that reads everything there is, few tensors at a time; returns its nodes."""
        rng = self.rng
        rest = [t["id"] for t in self.tensors]
        counts = rng.choice([[1], [1], [1, 2, 9]])
        while rest:
            count = rng.choice(counts)
            head, rest = rest[:count], rest[count:]
            self.add(op=rng.choice(["ADD", "CUSTOM"]), ne=[8, 4, 1, 1], src=[*head, self.tensors[-1]["id"]][:10])
        return [t["id"] for t in self.tensors if t["op"] in ("ADD", "CUSTOM")]

    def wide(self) -> Json:
        """A node of up to ten sources."""
        src = [self.pick()["id"] for _ in range(self.rng.randint(3, 10))]
        return self.add(op="CUSTOM", ne=list(self.rng.choice(SHAPES)), src=src)


def random_devices(rng: random.Random) -> list[Json]:
    """One to four devices, the last a cpu."""
    n = rng.randint(1, 4)
    devices: list[Json] = []
    for k in range(n):
        last = k == n - 1
        shared = bool(devices) and rng.random() < 0.2
        twin = rng.choice(devices) if shared else None
        name = "CPU" if last else f"GPU{k}"
        devices.append({
            "name": name,
            "type": "cpu" if last else rng.choice(["gpu", "gpu", "igpu", "accel", "cpu"]),
            "buft": twin["buft"] if twin else name,
            "alignment": twin["alignment"] if twin else rng.choice([1, 16, 32, 32, 64, 128, 256]),
            "max_size": twin["max_size"] if twin else rng.choice([None, None, None, 700, 2048, 4096, 10000]),
            "is_host": twin["is_host"] if twin else (last or rng.random() < 0.2),
            "extra_bufts": [],
            "unsupported_ops": [],
            "offload_ops": [o for o in [*INPLACE, *OTHER] if not last and rng.random() < 0.3],
        })  # fmt: skip
    bufts = [d["buft"] for d in devices]
    for k, d in enumerate(devices):
        if rng.random() < 0.4:
            d["extra_bufts"] = sorted({rng.choice([*bufts, "EXTRA"]) for _ in range(2)})
        if k < n - 1:
            rate = rng.choice([0.0, 0.1, 0.4])
            d["unsupported_ops"] = [o for o in [*INPLACE, *OTHER, *VIEWS, "CPY"] if rng.random() < rate]
            if rng.random() < 0.03:
                d["unsupported_ops"].append("NONE")
        elif rng.random() < 0.1:
            d["unsupported_ops"] = [o for o in [*INPLACE, *OTHER] if rng.random() < 0.1]
    return devices


def random_graph(rng: random.Random, devices: list[Json], tame: bool = False) -> Json:
    """One random graph with its outputs and pins."""
    maker = GraphMaker(rng, devices, tame)
    many = rng.random() < 0.04  # enough inputs to fill a split's list
    for _ in range(rng.randint(1, 5)):
        maker.leaf()
    for _ in range(rng.randint(28, 75) if many else 0):
        maker.leaf(rng.choice(["input"] * 9 + ["weight"]))
    chain = maker.sum_up() if many else []
    for _ in range(rng.choice([0, 1, 3, 6, 12, 25, 60])):
        if rng.random() < 0.2:
            maker.leaf()
        maker.node()
    tensors = maker.tensors
    used = {s for t in tensors for s in t["src"]}
    expand = [t["id"] for t in tensors if t["id"] not in used and (t["op"] != "NONE" or _may_stand_alone(t))]
    rng.shuffle(expand)
    expand = expand[: rng.choice([1, 2, 3, len(expand)])] or [tensors[-1]["id"]]
    expand += [t["id"] for t in tensors if rng.random() < 0.03 and (t["op"] != "NONE" or _may_stand_alone(t))]
    pins = {}
    if rng.random() < 0.3 and not tame:
        pins = {str(rng.choice(tensors)["id"]): rng.randrange(len(devices)) for _ in range(rng.randint(1, 3))}
    if rng.random() < 0.8:
        pins |= {str(ident): 0 for ident in chain}
    return {"reserve": False, "reset": True, "tensors": tensors, "expand": expand, "pinned": pins}


def _may_stand_alone(t: Json) -> bool:
    # A leaf without a place, a flag or a consumer is assigned to no device, and ggml then reads before its tables.
    return t["buffer"] is not None or "input" in t["flags"]


def mutated(rng: random.Random, graph: Json) -> Json:
    """The same graph, or one that differs in a detail that may or may not force a reallocation."""
    graph = copy.deepcopy(graph)
    for _ in range(rng.choice([0, 0, 1, 2])):
        t = rng.choice(graph["tensors"])
        change = rng.randrange(4)
        if change == 0:
            t["flags"] = [] if t["flags"] else ["output"]
        elif change == 1:
            graph["pinned"] = {}
        elif change == 2 and t["op"] in INPLACE:
            t["op"] = rng.choice(INPLACE)
        elif change == 3 and t["view_src"] is None and not any(v["view_src"] == t["id"] for v in graph["tensors"]):
            t["type"], t["ne"] = "f32", list(rng.choice(SHAPES))
            t["nb"] = strides("f32", t["ne"])
    return graph


def random_document(rng: random.Random) -> Json:
    """Devices and one to four graphs on one scheduler."""
    devices = random_devices(rng)
    graphs = [random_graph(rng, devices)]
    for _ in range(rng.randint(0, 3)):
        graphs.append(mutated(rng, rng.choice(graphs)) if rng.random() < 0.6 else random_graph(rng, devices))
    for k, graph in enumerate(graphs):
        graph["reserve"] = rng.random() < 0.15
        # Without a reset ggml aborts unless it has just reserved: rarely, since that ends the process.
        graph["reset"] = rng.random() > (0.3 if k == 0 or graphs[k - 1]["reserve"] else 0.01)
    return {
        "devices": devices,
        "parallel": rng.random() < 0.25,
        "op_offload": rng.random() < 0.4,
        "graphs": graphs,
    }


def tame_document(rng: random.Random) -> Json:
    """A document whose plan has to be right: nothing in it is a known hazard of ggml's scheduler.

    No writes into views, no views as outputs or inputs, no pins, each leaf an input or a weight, every device with
    memory of its own, one graph.
    """
    devices = random_devices(rng)
    for device in devices:
        device["buft"], device["extra_bufts"], device["unsupported_ops"] = device["name"], [], []
    graph = random_graph(rng, devices, tame=True)
    flags = {"parallel": rng.random() < 0.25, "op_offload": rng.random() < 0.4}
    return {"devices": devices, **flags, "graphs": [graph]}
