"""Bad input: one clear message that names file or key, exit status 2, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomlkit

Tables = dict[str, Any]
Spoil = Callable[[Tables, Path], None]


@pytest.fixture
def tables(tiny_sd1: Path, photographs: Path, tmp_path: Path) -> Tables:
    """A good config, with a copy of the photographs that a test may damage."""
    shutil.copytree(photographs, tmp_path / "photographs")
    return {
        "model": {"path": str(tiny_sd1)},
        "data": {"image_dir": "photographs", "resolution": 64},
        "training": {"max_steps": 1},
        "output": {"dir": "out"},
    }


def first_image(folder: Path) -> Path:
    """One of the copied photographs."""
    return sorted((folder / "photographs").glob("*.png"))[0]


def header_only(path: Path, tensors: dict[str, list[int]]) -> None:
    """A safetensors file with these shapes and no more than its header says."""
    entries, offset = {}, 0
    for name, shape in tensors.items():
        size = 4
        for side in shape:
            size *= side
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)


def no_model(tables: Tables, folder: Path) -> None:
    tables["model"]["path"] = "missing.safetensors"


def hub_model(tables: Tables, folder: Path) -> None:
    tables["model"]["path"] = "nobody/nothing"


def broken_model(tables: Tables, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a model at all, but long enough")
    tables["model"]["path"] = "model.safetensors"


def evil_model(tables: Tables, folder: Path) -> None:
    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {folder / 'executed'}",))

    torch.save({"state_dict": {"weight": Evil()}}, folder / "model.ckpt")
    tables["model"]["path"] = "model.ckpt"


def other_family(tables: Tables, folder: Path) -> None:
    header_only(
        folder / "xl.safetensors",
        {
            "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": [10, 8],
            "conditioner.embedders.1.model.token_embedding.weight": [10, 8],
            "model.diffusion_model.input_blocks.0.0.weight": [32, 9, 3, 3],
            "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": [64, 2048],
            "model.diffusion_model.input_blocks.4.1.proj_in.weight": [64, 64],
            "model.diffusion_model.label_emb.0.0.weight": [64, 2816],
        },
    )
    tables["model"]["path"] = "xl.safetensors"


def unknown_key(tables: Tables, folder: Path) -> None:
    tables["network"] = {"network_dim": 16}


def unknown_deep_key(tables: Tables, folder: Path) -> None:
    tables["data"] = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": "photographs", "num_repeat": 2}]}]}


def wrong_type(tables: Tables, folder: Path) -> None:
    tables["training"]["gradient_accumulation_steps"] = 1.5


def out_of_range(tables: Tables, folder: Path) -> None:
    tables["network"] = {"rank": 0}


def empty_folder(tables: Tables, folder: Path) -> None:
    (folder / "empty").mkdir()
    tables["data"]["image_dir"] = "empty"


def missing_folder(tables: Tables, folder: Path) -> None:
    tables["data"]["image_dir"] = "nowhere"


def zero_byte_image(tables: Tables, folder: Path) -> None:
    (folder / "photographs" / "zero.png").touch()


def unreadable_image(tables: Tables, folder: Path) -> None:
    (folder / "photographs" / "text.jpg").write_text("this is a text")


def latin_caption(tables: Tables, folder: Path) -> None:
    first_image(folder).with_suffix(".txt").write_bytes("Gr\xfc\xdfe".encode("latin-1"))


def output_is_a_file(tables: Tables, folder: Path) -> None:
    (folder / "file").touch()
    tables["output"]["dir"] = "file/out"


def unknown_component(tables: Tables, folder: Path) -> None:
    tables["optimizer"] = {"name": "adam8bit"}


def not_toml(tables: Tables, folder: Path) -> None:
    tables["training"] = tomlkit.string("x")


CASES: list[tuple[Spoil, list[str]]] = [
    (no_model, ["model.path", "missing.safetensors", "does not exist"]),
    (hub_model, ["model.path", "nobody/nothing", "Hub"]),
    (broken_model, ["model.path", "model.safetensors"]),
    (evil_model, ["model.ckpt", "posix.system"]),
    (other_family, ["model.path", "a Stable Diffusion XL inpainting model"]),
    (unknown_key, ["network.network_dim", "network.rank"]),
    (unknown_deep_key, ["data.datasets[0].subsets[0].num_repeat", "num_repeats"]),
    (wrong_type, ["training.gradient_accumulation_steps", "whole number", "1.5"]),
    (out_of_range, ["network.rank", "at least 1", "0"]),
    (empty_folder, ["empty", "no images"]),
    (missing_folder, ["nowhere", "image_dir"]),
    (zero_byte_image, ["zero.png", "empty"]),
    (unreadable_image, ["text.jpg"]),
    (latin_caption, [".txt", "UTF-8"]),
    (output_is_a_file, ["output.dir", "file"]),
    (unknown_component, ["optimizer.name", "adamw8bit"]),
    (not_toml, ["training", "table"]),
]


@pytest.mark.parametrize(("spoil", "words"), CASES, ids=[spoil.__name__ for spoil, _ in CASES])
@pytest.mark.parametrize("command", ["train", "check"])
def test_bad_input(tables: Tables, tmp_path: Path, spoil: Spoil, words: list[str], command: str) -> None:
    """The message has these words, the status is 2, no code of the file ran, and no file appeared."""
    spoil(tables, tmp_path)
    (tmp_path / "config.toml").write_text(tomlkit.dumps(tables))
    before = sorted(tmp_path.rglob("*"))
    result = subprocess.run(
        [sys.executable, "-m", "lorakit", command, str(tmp_path / "config.toml")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_truncated_image_is_named(tables: Tables, tmp_path: Path) -> None:
    """An image whose header is whole and whose pixels are not is named when it is decoded; no LoRA is written."""
    image = first_image(tmp_path)
    image.write_bytes(image.read_bytes()[:400])
    (tmp_path / "config.toml").write_text(tomlkit.dumps(tables))
    result = subprocess.run(
        [sys.executable, "-m", "lorakit", "train", str(tmp_path / "config.toml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert image.name in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_missing_package_is_named(tables: Tables, tmp_path: Path) -> None:
    """An optimizer whose package is not installed says which, before anything is read."""
    tables["optimizer"] = {"name": "lion"}
    (tmp_path / "config.toml").write_text(tomlkit.dumps(tables))
    # Only the distribution's record is hidden: that is what makes a package installed.
    hide = (
        "import sys, importlib.metadata as m; real = m.version\n"
        "def version(name):\n"
        "    if name == 'lion-pytorch': raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version; from lorakit.__main__ import main\n"
        f"sys.argv = ['lorakit', 'check', {str(tmp_path / 'config.toml')!r}]; main()"
    )
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "pip install lion-pytorch" in result.stderr
