"""The generated part of `docs/explanation/architecture.md`: the folders of `lorakit/`, and who imports whom.

Layers come from the import-linter contract in `pyproject.toml`, imports from the code, and each folder's line is the
first line of its docstring. `docs/generate.py` writes it with the reference pages.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "explanation" / "architecture.md"
BEGIN = "<!-- Written by docs/generate.py from here on; change the code instead. -->\n"
END = "<!-- To here. -->\n"

EVERYWHERE = ("utils", "errors", "_version")
"""What most folders import; left out of the table."""


def page() -> str:
    """The page as it is, with its generated part made again."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + generated_part() + END + after


def generated_part() -> str:
    """The diagram and the table."""
    imports = direct_imports()
    rows = ["| folder | what is in it | imports |", "|---|---|---|"]
    for folder in folders():
        imported = (name for name in layers() if name in imports.get(folder, ()) and name not in EVERYWHERE)
        rows.append(f"| `{folder}/` | {first_line(folder)} | {', '.join(imported)} |")
    return f"\n```mermaid\nflowchart TD\n{chr(10).join(_arrows(imports))}\n```\n\n{chr(10).join(rows)}\n\n"


def layers() -> list[str]:
    """The modules and folders of the layer contract, the highest first; those of one layer as the contract has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (contract,) = [contract for contract in contracts if contract["type"] == "layers"]
    return [name.strip() for layer in contract["layers"] for name in re.split(r"[:|]", layer)]


def folders() -> list[str]:
    """Every package in `lorakit/` by its path: those of the layers from the highest down, each before what is in it."""
    package = ROOT / "lorakit"
    found = sorted(str(path.parent.relative_to(package)) for path in package.rglob("__init__.py"))
    order = layers()
    return sorted(found[1:], key=lambda folder: (order.index(folder.partition("/")[0]), folder))


def first_line(folder: str) -> str:
    """The first line of a package's docstring. Raises ValueError where it has none."""
    text = (ROOT / "lorakit" / folder / "__init__.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    if not docstring:
        raise ValueError(f"lorakit/{folder}/__init__.py has no docstring, which would be its line in {PAGE.name}")
    return docstring.partition("\n")[0]


def direct_imports() -> Mapping[str, set[str]]:
    """What each module or folder right in `lorakit/` imports of the others; imports for types alone do not count."""
    graph = grimp.build_graph("lorakit", exclude_type_checking_imports=True, cache_dir=None)
    found: dict[str, set[str]] = {}
    for module in graph.modules:
        importer = _top(module)
        imported = {_top(other) for other in graph.find_modules_directly_imported_by(module)}
        found.setdefault(importer, set()).update(imported - {importer, "__init__"})
    return found


def _top(module: str) -> str:
    """The module or folder right in `lorakit/` that a module belongs to; `__init__` for `lorakit` itself."""
    return module.split(".")[1] if "." in module else "__init__"


def _arrows(imports: Mapping[str, set[str]]) -> Iterator[str]:
    """The arrows of the diagram, none where others lead the same way; only folders and `errors` are in it."""
    nodes = [name for name in layers() if not name.startswith("_")]
    for importer in nodes:
        for imported in (name for name in nodes if name in imports[importer]):
            if not any(imported in _reachable(other, imports) for other in imports[importer] - {imported}):
                yield f"    {importer} --> {imported}"


def _reachable(start: str, imports: Mapping[str, set[str]]) -> set[str]:
    """All that a module or folder imports, directly or by way of others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = imports[waiting.pop()] - found
        found |= new
        waiting += new
    return found
