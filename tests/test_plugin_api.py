"""`lorakit.api`: what it promises is there, and the plugins in this repository import nothing else."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorakit import api
from lorakit.plugins.discovery import REGISTRATION_HOOKS
from lorakit.testing import contracts

ROOT = Path(__file__).parents[1]
PROMISED = re.compile(r"lorakit|lorakit_\w+(\.\w+)*|lorakit\.api|lorakit\.testing(\.\w+)*")
"""The modules that a plugin, and its tests, may import; `lorakit` itself for `lorakit.train`."""

TUTORIAL = ROOT / "docs" / "tutorial" / "write-a-plugin.md"
SOURCES = {
    **{str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in ROOT.glob("plugins/*/**/*.py")},
    **{
        f"{TUTORIAL.name}, block {number}": block
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(encoding="utf-8"), re.S))
    },
}


def imported_modules(source: str) -> Iterator[str]:
    """The modules of lorakit that a source imports, or imports from."""
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name for name in names if name.startswith("lorakit"))


@pytest.mark.parametrize("name", SOURCES)
def test_plugins_import_what_is_promised(name: str) -> None:
    """Plugins, their tests and the tutorial import `lorakit.api` and `lorakit.testing` alone."""
    assert [module for module in imported_modules(SOURCES[name]) if not PROMISED.fullmatch(module)] == []


def test_every_name_is_there_and_documented() -> None:
    """Each promised name can be imported from where type checkers find it, and says what it is."""
    assert api.__all__ == sorted(set(api.__all__))
    for name in api.__all__:
        value = getattr(api, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        api.Nothing  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    """The imports for type checkers are the table that imports go by at run time, name for name."""
    tree = ast.parse(inspect.getsource(api))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    aliases = {
        (node.module, alias.name, alias.asname)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert aliases == {(module, name, name) for name, module in api.MODULES.items()}


def test_every_kind_is_whole() -> None:
    """The base of each kind of component is in `lorakit.api`, and its contract in `lorakit.testing.contracts`."""
    for base in REGISTRATION_HOOKS.values():
        assert getattr(api, base.__name__) is base
        assert base.__name__.replace("Config", "Contract") in contracts.__all__
