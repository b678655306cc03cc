"""Base models as files: where they are, what tensors they hold, and what kind of model that makes them.

Nothing here reads a weight or imports torch: a 4 GB file is summarised in milliseconds from its header.
"""

from __future__ import annotations

from lorakit.checkpoints.kinds import describe, is_add_on, is_other_part, kind_of
from lorakit.checkpoints.location import HubModel, Location, ModelPath, locate
from lorakit.checkpoints.prediction import StatedPrediction, stated_prediction
from lorakit.checkpoints.pytorch_file import pickled_tensors
from lorakit.checkpoints.stored_tensor import StoredTensor
from lorakit.checkpoints.summary import LORA_FILES, CheckpointSummary, Shapes, kind_of_file, read_json, summarize

__all__ = [
    "LORA_FILES",
    "CheckpointSummary",
    "HubModel",
    "Location",
    "ModelPath",
    "Shapes",
    "StatedPrediction",
    "StoredTensor",
    "describe",
    "is_add_on",
    "is_other_part",
    "kind_of",
    "kind_of_file",
    "locate",
    "pickled_tensors",
    "read_json",
    "stated_prediction",
    "summarize",
]
