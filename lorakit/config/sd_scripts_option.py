"""What is known of an option of sd-scripts' scripts for LoRA training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from attrs import Factory, frozen

from lorakit.config.training_scripts import Script

Kind = Literal["flag", "int", "float", "text", "path", "texts", "floats", "int or share"]


@frozen
class Option:
    """An option of sd-scripts' scripts for LoRA training."""

    name: str
    """Its name, without leading dashes."""
    kind: Kind
    """Type of its value; `int or share` takes a number of steps, a fraction below 1, or a percentage."""
    default: object = None
    """Its value when absent."""
    key: str = ""
    """The equivalent key, `network.rank`; for a flag with the value it sets, `attention.name = "sdpa"`."""
    unneeded: str = ""
    """Why lorakit does not need it."""
    later: str = ""
    """Why it is not supported, or what to do instead."""
    choices: tuple[object, ...] = ()
    """The accepted values, if restricted."""
    in_files: tuple[object, ...] = ()
    """Further values accepted in a --config_file, where sd-scripts does not enforce `choices`."""
    special: bool = False
    """Whether converting it takes more than copying the value to `key`."""
    scripts: tuple[Script, ...] = ()
    """The scripts that have it; none for an option of all scripts."""
    other_defaults: Mapping[str, object] = Factory(dict)
    """Its value when absent in scripts, by their names, where that is another."""
    plugin: str = ""
    """The plugin distribution that provides the key, if it is not part of lorakit."""
    hint: str = ""
    """What to write instead, where `key` alone does not say it."""

    def is_of(self, script: Script | None) -> bool:
        """Whether a script has it; true where the script is not known."""
        return script is None or not self.scripts or script in self.scripts

    def default_of(self, script: Script) -> object:
        """Its value when absent in a script."""
        return self.other_defaults.get(script.name, self.default)
