"""The llama graph equals the scheduled graph that llama.cpp itself printed for SmolLM2-135M."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coordinator.graph.build import dims
from coordinator.graph.language import build_language
from coordinator.graph.node import BufferRef, Graph, Tensor
from coordinator.model.hparams import ModelParams, RopeParams, TextParams, WeightInfo
from protocol.dtypes import DType
from protocol.ops import GluOp, Op, Usage

DUMP = Path(__file__).parents[1] / "data" / "llama_cpp_smollm2_ngl15.txt"
N = 512
NODE = re.compile(r"node #\s*(\d+) \(\s*(\w+)\):\s*(.*?) \(\s*(\d+[KM])\) \[.{14}\] use=(\d+),c=1:(.*)")
SOURCE = re.compile(r"\s*(.*?) \(\s*(\d+[KM])\) \[.{14}\]")
COPIES = re.compile(r"\[([^\s\[\]]+) \(")
COPY = "RPC0[127.0.0.1:50052"

SMOLLM2 = ModelParams(
    arch="llama",
    name="SmolLM2 135M",
    text=TextParams(
        n_layer=30, n_embd=576, n_ff=1536, n_head=9, n_head_kv=3, head_dim=64, n_vocab=49152, n_ctx_train=8192,
        rms_eps=1e-5, rope=RopeParams(n_dims=64, mode=0, freq_base=100000.0, n_ctx_orig=8192), tied_output=True,
    ),
    vision=None,
    image_token=None,
)  # fmt: skip


def smollm2_weights() -> dict[str, WeightInfo]:
    shapes = {"token_embd.weight": (576, 49152), "output_norm.weight": (576,)}
    matrices = {
        "attn_q": (576, 576), "attn_k": (576, 192), "attn_v": (576, 192), "attn_output": (576, 576),
        "ffn_gate": (576, 1536), "ffn_up": (576, 1536), "ffn_down": (1536, 576),
        "attn_norm": (576,), "ffn_norm": (576,),
    }  # fmt: skip
    for il in range(30):
        shapes |= {f"blk.{il}.{name}.weight": ne for name, ne in matrices.items()}
    # the file's token_embd is Q8_0, its matrices Q4_1
    dtypes = {1: DType.F32, 2: DType.Q4_1}
    infos = {}
    for name, ne in shapes.items():
        dtype = DType.Q8_0 if name.startswith("token") else dtypes[len(ne)]
        infos[name] = WeightInfo(name, dtype, dims(*ne), 0, dtype.row_nbytes(ne[0]) * dims(*ne)[1])
    return infos


def place(name: str) -> BufferRef:
    layer = re.search(r"(?:blk\.|_l)(\d+)", name)
    on_device = int(layer[1]) >= 16 if layer else name.startswith("output")
    return BufferRef("RPC0" if on_device else "CPU", Usage.WEIGHTS)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return build_language(
        SMOLLM2, smollm2_weights(), place, n_tokens=N, n_kv=N, n_outputs=N, n_ctx=N, kv_dtype=DType.F16
    )


def label(t: Tensor) -> str:
    name = GluOp(int(t.params[0])).name if t.op == Op.GLU else t.op.name
    return name[:10]


def size(t: Tensor) -> str:
    return f"{t.nbytes >> 20}M" if t.nbytes >= 1 << 20 else f"{t.nbytes >> 10}K"


def dumped() -> list[tuple[int, str, str, str, int, list[tuple[str, str]]]]:
    rows = []
    for line in DUMP.read_text().splitlines():
        if line.startswith("node"):
            match = NODE.match(line)
            assert match, line
            position, op, name, nbytes, use, sources = match.groups()
            rows.append((int(position), op, name, nbytes, int(use), SOURCE.findall(sources)))
    return rows


def test_counts(graph: Graph) -> None:
    assert len(graph.nodes) == 936
    assert sum(not graph.tensors[i].is_view_op for i in graph.nodes) == 576


def test_every_node_that_is_no_view(graph: Graph) -> None:
    ours = [(k, graph.tensors[i]) for k, i in enumerate(graph.nodes) if not graph.tensors[i].is_view_op]
    theirs = dumped()
    assert [k for k, _ in ours] == [row[0] for row in theirs]
    for (_, t), (_, op, name, nbytes, _, _) in zip(ours, theirs, strict=True):
        assert (label(t), t.name[:20], size(t)) == (op, name, nbytes)


def test_sources(graph: Graph) -> None:
    """A copy is printed under its backend's name: only its size tells what it is a copy of."""
    tensors = graph.tensors
    ours = [tensors[i] for i in graph.nodes if not tensors[i].is_view_op]
    for t, (_, _, _, _, _, sources) in zip(ours, dumped(), strict=True):
        want = [(tensors[s].name[:20], size(tensors[s])) for s in t.src]
        got = [(w[0] if name == COPY else name, nbytes) for (name, nbytes), w in zip(sources, want, strict=True)]
        assert got == want, t.name


def test_number_of_uses(graph: Graph) -> None:
    uses = [0] * len(graph.tensors)
    for i in graph.nodes:
        for s in graph.tensors[i].src:
            uses[s] += 1
    ours = [uses[i] for i in graph.nodes if not graph.tensors[i].is_view_op]
    assert ours == [row[4] for row in dumped()]


def test_copied_inputs_are_in_the_graph(graph: Graph) -> None:
    line = next(line for line in DUMP.read_text().splitlines() if line.startswith("## SPLIT #1"))
    names = COPIES.findall(line)
    assert len(names) == 7
    assert all(name in graph.by_name for name in names)


def test_tied_output_is_a_leaf_of_its_own_on_the_device(graph: Graph) -> None:
    tables = [t for t in graph.tensors if t.name == "token_embd.weight"]
    assert [t.buffer for t in tables] == [BufferRef("CPU", Usage.WEIGHTS), BufferRef("RPC0", Usage.WEIGHTS)]


def test_caches_are_no_weights(graph: Graph) -> None:
    assert graph.named("cache_k_l3").buffer == BufferRef("CPU", Usage.ANY)
    assert graph.named("cache_v_l29").buffer == BufferRef("RPC0", Usage.ANY)
