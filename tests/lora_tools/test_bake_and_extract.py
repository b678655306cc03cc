"""LoRA files baked into base models, and extracted from them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.builtin.model_families.sd2 import SD2Config
from lorakit.builtin.model_families.sdxl import SDXLConfig
from lorakit.checkpoints import pickled_tensors
from lorakit.errors import AdapterError, LorakitError, ModelError, OutputError
from lorakit.lora_tools import bake, convert, extract
from lorakit.models.weights.load import open_tensors
from tests.lora_tools.files import SD1, close, dora, lora, metadata_of, updates, updates_of, write

CPU = torch.device("cpu")
PARTS = {SD1Config: ("unet", "text_encoder"), SD2Config: ("unet", "text_encoder"),
         SDXLConfig: ("unet", "text_encoder", "text_encoder_2")}  # fmt: skip


def weights(path: Path, family: type = SD1Config) -> dict[str, Tensor]:
    """The weight of each layer that can be adapted, by key, as a matrix in float64."""
    model = family(path=str(path)).build(CPU, torch.float32)
    return {layer.key: layer.module.weight.detach().double().flatten(1) for layer in model.targets(PARTS[family])}


def shapes(path: Path, family: type = SD1Config) -> dict[str, tuple[int, ...]]:
    """The shape of each of those layers."""
    model = family(path=str(path)).build(CPU, torch.float32)
    return {layer.key: tuple(layer.module.weight.shape) for layer in model.targets(PARTS[family])}


def weak(make: Callable[..., dict], layers: dict, **options: object) -> dict:
    """A LoRA or DoRA whose updates are a tenth of the weights, about."""
    tensors = make(layers, **options)
    return {name: own * 0.02 if "lora_up" in name else own for name, own in tensors.items()}


def stored(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by their names in it."""
    if path.suffix == ".safetensors":
        return load_file(path)
    read = open_tensors(path)
    return {name: read(name) for name in pickled_tensors(path)}


@pytest.mark.parametrize(
    ("family", "fixture"),
    [(SD1Config, "tiny_sd1_file"), (SD1Config, "tiny_sd1_ckpt"), (SD2Config, "tiny_sd2_file"),
     (SDXLConfig, "tiny_sdxl_file")],
)  # fmt: skip
def test_bake_and_extract(tmp_path: Path, request: pytest.FixtureRequest, family: type, fixture: str) -> None:
    """Every layer is W + weight·ΔW, all other tensors are untouched, and extraction gives the updates again."""
    base = request.getfixturevalue(fixture)
    tensors = weak(lora, shapes(base, family), rank=3, alpha=1.5)
    done = bake(base, [(write(tmp_path / "a.safetensors", tensors, {}), 0.7)], tmp_path / "baked.safetensors")
    before, after = weights(base, family), weights(done.path, family)
    update = {key: 0.7 * own for key, own in updates(tensors).items()}
    assert done.changed == len(update)
    for key, weight in before.items():
        assert float((after[key] - weight - update[key]).norm()) < 1e-6 * float(weight.norm()), key
    old, new = stored(base), load_file(done.path)
    assert {name: (own.dtype, own.shape) for name, own in old.items()} == {
        name: (own.dtype, own.shape) for name, own in new.items()
    }
    assert sum(torch.equal(own, new[name]) for name, own in old.items()) == done.copied
    lora_file = extract(base, done.path, tmp_path / "e.safetensors", rank=3, conv_rank=3, precision="fp32")
    assert close(updates_of(lora_file.path), update, 1e-4)
    assert lora_file.error < 1e-4
    assert (lora_file.unchanged, lora_file.left_out) == (0, ())


def in_shards(folder: Path) -> None:
    """Spread the weights of a U-Net's folder over two files and an index; the second has no layer of a LoRA."""
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors, places = load_file(whole), {}
    for number in (1, 2):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        chosen = {key: own for key, own in tensors.items() if key.startswith("conv_") == (number == 2)}
        save_file(chosen, folder / name, {"format": "pt"})
        places |= dict.fromkeys(chosen, name)
    whole.with_suffix(".safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    whole.unlink()


def pickled(folder: Path) -> None:
    """Write the weights of a U-Net's folder as PyTorch does."""
    whole = folder / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(whole), whole.with_suffix(".bin"))
    whole.unlink()


@pytest.mark.parametrize("store", [lambda _: None, in_shards, pickled], ids=["whole", "shards", "bin"])
def test_bake_into_a_folder(tmp_path: Path, tiny_sd1: Path, store: Callable[[Path], None]) -> None:
    """A diffusers folder becomes one that diffusers loads, without weights that would no longer be the same model."""
    base, baked = shutil.copytree(tiny_sd1, tmp_path / "base"), tmp_path / "baked"
    tensors = weak(lora, {key: own for key, own in shapes(base).items() if key.startswith("lora_unet")})
    store(base / "unet")
    before = weights(base)
    kept = {path.relative_to(base) for path in base.rglob("*") if path.is_file()}
    for stale in ("unet/diffusion_pytorch_model.fp16.safetensors", "whole.ckpt", ".git/x"):
        (base / stale).parent.mkdir(exist_ok=True)
        (base / stale).write_bytes(b"stale")
    done = bake(base, [(write(tmp_path / "a.safetensors", tensors, {}), 0.5)], baked)
    after, update = weights(baked), updates(tensors)
    for key, weight in before.items():
        expected = weight + 0.5 * update[key] if key in update else weight
        assert float((after[key] - expected).norm()) < 1e-6 * float(weight.norm()), key
    assert done.changed == len(update)
    names = {Path(str(path).replace(".bin", ".safetensors")) for path in kept}
    assert {path.relative_to(baked) for path in baked.rglob("*") if path.is_file()} == names
    for name in ("text_encoder/model.safetensors", "vae/config.json", "model_index.json"):
        assert (baked / name).read_bytes() == (base / name).read_bytes()
    loaded = UNet2DConditionModel.from_pretrained(baked / "unet").state_dict()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert torch.equal(loaded[f"{name}.weight"].double(), after[f"lora_unet_{name.replace('.', '_')}"])


def test_two_files_in_order(tmp_path: Path, tiny_sd1_file: Path) -> None:
    """A LoRA in the layout of diffusers, and after it a DoRA at half strength, by the formula."""
    layers = shapes(tiny_sd1_file)
    first, second = weak(lora, layers), weak(dora, layers, seed=1)
    one = convert(write(tmp_path / "k.safetensors", first), tmp_path / "a.safetensors", to="diffusers").path
    files = [one, (write(tmp_path / "b.safetensors", second), 0.5)]
    done = bake(tiny_sd1_file, files, tmp_path / "baked.safetensors")
    after, added, directions = weights(done.path), updates(first), updates(second)
    for key, weight in weights(tiny_sd1_file).items():
        changed = weight + added[key]
        turned = changed + directions[key]
        magnitude = second[f"{key}.dora_scale"].double().view(-1, 1)
        expected = changed + 0.5 * (turned * magnitude / turned.norm(dim=1, keepdim=True) - changed)
        assert float((after[key] - expected).norm()) < 1e-5 * float(expected.norm()), key
    assert json.loads(metadata_of(done.path)["modelspec.merged_from"]) == {"a.safetensors": 1.0, "b.safetensors": 0.5}


def test_loha_and_lokr(tmp_path: Path, tiny_sd1_file: Path) -> None:
    """Their full updates are baked in."""
    layers, draw = shapes(tiny_sd1_file), torch.Generator().manual_seed(0)
    first, second = [key for key in layers if key.endswith("attn1_to_q")][:2]
    (out, inputs), (other_out, other_inputs) = layers[first], layers[second]
    parts = {"hada_w1_a": (out, 2), "hada_w1_b": (2, inputs), "hada_w2_a": (out, 2), "hada_w2_b": (2, inputs)}
    tensors = {f"{first}.{name}": torch.randn(shape, generator=draw) * 0.1 for name, shape in parts.items()}
    tensors[f"{first}.alpha"] = torch.tensor(1.0)
    tensors |= {f"{second}.lokr_w1": torch.randn(2, 2, generator=draw) * 0.1,
                f"{second}.lokr_w2": torch.randn(other_out // 2, other_inputs // 2, generator=draw)}  # fmt: skip
    done = bake(tiny_sd1_file, [write(tmp_path / "a.safetensors", tensors)], tmp_path / "baked.safetensors")
    before, after = weights(tiny_sd1_file), weights(done.path)
    one = [tensors[f"{first}.hada_w{n}_a"].double() @ tensors[f"{first}.hada_w{n}_b"].double() for n in "12"]
    other = torch.kron(tensors[f"{second}.lokr_w1"].double(), tensors[f"{second}.lokr_w2"].double())
    assert torch.allclose(after[first] - before[first], one[0] * one[1] / 2, atol=1e-6)
    assert torch.allclose(after[second] - before[second], other, atol=1e-6)
    assert done.changed == 2


def test_half_precision_rounds_once(tmp_path: Path, tiny_sd1_file: Path) -> None:
    """In a float16 model the sum is rounded, not its terms."""
    half = {name: own.half() if own.is_floating_point() else own for name, own in load_file(tiny_sd1_file).items()}
    save_file(half, tmp_path / "half.safetensors")
    tensors = weak(lora, shapes(tiny_sd1_file))
    done = bake(tmp_path / "half.safetensors", [write(tmp_path / "a.safetensors", tensors)], tmp_path / "b.safetensors")
    key = next(key for key in shapes(tiny_sd1_file) if key.endswith("attn1_to_q"))
    exact = weights(tmp_path / "half.safetensors")[key].float() + updates(tensors)[key].float()
    found = weights(done.path)[key]
    assert float((found - exact.half().double()).abs().max()) <= 2**-10 * float(exact.abs().max())
    assert (found == exact.half().double()).double().mean() > 0.99


def test_extract_leaves_out(tmp_path: Path, tiny_sd1_file: Path) -> None:
    """Without a rank for convolutions only transformers and text encoder are adapted, and the rest is said."""
    layers = shapes(tiny_sd1_file)
    chosen = {key: layers[key] for key in layers if key.endswith(("attn1_to_q", "_conv1", "time_emb_proj"))}
    source = write(tmp_path / "a.safetensors", weak(lora, chosen))
    baked = bake(tiny_sd1_file, [source], tmp_path / "baked.safetensors").path
    done = extract(tiny_sd1_file, baked, tmp_path / "e.safetensors", rank=2)
    assert set(done.ranks) == {key for key in chosen if key.endswith("attn1_to_q")}
    assert set(done.left_out) == set(chosen) - set(done.ranks)
    assert done.unchanged == len(layers) - len(chosen)
    exact, found = updates_of(source), updates_of(done.path)
    for layer in done.errors:
        tail = float(torch.linalg.svdvals(exact[layer.key])[2:].norm())
        assert layer.error**0.5 == pytest.approx(tail, rel=1e-3)
        assert float((found[layer.key] - exact[layer.key]).norm()) == pytest.approx(tail, rel=1e-2)
    said = metadata_of(done.path)
    assert (said["ss_base_model_version"], said["ss_network_dim"], said["ss_output_name"]) == ("sd_v1", "2", "e")
    assert said["ss_training_comment"] == f"extracted from baked.safetensors, compared with {tiny_sd1_file.name}"


def test_extract_from_a_folder(tmp_path: Path, tiny_sd1: Path, tiny_sd1_file: Path) -> None:
    """A diffusers folder and a single file are compared layer by layer."""
    tensors = weak(lora, shapes(tiny_sd1_file))
    baked = bake(tiny_sd1_file, [write(tmp_path / "a.safetensors", tensors)], tmp_path / "baked.safetensors").path
    done = extract(tiny_sd1, baked, tmp_path / "e.safetensors", rank=4, conv_rank=4, precision="fp32")
    assert close(updates_of(done.path), updates(tensors), 1e-4)


def test_refused(tmp_path: Path, tiny_sd1_file: Path, tiny_sd1: Path, tiny_sd2_file: Path) -> None:
    """One message each, and no file left behind."""
    good = write(tmp_path / "good.safetensors", weak(lora, shapes(tiny_sd1_file)))
    layers = dict(list(shapes(tiny_sd1_file).items())[:2])
    strange = write(
        tmp_path / "strange.safetensors", lora({**layers, "lora_unet_down_blocks_9_attentions_0_proj_in": (4, 4)})
    )
    sizes = write(tmp_path / "sizes.safetensors", lora(dict.fromkeys(layers, (3, 5))))
    nan = lora(layers)
    nan[f"{next(iter(layers))}.lora_up.weight"][0] = torch.nan
    broken = write(tmp_path / "nan.safetensors", nan)
    new = tmp_path / "new.safetensors"
    for call, kind, said in (
        (lambda: bake(tiny_sd1_file, [strange], new), AdapterError, "does not fit.*down_blocks_9.* is no layer"),
        (lambda: bake(tiny_sd1_file, [sizes], new), AdapterError, r"weights of \[3, 5\], the layer's are"),
        (lambda: bake(tiny_sd1_file, [broken], new), AdapterError, "nan.safetensors.* holds NaN"),
        (lambda: bake(tiny_sd1_file, [], new), AdapterError, "no files"),
        (lambda: bake(tiny_sd1, [good], new), OutputError, "would be a folder, as the base model is one"),
        (lambda: bake(tiny_sd1, [good], tmp_path), OutputError, "exists already"),
        (lambda: bake(good, [good], new), ModelError, "good.safetensors is a LoRA.*; give a base model"),
        (lambda: bake(tmp_path / "gone.safetensors", [good], new), ModelError, "gone.safetensors does not exist"),
        (lambda: bake(tiny_sd1_file, [tiny_sd1_file], new), AdapterError, "is a base model, not a LoRA"),
        (lambda: extract(tiny_sd1_file, tiny_sd2_file, new), ModelError, "two models of one family"),
        (lambda: extract(tiny_sd1_file, tiny_sd1_file, new), ModelError, "differs from .* in no layer"),
        (lambda: extract(tiny_sd1_file, tiny_sd1, new, rank=0), AdapterError, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(kind, match=said):
            call()
    names = {"good.safetensors", "strange.safetensors", "sizes.safetensors", "nan.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_bake_over_nothing(tmp_path: Path, tiny_sd1_file: Path) -> None:
    """An update that float16 cannot hold is refused while it is written, and leaves nothing behind."""
    half = {name: own.half() if own.is_floating_point() else own for name, own in load_file(tiny_sd1_file).items()}
    save_file(half, tmp_path / "half.safetensors")
    strong = write(tmp_path / "a.safetensors", lora(shapes(tiny_sd1_file)), SD1)
    with pytest.raises(LorakitError, match="cannot hold; give smaller weights"):
        bake(tmp_path / "half.safetensors", [(strong, 1e6)], tmp_path / "b.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"half.safetensors", "a.safetensors"}
