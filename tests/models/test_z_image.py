"""Z-Image: its transformer against diffusers', its files in all layouts, its captions, and its names in LoRA files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad

from lorakit.builtin.model_families.z_image import ZImageConfig
from lorakit.checkpoints import summarize
from lorakit.errors import ModelError
from lorakit.models.families.flow.layers import rotary_table, time_waves
from lorakit.models.families.z_image.model import ZImage, transformer_targets
from lorakit.models.families.z_image.transformer import ZImageSettings, ZImageTransformer, _grid, patches
from lorakit.plugins.catalog import Catalog
from lorakit.testing.flow_models import make_tiny_z_image

SETTINGS = {
    "in_channels": 16, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 16, "rope_theta": 256.0, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32],
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Z-Image as diffusers stores it."""
    return make_tiny_z_image(tmp_path_factory.mktemp("z_image") / "tiny")


def pair() -> tuple[ZImageTransformer2DModel, ZImageTransformer]:
    """Diffusers' transformer and lorakit's, with the same random weights, float64."""
    torch.manual_seed(0)
    theirs = ZImageTransformer2DModel(**SETTINGS).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = ZImageTransformer(ZImageSettings.of(SETTINGS)).double()
    ours.set_rotary(CPU)
    renamed = {
        name.replace("all_x_embedder.2-1", "x_embedder").replace("all_final_layer.2-1", "final_layer"): tensor
        for name, tensor in theirs.state_dict().items()
    }
    ours.load_state_dict(renamed)
    return theirs, ours


@pytest.mark.parametrize("lengths", [(5, 40), (32, 7), (64, 64)])
def test_transformer_is_diffusers_one(lengths: tuple[int, int]) -> None:
    """Outputs and gradients of inputs, for captions of several lengths and images whose tokens are filled up.

    diffusers turns queries and keys in float32, so that float64 agrees to that only.
    """
    theirs, ours = pair()
    latents = torch.randn(2, 16, 6, 10, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.3, 0.8])
    captions = [torch.randn(length, 16, dtype=torch.float64) for length in lengths]
    own_captions = [caption.clone().requires_grad_() for caption in captions]
    filled = [-(-length // 32) * 32 for length in lengths]
    padded = torch.stack([pad(own, (0, 0, 0, max(filled) - len(own))) for own in own_captions])
    mask = torch.arange(max(filled)) < torch.tensor(filled).unsqueeze(1)
    found = ours(latents, times, padded, torch.tensor(lengths), None if mask.all() else mask)

    their_latents = latents.detach().clone().requires_grad_()
    their_captions = [caption.clone().requires_grad_() for caption in captions]
    frames = theirs(list(their_latents.unsqueeze(2)), times, their_captions, return_dict=False)[0]
    expected = torch.stack([frame[:, 0] for frame in frames])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    direction = torch.randn_like(found)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(latents.grad, their_latents.grad, rtol=1e-6, atol=1e-5)
    for own, other in zip(own_captions, their_captions, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-6, atol=1e-5)


def test_known_patches_and_positions() -> None:
    """Numbers written out by hand: a latent with the value 100·c + 10·y + x, and a caption that takes 32 places."""
    y, x = torch.arange(4).view(4, 1), torch.arange(6)
    latent = torch.stack([100 * channel + 10 * y + x for channel in range(2)]).unsqueeze(0)
    tokens = patches(latent)[0]
    assert tokens[0].tolist() == [0, 100, 1, 101, 10, 110, 11, 111]
    assert tokens[5].tolist() == [24, 124, 25, 125, 34, 134, 35, 135]
    grid = _grid(torch.tensor([33]), 2, 3, 32)[0]
    assert grid[:3].tolist() == [[33, 0, 0], [33, 0, 1], [33, 0, 2]]
    assert grid[5].tolist() == [33, 1, 2]
    assert grid[6:].tolist() == [[0, 0, 0]] * 26


def test_known_frequencies_and_waves() -> None:
    """Angles of rotary positions, and the waves of a time in float32."""
    cosines, sines = rotary_table(34, 48, 256.0).unbind(-1)
    angles = torch.atan2(sines[1].double(), cosines[1].double())[:4]
    expected = torch.tensor([1.0, 0.793701, 0.629961, 0.5], dtype=torch.float64)
    torch.testing.assert_close(angles, expected, rtol=0, atol=1e-6)
    frame = torch.tensor([33.0, 23.334524, 16.5, 11.667262], dtype=torch.float64)
    torch.testing.assert_close(rotary_table(34, 32, 256.0)[33, :4, 0].double(), frame.cos(), rtol=0, atol=1e-6)
    waves = time_waves(torch.tensor([700.0]), 256)[0]
    known = torch.tensor([-0.839104, -0.461821, -0.988416])
    torch.testing.assert_close(waves[:3], known, rtol=0, atol=5e-5)
    torch.testing.assert_close(waves[128:131], torch.tensor([0.543971, -0.886973, 0.151767]), rtol=0, atol=5e-5)


def original_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's tensors as the original code and ComfyUI have them."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        own = name.replace("all_x_embedder.2-1.", "x_embedder.").replace("all_final_layer.2-1.", "final_layer.")
        own = own.replace(".norm_q.", ".q_norm.").replace(".norm_k.", ".k_norm.").replace(".to_out.0.", ".out.")
        if ".to_q." in own:
            fused = torch.cat([tensors[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")])
            own, tensor = own.replace("to_q", "qkv"), fused  # noqa: PLW2901
        found[own] = tensor.contiguous()
    return found


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The same model as ComfyUI's files for its parts, and as one file with all of them."""
    target = tmp_path_factory.mktemp("files")
    transformer = original_names(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    qwen = load_file(folder / "text_encoder" / "model.safetensors")
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    contents = {
        "transformer": transformer,
        "text_encoder": {f"model.{name}": tensor for name, tensor in qwen.items()},
        "vae": vae,
        "all": {
            **{f"model.diffusion_model.{name}": tensor for name, tensor in transformer.items()},
            **{f"text_encoders.qwen3_4b.transformer.model.{name}": tensor for name, tensor in qwen.items()},
            **{f"vae.{name}": tensor for name, tensor in vae.items()},
        },
    }
    for name, tensors in contents.items():
        save_file(tensors, target / f"{name}.safetensors")
    return {name: target / f"{name}.safetensors" for name in contents}


def configs(folder: Path, files: Mapping[str, Path]) -> dict[str, ZImageConfig]:
    """The model in each of the layouts."""
    tokenizer = str(folder / "tokenizer")
    parts = {name: str(files[name]) for name in ("text_encoder", "vae")}
    return {
        "folder": ZImageConfig(path=str(folder)),
        "files": ZImageConfig(path=str(files["transformer"]), tokenizer=tokenizer, **parts),
        "all in one": ZImageConfig(path=str(files["all"]), tokenizer=f"{tokenizer}/tokenizer.json"),
    }


def test_all_layouts_are_one_model(folder: Path, files: Mapping[str, Path]) -> None:
    """Predictions from captions, and latents, are the same bits, whichever way the model is stored."""
    generator = torch.Generator().manual_seed(0)
    noisy, times = torch.randn(2, 16, 8, 8, generator=generator), torch.tensor([0.2, 0.9])
    found = []
    for config in configs(folder, files).values():
        assert not list(config.problems())
        model = config.build(CPU, torch.float32)
        with torch.no_grad():
            conditioning = model.text_encoder.encode(model.text_encoder.tokenize(["a cat", "a longer caption " * 4]))
            prediction = model.predict(noisy, times, conditioning)
        pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        found.append((prediction, model.vae_encoder.encode(pixels)[0]))
    for prediction, latents in found[1:]:
        assert torch.equal(prediction, found[0][0])
        assert torch.equal(latents, found[0][1])


def test_is_recognised(folder: Path, files: Mapping[str, Path], tmp_path: Path) -> None:
    """By the pipeline or the class of a folder, and by names in files behind any prefix."""
    catalog = Catalog.discover()
    alone = Path(shutil.copytree(folder / "transformer", tmp_path / "alone"))
    tensors = load_file(files["transformer"])
    for prefix in ("net.", "diffusion_model."):
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / f"{prefix}safetensors")
    paths = [folder, alone, files["transformer"], files["all"], *tmp_path.glob("*.safetensors")]
    assert [catalog.detect_model_family(summarize(path)).name for path in paths] == ["z_image"] * 6


def test_what_is_missing_is_said(folder: Path, files: Mapping[str, Path], tmp_path: Path) -> None:
    """A transformer alone lacks three things, each at its own key, with what to give."""
    problems = {problem.key: problem for problem in ZImageConfig(path=str(files["transformer"])).problems()}
    assert problems.keys() == {"text_encoder", "vae", "tokenizer"}
    assert "qwen_3_4b.safetensors" in problems["text_encoder"].hint
    assert "ae.safetensors" in problems["vae"].hint
    (problem,) = ZImageConfig(path=str(folder), vae=str(files["text_encoder"])).problems()
    assert problem.key == "vae"
    assert "holds no VAE" in problem.message
    tensors = load_file(files["transformer"])
    del tensors["layers.1.attention.qkv.weight"]
    save_file(tensors, tmp_path / "half.safetensors")
    half = configs(folder, {**files, "transformer": tmp_path / "half.safetensors"})["files"]
    (problem,) = half.problems()
    assert "lacks layers.1.attention.to_q.weight" in problem.message
    with pytest.raises(ModelError, match="has no tokenizer"):
        _ = ZImageConfig(path=str(files["all"])).build(CPU, torch.float32).text_encoder


def test_captions_are_read_as_diffusers_does(folder: Path) -> None:
    """The chat template, the states before the last layer, and no padding; equal to transformers' own output."""
    from transformers import AutoTokenizer, Qwen3Model

    model = ZImageConfig(path=str(folder)).build(CPU, torch.float32)
    captions = ["a cat", ""]
    with torch.no_grad():
        conditioning = model.text_encoder.encode(model.text_encoder.tokenize(captions))
    assert isinstance(model, ZImage)
    rows = model.split(conditioning)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    qwen = Qwen3Model.from_pretrained(folder / "text_encoder").eval()
    for caption, row in zip(captions, rows, strict=True):
        text = f"<|im_start|>user\n{caption}<|im_end|>\n<|im_start|>assistant\n"
        with torch.no_grad():
            ids = tokenizer(text, return_tensors="pt").input_ids
            states = qwen(ids, output_hidden_states=True).hidden_states[-2][0]
        assert row["hidden_states"].shape == states.shape
        torch.testing.assert_close(row["hidden_states"], states, rtol=1e-4, atol=1e-5)


def test_layers_and_their_names() -> None:
    """Of the full size: 210 layers of the main blocks by default, 28 of refiners, 32 of modulation."""
    with torch.device("meta"):
        targets = list(transformer_targets(ZImageTransformer(ZImageSettings())))
    chosen = [target for target in targets if "transformer" in target.tags]
    refiners = [target for target in targets if "refiner" in target.tags and "modulation" not in target.tags]
    modulation = [target for target in targets if "modulation" in target.tags]
    assert (len(chosen), len(refiners), len(modulation)) == (210, 28, 32)
    assert sum(parameter.numel() for parameter in targets[0].root.parameters()) == 6_154_908_736
    first = next(target for target in targets if target.path == "layers.0.attention.to_q")
    assert first.original_path == "diffusion_model.layers.0.attention.to_q"
    assert first.diffusers_path == "transformer.layers.0.attention.to_q"
    assert {target.block_index for target in chosen} == set(range(30))


@pytest.mark.parametrize("form", ["scale_weight", "weight_scale", "rows"])
def test_files_in_fp8(folder: Path, files: Mapping[str, Path], tmp_path: Path, form: str) -> None:
    """Weights in fp8 are multiplied by their scales; what else such a file says of its numbers is left out."""
    tensors, expected = load_file(files["transformer"]), {}
    for name, tensor in list(tensors.items()):
        if tensor.ndim != 2 or "layers." not in name:
            continue
        scale = tensor.abs().amax(dim=1) / 448 if form == "rows" else tensor.abs().max() / 448
        stored = (tensor / scale.view(-1, 1)).to(torch.float8_e4m3fn)
        expected[name], tensors[name] = stored.float() * scale.view(-1, 1), stored
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.{'scale_weight' if form == 'scale_weight' else 'weight_scale'}"] = scale
        tensors[f"{stem}.input_scale"] = torch.tensor(1.0)
    save_file({**tensors, "scaled_fp8": torch.zeros(2)}, tmp_path / "fp8.safetensors")
    config = configs(folder, {**files, "transformer": tmp_path / "fp8.safetensors"})["files"]
    assert not list(config.problems())
    attention = config.build(CPU, torch.float32).denoiser.get_submodule("layers.1.attention")
    queries = attention.get_submodule("to_q").get_parameter("weight")
    assert torch.equal(queries, expected["layers.1.attention.qkv.weight"][:32])


def test_four_bits_are_refused(folder: Path, files: Mapping[str, Path], tmp_path: Path) -> None:
    """With what to take instead."""
    tensors = load_file(files["transformer"])
    save_file({**tensors, "layers.0.attention.qkv.weight_scale_2": torch.ones(1)}, tmp_path / "nvfp4.safetensors")
    config = configs(folder, {**files, "transformer": tmp_path / "nvfp4.safetensors"})["files"]
    (problem,) = config.problems()
    assert "take the file in bf16 or fp8" in problem.message
