"""How many operations a training step is, which is what a GPU pays for at batch size 1.

    python benchmarks/launches.py                     # SD 1.5 and SDXL, LierLa and C3Lier, bf16
    python benchmarks/launches.py --model sd15 --network lierla --kinds 20

The models have all layers of the real ones and are narrow, as the number of operations does not depend on the width.
Their files are float16, so that the weights are copied from them in each precision, as they are to a GPU.
Each is counted by PyTorch's dispatcher, views and allocations apart:

- `frozen`: the U-Net alone, forward and the gradient of its input backward.
- `lorakit`: a whole step of `lorakit.train`: batch, forward, backward, clipping, AdamW. The last of four.
- `peft`: PEFT's LoRA on the same layers of diffusers' U-Net, with clipping and AdamW, for the smaller network.

Bytes are those of all tensors that operations read and write. Host time is that of a step on these narrow tensors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from step import PEFT_TARGETS, prepare_files
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lorakit
from lorakit.api.observer import Observer
from lorakit.testing.models import TINY_SD1, TINY_SDXL, make_folder

MODELS = {"sd15": {**TINY_SD1, "unet": {**TINY_SD1["unet"], "layers_per_block": 2}}, "sdxl": TINY_SDXL}
NETWORKS = ("lierla", "c3lier")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16}
STEPS = 4

_VIEWS = """
    _reshape_alias _unsafe_view alias as_strided chunk detach detach_ expand lift_fresh permute reshape select slice
    split split_with_sizes squeeze t transpose unbind unsqueeze view view_as
"""
_ALLOCATIONS = "empty empty_like empty_strided new_empty new_empty_strided"
_QUESTIONS = "_local_scalar_dense is_pinned is_same_size record_stream"
_FREE = frozenset(f"{_VIEWS} {_ALLOCATIONS} {_QUESTIONS}".split())
"""Operations that launch no kernel."""


@define
class Count:
    """The operations of a step, by name, the bytes that they read and write, and the time that the host took."""

    operations: Counter[str] = field(factory=Counter)
    bytes: int = 0
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Operations of all kinds."""
        return self.operations.total()


class Counting(TorchDispatchMode):
    """Counts all operations inside it, views and allocations apart."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Count()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation, and count it."""
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _FREE:
            self.count.operations[name] += 1
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.count.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def counted(step: Callable[[], object]) -> Count:
    """The operations of a step, and its time without counting: the shortest of three, after one that allocates."""
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    with Counting() as counting:
        step()
    counting.count.seconds = min(times[1:])
    return counting.count


class StepCounter(Observer):
    """Counts the last step of a run; `count` is None until then."""

    def __init__(self, counts: bool = True) -> None:
        self._mode = Counting() if counts else None
        self._times: list[float] = []

    @property
    def count(self) -> Count:
        """What was counted, and the shortest time of a step."""
        count = self._mode.count if self._mode else Count()
        count.seconds = min(later - former for former, later in zip(self._times[1:], self._times[2:], strict=False))
        return count

    def step_finished(self, step: int) -> None:
        """Begin to count before the last step, and end behind it."""
        self._times.append(time.perf_counter())
        if self._mode and step == STEPS - 1:
            self._mode.__enter__()
        elif self._mode and step == STEPS:
            self._mode.__exit__(None, None, None)


def config_tables(folder: Path, precision: str, network: str = "lierla") -> dict[str, Any]:
    """The config of a run with the model in a folder."""
    conv = {"conv_rank": 4, "conv_alpha": 4.0} if network == "c3lier" else {}
    return {
        "model": {"path": str(folder)},
        "data": {"image_dir": str(folder.parent / "images"), "resolution": 64, "num_repeats": 100},
        "network": {"name": network, "rank": 4, "alpha": 4.0, "parts": ["unet"], **conv},
        "training": {"max_steps": STEPS, "mixed_precision": precision, "device": "cpu"},
        "output": {"dir": str(folder.parent / "out")},
    }


def lorakit_step(folder: Path, network: str, precision: str, **tables: Any) -> Count:
    """A step of `lorakit.train` with the model in a folder; `tables` are further ones of its config."""
    config = {**config_tables(folder, precision, network), **tables}
    counter, timer = StepCounter(), StepCounter(counts=False)
    for observer in (timer, counter):
        lorakit.train(config, observers=[observer])
    count = counter.count
    count.seconds = timer.count.seconds
    return count


def frozen_step(folder: Path, precision: str) -> Count:
    """Forward and input-gradient backward of lorakit's own U-Net, nothing adapted."""
    from lorakit.config.load import config_from_tables
    from lorakit.training.setup import load_model

    model = load_model(config_from_tables(config_tables(folder, precision), folder), torch.device("cpu"))
    latents, timesteps, conditioning = _inputs(folder, PRECISIONS[precision])

    def step() -> None:
        prediction = model.predict(latents.detach().requires_grad_(), timesteps, conditioning)
        prediction.float().square().mean().backward()

    return counted(step)


def peft_step(folder: Path, precision: str) -> Count:
    """A step of PEFT's LoRA on diffusers' U-Net, with clipping and AdamW."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    dtype = PRECISIONS[precision]
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=PEFT_TARGETS))
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    latents, timesteps, added = _inputs(folder, dtype)
    text = added.pop("hidden_states")

    def step() -> None:
        prediction = unet(latents, timesteps, text, added_cond_kwargs=added).sample
        prediction.float().square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return counted(step)


def _inputs(folder: Path, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents [1, 4, 8, 8], a timestep and what else the U-Net in a folder takes."""
    settings = json.loads((folder / "unet" / "config.json").read_text())
    conditioning = {"hidden_states": torch.randn(1, 77, settings["cross_attention_dim"], dtype=dtype)}
    if added := settings.get("projection_class_embeddings_input_dim"):
        conditioning["text_embeds"] = torch.randn(1, added - 6 * 256, dtype=dtype)
        conditioning["time_ids"] = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    return torch.randn(1, 4, 8, 8, dtype=dtype), torch.tensor([500]), conditioning


def prepare(work: Path, model: str) -> Path:
    """A folder with the narrow model, and an image beside it."""
    prepare_files(work)
    folder = work / model
    return folder if folder.exists() else make_folder(folder, MODELS[model], dtype="float16")


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="which models (all)")
    parser.add_argument("--network", choices=NETWORKS, action="append", help="which networks (all)")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--kinds", type=int, default=0, help="list this many of the most frequent operations")
    options = parser.parse_args()
    print("| model | step | operations | ÷ frozen | MB | ÷ frozen | host (ms) |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for model in options.model or MODELS:
            folder, precision = prepare(Path(work), model), options.precision
            counts = {"frozen": frozen_step(folder, precision)}
            for network in options.network or NETWORKS:
                counts[f"lorakit {network}"] = lorakit_step(folder, network, precision)
            counts["peft lierla"] = peft_step(folder, precision)
            _print_rows(model, counts, options.kinds)


def _print_rows(model: str, counts: Mapping[str, Count], kinds: int) -> None:
    frozen = counts["frozen"]
    for name, count in counts.items():
        print(
            f"| {model} | {name} | {count.total} | {count.total / frozen.total:.2f} | {count.bytes / 1e6:.0f} "
            f"| {count.bytes / frozen.bytes:.2f} | {1000 * count.seconds:.0f} |"
        )
    for name, count in counts.items() if kinds else ():
        print(f"\n{name}: " + ", ".join(f"{kind} {n}" for kind, n in count.operations.most_common(kinds)))


if __name__ == "__main__":
    main()
