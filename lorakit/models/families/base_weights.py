"""LoRA files that a config merges into the base model, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    from lorakit.models.weights.merge_lora import MergedFile, Merging


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
            yield from self.problems_of_file(f"base_weights[{index}]", path, MERGED)
        if len(self.base_weights_multipliers) > len(self.base_weights):
            yield Problem("base_weights_multipliers", "has more numbers than base_weights has files")

    def merging(self) -> Merging:
        """The files to merge."""
        from lorakit.models.weights.merge_lora import Merging

        return Merging(self.merged_files())

    def merged_files(self) -> list[MergedFile]:
        """Those of `base_weights`."""
        from lorakit.models.weights.merge_lora import MergedFile

        multipliers = chain(self.base_weights_multipliers, repeat(1.0))
        return [MergedFile(path, next(multipliers)) for path in self.base_weights]

    def problems_of_file(self, key: str, path: Path, kinds: Sequence[str]) -> Iterator[Problem]:
        """Why a file cannot be merged, as far as it alone tells; `kinds` are the adapters that can be."""
        try:
            found, hint = self._fault(path, kinds)
        except (ModelError, AdapterError) as error:
            found, hint = str(error).removesuffix("."), ""
        if found:
            yield Problem(key, found, hint)

    def _fault(self, path: Path, kinds: Sequence[str]) -> tuple[str, str]:
        """Why a file cannot be merged, and what to do; empty texts if it can, as far as the file alone tells."""
        summary = summarize(path)
        lacking = missing_factors(own_shapes(summary, lora_names(summary, rename=self.lora_name)))
        kind, ours = adapter_kind(summary), self.adapter_title
        if kind.algorithm not in kinds:
            usual = [name for name in kinds if "Tucker" not in name]
            given = f"{', '.join(usual[:-1])} or {usual[-1]}" if len(usual) > 1 else usual[0]
            return f"{path} is {kind.description}, which cannot be merged", f"give files of {given}"
        if not kind.fits(ours):
            found = f"{path} is {kind.description}, and the base model is {ours}"
            return found, "give LoRA files for the same kind of base model"
        if lacking:
            return f"{path} lacks {lacking}, so it is incomplete", "download it again"
        name = first_not_finite(path)
        return (f"{path} holds NaN or infinity in {name}", NOT_FINITE_CURE) if name else ("", "")
