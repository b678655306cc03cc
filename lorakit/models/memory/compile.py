"""Compiles a denoiser block by block with torch.compile.

Blocks of the same kind and size share what was compiled for the first of them, so that compiling
takes a fraction of what the whole denoiser would take.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

MAX_VARIANTS = 256
"""How often a kind of block may be compiled: for each size, with and without gradients, and so on."""


def compile_blocks(module: nn.Module, kinds: Sequence[type[nn.Module]], backend: str | None) -> None:
    """Let torch.compile compile the blocks of these kinds in a module, with all that is in them, on their first run.

    With None for the backend they run eagerly again.
    """
    blocks = [block for block in module.modules() if isinstance(block, tuple(kinds))]
    if backend is None:
        for block in blocks:
            block._compiled_call_impl = None
        return
    torch._dynamo.config.recompile_limit = MAX_VARIANTS
    torch._dynamo.config.accumulated_recompile_limit = 4 * MAX_VARIANTS
    for block in blocks:
        block.compile(backend=backend)


@contextmanager
def compilation_paused(compiles: bool) -> Iterator[None]:
    """Run what `compile_blocks` compiles eagerly for a while; `compiles` says whether there may be any of it."""
    # Not where nothing is compiled, as it imports the compiler.
    with torch.compiler.set_stance("force_eager") if compiles else nullcontext():
        yield


def compile_unsupported_reason(backend: str, device: torch.device) -> str:
    """Why a backend of torch.compile cannot be used on a device, as far as it shows beforehand; empty if it can."""
    from torch._dynamo.eval_frame import is_dynamo_supported

    if not is_dynamo_supported():
        return "cannot be used, because this PyTorch has no torch.compile on this system"
    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        known = ", ".join(torch._dynamo.list_backends())
        return f"must be a backend that this PyTorch has ({known}), not {backend!r}"
    if backend != "inductor":
        return ""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "needs a C++ compiler: install g++ or clang++, or name one in the environment variable CXX"
    elif device.type != "mps" and not has_triton():
        package = "triton-windows" if sys.platform == "win32" else "triton"
        return f"needs Triton: install the package {package}"
    return ""
