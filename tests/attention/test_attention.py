from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.api.components import AttentionConfig
from lorakit.builtin.attention import EagerConfig, SdpaConfig
from lorakit.testing.contracts.attention import AttentionContract

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class Kernels(TorchDispatchMode):
    """Notes which operations are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def kernels_of(config: SdpaConfig, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[str]:
    """The operations that attention calls for queries, keys and values of a shape."""
    inputs = [torch.randn(shape, dtype=dtype, device=device) for _ in range(3)]
    with Kernels() as kernels:
        config.build()(*inputs)
    return kernels.names


@pytest.mark.parametrize("config", [SdpaConfig, EagerConfig])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_is_attention(config: type[AttentionConfig], dtype: torch.dtype, tolerance: float) -> None:
    """The result and its gradients are those of softmax(q·kᵀ/√d)·v in float64, in the inputs' dtype."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, tokens, 16).to(dtype).requires_grad_() for tokens in (10, 7, 7))
    result = config().build()(query, key, value)
    assert result.dtype == dtype
    assert result.shape == (2, 3, 10, 16)
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]
    expected = torch.softmax(exact[0] @ exact[1].mT / math.sqrt(16), -1) @ exact[2]
    grad = torch.randn_like(result)
    actual = (result, *torch.autograd.grad(result, (query, key, value), grad))
    for one, other in zip(actual, (expected, *torch.autograd.grad(expected, exact, grad.double())), strict=True):
        assert ((one.double() - other).norm() / other.norm()).item() < tolerance


@pytest.mark.parametrize("config", [SdpaConfig, EagerConfig])
@pytest.mark.parametrize("size", [120.0, 500.0])
def test_scores_do_not_overflow_in_fp16(config: type[AttentionConfig], size: float) -> None:
    """Scores near and above the top of float16 still give weights that add up to 1."""
    query = torch.full((1, 1, 2, 4), size, dtype=torch.float16)
    value = torch.ones(1, 1, 2, 4, dtype=torch.float16)
    assert torch.equal(config().build()(query, query, value), value)


def test_kernels_are_chosen() -> None:
    """The kernel that is named is used where the device has it, and none where it does not; nothing stays set."""
    fused, shape = "_scaled_dot_product_flash_attention_for_cpu", (1, 2, 8, 40)
    before = torch._C._get_sdp_priority_order(), torch.backends.cuda.flash_sdp_enabled()
    for kernels, expected in (((), True), (("flash",), True), (("math",), False), (("cudnn", "efficient"), False)):
        names = kernels_of(SdpaConfig(kernels=kernels), shape, torch.float32, "cpu")
        assert (fused in names) == expected
        assert (torch._C._get_sdp_priority_order(), torch.backends.cuda.flash_sdp_enabled()) == before


def test_chosen_kernels_are_compiled() -> None:
    """torch.compile takes them in one graph, with the same result."""
    attend = SdpaConfig(kernels=("flash", "efficient")).build()
    query, key, value = (torch.randn(1, 2, tokens, 40) for tokens in (8, 5, 5))
    try:
        compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(query, key, value)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(compiled, scaled_dot_product_attention(query, key, value))


@needs_cuda
@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("channels", [40, 64, 80, 160])
def test_kernels_on_cuda(kernel: str, channels: int) -> None:
    """Each kernel that is named alone is used for the head sizes of Stable Diffusion, if it takes them."""
    if kernel == "cudnn" and channels > 128:
        pytest.skip("cuDNN takes no such heads on all devices")
    config = SdpaConfig(kernels=(kernel,))
    names = kernels_of(config, (1, 8, 64, channels), torch.bfloat16, "cuda")
    assert any(kernel in name for name in names)


@needs_cuda
class TestOnCuda(AttentionContract):
    """Attention on a GPU, by whatever kernel PyTorch chooses."""

    config = SdpaConfig()
    device = "cuda"
    dtypes = (torch.float32, torch.float16, torch.bfloat16)


class TestCudnnOnCuda(TestOnCuda):
    """cuDNN's kernel where it takes the heads, and then the others."""

    config = SdpaConfig(kernels=("cudnn", "flash", "efficient"))


class TestFlashOnCuda(TestOnCuda):
    """The kernel of FlashAttention in half precision."""

    config = SdpaConfig(kernels=("flash", "efficient"))


class TestMathOnCuda(TestOnCuda):
    """No fused kernel."""

    config = SdpaConfig(kernels=("math",))
