"""Whole models against llama.cpp: decode and prompts, in one process each, and spread over processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks import models
from benchmarks.measure import Row, Timed, compare, interleave
from benchmarks.rivals import Ours, Peer, agreement, cpu_s, tokens

N_CTX = 1024
CHUNK, DEPTH = 8, 128
LEAST_AGREEMENT = 0.95


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured, and where llama.cpp is: `python` is an interpreter that has it."""

    rounds: int = 24
    prompt_rounds: int = 7
    prompts: tuple[int, ...] = (128, 512)
    python: str = ""
    budget_s: float = 60.0

    def shortened(self) -> Settings:
        """For a first look."""
        return replace(self, rounds=8, prompt_rounds=3, prompts=(128,), budget_s=15.0)


Rival = Ours | Peer


def decoding(rival: Rival, n_vocab: int) -> Callable[[], float]:
    """Seconds per token of the next CHUNK tokens; starts anew after DEPTH, as llama-bench's tg128."""
    chosen = tokens(DEPTH, n_vocab)
    at = 0

    def timed() -> float:
        nonlocal at
        if at == 0:
            rival.restart()
        seconds = rival.evaluate([[token] for token in chosen[at : at + CHUNK]])
        at = (at + CHUNK) % DEPTH
        return seconds / CHUNK

    return timed


def prompting(rival: Rival, n_vocab: int, n: int) -> Callable[[], float]:
    """Seconds per prompt of `n` tokens on an empty context."""
    chosen = tokens(n, n_vocab)

    def timed() -> float:
        rival.restart()
        return rival.evaluate([chosen])

    return timed


def race(bench: str, label: str, rivals: dict[str, Rival], n_vocab: int, settings: Settings) -> Iterator[Row]:
    """Decode and the prompts, rivals in turn."""
    yield _compared(
        bench, f"{label} decode", rivals, lambda rival: decoding(rival, n_vocab), settings.rounds, settings.budget_s, 1
    )
    for n in settings.prompts:
        yield _compared(
            bench, f"{label} prompt {n}", rivals, lambda rival, n=n: prompting(rival, n_vocab, n),  # type: ignore[misc]
            settings.prompt_rounds, settings.budget_s, n,
        )  # fmt: skip


def _compared(
    bench: str,
    name: str,
    rivals: dict[str, Rival],
    timer: Callable[[Rival], Timed],
    rounds: int,
    budget_s: float,
    n: int,
) -> Row:
    """Tokens per second of each, `n` per sample; and the ratio of the processor time that it took."""
    timers = {key: timer(rival) for key, rival in rivals.items()}
    for timed in timers.values():
        timed()
    cpu: dict[str, list[float]] = {key: [] for key in rivals}
    counted = {key: _counted(rivals[key], timed, cpu[key]) for key, timed in timers.items()}
    row = compare(bench, name, interleave(counted, rounds, budget_s), "t/s", lambda s: n / s)
    ratios = [b / a for a, b in zip(cpu["ours"], cpu[row.peer_name], strict=True)]
    return replace(row, cpu_ratio=statistics.median(ratios))


def _counted(rival: Rival, timed: Timed, cpu: list[float]) -> Timed:
    def run() -> float:
        before = cpu_s(rival.pids)
        seconds = timed()
        cpu.append(cpu_s(rival.pids) - before)
        return seconds

    return run


def single(names: tuple[str, ...], threads: tuple[int, ...], settings: Settings) -> Iterator[Row]:
    """One process each, same file and threads."""
    for name in names:
        file = models.model_file(name)
        for count in threads:
            with (
                Ours(file, "cpu:1", count, None, N_CTX) as ours,
                Peer(file, count, N_CTX, python=settings.python) as peer,
            ):
                same = agreement(ours, peer, tokens(32, ours.n_vocab, 7))
                assert same > LEAST_AGREEMENT, f"{name}: logits agree to {same:.3f} only"
                label = f"{name}, {count} thread{'s' if count > 1 else ''},"
                yield from race("model", label, {"ours": ours, "llama.cpp": peer}, ours.n_vocab, settings)


def spread(names: tuple[str, ...], settings: Settings) -> Iterator[Row]:
    """Two and three processes of one thread each, half and all layers away from the first."""
    for name in names:
        file = models.model_file(name)
        for others in (1, 2):
            for share in ("half", "all"):
                with Ours(file, "cpu:1", 1, None, N_CTX) as probe:
                    n_layer, n_vocab = probe.session.params.text.n_layer, probe.n_vocab
                layers = n_layer // 2 if share == "half" else n_layer + 1
                with (
                    Ours(file, f"cpu:1,accel:{others}", 1, layers, N_CTX) as ours,
                    Peer(file, 1, N_CTX, python=settings.python, servers=others, n_gpu_layers=layers) as peer,
                ):
                    label = f"{name}, {1 + others} processes, {share} layers away,"
                    yield from race("rpc", label, {"ours": ours, "llama.cpp RPC": peer}, n_vocab, settings)


def own(names: tuple[str, ...], settings: Settings) -> Iterator[Row]:
    """Decode over two workers against our own single process: what handing over costs."""
    for name in names:
        file = models.model_file(name)
        with Ours(file, "cpu:1", 1, None, N_CTX) as alone:
            layers = alone.session.params.text.n_layer // 2
            with Ours(file, "cpu:1,accel:1", 1, layers, N_CTX) as ours:
                rivals: dict[str, Rival] = {"ours": ours, "one worker": alone}
                name = f"{name}, 2 workers, half layers away, decode"
                yield _compared(
                    "own", name, rivals, lambda r: decoding(r, alone.n_vocab), 2 * settings.rounds, settings.budget_s, 1
                )
