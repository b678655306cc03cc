"""The layers that can be adapted: keys, kinds and shapes as LoRA files have them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lorakit.models.families.sd.targets import text_encoder_targets, unet_targets
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.load import without_weights
from lorakit.testing.models import FULL_SD1, FULL_SD2, Settings
from tests.models.building import stable_diffusion

MODELS = {"lora_keys_sd15.tsv": (FULL_SD1, 350, 72), "lora_keys_sd21.tsv": (FULL_SD2, 416, 138)}
"""By the file with the known keys: settings of the model, number of targets, and of those in the text encoder."""


def full_size(settings: Settings) -> list[AdaptationTarget]:
    """All targets of a full-size model, which has shapes but no weights."""
    text = without_weights(lambda: CLIPTextModel(CLIPTextConfig(**settings["text_encoder"])))
    unet = without_weights(lambda: UNet2DConditionModel(**settings["unet"]))
    return [*text_encoder_targets(text), *unet_targets(unet)]


def described(target: AdaptationTarget) -> tuple[str, str, int, int, int]:
    """Key, kind, inputs, outputs and kernel of a target."""
    layer = target.module
    if isinstance(layer, nn.Linear):
        return target.key, "linear", layer.in_features, layer.out_features, 1
    assert isinstance(layer, nn.Conv2d)
    assert layer.kernel_size[0] == layer.kernel_size[1]
    return target.key, "conv", layer.in_channels, layer.out_channels, layer.kernel_size[0]


def known_rows(keys: str) -> list[dict[str, str]]:
    """The rows of a file with known keys."""
    with Path(__file__).with_name(keys).open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


@pytest.mark.parametrize("keys", MODELS)
def test_full_size_targets_are_the_known_ones(keys: str) -> None:
    """Keys, kinds and shapes are exactly those of LoRA files for Stable Diffusion 1.5 and 2.1."""
    settings, count, _ = MODELS[keys]
    rows, found = known_rows(keys), full_size(settings)
    known = {(row["lora_name"], row["kind"], int(row["in"]), int(row["out"]), int(row["kernel"])) for row in rows}
    assert len(found) == len(rows) == count
    assert {described(target) for target in found} == known


@pytest.mark.parametrize("keys", MODELS)
def test_blocks_are_told_apart(keys: str) -> None:
    """There are six layers in each of the text encoder's, 192 in transformers, 80 in ResNet blocks, 6 in samplers."""
    settings, _, in_text = MODELS[keys]
    found = full_size(settings)
    kinds = {"transformer", "resnet", "sampler", "text_encoder"}
    blocks = [block for target in found for block in target.tags & kinds]
    counts = {block: blocks.count(block) for block in blocks}
    assert counts == {"text_encoder": in_text, "transformer": 192, "resnet": 80, "sampler": 6}
    modes = {row["lora_name"]: row["mode"] for row in known_rows(keys)}
    for target in found:
        assert (modes[target.key] == "LierLa") == bool(target.tags & {"transformer", "text_encoder"}), target.key
        assert ("conv3x3" in target.tags) == (described(target)[-1] == 3)
        assert ("attention" in target.tags) == ("attn" in target.key)


def test_order_is_fixed(tiny_sd1_file: Path) -> None:
    """The text encoder comes first, whatever the order asked for; parts not asked for are left out."""
    model = stable_diffusion(tiny_sd1_file)
    keys = [target.key for target in model.targets(["unet", "text_encoder"])]
    assert keys == [target.key for target in model.targets(["text_encoder", "unet"])]
    assert [key.startswith("lora_te_text_model_encoder_layers_") for key in keys] == [True] * 18 + [False] * 177
    assert [target.key for target in model.targets(["unet"])] == keys[18:]
    assert len(set(keys)) == len(keys)


def test_replaced_layers_are_used(tiny_sd1_file: Path) -> None:
    """What is put in a layer's place takes part in the prediction, for each and every target of both parts."""
    model = stable_diffusion(tiny_sd1_file)
    used: set[str] = set()

    class Wrapper(nn.Module):
        def __init__(self, key: str, layer: nn.Module) -> None:
            super().__init__()
            self.key, self.layer = key, layer

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            used.add(self.key)
            return self.layer(inputs)

    targets = model.targets(["text_encoder", "unet"])
    tokens = model.text_encoder.tokenize(["a cat"])
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([500]))
    expected = model.predict(*inputs, model.text_encoder.encode(tokens))
    for target in targets:
        target.replace(Wrapper(target.key, target.module))
    assert torch.equal(model.predict(*inputs, model.text_encoder.encode(tokens)), expected)
    assert used == {target.key for target in targets}
