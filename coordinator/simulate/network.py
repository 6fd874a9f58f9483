"""Links between devices: known kinds by name, and networks from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Final

from coordinator.simulate.hardware import FREE, LinkModel
from coordinator.simulate.known import presets_file
from coordinator.simulate.tables import Table, only_keys, read_toml, tables_of
from protocol.errors import UsageError

USUAL_RPC: Final = "10gbe"
"""The link that is meant where a row over RPC does not name a known one."""

_HOLE: Final = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Rule:
    """Which pairs of devices a link joins: patterns of names, in which `*` is anything and `{x}` the same on both
    sides, so that `node{n}.*` to `node{n}.*` is whatever lies in one node."""

    source: str
    target: str
    link: LinkModel

    def match(self, source: str, target: str) -> LinkModel | None:
        """The link from one device to another, its segment's `{...}` filled in."""
        one = _pattern(self.source).fullmatch(source)
        two = _pattern(self.target).fullmatch(target)
        if one is None or two is None:
            return None
        names, more = one.groupdict(), two.groupdict()
        if any(more[key] != value for key, value in names.items() if key in more):
            return None
        known = {"from": source, "to": target} | more | names
        segment = _HOLE.sub(lambda hole: known.get(hole[1], hole[0]), self.link.segment)
        return replace(self.link, segment=segment)


@dataclass(frozen=True, slots=True)
class Network:
    """Rules in order; the first that matches a pair counts. A segment's bandwidth in bytes/s is in `capacity`, that of
    its widest link where it is not."""

    rules: tuple[Rule, ...]
    capacity: Mapping[str, float]

    def link(self, source: str, target: str) -> LinkModel:
        """The link from one device to another. Raises UsageError when no rule joins them."""
        for rule in self.rules:
            link = rule.match(source, target)
            if link is not None:
                return link
        raise UsageError(f"network: no link from {source} to {target}: expected a [[link]] that matches them")


def uniform(link: LinkModel) -> Network:
    """The same link between any two devices, each pair with one of its own."""
    return Network((Rule("*", "*", link),), {})


def load_network(path: Path) -> Network:
    """A network from TOML: `[[link]]` tables with `from`, `to`, a `preset` or numbers, and `[segments]` in GB/s.

    Numbers: latency_us, bandwidth_gbs, duplex, segment, jitter, fixed_ms_per_token, further_us, pageable_gbs, and what
    `crossdock calibrate` writes: wake_us, each_us, both with a _missed_us besides, fixed_missed_us. A rule counts in
    both directions unless it says `both = false`. Raises UsageError naming file, table, key, what was expected and what
    was found.
    """
    document = read_toml(path)
    only_keys(document, ("link", "segments"), str(path))
    rules: list[Rule] = []
    for where, table in tables_of(document, "link", str(path)):
        source, target = table.text("from", "*"), table.text("to", "*")
        both = table.flag("both", True)
        link = _read_link(table, where)
        rules.append(Rule(source, target, link))
        if both and source != target:
            rules.append(Rule(target, source, link))
    if not rules:
        raise UsageError(f"{path}: no [[link]] table")
    capacity = Table(document, str(path)).numbers("segments", low=1e-6)
    return Network(tuple(rules), {name: gbs * 1e9 for name, gbs in capacity.items()})


@cache
def links() -> Mapping[str, LinkModel]:
    """The known kinds of links by name."""
    return {link.name: link for _, link in _known()}


def rpc_link(name: str) -> LinkModel:
    """The kind of link that a row names in words."""
    text = name.strip().lower()
    for pattern, link in _known():
        if link.fixed_s_per_token and pattern.fullmatch(text):
            return link
    return links()[USUAL_RPC]


@cache
def _known() -> Sequence[tuple[re.Pattern[str], LinkModel]]:
    path = presets_file("links.toml")
    document = read_toml(path)
    only_keys(document, ("link",), str(path))
    return [
        (re.compile(table.text("names", "")), _read_link(table, where))
        for where, table in tables_of(document, "link", str(path))
    ]


def _read_link(table: Table, where: str) -> LinkModel:
    preset = table.text("preset", "")
    if preset and preset not in links():
        raise UsageError(f"{where}: preset is {preset!r}: expected one of {', '.join(links())}")
    base = links()[preset] if preset else None
    sources = table.texts("source")
    link = LinkModel(
        name=table.text("name", preset or None),
        latency_s=table.number("latency_us", base.latency_s * 1e6 if base else None, high=1e9) * 1e-6,
        bandwidth=table.number("bandwidth_gbs", base.bandwidth / 1e9 if base else None, low=1e-6, high=1e6) * 1e9,
        duplex=table.flag("duplex", base.duplex if base else True),
        segment=table.text("segment", base.segment if base else ""),
        jitter=table.number("jitter", base.jitter if base else 0.0, high=100.0),
        fixed_s_per_token=table.number("fixed_ms_per_token", base.fixed_s_per_token * 1e3 if base else 0.0, high=1e6)
        * 1e-3,
        further_s=table.number("further_us", base.further_s * 1e6 if base else 0.0, high=1e9) * 1e-6,
        pageable=table.number("pageable_gbs", base.pageable / 1e9 if base else 0.0, high=1e6) * 1e9,
        wake=table.toll("wake", base.wake if base else FREE),
        each=table.toll("each", base.each if base else FREE),
        fixed_missed_s=table.number("fixed_missed_us", base.fixed_missed_s * 1e6 if base else 0.0, high=1e9) * 1e-6,
        sources=(dict(base.sources) if base else {}) | sources,
    )
    table.end()
    return link


@cache
def _pattern(text: str) -> re.Pattern[str]:
    seen: list[str] = []
    parts = []
    for part in re.split(r"(\*|\{\w+\})", text):
        hole = _HOLE.fullmatch(part)
        if part == "*":
            parts.append(".*")
        elif hole is None:
            parts.append(re.escape(part))
        elif hole[1] in seen:
            parts.append(f"(?P={hole[1]})")
        else:
            seen.append(hole[1])
            parts.append(f"(?P<{hole[1]}>[^.]+)")
    return re.compile("".join(parts))
