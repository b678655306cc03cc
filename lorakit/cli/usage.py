"""Wrong use of the command line: what to type instead of an option that there is not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

from lorakit.config.sd_scripts import OTHER_KEYS

SYNONYMS: Mapping[str, str] = {
    "steps": "training.max_steps",
    "epochs": "training.max_epochs",
    "precision": "training.mixed_precision",
    "lr": "optimizer.lr",
    "te_lr": "optimizer.text_encoder_lr",
    "optimizer": "optimizer.name",
    "scheduler": "lr_scheduler.name",
    "warmup": "lr_scheduler.warmup_steps",
    "network": "network.name",
    "batch": "data.batch_size",
    "bs": "data.batch_size",
    "repeats": "data.num_repeats",
    "images": "data.image_dir",
    "data": "data.image_dir",
    "dataset": "data.image_dir",
    "model": "model.path",
    "base_model": "model.path",
    "output": "output.dir",
    "out": "output.dir",
    "o": "output.dir",
    "name": "output.name",
    "attention": "attention.name",
}
"""What people call keys on command lines, where it is neither the key's name nor sd-scripts' option."""

PREFERRED = ("training", "optimizer", "network", "data", "output", "model")
"""Sections in which a bare name of a key is looked for first."""


def cure_of_options(arguments: Sequence[str], own: Collection[str], keys: Sequence[str]) -> str:
    """What to type for those of the arguments that look like options and are not the command's `own`.

    `keys` are all keys that a config can have. Empty where none of them is like a key.
    """
    settings, words = [], []
    for argument, following in zip(arguments, (*arguments[1:], ""), strict=True):
        name, separator, value = argument.partition("=")
        if not re.match(r"--?[A-Za-z]", name) or name in own:
            continue
        if not separator and not re.match(r"--?[A-Za-z]", following) and not following.endswith((".toml", ".json")):
            value = following
        option = name.lstrip("-").replace("-", "_")
        target = _target(option, keys)
        key, _, fixed = target.partition(" = ")
        if target and re.fullmatch(r"[\w.]+", key):
            chosen = fixed.strip('"') or value or "true"
            settings.append(f"--set {key}={chosen}")
        elif target:
            words.append(f"--{option} is {target} in the config")
    written = [f"write {' '.join(settings)}"] if settings else []
    return "; ".join([*written, *words])


def cure_of_arguments(arguments: Sequence[str]) -> str:
    """What to type for arguments too many; empty where none of them is like a key with its value."""
    arguments = [argument for argument in arguments if argument != "="]
    for before, argument in zip(("", *arguments), arguments, strict=False):
        if before != "--set" and re.fullmatch(r"[\w.\[\]]+=.*", argument):
            return f"write --set {argument}"
        if before and re.fullmatch(r"[a-z_]+\.[\w.\[\]]+", before) and not before.endswith((".toml", ".json")):
            return f"write --set {before}={argument.lstrip('=')}, without spaces"
    return ""


def _target(option: str, keys: Sequence[str]) -> str:
    """The key that an option means, perhaps with its value, or a description of the equivalent."""
    known = OTHER_KEYS.get(option) or SYNONYMS.get(option) or (option if option in keys else "")
    if known:
        return known
    by_name: dict[str, str] = {}
    keys = [key for key in keys if not key.startswith("observers.")]  # of which there may be several
    for key in sorted(keys, key=lambda key: key.partition(".")[0] not in PREFERRED):
        by_name.setdefault(key.rpartition(".")[2], key)
    near = difflib.get_close_matches(option, [*by_name, *OTHER_KEYS, *SYNONYMS], n=1, cutoff=0.75)
    found = by_name.get(option) or (near[0] if near else "")
    return by_name.get(found) or OTHER_KEYS.get(found) or SYNONYMS.get(found) or found
