"""What a plugin should import instead, where it imports something that lorakit does not promise and does not have."""

from __future__ import annotations

import ast
import difflib
import linecache
import textwrap
import traceback
from collections.abc import Mapping
from pathlib import Path

import lorakit.api

PACKAGE = Path(lorakit.api.__file__).parents[1]

RENAMED: Mapping[str, str] = {
    "half_waves": "cosine_factor",
    "load": "import_class",
    "made": "instantiate",
    "named": "with_import_path",
    "problem_of_length": "check_steps",
    "problems_of": "check_import_path",
    "resting_at_zero": "skip_at_zero_lr",
    "warning_of_warmup": "check_warmup",
    "whole_steps": "resolve_steps",
}
"""Names of the plugin API by other names that plugins know them by; all others are in `lorakit.api` as they were."""


def import_hint(error: ImportError) -> str:
    """What to write instead of an import from lorakit that failed; empty where that is not what failed."""
    module = error.name or ""
    package, _, inner = module.partition(".")
    if package != "lorakit" or inner.partition(".")[0] == "testing":
        return ""
    names = _imported_names(error)
    if names is None:
        return ""
    if module == "lorakit.api":
        near = [match for name in names for match in difflib.get_close_matches(name, lorakit.api.__all__, n=1)]
        missing = [name for name in names if name not in lorakit.api.__all__]
        return f"lorakit.api has no {' and no '.join(missing)}" + (f"; did you mean {near[0]}?" if near else "")
    promised = [RENAMED.get(name, name) for name in names]
    found = ", ".join(name for name in promised if name in lorakit.api.__all__)
    what = f"import {found} from lorakit.api" if found else "import from lorakit.api"
    return f"imports {module}, which is not part of the plugin API; {what}"


def _imported_names(error: ImportError) -> list[str] | None:
    """The names in the import statement that failed; None where the statement is in lorakit itself."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    if not frames or PACKAGE in Path(frames[-1].filename).parents:
        return None
    first, last = frames[-1].lineno or 1, frames[-1].end_lineno or 1
    source = textwrap.dedent("".join(linecache.getlines(frames[-1].filename)[first - 1 : last]))
    try:
        tree = ast.parse(source)
    except SyntaxError:  # behind a `try:` on the same line
        return []
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports for alias in node.names]
