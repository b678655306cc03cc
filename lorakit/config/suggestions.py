"""Suggestions for unknown keys: a similar key, or the equivalent of a name in sd-scripts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping

from lorakit.config.sd_scripts import OTHER_KEYS


def hint_for(section: str, name: str, known: Collection[str], places: Mapping[str, str]) -> str:
    """A hint for an unknown key of a section.

    `known` are the keys of the section; `places` gives the full keys of options elsewhere by their bare names.
    Of a key that other components of the section have, such as `betas`, the nearest key here may be meant: `beta1`.
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    # As other tools write it: --max-epochs, maxEpochs, MAX_EPOCHS.
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.lstrip("-")).replace("-", "_").lower()
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if name in known:
        meant = f"{section}.{name}" if section else name
    elif name in OTHER_KEYS:
        meant = OTHER_KEYS[name]
    elif close and places.get(name, "").startswith(f"{section}.{name} of "):
        return f"did you mean {section}.{close[0]}? {name} is a key{places[name].removeprefix(f'{section}.{name}')}"
    elif name in places:
        meant = places[name]
    elif near:
        meant = f"{section}.{near[0]}" if section else near[0]
    else:
        return f"known here: {', '.join(known)}" if known else ""
    return f"did you mean {meant}?"
