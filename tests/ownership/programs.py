"""Random host programs, and what they mean: every tensor of every evaluation in memory of its own."""

from __future__ import annotations

import random
from typing import Any

from coordinator.ownership.scenario_graphs import read_graphs
from coordinator.ownership.sequence import Sequence, Step

Json = dict[str, Any]

OPS = {
    "ADD": lambda a, b: a + b,
    "SUB": lambda a, b: a - b,
    "MUL_MAT": lambda a, b: a * b,
    "SCALE": lambda a: a * 0.5 + 1.0,
    "CONT": lambda a: a,
}


class Program:
    """Graphs over two queues and the host, and steps that may or may not respect who owns what."""

    def __init__(
        self, rng: random.Random, *, clean: bool, n_graphs: int = 3, n_steps: int = 6, asynchronous: bool | None = None
    ) -> None:
        self.rng, self.clean = rng, clean
        drawn = rng.random() < 0.6
        asynchronous = drawn if asynchronous is None else asynchronous
        self.devices: list[Json] = [
            {"name": "GPU0", "async": asynchronous},
            {"name": "GPU1", "async": asynchronous},
            {"name": "CPU", "type": "cpu"},
        ]
        self.graphs = [self._graph(f"g{k}") for k in range(n_graphs)]
        self.values: dict[str, dict[str, float]] = {}  # by graph: what its tensors hold, as the program means it
        self.caches = {f"cache{d}": 0.0 for d in range(3)}
        self.steps: list[Step] = []
        for _ in range(n_steps):
            self._evaluate(rng.choice(self.graphs))
        self.steps.append(Step("sync"))

    @property
    def sequence(self) -> Sequence:
        """For the checker and the interpreter."""
        devices, queues, graphs = read_graphs(self.devices, self.graphs)
        return Sequence(devices, graphs, tuple(self.steps), queues)

    def _graph(self, name: str) -> Json:
        rng = self.rng
        tensors: list[Json] = [{"name": f"in{k}", "flags": ["input"]} for k in range(rng.randint(1, 2))]
        known = [t["name"] for t in tensors]
        for d in range(3):
            buft = self.devices[d]["name"]
            weight = {"name": f"w{d}", "buffer": {"buft": buft, "usage": "weights"}, "value": float(d + 1)}
            tensors += [weight, {"name": f"cache{d}", "resident": buft}]
        expand = []
        for k in range(rng.randint(2, 7)):
            op = rng.choice(list(OPS))
            src = [rng.choice(known) for _ in range(OPS[op].__code__.co_argcount)]
            if op == "MUL_MAT" or rng.random() < 0.3:
                op, src = "MUL_MAT", [f"w{rng.randrange(3)}", rng.choice(known)]
            elif rng.random() < 0.2:
                src[0] = f"cache{rng.randrange(3)}"
            node = {"name": f"n{k}", "op": op, "src": src, "params": [0.5, 1.0] if op == "SCALE" else []}
            if rng.random() < 0.3:
                node["flags"] = ["output"]
            tensors.append(node)
            known.append(node["name"])
            if rng.random() < 0.5:
                expand.append(node["name"])
        tensors[-1]["flags"] = ["output"]
        expand.append(known[-1])
        if rng.random() < 0.4:
            d = rng.randrange(3)
            tensors.append({"name": "stored", "op": "CPY", "src": [known[-1], f"cache{d}"]})
            expand.append("stored")
        return {"name": name, "tensors": tensors, "expand": expand}

    def _evaluate(self, graph: Json) -> None:
        rng, name = self.rng, graph["name"]
        fresh = self.clean or name not in self.values or rng.random() < 0.4
        if fresh:
            self.steps.append(Step("allocate", graph=name))
            self.values[name] = {}
        used = _used(graph)
        values = self.values[name]
        for t in graph["tensors"]:
            if t.get("flags") == ["input"] and t["name"] in used and (fresh or rng.random() < 0.8):
                values[t["name"]] = float(rng.randint(-9, 9)) + 0.25
                self.steps.append(Step("set", tensor=f"{name}.{t['name']}", value=values[t["name"]]))
        self.steps.append(Step("compute", graph=name, asynchronous=not self.clean and rng.random() < 0.4))
        self._mean(graph, values)
        for _ in range(rng.randint(1, 3)):
            self._read(graph)

    def _mean(self, graph: Json, values: dict[str, float]) -> None:
        """One evaluation as it is meant."""
        order = read_graphs(self.devices, [graph])[2][graph["name"]].graph.nodes
        rows = {t["name"]: t for t in graph["tensors"]}
        names = [t["name"] for t in graph["tensors"]]
        for ident in order:
            row = rows[names[ident]]
            args = [self._value(values, s) for s in row["src"]]
            if row["op"] == "CPY":
                self.caches[row["src"][1]] = values["stored"] = args[0]
            else:
                values[row["name"]] = OPS[row["op"]](*args)

    def _value(self, values: dict[str, float], name: str) -> float:
        if name.startswith("cache"):
            return self.caches[name]
        return float(int(name[1:]) + 1) if name.startswith("w") else values[name]

    def _read(self, graph: Json) -> None:
        """The host reads an output of this graph, or, in a program that is not clean, any node of any graph."""
        if not self.clean and self.rng.random() < 0.4:
            graph = self.rng.choice([g for g in self.graphs if self.values.get(g["name"])])
        used = _used(graph)
        rows = [t for t in graph["tensors"] if t.get("op", "CPY") != "CPY" and t["name"] in used]
        if self.clean:
            rows = [t for t in rows if "output" in t.get("flags", [])]
        name = self.rng.choice(rows)["name"]
        values = self.values[graph["name"]]
        if name in values:
            self.steps.append(Step("read", tensor=f"{graph['name']}.{name}", right=values[name]))


def _used(graph: Json) -> set[str]:
    """Tensors that the graph's outputs need."""
    rows = {t["name"]: t for t in graph["tensors"]}
    todo, seen = list(graph["expand"]), set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += rows[name].get("src", [])
    return seen
