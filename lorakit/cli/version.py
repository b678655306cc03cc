"""What every report of a bug needs: the versions, and the device that PyTorch computes on."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from lorakit._version import __version__


def about() -> str:
    """`lorakit 0.1.0, Python 3.11.7, PyTorch 2.13.0+cpu, no GPU (PyTorch was built without GPU support)`.

    PyTorch is imported only where it was built for a GPU, as that takes seconds.
    """
    return f"lorakit {__version__}, Python {platform.python_version()}, {_torch()}"


def _torch() -> str:
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "PyTorch is not installed"
    if not (_built_for_gpus() or sys.platform == "darwin"):
        return f"PyTorch {version}, no GPU (PyTorch was built without GPU support)"
    try:
        return f"PyTorch {version}, {_device()}"
    except Exception as error:  # a driver can raise anything
        return f"PyTorch {version}, which fails: {' '.join(str(error).split())}"


def _built_for_gpus() -> bool:
    """Whether the installed PyTorch has code for any GPU, as its file of versions says without being run."""
    spec = find_spec("torch")
    try:
        text = (Path(spec.origin or "").parent / "version.py").read_text(encoding="utf-8") if spec else ""
    except OSError:
        return True
    return bool(re.search(r"^(cuda|hip|xpu)\b[^=\n]*= *['\"]", text, re.MULTILINE)) or "cuda" not in text


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        names = {torch.cuda.get_device_name(index) for index in range(count)}
        what = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        return f"{f'{count} × ' if count > 1 else ''}{', '.join(sorted(names))}, {what}"
    if torch.backends.mps.is_available():
        return "an Apple GPU (mps)"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return str(torch.xpu.get_device_name(0))
    return "no GPU that PyTorch can use"
