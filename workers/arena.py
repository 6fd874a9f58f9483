"""A worker's memory: numbered arenas under one byte limit."""

from __future__ import annotations

import numpy as np

from protocol import content, sharedmem
from protocol.errors import CapacityError, ModelError, ProtocolError
from protocol.limits import MAX_ARENA_NBYTES, MAX_ARENAS
from protocol.program import Table, check_range
from protocol.shadow import n_words


class Arenas:
    """The arenas of one worker, by number. Lives as long as the worker.

    `limit` bounds the sum of allocated bytes (mapped files do not count: they are the page cache's). With `virtual`
    arenas have a size and no memory: the `null` backend.
    """

    def __init__(self, directory: str, label: str, *, limit: int | None, shared: bool, virtual: bool) -> None:
        self.directory, self.label = directory, label
        self.limit, self.shared, self.virtual = limit, shared, virtual
        self.segments: dict[int, sharedmem.Segment] = {}
        self.shadows: dict[int, sharedmem.Segment] = {}
        self.read_only: set[int] = set()
        self.loaded: set[int] = set()  # hold weights: programs must not write to them

    @property
    def sizes(self) -> dict[int, int]:
        """Bytes by arena."""
        return {arena: segment.nbytes for arena, segment in self.segments.items()}

    @property
    def allocated_nbytes(self) -> int:
        """Sum over allocated arenas, mapped files left out."""
        return sum(s.nbytes for arena, s in self.segments.items() if arena not in self.read_only)

    def address(self, arena: int) -> int:
        """Address of the first byte; the arena must exist."""
        return 0 if self.virtual else self.segments[arena].address

    def allocate(self, arena: int, nbytes: int, label: str, *, shadow: bool = False) -> sharedmem.Segment:
        """A new arena of zeroed bytes; its shadow (see protocol.shadow) does not count for the limit.

        Raises CapacityError over the limit, ProtocolError for a number in use or a size out of range.
        """
        self._check_new(arena, nbytes)
        total = self.allocated_nbytes + nbytes
        if self.limit is not None and total > self.limit:
            raise CapacityError(
                f"{label} of {nbytes:,} bytes makes {total:,}, the limit is {self.limit:,}: "
                f"{total - self.limit:,} bytes short"
            )
        self.segments[arena] = self._segment(nbytes, f"{self.label}-{arena}", label)
        if shadow and not self.virtual:
            self.shadows[arena] = self._segment(8 * n_words(nbytes), f"{self.label}-{arena}-shadow", f"{label} shadow")
        return self.segments[arena]

    def _segment(self, nbytes: int, name: str, label: str) -> sharedmem.Segment:
        if self.virtual:
            return sharedmem.Segment(np.empty(0, np.uint8), nbytes, "")
        return sharedmem.create(nbytes, self.directory, name) if self.shared else sharedmem.private(nbytes, label)

    def map_file(self, arena: int, path: str, nbytes: int, ranges: Table, digest: str) -> None:
        """Map a model file read-only.

        Raises ModelError when the file is not the coordinator's: another size or another content digest over `ranges`.
        """
        self._check_new(arena, nbytes)
        if self.virtual:
            self.segments[arena] = sharedmem.Segment(np.empty(0, np.uint8), nbytes, path)
        else:
            segment = sharedmem.attach(path, nbytes)
            if content.digest(segment.view, ranges) != digest:
                raise ModelError(f"{path}: not the bytes that the coordinator read")
            self.segments[arena] = segment
        self.read_only.add(arena)

    def load(self, file_arena: int, arena: int, pieces: Table) -> int:
        """Copy pieces (file offset, arena offset, bytes) of a mapped file; the number of bytes copied.

        Raises ProtocolError for a piece outside either.
        """
        for source, target, nbytes in pieces.tolist():
            check_range(self.sizes, file_arena, source, nbytes, "weights in the file")
            check_range(self.sizes, arena, target, nbytes, "weights in the arena")
            if not self.virtual:
                sharedmem.copy(self.address(arena) + target, self.address(file_arena) + source, nbytes)
        self.loaded.add(arena)
        return int(pieces[:, 2].sum())

    def read(self, arena: int, offset: int, nbytes: int) -> bytes:
        """Bytes of an arena; zeros where there is no memory."""
        check_range(self.sizes, arena, offset, nbytes, "read")
        if self.virtual:
            return bytes(nbytes)
        return self.segments[arena].view[offset : offset + nbytes].tobytes()

    def write(self, arena: int, offset: int, data: memoryview) -> None:
        """Bytes into an arena. Raises ProtocolError outside of it or in a mapped file."""
        check_range(self.sizes, arena, offset, len(data), "write")
        if arena in self.read_only:
            raise ProtocolError(f"write: arena {arena} is a mapped file")
        if not self.virtual:
            self.segments[arena].view[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def release(self, arena: int) -> None:
        """Give an arena back. Raises ProtocolError for an unknown one."""
        segment = self.segments.pop(arena, None)
        if segment is None:
            raise ProtocolError(f"release: unknown arena {arena}")
        self.read_only.discard(arena)
        self.loaded.discard(arena)
        segment.close()
        if arena in self.shadows:
            self.shadows.pop(arena).close()

    def _check_new(self, arena: int, nbytes: int) -> None:
        if arena in self.segments or not 0 <= arena < 1 << 31:
            raise ProtocolError(f"arena {arena}: number in use or out of range")
        if len(self.segments) >= MAX_ARENAS or not 0 <= nbytes <= MAX_ARENA_NBYTES:
            raise ProtocolError(f"arena {arena} of {nbytes} bytes: over the limits")
