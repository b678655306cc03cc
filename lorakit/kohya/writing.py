"""A converted config as a file: each key with the option it comes from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from lorakit.kohya.draft import Draft, Table
from lorakit.utils.plain import toml_key, toml_value

_SECTIONS = (
    "model",
    "data",
    "network",
    "optimizer",
    "lr_scheduler",
    "attention",
    "training",
    "loss",
    "output",
    "metadata",
    "saver",
)
_COLUMN = 40
_WIDTH = 116
_PREAMBLE = """\
# A training run of lorakit, from options of sd-scripts' train_network.py. Behind each key is the option, or the
# field of another program's file, that it comes from. Relative paths are relative to this file."""


def to_text(draft: Draft) -> str:
    """The config file."""
    parts = [_PREAMBLE, *_remarks(draft)]
    for section in _SECTIONS:
        table = draft.sections.get(section, {})
        if table:
            parts.append(_table(f"[{section}]", table))
        if section == "data":
            parts += _datasets(draft)
    parts += [_table("[[observers]]", observer) for observer in draft.observers]
    return "\n\n".join(parts) + "\n"


def _remarks(draft: Draft) -> Iterator[str]:
    """What differs from sd-scripts, as comments."""
    if draft.remarks:
        lines = [_comment(str(remark)) for remark in draft.remarks]
        yield "\n".join(["# Not as with sd-scripts:", *lines])


def _comment(text: str) -> str:
    return textwrap.fill(
        " ".join(_one_line(text).split()),
        _WIDTH,
        break_long_words=False,
        initial_indent="#   ",
        subsequent_indent="#     ",
    )


def _datasets(draft: Draft) -> Iterator[str]:
    if draft.general:
        yield _table("[data.general]", draft.general)
    for own, subsets in draft.datasets:
        yield _table("[[data.datasets]]", own)
        for subset in subsets:
            yield _table("[[data.datasets.subsets]]", subset)


def _table(heading: str, table: Table) -> str:
    # The name of a component says what the other keys are.
    names = sorted(table, key=lambda key: key != "name" or "dir" in table)
    lines = [f"{toml_key(name)} = {toml_value(table[name].value)}" for name in names]
    sources = [_one_line(table[name].source) for name in names]
    described = [f"{line:<{_COLUMN - 2}}  # {source}" for line, source in zip(lines, sources, strict=True)]
    return "\n".join([heading, *described])


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
