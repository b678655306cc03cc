"""LoRA files merged into a base model as it is read."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.builtin.networks import C3LierConfig, LierlaConfig
from lorakit.errors import AdapterError
from lorakit.models.families.sd.model import StableDiffusion
from lorakit.models.memory.weight_formats import FORMATS
from lorakit.models.weights.merge_lora import MergedFile, Merging
from lorakit.networks.config import LoRAConfig
from tests.models.building import CPU
from tests.models.test_stable_diffusion import INPUTS

Tensors = dict[str, Tensor]


def tensors_of(folder: Path, network: LoRAConfig, seed: int = 0) -> Tensors:
    """What a network for the model holds, far from where it starts."""
    targets = SD1Config(path=str(folder)).build(CPU, torch.float32).targets(("text_encoder", "unet"))
    built = network.build(targets)
    generator = torch.Generator().manual_seed(seed)
    for adapter in built.adapters:
        nn.init.normal_(adapter.lora_up, std=0.1, generator=generator)
        if network.dora:
            adapter.dora_scale.data *= 0.8 + 0.4 * torch.rand(adapter.dora_scale.shape, generator=generator)
    return built.adapter_state()


def merged(folder: Path, *files: Path, dtype: torch.dtype = torch.float32, multipliers: tuple = ()) -> StableDiffusion:
    """The model with files merged into it."""
    config = SD1Config(path=str(folder), base_weights=files, base_weights_multipliers=multipliers)
    assert list(config.problems()) == []
    return config.build(CPU, dtype)


def weights_of(model: StableDiffusion) -> Tensors:
    """The weight of each layer that can be adapted, by key, and all other tensors by their names."""
    layers = {target.key: target.module.weight.data for target in model.targets(("text_encoder", "unet"))}
    adapted = {id(weight) for weight in layers.values()}
    others = {
        name: parameter.data
        for module in (model.denoiser, model.text_encoder.module)
        for name, parameter in module.named_parameters()
        if id(parameter.data) not in adapted and not name.endswith("weight")
    }
    return layers | others


def with_updates(weights: Tensors, tensors: Tensors, multiplier: float) -> Tensors:
    """W + multiplier·(alpha/rank)·U·D for each layer in a file, in float64; other weights as they are."""
    result = dict(weights)
    for key in {name.split(".")[0] for name in tensors}:
        down, up = tensors[f"{key}.lora_down.weight"].double(), tensors[f"{key}.lora_up.weight"].double()
        scale = tensors[f"{key}.alpha"].item() / len(down) if f"{key}.alpha" in tensors else 1.0
        update = torch.einsum("or,r...->o...", up.flatten(1), down) * scale * multiplier
        result[key] = weights[key].double() + update.view(weights[key].shape)
    return result


@pytest.fixture(scope="module")
def files(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRA files for the model: `both` for both parts with 3×3 convolutions, `unet` as a pickle without alphas."""
    folder = tmp_path_factory.mktemp("loras")
    both = tensors_of(tiny_sd1, C3LierConfig(rank=4, alpha=2.0, conv_rank=3, conv_alpha=0.5))
    save_file(both, folder / "both.safetensors")
    unet = tensors_of(tiny_sd1, LierlaConfig(rank=8, parts=("unet",)), seed=1)
    torch.save({key: tensor for key, tensor in unet.items() if "alpha" not in key}, folder / "unet.pt")
    text = tensors_of(tiny_sd1, LierlaConfig(rank=2, parts=("text_encoder",)), seed=2)
    save_file({key: tensor.half() for key, tensor in text.items()}, folder / "text.safetensors")
    return {file.stem: file for file in folder.iterdir()}


def content(file: Path) -> Tensors:
    """The tensors of a file of either kind."""
    from lorakit.networks.adapter_file import read_adapter

    return dict(read_adapter(file).tensors)


def test_merged_before_weights_shrink(tiny_sd1: Path, files: dict[str, Path]) -> None:
    """Of a base model that is kept in fewer bits, what is kept is the merged weights, in each part's form."""
    whole, small = (merged(tiny_sd1, files["both"]) for _ in range(2))
    formats = {"unet": "nf4", "text_encoder": "int8"}
    small.quantize(formats)
    for one, other in zip(*(model.targets(tuple(formats)) for model in (whole, small)), strict=True):
        form, weight = FORMATS[formats[one.part]], one.module.weight.data
        assert torch.equal(other.module.weight, form.unpack(form.pack(weight), weight.shape, weight.dtype))


def test_equals_the_formula(tiny_sd1: Path, files: dict[str, Path]) -> None:
    """Every weight is W + Σ multiplier·(alpha/rank)·U·D in float64; an absent alpha counts as the rank; others stay."""
    order = [(files["both"], 0.5), (files["unet"], 1.0), (files["text"], -2.0)]
    model = merged(tiny_sd1, *(file for file, _ in order), multipliers=(0.5, 1.0, -2.0))
    base = weights_of(merged(tiny_sd1))
    expected = base
    for file, multiplier in order:
        expected = with_updates(expected, content(file), multiplier)
    changed = 0
    for key, weight in weights_of(model).items():
        assert torch.allclose(weight.double(), expected[key].double(), rtol=1e-5, atol=1e-7), key
        changed += not torch.equal(weight, base[key])
    assert changed == len({key.split(".")[0] for file in files.values() for key in content(file)})


def test_rounds_once(tiny_sd1: Path, files: dict[str, Path]) -> None:
    """In a bfloat16 model the sum is rounded, not its terms: the weights are those of the float32 model, rounded."""
    exact = weights_of(merged(tiny_sd1, files["both"]))
    for key, weight in weights_of(merged(tiny_sd1, files["both"], dtype=torch.bfloat16)).items():
        assert torch.equal(weight, exact[key].bfloat16()), key


def outputs(model: StableDiffusion, tokens: Tensor) -> Tensors:
    """What text encoder and U-Net put out."""
    return {"prediction": model.predict(*INPUTS), **model.text_encoder.encode(tokens)}


@pytest.mark.parametrize("dora", [False, True])
def test_does_what_the_adapters_do(tiny_sd1: Path, tmp_path: Path, dora: bool) -> None:
    """Hidden states and prediction are those of the model with the adapters beside its layers, at half strength too."""
    config = C3LierConfig(rank=4, alpha=2.0, dora=dora)
    tensors = tensors_of(tiny_sd1, config)
    save_file(tensors, tmp_path / "lora.safetensors")
    for multiplier in (1.0, 0.5):
        adapted = merged(tiny_sd1)
        network = config.build(adapted.targets(("text_encoder", "unet")))
        network.load_adapter_state(tensors)
        network.multiplier = multiplier
        model = merged(tiny_sd1, tmp_path / "lora.safetensors", multipliers=(multiplier,))
        tokens = model.text_encoder.tokenize(["a cat"])
        with torch.no_grad():
            for name in ("hidden_states", "prediction"):
                theirs, ours, plain = (outputs(m, tokens)[name] for m in (adapted, model, merged(tiny_sd1)))
                assert (ours - theirs).norm() < 1e-4 * (theirs - plain).norm()


def test_a_part_that_is_read_again(tiny_sd1: Path, files: dict[str, Path]) -> None:
    """A text encoder that was freed is merged again when it is read again."""
    model = merged(tiny_sd1, files["text"])
    first = [parameter.clone() for parameter in model.text_encoder.module.parameters()]
    model.free("text_encoder")
    again = list(model.text_encoder.module.parameters())
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_fingerprints(tiny_sd1: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """The text encoder's fingerprint follows files for it, and how strongly they are merged; the VAE's follows none."""
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files["text"].read_bytes())
    models = {
        "plain": merged(tiny_sd1),
        "unet": merged(tiny_sd1, files["unet"]),
        "text": merged(tiny_sd1, files["text"]),
        "copy": merged(tiny_sd1, copy),
        "half": merged(tiny_sd1, files["text"], multipliers=(0.5,)),
        "both": merged(tiny_sd1, files["both"]),
    }
    text = {name: model.fingerprint("text_encoder") for name, model in models.items()}
    assert text["plain"] == text["unet"]
    assert text["text"] == text["copy"]
    assert len(set(text.values())) == 4
    assert len({model.fingerprint("vae_encoder") for model in models.values()}) == 1


def test_metadata(tiny_sd1: Path, files: dict[str, Path]) -> None:
    """Files that are trained on it say what was merged, and say nothing where nothing was."""
    metadata = merged(tiny_sd1, files["both"], files["text"], multipliers=(0.5,)).metadata()
    assert json.loads(metadata["ss_base_weights"]) == [
        {"name": file.name, "multiplier": multiplier, "sha256": sha256(file.read_bytes()).hexdigest()}
        for file, multiplier in ((files["both"], 0.5), (files["text"], 1.0))
    ]
    assert "ss_base_weights" not in merged(tiny_sd1).metadata()


def test_files_that_do_not_fit(tiny_sd1: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Unknown keys, wrong shapes, half pairs, and numbers that cannot be added are an error that names file and key."""
    good = content(files["text"])
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    up, down = f"{key}.lora_up.weight", f"{key}.lora_down.weight"
    cases = {
        f"{key} has tensors of two kinds of adapters": good | {f"{key}.hada_w1_a": torch.ones(2, 2)},
        "lora_te2_x.lora_up.weight is for no layer": good | {"lora_te2_x.lora_up.weight": torch.ones(2, 2)},
        f"{key} lacks lora_down.weight": {name: tensor for name, tensor in good.items() if name != down},
        f"{up} holds NaN, infinity or complex numbers": good | {up: torch.full_like(good[up], torch.nan)},
        f"{down} holds NaN, infinity or complex numbers": good | {down: torch.full_like(good[down], torch.inf)},
        f"{key} has factors of [32, 2] and [2, 31], the layer's weights are [32, 32]": good | {down: torch.ones(2, 31)},
        f"{key} has factors of [32, 3] and [2, 32]": good | {up: torch.ones(32, 3)},
        f"{key}.dora_scale is [1, 32], the layer has 32 outputs": good | {f"{key}.dora_scale": torch.ones(1, 32)},
    }
    for number, (message, tensors) in enumerate(cases.items()):
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors, file)
        with pytest.raises(AdapterError) as caught:
            weights_of(SD1Config(path=str(tiny_sd1), base_weights=(file,)).build(CPU, torch.float32))
        assert str(file) in str(caught.value)
        assert message in str(caught.value)


def test_linear_layers_and_pointwise_convolutions(tiny_sd1: Path, tmp_path: Path) -> None:
    """Factors of a 1×1 convolution fit as matrices too."""
    tensors = tensors_of(tiny_sd1, LierlaConfig(rank=2, parts=("unet",)))
    save_file(tensors, tmp_path / "plain.safetensors")
    flat = {name: tensor.flatten(1) if tensor.ndim == 4 else tensor for name, tensor in tensors.items()}
    assert any(flat[name].ndim != tensor.ndim for name, tensor in tensors.items())
    save_file(flat, tmp_path / "flat.safetensors")
    one, other = (weights_of(merged(tiny_sd1, tmp_path / f"{name}.safetensors")) for name in ("plain", "flat"))
    assert all(torch.equal(weight, other[key]) for key, weight in one.items())


def test_outputs_without_weights(tmp_path: Path) -> None:
    """An output whose weights are all zero stays as it is when a file with magnitudes is merged, as in training."""
    layer = {"down": torch.ones(2, 3), "up": torch.zeros(4, 2), "scale": torch.tensor([[0.0], [2.0], [2.0], [2.0]])}
    names = {"down": "lora_down.weight", "up": "lora_up.weight", "scale": "dora_scale"}
    save_file({f"key.{names[name]}": tensor for name, tensor in layer.items()}, tmp_path / "dora.safetensors")
    edit = Merging([MergedFile(tmp_path / "dora.safetensors")]).edit(lambda _: "key")
    weight = torch.eye(4, 3).roll(1, 0)
    assert edit is not None
    assert torch.equal(edit("layer.weight", weight), 2 * weight)
