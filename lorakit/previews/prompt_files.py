"""Prompt files: a line of text, a table of TOML, or an object of JSON for each picture. Imports no torch.

The forms are those of sd-scripts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from lorakit.config.table_reader import TableReader, field_names, hint_for
from lorakit.config.toml_files import parse_toml
from lorakit.config.values import toml_repr
from lorakit.errors import ConfigError, PluginError, Problem
from lorakit.plugins.catalog import Catalog
from lorakit.previews.prompts import Prompt, PromptSettings, find_sampler

LINE_OPTIONS: Mapping[str, str] = {
    "--w": "width",
    "--h": "height",
    "--d": "seed",
    "--s": "steps",
    "--l": "scale",
    "--n": "negative_prompt",
    "--ss": "sampler",
    "--g": "guidance",
    "--cn": "controlnet_image",
    "--ctr": "cfg_trunc_ratio",
    "--rcfg": "renorm_cfg",
    "--fs": "flow_shift",
}
"""The options of a line, and what they set."""

OF_OTHER_MODELS = ("controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")
"""What sd-scripts knows for other models than those that it trains with the same options."""

TABLE_KEYS: Mapping[str, str] = {
    **{name: name for name in (*field_names(Prompt), *OF_OTHER_MODELS)},
    "guidance_scale": "guidance",
    "sample_steps": "steps",
    "sample_sampler": "sampler",
}
"""The keys of a table or object, sd-scripts' own included, and what they set."""


@frozen
class PromptFile:
    """The prompts of a file."""

    prompts: tuple[Prompt, ...]
    warnings: tuple[Problem, ...]
    """What is passed over."""


@frozen
class _Entry:
    """What a file says of one prompt."""

    table: Mapping[str, Any]
    """The settings, by their names in the file."""
    names: Mapping[str, str]
    """All names that such a file knows, and what they set."""
    paths: Mapping[str, str]
    """Where in the file each setting stands, by its name."""
    line: int | None = None
    """The line, in a text file."""


def read_prompts(source: Path | Sequence[str], settings: PromptSettings) -> PromptFile:
    """The prompts in a `.txt`, `.toml` or `.json` file, or in lines; what they leave open is as in `settings`.

    Raises ConfigError with every problem found in them.
    """
    defaults = {own.name: getattr(settings, own.name) for own in attrs.fields(PromptSettings)}
    prompts: list[Prompt | None] = []
    problems: list[Problem] = []
    warnings: list[Problem] = []
    name = str(source) if isinstance(source, Path) else ""
    base = source.parent if isinstance(source, Path) else Path()

    @cache
    def refusal(sampler: str) -> str:
        """Why a sampler cannot be used; empty if it can."""
        try:
            find_sampler(sampler, Catalog.discover())
        except PluginError as error:
            return str(error)
        return ""

    for entry in _entries(source):
        place = f"{name}, line {entry.line}" if name else f"prompt {entry.line}"
        reader = TableReader(base, file=place if entry.line else name)
        prompts.append(_prompt(reader, entry, defaults))
        for key, value in entry.table.items():
            if entry.names.get(key) == "sampler" and isinstance(value, str) and refusal(value):
                reader.report(entry.paths[key], refusal(value))
        problems += reader.problems
        foreign = [entry.paths[name] for name in entry.table if entry.names.get(name) in OF_OTHER_MODELS]
        warnings += [Problem(f"{reader.file}: {name}", "is for other models and has no effect") for name in foreign]
    if problems:
        # What several subsets inherit is wrong once.
        raise ConfigError(dict.fromkeys(problems))
    if not prompts:
        raise ConfigError([Problem(name, "holds no prompt" if name else "must hold a prompt")])
    return PromptFile(tuple(prompt for prompt in prompts if prompt), tuple(dict.fromkeys(warnings)))


def _prompt(reader: TableReader, entry: _Entry, defaults: Mapping[str, Any]) -> Prompt | None:
    """The prompt of an entry; None where it gives none, which the reader notes."""
    known = {name: key for name, key in entry.names.items() if key not in OF_OTHER_MODELS}
    for name in entry.table:
        if name not in entry.names:
            reader.report(entry.paths[name], "is not known", hint_for("", name, known, {}))
    table = {known[name]: value for name, value in entry.table.items() if name in known}
    paths = {known[name]: path for name, path in entry.paths.items() if name in known}
    values = reader.values(Prompt, table, "", paths)
    return None if values is None else Prompt(**{**defaults, **values})


def _entries(source: Path | Sequence[str]) -> list[_Entry]:
    if not isinstance(source, Path):
        lines = [" ".join(line.split()) for line in source]
        return list(_lines("\n".join(lines), TableReader(Path())))

    def refusal(message: str, hint: str = "") -> ConfigError:
        return ConfigError([Problem(str(source), message, hint)])

    form = _FORMS.get(source.suffix.lower())
    if form is None:
        raise refusal("is of no known form", f"its name must end in {', '.join(_FORMS)}")
    reader = TableReader(source.parent, file=str(source))
    try:
        entries = list(form(source.read_text(encoding="utf-8-sig"), reader))
    except OSError as error:
        raise refusal(f"cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise refusal("is not UTF-8 text", "save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise refusal(f"is not valid {source.suffix[1:].upper()}: {error}") from error
    if reader.problems:
        raise ConfigError(reader.problems)
    return entries


def _lines(text: str, _: TableReader) -> Iterator[_Entry]:
    """An entry for each line that is neither blank nor a comment."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        # An option starts behind a blank, so that hyphens inside of words mean nothing.
        words, *options = re.split(r"(?:^|\s+)--(?=[A-Za-z])", line.strip())
        table: dict[str, Any] = {"prompt": words} if words else {}
        for option in options:
            name, *value = option.split(None, 1)
            key = f"--{name.lower()}"
            table[key] = _value(LINE_OPTIONS.get(key, ""), "".join(value))
        yield _Entry(table, {"prompt": "prompt", **LINE_OPTIONS}, {name: name for name in table}, number)


def _value(key: str, text: str) -> Any:
    """The value of an option in a line; a number where the key takes one and the text is one."""
    if key == "negative_prompt":
        return text
    if key == "sampler":
        return text.lower()
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _from_toml(text: str, reader: TableReader) -> Iterator[_Entry]:
    """An entry for each `[[prompt.subset]]`, with what `[prompt]` says where the subset says nothing."""
    tables = parse_toml(text)
    reader.report_unknown_keys(tables, ["prompt"], "")
    common = reader.table(tables, "prompt")
    subsets = common.pop("subset", [{}] if common else [])
    if not isinstance(subsets, list) or not all(isinstance(subset, Mapping) for subset in subsets):
        reader.report("prompt.subset", f"must be a list of tables, [[prompt.subset]], not {toml_repr(subsets)}")
        return
    for index, subset in enumerate(subsets):
        given = {TABLE_KEYS.get(name) for name in subset}
        inherited = {name: value for name, value in common.items() if TABLE_KEYS.get(name, name) not in given}
        paths = {name: f"prompt.subset[{index}].{name}" for name in subset} | {n: f"prompt.{n}" for n in inherited}
        yield _Entry({**inherited, **subset}, TABLE_KEYS, {"prompt": f"prompt.subset[{index}].prompt", **paths})


def _from_json(text: str, reader: TableReader) -> Iterator[_Entry]:
    """An entry for each object or text of a list."""
    content = json.loads(text)
    for index, item in enumerate(content if isinstance(content, list) else [content]):
        table = {"prompt": item} if isinstance(item, str) else item
        if not isinstance(table, Mapping):
            reader.report(f"[{index}]", f"must be a text or an object, not {toml_repr(item)}")
            continue
        paths = {name: f"[{index}].{name}" for name in ("prompt", *table)}
        yield _Entry({name: value for name, value in table.items() if value is not None}, TABLE_KEYS, paths)


_FORMS: Mapping[str, Callable[[str, TableReader], Iterator[_Entry]]] = {
    ".txt": _lines,
    ".toml": _from_toml,
    ".json": _from_json,
}
