"""The reference pages name all that there is; found by walking the code, not by the generator."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator

import attrs
import click
import pytest

from lorakit import api
from lorakit.api import hookspecs
from lorakit.api.components import Component, ObserverConfig
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.api.sampling import SamplerConfig
from lorakit.cli.group import cli
from lorakit.config.datasets import DataSection, DatasetConfig, SubsetConfig
from lorakit.config.load import COMPONENT_SECTIONS, PLAIN_SECTIONS
from lorakit.plugins.catalog import Catalog
from lorakit.plugins.discovery import REGISTRATION_HOOKS
from tests.docs.pages import ROOT, sections_of

REFERENCE = ROOT / "docs" / "reference"
KINDS: dict[str, type[Component]] = {
    "[model]": ModelFamilyConfig,
    **{f"[{section}]": base for section, (base, _) in COMPONENT_SECTIONS.items()},
    "[[observers]]": ObserverConfig,
    "Samplers": SamplerConfig,
}


def own_components(base: type[Component]) -> dict[str, type[Component]]:
    """The components of a kind that come with lorakit, by name."""
    found = [registration for same in Catalog.discover().of_kind(base).values() for registration in same]
    return {item.component.name: item.component for item in found if item.provider.is_of("lorakit")}


def page_sections(name: str) -> dict[str, str]:
    """The sections of a reference page, by heading."""
    return sections_of((REFERENCE / name).read_text(encoding="utf-8"), "##")


def rows(text: str) -> dict[str, list[str]]:
    """The other cells of each row of the tables in a text, by the key in its first."""
    found = re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.M)
    return {key: re.split(r"(?<!\\) \| ", cells) for key, cells in found}


def test_pages_are_current() -> None:
    """The pages are what `docs/generate.py` writes from the code as it is."""
    command = [sys.executable, "docs/generate.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_stale_pages_are_noticed() -> None:
    """`--check` fails when a page differs from what would be written, by a single character."""
    program = (
        "import sys, tempfile, pathlib, shutil; sys.path.insert(0, 'docs'); import generate;"
        "folder = pathlib.Path(tempfile.mkdtemp()); shutil.copytree(generate.FOLDER, folder, dirs_exist_ok=True);"
        "page = folder / 'hooks.md'; page.write_text(page.read_text(encoding='utf-8') + ' ', encoding='utf-8');"
        "generate.FOLDER = folder; generate.main(['--check'])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "hooks.md is stale" in result.stderr
    assert "config.md" not in result.stderr


@pytest.mark.parametrize("heading", KINDS)
def test_every_component_and_key_is_named(heading: str) -> None:
    """Each component has a heading, and each of its keys a row with type, default and meaning."""
    components = own_components(KINDS[heading])
    assert components
    shared, *_ = parts = sections_of(page_sections("config.md")[heading], "###")
    described = {title.partition('"')[2].rstrip('"'): text for title, text in parts.items() if title}
    assert described.keys() == components.keys()
    for name, component in components.items():
        keys = {**rows(parts[shared]), **rows(described[name])}
        assert keys.keys() >= {field.name for field in attrs.fields(component)}, name
        assert all(len(cells) == 3 and all(cells) for cells in keys.values())


@pytest.mark.parametrize("section", PLAIN_SECTIONS)
def test_every_key_of_other_sections_is_named(section: str) -> None:
    """Sections that are no components have a row for exactly their keys."""
    keys = [field.name for field in attrs.fields(PLAIN_SECTIONS[section])]
    assert keys
    assert list(rows(page_sections("config.md")[f"[{section}]"])) == keys


def test_every_key_of_the_data_is_named() -> None:
    """[data] has the rows of the section, of datasets and of subsets, each under its own heading."""
    parts = sections_of(page_sections("config.md")["[data]"], "###")
    expected = {"": (DataSection, {"config"}), "A dataset": (DatasetConfig, set()), "A subset": (SubsetConfig, set())}
    assert parts.keys() == expected.keys()
    for title, (cls, more) in expected.items():
        names = {field.name for field in attrs.fields(cls)} - {"datasets", "subsets"}
        assert rows(parts[title]).keys() == names | more, title


def test_limits_and_defaults_are_told() -> None:
    """Types, limits and defaults are those of the class, for one key of each sort."""
    sections = page_sections("config.md")
    rank = rows(sections_of(sections["[network]"], "###")['name = "lierla"'])["rank"]
    assert rank[:2] == ["whole number, at least 1", "`4`"]
    training = rows(sections["[training]"])
    assert training["mixed_precision"][:2] == ['`"auto"`, `"no"`, `"fp16"`, `"bf16"`', '`"auto"`']
    assert training["max_epochs"][:2] == ["whole number, at least 1", "absent"]
    assert rows(sections["[output]"])["dir"][:2] == ["path", "—"]


def below(path: str, command: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    """A command and those below it, by what is typed to run them."""
    yield path, command
    for name in command.list_commands(context) if isinstance(command, click.Group) else ():
        own = command.get_command(context, name)
        assert own is not None
        yield from below(f"{path} {name}", own, context)


def test_every_command_is_described() -> None:
    """Each command has a section with all its arguments and options."""
    sections = page_sections("commands.md")
    context = click.Context(cli, info_name="lorakit")
    commands = {path: command for path, command in below("lorakit", cli, context) if path != "lorakit"}
    assert len(commands) >= 5
    assert sections.keys() - {""} == commands.keys()
    for name, command in commands.items():
        described = [key.split()[0] for key in rows(sections[name])]
        for parameter in command.params:
            is_argument = isinstance(parameter, click.Argument)
            assert (parameter.human_readable_name if is_argument else parameter.opts[0]) in described, name


def test_every_hook_is_described() -> None:
    """Each hook has a section with its signature and its docstring, and for classes their base and `build`."""
    sections = page_sections("hooks.md")
    hooks = {name: hook for name, hook in vars(hookspecs).items() if hasattr(hook, "lorakit_spec")}
    assert hooks.keys() == {*REGISTRATION_HOOKS, "detect_model_family"}
    assert hooks.keys() < sections.keys()
    for name, hook in hooks.items():
        arguments = ", ".join(f"{key}: {type_}" for key, type_ in hook.__annotations__.items() if key != "return")
        assert f"def {name}({arguments}) -> {hook.__annotations__['return']}: ...\n" in sections[name]
        assert str(inspect.getdoc(hook)) in sections[name]
        if name in REGISTRATION_HOOKS:
            assert f"`lorakit.api.{REGISTRATION_HOOKS[name].__name__}`" in sections[name]


@pytest.mark.parametrize("base", [Component, *REGISTRATION_HOOKS.values()], ids=lambda base: base.__name__)
def test_every_member_of_every_base_is_described(base: type[Component]) -> None:
    """Class attributes and fields are listed with their types, and methods with signature and docstring."""
    sections = page_sections("hooks.md")
    hook = next((name for name, kind in REGISTRATION_HOOKS.items() if kind is base), "What every component has")
    annotated = {name for name in inspect.get_annotations(base) if not name.startswith("_")}
    own = {name for name in vars(base) if not name.startswith("_")} - annotated
    assert "build" in own or base is Component
    for name in annotated:
        assert re.search(rf"^- `{name}: [^`]+`: \w", sections[hook], re.M), name
    for name in own:
        member = inspect.getattr_static(base, name)
        if isinstance(member, str | bool | tuple):  # such as `kind`, which `Component` describes
            assert f"- `{name}: " in sections["What every component has"], name
        else:
            assert f"def {name}(" in sections[hook], name
            assert str(inspect.getdoc(getattr(base, name))) in sections[hook], name


def test_every_promised_name_is_described() -> None:
    """All of `lorakit.api` is in the table of what a plugin may import, with what it is."""
    names = rows(page_sections("hooks.md")["What a plugin may import"].replace("`*", "`"))
    assert list(names) == api.__all__
    assert all(text for (text,) in names.values())
