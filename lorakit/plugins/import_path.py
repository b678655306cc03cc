"""Classes of other packages, by their import path.

`check_import_path` imports nothing: it looks for the module, and for the class's name in its source. `import_class` and
`instantiate` check the rest: that the class is of the right kind and takes the arguments.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from lorakit.errors import ConfigError, Problem

ClassT = TypeVar("ClassT")


def check_import_path(path: str) -> Iterator[Problem]:
    """Problems of an import path that show without importing the module; the key is `name`."""
    package, *inner = path.split(".")
    if not inner or not all(part.isidentifier() for part in (package, *inner)):
        yield Problem("name", f"{path!r} is not the import path of a class", 'write, for example, "torch.optim.RAdam"')
        return
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):  # such as `__main__`
        spec = None
    if spec is None:
        yield Problem("name", f"the package {package!r} is not installed", "pip install the package that has the class")
    place = package
    for part in inner:
        if spec is None:
            return
        module = PathFinder.find_spec(f"{place}.{part}", spec.submodule_search_locations or [])
        if module is None and spec.origin is not None and spec.origin.endswith(".py"):
            # Not a module, so a class, which the source must define, unless that cannot be seen in it.
            source = Path(spec.origin).read_text(encoding="utf-8", errors="replace")
            words = set(re.findall(r"\w+", source))
            if words and part not in words and "__getattr__" not in words and "import *" not in source:
                near = difflib.get_close_matches(part, words, n=1, cutoff=0.6)
                yield Problem("name", f"{place} has no {part!r}", f"did you mean {place}.{near[0]}?" if near else "")
        place, spec = f"{place}.{part}", module


def import_class(path: str, base: type[ClassT], section: str) -> type[ClassT]:
    """The class at an import path. Raises ConfigError if it cannot be imported or is not derived from `base`."""
    modules, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(modules), name)
    except (Exception, SystemExit) as error:  # an import can raise anything
        text = " ".join(str(error).split())
        raise ConfigError([Problem(f"{section}.name", f"{path} cannot be imported: {text}")]) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        what = f"{base.__module__}.{base.__qualname__}"
        raise ConfigError([Problem(f"{section}.name", f"{path} is not a class derived from {what}")])
    required = [one.name for one in _parameters(found.step)[1:] if one.default is inspect.Parameter.empty]  # type: ignore[attr-defined]
    if required:
        message = f"{path} needs {' and '.join(required)} at each step, which lorakit does not have"
        raise ConfigError([Problem(f"{section}.name", message, "choose another")])
    return found


def instantiate(cls: type[ClassT], first: object, arguments: Mapping[str, Any], section: str, **given: Any) -> ClassT:
    """An instance of a class, from its first argument, the config's arguments, and those of `given` that it takes.

    Lists become tuples where the argument's default is a tuple. Raises ConfigError, which names the wrong argument.
    """
    parameters = {parameter.name: parameter for parameter in _parameters(cls)[1:]}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    unknown = [name for name in arguments if name not in parameters and not takes_any]
    if unknown:
        hint = f"it takes {', '.join(name for name in parameters if name not in given)}"
        raise ConfigError(
            [Problem(f"{section}.args.{name}", f"{cls.__name__} has no such argument", hint) for name in unknown]
        )
    tuples = {name for name, parameter in parameters.items() if isinstance(parameter.default, tuple)}
    converted = {
        name: tuple(value) if name in tuples and isinstance(value, list) else value for name, value in arguments.items()
    }
    accepted = {name: value for name, value in given.items() if name in parameters}
    try:
        return cls(first, **accepted, **converted)  # type: ignore[call-arg]
    except Exception as error:  # a constructor can raise anything
        text = " ".join(str(error).split())
        raise ConfigError([Problem(f"{section}.args", f"{cls.__name__} rejects them: {text}")]) from error


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # not written in Python
        return []
