"""Files as an attacker would make them, and the command line run in this process."""

from __future__ import annotations

import json
import os
import pickle
import signal
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lorakit.__main__ import main


class Outcome(NamedTuple):
    """How a command ended."""

    status: int
    said: str
    """Its standard error."""


class MakesFolder:
    """Something whose pickle makes a folder when it is loaded by a reader that believes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.folder),))


def evil_bytes(trace: Path, form: str = "zip") -> bytes:
    """A PyTorch file, of the archive or the legacy form, or a bare pickle, that makes the folder `trace` when run."""
    if form == "bare":
        return pickle.dumps(MakesFolder(trace))
    path = trace.with_name(f"evil.{form}")
    content = {"lora_unet_x.lora_up.weight": torch.zeros(1), "state_dict": {"w": MakesFolder(trace)}}
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    content_bytes = path.read_bytes()
    path.unlink()
    return content_bytes


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, honest about its length unless told otherwise."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def run_command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Outcome:
    """Run `lorakit ARGUMENTS` in this process."""
    before = sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["lorakit", *map(str, arguments)]
    try:
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Outcome(status, capsys.readouterr().err)
