"""Base models as files: where they are, what tensors they hold, and what kind of model that makes them.

Nothing here reads a weight or imports torch: a 4 GB file is summarised in milliseconds from its header.
"""

from __future__ import annotations

from lorakit.checkpoints.location import HubModel, Location, locate
from lorakit.checkpoints.pytorch_file import pickled_tensors
from lorakit.checkpoints.recognition import Traits, describe, traits_of
from lorakit.checkpoints.stored_tensor import StoredTensor
from lorakit.checkpoints.summary import CheckpointSummary, Shapes, kind_of_file, read_json, summarize

__all__ = [
    "CheckpointSummary",
    "HubModel",
    "Location",
    "Shapes",
    "StoredTensor",
    "Traits",
    "describe",
    "kind_of_file",
    "locate",
    "pickled_tensors",
    "read_json",
    "summarize",
    "traits_of",
]
