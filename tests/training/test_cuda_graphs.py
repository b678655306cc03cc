"""Replayed micro-batches: the sums of calling the function each time, bit for bit, and when nothing is replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import nn

from lorakit.data.loader import Batch
from lorakit.networks.flat_parameters import FlatParameters
from lorakit.networks.network import ParameterGroup
from lorakit.training.loop import train
from lorakit.training.prepare import prepare
from lorakit.training.run import Run
from lorakit.training.run_handle import RunHandle
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run
from lorakit.training.step import cuda_graphs
from lorakit.training.step.autotune import compile_step
from lorakit.training.step.cuda_graphs import WARM_UPS, CudaGraphStep, GraphMemory
from lorakit.training.step.gradients import FlatGradients

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


class Toy:
    """A weight that is trained on micro-batches, and what has been added up."""

    def __init__(self, device: str = "cpu") -> None:
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4, device=device))
        self.gradients = FlatGradients(FlatParameters([ParameterGroup("toy", "unet", (self.weight,), 1e-3)]))
        self.loss = torch.zeros((), device=device)
        self.calls: list[Batch] = []

    def learn(self, batch: Batch) -> None:
        """Add loss and gradients, which depend on latents, weights, timesteps, caption and mask."""
        self.calls.append(batch)
        assert batch.conditioning is not None
        scaled = batch.latents * self.weight[:, None, None] * batch.timesteps[:, None, None, None]
        per_image = batch.masked(scaled).square().mean((1, 2, 3)) + batch.conditioning["states"].mean((1, 2))
        loss = (per_image * batch.weights * self.weight.mean()).mean()
        torch.autograd.backward(loss)
        self.loss += loss.detach()

    def replayed(
        self, learn: Callable[[Batch], None] | None = None, graphs: type[CudaGraphStep] = CudaGraphStep
    ) -> CudaGraphStep:
        """What this learns, replayed."""
        return graphs(learn or self.learn, (self.gradients.buffer, self.loss), (self.weight,))

    @property
    def sums(self) -> torch.Tensor:
        """Gradients and loss."""
        return torch.cat([self.gradients.buffer, self.loss.view(1)]).cpu()


def batch(number: int, images: int = 2, width: int = 3, masked: bool = False, device: str = "cpu") -> Batch:
    """A micro-batch of random numbers, on the device."""
    generator = torch.Generator().manual_seed(number)
    latents = torch.randn(images, 4, 2, width, generator=generator)
    return Batch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=generator),
        timesteps=torch.randint(1, 9, (images,), generator=generator),
        weights=torch.rand(images, generator=generator),
        sample_seeds=torch.arange(images),
        conditioning={"states": torch.randn(images, 5, 6, generator=generator)},
        tokens=None,
        images=(f"{number}.png",) * images,
        share=1.0,
        loss_mask=torch.rand(images, 1, 2, width, generator=generator) if masked else None,
    ).to(torch.device(device))


MIXED = [batch(0), batch(1, width=5), batch(2), batch(3, images=1), batch(4, masked=True), batch(5), batch(6, width=5)]


def replayed_as_called(graphs: type[CudaGraphStep] = CudaGraphStep) -> tuple[Toy, CudaGraphStep]:
    """What learns from all of them by graphs, and these; the sums are those of calling."""
    called, other = Toy(), Toy()
    replayed = other.replayed(graphs=graphs)
    for own in MIXED:
        called.learn(own)
        replayed(own)
    assert torch.equal(called.sums, other.sums)
    return other, replayed


@pytest.mark.parametrize("device", DEVICES)
def test_replaying_is_calling(device: str) -> None:
    """Over micro-batches of several shapes in any order, with updates between, the sums are those of calling."""
    called, other = Toy(device), Toy(device)
    replayed = other.replayed()
    for number, own in enumerate(MIXED):
        called.learn(own.to(torch.device(device)))
        replayed(own.to(torch.device(device)))
        assert torch.equal(called.sums, other.sums) or device == "cuda"
        torch.testing.assert_close(called.sums, other.sums)
        assert called.sums.any()
        if number == 3:
            for toy in (called, other):
                toy.weight.data.sub_(toy.weight.grad, alpha=0.1)
                toy.gradients.zero()
                toy.loss.zero_()


def test_recordings_are_made_once_for_each_shape() -> None:
    """Of each shape one micro-batch is copied, worked on to warm up, and worked on for each of that shape."""
    toy = Toy()
    replayed = toy.replayed()
    for own in MIXED:
        replayed(own)
    shapes = 4
    assert len(toy.calls) == WARM_UPS * shapes + len(MIXED)
    assert len({own.latents.data_ptr() for own in toy.calls}) == shapes
    assert not {own.latents.data_ptr() for own in toy.calls} & {own.latents.data_ptr() for own in MIXED}


def test_micro_batches_stay_as_they_are() -> None:
    """What is handed over is not changed, and may be changed afterwards."""
    toy, own = Toy(), batch(0)
    replayed, before = toy.replayed(), own.clone()
    replayed(own)
    replayed(batch(1))
    assert all(torch.equal(now, old) for now, old in zip(own.tensors.values(), before.tensors.values(), strict=True))
    own.latents.zero_()
    first = toy.sums
    replayed(before)
    expected = Toy()
    for each in (before, batch(1), before):
        expected.learn(each)
    assert torch.equal(toy.sums, expected.sums)
    assert not torch.equal(toy.sums, first)


@pytest.mark.parametrize("device", DEVICES)
def test_what_draws_is_called(device: str, caplog: pytest.LogCaptureFixture) -> None:
    """A function that draws from PyTorch's generator is called as usual, with the draws that it would have had."""
    called, other = Toy(device), Toy(device)

    def drawing(toy: Toy) -> Callable[[Batch], None]:
        return lambda own: toy.learn(evolve(own, weights=torch.rand_like(own.weights)))

    torch.manual_seed(3)
    for number in range(3):
        drawing(called)(batch(number, device=device))
    torch.manual_seed(3)
    replayed = other.replayed(drawing(other))
    for number in range(3):
        replayed(batch(number, device=device))
    assert torch.equal(called.sums, other.sums)
    assert caplog.text.count("something draws from a random generator") == 1


class Refusing(CudaGraphStep):
    """Cannot capture."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Fail when the work has been begun, as a CUDA graph does."""
        work()
        raise RuntimeError("operation not permitted\nwhen stream is capturing")


def test_what_cannot_be_recorded_is_called(caplog: pytest.LogCaptureFixture) -> None:
    """A recording that fails is told of, with its reason, and none is tried again; the sums are right."""
    other, _ = replayed_as_called(Refusing)
    assert len(other.calls) == WARM_UPS + 1 + len(MIXED)
    assert "2 × 4 × 2 × 3 cannot be captured: operation not permitted when stream is capturing" in caplog.text


def test_a_capture_that_fails_leaves_those_before_it(caplog: pytest.LogCaptureFixture) -> None:
    """Shapes that are captured stay so when another cannot be; no further shape is tried."""

    class RefusingLater(Refusing):
        def capture(self, work: Callable[[], None]) -> Callable[[], None]:
            return super().capture(work) if self._graphs else work

    other, _ = replayed_as_called(RefusingLater)
    assert len(other.calls) == WARM_UPS + WARM_UPS + 1 + len(MIXED)
    assert caplog.text.count("cannot be captured") == 1


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7."),
    torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
]
"""What a full GPU says, by the layer that says it."""


@pytest.mark.parametrize("stage", ["warm_up", "capture"])
@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:40])
def test_memory_that_does_not_suffice(error: RuntimeError, stage: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where memory runs out for a second shape, all goes on without graphs, with the right sums; it is told once."""

    class Full(CudaGraphStep):
        """Has room for one graph."""

    def fails(self: CudaGraphStep, work: Callable[[], None]) -> Callable[[], None] | None:
        if self._graphs:
            work()
            raise error
        return getattr(CudaGraphStep, stage)(self, work)

    setattr(Full, stage, fails)
    other, replayed = replayed_as_called(Full)
    assert not replayed._graphs
    assert len(other.calls) == WARM_UPS + (1 if stage == "warm_up" else WARM_UPS + 1) + len(MIXED)
    (record,) = caplog.records
    told = "memory does not suffice to capture micro-batches of 2 × 4 × 2 × 5, so CUDA graphs are disabled"
    assert record.getMessage() == f"training.cuda_graphs: {told}"


def test_other_errors_of_a_warm_up_are_raised() -> None:
    """What would fail without graphs, too, is no reason to do without them."""
    toy = Toy()

    def broken(_: Batch) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        toy.replayed(broken)(batch(0))


@pytest.mark.parametrize("masked", [False, True])
def test_the_largest_shape_is_captured_first(masked: bool) -> None:
    """Of a run's shapes the largest is captured before any other, though the first micro-batch is smaller."""
    called, other = Toy(), Toy()
    replayed = CudaGraphStep(other.learn, (other.gradients.buffer, other.loss), (other.weight,), (3, 4, 2, 5))
    batches = [batch(number, images, width, masked) for number, (images, width) in enumerate([(2, 3), (3, 5), (1, 5)])]
    for own in batches:
        called.learn(own)
        replayed(own)
    assert torch.equal(called.sums, other.sums)
    sizes = [tuple(captured.latents.shape) for captured, _ in replayed._graphs.values()]
    assert sizes == [(3, 4, 2, 5), (2, 4, 2, 3), (1, 4, 2, 5)]
    assert len(other.calls) == WARM_UPS * 3 + len(batches)


def test_resized_batches() -> None:
    """A micro-batch of another shape has all tensors that it would have, in the shapes that it would have."""
    own = evolve(batch(0, masked=True), perturbation=torch.ones(2, 4, 2, 3))
    other = evolve(batch(1, images=3, width=7, masked=True), perturbation=torch.ones(3, 4, 2, 7))
    found = own.resized(other.latents.shape)
    assert [(key, tensor.shape, tensor.dtype) for key, tensor in found.tensors.items()] == [
        (key, tensor.shape, tensor.dtype) for key, tensor in other.tensors.items()
    ]
    assert found.images == own.images[:1] * 3


class Pools:
    """How often the memory pool of graphs is used, as CUDA's allocator counts it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uses = 0
        self.is_open = False
        self.sizes: list[int] = []
        stream = SimpleNamespace(device="cuda", wait_stream=lambda _: None)
        known = {"begin": "beginAllocateCurrentStreamToPool", "end": "endAllocateToPool", "release": "releasePool"}
        for name, function in known.items():
            monkeypatch.setattr(torch._C, f"_cuda_{function}", getattr(self, name), raising=False)
        monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: self.capturing())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
        monkeypatch.setattr(torch.cuda, "memory_snapshot", self.snapshot)

    def snapshot(self, pool: tuple[int, int]) -> list[dict[str, Any]]:
        """The segments of the pool: one, with a block for each tensor, and a free one."""
        assert pool == (0, 1)
        used = [{"size": size, "state": "active_allocated"} for size in self.sizes]
        return [{"blocks": [*used, {"size": 512, "state": "inactive"}]}]

    def begin(self, device: int, pool: tuple[int, int]) -> None:
        """Count a use, and take what is allocated."""
        assert (device, pool) == (1, (0, 1))
        assert not self.is_open, "beginAllocateToPool: already recording to mempool_id"
        self.uses, self.is_open = self.uses + 1, True

    def end(self, *_: object) -> None:
        """Take no more."""
        if not self.is_open:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.is_open = False

    def release(self, *_: object) -> None:
        """Count a use no more."""
        assert self.uses
        self.uses -= 1

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """A capture, which ends its use of the pool only where it succeeds."""
        self.begin(1, (0, 1))
        yield
        self.end()


def test_uses_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each use of the pool ends, also where work or a capture fails, but for that of the graphs that are there."""
    pools = Pools(monkeypatch)
    memory = GraphMemory(torch.device("cuda", 1))

    def fails() -> None:
        assert pools.is_open
        raise RuntimeError("CUDA out of memory")

    def warm_up(work: Callable[[], None]) -> None:
        with memory.allocating():
            work()

    with memory.held():
        warm_up(lambda: None)
        assert (pools.uses, pools.is_open) == (1, False)
        memory.capture(lambda: None)
    assert (pools.uses, pools.is_open) == (1, False)  # that of the graph
    for attempt in (warm_up, memory.capture):
        with pytest.raises(RuntimeError, match="out of memory"), memory.held():
            attempt(fails)
        assert (pools.uses, pools.is_open) == (1, False)


def test_tensors_that_stay_in_the_pool(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What a first shape leaves in the pool no graph uses; what a later one leaves, graphs would overwrite."""
    pools, toy, called = Pools(monkeypatch), Toy(), Toy()
    replayed = toy.replayed()
    replayed._memory = GraphMemory(torch.device("cuda", 1))
    seen: set[torch.Size] = set()

    def keeps(own: Batch) -> None:
        toy.learn(own)
        if pools.is_open and own.latents.shape not in seen:  # a table for each shape
            seen.add(own.latents.shape)
            pools.sizes.append(512)

    replayed._forward_backward = keeps
    monkeypatch.setattr(replayed, "capture", lambda work: work)
    for number, width in enumerate((3, 3, 5, 3)):
        called.learn(batch(number, width=width))
        replayed(batch(number, width=width))
        assert len(replayed._graphs) == (number < 2)
        assert pools.uses == 0
    assert torch.equal(called.sums, toy.sums)
    (record,) = caplog.records
    assert "micro-batches of 2 × 4 × 2 × 5 leave tensors in the graphs' memory" in record.getMessage()


def test_moved_weights_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    """Where an optimizer puts new tensors in the place of weights, nothing is replayed with the old ones."""
    called, other = Toy(), Toy()
    replayed = other.replayed()
    for number in range(3):
        called.learn(batch(number))
        replayed(batch(number))
        for toy in (called, other):
            toy.weight.data = toy.weight.data * 0.5
    assert torch.equal(called.sums, other.sums)
    assert caplog.text.count("parameters were reallocated") == 1


def test_shapes_beyond_the_most_are_called(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Only so many shapes are recorded; micro-batches of others are computed, and the log says so once."""
    monkeypatch.setattr(cuda_graphs, "MAX_SHAPES", 2)
    other, _ = replayed_as_called()
    assert len(other.calls) == WARM_UPS * 2 + len(MIXED)
    assert caplog.text.count("of 2 shapes are captured") == 1


VARIED = {
    "network": {"name": "c3lier", "dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2, "dora": True},
    "training": {"max_steps": 3, "gradient_accumulation_steps": 3, "gradient_checkpointing": 0.5},
    "loss": {"min_snr_gamma": 5.0, "ip_noise_gamma": 0.1, "type": "huber"},
    "data": {"batch_size": 2, "resolution": 96, "enable_bucket": True, "bucket_reso_steps": 32, "min_bucket_reso": 64},
}
"""A run with all that changes from step to step: sizes, dropouts, the text encoder, kinds of noise."""


def trained(make_config, device: str, replays: bool, **changes: object) -> Run:
    """A run that has been trained, in the mode that replays or not."""
    sections = {**VARIED, "training": {**VARIED["training"], "device": device, **changes}}
    run = build_run(prepare(make_config(**sections)), Distributed(torch.device(device)))
    run.config = evolve(run.config, training=evolve(run.config.training, cuda_graphs=replays))
    assert isinstance(compile_step(run), CudaGraphStep) == replays
    train(RunHandle(run))
    return run


@pytest.mark.usefixtures("lorakit_one_thread")
def test_a_replayed_run(make_config, caplog: pytest.LogCaptureFixture) -> None:
    """A run whose micro-batches are replayed trains the same factors as one whose are not, bit for bit."""
    plain, replayed = (trained(make_config, "cpu", replays).network.adapter_state() for replays in (False, True))
    assert all(torch.equal(plain[key], replayed[key]) for key in plain)
    assert "training.cuda_graphs" not in caplog.text


@needs_cuda
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_replayed_run_on_cuda(make_config, precision: str, compiles: bool, caplog: pytest.LogCaptureFixture) -> None:
    """CUDA graphs train the same factors as the same kernels called one by one, nearly, and all shapes are recorded."""
    changes = {"mixed_precision": precision, "compile": compiles}
    plain, replayed = (
        trained(make_config, "cuda", replays, **changes).network.adapter_state() for replays in (False, True)
    )
    for key, tensor in plain.items():
        torch.testing.assert_close(replayed[key], tensor, rtol=0.02, atol=2e-4)
    assert "training.cuda_graphs" not in caplog.text
