"""Metadata of the files that are made from LoRA files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from lorakit.api.network_metadata import LORA_MODULE
from lorakit.lora_tools.adapters import Adapter, LoRAFile

_OF_ONE_FILE = (
    "sshs_", "lora_adapter_metadata", "modelspec.hash_sha256", "modelspec.date", "modelspec.thumbnail", "ss_session_id",
)  # fmt: skip
"""What the metadata begin with that another file cannot have."""
_COUNTS = ("ss_tag_frequency", "ss_dataset_dirs")
_ARGUMENTS_OF_RANKS = (
    "conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas", "algo", "factor",
    "preset", "rank_stabilized",
)  # fmt: skip


def json_object(metadata: Mapping[str, str], key: str) -> dict[str, object]:
    """A table that a value holds as JSON; empty where there is none."""
    try:
        found = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def kept_metadata(files: Sequence[LoRAFile], output: Path) -> dict[str, str]:
    """What all files agree on, and the tags and folders of all of them."""
    first, *others = [file.summary.metadata for file in files]
    kept = {
        key: text
        for key, text in first.items()
        if not key.startswith(_OF_ONE_FILE) and all(other.get(key) == text for other in others)
    }
    for key in _COUNTS if others else ():
        tables = [json_object(metadata, key) for metadata in (first, *others)]
        if any(tables):
            kept[key] = json.dumps({name: value for table in reversed(tables) for name, value in table.items()})
    now = datetime.fromtimestamp(time.time()).isoformat(timespec="seconds")
    return {**kept, "ss_output_name": output.stem, "modelspec.date": now}


def network_metadata(kept: Mapping[str, str], adapters: Mapping[str, Adapter], alpha: float) -> dict[str, str]:
    """Ranks and alpha of the network, in the words of sd-scripts; ranks that differ are called `Dynamic`."""
    ranks: dict[bool, set[int]] = {False: set(), True: set()}
    for adapter in adapters.values():
        ranks[max(adapter.inputs[1:], default=1) > 1].add(adapter.rank)
    arguments = {
        key: value for key, value in json_object(kept, "ss_network_args").items() if key not in _ARGUMENTS_OF_RANKS
    }
    if ranks[True]:
        arguments |= {"conv_dim": _one(ranks[True]), "conv_alpha": f"{alpha:g}"}
    entries = {
        "ss_network_module": LORA_MODULE,
        "ss_network_dim": _one(ranks[False] or ranks[True]),
        "ss_network_alpha": str(alpha),
    }
    if arguments:
        entries["ss_network_args"] = json.dumps(arguments)
    return {**{key: text for key, text in kept.items() if key != "ss_network_args"}, **entries}


def _one(ranks: set[int]) -> str:
    return str(min(ranks)) if len(ranks) == 1 else "Dynamic"
