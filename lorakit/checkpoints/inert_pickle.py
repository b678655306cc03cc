"""Pickles read without importing or calling anything that they name.

A pickle is a program for a stack machine that may call any Python function. This machine knows all instructions of
protocols 0 to 5, but whatever a program names is a placeholder, and so is what a call of it would have returned.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from attrs import frozen

_MOST_STEPS = 2_000_000
"""Instructions of a pickle. Those of Stable Diffusion have some 100,000, and each may take 100 bytes of memory."""

_LONGEST_NAME = 500


@frozen(eq=False)
class Placeholder:
    """Stands for a function or class that a pickle names, or for an object that a call of it would have returned."""

    name: str
    """Of the function or class, with its module: `numpy.dtype`."""
    is_object: bool = False
    """Whether it is a stand-in for an object."""


class Parameters(dict[str, Any]):
    """Stands for an object that is its named parameters, which are part of the state that it is given."""


Call = Callable[[str, tuple[Any, ...]], object]
"""Returns the stand-in for calling the function or class of that name with these arguments."""
Resolve = Callable[[object], object]
"""Returns the stand-in for the object that is stored outside the pickle under that id."""


def read_inertly(stream: BinaryIO, call: Call, resolve: Resolve) -> object:
    """The object in the pickle at a stream's position, with calls and persistent ids left to `call` and `resolve`.

    Dicts keep the items whose keys are text or whole numbers; sets are placeholders; the state that objects would be
    given is dropped, except for `Parameters`.
    For a damaged pickle it raises ValueError, IndexError, KeyError or another of Python's own exceptions.
    """
    machine = _Machine(call, resolve)
    for _ in range(_MOST_STEPS):
        code = stream.read(1)
        if code == b".":
            return machine.stack.pop()
        if code not in _BY_CODE:
            raise ValueError("it contains an unknown instruction" if code else "it is cut short")
        read_argument, act = _BY_CODE[code]
        act(machine, read_argument(stream) if read_argument else None)
    raise ValueError("its pickle is longer than that of any checkpoint")


class _Machine:
    """The state of a running pickle."""

    def __init__(self, call: Call, resolve: Resolve) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        """The stacks below each mark."""
        self.memo: dict[int, object] = {}
        self.call, self.resolve = call, resolve

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def popped(self, count: int) -> list[Any]:
        """Takes away the last values."""
        if len(self.stack) < count:
            raise ValueError("its pickle takes more values than it has pushed")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        """Takes away all that was pushed since the last mark."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def extend(self, items: list[Any]) -> None:
        """Add to the last value if it is a list."""
        if type(self.stack[-1]) is list:
            self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values by turns into the last value if it is a dict.

        Only texts and numbers are keys, as nothing else names a tensor. Others are not hashed, because that takes
        forever for a tuple of twice a tuple of twice a tuple.
        """
        if type(self.stack[-1]) is dict:
            pairs = zip(items[::2], items[1::2], strict=True)
            self.stack[-1].update({key: value for key, value in pairs if type(key) is str or _is_short(key)})

    def new_dict(self, items: list[Any]) -> None:
        self.push({})
        self.set_items(items)

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it contains an invalid name")
        if len(module) + len(name) > _LONGEST_NAME:
            raise ValueError("it has a name of an unusual length")
        self.push(Placeholder(f"{module}.{name}"))

    def make(self, function: object, arguments: object) -> None:
        """Push the stand-in for the result of a call."""
        if not isinstance(function, Placeholder) or not isinstance(arguments, tuple):
            raise ValueError("it calls something that is not a function")
        self.push(function if function.is_object else self.call(function.name, arguments))

    def make_named(self, text: str) -> None:
        arguments = tuple(self.since_mark())
        self.name(*text.split(" ", 1))
        self.make(self.stack.pop(), arguments)

    def make_first(self, function: object, *arguments: object) -> None:
        self.make(function, arguments)

    def memoize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def build(self) -> None:
        """Drop the state that the last value would be given; what is no longer as it was made is a call's result."""
        (state,) = self.popped(1)
        if isinstance(self.stack[-1], Parameters):
            named = state.get("_parameters") if isinstance(state, dict) else None
            self.stack[-1].update(named if isinstance(named, dict) else {})
        elif not isinstance(self.stack[-1], Placeholder | dict):
            self.push(self.call("__setstate__", (self.stack.pop(),)))


def _is_short(key: object) -> bool:
    return type(key) is int and 0 <= key < 2**31


_INSTRUCTIONS: Mapping[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda *_: None),
    **dict.fromkeys((
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE",
        "SHORT_BINUNICODE", "BINUNICODE8", "NONE",
    ), _Machine.push),
    "NEWTRUE": lambda machine, _: machine.push(value=True),
    "NEWFALSE": lambda machine, _: machine.push(value=False),
    "POP": lambda machine, _: machine.pop(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "MARK": lambda machine, _: machine.mark(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.push(machine.memo[index])),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "APPEND": lambda machine, _: machine.extend(machine.popped(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.popped(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.popped(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.popped(3))),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "DICT": lambda machine, _: machine.new_dict(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.popped(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "EMPTY_SET": lambda machine, _: machine.push(Placeholder("builtins.set", is_object=True)),
    "FROZENSET": lambda machine, _: machine.make(Placeholder("builtins.frozenset"), (machine.since_mark(),)),
    "ADDITEMS": lambda machine, _: machine.extend(machine.since_mark()),
    "GLOBAL": lambda machine, text: machine.name(*text.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*machine.popped(2)),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda machine, code: machine.name("copyreg", f"extension {code}")),
    "REDUCE": lambda machine, _: machine.make(*machine.popped(2)),
    "NEWOBJ": lambda machine, _: machine.make(*machine.popped(2)),
    "NEWOBJ_EX": lambda machine, _: machine.make(*machine.popped(3)[:2]),
    "INST": lambda machine, text: machine.make_named(text),
    "OBJ": lambda machine, _: machine.make_first(*machine.since_mark()),
    "BUILD": lambda machine, _: machine.build(),
    "PERSID": lambda machine, text: machine.push(machine.resolve(text)),
    "BINPERSID": lambda machine, _: machine.push(machine.resolve(machine.stack.pop())),
}  # fmt: skip

_BY_CODE = {
    found.code.encode("latin-1"): (found.arg.reader if found.arg else None, _INSTRUCTIONS[found.name])
    for found in pickletools.opcodes
    if found.name in _INSTRUCTIONS
}
"""How the argument of an instruction is read, if it has one, and what it does, by its byte in a pickle."""
