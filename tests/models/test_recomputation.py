"""Blocks that recompute: which, what that saves, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lorakit.models.memory.activation_checkpointing import (
    CheckpointedBlock,
    bytes_kept,
    checkpoint_blocks,
    checkpointed_blocks,
)
from tests.models.building import stable_diffusion


class Block(CheckpointedBlock):
    """Keeps as many tensors of the size of its input as it is told, and counts how often it runs."""

    def __init__(self, kept: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.kept, self.dropout, self.calls = kept, dropout, 0

    def forward(self, x: Tensor, *, factor: float = 1.0) -> tuple[Tensor]:
        """[B, 8] of [B, 8]."""
        self.calls += 1
        for _ in range(self.kept):
            x = (x * factor).exp().clamp(max=2)
        return (nn.functional.dropout(x, self.dropout) * self.weight,)


def step(blocks: list[Block], x: Tensor) -> list[Tensor]:
    """Loss and gradients of the blocks, one after the other."""
    torch.manual_seed(0)
    for block in blocks:
        (x,) = block(x, factor=0.5)
    loss = x.square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, [block.weight for block in blocks])]


def made(dropout: float = 0.0) -> list[Block]:
    """Six blocks, of which the fourth keeps the most, and then the second."""
    torch.manual_seed(0)
    return [Block(kept, dropout) for kept in (1, 4, 2, 8, 3, 2)]


@pytest.mark.parametrize(
    ("share", "chosen"),
    [(1.0, [0, 1, 2, 3, 4, 5]), (0.5, [1, 3, 4]), (0.4, [1, 3, 4]), (0.1, [3])],
)
def test_the_blocks_that_keep_the_most_recompute(share: float, chosen: list[int]) -> None:
    """After the first step only that share of the blocks, rounded up, runs twice in a step: those that keep most."""
    blocks, x = made(), torch.randn(4, 8)
    checkpoint_blocks(blocks, share)
    step(blocks, x)
    for block in blocks:
        block.calls = 0
    for _ in range(2):
        step(blocks, x)
    assert [index for index, block in enumerate(blocks) if block.calls == 4] == chosen
    assert all(block.calls == 2 for index, block in enumerate(blocks) if index not in chosen)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_nothing_else_changes(share: float) -> None:
    """Loss, gradients and random numbers drawn stay the same, bit for bit, in every step."""
    plain, recomputing, x = made(0.3), made(0.3), torch.randn(4, 8)
    checkpoint_blocks(recomputing, share)
    for _ in range(3):
        expected, state = step(plain, x), torch.get_rng_state()
        assert all(torch.equal(*pair) for pair in zip(step(recomputing, x), expected, strict=True))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_states_of_generators_are_kept_where_something_draws(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    """From the second step on they are read and put back in blocks that draw, as a plugin's may, and in no others."""
    blocks, x = made(), torch.randn(4, 8)
    blocks[2].dropout = dropout
    checkpoint_blocks(blocks)
    step(blocks, x)
    reads: list[object] = []
    read = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: reads.append(0) or read())
    step(blocks, x)
    assert len(reads) == (2 if dropout else 0)  # before the block runs, and before it runs again


def test_without_gradients_nothing_is_recomputed_or_chosen() -> None:
    """What is predicted for a preview runs once, and says nothing of what blocks keep."""
    blocks, x = made(), torch.randn(4, 8)
    checkpoint_blocks(blocks, 0.1)
    with torch.no_grad():
        for block in blocks:
            block(x)
    assert [block.calls for block in blocks] == [1] * 6
    for _ in range(2):
        step(blocks, x)
    assert [block.calls for block in blocks] == [5, 5, 5, 6, 5, 5]


def test_another_share() -> None:
    """Blocks that recompute may be told to recompute less, or all again."""
    blocks, x = made(), torch.randn(4, 8)
    for share, calls in ((1.0, 12), (0.1, 7), (0.5, 9), (1.0, 12)):
        checkpoint_blocks(blocks, share)
        step(blocks, x)
        for block in blocks:
            block.calls = 0
        step(blocks, x)
        assert sum(block.calls for block in blocks) == calls


def test_bytes_are_counted_once_and_without_what_is_there_anyway() -> None:
    """Of x, weight, two results and one of them seen twice, the two results count; random numbers are as before."""
    block, x = Block(0), torch.randn(4, 8, requires_grad=True)

    def run() -> Tensor:
        first = (x * block.weight).exp()  # keeps x, the weight and itself
        noise = torch.rand_like(first)  # kept for the gradient of `first`
        return first * noise + first.view(8, 4).square().view(4, 8)

    state = torch.get_rng_state()
    assert bytes_kept(block, run, (x, "text", None)) == 2 * x.nbytes
    assert torch.equal(torch.get_rng_state(), state)


def memory_of(run: Callable[[], Tensor]) -> int:
    """Bytes of all tensors that a function keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        _output = run()
    return sum(kept.values())


def test_a_unet_saves_most_where_it_keeps_most(tiny_sd1_file: Path) -> None:
    """A quarter of the U-Net's blocks saves more than a quarter of what all save, and all save more than half."""
    latents, times = torch.randn(1, 4, 16, 16, requires_grad=True), torch.tensor([5])
    texts = {"hidden_states": torch.randn(1, 77, 32)}
    kept = {}
    for share in (0.0, 0.25, 0.5, 1.0):
        model = stable_diffusion(tiny_sd1_file)
        if share:
            model.enable_gradient_checkpointing(share)
        for _ in range(2):
            kept[share] = memory_of(lambda model=model: model.predict(latents, times, texts))
    saved = {share: kept[0.0] - bytes_ for share, bytes_ in kept.items()}
    assert saved[0.25] > 0.35 * saved[1.0]
    assert saved[0.25] < saved[0.5] < saved[1.0]
    assert saved[1.0] > 0.5 * kept[0.0]


def test_blocks_of_a_unet(tiny_sd1_file: Path) -> None:
    """Blocks are the ResNet and transformer blocks of all levels and the middle, none inside another."""
    unet = stable_diffusion(tiny_sd1_file).denoiser
    names = {module: path for path, module in unet.named_modules()}
    paths = [names[block] for block in checkpointed_blocks(unet)]
    assert len(paths) == len(set(paths)) == 4 + 3 + 3 + 8 + 6
    assert {path.split(".")[0] for path in paths} == {"down_blocks", "mid_block", "up_blocks"}
    assert not any(one != other and one.startswith(f"{other}.") for one in paths for other in paths)
