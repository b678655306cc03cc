"""From a command line as it was typed or pasted to the options of sd-scripts in it.

Parsing is strict: an option that does not exist, or a value of the wrong type, is an error.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lorakit.config.sd_scripts import OPTIONS
from lorakit.config.sd_scripts_option import Option
from lorakit.config.toml_files import read_toml
from lorakit.config.training_scripts import (
    ANIMA_TRAIN_NETWORK,
    FLUX_TRAIN_NETWORK,
    MODELS,
    SCRIPTS,
    SDXL_TRAIN_NETWORK,
    TRAIN_NETWORK,
    Script,
)
from lorakit.errors import ConfigError, Problem
from lorakit.kohya.gui_files import is_gui_file, read_gui_file, what_it_trains
from lorakit.kohya.options_files import (
    WORDS,
    Given,
    not_a_choice,
    options_of,
    read_options_file,
    unknown_option,
    whole_or_share,
)

OTHER_MODELS: Mapping[str, str] = {
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX",
    "lumina": "Lumina",
    "hunyuan": "HunyuanImage",
    "anima": "Anima",
}
"""Models with scripts and network modules of their own, by what the names of these contain."""

_WHOLE = "trains the whole model"
_OTHER_SCRIPTS: Mapping[str, str] = {
    "fine_tune.py": f"{_WHOLE} (fine-tuning)",
    "train_db.py": f"{_WHOLE} (DreamBooth)",
    "sdxl_train.py": f"{_WHOLE}, SDXL",
    "sd3_train.py": f"{_WHOLE}, Stable Diffusion 3",
    "flux_train.py": f"{_WHOLE}, FLUX",
    "lumina_train.py": f"{_WHOLE}, Lumina",
    "anima_train.py": f"{_WHOLE}, Anima",
    "train_leco.py": "trains a LoRA from prompts without images (LECO)",
    "sdxl_train_leco.py": "trains a LoRA for SDXL from prompts without images (LECO)",
}
"""What other scripts do, where their names do not say it."""

_KINDS: tuple[tuple[str, str], ...] = (
    (r"textual_inversion", "trains an embedding (textual inversion)"),
    (r"control_?net", "trains a ControlNet"),
    (r"train_network|network_xl", "trains a LoRA"),
    (r"(merge|resize|extract)\w*lora|lora\w*(merge|resize|extract)|svd_merge", "changes LoRA files"),
    (r"^gen_img|inference", "generates images"),
)
"""What a part of a script's name says that it does."""

_MODELS_OF_SCRIPTS: Mapping[str, str] = {**OTHER_MODELS, "sdxl": "SDXL"}
"""Models by what the names of their scripts begin with."""

_LORA_INSTEAD: Mapping[str, Script] = {
    "fine_tune.py": TRAIN_NETWORK,
    "train_db.py": TRAIN_NETWORK,
    "sdxl_train.py": SDXL_TRAIN_NETWORK,
    "flux_train.py": FLUX_TRAIN_NETWORK,
    "anima_train.py": ANIMA_TRAIN_NETWORK,
}
"""The script that trains a LoRA of the same model, by the name of one that trains the whole model."""

_NAMES = " or ".join([", ".join(script.name for script in SCRIPTS[:-1]), SCRIPTS[-1].name])

_ENDS = re.compile(r"[ \t]*[\\^`][ \t]*(?:\r?\n|\Z)")
_COMMENTS = re.compile(r"^[ \t]*#.*$", re.M)
_WINDOWS = re.compile(r"\^[ \t]*\r?\n|\b[A-Za-z]:\\|(?:^|[\s=\"'])\.{1,2}\\", re.M)
_TYPESET = {ord("“"): '"', ord("”"): '"', ord("„"): '"'}


def read_arguments(arguments: Sequence[str], folder: Path) -> Given:
    """The options that a command line gives, with those of its files.

    Files are `--config_file`, and those that stand in front of the options: files for `--config_file`, dataset files,
    and files of the kohya_ss GUI. Relative paths are relative to `folder`. An option of the command line wins over one
    of a file, and a later file over an earlier one. Raises ConfigError, which names all unknown options.
    """
    is_file = len(arguments) == 1 and _exists(folder, arguments[0])
    words = list(arguments) if is_file else split(arguments)
    files = []
    while words and not words[0].startswith("-") and words[0].lower().endswith((".toml", ".json")):
        files.append(words.pop(0))
    script, words = (None, words) if files else script_and_arguments(words)
    typed = parse(words, script)
    if "config_file" in typed:
        name = typed["config_file"]
        is_own = name.lower().endswith(".toml") or (name.lower().endswith(".json") and _exists(folder, name))
        files.append(name if is_own else f"{name}.toml")
    found: dict[str, Any] = {}
    sources: dict[str, str] = {}
    remarks: list[Problem] = []
    for file in files:
        given = _read_file(file, folder, typed)
        found |= given.options
        sources |= given.sources
        remarks += given.remarks
        script = script or given.script
    from_files = {name: source for name, source in sources.items() if name not in typed}
    return Given({**found, **typed}, from_files, tuple(remarks), script)


def _exists(folder: Path, name: str) -> bool:
    try:
        return (folder / name).is_file()
    except (OSError, ValueError):  # a name that is too long, or with a NUL in it
        return False


def _read_file(name: str, folder: Path, typed: Mapping[str, Any]) -> Given:
    path = folder / name
    try:
        tables = read_toml(path)
    except ValueError as error:
        hint = "" if Path(name).is_absolute() or path.exists() else f"relative paths are relative to {folder}"
        key = "--config_file" if "config_file" in typed else name
        raise _refusal(key, f"{path} {error}" if key != name else str(error), hint) from error
    if isinstance(tables.get("datasets"), list):
        return Given({"dataset_config": name}, {"dataset_config": "a dataset file"})
    if path.suffix.lower() != ".json":
        return read_options_file(path)
    if not is_gui_file(tables):
        does = what_it_trains(tables)
        message = "is not a kohya_ss file for LoRA training" + (f": it is for {does}" if does else "")
        raise _refusal(name, message, "supported are files saved by its LoRA tab, and sd-scripts' .toml files")
    return read_gui_file(name, tables, typed, lambda text, script: parse(split_line(text), script))


def split(arguments: Sequence[str]) -> list[str]:
    """The words of a command line; one argument with blanks in it is a whole line, or several, as it was pasted."""
    words = list(arguments)
    if len(words) != 1 or not re.search(r"\s", words[0].strip()):
        return [_with_dashes(word) for word in words if word.strip() not in ("", "\\", "^", "`")]
    return split_line(words[0])


def split_line(line: str) -> list[str]:
    """The words of a command line, or of several, as a shell splits them; raises ConfigError."""
    text = _ENDS.sub(" ", _COMMENTS.sub("", line.translate(_TYPESET)))
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    if _WINDOWS.search(line):
        lexer.escape = ""
    try:
        return [_with_dashes(word) for word in lexer]
    except ValueError as error:
        raise _refusal("the command line", "has an unclosed quotation mark", "close the quotation") from error


def _with_dashes(word: str) -> str:
    """A word with the two hyphens that a web page has made a dash of."""
    return re.sub(r"^[–—](?=[a-z])", "--", word)


def script_and_arguments(words: Sequence[str]) -> tuple[Script | None, list[str]]:
    """The script in a command line and what stands behind it; all, without a script, where an option is first."""
    scripts = {name: script for script in SCRIPTS for name in (script.name, *script.also)}
    for number, word in enumerate(words):
        name = re.split(r"[/\\]", word)[-1]
        if name in scripts:
            return scripts[name], list(words[number + 1 :])
        _refuse_other(name)
    if not words or not words[0].startswith("--"):
        raise _refusal(
            "the command line", f"neither names {_NAMES} nor starts with one of their options",
            "give the complete line, lorakit from-kohya accelerate launch train_network.py --…, or a file",
        )  # fmt: skip
    return None, list(words)


def _refuse_other(name: str) -> None:
    """Raises ConfigError for the name of another script of sd-scripts, which says what that one does."""
    does = _OTHER_SCRIPTS.get(name) or next((does for part, does in _KINDS if re.search(part, name)), "")
    if not re.fullmatch(r"\w+\.py", name) or not (does or "train" in name):
        return
    model = next((model for part, model in _MODELS_OF_SCRIPTS.items() if name.startswith(part)), "")
    if model and does and name not in _OTHER_SCRIPTS:
        does += f" for {model}"
    hint = MODELS
    if name in _LORA_INSTEAD:
        script = _LORA_INSTEAD[name]
        hint += f": give the options to {script.name}, with --network_module={script.network_module}"
    raise ConfigError([Problem(name, f"is not {_NAMES}" + (f": it {does}" if does else ""), hint)])


def parse(words: Sequence[str], script: Script | None = None) -> dict[str, Any]:
    """The options in words, by name; unambiguous abbreviations count, as with sd-scripts.

    Only those of the script are known; those of all scripts without one.
    """
    known, unknown = _parser(script).parse_known_args(list(words))
    if unknown:
        stray = Problem(repr(unknown[0]), "does not belong to any option", "a value with spaces must be quoted")
        options = [unknown_option(word, script=script) for word in unknown if word.startswith("-")]
        raise ConfigError(options or [stray])
    return vars(known)


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        about = re.fullmatch(r"argument (--\w+): (.*)", message, re.S)
        raise _refusal(about[1], about[2]) if about else _refusal("the command line", message)


def _parser(script: Script | None) -> _Parser:
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for option in map(OPTIONS.__getitem__, options_of(script)):
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
            raise argparse.ArgumentTypeError(f"must be {WORDS[option.kind]}, not {text!r}") from error
        if option.choices and found not in option.choices:
            raise argparse.ArgumentTypeError(not_a_choice(option, found))
        return found

    return value


_CONVERSIONS: Mapping[str, Callable[[str], Any]] = {
    "int": int, "float": float, "text": str, "path": str, "texts": str, "floats": float, "int or share": whole_or_share,
}  # fmt: skip


def _refusal(key: str, message: str, hint: str = "") -> ConfigError:
    return ConfigError([Problem(key, message, hint)])
