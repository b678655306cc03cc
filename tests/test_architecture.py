"""The house rules: imports run one way, what is small stays light, and code stays readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit

PACKAGE = Path(lorakit.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(node: ast.AST, path: str) -> Iterator[tuple[str, Definition]]:
    """All classes and functions in a syntax tree, with where they are."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield f"{path}:{child.lineno} {child.name}", child
        yield from definitions(child, path)


def all_definitions() -> list[tuple[str, Definition]]:
    """All classes and functions of the package."""
    return [found for file in FILES for found in definitions(ast.parse(file.read_text()), str(file.relative_to(ROOT)))]


def public_definitions(node: ast.AST, path: str) -> Iterator[tuple[str, Definition]]:
    """Public classes and functions, and the public methods of public classes; nothing that a function holds."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield f"{path}:{child.lineno} {child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public_definitions(child, path)


def test_imports_run_one_way() -> None:
    """The contracts in pyproject.toml hold: layers, and nobody imports the built-ins."""
    linter = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lorakit", "torch numpy PIL click cattrs tomlkit"),
        ("lorakit.api", "torch numpy PIL click cattrs tomlkit attrs"),
        ("lorakit.cli.commands", "torch numpy PIL cattrs tomlkit"),
        ("lorakit.cli.group", "torch numpy PIL cattrs tomlkit"),
        ("lorakit.plugins.catalog", "torch numpy PIL cattrs tomlkit safetensors"),
        ("lorakit.config.load", "torch numpy PIL tomlkit safetensors huggingface_hub"),
        ("lorakit.config.dump", "torch numpy PIL safetensors huggingface_hub"),
        ("lorakit.kohya.conversion", "torch numpy PIL tomlkit safetensors huggingface_hub"),
        ("lorakit.data.index", "torch"),
        ("lorakit.training.prepare", "torch safetensors"),
        ("lorakit.dataset_report.text", "torch safetensors imagehash"),
        ("lorakit.testing.plugin", "torch numpy"),
    ],
)
def test_light_modules_stay_light(module: str, absent: str) -> None:
    """Importing what checks, lists and configures brings in nothing heavy."""
    code = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in result.stdout.split()}
    assert imported & set(absent.split()) == set()


def test_no_component_imports_anything_heavy() -> None:
    """All built-in plugins together import neither torch nor an optional package before something is built."""
    code = (
        "import sys; from lorakit.plugins.catalog import Catalog;"
        "assert Catalog.discover().registrations; print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {
        "torch",
        "numpy",
        "diffusers",
        "transformers",
        "bitsandbytes",
        "lion_pytorch",
        "dadaptation",
        "tensorboard",
    }
    assert {name.partition(".")[0] for name in result.stdout.split()} & heavy == set()


def test_files_and_functions_are_short() -> None:
    """No file is over 400 lines, no function over 60, and none takes more than 6 parameters besides self."""
    files = [f"{file}: {lines} lines" for file in FILES if (lines := len(file.read_text().splitlines())) > 400]
    long, wide = [], []
    for place, node in all_definitions():
        if isinstance(node, ast.ClassDef):
            continue
        parameters = [p.arg for p in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if (node.end_lineno or 0) - node.lineno >= 60:
            long.append(place)
        if len([name for name in parameters if name not in ("self", "cls")]) > 6:
            wide.append(place)
    assert (files, long, wide) == ([], [], [])


def test_public_names_are_documented() -> None:
    """Every module, public class and public function says what it is; methods that override need not repeat it."""
    missing = []
    for file in FILES:
        tree = ast.parse(file.read_text())
        where = str(file.relative_to(ROOT))
        if not ast.get_docstring(tree):
            missing.append(where)
        for place, node in public_definitions(tree, where):
            if not ast.get_docstring(node) and not _overrides(node, tree):
                missing.append(place)
    assert missing == []


def _overrides(node: Definition, tree: ast.Module) -> bool:
    """Whether a function is a method of a class that has a base, which documents it."""
    return any(
        node in found.body and found.bases for _, found in definitions(tree, "") if isinstance(found, ast.ClassDef)
    )


def test_no_file_is_left_unfinished() -> None:
    """No marks of unfinished work, and postponed evaluation of annotations in every file with code."""
    marks = [f"{word}{end}" for word, end in (("TO", "DO"), ("FIX", "ME"), ("XX", "X"))]
    assert [str(file) for file in FILES if any(mark in file.read_text() for mark in marks)] == []
    future = "from __future__ import annotations"
    assert [str(file) for file in FILES if file.name != "__init__.py" and future not in file.read_text()] == []
