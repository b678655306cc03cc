"""Stable Diffusion as the engine sees it: lazy, forgetful on request, and identified by its weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.models.families.sd.model import StableDiffusion
from lorakit.models.interfaces import AdaptationTarget
from lorakit.models.weights.hashing import ProcessMemo
from lorakit.testing.models import to_single_file
from tests.models.building import CPU, stable_diffusion

SEEDED = torch.Generator().manual_seed(0)
INPUTS = (
    torch.randn(2, 4, 8, 8, generator=SEEDED),
    torch.tensor([1, 900]),
    {"hidden_states": torch.randn(2, 77, 32, generator=SEEDED)},
)


def test_prediction_is_that_of_diffusers(tiny_sd1: Path) -> None:
    """The U-Net's output is that of the model as diffusers loads it."""
    unet = UNet2DConditionModel.from_pretrained(tiny_sd1 / "unet").eval()
    latents, timesteps, conditioning = INPUTS
    expected = unet(latents, timesteps, conditioning["hidden_states"]).sample
    torch.testing.assert_close(stable_diffusion(tiny_sd1).predict(*INPUTS), expected)


def test_prediction_is_in_the_models_number_format(tiny_sd1: Path) -> None:
    """Latents and conditioning of another number format are converted, and the output is left as it is."""
    prediction = stable_diffusion(tiny_sd1, torch.bfloat16).predict(*INPUTS)
    assert prediction.dtype == torch.bfloat16
    exact = stable_diffusion(tiny_sd1).predict(*INPUTS)
    assert (prediction.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_parts_are_read_once_and_on_first_use(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """Building reads no weights, each part is read once, and a freed part is read again."""
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(tiny_sd1_file.read_bytes())
    model = stable_diffusion(copy)
    assert "copy.safetensors" not in Path("/proc/self/maps").read_text()
    first = model.text_encoder
    assert model.text_encoder is first
    assert model.vae_encoder is model.vae_encoder
    assert model.denoiser is model.denoiser
    model.free("text_encoder")
    assert model.text_encoder is not first


def test_freed_weights_are_gone(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """When all parts in use are freed, the file is not mapped any more."""
    copy = tmp_path / "freed.safetensors"
    copy.write_bytes(tiny_sd1_file.read_bytes())
    model = stable_diffusion(copy)
    assert model.text_encoder.module
    assert model.vae_encoder.module
    assert "freed.safetensors" in Path("/proc/self/maps").read_text()
    model.free("text_encoder")
    model.free("vae_encoder")
    assert "freed.safetensors" not in Path("/proc/self/maps").read_text()


def variations(tiny_sd1: Path, tmp_path: Path) -> dict[str, StableDiffusion]:
    """Models that differ in one thing each that an encoder's output depends on."""
    other_text = tmp_path / "text.safetensors"
    other_vae = tmp_path / "vae.safetensors"
    tensors = load_file(to_single_file(tiny_sd1, tmp_path / "plain.safetensors"))
    text_name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    vae_name = "first_stage_model.encoder.conv_out.bias"
    save_file({**tensors, text_name: tensors[text_name] + 1}, other_text)
    save_file({**tensors, vae_name: tensors[vae_name] + 1}, other_vae)
    return {
        "plain": stable_diffusion(tmp_path / "plain.safetensors"),
        "text weights": stable_diffusion(other_text),
        "vae weights": stable_diffusion(other_vae),
        "number format": stable_diffusion(tmp_path / "plain.safetensors", torch.bfloat16),
        "clip_skip": stable_diffusion(tmp_path / "plain.safetensors", clip_skip=2),
        "max_token_length": stable_diffusion(tmp_path / "plain.safetensors", max_token_length=150),
        "fix_text": stable_diffusion(tmp_path / "plain.safetensors", fix_text=True),
    }


def test_fingerprints_follow_what_the_output_depends_on(tiny_sd1: Path, tmp_path: Path) -> None:
    """Each encoder's fingerprint changes with its own weights and settings, and with nothing else."""
    models = variations(tiny_sd1, tmp_path)
    text = {name: model.fingerprint("text_encoder") for name, model in models.items()}
    image = {name: model.fingerprint("vae_encoder") for name, model in models.items()}
    assert text["vae weights"] == text["plain"]
    assert len(set(text.values())) == 6
    others = ("text weights", "clip_skip", "max_token_length", "fix_text")
    assert {image[name] for name in others} == {image["plain"]}
    assert len(set(image.values())) == 3


def test_fingerprint_is_that_of_the_content(tiny_sd1_file: Path, tiny_sd1_ckpt: Path, tmp_path: Path) -> None:
    """A copy under another name, and the same weights in the other file format, have the same fingerprints."""
    (tmp_path / "copy.safetensors").write_bytes(tiny_sd1_file.read_bytes())
    for part in ("vae_encoder", "text_encoder"):
        prints = {
            stable_diffusion(path).fingerprint(part)
            for path in (tiny_sd1_file, tiny_sd1_ckpt, tmp_path / "copy.safetensors")
        }
        assert len(prints) == 1


class CountingMemo(ProcessMemo):
    """A memo that notes what it had to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: list[str] = []

    def get_or_compute(self, path: Path, name: str, compute: Callable[[], str]) -> str:
        """As the memo does, noting the name when it computes."""

        def noting() -> str:
            self.computed.append(name)
            return compute()

        return super().get_or_compute(path, name, noting)


def test_fingerprints_are_remembered_until_the_file_changes(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """With a memo, weights are hashed once for all models and settings, and again when the file is another."""
    path, memo = tmp_path / "x.safetensors", CountingMemo()
    path.write_bytes(tiny_sd1_file.read_bytes())
    for clip_skip in (1, 2):
        model = stable_diffusion(path, clip_skip=clip_skip)
        assert model.fingerprint("text_encoder", memo) == model.fingerprint("text_encoder", memo)
    assert memo.computed == ["text_encoder"]
    os.utime(path, ns=(0, 0))
    model.fingerprint("text_encoder", memo)
    assert memo.computed == ["text_encoder", "text_encoder"]


def test_fingerprint_needs_only_the_parts_own_bytes(tiny_sd1_file: Path, tmp_path: Path) -> None:
    """The image encoder's fingerprint does not depend on the U-Net, the text encoder or the VAE's decoder."""
    tensors = load_file(tiny_sd1_file)
    own = ("first_stage_model.encoder.", "first_stage_model.quant_conv.")
    others = {name: tensor + 1 for name, tensor in tensors.items() if not name.startswith(own)}
    save_file({**tensors, **others}, tmp_path / "x.safetensors")
    prints = {stable_diffusion(path).fingerprint("vae_encoder") for path in (tiny_sd1_file, tmp_path / "x.safetensors")}
    assert len(prints) == 1


def test_metadata_names_and_hashes_the_model(tiny_sd1_file: Path) -> None:
    """A file is named and hashed the two ways in which web UIs look it up."""
    content = tiny_sd1_file.read_bytes()
    config = SD1Config(path=str(tiny_sd1_file), clip_skip=2, prediction="v_prediction", max_token_length=225)
    entries = config.build(CPU, torch.float32).metadata()
    assert entries == {
        "ss_base_model_version": "sd_v1_v",
        "ss_v2": "False",
        "ss_clip_skip": "2",
        "ss_max_token_length": "225",
        "ss_sd_model_name": "tiny-sd1.safetensors",
        "ss_sd_model_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(content).hexdigest(),
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "v",
        "modelspec.encoder_layer": "2",
    }


def test_metadata_of_a_folder_has_its_name(tiny_sd1: Path, tiny_sd1_file: Path) -> None:
    """A folder has a name and no hash; a VAE of its own has both."""
    entries = stable_diffusion(tiny_sd1, vae=tiny_sd1_file).metadata()
    assert (entries["ss_sd_model_name"], entries["ss_base_model_version"]) == ("tiny-sd1", "sd_v1")
    assert entries["modelspec.prediction_type"] == "epsilon"
    assert entries["ss_vae_name"] == "tiny-sd1.safetensors"
    assert entries["ss_new_vae_hash"] == hashlib.sha256(tiny_sd1_file.read_bytes()).hexdigest()
    assert "ss_sd_model_hash" not in entries


class Adapter(nn.Module):
    """A layer with a trainable detour of rank 2."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.full((2, layer.in_features), 0.01))
        self.up = nn.Parameter(torch.full((layer.out_features, 2), 0.01))
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output and the detour's."""
        self.calls += 1
        return self.layer(inputs) + inputs @ self.down.T @ self.up.T


def adapted(target: AdaptationTarget) -> Adapter:
    """An adapter in the place of the target."""
    assert isinstance(target.module, nn.Linear)
    adapter = Adapter(target.module)
    target.replace(adapter)
    return adapter


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_recomputing_changes_memory_but_not_gradients(tiny_sd1_file: Path, when: str, clip_skip: int) -> None:
    """With checkpointing, enabled before or after reading, layers run twice and the gradients stay the same."""
    gradients, calls = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = stable_diffusion(tiny_sd1_file, clip_skip=clip_skip)
        if recompute and when == "before":
            model.enable_gradient_checkpointing()
        targets = {target.key: target for target in model.targets(["text_encoder", "unet"])}
        if recompute and when == "after":
            model.enable_gradient_checkpointing()
        adapters = [
            adapted(targets["lora_te_text_model_encoder_layers_0_mlp_fc1"]),
            adapted(targets["lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"]),
        ]
        conditioning = model.text_encoder.encode(model.text_encoder.tokenize(["a cat", "a dog"]))
        model.predict(INPUTS[0], INPUTS[1], conditioning).square().mean().backward()
        gradients.append([adapter.up.grad for adapter in adapters])
        calls.append([adapter.calls for adapter in adapters])
    assert calls == [[1, 1], [2, 2]]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_gradients_reach_adapters_only(tiny_sd1_file: Path) -> None:
    """A backward pass leaves no gradient on any weight of the base model."""
    model = stable_diffusion(tiny_sd1_file)
    target = model.targets(["unet"])[3]
    adapter = adapted(target)
    model.predict(*INPUTS).mean().backward()
    with_gradient = [parameter for parameter in model.denoiser.parameters() if parameter.grad is not None]
    assert {id(parameter) for parameter in with_gradient} == {id(adapter.down), id(adapter.up)}
