"""From a command line as it was typed or pasted to the options of `train_network.py` in it.

Parsing is strict: an option that does not exist, or a value of the wrong type, is an error.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lorakit.config.toml_files import read_toml
from lorakit.config.values import shown
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.options import OPTIONS, Option

SCRIPT = "train_network.py"

_ENDS = re.compile(r"[ \t]+[\\^`][ \t]*(?:\r?\n|\Z)")
_WINDOWS = re.compile(r"\^[ \t]*\r?\n|\b[A-Za-z]:\\|(?:^|[\s=\"'])\.{1,2}\\", re.M)


def read_arguments(arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """The options that a command line gives, by name; with `--config_file`, also those of that file.

    Relative paths are relative to `folder`. An option of the command line wins over one of the file.
    Raises ConfigError, which names all unknown options.
    """
    given = parse(script_arguments(split(arguments)))
    if "config_file" not in given:
        return given
    path = folder / given["config_file"]
    path = path if path.suffix == ".toml" else path.with_name(f"{path.name}.toml")
    return {**read_options_file(path), **given}


def split(arguments: Sequence[str]) -> list[str]:
    """The words of a command line; one argument with blanks in it is a whole line, or several, as it was pasted."""
    words = list(arguments)
    if len(words) != 1 or not re.search(r"\s", words[0].strip()):
        return [word for word in words if word.strip() not in ("", "\\", "^", "`")]
    text = _ENDS.sub(" ", words[0])
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    if _WINDOWS.search(words[0]):
        lexer.escape = ""
    try:
        return list(lexer)
    except ValueError as error:
        raise _refusal("the command line", "has a quotation mark without its partner", "close the quotation") from error


def script_arguments(words: Sequence[str]) -> list[str]:
    """What stands behind `train_network.py`; everything where the first word is an option already."""
    for number, word in enumerate(words):
        name = re.split(r"[/\\]", word)[-1]
        if name == SCRIPT:
            return list(words[number + 1 :])
        if re.fullmatch(r"\w*train\w*\.py", name):
            raise _refusal(word, f"is another script than {SCRIPT}", "only that one's options are known")
    if not words or not words[0].startswith("--"):
        raise _refusal(
            "the command line", f"neither names {SCRIPT} nor starts with one of its options",
            "give the whole line: lorakit from-kohya accelerate launch train_network.py --…",
        )  # fmt: skip
    return list(words)


def parse(words: Sequence[str]) -> dict[str, Any]:
    """The options in words, by name; unambiguous abbreviations count, as with sd-scripts."""
    known, unknown = _parser().parse_known_args(list(words))
    if unknown:
        raise ConfigError([_unknown(word) for word in unknown if word.startswith("-")] or [_stray(unknown[0])])
    return vars(known)


def read_options_file(path: Path) -> dict[str, Any]:
    """The options in a file for `--config_file`; its tables have no meaning, as with sd-scripts."""
    try:
        tables = read_toml(path)
    except ValueError as error:
        raise _refusal("--config_file", f"{path} {error}") from error
    values: dict[str, Any] = {}
    for key, value in tables.items():
        values |= value if isinstance(value, Mapping) else {key: value}
    found, problems = {}, []
    for key, value in values.items():
        try:
            found[key] = _from_toml(OPTIONS[key], value)
        except KeyError:
            problems.append(_unknown(key, f"{path.name}: "))
        except ValueError as error:
            problems.append(Problem(f"{path.name}: {key}", str(error)))
    if problems:
        raise ConfigError(problems)
    return found


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        about = re.fullmatch(r"argument (--\w+): (.*)", message, re.S)
        raise _refusal(about[1], about[2]) if about else _refusal("the command line", message)


def _parser() -> _Parser:
    parser = _Parser(prog=SCRIPT, add_help=False, argument_default=argparse.SUPPRESS)
    for option in OPTIONS.values():
        settings: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
        if option.kind != "flag":
            settings = {"type": _from_text(option)}
            if option.kind in ("texts", "floats"):
                settings["nargs"] = "*"
        parser.add_argument(f"--{option.name}", **settings)
    return parser


def _from_text(option: Option) -> Callable[[str], Any]:
    """What makes the option's value from the text behind it."""
    convert = _CONVERSIONS[option.kind]

    def value(text: str) -> Any:
        try:
            found = convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {_WORDS[option.kind]}, not {text!r}") from error
        if option.choices and found not in option.choices:
            raise argparse.ArgumentTypeError(_not_a_choice(option, found))
        return found

    return value


def _from_toml(option: Option, value: Any) -> Any:
    """The value if it is of the option's type; raises ValueError with the end of a sentence that starts with it."""
    if option.kind in ("texts", "floats"):
        items = value if isinstance(value, list) else [value]
        single = str if option.kind == "texts" else (int, float)
        fits = all(isinstance(item, single) and not isinstance(item, bool) for item in items)
        value = items if fits else value
    elif option.kind == "int or share" and isinstance(value, str):
        return whole_or_share(value)
    else:
        types = _TYPES[option.kind]
        fits = isinstance(value, types) and (option.kind == "flag" or not isinstance(value, bool))
    if not fits:
        raise ValueError(f"must be {_WORDS[option.kind]}, not {shown(value)}")
    if option.choices and value not in (*option.choices, *option.in_files):
        raise ValueError(_not_a_choice(option, value))
    return value


def whole_or_share(text: str) -> int | float:
    """A number of steps, or a share of the run below 1, which may be given in per cent: `500`, `0.1`, `10%`."""
    if text.endswith("%"):
        return float(text[:-1]) / 100
    value = float(text)
    return int(text) if value >= 1 else value


_CONVERSIONS: Mapping[str, Callable[[str], Any]] = {
    "int": int, "float": float, "text": str, "path": str, "texts": str, "floats": float, "int or share": whole_or_share,
}  # fmt: skip
_TYPES: Mapping[str, Any] = {
    "flag": bool, "int": int, "float": (int, float), "text": str, "path": str, "int or share": (int, float),
}  # fmt: skip
_WORDS: Mapping[str, str] = {
    "flag": "true or false",
    "int": "a whole number",
    "float": "a number",
    "text": "a text",
    "path": "a path",
    "texts": "texts",
    "floats": "numbers",
    "int or share": "whole steps, or a share below 1",
}


def _not_a_choice(option: Option, value: object) -> str:
    return f"must be one of {', '.join(map(str, option.choices))}, not {value!r}"


def _unknown(word: str, place: str = "") -> Problem:
    """What is said of an option that sd-scripts does not have."""
    name = word.lstrip("-").partition("=")[0]
    near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.6)
    dashes = "" if place else "--"
    hint = f"did you mean {dashes}{near[0]}?" if near else ""
    return Problem(f"{place}{dashes}{name}", f"is not an option of {SCRIPT}", hint)


def _stray(word: str) -> Problem:
    return Problem(repr(word), "belongs to no option", "a value with blanks in it must stand in quotation marks")


def _refusal(key: str, message: str, hint: str = "") -> ConfigError:
    return ConfigError([Problem(key, message, hint)])
