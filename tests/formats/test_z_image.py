"""LoRA files for Z-Image: as diffusers loads them, in ComfyUI's rules, and back to continue from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.loaders.lora_pipeline import ZImageLoraLoaderMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.builtin.model_families.z_image import ZImageConfig
from lorakit.config.load import config_from_tables
from lorakit.errors import ConfigError
from lorakit.models.conditioning import without_training_adapter
from lorakit.plugins.catalog import Catalog
from lorakit.testing.flow_models import make_tiny_z_image
from lorakit.training.prepare import prepare
from lorakit.training.runtime import precision
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.runtime.precision import Precision
from lorakit.training.setup import attach_network, build_model, run_training

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Z-Image as diffusers stores it."""
    return make_tiny_z_image(tmp_path_factory.mktemp("z_image") / "tiny")


@pytest.fixture
def tables(folder: Path, photographs: Path, tmp_path: Path) -> dict[str, Any]:
    """The tables of a short run."""
    return {
        "model": {"path": str(folder)},
        "data": {"image_dir": str(photographs), "resolution": 64, "batch_size": 2, "cache_dir": str(tmp_path / "c")},
        "network": {"rank": 4, "alpha": 2.0},
        "optimizer": {"lr": 1e-2},
        "training": {"max_steps": 3, "device": "cpu"},
        "output": {"dir": str(tmp_path / "out"), "name": "z"},
    }


def trained(tables: dict[str, Any], folder: Path) -> Path:
    """The file of a run."""
    return run_training(prepare(config_from_tables(tables, folder, Catalog.discover())), Catalog.discover())


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, times, and the states of a caption."""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 16, 8, 8, generator=generator)
    return noisy, torch.tensor([0.4]), torch.randn(7, 32, generator=generator)


def predicted(tables: dict[str, Any], folder: Path) -> Tensor:
    """The velocity with the adapters that a config starts from."""
    config = config_from_tables(tables, folder, Catalog.discover())
    model = build_model(config, CPU)
    attach_network(model, config)[0].eval()
    noisy, times, states = inputs()
    with torch.no_grad():
        return model.predict(noisy, times, model.collate([{"hidden_states": states}]))  # type: ignore[attr-defined]


def test_diffusers_loads_every_layer(tables: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Names without alpha; each adapter is loaded, and diffusers predicts what lorakit does."""
    file = trained(tables, tmp_path)
    tensors = load_file(file)
    layers = [f"layers.{index}.{name}" for index in range(2) for name in (
        "attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
        "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    )]  # fmt: skip
    assert tensors.keys() == {f"diffusion_model.{layer}.lora_{end}.weight" for layer in layers for end in "AB"}
    transformer = ZImageTransformer2DModel.from_pretrained(folder / "transformer").eval()
    plain = _of_diffusers(transformer)
    ZImageLoraLoaderMixin.load_lora_into_transformer(ZImageLoraLoaderMixin.lora_state_dict(file), transformer)
    adapted = [name for name, module in transformer.named_modules() if hasattr(module, "lora_A")]
    assert sorted(adapted) == sorted(layers)
    found = predicted({**tables, "network": {"weights": str(file), "rank_from_weights": True}}, tmp_path)
    torch.testing.assert_close(_of_diffusers(transformer), found, rtol=1e-4, atol=1e-5)
    assert (found - plain).norm() > 0.01 * plain.norm()


def test_diffusers_loads_one_block(folder: Path, tmp_path: Path) -> None:
    """A file with adapters of some layers alone loads: each of these, and no other."""
    transformer = ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    layers = ["layers.1.attention.to_q", "layers.1.feed_forward.w2"]
    tensors = {}
    for layer in layers:
        outputs, inputs = transformer.get_submodule(layer).weight.shape
        tensors[f"diffusion_model.{layer}.lora_A.weight"] = torch.ones(2, inputs)
        tensors[f"diffusion_model.{layer}.lora_B.weight"] = torch.ones(outputs, 2)
    save_file(tensors, tmp_path / "one.safetensors")
    state = ZImageLoraLoaderMixin.lora_state_dict(tmp_path / "one.safetensors")
    ZImageLoraLoaderMixin.load_lora_into_transformer(state, transformer)
    assert [name for name, module in transformer.named_modules() if hasattr(module, "lora_A")] == layers


def _of_diffusers(transformer: ZImageTransformer2DModel) -> Tensor:
    noisy, times, states = inputs()
    with torch.no_grad():
        return -transformer([noisy[0].unsqueeze(1)], 1 - times, [states], return_dict=False)[0][0].transpose(0, 1)


@pytest.mark.parametrize("form", ["split", "fused", "diffusers"])
def test_files_of_other_tools(tables: dict[str, Any], tmp_path: Path, form: str) -> None:
    """musubi-tuner's names, ComfyUI's with one adapter for queries, keys and values, and those of diffusers."""
    generator = torch.Generator().manual_seed(1)
    pair = {"lora_A.weight": torch.randn(2, 32, generator=generator), "alpha": torch.tensor(1.0)}
    third = torch.randn(96, 2, generator=generator)
    kohya = {"lora_down.weight": pair["lora_A.weight"], "alpha": pair["alpha"]}
    tensors: dict[str, Tensor] = {}
    if form == "fused":
        key = "lora_unet_layers_1_attention_qkv"
        tensors = {f"{key}.{end}": tensor for end, tensor in {**kohya, "lora_up.weight": third}.items()}
    for index, name in enumerate(("to_q", "to_k", "to_v") if form != "fused" else ()):
        up = third[32 * index : 32 * index + 32]
        own = {**kohya, "lora_up.weight": up} if form == "split" else {"lora_A.weight": pair["lora_A.weight"]}
        layer = f"lora_unet_layers_1_attention_{name}" if form == "split" else f"transformer.layers.1.attention.{name}"
        own = own if form == "split" else {**own, "lora_B.weight": up / 2}
        tensors |= {f"{layer}.{end}": tensor.clone() for end, tensor in own.items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    paths = {"weights": str(tmp_path / "theirs.safetensors"), "rank_from_weights": True}
    found = predicted({**tables, "network": paths}, tmp_path)
    merged = {**tables, "model": {**tables["model"], "base_weights": [paths["weights"]]}, "network": {"rank": 2}}
    torch.testing.assert_close(found, predicted(merged, tmp_path), rtol=1e-4, atol=1e-5)
    fused = {"form": form, "norm": float(found.norm())}
    expected = _with_update(tables, third @ pair["lora_A.weight"] / 2, tmp_path)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=str(fused))


def _with_update(tables: dict[str, Any], update: Tensor, folder: Path) -> Tensor:
    """The velocity with an update added to queries, keys and values of the last block by hand."""
    model = build_model(config_from_tables(tables, folder, Catalog.discover()), CPU)
    attention = model.denoiser.get_submodule("layers.1.attention")
    for name, own in zip(("to_q", "to_k", "to_v"), update.chunk(3), strict=True):
        attention.get_submodule(name).get_parameter("weight").data.add_(own)
    noisy, times, states = inputs()
    with torch.no_grad():
        return model.predict(noisy, times, model.collate([{"hidden_states": states}]))  # type: ignore[attr-defined]


def test_training_adapter(tables: dict[str, Any], tmp_path: Path) -> None:
    """Part of the model while it trains, taken back in previews, named in the metadata, and not in the file."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for index, name in enumerate(("attention.to_q", "attention.to_out.0", "feed_forward.w2")):
        inputs_, outputs = ((85, 32), (32, 32))[name != "feed_forward.w2"]
        key = f"diffusion_model.layers.{index % 2}.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(3, inputs_, generator=generator) / 4
        tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, 3, generator=generator) / 4
    save_file(tensors, tmp_path / "undistilled.safetensors")
    plain = config_from_tables(tables, tmp_path, Catalog.discover())
    tables["model"] = {**tables["model"], "training_adapter": str(tmp_path / "undistilled.safetensors")}
    config = config_from_tables(tables, tmp_path, Catalog.discover())
    noisy, times, states = inputs()
    found = []
    for own in (plain, config):
        model = build_model(own, CPU)
        network = attach_network(model, own)[0]
        for parameter in (own for own in network.parameters() if own.requires_grad):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        conditioning = model.collate([{"hidden_states": states}])  # type: ignore[attr-defined]
        with torch.no_grad():
            found.append(model.predict(noisy, times, conditioning))
            with without_training_adapter(model):
                found.append(model.predict(noisy, times, conditioning))
            assert torch.equal(model.predict(noisy, times, conditioning), found[-2])
    alone, _, merged, taken_back = found
    assert (merged - alone).norm() > 0.1 * alone.norm()
    torch.testing.assert_close(taken_back, alone, rtol=1e-4, atol=1e-5)
    with safe_open(trained(tables, tmp_path), "pt") as file:
        metadata = file.metadata()
    assert "undistilled.safetensors" in metadata["ss_training_adapter"]
    assert "ss_base_weights" not in metadata


def test_distilled_models(folder: Path, tmp_path: Path) -> None:
    """Turbo is known by its scheduler or its name, previewed in 8 steps, and warned of when it is trained plainly."""
    turbo = Path(shutil.copytree(folder, tmp_path / "model"))
    (turbo / "scheduler" / "scheduler_config.json").write_text('{"shift": 3.0}')
    config = ZImageConfig(path=str(turbo))
    assert (config.preview_steps, config.preview_scale, config.noise_process.preview_shift) == (8, 1.0, 3.0)
    (warning,) = config.warnings()
    assert "training_adapter" in warning.hint
    assert not list(ZImageConfig(path=str(turbo), distilled=False).warnings())
    assert not list(ZImageConfig(path=str(folder)).warnings())
    assert ZImageConfig(path="z_image_turbo_bf16.safetensors").is_distilled
    assert not ZImageConfig(path="Z-Image-De-Turbo.safetensors").is_distilled


def test_fp16_is_refused(tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the transformer overflows in it; where the device asks for it, bf16 is used, though it is slow."""
    processes = Distributed(CPU)
    asked = Precision("fp16", "compute capability 7.5, below 8.0")
    monkeypatch.setattr(precision, "precision_of", lambda *_: asked)
    config = config_from_tables(tables, tmp_path, Catalog.discover())
    found = precision.run_precision(config, processes)
    assert (found.value, "overflows in fp16" in found.reason) == ("bf16", True)
    tables["training"]["mixed_precision"] = "fp16"
    with pytest.raises(ConfigError, match=r"training\.mixed_precision: cannot be used: Z-Image overflows in fp16"):
        config_from_tables(tables, tmp_path, Catalog.discover())
