"""Whether a LoRA file is one that a network can start from, as far as names and shapes tell; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen

from lorakit.checkpoints import CheckpointSummary, Shapes, summarize
from lorakit.checkpoints.finite import NOT_FINITE_CURE, first_not_finite
from lorakit.checkpoints.kinds import OF_LYCORIS, TRAINED_BY, AdapterKind, adapter_kind
from lorakit.checkpoints.lora_files import lora_names, missing_factors, own_shapes
from lorakit.checkpoints.lora_names import DOWN
from lorakit.errors import Problem

if TYPE_CHECKING:
    from lorakit.api.components import ModelPart
    from lorakit.api.model_family import ModelFamilyConfig
    from lorakit.config.train_config import TrainConfig

_ONES = ((), (1, 1))
_RESNETS = re.compile(r"_resnets_|samplers_0_conv|_(?:in|out|emb)_layers_|_skip_connection|_0_op\b|_2_conv\b")
"""Matches the names of layers in ResNet and sampling blocks of a U-Net, in diffusers and in the original code."""


@frozen
class StartingFile:
    """What a LoRA file holds, for a network that is to start from it."""

    path: Path
    kind: AdapterKind
    shapes: Shapes = field(repr=False)
    """Shape of each tensor, by its name as sd-scripts has it."""

    def has(self, part: ModelPart) -> bool:
        """Whether it has adapters for a part of the model."""
        return any(name.startswith(part.lora_prefix) for name in self.shapes)

    def trains_denoiser(self, config: TrainConfig) -> bool:
        """Whether it has adapters for a part that is trained and is no text encoder."""
        trained = config.model.parts_named(config.trained_parts)
        return any(self.has(part) for part in trained if part.lora_prefix and not part.encoders)

    @property
    def has_resnets(self) -> bool:
        """Whether it has adapters for ResNet or sampling blocks of the U-Net, as LoRA-C3Lier has."""
        return any(_RESNETS.search(name) for name in self.shapes)

    def ranks(self, parts: Sequence[ModelPart], *, wide: bool) -> list[int]:
        """All ranks of adapters of these parts: of 3×3 convolutions (`wide`), or of the other layers."""
        prefixes = tuple(part.lora_prefix for part in parts if part.lora_prefix)
        return sorted(
            {
                shape[0]
                for name, shape in self.shapes.items()
                if name.endswith(f".{DOWN}")
                and name.startswith(prefixes)
                and shape
                and (shape[2:] not in _ONES) == wide
            }
        )

    def missing_layers(self, part: ModelPart) -> list[str]:
        """Which layers of a part it has no adapters for, by the ends of their keys: `attn1_to_q`."""
        keys = {name.partition(".")[0] for name in self.shapes if name.startswith(part.lora_prefix)}
        return [end for end in part.lora_layers if not any(key.endswith(f"_{end}") for key in keys)]


def starting_file(path: Path, model: ModelFamilyConfig) -> StartingFile:
    """What a LoRA file holds for a model. Raises ModelError or AdapterError where it cannot be read."""
    summary: CheckpointSummary = summarize(path)
    names = lora_names(summary, rename=model.lora_name)
    return StartingFile(path, adapter_kind(summary), own_shapes(summary, names))


def problems_of_kind(file: StartingFile, config: TrainConfig, algorithms: Collection[str]) -> Iterator[Problem]:
    """Says so where a file's adapters are of none of these kinds, or not for the config's kind of model."""
    kind, model = file.kind, config.model.adapter_title
    if kind.algorithm not in algorithms:
        found = f"{file.path} is {kind.description}, which network.name = {config.network.name!r} cannot start from"
        yield Problem("weights", found, _cure(kind))
    elif not kind.fits(model):
        hint = f"give a {kind.algorithm} for {model}, or set model.path to a model that the file is for"
        yield Problem("weights", f"{file.path} is {kind.description}, and the base model is {model}", hint)
    elif kind.algorithm == "DoRA" and not getattr(config.network, "dora", True):
        yield Problem("weights", f"{file.path} is {kind.description}", "set network.dora = true")
    elif lacking := missing_factors(file.shapes):
        yield Problem("weights", f"{file.path} lacks {lacking}, so it is incomplete", "download it again")
    elif name := first_not_finite(file.path):
        yield Problem("weights", f"{file.path} holds NaN or infinity in {name}", NOT_FINITE_CURE)


def problems_of_parts(file: StartingFile, config: TrainConfig, any_layers: bool) -> Iterator[Problem]:
    """Says so where a file has adapters for other parts of the model; with `any_layers` it may have fewer."""
    checked = [part for part in config.model.parts if part.lora_prefix]
    there, trained = [part for part in checked if file.has(part)], config.trained_parts
    lacking = [part.name for part in checked if part.name in trained and part not in there]
    more = [part.name for part in there if part.name not in trained]
    if more or (lacking and not any_layers):
        what = f"has {'no ' * bool(lacking)}adapters for {' and '.join(lacking or more)}"
        parts = ", ".join(f'"{part.name}"' for part in there)
        hint = f"set network.parts = [{parts}], each with a learning rate above 0"
        yield Problem("weights", f"{file.path} {what}", hint)
    for part in there if not any_layers else ():
        if absent := file.missing_layers(part):
            found = f"{file.path} has no adapters for the layers {', '.join(absent)} of {part.name}"
            yield Problem("weights", found, "network.rank_from_weights = true adapts those alone that the file adapts")


def problem_of_rank(file: StartingFile, key: str, rank: int, ranks: list[int]) -> Iterator[Problem]:
    """Says so where the ranks in a file are not the one that a key of the config gives."""
    if ranks and ranks != [rank]:
        found, cure = f"rank {ranks[0]}", f"network.{key} = {ranks[0]}, or "
        if len(ranks) > 1:
            found, cure = f"ranks from {ranks[0]} to {ranks[-1]}", ""
        hint = f"set {cure}network.rank_from_weights = true"
        yield Problem(key, f"is {rank}, and {file.path} has adapters of {found}", hint)


def _cure(kind: AdapterKind) -> str:
    if kind.algorithm in TRAINED_BY:
        return f"in [network], set {TRAINED_BY[kind.algorithm]}, which trains it"
    if kind.algorithm in OF_LYCORIS:
        return (
            f'the plugin lorakit-network-modules trains it: network.name = "lycoris.kohya",'
            f" network.args = {{ {OF_LYCORIS[kind.algorithm]} }}"
        )
    if not kind.algorithm:
        return "give a LoRA file, or leave network.weights out"
    return "give a plain LoRA or DoRA, or leave network.weights out"
