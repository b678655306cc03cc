"""Blocks of the U-Net: their numbers, curves over them, and adapters and learning rates that differ between them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import attrs
import pytest
import torch
from torch import nn

from lorakit.api.block_layout import curve
from lorakit.api.components import ModelPart, OptimizerConfig
from lorakit.api.model_family import ModelFamilyConfig
from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.builtin.networks import C3LierConfig, LierlaConfig, LoHaConfig, LoKrConfig
from lorakit.builtin.optimizers.dadaptation import DAdaptationConfig
from lorakit.builtin.optimizers.standard import AdafactorConfig, AdamWConfig
from lorakit.errors import AdapterError
from lorakit.models.families.sd.state_dict_keys import LAYOUT
from lorakit.models.families.sd.targets import text_encoder_targets, unet_targets
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.load import without_weights
from lorakit.networks.config import LoRAConfig
from lorakit.networks.network import ParameterGroup
from lorakit.networks.ranked_config import RankedConfig
from lorakit.testing.contracts.networks import NetworkContract
from lorakit.testing.models import FULL_SD1

ATTENTION = {1, 2, 4, 5, 7, 8, 12, 16, 17, 18, 19, 20, 21, 22, 23, 24}
"""The blocks of Stable Diffusion 1.5 that have a transformer."""


@pytest.fixture(scope="module")
def targets() -> list[AdaptationTarget]:
    """All layers of Stable Diffusion 1.5 that can be adapted, without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    text = without_weights(lambda: CLIPTextModel(CLIPTextConfig(**FULL_SD1["text_encoder"])))
    unet = without_weights(lambda: UNet2DConditionModel(**FULL_SD1["unet"]))
    return [*text_encoder_targets(text), *unet_targets(unet)]


def sizes(config: RankedConfig, targets: Sequence[AdaptationTarget]) -> dict[str, tuple[int, float]]:
    """Rank and alpha of each adapter, by key."""
    network = config.build(targets)
    network.detach()
    return {adapter.key: (adapter.rank, adapter.alpha) for adapter in network.adapters}


def groups(config: LoRAConfig, targets: Sequence[AdaptationTarget]) -> list[ParameterGroup]:
    """The parameter groups with the learning rates 1 for the U-Net and 0.5 for the text encoder."""
    network = config.build(targets)
    network.detach()
    return network.parameter_groups(lambda target: {"unet": 1.0, "text_encoder": 0.5}[target.part])


def test_block_numbers(targets: list[AdaptationTarget]) -> None:
    """Layers have the numbers that sd-scripts gives their blocks, written out here for one layer of each block."""
    numbers = {target.key.removeprefix("lora_unet_"): target.block_index for target in targets if target.layout}
    for level in range(4):
        for layer in range(2):
            assert numbers[f"down_blocks_{level}_resnets_{layer}_conv1"] == 1 + 3 * level + layer
        for layer in range(3):
            assert numbers[f"up_blocks_{level}_resnets_{layer}_conv2"] == 13 + 3 * level + layer
        if level < 3:
            assert numbers[f"down_blocks_{level}_downsamplers_0_conv"] == 3 * level + 3
            assert numbers[f"down_blocks_{level}_attentions_1_proj_in"] == 2 + 3 * level
            assert numbers[f"up_blocks_{level}_upsamplers_0_conv"] == 13 + 3 * level + 2
    assert numbers["mid_block_attentions_0_transformer_blocks_0_attn1_to_q"] == 12
    assert numbers["mid_block_resnets_1_conv1"] == 12
    assert set(numbers.values()) == set(range(1, 25))
    in_text = [target for target in targets if target.part == "text_encoder"]
    assert {(target.block_index, target.encoder_index) for target in in_text} == {(None, 0)}


@pytest.mark.parametrize("count", [12, 9])
def test_curves(count: int) -> None:
    """Each curve is its formula, `cosine` is `sine` reversed, and what stands behind + is added."""
    steps = [number / (count - 1) for number in range(count)]
    assert curve("sine", count) == pytest.approx([math.sin(math.pi / 2 * x) for x in steps])
    assert curve("cosine", count) == pytest.approx(curve("sine", count)[::-1])
    assert curve("linear", count) == pytest.approx(steps)
    assert curve("reverse_linear", count) == pytest.approx(steps[::-1])
    assert curve("zeros", count) == (0,) * count
    assert curve("zeros + 0.5", count) == (0.5,) * count
    assert curve("linear+.25", count) == pytest.approx([x + 0.25 for x in steps])
    assert curve("cosine", count)[-1] == curve("reverse_linear", count)[-1] == curve("sine", count)[0] == 0
    for wrong in ("sinus", "sine+", "sine+x", "0.5", "sine-1"):
        with pytest.raises(ValueError, match="must be numbers, or one of sine, cosine, linear"):
            curve(wrong, count)


def test_ranks_of_blocks(targets: list[AdaptationTarget]) -> None:
    """Each block has its own rank and alpha, a block of rank 0 no adapter, and the text encoder those of the config."""
    ranks = tuple(0 if number == 12 else number for number in range(25))
    alphas = tuple(1.0 + number for number in range(25))
    found = sizes(LierlaConfig(rank=3, alpha=2.0, block_ranks=ranks, block_alphas=alphas), targets)
    by_key = {target.key: target for target in targets}
    assert len(found) == 72 + 15 * 12
    for key, size in found.items():
        number = by_key[key].block_index
        assert size == ((number, 1.0 + number) if "unet" in key else (3, 2.0))
    assert {by_key[key].block_index for key in found if "unet" in key} == ATTENTION - {12}


def test_ranks_of_convolutions_in_blocks(targets: list[AdaptationTarget]) -> None:
    """3×3 convolutions follow their own lists; linear layers and 1×1 convolutions of the same blocks do not."""
    conv_ranks = tuple(2 if number >= 13 else 0 for number in range(25))
    config = C3LierConfig(rank=5, alpha=1.0, conv_block_ranks=conv_ranks, conv_block_alphas=(3.0,) * 25)
    found = sizes(config, targets)
    assert Counter(found.values()) == {(5, 1.0): 72 + 228, (2, 3.0): 4 * 3 * 2 + 3}
    assert found["lora_unet_up_blocks_0_resnets_0_conv1"] == (2, 3.0)
    assert found["lora_unet_up_blocks_0_resnets_0_conv_shortcut"] == (5, 1.0)
    assert "lora_unet_down_blocks_0_resnets_0_conv1" not in found


@pytest.mark.parametrize(
    "settings",
    [
        {"down_lr_weight": (0.0,) * 9 + (1.0,) * 3, "mid_lr_weight": (0.0,), "up_lr_weight": "zeros"},
        {"block_ranks": (0,) * 24 + (5,)},
        {"conv_block_ranks": (2,) * 25},
    ],
)
def test_alphas_in_files_are_one_where_blocks_vary(targets: list[AdaptationTarget], settings: dict[str, Any]) -> None:
    """The most common alpha of a file, which some tools take for all, is that of linear layers in few blocks too."""
    config = C3LierConfig(alpha=3.0, conv_alpha=2.0, parts=("unet",), **settings)
    network = config.build(targets)
    network.detach()
    assert {adapter.file_alpha for adapter in network.adapters} == {3.0}


def test_learning_rates_of_blocks(targets: list[AdaptationTarget]) -> None:
    """Each block is a group with the U-Net's rate times its factor; blocks at the threshold have no adapters."""
    down = tuple(0.1 * number for number in range(12))
    config = LierlaConfig(rank=1, down_lr_weight=down, up_lr_weight="linear", block_lr_zero_threshold=0.1)
    found = {group.name: group for group in groups(config, targets)}
    expected = {number: down[number] for number in (2, 4, 5, 7, 8)} | {12: 1.0}
    expected |= {13 + number: number / 11 for number in range(3, 12)}
    assert {name: group.lr for name, group in found.items()} == pytest.approx(
        {"text_encoder": 0.5} | {f"unet_block{number}": factor for number, factor in expected.items()}
    )
    assert {len(group.parameters) for name, group in found.items() if "block" in name} == {24}
    assert {group.part for name, group in found.items() if "block" in name} == {"unet"}


def test_chosen_layers(targets: list[AdaptationTarget]) -> None:
    """Kinds of layers replace the network's own choice; 3×3 convolutions have their rank where the network has one."""
    tags = {target.key: target.tags for target in targets}
    attention = sizes(LierlaConfig(layers=("attention",)), targets)
    assert len(attention) == 16 * 8 + 12 * 4
    assert all("attention" in tags[key] for key in attention)
    others = sizes(LierlaConfig(layers=("mlp", "resnet")), targets)
    assert {key for key, own in tags.items() if own & {"mlp", "resnet"}} == others.keys()
    for config, size in (
        (LierlaConfig(rank=6, alpha=3.0, layers=("conv3x3",)), (6, 3.0)),
        (C3LierConfig(rank=6, alpha=3.0, conv_rank=2, layers=("conv3x3",)), (2, 1.0)),
        (LoHaConfig(rank=6, alpha=3.0, layers=("conv3x3",)), (6, 3.0)),
        (LoKrConfig(rank=6, alpha=3.0, conv_rank=2, conv_alpha=1.0, layers=("conv3x3",)), (2, 1.0)),
    ):
        found = sizes(config, targets)
        assert found.keys() == {key for key, own in tags.items() if "conv3x3" in own}
        assert set(found.values()) == {size}
    with pytest.raises(AdapterError, match=r"check network\.name, network\.parts and network\.layers"):
        LierlaConfig(layers=("modulation",)).build(targets)


def test_groups_of_blocks(targets: list[AdaptationTarget]) -> None:
    """Each group has its rank and learning rate, one of 0 no adapters; convolutions keep their rank."""
    config = C3LierConfig(rank=3, conv_rank=2, group_ranks={"up": 8, "mid": 0}, group_lr_weights={"up": 0.5})
    found, by_key = sizes(config, targets), {target.key: target for target in targets}
    for key, (rank, _) in found.items():
        expected = 8 if (by_key[key].block_index or 0) >= LAYOUT.groups["up"].start else 3
        assert rank == (2 if "conv3x3" in by_key[key].tags else expected)
    assert not any("mid_block" in key for key in found)
    rates = {group.name: group.lr for group in groups(config, targets)}
    assert rates == {"text_encoder": 0.5, "unet": 1.0, "unet_up": 0.5}
    off = LierlaConfig(group_lr_weights={"down": 0.0}, parts=("unet",))
    assert not any("down_blocks" in key for key in sizes(off, targets))


def test_loraplus(targets: list[AdaptationTarget]) -> None:
    """Up factors are groups of their own whose rate is that of the down factors times the part's ratio."""
    one = groups(LierlaConfig(rank=1, loraplus_lr_ratio=4.0, loraplus_text_encoder_lr_ratio=2.0), targets)
    assert [(group.name, group.lr, len(group.parameters)) for group in one] == [
        ("text_encoder", 0.5, 72), ("text_encoder plus", 1.0, 72), ("unet", 1.0, 192), ("unet plus", 4.0, 192)
    ]  # fmt: skip
    assert all(own.shape[-1] == 1 or own.shape[1] == 1 for group in one[1::2] for own in group.parameters)
    assert all(own.shape[0] == 1 for group in one[::2] for own in group.parameters)
    unet = groups(LierlaConfig(rank=1, loraplus_unet_lr_ratio=3.0, mid_lr_weight=(0.5,)), targets)
    rates = {group.name: group.lr for group in unet}
    assert rates["text_encoder"] == 0.5
    assert "text_encoder plus" not in rates
    assert (rates["unet_block12"], rates["unet_block12 plus"]) == (0.5, 1.5)
    assert (rates["unet_block1"], rates["unet_block1 plus"]) == (1.0, 3.0)


def test_several_text_encoders() -> None:
    """Where there are several text encoders, each has a group with its own learning rate."""
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    found = [
        AdaptationTarget(
            f"lora_te{number + 1}_x",
            "text_encoder",
            layers,
            str(number),
            frozenset({"text_encoder"}),
            encoder_index=number,
        )
        for number in range(2)
    ]
    optimizer = AdamWConfig(text_encoder_lr=(1e-3, 2e-3))
    network = LierlaConfig(rank=1, loraplus_lr_ratio=2.0).build(found)
    built = network.parameter_groups(lambda target: optimizer.lr_for(target.encoder_index))
    assert [(group.name, group.lr) for group in built] == [
        ("text_encoder_1", 1e-3), ("text_encoder_1 plus", 2e-3), ("text_encoder_2", 2e-3), ("text_encoder_2 plus", 4e-3)
    ]  # fmt: skip


@attrs.frozen
class Beside:
    """What a network looks at of the config that it is part of."""

    model: ModelFamilyConfig
    optimizer: OptimizerConfig


def problems(
    config: LoRAConfig, optimizer: OptimizerConfig | None = None, model: ModelFamilyConfig | None = None
) -> dict[str, str]:
    """What is wrong with a network beside an optimizer and a model."""
    run = Beside(model or SD1Config(path="x"), optimizer or AdamWConfig())
    found = [*config.problems(), *config.problems_with(run)]
    return {problem.key: problem.message for problem in found}


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"block_ranks": (4,) * 24}, "block_ranks", "must have 25 numbers for sd1, not 24"),
        ({"block_alphas": (4.0,) * 26}, "block_alphas", "must have 25 numbers for sd1, not 26"),
        ({"conv_block_ranks": (4,)}, "conv_block_ranks", "must have 25 numbers for sd1, not 1"),
        ({"conv_block_alphas": (4.0,)}, "conv_block_alphas", "must have 25 numbers for sd1, not 1"),
        ({"down_lr_weight": (1.0,)}, "down_lr_weight", "must have 12 numbers for sd1, not 1"),
        ({"mid_lr_weight": (1.0, 1.0)}, "mid_lr_weight", "must have 1 numbers for sd1, not 2"),
        ({"up_lr_weight": (1.0,) * 13}, "up_lr_weight", "must have 12 numbers for sd1, not 13"),
        ({"rank_from_weights": True}, "rank_from_weights", "needs network.weights"),
        ({"parts": ("unet",), "block_ranks": (0,) * 25, "conv_block_ranks": (0,) * 25}, "parts", "no block has both"),
        (
            {"parts": ("unet",), "down_lr_weight": "zeros", "mid_lr_weight": (0.0,), "up_lr_weight": "zeros"},
            "parts",
            "no block has both",
        ),
    ],
)
def test_problems(settings: dict[str, Any], key: str, message: str) -> None:
    """Lists of a wrong length, and settings that leave nothing to train, are refused at their key."""
    found = problems(C3LierConfig(**settings))
    assert list(found) == [key]
    assert message in found[key]


def test_optimizers_with_one_learning_rate() -> None:
    """Learning rates that vary are refused where the optimizer finds a single one; factors of 0 and 1 are not."""
    varied = LierlaConfig(loraplus_lr_ratio=4.0, up_lr_weight="sine")
    for optimizer in (DAdaptationConfig(), AdafactorConfig(relative_step=True)):
        assert set(problems(varied, optimizer)) == {"loraplus_lr_ratio", "up_lr_weight"}
        assert not problems(LierlaConfig(loraplus_lr_ratio=1.0, up_lr_weight="zeros", mid_lr_weight=(1.0,)), optimizer)
    assert not problems(varied, AdafactorConfig())
    assert [one.key for one in DAdaptationConfig(lr=1, text_encoder_lr=(1.0, 0.5)).problems()] == ["text_encoder_lr"]


def test_families_without_numbers() -> None:
    """Lists of numbers for blocks are refused with a family whose blocks have none; the rest is not."""

    @attrs.frozen(kw_only=True)
    class Other(ModelFamilyConfig):
        name = "other"
        parts = (ModelPart("transformer", title="transformer"),)

    found = problems(LierlaConfig(block_ranks=(1,), up_lr_weight="sine", loraplus_lr_ratio=2.0), model=Other(path="x"))
    assert set(found) == {"block_ranks", "up_lr_weight"}


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"parts": ("text_encoder",), "block_ranks": (1,) * 25, "mid_lr_weight": (1.0,)}, "block_ranks mid_lr_weight"),
        ({"block_lr_zero_threshold": 0.1}, "block_lr_zero_threshold"),
        ({"parts": ("unet",), "loraplus_text_encoder_lr_ratio": 2.0}, "loraplus_text_encoder_lr_ratio"),
        (
            {"loraplus_lr_ratio": 1.0, "loraplus_unet_lr_ratio": 2.0, "loraplus_text_encoder_lr_ratio": 2.0},
            "loraplus_lr_ratio",
        ),
        ({"rank_from_weights": True, "rank": 9, "rank_stabilized": True, "conv_rank": 3}, "conv_rank rank rank_stabil"),
    ],
)
def test_warnings(settings: dict[str, Any], keys: str) -> None:
    """Settings that nothing uses are told."""
    run = Beside(SD1Config(path="x"), AdamWConfig())
    found = [[*config.warnings(), *config.warnings_with(run)] for config in (C3LierConfig(**settings), C3LierConfig())]
    assert " ".join(sorted(warning.key for warning in found[0])).startswith(keys)
    assert not found[1]


class TestBlockwise(NetworkContract):
    """Ranks from block to block, rank-stabilized, and two kinds of factors of the learning rate."""

    config = C3LierConfig(
        rank=4,
        alpha=2.0,
        rank_stabilized=True,
        block_ranks=tuple(number % 5 for number in range(25)),
        conv_block_ranks=tuple((number + 2) % 4 for number in range(25)),
        down_lr_weight="sine+0.5",
        loraplus_lr_ratio=2.0,
        dropout=0.1,
    )


def test_lists_are_as_long_as_the_layout() -> None:
    """The three sides make up all of Stable Diffusion's blocks, each number once."""
    layout, numbers = LAYOUT, list(range(25))
    assert [number for group in layout.groups.values() for number in group] == list(range(layout.count)) == numbers
    assert layout.spread({"mid": [0.5]}) == [1.0] * 12 + [0.5] + [1.0] * 12
    assert torch.tensor(layout.spread({"down": [0.0] * 12, "up": [2.0] * 12})).sum() == 25
