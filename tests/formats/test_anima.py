"""LoRA files for Anima: as diffusers loads them, and those of other tools to continue from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AnimaTextConditioner, CosmosTransformer3DModel
from diffusers.loaders.lora_pipeline import AnimaLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.config.load import config_from_tables
from lorakit.models.families.anima.model import Anima
from lorakit.plugins.catalog import Catalog
from lorakit.testing.flow_models import make_tiny_anima
from lorakit.training.prepare import prepare
from lorakit.training.setup import attach_network, build_model, run_training

CPU = torch.device("cpu")
BLOCK = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.output_proj",
    "cross_attn.q_proj", "cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.output_proj",
    "mlp.layer1", "mlp.layer2",
)  # fmt: skip
ADAPTER = (
    *(name.replace("output_proj", "o_proj") for name in BLOCK if name.endswith("proj")), "mlp.0", "mlp.2",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Anima as diffusers stores it."""
    return make_tiny_anima(tmp_path_factory.mktemp("anima") / "tiny")


@pytest.fixture
def tables(folder: Path, photographs: Path, tmp_path: Path) -> dict[str, Any]:
    """The tables of a short run."""
    return {
        "model": {"path": str(folder)},
        "data": {"image_dir": str(photographs), "resolution": 64, "batch_size": 2, "cache_dir": str(tmp_path / "c")},
        "network": {"rank": 4, "alpha": 2.0, "parts": ["transformer", "text_conditioner"]},
        "optimizer": {"lr": 1e-2},
        "training": {"max_steps": 3, "device": "cpu"},
        "output": {"dir": str(tmp_path / "out"), "name": "a"},
    }


def predicted(tables: dict[str, Any], folder: Path) -> Tensor:
    """The velocity for a caption with the adapters that a config starts from."""
    config = config_from_tables(tables, folder, Catalog.discover())
    model = build_model(config, CPU)
    assert isinstance(model, Anima)
    attach_network(model, config)[0].eval()
    with torch.no_grad():
        captions = model.text_encoder.encode(model.text_encoder.tokenize(["a cat"]))
        return model.predict(noisy(), torch.tensor([0.4]), captions)


def noisy() -> Tensor:
    """Noisy latents."""
    return torch.randn(1, 16, 8, 6, generator=torch.Generator().manual_seed(0))


def of_diffusers(folder: Path, transformer: Any, conditioner: Any) -> Tensor:
    """The same by diffusers' modules; the transformer gets its padding mask as one more channel."""
    from transformers import AutoTokenizer, Qwen3Model

    tokenizer, t5_tokenizer = (AutoTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "t5_tokenizer"))
    transformer.register_to_config(concat_padding_mask=False)
    with torch.no_grad():
        qwen3 = Qwen3Model.from_pretrained(folder / "text_encoder").eval()
        states = qwen3(**tokenizer("a cat", return_tensors="pt")).last_hidden_state
        context = conditioner(states, torch.tensor([[*t5_tokenizer("a cat").input_ids, 1]]))
        padding = torch.zeros(1, 1, 1, 8, 6)
        (found,) = transformer(
            noisy().unsqueeze(2), torch.tensor([0.4]), context, condition_mask=padding, return_dict=False
        )
    return found.squeeze(2)


def test_diffusers_loads_every_layer(tables: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Names without alpha; each adapter is loaded, and diffusers predicts what lorakit does."""
    catalog = Catalog.discover()
    file = run_training(prepare(config_from_tables(tables, tmp_path, catalog)), catalog)
    tensors = load_file(file)
    layers = [f"blocks.{index}.{name}" for index in range(2) for name in BLOCK]
    layers += [f"llm_adapter.blocks.0.{name}" for name in ADAPTER]
    assert tensors.keys() == {f"diffusion_model.{layer}.lora_{end}.weight" for layer in layers for end in "AB"}
    transformer = CosmosTransformer3DModel.from_pretrained(folder / "transformer").eval()
    conditioner = AnimaTextConditioner.from_pretrained(folder / "text_conditioner").eval()
    plain = of_diffusers(folder, transformer, conditioner)
    state = AnimaLoraLoaderMixin.lora_state_dict(file)
    AnimaLoraLoaderMixin.load_lora_into_transformer(state, transformer)
    AnimaLoraLoaderMixin.load_lora_into_text_conditioner(state, conditioner)
    adapted = [own for module in (transformer, conditioner) for own in module.modules() if hasattr(own, "lora_A")]
    assert len(adapted) == len(layers)
    start = {"weights": str(file), "rank_from_weights": True, "parts": ["transformer", "text_conditioner"]}
    found = predicted({**tables, "network": start}, tmp_path)
    torch.testing.assert_close(of_diffusers(folder, transformer, conditioner), found, rtol=1e-3, atol=1e-4)
    assert (found - plain).norm() > 0.01 * plain.norm()


def test_diffusers_loads_one_block(folder: Path, tmp_path: Path) -> None:
    """A file with adapters of some layers alone loads: each of these, and no other."""
    transformer = CosmosTransformer3DModel.from_pretrained(folder / "transformer")
    layers = {
        "blocks.1.mlp.layer1": "transformer_blocks.1.ff.net.0.proj",
        "blocks.1.cross_attn.k_proj": "transformer_blocks.1.attn2.to_k",
    }
    tensors = {}
    for layer, theirs in layers.items():
        outputs, inputs = transformer.get_submodule(theirs).weight.shape
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.ones(2, inputs)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.ones(outputs, 2)
    save_file(tensors, tmp_path / "one.safetensors")
    state = AnimaLoraLoaderMixin.lora_state_dict(tmp_path / "one.safetensors")
    AnimaLoraLoaderMixin.load_lora_into_transformer(state, transformer)
    adapted = {name for name, module in transformer.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {*layers.values()}


@pytest.mark.parametrize("form", ["sd-scripts", "ComfyUI", "diffusers"])
def test_files_of_other_tools(tables: dict[str, Any], tmp_path: Path, form: str) -> None:
    """A LoRA of one layer of the transformer and one of the LLM adapter, in the names that tools have for them."""
    generator = torch.Generator().manual_seed(1)
    names = {
        "sd-scripts": ("lora_unet_blocks_1_mlp_layer2", "lora_unet_llm_adapter_blocks_0_cross_attn_v_proj"),
        "ComfyUI": ("diffusion_model.blocks.1.mlp.layer2", "diffusion_model.llm_adapter.blocks.0.cross_attn.v_proj"),
        "diffusers": ("transformer.transformer_blocks.1.ff.net.2", "text_conditioner.blocks.0.cross_attn.v_proj"),
    }[form]
    ends = ("lora_down", "lora_up") if form == "sd-scripts" else ("lora_A", "lora_B")
    shapes = {"blocks.1.mlp.layer2": (32, 64), "blocks.0.cross_attn.v_proj": (24, 32)}
    tensors: dict[str, Tensor] = {}
    updates: list[Tensor] = []
    for name, (outputs, inputs) in zip(names, shapes.values(), strict=True):
        down, up = (torch.randn(shape, generator=generator) for shape in ((2, inputs), (outputs, 2)))
        tensors |= {f"{name}.{ends[0]}.weight": down, f"{name}.{ends[1]}.weight": up}
        scale = 0.5 if form == "sd-scripts" else 1.0
        if form == "sd-scripts":
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
        updates.append(scale * up @ down)
    save_file(tensors, tmp_path / "theirs.safetensors")
    file = str(tmp_path / "theirs.safetensors")
    parts = ["transformer", "text_conditioner"]
    found = predicted({**tables, "network": {"weights": file, "rank_from_weights": True, "parts": parts}}, tmp_path)
    merged = {**tables, "model": {**tables["model"], "base_weights": [file]}, "network": {"rank": 2}}
    torch.testing.assert_close(found, predicted(merged, tmp_path), rtol=1e-4, atol=1e-5)
    model = build_model(config_from_tables({**tables, "network": {"rank": 2}}, tmp_path, Catalog.discover()), CPU)
    assert isinstance(model, Anima)
    encoder = model.text_encoder
    for module, path, update in zip((model.denoiser, encoder.adapter), shapes, updates, strict=True):
        module.get_submodule(path).get_parameter("weight").data.add_(update)
    with torch.no_grad():
        expected = model.predict(noisy(), torch.tensor([0.4]), encoder.encode(encoder.tokenize(["a cat"])))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
