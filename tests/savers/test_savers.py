from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from lorakit.api.components import SaverConfig
from lorakit.builtin.savers import CkptConfig, PtConfig, SafetensorsConfig
from lorakit.errors import AdapterError, OutputError
from lorakit.networks.adapter_file import AdapterFile, read_adapter
from lorakit.utils.atomic_io import atomic_write
from tests.memory import growth

SAVERS = [SafetensorsConfig, CkptConfig, PtConfig]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
METADATA = {"ss_network_dim": "4", "ss_output_name": "café 🐈", "modelspec.title": 'A "title"', "ss_json": '{"a": 1}'}


def adapter(rows: int = 320) -> AdapterFile:
    """An adapter of one layer; 1000 rows or more make a file longer than 1 MiB."""
    torch.manual_seed(0)
    tensors = {
        "lora_unet_x.lora_up.weight": torch.randn(rows, 4),
        "lora_unet_x.lora_down.weight": torch.randn(4, rows, 1, 1),
        "lora_unet_x.alpha": torch.tensor(1.5),
    }
    return AdapterFile(tensors, METADATA)


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("config", SAVERS)
def test_round_trip(config: type[SaverConfig], precision: str, tmp_path: Path) -> None:
    """What is saved is loaded again, rounded to the precision asked for and no further; alpha keeps no sides."""
    saver = config(precision=precision).build()
    path = tmp_path / "new folder" / f"lora{saver.suffix}"
    saver.save(adapter(), path)
    loaded = saver.load(path).tensors
    assert saver.suffix == f".{config.name}"
    assert loaded.keys() == adapter().tensors.keys()
    for key, tensor in adapter().tensors.items():
        assert loaded[key].dtype == DTYPES[precision]
        assert torch.equal(loaded[key], tensor.to(DTYPES[precision]))
        assert loaded[key].shape == tensor.shape


def test_safetensors_metadata(tmp_path: Path) -> None:
    """All metadata come back as they were, beside the two hashes; the pickled formats hold none."""
    SafetensorsConfig().build().save(adapter(), tmp_path / "a.safetensors")
    metadata = dict(read_adapter(tmp_path / "a.safetensors").metadata)
    assert metadata.pop("sshs_model_hash")
    assert metadata.pop("sshs_legacy_hash")
    assert metadata == METADATA
    PtConfig().build().save(adapter(), tmp_path / "a.pt")
    assert read_adapter(tmp_path / "a.pt").metadata == {}


@pytest.mark.parametrize("rows", [64, 33_000, 50_000])
def test_hashes_are_those_of_the_definition(rows: int, tmp_path: Path) -> None:
    """The model hash is that of all bytes after the header; the legacy hash, of the file with only ss_* metadata."""
    path = tmp_path / "a.safetensors"
    SafetensorsConfig().build().save(adapter(rows), path)
    content = path.read_bytes()
    header_size = struct.unpack("<Q", content[:8])[0]
    assert header_size % 8 == 0
    plain = safetensors.torch.save(
        dict(adapter(rows).tensors), {key: value for key, value in METADATA.items() if key.startswith("ss_")}
    )
    metadata = json.loads(content[8 : 8 + header_size])["__metadata__"]
    assert metadata["sshs_model_hash"] == sha256(content[8 + header_size :]).hexdigest()
    assert metadata["sshs_legacy_hash"] == sha256(plain[0x100000:0x110000]).hexdigest()[:8]
    assert (metadata["sshs_legacy_hash"] == "e3b0c442") == (len(plain) < 2**20)


def test_hashes_of_an_older_file_are_not_carried_over(tmp_path: Path) -> None:
    """Saving a changed adapter with the metadata of the one it came from writes the hash of the new one."""
    saver = SafetensorsConfig().build()
    saver.save(adapter(), tmp_path / "a.safetensors")
    first = saver.load(tmp_path / "a.safetensors")
    changed = {key: tensor + 1 for key, tensor in first.tensors.items()}
    saver.save(AdapterFile(changed, first.metadata), tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata()["sshs_model_hash"] != first.metadata["sshs_model_hash"]


def test_pickled_files_are_plain_dicts_of_tensors(tmp_path: Path) -> None:
    """Any tool can read the pickled formats with torch's safe loader and finds the keys at the top."""
    CkptConfig(precision="fp16").build().save(adapter(), tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert type(content) is dict
    assert set(content) == set(adapter().tensors)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the system refuse to write more than `size` bytes to a file, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("config", SAVERS)
def test_a_full_disk_leaves_the_old_file(config: type[SaverConfig], tmp_path: Path) -> None:
    """When the system refuses half-way, the error names the file, the old one is untouched and nothing else is left."""
    saver = config().build()
    path = tmp_path / f"lora{saver.suffix}"
    saver.save(adapter(8), path)
    before = path.read_bytes()
    with file_size_limit(100_000), pytest.raises(OutputError, match=rf"lora{saver.suffix} cannot be written: "):
        saver.save(adapter(100_000), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208


def test_no_folder_can_be_made(tmp_path: Path) -> None:
    """A folder that cannot be made, because a file is in its place, is one error that names the path."""
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match=r"out/lora\.safetensors cannot be written: Not a directory|File exists"):
        SafetensorsConfig().build().save(adapter(), tmp_path / "out" / "lora.safetensors")


def test_killed_while_writing(tmp_path: Path) -> None:
    """A process that dies in the middle of a save leaves the old file whole."""
    path = tmp_path / "lora.safetensors"
    SafetensorsConfig().build().save(adapter(), path)
    before = path.read_bytes()
    code = (
        "import os, sys; from pathlib import Path; from lorakit.utils.atomic_io import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, path], check=False).returncode == 9
    assert path.read_bytes() == before


def test_an_error_while_writing_leaves_no_trace(tmp_path: Path) -> None:
    """An exception of any kind inside the block, Ctrl-C included, goes through and leaves no file."""

    def interrupted() -> None:
        with atomic_write(tmp_path / "x") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


class _Payload:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("executed",))


def test_code_in_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickled file with code in it is refused, the message says why, and the code is not run."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Payload()}, tmp_path / "evil.pt")
    with pytest.raises(
        AdapterError, match=r"evil\.pt needs to run code \((posix|nt)\.mkdir\) to load, which lorakit refuses"
    ):
        read_adapter(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_broken_files(tmp_path: Path) -> None:
    """A missing, cut or foreign file is one error that names it."""
    SafetensorsConfig().build().save(adapter(), tmp_path / "whole.safetensors")
    PtConfig().build().save(adapter(), tmp_path / "whole.pt")
    for suffix in (".safetensors", ".pt"):
        content = (tmp_path / f"whole{suffix}").read_bytes()
        (tmp_path / f"cut{suffix}").write_bytes(content[: len(content) // 2])
        (tmp_path / f"empty{suffix}").write_bytes(b"")
        (tmp_path / f"text{suffix}").write_text("<html>404</html>")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": torch.ones(2)}, tmp_path / "tensor.ckpt")
    torch.save({"epoch": 3}, tmp_path / "numbers.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps({"a": 1}))
    bad = [*tmp_path.glob("cut*"), *tmp_path.glob("empty*"), *tmp_path.glob("text*"), *tmp_path.glob("*.ckpt")]
    bad += [tmp_path / "list.pt", tmp_path / "missing.safetensors", tmp_path]
    assert len(bad) == 12
    for path in bad:
        with pytest.raises(AdapterError, match=path.name):
            read_adapter(path)


def test_a_state_dict_level_is_looked_through(tmp_path: Path) -> None:
    """Files of tools that put the tensors one level down, under state_dict, are read too."""
    torch.save({"state_dict": dict(adapter().tensors)}, tmp_path / "a.ckpt")
    assert read_adapter(tmp_path / "a.ckpt").tensors.keys() == adapter().tensors.keys()


def test_reading_back_leaves_nothing_behind(tmp_path: Path) -> None:
    """A run that saves a thousand times grows by less than 10 bytes for each tensor that it reads back."""
    count, times = 200, 20
    tensors = {f"lora_unet_{index}.lora_up.weight": torch.zeros(300, 1) for index in range(count)}
    path = tmp_path / "lora.safetensors"
    SafetensorsConfig().build().save(AdapterFile(tensors, {}), path)
    assert growth(lambda: read_adapter(path), times) < 10 * count * times
