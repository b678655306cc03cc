"""Which errors are a lack of memory, by class and by the words of those who report it."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from lorakit.errors import ModelError, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7."),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions."),
        torch.AcceleratorError("HIP error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.88 GB, other allocations: 1.02 MB)"),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("ncclUnhandledCudaError: a call failed.\nLast error:\nCuda failure 2 'out of memory'"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("unable to mmap 4265380512 bytes from file </models/sd.ckpt>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        OSError("The paging file is too small for this operation to complete. (os error 1455)"),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:60],
)  # fmt: skip
def test_forms_of_a_lack_of_memory(error: Exception) -> None:
    """The computer's, an accelerator's and a library's way to say it are all understood."""
    assert is_out_of_memory(error)


def test_what_the_cpu_says() -> None:
    """A tensor that is too large for any computer is refused in a form that is understood."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory", "/photos/CUDA out of memory/a.png"),
        RuntimeError("PytorchStreamReader failed reading file /home/me/CUDA out of memory/model.ckpt"),
        RuntimeError(r"cannot open C:\CUDA error: out of memory\model.ckpt"),
        RuntimeError("a caption: I ran out of memory today"),
        ModelError("out of memory.safetensors: can't allocate memory.txt"),
        ValueError("MPS backend out of memory"),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}"[:60],
)
def test_other_errors(error: Exception) -> None:
    """Errors of other kinds are not taken for it, whatever the names of files say."""
    assert not is_out_of_memory(error)
