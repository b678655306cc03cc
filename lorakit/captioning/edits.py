"""Edits of captions: the same few for all captions of a folder."""

from __future__ import annotations

import re

from attrs import field, frozen

from lorakit.data.captions import split_tags


@frozen(kw_only=True)
class CaptionEdits:
    """What is done to a caption, line by line, in the order of the fields."""

    replace: tuple[tuple[str, str], ...] = field(default=(), converter=tuple)
    """Words or tags and what is written instead, wherever they stand between other letters than their own."""
    remove_tags: tuple[str, ...] = field(default=(), converter=tuple)
    """Tags that are taken out, as written but for capitals."""
    prefix: str = ""
    """What each caption starts with; nothing is added to one that does already."""
    suffix: str = ""
    """What each caption ends with; nothing is added to one that does already."""
    separator: str = ","
    """What separates tags."""

    def __bool__(self) -> bool:
        return bool(self.replace or self.remove_tags or self.prefix or self.suffix)

    def apply(self, caption: str) -> str:
        """The caption, edited; one that no edit is for stays as it is, but for spaces around its lines."""
        return "\n".join(map(self._edit, caption.split("\n")))

    def _edit(self, line: str) -> str:
        for old, new in self.replace:
            pattern = re.escape(old)
            pattern = rf"(?<!\w){pattern}" if re.match(r"\w", old) else pattern
            pattern = rf"{pattern}(?!\w)" if re.search(r"\w\Z", old) else pattern
            line = re.sub(pattern, lambda _, text=new: text, line)  # type: ignore[misc]
        removed = {tag.strip().casefold() for tag in self.remove_tags}
        tags = split_tags(line, self.separator)
        kept = [tag for tag in tags if tag.casefold() not in removed]
        if len(kept) < len(tags):
            line = (self.separator.rstrip() + " ").join(kept)
        around = f" {self.separator}"
        first, last = self.prefix.rstrip(around), self.suffix.lstrip(around)
        if not line.startswith(self.prefix) and line != first:
            line = f"{self.prefix}{line}" if line else first
        if not line.rstrip().endswith(self.suffix.rstrip()) and line != last:
            line = f"{line}{self.suffix}" if line else last
        return line.strip()
