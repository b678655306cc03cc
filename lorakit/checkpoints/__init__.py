"""Base models as files: where they are, what tensors they hold, and what kind of model that makes them.

Nothing here reads a weight or imports torch: a 4 GB file is summarised in milliseconds from its header.
"""

from __future__ import annotations

from lorakit.checkpoints.location import HubModel, Location, ModelPath, locate
from lorakit.checkpoints.pickle_shapes import pickle_shapes
from lorakit.checkpoints.prediction import StatedPrediction, stated_prediction
from lorakit.checkpoints.recognition import Traits, advice, describe, traits_of
from lorakit.checkpoints.summary import CheckpointSummary, Shapes, read_json, summarize

__all__ = [
    "CheckpointSummary",
    "HubModel",
    "Location",
    "ModelPath",
    "Shapes",
    "StatedPrediction",
    "Traits",
    "advice",
    "describe",
    "locate",
    "pickle_shapes",
    "read_json",
    "stated_prediction",
    "summarize",
    "traits_of",
]
