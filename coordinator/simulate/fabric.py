"""Who can send to whom, over which link, and what links and workers share: what the engine knows of a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.simulate.hardware import FREE, Pool, Toll


@dataclass(frozen=True, slots=True)
class Route:
    """One direction of a link. Transfers on it go one after the other, each `latency_s` after its last byte left.

    `bandwidth` in bytes/s; `media` index the fabric's shared media. `jitter` j makes a transfer slower by a factor
    between 1 and 1 + j. `fixed_s` is spent once per evaluation by a device that receives over it (RPC, a further GPU).
    `pageable` bytes/s are reached out of memory that is not pinned: the weights of a mapped file; 0: `bandwidth`.
    `wake`, `each` and `fixed_missed_s` as of a LinkModel.
    """

    name: str
    latency_s: float
    bandwidth: float
    media: tuple[int, ...] = ()
    jitter: float = 0.0
    fixed_s: float = 0.0
    pageable: float = 0.0
    wake: Toll = FREE
    each: Toll = FREE
    fixed_missed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Fabric:
    """Routes, their indices by (from, to) worker, the bytes/s of each shared medium, and workers that share processors:
    in at most one pool each, in none where they have processors of their own."""

    routes: tuple[Route, ...]
    index: Mapping[tuple[int, int], int]
    capacity: tuple[float, ...] = ()
    media: tuple[str, ...] = ()
    pools: tuple[Pool, ...] = ()

    @property
    def shares_memory(self) -> bool:
        """True when what workers ask of the memory matters."""
        return any(pool.memory for pool in self.pools)

    def between(self, source: int, target: int) -> Route:
        """The route from one worker to another. Raises KeyError when there is none."""
        return self.routes[self.index[source, target]]
