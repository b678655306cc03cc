"""The layouts that are not sd-scripts': names, shapes, and where alpha goes."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.builtin.networks import C3LierConfig
from lorakit.builtin.observers.diffusers import DiffusersConfig
from lorakit.builtin.savers import SafetensorsConfig
from lorakit.errors import AdapterError
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.folders import TensorSlice
from lorakit.networks.adapter_file import AdapterFile
from lorakit.networks.lora_layouts import copy_in_layout, to_diffusers, to_original

PATHS = {"lora_unet_a_b": "unet.a.b", "lora_te_c": "text_encoder.c"}


def tensors_of_two_layers() -> dict[str, torch.Tensor]:
    """A 3×3 convolution of the U-Net and a linear layer of the text encoder, both DoRA."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "lora_unet_a_b": {"lora_down.weight": (4, 3, 3, 3), "lora_up.weight": (8, 4, 1, 1), "dora_scale": (8, 1, 1, 1)},
        "lora_te_c": {"lora_down.weight": (2, 6), "lora_up.weight": (5, 2), "dora_scale": (5, 1)},
    }
    tensors = {
        f"{key}.{suffix}": torch.randn(shape, generator=generator)
        for key, own in shapes.items()
        for suffix, shape in own.items()
    }
    return {**tensors, "lora_unet_a_b.alpha": torch.tensor(1.0), "lora_te_c.alpha": torch.tensor(3.0)}


def test_layout() -> None:
    """`lora_A` is down, `lora_B` alpha/rank times up, and magnitudes have PEFT's shapes and names."""
    given = tensors_of_two_layers()
    made = to_diffusers(given, PATHS)
    expected = {
        "unet.a.b.lora_A.weight": given["lora_unet_a_b.lora_down.weight"],
        "unet.a.b.lora_B.weight": given["lora_unet_a_b.lora_up.weight"] / 4,
        "unet.a.b.lora_magnitude_vector": given["lora_unet_a_b.dora_scale"].view(1, 8, 1, 1),
        "text_encoder.c.lora_A.weight": given["lora_te_c.lora_down.weight"],
        "text_encoder.c.lora_B.weight": given["lora_te_c.lora_up.weight"] * 1.5,
        "text_encoder.c.lora_magnitude_vector.weight": given["lora_te_c.dora_scale"].view(5),
    }
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())


def test_original_layout() -> None:
    """Factors are PEFT's, behind the original path; magnitudes keep their name, and a layer without path its key."""
    given = tensors_of_two_layers()
    made = to_original(given, {"lora_unet_a_b": "diffusion_model.a.0.b_c"})
    expected = {
        "diffusion_model.a.0.b_c.lora_A.weight": given["lora_unet_a_b.lora_down.weight"],
        "diffusion_model.a.0.b_c.lora_B.weight": given["lora_unet_a_b.lora_up.weight"] / 4,
        "diffusion_model.a.0.b_c.dora_scale": given["lora_unet_a_b.dora_scale"],
        "lora_te_c.lora_down.weight": given["lora_te_c.lora_down.weight"],
        "lora_te_c.lora_up.weight": given["lora_te_c.lora_up.weight"] * 1.5,
        "lora_te_c.dora_scale": given["lora_te_c.dora_scale"],
    }
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())


def layers(*names: str, **more: Any) -> list[AdaptationTarget]:
    """Layers of a transformer."""
    return [
        AdaptationTarget(key=f"lora_unet_{name}", part="", root=nn.Module(), path=name, **more.get(name, {}))
        for name in names
    ]


def test_copies_of_layers_that_are_fused_elsewhere() -> None:
    """In diffusers' layout a fused layer is its parts, in sd-scripts' separate layers are one; updates are the same."""
    generator = torch.Generator().manual_seed(0)
    rows = {"q": (0, 6), "k": (6, 8), "v": (8, 10)}
    down, up = torch.randn(4, 5, generator=generator), torch.randn(10, 4, generator=generator)
    parts = tuple(TensorSlice(f"transformer.a.to_{name}", *at) for name, at in rows.items())
    fused = layers("qkv", qkv={"fused_from": parts})
    given = {"lora_unet_qkv.lora_down.weight": down, "lora_unet_qkv.lora_up.weight": up}
    made = copy_in_layout({**given, "lora_unet_qkv.alpha": torch.tensor(2.0)}, "diffusers", fused)
    for name, (start, stop) in rows.items():
        assert torch.equal(made[f"transformer.a.to_{name}.lora_A.weight"], down)
        assert torch.equal(made[f"transformer.a.to_{name}.lora_B.weight"], up[start:stop] / 2)
    assert len(made) == 6
    apart = layers(*rows, **{name: {"fused_in": TensorSlice("lora_unet_qkv", *at)} for name, at in rows.items()})
    ranks, separate, expected = {"q": 4, "k": 2, "v": 2}, {}, torch.zeros(10, 5)
    for name, (start, stop) in rows.items():
        shapes = ((ranks[name], 5), (stop - start, ranks[name]))
        down_part, up_part = (torch.randn(shape, generator=generator) for shape in shapes)
        ends = {"lora_down.weight": down_part, "lora_up.weight": up_part, "alpha": torch.tensor(1.0)}
        separate |= {f"lora_unet_{name}.{end}": tensor for end, tensor in ends.items()}
        expected[start:stop] = up_part @ down_part / ranks[name]
    other = {"lora_unet_out.lora_down.weight": down, "lora_unet_out.lora_up.weight": up}
    separate |= {**other, "lora_unet_out.alpha": torch.tensor(1.0)}
    made = copy_in_layout(separate, "kohya", [*apart, *layers("out")])
    assert {name.partition(".")[0] for name in made} == {"lora_unet_qkv", "lora_unet_out"}
    assert made["lora_unet_qkv.alpha"] == made["lora_unet_out.alpha"]
    for key, update in (("lora_unet_qkv", expected), ("lora_unet_out", up @ down / 4)):
        found = made[f"{key}.lora_up.weight"] @ made[f"{key}.lora_down.weight"]
        torch.testing.assert_close(found * (made[f"{key}.alpha"] / len(made[f"{key}.lora_down.weight"])), update)


def test_number_format_stays() -> None:
    """Tensors of a half-precision file stay in its number format."""
    given = {name: tensor.half() for name, tensor in tensors_of_two_layers().items()}
    assert {tensor.dtype for tensor in to_diffusers(given, PATHS).values()} == {torch.float16}


def test_what_has_no_place() -> None:
    """Other algorithms, and layers that no pipeline has, are refused by name."""
    with pytest.raises(AdapterError, match=r"lora_te_c\.hada_w1_a is no part of a LoRA"):
        to_diffusers(tensors_of_two_layers() | {"lora_te_c.hada_w1_a": torch.ones(2, 2)}, PATHS)
    with pytest.raises(AdapterError, match="lora_te_c is a layer that diffusers' pipelines"):
        to_diffusers(tensors_of_two_layers(), {**PATHS, "lora_te_c": ""})


def test_observer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Copies go with the files that they are of; a network without a place in the layout is a warning, not the end."""
    saver = SafetensorsConfig(precision="bf16")
    targets = [
        AdaptationTarget(key=key, part="", root=nn.Module(), path="", diffusers_path=path)
        for key, path in PATHS.items()
    ]
    config = SimpleNamespace(saver=saver, model=SD1Config)
    observer = DiffusersConfig().build(SimpleNamespace(targets=targets, config=config))
    for name in ("one", "two.b"):
        saver.build().save(AdapterFile(tensors_of_two_layers(), {"ss_seed": "4"}), tmp_path / f"{name}.safetensors")
        observer.adapter_saved(tmp_path / f"{name}.safetensors")
    assert {tensor.dtype for tensor in load_file(tmp_path / "one.diffusers.safetensors").values()} == {torch.bfloat16}
    (tmp_path / "one.safetensors").unlink()
    other = AdapterFile({"lora_te_c.hada_w1_a": torch.ones(2, 2)})
    saver.build().save(other, tmp_path / "three.safetensors")
    with caplog.at_level(logging.WARNING):
        observer.adapter_saved(tmp_path / "three.safetensors")
    assert "no copy of three.safetensors for diffusers: lora_te_c.hada_w1_a" in caplog.text
    observer.closed()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "three.safetensors",
        "two.b.diffusers.safetensors",
        "two.b.safetensors",
    ]


def test_paths_are_those_of_the_model(tiny_sd1: Path) -> None:
    """Each adapted layer's path leads to a layer with its weights' shape in the modules that a pipeline holds."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    from lorakit.testing.contracts.tiny_batch import read_model

    network = C3LierConfig(rank=2).build(read_model(tiny_sd1).targets(("text_encoder", "unet")))
    unet = UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet")
    text = CLIPTextModel.from_pretrained(tiny_sd1 / "text_encoder")
    assert [target.key for target in network.targets] == [adapter.key for adapter in network.adapters]
    for target, adapter in zip(network.targets, network.adapters, strict=True):
        part, _, path = target.diffusers_path.partition(".")
        module = unet if part == "unet" else getattr(text, "text_model", text)
        layer = module.get_submodule(path.removeprefix("text_model."))
        assert torch.equal(layer.weight, adapter.base.weight), adapter.key
