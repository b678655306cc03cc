"""Files of training frameworks: what is foreign in them is neither run nor missed, and the tensors are right."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import io
import os
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorakit.checkpoints import summarize
from lorakit.errors import ModelError
from lorakit.models.weights.load import open_tensors
from lorakit.networks.adapter_file import read_adapter
from tests.untrusted.hostile import MakesFolder

NEWER = ("torch.uint", "torch.float8")
pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage")

FORMATS = pytest.mark.parametrize("is_archive", [True, False], ids=["zip", "legacy"])


class Stage(enum.Enum):
    """An enumeration, which is pickled as a call."""

    FIT = "fit"


@pytest.fixture
def framework() -> Iterator[types.ModuleType]:
    """A package that is there while a file is written and gone when the test calls `sys.modules.pop`."""
    module = types.ModuleType("made_up_lightning")

    class ModelCheckpoint:
        """A callback; the class itself is a key of Lightning's `callbacks`."""

    class AttributeDict(dict):  # type: ignore[type-arg]
        """A dict with attributes, of which Lightning's hyperparameters are."""

    class DictConfig:
        """An object with state and its own way of pickling, as OmegaConf's have."""

        def __init__(self, content: object) -> None:
            self.content = content

        def __getstate__(self) -> dict[str, object]:
            return {"content": self.content, "tensor": torch.ones(3)}

    class Scheduler:
        """Something that is pickled with a method of its own."""

        def __reduce__(self) -> object:
            return getattr, (DictConfig, "__init__")

    for kind in (ModelCheckpoint, AttributeDict, DictConfig, Scheduler):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    sys.modules[module.__name__] = module
    yield module
    sys.modules.pop(module.__name__, None)


def lightning(module: Any, tensors: dict[str, Tensor]) -> dict[str, object]:
    """All that v1-5-pruned.ckpt and VAEs trained with Lightning hold besides their tensors, and more."""
    weight = nn.Parameter(torch.randn(3, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": 840_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": collections.OrderedDict(tensors),
        "callbacks": {
            module.ModelCheckpoint: {"best_model_score": np.float64(0.25), "best_model_path": Path("/a/b.ckpt")},
            (module.ModelCheckpoint, 1): [np.arange(4), np.dtype("float16")],
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [module.Scheduler(), torch.optim.lr_scheduler.ConstantLR(optimizer)],
        "hyper_parameters": module.AttributeDict(
            config=module.DictConfig([1, {2}]), dtype=torch.float16, place=torch.device("cpu"), stage=Stage.FIT
        ),
        "arguments": argparse.Namespace(path=Path("x"), at=datetime.datetime(2022, 10, 20, tzinfo=datetime.UTC)),
        "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "sparse": torch.eye(3).to_sparse(),
        "counts": collections.defaultdict(int, a=1),
    }


def save(content: object, path: Path, is_archive: bool = True) -> Path:
    """Write a PyTorch file."""
    torch.save(content, path, _use_new_zipfile_serialization=is_archive)
    return path


def assert_as_pytorch_reads(path: Path, tensors: dict[str, Tensor]) -> None:
    """All tensors of a file are those, in type, shape and bits, and so are those of their names that were read."""
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == summarize(path).tensors
    read = open_tensors(path)
    for name, tensor in tensors.items():
        found = read(name)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        bits = [each.detach().contiguous().flatten().view(torch.uint8) for each in (found, tensor)]
        assert torch.equal(*bits), name


@FORMATS
def test_all_that_lightning_saves(tmp_path: Path, framework: types.ModuleType, is_archive: bool) -> None:
    """Unknown classes as keys and values, with state and without, take nothing away from the tensors."""
    tensors = {"model.a": torch.randn(3, 4), "model_ema.modela": torch.randn(3, 4).half(), "loss.b": torch.randn(2)}
    path = save(lightning(framework, tensors), tmp_path / "x.ckpt", is_archive)
    theirs = torch.load(path, weights_only=False)["state_dict"]
    sys.modules.pop(framework.__name__)
    assert_as_pytorch_reads(path, dict(theirs))
    assert framework.__name__ not in sys.modules


SHARED = torch.randn(6, 10)
SMALL = torch.arange(-6, 6).reshape(3, 4)
TENSORS: dict[str, Tensor] = {
    "whole": SHARED,
    "transposed": SHARED.t(),
    "slice": SHARED[2:5, 1::3],
    "last": SHARED.flatten()[-1:],
    "row repeated": torch.randn(4).expand(3, 4),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "parameter": nn.Parameter(torch.randn(2)),
    "bool": torch.tensor([True, False]),
    "byte": torch.arange(7, dtype=torch.uint8),
    **{
        str(kind): SMALL.to(kind)
        for kind in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
                     torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
                     torch.float8_e4m3fn, torch.float8_e5m2)
    },
}  # fmt: skip


@FORMATS
@pytest.mark.parametrize("name", ["x.ckpt", "x.safetensors"])
def test_every_kind_of_tensor(tmp_path: Path, is_archive: bool, name: str) -> None:
    """Numbers of all types, shared, strided, offset, repeated and none, are as PyTorch itself reads them."""
    # PyTorch writes numbers of the newer types in the old format, too, and then cannot read them.
    tensors = {key: tensor for key, tensor in TENSORS.items() if is_archive or not key.startswith(NEWER)}
    path = save({"state_dict": tensors}, tmp_path / name, is_archive)
    with path.open("rb") as file:  # by a path, PyTorch would go by the name
        assert_as_pytorch_reads(path, torch.load(file, weights_only=False)["state_dict"])
    assert_as_pytorch_reads(path, tensors)


class WithAttributes(Tensor):
    """A tensor of another class, which only its code can rebuild."""


def test_parameters_and_tensors_with_attributes(tmp_path: Path) -> None:
    """What other libraries note at a tensor is dropped; the tensor is read."""
    tensors: dict[str, Any] = {"a": nn.Parameter(torch.randn(3)), "b": torch.randn(3)}
    for tensor in tensors.values():
        tensor.note = MakesFolder(tmp_path / "executed")
    path = save(tensors, tmp_path / "x.pt")
    assert_as_pytorch_reads(path, tensors)
    assert not (tmp_path / "executed").exists()


NEEDS_CODE: dict[str, Callable[[], Any]] = {
    "torch._utils._rebuild_qtensor": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "torch._utils._rebuild_sparse_tensor": lambda: torch.eye(3).to_sparse(),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda: torch.empty(3, device="meta"),
    f"{__name__}.WithAttributes": lambda: torch.ones(3).as_subclass(WithAttributes),
}


@FORMATS
@pytest.mark.parametrize("code", NEEDS_CODE)
@pytest.mark.parametrize("level", ["state_dict", None])
def test_tensors_that_need_code(tmp_path: Path, is_archive: bool, code: str, level: str | None) -> None:
    """A tensor that only a function can rebuild is refused by both names where it is one of the model's."""
    tensors = {"a.weight": torch.ones(2), "b.weight": NEEDS_CODE[code]()}
    path = save({level: tensors} if level else tensors, tmp_path / "x.ckpt", is_archive)
    for read in (summarize, open_tensors):
        with pytest.raises(ModelError) as caught:
            read(path)
        assert f"{path} needs to run code ({code}) to load b.weight, which lorakit refuses to do" in str(caught.value)


class Calls:
    """Something whose pickle calls a function with a tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.folder), torch.ones(2))


@FORMATS
def test_a_call_with_a_tensor(tmp_path: Path, is_archive: bool) -> None:
    """What a function would make of a tensor is refused among the tensors, and ignored elsewhere; nothing is called."""
    evil = Calls(tmp_path / "executed")
    path = save({"state_dict": {"a": torch.ones(2)}, "hook": evil}, tmp_path / "x.ckpt", is_archive)
    assert_as_pytorch_reads(path, {"a": torch.ones(2)})
    path = save({"state_dict": {"a": torch.ones(2), "b": evil}}, tmp_path / "y.ckpt", is_archive)
    with pytest.raises(ModelError, match=r"needs to run code \((posix|nt)\.mkdir\) to load b,"):
        summarize(path)
    assert not (tmp_path / "executed").exists()


@FORMATS
def test_other_things_among_the_tensors(tmp_path: Path, is_archive: bool) -> None:
    """Numbers, texts and objects in the state dict are passed over, and so are keys that are no texts."""
    evil = MakesFolder(tmp_path / "executed")
    tensors = {"a": torch.randn(2), "b": torch.randn(3)}
    others = {"n": 3, "t": "x", "o": evil, 7: torch.ones(1), (1, (2, 3)): torch.ones(1), "bytes": io.BytesIO(b"x")}
    path = save({"state_dict": {**tensors, **others}, "evil": [evil, {"x": evil}]}, tmp_path / "x.ckpt", is_archive)
    assert_as_pytorch_reads(path, tensors)
    assert read_adapter(path).tensors.keys() == tensors.keys()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (lambda a: {"state_dict": a, "model_ema": a}, {"w"}),
        (lambda a: {"model": a, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "step": torch.ones(1)}, {"w"}),
        (lambda a: {"params_ema": a}, {"w"}),
        (lambda a: {"module": a, "epoch": 3}, {"w"}),
        (lambda a: {**a, "step": 3}, {"w"}),
        (lambda a: {"string_to_token": {"*": 265}, "string_to_param": {"*": a["w"]}}, {"string_to_param.*"}),
        (
            lambda a: {"string_to_param": nn.ParameterDict({"*": nn.Parameter(a["w"])}), "name": "x"},
            {"string_to_param.*"},
        ),
        (lambda a: {768: (a, dict(a)), 1280: [dict(a)], "step": 3}, {"768.0.w", "768.1.w", "1280.0.w"}),
        (lambda a: {"768": {0: a["w"]}, 2: a["w"]}, {"768.0"}),
        (lambda a: {"state_dict": {**a, 7: a["w"]}}, {"w"}),
        (lambda a: {"x": nn.Linear(1, 1), "w": a["w"]}, {"w"}),
        (lambda a: {"x": [[a]] * 99, 2**40: a}, set()),
        (lambda a: [a], set()),
        (lambda a: {"state_dict": a["w"]}, set()),
    ],
)
def test_where_tools_put_the_tensors(tmp_path: Path, content: Callable[[Any], Any], names: set[str]) -> None:
    """They are found at the top and one level down; embeddings keep both of their names."""
    path = save(content({"w": torch.ones(3), "v": 3}), tmp_path / "x.pt")
    assert summarize(path).tensors.keys() == names


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_protocol(tmp_path: Path, framework: types.ModuleType, protocol: int) -> None:
    """All that pickle can write since protocol 2 is read: frames, sets, long numbers, bytes, memos."""
    content = {
        "state_dict": {"a": torch.ones(2)}, "set": {1}, "frozen": frozenset({2}), "long": 1 << 3000, "float": 0.5,
        "bytes": bytes(300), "array": bytearray(300), "none": [None, True, False, (), (1,), (1, 2), (1, 2, 3), -1],
        "keyed": framework.AttributeDict(a=1), "many": tuple(range(9)), "text": "ä" * 300,
    }  # fmt: skip
    torch.save(content, tmp_path / "x.ckpt", pickle_protocol=protocol)
    assert_as_pytorch_reads(tmp_path / "x.ckpt", {"a": torch.ones(2)})


@pytest.mark.parametrize(
    "program",
    [
        b"(i" + b"posix\nmkdir\n" + b".",
        b"(cposix\nmkdir\nV%s\no.",
        b"cposix\nmkdir\n(V%s\ntR.",
        b"cposix\nmkdir\n(V%s\nt\x81.",
        b"cposix\nmkdir\n(V%s\nt}\x92.",
        b"\x8c\x05posix\x8c\x05mkdir\x93(V%s\ntR.",
        b"(V%s\niposix\nmkdir\n.",
        b"cposix\nmkdir\n(V%s\ntR}(cposix\nmkdir\n(V%s\ntRK\x01ub.",
        b"\x82\x01(V%s\ntR.",
    ],
)
def test_every_way_to_call(tmp_path: Path, program: bytes) -> None:
    """None of pickle's instructions that call or make something runs anything, as a value or as a key."""
    made = program.replace(b"%s", str(tmp_path / "executed").encode())[:-1]
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    with zipfile.ZipFile(buffer) as sound, zipfile.ZipFile(tmp_path / "x.ckpt", "w") as changed:
        for entry in sound.infolist():
            content = sound.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert content.endswith(b"s.")
                # As a value, and as a key, of the dict of tensors.
                content = content[:-1] + b"V\x62\n" + made + b"s" + made + b"K\x01s."
            changed.writestr(entry.filename, content)
    assert_as_pytorch_reads(tmp_path / "x.ckpt", {"a": torch.zeros(2)})
    assert not (tmp_path / "executed").exists()
    (tmp_path / "bare.ckpt").write_bytes(b"\x80\x04" + made + b".")
    with pytest.raises(ModelError, match=r"needs to run code"):
        summarize(tmp_path / "bare.ckpt")
    assert not (tmp_path / "executed").exists()
