"""LoRA files that a config merges into the base model, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import frozen

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.checkpoints import summarize
from lorakit.checkpoints.finite import NOT_FINITE_CURE, first_not_finite
from lorakit.checkpoints.kinds import MERGED, adapter_kind
from lorakit.checkpoints.lora_files import lora_names, missing_factors, own_shapes
from lorakit.errors import AdapterError, ModelError, Problem

if TYPE_CHECKING:
    from lorakit.models.weights.merge_lora import Merging


@frozen(kw_only=True)
class BaseWeightsConfig(ModelFamilyConfig):
    """A family into whose models LoRA files can be merged."""

    base_weights: tuple[Path, ...] = ()
    """LoRA files to merge into the model before training, in this order."""
    base_weights_multipliers: tuple[float, ...] = ()
    """Multiplier for each of `base_weights`; defaults to 1."""

    def problems(self) -> Iterator[Problem]:
        """What is wrong with the files to merge, as far as the files alone tell; keys are field names."""
        for index, path in enumerate(self.base_weights):
            try:
                found, hint = self._fault_of_base_weights(path)
            except (ModelError, AdapterError) as error:
                found, hint = str(error).removesuffix("."), ""
            if found:
                yield Problem(f"base_weights[{index}]", found, hint)
        if len(self.base_weights_multipliers) > len(self.base_weights):
            yield Problem("base_weights_multipliers", "has more numbers than base_weights has files")

    def merging(self) -> Merging:
        """The files to merge."""
        from lorakit.models.weights.merge_lora import MergedFile, Merging

        multipliers = chain(self.base_weights_multipliers, repeat(1.0))
        return Merging([MergedFile(path, next(multipliers)) for path in self.base_weights])

    def _fault_of_base_weights(self, path: Path) -> tuple[str, str]:
        """Why a file cannot be merged, and what to do; empty texts if it can, as far as the file alone tells."""
        summary = summarize(path)
        lacking = missing_factors(own_shapes(summary, lora_names(summary, rename=self.lora_name)))
        kind, ours = adapter_kind(summary), self.adapter_title
        if kind.algorithm not in MERGED:
            return f"{path} is {kind.description}, which cannot be merged", "give files of LoRA, DoRA, LoHa or LoKr"
        if not kind.fits(ours):
            found = f"{path} is {kind.description}, and the base model is {ours}"
            return found, "give LoRA files for the same kind of base model"
        if lacking:
            return f"{path} lacks {lacking}, so it is incomplete", "download it again"
        name = first_not_finite(path)
        return (f"{path} holds NaN or infinity in {name}", NOT_FINITE_CURE) if name else ("", "")
