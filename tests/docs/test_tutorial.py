"""The tutorial “Write a plugin” shows the example's files and what lorakit really says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from lorakit.testing import contracts
from tests.guests import install, optimizer_source, write_metadata

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "plugins" / "lorakit-example"
TEXT = (ROOT / "docs" / "tutorial" / "write-a-plugin.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- (.+?) -->\n```\w+\n(.*?)```\n", TEXT, flags=re.DOTALL))
"""The marked blocks of code, each by what its mark says."""

FILES = {mark.removeprefix("file: "): block for mark, block in BLOCKS.items() if mark.startswith("file: ")}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with the example as an installer would put it there."""
    site = tmp_path / "site"
    shutil.copytree(EXAMPLE / "lorakit_example", site / "lorakit_example")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [f"{name} = {module}" for name, module in project["entry-points"]["lorakit"].items()]
    write_metadata(site, project["name"], "\n".join(["[lorakit]", *lines]))
    metadata = next(site.glob("*.dist-info/METADATA"))
    metadata.write_text(metadata.read_text().replace("Version: 1.0", f"Version: {project['version']}"))
    return site


@pytest.fixture
def config(train_tables: dict[str, Any], tmp_path: Path) -> Path:
    """The tutorial's config, with a model and pictures."""
    path = tmp_path / "config.toml"
    path.write_text(tomlkit.dumps({**train_tables, **tomllib.loads(BLOCKS["config"])}), encoding="utf-8")
    return path


def lorakit(*arguments: str | Path, folders: list[Path]) -> subprocess.CompletedProcess[str]:
    """What a command says when these folders, and nothing else of the kind, are installed beside lorakit."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    command = [sys.executable, "-m", "lorakit", *map(str, arguments)]
    return subprocess.run(command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("file", FILES)
def test_blocks_are_the_files(file: str) -> None:
    """Each marked block is the whole content of the file that it names."""
    assert FILES[file] == (ROOT / file).read_text(encoding="utf-8")


def test_shows_every_file_of_code() -> None:
    """No module of the example, and no test of it, is left out."""
    found = {str(file.relative_to(ROOT)) for file in EXAMPLE.rglob("*.py")}
    assert found | {"plugins/lorakit-example/pyproject.toml"} == set(FILES)


def test_lists_the_plugins(site: Path) -> None:
    """`lorakit plugins` says what the tutorial shows when only the optimizer is written yet."""
    for module in ("network.py", "observer.py"):
        (site / "lorakit_example" / module).unlink()
    said = lorakit("plugins", folders=[site]).stdout.splitlines()
    shown = BLOCKS["output of lorakit plugins, with optimizer.py alone"].splitlines()
    assert [line for line in shown if line != "…"] == [line for line in said if line in shown]


def test_the_config_is_good(site: Path, config: Path) -> None:
    """`lorakit check` finds nothing wrong with the tutorial's config, which names all of the example's components."""
    checked = lorakit("check", config, folders=[site])
    assert checked.returncode == 0, checked.stderr


def test_says_what_is_wrong(site: Path, config: Path) -> None:
    """The messages about wrong values are those of the tutorial."""
    mistakes = ["--set", "optimizer.betas=[0.9, 1.5]", "--set", "observers.0.every_n_steps=0"]
    said = lorakit("check", config, *mistakes, folders=[site]).stderr
    said = said.replace(str(config), "config.toml")
    assert said == BLOCKS["output of lorakit check, with betas = [0.9, 1.5] and every_n_steps = 0"]


def test_says_what_clashes(site: Path, config: Path, tmp_path: Path) -> None:
    """The message about two packages with one name is that of the tutorial, and its cure works."""
    other = install(tmp_path / "other", "lorakit-radam", radam_guest=optimizer_source("radam"))
    said = lorakit("check", config, folders=[site, other]).stderr
    assert said == BLOCKS["output of lorakit check, with another package that provides radam"]
    cured = lorakit("check", config, "--set", "optimizer.name=lorakit-example:radam", folders=[site, other])
    assert cured.returncode == 0, cured.stderr


def test_says_who_fails(site: Path, config: Path) -> None:
    """The message about a component that fails is that of the tutorial."""
    module = site / "lorakit_example" / "optimizer.py"
    module.write_text(module.read_text().replace("return RAdam(", "return 1 / 0, RAdam("))
    said = lorakit("train", config, folders=[site]).stderr.splitlines(keepends=True)
    assert said[-1] == BLOCKS["output of lorakit train, with 1 / 0 in build"]


def test_names_every_contract() -> None:
    """The table at the end names the suite of each kind."""
    named = set(re.findall(r"`(\w+Contract)`", TEXT))
    assert named == set(contracts.__all__) - {"ComponentContract"}
