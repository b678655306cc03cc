"""What is said of the device: its name, why it is not a GPU, and what does not suit it.

What PyTorch says of GPUs is put into its mouth here, as no machine has all of them.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.config.train_config import TrainingSection
from lorakit.errors import ConfigError, OutOfMemory
from lorakit.training.runtime import device as devices
from lorakit.training.runtime import hardware
from lorakit.training.runtime.device import (
    check_device,
    device_summary,
    device_warnings,
    find_device,
    rank_summary,
)
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.runtime.hardware import TorchBuild, torch_build
from lorakit.training.runtime.precision import Precision, precision_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CARDS = {
    "NVIDIA GeForce RTX 4090": ((8, 9), 25_393_692_672),
    "NVIDIA GeForce GTX 1080 Ti": ((6, 1), 11_714_691_072),
    "NVIDIA GeForce RTX 5090": ((12, 0), 33_660_272_640),
    "Tesla T4": ((7, 5), 15_642_329_088),
    "NVIDIA A100": ((8, 0), 16 * 2**30),
}

HasCards = Callable[..., None]


@pytest.fixture
def has_cards(monkeypatch: pytest.MonkeyPatch) -> HasCards:
    """A function that lets PyTorch say that the machine has some cards of a name, and kernels for some of them."""

    def has(name: str, count: int = 1, kernels: tuple[str, ...] = ("sm_75", "sm_80", "sm_90"), **others: Any) -> None:
        capability, memory = CARDS.get(name, ((0, 0), 16 * 2**30))
        properties = SimpleNamespace(total_memory=memory, **others)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(kernels))

    return has


@pytest.fixture
def has_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A function that makes it a machine with NVIDIA's tool and a PyTorch of some build, which finds no GPU."""

    def has(build: str, told: str = "", tool: str = "nvidia-smi") -> None:
        shutil.copy("/bin/sh", tmp_path / tool)
        monkeypatch.setenv("PATH", str(tmp_path))
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        found = TorchBuild("2.13.0+cpu", build)
        monkeypatch.setattr(hardware, "torch_build", lambda: found)
        monkeypatch.setattr(devices, "torch_build", lambda: found)
        monkeypatch.setattr(torch.version, "cuda", "13.0" if build == "CUDA" else None)

        def refused() -> None:
            raise RuntimeError(told)

        monkeypatch.setattr(torch.cuda, "init", refused)

    return has


def warned(device: torch.device = CPU, /, **training: Any) -> list[str]:
    """What a run on a device is warned of, before torch is imported and after."""
    section = TrainingSection(**training)
    return [str(own) for own in (*hardware.hardware_warnings(section), *device_warnings(section, device))]


def test_the_build_is_read_from_files() -> None:
    """What torch was built for is known without importing it."""
    build = torch_build()
    assert build is not None
    assert build.version == torch.__version__
    assert (build.gpus == "CUDA") == (torch.version.cuda is not None)


@pytest.mark.parametrize(
    ("card", "precision", "world_size", "count", "summary"),
    [
        ("NVIDIA GeForce RTX 4090", "bf16", 1, 1, "NVIDIA GeForce RTX 4090, 24 GB, bf16"),
        ("Tesla T4", "float32", 1, 1, "Tesla T4, 15 GB, float32"),
        ("NVIDIA GeForce RTX 4090", "fp16", 4, 4, "4 processes, each on: NVIDIA GeForce RTX 4090, 24 GB, fp16"),
        (
            "NVIDIA GeForce RTX 4090", "bf16", 1, 4,
            "NVIDIA GeForce RTX 4090, 24 GB, bf16. 1 of 4 GPUs is used; "
            "`accelerate launch --num_processes 4 -m lorakit train …` for all",
        ),
    ],
)  # fmt: skip
def test_summary_of_gpus(
    card: str, precision: str, world_size: int, count: int, summary: str, has_cards: HasCards
) -> None:
    """Name, memory and number format; and how to use the GPUs that are not used."""
    has_cards(card, count)
    assert device_summary(CUDA, precision, world_size) == summary


def test_summary_of_a_rank(has_cards: HasCards, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several processes has a device of a machine, and a share."""
    monkeypatch.setattr("platform.node", lambda: "node3")
    has_cards("Tesla T4", 2)
    assert rank_summary(torch.device("cuda", 1), 2) == "cuda:1 (Tesla T4) of node3, 1/2 of each batch"
    assert rank_summary(CPU, 4) == "CPU of node3, 1/4 of each batch"


def test_summary_of_the_cpu(has_cards: HasCards, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU comes with the reason why it is no GPU, unless there is one that was not wanted."""
    monkeypatch.setattr(devices, "torch_build", lambda: TorchBuild("2.13.0+cpu"))
    build = f"PyTorch {torch.__version__} cannot use a GPU; if you have one: https://pytorch.org/get-started/locally/"
    assert device_summary(CPU, "float32", 1) == f"CPU, float32. {build}"
    monkeypatch.setattr(devices, "torch_build", lambda: TorchBuild("2.13.0+cu130", "CUDA"))
    assert device_summary(CPU, "bf16", 2).startswith("CPU, 2 processes, bf16. PyTorch ")
    assert device_summary(CPU, "bf16", 2).endswith(" finds no GPU that it can use")
    has_cards("Tesla T4")
    assert device_summary(CPU, "float32", 1) == "CPU, float32"


@pytest.mark.parametrize(
    ("build", "told", "expected"),
    [
        ("", "", ["an NVIDIA GPU, but PyTorch 2.13.0+cpu was built for CPUs alone", "a build for CUDA: https"]),
        ("ROCm", "", ["was built for ROCm, so this run is on the CPU"]),
        (
            "CUDA",
            "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver by …",
            ["the NVIDIA driver is for CUDA 12.4, PyTorch", "for CUDA 13.0", "update the driver", "CUDA 12.4: https"],
        ),
        ("CUDA", "No CUDA GPUs are available", ["no GPU that it can use: No CUDA GPUs are available", "nvidia-smi"]),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used(build: str, told: str, expected: list[str], has_driver: Callable[..., None]) -> None:
    """A GPU whose driver is there, and that PyTorch cannot use, is told of once, with the reason and the cure."""
    has_driver(build, told)
    (warning,) = warned()
    assert warning.startswith("training.device: ")
    assert all(words in warning for words in expected), warning
    assert warned(device="cpu") == []


def test_gpus_that_are_hidden(has_driver: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs that were hidden on purpose are not missed; a number that no GPU has is told."""
    has_driver("CUDA", "No CUDA GPUs are available")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert warned() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert "CUDA_VISIBLE_DEVICES=3 (GPUs are counted from 0)" in warned()[0]


def test_machines_without_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where nothing shows that there is a GPU, nothing is said."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.installed_gpu() is None
    assert warned() == []


@pytest.mark.parametrize(
    ("card", "precision", "is_slow"),
    [
        ("Tesla T4", "bf16", True),
        ("Tesla T4", "fp16", False),
        ("NVIDIA GeForce GTX 1080 Ti", "bf16", True),
        ("NVIDIA GeForce RTX 4090", "bf16", False),
    ],
)
def test_bf16_on_old_cards(card: str, precision: str, is_slow: bool, has_cards: HasCards) -> None:
    """Cards before compute capability 8.0 are for fp16."""
    has_cards(card)
    found = warned(CUDA, device="cuda", mixed_precision=precision)
    assert bool(found) == is_slow
    if found:
        assert found[0].startswith('training.mixed_precision: "bf16" is slow here')
        assert card in found[0]
        assert found[0].endswith('(use "fp16")')


@pytest.mark.parametrize(
    ("card", "shown"),
    [
        ("Tesla T4", "Tesla T4, 15 GB, fp16 (auto: compute capability 7.5, below 8.0)"),
        ("NVIDIA A100", "NVIDIA A100, 16 GB, bf16 (auto: compute capability 8.0)"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090, 24 GB, bf16 (auto: compute capability 8.9)"),
    ],
)
def test_automatic_precision_of_cards(
    card: str, shown: str, has_cards: HasCards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is bf16 on cards with units for it, whatever PyTorch says of emulation, and comes with its reason."""
    has_cards(card)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    found = precision_of(TrainingSection(), CUDA)
    assert device_summary(CUDA, str(found)) == shown
    assert warned(CUDA, device="cuda", mixed_precision=found.value) == []
    for value in ("no", "fp16", "bf16"):
        assert precision_of(TrainingSection(mixed_precision=value), CUDA) == Precision(value)


@pytest.mark.parametrize(
    ("architecture", "value"), [("gfx1100", "bf16"), ("gfx942:sramecc+:xnack-", "bf16"), ("gfx1030", "fp16")]
)
def test_automatic_precision_on_rocm(
    architecture: str, value: str, has_cards: HasCards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AMD's cards are known by their architecture."""
    has_cards("AMD Radeon", gcnArchName=architecture)
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    assert precision_of(TrainingSection(), CUDA) == Precision(value, architecture.partition(":")[0])


def test_automatic_precision_elsewhere() -> None:
    """It is float32 on CPUs, where there was no choice, and where half precision has not been tried."""
    assert str(precision_of(TrainingSection(), CPU)) == "float32"
    for kind in ("mps", "xpu"):
        told = f"float32 (auto: half precision has not been tried on {kind})"
        assert str(precision_of(TrainingSection(), torch.device(kind))) == told


@pytest.mark.parametrize(("architecture", "is_told"), [("gfx1100", True), ("gfx942:sramecc+:xnack-", False)])
def test_attention_on_rocm(
    architecture: str, is_told: bool, has_cards: HasCards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On AMD's cards for home use, the environment variable that fast attention may need is named, until it is set."""
    has_cards("AMD Radeon RX 7900 XTX", gcnArchName=architecture)
    monkeypatch.setattr(torch.version, "hip", "6.4.0")
    monkeypatch.delenv("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", raising=False)
    assert ["TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL=1" in own for own in warned(CUDA)] == [True] * is_told
    monkeypatch.setenv("TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL", "1")
    assert warned(CUDA) == []


NO_KERNELS = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be …"


@pytest.mark.parametrize(
    ("card", "cure"),
    [
        ("NVIDIA GeForce GTX 1080 Ti", "install a PyTorch for an older CUDA, such as 12.6: https"),
        ("NVIDIA GeForce RTX 5090", "install a newer PyTorch: https"),
    ],
)
def test_cards_without_kernels(card: str, cure: str, has_cards: HasCards, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that the build has no kernels for is told before anything is read, with both sides and the cure."""
    has_cards(card)

    def fails(*_: object, **__: object) -> None:
        raise torch.AcceleratorError(NO_KERNELS)

    monkeypatch.setattr(torch, "ones", fails)
    with pytest.raises(ConfigError) as caught:
        Distributed.init("auto")
    told = str(caught.value)
    capability = "{}.{}".format(*CARDS[card][0])
    assert f"has no kernels for {card} (compute capability {capability}), only for sm_75, sm_80, sm_90" in told
    assert cure in told
    assert "\n" not in told


@pytest.mark.parametrize(
    ("message", "kind", "told"),
    [
        (
            "CUDA error: all CUDA-capable devices are busy or unavailable",
            ConfigError,
            "busy or unavailable .another",
        ),
        ("CUDA error: out of memory", OutOfMemory, "cuda has no memory left before anything is read"),
    ],
)
def test_devices_that_others_hold(
    message: str, kind: type[Exception], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is full or held by another program is told as that."""

    def fails(*_: object, **__: object) -> None:
        raise torch.AcceleratorError(message)

    monkeypatch.setattr(torch, "ones", fails)
    with pytest.raises(kind, match=told):
        check_device(CUDA)


def test_a_device_that_works() -> None:
    """A device that computes is let through, and gives no warning of PyTorch's."""
    check_device(CPU)


def test_devices_by_name(has_cards: HasCards) -> None:
    """Names find the devices that are there, also by number."""
    assert find_device("cpu") == CPU
    has_cards("Tesla T4", 2)
    assert find_device("auto") == CUDA
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"""'cuda:2' is not available: there is only "cuda:0" and "cuda:1"$"""):
        find_device("cuda:2")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without an accelerator")
@pytest.mark.parametrize("name", ["cuda", "xpu", "mps", "cuda:0"])
def test_devices_that_the_build_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that this PyTorch was not built for is refused with where to get another."""
    monkeypatch.setattr(devices, "torch_build", lambda: TorchBuild(torch.__version__))
    told = f"training.device: '{name}' is not available: PyTorch {torch.__version__} was built without it "
    with pytest.raises(ConfigError) as caught:
        find_device(name)
    assert str(caught.value) == told + '(https://pytorch.org/get-started/locally/, or set "cpu")'


def test_windows_wants_another_triton(has_cards: HasCards, monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install for compiling on Windows is named as it is called there."""
    from lorakit.models.memory.compile import compile_unsupported_reason

    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert compile_unsupported_reason("inductor", CUDA) == "needs Triton: install the package triton"
    monkeypatch.setattr(sys, "platform", "win32")
    assert compile_unsupported_reason("inductor", CUDA) == "needs Triton: install the package triton-windows"
