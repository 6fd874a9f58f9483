"""Object files of x86-64 Linux, as LLVM makes them, laid out together as one piece of code."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

_ALLOCATED, _NO_BITS, _SYMBOLS, _RELOCATIONS = 2, 8, 2, 4  # ELF: SHF_ALLOC, SHT_NOBITS, SHT_SYMTAB, SHT_RELA
_UNDEFINED, _ABSOLUTE, _COMMON = 0, 0xFFF1, 0xFFF2
_ABSOLUTE_64 = 1  # R_X86_64_64: the symbol's address plus an addend, in 64 bits
_UNWINDING = ".eh_frame"

TRAP = b"\x0f\x0b"
"""An instruction that ends the process: stands for functions that are only called when a kernel raises an error."""

_NEVER_CALLED = (
    "numba_gil_ensure", "numba_gil_release", "numba_unpickle", "numba_do_raise",
    "numba_runtime_build_excinfo_struct", "NRT_Free",
)  # fmt: skip


class Section(NamedTuple):
    """A section's header."""

    name: int
    kind: int
    flags: int
    address: int
    offset: int
    nbytes: int
    link: int
    info: int
    alignment: int
    entry: int


class Symbol(NamedTuple):
    """A symbol; `section` may be one of the special indices."""

    name: str
    section: int
    value: int
    nbytes: int


@dataclass(slots=True)
class Linked:
    """Code for base address 0. `absolute`: offsets of 64-bit words to which the base has to be added; `foreign`: of
    words to which the address of a function of the C library has to be added, by its name."""

    code: bytes = b""
    entries: dict[str, int] = field(default_factory=dict)
    absolute: list[int] = field(default_factory=list)
    foreign: dict[str, list[int]] = field(default_factory=dict)


def link(objects: Mapping[str, tuple[bytes, str]]) -> Linked:
    """Lay out object files; the entry `key` is the symbol named beside its object.

    Raises ValueError for anything that LLVM does not make of a kernel.
    """
    code = bytearray(TRAP.ljust(64, b"\xcc"))
    linked = Linked()
    try:
        for key, (data, symbol) in objects.items():
            linked.entries[key] = _add(data, symbol, code, linked)
    except (struct.error, IndexError) as error:
        raise ValueError(f"no object file: {error}") from None
    linked.code = bytes(code)
    return linked


def _add(data: bytes, entry: str, code: bytearray, linked: Linked) -> int:
    """Append one object; the offset of its entry."""
    if data[:5] != b"\x7fELF\x02" or struct.unpack_from("<HH", data, 16) != (1, 62):
        raise ValueError("no object file for x86-64")
    start, size, count, names = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HHH", data, 58)
    sections = [Section(*struct.unpack_from("<IIQQQQIIQQ", data, start + size * i)) for i in range(count)]
    titles = [_text(data, sections[names].offset + s.name) for s in sections]
    symbols = _symbols(data, sections)
    places = _place_sections(data, sections, titles, code)
    targets = _place_symbols(symbols, places, code)
    for section in sections:
        if section.kind != _RELOCATIONS or section.info not in places:
            continue
        for at in range(section.offset, section.offset + section.nbytes, 24):
            where, info, addend = struct.unpack_from("<QQq", data, at)
            if info & 0xFFFFFFFF != _ABSOLUTE_64:
                raise ValueError(f"relocation of type {info & 0xFFFFFFFF}")
            _relocate(code, places[section.info] + where, symbols[info >> 32], targets[info >> 32], addend, linked)
    found = [target for symbol, target in zip(symbols, targets, strict=True) if symbol.name == entry and target >= 0]
    if len(found) != 1:
        raise ValueError(f"{len(found)} symbols {entry}")
    return found[0]


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def _symbols(data: bytes, sections: list[Section]) -> list[Symbol]:
    table = next(s for s in sections if s.kind == _SYMBOLS)
    names = sections[table.link].offset
    symbols = []
    for at in range(table.offset, table.offset + table.nbytes, 24):
        name, _, _, section, value, nbytes = struct.unpack_from("<IBBHQQ", data, at)
        symbols.append(Symbol(_text(data, names + name), section, value, nbytes))
    return symbols


def _place_sections(data: bytes, sections: list[Section], titles: list[str], code: bytearray) -> dict[int, int]:
    """Append what belongs into memory; offsets by section. Nothing unwinds kernels: their unwinding tables stay out."""
    places = {}
    for i, (section, title) in enumerate(zip(sections, titles, strict=True)):
        if section.flags & _ALLOCATED and section.nbytes and title != _UNWINDING:
            places[i] = _align(code, section.alignment)
            code += bytes(section.nbytes) if section.kind == _NO_BITS else _slice(data, section.offset, section.nbytes)
    return places


def _slice(data: bytes, at: int, nbytes: int) -> bytes:
    if at + nbytes > len(data):
        raise ValueError("truncated object file")
    return data[at : at + nbytes]


def _align(code: bytearray, alignment: int) -> int:
    code += bytes(-len(code) % max(alignment, 1))
    return len(code)


def _place_symbols(symbols: list[Symbol], places: dict[int, int], code: bytearray) -> list[int]:
    """Offsets by symbol, -1 for what is not in the object."""
    targets = []
    for symbol in symbols:
        if symbol.section == _COMMON:  # here `value` is the alignment
            targets.append(_align(code, symbol.value))
            code += bytes(symbol.nbytes)
        elif symbol.section in places:
            targets.append(places[symbol.section] + symbol.value)
        else:
            targets.append(-1)
    return targets


def _relocate(code: bytearray, at: int, symbol: Symbol, target: int, addend: int, linked: Linked) -> None:
    if target < 0 and symbol.section != _UNDEFINED:
        raise ValueError(f"symbol {symbol.name} in section {symbol.section}")
    if target >= 0:
        linked.absolute.append(at)
    elif symbol.name in _NEVER_CALLED or symbol.name.startswith(("Py", "_Py")):
        linked.absolute.append(at)
        target, addend = 0, 0  # the trap
    else:
        linked.foreign.setdefault(symbol.name, []).append(at)
        target = 0
    struct.pack_into("<q", code, at, target + addend)
