"""TOML and JSON files that users write by hand: their values, or what is wrong and how it is written instead.

Python's reader says what it met, such as `Invalid value (at line 98, column 8)`; who writes TOML once a year needs to
hear what to write.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.utils.wording import printable

LARGEST_FILE = 2**24
"""Bytes; no config that a person wrote is larger, but models are."""

_SUFFIXES = (".toml", ".json")
_IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cJXL ", b"\xff\x0a")


def read_toml(path: Path) -> dict[str, Any]:
    """The plain values of a TOML (or JSON) file; raises ValueError with the reason why it cannot be read."""
    try:
        if path.is_dir():
            raise ValueError(f"is a folder, not a file{_in_folder(path)}")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}{_near(path)}") from error
    what = next(_other_content(content), None)
    if what:
        raise ValueError(what)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8 text; save it as UTF-8") from error
    try:
        found = json.loads(text) if path.suffix.lower() == ".json" else parse_toml(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(_no_toml(text, path.suffix.lower(), error)) from error
    if not isinstance(found, dict):
        raise ValueError("must hold a table of keys")
    return found


def parse_toml(text: str) -> dict[str, Any]:
    """The values in a TOML text; raises ValueError with line, cause and cure."""
    text = text.replace("\r\n", "\n")
    try:
        # With a final line end, mistakes in the last line are reported with its number.
        return tomllib.loads(f"{text}\n")
    except RecursionError as error:
        raise ValueError("its lists are too deep") from error
    except ValueError as error:
        raise ValueError(_explain(text, str(error))) from error


def _no_toml(text: str, suffix: str, error: Exception) -> str:
    """What a text is that cannot be read as what the suffix of its file says."""
    if suffix == ".json":
        return f"is not valid JSON: {error}"
    if "train_network.py" in text or "accelerate launch" in text:
        cure = "`lorakit from-kohya -o config.toml` with this line behind it makes a config of it"
        return f"is a command line of sd-scripts, not a config; {cure}"
    if suffix in (".yaml", ".yml"):
        return "is YAML; configs are TOML, such as `lorakit init` writes"
    if text.lstrip().startswith("{"):
        return "is JSON; give it a name that ends in .json"
    return f"is not valid TOML: {error}"


def _in_folder(folder: Path) -> str:
    """What to name instead of a folder."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    except OSError:
        names = []
    if not names:
        return "; `lorakit init` writes a config"
    return f"; name a config in it: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"


def _near(path: Path) -> str:
    """A file beside a missing one whose name is nearly the same."""
    try:
        names = [found.name for found in path.parent.iterdir() if found.suffix.lower() in _SUFFIXES]
    except OSError:
        return ""
    own = path.name if path.suffix else f"{path.name}.toml"
    near = difflib.get_close_matches(own, names, n=1, cutoff=0.7)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _other_content(content: bytes) -> Iterator[str]:
    """What a file is that is no config; nothing where it may be one."""
    head = content[:512]
    is_container = head[4:8] == b"ftyp" or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
    if head.startswith(_IMAGES) or is_container or (head.startswith(b"BM") and b"\0" in head):
        yield "is an image, not a config"
    if head[8:9] == b"{" and b"\0" in head[:8] and int.from_bytes(head[:8], "little") < 2**31:
        yield "is a model or LoRA file (safetensors), not a config; set model.path in a config to a base model"
    if head.startswith(b"PK\x03\x04"):
        yield "is a model file (.ckpt, .pt) or another zip archive, not a config"
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        yield "is a model file (pickle), not a config"
    nulls = [head[start::2].count(0) for start in (0, 1)]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (head and max(nulls) >= 0.4 * len(head) / 2 > min(nulls)):
        yield "is UTF-16 text; save it as UTF-8"
    if b"\0" in head:
        yield "is a binary file, not a config"
    if len(content) > LARGEST_FILE:
        yield f"is larger than {LARGEST_FILE // 2**20} MiB, too large for a config"


_CURLY = "“”„‟‘’‚″«»＂"
_INVISIBLE = {"\xa0": "a no-break space", "\u200b": "an invisible space", "\ufeff": "an invisible mark"}
_FULL_WIDTH = {"−": "-", "＝": "=", "，": ",", "［": "[", "］": "]", "＃": "#", "：": "=", "\u3000": "a space"}
_BACKSLASH = ("Unescaped '\\'", "Invalid hex value", "Escaped character", "Illegal escape")
_LONGEST = 60


class _Line(NamedTuple):
    """A line with a mistake."""

    text: str
    """Without spaces around it and without a comment."""
    key: str
    """What precedes the first `=`, or the complete line."""
    value: str
    message: str
    """Of Python's TOML reader."""


def _explain(text: str, message: str) -> str:
    """What is wrong with a TOML text: `line 7: name = lierla: text needs quotation marks: name = "lierla"`.

    `message` is what tomllib says.
    """
    lines = text.split("\n")
    place = re.search(r" \(at line (\d+), column (\d+)\)$", message)
    number = min(int(place[1]), len(lines)) if place else len(lines)
    while number > 1 and not lines[number - 1].strip():
        number -= 1
    bare = re.sub(r" \(at [^)]*\)$", "", message)
    if bare.startswith(("Cannot overwrite", "Cannot declare", "Cannot mutate")):
        return _twice(lines, number, bare)
    if bare.startswith(("Unclosed array", "Invalid value", "Unclosed inline")):
        number = _opening(lines, number)
    if bare.startswith(("Unterminated string", "Expected \"'", "Expected \"\\'")):
        number = _unclosed(lines, number)
    stripped = _without_comment(lines[number - 1].strip())
    key, _, value = stripped.partition("=")
    line = _Line(stripped, key.strip(), value.strip(), bare)
    cure = next((cure for rule in _RULES for cure in rule(line)), f"{bare[:1].lower()}{bare[1:]}")
    return f"line {number}: {_cut(line.text)}: {printable(cure)}"


def _without_comment(line: str) -> str:
    """A line without the comment at its end, as far as quotation marks, which may be wrong, show where it begins."""
    code = re.match(r"(?:[^\"'#]|\"[^\"]*\"|'[^']*')*", line)
    if code and line[code.end() :].startswith("#") and line[: code.end()][-1:].isspace():
        return code[0].rstrip()
    return re.sub(r"\s+#[^\"']*$", "", line)


def _cut(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"


def _opening(lines: Sequence[str], number: int) -> int:
    """The line where a list begins that is not closed before this line; the line itself where there is none."""
    depth = 0
    for earlier in range(number - 1, 0, -1):
        text = lines[earlier - 1].strip()
        depth += text.count("]") - text.count("[")
        if re.fullmatch(r"[\w.\"'-]+\s*=\s*\[.*", text):
            return earlier if depth < 0 else number
        if text.startswith("["):
            break
    return number


def _unclosed(lines: Sequence[str], number: int) -> int:
    """The first line with a text that does not end in it; the line itself where there is none."""
    for count, line in enumerate(lines, 1):
        rest = re.sub(r"\"[^\"]+\"|'[^']+'|#.*", "", line)
        if re.search(r"=\s*(\"\"\"|'''|')", rest) and rest.count("'") != 2:
            return count
    return number


def _twice(lines: Sequence[str], number: int, message: str) -> str:
    """That a key or section is there already, and in which line."""
    header = ""
    places: dict[str, int] = {}
    for count, line in enumerate(lines[:number], 1):
        text = line.strip()
        section = re.match(r"\[+\s*([^\]]+?)\s*\]+", text)
        name = re.match(r"([\w.\"'-]+)\s*=", text)
        if section:
            header, key = section[1], section[1]
            if text.startswith("[["):  # each has its own keys
                places = {known: place for known, place in places.items() if not known.startswith(f"{key}.")}
                if count != number:
                    continue
        elif name:
            key = f"{header}.{name[1]}" if header else name[1]
        else:
            continue
        if key in places and (count == number or name):
            what = f"the section [{key}]" if section else name[1] if name else key
            cure = "put its keys there" if section else "remove one of them"
            return (
                f"line {count}: {_cut(_without_comment(text))}: {what} is there already, in line {places[key]}; {cure}"
            )
        places.setdefault(key, count)
    return f"line {number}: {_cut(lines[number - 1].strip())}: it is there already ({message})"


def _odd_characters(line: _Line) -> Iterator[str]:
    if line.value[:1] and line.value[0] in _CURLY:
        text = line.value.strip(_CURLY + "\"'")
        yield f"curly quotation marks are not valid; use straight ones: {line.key} = {_quoted(text)}"
    outside = re.sub(r"\"[^\"]*\"|'[^']*'", "", line.text)
    for character, name in _INVISIBLE.items():
        if character in outside:
            yield f"it contains {name}, as text copied from web pages may; retype the spaces"
    for character, wanted in _FULL_WIDTH.items():
        if character in outside:
            yield f"{character} is a full-width character; write {wanted}"


def _backslashes(line: _Line) -> Iterator[str]:
    # A backslash before the last quotation mark makes that a part of the text.
    ends = line.message.startswith("Illegal character '\\n'") and re.search(r'\\"\s*$', line.text)
    if not ends and not line.message.startswith(_BACKSLASH):
        return
    found = re.search(r'"([^"]*\\[^"]*)"?', line.text)
    text = found[1] if found else line.value.strip('"')
    bare = _cut(text.rstrip("\\") or text)
    yield f"between double quotation marks \\ is special; write '{bare}' or \"{bare.replace(chr(92), '/')}\""


def _missing_quote(line: _Line) -> Iterator[str]:
    if not line.message.startswith(("Illegal character '\\n'", "Unterminated string", "Expected \"'", "Expected '")):
        return
    triple = next((marks for marks in ('"""', "'''") if marks in line.text or marks in line.message), "")
    if triple:
        yield f"a text that begins with {triple} must end with {triple}"
    if line.message.startswith("Expected '") and line.value[:1] not in ("'", '"'):
        return
    mark = line.value[:1]
    if mark in ("'", '"'):
        yield f"the quotation mark at the end is missing: {line.key} = {line.value}{mark}"


def _missing_equals(line: _Line) -> Iterator[str]:
    if not line.message.startswith("Expected '=' after a key"):
        return
    colon = re.match(r"[\"']?([\w.-]+)[\"']?\s*:\s*(.+?),?$", line.text)
    if colon:
        yield f"= belongs between key and value: {colon[1]} = {_as_value(colon[2])}"
    if "=" in line.text and re.fullmatch(r"[\w.-]+( +[\w.-]+)+", line.key):
        yield f"a key has no spaces: {line.key.replace(' ', '_')} = {line.value}"
    apart = re.fullmatch(r"([\w.-]+)\s+(\S.*)", line.text)
    if apart:
        yield f"= is missing between key and value: {apart[1]} = {_as_value(apart[2])}"
    yield f"a value is missing: {line.text} = …"


def _statements(line: _Line) -> Iterator[str]:
    if line.text.startswith("[") and not line.message.startswith("Unclosed"):
        if line.message.startswith("Expected newline"):
            yield "the keys of a section go on separate lines below it"
        yield "a section is a name in brackets: [network]"
    cures = {
        "Unclosed array": "a list ends with ], and has commas between its values",
        "Unclosed inline table": "an inline table ends with } and has commas between its keys",
    }
    yield from (cure for start, cure in cures.items() if line.message.startswith(start))
    if line.message.startswith("Invalid statement"):
        if line.text.startswith(("//", ";", "--", "/*", "%", "REM ", "rem ")):
            yield "a comment begins with #"
        if line.text.startswith("="):
            yield "a key is missing before ="
    if "=" in line.text and not line.value:
        yield "a value is missing"


_NUMBERS: Sequence[tuple[str, str, Callable[[str], object]]] = (
    (r"[+-]?\d,\d+|[+-]?\d\d,\d", "the decimal sign is a point", lambda value: value.replace(",", ".")),
    (
        r"[\d.e-]+\s*[,;xX×*]\s*[\d.e-]+",
        "two numbers are a list",
        lambda value: re.sub(r"(.*?)\s*[,;xX×*]\s*(.*)", r"[\1, \2]", value),
    ),
    (r"[+-]?\.\d+(e-?\d+)?", "a number has a digit before the point", lambda value: value.replace(".", "0.", 1)),
    (r"[+-]?\d+\.(e-?\d+)?", "a number has a digit after the point", lambda value: value.replace(".", ".0", 1)),
    (r"0\d+", "a number has no zeros in front", lambda value: value.lstrip("0") or "0"),
    (r"\d+(\.\d+)?\s*%", "write a share", lambda value: f"{float(value.rstrip('% ')) / 100:g}"),
    (r"\d+(\.\d+)?\s*[kK]", "write all digits", lambda value: f"{float(value.rstrip('kK ')) * 1000:g}"),
    (r"\d{1,3}([ '.]\d{3})+", "write the digits together", lambda value: re.sub(r"[^0-9]", "", value)),
)
"""Numbers as people write them, what TOML wants, and how it is written."""


def _numbers(line: _Line) -> Iterator[str]:
    return (
        f"{rule}: {line.key} = {cure(line.value)}" for form, rule, cure in _NUMBERS if re.fullmatch(form, line.value)
    )


def _words(line: _Line) -> Iterator[str]:
    value, key = line.value, line.key
    if not value or "=" not in line.text:
        return
    mark, inside = value[0], value[1:-1]
    if mark in "[{":
        yield from _in_brackets(line)
        return
    if value[-1] in ",;" and len(value) > 1:
        yield f"nothing may follow a value: {key} = {_as_value(value[:-1].rstrip())}"
    lowered = value.lower()
    if lowered in ("true", "yes", "on", "false", "no", "off"):
        yield f"write {key} = {'true' if lowered in ('true', 'yes', 'on') else 'false'}"
    if lowered in ("none", "null", "nil", "undefined"):
        yield "leave the line out; a key that is absent has its default"
    if mark in "\"'" and value[-1] == mark and mark in inside:
        other = '"' if mark == "'" else "'"
        escaped = inside.replace('"', '\\"')
        written = f"{other}{inside}{other}" if other not in inside else f'"{escaped}"'
        yield f"the quotation mark in the text ends it; write {key} = {written}"
    behind = re.fullmatch(r"(\"[^\"]*\"|'[^']*')\s*\S.*", value)
    if behind:
        yield f"nothing may follow a value: {key} = {behind[1]}"
    if mark not in "\"'" and not mark.isdigit():
        text = value if value.count('"') > 1 else value.strip(_CURLY + "\"'")
        yield f"text needs quotation marks: {key} = {_quoted(text)}"


def _in_brackets(line: _Line) -> Iterator[str]:
    """What is wrong in a list or an inline table."""
    if line.value[0] == "{":
        yield "what begins with { ends with }, and its values are written as elsewhere"
    items = [item.strip().strip(_CURLY) for item in line.value.strip("[]").split(",")]
    written = ", ".join(_as_value(item) for item in items if item)
    if line.value[-1] != "]" or line.value.count("[") > 1:
        yield "a list ends with ], and has commas between its values"
    yield f"text needs quotation marks: {line.key} = [{written}]"


def _quoted(text: str) -> str:
    """A text in the quotation marks that suit it."""
    return f"'{text}'" if "\\" in text or '"' in text else f'"{text}"'


def _as_value(text: str) -> str:
    """What was meant as a value, as it is written: a number, true or false as it is, other text in quotation marks."""
    is_adaptable = re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?|true|false|[\"'\[{].*", text)
    return text if is_adaptable else _quoted(text)


_RULES: Sequence[Callable[[_Line], Iterator[str]]] = (
    _odd_characters, _backslashes, _missing_quote, _missing_equals, _statements, _numbers, _words,
)  # fmt: skip
"""Each gives the cure of one kind of mistakes, or nothing; the first that gives one counts."""
