"""Dataclasses to plain msgpack values and back, every field checked against its annotation."""

from __future__ import annotations

import dataclasses
import types
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from protocol.errors import ProtocolError
from protocol.limits import MAX_ITEMS, MAX_TEXT

T = TypeVar("T")

INT_MIN, INT_MAX = -(1 << 63), (1 << 63) - 1


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def to_plain(value: Any) -> Any:
    """A dataclass, and what it holds, as maps, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(cls: type[T], plain: Any, where: str) -> T:
    """The dataclass `cls` from its plain form.

    Raises ProtocolError that names the field, the expected and the actual type: fields that are missing, unknown,
    of another type, too long or out of range.
    """
    if not isinstance(plain, dict):
        raise ProtocolError(f"{where}: expected a map, got {type(plain).__name__}")
    hints: dict[str, Any] = _hints(cls)  # type: ignore[arg-type]
    unknown = set(plain) - set(hints)
    if unknown:
        raise ProtocolError(f"{where}: unknown field {sorted(map(str, unknown))[0][:40]!r}")
    values = {}
    for name, hint in hints.items():
        if name not in plain:
            raise ProtocolError(f"{where}: field {name!r} is missing")
        values[name] = _check(hint, plain[name], f"{where}.{name}")
    return cls(**values)


def _check(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _check_union(hint, value, where)
    if origin is tuple:
        return _check_tuple(get_args(hint), value, where)
    if origin is dict:
        return _check_dict(get_args(hint), value, where)
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return from_plain(hint, value, where)
    return _check_scalar(hint, value, where)


def _check_union(hint: Any, value: Any, where: str) -> Any:
    options = [option for option in get_args(hint) if option is not type(None)]
    if value is None:
        if len(options) < len(get_args(hint)):
            return None
        raise ProtocolError(f"{where}: expected {hint}, got nothing")
    assert len(options) == 1, hint
    return _check(options[0], value, where)


def _check_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise ProtocolError(f"{where}: expected a list of at most {MAX_ITEMS} items, got {type(value).__name__}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_check(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(args):
        raise ProtocolError(f"{where}: expected {len(args)} items, got {len(value)}")
    return tuple(_check(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))


def _check_dict(args: tuple[Any, ...], value: Any, where: str) -> dict[Any, Any]:
    if not isinstance(value, dict) or len(value) > MAX_ITEMS:
        raise ProtocolError(f"{where}: expected a map of at most {MAX_ITEMS} items, got {type(value).__name__}")
    return {_check(args[0], k, f"{where} key"): _check(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}


def _check_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise ProtocolError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {type(value).__name__}")
    if hint is int and not INT_MIN <= value <= INT_MAX:
        raise ProtocolError(f"{where}: {value} does not fit in 64 bits")
    if hint in (str, bytes) and len(value) > MAX_TEXT:
        raise ProtocolError(f"{where}: {len(value)} characters, at most {MAX_TEXT} are allowed")
    return value
