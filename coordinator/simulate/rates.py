"""Rates of published rows by the laws of their devices: one device, several, a part of the layers on the CPU, RPC."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Final

from coordinator.simulate.cases import Case
from coordinator.simulate.hardware import DeviceModel, LinkModel, Work
from coordinator.simulate.hosts import Host, find_host, known_hosts, usual_host
from coordinator.simulate.known import constants
from coordinator.simulate.law import OPS_PER_LAYER, Constants, Spec, device_of
from coordinator.simulate.models import Workload
from coordinator.simulate.network import rpc_link
from protocol.dtypes import DType

ROWS_DECODE: Final = 4.6e-4
"""Seconds that splitting by rows costs each layer and further device: two joins (rows Y25 to Y27)."""

ROWS_LINK: Final = 0.6e9
"""Bytes/s at which they exchange a prompt's activations (rows Y25, Y27; Y26 was five times faster)."""

LAST_LOGITS: Final = 2024.25
"""Builds from then on go on with a prompt's last token alone where the last layer's attention ends."""

Lookup = Callable[[str], Constants]


@dataclass(frozen=True, slots=True)
class Ask:
    """What a prediction looks up: constants of classes, calibrated machines; and the models made from them so far."""

    constants: Lookup = constants
    hosts: Mapping[str, Host] | None = None
    models: dict[object, DeviceModel] = field(default_factory=dict)

    def host(self, case: Case) -> Host:
        """How fast the two sides of a machine are when its layers are divided."""
        hosts = known_hosts() if self.hosts is None else self.hosts
        return find_host(hosts, case.row.hardware, case.row.model) or usual_host(case)


def tokens_per_s(case: Case, ask: Ask) -> float:
    """The predicted rate of a case."""
    if case.mode == "offload":
        return 1.0 / _offloaded_s(case, ask)
    if case.test.kind == "decode":
        return 1.0 / (_decode_s(case, ask) + case.extra_s)
    return 1.0 / (_prompt_s(case, ask) + case.extra_s / case.test.ubatch)


def _model(case: Case, spec: Spec, ask: Ask) -> DeviceModel:
    """The device in the builds of that time; made once for an Ask."""
    key = (spec.cls, spec.name, spec.watts, spec.tags, spec.k_decode, spec.k_prompt, case.row.year, case.flash)
    if key not in ask.models:
        ask.models[key] = device_of(spec, ask.constants(spec.cls), case.row.year, flash=case.flash)
    return ask.models[key]


def decode_work(case: Case, share: float) -> tuple[Work, Work]:
    """What the mean token of a decode test asks for, of a share of the layers: the weights, and the cache."""
    load, test = case.load, case.test
    depth = test.depth + test.n / 2
    weights = int(load.weights * share)
    return (
        Work("matvec", load.dtype, int(load.read_nbytes * share), weights, flops=2 * weights),
        Work("attention", DType.F16, int(load.kv_nbytes * depth * share)),
    )


def _decode_part_s(case: Case, spec: Spec, ask: Ask, share: float) -> float:
    device = _model(case, spec, ask)
    busy = sum(device.busy_s(work) for work in decode_work(case, share))
    layers = case.load.layers * share
    experts_us = ask.constants(spec.cls).value("moe_us", (), case.row.year) if case.load.experts else 0.0
    return busy + layers * (OPS_PER_LAYER * device.launch_s + experts_us * 1e-6 / spec.k_decode)


def _decode_s(case: Case, ask: Ask) -> float:
    """Seconds per token: the parts one after another, and what lies between them."""
    specs, split = case.specs, ask.constants("layers")
    if case.mode == "rows":
        part = max(_decode_part_s(case, spec, ask, 1 / len(specs)) for spec in specs)
        return part + ROWS_DECODE * case.load.layers * (len(specs) - 1)
    shares = _shares(specs)
    seconds = sum(_decode_part_s(case, spec, ask, share) for spec, share in zip(specs, shares, strict=True))
    if case.mode == "rpc":
        return seconds + _rpc_s(case, 1)
    return seconds + split.value("hop_us", (), case.row.year) * 1e-6 * (len(specs) - 1)


def _shares(specs: tuple[Spec, ...]) -> tuple[float, ...]:
    """Layers go by memory, as ggml divides them; alike where it is not known."""
    sizes = [float(spec.memory_nbytes) for spec in specs]
    if not all(sizes):
        return (1.0 / len(specs),) * len(specs)
    return tuple(size / sum(sizes) for size in sizes)


def _rpc_s(case: Case, n_tokens: int) -> float:
    """What the network adds to an evaluation: a fixed cost for each remote, activations, and the logits."""
    link: LinkModel = rpc_link(case.row.link)
    if not case.remote:
        return 0.0
    activations = 2.0 * case.remote * n_tokens * case.load.embd * 4
    return case.remote * link.fixed_s_per_token + (activations + case.load.vocab * 4) / link.bandwidth


def spared_weights(load: Workload) -> float:
    """Weights that only the last token of a prompt meets in builds since LAST_LOGITS: those of the output, and of the
    last layer's MLP."""
    output = load.vocab * load.embd
    attention = 2 * load.embd * (load.heads + load.kv_nbytes / (4 * load.layers))
    return min(load.weights, output + max(0.0, (load.weights - output) / load.layers - attention))


def prompt_work(case: Case, n_tokens: int, depth: int) -> tuple[Work, Work]:
    """What a micro-batch of `n_tokens` that begins at `depth` asks for: the weights' products, and attention, which
    computes every score and masks those of later tokens."""
    load = case.load
    attention = int(4 * load.heads * load.layers * n_tokens * (depth + n_tokens))
    nbytes = load.read_nbytes
    if load.experts:  # a batch meets most experts
        nbytes = min(load.file_nbytes, nbytes * (1.0 + n_tokens / 16))
    products = load.weights * n_tokens
    if case.row.year >= LAST_LOGITS:
        products -= spared_weights(load) * (n_tokens - 1)
    return (
        Work("matmat", load.dtype, int(nbytes), int(load.weights), flops=int(2 * products), rows=n_tokens),
        Work("attention", DType.F16, int(load.kv_nbytes * depth), flops=attention, rows=max(16, n_tokens)),
    )


def _prompt_s(case: Case, ask: Ask) -> float:
    """Seconds per token of a prompt; devices that hold layers in turn overlap as far as the pipeline lets them."""
    test, specs = case.test, case.specs
    sizes = [min(test.ubatch, test.n - start) for start in range(0, test.n, test.ubatch)]
    starts = [test.depth + start for start in range(0, test.n, test.ubatch)]
    shares = _shares(specs) if case.mode != "rows" else (1 / len(specs),) * len(specs)
    parts: dict[str, tuple[Spec, float]] = {}
    for spec, share in zip(specs, shares, strict=True):
        parts[spec.name] = (spec, share + (parts[spec.name][1] if spec.name in parts else 0.0))
    total = sum(
        share * _batch_s(case, _model(case, spec, ask), ask, size, start)
        for spec, share in parts.values()
        for size, start in zip(sizes, starts, strict=True)
    )
    if case.mode == "layers":
        total = _pipelined_s(case, ask, total, len(sizes))
    elif case.mode == "rpc":
        total += sum(_rpc_s(case, size) for size in sizes)
    elif case.mode == "rows":  # every layer waits for all rows twice
        total += len(specs) * 2 * case.load.layers * test.n * case.load.embd * 4 / 2e9
    return total / test.n


def _batch_s(case: Case, device: DeviceModel, ask: Ask, n_tokens: int, depth: int) -> float:
    weights, attention = prompt_work(case, n_tokens, depth)
    seconds = device.busy_s(attention) + case.load.layers * OPS_PER_LAYER * device.launch_s
    slow = ask.constants("layers").value("moe_prompt", (), case.row.year) if case.load.experts else 1.0
    return seconds + device.busy_s(replace(weights, flops=int(weights.flops * slow)))


def _pipelined_s(case: Case, ask: Ask, total: float, n_batches: int) -> float:
    """Micro-batches follow each other through the devices.

    Of the ideal pipeline only a part is reached, less the more layers a device has: with many kernels to a
    micro-batch the one host thread has no time to feed the next device.
    """
    n, law, year = len(case.specs), ask.constants("layers"), case.row.year
    per_device = case.load.layers / n
    overlap = law.value("overlap", (), year) / (1 + (per_device / law.value("overlap_layers", (), year)) ** 4)
    ideal = n_batches * n / (n_batches + n - 1)
    tokens = min(case.test.n, case.test.ubatch)
    hop = law.value("hop_us", (), year) * 1e-6 + tokens * case.load.embd * 4 / (law.value("hop_gbs", (), year) * 1e9)
    return total * (1 - overlap + overlap / ideal) + hop * (n - 1) * ceil(n_batches / n)


def _offloaded_s(case: Case, ask: Ask) -> float:
    """Seconds per token with the layers divided between a GPU and the host's CPU.

    Decode goes linearly in the layers; a prompt's products all run on the GPU, which the others' weights are sent to.
    """
    host, load, test = ask.host(case), case.load, case.test
    if test.kind == "decode":
        return load.read_nbytes * (case.share / host.gpu_bandwidth + (1 - case.share) / host.cpu_bandwidth)
    batch = min(test.n, test.ubatch)
    sent = load.file_nbytes * (1 - case.share) / host.stream_bandwidth
    return 2 * load.weights / host.gpu_rate + sent / batch
