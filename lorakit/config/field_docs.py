"""The help text of config fields, which is the string under each in the source, and their types in words."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from lorakit.api.dataset_source import DatasetSourceConfig
from lorakit.checkpoints import ModelPath

COMPARISONS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The help text of each field of a config class, its bases included; fields without one are left out."""
    docs: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__):
        try:
            source = inspect.getsource(ancestor) if "__attrs_attrs__" in vars(ancestor) else ""
            statements = [statement for top in ast.parse(textwrap.dedent(source)).body for statement in top.body]  # type: ignore[attr-defined]
        except (OSError, TypeError, SyntaxError, ValueError):  # a class without a source file, such as one of a zip
            continue
        for pair in pairwise(statements):
            match pair:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def type_in_words(type_: Any, validator: object = None) -> str:
    """A field's type, with the limits that its validator sets: `number, at least 0`."""
    # Validators describe themselves as `<Validator for x >= 0>`.
    limits = re.findall(r"x ([<>]=?) ([^>]+)>", repr(validator))
    return _type(type_) + "".join(f", {COMPARISONS[comparison]} {bound}" for comparison, bound in limits)


def _type(type_: Any) -> str:
    origin, members = get_origin(type_), get_args(type_)
    if origin in (Union, UnionType):
        return " or ".join(_type(member) for member in members if member is not type(None))
    if origin is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in members)
    if origin is Mapping:
        return "table"
    if origin is tuple:
        if get_origin(members[0]) is Literal:
            return f"list of {_type(members[0])}"
        return f"list of {_type(members[0])}s" if Ellipsis in members else f"[{', '.join(map(_type, members))}]"
    plain: Mapping[Any, str] = {
        bool: "`true`, `false`",
        int: "whole number",
        float: "number",
        str: "text",
        DatasetSourceConfig: "text",
        Path: "path",
        ModelPath: "path or Hub id",
    }
    return plain.get(type_, str(getattr(type_, "__name__", type_)))
