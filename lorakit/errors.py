"""The errors that lorakit raises on purpose; each knows the exit status of the command that meets it.

Whatever a user can cause ends as one of these: a message that names the file or key, the cause and
the cure, and no traceback.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar

from attrs import frozen


@frozen
class Problem:
    """One thing that is wrong with a config: where, what, and what to do about it."""

    key: str
    """Path of the key, `network.rank`; with the file in front where it is not the config file itself."""
    message: str
    """What is wrong, as the end of a sentence that starts with the key: `must be at least 1, not 0`."""
    hint: str = ""
    """What to do about it, as a separate sentence; empty if the message is enough."""

    def __str__(self) -> str:
        text = f"{self.key}: {self.message}" if self.key else self.message
        return f"{text} ({self.hint})" if self.hint else text


class LorakitError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_status: ClassVar[int] = 1


class ConfigError(LorakitError):
    """The config cannot be used; holds every problem found in it, not only the first."""

    exit_status = 2

    def __init__(self, problems: Iterable[Problem], file: str = "") -> None:
        """`file` is the config file, if there is one."""
        self.problems = tuple(problems)
        self.file = file
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(LorakitError):
    """Images, captions or dataset folders that cannot be used; the message lists the files."""

    exit_status = 2


LISTED = 20
"""How many problems a message lists before it only counts them."""


def data_error(problems: Sequence[str]) -> DataError:
    """One error for all problems, each on its own line; the first 20 are listed."""
    if len(problems) == 1:
        return DataError(problems[0])
    lines = [f"{len(problems)} problems with the data:", *(f"  {problem}" for problem in problems[:LISTED])]
    if len(problems) > LISTED:
        lines.append(f"  … and {len(problems) - LISTED} more")
    return DataError("\n".join(lines))


class ModelError(LorakitError):
    """A base model that is missing, unreadable, unsafe to read, or of another family than asked for."""

    exit_status = 2


class PluginError(LorakitError):
    """A component that is not there: unknown name, broken plugin, clash of names, missing package."""

    exit_status = 2


class AdapterError(LorakitError):
    """A LoRA file that cannot be read or does not fit the network it is loaded into."""

    exit_status = 2


class OutputError(LorakitError):
    """A file or folder that cannot be written."""

    exit_status = 2


class NotSaved(LorakitError):
    """Results of a run could not be written to their place; the message says what was saved, and where."""


class TrainingDiverged(LorakitError):
    """The loss became NaN or infinite; the message names the step, the images and the cure."""


class OutOfMemory(LorakitError):
    """The memory of the computer or of an accelerator was not enough; the message says what for, and what to change."""


class Interrupted(LorakitError):
    """Stopped on request, by Ctrl-C, SIGTERM or a program, after a whole state was saved."""

    exit_status = 130

    def __init__(self, message: str = "", state: Path | None = None, is_found: bool = True) -> None:
        """`state` is the state's folder, None in processes that save none; `is_found`: whether --resume finds it."""
        super().__init__(message)
        self.state = state
        self.is_found = is_found


_OUT_OF_MEMORY = re.compile(
    r"""(?<![\w/\\])(?:                                        # not within a path
    (?:CUDA|HIP|XPU|MPS\ backend)\ out\ of\ memory
    | (?:CUDA|HIP)(?:\ driver)?\ error:\ out\ of\ memory      # pinned memory, graphs, the driver
    | Triton\ Error\ \[\w+\]:\ out\ of\ memory
    | Cuda\ failure(?:\ \d+)?\ 'out\ of\ memory'             # NCCL
    | CUDA_ERROR_OUT_OF_MEMORY | Cannot\ allocate\ memory\ \(12\)
    | \w+_STATUS_(?:\w+_)?ALLOC(?:ATION)?_FAILED              # cuBLAS, cuDNN, hipBLAS and the like
    | rocblas_status_memory_error | miopenStatusAllocFailed
    | \w+_ERROR_OUT_OF_(?:DEVICE|HOST)_MEMORY                 # Level Zero, of Intel's GPUs
    | DefaultCPUAllocator:\ (?:can't\ allocate|not\ enough)\ memory
    )""",
    re.VERBOSE,
)
"""What PyTorch's allocators and the libraries below it say, in errors of no class for it."""

_NO_MEMORY_TO_MAP = re.compile(r"\(os error (?:12|1455)\)$")
"""How safetensors ends where a file cannot be mapped; 1455 is Windows' paging file that is too small."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of the computer or of an accelerator was not enough, as Python or PyTorch says it."""
    names = {ancestor.__name__ for ancestor in type(error).__mro__}
    if {"MemoryError", "OutOfMemoryError"} & names:
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or bool(_NO_MEMORY_TO_MAP.search(str(error)))
    # Other errors quote what users write: paths and captions, in which any words may be.
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))
