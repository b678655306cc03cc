"""Previews while training: the table [[observers]] with the name `samples`."""

from __future__ import annotations

from pathlib import PureWindowsPath

from lorakit.errors import ConfigError, Problem
from lorakit.kohya.draft import Command, Draft


def write_previews(command: Command, draft: Draft) -> None:
    """Previews. Raises ConfigError where a line asks for them and says no prompts; sd-scripts stops the run there."""
    counts = [name for name in ("sample_every_n_epochs", "sample_every_n_steps") if (command.get(name) or 0) > 0]
    for name in ("sample_every_n_epochs", "sample_every_n_steps"):
        if command.is_typed(name) and name not in counts:
            draft.note(name, f"{command.get(name)} means never")
    asked = [*counts, *(["sample_at_first"] if command.get("sample_at_first") else [])]
    if asked and not command.get("sample_prompts") and not any(map(command.is_typed, asked)):
        source, hint = command.sources[asked[0]], "add --sample_prompts=FILE after the file"
        draft.remarks.append(Problem(source, "is ignored, as there are no prompts", hint))
        return
    if asked and not command.get("sample_prompts"):
        raise ConfigError([Problem(f"--{asked[0]}", "needs --sample_prompts, the file with the prompts")])
    if not asked:
        for name in ("sample_prompts", "sample_sampler"):
            if command.is_typed(name):
                draft.note(name, "has no effect without --sample_every_n_epochs or --sample_every_n_steps")
        return
    if len(counts) == 2:
        draft.note("sample_every_n_steps", "has no effect with --sample_every_n_epochs")
        asked.remove("sample_every_n_steps")
    observer = {
        "name": command.setting("sample_prompts", "samples"),
        "prompts": command.setting("sample_prompts", _prompts(command)),
    }
    observer |= {name.removeprefix("sample_"): command.setting(name) for name in asked}
    if "sample_sampler" in command.given:
        observer["sampler"] = command.setting("sample_sampler")
    draft.observers.append(observer)


_FORMS = (".txt", ".toml", ".json")


def _prompts(command: Command) -> str | list[str]:
    """The path of the prompt file; a text that leads to none holds the prompts themselves, one in each line."""
    text: str = command.get("sample_prompts")
    try:
        is_file = command.on_disk(text).is_file()
    except (OSError, ValueError):  # a name that is too long
        is_file = False
    if is_file or PureWindowsPath(text.strip()).suffix.lower() in _FORMS:
        return command.path(text)
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
