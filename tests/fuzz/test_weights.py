"""Checkpoints, folders of models, LoRA files and cache entries: any bytes are read or refused by the file's name."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from lorakit.builtin.model_families.sd1 import SD1Config
from lorakit.checkpoints import stated_prediction, summarize
from lorakit.data.cache.store import Cache
from lorakit.errors import AdapterError, DataError, ModelError
from lorakit.models.families.sd.checkpoint import FORMATS, SDCheckpoint
from lorakit.models.families.sd.detect import recognise
from lorakit.models.families.sd.model import unet_module
from lorakit.models.families.sd.text_encoder import clip_module
from lorakit.models.families.sd.tokenizer import CaptionTokenizer
from lorakit.models.weights.load import open_tensors
from lorakit.models.weights.merge_lora import MergedFile, Merging
from lorakit.models.weights.modules import empty_module
from lorakit.networks.adapter_file import load_initial_weights, ranks_and_alphas, read_adapter
from tests.config.conftest import SD1_SHAPES
from tests.fuzz.mutations import damaged, ends_well, few, mutated
from tests.untrusted.hostile import safetensors_bytes

LORA = {
    "lora_unet_x.lora_down.weight": torch.ones(2, 4),
    "lora_unet_x.lora_up.weight": torch.ones(4, 2),
    "lora_unet_x.alpha": torch.tensor(1.0),
}


def saved(content: object, archive: bool = True) -> bytes:
    """A PyTorch file."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


def zipped(program: bytes) -> bytes:
    """A PyTorch file with another pickle in it, whose checksum is right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(LORA))) as sound, zipfile.ZipFile(file, "w") as made:
        for entry in sound.infolist():
            made.writestr(entry.filename, program if entry.filename.endswith("/data.pkl") else sound.read(entry))
    return file.getvalue()


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


SAVED = save(LORA, {"ss_network_dim": "2"})
HEADER, DATA = header_of(SAVED)
with zipfile.ZipFile(io.BytesIO(saved(LORA))) as _archive:
    PROGRAM = _archive.read("archive/data.pkl")

lora_files = (
    damaged(SAVED)
    | mutated(HEADER).map(partial(safetensors_bytes, data=DATA))
    | damaged(saved(LORA))
    | damaged(saved(LORA, archive=False))
    | damaged(PROGRAM).map(zipped)
    | st.binary(max_size=60)
)


@few(150)
@given(content=lora_files, suffix=st.sampled_from([".safetensors", ".pt", ".ckpt"]))
def test_lora_files(tmp_path: Path, content: bytes, suffix: str) -> None:
    """Any LoRA file is read, or refused by name; what is read has shapes and alphas that make sense."""
    path = tmp_path / f"lora{suffix}"
    path.write_bytes(content)

    def act() -> None:
        read_adapter(path)
        for rank, alpha in ranks_and_alphas(load_initial_weights(path)).values():
            assert rank > 0
            assert alpha == alpha  # noqa: PLR0124 - it is no NaN

    ends_well("LoRA files", act, AdapterError, str(path))


@few(60)
@given(content=lora_files)
def test_merged_files(tmp_path: Path, content: bytes) -> None:
    """The same of LoRA files that are merged into the base model."""
    path = tmp_path / "base.safetensors"
    path.write_bytes(content)

    def act() -> None:
        merging = Merging([MergedFile(path)])
        merging.check({"lora_unet_x": (4, 4)})
        edit = merging.edit(lambda name: f"lora_unet_{name}")
        assert edit is not None
        edit("x.weight", torch.zeros(4, 4))

    ends_well("LoRA files to merge", act, (AdapterError, ModelError), str(path))  # type: ignore[arg-type]


MODEL: dict[str, Any] = {}
_end = 0
for _name, _shape in SD1_SHAPES.items():
    _size = 2 * int(torch.Size(_shape).numel())
    MODEL[_name] = {"dtype": "F16", "shape": list(_shape), "data_offsets": [_end, _end + _size]}
    _end += _size
PICKLED = saved({"state_dict": {name: torch.zeros(shape, dtype=torch.float16) for name, shape in SD1_SHAPES.items()}})


def with_lengths(header: Any) -> bytes:
    """A checkpoint with this header, its tensors moved to where their shapes and types put them, if they have some."""
    end = 0
    for entry in header.values() if isinstance(header, dict) else ():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if isinstance(shape, list) and all(type(side) is int and 0 <= side < 4096 for side in shape):
            size = min(2 * torch.Size(shape).numel(), 1 << 20)
            entry["data_offsets"] = [end, end + size]
            end += size
    return safetensors_bytes(header, bytes(end))


@few(80)
@given(
    content=mutated(MODEL, st.lists(st.integers(0, 99), max_size=5) | st.none()).map(with_lengths)
    | mutated(MODEL).map(lambda header: safetensors_bytes(header, bytes(_end)))
    | damaged(safetensors_bytes(MODEL, bytes(_end)))
    | damaged(PICKLED)
)
def test_checkpoints(tmp_path: Path, content: bytes) -> None:
    """Any model file is described, checked and opened part by part, or refused by name."""
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)

    def act() -> None:
        summary = summarize(path)
        assert recognise(summary).title
        assert all(str(path) in problem.message for problem in SD1Config(path=str(path)).problems())
        read = open_tensors(path)
        for name in summary.tensors:
            assert tuple(read(name).shape) == summary.tensors[name]
        SDCheckpoint(path).check_vae()
        SDCheckpoint(path).check()

    ends_well("checkpoints", act, ModelError, str(path))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_sd1: Path) -> Path:
    """A copy of the tiny model whose JSON files may be changed."""
    return Path(shutil.copytree(tiny_sd1, tmp_path_factory.mktemp("models") / "tiny"))


FILES = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "model_index.json",
         "scheduler/scheduler_config.json")  # fmt: skip
ODD_SETTINGS = st.sampled_from([10**6, 10**9, 10**18, -1, 0, [10**9] * 4, [[1]], "x", ["x"] * 9, 1e300, None, {}])


@few(40)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_folders_of_models(model_folder: Path, data: st.DataObject, name: str) -> None:
    """Whatever the settings in a folder say, its parts become modules, or are refused by the folder's name."""
    file = model_folder / name
    sound = file.read_bytes()
    content = data.draw(mutated(json.loads(sound), ODD_SETTINGS).map(json.dumps).map(str.encode) | damaged(sound))
    file.write_bytes(content)

    def act() -> None:
        model = SDCheckpoint(model_folder)
        model.check_vae()
        model.check()
        stated_prediction(model.summary)
        for part, build in (("unet", unet_module), ("text_encoder", clip_module)):
            stored = model.part(part)  # type: ignore[arg-type]
            empty_module(stored, build)
        FORMATS["vae"].alone(model_folder)

    try:
        ends_well("folders of models", act, ModelError, str(model_folder))
    finally:
        file.write_bytes(sound)


@few(25)
@given(data=st.data(), name=st.sampled_from(["vocab.json", "merges.txt", "tokenizer.json"]))
def test_tokenizers(tiny_sd1: Path, tmp_path: Path, data: st.DataObject, name: str) -> None:
    """Any tokenizer turns captions into ids, or is refused by its folder."""
    vocabulary = {"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    (tmp_path / "tokenizer.json").unlink(missing_ok=True)
    whole = CaptionTokenizer(tmp_path).tokenizer.to_str().encode() if name == "tokenizer.json" else b""
    sound = whole or (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(
        data.draw(
            damaged(sound)
            | (mutated(json.loads(sound)).map(json.dumps).map(str.encode) if name != "merges.txt" else st.nothing())
        )
    )
    ends_well("tokenizers", lambda: CaptionTokenizer(tmp_path)(["ab (a:2) b"]), ModelError, str(tmp_path))


@few(80)
@given(content=damaged(save({"mean": torch.zeros(4, 8, 8), "std": torch.ones(4, 8, 8)})) | st.binary(max_size=30))
def test_cache_entries(tmp_path: Path, content: bytes) -> None:
    """A damaged entry counts as absent; one that looks whole is read."""
    key = "0" * 40
    (tmp_path / "00").mkdir(exist_ok=True)
    (tmp_path / "00" / f"{key}.safetensors").write_bytes(content)
    cache = Cache(tmp_path)

    def act() -> None:
        is_whole = cache.has(key)
        try:
            cache.load(key)
        except DataError:
            assert not is_whole
            raise

    ends_well("cache entries", act, DataError, key)


def test_the_folder_is_sound(model_folder: Path) -> None:
    """The folder that is damaged above is taken as it is."""
    assert SDCheckpoint(model_folder).check() is None
