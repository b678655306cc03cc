"""Summaries of checkpoints: right about sound files, plain about damaged ones, and safe with hostile ones."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorakit.checkpoints import summarize
from lorakit.errors import ModelError

TENSORS = {"a.weight": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16), "c": torch.zeros(())}
SHAPES = {"a.weight": (3, 5), "b": (7,), "c": ()}


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, honest about its length unless told otherwise."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[Any], start: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


class RunsCode:
    """Something whose pickle calls a function when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_safetensors_names_and_shapes(tmp_path: Path) -> None:
    """Names and shapes are those of the tensors that safetensors itself wrote."""
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"some": "thing"})
    summary = summarize(tmp_path / "x.safetensors")
    assert (summary.kind, summary.tensors) == ("safetensors", SHAPES)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_checkpoint_names_and_shapes(tmp_path: Path, legacy: bool, nested: bool) -> None:
    """PyTorch's archive and its format before 1.6 are understood, with and without a `state_dict`."""
    tensors = {**TENSORS, "d": torch.nn.Parameter(torch.zeros(2, 2))}
    content = {"state_dict": tensors, "epoch": 3, "other": {1, 2}} if nested else tensors
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not legacy)
    summary = summarize(tmp_path / "x.ckpt")
    assert (summary.kind, summary.tensors) == ("pickle", {**SHAPES, "d": (2, 2)})


def test_format_is_told_from_the_content(tmp_path: Path) -> None:
    """A safetensors file that is called .ckpt is read as what it is."""
    save_file(TENSORS, tmp_path / "x.ckpt")
    assert summarize(tmp_path / "x.ckpt").tensors == SHAPES


@pytest.mark.parametrize("length", [0x80, 0x280, 0x4B50, 0x10480])
def test_lengths_that_look_like_other_formats(tmp_path: Path, length: int) -> None:
    """A header may be as long as the number that an archive, or a pickle of some protocol, begins with."""
    header = json.dumps({"a": entry([2], 0, 8)}).encode().ljust(length)
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(header, bytes(8)))
    assert load_file(tmp_path / "x.safetensors")["a"].shape == (2,)
    summary = summarize(tmp_path / "x.safetensors")
    assert (summary.kind, summary.tensors) == ("safetensors", {"a": (2,)})


def bytes_read() -> int:
    """How many bytes this process has read from files so far, as Linux counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_of_a_large_file_little_is_read(tmp_path: Path) -> None:
    """Only the header of a 4 GB file is read."""
    path = tmp_path / "large.safetensors"
    header = safetensors_bytes({"w": entry([1 << 30], 0, 4 << 30)})
    path.write_bytes(header)
    os.truncate(path, len(header) + (4 << 30))
    before = bytes_read()
    assert summarize(path).tensors == {"w": (1 << 30,)}
    assert bytes_read() - before < 1 << 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\x10", "neither"),
        (safetensors_bytes(b"{}", length=1 << 62), "cut short or damaged"),
        (safetensors_bytes(b"{}", length=200), "cut short or damaged"),
        (safetensors_bytes(b"{]"), "header cannot be read"),
        (safetensors_bytes(b"{" * 100_000), "header cannot be read"),
        (safetensors_bytes({"w": entry([2], 0, 8)}, b"1234"), "4 bytes after the end"),
        (safetensors_bytes({"w": entry([2], 0, 8)}, b"123456789"), "1 bytes belong to no tensor"),
        (safetensors_bytes({"w": entry([3], 0, 8)}, b"12345678"), "cannot have 8 bytes"),
        (safetensors_bytes({"w": entry([-2], 0, 8)}, b"12345678"), "is invalid"),
        (safetensors_bytes({"w": entry([2], 0, "8")}, b"12345678"), "is invalid"),
        (safetensors_bytes({"w": entry([2], 0, 8, dtype="F31")}, b"12345678"), "is invalid"),
        (safetensors_bytes({"w": 5}), "is invalid"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"GGUF\x03\0\0\0" + bytes(16), "is a GGUF file"),
        (b"<!DOCTYPE html><html>Not found</html>", "is a web page, not the file itself"),
        (b"PK\x03\x04 this is no archive", "is not a complete PyTorch checkpoint"),
        (pickle.dumps({"no": "checkpoint"}), "is not a complete PyTorch checkpoint"),
    ],
)
def test_damaged_files_are_refused_in_words(tmp_path: Path, content: bytes, reason: str) -> None:
    """A file that is cut short, damaged or something else gives one message that names the file and the cause."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=re.escape(reason)) as caught:
        summarize(path)
    assert str(path) in str(caught.value)


@settings(max_examples=120, deadline=None)
@given(position=st.integers(0, 10_000), byte=st.integers(0, 255), cut=st.integers(0, 3))
@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_no_damage_leads_to_another_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, position: int, byte: int, cut: int
) -> None:
    """Whatever byte is changed or cut off, the answer is a summary or a `ModelError`, never another exception."""
    folder = tmp_path_factory.getbasetemp()
    sound, damaged = folder / f"sound.{kind}", folder / f"damaged.{kind}"
    if not sound.exists():
        if kind == "safetensors":
            save_file(TENSORS, sound)
        else:
            torch.save({"state_dict": TENSORS}, sound, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(sound.read_bytes())
    content[position % len(content)] = byte
    damaged.write_bytes(content[: len(content) - cut])
    with contextlib.suppress(ModelError):
        assert summarize(damaged).path == damaged


@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, form: str) -> None:
    """A file that is made by a function is refused by its name, and the function is not called."""
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    content = RunsCode(os.system, f"touch {trace}")
    if form == "bare":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ModelError, match=r"evil\.ckpt needs to run code \((posix|nt)\.system\)") as caught:
        summarize(path)
    assert "convert it to .safetensors" in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "torch.storage _load_from_bytes", "torch load", "builtins getattr", "collections Counter"]
)
def test_no_way_around_the_refusal(tmp_path: Path, name: str) -> None:
    """Functions that lead to others, also those of torch itself, are refused."""
    path = tmp_path / "evil.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", f"c{name.replace(' ', chr(10))}\n(S'1'\ntR.".encode())
    with pytest.raises(ModelError, match=re.escape(name.replace(" ", "."))):
        summarize(path)


def test_whole_models_of_other_packages_are_refused(tmp_path: Path) -> None:
    """A file that holds nothing but an object of a training framework is refused by the name of its class."""
    path = tmp_path / "lightning.ckpt"
    program = b"cpytorch_lightning.core\nLightningModule\n)\x81}b."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
    with pytest.raises(ModelError, match=r"pytorch_lightning\.core\.LightningModule"):
        summarize(path)


def test_folder_gives_the_configs_of_its_parts(tmp_path: Path) -> None:
    """Of a folder, the configs are read by part, and no weights are needed."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "P"}')
    (tmp_path / "unet" / "config.json").write_text('{"in_channels": 4}')
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "epsilon"}')
    summary = summarize(tmp_path)
    assert (summary.kind, summary.tensors) == ("folder", {})
    assert summary.configs == {
        "model_index": {"_class_name": "P"},
        "unet": {"in_channels": 4},
        "scheduler": {"prediction_type": "epsilon"},
    }


def test_missing_and_empty_places_are_named(tmp_path: Path) -> None:
    """A path that is not there and a folder without a model are refused by name."""
    with pytest.raises(ModelError, match=r"gone\.ckpt does not exist"):
        summarize(tmp_path / "gone.ckpt")
    with pytest.raises(ModelError, match="contains no model"):
        summarize(tmp_path)


def test_broken_json_is_named(tmp_path: Path) -> None:
    """A config that is not JSON is refused with the file's name."""
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match=r"model_index\.json is not valid JSON"):
        summarize(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "adapter_model.bin"])
def test_a_folder_with_a_lora_is_told(tmp_path: Path, name: str) -> None:
    """A folder of diffusers' or PEFT's with a LoRA is called that, with the key that takes its file."""
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match=rf"contains a LoRA, {name}, and no base model; network\.weights takes"):
        summarize(tmp_path)
