"""Run untrusted Jinja templates: no way out, and limits on loops, calls and the size of what they build."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from itertools import islice
from typing import Any, Final

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import FILTERS
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE: Final = 64 << 10  # characters of a template; known ones have up to 20,000
MAX_OUTPUT: Final = 4 << 20  # characters of the result and of every value on the way
MAX_STEPS: Final = 200_000  # loop passes and calls in all; looking at values counts too
_CHARACTERS: Final = 250  # looked at per step
_MEMBERS: Final = 4  # looked at per step
_MAX_STRIPPED: Final = 100  # different characters to strip: each character of the text is compared with all of them

_FILTERS: Final = (
    "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items", "last",
    "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round", "safe", "select",
    "selectattr", "sort", "title", "trim", "unique", "upper",
)  # fmt: skip
_STRING_METHODS: Final = frozenset({
    "capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower", "isspace",
    "isupper", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rpartition",
    "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
})  # fmt: skip


_VALUES: Final = (str, list, tuple, set, frozenset, Mapping, KeysView, ValuesView, ItemsView, range)
_TRIM: Final = FILTERS["trim"]


class TemplateRefusalError(Exception):
    """The template called `raise_exception`: it does not want this conversation."""


class Sandbox(ImmutableSandboxedEnvironment):
    """One rendering of one template. Loops, calls, filters and tests are counted, everything they see is measured.

    A step stands for at most some ten microseconds, so that a template made to waste time is stopped within seconds.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: datetime | None) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self._steps = MAX_STEPS
        self._room = MAX_OUTPUT
        self._now = now
        self.finalize = self._emit
        known: dict[str, Any] = {name: FILTERS[name] for name in _FILTERS}
        known.update(join=self._join, replace=self._replace, string=self._string, tojson=self._tojson)
        self.filters = {name: self._metered(function) for name, function in known.items()}
        known = {**TESTS}
        self.tests = {name: self._metered(function) for name, function in known.items()}
        self.globals = {
            "range": self._range, "namespace": self.globals["namespace"], "dict": dict, "raise_exception": _refuse,
            "strftime_now": self._strftime, "_concat": self._concat, "_each": self._each,
            "_sized": self._sized,
        }  # fmt: skip

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """The output. Raises SecurityError beyond a limit and TemplateRefusalError when the template says no."""
        tree = _Counted().visit(self.parse(source))
        tree.set_environment(self)
        template = self.from_string(tree)
        pieces: list[str] = []
        total = 0
        for piece in template.generate(variables):
            total += len(piece)
            if total > MAX_OUTPUT:
                raise SecurityError(f"more than {MAX_OUTPUT:,} characters of output")
            pieces.append(piece)
        return "".join(pieces)

    def wrap_str_format(self, value: Any) -> None:
        """No `format`: its field widths build what no limit sees."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Strings keep the methods that templates need and lose those that pad or format; numbers have none."""
        if isinstance(obj, (int, float)) or (isinstance(obj, str) and attr not in _STRING_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Count calls, and measure what they are given and what `replace` would build."""
        self._spend(1)
        owner = getattr(obj, "__self__", None)
        name = getattr(obj, "__name__", "")
        self._measure([args, kwargs, owner if isinstance(owner, _VALUES) else None])
        if isinstance(owner, str) and name == "replace":
            return self._replace(owner, *args, **kwargs)
        if isinstance(owner, str) and name.endswith("strip"):
            _check_stripped(args)
        if isinstance(obj, LoopContext):  # a recursive loop
            args = (self._each(args[0]), *args[1:]) if args else args
        return super().call(context, obj, *args, **kwargs)

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that counts as a call; what it is given and gives back is measured, and made at once."""

        @functools.wraps(function)  # with the marks that say whether it is given the context
        def metered(*args: Any, **kwargs: Any) -> Any:
            self._spend(1)
            args = tuple(self._each(a) if _runs(a) else a for a in args)
            self._measure([args, kwargs])
            if function is _TRIM:
                _check_stripped(args[1:] or tuple(kwargs.values()))
            result = function(*args, **kwargs)
            return self._each(result) if _runs(result) else result

        return metered

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Measure sums and products before they are built."""
        if operator == "+":
            self._measure([left, right])
        elif operator != "%" and not _small(left, right, operator):
            raise SecurityError(f"a product or power of {left!r:.40} and {right!r:.40}")
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("string formatting with %")
        return super().call_binop(context, operator, left, right)

    def _spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise SecurityError(f"more than {MAX_STEPS:,} loop passes and calls")

    def _measure(self, value: Any) -> int:
        """Size of a value in characters and members; raises when it is over the limit, however deep it nests."""
        characters, members, stack = 0, 0, [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                characters += len(item)
            elif isinstance(item, Mapping):
                stack += [*item.keys(), *item.values()]
            elif isinstance(item, range):
                members += len(item)
            elif isinstance(item, _VALUES):
                stack += item
            members += 1
            if members > self._steps * _MEMBERS:
                self._spend(members // _MEMBERS + 1)
            if characters + members + len(stack) > MAX_OUTPUT:
                raise SecurityError(f"a value of more than {MAX_OUTPUT:,} characters")
        self._spend(characters // _CHARACTERS + members // _MEMBERS)  # looking at it takes time too
        return characters + members

    def _emit(self, value: Any) -> Any:
        self._room -= self._measure(value)
        if self._room < 0:
            raise SecurityError(f"more than {MAX_OUTPUT:,} characters of output")
        return value

    def _each(self, values: Iterable[Any]) -> list[Any]:
        """A loop's values, counted."""
        items = list(islice(values, self._steps + 1))
        self._spend(len(items))
        return items

    def _sized(self, value: Any) -> Any:
        self._measure(value)
        return value

    def _concat(self, *values: Any) -> str:
        self._measure(list(values))
        return "".join(map(str, values))

    def _join(self, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        items = self._each(values)
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        self._measure([*items, separator])
        if len(separator) * len(items) > MAX_OUTPUT:
            raise SecurityError(f"a value of more than {MAX_OUTPUT:,} characters")
        return str(separator).join(map(str, items))

    def _replace(self, text: Any, old: str, new: str, count: int = -1) -> str:
        self._measure(text)
        text = str(text)
        if (text.count(old) or 1) * len(new) > MAX_OUTPUT:
            raise SecurityError(f"a value of more than {MAX_OUTPUT:,} characters")
        result: str = text.replace(old, new, -1 if count is None else count)
        return result

    def _string(self, value: Any) -> str:
        self._measure(value)
        return str(value)

    def _tojson(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None,
        separators: tuple[str, str] | None = None, sort_keys: bool = False,
    ) -> str:  # fmt: skip
        self._measure(value)
        if indent is not None and not 0 <= indent <= 16:
            raise SecurityError(f"an indentation of {indent}")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def _range(self, *bounds: int) -> range:
        values = range(*bounds)
        if len(values) > MAX_STEPS:
            raise SecurityError(f"a range of {len(values):,} numbers")
        return values

    def _strftime(self, form: str) -> str:
        if len(form) > 100:
            raise SecurityError("a date format of more than 100 characters")
        return (self._now or datetime.now()).strftime(form)


def _refuse(message: object = "") -> None:
    raise TemplateRefusalError(str(message))


def _runs(value: object) -> bool:
    """True for what is computed member by member while somebody takes them."""
    return isinstance(value, Iterator) and not isinstance(value, LoopContext)


def _check_stripped(arguments: tuple[Any, ...]) -> None:
    if any(isinstance(value, str) and len(value) > _MAX_STRIPPED for value in arguments):
        raise SecurityError(f"more than {_MAX_STRIPPED} characters to strip")


def _small(left: Any, right: Any, operator: str) -> bool:
    """True for numbers whose product or power stays small."""
    if not isinstance(left, (int, float)) or not isinstance(right, (int, float)):
        return False
    return abs(left) < 1 << 32 and abs(right) < (64 if operator == "**" else 1 << 32)


class _Counted(NodeTransformer):
    """Wraps what loops run over in `_each`, what `~` joins in `_concat`; what is compared or cut in `_sized`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _call("_each", [node.iter], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("_concat", list(node.nodes), node.lineno)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _call("_sized", [node.node], node.lineno)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.expr = _call("_sized", [node.expr], node.lineno)
        for operand in node.ops:
            operand.expr = _call("_sized", [operand.expr], node.lineno)
        return node


def _call(name: str, arguments: list[Any], lineno: int) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load", lineno=lineno), arguments, [], None, None, lineno=lineno)
