"""TOML and JSON files that users write by hand: their values, or what is wrong and how it is written instead."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.config.toml_mistakes import explain

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
    found = _read_json(text) if path.suffix.lower() == ".json" else _read_toml(text, path.suffix.lower())
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
        raise ValueError(explain(text, str(error))) from error


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not valid JSON: {error}") from error


def _read_toml(text: str, suffix: str) -> dict[str, Any]:
    try:
        return parse_toml(text)
    except ValueError as error:
        if "train_network.py" in text or "accelerate launch" in text:
            cure = "`lorakit from-kohya -o config.toml` with this line behind it makes a config of it"
            raise ValueError(f"is a command line of sd-scripts, not a config; {cure}") from error
        if suffix in (".yaml", ".yml"):
            raise ValueError("is YAML; configs are TOML, such as `lorakit init` writes") from error
        if text.lstrip().startswith("{"):
            raise ValueError("is JSON; give it a name that ends in .json") from error
        raise ValueError(f"is not valid TOML: {error}") from error


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
