"""The layers that can be adapted: keys, kinds and shapes as LoRA files have them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from lorakit.models.protocol import AdaptationTarget
from lorakit.models.stable_diffusion.targets import text_encoder_targets, unet_targets
from lorakit.models.weights import without_weights
from lorakit.testing.models import FULL_SD1
from tests.models.building import stable_diffusion

KEYS = Path(__file__).with_name("lora_keys_sd15.tsv")


@pytest.fixture(scope="module")
def full_size() -> list[AdaptationTarget]:
    """All targets of the full-size model, which has shapes but no weights."""
    text = without_weights(lambda: CLIPTextModel(CLIPTextConfig(**FULL_SD1["text_encoder"])))
    unet = without_weights(lambda: UNet2DConditionModel(**FULL_SD1["unet"]))
    return [*text_encoder_targets(text), *unet_targets(unet)]


def described(target: AdaptationTarget) -> tuple[str, str, int, int, int]:
    """Key, kind, inputs, outputs and kernel of a target."""
    layer = target.module
    if isinstance(layer, nn.Linear):
        return target.key, "linear", layer.in_features, layer.out_features, 1
    assert isinstance(layer, nn.Conv2d)
    assert layer.kernel_size[0] == layer.kernel_size[1]
    return target.key, "conv", layer.in_channels, layer.out_channels, layer.kernel_size[0]


def test_full_size_targets_are_the_known_ones(full_size: list[AdaptationTarget]) -> None:
    """Keys, kinds and shapes are exactly those of LoRA files for Stable Diffusion 1.5."""
    with KEYS.open(newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    known = {(row["lora_name"], row["kind"], int(row["in"]), int(row["out"]), int(row["kernel"])) for row in rows}
    assert len(full_size) == len(rows) == 350
    assert {described(target) for target in full_size} == known


def test_blocks_are_told_apart(full_size: list[AdaptationTarget]) -> None:
    """There are 72 layers in the text encoder, 192 in transformers, 80 in ResNet blocks and 6 in samplers."""
    blocks = [target.block for target in full_size]
    counts = {block: blocks.count(block) for block in blocks}
    assert counts == {"text_encoder": 72, "transformer": 192, "resnet": 80, "sampler": 6}
    with KEYS.open(newline="") as stream:
        modes = {row["lora_name"]: row["mode"] for row in csv.DictReader(stream, delimiter="\t")}
    for target in full_size:
        assert (modes[target.key] == "LierLa") == (target.block in {"transformer", "text_encoder"}), target.key


def test_order_is_fixed(tiny_file: Path) -> None:
    """The text encoder comes first, whatever the order asked for; parts not asked for are left out."""
    model = stable_diffusion(tiny_file)
    keys = [target.key for target in model.targets(["unet", "text_encoder"])]
    assert keys == [target.key for target in model.targets(["text_encoder", "unet"])]
    assert [key.startswith("lora_te_text_model_encoder_layers_") for key in keys] == [True] * 18 + [False] * 177
    assert [target.key for target in model.targets(["unet"])] == keys[18:]
    assert len(set(keys)) == len(keys)


def test_replaced_layers_are_used(tiny_file: Path) -> None:
    """What is put in a layer's place takes part in the prediction, for each and every target of both parts."""
    model = stable_diffusion(tiny_file)
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
