"""LoRA files for other models than Stable Diffusion, whose layers have dotted paths: merged, resized, looked into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.errors import AdapterError
from lorakit.lora_tools import average, bake, convert, extract, info, merge, resize
from lorakit.lora_tools.info import report
from lorakit.testing.flow_models import make_tiny_z_image
from tests.lora_tools.files import close, lora, metadata_of, write

LAYERS = [f"layers.{number}.attention.to_{name}" for number in (0, 2, 10) for name in "qk"]
SHAPES: dict[str, tuple[int, ...]] = dict.fromkeys(LAYERS, (12, 10))


def dotted(rank: int = 4, seed: int = 0, prefix: str = "diffusion_model.") -> dict[str, Tensor]:
    """A LoRA for Z-Image as most tools write it."""
    tensors = lora(SHAPES, rank=rank, alpha=None, seed=seed)
    ends = {"lora_down": "lora_A", "lora_up": "lora_B"}
    return {
        f"{prefix}{path}.{ends[factor]}.weight": tensor
        for name, tensor in tensors.items()
        for path, factor in [name.removesuffix(".weight").rsplit(".", 1)]
    }


def updates(file: Path, prefix: str = "diffusion_model.") -> dict[str, Tensor]:
    """B·A of each layer, float64; the file has nothing else."""
    tensors = load_file(file)
    assert tensors.keys() == {f"{prefix}{path}.lora_{factor}.weight" for path in LAYERS for factor in "AB"}
    return {
        path: tensors[f"{prefix}{path}.lora_B.weight"].double() @ tensors[f"{prefix}{path}.lora_A.weight"].double()
        for path in LAYERS
    }


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of the same ranks."""
    return [write(tmp_path / f"{seed}.safetensors", dotted(seed=seed), {"ss_steps": str(seed)}) for seed in (0, 1)]


def test_sums_and_means(tmp_path: Path, files: list[Path]) -> None:
    """A sum or a mean is in the layout of the first file, without alphas, and can be read again."""
    one, other = map(updates, files)
    done = merge([(files[0], 0.5), (files[1], -1.0)], tmp_path / "sum.safetensors")
    assert close(updates(done.path), {path: 0.5 * one[path] - other[path] for path in LAYERS})
    assert set(done.ranks.values()) == {8}
    mean = average(files, tmp_path / "mean.safetensors")
    exact = {path: (one[path] + other[path]) / 2 for path in LAYERS}
    found = updates(mean.path)
    assert 0 < sum(float((found[path] - exact[path]).norm()) for path in LAYERS) < sum(map(torch.norm, exact.values()))
    twice = merge([done.path, done.path], tmp_path / "twice.safetensors")
    assert close(updates(twice.path), {path: one[path] - 2 * other[path] for path in LAYERS})


def test_of_several_layouts(tmp_path: Path, files: list[Path]) -> None:
    """A file of sd-scripts' layout, or with the paths of diffusers, is added to a dotted one, in the first's layout."""
    keys = {f"lora_unet_{path.replace('.', '_')}": path for path in LAYERS}
    kohya = lora(dict.fromkeys(keys, (12, 10)), alpha=2.0, seed=3)
    write(tmp_path / "kohya.safetensors", kohya, {})
    diffusers = write(tmp_path / "diffusers.safetensors", dotted(seed=4, prefix="transformer."), {})
    theirs, ours = updates(diffusers, "transformer."), updates(files[0])
    by_key = {
        path: kohya[f"{key}.lora_up.weight"].double() @ kohya[f"{key}.lora_down.weight"].double() / 2
        for key, path in keys.items()
    }
    done = merge([files[0], tmp_path / "kohya.safetensors", diffusers], tmp_path / "sum.safetensors")
    expected = {path: ours[path] + by_key[path] + theirs[path] for path in LAYERS}
    assert close(updates(done.path), expected)
    done = merge([diffusers, files[0]], tmp_path / "other.safetensors")
    assert close(updates(done.path, "transformer."), {path: ours[path] + theirs[path] for path in LAYERS})


def test_resized(tmp_path: Path, files: list[Path]) -> None:
    """A lower rank in the same layout; magnitudes of DoRA stay."""
    exact, done = updates(files[0]), resize(files[0], tmp_path / "small.safetensors", rank=2)
    found = updates(done.path)
    for path in LAYERS:
        left, values, right = torch.linalg.svd(exact[path], full_matrices=False)
        torch.testing.assert_close(found[path], (left * values)[:, :2] @ right[:2], rtol=1e-4, atol=1e-5)
    scale = {f"diffusion_model.{path}.dora_scale": torch.rand(12, 1) for path in LAYERS}
    file = write(tmp_path / "dora.safetensors", dotted() | scale, {})
    small = load_file(resize(file, tmp_path / "small-dora.safetensors", rank=2).path)
    assert all(torch.equal(small[name], own) for name, own in scale.items())


def test_other_algorithms(tmp_path: Path) -> None:
    """A LoKr behind dotted paths becomes a LoRA with the same update."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path in LAYERS:
        tensors[f"diffusion_model.{path}.lokr_w1"] = torch.randn(3, 2, generator=generator)
        tensors[f"diffusion_model.{path}.lokr_w2"] = torch.randn(4, 5, generator=generator)
    file = write(tmp_path / "lokr.safetensors", tensors, {})
    found = updates(resize(file, tmp_path / "lora.safetensors", rank=10).path)
    for path in LAYERS:
        first, second = (tensors[f"diffusion_model.{path}.lokr_w{n}"].double() for n in (1, 2))
        torch.testing.assert_close(found[path], torch.kron(first, second), rtol=1e-4, atol=1e-4)


def test_said_of_a_file(files: list[Path]) -> None:
    """The model and the strength of each block, in the order of their numbers."""
    found = info(files[0])
    assert found.kind == "a LoRA for Z-Image"
    assert found.layers == {"layers 0": 2, "layers 2": 2, "layers 10": 2}
    assert list(found.norms) == ["layers 0", "layers 2", "layers 10"]
    assert found.damage == ""
    assert any(line.split()[:2] == ["layers", "10"] for line in report(found))


def test_converted_where_names_are_enough(tmp_path: Path, files: list[Path]) -> None:
    """Keys of sd-scripts are the paths with underscores; other paths are not guessed."""
    there = convert(files[0], tmp_path / "kohya.safetensors", to="kohya").path
    tensors = load_file(there)
    assert float(tensors["lora_unet_layers_10_attention_to_q.alpha"]) == 4
    own = load_file(files[0])["diffusion_model.layers.10.attention.to_q.lora_B.weight"]
    assert torch.equal(tensors["lora_unet_layers_10_attention_to_q.lora_up.weight"], own)
    assert "ss_steps" in metadata_of(there)
    same = convert(files[0], tmp_path / "same.safetensors", to="comfyui").path
    assert close(updates(same), updates(files[0]))
    for source, to in ((files[0], "diffusers"), (there, "comfyui")):
        with pytest.raises(AdapterError, match=r"has no name for.* by the observer diffusers"):
            convert(source, tmp_path / "refused.safetensors", to=to)  # type: ignore[arg-type]


def test_files_for_different_models(tmp_path: Path, files: list[Path]) -> None:
    """Files for two models are not merged, and the models are said."""
    anima = {name.replace("layers", "blocks").replace("attention.to_q", "self_attn.q_proj"): own
             for name, own in dotted().items() if "to_q" in name}  # fmt: skip
    other = write(tmp_path / "anima.safetensors", anima, {})
    with pytest.raises(AdapterError, match=r"0\.safetensors is for Z-Image and .*anima\.safetensors for Anima"):
        merge([files[0], other], tmp_path / "sum.safetensors")


def test_extracted_and_baked(tmp_path: Path) -> None:
    """The difference of two transformers is in the layout of their family; baked into one, it gives the other."""
    name = "diffusion_pytorch_model.safetensors"
    for number, part in enumerate(("base", "tuned")):
        folder = make_tiny_z_image(tmp_path / f"{part}-folder", seed=0)
        weights = load_file(folder / "transformer" / name)
        if number:
            generator = torch.Generator().manual_seed(1)
            changed = [key for key in weights if key.startswith("layers.") and key.endswith("attention.to_q.weight")]
            for key in changed:
                left, right = (torch.randn(shape, generator=generator) for shape in ((len(weights[key]), 2), (2, 32)))
                weights[key] = weights[key] + left @ right / 10
        save_file(weights, tmp_path / f"{part}.safetensors")
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    done = extract(base, tuned, tmp_path / "lora.safetensors", rank=2, precision="fp32")
    tensors = load_file(done.path)
    assert tensors.keys() == {
        f"diffusion_model.{key.removesuffix('.weight')}.lora_{factor}.weight" for key in changed for factor in "AB"
    }
    baked = load_file(bake(base, [done.path], tmp_path / "baked.safetensors").path)
    for key, weight in load_file(tuned).items():
        torch.testing.assert_close(baked[key], weight, rtol=1e-4, atol=1e-5)
