"""`lorakit grid`: what is drawn is what training's previews and a merged base model draw."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import tomlkit
import torch
from PIL import Image
from safetensors.torch import save_file

import lorakit
from lorakit.config.load import read_config
from lorakit.grid.draw import distinct_names, saves_of
from lorakit.testing.flow_models import anima_files, make_tiny_anima

PROMPTS = ["a beach --w 64 --h 64 --s 2 --d 3", "snow --w 64 --h 96 --s 2 --d 4"]


@pytest.fixture(scope="module")
def trained(lorakit_offline: None, tiny_sd1: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config and the saves of a short run that changes pictures much, text encoder and all."""
    folder = tmp_path_factory.mktemp("trained")
    tables: dict[str, Any] = {
        "model": {"path": str(tiny_sd1)},
        "data": {"image_dir": str(photographs), "resolution": 64},
        "network": {"rank": 4, "alpha": 4.0},
        "optimizer": {"lr": 1e-2},
        "training": {"max_steps": 8, "device": "cpu"},
        "output": {"dir": "out", "name": "lora", "save_every_n_steps": 4},
        "saver": {"precision": "fp32"},
        "observers": [{"name": "samples", "prompts": PROMPTS}],
    }
    (folder / "config.toml").write_text(tomlkit.dumps(tables))
    lorakit.train(folder / "config.toml")
    return folder


def grid(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [sys.executable, "-m", "lorakit", "grid", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    """The pixels of a picture."""
    return np.asarray(Image.open(path)).astype(int)


def test_saves_and_strengths(trained: Path) -> None:
    """At strength 1 the last save draws what the run's own last previews show; at 0 all files draw the same."""
    result = grid(trained, "config.toml", "--strengths", "0,1")
    assert result.returncode == 0, result.stderr
    folder = trained / "out" / "lora-grid"
    assert result.stdout.splitlines()[0] == "8 pictures: 2 prompts, 4 columns"
    names = [f"{stem}_{strength}_{prompt:02d}.png" for stem in ("lora-step00000004", "lora") for strength in (0, 1)
             for prompt in (0, 1)]  # fmt: skip
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "grid.png", "grid.html"])
    previews = sorted((trained / "out" / "sample").glob("lora_0*.png"))
    for prompt, preview in enumerate(previews):
        assert np.abs(pixels(folder / f"lora_1_{prompt:02d}.png") - pixels(preview)).max() <= 1
        base, half = (pixels(folder / f"{stem}_0_{prompt:02d}.png") for stem in ("lora", "lora-step00000004"))
        assert np.array_equal(base, half)
        assert np.abs(base - pixels(preview)).mean() > 1
    parameters = Image.open(folder / "lora_1_00.png").info["parameters"]
    assert parameters.startswith("a beach <lora:lora:1>\nSteps: 2, ")
    assert Image.open(folder / "grid.png").size[0] == 180 + 4 * 168 + 8
    page = (folder / "grid.html").read_text()
    assert sorted(re.findall(r'src="([^"]+)"', page)) == sorted(names)


def test_without_a_config(trained: Path, tmp_path: Path, tiny_sd1: Path) -> None:
    """A model, a file and a prompt are enough; a strength between is what a merged base model draws."""
    file = trained / "out" / "lora.safetensors"
    command = ["--model", tiny_sd1, "--lora", file, "--prompt", PROMPTS[0], "--strengths", "0.5"]
    result = grid(tmp_path, *command)
    assert result.returncode == 0, result.stderr
    tables = tomlkit.parse((trained / "config.toml").read_text()).unwrap()
    tables["model"] |= {"base_weights": [str(file)], "base_weights_multipliers": [0.5]}
    tables["output"] = {"dir": str(tmp_path / "merged")}
    tables["training"]["max_steps"] = 1
    tables["observers"][0] |= {"prompts": PROMPTS[:1], "at_first": True}
    lorakit.train(tables)
    (first, _) = sorted((tmp_path / "merged" / "sample").glob("lora_0*.png"))
    assert np.abs(pixels(tmp_path / "grid" / "lora_0.5_00.png") - pixels(first)).max() <= 1


def test_files_of_one_name(trained: Path, tmp_path: Path, tiny_sd1: Path) -> None:
    """Two files that are called the same have a column each, named after their folders; one given twice has one."""
    files = []
    for folder, stem in (("one", "lora-step00000004"), ("two", "lora")):
        files.append(tmp_path / folder / "cat.safetensors")
        files[-1].parent.mkdir()
        shutil.copyfile(trained / "out" / f"{stem}.safetensors", files[-1])
    chosen = [word for file in (*files, files[0]) for word in ("--lora", file)]
    result = grid(tmp_path, "--model", tiny_sd1, *chosen, "--prompt", PROMPTS[0], "--strengths", "1,1.0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[1:3] == ["one/cat, strength 1", "two/cat, strength 1"]
    one, two = (pixels(tmp_path / "grid" / f"{name}_cat_1_00.png") for name in ("one", "two"))
    assert np.abs(one - two).mean() > 1
    assert Image.open(tmp_path / "grid" / "grid.png").size[0] == 180 + 2 * 168 + 8
    assert 'alt="two/cat, strength 1"' in (tmp_path / "grid" / "grid.html").read_text()


def test_pictures_of_any_name_are_found_by_the_page(trained: Path, tmp_path: Path, tiny_sd1: Path) -> None:
    """What means something in addresses is written so that it means itself."""
    shutil.copy(trained / "out" / "lora.safetensors", tmp_path / "cat #1 50%25?.safetensors")
    prompt = "a --w 64 --h 64 --s 1"
    arguments = ("--model", tiny_sd1, "--lora", "cat #1 50%25?.safetensors", "--prompt", prompt, "-o", "grid")
    assert grid(tmp_path, *arguments).returncode == 0
    (address,) = re.findall(r'src="([^"]+png)"', (tmp_path / "grid" / "grid.html").read_text())
    assert unquote(urlsplit(address).path) == "cat #1 50%25?_1_00.png"
    assert (tmp_path / "grid" / unquote(address)).is_file()


def test_a_model_that_needs_a_config(trained: Path, tmp_path: Path) -> None:
    """Files that lack parts are refused with the keys that name these, and with where to write them."""
    files = anima_files(make_tiny_anima(tmp_path / "anima"), tmp_path / "files")
    result = grid(trained, "--model", files["path"], "--lora", "out/lora.safetensors", "--prompt", "a", "-o", "g")
    assert result.returncode == 2
    assert "model.vae: is missing" in result.stderr
    assert "write a config with these keys, and give it instead" in result.stderr


def test_distinct_names() -> None:
    """As short as can be."""
    cases = [
        (["a/x.pt", "a/y.pt"], ["x", "y"]),
        (["a/x.pt", "b/x.pt"], ["a/x", "b/x"]),
        (["a/x.pt", "a/x.safetensors"], ["x.pt", "x.safetensors"]),
        (["1/a/x.pt", "2/a/x.pt"], ["1/a/x", "2/a/x"]),
    ]
    for files, names in cases:
        assert distinct_names([*map(Path, files)]) == names


def test_saves_in_the_order_of_their_steps(trained: Path) -> None:
    """Other files of the folder are none of them."""
    config = read_config(trained / "config.toml")
    (trained / "out" / "lora-other.safetensors").write_bytes(b"")
    assert [path.stem for path in saves_of(config)] == ["lora-step00000004", "lora"]


def test_saves_of_a_run_with_any_name(trained: Path, tmp_path: Path) -> None:
    """Brackets and the like in the name of a run are no pattern."""
    name = "cat [v1] 100%"
    config = read_config(trained / "config.toml", [f"output.name={name}", f"output.dir={tmp_path}"])
    for end in ("-000001", "-best", ""):
        shutil.copy(trained / "out" / "lora.safetensors", tmp_path / f"{name}{end}.safetensors")
    assert [path.stem for path in saves_of(config)] == [f"{name}-000001", f"{name}-best", name]


def test_all_files_are_looked_at_before_any_is_drawn(trained: Path, tmp_path: Path) -> None:
    """A file that is no LoRA for the model is named at once, not behind the pictures of those before it."""
    save_file(
        {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 64)}, tmp_path / "flux.safetensors"
    )
    for wrong in (tmp_path / "flux.safetensors", trained / "config.toml"):
        result = grid(
            trained, "config.toml", "--lora", "out/lora.safetensors", "--lora", wrong, "-o", tmp_path / "drawn"
        )
        assert result.returncode == 2, result.stderr
        assert wrong.name in result.stderr
        assert not (tmp_path / "drawn").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a config, or --model"),
        (["config.toml", "--lora", "nothing.safetensors"], "there is no file nothing.safetensors"),
        (["config.toml", "--strengths", "much"], "must be numbers such as 0.6,0.8,1"),
        (["config.toml", "-o", "config.toml"], "config.toml is a file, not a folder; choose another folder with -o"),
        (["config.toml", "--strengths", "1,nan"], "must be numbers such as 0.6,0.8,1, not '1,nan'"),
        (["config.toml", "--strengths", "1,inf"], "must be numbers"),
        (["config.toml", "--prompt", " "], "--prompt must not be empty"),
        (["config.toml", "--set", "output.name=new"], "has no saves yet"),
        (["config.toml", "--set", "observers=[]"], "give --prompt or --prompts"),
        (["config.toml", "--lora", "config.toml"], "config.toml"),
    ],
)
def test_wrong_use(trained: Path, arguments: list[str], message: str) -> None:
    """Each mistake is one clear message, and nothing is drawn."""
    result = grid(trained, *arguments)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
