"""Reading TOML of models of hardware: every key known, every number in range, or one line that says what is not."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from coordinator.config import parse_size
from coordinator.simulate.hardware import Toll
from protocol.errors import UsageError

SCHEMA: Final = 1
_MAX_FILE_NBYTES: Final = 1 << 24


def read_toml(path: Path) -> dict[str, Any]:
    """The document in a TOML file with `schema = 1`, which is taken out of it. Raises UsageError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_NBYTES + 1)
        if len(content) > _MAX_FILE_NBYTES:
            raise UsageError(f"{path}: more than {_MAX_FILE_NBYTES:,} bytes are no description of hardware")
        document = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not TOML: {error}") from None
    if document.get("schema") != SCHEMA or isinstance(document["schema"], bool):
        raise UsageError(f"{path}: schema is {document.get('schema')!r}: expected schema = {SCHEMA}")
    del document["schema"]
    return document


def tables_of(document: Mapping[str, Any], key: str, where: str) -> list[tuple[str, Table]]:
    """The `[[key]]` tables, each with the words that say where it is. Raises UsageError."""
    found = document.get(key, [])
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise UsageError(f"{where}: {key} is no list of tables: expected [[{key}]]")
    return [(f"{where}: {key} {i + 1}", Table(table, f"{where}: {key} {i + 1}")) for i, table in enumerate(found)]


def only_keys(document: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise UsageError for a key that nobody reads."""
    for key in document:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}: expected one of {', '.join(known)}")


class Table:
    """One table while it is read: what was asked for is known, and what is left at `end` is an error."""

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        self.table, self.where = table, where
        self.asked: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self.table

    def number(self, key: str, default: float | None = None, low: float = 0.0, high: float = 1e18) -> float:
        """A number in [low, high]."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(f"{self.where}: {key} is {value!r}: expected a number")
        if not (math.isfinite(value) and low <= value <= high):
            raise UsageError(f"{self.where}: {key} is {value!r}: expected {low:g} to {high:g}")
        return float(value)

    def toll(self, key: str, default: Toll, *, others: bool = False) -> Toll:
        """`key`_us and `key`_missed_us, and `key`_others_us where what others read matters."""
        parts = [("us", default.base_s), ("missed_us", default.missed_s)]
        parts += [("others_us", default.others_s)] if others else []
        return Toll(*(self.number(f"{key}_{name}", seconds * 1e6, high=1e9) * 1e-6 for name, seconds in parts))

    def text(self, key: str, default: str | None = None, choices: tuple[str, ...] = ()) -> str:
        """A string, one of `choices` where there are any."""
        value = self._get(key, default)
        if not isinstance(value, str) or len(value) > 400:
            raise UsageError(f"{self.where}: {key} is {str(value)[:40]!r}: expected a text")
        if choices and value not in choices:
            raise UsageError(f"{self.where}: {key} is {value!r}: expected one of {', '.join(choices)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A truth value."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise UsageError(f"{self.where}: {key} is {value!r}: expected true or false")
        return value

    def size(self, key: str, default: int) -> int:
        """Bytes: a number, or a text such as 24GiB."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise UsageError(f"{self.where}: {key} is {value!r}: expected a size such as 24GiB")
        return parse_size(value, f"{self.where}: {key}")

    def names(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise UsageError(f"{self.where}: {key} is {value!r}: expected a list of names")
        return tuple(value)

    def numbers(self, key: str, low: float = 0.0, high: float = 1e18) -> dict[str, float]:
        """A table of numbers."""
        inner = Table(self._mapping(key), f"{self.where}: {key}")
        return {name: inner.number(name, low=low, high=high) for name in inner.table}

    def tables(self, key: str) -> list[tuple[str, Table]]:
        """A table of tables, by name."""
        outer = self._mapping(key)
        for name, value in outer.items():
            if not isinstance(value, dict):
                raise UsageError(f"{self.where}: {key}: {name} is {value!r}: expected a table")
        return [(name, Table(value, f"{self.where}: {key}: {name}")) for name, value in outer.items()]

    def texts(self, key: str) -> dict[str, str]:
        """A table of strings."""
        inner = Table(self._mapping(key), f"{self.where}: {key}")
        return {name: inner.text(name) for name in inner.table}

    def end(self) -> None:
        """Everything has been asked for: what is left is unknown."""
        only_keys(self.table, tuple(self.asked), self.where)

    def _mapping(self, key: str) -> Mapping[str, Any]:
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise UsageError(f"{self.where}: {key} is {value!r}: expected a table")
        return value

    def _get(self, key: str, default: Any) -> Any:
        self.asked.append(key)
        value = self.table.get(key, default)
        if value is None:
            raise UsageError(f"{self.where}: {key} is missing")
        return value
