"""Models of devices and links: the law by hand, files that describe them, and what files may get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.graph.language import build_language
from coordinator.graph.node import BufferRef, Usage
from coordinator.model.presets import PRESETS, make_weights
from coordinator.simulate.hardware import DeviceModel, LinkModel, Work
from coordinator.simulate.known import constants, find_spec, specs
from coordinator.simulate.law import OPS_PER_LAYER, Constants, Spec, device_of
from coordinator.simulate.network import links, load_network, rpc_link, uniform
from coordinator.simulate.system import load_system, presets
from protocol.dtypes import DType
from protocol.errors import UsageError
from protocol.ops import VIEW_OPS

BY_HAND = DeviceModel(
    name="gpu", cls="nvidia", memory_nbytes=0, bandwidth=1e12, rates={"f32": 1e13, "f16": 1e14, "quant": 5e13},
    efficiency={"matvec": 0.8, "matmat": 0.5, "attention": 0.25, "matvec.q2_K": 0.4}, weights_per_s={"quant": 1e13},
    attention_rate=2e13, launch_s=1e-6,
)  # fmt: skip


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Work("matvec", DType.F16, 800_000_000, 400_000_000), 1e-6 + 1e-3),
        (Work("matvec", DType.Q4_0, 800_000_000, 1_000_000_000), 1e-6 + 1e-3 + 1e-4),
        (Work("matvec", DType.Q2_K, 400_000_000, 1_000_000_000), 1e-6 + 1e-3 + 1e-4),
        (Work("matmat", DType.Q4_0, 500_000_000, 10**9, flops=10**12, rows=500), 1e-6 + 1e-3 + 2e-2),
        (Work("matmat", DType.F16, 500_000_000, 10**9, flops=10**12, rows=500), 1e-6 + 1e-3 + 1e-2),
        (Work("attention", DType.F16, 250_000_000, rows=1), 1e-6 + 1e-3),
        (Work("attention", DType.F16, 250_000_000, flops=4 * 10**10, rows=512), 1e-6 + 2e-3),
        (Work("elementwise", DType.F32, read_nbytes=10**9, write_nbytes=10**9), 1e-6 + 2e-3),
        (Work("copy", DType.F32, read_nbytes=10**9, write_nbytes=0), 1e-6 + 1e-3),
    ],
)
def test_seconds_by_hand(work: Work, seconds: float) -> None:
    assert BY_HAND.seconds(work) == pytest.approx(seconds, rel=1e-12)


def test_link_by_hand() -> None:
    assert LinkModel("l", 1e-5, 1e9).seconds(1_000_000) == pytest.approx(1.01e-3)


def test_law_by_hand() -> None:
    """One NVIDIA device of 100 SM at 2 GHz: every term of the law, the era and the power limit."""
    law = Constants({
        "eb": 0.9, "q": 50, "q@q2_K": 0.5, "c_us": 19, "c_us~2024.5": 2.0, "ekv": 0.4, "pp_quant": 0.5, "pp_f16": 1.0,
        "pp_quant@narrow": 0.6, "ppa": 0.1, "watts": 2.0, "power": 0.5,
    })  # fmt: skip
    spec = Spec("x", "nvidia", 1e12, sm=100, ghz=2.0, watts=100, tags=("turing", "narrow"))
    device = device_of(spec, law, 2026)
    assert device.efficiency["matvec"] == 0.9
    assert device.weights_per_s["quant"] == pytest.approx(50e9 * 200)
    assert device.weights_per_s["q2_K"] == pytest.approx(25e9 * 200)
    assert device.launch_s * OPS_PER_LAYER == pytest.approx(19e-6)
    assert device_of(spec, law, 2024.4).launch_s == pytest.approx(2 * device.launch_s)
    assert device.rate(DType.Q4_0) == pytest.approx(0.5 * 0.6 * 200e12 * 0.5)  # a quarter of the usual power, root
    assert device.rate(DType.F16) == pytest.approx(1.0 * 200e12 * 0.5)
    scores_s = 16 / (0.9 * 1e12)  # of one, which takes 4 x 128 FLOPs; 16 bytes in memory
    assert 512 / device.attention_rate == pytest.approx(512 / (0.1 * 200e12) + scores_s)
    assert device_of(spec, law, 2026, flash=True).attention_rate == pytest.approx(3 * 0.1 * 200e12)
    faster = device_of(Spec("x", "nvidia", 1e12, sm=100, ghz=2.0, k_decode=1.25), law, 2026)
    plain = device_of(Spec("x", "nvidia", 1e12, sm=100, ghz=2.0), law, 2026)
    for work in (Work("matvec", DType.Q4_0, 10**9, 10**9), Work("attention", DType.F16, 10**8)):
        assert plain.seconds(work) == pytest.approx(1.25 * faster.seconds(work))


def test_ops_per_layer_are_those_of_the_graph() -> None:
    """The overhead of a layer is spread over the ops that our own llama graph has in one."""
    params, _ = PRESETS["smollm2-135m"]
    weights = make_weights(params, lambda name, shape: DType.F16)
    place = BufferRef("gpu", Usage.WEIGHTS)
    graph = build_language(
        params, weights, lambda name: place, n_tokens=1, n_kv=256, n_outputs=1, n_ctx=256, kv_dtype=DType.F16
    )
    computed = [i for i in graph.nodes if graph.tensors[i].op not in VIEW_OPS]
    assert len(computed) // params.text.n_layer == OPS_PER_LAYER


def test_every_number_of_a_preset_has_a_source() -> None:
    assert len(specs()) > 150
    for spec in specs().values():
        assert spec.sources["bandwidth_gbs"], spec.name
        for key, value in (("fp16_tflops", spec.flops), ("sm", spec.sm), ("watts", spec.watts)):
            assert not value or spec.sources[key], spec.name
        assert (spec.k_decode, spec.k_prompt) == (1.0, 1.0) or spec.sources["k"], spec.name
    for link in links().values():
        assert {"latency_us", "bandwidth_gbs"} <= set(link.sources), link.name
    for name, device in presets().items():
        assert device.seconds(Work("matvec", DType.Q4_K, 10**9, 2 * 10**9)) > 1e9 / device.bandwidth, name
        assert device.rate(DType.Q4_0) > 0, name


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("RTX 4070 Ti Super", "RTX 4070 Ti SUPER"), ("T4", "Tesla T4"),
        ("AMD Radeon RX 7900 XTX 24GB", "RX 7900 XTX"), ("Apple M2 Ultra (76-core GPU)", "M2 Ultra 76c"),
        ("M4 Max 40-core", "M4 Max 40c"), ("Strix Halo", "Strix Halo 8060S"), ("RTX 9999", None), ("", None),
    ],
)  # fmt: skip
def test_names_as_people_write_them(said: str, meant: str | None) -> None:
    found = find_spec(said)
    assert (found and found.name) == meant


def test_system_file(tmp_path: Path) -> None:
    path = tmp_path / "system.toml"
    path.write_text(
        'schema = 1\n[[device]]\nname = "gpu"\ncount = 2\npreset = "RTX 3090"\nmemory = "20GiB"\nlaunch_us = 3\n'
        '[[device]]\nname = "host"\nclass = "cpu"\nbandwidth_gbs = 80\nfp16_tflops = 1\nsm = 8\n'
        'efficiency = { matvec = 0.5, "matvec.q4_K" = 0.4 }\nsource = { bandwidth_gbs = "measured" }\n'
    )
    system = load_system(path)
    assert [device.name for device in system.devices] == ["gpu0", "gpu1", "host"]
    gpu, host = system.device("gpu1"), system.device("host")
    assert (gpu.memory_nbytes, gpu.launch_s, gpu.bandwidth) == (20 << 30, pytest.approx(3e-6), 936e9)
    assert gpu.rates == device_of(specs()["RTX 3090"], constants("nvidia")).rates
    assert host.sources["bandwidth_gbs"] == "measured"
    assert host.busy_s(Work("matvec", DType.Q4_K, 32_000_000)) == pytest.approx(1e-3)


BAD_SYSTEMS = [
    ("[[device]]\nname = 'a'", "schema is None: expected schema = 1"),
    ("schema = 1", "no [[device]] table"),
    ("schema = 1\ngpu = 1", "unknown key 'gpu': expected one of device"),
    ("schema = 1\n[[device]]\nname = 'a'\npreset = 'RTX 9999'", "device 1: preset is 'RTX 9999': no such device"),
    ("schema = 1\n[[device]]\nname = 'a'\nclass = 'tpu'", "class is 'tpu': expected one of nvidia"),
    ("schema = 1\n[[device]]\nname = 'a'\nclass = 'cpu'", "bandwidth_gbs is missing"),
    ("schema = 1\n[[device]]\nname = 'a'\npreset = 'T4'\nbandwidth_gbs = -1", "bandwidth_gbs is -1: expected 0.001 to"),
    ("schema = 1\n[[device]]\nname = 'a'\npreset = 'T4'\nbandwidth_gbs = nan", "bandwidth_gbs is nan: expected 0.001"),
    ("schema = 1\n[[device]]\nname = 'a'\npreset = 'T4'\nlaunch_us = '3'", "launch_us is '3': expected a number"),
    ("schema = 1\n[[device]]\nname = 'a'\npreset = 'T4'\nspeed = 3", "device 1: unknown key 'speed': expected one of"),
    ("schema = 1\n[[device]]\nname = 'a'\npreset = 'T4'\nefficiency = {fast = 1}", "efficiency: 'fast': expected KIND"),
    ("schema = 1\n[[device]]\nname = 'a'\npreset = 'T4'\nunsupported_ops = ['PADD']", "'PADD' is not known"),
    ("schema = 1\n[[device]]\nname = 'a'\nclass = 'cpu'\nbandwidth_gbs = 9", "prompts would take forever"),
    ("schema = 1\n" + "[[device]]\nname = 'a'\npreset = 'T4'\n" * 2, "two devices are called 'a'"),
    ("schema = 1\n[[device]]\nname = 'a'\ncount = 9999\npreset = 'T4'", "count is 9999: expected 1 to"),
    ("schema = [", "not TOML"),
]


@pytest.mark.parametrize(("text", "line"), BAD_SYSTEMS, ids=[line[:30] for _, line in BAD_SYSTEMS])
def test_bad_systems_get_one_line(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        load_system(path)
    assert line in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_network_file(tmp_path: Path) -> None:
    """Within a node PCIe with one root, between nodes a network card for each sender; the first rule counts."""
    path = tmp_path / "network.toml"
    path.write_text(
        'schema = 1\n[[link]]\nfrom = "n{x}.*"\nto = "n{x}.*"\npreset = "pcie4x16"\nsegment = "root{x}"\n'
        '[[link]]\npreset = "10gbe"\nsegment = "nic-{from}"\njitter = 0.1\n[segments]\nroot1 = 30\n'
    )
    network = load_network(path)
    inside, between = network.link("n1.gpu0", "n1.gpu1"), network.link("n1.gpu0", "n22.gpu1")
    assert (inside.bandwidth, inside.segment) == (24e9, "root1")
    assert (between.bandwidth, between.segment, between.jitter) == (1.15e9, "nic-n1.gpu0", 0.1)
    assert network.capacity == {"root1": 30e9}
    assert uniform(links()["wifi"]).link("a", "b").duplex is False
    path.write_text('schema = 1\n[[link]]\nfrom = "a"\nto = "b"\npreset = "1gbe"\nboth = false\n')
    assert load_network(path).link("a", "b").bandwidth == 0.117e9
    with pytest.raises(UsageError, match="no link from b to a"):
        load_network(path).link("b", "a")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("schema = 1", "no [[link]] table"),
        ("schema = 1\n[[link]]\npreset = '3gbe'", "preset is '3gbe': expected one of pcie3x16"),
        ("schema = 1\n[[link]]\nname = 'x'\nlatency_us = 1", "bandwidth_gbs is missing"),
        ("schema = 1\n[[link]]\npreset = '1gbe'\nspeed = 1", "unknown key 'speed'"),
        ("schema = 1\n[[link]]\npreset = '1gbe'\nduplex = 1", "duplex is 1: expected true or false"),
        ("schema = 1\nlink = 3", "link is no list of tables"),
    ],
)
def test_bad_networks_get_one_line(tmp_path: Path, text: str, line: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as raised:
        load_network(path)
    assert line in str(raised.value)


def test_links_by_the_words_of_a_row() -> None:
    said = {"QSFP 200G pair2": "200g-qsfp", "25GbE RoCEv2": "25gbe-rdma", "25GbE TCP": "25gbe-tcp", "1GbE": "1gbe",
            "Wi-Fi AP": "wifi", "Ethernet (unstated)": "10gbe", "": "10gbe", "loopback": "loopback"}  # fmt: skip
    assert {name: rpc_link(name).name for name in said} == said
