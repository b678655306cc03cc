"""The help text of config fields: the string that stands under each in the source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from itertools import pairwise


@cache
def field_docs(cls: type) -> dict[str, str]:
    """The help text of each field of a config class, its bases included; fields without one are left out."""
    docs: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__):
        if "__attrs_attrs__" in vars(ancestor):
            docs.update(_own_field_docs(ancestor))
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # a class without a source file, such as one of a zip
        return {}
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    docs = {}
    for statement, following in pairwise(body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            docs[statement.target.id] = " ".join(following.value.value.split())
    return docs
