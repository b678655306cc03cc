"""The arguments of networks.lora_flux and networks.lora_anima."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from lorakit.api.model_family import ModelFamilyConfig
from lorakit.kohya.flow_layers import LAYERS, Choice, Layer, choice_of, layers_of
from lorakit.models.families.anima.model import transformer_targets as anima_targets
from lorakit.models.families.anima.structure import TransformerConfig
from lorakit.models.families.anima.transformer import Transformer as AnimaTransformer
from lorakit.models.families.flux1.settings import FluxSettings
from lorakit.models.families.flux1.targets import transformer_targets as flux_targets
from lorakit.models.families.flux1.transformer import FluxTransformer
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.load import without_weights
from lorakit.plugins.catalog import Catalog
from tests.kohya.conftest import Convert
from tests.kohya.test_conversion import remarks

Least = tuple[str, ...]
UNET = "--network_train_unet_only"


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ("", {}),
        ("train_blocks=all verbose=True", {}),
        ("train_blocks=single", {"group_ranks": {"double": 0}}),
        ("train_blocks=double", {"group_ranks": {"single": 0}}),
        ("single_dim=8 single_mod_dim=8", {"group_ranks": {"single": 8}}),
        ("train_single_block_indices=none", {"group_ranks": {"single": 0}}),
        ("train_double_block_indices=0-1,18 train_single_block_indices=all",
         {"block_ranks": [4, 4, *[0] * 16, 4, *[4] * 38]}),
        ("img_mod_dim=0 txt_mod_dim=0 single_mod_dim=0", {"layers": ["attention", "mlp"]}),
        ("img_mlp_dim=0 txt_mlp_dim=0 img_mod_dim=0 txt_mod_dim=0 train_blocks=double",
         {"layers": ["attention"], "group_ranks": {"single": 0}}),
        ("network_reg_dims=_mod_lin=0,modulation=0", {"layers": ["attention", "mlp"]}),
        ("network_reg_dims=single_blocks=16", {"group_ranks": {"single": 16}}),
        ("network_reg_lrs=single_blocks=1e-5", {"group_lr_weights": {"single": 5.0}}),
        ("network_reg_lrs=double_blocks=0", {"group_lr_weights": {"double": 0.0}}),
        ("rank_dropout=0.1 module_dropout=0.2 loraplus_lr_ratio=4",
         {"rank_dropout": 0.1, "module_dropout": 0.2, "loraplus_lr_ratio": 4.0}),
    ],
)  # fmt: skip
def test_what_the_network_can_say(args: str, wanted: Mapping[str, Any], converted: Convert, flux_least: Least) -> None:
    """Choices of layers and ranks are kinds of layers and ranks of blocks, with no remark."""
    draft = converted(UNET, "--network_args", *args.split(), least=flux_least)
    network = draft.tables()["network"]
    assert {key: value for key, value in network.items() if key not in ("name", "parts")} == wanted
    assert network["parts"] == ["transformer"]
    assert draft.remarks == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("img_attn_dim=8", "--network_args=img_attn_dim=8: has no counterpart (layers are chosen by their kind, netw"),
        ("network_reg_dims=linear1=8", "--network_args=network_reg_dims=linear1=8: has no counterpart (layers are"),
        ("network_reg_lrs=linear1=1e-4", "--network_args=network_reg_lrs=linear1=0.0001: has no counterpart (learni"),
        ("network_reg_lrs=nothing=1e-4", "--network_args: network_reg_lrs=nothing=0.0001 has no effect, as no layer"),
        ("split_qkv=True", "--network_args=split_qkv=True: has no counterpart (one adapter is trained for queries"),
        ("in_dims=[4,0,0,0,0]", "--network_args=in_dims=[4,0,0,0,0]: has no counterpart (layers outside of blocks"),
        ("conv_dim=4", "--network_args: conv_dim=4 has no effect, as there are no convolutions"),
        ("ggpo_beta=0.01 ggpo_sigma=0.03", "--network_args=ggpo_beta=0.01 ggpo_sigma=0.03: has no counterpart"),
        ("ggpo_beta=0.01", "--network_args: ggpo_beta=0.01 has no effect alone"),
        ("train_t5xxl=True", "--network_args: train_t5xxl=True has no effect with --network_train_unet_only"),
    ],
)
def test_what_it_cannot_say(args: str, told: str, converted: Convert, flux_least: Least) -> None:
    """An argument without a counterpart, or without effect, is one remark, and nothing is written."""
    draft = converted(UNET, "--network_args", *args.split(), least=flux_least)
    assert [text[: len(told)] for text in remarks(draft)] == [told]
    assert draft.tables()["network"] == {"name": "lierla", "parts": ["transformer"]}


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ("exclude_patterns='.*mlp.*'", {"layers": ["attention"]}),
        ("exclude_patterns=['.*_attn.*']", {"layers": ["mlp"]}),
        ("include_patterns=['blocks.*adaln_modulation.*']", {"layers": ["transformer", "modulation"]}),
        (r"exclude_patterns=['blocks\\.\\d\\..*']", {"block_ranks": [*[0] * 10, *[4] * 18]}),
        ("network_reg_dims=.*=8", {"group_ranks": {"blocks": 8}}),
        ("network_reg_lrs=.*mlp.*=4e-6,.*=4e-6", {"group_lr_weights": {"blocks": 2.0}}),
    ],
)
def test_patterns_of_anima(args: str, wanted: Mapping[str, Any], converted: Convert, anima_least: Least) -> None:
    """Expressions for layers are kinds of layers and ranks of blocks, where these say the same."""
    draft = converted(UNET, "--network_args", args, least=anima_least)
    network = draft.tables()["network"]
    assert {key: value for key, value in network.items() if key not in ("name", "parts")} == wanted
    assert draft.remarks == []


@pytest.mark.parametrize(
    "args", ["include_patterns=['final_layer.*']", "exclude_patterns=['.*q_proj']", "network_reg_dims=.*mlp.*=8"]
)
def test_patterns_without_a_counterpart(args: str, converted: Convert, anima_least: Least) -> None:
    """Expressions for more than kinds of layers and blocks are told."""
    draft = converted(UNET, "--network_args", args, least=anima_least)
    (told,) = remarks(draft)
    assert told.startswith(f"--network_args={args}: has no counterpart")
    assert draft.tables()["network"] == {"name": "lierla", "parts": ["transformer"]}


@pytest.mark.parametrize(
    "case",
    [
        ("flux", "", ["transformer", "text_encoder"], None),
        ("flux", "--text_encoder_lr 1e-5", ["transformer", "text_encoder"], 1e-5),
        ("flux", "--network_args train_t5xxl=True", ["transformer", "text_encoder", "text_encoder_2"], None),
        ("flux", "--network_args train_t5xxl=True --text_encoder_lr 1e-5 5e-6",
         ["transformer", "text_encoder", "text_encoder_2"], [1e-5, 5e-6]),
        ("flux", "--network_train_text_encoder_only", ["text_encoder"], None),
        ("chroma", "", ["transformer"], None),
        ("chroma", "--network_args train_t5xxl=True --text_encoder_lr 5e-6",
         ["transformer", "text_encoder"], 5e-6),
        ("anima", "--text_encoder_lr 1e-5", ["transformer", "text_encoder"], 1e-5),
        ("anima", "--network_args train_llm_adapter=True --network_train_unet_only --unet_lr 1e-4",
         ["transformer", "text_conditioner"], 1e-4),
        ("anima", "--network_args train_llm_adapter=True --unet_lr 1e-4 --text_encoder_lr 1e-5",
         ["transformer", "text_encoder", "text_conditioner"], [1e-5, 1e-4]),
    ],
)  # fmt: skip
def test_parts_and_rates(
    case: tuple[str, str, list[str], object], converted: Convert, flow_leasts: dict[str, Least]
) -> None:
    """The parts that sd-scripts trains, with the learning rates that it gives them."""
    family, words, parts, rate = case
    draft = converted(*words.split(), least=flow_leasts[family])
    assert draft.tables()["network"]["parts"] == parts
    assert draft.tables()["optimizer"].get("text_encoder_lr") == rate
    assert draft.remarks == []


def test_rates_for_nothing(converted: Convert, flux_least: Least) -> None:
    """A learning rate of a text encoder that is not trained is told."""
    told = "has no effect, as no text encoder that it is for is trained"
    for words, unused in ((("--text_encoder_lr", "1e-5", "5e-6"), "5e-06"), (("--text_encoder_lr=3", UNET), "3")):
        assert remarks(converted(*words, least=flux_least)) == [f"--text_encoder_lr: {unused} {told}"]


def test_text_encoders_beside_a_choice(converted: Convert, anima_least: Least, flux_least: Least) -> None:
    """A choice of the transformer's layers leaves text encoders whole, and is told where it is for them as well."""
    draft = converted("--network_args", "exclude_patterns=['.*mlp.*']", least=anima_least)
    assert draft.tables()["network"]["layers"] == ["attention", "text_encoder"]
    told = "--network_args: exclude_patterns=['.*mlp.*'] counts for the transformer alone in lorakit"
    assert remarks(draft) == [told]
    assert converted("--network_args", "network_reg_dims=single=8", least=flux_least).remarks == []


def test_ranks_of_a_file(converted: Convert, flux_least: Least) -> None:
    """With --dim_from_weights the file says which layers there are, and the arguments do nothing."""
    words = (UNET, "--dim_from_weights", "--network_weights=a.safetensors")
    draft = converted(*words, "--network_args", "train_blocks=single", least=flux_least)
    assert remarks(draft) == ["--network_args: train_blocks=single has no effect with --dim_from_weights"]
    assert "group_ranks" not in draft.tables()["network"]


def layers(family: str) -> list[Layer]:
    """All layers of a family."""
    layout = Catalog.discover().find(ModelFamilyConfig, family).layout
    assert layout
    return layers_of(family, layout)


def test_choices() -> None:
    """Any choice by kind and block is found again, and one that is none is not."""
    own = layers("flux1")
    for layer in own[:3]:
        assert choice_of({other: 4 * (other != layer) for other in own}) is None
    assert choice_of({layer: layer.block * ("modulation" not in layer.tags) for layer in own}) == Choice(
        ("attention", "mlp"), tuple(range(57))
    )
    assert choice_of(dict.fromkeys(own, 0)) == Choice(None, (0,) * 57)
    assert choice_of(dict.fromkeys(own, 4)) == Choice(None, (4,) * 57)


def targets(family: str) -> Iterator[AdaptationTarget]:
    """The layers of a family's transformer, with a few blocks."""
    if family == "anima":
        yield from anima_targets(without_weights(lambda: AnimaTransformer(TransformerConfig())))
        return
    channels = {"approximator_num_channels": 64} if family == "chroma" else {}
    settings = FluxSettings(num_layers=1, num_single_layers=1, **channels)
    yield from flux_targets(without_weights(lambda: FluxTransformer(settings)))


@pytest.mark.parametrize("family", sorted(LAYERS))
def test_layers_are_those_of_the_family(family: str) -> None:
    """The layers in a block of each group, and their tags, are those that the family's own targets have."""
    found = {target.path: target.tags for target in targets(family) if ".0." in target.path}
    known = {layer.path: layer.tags for layer in layers(family)}
    for path, tags in found.items():
        assert known[path] == tags, path
    firsts = {path for path in known if path.split(".")[1] == "0"}
    assert firsts == {path for path in found if path.split(".")[1] == "0"}
