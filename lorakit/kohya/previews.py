"""Previews while training: the table [[observers]] with the name `samples`."""

from __future__ import annotations

from lorakit.errors import ConfigError, Problem
from lorakit.kohya.drafts import Command, Draft


def write_previews(command: Command, draft: Draft) -> None:
    """Previews. Raises ConfigError where there is no prompt file, for which sd-scripts stops in the middle of a run."""
    counts = [name for name in ("sample_every_n_epochs", "sample_every_n_steps") if (command.get(name) or 0) > 0]
    for name in ("sample_every_n_epochs", "sample_every_n_steps"):
        if name in command.given and name not in counts:
            draft.remark(name, f"{command.get(name)} means never")
    asked = [*counts, *(["sample_at_first"] if command.get("sample_at_first") else [])]
    if asked and not command.get("sample_prompts"):
        raise ConfigError([Problem(f"--{asked[0]}", "needs --sample_prompts, the file that says what to draw")])
    if not asked:
        for name in ("sample_prompts", "sample_sampler"):
            if name in command.given:
                draft.remark(name, "has no effect without --sample_every_n_epochs or --sample_every_n_steps")
        return
    if len(counts) == 2:
        draft.remark("sample_every_n_steps", "has no effect beside --sample_every_n_epochs")
        asked.remove("sample_every_n_steps")
    observer = {
        "name": command.setting("sample_prompts", "samples"),
        "prompts": command.setting("sample_prompts", command.path(command.get("sample_prompts"))),
    }
    observer |= {name.removeprefix("sample_"): command.setting(name) for name in asked}
    if "sample_sampler" in command.given:
        observer["sampler"] = command.setting("sample_sampler")
    draft.observers.append(observer)
