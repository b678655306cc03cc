"""What the families of flow-matching transformers have in common in the config file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from attrs import field, frozen

from lorakit.api.model_family import CaptionLengths
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


MAX_TOKENS = 512
"""Most tokens of a caption."""

_OWN_TOKENS = 32

TokenCounter = Callable[[Sequence[str]], Sequence[int]]
"""How many tokens captions have, before anything is cut off."""


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
    length_key: ClassVar[str] = "text_encoder"
    """The field that says how long captions may be, or whose model does."""

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

    @property
    def caption_length(self) -> int:
        """Maximum caption length in tokens."""
        return MAX_TOKENS

    def token_counters(self) -> Iterator[TokenCounter]:
        """What counts the tokens of captions, for each tokenizer that cuts them off; imports no torch.

        A `ModelError` for a tokenizer that cannot be read or is not on the disk.
        """
        return iter(())

    def tokenizer_on_disk(self, name: str) -> Path:
        """The folder with a tokenizer; a `ModelError` if it is nowhere, or would have to be downloaded."""
        location = self.stored.tokenizers.get(name, self.stored.location)
        folder = None if isinstance(location, HubModel) else self.stored.tokenizer_folder(name)
        if folder is None:
            raise ModelError(f"{location} has no {name} on this disk")
        return folder

    def caption_lengths(self, captions: Sequence[str], weighted: bool) -> CaptionLengths | None:  # noqa: ARG002
        """The tokens of captions by the tokenizer that has most; None where one is not on the disk."""
        try:
            counts = [count(captions) for count in self.token_counters()]
        except ModelError:
            return None
        return CaptionLengths(tuple(map(max, zip(*counts, strict=True))), self.caption_length) if counts else None

    def warnings_of_captions(self, captions: Mapping[str, str], weighted: bool) -> Iterator[Problem]:
        """Captions that have more tokens than are read."""
        limit = self.caption_length
        # A token is one byte or more; templates and ends of captions have a few of their own.
        long = {name: text for name, text in captions.items() if len(text.encode()) > limit - _OWN_TOKENS}
        lengths = self.caption_lengths(list(long.values()), weighted) if long else None
        cut = [(own, name) for own, name in zip(lengths.tokens, long, strict=True) if own > limit] if lengths else []
        if cut:
            tokens, name = max(cut)
            message = f"{limit} tokens are read, which cuts off the end of {len(cut)} of {len(captions)} captions"
            hint = "write shorter ones" if limit == MAX_TOKENS else f"set it to {MAX_TOKENS}, or write shorter captions"
            yield Problem(self.length_key, f"{message}; the longest, of {name}, has {tokens} tokens", hint)

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
