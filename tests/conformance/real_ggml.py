"""The real ggml, driven over faked devices: it plans, nothing is computed and no memory is touched.

Only addresses and tables are read back. Offsets of ggml's private structures are those of 0.20.2 on 64-bit machines.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
from pathlib import Path
from typing import Any

from protocol.dtypes import dtype_of
from protocol.ops import Flag, Op, Usage

VERSION = "0.20.2"
GRAPH_SIZE = 4096  # nodes and leafs that a real scheduler has room for
PAGE = 4096


def library_path() -> Path | None:
    """Where the prebuilt library lies, or None when the package is not installed."""
    spec = importlib.util.find_spec("libggml")
    if spec is None or not spec.submodule_search_locations:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).glob("lib*/libggml-base.so*"))
    return found[0] if found else None


class TensorStruct(c.Structure):
    """`struct ggml_tensor` of the public header."""

    _fields_ = [
        ("type", c.c_int), ("buffer", c.c_void_p), ("ne", c.c_int64 * 4), ("nb", c.c_size_t * 4), ("op", c.c_int),
        ("op_params", c.c_int32 * 16), ("flags", c.c_int32), ("src", c.c_void_p * 10), ("view_src", c.c_void_p),
        ("view_offs", c.c_size_t), ("data", c.c_void_p), ("name", c.c_char * 64), ("extra", c.c_void_p),
        ("padding", c.c_char * 8),
    ]  # fmt: skip


class InitParams(c.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("mem_size", c.c_size_t), ("mem_buffer", c.c_void_p), ("no_alloc", c.c_bool)]


class BufferTable(c.Structure):
    """The function table of a buffer, passed by value: only the second entry, its base address, is ever called."""

    _fields_ = [("entries", c.c_void_p * 11)]


NAME = c.CFUNCTYPE(c.c_void_p, c.c_void_p)
ALLOC = c.CFUNCTYPE(c.c_void_p, c.c_void_p, c.c_size_t)
SIZE = c.CFUNCTYPE(c.c_size_t, c.c_void_p)
BOOL = c.CFUNCTYPE(c.c_bool, c.c_void_p)
INT = c.CFUNCTYPE(c.c_int, c.c_void_p)
ASK = c.CFUNCTYPE(c.c_bool, c.c_void_p, c.c_void_p)
ADDRESS = c.CFUNCTYPE(c.c_void_p, c.c_void_p)
VOID = c.CFUNCTYPE(None, c.c_void_p)
LOG = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
SILENT = LOG(lambda *_: None)
"""Takes ggml's messages and drops them."""

# Slots in the function tables, and where the tables' owners keep what follows them.
BUFT_SLOTS, BUFT_DEVICE = 8, 6
BACKEND_SLOTS, BACKEND_DEVICE = 19, 17
DEVICE_SLOTS = 17
TYPE_CPU, TYPE_GPU, TYPE_IGPU, TYPE_ACCEL = range(4)
TYPES = {"cpu": TYPE_CPU, "gpu": TYPE_GPU, "igpu": TYPE_IGPU, "accel": TYPE_ACCEL}


def load(path: Path) -> c.CDLL:
    """Open the library and declare what is used of it."""
    lib = c.CDLL(str(path))
    pointers = (
        "ggml_init ggml_new_graph_custom ggml_backend_buffer_init ggml_backend_sched_new ggml_backend_buft_alloc_buffer"
    )
    for name in pointers.split():
        getattr(lib, name).restype = c.c_void_p
    lib.ggml_version.restype = c.c_char_p
    lib.ggml_init.argtypes = [InitParams]
    lib.ggml_new_graph_custom.argtypes = [c.c_void_p, c.c_size_t, c.c_bool]
    lib.ggml_build_forward_expand.argtypes = [c.c_void_p, c.c_void_p]
    lib.ggml_backend_buffer_init.argtypes = [c.c_void_p, BufferTable, c.c_void_p, c.c_size_t]
    lib.ggml_backend_buffer_set_usage.argtypes = [c.c_void_p, c.c_int]
    lib.ggml_backend_buffer_free.argtypes = [c.c_void_p]
    lib.ggml_backend_buft_alloc_buffer.argtypes = [c.c_void_p, c.c_size_t]
    lib.ggml_backend_sched_new.argtypes = [c.c_void_p, c.c_void_p, c.c_int, c.c_size_t, c.c_bool, c.c_bool]
    lib.ggml_backend_sched_set_tensor_backend.argtypes = [c.c_void_p] * 3
    lib.ggml_backend_sched_get_tensor_backend.argtypes = [c.c_void_p] * 2
    lib.ggml_backend_sched_get_tensor_backend.restype = c.c_void_p
    for name in ("reserve", "alloc_graph"):
        getattr(lib, f"ggml_backend_sched_{name}").argtypes = [c.c_void_p] * 2
        getattr(lib, f"ggml_backend_sched_{name}").restype = c.c_bool
    for name in ("ggml_backend_sched_reset", "ggml_backend_sched_free", "ggml_free"):
        getattr(lib, name).argtypes = [c.c_void_p]
    lib.ggml_log_set.argtypes = [c.c_void_p, c.c_void_p]
    return lib


def word(address: int) -> int:
    """The 64-bit word at `address`."""
    return c.c_uint64.from_address(address).value


def int32(address: int) -> int:
    """The int at `address`."""
    return c.c_int32.from_address(address).value


def words(address: int, count: int) -> list[int]:
    """`count` words from `address` on."""
    return list((c.c_uint64 * count).from_address(address)) if count else []


class World:
    """Faked devices and buffer types, with made-up addresses for buffers."""

    def __init__(self, lib: c.CDLL, devices: list[dict[str, Any]]) -> None:
        self.lib = lib
        self.keep: list[Any] = []  # callbacks and tables that ggml points to
        self.next_base = 1 << 40
        self.bases: dict[int, int] = {}  # id of a live buffer -> base address
        self.buft_of: dict[int, str] = {}  # id of any buffer -> buffer type
        self.syncs = 0
        self.buffer_table = BufferTable()
        self.buffer_table.entries[0] = self._pointer(VOID(self._free))
        self.buffer_table.entries[1] = self._pointer(ADDRESS(self._base))
        self.bufts: dict[str, int] = {}
        for device in devices:
            self.buft(buft_of(device), device)
        self.backends = [self._backend(device) for device in devices]

    def _pointer(self, callback: Any) -> int:
        self.keep.append(callback)
        return c.cast(callback, c.c_void_p).value or 0

    def _name(self, name: str) -> int:
        """A callback that answers `name`."""
        label = c.create_string_buffer(name.encode())
        self.keep.append(label)
        address = c.addressof(label)
        return self._pointer(NAME(lambda _: address))

    def _table(self, slots: int, entries: dict[int, int]) -> int:
        table = (c.c_void_p * slots)()
        for slot, value in entries.items():
            table[slot] = value
        self.keep.append(table)
        return c.addressof(table)

    def _base(self, buffer: int) -> int:
        return word(buffer + 0x60)

    def _free(self, buffer: int) -> None:
        del self.bases[word(buffer + 0x60)]

    def buft(self, name: str, device: dict[str, Any] | None = None) -> int:
        """The buffer type of that name; the first device that names it gives it its properties."""
        if name not in self.bufts:
            facts = device or {}
            size = facts.get("max_size")
            host = facts.get("is_host", facts.get("type") == "cpu")
            entries = {
                0: self._name(name),
                1: self._pointer(ALLOC(lambda _, size: self._alloc(name, size))),
                2: self._pointer(SIZE(lambda _: facts.get("alignment", 32))),
                5: self._pointer(BOOL(lambda _: bool(host))),
            }
            if size is not None:
                entries[3] = self._pointer(SIZE(lambda _: size))
            self.bufts[name] = self._table(BUFT_SLOTS, entries)
        return self.bufts[name]

    def _alloc(self, name: str, size: int) -> int:
        base = self.next_base
        self.next_base += (size // PAGE + 2) * PAGE
        buffer = self.lib.ggml_backend_buffer_init(self.bufts[name], self.buffer_table, base, size)
        self.bases[base] = size
        return int(buffer)

    def _backend(self, device: dict[str, Any]) -> int:
        refused = {int(Op[o]) for o in device.get("unsupported_ops", ())}
        wanted = {int(Op[o]) for o in device.get("offload_ops", ())}
        usable = {self.buft(b) for b in (buft_of(device), *device.get("extra_bufts", ()))}
        name = self._name(device["name"])
        handle = self._table(
            DEVICE_SLOTS,
            {
                0: name,
                1: name,
                3: self._pointer(INT(lambda _: TYPES[device["type"]])),
                6: self._pointer(ADDRESS(lambda _: self.bufts[buft_of(device)])),
                9: self._pointer(ASK(lambda _, t: int32(t + TensorStruct.op.offset) not in refused)),
                10: self._pointer(ASK(lambda _, buft: buft in usable)),
                11: self._pointer(ASK(lambda _, t: int32(t + TensorStruct.op.offset) in wanted)),
            },
        )
        owner = (c.c_void_p * BUFT_SLOTS).from_address(self.bufts[buft_of(device)])
        owner[BUFT_DEVICE] = owner[BUFT_DEVICE] or handle
        sync = self._pointer(VOID(self._synchronize))
        return self._table(BACKEND_SLOTS, {1: name, 8: sync, BACKEND_DEVICE: handle})

    def _synchronize(self, _backend: int) -> None:
        self.syncs += 1


def buft_of(device: dict[str, Any]) -> str:
    """The buffer type a document's device allocates in."""
    return str(device.get("buft") or device["name"])


class RealGraph:
    """A document's graph as ggml structures."""

    def __init__(self, world: World, doc: dict[str, Any]) -> None:
        self.world = world
        lib = world.lib
        entries = doc["tensors"]
        self.ids = [t["id"] for t in entries]
        index = {ident: k for k, ident in enumerate(self.ids)}
        self.structs = (TensorStruct * max(len(entries), 1))()
        self.address = {t["id"]: c.addressof(self.structs[k]) for k, t in enumerate(entries)}
        self.ident = {address: ident for ident, address in self.address.items()}
        self.buffers: dict[int, int] = {}
        for t, struct in zip(entries, self.structs, strict=False):
            self._fill(struct, t)
        for t, struct in zip(entries, self.structs, strict=False):
            if t["view_src"] is not None:
                root = self.structs[index[t["view_src"]]]
                if root.data:
                    struct.data = root.data + t["view_offs"]
        self.context = lib.ggml_init(InitParams(1 << 20, None, True))
        self.graph = lib.ggml_new_graph_custom(self.context, GRAPH_SIZE, False)
        for ident in doc["expand"]:
            lib.ggml_build_forward_expand(self.graph, self.address[ident])

    def _fill(self, struct: TensorStruct, t: dict[str, Any]) -> None:
        struct.type = int(dtype_of(t["type"]))
        struct.ne[:], struct.nb[:] = t["ne"], t["nb"]
        struct.op = int(Op[t["op"]])
        struct.flags = sum({int(Flag[f.upper()]) for f in t["flags"]})
        struct.name = t["name"].encode()
        for k, s in enumerate(t["src"]):
            struct.src[k] = None if s in (None, -1) else self.address[s]
        if t["view_src"] is not None:
            struct.view_src, struct.view_offs = self.address[t["view_src"]], t["view_offs"]
        if t["buffer"] is not None:
            world = self.world
            buffer = world.lib.ggml_backend_buft_alloc_buffer(world.buft(t["buffer"]["buft"]), 1 << 20)
            world.lib.ggml_backend_buffer_set_usage(buffer, int(Usage[t["buffer"]["usage"].upper()]))
            self.buffers[t["id"]] = buffer
            struct.buffer = buffer
            if t["view_src"] is None:
                struct.data = world._base(buffer)

    def free(self) -> None:
        """Give the context and the pre-allocated tensors' buffers back."""
        self.world.lib.ggml_free(self.context)
        for buffer in self.buffers.values():
            self.world.lib.ggml_backend_buffer_free(buffer)
