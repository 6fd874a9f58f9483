"""Every message that coordinator and workers exchange, as frozen dataclasses with a name on the wire."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

from protocol.errors import BY_CODE, CrossdockError

M = TypeVar("M")

KINDS: dict[str, type] = {}
"""Name on the wire to class."""


@dataclass_transform(frozen_default=True)
def _message(kind: str) -> Callable[[type[M]], type[M]]:
    """Make a class a frozen dataclass and enter it under its name on the wire."""

    def register(cls: type[M]) -> type[M]:
        data = dataclass(frozen=True, slots=True)(cls)
        KINDS[kind] = data
        data.KIND = kind  # type: ignore[attr-defined]
        return data

    return register


@_message("hello")
class Hello:
    """Worker to coordinator: who I am. The first message; answered by `Welcome` or `Refused`."""

    name: str
    major: int
    minor: int
    token: str
    pid: int
    kind: str
    features: tuple[str, ...]
    data_endpoint: str


@_message("welcome")
class Welcome:
    """Coordinator to worker: you are in."""

    index: int
    names: tuple[str, ...]
    data_endpoints: tuple[str, ...]
    plane: str


@_message("refused")
class Refused:
    """Coordinator to worker, or back: this cannot work, and why. The receiver ends."""

    reason: str


@_message("allocate")
class Allocate:
    """Make arena `arena` of `nbytes` zeroed bytes, with a `shadow` for strict ownership; answered by `Allocated`."""

    arena: int
    nbytes: int
    label: str
    shadow: bool


@_message("allocated")
class Allocated:
    """`path` is what peers on this host open to read the arena, "" when nothing can be opened; so for its shadow."""

    arena: int
    path: str
    shadow_path: str


@_message("release")
class Release:
    """Give arenas back; programs that use them must not run again. No answer."""

    arenas: tuple[int, ...]


@_message("map_file")
class MapFile:
    """Map a model file read-only as an arena. Buffer 0: int64 [n, 2], the ranges that `digest` (BLAKE2b) covers."""

    arena: int
    path: str
    nbytes: int
    digest: str


@_message("mapped")
class Mapped:
    """The file is the same and mapped."""

    arena: int


@_message("load")
class Load:
    """Copy weights from a mapped file into an arena. Buffer 0: int64 [n, 3] file offset, arena offset, bytes."""

    file_arena: int
    arena: int


@_message("loaded")
class Loaded:
    """Weights are in place."""

    arena: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Port:
    """A named range of bytes in an arena that the coordinator writes or reads each step."""

    name: str
    arena: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PeerArena:
    """An arena of worker `peer` (index) that this worker receives from, and its shadow ("": none)."""

    peer: int
    arena: int
    path: str
    nbytes: int
    shadow_path: str


@_message("program")
class ProgramMessage:
    """A lowered graph evaluation. Buffers: ops, instructions (see protocol.program), in strict ownership expectations
    (see protocol.shadow), and with `timing` "clock" or "pace" modelled times (see protocol.timing, as for `timing`).
    With `overlaps` a result may lie on bytes that its op still reads, as a wrong plan of ggml's would have it.
    Answered by `Ready`."""

    program: int
    name: str
    n_transfers: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    digests: tuple[Port, ...]
    peer_arenas: tuple[PeerArena, ...]
    overlaps: bool
    timing: str = ""


@_message("ready")
class Ready:
    """The program is checked and compiled."""

    program: int


@_message("forget")
class Forget:
    """Drop programs. No answer."""

    programs: tuple[int, ...]


@_message("step")
class Step:
    """Run a program once. Buffers: one per input port, in order. Answered by `Done`."""

    program: int
    step: int


@_message("done")
class Done:
    """The step is through. Buffers: one per output port, and one more with the bytes of all TAPs in program order where
    the program has any; with a `timing` of the program, one with times (protocol.timing). Times in nanoseconds; digests
    are SHA-256 in hex."""

    program: int
    step: int
    total_ns: int
    compute_ns: int
    wait_ns: int
    copy_ns: int
    received_nbytes: int
    digests: tuple[str, ...]


@_message("violated")
class Violated:
    """Instead of `Done` in strict ownership: row `row` of the program's expectations was not met.

    Tags as in protocol.shadow: `found` at `granule`, where `expected` should be; granule -1: the bytes are as they
    should be, but the arena's `epoch` (a step) is a later one.
    """

    program: int
    step: int
    row: int
    granule: int
    found: int
    expected: int
    epoch: int


@_message("read")
class Read:
    """Send me bytes of an arena; answered by `Bytes`."""

    arena: int
    offset: int
    nbytes: int


@_message("bytes")
class Bytes:
    """Buffer 0: what `Read` asked for."""

    arena: int
    offset: int


@_message("write")
class Write:
    """Buffer 0 goes to an arena; answered by `Written`."""

    arena: int
    offset: int


@_message("written")
class Written:
    """The bytes are in place."""

    arena: int


@_message("stats")
class StatsRequest:
    """How are you? Answered by `Stats`."""


@_message("statistics")
class Stats:
    """Most bytes that the worker's process has had in memory, and bytes of its arenas now."""

    peak_nbytes: int
    arena_nbytes: int


ANSWERS: dict[type, type] = {
    Allocate: Allocated, MapFile: Mapped, Load: Loaded, ProgramMessage: Ready, Step: Done,
    Read: Bytes, Write: Written, StatsRequest: Stats,
}  # fmt: skip
"""What a worker answers to each request when it does not fail; to the others it answers nothing."""


@_message("shutdown")
class Shutdown:
    """End; no answer."""


@_message("failed")
class Failed:
    """Worker to coordinator: the request failed; `code` names the error class of protocol.errors."""

    code: str
    text: str

    def error(self) -> CrossdockError:
        """The error to raise at the coordinator."""
        return BY_CODE.get(self.code, CrossdockError)(self.text)
