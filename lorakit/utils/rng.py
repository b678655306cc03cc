"""Randomness as a function of what it is for, not of what was drawn before.

Every draw names its purpose and the thing it is drawn for, so a run is the same whether it was
resumed or not, drew previews or not, and however many workers or processes it has.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np

RngFactory: TypeAlias = "Callable[[str], np.random.Generator]"
"""Gives the fresh generator for each purpose; the rest of its key is settled."""


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key and on nothing else."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def keyed_generator(*key: int | str) -> np.random.Generator:
    """A fresh generator for one purpose: `keyed_generator(seed, "noise", epoch, sample)`.

    Philox is counter-based (Salmon et al., 2011), so making one costs microseconds.
    """
    # Only here, as prompts of previews are read without NumPy.
    import numpy as np

    return np.random.Generator(np.random.Philox(derived_seed(*key)))
