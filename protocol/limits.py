"""Upper bounds on everything that a peer or a file may claim; checked before use."""

from __future__ import annotations

MAX_WORKERS = 64
MAX_FRAMES = 4096
MAX_HEADER_NBYTES = 2 << 20  # a megabyte of msgpack can become 64 of Python objects
MAX_BUFFER_NBYTES = 4 << 30
MAX_TEXT = 4096  # characters of any string in a message
MAX_ITEMS = 1 << 16  # entries of any list or map in a message
MAX_ARENAS = 4096  # per worker
MAX_ARENA_NBYTES = 1 << 46
MAX_OPS = 1 << 20  # per program
MAX_INSTRUCTIONS = 1 << 20  # per program
MAX_TRANSFERS = 16384  # per program: one doorbell line each on the board
MAX_PROGRAMS = 4096  # per worker
