"""A worker of a run within the test's process, for programs that compiled code walks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protocol import messages as m
from protocol.board import Board
from workers.arena import Arenas
from workers.engine import KernelEngine
from workers.peers import SharedPlane
from workers.run import Compiled, Runner, compile_program
from workers.shadow import Shadows

ARENA, PROGRAM = 1, 7


class Side:
    """It has one arena, of `nbytes`."""

    def __init__(self, index: int, board: Board, directory: str, nbytes: int, *, shadow: bool = False) -> None:
        self.index, self.board = index, board
        self.arenas = Arenas(directory, f"w{index}", limit=None, shared=True, virtual=False)
        self.segment = self.arenas.allocate(ARENA, nbytes, "compute", shadow=shadow)
        self.plane, self.engine = SharedPlane(board), KernelEngine(1)
        self.runner = Runner(index, self.arenas, self.plane, board, self.engine)
        self.shadows = Shadows(self.arenas, self.plane) if shadow else None

    def lends(self) -> m.PeerArena:
        """What peers are told of its arena."""
        shadow = self.arenas.shadows.get(ARENA)
        path = "" if shadow is None else shadow.path
        return m.PeerArena(self.index, ARENA, self.segment.path, self.segment.nbytes, path)

    def compile(
        self, message: m.ProgramMessage, tables: Sequence[np.ndarray], n_workers: int, *, board: Board | None = None
    ) -> Compiled:
        """Its share of a program."""
        buffers = [memoryview(table.tobytes()) for table in tables]
        return compile_program(
            message, buffers, self.arenas, self.plane, self.engine, n_workers, frozenset(), self.shadows, board
        )
