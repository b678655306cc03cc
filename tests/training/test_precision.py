"""How runs compute: the VAE in float32, a base model kept in fewer bits, and compiled blocks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorakit
from lorakit.errors import ConfigError, DataError
from lorakit.models.memory.quantization import QuantizedLayer
from lorakit.models.memory.weight_formats import FORMATS
from lorakit.training.prepare import prepare
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_model, build_run
from tests.training.test_runs import nearly_same, same, weights_of


def test_vae_in_float32(make_config) -> None:
    """`no_half_vae` reaches the latents of a mixed-precision run, and has no effect without mixed precision."""

    def trained(mixed_precision: str, no_half_vae: bool) -> dict:
        training = {"mixed_precision": mixed_precision, "max_steps": 2}
        return weights_of(lorakit.train(make_config(model={"no_half_vae": no_half_vae}, training=training)))

    assert not same(trained("bf16", False), trained("bf16", True))
    assert same(trained("no", False), trained("no", True))


def with_other_vae(model: Path, folder: Path, factor: float) -> Path:
    """A copy of a model whose VAE's first weights are multiplied."""
    copy = shutil.copytree(model, folder)
    (file,) = (copy / "vae").glob("*.safetensors")
    weights = load_file(file)
    weights["encoder.conv_in.weight"].mul_(factor)
    save_file(weights, file)
    return copy


def test_vae_that_overflows(make_config, tiny_sd1: Path, tmp_path: Path) -> None:
    """Latents that float16 is too small for are made in float32, and the cache holds no NaN."""
    model = with_other_vae(tiny_sd1, tmp_path / "loud", 3000.0)
    data = {"cache_dir": str(tmp_path / "own-cache")}
    training = {"mixed_precision": "fp16", "max_steps": 1}
    lorakit.train(make_config(model={"path": str(model)}, data=data, training=training, network={"parts": ["unet"]}))
    entries = [load_file(file) for file in (tmp_path / "own-cache").rglob("*.safetensors")]
    assert len([entry for entry in entries if "mean" in entry]) == 4
    assert all(tensor.isfinite().all() for entry in entries for tensor in entry.values())


def test_vae_that_is_damaged(make_config, tiny_sd1: Path, tmp_path: Path) -> None:
    """Latents that are NaN in float32 too are an error that names an image and the cure, and are not cached."""
    model = with_other_vae(tiny_sd1, tmp_path / "damaged", float("nan"))
    data = {"cache_dir": str(tmp_path / "own-cache")}
    with pytest.raises(DataError, match=r"\.png: cannot be encoded: its mean holds NaN .*model\.vae"):
        lorakit.train(make_config(model={"path": str(model)}, data=data))
    assert not list((tmp_path / "own-cache").rglob("*.safetensors"))


def test_base_model_in_fewer_bits(make_config) -> None:
    """A run on a base model in fewer bits gives a plain LoRA like one of the whole base model, and can be resumed."""
    sections = {"network": {"name": "c3lier", "dropout": 0.1}, "training": {"gradient_checkpointing": True}}
    whole = weights_of(lorakit.train(make_config(**sections)))
    states = {"save_every_n_steps": 3, "save_state": True, "keep_last_states": 2}
    for weight_format, least in (("fp8", 0.8), ("int8", 0.9), ("nf4", 0.3)):
        training = {**sections["training"], f"{weight_format}_base": ["unet", "text_encoder"]}
        config = make_config(network=sections["network"], training=training, output={"name": weight_format, **states})
        path = lorakit.train(config)
        small = weights_of(path)
        assert small.keys() == whole.keys()
        assert not same(small, whole)
        updates = [torch.cat([w[key].flatten() for key in sorted(w) if "lora_up" in key]) for w in (small, whole)]
        assert torch.cosine_similarity(*updates, dim=0) > least
    state = path.parent / "nf4-state" / "step00000003"
    assert same(weights_of(lorakit.train(path.with_name("nf4.config.toml"), resume=state)), small)


@pytest.mark.parametrize(
    "formats",
    [{"unet": "fp8"}, {"unet": "nf4", "text_encoder": "int8"}, {"unet": "nf4", "text_encoder": "nf4"}],
)
def test_parts_in_fewer_bits(formats: dict[str, str], make_config) -> None:
    """The layers with adapters, and those without, of each part named are in its form; the others are whole."""
    keys = {form: [part for part in formats if formats[part] == form] for form in FORMATS}
    training = {f"{form}_base": parts for form, parts in keys.items()}
    config = make_config(training={**training, "mixed_precision": "bf16"})
    run = build_run(prepare(config), Distributed(torch.device("cpu")))
    for part, module in (("unet", run.model.denoiser), ("text_encoder", run.model.text_encoder.module)):
        layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)]
        small = [layer for layer in layers if isinstance(layer, QuantizedLayer)]
        assert all(layer.format is FORMATS[formats[part]] for layer in small)
        share = sum(layer.weight.numel() for layer in small) / sum(layer.weight.numel() for layer in layers)
        assert share > 0.95 if part in formats else share == 0


@pytest.mark.parametrize(
    "sections",
    [
        {"network": {"parts": ["unet"], "rank_dropout": 0.1}},
        {"network": {"name": "c3lier", "dora": True, "dropout": 0.1}, "training": {"gradient_checkpointing": True}},
        {"training": {"int8_base": ["text_encoder"], "nf4_base": ["unet"], "mixed_precision": "bf16"}},
    ],
    ids=["U-Net", "both parts, DoRA, recomputed", "in fewer bits"],
)
def test_streamed_base_model(make_config, tmp_path: Path, sections: dict[str, Any]) -> None:
    """A run whose frozen weights are copied ahead of their use gives the file of one that has them, previews or not."""
    shorter = {**sections, "training": {**sections.get("training", {}), "max_steps": 3}}
    plain = weights_of(lorakit.train(make_config(**shorter)))
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\n")
    streamed = make_config(
        **{**shorter, "training": {**shorter["training"], "stream_base": ["unet", "text_encoder"]}},
        output={"name": "streamed"},
        observers=[{"name": "samples", "prompts": str(tmp_path / "prompts.txt"), "every_n_steps": 1}],
    )
    assert same(weights_of(lorakit.train(streamed)), plain)


def test_streamed_base_model_sums_in_another_order(make_config) -> None:
    """Layers of several blocks that read the same caption are computed one by one, with a difference in rounding."""
    sections = {"network": {"parts": ["unet"]}, "training": {"max_steps": 3}}
    plain = weights_of(lorakit.train(make_config(**sections)))
    sections["training"] |= {"stream_base": ["unet"]}
    streamed = weights_of(lorakit.train(make_config(**sections, output={"name": "streamed"})))
    assert nearly_same(streamed, plain)


def test_streaming_in_vain(make_config, caplog: pytest.LogCaptureFixture) -> None:
    """Where `auto` finds no device with memory of its own, that nothing is saved is told when it shows."""
    config = make_config(training={"stream_base": ["unet"], "device": "auto"})
    assert not list(config.training.warnings())
    build_model(config, torch.device("cpu"))
    assert "training.stream_base: saves nothing, because cpu computes in CPU RAM" in caplog.messages


def test_8_bits_on_a_device_without_them(make_config) -> None:
    """A device that lacks the format is an error that names the key, before anything is read."""
    with pytest.raises(ConfigError, match=r"training\.fp8_base: cannot be used on mps"):
        build_model(make_config(training={"fp8_base": ["unet"]}), torch.device("mps"))


def test_compiled_run(make_config) -> None:
    """A run that compiles gives the file of one that does not, but for rounding."""
    sections = {"network": {"parts": ["unet"]}, "training": {"max_steps": 1}}
    plain = weights_of(lorakit.train(make_config(**sections)))
    sections["training"] |= {"compile": True, "compile_backend": "eager"}
    compiled = weights_of(lorakit.train(make_config(**sections, output={"name": "compiled"})))
    assert nearly_same(compiled, plain)


def test_backend_that_is_not_there(make_config) -> None:
    """A backend that this PyTorch lacks is an error at its key, with those that it has, before anything is read."""
    config = make_config(training={"compile": True, "compile_backend": "nvfuser"})
    with pytest.raises(ConfigError, match=r"training\.compile_backend: must be a backend .*inductor.*not 'nvfuser'"):
        build_model(config, torch.device("cpu"))
