"""Folders whose weights are spread over several files, or there in half precision only, here and on the Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.models.interfaces import DiffusionModel
from lorakit.models.weights.hashing import ProcessMemo

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def shard(folder: Path, part: str, suffix: str = "safetensors", variant: str = "") -> list[Path]:
    """Spread a part's weights over three files as diffusers and transformers do, and remove the one they were in."""
    stem = PARTS[part]
    tensors = load_file(folder / part / f"{stem}.safetensors")
    (folder / part / f"{stem}.safetensors").unlink()
    if suffix == "bin" and part == "text_encoder":
        stem = "pytorch_model"
    names = sorted(tensors)
    files, places = [], {}
    for index in range(3):
        own = {name: tensors[name] for name in names[index::3]}
        files.append(folder / part / f"{stem}{variant}-{index + 1:05d}-of-00003.{suffix}")
        save_file(own, files[-1]) if suffix == "safetensors" else torch.save(own, files[-1])
        places |= dict.fromkeys(own, files[-1].name)
    index_file = folder / part / f"{stem}.{suffix}.index{variant}.json"
    index_file.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return files


def only_variant(folder: Path, part: str, variant: str = "fp16") -> Path:
    """Give the file with a part's weights the name of a variant, such as one in half precision."""
    file = folder / part / f"{PARTS[part]}.safetensors"
    return file.rename(file.with_suffix(f".{variant}.safetensors"))


def build(path: Path | str) -> DiffusionModel:
    """The model of a folder."""
    return SD1Config(path=str(path)).build(torch.device("cpu"), torch.float32)


def prediction(model: DiffusionModel) -> torch.Tensor:
    """What the model makes of ones and a caption."""
    hidden = model.text_encoder.encode(model.text_encoder.tokenize(["a cat"]))
    return model.predict(torch.ones(1, 4, 8, 8), torch.tensor([5]), hidden)


@pytest.mark.parametrize(("suffix", "variant"), [("safetensors", ""), ("bin", ""), ("safetensors", ".fp16")])
def test_sharded_folders(tiny_sd1: Path, tmp_path: Path, suffix: str, variant: str) -> None:
    """A folder in shards is the same model, with the same keys in the cache, as one in whole files."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "model"))
    for part in PARTS:
        shard(folder, part, suffix, variant)
    assert list(SD1Config(path=str(folder)).problems()) == []
    sharded, whole = build(folder), build(tiny_sd1)
    assert torch.equal(prediction(sharded), prediction(whole))
    image = torch.ones(1, 3, 64, 64)
    assert torch.equal(sharded.vae_encoder.encode(image)[0], whole.vae_encoder.encode(image)[0])
    for part in ("vae_encoder", "text_encoder"):
        assert sharded.fingerprint(part) == whole.fingerprint(part)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["non_ema", "ema", "fp16", "bf16", "fp32"])
def test_folders_of_one_variant(tiny_sd1: Path, tmp_path: Path, variant: str) -> None:
    """A folder with nothing but one variant of the weights, in some parts or in all, is the same model."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "model"))
    for part in ("unet",) if variant == "non_ema" else PARTS:
        only_variant(folder, part, variant)
    assert list(SD1Config(path=str(folder)).problems()) == []
    assert torch.equal(prediction(build(folder)), prediction(build(tiny_sd1)))


def test_the_usual_variant_is_taken(tiny_sd1: Path, tmp_path: Path) -> None:
    """Beside the plain weights, and beside those in half precision, copies without EMA are left alone."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "model"))
    plain = folder / "unet" / f"{PARTS['unet']}.safetensors"
    other = plain.with_suffix(".non_ema.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(plain).items()}, other)
    expected = prediction(build(tiny_sd1))
    assert torch.equal(prediction(build(folder)), expected)
    half = only_variant(folder, "unet")
    assert torch.equal(prediction(build(folder)), expected)
    half.unlink()
    assert torch.equal(prediction(build(folder)), torch.zeros_like(expected))


def test_weights_of_unknown_names(tiny_sd1: Path, tmp_path: Path) -> None:
    """What lies there in place of the weights is named."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "model"))
    only_variant(folder, "unet", "mine")
    (folder / "unet" / "diffusion_flax_model.msgpack").touch()
    (problem,) = map(str, SD1Config(path=str(folder)).problems())
    assert (
        "unet has no weights; there should be a file diffusion_pytorch_model.safetensors, and there is only " in problem
    )
    assert problem.endswith("only diffusion_flax_model.msgpack, diffusion_pytorch_model.mine.safetensors")


def test_a_shard_that_changes_changes_the_key(tiny_sd1: Path, tmp_path: Path) -> None:
    """What is remembered of a sharded part is good until any of its files changes."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "model"))
    *_, last = shard(folder, "text_encoder")
    memo, keys = ProcessMemo(), []
    for time in (1, 2):
        save_file({name: tensor + time for name, tensor in load_file(last).items()}, last)
        os.utime(last, (time, time))
        keys.append(build(folder).fingerprint("text_encoder", memo))
    assert keys[0] != keys[1]


def test_missing_shards_are_named(tiny_sd1: Path, tmp_path: Path) -> None:
    """A shard that is not there, and a tensor that is not in its shard, are told before training."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "model"))
    _, second, third = shard(folder, "unet")
    tensors = load_file(second)
    lost = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, second)
    (problem,) = map(str, SD1Config(path=str(folder)).problems())
    assert f"{second} lacks {lost}" in problem
    third.unlink()
    (problem,) = map(str, SD1Config(path=str(folder)).problems())
    assert problem.startswith("path: ")
    assert f"lacks {third.name}, which diffusion_pytorch_model.safetensors.index.json lists" in problem


@pytest.mark.parametrize(
    "index",
    [
        {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"x": 5}}, {"weight_map": {"x": "../../secret"}},
        {"weight_map": {"x": "/etc/passwd"}}, {"weight_map": {"x": "*"}}, {"weight_map": {"x": ".."}},
    ],
)  # fmt: skip
def test_indexes_that_make_no_sense(tiny_sd1: Path, tmp_path: Path, index: dict[str, object]) -> None:
    """An index lists files of its own folder or is refused."""
    folder = Path(shutil.copytree(tiny_sd1, tmp_path / "model"))
    shard(folder, "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (problem,) = map(str, SD1Config(path=str(folder)).problems())
    assert "index.json does not say which files hold the weights" in problem


def test_hub_models_in_shards_and_halves(tiny_sd1: Path, tmp_path: Path) -> None:
    """The same of a Hub model, whose files are asked for one name after the other; its VAE is one of the Hub, too."""
    for name in ("some--model", "some--vae"):
        folder = tmp_path / f"models--{name}" / "snapshots" / ("0" * 40)
        shutil.copytree(tiny_sd1, folder) if name == "some--model" else shutil.copytree(tiny_sd1 / "vae", folder)
        (tmp_path / f"models--{name}" / "refs").mkdir()
        (tmp_path / f"models--{name}" / "refs" / "main").write_text("0" * 40)
    folder = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    shard(folder, "unet")
    only_variant(folder, "text_encoder")
    shutil.rmtree(folder / "vae")
    code = (
        "import torch; from lorakit.builtin.model_families.sd1 import SD1Config\n"
        "config = SD1Config(path='some/model', vae='some/vae'); assert not list(config.problems())\n"
        "model = config.build(torch.device('cpu'), torch.float32)\n"
        "hidden = model.text_encoder.encode(model.text_encoder.tokenize(['a cat']))\n"
        "out = model.predict(torch.ones(1, 4, 8, 8), torch.tensor([5]), hidden)\n"
        "mean = model.vae_encoder.encode(torch.ones(1, 3, 64, 64))[0]\n"
        "print(out.double().sum().item(), mean.double().sum().item(), model.metadata()['ss_vae_name'])"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    out, mean, name = found.stdout.split()
    model = build(tiny_sd1)
    assert name == "some/vae"
    assert float(out) == pytest.approx(prediction(model).double().sum().item(), rel=1e-5)
    expected = model.vae_encoder.encode(torch.ones(1, 3, 64, 64))[0].double().sum().item()
    assert float(mean) == pytest.approx(expected, rel=1e-5)
