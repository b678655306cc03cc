"""LoRA files in the layouts of sd-scripts, diffusers and ComfyUI, and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.checkpoints.kinds import adapter_kind
from lorakit.checkpoints.summary import summarize
from lorakit.errors import AdapterError
from lorakit.lora_tools import convert
from lorakit.lora_tools.adapters import open_lora
from tests.lora_tools.files import (
    ATTENTION,
    CONVOLUTION,
    PROJECTION,
    SD1,
    SHAPES,
    TEXT,
    XL_SHAPES,
    close,
    dora,
    lora,
    metadata_of,
    updates,
    write,
)


def same(one: Path, other: Path) -> bool:
    """Whether files have the same tensors, bit for bit, in the same number formats."""
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and left[name].shape == right[name].shape
        and torch.equal(left[name], right[name])
        for name in left
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [2.0, 4.0, 3.0, 0.7])
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
@pytest.mark.parametrize("make", [lora, dora])
def test_there_and_back(tmp_path: Path, make: object, layout: str, alpha: float, dtype: torch.dtype) -> None:
    """Each layout gives the file again, bit for bit, metadata included."""
    tensors = make(alpha=alpha, dtype=dtype)  # type: ignore[operator]
    source = write(tmp_path / "a.safetensors", tensors, {**SD1, "ss_steps": "7"})
    there = convert(source, tmp_path / "b.safetensors", to=layout)  # type: ignore[arg-type]
    back = convert(there.path, tmp_path / "c.safetensors", to="kohya")
    if alpha in (2.0, 4.0) or dtype is not torch.float32 or layout == "comfyui":
        assert there.rounded == back.rounded == ()
        assert same(back.path, source)
    else:  # a quotient that is no power of two, in the widest format: told, and right up to the last bit
        assert set(there.rounded) <= set(SHAPES)
        assert close(updates(load_file(back.path)), updates(tensors), 1e-7)
    assert {key: text for key, text in metadata_of(back.path).items() if not key.startswith("sshs_")} == {
        **SD1, "ss_steps": "7",
    }  # fmt: skip


def by_diffusers(tensors: dict[str, Tensor], path: str) -> Tensor:
    """The update of a layer as diffusers computes it: up times down, as there is no alpha."""
    down, up = tensors[f"{path}.lora_A.weight"].double(), tensors[f"{path}.lora_B.weight"].double()
    return up.flatten(1) @ down.flatten(1)


def test_diffusers_layout(tmp_path: Path) -> None:
    """Dotted paths, no alphas, and updates that are those of the source, for different alphas too."""
    tensors = lora()
    tensors[f"{CONVOLUTION}.alpha"] = torch.tensor(0.5)
    there = convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", to="diffusers").path
    found, exact = load_file(there), updates(tensors)
    paths = {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": ATTENTION,
        "unet.down_blocks.0.attentions.0.proj_in": PROJECTION,
        "unet.mid_block.resnets.0.conv1": CONVOLUTION,
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": TEXT,
    }
    assert len(found) == 2 * len(paths)
    assert close({key: by_diffusers(found, path) for path, key in paths.items()}, exact)
    back = convert(there, tmp_path / "c.safetensors", to="kohya").path
    assert same(back, tmp_path / "a.safetensors")


def test_comfyui_layout(tmp_path: Path) -> None:
    """Paths of the original code and of ComfyUI's text encoders, alphas kept."""
    tensors = lora()
    found = load_file(
        convert(write(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors", to="comfyui").path
    )
    keys = {
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": ATTENTION,
        "diffusion_model.input_blocks.1.1.proj_in": PROJECTION,
        "diffusion_model.middle_block.0.in_layers.2": CONVOLUTION,
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1": TEXT,
    }
    assert found.keys() == {
        f"{path}.{part}" for path in keys for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    for path, key in keys.items():
        assert torch.equal(found[f"{path}.lora_up.weight"], tensors[f"{key}.lora_up.weight"])
    two = {**SD1, "ss_base_model_version": "sd_v2"}
    second = convert(write(tmp_path / "2.safetensors", tensors, two), tmp_path / "2c.safetensors", to="comfyui").path
    assert "text_encoders.clip_h.transformer.text_model.encoder.layers.0.mlp.fc1.alpha" in load_file(second)
    assert same(convert(second, tmp_path / "2k.safetensors", to="kohya").path, tmp_path / "2.safetensors")


@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_sdxl(tmp_path: Path, layout: str) -> None:
    """Both text encoders and the U-Net's two spellings come back; the family stays known."""
    source = write(tmp_path / "a.safetensors", lora(XL_SHAPES), {"ss_base_model_version": "sdxl_base_v1-0"})
    there = convert(source, tmp_path / "b.safetensors", to=layout).path  # type: ignore[arg-type]
    start = {"diffusers": "unet.down_blocks.1.attentions.0.", "comfyui": "diffusion_model.input_blocks.4.1."}[layout]
    assert any(name.startswith(start) for name in load_file(there))
    assert adapter_kind(summarize(there)).model == "Stable Diffusion XL"
    assert same(convert(there, tmp_path / "c.safetensors", to="kohya").path, source)


def test_from_diffusers_and_back(tmp_path: Path) -> None:
    """A file of diffusers gets one alpha, whatever its ranks, as readers want it, and comes back bit for bit."""
    tensors = lora(rank=4, alpha=None) | lora({TEXT: SHAPES[TEXT]}, rank=2, alpha=None, seed=1)
    ends = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    paths = {ATTENTION: "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
             PROJECTION: "unet.down_blocks.0.attentions.0.proj_in", CONVOLUTION: "unet.mid_block.resnets.0.conv1",
             TEXT: "text_encoder.text_model.encoder.layers.0.mlp.fc1"}  # fmt: skip
    source = tmp_path / "a.safetensors"
    named = {f"{paths[key]}.{ends[part]}": own for name, own in tensors.items() for key, part in [name.split(".", 1)]}
    save_file(named, source)
    kohya = convert(source, tmp_path / "b.safetensors", to="kohya")
    assert kohya.rounded == ()
    found = load_file(kohya.path)
    assert {float(own) for name, own in found.items() if name.endswith("alpha")} == {4.0}
    assert close(updates(found), updates(tensors))
    assert same(convert(kohya.path, tmp_path / "c.safetensors", to="diffusers").path, source)


def test_alphas_of_peft(tmp_path: Path) -> None:
    """Alphas in the config that diffusers writes into the header are tensors afterwards, and the config is gone."""
    tensors = {name: own for name, own in lora(alpha=None).items() if name.startswith(ATTENTION)}
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    named = {f"{path}.lora_{'A' if 'lora_down' in name else 'B'}.weight": own for name, own in tensors.items()}
    config = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8})}
    source = write(tmp_path / "a.safetensors", named, config)
    kohya = convert(source, tmp_path / "b.safetensors", to="kohya").path
    assert load_file(kohya)[f"{ATTENTION}.alpha"] == 8.0
    assert "lora_adapter_metadata" not in metadata_of(kohya)
    plain = load_file(convert(source, tmp_path / "c.safetensors", to="diffusers").path)
    assert close({ATTENTION: by_diffusers(plain, path)}, updates(load_file(kohya)))


def test_notes_that_make_no_sense(tmp_path: Path) -> None:
    """A note that others have changed is passed over: the updates are those that readers of the file see."""
    source = write(tmp_path / "a.safetensors", lora())
    there = convert(source, tmp_path / "b.safetensors", to="diffusers").path
    tensors, metadata = load_file(there), metadata_of(there)
    expected = updates(lora())
    for number, note in enumerate(("", "[1]", "{}", '{"alpha": 2, "others": 3, "dtypes": ["float32", "float32"]}',
                                   '{"alpha": -2, "others": {}, "dtypes": ["float32", "float32"]}',
                                   '{"alpha": 2, "others": {}, "dtypes": ["int64", "nn"]}')):  # fmt: skip
        changed = write(tmp_path / f"{number}.safetensors", tensors, {**metadata, "lorakit_alphas": note})
        back = convert(changed, tmp_path / f"{number}-back.safetensors", to="kohya").path
        assert close(updates(load_file(back)), expected)


def test_refused(tmp_path: Path) -> None:
    """Other algorithms, and layers that the tool has no name for."""
    loha = {f"{ATTENTION}.hada_w{n}_{side}": torch.ones(2, 2) for n in "12" for side in "ab"}
    flux = lora({"lora_unet_double_blocks_0_img_attn_qkv": (4, 4)})
    dotted = {"diffusion_model.single_blocks.0.linear1.lora_A.weight": torch.ones(2, 4),
              "diffusion_model.single_blocks.0.linear1.lora_B.weight": torch.ones(4, 2)}  # fmt: skip
    for name, tensors, said in (
        ("loha", loha, "is a LoHa, not a LoRA"),
        ("flux", flux, "diffusers has no name for: lora_unet_double_blocks_0_img_attn_qkv"),
        ("dotted", dotted, "diffusers has no name for: lora_unet_single_blocks_0_linear1"),
    ):
        file = write(tmp_path / f"{name}.safetensors", tensors, {})
        with pytest.raises(AdapterError, match=f"{name}.safetensors.*{said}"):
            convert(file, tmp_path / "out.safetensors", to="diffusers")


def test_loads_in_diffusers(tmp_path: Path, tiny_sd1: Path) -> None:
    """Diffusers takes every tensor of a converted file, and computes the same as with a file of sd-scripts' layout."""
    from diffusers import StableDiffusionPipeline

    from lorakit.builtin.model_families.sd1 import SD1Config

    model = SD1Config(path=str(tiny_sd1)).build(torch.device("cpu"), torch.float32)
    shapes = {layer.key: tuple(layer.module.weight.shape) for layer in model.targets(("text_encoder", "unet"))}
    weak = {name: own * 0.05 for name, own in lora(shapes, alpha=3.0).items() if not name.endswith("alpha")}
    tensors = {name: own.half() for name, own in (lora(shapes, alpha=3.0) | weak).items()}
    kohya = write(tmp_path / "kohya.safetensors", tensors)
    files = [kohya, convert(kohya, tmp_path / "diffusers.safetensors", to="diffusers").path]
    outputs = []
    for file in files:
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd1)
        pipeline.load_lora_weights(file)
        loaded = sum(hasattr(m, "lora_A") for part in (pipeline.unet, pipeline.text_encoder) for m in part.modules())
        assert loaded == len(shapes)
        with torch.no_grad():
            text = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))
            latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
            outputs.append(pipeline.unet(latents, torch.tensor([10]), text).sample)
    assert float((outputs[0] - outputs[1]).norm()) < 1e-3 * float(outputs[0].norm())


def test_comfyui_names_are_read(tmp_path: Path) -> None:
    """A file in ComfyUI's layout is known by its keys, its kind and its alphas."""
    there = convert(write(tmp_path / "a.safetensors", lora()), tmp_path / "b.safetensors", to="comfyui").path
    file = open_lora(there)
    assert set(file.keys) == set(SHAPES)
    assert re.match("a LoRA", file.kind.description)
    assert file.alpha(TEXT, 4) == 2.0
