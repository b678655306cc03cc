"""The host does not wait for the device inside a step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.training.prepare import prepare
from lorakit.training.runtime.distributed import Distributed
from lorakit.training.setup import build_run
from lorakit.training.step.autotune import compile_step
from tests.optimizers.test_elementwise import elementwise
from tests.training.conftest import MakeConfig

Sections = dict[str, Any]

READS = frozenset({"_local_scalar_dense", "equal", "masked_select", "nonzero", "unique_consecutive", "_unique2"})
"""Operations whose result depends on numbers that the host, or the allocator, has to know."""
METHODS = frozenset({Tensor.cpu, Tensor.numpy, Tensor.tolist})
"""What copies numbers to the host."""


class Waits(TorchDispatchMode):
    """Counts what the host would wait for, were the tensors on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._methods = _Methods(self.found)

    def __enter__(self) -> Waits:
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operation."""
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in READS or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of PyTorch."""
        if func in METHODS:
            self._found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def waits_of_a_step(make_config: MakeConfig, sections: Sections) -> Counter[str]:
    """What the third step of a run waits for."""
    run = build_run(prepare(make_config(**sections)), Distributed(torch.device("cpu")))
    forward_backward = compile_step(run)
    for step in run.schedule.steps_from(0, run.schedule.batches_from(0, run.loader)):
        batches = list(step.batches)  # prepared by another thread where there is a GPU
        with Waits() as waits:
            for batch in batches:
                forward_backward(batch)
                step.record(batch, run.loss)
            run.update(step)
            run.advance(step)
        if step.number == 3:
            return waits.found
    raise AssertionError("the run is too short")


def test_what_is_counted() -> None:
    """Reading a number, a list, or which elements there are."""
    x = torch.arange(4.0)
    with Waits() as waits:
        _ = x.sum().item(), bool(x[0] > 0), x.tolist(), x.cpu(), x.numpy(), x[x > 1], x[torch.tensor([1])], x + 1
    assert waits.found == {"_local_scalar_dense": 2, "tolist": 1, "cpu": 1, "numpy": 1, "index": 1}


@pytest.mark.parametrize("optimizer", [kind.name for kind in elementwise()])
def test_elementwise_optimizers(make_config: MakeConfig, optimizer: str) -> None:
    """No step waits, whichever of the optimizers that treat each number by itself it takes."""
    sections = {"optimizer": {"name": optimizer}, "training": {"mixed_precision": "bf16"}}
    assert waits_of_a_step(make_config, sections) == {}


WAYS: dict[str, Sections] = {
    "loss scaling": {"training": {"mixed_precision": "fp16"}},
    "steps that may be skipped": {"training": {"on_nonfinite": "skip"}},
    "both": {"training": {"mixed_precision": "fp16", "on_nonfinite": "skip"}},
    "DoRA, dropouts and convolutions": {
        "network": {"name": "c3lier", "dora": True, "dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1}
    },
    "an average and a largest norm": {"network": {"ema": 0.9, "scale_weight_norms": 1.0}},
    "other losses": {"loss": {"min_snr_gamma": 5.0, "type": "huber", "ip_noise_gamma": 0.1}},
    "recomputed": {"training": {"gradient_checkpointing": True}},
    "in fewer bits": {"training": {"int8_base": ["unet"], "nf4_base": ["text_encoder"]}},
    "several micro-batches": {"training": {"gradient_accumulation_steps": 2}},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(make_config: MakeConfig, way: str) -> None:
    """Nor does it with other settings."""
    assert waits_of_a_step(make_config, WAYS[way]) == {}
