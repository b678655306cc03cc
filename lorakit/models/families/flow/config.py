"""What the families of flow-matching transformers have in common in the config file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from attrs import field, frozen

from lorakit.api.noise import FlowSpec
from lorakit.checkpoints import HubModel, Location, ModelPath, locate
from lorakit.errors import ModelError, Problem
from lorakit.models.families.base_weights import BaseWeightsConfig
from lorakit.models.families.flow.checkpoint import TRANSFORMER, FlowCheckpoint

if TYPE_CHECKING:
    import torch

    from lorakit.models.families.flow.model import FlowTransformer
    from lorakit.models.interfaces import DiffusionModel
    from lorakit.models.weights.merge_lora import Merging


def path_text(path: str | Path | None) -> ModelPath | None:
    """A converter for fields with a file, a folder or a Hub id."""
    return None if path is None else ModelPath(str(path))


@frozen(kw_only=True)
class FlowTransformerConfig(BaseWeightsConfig):
    """A transformer that predicts velocities, with frozen text encoders, each of which may be a file of its own."""

    default_parts = (TRANSFORMER,)
    lora_layouts = ("kohya", "original", "diffusers")
    size_multiple = 16
    overflows_fp16 = True
    web_uis = ("Forge Neo",)
    supports_weighted_captions = False
    usual_resolution = preview_size = 1024
    dataset_defaults = {"resolution": (1024, 1024), "max_bucket_reso": 2048}  # noqa: RUF012 - a ClassVar of the base
    checkpoint_type: ClassVar[type[FlowCheckpoint]]
    """Finds the model's parts."""
    flow: ClassVar[FlowSpec]
    """Its noise process."""
    usual_parts: ClassVar[Mapping[str, str]]
    """An example of what to give for each part, and each tokenizer, that a model may lack, by the field's name."""
    tokenizer_fields: ClassVar[tuple[str, ...]] = ("tokenizer",)
    """The fields with tokenizers, called as their folders in models are."""

    vae: ModelPath | None = field(default=None, converter=path_text)
    """VAE: a file, a diffusers folder, or a Hub id. The model's own when absent."""
    text_encoder: ModelPath | None = field(default=None, converter=path_text)
    """Text encoder: a file, a folder, or a Hub id. The model's own when absent."""
    tokenizer: ModelPath | None = field(default=None, converter=path_text)
    """Tokenizer of the text encoder: a folder with its `tokenizer.json`, or a Hub id. The model's own when absent;
    single files have none."""
    training_adapter: Path | None = None
    """LoRA file that undoes the distillation of a model that draws in few steps: merged into the model while it trains,
    not part of the saved file, and taken back in previews."""

    @property
    def noise_process(self) -> FlowSpec:
        """Flow matching."""
        return self.flow

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the files, as far as it shows without reading weights; keys are field names."""
        yield from super().problems()
        if self.training_adapter is not None:
            yield from self.problems_of_file("training_adapter", self.training_adapter, kinds=("LoRA",))
        try:
            stored = self.stored
            lacking = stored.lacking()
        except ModelError as error:
            yield Problem("path", str(error))
            return
        for name in lacking:
            key = "path" if name == TRANSFORMER else name
            title = stored.formats[name].title
            hint = f"give {self.usual_parts[name]}" if name in self.usual_parts else ""
            yield Problem(key, f"is missing, and {stored.location} has no {title}", hint)
        if not lacking:
            yield from self._problems_of_parts(stored)
        yield from self._problems_of_tokenizers(stored)

    def merging(self) -> Merging:
        """The files to merge, the one that is only for training last."""
        from lorakit.models.weights.merge_lora import MergedFile, Merging

        own = [] if self.training_adapter is None else [MergedFile(self.training_adapter, only_trains=True)]
        return Merging([*self.merged_files(), *own])

    def build(self, device: torch.device, dtype: torch.dtype) -> DiffusionModel:
        """The model; each part's weights are loaded on first use."""
        from lorakit.diffusion.flow import FlowMatching

        return self.model_type()(self, FlowMatching(self.noise_process), device, dtype)

    def model_type(self) -> type[FlowTransformer]:
        """The class of the model."""
        raise NotImplementedError(f"{type(self).__name__} does not say its model's class")

    @cached_property
    def stored(self) -> FlowCheckpoint:
        """Where the model's parts are; a `ModelError` if a path leads nowhere."""
        separate = {name: path for name in self.checkpoint_type.formats if (path := self._location(name)) is not None}
        tokenizers = {name: path for name in self.tokenizer_fields if (path := self._location(name)) is not None}
        return self.checkpoint_type(locate(self.path, Path()), separate, tokenizers)

    def _location(self, name: str) -> Location | None:
        path: ModelPath | None = getattr(self, name, None)
        return None if path is None else locate(path, Path())

    def _problems_of_parts(self, stored: FlowCheckpoint) -> Iterator[Problem]:
        for name in stored.formats:
            try:
                stored.check_part(name)
            except ModelError as error:
                yield Problem(name if name in stored.separate else "path", str(error))

    def _problems_of_tokenizers(self, stored: FlowCheckpoint) -> Iterator[Problem]:
        for name in self.tokenizer_fields:
            location = stored.tokenizers.get(name, stored.location)
            if isinstance(location, HubModel):
                continue
            if stored.tokenizer_folder(name) is None:
                found = f"{location} has no tokenizer" if name in stored.tokenizers else "is missing"
                yield Problem(name, found, f"give {self.usual_parts[name]}")
